"""Moving the elements of queues and stacks, which can only be popped: in the kernel, so that none is lost or doubled.

One run of a program is never cut in half by the death of the process that asked for it. So an element that leaves one
map is in the other when a run ends, and the whole can be repeated after a kill.
"""

from __future__ import annotations

import errno
import itertools
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hitless.kernel.codegen import (
    ADD,
    ADD_IMM,
    EXIT,
    JA,
    JEQ_IMM,
    JLE,
    JNE,
    JNE_IMM,
    JSGE,
    JSLE,
    LOAD,
    MOV,
    MOV_IMM,
    PEEK,
    POP,
    PUSH,
    R0,
    R1,
    R2,
    R3,
    R6,
    R7,
    R8,
    STORE,
    STORE_IMM,
    SUB,
    Assembler,
    copy_code,
)
from hitless.kernel.libbpf import check
from hitless.kernel.maps import Map, create
from hitless.kernel.programs import load_code, run_code
from hitless.kernel.vmlinux import offsets
from hitless.layout.conversion import Conversion, Move

__all__ = ["Journal", "Mover", "count_elements", "create_beside"]

_MAP_TYPES = {"queue": 22, "stack": 23}
_MAP_TYPE_ARRAY = 2
_PROG_TYPE_XDP = 6  # not SYSCALL: what sleeps may use no queue on older kernels (6.1)
_KEY = bytes(4)
_JLT, _JLT_IMM = 0xAD, 0xA5

_EMPTY, _MORE, _FULL = 0, 1, 2  # what a run returns: the source is empty, elements are left, a private target is full
_ELEMENTS_A_RUN = 64  # each is a turn of a loop that the verifier walks through
_STEPS_A_RUN = 200_000  # what the verifier surely walks through


class Journal:
    """How far the moves of one map have come, in a pinned array: the step, and what did not fit by field.

    It also is the memory in which an element is converted.
    """

    _HEAD = 16

    def __init__(self, held: Map, paths: tuple[str, ...], area: int) -> None:
        self.map = held
        self._paths = paths
        self.element = self._HEAD + 8 * len(paths)  # where the popped element is
        self.converted = self.element + area

    @classmethod
    def at(cls, pin: Path, name: str, conversion: Conversion | None, size: int, fresh: bool) -> Journal:
        """The journal pinned at ``pin``, made new if it is ``fresh``; elements are ``size`` bytes at most."""
        paths = tuple(dict.fromkeys(item.path for item in _lossy(conversion)))
        area = (size + 7) // 8 * 8
        if fresh:
            held = create(_MAP_TYPE_ARRAY, f"moves_{name}", 4, cls._HEAD + 8 * len(paths) + 2 * area, 1)
            held.pin(pin)
        else:
            held = Map.open(pin)
        return cls(held, paths, area)

    @property
    def step(self) -> int:
        """Number of the move that is on, from 0."""
        return int(struct.unpack_from("=Q", self._read())[0])

    @property
    def moved(self) -> int:
        """Elements that a counting :class:`Mover` has moved."""
        return int(struct.unpack_from("=Q", self._read(), 8)[0])

    @property
    def lost(self) -> dict[str, int]:
        """Elements whose field did not fit, by the field's path."""
        data = self._read()
        counts = {path: self._count(data, index) for index, path in enumerate(self._paths)}
        return {path: count for path, count in counts.items() if count}

    def advance(self, step: int) -> None:
        """Note that the moves before ``step`` are done."""
        data = bytearray(self._read())
        struct.pack_into("=Q", data, 0, step)
        self.map.update(_KEY, bytes(data))

    def counter(self, path: str) -> int:
        """Where what did not fit at ``path`` is counted, as an offset."""
        return self._HEAD + 8 * self._paths.index(path)

    def _count(self, data: bytes, index: int) -> int:
        return int(struct.unpack_from("=Q", data, self._HEAD + 8 * index)[0])

    def _read(self) -> bytes:
        data = self.map.lookup(_KEY)
        assert data is not None  # an array has all its elements
        return data


class Mover:
    """A loaded program that moves elements from one map to another, some at a time."""

    def __init__(
        self,
        name: str,
        source: Map,
        target: Map,
        journal: Journal,
        conversion: Conversion | None = None,
        live: bool = False,
        counts: bool = False,
    ) -> None:
        """``conversion`` is None where the bytes stay as they are. ``counts``: in the journal.

        ``live``: programs use the source meanwhile, and nobody but us the target. Without it the source is ours, and
        nothing leaves it before it is in the target. Raises KernelError, UnsupportedError.
        """
        self._name = name
        code = _move_code(source, target, journal, conversion, live, counts)
        self._program = load_code(_PROG_TYPE_XDP, f"move_{name}", code, f"the program that moves map {name}")

    def run(self) -> None:
        """Move until the source is empty, or a private target full.

        Raises KernelError (E2BIG: the target is full; what did not fit is where it was).
        """
        while (result := run_code(self._program, f"moving elements of map {self._name}")) == _MORE:
            pass
        check(result, "moving an element", f"map {self._name}")


def create_beside(kind: str, name: str, value_size: int, room: int) -> Map:
    """A new queue or stack, as ``kind`` says, for ``room`` elements of ``value_size`` bytes."""
    return create(_MAP_TYPES[kind], name, 0, value_size, room)


def count_elements(held: Map) -> int:
    """How many elements are in a queue or stack; programs may push and pop meanwhile."""
    asm = Assembler()
    head, tail, size = (_field(name) for name in ("head", "tail", "size"))
    asm.map(R1, held.fd)
    asm.emit(LOAD[4], R0, R1, head)
    asm.emit(LOAD[4], R2, R1, tail)
    asm.emit(LOAD[4], R3, R1, size)
    asm.emit(JLE, R2, R0, "ahead")
    asm.emit(ADD, R0, R3)
    asm.label("ahead")
    asm.emit(SUB, R0, R2)
    asm.emit(EXIT)
    what = f"the program that counts the elements of map {held.info.name}"
    with load_code(_PROG_TYPE_XDP, "count", asm.code(), what) as program:
        return run_code(program, f"counting the elements of map {held.info.name}")


def _field(name: str) -> int:
    """Where the kernel keeps ``name`` of a queue or stack, in bytes; programs may read that through the map."""
    members = [f"bpf_queue_stack.{field}" for field in ("head", "tail", "size")]
    return offsets("a queue", "its elements cannot be counted", *members)[f"bpf_queue_stack.{name}"]


def _move_code(
    source: Map, target: Map, journal: Journal, conversion: Conversion | None, live: bool, counts: bool
) -> bytes:
    # R6 the journal, R7 whether a field did not fit, R8 elements moved.
    once = _element_code(source, target, journal, conversion, live, counts, 1)
    limit = max(1, min(_ELEMENTS_A_RUN, _STEPS_A_RUN // (len(once) // 8)))
    return _element_code(source, target, journal, conversion, live, counts, limit)


def _element_code(
    source: Map, target: Map, journal: Journal, conversion: Conversion | None, live: bool, counts: bool, limit: int
) -> bytes:
    asm = Assembler()
    asm.value(R6, journal.map.fd)
    asm.emit(MOV_IMM, R8, imm=0)
    asm.label("next")
    if live:
        _leave_if_full(asm, target)
    _call(asm, POP if live else PEEK, source, journal.element)
    asm.emit(JNE_IMM, R0, off="no element", imm=0)
    at = journal.element
    if conversion is not None:
        at = journal.converted
        _convert(asm, conversion, journal)
    asm.emit(MOV_IMM, R3, imm=0)  # BPF_ANY: a push that finds the map full fails
    _call(asm, PUSH, target, at)
    asm.emit(JNE_IMM, R0, off="exit", imm=0)
    if not live:
        _call(asm, POP, source, journal.element)
        asm.emit(JNE_IMM, R0, off="exit", imm=0)
    if counts:
        _count(asm, 8)
    asm.emit(ADD_IMM, R8, imm=1)
    asm.emit(_JLT_IMM, R8, off="next", imm=limit)
    asm.emit(MOV_IMM, R0, imm=_MORE)
    asm.emit(JA, off="exit")
    asm.label("no element")
    asm.emit(JNE_IMM, R0, off="exit", imm=-errno.ENOENT)
    asm.emit(MOV_IMM, R0, imm=_EMPTY)
    asm.label("exit")
    asm.emit(EXIT)
    return asm.code()


def _call(asm: Assembler, helper: int, held: Map, at: int) -> None:
    asm.map(R1, held.fd)
    asm.pointer(R2, R6, at)
    asm.call(helper)


def _leave_if_full(asm: Assembler, target: Map) -> None:
    """What was popped from a live map cannot be put back at its place: there must be room for it first."""
    room, around = asm.fresh("room"), asm.fresh("around")
    asm.map(R1, target.fd)
    asm.emit(LOAD[4], R0, R1, _field("head"))
    asm.emit(LOAD[4], R2, R1, _field("size"))
    asm.emit(LOAD[4], R3, R1, _field("tail"))
    asm.emit(ADD_IMM, R0, imm=1)
    asm.emit(_JLT, R0, R2, around)
    asm.emit(MOV_IMM, R0, imm=0)
    asm.label(around)
    asm.emit(JNE, R0, R3, room)
    asm.emit(MOV_IMM, R0, imm=_FULL)
    asm.emit(JA, off="exit")
    asm.label(room)


def _count(asm: Assembler, at: int) -> None:
    asm.emit(LOAD[8], R1, R6, at)
    asm.emit(ADD_IMM, R1, imm=1)
    asm.emit(STORE[8], R6, R1, at)


def _lossy(conversion: Conversion | None) -> list[Move]:
    return [move for move in conversion.moves if move.bounds is not None] if conversion is not None else []


def _convert(asm: Assembler, conversion: Conversion, journal: Journal) -> None:
    """The element into the new layout; a number that does not fit becomes the nearest that does, and is counted."""
    blank = conversion.apply(np.zeros((1, conversion.old_size), np.uint8)).records.tobytes()  # the defaults
    for offset in range(0, len(blank), 4):
        part = blank[offset : offset + 4]
        width = 4 if len(part) == 4 else 1
        for at in range(0, len(part), width):
            number = int.from_bytes(part[at : at + width], sys.byteorder, signed=True)
            asm.emit(STORE_IMM[width], R6, 0, journal.converted + offset + at, number)
    for move in conversion.moves:
        asm.emit(MOV_IMM, R7, imm=0)
        for old, new in _places(move):
            _carry(asm, move, journal.element + old, journal.converted + new)
        if move.bounds is not None:
            fits = asm.fresh("fits")
            asm.emit(JEQ_IMM, R7, off=fits, imm=0)
            _count(asm, journal.counter(move.path))
            asm.label(fits)


def _carry(asm: Assembler, move: Move, old: int, new: int) -> None:
    if move.copies:
        copy_code(asm, move.old_size, R6, old, R6, new)
        return
    asm.load(move.old_size, move.old_signed, R1, R6, old)
    if move.bounds is not None:
        low, high = move.bounds
        _bound(asm, high, JSLE if move.old_signed else JLE)
        if move.old_signed:
            _bound(asm, low, JSGE)
    asm.emit(STORE[move.new_size], R6, R1, new)


def _bound(asm: Assembler, limit: int, holds: int) -> None:
    fits = asm.fresh("within")
    low, high = struct.unpack("=ii", struct.pack("=Q", limit & (1 << 64) - 1))
    asm.emit(0x18, R2, 0, 0, low)  # LD_IMM64
    asm.emit(0, imm=high)
    asm.emit(holds, R1, R2, fits)
    asm.emit(MOV, R1, R2)
    asm.emit(MOV_IMM, R7, imm=1)
    asm.label(fits)


def _places(move: Move) -> Iterator[tuple[int, int]]:
    """The old and the new offset, as often as it is repeated."""
    steps = [[(index * r.old_stride, index * r.new_stride) for index in range(r.count)] for r in move.repeat]
    for chosen in itertools.product(*steps):
        yield move.old_offset + sum(old for old, _ in chosen), move.new_offset + sum(new for _, new in chosen)
