"""Which of several daemons of one pin root writes its maps: the one that takes over right now, else the youngest.

Each of them says what it is about by locks on bytes of the root's directory, which the kernel frees when it dies:

    byte 0      it takes over: it writes from here on, and the others wait to see whether that succeeds
    byte 1      it writes right now
    byte 2 + n  it took over as the n-th: who sees a higher one than its own is superseded

They are shared locks, since a directory cannot be locked otherwise, so that each only tells; who is about to do
something tells it first and then looks at what the others told. All of them see each other only because that order is
the same everywhere. The lock of hitless on the same directory, a flock, knows nothing of these and keeps two from
taking over at once.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hitless.errors import BusyError

__all__ = ["Turn"]

_TAKES_OVER, _WRITES, _FIRST = 0, 1, 2
_PAUSE = 0.001  # s between looks whether the other one has finished its write

# Linux: fcntl locks of an open file instead of a process. Python 3.11 has no names for them.
_OFD_GETLK, _OFD_SETLK = 36, 37
_FLOCK = "hhqqi4x"  # type, whence, start, length, pid


class Turn:
    """This daemon's turn at the maps under ``root``; between :meth:`seize` and the end of its process."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._fd = -1
        self._place = -1

    def seize(self, seconds: float) -> None:
        """Begin to take over, once nobody else writes; from then on nobody else does. Call it under the root's lock.

        Raises BusyError if another daemon has not finished a write within ``seconds``.
        """
        self._fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        self._tell(_TAKES_OVER)
        deadline = time.monotonic() + seconds
        while self._is_told(_WRITES):
            if time.monotonic() > deadline:
                self.give_up()
                raise BusyError(
                    f"another meshd has been writing to the maps of {self._root} for {seconds:g} s without an end, "
                    "perhaps because it was stopped; let it go on or end it, then start again",
                    path=str(self._root),
                    pid=None,
                )
            time.sleep(_PAUSE)

    def settle(self) -> None:
        """Say that taking over has succeeded: whoever wrote until now is superseded."""
        place = _FIRST
        while (told := self._told(place, 0)) is not None:
            place = told + 1
        self._tell(place)
        self._place = place  # not before: another thread looks whether a higher one is told
        self._tell(_TAKES_OVER, fcntl.F_UNLCK)

    def give_up(self) -> None:
        """Leave the maps to who wrote them until now."""
        os.close(self._fd)
        self._fd = self._place = -1

    @contextmanager
    def writing(self) -> Iterator[Literal["mine", "wait", "lost"]]:
        """Around a write: ``mine`` if it may happen; ``wait`` while another one takes over; ``lost`` for good."""
        if self._is_lost():
            yield "lost"
            return
        self._tell(_WRITES)
        try:
            # In this order: one that takes over tells so first, and then waits for those that write.
            yield "wait" if self._is_told(_TAKES_OVER) else "lost" if self._is_lost() else "mine"
        finally:
            self._tell(_WRITES, fcntl.F_UNLCK)

    def _is_lost(self) -> bool:
        try:
            there = self._root.stat().st_ino
        except FileNotFoundError:
            return True
        if there != os.fstat(self._fd).st_ino:
            return True  # unloaded, and made again by another one
        return self._place >= 0 and self._told(self._place + 1, 0) is not None

    def _is_told(self, byte: int) -> bool:
        return self._told(byte, 1) is not None

    def _told(self, start: int, length: int) -> int | None:
        """The first of these bytes, with 0 for all from ``start`` on, that another daemon has locked."""
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        kind, _, first, _, _ = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, _OFD_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else max(first, start)

    def _tell(self, byte: int, kind: int = fcntl.F_RDLCK) -> None:
        fcntl.fcntl(self._fd, _OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
