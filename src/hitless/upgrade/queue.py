"""The carrier of queues and stacks. They can only be popped, so nothing is copied: it moves, after the cutover.

Old programs may push and pop until the barrier, then all elements move in a few runs of small programs. What the new
release pushed until then is held aside, so that it comes behind the old elements. These go over a further map: it is
ours alone, so that an element which leaves the old one, where user space may pop still, surely has a place; and a
stack, which turns the order round with each move, must be turned twice. Which move is on is in a pinned journal, and
each can be repeated. An upgrade that is taken back finds elements in up to four maps; where the moves had come to says
in which order they belong.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from hitless.errors import KernelError, LossNotAllowedError
from hitless.kernel.bpffs import make_directory
from hitless.kernel.maps import Map
from hitless.kernel.queues import Journal, Mover, count_elements, create_beside
from hitless.layout.conversion import Conversion
from hitless.upgrade.carrier import Carrier, Passage, Tally

__all__ = ["carry_queue"]


class _Moves(NamedTuple):
    """One move: elements of ``source`` to ``target``, converted or as they are; see :class:`Mover` for ``live``."""

    source: Map
    target: Map
    conversion: Conversion | None = None
    live: bool = False
    counts: bool = False


class _Moving:
    """Moves made one after the other, also by several processes of which one finishes what another began."""

    def __init__(self, name: str, moves: Sequence[_Moves], journal: Journal) -> None:
        self._journal = journal
        self._movers = [
            Mover(name, move.source, move.target, journal, move.conversion, move.live, move.counts) for move in moves
        ]

    def run(self, leave_out: bool) -> None:
        """``leave_out``: what a full target has no room for stays where it is. Raises KernelError (E2BIG)."""
        for step in range(self._journal.step, len(self._movers)):
            try:
                self._movers[step].run()
            except KernelError as error:
                if not (leave_out and error.facts["errno"] == errno.E2BIG):
                    raise
            self._journal.advance(step + 1)


class _Way:
    """The way there: see :class:`Carrier`."""

    def __init__(self, passage: Passage) -> None:
        self.name = passage.name
        self.tally = Tally()
        self._source, self._target = passage.source, passage.target
        self._writing = passage.writing
        self._there = passage.diff.value
        self._back = self._there.inverse() if self._there else None
        self._stack = passage.new.type == "stack"
        room = passage.source.info.max_entries + passage.target.info.max_entries
        size = passage.target.info.value_size
        self._size = max(passage.source.info.value_size, size)
        if passage.fresh:
            make_directory(passage.pin)
        for aside in ("held", "over") if passage.fresh else ():
            create_beside(passage.new.type, f"{aside}_{self.name}", size, room).pin(passage.pin / aside)
        self._held, self._over = Map.open(passage.pin / "held"), Map.open(passage.pin / "over")
        self._journal = Journal.at(passage.pin / "journal", self.name, self._there, self._size, passage.fresh)
        # Loaded before a hook changes: if the kernel refuses one, it does so in time.
        self._moving = _Moving(self.name, self._moves(), self._journal)

    def _moves(self) -> list[_Moves]:
        return [
            _Moves(self._target, self._held, live=True),
            _Moves(self._source, self._over, self._there, live=True, counts=True),
            _Moves(self._over, self._target),
            _Moves(self._held, self._target),
        ]

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`; only looks whether all will fit, since the old release has its elements until then."""
        self.tally.entries = count_elements(self._source)
        room = self._target.info.max_entries
        if self.tally.entries > room:
            raise LossNotAllowedError(
                f"map {self.name} holds {self.tally.entries} elements and would have room for {room}; nothing was "
                "changed; let its consumers take some first, or make it larger",
                maps=[self.name],
                elements=self.tally.entries,
                room=room,
            )
        progress(0)

    def verify(self) -> None:
        """See :class:`Carrier`; nothing was copied."""

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`; moves all when no old program runs any more, and nothing before."""
        if not last:
            return 0
        with self._writing:
            self._moving.run(leave_out=False)
        self.tally.rounds += 1
        self.tally.caught_up = self._journal.moved
        self.tally.lost = self._journal.lost
        return self.tally.caught_up

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`."""
        if fresh:
            make_directory(pin)
            room = 2 * self._source.info.max_entries
            create_beside(
                "stack" if self._stack else "queue", f"aside_{self.name}", self._source.info.value_size, room
            ).pin(pin / "aside")
        journal = Journal.at(pin / "journal", self.name, self._back, self._size, fresh)
        moves = self._moves_back(Map.open(pin / "aside"))
        return _WayBack(self.name, _Moving(self.name, moves, journal), self._writing)

    def _moves_back(self, aside: Map) -> list[_Moves]:
        """What brings all back in order, oldest first, from where the moves there had come to."""
        over = _Moves(self._over, self._source, self._back)
        held = _Moves(self._held, self._source, self._back)
        step = self._journal.step
        if self._stack:
            # A move turns the order round, so what has been moved an odd number of times goes over `held` or `over`.
            if step == 1:
                return [over, held, _Moves(self._target, self._held), held]
            if step == 2:
                return [_Moves(self._target, self._over), over, held]
            return [_Moves(self._target, self._held), held]
        new = _Moves(self._target, self._source, self._back)
        if step == 0:  # what the old map holds is older than what the new release pushed
            return [held, new]
        behind = _Moves(self._source, aside, live=True)
        again = _Moves(aside, self._source)
        return [behind, over, again, held, new] if step == 1 else [behind, new, over, held, again]


class _WayBack:
    """What brings all back once the old programs run again: see :class:`Carrier`."""

    def __init__(self, name: str, moving: _Moving, writing: threading.RLock) -> None:
        self.name = name
        self.tally = Tally()
        self._moving = moving
        self._writing = writing

    def copy(self, progress: Callable[[int], None]) -> None:
        """Never called."""

    def verify(self) -> None:
        """Never called."""

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`; what the old map has no room for is left out, as without an upgrade."""
        with self._writing:
            self._moving.run(leave_out=True)
        return 0

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """Never called."""
        raise NotImplementedError


def carry_queue(passage: Passage) -> Carrier:
    """The carrier of a queue or stack, its programs loaded. Raises KernelError, UnsupportedError."""
    return _Way(passage)
