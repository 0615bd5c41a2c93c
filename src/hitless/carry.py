"""How apply carries what :mod:`hitless.layout.answers` says it can, and what bars it: pure, so that CI can ask."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection

import msgspec

from hitless.layout.answers import answer
from hitless.layout.conversion import Move, leaves
from hitless.layout.diff import diff_map
from hitless.layout.members import SPECIAL, lock_offset
from hitless.layout.model import Array, MapSpec, Pointer, Record, Type
from hitless.layout.rules import MapRules

__all__ = ["Way", "is_global", "obstacle", "way"]

_PROGRAMS_BARRED = 1 << 7 | 1 << 8  # BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG
# Types of which one can become the other: (old, new).
_ALIKE = {
    ("hash", "lru_hash"), ("lru_hash", "hash"), ("array", "hash"),
    ("percpu_hash", "lru_percpu_hash"), ("lru_percpu_hash", "percpu_hash"), ("percpu_array", "percpu_hash"),
}  # fmt: skip
_ITERATED = ("hash", "lru_hash")
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


def way(old: MapSpec, new: MapSpec, rules: MapRules, features: Collection[str]) -> Way | str:
    """How ``old`` becomes ``new`` on a kernel with ``features``, or why this version cannot."""
    found = obstacle(old, new, rules)
    if found is not None:
        return found
    return _WAYS[answer(new.type).kind](old, new, rules, features)


def _entries(old: MapSpec, new: MapSpec, rules: MapRules, features: Collection[str]) -> Way:
    exactness = _exactness(new, rules)
    if _ITERATE_HASH in features and old.type in _ITERATED and new.type in _ITERATED and _in_kernel(old, new, rules):
        return Way("entries-in-kernel", "copy and merge in the kernel", exactness)
    return Way("entries", "batch copy, merge in the kernel", exactness)


def _in_kernel(old: MapSpec, new: MapSpec, rules: MapRules) -> bool:
    if any(spec.value is None or lock_offset(spec.value) is not None for spec in (old, new)):
        return False
    diff = diff_map(old, new, rules)
    if diff.value is None and new.value is not None and _holds_object(new.value):
        return False  # a program may not read the whole value; a conversion leaves those bytes out
    return all(conversion is None or conversion.in_kernel for conversion in (diff.key, diff.value))


def _holds_object(layout: Type) -> bool:
    """Whether some bytes of it belong to the kernel: a timer, a list head, a pointer to one of its objects."""
    if isinstance(layout, Array):
        return _holds_object(layout.element)
    if isinstance(layout, Record):
        return layout.name in SPECIAL or any(_holds_object(field.type) for field in layout.fields)
    return isinstance(layout, Pointer) and layout.kernel


def _queue(_old: MapSpec, _new: MapSpec, _rules: MapRules, _features: Collection[str]) -> Way:
    return Way(
        "queue",
        "moved in the kernel after the cutover",
        "exact: none lost, none twice, in order; but between cutover and catch-up the new release finds it empty, and "
        "what it pushes while elements are being moved may come among them",
    )


def _ring(_old: MapSpec, _new: MapSpec, _rules: MapRules, _features: Collection[str]) -> Way:
    return Way(
        "ring",
        "its readers drain the old one",
        "exact for readers that hold the old one; it stays in previous/ until the upgrade after this one",
    )


def _references(_old: MapSpec, _new: MapSpec, _rules: MapRules, _features: Collection[str]) -> Way:
    return Way(
        "references",
        "single calls",
        "exact; devices are looked for in the network namespace of this process, and an entry keeps its program until "
        "who wrote it writes it again",
    )


_WAYS: dict[str, Callable[[MapSpec, MapSpec, MapRules, Collection[str]], Way]] = {
    "entries": _entries,
    "queue": _queue,
    "ring": _ring,
    "references": _references,
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
    if kind == "entries":
        return _entries_obstacle(old, new, rules)
    if kind == "queue":
        return _queue_obstacle(old, new, rules)
    if kind == "references" and diff_map(old, new, rules).key is not None:
        return f"converting the keys of a {new.type} is not supported"
    return None


def _entries_obstacle(old: MapSpec, new: MapSpec, rules: MapRules) -> str | None:
    reach = 2 * new.key_size + 2 * new.value_size + old.key_size
    if reach > _MAX_REACH:
        return f"its keys and values take {reach} bytes in a merge, and more than {_MAX_REACH} are not supported yet"
    for spec in (old, new):
        if spec.flags & _PROGRAMS_BARRED:
            return "its flags bar programs from it (BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG), and the merge is one"
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


def _words_to_merge(spec: MapSpec, rules: MapRules) -> int:
    """Size of the merge program: a step for a field or 8 bytes of one; max and min try again and again."""
    fields = leaves(spec.value, rules, spec.tags) if spec.value is not None else ()
    return sum(4 if leaf.merge in ("max", "min") else max(1, leaf.size // 8) for leaf in fields)
