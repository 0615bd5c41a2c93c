"""What programs have in common that an iterator runs once for each entry of a map.

They begin with the context in R6, the key in R7 and the value in R8, and put out a byte for every ``EACH`` entries, so
that a read of so many bytes is so much work and no more. A byte for each entry would take longer.
"""

from __future__ import annotations

import mmap

import numpy as np

from hitless.kernel.base import padded
from hitless.kernel.codegen import (
    ADD_IMM,
    AND_IMM,
    EXIT,
    FP,
    JEQ_IMM,
    JNE_IMM,
    LOAD,
    MOV,
    MOV_IMM,
    R0,
    R1,
    R2,
    R3,
    R6,
    R7,
    R8,
    SEQ_WRITE,
    STORE,
    Assembler,
)
from hitless.kernel.libbpf import options
from hitless.kernel.maps import Rows, create
from hitless.layout.conversion import Conversion

__all__ = ["EACH", "Scratch", "begin_entry", "count", "end_entry", "put_out"]

_ARRAY = 2  # BPF_MAP_TYPE_ARRAY
_MMAPABLE = 1 << 10  # BPF_F_MMAPABLE
_COUNTERS = 6
EACH = 64
"""Entries for which a program puts out one byte."""


class Scratch:
    """Counters and working room of a program, in one array of one value that is mapped into this process.

    There are six counters of 8 bytes, addressed by their offset. ``rooms`` are the offsets of the rooms asked for, each
    of so many bytes and for what a conversion makes, if any: the moves never write what the defaults do, so those are
    there from the beginning. ``whole`` are all bytes of it.
    """

    def __init__(self, name: str, *rooms: tuple[int, Conversion | None]) -> None:
        at = 8 * _COUNTERS
        self.rooms: list[int] = []
        for size, _ in rooms:
            self.rooms.append(at)
            at += padded(size)
        self.map = create(_ARRAY, name, 4, at, 1, options("bpf_map_create_opts", map_flags=_MMAPABLE))
        memory = mmap.mmap(self.map.fd, (at + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE)
        self.counters = np.frombuffer(memory, np.int64)[:_COUNTERS]
        self.whole = np.frombuffer(memory, np.uint8)
        for (_, conversion), room in zip(rooms, self.rooms, strict=True):
            if conversion is not None:
                zeros: Rows = np.zeros((1, conversion.old_size), np.uint8)
                self.whole[room : room + conversion.new_size] = conversion.apply(zeros).records[0]

    def __getitem__(self, counter: int) -> int:
        return int(self.counters[counter // 8])

    def __setitem__(self, counter: int, number: int) -> None:
        self.counters[counter // 8] = number


def begin_entry(asm: Assembler) -> None:
    """The context is struct bpf_iter__bpf_map_elem: meta, map, key, value; the last call has no key and no value."""
    asm.emit(MOV, R6, R1)
    asm.emit(LOAD[8], R7, R6, 16)
    asm.emit(JEQ_IMM, R7, off="exit", imm=0)
    asm.emit(LOAD[8], R8, R6, 24)
    asm.emit(JEQ_IMM, R8, off="exit", imm=0)


def end_entry(asm: Assembler) -> None:
    """The label ``end``, and a byte of output if this entry is the last of ``EACH``."""
    asm.label("end")
    asm.emit(LOAD[8], R1, R6, 0)  # meta
    asm.emit(LOAD[8], R1, R1, 16)  # meta->seq_num
    asm.emit(AND_IMM, R1, imm=EACH - 1)
    asm.emit(JNE_IMM, R1, off="exit", imm=EACH - 1)
    asm.emit(MOV_IMM, R1, imm=0)
    asm.emit(STORE[8], FP, R1, -8)
    asm.pointer(R2, FP, -8)
    put_out(asm, 1)
    asm.label("exit")
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)


def put_out(asm: Assembler, size: int) -> None:
    """Put out ``size`` bytes at R2."""
    asm.emit(LOAD[8], R1, R6, 0)  # meta
    asm.emit(LOAD[8], R1, R1, 0)  # meta->seq
    asm.emit(MOV_IMM, R3, imm=size)
    asm.call(SEQ_WRITE)


def count(asm: Assembler, scratch: Scratch, counter: int) -> None:
    """Add 1 to a counter; by R1 and R2."""
    asm.value(R1, scratch.map.fd, counter)
    asm.emit(LOAD[8], R2, R1, 0)
    asm.emit(ADD_IMM, R2, imm=1)
    asm.emit(STORE[8], R1, R2, 0)
