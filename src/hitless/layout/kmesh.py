"""The layout snapshot that a Kmesh daemon keeps (``mapspecs_by_prog.json``), written and read.

It tells less than an object file. A member has a name, a place, the width of its bitfield and the *name* of its type:
nothing of sizes, signs, element counts, enum values and union members. So reading it is mostly knowing what a name
cannot tell:

- The names of C's own integers and the kernel's and the standard's fixed names (``__u32``, ``uint8_t``...) mean one
  size and sign each, and are believed where that size fits into the room up to the next member.
- A struct that carries its members is a struct, if they fit into it. Kmesh keeps structs by name, across all objects:
  it cuts one that it is in the middle of down to its name, and takes all without a name for one. So what has no name,
  or one name and two layouts or sizes, is not known. (Two structs of one name and one size it writes as the first of
  them; that, nobody can see from the file.)
- Everything else (a typedef of someone's own, an enum, a union, an array or a pointer, which have no name at all) is
  :class:`~hitless.layout.model.Opaque`: bytes up to the next member, equal to nothing in a comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from hitless.errors import LayoutError
from hitless.layout.model import Array, Field, Int, MapSpec, ObjectSpec, Opaque, Pointer, Record, Type
from hitless.layout.snapshot import check

__all__ = ["dump", "is_kmesh", "load"]

_MAX_DEPTH = 64
_MAX_SIZE = 1 << 32
_UNNAMED = "?"

# Kmesh writes map types by the names that its Go library gives them.
_SPELLED = {
    "hash": "Hash", "array": "Array", "prog_array": "ProgramArray", "perf_event_array": "PerfEventArray",
    "percpu_hash": "PerCPUHash", "percpu_array": "PerCPUArray", "stack_trace": "StackTrace",
    "cgroup_array": "CGroupArray", "lru_hash": "LRUHash", "lru_percpu_hash": "LRUCPUHash", "lpm_trie": "LPMTrie",
    "array_of_maps": "ArrayOfMaps", "hash_of_maps": "HashOfMaps", "devmap": "DevMap", "sockmap": "SockMap",
    "cpumap": "CPUMap", "xskmap": "XSKMap", "sockhash": "SockHash", "reuseport_sockarray": "ReusePortSockArray",
    "percpu_cgroup_storage": "PerCPUCGroupStorage", "queue": "Queue", "stack": "Stack", "sk_storage": "SkStorage",
    "devmap_hash": "DevMapHash", "struct_ops": "StructOpsMap", "ringbuf": "RingBuf", "inode_storage": "InodeStorage",
    "task_storage": "TaskStorage", "bloom_filter": "BloomFilter", "user_ringbuf": "UserRingbuf", "arena": "Arena",
    "cgroup_storage": "CGroupStorage", "cgrp_storage": "CgroupStorage",
}  # fmt: skip
_TYPES = {spelled: kind for kind, spelled in _SPELLED.items()}

_INTS: dict[str, Int] = {}
for _bits in (8, 16, 32, 64):
    for _name, _signed in (
        (f"__u{_bits}", False), (f"u{_bits}", False), (f"uint{_bits}_t", False), (f"__be{_bits}", False),
        (f"__le{_bits}", False), (f"__s{_bits}", True), (f"s{_bits}", True), (f"int{_bits}_t", True),
    ):  # fmt: skip
        if _name not in ("__be8", "__le8"):
            _INTS[_name] = Int(_name, _bits // 8, _signed)
# As clang's BPF target has them. Kmesh spells C's types as the compiler wrote them into BTF.
for _name, _size in (("short", 2), ("int", 4), ("long", 8), ("long long", 8), ("__int128", 16)):
    _INTS[_name] = Int(_name, _size, True)
    _INTS[f"unsigned {_name}"] = Int(f"unsigned {_name}", _size, False)
_INTS |= {
    "unsigned char": Int("unsigned char", 1, False), "signed char": Int("signed char", 1, True),
    "char": Int("char", 1, True, "char"), "_Bool": Int("_Bool", 1, False, "bool"),
    "bool": Int("bool", 1, False, "bool"),
}  # fmt: skip


class _Member(msgspec.Struct):
    name: str
    type_name: str = msgspec.field(name="typeName")
    offset: int
    bits: int = msgspec.field(name="bitfieldsize", default=0)
    nested: _Info | None = None


class _Info(msgspec.Struct):
    name: str = ""
    members: list[_Member] | None = None


class _Map(msgspec.Struct):
    name: str
    type: str
    key_size: int = msgspec.field(name="keySize")
    value_size: int = msgspec.field(name="valueSize")
    max_entries: int = msgspec.field(name="maxEntries")
    flags: int = 0
    key: _Info = msgspec.field(name="keyInfo", default_factory=_Info)
    value: _Info = msgspec.field(name="valueInfo", default_factory=_Info)


class _Snapshot(msgspec.Struct):
    maps: dict[str, dict[str, _Map]]


def is_kmesh(data: bytes) -> bool:
    """Whether these bytes are meant as a snapshot of Kmesh's: an object with ``maps`` and no ``schema``."""
    try:
        head = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return "maps" in head and "schema" not in head


def load(data: bytes) -> dict[str, ObjectSpec]:
    """The maps of a snapshot of Kmesh's, each of its programs standing as an object; programs' types it does not tell.

    Raises :class:`LayoutError` if it is damaged or contradicts itself.
    """
    try:
        found = msgspec.json.decode(data, type=_Snapshot).maps
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LayoutError(f"Kmesh snapshot: damaged: {error}") from error
    doubtful = _doubtful(found)
    out = {}
    for program, maps in found.items():
        specs = []
        for name, entry in maps.items():
            where = f"Kmesh snapshot: {program!r}: map {name!r}"
            numbers = (entry.key_size, entry.value_size, entry.max_entries, entry.flags)
            if not all(0 <= number < _MAX_SIZE for number in numbers):
                raise LayoutError(f"{where}: sizes, entries or flags are no 32-bit numbers", map=name)
            if entry.type not in _TYPES:
                raise LayoutError(f"{where}: map type {entry.type!r} is not known", map=name)
            key = _whole(entry.key, entry.key_size, doubtful)
            value = _whole(entry.value, entry.value_size, doubtful)
            specs.append(MapSpec(name, _TYPES[entry.type], *numbers, key, value))
        out[program] = ObjectSpec(program, tuple(specs), ())
    check(out, "Kmesh snapshot")
    return out


def dump(registry: Mapping[str, ObjectSpec]) -> bytes:
    """A release as Kmesh would keep it. What its format has no place for is left out: see the module's docstring."""
    maps = {
        name: {spec.name: _map(spec) for spec in sorted(item.maps, key=lambda spec: spec.name)}
        for name, item in sorted(registry.items())
    }
    return msgspec.json.format(msgspec.json.encode({"maps": maps}), indent=2) + b"\n"


def _map(spec: MapSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "type": _SPELLED.get(spec.type, spec.type),
        "keySize": spec.key_size,
        "valueSize": spec.value_size,
        "maxEntries": spec.max_entries,
        "flags": spec.flags,
        "keyInfo": _info(spec.key),
        "valueInfo": _info(spec.value),
    }


def _info(made: Type | None) -> dict[str, object]:
    if not isinstance(made, Record) or made.union:
        return {"name": _type_name(made), "members": None}
    members = []
    for field in made.fields:
        member: dict[str, object] = {
            "name": field.name,
            "typeName": _type_name(field.type),
            "offset": field.offset,
            "bitfieldsize": field.bits,
        }
        if isinstance(field.type, Record) and not field.type.union:
            member["nested"] = _info(field.type)
        members.append(member)
    return {"name": made.name, "members": members}


def _type_name(made: Type | None) -> str:
    name = "" if made is None or isinstance(made, Array | Pointer) else made.name
    return "" if name == _UNNAMED else name


def _doubtful(maps: Mapping[str, Mapping[str, _Map]]) -> set[str]:
    """Names of structs that stand for two different ones: Kmesh knows structs by name only, across all objects."""
    seen: dict[str, object] = {}
    out = set()
    for entry in (entry for inside in maps.values() for entry in inside.values()):
        for info, size in ((entry.key, entry.key_size), (entry.value, entry.value_size)):
            for name, facts in _facts(info, size, 0):
                if seen.setdefault(name, facts) != facts:
                    out.add(name)
    return out


def _facts(info: _Info, size: int | None, depth: int) -> Iterator[tuple[str, object]]:
    if depth > _MAX_DEPTH:
        raise LayoutError(f"Kmesh snapshot: structs are nested more than {_MAX_DEPTH} deep")
    for member in info.members or ():
        if member.nested is not None:
            yield from _facts(member.nested, None, depth + 1)
    if info.members:
        yield f"{info.name}", [(one.name, one.type_name, one.offset, one.bits) for one in info.members]
        if size is not None:
            yield f"{info.name} size", size


class _UnknownError(Exception):
    """What these members say cannot be, or not be said in our words: the struct is not known."""


def _whole(info: _Info, size: int, doubtful: set[str]) -> Type | None:
    if info.members:
        try:
            return _struct(info, size, doubtful) if f"{info.name} size" not in doubtful else Opaque(info.name, size)
        except _UnknownError:
            return Opaque(info.name or _UNNAMED, size)
    known = _INTS.get(info.name)
    # Of another name nothing but the name is known: a typedef, an enum, a union, or a struct cut down to its name.
    return known if known is not None and known.size == size else Opaque(info.name, size) if info.name else None


def _struct(info: _Info, size: int, doubtful: set[str]) -> Record:
    """A struct in a room of ``size`` bytes."""
    if not info.name or info.name in doubtful or not info.members:
        raise _UnknownError
    fields = []
    for number, member in enumerate(info.members):
        after = info.members[number + 1].offset if number + 1 < len(info.members) else 8 * size
        if not 0 <= member.offset <= after <= 8 * size:
            raise _UnknownError
        made = _member(member, after - member.offset, doubtful)
        fields.append(Field(member.name, made, member.offset, member.bits))
    return Record(info.name, size, tuple(fields))


def _member(member: _Member, room: int, doubtful: set[str]) -> Type:
    """Its type; ``room`` is how many bits there are up to the next member."""
    known = _INTS.get(member.type_name) if member.nested is None else None
    if member.bits:
        # One of a type that is not known cannot be told from an unsigned one by its bits.
        if known is None or not 0 < member.bits <= min(8 * known.size, room):
            raise _UnknownError
        return known
    if member.offset % 8:
        raise _UnknownError
    if known is not None:
        if 8 * known.size > room:
            raise _UnknownError
        return known
    if member.nested is not None:
        try:
            inner = _struct(member.nested, room // 8, doubtful)
        except _UnknownError:
            return Opaque(member.type_name or _UNNAMED, room // 8)
        # Its own size is not told. Without what pads it at its end, all its members are where they are.
        last = inner.fields[-1]
        end = (last.offset + (last.bits or 8 * last.type.size) + 7) // 8
        return Record(inner.name, end, inner.fields)
    return Opaque(member.type_name or _UNNAMED, room // 8)
