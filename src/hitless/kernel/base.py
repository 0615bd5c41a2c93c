"""The base of a merge: what each entry of the old map was when it was last converted, as rows of BPF arrays.

It is made of maps so that it outlives the process that fills it, of flat ones so that it takes less memory than the map
it is of, and mapped into this process so that it is read without system calls. A row is written whole by one run of a
program, or by one system call, so that no kill leaves half of one.

    row: state (8 bytes, 0 free, 1 live) | key, padded to 8 | value, padded to 8
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hitless.kernel.maps import Entries, Rows
from hitless.kernel.segments import Segments, padded

__all__ = ["Base", "Indices", "marks", "padded"]

Indices = npt.NDArray[np.intp]

_MARK_CHUNK = 1 << 16
_LIVE = (1).to_bytes(8, sys.byteorder)

# Keys may come from the network: nobody outside can make many of them share a mark.
_SEED = np.uint64(secrets.randbits(64))


class Base:
    """Rows of keys and values of a map with ``key_size`` and ``entry_size``; ``used`` rows are or were in use.

    While the first pass over the map fills it (``settled`` is false), rows set one by one go behind those of the pass
    and are not looked for among them; :meth:`settle` puts that right.
    """

    def __init__(self, segments: Segments, key_size: int, entry_size: int) -> None:
        self.segments = segments
        self.value_at = 8 + padded(key_size)
        self._sizes = key_size, entry_size
        self.used = 0
        self.settled = True
        self._passed = 0  # rows that the pass wrote
        self._single: dict[bytes, int] = {}  # rows set one by one
        self._erased: dict[bytes, int] = {}  # keys erased during the pass, with the rows it had written then
        self._index: tuple[npt.NDArray[np.uint64], Indices] | None = None
        self._look()

    @classmethod
    def create(cls, model: Entries, name: str, rows: int) -> Base:
        """A new base with room for at least ``rows`` rows of the keys and values of ``model``.

        Raises KernelError (ENOMEM).
        """
        info = model.info
        size = 8 + padded(info.key_size) + padded(info.entry_size)
        made = cls(Segments.create(name, size, rows, max(rows, info.max_entries)), info.key_size, info.entry_size)
        made.settled = False
        return made

    @classmethod
    def open(cls, path: Path, model: Entries) -> Base:
        """The base of ``model`` that is pinned at ``path``, as a process left it. Raises NodeError, KernelError."""
        made = cls(Segments.open(path), model.info.key_size, model.info.entry_size)
        live = np.flatnonzero(made.live)
        made.passed(int(live[-1]) + 1 if len(live) else 0)
        made.free_doubles()
        return made

    def grow(self, rows: int) -> None:
        """Make room for at least ``rows`` more; no row moves, and programs see them. Raises KernelError (ENOMEM)."""
        self.segments.grow(rows)
        self._look()

    @property
    def room(self) -> int:
        """Rows that can be written still."""
        return self.capacity - self.used

    def passed(self, used: int) -> None:
        """The pass has written rows up to ``used``."""
        self.used = self._passed = used

    def append(self, keys: Rows, values: Rows) -> None:
        """Rows of the pass, made in user space; there must be room. A kill in the midst of it undoes the upgrade."""
        rows = slice(self.used, self.used + len(keys))
        self.keys[rows], self.values[rows], self.live[rows] = keys, values, 1
        self.passed(rows.stop)

    def take(self, key: bytes) -> int:
        """The row that ``key`` is to have, behind all others; whoever asks writes it. There must be room."""
        row = self.used
        self.used += 1
        self._single[key] = row
        return row

    def settle(self) -> None:
        """The pass is over: what was set or erased one by one meanwhile goes to the rows that the pass wrote."""
        self.settled = True
        for key, before in self._erased.items():
            for row in self._rows_of(key):
                if row < before:
                    self.live[row] = 0
        for key, single in list(self._single.items()):
            for row in self._rows_of(key):
                if row < single:
                    self._write(row, key, self.values[single].tobytes())
                    self.free(single, key)
        self._erased = {}

    def find(self, key: bytes) -> int | None:
        """The live row of ``key``, or None."""
        row = self._single.get(key)
        if row is not None and self.live[row]:
            return row
        return next(iter(self._rows_of(key)), None) if self.settled else None

    def get(self, key: bytes) -> bytes | None:
        """The value in the row of ``key``, or None."""
        row = self.find(key)
        return None if row is None else self.values[row].tobytes()

    def put(self, key: bytes, value: bytes) -> None:
        """Set the row of ``key``, a new one if it has none; there must be room."""
        row = self.find(key)
        self._write(self.take(key) if row is None else row, key, value)

    def erase(self, key: bytes) -> None:
        """Free the row of ``key``, if it has one."""
        row = self.find(key)
        if row is not None:
            self.free(row, key)
        if not self.settled:
            self._erased[key] = self._passed

    def free(self, row: int, key: bytes) -> None:
        """Free a row whose key is known."""
        self.live[row] = 0
        if self._single.get(key) == row:
            del self._single[key]

    def set_singly(self, keys: Rows) -> npt.NDArray[np.bool_]:
        """Which of these keys were set one by one."""
        if not self._single:
            return np.zeros(len(keys), np.bool_)
        return np.array([key.tobytes() in self._single for key in keys], np.bool_)

    def close(self) -> None:
        """Give the map back; its memory goes with the last use of the arrays."""
        self.segments.map.close()

    def _look(self) -> None:
        rows = self.segments.rows()
        key_size, entry_size = self._sizes
        self.capacity = len(rows)
        self.live = rows.view(np.uint64)[:, 0]
        self.keys: Rows = rows[:, 8 : 8 + key_size]
        self.values: Rows = rows[:, self.value_at : self.value_at + entry_size]

    def _write(self, row: int, key: bytes, value: bytes) -> None:
        self.segments.write(row, _LIVE + key.ljust(self.value_at - 8, b"\0") + value)

    def _rows_of(self, key: bytes) -> list[int]:
        """Live rows of ``key`` among those that were there when the pass ended."""
        if self._index is None:
            all_marks = np.empty(self._passed, np.uint64)
            for start in range(0, self._passed, _MARK_CHUNK):
                part = slice(start, min(start + _MARK_CHUNK, self._passed))
                all_marks[part] = marks(self.keys[part])
            order = np.argsort(all_marks)
            self._index = all_marks[order], order
        ordered, order = self._index
        wanted = np.frombuffer(key, np.uint8)
        mark = marks(wanted.reshape(1, -1))[0]
        first, end = np.searchsorted(ordered, mark), np.searchsorted(ordered, mark, "right")
        rows = (int(row) for row in order[first:end])
        return [row for row in rows if self.live[row] and bool((self.keys[row] == wanted).all())]

    def free_doubles(self) -> None:
        """Of two rows of one key the later one counts: a pass can repeat a key, and a kill can leave a row behind."""
        rows = np.flatnonzero(self.live[: self.used])
        found = marks(self.keys[rows])
        order = np.argsort(found, kind="stable")
        alike = np.flatnonzero(found[order][1:] == found[order][:-1])
        for first, second in zip(rows[order[alike]], rows[order[alike + 1]], strict=True):
            if bool((self.keys[first] == self.keys[second]).all()):
                self.live[first] = 0


def marks(rows: Rows) -> npt.NDArray[np.uint64]:
    """A number for each record that is the same for equal ones and seldom for others."""
    words = np.zeros((len(rows), padded(rows.shape[1])), np.uint8)
    words[:, : rows.shape[1]] = rows
    found = np.full(len(rows), _SEED, np.uint64)
    for word in words.view(np.uint64).T:
        found = (found ^ word) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(29)
    return found
