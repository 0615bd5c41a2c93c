"""BPF object files: maps, programs and types from the bytes of an ELF, without kernel or libbpf."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from hitless.errors import LayoutError, UnsupportedError
from hitless.layout.btf import Btf, Section, Variable
from hitless.layout.dwarf import DAMAGE, Dwarf
from hitless.layout.infer import fitting
from hitless.layout.members import holds_object, overlapping, repeated
from hitless.layout.model import Array, Field, Int, MapSpec, ObjectSpec, Ops, Order, ProgramSpec, Record, Type
from hitless.layout.sections import program_type

__all__ = [
    "BYTES", "MAP_TYPES", "STRUCT_OPS", "Binding", "Types", "for_old_libbpf", "needs_types", "read_btf", "read_object",
]  # fmt: skip

BYTES = "bytes"
"""What a manifest binds to a side of a map that is to be taken as it is: bytes that mean the same in both releases."""

#: Names of the kernel's map types; the index is the number in ``enum bpf_map_type``.
MAP_TYPES = (
    "unspec", "hash", "array", "prog_array", "perf_event_array", "percpu_hash", "percpu_array", "stack_trace",
    "cgroup_array", "lru_hash", "lru_percpu_hash", "lpm_trie", "array_of_maps", "hash_of_maps", "devmap", "sockmap",
    "cpumap", "xskmap", "sockhash", "cgroup_storage", "reuseport_sockarray", "percpu_cgroup_storage", "queue", "stack",
    "sk_storage", "devmap_hash", "struct_ops", "ringbuf", "inode_storage", "task_storage", "bloom_filter",
    "user_ringbuf", "cgrp_storage", "arena", "insn_array",
)  # fmt: skip

STRUCT_OPS = (".struct_ops", ".struct_ops.link")
"""Sections whose variables are struct_ops maps. hitless attaches those of either by a link."""

_UPDATABLE = ("tcp_congestion_ops",)  # what the kernel can exchange in place
_LINK = 1 << 13  # BPF_F_LINK

_EM_BPF = 247
_SHF_EXECINSTR = 4
_SHF_COMPRESSED = 0x800
_NULL, _SYMTAB, _NOBITS = 0, 2, 8
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL_SIZE = 24
_RDONLY_PROG = 1 << 7
_MMAPABLE = 1 << 10
_MAX_INNER = 2

# Maps whose keys and values are bytes that programs give a meaning.
_TYPED = (
    "hash", "array", "percpu_hash", "percpu_array", "lru_hash", "lru_percpu_hash", "lpm_trie", "cgroup_storage",
    "percpu_cgroup_storage", "queue", "stack", "sk_storage", "inode_storage", "task_storage", "cgrp_storage",
)  # fmt: skip


class Binding(NamedTuple):
    """Type names for a map whose definition carries only sizes; None leaves a side as the object has it.

    ``infer`` accepts, for a side that has no type then, the one type that fits by size and name.
    """

    key: str | None = None
    value: str | None = None
    infer: bool = False


class _Part(NamedTuple):
    name: str
    type: str
    flags: int
    size: int
    data: bytes


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int
    kind: str
    bind: str
    hidden: bool
    size: int


class _Pointer(NamedTuple):
    """A place in .maps, in bytes, where the linker will put the address of ``symbol``."""

    offset: int
    symbol: str


class _Elf(NamedTuple):
    parts: tuple[_Part, ...]
    symbols: tuple[_Symbol, ...]
    pointers: tuple[_Pointer, ...]
    order: Order

    def part(self, name: str) -> _Part | None:
        return next((part for part in self.parts if part.name == name), None)


def read_object(
    data: bytes, name: str, bindings: Mapping[str, Binding] | None = None, types: Dwarf | Types | None = None
) -> ObjectSpec:
    """Everything that an object file says about its maps and programs; ``name`` is used in messages and the spec.

    ``bindings`` gives types, by map name, to maps that were declared with sizes only. The types are looked up in BTF,
    then in the debug information if the object has any, then in ``types``.

    Raises :class:`LayoutError` if the bytes are no whole BPF object, have no ``.BTF`` or no ``.maps``, or define a
    map that makes no sense; :class:`UnsupportedError` for legacy ``maps`` sections, struct_ops maps that cannot be
    exchanged and compressed sections. Objects of either byte order are read.
    """
    elf = _read_elf(data, name)
    for part in elf.parts:
        if part.name == "maps" or part.name.startswith("maps/"):
            raise UnsupportedError(
                f"{name}: section {part.name!r} holds legacy map definitions (struct bpf_map_def), which libbpf 1.0 "
                "dropped; define the maps in SEC(\".maps\")",
                feature="legacy maps section", object=name,
            )  # fmt: skip
    btf = _read_btf(elf, name)
    sections = btf.sections()
    maps_part = elf.part(".maps")
    ops = _ops_maps(elf, btf, sections, name)
    if (maps_part is None or ".maps" not in sections) and not ops:
        raise LayoutError(f'{name}: no .maps section: the object defines no map with SEC(".maps")', object=name)
    bound = dict(bindings or {})
    found_types = Types(btf, data, name, types)
    maps = [
        _bind(_map(btf, var.type_id, var.name, var.tags, name), bound.pop(var.name, Binding()), found_types, name)
        for var in (sections[".maps"].variables if ".maps" in sections else ())
    ]
    if bound:
        raise LayoutError(f"{name}: no map {', '.join(sorted(bound))} to bind a type to", object=name)
    maps += _data_maps(elf, btf, sections, name)
    maps = [*(_finished(spec, elf, btf, sections.get(".maps"), name) for spec in maps), *ops]
    seen: set[str] = set()
    for spec in maps:
        if spec.name in seen:
            raise LayoutError(f"{name}: map {spec.name!r} is defined twice", object=name, map=spec.name)
        seen.add(spec.name)
    found = elf.part("license")
    text = found.data.split(b"\0")[0].decode("ascii", "replace") if found else ""
    if not text.isprintable():
        raise LayoutError(f"{name}: the license {text!r} has control characters", object=name)
    return ObjectSpec(name, tuple(maps), tuple(_programs(elf, name)), text)


def for_old_libbpf(data: bytes) -> bytes:
    """The object with its section ``.struct_ops.link`` called ``.struct_ops``: the name that libbpf 1.1 knows."""
    if b".struct_ops.link\0" not in data:
        return data
    out = bytearray(data)
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        if section["sh_type"] == "SHT_STRTAB" or section.name == ".BTF":
            place = slice(section["sh_offset"], section["sh_offset"] + section["sh_size"])
            # In place, since strings are found by where they begin, and `link` may be the tail of a name.
            out[place] = data[place].replace(b".struct_ops.link\0", b".struct_ops\0link\0")
    return bytes(out)


def read_btf(data: bytes, name: str) -> Btf:
    """The BTF of an object file, for looking types up by name. Raises as :func:`read_object` does."""
    return _read_btf(_read_elf(data, name), name)


def _read_btf(elf: _Elf, name: str) -> Btf:
    part = elf.part(".BTF")
    if part is None:
        raise LayoutError(f"{name}: no .BTF section: compile with clang -g, and do not strip it", object=name)
    btf = Btf.parse(part.data, f"{name}: BTF")
    if btf.order != elf.order:
        raise LayoutError(f"{name}: a {elf.order}-endian file with {btf.order}-endian BTF", object=name)
    return btf


def _read_elf(data: bytes, name: str) -> _Elf:
    if data[:4] != b"\x7fELF":
        raise LayoutError(f"{name}: not an ELF file", object=name)
    if len(data) < 64:
        raise LayoutError(f"{name}: cut short: {len(data)} bytes do not hold an ELF header", object=name)
    if data[4] != 2:
        raise LayoutError(f"{name}: not a 64-bit ELF file, which BPF objects are", object=name)
    if data[5] not in (1, 2):
        raise LayoutError(f"{name}: unknown byte order {data[5]} in the ELF header", object=name)
    machine = int.from_bytes(data[18:20], "little" if data[5] == 1 else "big")
    if machine != _EM_BPF:
        raise LayoutError(f"{name}: for machine {machine}, not BPF ({_EM_BPF}): compile with -target bpf", object=name)
    _check_sections(data, "<" if data[5] == 1 else ">", name)
    try:
        elf = ELFFile(io.BytesIO(data))
        parts = tuple(_part(section, name) for section in elf.iter_sections())
        symbols = tuple(
            _Symbol(
                symbol.name,
                symbol["st_shndx"] if isinstance(symbol["st_shndx"], int) else -1,
                symbol["st_value"],
                symbol["st_info"]["type"],
                symbol["st_info"]["bind"],
                symbol["st_other"]["visibility"] in ("STV_HIDDEN", "STV_INTERNAL"),
                symbol["st_size"],
            )
            for section in elf.iter_sections()
            if isinstance(section, SymbolTableSection)
            for symbol in section.iter_symbols()
        )
        pointers = tuple(_pointers(elf, parts))
    except DAMAGE as error:
        raise LayoutError(f"{name}: damaged or truncated ELF file: {error}", object=name) from error
    return _Elf(parts, symbols, pointers, "little" if data[5] == 1 else "big")


def _pointers(elf: ELFFile, parts: tuple[_Part, ...]) -> Iterator[_Pointer]:
    index = next((i for i, part in enumerate(parts) if part.name == ".maps"), None)
    for section in elf.iter_sections():
        if isinstance(section, RelocationSection) and section["sh_info"] == index:
            symbols = elf.get_section(section["sh_link"])
            if not isinstance(symbols, SymbolTableSection):
                raise ELFError(f"relocations {section.name!r} refer to no symbol table")
            for entry in section.iter_relocations():
                symbol = symbols.get_symbol(entry["r_info_sym"])
                yield _Pointer(entry["r_offset"], symbol.name)


def _check_sections(data: bytes, order: str, name: str) -> None:
    # pyelftools reads where it is told to; what it then says of a file that lies helps nobody.
    def bad(why: str) -> LayoutError:
        return LayoutError(f"{name}: damaged or truncated ELF file: {why}", object=name)

    (start,) = struct.unpack_from(f"{order}Q", data, 0x28)
    each, count, names = struct.unpack_from(f"{order}HHH", data, 0x3A)
    if not start or not count:
        raise bad("it has no sections")
    if each != _SECTION.size:
        raise bad(f"its section headers are {each} bytes each, not {_SECTION.size}")
    if start + each * count > len(data):
        raise bad(f"its {count} section headers at byte {start} end after its {len(data)} bytes")
    if names >= count:
        raise bad(f"the names of its sections are in section {names}, but there are only {count}")
    for index in range(count):
        _name, kind, _flags, _address, offset, size, link, _info, _align, entry = struct.unpack_from(
            f"{order}IIQQQQIIQQ", data, start + each * index
        )
        if kind not in (_NULL, _NOBITS) and offset + size > len(data):
            raise bad(f"section {index} at byte {offset} has {size} bytes and ends after the file's {len(data)}")
        if kind == _SYMTAB and (entry != _SYMBOL_SIZE or size % _SYMBOL_SIZE or link >= count):
            raise bad(f"section {index} at byte {offset} is no table of {_SYMBOL_SIZE}-byte symbols with their names")


def _part(section: Any, name: str) -> _Part:
    kind, flags, size = str(section["sh_type"]), int(section["sh_flags"]), int(section["sh_size"])
    stored = kind not in ("SHT_NOBITS", "SHT_NULL") and size > 0
    if not section.name.isprintable():
        raise LayoutError(f"{name}: the section name {section.name!r} has control characters", object=name)
    if flags & _SHF_COMPRESSED:
        raise UnsupportedError(
            f"{name}: section {section.name!r} is compressed", feature="compressed sections", object=name
        )
    # Only these are read further; anything else may be as large as it likes.
    wanted = section.name in (".BTF", "license", *STRUCT_OPS)
    return _Part(section.name, kind, flags, size, bytes(section.data()) if wanted and stored else b"")


def _programs(elf: _Elf, name: str) -> list[ProgramSpec]:
    out = []
    for symbol in elf.symbols:
        if symbol.kind != "STT_FUNC" or not 0 < symbol.section < len(elf.parts):
            continue
        part = elf.parts[symbol.section]
        # Functions in .text are subprograms that programs call.
        if not part.flags & _SHF_EXECINSTR or part.name == ".text":
            continue
        if symbol.bind == "STB_LOCAL":
            raise LayoutError(f"{name}: program {symbol.name!r} is static, so libbpf will not load it", object=name)
        if not _is_identifier(symbol.name):
            raise LayoutError(f"{name}: the program name {symbol.name!r} is no C identifier", object=name)
        section = part.name.removeprefix("?")
        kind, attach = program_type(section)
        out.append(ProgramSpec(symbol.name, part.name, kind, attach, not part.name.startswith("?")))
    return out


def _is_identifier(name: str) -> bool:
    return name.isascii() and name.isidentifier()


def _data_maps(elf: _Elf, btf: Btf, sections: dict[str, Section], name: str) -> list[MapSpec]:
    # .ksyms hold addresses that the kernel tells a program, no map at all, and are left out.
    out = []
    for index, part in enumerate(elf.parts):
        base = part.name.split(".")[1] if part.name.startswith(".") and len(part.name) > 1 else ""
        if base not in ("rodata", "data", "bss") or not part.size or part.flags & _SHF_EXECINSTR:
            continue
        if part.size >= 1 << 32:
            why = f"section {part.name} claims {part.size} bytes, more than a map can hold"
            raise LayoutError(f"{name}: {why}", object=name)
        section = sections.get(part.name)
        value = _data_layout(elf, btf, section, index, part, name) if section else None
        flags = _RDONLY_PROG if base == "rodata" else 0
        # As libbpf has it: only a map with a variable that others may see can be mapped into memory. But the kernel
        # maps none with a lock or the like, and a newer libbpf, which maps all that have this flag, fails on it.
        hidden = {symbol.name for symbol in elf.symbols if symbol.section == index and symbol.hidden}
        seen = section is not None and any(var.exported and var.name not in hidden for var in section.variables)
        if seen and value is not None and not holds_object(value):
            flags |= _MMAPABLE
        out.append(MapSpec(part.name, "array", 4, part.size, 1, flags, Int("int", 4, True), value))
    if ".kconfig" in sections:
        out.append(_kconfig(btf, sections[".kconfig"], name))
    return out


def _ops_maps(elf: _Elf, btf: Btf, sections: Mapping[str, Section], where: str) -> list[MapSpec]:
    found = [part for part in elf.parts if part.name.removeprefix("?") in STRUCT_OPS and part.size]
    if len(found) > 1 or any(part.name.startswith("?") for part in found):
        names = ", ".join(part.name for part in found)
        raise UnsupportedError(
            f"{where}: struct_ops maps are in {names}: put all of them into one section, .struct_ops.link",
            feature="several struct_ops sections", object=where,
        )  # fmt: skip
    if not found:
        return []
    if found[0].name not in sections:
        raise LayoutError(f"{where}: section {found[0].name} has no type in BTF", object=where)
    return [_ops_map(elf, btf, found[0], var, where) for var in sections[found[0].name].variables]


def _ops_map(elf: _Elf, btf: Btf, part: _Part, var: Variable, where: str) -> MapSpec:
    made = btf.layout(var.type_id)
    if not isinstance(made, Record) or made.name not in _UPDATABLE:
        raise UnsupportedError(
            f"{where}: {var.name} is a {made.name or 'type without a name'}, which the kernel cannot exchange in "
            f"place: of struct_ops hitless supports {', '.join(_UPDATABLE)}; leave it out of the release",
            feature=f"struct_ops {made.name}", object=where, map=var.name,
        )  # fmt: skip
    if not _is_identifier(var.name):
        raise LayoutError(f"{where}: the struct_ops map {var.name!r} is no C identifier", object=where)
    place = next((symbol.value for symbol in elf.symbols if symbol.name == var.name), None)
    field = next((field for field in made.fields if field.name == "name"), None)
    if place is None or field is None:
        missing = "symbol" if place is None else "member `name`, under which the kernel offers it"
        raise LayoutError(f"{where}: struct_ops map {var.name} has no {missing}", object=where, map=var.name)
    start = place + field.offset // 8
    name = part.data[start : start + field.type.size].split(b"\0")[0].decode("ascii", "replace")
    if not name or not name.isprintable() or not name.isascii():
        raise LayoutError(
            f"{where}: struct_ops map {var.name}: the kernel offers it by its member `name`, and that is {name!r}",
            object=where, map=var.name,
        )  # fmt: skip
    key, ops = Int("int", 4, True), Ops(made.name, name)
    return MapSpec(var.name, "struct_ops", 4, 0, 1, _LINK, key, order=btf.order, ops=ops)


def _kconfig(btf: Btf, section: Section, name: str) -> MapSpec:
    """What the kernel's configuration tells a program: externs that the compiler gives no place, so libbpf does.

    The widest alignment first, then the smallest, then by name (libbpf, ``cmp_externs``).
    """
    variables = [(btf.layout(var.type_id), var) for var in section.variables]
    variables.sort(key=lambda pair: (-_alignment(pair[0]), pair[0].size, pair[1].name))
    fields: list[Field] = []
    end = 0
    for made, var in variables:
        start = -(-end // _alignment(made)) * _alignment(made)
        fields.append(Field(var.name, made, 8 * start, 0, var.tags))
        end = start + made.size
    twice = repeated(fields)
    if twice is not None or not 0 < end < 1 << 32:
        why = f"two variables called {twice!r}" if twice else f"{end} bytes of variables"
        raise LayoutError(f"{name}: section {section.name} has {why}, as no compiler makes it", object=name)
    value = Record(section.name, end, tuple(fields))
    return MapSpec(section.name, "array", 4, end, 1, _RDONLY_PROG | _MMAPABLE, Int("int", 4, True), value)


def _alignment(made: Type) -> int:
    return _alignment(made.element) if isinstance(made, Array) else max(made.size, 1)


def _data_layout(elf: _Elf, btf: Btf, section: Section, index: int, part: _Part, name: str) -> Record:
    # clang leaves the offsets of what others may see at 0, and libbpf fills them in from the symbol table, as done
    # here. Statics have theirs, and need not have a name of their own when several files were linked into one.
    places = {
        symbol.name: symbol.value
        for symbol in elf.symbols
        if symbol.section == index and symbol.name and symbol.bind != "STB_LOCAL"
    }
    fields = []
    for var in section.variables:
        made = btf.layout(var.type_id)
        offset = places.get(var.name, var.offset) if var.exported else var.offset
        if offset + made.size > part.size:
            raise LayoutError(f"{name}: variable {var.name!r} lies outside section {part.name}", object=name)
        fields.append(Field(var.name, made, 8 * offset, 0, var.tags))
    fields.sort(key=lambda field: field.offset)
    twice = repeated(fields)
    if twice is not None:
        raise UnsupportedError(
            f"{name}: section {part.name} has two variables called {twice!r}, which cannot be told apart: rename one",
            feature="variables of one name", object=name,
        )  # fmt: skip
    clash = overlapping(fields)
    if clash is not None:
        why = f"variables {clash[0].name!r} and {clash[1].name!r} overlap in section {part.name}"
        raise LayoutError(f"{name}: {why}", object=name)
    return Record(part.name, part.size, tuple(fields))


def _map(btf: Btf, type_id: int, name: str, tags: tuple[str, ...], where: str, depth: int = 0) -> MapSpec:
    def bad(why: str) -> LayoutError:
        return LayoutError(f"{where}: map {name!r}: {why}", object=where, map=name)

    def number(member: str, ref: int) -> int:
        target = btf.pointee(ref)
        array = btf.array(target) if target is not None else None
        if array is None:
            raise bad(f"{member!r} is not made with __uint()")
        return array[1]

    def pointed(member: str, ref: int) -> Type:
        target = btf.pointee(ref)
        if target is None:
            raise bad(f"{member!r} is not made with __type()")
        return btf.layout(target)

    if not depth and not _is_identifier(name):
        raise bad("its name is no C identifier, as the kernel wants one")
    numbers = dict.fromkeys(("type", "max_entries", "map_flags", "pinning", "key_size", "value_size", "map_extra"), 0)
    key: Type | None = None
    value: Type | None = None
    inner: MapSpec | None = None
    sized = set()
    listed = False
    for member, ref in btf.members(type_id):
        if member in numbers:
            numbers[member] = number(member, ref)
            sized.add(member)
        elif member == "key":
            key = pointed(member, ref)
        elif member == "value":
            value = pointed(member, ref)
        elif member == "values":
            array = btf.array(ref)
            target = btf.pointee(array[0]) if array else None
            if target is None:
                raise bad("'values' is not made with __array()")
            listed = True
            if not btf.is_function(target):
                if depth + 1 >= _MAX_INNER:
                    raise bad("maps are nested more than two deep")
                inner = _map(btf, target, f"{name}.inner", (), where, depth + 1)
        elif member != "numa_node":
            raise bad(f"unknown member {member!r} in its definition")
    if not 0 < numbers["type"] < len(MAP_TYPES):
        raise bad(f"has no type that is known (type {numbers['type']})")
    for side, made in (("key", key), ("value", value)):
        if made is not None:
            if f"{side}_size" in sized and numbers[f"{side}_size"] != made.size:
                raise bad(f"{side}_size says {numbers[f'{side}_size']} bytes but its type has {made.size}")
            numbers[f"{side}_size"] = made.size
    kind = MAP_TYPES[numbers["type"]]
    if listed:
        # As libbpf has it: what such a map holds are file descriptors to user space.
        if kind not in ("array_of_maps", "hash_of_maps", "prog_array"):
            raise bad(f"'values' is for maps of maps and program arrays, not for a map of type {kind}")
        if numbers["value_size"] not in (0, 4):
            raise bad(f"its values are maps or programs, which take 4 bytes, not {numbers['value_size']}")
        numbers["value_size"] = 4
    if numbers["pinning"] > 1 or (numbers["pinning"] and depth):
        raise bad(f"pinning {numbers['pinning']} is not known: maps are pinned by name (1), inner maps not at all")
    return MapSpec(
        name, kind, numbers["key_size"], numbers["value_size"], numbers["max_entries"], numbers["map_flags"],
        key, value, bool(numbers["pinning"]), inner, numbers["map_extra"], tags,
    )  # fmt: skip


def _finished(spec: MapSpec, elf: _Elf, btf: Btf, section: Section | None, where: str) -> MapSpec:
    """The map with what its BTF alone does not tell: byte order, and what its slots hold from the start."""
    inner = msgspec.structs.replace(spec.inner, order=btf.order) if spec.inner else None
    spec = msgspec.structs.replace(spec, order=btf.order, inner=inner)
    var = next((var for var in section.variables if var.name == spec.name), None) if section else None
    place = next((s for s in elf.symbols if s.name == spec.name and s.kind == "STT_OBJECT"), None)
    start = btf.offset_of(var.type_id, "values") if var else None
    if start is None or place is None:
        return spec
    first = place.value + start
    slots = []
    for pointer in elf.pointers:
        if not first <= pointer.offset < place.value + place.size:
            continue
        if (pointer.offset - first) % 8:
            raise LayoutError(f"{where}: map {spec.name!r}: a slot begins at an odd place", object=where, map=spec.name)
        slots.append(((pointer.offset - first) // 8, pointer.symbol))
    return msgspec.structs.replace(spec, slots=tuple(sorted(slots)))


class Types:
    """What an object's maps can be bound to: types of its BTF, else its debug information, else those ``beside`` it."""

    def __init__(self, btf: Btf, data: bytes, where: str, beside: Dwarf | Types | None = None) -> None:
        self.btf = btf
        self.beside = beside
        self._data = data
        self._where = where
        self._dwarf: Dwarf | None = None

    @property
    def dwarf(self) -> Dwarf:
        """The object's own debug information."""
        if self._dwarf is None:
            self._dwarf = Dwarf.parse(self._data, self._where)
        return self._dwarf

    def find(self, name: str) -> Type | None:
        """The type called ``name``, or None. Raises LayoutError if it is damaged."""
        made = self.btf.find(name)
        if made is None:
            made = self.dwarf.find(name)
        return self.beside.find(name) if made is None and self.beside else made

    def source(self, name: str) -> str:
        """Where :meth:`find` finds it, in words."""
        if self.btf.find(name) is not None:
            return "BTF"
        return "debug information" if self.dwarf.find(name) is not None else "the types beside it"

    def names(self) -> set[str]:
        """Names of structs, unions and typedefs."""
        return {*self.btf.names(), *self.dwarf.names(), *(self.beside.names() if self.beside else ())}


def needs_types(spec: MapSpec, side: Literal["key", "value"]) -> bool:
    """Whether this side of a map is bytes that have a meaning, and nothing here tells which."""
    made, size = (spec.key, spec.key_size) if side == "key" else (spec.value, spec.value_size)
    return made is None and size > 0 and spec.type in _TYPED


def _bind(spec: MapSpec, binding: Binding, types: Types, where: str) -> MapSpec:
    def bad(why: str) -> LayoutError:
        return LayoutError(f"{where}: map {spec.name!r}: {why}", object=where, map=spec.name)

    sides: dict[str, Type | None] = {"key": spec.key, "value": spec.value}
    inferred = []
    wanted: tuple[tuple[Literal["key", "value"], str | None, int], ...] = (
        ("key", binding.key, spec.key_size), ("value", binding.value, spec.value_size),
    )  # fmt: skip
    for side, type_name, size in wanted:
        if type_name is not None:
            made = types.find(type_name)
            if made is None and type_name == BYTES:
                made = Array(Int("__u8", 1, False), size)
            if made is None:
                beside = ", nor in the types beside it" if types.beside else ""
                raise bad(f"no type {type_name!r} in the object's BTF or debug information{beside}")
            if made.size != size:
                raise bad(f"{side} is {size} bytes but type {type_name!r} has {made.size}")
            sides[side] = made
        elif needs_types(spec, side):
            # Reading debug information takes its time, so that a mere proposal does without.
            names = types.names() if binding.infer or types.beside else types.btf.names()
            guess = fitting(spec.name, side, size, names, types.find)
            if guess is not None:
                inferred.append((side, guess))
                sides[side] = types.find(guess) if binding.infer else None
            elif binding.infer and (side == "value" or "array" not in spec.type):
                raise bad(f"infer: no type, or more than one, fits its {side} of {size} bytes by name")
    return msgspec.structs.replace(spec, key=sides["key"], value=sides["value"], inferred=tuple(inferred))
