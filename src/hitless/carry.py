"""What apply of this version can carry from one map to another, beyond what layouts allow: pure, so that CI can ask."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import msgspec

from hitless.layout.conversion import leaves
from hitless.layout.diff import Change, MapDiff, diff_inner, diff_map
from hitless.layout.members import SPECIAL, lock_offset
from hitless.layout.model import Array, MapSpec, Record, Type
from hitless.layout.rules import MapRules, inner_rules, inner_spec

__all__ = ["KINDS", "Way", "converts", "is_global", "losses", "obstacle", "refusals", "translated", "way"]

_PROGRAMS_BARRED = 1 << 7 | 1 << 8  # BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG
# Types of which one can become the other: (old, new).
_ALIKE = {
    ("hash", "lru_hash"), ("lru_hash", "hash"), ("array", "hash"),
    ("percpu_hash", "lru_percpu_hash"), ("lru_percpu_hash", "percpu_hash"), ("percpu_array", "percpu_hash"),
}  # fmt: skip
_ITERATED = ("hash", "lru_hash")
_FOLDING = ("hash", "lru_hash")  # types of maps of which several entries may become one
_ITERATE_HASH = "iter/bpf_map_elem"  # the feature's name in kernel/features.py, which this pure module cannot import
_MAX_REACH = 32_000  # bytes: an instruction reaches 32767 from a pointer
_MAX_WORDS = 2000  # what surely fits one merge program: its jumps reach 32767 instructions


def is_global(name: str) -> bool:
    """Whether a map of this name holds an object's global variables."""
    return "." in name  # bpffs refuses a dot, so no other map has one


class Way(msgspec.Struct, frozen=True):
    """How the contents of a map are carried: the ``kind`` of carrier, its ``method`` and ``exactness`` in words."""

    kind: str
    method: str
    exactness: str = "exact"


#: The kind of carrier that each type of map has.
KINDS: dict[str, str] = {
    "hash": "entries",
    "lru_hash": "entries",
    "array": "entries",
    "percpu_hash": "entries",
    "lru_percpu_hash": "entries",
    "percpu_array": "entries",
    "lpm_trie": "entries",
    "hash_of_maps": "inner-maps",
    "array_of_maps": "inner-maps",
}


def way(old: MapSpec, new: MapSpec, rules: MapRules, features: Collection[str]) -> Way | str:
    """How ``old`` becomes ``new`` on a kernel with ``features``, or why this version cannot."""
    found = obstacle(old, new, rules)
    if found is not None:
        return found
    return _WAYS[KINDS[new.type]](old, new, rules, features)


def _entries(old: MapSpec, new: MapSpec, rules: MapRules, features: Collection[str]) -> Way:
    exactness = _exactness(new, rules)
    if _ITERATE_HASH in features and old.type in _ITERATED and new.type in _ITERATED and _in_kernel(old, new, rules):
        return Way("entries-in-kernel", "copy and merge in the kernel", exactness)
    return Way("entries", "batch copy, merge in the kernel", exactness)


def _in_kernel(old: MapSpec, new: MapSpec, rules: MapRules) -> bool:
    if any(spec.value is None or lock_offset(spec.value) is not None for spec in (old, new)):
        return False
    diff = diff_map(old, new, rules)
    return all(conversion is None or conversion.in_kernel for conversion in (diff.key, diff.value))


def _inner_maps(old: MapSpec, new: MapSpec, rules: MapRules, _features: Collection[str]) -> Way:
    found = _way_of_inner(old, new, rules)
    if found is None:
        return Way("inner-maps", "a new outer map with the same inner maps")
    assert isinstance(found, Way)  # an obstacle of theirs is one of the outer map
    return Way("inner-maps", f"a new map for each inner map ({found.method})", found.exactness)


_WAYS: dict[str, Callable[[MapSpec, MapSpec, MapRules, Collection[str]], Way]] = {
    "entries": _entries,
    "inner-maps": _inner_maps,
}


def converts(diff: MapDiff, rules: MapRules) -> bool:
    """Whether the map's entries are for the user's converter: where no layout changed, there is nothing to convert."""
    return rules.convert is not None and diff.verdict in ("lossless", "lossy", "needs-converter")


def refusals(diff: MapDiff, new: MapSpec, rules: MapRules) -> tuple[str, ...]:
    """Why the rules of the manifest cannot carry this map, although it could be read and written."""
    if _folds(diff, rules) and new.type not in _FOLDING:
        return (f"keys of a {new.type} map of which two may become one are not supported yet",)
    if not converts(diff, rules):
        return ()
    if KINDS.get(new.type, "entries") != "entries":
        return (f"converters for maps of type {new.type} are not supported yet",)
    module, _, name = (rules.convert or "").partition(":")
    missing = f"; {module}.py has no function {name}_key, which would convert the key"
    return tuple(
        f"{change.reason}{missing if change.path else ''}"
        for change in diff.changes
        if change.reason and not _answers(change, diff, rules)
    )


def losses(diff: MapDiff, rules: MapRules) -> tuple[Change, ...]:
    """The changes by which entries that are carried lose something; what a converter answers for loses nothing."""
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
    if not folds and not by_user:
        return found
    words = [_FOLDED[rules.on_collision or "error"]] if folds else []
    if folds or rules.function("_back") is None:
        missing = f"there is no {(rules.convert or '').partition(':')[2]}_back"
        why = "their old keys cannot be told" if folds else missing
        words.append(
            f"best-effort on the way back: {why}, so that after a failed cutover the old map has what the old release "
            "wrote and not what the new one did, and writes of this process meanwhile reach the new map only"
        )
    method = f"{rules.convert} in batches, merge in the kernel" if by_user else "merge in the kernel"
    return Way("entries", method, "; ".join((found.exactness, *words)))


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
    if new.type not in KINDS:
        return f"converting maps of type {new.type} is not supported yet"
    if KINDS[new.type] == "inner-maps":
        found = _way_of_inner(old, new, rules)
        return f"its inner maps: {found}" if isinstance(found, str) else None
    reach = 2 * new.key_size + 2 * new.value_size + old.key_size
    if reach > _MAX_REACH:
        return f"its keys and values take {reach} bytes in a merge, and more than {_MAX_REACH} are not supported yet"
    for spec in (old, new):
        if spec.flags & _PROGRAMS_BARRED:
            return "its flags bar programs from it (BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG), and the merge is one"
        if spec.value is not None and (found := _kernel_object(spec.value)):
            return f"its value holds a {found}, and converting such maps is not supported yet"
    if (words := _words_to_merge(new, rules)) > _MAX_WORDS:
        return f"its value takes {words} steps to merge, and more than {_MAX_WORDS} are not supported yet"
    return None


def _way_of_inner(old: MapSpec, new: MapSpec, rules: MapRules) -> Way | str | None:
    """How the inner maps are carried, or why they cannot be; None if they stay the same maps."""
    before, after, diff = inner_spec(old), inner_spec(new), diff_inner(old, new, rules)
    if before is None or after is None or diff is None:
        return "what they are is not known"
    if diff.verdict == "identical":
        return None
    if any(spec.value is not None and lock_offset(spec.value) is not None for spec in (before, after)):
        return "they hold a bpf_spin_lock, and new inner maps are made without the type information that it needs"
    # In batches whatever the kernel can do: for many small maps, the programs would take longer than the copy.
    return way(before, after, inner_rules(rules), ())


def _words_to_merge(spec: MapSpec, rules: MapRules) -> int:
    """Size of the merge program: a step for a field or 8 bytes of one; max and min try again and again."""
    fields = leaves(spec.value, rules, spec.tags) if spec.value is not None else ()
    return sum(4 if leaf.merge in ("max", "min") else max(1, leaf.size // 8) for leaf in fields)


def _kernel_object(layout: Type) -> str | None:
    if isinstance(layout, Array):
        return _kernel_object(layout.element)
    if isinstance(layout, Record):
        if layout.name == "bpf_spin_lock":
            return None  # a lock is free where nobody holds it, and the merge takes it
        if layout.name in SPECIAL:  # bytes that belong to the kernel, and that a copy would not carry
            return layout.name
        return next((found for field in layout.fields if (found := _kernel_object(field.type))), None)
    return None
