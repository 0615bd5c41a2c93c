"""Bringing entries of a new map up to date, atomically against running programs.

The three-way merge of the protocol: a *record* holds the base value and the old value, both converted to the
new layout, and a program made here merges their difference into the entry field by field: atomic add for ``sum``,
compare-and-swap for ``keep``, ``max`` and ``min``, atomic or for ``or``; under the entry's bpf_spin_lock if it has one.
It writes the old value into the row of the base as well. One run of a program is never cut in half by the death of the
process that asked for it, so entry and base always agree, and the whole merge can be repeated after a kill.

A per-CPU map takes a record for each CPU, and the run happens on that CPU: programs count there without atomic
instructions, and nothing else runs on a CPU between two instructions of one that does.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

import msgspec
import numpy as np

from hitless.errors import NodeError
from hitless.kernel.base import Base, Indices, padded
from hitless.kernel.codegen import (
    ADD,
    ATOMIC,
    ATOMIC_ADD,
    ATOMIC_OR,
    CMPXCHG,
    DELETE,
    EXIT,
    FP,
    JA,
    JEQ,
    JEQ_IMM,
    JGE,
    JGT_IMM,
    JLE,
    JNE,
    JNE_IMM,
    JSGE,
    JSLE,
    LOAD,
    LOOKUP,
    LOOKUP_PERCPU,
    MOV,
    MOV32,
    MOV_IMM,
    OR,
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R7,
    R8,
    R9,
    SPIN_LOCK,
    SPIN_UNLOCK,
    STORE,
    SUB,
    UPDATE,
    Assembler,
    copy_code,
    words,
)  # fmt: skip
from hitless.kernel.libbpf import check, options
from hitless.kernel.maps import Entries, Map, Rows, create
from hitless.kernel.programs import load_code, run_code
from hitless.layout.conversion import Leaf

__all__ = ["Merger", "Mode", "on_cpu"]


class Mode(IntEnum):
    """What became of a key of the old map since its base was taken."""

    CHANGED = 0
    INSERTED = 1
    DELETED = 2


_HEADER = 16  # row, CPU, place of the value in the row, nothing; each 4 bytes


class _Record(msgspec.Struct, frozen=True):
    """Where the parts of a record are, in bytes; each part starts at a multiple of 8."""

    old_key: int
    new_key: int
    base: int  # base value in the new layout
    value: int  # old value in the new layout
    old: int  # old value as it is
    size: int

    @property
    def old_size(self) -> int:
        """Bytes of the old value, padded."""
        return self.size - self.old

    @classmethod
    def of(cls, old: Entries, new: Map) -> _Record:
        value = padded(new.info.value_size)
        sizes = [padded(old.info.key_size), padded(new.info.key_size), value, value, padded(old.info.value_size)]
        starts = [_HEADER]
        for size in sizes:
            starts.append(starts[-1] + size)
        return cls(*starts)


_SLOTS = 1024
_MAP_TYPE_ARRAY = 2
_MMAPABLE = 1 << 10  # BPF_F_MMAPABLE
_PROG_TYPE_XDP, _PROG_TYPE_SYSCALL = 6, 31
_F_SLEEPABLE = 1 << 4


class Merger:
    """A loaded merge program for one map, with the array through which records reach it."""

    def __init__(
        self, name: str, old: Entries, new: Map, base: Base, leaves: Sequence[Leaf], lock: int | None = None
    ) -> None:
        """Load the program for map ``name``; ``leaves`` are the fields of the new value.

        ``lock`` is the offset of the bpf_spin_lock that guards the value, in bytes. Raises KernelError with the
        verifier's log if the kernel refuses the program.
        """
        self._name = name
        self._new = new
        self._record = _Record.of(old, new)
        self._records = create(_MAP_TYPE_ARRAY, f"merge_{name}", 4, self._record.size, _SLOTS)
        opts = options("bpf_map_create_opts", map_flags=_MMAPABLE)
        self._order = create(_MAP_TYPE_ARRAY, f"merge_{name}", 4, 8, 1, opts)
        self._asked = np.frombuffer(mmap.mmap(self._order.fd, mmap.PAGESIZE), np.uint32)
        code = _merge_code(self._record, leaves, self._records, self._order, new, base, lock)
        what = f"the merge program of map {name}"
        # SYSCALL programs sleep, and what sleeps may not use tries, nor before Linux 6.9 maps with locks, even if it
        # takes none: a section of variables, whose one record needs no sleep, may have one. XDP programs do both.
        sleeps = lock is None and new.info.type != "lpm_trie" and new.info.max_entries > 1
        kind, flags = (_PROG_TYPE_SYSCALL, _F_SLEEPABLE) if sleeps else (_PROG_TYPE_XDP, 0)
        self._program = load_code(kind, f"merge_{name}", code, what, prog_flags=flags)

    def merge(
        self,
        mode: Mode,
        places: Indices,
        old_keys: Rows,
        new_keys: Rows,
        base: Rows,
        values: Rows,
        old: Rows,
        leave_out: bool = False,
        cpu: int | None = None,
    ) -> Indices:
        """Merge entries, one row each: keys in both layouts, base and old values in the new layout, old as it is.

        ``places`` are their rows in the base. ``leave_out``: pass over entries that a full new map has no room for.
        Of a per-CPU map the values are those of ``cpu``. Returns the indices of entries that were left out. Raises
        KernelError (E2BIG when the new map is full); entries before the failing one are merged.
        """
        layout = self._record
        value_at = padded(old_keys.shape[1]) + 8 + (cpu or 0) * layout.old_size
        left = []
        with on_cpu(cpu):
            for start in range(0, len(old_keys), _SLOTS):
                part = slice(start, start + _SLOTS)
                rows = np.zeros((len(old_keys[part]), layout.size), np.uint8)
                header = rows.view(np.uint32)
                header[:, 0], header[:, 1], header[:, 2] = places[part], cpu or 0, value_at
                for offset, column in (
                    (layout.old_key, old_keys),
                    (layout.new_key, new_keys),
                    (layout.base, base),
                    (layout.value, values),
                    (layout.old, old),
                ):
                    rows[:, offset : offset + column.shape[1]] = column[part]
                self._records.write(np.arange(len(rows), dtype=np.uint32).view(np.uint8).reshape(-1, 4), rows)
                left += [start + slot for slot in range(len(rows)) if not self._run(slot, mode, leave_out)]
        return np.array(left, np.intp)

    def _run(self, slot: int, mode: Mode, leave_out: bool) -> bool:
        self._asked[0], self._asked[1] = slot, mode
        while True:
            result = run_code(self._program, f"merge of map {self._name}")
            if result != -errno.EAGAIN:  # a busy field is tried again, a few swaps at a time
                if leave_out and result == -errno.E2BIG:
                    return False
                check(result, "merging an entry", f"map {self._name}")
                return True

    def close(self) -> None:
        """Give the program and its records back to the kernel."""
        self._program.close()
        self._records.close()
        self._order.close()


@contextmanager
def on_cpu(cpu: int | None) -> Iterator[None]:
    """Run on ``cpu`` for a while, if it is online; values of one that is not are written by nobody."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {cpu})
    except OSError as error:
        if error.errno != errno.EINVAL:  # which says that the CPU is not online
            raise
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def require_all_cpus(name: str) -> None:
    """Raise NodeError unless this process may run on every CPU that is online: map ``name`` has a value for each."""
    online = Path("/sys/devices/system/cpu/online").read_text().strip()
    for part in online.split(","):
        first, _, last = part.partition("-")
        for cpu in range(int(first), int(last or first) + 1):
            with on_cpu(cpu):
                if os.sched_getaffinity(0) != {cpu}:
                    raise NodeError(
                        f"map {name} has a value for each CPU, and this process may not run on CPU {cpu}, so that it "
                        "could not add to that value safely; run the upgrade outside of this cpuset",
                        map=name,
                        cpu=cpu,
                    )


# Registers: R6 the record, R7 the entry of the new map, R8 the mode, R9 the row of the base; R0 to R5 are scratch.
_SWAP_TRIES = 4
_EXTREMES = {"max": (JGE, JSGE), "min": (JLE, JSLE)}  # the jump, unsigned and signed, when the entry stays


def _merge_code(
    record: _Record, leaves: Sequence[Leaf], records: Map, order: Map, new: Map, base: Base, lock: int | None
) -> bytes:
    asm = Assembler()
    asm.value(R1, order.fd)
    asm.emit(LOAD[4], R8, R1, 4)  # mode
    asm.emit(LOAD[4], R2, R1, 0)  # slot
    asm.emit(STORE[4], FP, R2, -4)
    asm.map(R1, records.fd)
    asm.pointer(R2, FP, -4)
    asm.call(LOOKUP)
    asm.emit(MOV, R6, R0)
    asm.emit(MOV_IMM, R0, imm=-errno.EINVAL)
    asm.emit(JEQ_IMM, R6, off="exit", imm=0)
    asm.emit(LOAD[4], R2, R6, 0)
    base.segments.lookup_code(asm, R2)
    asm.emit(MOV, R9, R0)
    asm.emit(MOV_IMM, R0, imm=-errno.EINVAL)
    asm.emit(JEQ_IMM, R9, off="exit", imm=0)

    longest = new.info.type == "lpm_trie"
    if longest:
        # A lookup finds a shorter prefix where the entry is absent: only an insertion that fails shows it is there.
        asm.emit(JNE_IMM, R8, off="there", imm=Mode.INSERTED)
        _insert(asm, new, record)
        asm.label("there")
    asm.map(R1, new.fd)
    asm.pointer(R2, R6, record.new_key)
    if new.info.per_cpu:
        asm.emit(LOAD[4], R3, R6, 4)
        asm.call(LOOKUP_PERCPU)
    else:
        asm.call(LOOKUP)
    asm.emit(MOV, R7, R0)
    asm.emit(JEQ_IMM, R8, off="delete", imm=Mode.DELETED)

    asm.emit(JEQ_IMM, R7, off="absent", imm=0)
    # What can fail comes first, so that a run which fails has changed nothing that a second run would repeat.
    if lock is None:
        for leaf in leaves:
            if leaf.merge in _EXTREMES:
                _extreme(asm, leaf, record, leaf.atomic)
    _remember(asm, record, base)
    if lock is not None:
        asm.pointer(R1, R7, lock)
        asm.call(SPIN_LOCK)
        for leaf in leaves:
            if leaf.merge in _EXTREMES:
                _extreme(asm, leaf, record, False)
    for leaf in leaves:
        if leaf.merge not in _EXTREMES:
            _merge_leaf(asm, leaf, record)
    if lock is not None:
        asm.pointer(R1, R7, lock)
        asm.call(SPIN_UNLOCK)
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(JA, off="exit")

    asm.label("absent")
    # A changed key that the new release deleted stays deleted: its own word wins.
    asm.emit(JEQ_IMM, R8, off="remember", imm=Mode.CHANGED)
    if not longest:
        _insert(asm, new, record)
    # The new release inserted the key itself since the lookup: the next run finds and merges it.
    asm.emit(MOV_IMM, R0, imm=-errno.EAGAIN)
    asm.emit(JA, off="exit")
    asm.label("remember")
    _remember(asm, record, base)
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(JA, off="exit")

    asm.label("delete")
    asm.emit(JEQ_IMM, R7, off="forget", imm=0)
    # Only an entry that the new release has not touched goes. Of a per-CPU map this program sees one CPU's value.
    for leaf in () if new.info.per_cpu else leaves:
        for size, offset in words(leaf.offset, leaf.size):
            asm.emit(LOAD[size], R1, R7, offset)
            asm.emit(LOAD[size], R2, R6, record.base + offset)
            asm.emit(JNE, R1, R2, "forget")
    asm.map(R1, new.fd)
    asm.pointer(R2, R6, record.new_key)
    asm.call(DELETE)
    asm.label("forget")
    asm.emit(MOV_IMM, R1, imm=0)
    asm.emit(STORE[8], R9, R1, 0)
    asm.emit(MOV_IMM, R0, imm=0)
    asm.label("exit")
    asm.emit(EXIT)
    return asm.code()


def _insert(asm: Assembler, new: Map, record: _Record) -> None:
    """The old value as an entry of its own, unless its key is there already."""
    asm.map(R1, new.fd)
    asm.pointer(R2, R6, record.new_key)
    asm.pointer(R3, R6, record.value)
    asm.emit(MOV_IMM, R4, imm=1)  # BPF_NOEXIST
    asm.call(UPDATE)
    asm.emit(JEQ_IMM, R0, off="remember", imm=0)
    asm.emit(JNE_IMM, R0, off="exit", imm=-errno.EEXIST)


def _remember(asm: Assembler, record: _Record, base: Base) -> None:
    """The old value, and its key, into the row of the base."""
    done = asm.fresh("remembered")
    copy_code(asm, record.new_key - record.old_key, R6, record.old_key, R9, 8)
    asm.emit(LOAD[4], R2, R6, 8)
    asm.emit(JGT_IMM, R2, off=done, imm=base.segments.row_size - record.old_size)  # which only tells the verifier
    asm.emit(MOV, R3, R9)
    asm.emit(ADD, R3, R2)
    asm.pointer(R4, R6, record.old)
    copy_code(asm, record.old_size, R4, 0, R3, 0)
    asm.emit(MOV_IMM, R1, imm=1)
    asm.emit(STORE[8], R9, R1, 0)
    asm.label(done)


def _merge_leaf(asm: Assembler, leaf: Leaf, record: _Record) -> None:
    if leaf.merge == "sum":
        _sum(asm, leaf, record)
    elif leaf.merge == "or":
        _or(asm, leaf, record)
    else:
        _keep(asm, leaf, record)


def _keep(asm: Assembler, leaf: Leaf, record: _Record) -> None:
    """Old value in, if the entry still has the base value."""
    done = asm.fresh("kept")
    if leaf.atomic:
        size, offset = leaf.size, leaf.offset
        asm.emit(LOAD[size], R0, R6, record.base + offset)
        asm.emit(LOAD[size], R1, R6, record.value + offset)
        asm.emit(JEQ, R0, R1, done)
        asm.emit(ATOMIC[size], R7, R1, offset, CMPXCHG)
        asm.label(done)
        return
    parts = words(leaf.offset, leaf.size)
    for size, offset in parts:
        asm.emit(LOAD[size], R0, R6, record.base + offset)
        asm.emit(LOAD[size], R1, R7, offset)
        asm.emit(JNE, R0, R1, done)
    for size, offset in parts:
        asm.emit(LOAD[size], R1, R6, record.value + offset)
        asm.emit(STORE[size], R7, R1, offset)
    asm.label(done)


def _sum(asm: Assembler, leaf: Leaf, record: _Record) -> None:
    """What the old programs added since the base, modulo the width of the field."""
    size, offset = leaf.size, leaf.offset
    asm.emit(LOAD[size], R1, R6, record.value + offset)
    asm.emit(LOAD[size], R2, R6, record.base + offset)
    asm.emit(SUB, R1, R2)
    if leaf.atomic:
        asm.emit(ATOMIC[size], R7, R1, offset, ATOMIC_ADD)
        return
    asm.emit(LOAD[size], R2, R7, offset)
    asm.emit(ADD, R2, R1)
    asm.emit(STORE[size], R7, R2, offset)


def _or(asm: Assembler, leaf: Leaf, record: _Record) -> None:
    size, offset = leaf.size, leaf.offset
    asm.emit(LOAD[size], R1, R6, record.value + offset)
    if leaf.atomic:
        asm.emit(ATOMIC[size], R7, R1, offset, ATOMIC_OR)
        return
    asm.emit(LOAD[size], R2, R7, offset)
    asm.emit(OR, R2, R1)
    asm.emit(STORE[size], R7, R2, offset)


def _extreme(asm: Assembler, leaf: Leaf, record: _Record, atomic: bool) -> None:
    """The greater or smaller of entry and old value; a few swaps, then -EAGAIN so that no run is unbounded."""
    size, offset, signed = leaf.size, leaf.offset, leaf.signed
    done = asm.fresh("extreme")
    asm.load(size, signed, R2, R6, record.value + offset)
    for _attempt in range(_SWAP_TRIES if atomic else 1):
        asm.load(size, signed, R1, R7, offset)
        asm.emit(_EXTREMES[leaf.merge][signed], R1, R2, done)
        if atomic:
            asm.emit(MOV if size == 8 else MOV32, R0, R1)
            asm.emit(MOV if size == 8 else MOV32, R3, R1)
            asm.emit(ATOMIC[size], R7, R2, offset, CMPXCHG)
            asm.emit(JEQ, R0, R3, done)
        else:
            asm.emit(STORE[size], R7, R2, offset)
    if atomic:
        asm.emit(MOV_IMM, R0, imm=-errno.EAGAIN)
        asm.emit(JA, off="exit")
    asm.label(done)
