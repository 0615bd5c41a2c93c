"""Programs over the owners of local storage (sockets, tasks, cgroups): they tell what differs, and settle it.

User space cannot list the owners of a storage map, so an iterator program visits them. The *base* of the three-way
merge is local storage of the same owners: it goes when they go, and children of a socket inherit it if they inherit
the old value. Its value is a number that names the owner to user space, whether an old value is held, and the old
value. One run of a program settles one owner, and no kill cuts a run in half.
"""

from __future__ import annotations

import errno
import secrets
import struct
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from hitless.errors import KernelError
from hitless.kernel.base import padded
from hitless.kernel.codegen import (
    ADD_IMM,
    ATOMIC,
    CMPXCHG,
    EXIT,
    FP,
    JA,
    JEQ_IMM,
    JGE,
    JNE,
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
    Assembler,
    copy_code,
    words,
)  # fmt: skip
from hitless.kernel.iterators import Iterator
from hitless.kernel.libbpf import check, options
from hitless.kernel.maps import Map, Rows, create, create_as
from hitless.kernel.merger import _EXTREMES, Mode, _extreme, _merge_leaf, _Record
from hitless.layout.conversion import Leaf
from hitless.layout.model import Array, Int, MapSpec

__all__ = ["Settler", "Teller", "Told", "create_base", "create_storage", "probe_storage"]


Flags = npt.NDArray[np.bool_]


class _Owner(msgspec.Struct, frozen=True):
    """A type of storage: the iterator over owners, where that one's context has them, helper numbers."""

    target: str
    member: int
    get: int
    delete: int


_OWNERS = {
    "sk_storage": _Owner("bpf_sk_storage_map", 16, 107, 108),
    "task_storage": _Owner("task", 8, 156, 157),
    "cgrp_storage": _Owner("cgroup", 8, 210, 211),
}
_COOKIE = 46  # bpf_get_socket_cookie
_CREATE = 1  # BPF_LOCAL_STORAGE_GET_F_CREATE
_SLOTS = 4096
_HASH, _ARRAY = 1, 2
_NO_PREALLOC = 1  # BPF_F_NO_PREALLOC
_TRIES = 100  # the kernel makes no storage while another task on the same CPU is in the midst of making some
_DONE = 255  # mode of a record that was settled

# A value of a base: the owner's number, whether an old value is held, the old value.
_NUMBER, _HELD, _VALUE = 0, 8, 16
# The control record of a teller: owners to pass over, owners seen, the next owner's number, failures; then zeros.
_SKIP, _SEEN, _NEXT, _FAILED, _ZEROS = 0, 8, 16, 24, 32


def create_base(source: Map, name: str, size: int) -> Map:
    """An empty base beside ``source`` for values of ``size`` bytes, inherited by sockets as those of ``source`` are.

    Raises KernelError.
    """
    return create_storage(source.info.type, source.info.flags, name, size)


def probe_storage(kind: str) -> None:
    """Load the programs for a map of type ``kind``. Raises KernelError, UnsupportedError: not all works here."""
    with (
        create_storage(kind, _NO_PREALLOC, "probe", 8) as source,
        create_base(source, "probe_base", source.info.value_size) as base,
    ):
        Teller("probe", source, base, differing=True).close()
        Settler("probe", source, base, (Leaf("value", 0, 8, merge="sum"),)).close()


def create_storage(kind: str, flags: int, name: str, size: int) -> Map:
    """A map of local storage of this ``kind``, with values of ``size`` bytes and the head of a base before them."""
    size += _VALUE
    value = Array(Int("byte", 1, False), size)  # the kernel wants types of every storage map
    return create_as(MapSpec(name, kind, 4, size, 0, flags, key=Int("int", 4, True), value=value))


class Told(msgspec.Struct, frozen=True):
    """What a pass found, a row for each owner: its number, whether a value is in the map (``has``), in the base."""

    numbers: Rows
    has: Flags
    held: Flags
    values: Rows
    base: Rows


class Teller:
    """Tells of owners that have a value in ``source`` or in ``base``, and gives them storage for a base."""

    def __init__(self, name: str, source: Map, base: Map, differing: bool) -> None:
        """``differing``: only of those whose value is not the one that the base holds, byte by byte.

        Raises KernelError with the verifier's log.
        """
        self._name = name
        self._sizes = source.info.value_size, base.info.value_size - _VALUE
        self._control = create(_ARRAY, f"control_{name}", 4, _ZEROS + padded(max(self._sizes)) + 8, 1)
        self._next = secrets.randbits(62)  # numbers given by a process that was killed are still in use
        owner = _OWNERS[source.info.type]
        code = _telling(owner, source, base, self._control, self._sizes, differing)
        self._iterator = Iterator.load(owner.target, code, f"tell_{name}")

    def tell(self, over: Map) -> Told:
        """One pass over the owners of ``over``: source or base of sockets; all there are of tasks and cgroups.

        Raises KernelError (ENOMEM if the kernel makes no storage for the base of an owner).
        """
        size = 16 + padded(self._sizes[0]) + padded(self._sizes[1])
        for _ in range(_TRIES):
            told, failed, ended = bytearray(), 0, False
            while not ended:
                more, ended = self._pass(over, len(told) // size, told)
                failed += more
            if not failed:
                break
        else:
            what = f"storage of map {self._name} for {failed} owners, which the merge needs (sockets: see optmem_max)"
            check(-errno.ENOMEM, "making", what)
        rows = np.frombuffer(told, np.uint8).reshape(-1, size)
        base_at = 16 + padded(self._sizes[0])
        return Told(
            numbers=rows[:, :8],
            has=rows[:, 8] & 1 != 0,
            held=rows[:, 8] & 2 != 0,
            values=rows[:, 16 : 16 + self._sizes[0]],
            base=rows[:, base_at : base_at + self._sizes[1]],
        )

    def _pass(self, over: Map, skip: int, told: bytearray) -> tuple[int, bool]:
        """Read into ``told`` behind the first ``skip`` owners; how many got no base, and whether the end was reached.

        The kernel lets nobody read twice in one pass over cgroups, so that another pass takes up where the one ended.
        """
        head = struct.pack("=QQQQ", skip, 0, self._next, 0)
        self._control.update(bytes(4), head.ljust(self._control.info.value_size, b"\0"))
        self._iterator.open(over)
        ended = True
        try:
            while part := self._iterator.read(1 << 15):
                told += part
        except KernelError as error:
            if error.facts["errno"] != errno.EOPNOTSUPP:
                raise
            ended = False
        _, _, self._next, failed = struct.unpack_from("=QQQQ", self._control.lookup(bytes(4)) or b"")
        return failed, ended

    def close(self) -> None:
        """Give the program back to the kernel."""
        self._iterator.close()
        self._control.close()


class Settler:
    """Merges what differs into ``target``, owner by owner, and notes it in the base."""

    def __init__(self, name: str, target: Map, base: Map, leaves: Sequence[Leaf]) -> None:
        """``leaves`` are the fields of the target's value. Raises KernelError with the verifier's log."""
        size, held = padded(target.info.value_size), padded(base.info.value_size - _VALUE)
        self._base = base
        self._record = _Record(0, 8, 8, 8 + size, 8 + 2 * size, 8 + 2 * size + held)
        opts = options("bpf_map_create_opts", map_flags=_NO_PREALLOC)
        self._records = create(_HASH, f"settle_{name}", 8, self._record.size, _SLOTS, opts)
        owner = _OWNERS[target.info.type]
        code = _settling(owner, target, base, self._records, self._record, leaves)
        self._iterator = Iterator.load(owner.target, code, f"settle_{name}")

    def settle(self, modes: npt.NDArray[np.uint8], numbers: Rows, base: Rows, values: Rows, held: Rows) -> int:
        """Merge, one row for each owner: ``base`` and ``values`` in the target's layout, ``held`` as the base has it.

        Returns how many were not settled: their owner is gone, a field of theirs is busy, or there is no room.
        """
        left = 0
        for start in range(0, len(numbers), _SLOTS):
            part = slice(start, start + _SLOTS)
            keys = np.ascontiguousarray(numbers[part])
            rows = np.zeros((len(keys), self._record.size), np.uint8)
            rows[:, 0] = modes[part]
            for offset, column in ((self._record.base, base), (self._record.value, values), (self._record.old, held)):
                rows[:, offset : offset + column.shape[1]] = column[part]
            self._records.write(keys, rows)
            self._iterator.run(self._base)
            left += int((self._records.entries()[1][:, 0] != _DONE).sum())
            for key in keys:
                self._records.delete(key.tobytes())
        return left

    def close(self) -> None:
        """Give the program back to the kernel."""
        self._iterator.close()
        self._records.close()


def _storage(asm: Assembler, helper: int, storage: Map, owner: int, flags: int = 0) -> None:
    """Call a helper on ``storage`` of the owner in a register; R0 is the value or nothing."""
    asm.map(R1, storage.fd)
    asm.emit(MOV, R2, owner)
    asm.emit(MOV_IMM, R3, imm=0)
    asm.emit(MOV_IMM, R4, imm=flags)
    asm.call(helper)


def _number(asm: Assembler, owner: _Owner, register: int, base: int) -> None:
    """A socket's number is its cookie: a base that a child inherited has its parent's."""
    if owner.target == "bpf_sk_storage_map":
        asm.emit(MOV, R1, register)
        asm.call(_COOKIE)
        asm.emit(STORE[8], base, R0, _NUMBER)


# Registers: R6 the owner, R7 its value, R8 its base, R9 where output goes.
def _telling(
    owner: _Owner, source: Map, base: Map, control: Map, sizes: tuple[int, int], differing: bool
) -> bytes:
    asm = Assembler()
    asm.emit(LOAD[8], R2, R1, 0)  # meta
    asm.emit(LOAD[8], R9, R2, 0)  # meta->seq
    asm.emit(LOAD[8], R6, R1, owner.member)
    asm.emit(JEQ_IMM, R6, off="exit", imm=0)  # the last call, after all owners, has none
    _storage(asm, owner.get, source, R6)
    asm.emit(MOV, R7, R0)
    _storage(asm, owner.get, base, R6)
    asm.emit(MOV, R8, R0)
    asm.emit(JNE_IMM, R8, off="based", imm=0)
    asm.emit(JEQ_IMM, R7, off="exit", imm=0)
    _storage(asm, owner.get, base, R6, _CREATE)
    asm.emit(MOV, R8, R0)
    asm.value(R1, control.fd)
    asm.emit(JNE_IMM, R8, off="made", imm=0)
    asm.emit(LOAD[8], R2, R1, _FAILED)
    asm.emit(ADD_IMM, R2, imm=1)
    asm.emit(STORE[8], R1, R2, _FAILED)
    asm.emit(JA, off="exit")
    asm.label("made")
    asm.emit(LOAD[8], R2, R1, _NEXT)
    asm.emit(STORE[8], R8, R2, _NUMBER)
    asm.emit(ADD_IMM, R2, imm=1)
    asm.emit(STORE[8], R1, R2, _NEXT)

    asm.label("based")
    _number(asm, owner, R6, R8)
    asm.emit(LOAD[8], R1, R8, _NUMBER)
    asm.emit(STORE[8], FP, R1, -16)
    asm.emit(LOAD[8], R1, R8, _HELD)
    asm.emit(JEQ_IMM, R7, off="deleted", imm=0)
    asm.emit(MOV_IMM, R2, imm=1)
    asm.emit(JEQ_IMM, R1, off="tell", imm=0)
    asm.emit(MOV_IMM, R2, imm=3)
    if differing:
        for size, offset in words(0, sizes[0]):
            asm.emit(LOAD[size], R3, R7, offset)
            asm.emit(LOAD[size], R4, R8, _VALUE + offset)
            asm.emit(JNE, R3, R4, "tell")
    asm.emit(JA, off="exit" if differing else "tell")
    asm.label("deleted")
    asm.emit(JEQ_IMM, R1, off="exit", imm=0)
    asm.value(R7, control.fd, _ZEROS)
    asm.emit(MOV_IMM, R2, imm=2)

    asm.label("tell")
    asm.emit(STORE[8], FP, R2, -8)
    asm.value(R1, control.fd)
    asm.emit(LOAD[8], R2, R1, _SEEN)
    asm.emit(LOAD[8], R3, R1, _SKIP)
    asm.emit(MOV, R4, R2)
    asm.emit(ADD_IMM, R4, imm=1)
    asm.emit(STORE[8], R1, R4, _SEEN)
    asm.emit(JGE, R2, R3, "emit")
    asm.emit(JA, off="exit")
    asm.label("emit")
    asm.pointer(R2, FP, -16)
    _write(asm, 16)
    for register, offset, size in ((R7, 0, sizes[0]), (R8, _VALUE, sizes[1])):
        asm.pointer(R2, register, offset)
        _write(asm, size)
        if size % 8:
            asm.value(R2, control.fd, _ZEROS)
            _write(asm, 8 - size % 8)
    asm.label("exit")
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)
    return asm.code()


def _write(asm: Assembler, size: int) -> None:
    """Put out ``size`` bytes at R2."""
    asm.emit(MOV, R1, R9)
    asm.emit(MOV_IMM, R3, imm=size)
    asm.call(SEQ_WRITE)


# Registers: R6 the record, R7 the target's value, R8 the owner, R9 its base; R0 to R5 are scratch.
def _settling(
    owner: _Owner, target: Map, base: Map, records: Map, record: _Record, leaves: Sequence[Leaf]
) -> bytes:
    asm = Assembler()
    asm.emit(LOAD[8], R8, R1, owner.member)
    asm.emit(JEQ_IMM, R8, off="exit", imm=0)
    _storage(asm, owner.get, base, R8)
    asm.emit(MOV, R9, R0)
    asm.emit(JEQ_IMM, R9, off="exit", imm=0)
    _number(asm, owner, R8, R9)
    asm.map(R1, records.fd)
    asm.pointer(R2, R9, _NUMBER)
    asm.call(LOOKUP)
    asm.emit(MOV, R6, R0)
    asm.emit(JEQ_IMM, R6, off="exit", imm=0)
    _storage(asm, owner.get, target, R8)
    asm.emit(MOV, R7, R0)
    asm.emit(LOAD[8], R1, R6, 0)
    asm.emit(JEQ_IMM, R1, off="exit", imm=_DONE)
    asm.emit(JEQ_IMM, R1, off="delete", imm=Mode.DELETED)
    asm.emit(JNE_IMM, R7, off="there", imm=0)
    # A changed value that the new release deleted stays deleted: its own word wins.
    asm.emit(JEQ_IMM, R1, off="remember", imm=Mode.CHANGED)
    # Made of zeros and then merged as if it had been there: exact, even if a running program makes it just now.
    _storage(asm, owner.get, target, R8, _CREATE)
    asm.emit(MOV, R7, R0)
    asm.emit(JEQ_IMM, R7, off="exit", imm=0)
    for leaf in leaves:
        if leaf.merge in _EXTREMES:
            _first(asm, leaf, record)

    asm.label("there")
    # What can fail comes first, so that a run which fails has changed nothing that a second run would repeat.
    for leaf in leaves:
        if leaf.merge in _EXTREMES:
            _extreme(asm, leaf, record, leaf.atomic)
    asm.label("remember")
    copy_code(asm, base.info.value_size - _VALUE, R6, record.old, R9, _VALUE)
    asm.emit(MOV_IMM, R1, imm=1)
    asm.emit(STORE[8], R9, R1, _HELD)
    asm.emit(JEQ_IMM, R7, off="done", imm=0)
    for leaf in leaves:
        if leaf.merge not in _EXTREMES:
            _merge_leaf(asm, leaf, record)
    asm.emit(JA, off="done")

    asm.label("delete")
    asm.emit(JEQ_IMM, R7, off="forget", imm=0)
    for leaf in leaves:  # only a value that the new release has not touched goes
        for size, offset in words(leaf.offset, leaf.size):
            asm.emit(LOAD[size], R1, R7, offset)
            asm.emit(LOAD[size], R2, R6, record.base + offset)
            asm.emit(JNE, R1, R2, "forget")
    asm.map(R1, target.fd)
    asm.emit(MOV, R2, R8)
    asm.call(owner.delete)
    asm.label("forget")
    asm.emit(MOV_IMM, R1, imm=0)
    asm.emit(STORE[8], R9, R1, _HELD)
    asm.label("done")
    asm.emit(MOV_IMM, R1, imm=_DONE)
    asm.emit(STORE[8], R6, R1, 0)
    asm.label("exit")
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)
    return asm.code()


def _first(asm: Assembler, leaf: Leaf, record: _Record) -> None:
    """The old value in place of the zero of a value just made: no zero counts as its smallest or greatest."""
    size, offset = leaf.size, leaf.offset
    asm.emit(LOAD[size], R1, R6, record.value + offset)
    asm.emit(MOV_IMM, R0, imm=0)
    if leaf.atomic:
        asm.emit(ATOMIC[size], R7, R1, offset, CMPXCHG)
        return
    skip = asm.fresh("first")
    asm.emit(LOAD[size], R2, R7, offset)
    asm.emit(JNE, R2, R0, skip)
    asm.emit(STORE[size], R7, R1, offset)
    asm.label(skip)
