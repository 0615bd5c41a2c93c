"""BTF, the kernel's type information, from raw bytes to :data:`~hitless.layout.model.Type` trees.

The input may come from a hostile or broken object: every offset is checked against the bytes that are there, every
chain of references is bounded, and whatever does not add up raises :class:`~hitless.errors.LayoutError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from hitless.errors import LayoutError, UnsupportedError
from hitless.layout.members import overlapping, repeated
from hitless.layout.model import Array, Enum, Field, Float, Int, Opaque, Order, Pointer, Record, Type

__all__ = ["Btf", "Section", "Variable", "renamed"]

MAGIC = 0xEB9F
(
    VOID, INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE,
    CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64,
) = range(20)  # fmt: skip

_HEADER = "HBBIIIII"
_HEADER_SIZE = 24
_TYPE_SIZE = 12

# Bytes that follow the common header of each kind: fixed, and per item of the kind's list.
_EXTRA = {
    INT: (4, 0), PTR: (0, 0), ARRAY: (12, 0), STRUCT: (0, 12), UNION: (0, 12), ENUM: (0, 8), FWD: (0, 0),
    TYPEDEF: (0, 0), VOLATILE: (0, 0), CONST: (0, 0), RESTRICT: (0, 0), FUNC: (0, 0), FUNC_PROTO: (0, 8),
    VAR: (4, 0), DATASEC: (0, 12), FLOAT: (0, 0), DECL_TAG: (4, 0), TYPE_TAG: (0, 0), ENUM64: (0, 12),
}  # fmt: skip
_NAMED = (STRUCT, UNION, TYPEDEF, ENUM, ENUM64, INT, FLOAT)
_MODIFIERS = (VOLATILE, CONST, RESTRICT, TYPE_TAG)

# The kernel refuses types nested deeper than 32; the other two limits only keep a lying blob from costing us
# unbounded time, since a few hundred bytes of BTF can describe a tree with 2**100 leaves. The largest of a kernel's
# own types has some 5,000 parts.
_MAX_DEPTH = 64
_MAX_NODES = 100_000
_MAX_SIZE = 1 << 32


class _Raw(NamedTuple):
    kind: int
    flag: bool
    vlen: int
    name: int
    word: int
    extra: int


class Variable(NamedTuple):
    """A variable of a data section: its name, type id, offset and size in bytes, its declaration tags, and whether
    it is visible outside its file."""

    name: str
    type_id: int
    offset: int
    size: int
    tags: tuple[str, ...]
    exported: bool


class Section(NamedTuple):
    """A DATASEC: the variables that live in the ELF section ``name`` of ``size`` bytes (0 before linking)."""

    name: str
    size: int
    variables: tuple[Variable, ...]


class Btf:
    """A parsed BTF blob. Type ids are as in the blob: 0 is void."""

    def __init__(self, data: bytes, raw: list[_Raw], strings: bytes, where: str, order: Order = "little") -> None:
        #: Byte order of the processor that the types are for.
        self.order: Order = order
        mark = "<" if order == "little" else ">"
        self._word = struct.Struct(mark + "I")
        self._number = struct.Struct(mark + "i")
        self._pair = struct.Struct(mark + "II")
        self._signed_pair = struct.Struct(mark + "Ii")
        self._triple = struct.Struct(mark + "III")
        self._bytes = data
        self._where = where
        self._raw = raw
        self._strings = strings
        self._types: dict[int, tuple[Type, int]] = {}
        self._open: set[int] = set()
        self._tags: dict[tuple[int, int], tuple[str, ...]] | None = None
        self._names: dict[str, list[int]] | None = None

    @classmethod
    def parse(cls, data: bytes, where: str = "BTF") -> Btf:
        """Read a BTF blob (an ELF's ``.BTF`` section, or what BPF_OBJ_GET_INFO_BY_FD gives).

        ``where`` begins the messages of errors, those of later calls too.

        Either byte order is read; ``order`` says which it is.

        Raises :class:`LayoutError` if it is cut short or contradicts itself, :class:`UnsupportedError` if it is of a
        version or with a kind that came after this parser.
        """
        if len(data) < _HEADER_SIZE:
            raise LayoutError(f"{where}: {len(data)} bytes are too few for a header", size=len(data))
        order: Order = "big" if data[:2] == MAGIC.to_bytes(2, "big") else "little"
        mark = "<" if order == "little" else ">"
        magic, version, _flags, header, type_off, type_len, str_off, str_len = struct.unpack_from(mark + _HEADER, data)
        if magic != MAGIC:
            raise LayoutError(f"{where}: magic is {magic:#06x}, not {MAGIC:#06x}: this is no BTF", magic=magic)
        if version != 1:
            raise UnsupportedError(
                f"{where}: version {version} is not known, only 1 is", feature=f"BTF version {version}"
            )
        if header < _HEADER_SIZE or header > len(data):
            raise LayoutError(f"{where}: header length {header} is impossible", header=header)
        ends = (("types", header + type_off + type_len), ("strings", header + str_off + str_len))
        for what, end in ends:
            if end > len(data):
                raise LayoutError(
                    f"{where}: cut short: by its header the {what} end at byte {end}, but there are {len(data)}",
                    size=len(data),
                )
        strings = data[header + str_off : header + str_off + str_len]
        if not strings or strings[0] or strings[-1]:
            raise LayoutError(f"{where}: the string table does not begin and end with NUL")
        raw = [_Raw(VOID, False, 0, 0, 0, 0)]
        at, end = header + type_off, header + type_off + type_len
        words = struct.Struct(mark + "III")
        while at < end:
            if at + _TYPE_SIZE > end:
                raise _short(where, len(raw), at, end)
            name, info, size = words.unpack_from(data, at)
            kind, count = info >> 24 & 0x1F, info & 0xFFFF
            if kind not in _EXTRA:
                raise UnsupportedError(
                    f"{where}: type {len(raw)} at byte {at} has kind {kind}, which this parser does not know",
                    feature=f"BTF kind {kind}",
                )
            fixed, each = _EXTRA[kind]
            at += _TYPE_SIZE
            if at + fixed + each * count > end:
                raise _short(where, len(raw), at - _TYPE_SIZE, end)
            raw.append(_Raw(kind, bool(info >> 31), count, name, size, at))
            at += fixed + each * count
        return cls(data, raw, strings, where, order)

    def __len__(self) -> int:
        return len(self._raw)

    def layout(self, type_id: int) -> Type:
        """The type with this id as a finite tree, typedefs and qualifiers resolved.

        Raises :class:`LayoutError` if the type has no layout (void, a function, a forward declaration) or lies
        about itself: members outside their struct, references to nothing, endless nesting.
        """
        return self._layout(type_id, 0)[0]

    def find(self, name: str) -> Type | None:
        """The struct, union, typedef, enum or scalar called ``name`` (``struct x`` also), or None.

        A name that several kinds bear means the struct or union first, then the typedef.
        """
        wanted, _, bare = name.rpartition(" ")
        kinds = {"struct": (STRUCT,), "union": (UNION,), "enum": (ENUM, ENUM64)}.get(wanted)
        if kinds is None:
            kinds, bare = _NAMED, name
        found = [i for i in self._named().get(bare, []) if self._raw[i].kind in kinds]
        return self.layout(min(found, key=lambda i: (_NAMED.index(self._raw[i].kind), i))) if found else None

    def names(self) -> Iterator[str]:
        """Names of structs, unions and typedefs."""
        kinds = (STRUCT, UNION, TYPEDEF)
        return (name for name, ids in self._named().items() if any(self._raw[i].kind in kinds for i in ids))

    def sections(self) -> dict[str, Section]:
        """Every DATASEC by name."""
        out = {}
        for type_id, raw in enumerate(self._raw):
            if raw.kind == DATASEC:
                name = self._string(raw.name)
                out[name] = Section(name, raw.word, tuple(self._variables(type_id)))
        return out

    # What the map definitions of .maps need beyond layouts: they encode numbers as array sizes behind pointers.

    def members(self, type_id: int) -> list[tuple[str, int]]:
        """(name, type id) of each member of a struct or union."""
        raw = self._at(self._resolve(type_id))
        if raw.kind not in (STRUCT, UNION):
            raise LayoutError(f"{self._where}: type {type_id} is no struct or union", type_id=type_id)
        items = (self._triple.unpack_from(self._bytes, raw.extra + 12 * i) for i in range(raw.vlen))
        return [(self._string(name), ref) for name, ref, _ in items]

    def offset_of(self, type_id: int, name: str) -> int | None:
        """Where member ``name`` of a struct begins, in bytes, or None if there is none."""
        raw = self._at(self._resolve(type_id))
        for index, (member, _) in enumerate(self.members(type_id)):
            if member == name:
                _, _, place = self._triple.unpack_from(self._bytes, raw.extra + 12 * index)
                return (int(place) & 0xFFFFFF if raw.flag else int(place)) // 8
        return None

    def pointee(self, type_id: int) -> int | None:
        """The id of the type behind a pointer, or None if ``type_id`` is no pointer."""
        raw = self._at(self._resolve(type_id))
        return raw.word if raw.kind == PTR else None

    def array(self, type_id: int) -> tuple[int, int] | None:
        """(element type id, count) of an array, or None if ``type_id`` is none."""
        raw = self._at(self._resolve(type_id))
        if raw.kind != ARRAY:
            return None
        element, _index, count = self._triple.unpack_from(self._bytes, raw.extra)
        return element, count

    def is_function(self, type_id: int) -> bool:
        """Whether ``type_id`` is a function prototype, as in the ``values`` of a program array."""
        return self._at(self._resolve(type_id)).kind == FUNC_PROTO

    def name_of(self, type_id: int) -> str:
        """The name of any type, a function's too; empty if it has none. Raises LayoutError."""
        return self._string(self._at(type_id).name)

    def _variables(self, type_id: int) -> list[Variable]:
        raw = self._raw[type_id]
        out = []
        for i in range(raw.vlen):
            ref, offset, size = self._triple.unpack_from(self._bytes, raw.extra + 12 * i)
            var = self._at(ref)
            if var.kind == FUNC:
                continue  # .ksyms lists functions too
            if var.kind != VAR:
                raise LayoutError(
                    f"{self._where}: section {self._string(raw.name)} lists type {ref}, which is no variable"
                )
            (linkage,) = self._word.unpack_from(self._bytes, var.extra)
            tags = self._tags_of(ref, -1)
            out.append(Variable(self._string(var.name), var.word, offset, size, tags, linkage != 0))
        return out

    def _at(self, type_id: int) -> _Raw:
        if not 0 <= type_id < len(self._raw):
            raise LayoutError(
                f"{self._where}: reference to type {type_id}, but there are only {len(self._raw)}", type_id=type_id
            )
        return self._raw[type_id]

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset) if offset < len(self._strings) else -1
        if end < 0:
            raise LayoutError(f"{self._where}: string offset {offset} is outside the string table", offset=offset)
        try:
            text = self._strings[offset:end].decode()
        except UnicodeDecodeError as error:
            raise LayoutError(f"{self._where}: the string at {offset} is not UTF-8", offset=offset) from error
        if not text.isprintable():
            raise LayoutError(f"{self._where}: the string at {offset} has control characters: {text!r}", offset=offset)
        return text

    def _resolve(self, type_id: int) -> int:
        for _ in range(_MAX_DEPTH):
            raw = self._at(type_id)
            if raw.kind != TYPEDEF and raw.kind not in _MODIFIERS:
                return type_id
            type_id = raw.word
        raise LayoutError(f"{self._where}: type {type_id} is a chain of typedefs without end", type_id=type_id)

    def _tags_of(self, type_id: int, component: int) -> tuple[str, ...]:
        if self._tags is None:
            self._tags = {}
            for raw in self._raw:
                if raw.kind == DECL_TAG:
                    (index,) = self._number.unpack_from(self._bytes, raw.extra)
                    key = (raw.word, index)
                    self._tags[key] = (*self._tags.get(key, ()), self._string(raw.name))
        return self._tags.get((type_id, component), ())

    def _named(self) -> dict[str, list[int]]:
        if self._names is None:
            self._names = {}
            for type_id, raw in enumerate(self._raw):
                if raw.kind in _NAMED and raw.name:
                    self._names.setdefault(self._string(raw.name), []).append(type_id)
        return self._names

    def _layout(self, type_id: int, depth: int) -> tuple[Type, int]:
        # The second value is the number of nodes of the tree as seen from its root, shared subtrees counted
        # each time: what a walk over it will cost.
        if type_id in self._types:
            return self._types[type_id]
        if depth > _MAX_DEPTH:
            raise LayoutError(f"{self._where}: type {type_id} is nested more than {_MAX_DEPTH} deep", type_id=type_id)
        if type_id in self._open:
            raise LayoutError(f"{self._where}: type {type_id} contains itself, so it has no size", type_id=type_id)
        self._open.add(type_id)
        try:
            made, nodes = self._make(type_id, depth)
        finally:
            self._open.remove(type_id)
        if nodes > _MAX_NODES:
            raise LayoutError(f"{self._where}: type {type_id} has more than {_MAX_NODES} parts", type_id=type_id)
        if made.size >= _MAX_SIZE:
            raise LayoutError(f"{self._where}: type {type_id} claims {made.size} bytes", type_id=type_id)
        self._types[type_id] = (made, nodes)
        return made, nodes

    def _make(self, type_id: int, depth: int) -> tuple[Type, int]:
        raw = self._at(type_id)
        name = self._string(raw.name)
        match raw.kind:
            case 1:
                return self._int(raw, name), 1
            case 2:
                return Pointer(self._spell(raw.word)), 1
            case 3:
                ref, _index, count = self._triple.unpack_from(self._bytes, raw.extra)
                element, nodes = self._layout(ref, depth + 1)
                # Any number of nothing is nothing; a count would only send walkers round in circles.
                return Array(element, count if element.size else 0), nodes + 1
            case 4 | 5:
                return self._record(type_id, raw, name, depth)
            case 6:
                item = self._signed_pair if raw.flag else self._pair
                pairs = (item.unpack_from(self._bytes, raw.extra + 8 * i) for i in range(raw.vlen))
                values = tuple((self._string(text), value) for text, value in pairs)
                return Enum(name, self._scalar_size(raw, name, (1, 2, 4, 8)), raw.flag, values), 1
            case 19:
                triples = (self._triple.unpack_from(self._bytes, raw.extra + 12 * i) for i in range(raw.vlen))
                values = tuple((self._string(text), _join(low, high, raw.flag)) for text, low, high in triples)
                return Enum(name, self._scalar_size(raw, name, (1, 2, 4, 8)), raw.flag, values), 1
            case 16:
                return Float(name, self._scalar_size(raw, name, (2, 4, 8, 12, 16))), 1
            case 8:
                made, nodes = self._layout(raw.word, depth + 1)
                return renamed(made, name), nodes
            case 9 | 10 | 11 | 18:
                return self._layout(raw.word, depth + 1)
            case 14:
                return self._layout(raw.word, depth + 1)
            case 15:
                return self._section(type_id, raw, name, depth)
            case 0 | 7 | 12 | 13:
                what = {VOID: "void", FWD: "only declared", FUNC: "a function", FUNC_PROTO: "a function"}[raw.kind]
                raise LayoutError(
                    f"{self._where}: type {type_id} {name!r} is {what} and has no layout", type_id=type_id
                )
            case _:
                raise LayoutError(f"{self._where}: type {type_id} {name!r} is a tag, not a type", type_id=type_id)

    def _scalar_size(self, raw: _Raw, name: str, sizes: tuple[int, ...]) -> int:
        if raw.word not in sizes:
            raise LayoutError(f"{self._where}: {name!r} claims a size of {raw.word} bytes", size=raw.word)
        return raw.word

    def _int(self, raw: _Raw, name: str) -> Int:
        size = self._scalar_size(raw, name, (1, 2, 4, 8, 16))
        (word,) = self._word.unpack_from(self._bytes, raw.extra)
        encoding = word >> 24 & 0xF
        # clang marks char only as signed, so its name has to tell it from signed char.
        text = "bool" if encoding & 4 else "char" if encoding & 2 or name == "char" else ""
        return Int(name, size, bool(encoding & 1), text)

    def _record(self, type_id: int, raw: _Raw, name: str, depth: int) -> tuple[Record, int]:
        what = f"{'union' if raw.kind == UNION else 'struct'} {name or f'(type {type_id})'}"
        fields, total = [], 1
        for i in range(raw.vlen):
            text, ref, place = self._triple.unpack_from(self._bytes, raw.extra + 12 * i)
            member = self._string(text)
            made, nodes = self._layout(ref, depth + 1)
            bits, offset = (place >> 24, place & 0xFFFFFF) if raw.flag else (0, place)
            if not bits:
                bits, offset = self._old_bitfield(ref, offset)
            if bits and (not isinstance(made, Int | Enum) or bits > 8 * made.size):
                raise LayoutError(f"{self._where}: {what}: bitfield {member!r} of {bits} bits in {made.name!r}")
            if not bits and offset % 8:
                raise LayoutError(f"{self._where}: {what}: member {member!r} at bit {offset} begins inside a byte")
            if offset + (bits or 8 * made.size) > 8 * raw.word:
                why = f"member {member!r} at bit {offset} lies outside its {raw.word} bytes"
                raise LayoutError(f"{self._where}: {what}: {why}", type_id=type_id)
            total += nodes
            fields.append(Field(member, made, offset, bits, self._tags_of(type_id, i)))
        # A tree that is too large is refused by our caller; to walk it would only take long.
        twice = repeated(fields) if total <= _MAX_NODES else None
        if twice is not None:
            raise LayoutError(f"{self._where}: {what} has two members called {twice!r}", type_id=type_id)
        clash = overlapping(fields) if raw.kind == STRUCT else None
        if clash is not None:
            why = f"member {clash[1].name!r} at bit {clash[1].offset} overlaps {clash[0].name!r} at {clash[0].offset}"
            raise LayoutError(f"{self._where}: {what}: {why}", type_id=type_id)
        return Record(name, raw.word, tuple(fields), raw.kind == UNION), total

    def _section(self, type_id: int, raw: _Raw, name: str, depth: int) -> tuple[Record, int]:
        # The kernel gives a global data map its section as value type, with the offsets filled in.
        fields, total = [], 1
        for var in self._variables(type_id):
            made, nodes = self._layout(var.type_id, depth + 1)
            if var.offset + made.size > raw.word:
                raise LayoutError(f"{self._where}: variable {var.name!r} lies outside section {name}", type_id=type_id)
            total += nodes
            fields.append(Field(var.name, made, 8 * var.offset, 0, var.tags))
        return Record(name, raw.word, tuple(sorted(fields, key=lambda field: field.offset))), total

    def _old_bitfield(self, type_id: int, offset: int) -> tuple[int, int]:
        # Before kind_flag, a bitfield was an INT whose width differs from its size.
        raw = self._at(self._resolve(type_id))
        if raw.kind != INT:
            return 0, offset
        (word,) = self._word.unpack_from(self._bytes, raw.extra)
        bits, shift = word & 0xFF, word >> 16 & 0xFF
        return (bits, offset + shift) if bits != 8 * raw.word else (0, offset)

    def _spell(self, type_id: int) -> str:
        words = []
        for _ in range(_MAX_DEPTH):
            raw = self._at(type_id)
            name = self._string(raw.name)
            if raw.kind == TYPE_TAG:
                words.append(name)
            elif raw.kind in (VOLATILE, CONST, RESTRICT):
                words.append({VOLATILE: "volatile", CONST: "const", RESTRICT: "restrict"}[raw.kind])
            elif raw.kind == PTR:
                words.append("pointer to")
            else:
                prefix = {STRUCT: "struct ", UNION: "union ", ENUM: "enum ", ENUM64: "enum "}.get(raw.kind, "")
                if raw.kind == FWD:
                    prefix = "union " if raw.flag else "struct "
                words.append("void" if raw.kind == VOID else prefix + (name or "(anonymous)"))
                return " ".join(words)
            type_id = raw.word
        raise LayoutError(f"{self._where}: type {type_id} is a chain of pointers without end", type_id=type_id)


def _short(where: str, type_id: int, at: int, end: int) -> LayoutError:
    return LayoutError(
        f"{where}: type {type_id} at byte {at} is cut short: the types end at byte {end}", type_id=type_id, offset=at
    )


def _join(low: int, high: int, signed: bool) -> int:
    value = high << 32 | low
    return value - (1 << 64) if signed and value >> 63 else value


def renamed(made: Type, name: str) -> Type:
    """A type under the name that a typedef gives it; structs, unions and enums keep a name of their own."""
    match made:
        case Int(size=size, signed=signed, encoding=encoding):
            return Int(name, size, signed, encoding)
        case Float(size=size):
            return Float(name, size)
        case Enum(name="", size=size, signed=signed, values=values):
            return Enum(name, size, signed, values)
        case Record(name="", size=size, fields=fields, union=union):
            return Record(name, size, fields, union)
        case Opaque(size=size):
            return Opaque(name, size)
    return made
