"""Records as a C programmer addresses them: anonymous structs opened up, bitfields in groups of whole bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from hitless.layout.model import Array, Field, Int, Pointer, Record, Type

__all__ = [
    "SPECIAL", "Member", "holds_object", "holds_special", "inside", "is_bytes", "is_text", "join", "lock_offset",
    "members", "overlapping", "repeated", "singles",
]  # fmt: skip

#: Records whose bytes belong to the kernel, and what is lost when an entry moves to another map (None: nothing).
SPECIAL: dict[str, str | None] = {
    "bpf_spin_lock": None,
    "bpf_res_spin_lock": None,
    "bpf_refcount": None,
    "bpf_timer": "an armed timer is not carried",
    "bpf_wq": "queued work is not carried",
    "bpf_task_work": "scheduled task work is not carried",
    "bpf_list_head": "the objects in the list are not carried",
    "bpf_list_node": "membership in a list is not carried",
    "bpf_rb_root": "the objects in the tree are not carried",
    "bpf_rb_node": "membership in a tree is not carried",
}


class Member(NamedTuple):
    """A part of a record at a whole byte.

    ``name`` of an anonymous union is ``{a|b}``, of a run of bitfields that share bytes ``{a,b}``; ``parts`` are then
    the names of what is inside. ``bits`` says that it is such a run; its type is a record of just those bitfields.
    A bitfield by itself, as :func:`singles` gives it, has a ``width`` in bits and begins ``shift`` bits into its byte.
    """

    name: str
    type: Type
    offset: int
    tags: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    bits: bool = False
    width: int = 0
    shift: int = 0


def holds_object(layout: Type) -> bool:
    """Whether some bytes of it belong to the kernel: a lock, a timer, a list head, a pointer to one of its objects."""
    return holds_special(layout) or _holds_pointer(layout)


def holds_special(layout: Type) -> bool:
    """Whether some of its bytes are one of ``SPECIAL``."""
    if isinstance(layout, Array):
        return holds_special(layout.element)
    return isinstance(layout, Record) and (
        layout.name in SPECIAL or any(holds_special(field.type) for field in layout.fields)
    )


def _holds_pointer(layout: Type) -> bool:
    if isinstance(layout, Array):
        return _holds_pointer(layout.element)
    if isinstance(layout, Record):
        return any(_holds_pointer(field.type) for field in layout.fields)
    return isinstance(layout, Pointer) and layout.kernel


def lock_offset(made: Type) -> int | None:
    """Where in a value the bpf_spin_lock is that guards it, in bytes; None if there is none."""
    if not isinstance(made, Record) or made.union:
        return None
    for field in made.fields:
        if isinstance(field.type, Record):
            inner = 0 if field.type.name == "bpf_spin_lock" else lock_offset(field.type)
            if inner is not None:
                return field.offset // 8 + inner
    return None


def members(record: Record) -> tuple[Member, ...]:
    """The members of a record, offsets in bytes."""
    out: list[Member] = []
    run: list[Field] = []

    def flush() -> None:
        if run:
            start = run[0].offset // 8
            end = max((field.offset + field.bits + 7) // 8 for field in run)
            inner = tuple(Field(f.name, f.type, f.offset - 8 * start, f.bits, f.tags) for f in run)
            names = tuple(field.name for field in run)
            out.append(Member(f"{{{','.join(names)}}}", Record("", end - start, inner), start, (), names, True))
            run.clear()

    for field in record.fields:
        if field.bits:
            # A bitfield that begins at a byte of its own starts a new group; in a union all begin at bit 0.
            if record.union or (run and field.offset // 8 >= (run[-1].offset + run[-1].bits + 7) // 8):
                flush()
            run.append(field)
            continue
        flush()
        at = field.offset // 8
        if field.name or not isinstance(field.type, Record):
            out.append(Member(field.name, field.type, at, field.tags))
        elif field.type.union and not record.union:
            names = tuple(name for m in members(field.type) for name in m.parts or (m.name,))
            out.append(Member(f"{{{'|'.join(names)}}}", field.type, at, field.tags, names))
        elif record.union:
            out.append(Member(f"{{anonymous {len(out)}}}", field.type, at, field.tags))
        else:
            out += [m._replace(offset=m.offset + at, tags=m.tags + field.tags) for m in members(field.type)]
    flush()
    return tuple(out)


def repeated(fields: Iterable[Field]) -> str | None:
    """A name that two of these fields bear, those of anonymous structs and unions among them; None if none is."""
    seen: set[str] = set()
    todo = list(fields)
    while todo:
        field = todo.pop()
        if field.name in seen:
            return field.name
        if field.name:
            seen.add(field.name)
        elif isinstance(field.type, Record):
            todo += field.type.fields
    return None


def overlapping(fields: Sequence[Field]) -> tuple[Field, Field] | None:
    """Neighbours in a struct of which the second begins before the first ends, as no compiler places them."""
    for before, after in pairwise(fields):
        if after.offset < before.offset + (before.bits or 8 * before.type.size):
            return before, after
    return None


def singles(record: Record) -> tuple[Member, ...]:
    """The members of a record with every bitfield by itself; unnamed ones are padding and left out."""
    out: list[Member] = []
    for member in members(record):
        if not member.bits or not isinstance(member.type, Record):
            out.append(member)
            continue
        for field in member.type.fields:
            if field.name:
                at = member.offset + field.offset // 8
                out.append(Member(field.name, field.type, at, field.tags, width=field.bits, shift=field.offset % 8))
    return tuple(out)


def inside(record: Record, at: int = 0) -> dict[str, Member]:
    """What C reaches by its bare name in a record, through anonymous structs and unions, offsets from ``at``."""
    out: dict[str, Member] = {}
    for member in singles(record):
        if member.name.startswith("{") and isinstance(member.type, Record):
            out |= inside(member.type, at + member.offset)
        else:
            out[member.name] = member._replace(offset=at + member.offset)
    return out


def is_text(made: Type) -> bool:
    """Whether this is an array of ``char``."""
    return isinstance(made, Array) and isinstance(made.element, Int) and made.element.encoding == "char"


def is_bytes(made: Type) -> bool:
    """Whether this is an array of ``char`` or of unsigned bytes."""
    return is_text(made) or (
        isinstance(made, Array)
        and isinstance(made.element, Int)
        and made.element.size == 1
        and not made.element.signed
        and not made.element.encoding
    )


def join(path: str, name: str) -> str:
    """``path.name``, or ``name`` at the root."""
    return f"{path}.{name}" if path else name
