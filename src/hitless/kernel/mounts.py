"""Which filesystem a path is on."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["filesystem"]


def filesystem(path: Path) -> str:
    """Type of the mounted filesystem that holds the existing ``path`` (``bpf``, ``cgroup2``...), by device number."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()  # proc(5): the optional fields end at "-", the type follows
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "an unknown filesystem"
