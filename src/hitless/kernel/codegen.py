"""BPF instructions, assembled here so that no compiler is needed on the node. Names are those of RFC 9669."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

from hitless.layout.conversion import Conversion, Move

R0, R1, R2, R3, R4, R5, R6, R7, R8, R9, FP = range(11)

LOAD = {1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}  # LDX | MEM | B, H, W, DW
STORE = {1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}  # STX | MEM
STORE_IMM = {1: 0x72, 2: 0x6A, 4: 0x62, 8: 0x7A}  # ST | MEM
ATOMIC = {4: 0xC3, 8: 0xDB}  # STX | ATOMIC | W, DW
ATOMIC_ADD, ATOMIC_OR, CMPXCHG = 0x00, 0x40, 0xF1
MOV, MOV_IMM, SUB, OR, ADD, ADD_IMM, AND_IMM = 0xBF, 0xB7, 0x1F, 0x4F, 0x0F, 0x07, 0x57  # ALU64
MOV32 = 0xBC
LSH_IMM, RSH_IMM, ARSH_IMM = 0x67, 0x77, 0xC7
JA, JEQ, JEQ_IMM, JNE, JNE_IMM, JGT_IMM = 0x05, 0x1D, 0x15, 0x5D, 0x55, 0x25
JGE, JLE, JSGE, JSLE, JSLT_IMM = 0x3D, 0xBD, 0x7D, 0xDD, 0xC5
CALL, EXIT = 0x85, 0x95
# Helper numbers: bpf_map_lookup_elem, bpf_map_update_elem and so on.
LOOKUP, UPDATE, DELETE, SPIN_LOCK, SPIN_UNLOCK, SEQ_WRITE, LOOKUP_PERCPU = 1, 2, 3, 93, 94, 127, 195
PUSH, POP, PEEK = 87, 88, 89

# Linux before 6.4 calls what a map does for these directly, and that answers a number of 32 bits.
_ANSWERING_INT = frozenset({UPDATE, DELETE, PUSH, POP, PEEK})


class Assembler:
    """Instructions with labels; jumps are resolved in :meth:`code`."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int, int | str, int]] = []
        self._labels: dict[str, int] = {}
        self._names = 0

    def emit(self, opcode: int, dst: int = 0, src: int = 0, off: int | str = 0, imm: int = 0) -> None:
        """One instruction; ``off`` may be a label to jump to."""
        self._instructions.append((opcode, dst, src, off, imm))

    def label(self, name: str) -> None:
        """Jumps to ``name`` come here."""
        self._labels[name] = len(self._instructions)

    def fresh(self, stem: str) -> str:
        """A label name that is not used yet."""
        self._names += 1
        return f"{stem}{self._names}"

    def map(self, register: int, fd: int) -> None:
        """Put the map behind ``fd`` into ``register`` (64-bit immediate, BPF_PSEUDO_MAP_FD)."""
        self.emit(0x18, register, 1, 0, fd)
        self.emit(0)

    def value(self, register: int, fd: int, offset: int = 0) -> None:
        """Put the address of the only value of the array behind ``fd`` into ``register`` (BPF_PSEUDO_MAP_VALUE)."""
        self.emit(0x18, register, 2, 0, fd)
        self.emit(0, imm=offset)

    def call(self, helper: int) -> None:
        """Call a helper: arguments in R1 to R5, result in R0; R1 to R5 are gone after it.

        A number in R0 has 64 bits and its sign on every kernel.
        """
        self.emit(CALL, imm=helper)
        if helper in _ANSWERING_INT:
            self._extend(R0, 4)

    def pointer(self, register: int, base: int, offset: int) -> None:
        """``register = base + offset``."""
        self.emit(MOV, register, base)
        if offset:
            self.emit(ADD_IMM, register, imm=offset)

    def load(self, size: int, signed: bool, register: int, base: int, offset: int) -> None:
        """Load a number of ``size`` bytes, extended to 64 bits."""
        self.emit(LOAD[size], register, base, offset)
        if signed and size < 8:
            self._extend(register, size)

    def _extend(self, register: int, size: int) -> None:
        # Not by the instructions that extend signs, which Linux has since 6.6.
        self.emit(LSH_IMM, register, imm=64 - 8 * size)
        self.emit(ARSH_IMM, register, imm=64 - 8 * size)

    def code(self) -> bytes:
        """The instructions as the kernel takes them."""
        out = bytearray()
        for index, (opcode, dst, src, off, imm) in enumerate(self._instructions):
            jump = self._labels[off] - index - 1 if isinstance(off, str) else off
            out += struct.pack("=BBhi", opcode, dst | src << 4, jump, imm)
        return bytes(out)


def words(offset: int, size: int, other: int | None = None) -> list[tuple[int, int]]:
    """``size`` bytes from ``offset`` as aligned words: (bytes, offset) each.

    ``other`` is where they go to or are compared with: the words are aligned there too.
    """
    found = []
    shift = 0 if other is None else other - offset
    end = offset + size
    while offset < end:
        fits = (n for n in (8, 4, 2, 1) if offset % n == 0 and (offset + shift) % n == 0 and offset + n <= end)
        found.append((next(fits), offset))
        offset += found[-1][0]
    return found


def copy_code(asm: Assembler, size: int, source: int, at: int, target: int, to: int) -> None:
    """Copy ``size`` bytes from ``source + at`` to ``target + to``, by way of R1."""
    for width, offset in words(at, size, to):
        asm.emit(LOAD[width], R1, source, offset)
        asm.emit(STORE[width], target, R1, to + offset - at)


def convert_code(asm: Assembler, conversion: Conversion, source: int, at: int, target: int, to: int) -> None:
    """The moves of ``conversion`` from the record at ``source + at`` to that at ``target + to``, by way of R1.

    Only of one that says ``in_kernel``. What no move writes is left as it is: the target was filled beforehand with
    what the conversion makes of zeros, which is its defaults.
    """
    for move, old, new in _places(conversion):
        if move.copies:
            copy_code(asm, move.old_size, source, at + old, target, to + new)
        else:
            asm.load(move.old_size, move.old_signed, R1, source, at + old)
            asm.emit(STORE[move.new_size], target, R1, to + new)


def compare_code(
    asm: Assembler, conversion: Conversion | None, size: int, one: int, other: int, different: str
) -> None:
    """Jump to ``different`` unless two records of ``size`` bytes are equal where ``conversion`` writes; by R1, R2."""
    if conversion is None:
        parts = words(0, size)
    else:
        parts = [part for move, _, new in _places(conversion) for part in words(new, move.new_size)]
    for width, offset in parts:
        asm.emit(LOAD[width], R1, one, offset)
        asm.emit(LOAD[width], R2, other, offset)
        asm.emit(JNE, R1, R2, different)


def _places(conversion: Conversion) -> Iterator[tuple[Move, int, int]]:
    """Each move with its old and its new offset, as often as it is repeated."""
    for move in conversion.moves:
        for steps in itertools.product(*(range(repeat.count) for repeat in move.repeat)):
            old = sum(step * repeat.old_stride for step, repeat in zip(steps, move.repeat, strict=True))
            new = sum(step * repeat.new_stride for step, repeat in zip(steps, move.repeat, strict=True))
            yield move, move.old_offset + old, move.new_offset + new
