"""How long tests wait: longer on a machine that is emulated, by a factor that whoever emulates it gives."""

from __future__ import annotations

import os

__all__ = ["SLOWNESS", "patient"]

SLOWNESS = float(os.environ.get("HITLESS_SLOWNESS", "1"))
"""How many times slower than a usual machine this one may be."""


def patient(seconds: float) -> float:
    """A limit of so many seconds on a usual machine, in seconds on this one."""
    return seconds * SLOWNESS
