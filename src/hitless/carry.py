"""What apply of this version can carry from one map to another, beyond what layouts allow: pure, so that CI can ask."""

from __future__ import annotations

from hitless.layout.conversion import leaves
from hitless.layout.members import SPECIAL
from hitless.layout.model import Array, MapSpec, Record, Type
from hitless.layout.rules import MapRules

__all__ = ["is_global", "obstacle"]

_CONVERTIBLE_TYPES = ("hash", "lru_hash", "array")
_PROGRAMS_BARRED = 1 << 7 | 1 << 8  # BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG
_MAX_WORDS = 2000  # what surely fits one merge program: its jumps reach 32767 instructions


def is_global(name: str) -> bool:
    """Whether a map of this name holds an object's global variables."""
    return "." in name  # bpffs refuses a dot, so no other map has one


def obstacle(old: MapSpec, new: MapSpec, rules: MapRules) -> str | None:
    """Why entries of ``old`` cannot be converted into ``new`` by this version, or None."""
    if old.type != new.type:
        return f"from a map of type {old.type} to {new.type} is not supported yet"
    if new.type not in _CONVERTIBLE_TYPES:
        return f"converting maps of type {new.type} is not supported yet"
    if new.type == "array" and new.max_entries < old.max_entries:
        return "making an array smaller is not supported yet"
    for spec in (old, new):
        if spec.flags & _PROGRAMS_BARRED:
            return "its flags bar programs from it (BPF_F_RDONLY_PROG, BPF_F_WRONLY_PROG), and the merge is one"
        if spec.value is not None and (found := _kernel_object(spec.value)):
            return f"its value holds a {found}, and converting such maps is not supported yet"
    if (words := _words_to_merge(new, rules)) > _MAX_WORDS:
        return f"its value takes {words} steps to merge, and more than {_MAX_WORDS} are not supported yet"
    return None


def _words_to_merge(spec: MapSpec, rules: MapRules) -> int:
    """Size of the merge program: a step for a field or 8 bytes of one; max and min try again and again."""
    fields = leaves(spec.value, rules, spec.tags) if spec.value is not None else ()
    return sum(4 if leaf.merge in ("max", "min") else max(1, leaf.size // 8) for leaf in fields)


def _kernel_object(layout: Type) -> str | None:
    if isinstance(layout, Array):
        return _kernel_object(layout.element)
    if isinstance(layout, Record):
        if layout.name in SPECIAL:  # bytes that belong to the kernel, and that a copy would not carry
            return layout.name
        return next((found for field in layout.fields if (found := _kernel_object(field.type))), None)
    return None
