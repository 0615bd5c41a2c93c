"""How fast an upgrade may work through entries, so that a node shared with others stays theirs too."""

from __future__ import annotations

import time

__all__ = ["Pace"]


class Pace:
    """At most ``rate`` entries a second, and at most ``share`` of one CPU; None and 1 are no limits.

    It holds until the hooks switch: from then on there is a window to close.
    """

    def __init__(self, rate: float | None = None, share: float = 1.0) -> None:
        """Raises ValueError for a rate that is not positive or a share that is not in (0, 1]."""
        if rate is not None and rate <= 0:
            raise ValueError(f"a rate of {rate:g} entries a second would never end: give a positive number")
        if not 0 < share <= 1:
            raise ValueError(f"a share of {share:g} of a CPU is impossible: give one above 0 and up to 1")
        self._rate = rate
        self._share = share
        self._began = time.monotonic()

    def __call__(self, entries: int) -> None:
        """So many entries were worked through since the last call; sleeps if that was too fast."""
        now = time.monotonic()
        worked = now - self._began
        least = max(worked / self._share, entries / self._rate if self._rate else 0.0)
        if least > worked:
            time.sleep(least - worked)
        self._began = time.monotonic()
