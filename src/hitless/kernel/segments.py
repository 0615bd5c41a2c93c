"""Rows of bytes in BPF arrays of one size, the segments, which are mapped into this process one behind the other.

The kernel makes, maps and unmaps a map in one go, and some kernels let nothing else run on that CPU meanwhile: a large
map in segments makes nobody wait for long. It grows by more of them, and no row moves. One array of maps holds them, by
which programs find a row in two steps, and another process finds them all.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hitless.errors import KernelError
from hitless.kernel.codegen import AND_IMM, FP, JEQ_IMM, LOOKUP, MOV, R0, R1, R2, RSH_IMM, STORE, Assembler
from hitless.kernel.libbpf import ENOTSUPP, check, ffi, libc, options
from hitless.kernel.maps import Map, Rows, create

__all__ = ["Segments", "padded"]

_ARRAY, _ARRAY_OF_MAPS = 2, 12
_MMAPABLE = 1 << 10  # BPF_F_MMAPABLE
_FIXED, _NORESERVE = 1 << 4, 1 << 14  # MAP_FIXED, MAP_NORESERVE
_SIZE = 2 << 20  # bytes of a segment at most, unless it is one row: a quarter of a millisecond to make it
_FEW_ROWS = 512  # whole pages, whatever their size
_PARTS = 32  # of a map that is not small: so little of it is unused at its end
_ROOM = 16  # times the rows that are expected at most
_AT_ONCE = 128  # segments whose descriptors are open together


def padded(size: int, to: int = 8) -> int:
    """``size`` bytes, rounded up to a multiple of ``to``."""
    return (size + to - 1) // to * to


class Segments:
    """Rows of ``row_size`` bytes. Row r is in segment r // ``each``, which is a power of two, at index r % ``each``."""

    def __init__(self, outer: Map, like: Map) -> None:
        """No rows yet, but address room for as many segments like ``like`` as ``outer`` has slots for."""
        self.map = outer
        self.each = like.info.max_entries
        self.row_size = like.info.value_size
        self._memory = _Memory(outer.info.max_entries, self.each * self.row_size)
        self._ids: list[int] = []

    @classmethod
    def create(cls, name: str, size: int, rows: int, most: int) -> Segments:
        """New ones with zeros, for ``rows`` rows of ``size`` bytes or some more; up to ``most`` are expected.

        A row gets more bytes than asked for if few rows would not fill whole pages. Raises KernelError (ENOMEM).
        """
        wanted, fitting = max(min(rows, _FEW_ROWS), most // _PARTS), max(1, _SIZE // size)
        each = min(1 << (wanted - 1).bit_length(), 1 << (fitting.bit_length() - 1))
        with _segment(name, padded(size, max(8, mmap.PAGESIZE // each)), each) as like:
            opts = options("bpf_map_create_opts", inner_map_fd=like.fd)
            made = cls(create(_ARRAY_OF_MAPS, name, 4, 4, _ROOM * (most // each + 1), opts), like)
        made.grow(rows)
        return made

    @classmethod
    def open(cls, path: Path) -> Segments:
        """Those that are pinned at ``path``. Raises NodeError, KernelError."""
        outer = Map.open(path)
        segments = _inside(outer)
        first = next(segments)
        made = cls(outer, first)
        made._add(itertools.chain([first], segments))
        return made

    def grow(self, rows: int) -> None:
        """Add ``rows`` rows or some more behind those that are there, for programs too.

        Raises KernelError (ENOMEM; ENOSPC when there are many times the rows that were expected).
        """
        first, slots, name = len(self._ids), self.map.info.max_entries, self.map.info.name
        end = first + padded(max(rows, first * self.each // 8), self.each) // self.each  # not often only a few
        if end > slots:
            raise KernelError(
                f"{name} has room for {slots * self.each} rows at most (ENOSPC), many times those that were expected: "
                "entries come and go faster than they are copied; try again when less happens",
                call="growing the base", errno=errno.ENOSPC, errno_name="ENOSPC", object=name,
            )  # fmt: skip
        for start in range(first, end, _AT_ONCE):
            made = [_segment(name, self.row_size, self.each) for _ in range(start, min(start + _AT_ONCE, end))]
            _put(self.map, start, made)
            self._add(made)

    def rows(self) -> Rows:
        """All rows that there are by now, in place. They may be used even after these segments were given back."""
        found: Rows = np.asarray(self._memory).reshape(-1, self.row_size)
        return found

    def segment(self, row: int) -> Map:
        """The array that has ``row``. Raises KernelError."""
        return Map.by_id(self._ids[row // self.each])

    def write(self, row: int, content: bytes) -> None:
        """Set a row by a system call, since a kill can come between two stores of this process; zeros fill it up."""
        with self.segment(row) as segment:
            segment.update((row % self.each).to_bytes(4, sys.byteorder), content.ljust(self.row_size, b"\0"))

    def lookup_code(self, asm: Assembler, row: int) -> None:
        """Look up the row with the number in a register: R0 is it or nothing. By R1, R2 and 8 bytes of the stack."""
        none = asm.fresh("none")
        asm.emit(MOV, R1, row)
        asm.emit(AND_IMM, R1, imm=self.each - 1)
        asm.emit(STORE[4], FP, R1, -8)
        asm.emit(MOV, R1, row)
        asm.emit(RSH_IMM, R1, imm=self.each.bit_length() - 1)
        asm.emit(STORE[4], FP, R1, -4)
        asm.map(R1, self.map.fd)
        asm.pointer(R2, FP, -4)
        asm.call(LOOKUP)
        asm.emit(JEQ_IMM, R0, off=none, imm=0)
        asm.emit(MOV, R1, R0)
        asm.pointer(R2, FP, -8)
        asm.call(LOOKUP)
        asm.label(none)

    def _add(self, segments: Iterable[Map]) -> None:
        for segment in segments:
            with segment:
                self._memory.add(segment)
                self._ids.append(segment.info.id)


class _Memory:
    """Room for ``most`` segments of ``size`` bytes among this process' addresses; to numpy, an array of those mapped.

    They are unmapped, one by one, when nothing refers to it any more, no array either.
    """

    def __init__(self, most: int, size: int) -> None:
        self._size = size
        self._room = most * size
        self._mapped = self._at = 0
        self._at = self._map(0, self._room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1)

    def add(self, segment: Map) -> None:
        """Map one more. Raises KernelError."""
        room, self._room = self._room, self._mapped  # if this fails, the room behind is nobody's, or soon somebody's
        if self._mapped == room:
            check(-errno.ENOMEM, "mmap", "the memory of a base, which could not be mapped before")
        access = mmap.PROT_READ | mmap.PROT_WRITE
        self._map(self._at + self._mapped, self._size, access, mmap.MAP_SHARED | _FIXED, segment.fd)
        self._mapped += self._size
        self._room = room

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "data": (self._at, False), "shape": (self._mapped,)}

    def __del__(self) -> None:
        if self._at:
            for start in range(0, self._mapped, self._size):
                libc().munmap(ffi.cast("void *", self._at + start), self._size)
            libc().munmap(ffi.cast("void *", self._at + self._mapped), self._room - self._mapped)

    @staticmethod
    def _map(at: int, size: int, access: int, flags: int, fd: int) -> int:
        made = libc().mmap(ffi.cast("void *", at), size, access, flags, fd, 0)
        return check(int(ffi.cast("intptr_t", made)), "mmap", f"{size} bytes of a base")


def _segment(name: str, row_size: int, rows: int) -> Map:
    return create(_ARRAY, name, 4, row_size, rows, options("bpf_map_create_opts", map_flags=_MMAPABLE))


def _inside(outer: Map) -> Iterator[Map]:
    for number in range(outer.info.max_entries):
        inner = outer.lookup(number.to_bytes(4, sys.byteorder))
        if inner is None:
            return
        yield Map.by_id(int.from_bytes(inner, sys.byteorder))


def _put(outer: Map, first: int, segments: list[Map]) -> None:
    """Put segments into the slots from ``first`` on.

    The kernel does it at once and then waits for running programs, some milliseconds, which is for those who replace a
    map. Nothing was in these slots, so another thread waits.
    """
    pool = ThreadPoolExecutor(1)
    put = pool.submit(_write, outer, first, [segment.fd for segment in segments])
    pool.shutdown(wait=False)
    last = (first + len(segments) - 1).to_bytes(4, sys.byteorder)
    while not put.done() and outer.lookup(last) != segments[-1].info.id.to_bytes(4, sys.byteorder):
        time.sleep(0)
    if put.done():
        put.result()


def _write(outer: Map, first: int, fds: list[int]) -> None:
    keys = np.arange(first, first + len(fds), dtype=np.uint32).view(np.uint8).reshape(-1, 4)
    values = np.array(fds, np.uint32).view(np.uint8).reshape(-1, 4)
    try:
        outer.write(keys, values)
    except KernelError as error:
        if error.facts["errno"] != ENOTSUPP:
            raise
        for key, value in zip(keys, values, strict=True):  # before Linux 5.19
            outer.update(key.tobytes(), value.tobytes())
