"""Making one hash what another one says, in the kernel, when no program writes either of them.

An iterator runs a program made here for each entry of the old map: what the new map lacks is added, what differs there
is put right. Nothing is remembered of what an entry was, so that this takes no memory that grows with the map.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator as Iterating

from hitless.kernel.codegen import (
    JA,
    JEQ_IMM,
    JNE_IMM,
    LOAD,
    LOOKUP,
    MOV,
    MOV_IMM,
    R0,
    R1,
    R2,
    R3,
    R4,
    R7,
    R8,
    R9,
    STORE,
    UPDATE,
    Assembler,
    compare_code,
    convert_code,
    copy_code,
)
from hitless.kernel.iterators import Iterator
from hitless.kernel.maps import EXIST, NOEXIST, Map
from hitless.kernel.per_entry import EACH, Scratch, begin_entry, count, end_entry, put_out
from hitless.layout.conversion import Conversion

__all__ = ["Mirrorer", "Sweeper"]

# Counters in the scratch array; _FILLING is not 0 while most entries are expected to be absent.
_SEEN, _ADDED, _RIGHT, _FULL, _ERROR, _FILLING = range(0, 48, 8)
_FLAG = 8  # bytes in front of a key that is put out, of which the last one is put out too


class Mirrorer:
    """Passes over ``old`` that make ``new`` what it says: keys as they are, values by ``value``.

    Of an entry that is there, what the conversion moves is put right, unless its key is in ``beyond``; what only the
    new layout has stays as it is.
    """

    def __init__(self, name: str, old: Map, new: Map, beyond: Map, value: Conversion | None) -> None:
        """Load the program; ``value`` must be ``in_kernel``. Raises as :class:`hitless.kernel.copier.Copier`."""
        self._old = old
        size = new.info.value_size
        self._scratch = Scratch(f"mirror_{name}", (old.info.key_size, None), (size, value), (size, None))
        code = _mirror_code(old, new, beyond, self._scratch, value)
        self._iterator = Iterator.load("bpf_map_elem", code, f"mirror_{name}")

    def begin(self, filling: bool) -> None:
        """Begin a pass, with all counts at 0; ``filling`` if ``new`` is empty so far."""
        self._scratch.counters[:] = 0
        self._scratch[_FILLING] = int(filling)
        self._iterator.open(self._old)

    def read(self, entries: int) -> bool:
        """Go on for so many entries, or a few more; False at the end. Raises OSError with the kernel's errno."""
        more = bool(self._iterator.read(max(1, entries // EACH)))
        if self._scratch[_ERROR]:
            raise OSError(-self._scratch[_ERROR], "mirroring an entry in the kernel")
        return more

    @property
    def seen(self) -> int:
        """Entries that this pass met."""
        return self._scratch[_SEEN]

    @property
    def added(self) -> int:
        """Those of them that the new map did not have."""
        return self._scratch[_ADDED]

    @property
    def put_right(self) -> int:
        """Those of them that were different there."""
        return self._scratch[_RIGHT]

    @property
    def left_out(self) -> int:
        """Those of them that the new map had no room for."""
        return self._scratch[_FULL]

    def close(self) -> None:
        """Give the program and its working room back."""
        self._iterator.close()
        self._scratch.map.close()


class Sweeper:
    """Passes over ``new`` that find the keys which ``old`` has no more."""

    def __init__(self, name: str, old: Map, new: Map) -> None:
        """Load the program. Raises as :class:`Mirrorer`."""
        self._new = new
        self._size = new.info.key_size
        scratch = Scratch(f"sweep_{name}", (_FLAG + self._size, None))
        self._scratch = scratch
        scratch.whole[scratch.rooms[0] + _FLAG - 1] = 1
        self._iterator = Iterator.load("bpf_map_elem", _sweep_code(old, scratch, self._size), f"sweep_{name}")

    def keys(self, entries: int) -> Iterating[list[bytes]]:
        """One pass: lists of such keys, each after a look at so many entries or less, but ``EACH``."""
        self._iterator.open(self._new)
        rest = b""
        while part := self._iterator.read(max(1, entries // EACH)):
            rest += part
            found = []
            while (at := rest.find(1)) >= 0 and len(rest) > at + self._size:
                found.append(rest[at + 1 : at + 1 + self._size])
                rest = rest[at + 1 + self._size :]
            rest = rest[at:] if at >= 0 else b""
            yield found

    def close(self) -> None:
        """Give the program and its working room back."""
        self._iterator.close()
        self._scratch.map.close()


def _mirror_code(old: Map, new: Map, beyond: Map, scratch: Scratch, value: Conversion | None) -> bytes:
    key_at, value_at, other_at = scratch.rooms
    asm = Assembler()
    begin_entry(asm)
    asm.value(R1, scratch.map.fd)
    asm.emit(LOAD[8], R2, R1, _ERROR)
    asm.emit(JNE_IMM, R2, off="end", imm=0)
    count(asm, scratch, _SEEN)
    asm.value(R2, scratch.map.fd, key_at)
    copy_code(asm, old.info.key_size, R7, 0, R2, 0)
    asm.value(R3, scratch.map.fd, value_at)
    _convert(asm, value, old.info.value_size, R3)
    asm.value(R1, scratch.map.fd)
    asm.emit(LOAD[8], R2, R1, _FILLING)
    asm.emit(JEQ_IMM, R2, off="look", imm=0)
    asm.label("add")
    _update(asm, scratch, new, value_at, NOEXIST)
    for number, label in ((0, "added"), (-errno.E2BIG, "full"), (-errno.EBUSY, "full")):
        asm.emit(JEQ_IMM, R0, off=label, imm=number)
    asm.emit(JNE_IMM, R0, off="error", imm=-errno.EEXIST)
    asm.label("look")
    asm.map(R1, new.fd)
    asm.value(R2, scratch.map.fd, key_at)
    asm.call(LOOKUP)
    asm.emit(MOV, R9, R0)
    asm.emit(JEQ_IMM, R9, off="absent", imm=0)
    asm.value(R3, scratch.map.fd, value_at)
    compare_code(asm, value, new.info.value_size, R3, R9, "different")
    asm.emit(JA, off="end")
    asm.label("different")
    # The entry is replaced as a whole, since a program may be reading it.
    asm.value(R3, scratch.map.fd, other_at)
    copy_code(asm, new.info.value_size, R9, 0, R3, 0)
    _convert(asm, value, old.info.value_size, R3)
    asm.map(R1, beyond.fd)
    asm.value(R2, scratch.map.fd, key_at)
    asm.call(LOOKUP)
    asm.emit(JNE_IMM, R0, off="end", imm=0)
    _update(asm, scratch, new, other_at, EXIST)
    for number, label in ((0, "right"), (-errno.ENOENT, "end"), (-errno.EBUSY, "full")):
        asm.emit(JEQ_IMM, R0, off=label, imm=number)
    asm.label("error")
    asm.value(R1, scratch.map.fd)
    asm.emit(STORE[8], R1, R0, _ERROR)
    asm.emit(JA, off="end")
    asm.label("right")
    count(asm, scratch, _RIGHT)
    asm.emit(JA, off="end")
    asm.label("absent")
    _update(asm, scratch, new, value_at, NOEXIST)
    for number, label in ((0, "added"), (-errno.EEXIST, "end"), (-errno.E2BIG, "full"), (-errno.EBUSY, "full")):
        asm.emit(JEQ_IMM, R0, off=label, imm=number)
    asm.emit(JA, off="error")
    asm.label("full")
    count(asm, scratch, _FULL)
    asm.emit(JA, off="end")
    asm.label("added")
    count(asm, scratch, _ADDED)
    end_entry(asm)
    return asm.code()


def _update(asm: Assembler, scratch: Scratch, new: Map, value_at: int, flags: int) -> None:
    asm.map(R1, new.fd)
    asm.value(R2, scratch.map.fd, scratch.rooms[0])
    asm.value(R3, scratch.map.fd, value_at)
    asm.emit(MOV_IMM, R4, imm=flags)
    asm.call(UPDATE)


def _convert(asm: Assembler, value: Conversion | None, size: int, target: int) -> None:
    """What the conversion moves of the old value at R8."""
    if value is None:
        copy_code(asm, size, R8, 0, target, 0)
    else:
        convert_code(asm, value, R8, 0, target, 0)


def _sweep_code(old: Map, scratch: Scratch, size: int) -> bytes:
    key_at = scratch.rooms[0] + _FLAG
    asm = Assembler()
    begin_entry(asm)
    asm.value(R2, scratch.map.fd, key_at)
    copy_code(asm, size, R7, 0, R2, 0)
    asm.map(R1, old.fd)
    asm.call(LOOKUP)
    asm.emit(JNE_IMM, R0, off="end", imm=0)
    asm.value(R2, scratch.map.fd, key_at - 1)
    put_out(asm, 1 + size)
    asm.emit(JA, off="exit")
    end_entry(asm)
    return asm.code()
