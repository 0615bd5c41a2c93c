"""Comparing the maps of two releases: what changed, whether state survives it, and the conversion that carries it.

Verdicts, from best to worst:

- ``identical``: the same bytes mean the same thing; the live map can be kept, under a new name if it has one.
- ``lossless``: every value that the old layout can hold has a place in the new one: moved, renamed, widened within its
  signedness, nested into a struct of one or an element 0, taken into a union as its only field, in a longer array or
  bitfield, under the same number of an enum.
- ``lossy``: something is dropped, cut, or may not fit; every change that loses says what. Narrowed numbers, numbers
  that change signedness, removed fields and enum names, shorter arrays and texts, a union reduced to one of its
  members, enums numbered anew (names are followed, numbers without a name are not).
- ``needs-converter``: only the author can know: a byte order that changed, fields that begin or cease to share bytes, a
  union member of another type, text for a number. ``reason`` says which. So is a key of which two may become one,
  unless the rules say what happens then (``on_collision``).
- ``not-carried``: the entries cannot be read, or cannot be written to another map.
- ``unknown``: a layout is not known on one side. Equal sizes prove nothing.
- ``added``, ``removed``: the map is in one release only.

Several old maps may be folded into one, where a rule lists them: the verdict is then the worst of theirs. One may be
split into several, where the rules of these all name it: each gets all of its entries, or those that its converter
takes, and a field that one of them drops is lost only if no other one has it for every entry.

What makes no change: names of typedefs, structs and enums, qualifiers, padding. What does: signedness, positions,
sizes, element counts, enum values, union members, network byte order (the kernel's ``__be`` names). Fields match by
name; a new name is followed only where a tag or a rule says so (a tag also when going back). A field that vanished
where another of its type appeared is hinted at as a rename, never taken for one; so is a map that vanished. A type that
was guessed for a map (``inferred``) is shown as such and makes no change by itself. Global variables are compared one
by one, whichever section they are in: see :mod:`hitless.layout.variables`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from hitless.errors import LayoutError
from hitless.layout.answers import answer
from hitless.layout.codec import encode
from hitless.layout.conversion import Conversion, Cut, Default, Move, Repeat
from hitless.layout.members import SPECIAL, Member, inside, is_bytes, is_text, join, members, singles
from hitless.layout.model import Array, Enum, Field, Float, Int, MapSpec, Opaque, Pointer, Record, Type
from hitless.layout.rules import INNER, MapRules, OnCollision, bind_old, inner_rules, inner_spec, parse_tags

__all__ = [
    "Change", "MapDiff", "Verdict", "diff_inner", "diff_map", "diff_maps", "diff_members", "draft", "is_constant",
    "match_names", "phrases", "section_of", "sources_of",
]  # fmt: skip

Verdict = Literal[
    "identical", "lossless", "lossy", "needs-converter", "not-carried", "unknown", "added", "removed"
]  # fmt: skip

# Values that are the kernel's own, whatever type somebody wrote down for them: only sizes count there.
_KERNEL_VALUE = ("devmap", "devmap_hash", "cpumap")
# Maps without entries that have a meaning of their own, or whose values are not bytes: only sizes count there.
_NO_KEY_TYPE = (
    "array", "percpu_array", "prog_array", "perf_event_array", "stack_trace", "cgroup_array", "array_of_maps", "devmap",
    "sockmap", "cpumap", "xskmap", "reuseport_sockarray", "queue", "stack", "ringbuf", "user_ringbuf", "bloom_filter",
    "arena", "insn_array", "struct_ops",
)  # fmt: skip
_NO_VALUE_TYPE = (
    "prog_array", "perf_event_array", "stack_trace", "cgroup_array", "array_of_maps", "hash_of_maps", "sockmap",
    "sockhash", "xskmap", "reuseport_sockarray", "ringbuf", "user_ringbuf", "arena", "insn_array",
    "struct_ops", *_KERNEL_VALUE,
)  # fmt: skip


class Change(msgspec.Struct, frozen=True):
    """One thing that changed. ``path`` is the field's new path (its old one if removed), empty for the map itself.

    ``loss`` says what is lost by carrying the entries over; ``reason`` why it cannot be done without a converter (or
    at all); ``hint`` what the author may have meant. Keys' paths begin with ``key``, inner maps' with ``inner``.
    """

    path: str
    kind: str
    old: str | None = None
    new: str | None = None
    loss: str | None = None
    reason: str | None = None
    hint: str | None = None


class MapDiff(msgspec.Struct, frozen=True):
    """How a map differs between two releases. ``was`` is its old name if that differs.

    ``key`` and ``value`` are None where the bytes stay as they are, and where there is nothing to convert.
    ``key_change`` says what that of the key means: ``folds`` that two keys may become one, under the rule
    ``on_collision``; ``converter`` that only a converter can tell. ``parts`` are the differences from each of the old
    maps that are folded into this one, which have conversions of their own.
    """

    name: str
    was: str | None
    verdict: Verdict
    changes: tuple[Change, ...] = ()
    key: Conversion | None = None
    value: Conversion | None = None
    key_change: Literal["plain", "folds", "converter"] = "plain"
    parts: tuple[MapDiff, ...] = ()


_WORST = ("identical", "lossless", "lossy", "needs-converter", "not-carried", "unknown")
_SECTION = re.compile(r"\.(?:bss|data|rodata|kconfig)(?:\..*)?$")


def phrases(changes: Iterable[Change]) -> Iterator[str]:
    """What ``changes`` lose, each with the field that it is about."""
    for change in changes:
        if change.loss:
            yield change.loss if change.loss.startswith(change.path) else f"{change.path}: {change.loss}"


def sources_of(diff: MapDiff) -> tuple[str, ...]:
    """Names of the old maps that the map comes from."""
    return tuple(part.was or part.name for part in diff.parts or (diff,))


def section_of(spec: MapSpec) -> str | None:
    """The section of an object whose variables the map holds (``.bss``), or None if it is a map that was declared.

    The map's own name may have the object's in front: ``OBJECT.bss``.
    """
    if isinstance(spec.value, Record) and spec.value.name.startswith(".") and spec.name.endswith(spec.value.name):
        return spec.value.name
    found = _SECTION.search(spec.name)
    return found[0] if found else None


def is_constant(spec: MapSpec) -> bool:
    """Whether the map holds constants of the release (``.rodata``) or the kernel (``.kconfig``), never state."""
    return (section_of(spec) or "").startswith((".rodata", ".kconfig"))


def diff_maps(
    old: Sequence[MapSpec], new: Sequence[MapSpec], rules: Mapping[str, MapRules] | None = None
) -> tuple[MapDiff, ...]:
    """Compare all maps of two releases; ``rules`` are by the map's new name.

    Maps match by the rule's ``was`` or ``sources``, by ``hitless:was`` tags on either side, by name. Order: new maps as
    given, then those that were removed. A ``was`` or source that names no old map is no error.
    """
    from hitless.layout.variables import diff_sections  # which builds on this module

    rules = rules or {}
    before, after = _by_name(old, "old"), _by_name(new, "new")
    sections = {item.diff.name: item for item in diff_sections(before.values(), after.values(), rules)}
    apart = {source for item in sections.values() for source in item.sources}
    before = {name: spec for name, spec in before.items() if name not in apart}
    declared = {name: spec for name, spec in after.items() if name not in sections}
    folded = {
        name: [was for was in rule.sources if was in before]
        for name, rule in rules.items()
        if name in declared and any(was in before for was in rule.sources)
    }
    gone = {was for sources in folded.values() for was in sources}
    whole = {name: spec for name, spec in before.items() if name not in gone}
    former = {name: rule.was for name, rule in rules.items() if rule.was in whole and rule.was and name in declared}
    matched = match_names(
        {name: _map_was(spec) for name, spec in whole.items()},
        {name: _map_was(spec) for name, spec in declared.items() if name not in folded},
        former,
    )
    heirs: dict[str, list[str]] = {}
    for name, was in former.items():
        heirs.setdefault(was, []).append(name)
    split = {was: names for was, names in heirs.items() if len(names) > 1}
    for was, names in split.items():
        matched |= dict.fromkeys(names, was)
    parted = {name: diff for was, names in split.items() for name, diff in _split(before[was], names, after, rules)}
    out = []
    for name, spec in after.items():
        if name in sections:
            out.append(sections[name].diff)
        elif name in folded:
            out.append(_fold([before[was] for was in folded[name]], spec, rules[name]))
        elif name in parted:
            out.append(parted[name])
        elif name in matched:
            out.append(diff_map(before[matched[name]], spec, rules.get(name, MapRules())))
        else:
            out.append(MapDiff(name, None, "added", (Change("", "added", None, spec.type),)))
    taken = {*matched.values(), *gone}
    for name, spec in before.items():
        if name not in taken:
            holds = not is_constant(spec) and spec.ops is None
            loss = "the map and its entries are dropped" if holds else None
            hint = _became(spec, after, {**matched, **dict.fromkeys(folded, "")}) if holds else None
            out.append(MapDiff(name, None, "removed", (Change("", "removed", spec.type, None, loss, hint=hint),)))
    return (*out, *(item.diff for name, item in sections.items() if name not in after))


def _fold(olds: Sequence[MapSpec], new: MapSpec, rules: MapRules) -> MapDiff:
    """One map that several have become: what changed for the entries of each."""
    names = ", ".join(old.name for old in olds)
    loss = None
    if rules.on_collision in ("first", "last"):
        loss = f"of entries that have one key in {names}, all but the {rules.on_collision} that is read"
    parts = []
    for old in olds:
        change = Change("", "folded", old.name, new.name, loss if old is olds[0] else None)
        parts.append(diff_map(old, new, rules.sources[old.name], change))
    verdict = max((part.verdict for part in parts), key=_WORST.index)
    changes = tuple(dict.fromkeys(change for part in parts for change in part.changes))
    return MapDiff(new.name, None, verdict, changes, parts=tuple(parts))


def _split(
    old: MapSpec, names: Sequence[str], after: Mapping[str, MapSpec], rules: Mapping[str, MapRules]
) -> Iterator[tuple[str, MapDiff]]:
    """What changed for each of the maps ``names``, which ``old`` has become."""
    change = Change("", "split", old.name, ", ".join(names))
    alone = {name: diff_map(old, after[name], rules[name], change) for name in names}
    dropped = {name: _without_place(diff) for name, diff in alone.items()}
    for name, diff in alone.items():
        # One that a converter fills may have just some of the entries.
        others = [dropped[one] for one in names if one != name and rules[one].convert is None]
        elsewhere = frozenset(path for path in dropped[name] if any(not _within(path, other) for other in others))
        yield name, diff_map(old, after[name], rules[name], change, elsewhere) if elsewhere else diff


def _without_place(diff: MapDiff) -> set[str]:
    """Fields of the value that have no place any more."""
    paths = {change.path for change in diff.changes if change.kind == "removed"}
    return {path for path in paths if not path.startswith("key.")}


def _within(path: str, others: Iterable[str]) -> bool:
    return any(path == other or path.startswith((f"{other}.", f"{other}[")) for other in others)


def draft(old: MapSpec, new: MapSpec, rules: MapRules = MapRules()) -> tuple[Conversion, Conversion]:  # noqa: B008
    """What can be carried of key and value where a converter has to do the rest: a verdict ``needs-converter``.

    Raises :class:`LayoutError` as :func:`diff_map` does, and if a type is not known.
    """
    old = bind_old(old, rules)
    if old.key is None or old.value is None or new.key is None or new.value is None:
        raise LayoutError(f"map {new.name!r}: a type is not known on one side", map=new.name)
    fields = _split_rules(new, rules)
    big = new.order == "big"
    _, key = _Walk("key", old.key, new.key, fields["key"], big).run()
    _, value = _Walk("value", old.value, new.value, fields["value"], big).run()
    return key, value


def _became(old: MapSpec, after: Mapping[str, MapSpec], matched: Mapping[str, str]) -> str | None:
    """What a map that is gone may have become; suggested, never assumed."""
    fields = _named(old)
    alike = [
        spec.name for spec in after.values()
        if spec.name not in matched and old.key and spec.key and same(old.key, spec.key) and not _is_data(spec)
    ]  # fmt: skip
    holders = [spec for spec in after.values() if fields and fields <= _named(spec) and spec.name not in alike]
    data = [spec.name for spec in holders if _is_data(spec)]
    folded = [spec.name for spec in holders if not _is_data(spec) and spec.name in matched]
    if len(alike) == 1:
        return f'if this is {alike[0]} now, say so: [map.{alike[0]}] was = "{old.name}"'
    if alike:
        return f'if its entries are split among {", ".join(alike)}, say was = "{old.name}" for each of them'
    if data:
        return f'its fields are variables in {data[0]} now; to carry them: [map."{data[0]}"] was = "{old.name}"'
    if folded:
        others = f'"{matched[folded[0]]}", ' if matched[folded[0]] else ""
        return f'if its entries are folded into {folded[0]}, say so: [map.{folded[0]}] was = [{others}"{old.name}"]'
    return None


def _named(spec: MapSpec) -> set[str]:
    return {field.name for field in spec.value.fields if field.name} if isinstance(spec.value, Record) else set()


def _is_data(spec: MapSpec) -> bool:
    return section_of(spec) is not None


def diff_map(
    old: MapSpec,
    new: MapSpec,
    rules: MapRules = MapRules(),  # noqa: B008 - frozen
    moved: Change | None = None,
    elsewhere: Collection[str] = (),
) -> MapDiff:
    """Compare one map of two releases, whatever its names are.

    ``moved`` tells that it is folded with others or split, so that its entries have to be carried whatever else is the
    same; what ``elsewhere`` names has its place in another of the maps that it is split into.
    Raises :class:`LayoutError` for a rule that names a field which the new layout lacks or that cannot apply, for a
    default that its field cannot hold, and for hitless tags that do not exist.
    """
    old = bind_old(old, rules)
    changes = _definition(old, new)
    was = old.name if old.name != new.name else None
    if was and moved is None:
        changes.insert(0, Change("", "renamed", old.name, new.name))
    if moved is not None:
        changes.append(moved)
    inner = _inner(old, new, rules)
    changes += inner
    unknown = [change for change in inner if change.kind == "unknown"]
    converted: dict[str, Conversion | None] = {"key": None, "value": None}
    key_change: Literal["plain", "folds", "converter"] = "plain"
    fields = _split_rules(new, rules)
    kernel: list[Change] = []  # what a map that is not kept loses though its layout did not change
    sides = (
        ("key", old.key, new.key, old.key_size, new.key_size, _NO_KEY_TYPE),
        ("value", old.value, new.value, old.value_size, new.value_size, _NO_VALUE_TYPE),
    )
    for side, before, after, old_size, new_size, untyped in sides:
        # The key of an array is its index, always u32, whether or not somebody wrote its type down.
        index = side == "key" and "array" in old.type and "array" in new.type and old_size == new_size == 4
        free = old.type in untyped and new.type in untyped and (index or before is None or after is None)
        free |= side == "value" and old.type in _KERNEL_VALUE and new.type in _KERNEL_VALUE
        if free:
            if old_size != new_size:
                changes.append(_resized(side, old, old_size, new_size))
            continue
        if before is None or after is None:
            which = "either side" if before is after else "the old side" if before is None else "the new side"
            guess = next((spec.inferred_type(side) for spec in (new, old) if spec.inferred_type(side)), None)
            hint = f"bind a type to it in the manifest ({side} = \"type_name\"), or declare it with __type()"
            if guess is not None:
                hint = f"{guess} alone fits by size and name: if it is that, say {side} = \"{guess}\" or infer = true"
            change = Change(
                side, "unknown", _opt(before), _opt(after),
                reason=f"the {side}'s type is not known on {which}; equal sizes prove nothing", hint=hint,
            )  # fmt: skip
            changes.append(change)
            unknown.append(change)
            continue
        _check_size(new.name, side, before, old_size)
        _check_size(new.name, side, after, new_size)
        guesses = old.inferred_type(side), new.inferred_type(side)
        if any(guesses):
            changes.append(Change(side, "inferred", *guesses))
        walk = _Walk(side, before, after, fields[side], new.order == "big")
        found, conversion = walk.run()
        kernel += [] if found else walk.kernel
        unknown += [change for change in found if change.kind == "unknown"]
        if side == "key":
            found = [_for_key(change, rules.on_collision) for change in found]
            if any(change.reason for change in found):
                key_change = "converter"
            elif any(change.loss for change in found):
                key_change = "folds"
        else:
            found = [
                msgspec.structs.replace(change, loss=None)
                if change.kind == "removed" and change.path in elsewhere
                else change
                for change in found
            ]
        changes += found
        converted[side] = conversion if found else None
    if _real(changes):
        changes += kernel
    judged = _judge(old, new, was, changes, bool(unknown), converted)
    return msgspec.structs.replace(judged, key_change=key_change)


def _judge(
    old: MapSpec,
    new: MapSpec,
    was: str | None,
    changes: list[Change],
    unknown: bool,
    converted: dict[str, Conversion | None],
) -> MapDiff:
    verdict: Verdict
    if unknown:
        verdict = "unknown"
    elif not _real(changes):
        # A new name alone moves the pin, not the entries: the live map can be kept.
        verdict = "identical"
    elif is_constant(new):
        plain = tuple(msgspec.structs.replace(c, loss=None, reason=None) for c in changes)
        return MapDiff(new.name, was, "lossless", plain)
    elif not (answer(old.type).kind and answer(new.type).kind):
        changes.append(_not_carried(old, new))
        verdict = "not-carried"
    elif any(change.kind == "not-carried" for change in changes):  # of inner maps
        verdict = "not-carried"
    elif any(change.reason for change in changes):
        verdict = "needs-converter"
    elif any(change.loss and not _maybe(change, old, new) for change in changes):
        verdict = "lossy"
    else:
        verdict = "lossless"
    keep = verdict in ("lossless", "lossy")
    key, value = (converted["key"], converted["value"]) if keep else (None, None)
    return MapDiff(new.name, was, verdict, tuple(changes), key, value)


def _real(changes: Sequence[Change]) -> bool:
    """Whether a new map has to be made: a new name or a guess at a type alone is no reason."""
    return any(not (c.path == "" and c.kind == "renamed") and c.kind != "inferred" for c in changes)


def _maybe(change: Change, old: MapSpec, new: MapSpec) -> bool:
    if change.path == "inner" and old.inner is not None and new.inner is not None:
        old, new = old.inner, new.inner
    # A smaller hash loses nothing unless it is too full, which only the live map can tell. An array is always full.
    return change.kind == "max-entries" and "array" not in (old.type, new.type)


def _not_carried(old: MapSpec, new: MapSpec) -> Change:
    found = answer(new.type if answer(old.type).kind else old.type)
    loss = "all entries" if found.loses or old.type != new.type else None
    return Change("", "not-carried", old.type, new.type, loss=loss, reason=found.words)


def _resized(side: str, old: MapSpec, old_size: int, new_size: int) -> Change:
    loss = None
    if side == "value" and old.type in _KERNEL_VALUE and new_size < old_size:
        loss = "the programs of its entries have no place"
    return Change(side, "resized", f"{old_size} bytes", f"{new_size} bytes", loss)


def _definition(old: MapSpec, new: MapSpec) -> list[Change]:
    out = []
    if old.order != new.order:
        reason = "the releases are for processors of different byte orders"
        out.append(Change("", "byte-order", f"{old.order}-endian", f"{new.order}-endian", reason=reason))
    if old.type != new.type:
        hint = "a full lru_hash evicts entries by itself" if new.type == "lru_hash" else None
        loss = None
        if new.type == "array":
            loss = f"entries whose key is {new.max_entries} or more have no element"
        out.append(Change("", "map-type", old.type, new.type, loss, hint=hint))
    if old.flags != new.flags:
        out.append(Change("", "flags", f"{old.flags:#x}", f"{new.flags:#x}"))
    if old.extra != new.extra:
        out.append(Change("", "map-extra", f"{old.extra:#x}", f"{new.extra:#x}"))
    if old.max_entries != new.max_entries:
        loss = hint = None
        if new.max_entries < old.max_entries:
            if new.type == "array":
                loss = f"elements {new.max_entries} and above are dropped"
            elif new.type == "lru_hash":
                loss = f"of more than {new.max_entries} entries, the least recently used are evicted"
            elif new.type in ("devmap", "cpumap"):
                hint = f"refused when there is an entry at {new.max_entries} or above"
            elif new.type == "ringbuf":
                hint = None  # bytes, and what is in the old one stays there
            else:
                hint = f"refused when there are more than {new.max_entries} entries"
        out.append(Change("", "max-entries", str(old.max_entries), str(new.max_entries), loss, hint=hint))
    return out


def diff_inner(old: MapSpec, new: MapSpec, rules: MapRules = MapRules()) -> MapDiff | None:  # noqa: B008 - frozen
    """Compare the inner maps of two maps of maps, with their own paths; None where a side does not tell them."""
    before, after = inner_spec(old), inner_spec(new)
    if before is None or after is None:
        return None
    return diff_map(msgspec.structs.replace(before, name=after.name), after, inner_rules(rules))


def _inner(old: MapSpec, new: MapSpec, rules: MapRules) -> list[Change]:
    if old.inner is None and new.inner is None:
        return []
    diff = diff_inner(old, new, rules)
    if diff is None:
        which = "old" if old.inner is None else "new"
        return [Change("", "unknown", reason=f"the {which} side does not tell what its inner maps are")]
    if diff.verdict == "identical":
        return []
    return [_of_inner(change) for change in diff.changes]


def _of_inner(change: Change) -> Change:
    path = f"{INNER}{change.path}" if change.path else "inner"
    loss, reason = change.loss, change.reason
    if loss is not None:
        named = bool(change.path) and loss.startswith(f"{change.path} ")
        loss = f"{INNER}{loss}" if named else f"{path}: {loss}"
    if reason is not None:
        reason = f"inner maps: {reason}"
    return msgspec.structs.replace(change, path=path, loss=loss, reason=reason)


def _for_key(change: Change, on_collision: OnCollision | None) -> Change:
    if change.loss is None or change.reason is not None:
        return change
    if on_collision is not None:
        loss = f"{change.loss}, so that entries can become one (on_collision = {on_collision})"
        return msgspec.structs.replace(change, loss=loss)
    why = f"in a key two entries could become one: {change.loss}"
    hint = "say what is to become of them: on_collision = error, first, last or merge"
    return msgspec.structs.replace(change, reason=why, hint=change.hint or hint)


def _check_size(name: str, side: str, made: Type, size: int) -> None:
    if made.size != size:
        why = f"its {side} has {size} bytes but the type {made.name!r} has {made.size}"
        raise LayoutError(f"map {name!r}: {why}", map=name)


def _opt(made: Type | None) -> str | None:
    return made.name or "(anonymous)" if made is not None else None


def _by_name(specs: Sequence[MapSpec], side: str) -> dict[str, MapSpec]:
    out: dict[str, MapSpec] = {}
    for spec in specs:
        # What libbpf puts in, and how a type was found, may differ between objects that share the map.
        known = msgspec.structs.replace(out.setdefault(spec.name, spec), slots=spec.slots, inferred=spec.inferred)
        if known != spec:
            raise LayoutError(f"map {spec.name!r} has two definitions on the {side} side", map=spec.name)
    return out


def _map_was(spec: MapSpec) -> tuple[str, ...]:
    return parse_tags(spec.tags, f"map {spec.name}").was


def match_names(
    old: Mapping[str, tuple[str, ...]], new: Mapping[str, tuple[str, ...]], rules: Mapping[str, str]
) -> dict[str, str]:
    """New name -> old name. ``old`` and ``new`` give each name's former names, ``rules`` what overrides them."""
    out: dict[str, str] = {}
    taken: set[str] = set()

    def take(name: str, was: str) -> None:
        if name not in out and was not in taken and was in old:
            out[name] = was
            taken.add(was)

    for name, was in rules.items():
        if was in old and name in new:
            take(name, was)
    # A name that exists on one side only may be the other name of a thing there; the two loops mirror each other,
    # so that going back matches what going forward matched.
    for name, former in new.items():
        if name not in old:
            for was in former:
                take(name, was)
    for was, former in old.items():
        if was not in new:
            for name in former:
                if name in new:
                    take(name, was)
    for name in new:
        take(name, name)
    return out


def _split_rules(new: MapSpec, rules: MapRules) -> dict[str, MapRules]:
    values, keys = {}, {}
    has_key = isinstance(new.value, Record) and any(member.name == "key" for member in members(new.value))
    for path, rule in rules.fields.items():
        if path.startswith(INNER) and new.inner is not None:
            continue
        if path.startswith("key.") and not has_key:
            was = rule.was.removeprefix("key.") if rule.was else None
            keys[path.removeprefix("key.")] = msgspec.structs.replace(rule, was=was)
        else:
            values[path] = rule
    out = {}
    for side, fields, made in (("key", keys, new.key), ("value", values, new.value)):
        for path in fields:
            whole = path == "value" and side == "value" and not isinstance(made, Record)
            if made is not None and not whole and resolve(made, path) is None:
                raise LayoutError(f"map {new.name!r}: no field {path!r} in its {side}", map=new.name, field=path)
        out[side] = MapRules(fields=fields)
    return out


def resolve(made: Type, path: str) -> tuple[Type, int] | None:
    """The type at a path and its offset in bytes (``[]`` meaning the first element), or None if there is none."""
    offset = 0
    rest = f".{path}"
    while rest:
        if rest.startswith("["):
            index, _, rest = rest[1:].partition("]")
            if not isinstance(made, Array) or (index and not index.isdecimal()):
                return None
            number = int(index or 0)
            if index and number >= made.count:
                return None
            offset += number * made.element.size
            made = made.element
            continue
        if not rest.startswith(".") or not isinstance(made, Record):
            return None
        rest = rest[1:]
        # The static variable of a function has a dot in its name: FUNCTION.VARIABLE.
        found = max(
            (m for m in members(made) if rest == m.name or rest.startswith((f"{m.name}.", f"{m.name}["))),
            key=lambda member: len(member.name),
            default=None,
        )
        if found is None:
            return None
        rest = rest[len(found.name) :]
        made, offset = found.type, offset + found.offset
    return made, offset


#: A bitfield's width and shift in bits; (0, 0) is no bitfield.
_Place = tuple[int, int]


class _Crossing(NamedTuple):
    """A field that comes into or out of an anonymous union: the old member it is in or is, its old and new self."""

    source: Member
    before: Member
    after: Member


class _Walk:
    """One comparison of two types, collecting changes, moves, defaults and cuts."""

    def __init__(self, side: str, old: Type, new: Type, rules: MapRules, big: bool = False) -> None:
        self.side = side
        self.big = big  # whether the processor's own byte order is big-endian
        self.old = old
        self.new = new
        self.rules = rules
        self.changes: list[Change] = []
        self.kernel: list[Change] = []  # what goes with objects of the kernel
        self.moves: list[Move] = []
        self.defaults: list[Default] = []
        self.cuts: list[Cut] = []
        self.specials = False
        self.applied: set[str] = set()
        # Old paths that a rule sends elsewhere, so that they neither match by name nor count as removed.
        self.claimed = {
            rule.was for rule in rules.fields.values() if rule.was is not None and resolve(old, rule.was) is not None
        }

    def run(self, apart: bool = False) -> tuple[list[Change], Conversion]:
        if apart and isinstance(self.old, Record) and isinstance(self.new, Record):
            self.fields("", "", self.old, 0, self.new, 0, ())
        else:
            self.pair("", "", self.old, 0, self.new, 0, ())
        if not apart and not self.changes and self.old.size != self.new.size:
            self.change("", "resized", f"{self.old.size} bytes", f"{self.new.size} bytes")
        for path, rule in self.rules.fields.items():
            if rule.was in self.claimed and path not in self.applied:
                raise LayoutError(f"rule for field {path!r}: was = {rule.was!r} cannot be applied there", field=path)
        if self.changes and not apart:
            self.changes += self.kernel
        conversion = Conversion(
            self.old.size, self.new.size, _coalesced(self.moves), tuple(self.defaults), tuple(self.cuts)
        )
        return self.changes, conversion

    def show(self, path: str) -> str:
        if self.side == "key":
            return f"key.{path}" if path else "key"
        return path or "value"

    def change(
        self, path: str, kind: str, old: str | None = None, new: str | None = None, loss: str | None = None,
        reason: str | None = None, hint: str | None = None,
    ) -> None:  # fmt: skip
        self.changes.append(Change(self.show(path), kind, old, new, loss, reason, hint))

    def refuse(self, path: str, old: Type, new: Type, reason: str) -> None:
        self.change(path, "retyped", _spell(old), _spell(new), reason=reason)

    def copy(self, path: str, at: int, to: int, size: int, repeat: tuple[Repeat, ...]) -> None:
        if size:
            self.moves.append(Move(self.show(path), at, size, to, size, repeat=repeat))

    def pair(
        self, old_path: str, path: str, old: Type, at: int, new: Type, to: int, repeat: tuple[Repeat, ...]
    ) -> None:
        """Compare two types that stand for each other, ``at`` and ``to`` being their offsets in bytes."""
        match old, new:
            case (Int() | Enum(), Int() | Enum()):
                self.scalar(path, old, at, new, to, repeat)
            case Float(), Float() if old.size == new.size:
                self.copy(path, at, to, old.size, repeat)
            case Pointer(), Pointer():
                self.pointer(path, old, at, new, to, repeat)
            case Array(), Array():
                self.array(old_path, path, old, at, new, to, repeat)
            case Record(), Record():
                self.record(old_path, path, old, at, new, to, repeat)
            case (Int() | Enum() | Float() | Record(), Array()) if new.count and _fits_first(old, new.element):
                self.change(path, "retyped", _spell(old), _spell(new))
                self.pair(old_path, f"{path}[0]", old, at, new.element, to, repeat)
                self.fill_elements(path, new, 1, to, repeat)
            case (Array(), Int() | Enum() | Float() | Record()) if old.count and _fits_first(new, old.element):
                loss = None
                if old.count > 1:
                    loss = _dropped("element", 1, old.count - 1)
                    size = old.element.size
                    self.cuts.append(Cut(self.show(path), at + size, old.size - size, repeat))
                self.change(path, "retyped", _spell(old), _spell(new), loss)
                self.pair(f"{old_path}[0]", path, old.element, at, new, to, repeat)
            case (Int() | Enum() | Float() | Pointer() | Array(), Record()) if (inner := _only(new)) is not None:
                self.change(path, "nested", _spell(old), _spell(new))
                self.pair(old_path, _into(path, inner), old, at, inner.type, to + inner.offset, repeat)
            case (Record(), Int() | Enum() | Float() | Pointer() | Array()) if (inner := _only(old)) is not None:
                self.change(path, "nested", _spell(old), _spell(new))
                self.pair(_into(old_path, inner), path, inner.type, at + inner.offset, new, to, repeat)
            case (Int() | Enum() | Float() | Pointer() | Array(), Record(union=True)) if new.fields:
                self.into_union(path, old, at, new, to, repeat)
            case (Record(union=True), Int() | Enum() | Float() | Pointer() | Array()) if old.fields:
                self.out_of_union(path, old, at, new, to, repeat)
            case (Opaque(), _) | (_, Opaque()):
                reason = "bytes without a known type are equal to nothing"
                hint = "compare with the old release's objects: this snapshot does not tell"
                self.change(path, "unknown", _spell(old), _spell(new), reason=reason, hint=hint)
            case _:
                self.refuse(path, old, new, f"no rule makes {_spell(old)} into {_spell(new)}")

    def scalar(
        self, path: str, old: Int | Enum, at: int, new: Int | Enum, to: int, repeat: tuple[Repeat, ...],
        old_place: _Place = (0, 0), new_place: _Place = (0, 0),
    ) -> None:  # fmt: skip
        (old_bits, old_shift), (new_bits, new_shift) = old_place, new_place
        old_width, new_width = old_bits or 8 * old.size, new_bits or 8 * new.size
        enums = isinstance(old, Enum) and isinstance(new, Enum)
        bools = "bool" in (_encoding(old), _encoding(new))
        text = old_width == new_width == 8 and "char" in (_encoding(old), _encoding(new)) and not bools
        spelled = _bit_spell(old, old_bits), _bit_spell(new, new_bits)
        network = _network(old) and not old_bits, _network(new) and not new_bits
        if network[0] != network[1] and (old.size > 1 or new.size > 1) and not self.big:
            reason = "one is in network byte order and the other in the processor's, or their typedefs say so"
            self.change(path, "byte-order", *spelled, reason=reason)
            return
        if old_width != new_width and all(network) and not (_swappable(old) and _swappable(new)):
            self.refuse(path, old, new, "a checksum has no other size")
            return
        names = _numbered(old, new, new_place) if isinstance(old, Enum) and isinstance(new, Enum) else ()
        old_signed, new_signed = old.signed, new.signed
        if old_width == new_width and (text or enums) and not names:
            old_signed = new_signed = False
        swapped = self.big or all(network)
        move = Move(
            self.show(path), at, _touched(old, old_place), to, _touched(new, new_place), old_signed, new_signed,
            _encoding(old) == "bool", _encoding(new) == "bool", repeat,
            old_bits, old_shift, new_bits, new_shift, swapped, swapped, names,
        )  # fmt: skip
        bounds = move.bounds
        loss = f"values outside {bounds[0]} to {bounds[1]} do not fit" if bounds is not None else None
        if old_width < new_width:
            self.change(path, "widened", *spelled, loss)
        elif old_width > new_width:
            self.change(path, "narrowed", *spelled, loss)
        elif (
            (old_signed != new_signed and not enums)
            or _encoding(old) != _encoding(new)
            or isinstance(old, Enum) != isinstance(new, Enum)
        ):
            self.change(path, "retyped", *spelled, loss)
        if isinstance(old, Enum) and isinstance(new, Enum):
            self.enum(path, old, new)
        if move.copies:
            move = Move(move.path, at, move.old_size, to, move.new_size, repeat=repeat)
        self.moves.append(move)

    def enum(self, path: str, old: Enum, new: Enum) -> None:
        before, after = dict(old.values), dict(new.values)
        for name, value in before.items():
            if name in after and after[name] != value:
                loss = "entries that hold a number without a name keep it, whatever it means in the new release"
                self.change(path, "enum-changed", f"{name} = {value}", f"{name} = {after[name]}", loss)
            elif name not in after:
                renamed = [other for other, number in after.items() if number == value and other not in before]
                hint = f"{value} is now called {renamed[0]}" if renamed else None
                loss = f"entries that hold {name} = {value} have no meaning in the new release"
                self.change(path, "enum-removed", f"{name} = {value}", None, loss, hint=hint)
        for name, value in after.items():
            if name not in before:
                self.change(path, "enum-added", None, f"{name} = {value}")

    def pointer(self, path: str, old: Pointer, at: int, new: Pointer, to: int, repeat: tuple[Repeat, ...]) -> None:
        if old.target != new.target or old.size != new.size:
            self.refuse(path, old, new, "it points to something else")
            return
        if old.kernel:
            self.specials = True
            loss = "the kernel object that it points to is not carried"
            self.kernel.append(Change(self.show(path), "kernel-pointer", _spell(old), _spell(new), loss))
            return
        self.copy(path, at, to, old.size, repeat)

    def array(
        self, old_path: str, path: str, old: Array, at: int, new: Array, to: int, repeat: tuple[Repeat, ...]
    ) -> None:
        kept = min(old.count, new.count)
        if old.count != new.count:
            loss = None
            if old.count > new.count:
                word = "byte" if is_bytes(old) else "element"
                loss = _dropped(word, new.count, old.count - 1)
                size = old.element.size
                self.cuts.append(Cut(self.show(path), at + kept * size, (old.count - kept) * size, repeat))
            self.change(path, "resized", _spell(old), _spell(new), loss)
        if kept and _spell(old.element) == _spell(new.element) and is_bytes(old) and is_bytes(new):
            self.copy(path, at, to, kept, repeat)
        elif kept:
            step = Repeat(kept, old.element.size, new.element.size)
            before = len(self.changes)
            self.pair(f"{old_path}[]", f"{path}[]", old.element, at, new.element, to, (*repeat, step))
            if old.element.size != new.element.size and len(self.changes) == before:
                self.change(path, "resized", f"{old.element.size} bytes each", f"{new.element.size} bytes each")
        elif _spell(old.element) != _spell(new.element) or old.element.size != new.element.size:
            # A flexible array holds nothing here, yet what would be in it is part of what the record means.
            self.refuse(path, old, new, "a flexible array changed")
        if new.count > kept:
            self.fill_elements(path, new, kept, to, repeat)

    def record(
        self, old_path: str, path: str, old: Record, at: int, new: Record, to: int, repeat: tuple[Repeat, ...]
    ) -> None:
        if old.name in SPECIAL and old.name == new.name:
            self.specials = True
            loss = SPECIAL[old.name]
            if loss is not None:
                self.kernel.append(Change(self.show(path), "kernel-object", _spell(old), _spell(new), loss))
            return
        if old.union != new.union:
            self.refuse(path, old, new, "a struct became a union, or the other way round")
            return
        if old.union:
            self.union(path, old, at, new, to, repeat)
            return
        changes, moves, specials = len(self.changes), len(self.moves), self.specials
        self.specials = False
        self.fields(old_path, path, old, at, new, to, repeat)
        if len(self.changes) == changes and old.size == new.size and not self.specials:
            # Nothing inside changed, so the whole is one block: quicker, and the explanation is shorter.
            del self.moves[moves:]
            self.copy(path, at, to, old.size, repeat)
        elif len(self.changes) > changes and path:
            self.changes.insert(changes, Change(self.show(path), "nested", _spell(old), _spell(new)))
        self.specials = self.specials or specials

    def union(self, path: str, old: Record, at: int, new: Record, to: int, repeat: tuple[Repeat, ...]) -> None:
        # Which member is meant, only the program knows. The bytes can stay if each member still reads them alike.
        base = path.rpartition(".")[0] if path.endswith("}") else path
        before = {member.name: member for member in members(old)}
        after = {member.name: member for member in members(new)}
        matched = match_names(
            {name: self.former(join(path, name), member) for name, member in before.items()},
            {name: self.former(join(path, name), member) for name, member in after.items()},
            {},
        )
        for name, was in matched.items():
            member, other = before[was], after[name]
            if other.offset != member.offset or not same(member.type, other.type):
                why = f"union member {was!r} changed, and only the program knows which one is in use"
                self.refuse(path, old, new, why)
                return
            if name != was:
                self.change(join(base, name), "renamed", was, name)
        for name, member in after.items():
            if name not in matched:
                self.change(join(base, name), "added", None, _spell(member.type))
        for name, member in before.items():
            if name not in matched.values():
                loss = f"entries in which {name} is in use have no meaning in the new release"
                self.change(join(base, name), "removed", _spell(member.type), None, loss)
        kept, end = _extent(new), _extent(old)
        self.copy(path, at, to, min(kept, end), repeat)
        if end > kept:
            self.cuts.append(Cut(self.show(path), at + kept, end - kept, repeat))

    def into_union(self, path: str, old: Type, at: int, new: Record, to: int, repeat: tuple[Repeat, ...]) -> None:
        name = _alike(old, new)
        if name is None:
            why = "no member of the union, or more than one, is of the old type; a rule can say which (was)"
            self.refuse(path, old, new, why)
            return
        self.change(path, "nested", _spell(old), _spell(new))
        member = inside(new)[name]
        self.pair(path, join(path, name), old, at, member.type, to + member.offset, repeat)

    def out_of_union(self, path: str, old: Record, at: int, new: Type, to: int, repeat: tuple[Repeat, ...]) -> None:
        name = _alike(new, old)
        if name is None:
            why = "no member of the union, or more than one, is of the new type; a rule can say which (was)"
            self.refuse(path, old, new, why)
            return
        self.change(path, "nested", _spell(old), _spell(new), self.misread(old, name, at, repeat, path))
        member = inside(old)[name]
        self.pair(join(path, name), path, member.type, at + member.offset, new, to, repeat)

    def misread(self, union: Record, name: str, at: int, repeat: tuple[Repeat, ...], path: str) -> str | None:
        """What is lost when of a union only member ``name`` goes on; what it does not cover is cut."""
        all_inside = inside(union)
        end = all_inside[name].offset + all_inside[name].type.size
        if end < _extent(union):
            self.cuts.append(Cut(self.show(path), at + end, _extent(union) - end, repeat))
        others = [other for other in all_inside if other != name]
        return f"entries in which {' or '.join(others)} is in use are misread" if others else None

    def fields(
        self, old_path: str, path: str, old: Record, at: int, new: Record, to: int, repeat: tuple[Repeat, ...]
    ) -> None:
        before = {member.name: member for member in singles(old)}
        after = {member.name: member for member in singles(new)}
        if len(before) != len(singles(old)) or len(after) != len(singles(new)):
            raise LayoutError(f"{self.show(path)}: {_spell(old)} or {_spell(new)} has two members of one name")
        rules: dict[str, str] = {}
        elsewhere: dict[str, str] = {}
        for name in after:
            rule = self.rules.field(join(path, name))
            if rule is None or rule.was is None or rule.was not in self.claimed:
                continue
            last = next((other for other in before if join(old_path, other) == rule.was), None)
            if last is not None:
                rules[name] = last
            else:
                elsewhere[name] = rule.was
            self.applied.update(p for p, r in self.rules.fields.items() if r is rule)
        free = {
            name: self.former(join(old_path, name), member)
            for name, member in before.items()
            if join(old_path, name) not in self.claimed or name in rules.values()
        }
        matched = match_names(
            free, {name: self.former(join(path, name), m) for name, m in after.items() if name not in elsewhere}, rules
        )
        self.match_groups(before, after, matched)
        used = set(matched.values()) | {name for name in before if join(old_path, name) in self.claimed}
        crossed = self.crossings(path, before, after, used, {*matched, *elsewhere})
        sources = [name for found in crossed.values() for name in {one.source.name for one in found}]
        mark = len(self.changes)
        added = []
        for name, member in after.items():
            here = join(path, name)
            if name in elsewhere:
                self.from_elsewhere(here, elsewhere[name], member, to, repeat)
            elif name in matched:
                other = before[matched[name]]
                self.member(old_path, path, other, at, member, to, repeat)
            elif name in crossed:
                alone = all(sources.count(one.source.name) == 1 for one in crossed[name])
                self.cross(old_path, path, member, crossed[name], alone, at, to, repeat)
            else:
                added.append(member)
                self.added(here, member, to, repeat)
        taken = {*matched.values(), *sources}
        for name, member in before.items():
            there = join(old_path, name)
            if name not in taken and there not in self.claimed:
                self.removed(there, member, added)
        self.changes[mark:] = [self.hinted(change, path, added, before, taken) for change in self.changes[mark:]]

    def former(self, path: str, member: Member) -> tuple[str, ...]:
        return parse_tags(member.tags, path).was

    def match_groups(self, old: dict[str, Member], new: dict[str, Member], matched: dict[str, str]) -> None:
        # Anonymous unions have no name to match by; one that shares a member's name is the same union.
        taken = set(matched.values())
        for name, member in new.items():
            if name in matched or not member.parts or member.bits:
                continue
            for was, other in old.items():
                if was not in taken and other.parts and not other.bits and set(other.parts) & set(member.parts):
                    matched[name] = was
                    taken.add(was)
                    break

    def crossings(
        self, path: str, old: dict[str, Member], new: dict[str, Member], used: set[str], served: set[str]
    ) -> dict[str, list[_Crossing]]:
        """What comes into or out of anonymous unions, by the new member; ``used`` and ``served`` need nothing."""
        out: dict[str, list[_Crossing]] = {}
        for name, member in new.items():
            for was, other in old.items():
                if name in served or was in used or not (member.parts or other.parts):
                    continue
                before, after = _reached(other), _reached(member)
                pairs = match_names(
                    {inner: self.former(join(path, inner), one) for inner, one in before.items()},
                    {inner: self.former(join(path, inner), one) for inner, one in after.items()},
                    {},
                )
                found = [_Crossing(other, before[there], after[here]) for here, there in pairs.items()]
                if found:
                    out.setdefault(name, []).extend(found)
        return out

    def cross(
        self, old_path: str, path: str, new: Member, found: list[_Crossing], alone: bool, at: int, to: int,
        repeat: tuple[Repeat, ...],
    ) -> None:  # fmt: skip
        sources = ", ".join(dict.fromkeys(one.source.name for one in found))
        if len(found) > 1 or not alone:
            why = "fields share their bytes on one side only, and only the program knows which one is in use"
            self.change(join(path, new.name), "retyped", sources, new.name, reason=why)
            return
        ((source, before, after),) = found
        loss = None
        if source.parts and isinstance(source.type, Record):
            loss = self.misread(source.type, before.name, at + source.offset, repeat, join(old_path, before.name))
        self.change(join(path, after.name), "nested", source.name, new.name, loss)
        self.member(old_path, path, before, at, after, to, repeat)

    def member(
        self, old_path: str, path: str, old: Member, at: int, new: Member, to: int, repeat: tuple[Repeat, ...]
    ) -> None:
        here, there = join(path, new.name), join(old_path, old.name)
        if old.name != new.name and not (old.parts and new.parts):
            self.change(here, "renamed", old.name, new.name)
        if (old.offset, old.shift) != (new.offset, new.shift):
            self.change(here, "moved", _offset(old), _offset(new))
        if not old.width and not new.width:
            self.pair(there, here, old.type, at + old.offset, new.type, to + new.offset, repeat)
        elif isinstance(old.type, Int | Enum) and isinstance(new.type, Int | Enum):
            places = (old.width, old.shift), (new.width, new.shift)
            self.scalar(here, old.type, at + old.offset, new.type, to + new.offset, repeat, *places)
        else:
            self.refuse(here, old.type, new.type, "a bitfield can become a number only, and only a number a bitfield")

    def from_elsewhere(self, path: str, was: str, member: Member, to: int, repeat: tuple[Repeat, ...]) -> None:
        found = resolve(self.old, was)
        if found is None or repeat or "[]" in was or member.width:
            raise LayoutError(f"rule for field {path!r}: was = {was!r} cannot be applied inside an array", field=path)
        self.change(path, "renamed", was, path)
        self.pair(was, path, found[0], found[1], member.type, to + member.offset, ())

    def added(self, path: str, member: Member, to: int, repeat: tuple[Repeat, ...]) -> None:
        self.change(path, "added", None, _bit_spell(member.type, member.width))
        self.fill_member(path, member, to, repeat)

    def fill_member(self, path: str, member: Member, to: int, repeat: tuple[Repeat, ...]) -> None:
        if not member.width:
            self.fill(path, member.type, to + member.offset, member.tags, repeat)
            return
        default = self.default(path, member.type, member.tags)
        if default is not None:
            place = (member.width, member.shift)
            field = Field("it", member.type, member.shift, member.width)
            holder = Record("", _touched(member.type, place), (field,))
            data = self.encoded(path, holder, {"it": default})
            signed = isinstance(member.type, Int | Enum) and member.type.signed
            mask = self.encoded(path, holder, {"it": -1 if signed else (1 << member.width) - 1})
            self.defaults.append(Default(self.show(path), to + member.offset, data, repeat, mask))

    def removed(self, path: str, member: Member, added: list[Member]) -> None:
        inside = sorted(was for was in self.claimed if was.startswith((path + ".", path + "[")))
        loss = f"{path} is dropped" + (f", except {', '.join(inside)}" if inside else "")
        self.change(path, "removed", _spell(member.type), None, loss)

    def hinted(self, change: Change, path: str, added: list[Member], old: dict[str, Member], taken: set[str]) -> Change:
        if change.kind != "added" or change.hint:
            return change
        for member in added:
            if self.show(join(path, member.name)) != change.path:
                continue
            for name, other in old.items():
                if name not in taken and other.offset == member.offset and same(other.type, member.type):
                    hint = f"if this is {name} under a new name, say so: hitless:was={name}"
                    return msgspec.structs.replace(change, hint=hint)
        return change

    def fill_elements(self, path: str, made: Array, first: int, to: int, repeat: tuple[Repeat, ...]) -> None:
        """Defaults, and what rules bring from elsewhere, for the elements from ``first`` on."""
        size = made.element.size
        if any(p.startswith(f"{path}[") for p in self.rules.fields):
            for index in range(first, made.count):
                self.fill(f"{path}[{index}]", made.element, to + index * size, (), repeat)
        elif made.count > first:
            step = Repeat(made.count - first, 0, size)
            self.fill(f"{path}[]", made.element, to + first * size, (), (*repeat, step))

    def fill(self, path: str, made: Type, to: int, tags: tuple[str, ...], repeat: tuple[Repeat, ...]) -> None:
        """Whatever a field gets that has no counterpart of its own."""
        rule = self.rules.field(path)
        if rule is not None and rule.was is not None and rule.was in self.claimed:
            self.applied.update(p for p, r in self.rules.fields.items() if r is rule)
            self.from_elsewhere(path, rule.was, Member(path, made, 0), to, repeat)
            return
        default = self.default(path, made, tags)
        if default is not None:
            self.defaults.append(Default(self.show(path), to, self.encoded(path, made, default), repeat))
        elif isinstance(made, Record) and not made.union:
            for member in singles(made):
                self.fill_member(join(path, member.name), member, to, repeat)
        elif isinstance(made, Array) and not is_bytes(made):
            self.fill_elements(path, made, 0, to, repeat)


    def default(self, path: str, made: Type, tags: tuple[str, ...]) -> object:
        rule = self.rules.field(path)
        if rule is not None and rule.default is not None:
            return rule.default
        return _literal(parse_tags(tags, path).default, made)

    def encoded(self, path: str, made: Type, value: object) -> bytes:
        try:
            return encode(made, value, "big" if self.big else "little")
        except LayoutError as error:
            raise LayoutError(f"{self.show(path)}: its default: {error.message}", field=path) from error


def diff_members(
    old: Record, new: Record, rules: MapRules, big: bool = False
) -> tuple[tuple[Change, ...], tuple[Change, ...], Conversion]:
    """Compare two structs whose members have nothing to do with each other: the variables of a section.

    Returns what changed, what belongs to the kernel and stays behind, and the moves. Nothing is said of the size of
    the whole, and bytes between members are not moved. Raises as :func:`diff_map`.
    """
    walk = _Walk("value", old, new, rules, big)
    changes, conversion = walk.run(apart=True)
    return tuple(changes), tuple(walk.kernel), conversion


def same(old: Type, new: Type) -> bool:
    """Whether the same bytes mean the same thing in both types."""
    if old.size != new.size:
        return False
    changes, _ = _Walk("value", old, new, MapRules()).run()
    return not changes


def _reached(member: Member) -> dict[str, Member]:
    """The fields that a member is, or holds if it is an anonymous union, by name, offsets from the same start."""
    if member.parts and isinstance(member.type, Record):
        return inside(member.type, member.offset)
    return {member.name: member}


def _alike(made: Type, union: Record) -> str | None:
    """The one member of a union that is of this type."""
    found = [name for name, member in inside(union).items() if not member.width and same(made, member.type)]
    return found[0] if len(found) == 1 else None


def _numbered(old: Enum, new: Enum, place: _Place) -> tuple[tuple[int, int], ...]:
    """(old, new) numbers of the names that stayed, or nothing if every old name still stands for its number."""
    before, after = dict(old.values), dict(new.values)
    if all(after.get(name) == value for name, value in before.items()):
        return ()
    bits = place[0] or 8 * new.size
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if new.signed else (0, (1 << bits) - 1)
    stayed = {value: after[name] for name, value in before.items() if low <= after.get(name, low - 1) <= high}
    return tuple(stayed.items())


def _extent(union: Record) -> int:
    """Bytes of the largest member; what a union has beyond is padding."""
    return max((member.offset + member.type.size for member in members(union)), default=0)


def _touched(made: Type, place: _Place) -> int:
    """Bytes that a number, or the bits of a bitfield, are in."""
    width, shift = place
    return (shift + width + 7) // 8 if width else made.size


def _offset(member: Member) -> str:
    return f"offset {member.offset}" + (f", bit {member.shift}" if member.width else "")


def _bit_spell(made: Type, width: int) -> str:
    return f"{_spell(made)}:{width}" if width else _spell(made)


def _swappable(made: Int | Enum) -> bool:
    return made.name.startswith("__be")


def _only(made: Record) -> Member | None:
    inside = members(made)
    return inside[0] if len(inside) == 1 and not made.union and not inside[0].bits else None


def _into(path: str, member: Member) -> str:
    return path if member.parts else join(path, member.name)


def _fits_first(one: Type, element: Type) -> bool:
    """Whether ``one`` can be an element; a number and a text or byte string are never the same thing."""
    if isinstance(one, Record) or isinstance(element, Record):
        return isinstance(one, Record) == isinstance(element, Record)
    return not isinstance(element, Array) and (one.size == 1 or element.size != 1)


def _dropped(word: str, first: int, last: int) -> str:
    return f"{word} {last} is dropped" if first == last else f"{word}s {first} to {last} are dropped"


def _encoding(made: Int | Enum) -> str:
    return made.encoding if isinstance(made, Int) else ""


def _network(made: Int | Enum) -> bool:
    return made.name.startswith(("__be", "__sum16", "__wsum"))


def _literal(text: str | None, made: Type) -> object:
    if text is None or is_text(made):
        return text
    if isinstance(made, Int) and made.encoding == "bool" and text in ("true", "false"):
        return text == "true"
    try:
        return float(text) if isinstance(made, Float) else int(text, 0)
    except ValueError:
        return text


def _spell(made: Type) -> str:
    match made:
        case Array():
            counts = ""
            inner: Type = made
            while isinstance(inner, Array):
                counts += f"[{inner.count or ''}]"
                inner = inner.element
            return _spell(inner) + counts
        case Record():
            return f"{'union' if made.union else 'struct'} {made.name or '{...}'}"
        case Enum():
            return f"enum {made.name or '{...}'}"
    return made.name


def _coalesced(moves: list[Move]) -> tuple[Move, ...]:
    """Fewer, larger copies: repeated neighbours become one block, and so do blocks that touch on both sides."""
    flat = []
    for move in moves:
        repeat = list(move.repeat)
        size = move.old_size
        while move.copies and repeat and repeat[-1].old_stride == repeat[-1].new_stride == size:
            size *= repeat.pop().count
        if size != move.old_size:
            move = Move(move.path, move.old_offset, size, move.new_offset, size, repeat=tuple(repeat))
        flat.append(move)
    flat.sort(key=lambda move: move.new_offset)
    out: list[Move] = []
    for move in flat:
        last = out[-1] if out else None
        if (
            last is not None and last.copies and move.copies and not last.repeat and not move.repeat
            and last.old_offset + last.old_size == move.old_offset
            and last.new_offset + last.new_size == move.new_offset
        ):  # fmt: skip
            size = last.old_size + move.old_size
            first = last.path.split("..")[0]
            out[-1] = Move(f"{first}..{move.path}", last.old_offset, size, last.new_offset, size)
        else:
            out.append(move)
    return tuple(out)
