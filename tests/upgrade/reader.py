"""Another program that opens maps by their paths: ``python -m tests.upgrade.reader ROOT WAY``, until its stdin ends.

It opens all maps of the running release, over and over, and tells at its end which sets of maps it got.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

from tests.bpf import map_id, pin_below, pin_below_by_proc

__all__ = ["NAMES", "WAYS", "open_all"]

NAMES = ("first", "second", "third", "kept")

Get = Callable[[int, str], int]
WAYS: dict[str, Get] = {"path_fd": pin_below, "proc": pin_below_by_proc}


def open_all(directory: int, get: Get) -> tuple[int, ...]:
    """The ids of all maps below an open directory. Raises FileNotFoundError."""
    found = []
    for name in NAMES:
        fd = get(directory, name)
        found.append(map_id(fd))
        os.close(fd)
    return tuple(found)


def _by_one_handle(root: Path, get: Get) -> tuple[int, ...] | None:
    """Through one open directory; None if its generation was given back before all was open."""
    directory = os.open(root / "maps", os.O_RDONLY | os.O_DIRECTORY)
    try:
        return open_all(directory, get)
    except FileNotFoundError:
        if (root / "maps").stat().st_ino == os.fstat(directory).st_ino:
            raise  # it is the running generation, and a pin is missing
        return None
    finally:
        os.close(directory)


def _by_plain_paths(root: Path, get: Get) -> tuple[int, ...]:
    """One path after the other: an upgrade may come between two of them."""
    found = []
    for name in NAMES:
        directory = os.open(root / "maps", os.O_RDONLY | os.O_DIRECTORY)
        fd = get(directory, name)
        found.append(map_id(fd))
        os.close(fd)
        os.close(directory)
    return tuple(found)


def main() -> None:
    """Open until stdin ends, then print one JSON object."""
    root, get = Path(sys.argv[1]), WAYS[sys.argv[2]]
    sets: dict[tuple[int, ...], int] = {}
    plain: dict[tuple[int, ...], int] = {}
    outdated = 0
    missing: list[str] = []
    print("ready", flush=True)
    while not select.select([0], [], [], 0)[0]:
        try:
            found = _by_one_handle(root, get)
        except FileNotFoundError as error:
            missing.append(str(error))
            continue
        if found is None:
            outdated += 1
        else:
            sets[found] = sets.get(found, 0) + 1
        try:
            one = _by_plain_paths(root, get)
        except FileNotFoundError:
            continue  # the directory was open for one pin only, and was a generation before the last by then
        plain[one] = plain.get(one, 0) + 1
    seen = [[list(ids), count] for ids, count in sets.items()]
    print(json.dumps({"sets": seen, "plain": [list(ids) for ids in plain], "outdated": outdated, "missing": missing}))


if __name__ == "__main__":
    main()
