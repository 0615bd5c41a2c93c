"""How long tests wait and how often they try, on a machine that is emulated: by a factor that its host gives."""

from __future__ import annotations

import os

__all__ = ["SLOWNESS", "often", "patient"]

SLOWNESS = float(os.environ.get("HITLESS_SLOWNESS", "1"))
"""How many times slower than a usual machine this one may be."""


def patient(seconds: float) -> float:
    """A limit of so many seconds on a usual machine, in seconds on this one."""
    return seconds * SLOWNESS


def often(times: int) -> int:
    """So many times on a usual machine, and as many as take about as long on this one.

    An even number: what takes turns is back where it began.
    """
    return 2 * max(1, round(times / SLOWNESS / 2))
