"""Which filesystem a path is on, and whether that is read-only."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["filesystem", "is_read_only"]


def filesystem(path: Path) -> str:
    """Type of the mounted filesystem that holds the existing ``path`` (``bpf``, ``cgroup2``...), by device number."""
    kind, _ = _of(path)
    return kind


def is_read_only(path: Path) -> bool:
    """Whether the filesystem that holds the existing ``path`` is read-only, wherever else it may be mounted."""
    _, options = _of(path)
    return "ro" in options.split(",")


def _of(path: Path) -> tuple[str, str]:
    """Type and options of the filesystem; the options of a mount of it are others."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()  # proc(5): the optional fields end at "-"; type, source and options follow
        if fields[2] == wanted:
            dash = fields.index("-")
            return fields[dash + 1], fields[dash + 3]
    return "an unknown filesystem", ""
