"""Copying a hash in the kernel, and showing in the kernel that the copy is right.

An iterator runs a program made here for each entry of the old map: the entry goes into the next row of the base, is
converted from there, and the outcome goes into the new map unless its key is there already. One reading feeds both, so
base and new map agree whatever running programs write meanwhile. Each read of the iterator is bounded, so that no other
task on this CPU waits for long.
"""

from __future__ import annotations

import errno

import msgspec

from hitless.kernel.base import Base
from hitless.kernel.codegen import (
    ADD,
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
)  # fmt: skip
from hitless.kernel.iterators import Iterator
from hitless.kernel.maps import Map
from hitless.kernel.per_entry import EACH, Scratch, begin_entry, count, end_entry
from hitless.layout.conversion import Conversion

__all__ = ["Checked", "Checker", "Copier"]

# Counters in the scratch array.
_NEXT, _DONE, _REPEATED, _FULL, _ERROR, _FIRST = range(0, 48, 8)
_START = _NEXT  # the first row of the segment that is checked


class Copier:
    """One pass over ``old`` into ``new`` and ``base``, some entries at a time."""

    def __init__(
        self, name: str, old: Map, new: Map, base: Base, key: Conversion | None, value: Conversion | None
    ) -> None:
        """Load the program for map ``name``; ``key`` and ``value`` are None where bytes stay as they are.

        Both must be ``in_kernel``. Raises UnsupportedError, KernelError with the verifier's log.
        """
        self._old = old
        self._base = base
        self._scratch = _scratch(f"copy_{name}", new, key, value)
        code = _copy_code(old, new, base, self._scratch, key, value)
        self._iterator = Iterator.load("bpf_map_elem", code, f"copy_{name}")
        self._iterator.open(old)

    def read(self, entries: int) -> bool:
        """Go on for so many entries or less, as the base has room for, which must be ``EACH``. False at the end.

        An entry that the new map has no room for is left out of both. Raises OSError with the kernel's errno for an
        entry that could not be written for another reason.
        """
        self._scratch[_NEXT] = self._base.used  # a dual write may have taken rows since the last read
        more = bool(self._iterator.read(min(entries, self._base.room) // EACH))
        self._base.passed(self._scratch[_NEXT])
        error = self._scratch[_ERROR]
        if error:
            raise OSError(-error, "copying an entry in the kernel")
        return more

    @property
    def done(self) -> int:
        """Entries copied."""
        return self._scratch[_DONE]

    def close(self) -> None:
        """Give the program and its working room back."""
        self._iterator.close()
        self._scratch.map.close()


class Checked(msgspec.Struct, frozen=True):
    """Rows of the base that were looked at, those that are not in the new map as converted, and the first of them."""

    rows: int
    wrong: int
    first: int


class Checker:
    """One pass over ``base``: whether each live row is in ``new`` as converted; only what moves is compared."""

    def __init__(self, name: str, new: Map, base: Base, key: Conversion | None, value: Conversion | None) -> None:
        """Load the program. Raises UnsupportedError, KernelError with the verifier's log."""
        self._base = base
        self._scratch = _scratch(f"check_{name}", new, key, value)
        self._scratch[_FIRST] = -1
        code = _check_code(new, base, self._scratch, key, value)
        self._iterator = Iterator.load("bpf_map_elem", code, f"check_{name}")
        self._open(0)

    def read(self, rows: int) -> bool:
        """Go on for so many rows or less, but ``EACH``; False at the end."""
        if not self._iterator.read(max(1, rows // EACH)):
            following = self._scratch[_START] + self._base.segments.each
            if following >= self._base.used:
                return False
            self._open(following)
        return True

    def _open(self, row: int) -> None:
        """Go on with the segment that begins with ``row``."""
        self._scratch[_START] = row
        with self._base.segments.segment(row) as segment:
            self._iterator.open(segment)

    @property
    def found(self) -> Checked:
        """What came of it so far."""
        return Checked(self._scratch[_DONE], self._scratch[_FULL], self._scratch[_FIRST])

    def close(self) -> None:
        """Give the program and its working room back."""
        self._iterator.close()
        self._scratch.map.close()


# R9 is the row of the base; R0 to R5 are scratch.


def _scratch(name: str, new: Map, key: Conversion | None, value: Conversion | None) -> Scratch:
    return Scratch(name, (new.info.key_size, key), (new.info.value_size, value))


def _converted(
    asm: Assembler, scratch: Scratch, new: Map, key: Conversion | None, value: Conversion | None, value_at: int
) -> None:
    """The row at R9 as a key and a value of the new map: R2 and R3 point at them."""
    if key is not None:
        asm.value(R2, scratch.map.fd, scratch.rooms[0])
        convert_code(asm, key, R9, 8, R2, 0)
    else:
        asm.pointer(R2, R9, 8)
    if value is not None:
        asm.value(R3, scratch.map.fd, scratch.rooms[1])
        convert_code(asm, value, R9, value_at, R3, 0)
    else:
        asm.pointer(R3, R9, value_at)


def _copy_code(
    old: Map, new: Map, base: Base, scratch: Scratch, key: Conversion | None, value: Conversion | None
) -> bytes:
    asm = Assembler()
    begin_entry(asm)
    asm.value(R1, scratch.map.fd)
    asm.emit(LOAD[8], R2, R1, _ERROR)
    asm.emit(JNE_IMM, R2, off="end", imm=0)
    asm.emit(LOAD[8], R2, R1, _NEXT)
    base.segments.lookup_code(asm, R2)
    asm.emit(MOV, R9, R0)
    asm.emit(MOV_IMM, R0, imm=-errno.ENOSPC)
    asm.emit(JEQ_IMM, R9, off="error", imm=0)
    copy_code(asm, old.info.key_size, R7, 0, R9, 8)
    copy_code(asm, old.info.value_size, R8, 0, R9, base.value_at)
    _converted(asm, scratch, new, key, value, base.value_at)
    asm.map(R1, new.fd)
    asm.emit(MOV_IMM, R4, imm=1)  # BPF_NOEXIST: a scan of a live hash repeats keys, and a dual write is newer
    asm.call(UPDATE)
    for number, label in ((0, "copied"), (-errno.EEXIST, "repeated"), (-errno.E2BIG, "full"), (-errno.EBUSY, "full")):
        asm.emit(JEQ_IMM, R0, off=label, imm=number)
    asm.label("error")
    asm.value(R1, scratch.map.fd)
    asm.emit(STORE[8], R1, R0, _ERROR)
    asm.emit(JA, off="end")
    asm.label("copied")
    asm.emit(MOV_IMM, R1, imm=1)
    asm.emit(STORE[8], R9, R1, 0)
    count(asm, scratch, _NEXT)
    count(asm, scratch, _DONE)
    asm.emit(JA, off="end")
    asm.label("repeated")
    count(asm, scratch, _REPEATED)
    asm.emit(JA, off="end")
    asm.label("full")
    count(asm, scratch, _FULL)
    end_entry(asm)
    return asm.code()


def _check_code(
    new: Map, base: Base, scratch: Scratch, key: Conversion | None, value: Conversion | None
) -> bytes:
    asm = Assembler()
    begin_entry(asm)
    asm.emit(MOV, R9, R8)
    asm.emit(LOAD[8], R1, R9, 0)
    asm.emit(JEQ_IMM, R1, off="end", imm=0)
    count(asm, scratch, _DONE)
    _converted(asm, scratch, new, key, value, base.value_at)
    if key is None:  # R2 is in the iterator's own memory, and older kernels let no helper take a key from there
        asm.value(R2, scratch.map.fd, scratch.rooms[0])
        copy_code(asm, new.info.key_size, R9, 8, R2, 0)
    asm.emit(MOV, R8, R3)
    asm.map(R1, new.fd)
    asm.call(LOOKUP)
    asm.emit(JEQ_IMM, R0, off="wrong", imm=0)
    compare_code(asm, value, new.info.value_size, R8, R0, "wrong")
    asm.emit(JA, off="end")
    asm.label("wrong")
    count(asm, scratch, _FULL)
    asm.value(R1, scratch.map.fd)
    asm.emit(LOAD[8], R2, R1, _FIRST)
    asm.emit(JNE_IMM, R2, off="end", imm=-1)
    asm.emit(LOAD[4], R2, R7, 0)  # the key is the row within the segment
    asm.emit(LOAD[8], R3, R1, _START)
    asm.emit(ADD, R2, R3)
    asm.emit(STORE[8], R1, R2, _FIRST)
    end_entry(asm)
    return asm.code()
