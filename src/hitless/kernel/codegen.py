"""BPF instructions that bring one entry of a new map up to date, atomically against running programs.

The three-way merge of the protocol: a *record* holds the base value and the old value, both converted to the
new layout, and the program merges their difference into the entry field by field: atomic add for ``sum``,
compare-and-swap for ``keep``, ``max`` and ``min``, atomic or for ``or``. Then it writes the old value into the
base map. One run of a program is never cut in half by the death of the process that asked for it, so entry and
base always agree, and the whole merge can be repeated after a kill.

Instruction names are those of RFC 9669.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from enum import IntEnum

import msgspec
import numpy as np

from hitless.kernel.libbpf import check, ffi, lib, options
from hitless.kernel.maps import Map, Rows, create
from hitless.kernel.programs import load_code
from hitless.layout.conversion import Leaf

__all__ = ["Merger", "Mode"]


class Mode(IntEnum):
    """What became of a key of the old map since its base was taken."""

    CHANGED = 0
    INSERTED = 1
    DELETED = 2


class _Record(msgspec.Struct, frozen=True):
    """Where the parts of a record are, in bytes; each part starts at a multiple of 8."""

    old_key: int
    new_key: int
    base: int  # base value in the new layout
    value: int  # old value in the new layout
    old: int  # old value as it is
    size: int

    @classmethod
    def of(cls, old: Map, new: Map) -> _Record:
        sizes = [old.info.key_size, new.info.key_size, new.info.value_size, new.info.value_size, old.info.value_size]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + (size + 7) // 8 * 8)
        return cls(*starts)


_SLOTS = 1024
_MAP_TYPE_ARRAY = 2
_PROG_TYPE_SYSCALL = 31
_F_SLEEPABLE = 1 << 4


class Merger:
    """A loaded merge program for one map, with the array through which records reach it."""

    def __init__(self, name: str, old: Map, new: Map, base: Map, leaves: Sequence[Leaf]) -> None:
        """Load the program for map ``name``; ``leaves`` are the fields of the new value.

        Raises KernelError with the verifier's log if the kernel refuses it.
        """
        self._name = name
        self._record = _Record.of(old, new)
        self._records = create(_MAP_TYPE_ARRAY, f"merge_{name}", 4, self._record.size, _SLOTS)
        code = _merge_code(self._record, leaves, self._records.fd, new.fd, base.fd)
        what = f"the merge program of map {name}"
        self._program = load_code(_PROG_TYPE_SYSCALL, f"merge_{name}", code, what, prog_flags=_F_SLEEPABLE)

    def merge(
        self, mode: Mode, old_keys: Rows, new_keys: Rows, base: Rows, values: Rows, old: Rows, leave_out: bool = False
    ) -> None:
        """Merge entries, one row each: keys in both layouts, base and old values in the new layout, old as it is.

        ``leave_out``: pass over entries that a full new map has no room for. Raises KernelError (E2BIG when the new
        map is full); entries before the failing one are merged.
        """
        layout = self._record
        for start in range(0, len(old_keys), _SLOTS):
            part = slice(start, start + _SLOTS)
            rows = np.zeros((len(old_keys[part]), layout.size), np.uint8)
            for offset, column in (
                (layout.old_key, old_keys),
                (layout.new_key, new_keys),
                (layout.base, base),
                (layout.value, values),
                (layout.old, old),
            ):
                rows[:, offset : offset + column.shape[1]] = column[part]
            self._records.write(np.arange(len(rows), dtype=np.uint32).view(np.uint8).reshape(-1, 4), rows)
            for slot in range(len(rows)):
                self._run(slot, mode, leave_out)

    def _run(self, slot: int, mode: Mode, leave_out: bool) -> None:
        context = ffi.new("__u32[2]", [slot, mode])
        opts = options("bpf_test_run_opts", ctx_in=context, ctx_size_in=8)
        while True:
            check(lib().bpf_prog_test_run_opts(self._program.fd, opts), "BPF_PROG_RUN", f"merge of map {self._name}")
            result = ffi.cast("int32_t", opts.retval)
            if int(result) != -errno.EAGAIN:  # a busy field is tried again, a few swaps at a time
                if not (leave_out and int(result) == -errno.E2BIG):
                    check(int(result), "merging an entry", f"map {self._name}")
                return

    def close(self) -> None:
        """Give the program and its records back to the kernel."""
        self._program.close()
        self._records.close()


# Registers: R6 the record, R7 the entry of the new map, R8 the mode; R0 to R5 are scratch.
_R0, _R1, _R2, _R3, _R4, _R5, _R6, _R7, _R8, _, _FP = range(11)

_LOAD = {1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}  # LDX | MEM | B, H, W, DW
_STORE = {1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}  # STX | MEM
_ATOMIC = {4: 0xC3, 8: 0xDB}  # STX | ATOMIC | W, DW
_ATOMIC_ADD, _ATOMIC_OR, _CMPXCHG = 0x00, 0x40, 0xF1
_MOV, _MOV_IMM, _SUB, _OR, _ADD, _ADD_IMM = 0xBF, 0xB7, 0x1F, 0x4F, 0x0F, 0x07  # ALU64
_MOV32 = 0xBC
_LSH_IMM, _ARSH_IMM = 0x67, 0xC7
_JA, _JEQ, _JEQ_IMM, _JNE, _JNE_IMM = 0x05, 0x1D, 0x15, 0x5D, 0x55
_JGE, _JLE, _JSGE, _JSLE = 0x3D, 0xBD, 0x7D, 0xDD
_CALL, _EXIT = 0x85, 0x95
_LOOKUP, _UPDATE, _DELETE = 1, 2, 3  # helper numbers: bpf_map_lookup_elem, _update_elem, _delete_elem
_SWAP_TRIES = 4
_EXTREMES = {"max": (_JGE, _JSGE), "min": (_JLE, _JSLE)}  # the jump, unsigned and signed, when the entry stays


class _Assembler:
    """Instructions with labels; jumps are resolved in :meth:`code`."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int, int | str, int]] = []
        self._labels: dict[str, int] = {}
        self._names = 0

    def emit(self, opcode: int, dst: int = 0, src: int = 0, off: int | str = 0, imm: int = 0) -> None:
        self._instructions.append((opcode, dst, src, off, imm))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._instructions)

    def fresh(self, stem: str) -> str:
        self._names += 1
        return f"{stem}{self._names}"

    def map(self, register: int, fd: int) -> None:
        self.emit(0x18, register, 1, 0, fd)  # LD_IMM64 with a map descriptor
        self.emit(0)

    def call(self, helper: int) -> None:
        self.emit(_CALL, imm=helper)

    def load(self, size: int, signed: bool, register: int, base: int, offset: int) -> None:
        self.emit(_LOAD[size], register, base, offset)
        if signed and size < 8:
            self.emit(_LSH_IMM, register, imm=64 - 8 * size)
            self.emit(_ARSH_IMM, register, imm=64 - 8 * size)

    def code(self) -> bytes:
        out = bytearray()
        for index, (opcode, dst, src, off, imm) in enumerate(self._instructions):
            jump = self._labels[off] - index - 1 if isinstance(off, str) else off
            out += struct.pack("=BBhi", opcode, dst | src << 4, jump, imm)
        return bytes(out)


def _merge_code(record: _Record, leaves: Sequence[Leaf], records: int, new: int, base: int) -> bytes:
    asm = _Assembler()
    asm.emit(_LOAD[4], _R8, _R1, 4)  # mode
    asm.emit(_LOAD[4], _R2, _R1, 0)  # slot
    asm.emit(_STORE[4], _FP, _R2, -4)
    asm.map(_R1, records)
    asm.emit(_MOV, _R2, _FP)
    asm.emit(_ADD_IMM, _R2, imm=-4)
    asm.call(_LOOKUP)
    asm.emit(_MOV, _R6, _R0)
    asm.emit(_MOV_IMM, _R0, imm=-errno.EINVAL)
    asm.emit(_JEQ_IMM, _R6, off="exit", imm=0)

    asm.map(_R1, new)
    _pointer(asm, _R2, record.new_key)
    asm.call(_LOOKUP)
    asm.emit(_MOV, _R7, _R0)
    asm.emit(_JEQ_IMM, _R8, off="delete", imm=Mode.DELETED)

    # What can fail comes first, so that a run which fails has changed nothing that a second run would repeat.
    asm.emit(_JEQ_IMM, _R7, off="remember", imm=0)
    for leaf in leaves:
        if leaf.merge in _EXTREMES:
            _extreme(asm, leaf, record)
    asm.label("remember")
    asm.map(_R1, base)
    _pointer(asm, _R2, record.old_key)
    _pointer(asm, _R3, record.old)
    asm.emit(_MOV_IMM, _R4, imm=0)  # BPF_ANY
    asm.call(_UPDATE)
    asm.emit(_JNE_IMM, _R0, off="exit", imm=0)
    asm.emit(_JNE_IMM, _R7, off="merge", imm=0)
    # A changed key that the new release deleted stays deleted: its own word wins. R0 is 0.
    asm.emit(_JEQ_IMM, _R8, off="exit", imm=Mode.CHANGED)
    asm.map(_R1, new)
    _pointer(asm, _R2, record.new_key)
    _pointer(asm, _R3, record.value)
    asm.emit(_MOV_IMM, _R4, imm=1)  # BPF_NOEXIST
    asm.call(_UPDATE)
    asm.emit(_JEQ_IMM, _R0, off="exit", imm=0)
    asm.emit(_MOV, _R7, _R0)
    asm.map(_R1, base)
    _pointer(asm, _R2, record.old_key)
    asm.call(_DELETE)
    asm.emit(_MOV, _R0, _R7)
    asm.emit(_JNE_IMM, _R0, off="exit", imm=-errno.EEXIST)
    # The new release inserted the key itself since the lookup: the next run finds and merges it.
    asm.emit(_MOV_IMM, _R0, imm=-errno.EAGAIN)
    asm.emit(_JA, off="exit")

    asm.label("merge")
    for leaf in leaves:
        if leaf.merge not in _EXTREMES:
            _merge_leaf(asm, leaf, record)
    asm.emit(_MOV_IMM, _R0, imm=0)
    asm.emit(_JA, off="exit")

    asm.label("delete")
    asm.emit(_JEQ_IMM, _R7, off="forget", imm=0)
    for leaf in leaves:  # only an entry that the new release has not touched goes
        for size, offset in _words(leaf):
            asm.emit(_LOAD[size], _R1, _R7, offset)
            asm.emit(_LOAD[size], _R2, _R6, record.base + offset)
            asm.emit(_JNE, _R1, _R2, "forget")
    asm.map(_R1, new)
    _pointer(asm, _R2, record.new_key)
    asm.call(_DELETE)
    asm.label("forget")
    asm.map(_R1, base)
    _pointer(asm, _R2, record.old_key)
    asm.call(_DELETE)
    asm.emit(_MOV_IMM, _R0, imm=0)
    asm.label("exit")
    asm.emit(_EXIT)
    return asm.code()


def _pointer(asm: _Assembler, register: int, offset: int) -> None:
    asm.emit(_MOV, register, _R6)
    asm.emit(_ADD_IMM, register, imm=offset)


def _words(leaf: Leaf) -> list[tuple[int, int]]:
    """The field as aligned words: (bytes, offset) each."""
    words = []
    offset, end = leaf.offset, leaf.offset + leaf.size
    while offset < end:
        size = next(size for size in (8, 4, 2, 1) if offset % size == 0 and offset + size <= end)
        words.append((size, offset))
        offset += size
    return words


def _merge_leaf(asm: _Assembler, leaf: Leaf, record: _Record) -> None:
    if leaf.merge == "sum":
        _sum(asm, leaf, record)
    elif leaf.merge == "or":
        _or(asm, leaf, record)
    else:
        _keep(asm, leaf, record)


def _keep(asm: _Assembler, leaf: Leaf, record: _Record) -> None:
    """Old value in, if the entry still has the base value."""
    done = asm.fresh("kept")
    if leaf.atomic:
        size, offset = leaf.size, leaf.offset
        asm.emit(_LOAD[size], _R0, _R6, record.base + offset)
        asm.emit(_LOAD[size], _R1, _R6, record.value + offset)
        asm.emit(_JEQ, _R0, _R1, done)
        asm.emit(_ATOMIC[size], _R7, _R1, offset, _CMPXCHG)
        asm.label(done)
        return
    words = _words(leaf)
    for size, offset in words:
        asm.emit(_LOAD[size], _R0, _R6, record.base + offset)
        asm.emit(_LOAD[size], _R1, _R7, offset)
        asm.emit(_JNE, _R0, _R1, done)
    for size, offset in words:
        asm.emit(_LOAD[size], _R1, _R6, record.value + offset)
        asm.emit(_STORE[size], _R7, _R1, offset)
    asm.label(done)


def _sum(asm: _Assembler, leaf: Leaf, record: _Record) -> None:
    """What the old programs added since the base, modulo the width of the field."""
    size, offset = leaf.size, leaf.offset
    asm.emit(_LOAD[size], _R1, _R6, record.value + offset)
    asm.emit(_LOAD[size], _R2, _R6, record.base + offset)
    asm.emit(_SUB, _R1, _R2)
    if leaf.atomic:
        asm.emit(_ATOMIC[size], _R7, _R1, offset, _ATOMIC_ADD)
        return
    asm.emit(_LOAD[size], _R2, _R7, offset)
    asm.emit(_ADD, _R2, _R1)
    asm.emit(_STORE[size], _R7, _R2, offset)


def _or(asm: _Assembler, leaf: Leaf, record: _Record) -> None:
    size, offset = leaf.size, leaf.offset
    asm.emit(_LOAD[size], _R1, _R6, record.value + offset)
    if leaf.atomic:
        asm.emit(_ATOMIC[size], _R7, _R1, offset, _ATOMIC_OR)
        return
    asm.emit(_LOAD[size], _R2, _R7, offset)
    asm.emit(_OR, _R2, _R1)
    asm.emit(_STORE[size], _R7, _R2, offset)


def _extreme(asm: _Assembler, leaf: Leaf, record: _Record) -> None:
    """The greater or smaller of entry and old value; a few swaps, then -EAGAIN so that no run is unbounded."""
    size, offset, signed = leaf.size, leaf.offset, leaf.signed
    done = asm.fresh("extreme")
    asm.load(size, signed, _R2, _R6, record.value + offset)
    for _attempt in range(_SWAP_TRIES if leaf.atomic else 1):
        asm.load(size, signed, _R1, _R7, offset)
        asm.emit(_EXTREMES[leaf.merge][signed], _R1, _R2, done)
        if leaf.atomic:
            asm.emit(_MOV if size == 8 else _MOV32, _R0, _R1)
            asm.emit(_MOV if size == 8 else _MOV32, _R3, _R1)
            asm.emit(_ATOMIC[size], _R7, _R2, offset, _CMPXCHG)
            asm.emit(_JEQ, _R0, _R3, done)
        else:
            asm.emit(_STORE[size], _R7, _R2, offset)
    if leaf.atomic:
        asm.emit(_MOV_IMM, _R0, imm=-errno.EAGAIN)
        asm.emit(_JA, off="exit")
    asm.label(done)
