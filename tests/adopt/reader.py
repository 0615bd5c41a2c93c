"""A program that knows nothing of hitless and opens a daemon's pins: ``python -m tests.adopt.reader PATH...``.

It opens one path after the other, over and over until its stdin ends, and tells what it got in each round: of a map the
size of its values, of a link its id.
"""

from __future__ import annotations

import json
import os
import select
import sys
from pathlib import Path

from tests.bpf import pin_below_by_proc


def _look(path: str) -> str:
    """Raises OSError."""
    directory, name = os.path.split(path)
    there = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd = pin_below_by_proc(there, name)
    finally:
        os.close(there)
    try:
        text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    facts = dict(line.split(":\t") for line in text.splitlines() if ":\t" in line)
    return facts.get("value_size") or f"link {facts['link_id']}"


def main() -> None:
    """Open until stdin ends, then print one JSON object: rounds in a row that gave the same are one."""
    rounds: list[tuple[list[str], int]] = []
    missing: list[str] = []
    print("ready", flush=True)
    while not select.select([0], [], [], 0)[0]:
        try:
            found = [_look(path) for path in sys.argv[1:]]
        except OSError as error:
            missing.append(str(error))
            continue
        if rounds and rounds[-1][0] == found:
            rounds[-1] = found, rounds[-1][1] + 1
        else:
            rounds.append((found, 1))
    print(json.dumps({"rounds": rounds, "missing": missing}))


if __name__ == "__main__":
    main()
