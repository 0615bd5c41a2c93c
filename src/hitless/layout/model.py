"""What a release says about its maps and programs, as frozen values.

A :data:`Type` is a finite tree: typedefs, qualifiers and BTF ids are resolved away when it is read, and a pointer
holds only the name of what it points to, so recursive C types end there. Two types that are the same bytes with
the same meaning may still differ in names; comparing them is the business of :mod:`hitless.layout.diff`.

Units: ``size`` is in bytes, ``offset`` and ``bits`` of a field are in bits, as in BTF.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = [
    "Array",
    "Enum",
    "Field",
    "Float",
    "Int",
    "MapSpec",
    "ObjectSpec",
    "Opaque",
    "Ops",
    "Order",
    "Pointer",
    "ProgramSpec",
    "Record",
    "Type",
]


_STRUCT_OPS = ("struct_ops", "struct_ops")  # types of program and attachment


class Int(msgspec.Struct, frozen=True, tag="int"):
    """An integer of ``size`` bytes; ``name`` is as spelled in C (``__u32``), ``char`` and ``bool`` by encoding."""

    name: str
    size: int
    signed: bool
    encoding: str = ""  # "", "char" or "bool"


class Float(msgspec.Struct, frozen=True, tag="float"):
    """A floating-point number of ``size`` bytes."""

    name: str
    size: int


class Enum(msgspec.Struct, frozen=True, tag="enum"):
    """An enumeration stored in ``size`` bytes, with its (name, value) pairs in source order."""

    name: str
    size: int
    signed: bool
    values: tuple[tuple[str, int], ...]


class Pointer(msgspec.Struct, frozen=True, tag="pointer"):
    """A pointer; ``target`` names what it points to and is never followed.

    Type tags come first in ``target``, as in ``kptr struct task_struct``.
    """

    target: str
    size: int = 8

    @property
    def name(self) -> str:
        """C spelling, e.g. ``struct sock *``."""
        return f"{self.target} *"

    @property
    def kernel(self) -> bool:
        """Whether it holds an object of the kernel (a kptr), and is the kernel's to read and write."""
        return "kptr" in self.target.split()[0]


class Array(msgspec.Struct, frozen=True, tag="array"):
    """``count`` elements one after the other; a flexible array has ``count`` 0."""

    element: Type
    count: int

    @property
    def size(self) -> int:
        """Bytes of all elements."""
        return self.element.size * self.count

    @property
    def name(self) -> str:
        """C spelling, e.g. ``__u8[16]``."""
        return f"{self.element.name}[{self.count}]"


class Field(msgspec.Struct, frozen=True):
    """A member of a struct or union. ``name`` is empty for an anonymous member.

    ``offset`` is from the start of the enclosing record, in bits; ``bits`` is the width of a bitfield, 0 if the
    member is none. ``tags`` are its declaration tags (``btf_decl_tag``) in source order.
    """

    name: str
    type: Type
    offset: int
    bits: int = 0
    tags: tuple[str, ...] = ()


class Record(msgspec.Struct, frozen=True, tag="record"):
    """A struct, or a union if ``union``; ``name`` is its tag or typedef name, empty if it has none."""

    name: str
    size: int
    fields: tuple[Field, ...]
    union: bool = False


class Opaque(msgspec.Struct, frozen=True, tag="opaque"):
    """Bytes that have a size but no meaning known to us; equal to nothing, not even to itself in a comparison."""

    name: str
    size: int


#: Byte order of the processor that the records are for.
Order = Literal["little", "big"]

Type = Int | Float | Enum | Pointer | Array | Record | Opaque


class Ops(msgspec.Struct, frozen=True):
    """What a struct_ops map is made of: a struct of the kernel of this ``type``, there under its own ``name``."""

    type: str
    name: str


class MapSpec(msgspec.Struct, frozen=True):
    """One map as its object, snapshot or the live kernel defines it.

    ``type`` is the kernel's name in lower case (``hash``, ``lru_hash``, ``percpu_array``...). ``key`` and ``value``
    are None when only sizes are known. ``flags`` are the BPF_F_* map flags. ``inner`` is the spec of inner maps.
    ``extra`` is ``map_extra``, whose meaning depends on the type. ``tags`` are the declaration tags of the map's
    variable in C. ``order`` is the byte order of the processor that the object is for.
    ``slots`` are (index, name) of the programs, or inner maps, that libbpf puts into it when it is loaded.
    ``inferred`` are (side, type name) of types that were guessed by size and name: where the user accepted that, the
    side has the type, else the guess is a proposal and the side has none.
    ``ops`` is for a struct_ops map, whose values the kernel lays out: ``value_size`` is 0.
    """

    name: str
    type: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    key: Type | None = None
    value: Type | None = None
    pinned_by_name: bool = False
    inner: MapSpec | None = None
    extra: int = 0
    tags: tuple[str, ...] = ()
    order: Order = "little"
    slots: tuple[tuple[int, str], ...] = ()
    inferred: tuple[tuple[str, str], ...] = ()
    ops: Ops | None = None

    def inferred_type(self, side: str) -> str | None:
        """The name of the type that was guessed for ``key`` or ``value``, or None."""
        return dict(self.inferred).get(side)


class ProgramSpec(msgspec.Struct, frozen=True):
    """One program: its function name, its ELF section, and what libbpf makes of that section's name.

    ``type`` and ``attach_type`` are the kernel's names in lower case (``cgroup_sock_addr``,
    ``cgroup_inet4_connect``), empty when the section name is not one that libbpf knows. ``autoload`` is false for a
    section that begins with ``?``: libbpf leaves such a program out unless it is asked for.
    """

    name: str
    section: str
    type: str = ""
    attach_type: str = ""
    autoload: bool = True

    @property
    def may_sleep(self) -> bool:
        """Whether it may sleep on its hook, as in waiting for a page of user memory."""
        return self.section.lstrip("?").split("/")[0].endswith(".s")


class ObjectSpec(msgspec.Struct, frozen=True):
    """Everything read from one object file. Global data appear as maps named ``.rodata``, ``.data``, ``.bss``..."""

    name: str
    maps: tuple[MapSpec, ...]
    programs: tuple[ProgramSpec, ...]
    license: str = ""

    @property
    def hookable(self) -> tuple[ProgramSpec, ...]:
        """What hooks can run: the programs, and each struct_ops map as if it were one."""
        ops = [(spec.name, spec.ops.name) for spec in self.maps if spec.ops is not None]
        return (*self.programs, *(ProgramSpec(name, f".struct_ops/{own}", *_STRUCT_OPS) for name, own in ops))
