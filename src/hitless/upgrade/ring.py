"""The carrier of ring buffers, which carries nothing: records are for a reader, who alone may take them out.

The new release writes a ring of its own. The old one stays: until the commit where it was, then in ``previous/`` until
the upgrade after this one. Its readers hold it open and drain it; after the commit they are given a while for that.
What they leave is told by the result, by ``status``, and by the plan of the upgrade that would remove it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from hitless.kernel.maps import Map
from hitless.kernel.rings import holders, unread_bytes
from hitless.upgrade.carrier import Carrier, Passage, Tally

__all__ = ["carry_ring", "drain"]

_DRAIN_SECONDS = 2.0


class _Ring:
    """A ring buffer that stays where it is: see :class:`Carrier`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tally = Tally()

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`; leaves everything to the readers."""

    def verify(self) -> None:
        """See :class:`Carrier`; nothing was copied."""

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`; what the old release wrote last is in the old ring."""
        return 0

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`; what the new release wrote until then goes with its ring, which nobody could read."""
        return self


def carry_ring(passage: Passage) -> Carrier:
    """The carrier of a ring buffer."""
    return _Ring(passage.name)


def drain(path: Path) -> int:
    """Wait for those who hold the ring pinned at ``path`` to read it, two seconds at most; returns the bytes left.

    Does not wait for this process, nor if nobody else has it open.
    """
    until = time.monotonic() + _DRAIN_SECONDS
    with Map.open(path) as old:
        while left := unread_bytes(old):
            if time.monotonic() > until or not set(holders(old.info.id)) - {os.getpid()}:
                return left
            time.sleep(0.01)
    return 0
