"""Types back into BTF, which the kernel wants to have of some maps that are made without libbpf.

Since Linux 6.2 an inner map may come without types; before that, one without them is no equal of one with them, and a
map of maps that libbpf made takes no other (``bpf_map_meta_equal``). A bpf_spin_lock in a value is found by them only.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from hitless.layout.btf import ARRAY, ENUM, ENUM64, FLOAT, FWD, INT, MAGIC, PTR, STRUCT, TYPEDEF, UNION
from hitless.layout.model import Array, Enum, Float, Int, Opaque, Pointer, Record, Type

__all__ = ["Written", "write_btf"]

_KIND_FLAG = 1 << 31
_ENCODINGS = {"": 0, "char": 2, "bool": 4}
_INDEX, _CHAR = Int("__u32", 4, False), Int("char", 1, True, "char")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*|", re.ASCII)
_TAGGED = re.compile(r"(struct|union) ([A-Za-z_]\w*)", re.ASCII)


class Written(NamedTuple):
    """A BTF blob in this machine's byte order, and the id that each type has in it."""

    data: bytes
    ids: tuple[int, ...]


def write_btf(*types: Type) -> Written | None:
    """BTF of ``types``, which is read as these types again; declaration tags are left out.

    None if there is something among them that only their own BTF could tell: opaque bytes, an object of the kernel, a
    pointer to what has no tag, a name that is none in C.
    """
    writer = _Writer()
    try:
        ids = tuple(writer.add(each) for each in types)
    except _Untold:
        return None
    body, strings = b"".join(writer.types), bytes(writer.strings)
    head = struct.pack("=HBBIIIII", MAGIC, 1, 0, 24, 0, len(body), len(body), len(strings))
    return Written(head + body + strings, ids)


class _Untold(Exception):  # noqa: N818 - no error: the way out of a tree
    pass


class _Writer:
    def __init__(self) -> None:
        self.types: list[bytes] = []
        self.strings = bytearray(1)
        self._ids: dict[Type, int] = {}
        self._names = {"": 0}

    def add(self, made: Type) -> int:
        if made not in self._ids:
            entry = self._entry(made)  # puts what it refers to in front of itself
            self.types.append(entry)
            self._ids[made] = len(self.types)
        return self._ids[made]

    def _entry(self, made: Type) -> bytes:
        match made:
            case Int() if made.encoding == "char" and made.signed and made.name != "char":
                return self._head(TYPEDEF, made.name, self.add(_CHAR))  # one of the two has to be told by a name
            case Int():
                bits = int(made.signed) or _ENCODINGS[made.encoding]
                return self._head(INT, made.name, made.size) + struct.pack("=I", bits << 24 | 8 * made.size)
            case Float():
                return self._head(FLOAT, made.name, made.size)
            case Enum():
                return self._enum(made)
            case Pointer():
                return self._head(PTR, "", self._target(made))
            case Array():
                return self._head(ARRAY, "", 0) + struct.pack(
                    "=III", self.add(made.element), self.add(_INDEX), made.count
                )
            case Record():
                return self._record(made)
            case Opaque():
                raise _Untold

    def _enum(self, made: Enum) -> bytes:
        wide = any(not -(1 << 31) <= value < 1 << 32 for _, value in made.values)
        mask = (1 << 64) - 1 if wide else (1 << 32) - 1
        values = ((self._identifier(name), value & mask) for name, value in made.values)
        pairs = [
            struct.pack("=III", name, value & 0xFFFFFFFF, value >> 32) if wide else struct.pack("=II", name, value)
            for name, value in values
        ]
        kind = ENUM64 if wide else ENUM
        return self._head(kind, made.name, made.size, len(pairs), made.signed, True) + b"".join(pairs)

    def _target(self, made: Pointer) -> int:
        found = _TAGGED.fullmatch(made.target)
        if found is None:
            if made.target == "void":
                return 0
            raise _Untold
        self.types.append(self._head(FWD, found[2], 0, flag=found[1] == "union"))
        return len(self.types)

    def _record(self, made: Record) -> bytes:
        flag = any(field.bits for field in made.fields)
        items = [
            struct.pack("=III", self._identifier(field.name), self.add(field.type), field.bits << 24 | field.offset)
            for field in made.fields
        ]
        kind = UNION if made.union else STRUCT
        return self._head(kind, made.name, made.size, len(items), flag, True) + b"".join(items)

    def _head(
        self, kind: int, name: str, word: int, count: int = 0, flag: bool = False, identifier: bool = False
    ) -> bytes:
        at = self._identifier(name) if identifier else self._string(name)
        return struct.pack("=III", at, flag * _KIND_FLAG | kind << 24 | count, word)

    def _identifier(self, name: str) -> int:
        if not _IDENTIFIER.fullmatch(name):
            raise _Untold
        return self._string(name)

    def _string(self, name: str) -> int:
        if name not in self._names:
            self._names[name] = len(self.strings)
            self.strings += name.encode() + b"\0"
        return self._names[name]
