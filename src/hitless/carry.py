"""How apply carries what :mod:`hitless.layout.answers` says it can, and what bars it: pure, so that CI can ask."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping

import msgspec

from hitless.layout.answers import answer
from hitless.layout.btf_writer import write_btf
from hitless.layout.conversion import Move, leaves
from hitless.layout.diff import Change, MapDiff, diff_inner, diff_map, sources_of
from hitless.layout.members import holds_object, holds_special, lock_offset
from hitless.layout.model import MapSpec
from hitless.layout.rules import FieldRule, MapRules, inner_rules, inner_spec
from hitless.layout.variables import Pair, Part, SectionDiff, make_part

__all__ = [
    "CGROUP_STORAGE", "ITERATE_HASH", "VISITED", "SectionWay", "Way", "converts", "emptied", "fold_obstacles",
    "folded", "is_global", "is_split", "losses", "mirrored", "obstacle", "refusals", "section_way", "translated",
    "visiting", "way",
]  # fmt: skip

#: Storage that the kernel gives a program when it is attached to a cgroup, and that an update of the link leaves to its
#: successor as it is, whatever map and layout that one has: too small, it is overrun; absent, its use is a crash.
CGROUP_STORAGE = ("cgroup_storage", "percpu_cgroup_storage")

ITERATE_HASH = "iter/bpf_map_elem"
"""A feature of the kernel: a program of ours can be run for each entry of a hash."""

_PROGRAMS_BARRED = 1 << 7 | 1 << 8  # BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG
# Types of which one can become the other: (old, new).
_ALIKE = {
    ("hash", "lru_hash"), ("lru_hash", "hash"), ("array", "hash"),
    ("percpu_hash", "lru_percpu_hash"), ("lru_percpu_hash", "percpu_hash"), ("percpu_array", "percpu_hash"),
}  # fmt: skip
_ITERATED = ("hash", "lru_hash")
_FOLDING = ("hash", "lru_hash")  # types of maps of which several entries may become one
_MAX_REACH = 32_000  # bytes: an instruction reaches 32767 from a pointer
_MAX_SOCKET_KEY = 400  # bytes: it has to go on a program's stack
_MAX_STORAGE = 8192  # bytes of a value of local storage: an iterator puts out two of them at a time, in 32 KB
_SEEN = {
    "task_storage": "; only tasks of this process's PID namespace are seen",
    "cgrp_storage": "; only cgroups of this process's cgroup namespace are seen",
}
_MAX_WORDS = 2000  # what surely fits one merge program: its jumps reach 32767 instructions


def is_global(name: str) -> bool:
    """Whether a map of this name holds an object's global variables."""
    return "." in name  # which no C identifier has


class Way(msgspec.Struct, frozen=True):
    """How the contents of a map are carried: the ``kind`` of carrier, its ``method`` and ``exactness`` in words."""

    kind: str
    method: str
    exactness: str = "exact"


#: Kinds whose contents only a program can visit, so that the kernel must have an iterator over them.
VISITED = ("storage", "sockets")


#: Kinds of carriers whose maps are emptied when they are filled once more, on the way back.
_EMPTIED = ("entries", "inner-maps", "queue", "references", "storage")


def emptied(kind: str) -> bool:
    """Whether a map of type ``kind`` that is left of the last release is emptied before a rollback fills it.

    Sockets stay in a sockmap or sockhash: those that are in there were added under the programs of that release, which
    serve them by that map until they close. What a reader has not taken from a ring buffer is his.
    """
    return answer(kind).kind in _EMPTIED


def visiting(kind: str) -> str:
    """Name of the feature that maps of type ``kind`` need, if they are of a kind that has to be visited."""
    return f"visit/{kind}"


def way(old: MapSpec, new: MapSpec, rules: MapRules, features: Container[str]) -> Way | str:
    """How ``old`` becomes ``new`` on a kernel with ``features``, or why this version cannot."""
    found = obstacle(old, new, rules)
    if found is not None:
        return found
    if answer(new.type).kind in VISITED and visiting(new.type) not in features:
        return f"this kernel, or this process's rights, let no program visit what a {new.type} map holds"
    return _WAYS[answer(new.type).kind](old, new, rules, features)


def _entries(old: MapSpec, new: MapSpec, rules: MapRules, features: Container[str]) -> Way:
    exactness = _exactness(new, rules)
    if ITERATE_HASH in features and old.type in _ITERATED and new.type in _ITERATED and _in_kernel(old, new, rules):
        return Way("entries-in-kernel", "copy and merge in the kernel", exactness)
    return Way("entries", "batch copy, merge in the kernel", exactness)


def _in_kernel(old: MapSpec, new: MapSpec, rules: MapRules) -> bool:
    if any(spec.value is None or lock_offset(spec.value) is not None for spec in (old, new)):
        return False
    diff = diff_map(old, new, rules)
    if diff.value is None and new.value is not None and holds_object(new.value):
        return False  # a program may not read the whole value; a conversion leaves those bytes out
    return all(conversion is None or conversion.in_kernel for conversion in (diff.key, diff.value))


def _queue(_old: MapSpec, _new: MapSpec, _rules: MapRules, _features: Container[str]) -> Way:
    return Way(
        "queue",
        "moved in the kernel after the cutover",
        "exact: none lost, none twice, in order; but between cutover and catch-up the new release finds it empty, and "
        "what it pushes while elements are being moved may come among them",
    )


def _ring(_old: MapSpec, _new: MapSpec, _rules: MapRules, _features: Container[str]) -> Way:
    return Way(
        "ring",
        "its readers drain the old one",
        "exact for readers that hold the old one; it stays in previous/ until the upgrade after this one",
    )


def _references(_old: MapSpec, _new: MapSpec, _rules: MapRules, _features: Container[str]) -> Way:
    return Way(
        "references",
        "single calls",
        "exact; devices are looked for in the network namespace of this process, and an entry keeps its program until "
        "who wrote it writes it again",
    )


def _storage(_old: MapSpec, new: MapSpec, rules: MapRules, _features: Container[str]) -> Way:
    return Way("storage", "merge in the kernel, owner by owner", _exactness(new, rules) + _SEEN.get(new.type, ""))


def _sockets(_old: MapSpec, _new: MapSpec, _rules: MapRules, _features: Container[str]) -> Way:
    exactness = (
        "exact; a socket keeps the programs that it was added under, and one that has some is refused once the new map "
        "has some too: it stays in the old map until it closes"
    )
    return Way("sockets", "added to the new map, and kept in the old one", exactness)


def _inner_maps(old: MapSpec, new: MapSpec, rules: MapRules, _features: Container[str]) -> Way:
    found = _way_of_inner(old, new, rules)
    if found is None:
        return Way("inner-maps", "a new outer map with the same inner maps")
    assert isinstance(found, Way)  # an obstacle of theirs is one of the outer map
    return Way("inner-maps", f"a new map for each inner map ({found.method})", found.exactness)


_WAYS: dict[str, Callable[[MapSpec, MapSpec, MapRules, Container[str]], Way]] = {
    "entries": _entries,
    "queue": _queue,
    "ring": _ring,
    "references": _references,
    "storage": _storage,
    "sockets": _sockets,
    "inner-maps": _inner_maps,
}


def converts(diff: MapDiff, rules: MapRules) -> bool:
    """Whether the map's entries are for the user's converter: where no layout changed, there is nothing to convert."""
    if diff.parts:
        parts = zip(sources_of(diff), diff.parts, strict=True)
        return any(converts(part, rules.sources[was]) for was, part in parts)
    return rules.convert is not None and diff.verdict in ("lossless", "lossy", "needs-converter")


def refusals(diff: MapDiff, new: MapSpec, rules: MapRules) -> tuple[str, ...]:
    """Why the rules of the manifest cannot carry this map, although it could be read and written."""
    if _folds(diff, rules) and new.type not in _FOLDING:
        return (f"keys of a {new.type} map of which two may become one are not supported yet",)
    if is_split(diff) and (refused := _split_refusal(diff, new, rules)):
        return (refused,)
    if not converts(diff, rules):
        return ()
    if answer(new.type).kind not in ("", "entries"):
        return (f"converters for maps of type {new.type} are not supported yet",)
    module, _, name = (rules.convert or "").partition(":")
    if rules.function() is None:  # a manifest's rule always has it, so that this is the way back
        return (f"{module}.py has no function {name}_back, which would convert them back",)
    missing = f"; {module}.py has no function {name}_key, which would convert the key"
    return tuple(
        f"{change.reason}{missing if change.path else ''}"
        for change in diff.changes
        if change.reason and not _answers(change, diff, rules)
    )


def is_split(diff: MapDiff) -> bool:
    """Whether the old map has several heirs, of which this is one."""
    return any(change.kind == "split" for change in diff.changes)


def _split_refusal(diff: MapDiff, new: MapSpec, rules: MapRules) -> str | None:
    if rules.apart and rules.function() is None:
        missing = f"no function {rules.convert.partition(':')[2]}_back" if rules.convert else "no converter"
        return f"only a function can tell which entries of {diff.was} were of {new.name}, and there is {missing}"
    if answer(new.type).kind != "entries":
        return f"splitting a map of type {new.type} is not supported yet"
    if rules.function() is not None and ("array" in new.type or "percpu" in new.type):
        return f"selecting entries for a map of type {new.type} is not supported yet: leave out convert, or take a hash"
    return None


def fold_obstacles(diff: MapDiff, old: Mapping[str, MapSpec], new: MapSpec, rules: MapRules) -> tuple[str, ...]:
    """Why the maps of ``diff.parts`` cannot be folded into one; ``old`` has them by name, ``rules`` are the map's."""
    if new.type not in _FOLDING:
        return (f"folding several maps into one of type {new.type} is not supported yet",)
    out = []
    for source, part in zip(sources_of(diff), diff.parts, strict=True):
        own = rules.sources[source]
        found = [*refusals(part, new, own)]
        if part.verdict not in ("lossless", "lossy") and not converts(part, own):
            found += [change.reason for change in part.changes if change.reason] or [part.verdict]
        elif missing := obstacle(old[source], new, own):
            found.append(missing)
        elif rules.on_collision == "merge":
            found += _wins_by_absence(part, new, own)
        out += [f"{source}: {reason}" for reason in found]
    return tuple(dict.fromkeys(out))


def _wins_by_absence(part: MapDiff, new: MapSpec, rules: MapRules) -> list[str]:
    """Fields that the old map lacks, and that its entries would set to 0 where they meet those of another."""
    if part.value is None or new.value is None or rules.convert is not None:
        return []
    reached = part.value.written()
    return [
        f"it has no {leaf.path}, whose policy is {leaf.merge}, so that 0 would come of it: give it a converter"
        for leaf in leaves(new.value, rules, new.tags)
        if (leaf.merge == "min" or (leaf.merge == "max" and leaf.signed))
        and not any(reached[leaf.offset : leaf.offset + leaf.size])
    ]


def folded(new: MapSpec, rules: MapRules) -> Way:
    """How several maps are carried into one, if nothing bars it."""
    by_user = dict.fromkeys(own.function() for own in rules.sources.values() if own.function() is not None)
    method = ", ".join([*(name for name in by_user if name), "merge in the kernel"])
    back = _NO_WAY_BACK % "no map has a function back"
    if any(own.function() is None or own.function("_back") is not None for own in rules.sources.values()):
        back = (
            "best-effort on the way back: after a failed cutover what the new release inserted, and what it wrote to "
            "entries that several maps have together, stays behind; writes of this process meanwhile reach the new map "
            "only"
        )
    words = (_exactness(new, rules), _FOLDED[rules.on_collision or "error"], _IN_ORDER, back)
    return Way("folded", method, "; ".join(words))


def losses(diff: MapDiff, rules: MapRules) -> tuple[Change, ...]:
    """The changes by which entries that are carried lose something; what a converter answers for loses nothing."""
    if diff.parts:
        parts = zip(sources_of(diff), diff.parts, strict=True)
        return tuple(dict.fromkeys(lost for was, part in parts for lost in losses(part, rules.sources[was])))
    lost = (change for change in diff.changes if change.loss)
    return tuple(change for change in lost if rules.convert is None or not _answers(change, diff, rules))


def _answers(change: Change, diff: MapDiff, rules: MapRules) -> bool:
    """Whether the user's functions are responsible for what changed: the map's definition is not theirs to change."""
    of_key = diff.key_change != "plain" and re.match(r"key($|[.\[])", change.path)
    return bool(change.path) and (not of_key or rules.function("_key") is not None)


def _folds(diff: MapDiff, rules: MapRules) -> bool:
    if converts(diff, rules) and rules.function("_key") is not None:
        return rules.function("_key_back") is None
    return diff.key_change == "folds"


def translated(found: Way, diff: MapDiff, rules: MapRules) -> Way:
    """``found``, with what is to be said of a map whose keys may become one, or which a user's functions convert."""
    folds, by_user = _folds(diff, rules), converts(diff, rules)
    if not folds and not by_user and not is_split(diff):
        return found
    words = [_FOLDED[rules.on_collision or "error"]] if folds else []
    if is_split(diff):
        words.append(
            "writes of this process meanwhile reach the new map only, since what they make of the old one would become "
            "entries of the other maps as well"
        )
        if by_user:
            words.append("an entry that no map takes is lost: refused, or taken back after the cutover, if not allowed")
        if not folds and not by_user:
            return Way("entries", "batch copy, merge in the kernel", "; ".join((found.exactness, *words)))
    if folds or rules.function("_back") is None:
        missing = f"there is no {(rules.convert or '').partition(':')[2]}_back"
        why = "their old keys cannot be told" if folds else missing
        words.append(_NO_WAY_BACK % why)
    merge = "merge in the kernel"
    method = f"{rules.function()} in batches, {merge}" if by_user else merge
    return Way("entries", method, "; ".join((found.exactness, *words)))


def mirrored(found: Way, old: MapSpec, new: MapSpec, diff: MapDiff) -> Way:
    """``found``, for a map that no program of either release writes: what the old map says is always right then."""
    if found.kind != "entries-in-kernel" or diff.key is not None or (old.type, new.type) != ("hash", "hash"):
        return found
    return Way("mirrored", "copy in the kernel, without a base: no program writes it")


_IN_ORDER = "the maps are read in the order in which was lists them"

_NO_WAY_BACK = (
    "best-effort on the way back: %s, so that after a failed cutover the old map has what the old release wrote and "
    "not what the new one did, and writes of this process meanwhile reach the new map only"
)

_FOLDED = {
    "error": "refused before the cutover, and taken back after it, when two entries become one",
    "first": "of entries that become one the first that is read is kept, which of a hash is any of them",
    "last": "of entries that become one the last that is read is kept, which of a hash is any of them",
    "merge": "entries that become one are merged by their fields' policies, exact for sum; in a field without one the "
    "first that is read and not zero stays; one that is deleted meanwhile leaves its share in all but the sums",
}


def _exactness(spec: MapSpec, rules: MapRules) -> str:
    assert spec.value is not None  # a convertible map has layouts
    if spec.type in ("lru_hash", "lru_percpu_hash"):
        return "best-effort: an LRU map may evict entries at any time"
    if spec.type == "lpm_trie":
        return "exact, but best-effort where a program of the new release deletes a prefix that the old one changed"
    if lock_offset(spec.value) is not None:
        return "exact"  # what is written under the lock; the merge takes it too
    # Elements of one array are told once: `backends[].addr`.
    paths = (re.sub(r"\[\d+\]", "[]", leaf.path) for leaf in leaves(spec.value, rules, spec.tags) if not leaf.atomic)
    loose = list(dict.fromkeys(paths))
    if not loose:
        return "exact"
    shown = ", ".join(loose[:3]) + (f" and {len(loose) - 3} more" if len(loose) > 3 else "")
    return f"exact, but best-effort where programs of both releases write these at once: {shown}"


def obstacle(old: MapSpec, new: MapSpec, rules: MapRules) -> str | None:
    """Why entries of ``old`` cannot be converted into ``new`` by this version, or None."""
    if old.type != new.type and (old.type, new.type) not in _ALIKE:
        return f"from a map of type {old.type} to {new.type} is not supported yet"
    kind = answer(new.type).kind
    if kind in ("entries", "storage"):
        return _entries_obstacle(old, new, rules)
    if kind == "sockets" and (size := max(old.key_size, new.key_size)) > _MAX_SOCKET_KEY:
        return f"its key has {size} bytes, and more than {_MAX_SOCKET_KEY} in a sockhash are not supported yet"
    if kind == "inner-maps":
        found = _way_of_inner(old, new, rules)
        return f"its inner maps: {found}" if isinstance(found, str) else None
    if kind == "queue":
        return _queue_obstacle(old, new, rules)
    if kind == "references" and diff_map(old, new, rules).key is not None:
        return f"converting the keys of a {new.type} is not supported"
    return None


def _entries_obstacle(old: MapSpec, new: MapSpec, rules: MapRules) -> str | None:
    reach = max(2 * new.key_size + 2 * new.value_size + old.key_size, old.value_size)
    if reach > _MAX_REACH:
        return f"its keys and values take {reach} bytes in a merge, and more than {_MAX_REACH} are not supported yet"
    for spec in (old, new):
        if spec.flags & _PROGRAMS_BARRED:
            return "its flags bar programs from it (BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG), and the merge is one"
    if answer(new.type).kind == "storage" and (size := max(old.value_size, new.value_size)) > _MAX_STORAGE:
        return f"its value has {size} bytes, and more than {_MAX_STORAGE} in local storage are not supported yet"
    if (words := _words_to_merge(new, rules)) > _MAX_WORDS:
        return f"its value takes {words} steps to merge, and more than {_MAX_WORDS} are not supported yet"
    return None


def _queue_obstacle(old: MapSpec, new: MapSpec, rules: MapRules) -> str | None:
    for spec in (old, new):
        if spec.flags & _PROGRAMS_BARRED:
            return "its flags bar programs from it (BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG), and only one can move it"
    reach = 2 * max(old.value_size, new.value_size)
    if reach > _MAX_REACH:
        return f"its elements take {reach} bytes in a move, and more than {_MAX_REACH} are not supported yet"
    conversion = diff_map(old, new, rules).value
    if conversion is None:
        return None
    for move in conversion.moves:
        if not (move.copies or _plain(move)):
            return f"{move.path} is no aligned number of whole bytes on both sides, as what changes in a queue must be"
    steps = sum(math.prod(r.count for r in move.repeat) * max(1, move.old_size // 8) for move in conversion.moves)
    if steps > _MAX_WORDS:
        return f"its value takes {steps} steps to convert, and more than {_MAX_WORDS} are not supported yet"
    return None


def _plain(move: Move) -> bool:
    """Whether a load, a comparison and a store carry it."""
    if move.old_bits or move.new_bits or move.names or move.old_big or move.new_big:
        return False
    sides = (
        (move.old_size, move.old_offset, [repeat.old_stride for repeat in move.repeat]),
        (move.new_size, move.new_offset, [repeat.new_stride for repeat in move.repeat]),
    )
    return all(size <= 8 and not any(at % size for at in (offset, *strides)) for size, offset, strides in sides)


def _way_of_inner(old: MapSpec, new: MapSpec, rules: MapRules) -> Way | str | None:
    """How the inner maps are carried, or why they cannot be; None if they stay the same maps."""
    before, after, diff = inner_spec(old), inner_spec(new), diff_inner(old, new, rules)
    if before is None or after is None or diff is None:
        return "what they are is not known"
    if diff.verdict == "identical":
        return None
    if _is_untold(before) or _is_untold(after):
        return (
            "they hold a lock, a timer or the like, which the kernel finds by types that cannot be written anew here: "
            "beside it is a pointer to something without a tag, or to const"
        )
    # In batches whatever the kernel can do: for many small maps, the programs would take longer than the copy.
    return way(before, after, inner_rules(rules), ())


def _is_untold(spec: MapSpec) -> bool:
    """Whether new maps of it would be made without the types by which the kernel finds what is its own in them."""
    return spec.value is not None and holds_special(spec.value) and write_btf(spec.value) is None


def _words_to_merge(spec: MapSpec, rules: MapRules) -> int:
    """Size of the merge program: a step for a field or 8 bytes of one; max and min try again and again."""
    fields = leaves(spec.value, rules, spec.tags) if spec.value is not None else ()
    return sum(4 if leaf.merge in ("max", "min") else max(1, leaf.size // 8) for leaf in fields)


class SectionWay(msgspec.Struct, frozen=True):
    """How the variables of one section are carried: part by part; ``losses`` are all there are."""

    parts: tuple[Part, ...]
    losses: tuple[str, ...]
    exactness: str


def section_way(
    section: SectionDiff, old: Mapping[str, MapSpec], new: Mapping[str, MapSpec], rules: Mapping[str, MapRules]
) -> SectionWay:
    """How the variables of ``section`` come from the maps ``old`` to its own among ``new``; ``rules`` are by map."""
    name = section.diff.name
    if section.diff.verdict in ("added", "removed"):
        return SectionWay((), section.losses, "exact")
    spec, own = new[name], rules.get(name, MapRules())
    losses = list(section.losses)
    groups: list[list[Pair]] = []
    words = 0
    for pair in sorted(section.pairs, key=lambda pair: pair.source):
        alone = make_part(old[pair.source], spec, [pair], own)
        found = obstacle(alone.old, alone.new, alone.rules)
        if found is not None:
            losses.append(f"{pair.new.name} starts anew: {found}")
            continue
        more = _words_to_merge(alone.new, alone.rules)
        if not groups or groups[-1][0].source != pair.source or words + more > _MAX_WORDS:
            groups.append([])
            words = 0
        groups[-1].append(pair)
        words += more
    parts = tuple(_untouched_kept(make_part(old[group[0].source], spec, group, own)) for group in groups)
    told = dict.fromkeys(_exactness(part.new, part.rules) for part in parts)
    return SectionWay(parts, tuple(losses), "; ".join(text for text in told if text != "exact") or "exact")


def _untouched_kept(part: Part) -> Part:
    """The same part, with a merge that leaves alone what no move reaches: its ``min`` with nothing would be 0.

    That is a field new inside a variable, which starts as the new object says, and on the way back one that was
    dropped.
    """
    value = part.diff.value
    assert value is not None and part.old.value is not None and part.new.value is not None  # a part is its conversion
    back = MapRules(fields={rule.was or path: FieldRule(merge=rule.merge) for path, rule in part.rules.fields.items()})
    fields = dict(part.rules.fields)
    for layout, rules, reached in (
        (part.new.value, part.rules, value.written()),
        (part.old.value, back, value.inverse().written()),
    ):
        for leaf in leaves(layout, rules):
            if leaf.merge != "keep" and not any(reached[leaf.offset : leaf.offset + leaf.size]):
                fields[leaf.path] = FieldRule(merge="keep")
    return msgspec.structs.replace(part, rules=MapRules(fields=fields))
