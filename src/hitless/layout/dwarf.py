"""Types from DWARF, for objects whose BTF leaves out the types that only their programs use.

clang puts a type into BTF when a map or a function names it. A map declared with ``__uint(value_size, sizeof(T))``
names no type, so that T is often found in the debug information only, until the object is stripped of it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from elftools.common.exceptions import DWARFError, ELFError
from elftools.construct.core import ConstructError
from elftools.elf.elffile import ELFFile

from hitless.errors import LayoutError, UnsupportedError
from hitless.layout.btf import renamed
from hitless.layout.model import Array, Enum, Field, Float, Int, Pointer, Record, Type

__all__ = ["DAMAGE", "Dwarf"]

#: What pyelftools is known to raise on damaged input; it was written for files that a linker made.
DAMAGE = (
    ELFError, DWARFError, ConstructError, UnicodeError, ValueError, LookupError, TypeError, AttributeError,
    ArithmeticError, AssertionError, EOFError, OSError, MemoryError, RecursionError,
)  # fmt: skip

# DW_TAG_LLVM_annotation; pyelftools gives the number of a tag that it has no name for.
_ANNOTATION = (0x6000, "DW_TAG_LLVM_annotation")
_BOOL, _FLOAT, _SIGNED, _SIGNED_CHAR = 2, 4, 5, 6
_RECORDS = {"DW_TAG_structure_type": "struct", "DW_TAG_union_type": "union"}
_NAMED = {**_RECORDS, "DW_TAG_typedef": "", "DW_TAG_enumeration_type": "enum", "DW_TAG_base_type": ""}
_QUALIFIERS = {
    "DW_TAG_const_type": "const", "DW_TAG_volatile_type": "volatile", "DW_TAG_restrict_type": "restrict",
    "DW_TAG_atomic_type": "_Atomic",
}  # fmt: skip
_MAX_DEPTH = 64
_MAX_NODES = 200_000


class Dwarf:
    """The types of an object's debug information, by name."""

    def __init__(self, named: dict[str, list[Any]], where: str, little: bool) -> None:
        self._named = named
        self._where = where
        self._little = little
        self._nodes = 0

    @classmethod
    def parse(cls, data: bytes, where: str) -> Dwarf:
        """Read an ELF file; without debug information there are no types in it. ``where`` begins messages.

        Raises :class:`LayoutError` if it is damaged.
        """
        named: dict[str, list[Any]] = {}
        try:
            elf = ELFFile(io.BytesIO(data))
            if not elf.has_dwarf_info():
                return cls(named, where, True)
            for unit in elf.get_dwarf_info().iter_CUs():
                for entry in unit.iter_DIEs():
                    name = entry.attributes.get("DW_AT_name")
                    if entry.tag in _NAMED and name is not None and "DW_AT_declaration" not in entry.attributes:
                        named.setdefault(name.value.decode(), []).append(entry)
            return cls(named, where, elf.little_endian)
        except DAMAGE as error:
            raise LayoutError(f"{where}: damaged debug information: {error}") from error

    def names(self) -> Iterator[str]:
        """Names of structs, unions and typedefs."""
        wanted = (*_RECORDS, "DW_TAG_typedef")
        return (name for name, entries in self._named.items() if any(entry.tag in wanted for entry in entries))

    def find(self, name: str) -> Type | None:
        """The type called ``name`` (``struct x`` also), or None; a struct or union comes before a typedef.

        Raises :class:`LayoutError` if it is damaged, or differs between two source files.
        """
        wanted, _, bare = name.rpartition(" ")
        if wanted not in ("struct", "union", "enum"):
            wanted, bare = "", name
        order = list(_NAMED)
        found = [e for e in self._named.get(bare, ()) if not wanted or _NAMED[e.tag] == wanted]
        if not found:
            return None
        first = min(order.index(entry.tag) for entry in found)
        self._nodes = 0
        try:
            made = [self._type(entry, 0) for entry in found if order.index(entry.tag) == first]
        except DAMAGE as error:
            raise LayoutError(f"{self._where}: damaged debug information: type {name!r}: {error}") from error
        if any(other != made[0] for other in made):
            raise LayoutError(f"{self._where}: type {name!r} differs between its source files")
        return made[0]

    def _bad(self, entry: Any, why: str) -> LayoutError:
        return LayoutError(f"{self._where}: debug information at {entry.offset:#x}: {why}", offset=entry.offset)

    def _type(self, entry: Any, depth: int) -> Type:
        self._nodes += 1
        if depth > _MAX_DEPTH or self._nodes > _MAX_NODES:
            raise self._bad(entry, f"nested more than {_MAX_DEPTH} deep, or more than {_MAX_NODES} parts")
        name = _text(entry, "DW_AT_name")
        match entry.tag:
            case "DW_TAG_base_type":
                return self._base(entry, name)
            case "DW_TAG_typedef":
                return renamed(self._target(entry, depth), name)
            case "DW_TAG_pointer_type":
                return Pointer(_spell(entry))
            case "DW_TAG_enumeration_type":
                return self._enum(entry, name, depth)
            case "DW_TAG_array_type":
                return self._array(entry, depth)
            case tag if tag in _QUALIFIERS:
                return self._target(entry, depth)
            case tag if tag in _RECORDS:
                return self._record(entry, name, depth)
        raise UnsupportedError(f"{self._where}: debug information: {entry.tag} has no layout", feature=str(entry.tag))

    def _target(self, entry: Any, depth: int) -> Type:
        if "DW_AT_type" not in entry.attributes:
            raise self._bad(entry, f"{_text(entry, 'DW_AT_name')!r} is void and has no layout")
        return self._type(entry.get_DIE_from_attribute("DW_AT_type"), depth + 1)

    def _base(self, entry: Any, name: str) -> Type:
        size, encoding = _number(entry, "DW_AT_byte_size"), _number(entry, "DW_AT_encoding")
        if encoding == _FLOAT and size in (2, 4, 8, 12, 16):
            return Float(name, size)
        if size not in (1, 2, 4, 8, 16):
            raise self._bad(entry, f"{name!r} claims a size of {size} bytes")
        text = "bool" if encoding == _BOOL else "char" if name == "char" else ""
        return Int(name, size, encoding in (_SIGNED, _SIGNED_CHAR), text)

    def _enum(self, entry: Any, name: str, depth: int) -> Enum:
        size = _number(entry, "DW_AT_byte_size")
        if size not in (1, 2, 4, 8) or "DW_AT_declaration" in entry.attributes:
            raise self._bad(entry, f"enum {name!r} claims a size of {size} bytes")
        base = self._target(entry, depth) if "DW_AT_type" in entry.attributes else None
        values = [
            (_text(child, "DW_AT_name"), _number(child, "DW_AT_const_value"))
            for child in entry.iter_children() if child.tag == "DW_TAG_enumerator"
        ]  # fmt: skip
        signed = base.signed if isinstance(base, Int) else any(value < 0 for _, value in values)
        top = 1 << 8 * size
        ranged = ((text, value % top) for text, value in values)
        return Enum(name, size, signed, tuple((t, v - top if signed and v >= top // 2 else v) for t, v in ranged))

    def _array(self, entry: Any, depth: int) -> Type:
        made = self._target(entry, depth)
        for child in reversed([child for child in entry.iter_children() if child.tag == "DW_TAG_subrange_type"]):
            count = 0
            if "DW_AT_count" in child.attributes:
                count = _number(child, "DW_AT_count")
            elif "DW_AT_upper_bound" in child.attributes:
                count = _number(child, "DW_AT_upper_bound") + 1
            made = Array(made, count if made.size else 0)
            if not 0 <= made.size < 1 << 32:
                raise self._bad(entry, f"an array of {count} elements")
        return made

    def _record(self, entry: Any, name: str, depth: int) -> Record:
        what = f"{_RECORDS[entry.tag]} {name}"
        if "DW_AT_declaration" in entry.attributes:
            raise self._bad(entry, f"{what} is only declared and has no layout")
        size = _number(entry, "DW_AT_byte_size")
        fields = []
        for child in entry.iter_children():
            if child.tag != "DW_TAG_member":
                continue
            made, bits = self._target(child, depth), _number(child, "DW_AT_bit_size")
            offset = self._place(child, made, bits)
            end = offset + (bits or 8 * made.size)
            if (not bits and offset % 8) or not 0 <= offset <= end <= 8 * size:
                raise self._bad(child, f"{what}: a member lies outside its {size} bytes")
            if bits and (not isinstance(made, Int | Enum) or bits > 8 * made.size):
                raise self._bad(child, f"{what}: a bitfield of {bits} bits in {made.name!r}")
            fields.append(Field(_text(child, "DW_AT_name"), made, offset, bits, _tags(child, "btf_decl_tag")))
        return Record(name, size, tuple(fields), entry.tag == "DW_TAG_union_type")

    def _place(self, entry: Any, made: Type, bits: int) -> int:
        at = 8 * _number(entry, "DW_AT_data_member_location")
        if not bits:
            return at
        if "DW_AT_bit_offset" in entry.attributes:
            # Before DWARF 4: counted from the high end of the storage unit.
            first = _number(entry, "DW_AT_bit_offset")
            unit = 8 * (_number(entry, "DW_AT_byte_size") or made.size)
            return at + (unit - first - bits if self._little else first)
        return at + _number(entry, "DW_AT_data_bit_offset")


def _text(entry: Any, attribute: str) -> str:
    found = entry.attributes.get(attribute)
    return found.value.decode() if found is not None else ""


def _number(entry: Any, attribute: str) -> int:
    found = entry.attributes.get(attribute)
    value = found.value if found is not None else 0
    if not isinstance(value, int):
        raise ValueError(f"{attribute} is no number")
    return value


def _tags(entry: Any, kind: str) -> tuple[str, ...]:
    return tuple(
        _text(child, "DW_AT_const_value") for child in entry.iter_children()
        if child.tag in _ANNOTATION and _text(child, "DW_AT_name") == kind
    )  # fmt: skip


def _spell(pointer: Any) -> str:
    """What a pointer points to, in the words that BTF's reader uses, so that both compare equal."""
    words: list[str] = []
    entry = pointer
    for _ in range(_MAX_DEPTH):
        if entry.tag == "DW_TAG_pointer_type":
            words += _tags(entry, "btf_type_tag")
        if "DW_AT_type" not in entry.attributes:
            return " ".join([*words, "void"])
        entry = entry.get_DIE_from_attribute("DW_AT_type")
        if entry.tag == "DW_TAG_pointer_type":
            words.append("pointer to")
        elif entry.tag in _QUALIFIERS:
            words.append(_QUALIFIERS[entry.tag])
        else:
            prefix = _NAMED.get(entry.tag, "")
            return " ".join([*words, *([prefix] if prefix else []), _text(entry, "DW_AT_name") or "(anonymous)"])
    raise ValueError("a chain of pointers without end")
