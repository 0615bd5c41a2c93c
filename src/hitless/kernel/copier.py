"""Copying a hash in the kernel, and showing in the kernel that the copy is right.

An iterator runs a program made here for each entry of the old map: the entry goes into the next row of the base, is
converted from there, and the outcome goes into the new map unless its key is there already. One reading feeds both, so
base and new map agree whatever running programs write meanwhile. Each read of the iterator is bounded, so that no other
task on this CPU waits for long.
"""

from __future__ import annotations

import errno
import mmap

import msgspec
import numpy as np

from hitless.kernel.base import Base, padded
from hitless.kernel.codegen import (
    ADD_IMM,
    EXIT,
    FP,
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
    R6,
    R7,
    R8,
    R9,
    SEQ_WRITE,
    STORE,
    UPDATE,
    Assembler,
    compare_code,
    convert_code,
    copy_code,
)  # fmt: skip
from hitless.kernel.iterators import Iterator
from hitless.kernel.libbpf import options
from hitless.kernel.maps import Map, Rows, create
from hitless.layout.conversion import Conversion

__all__ = ["Checked", "Checker", "Copier"]

_ARRAY = 2  # BPF_MAP_TYPE_ARRAY
_MMAPABLE = 1 << 10  # BPF_F_MMAPABLE

# The scratch array's one value: counters of 8 bytes each, then room for a key and a value in the new layout.
_NEXT, _DONE, _REPEATED, _FULL, _ERROR, _FIRST, _SCRATCH = 0, 8, 16, 24, 32, 40, 48


class _Scratch:
    """Counters and working room of a program, in one array of one value that is mapped into this process."""

    def __init__(self, name: str, new: Map, key: Conversion | None, value: Conversion | None) -> None:
        self.key_at = _SCRATCH
        self.value_at = _SCRATCH + padded(new.info.key_size)
        size = self.value_at + padded(new.info.value_size)
        self.map = create(_ARRAY, name, 4, size, 1, options("bpf_map_create_opts", map_flags=_MMAPABLE))
        memory = mmap.mmap(self.map.fd, (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE)
        self.counters = np.frombuffer(memory, np.int64)[: _SCRATCH // 8]
        whole = np.frombuffer(memory, np.uint8)
        # The moves never write what the defaults do, so those are written here, once.
        for conversion, at in ((key, self.key_at), (value, self.value_at)):
            if conversion is not None:
                zeros: Rows = np.zeros((1, conversion.old_size), np.uint8)
                whole[at : at + conversion.new_size] = conversion.apply(zeros).records[0]

    def __getitem__(self, counter: int) -> int:
        return int(self.counters[counter // 8])

    def __setitem__(self, counter: int, number: int) -> None:
        self.counters[counter // 8] = number


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
        self._scratch = _Scratch(f"copy_{name}", new, key, value)
        code = _copy_code(old, new, base, self._scratch, key, value)
        self._iterator = Iterator.load("bpf_map_elem", code, f"copy_{name}")
        self._iterator.open(old)

    def read(self, entries: int) -> bool:
        """Go on for so many entries or less; False at the end.

        Stops early when the base is full (``Base.room`` is 0 then). An entry that the new map has no room for is left
        out of both. Raises OSError with the kernel's errno for an entry that could not be written for another reason.
        """
        self._scratch[_NEXT] = self._base.used  # a dual write may have taken rows since the last read
        more = bool(self._iterator.read(entries))
        self._base.passed(self._scratch[_NEXT])
        error = self._scratch[_ERROR]
        if error and error != -errno.ENOSPC:
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
        self._scratch = _Scratch(f"check_{name}", new, key, value)
        self._scratch[_FIRST] = -1
        code = _check_code(new, base, self._scratch, key, value)
        self._iterator = Iterator.load("bpf_map_elem", code, f"check_{name}")
        self._iterator.open(base.map)

    def read(self, rows: int) -> int:
        """Go on for so many rows or less; returns how many, 0 at the end."""
        return len(self._iterator.read(rows))

    @property
    def found(self) -> Checked:
        """What came of it so far."""
        return Checked(self._scratch[_DONE], self._scratch[_FULL], self._scratch[_FIRST])

    def close(self) -> None:
        """Give the program and its working room back."""
        self._iterator.close()
        self._scratch.map.close()


# Registers: R6 the context, R7 the key, R8 the value, R9 the row of the base; R0 to R5 are scratch.


def _begin(asm: Assembler) -> None:
    """The context is struct bpf_iter__bpf_map_elem: meta, map, key, value; the last call has no key and no value."""
    asm.emit(MOV, R6, R1)
    asm.emit(LOAD[8], R7, R6, 16)
    asm.emit(JEQ_IMM, R7, off="exit", imm=0)
    asm.emit(LOAD[8], R8, R6, 24)
    asm.emit(JEQ_IMM, R8, off="exit", imm=0)


def _end(asm: Assembler) -> None:
    """A byte of output for this entry, which is what bounds a read."""
    asm.label("end")
    asm.emit(MOV_IMM, R1, imm=0)
    asm.emit(STORE[8], FP, R1, -8)
    asm.emit(LOAD[8], R1, R6, 0)  # meta
    asm.emit(LOAD[8], R1, R1, 0)  # meta->seq
    asm.pointer(R2, FP, -8)
    asm.emit(MOV_IMM, R3, imm=1)
    asm.call(SEQ_WRITE)
    asm.label("exit")
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)


def _count(asm: Assembler, scratch: _Scratch, counter: int) -> None:
    asm.value(R1, scratch.map.fd, counter)
    asm.emit(LOAD[8], R2, R1, 0)
    asm.emit(ADD_IMM, R2, imm=1)
    asm.emit(STORE[8], R1, R2, 0)


def _converted(
    asm: Assembler, scratch: _Scratch, new: Map, key: Conversion | None, value: Conversion | None, value_at: int
) -> None:
    """The row at R9 as a key and a value of the new map: R2 and R3 point at them."""
    if key is not None:
        asm.value(R2, scratch.map.fd, scratch.key_at)
        convert_code(asm, key, R9, 8, R2, 0)
    else:
        asm.pointer(R2, R9, 8)
    if value is not None:
        asm.value(R3, scratch.map.fd, scratch.value_at)
        convert_code(asm, value, R9, value_at, R3, 0)
    else:
        asm.pointer(R3, R9, value_at)


def _copy_code(
    old: Map, new: Map, base: Base, scratch: _Scratch, key: Conversion | None, value: Conversion | None
) -> bytes:
    asm = Assembler()
    _begin(asm)
    asm.value(R1, scratch.map.fd)
    asm.emit(LOAD[8], R2, R1, _ERROR)
    asm.emit(JNE_IMM, R2, off="end", imm=0)
    asm.emit(LOAD[8], R2, R1, _NEXT)
    asm.emit(STORE[4], FP, R2, -4)
    asm.map(R1, base.map.fd)
    asm.pointer(R2, FP, -4)
    asm.call(LOOKUP)
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
    _count(asm, scratch, _NEXT)
    _count(asm, scratch, _DONE)
    asm.emit(JA, off="end")
    asm.label("repeated")
    _count(asm, scratch, _REPEATED)
    asm.emit(JA, off="end")
    asm.label("full")
    _count(asm, scratch, _FULL)
    _end(asm)
    return asm.code()


def _check_code(
    new: Map, base: Base, scratch: _Scratch, key: Conversion | None, value: Conversion | None
) -> bytes:
    asm = Assembler()
    _begin(asm)
    asm.emit(MOV, R9, R8)
    asm.emit(LOAD[8], R1, R9, 0)
    asm.emit(JEQ_IMM, R1, off="end", imm=0)
    _count(asm, scratch, _DONE)
    _converted(asm, scratch, new, key, value, base.value_at)
    asm.emit(MOV, R8, R3)
    asm.map(R1, new.fd)
    asm.call(LOOKUP)
    asm.emit(JEQ_IMM, R0, off="wrong", imm=0)
    compare_code(asm, value, new.info.value_size, R8, R0, "wrong")
    asm.emit(JA, off="end")
    asm.label("wrong")
    _count(asm, scratch, _FULL)
    asm.value(R1, scratch.map.fd)
    asm.emit(LOAD[8], R2, R1, _FIRST)
    asm.emit(JNE_IMM, R2, off="end", imm=-1)
    asm.emit(LOAD[4], R2, R7, 0)  # the key of the base is the row
    asm.emit(STORE[8], R1, R2, _FIRST)
    _end(asm)
    return asm.code()
