"""Another program that opens a daemon's pins by their paths: ``python -m tests.faults.opener``.

It knows nothing of hitless: it opens one path after the other, over and over. A line on stdin is answered with how
often it opened all, what failed, and the ids that each path gave since the last answer; after ``pause`` it rests until
``go``. Paths behind the word are those to open from then on.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from pathlib import Path

from hitless.kernel.libbpf import lib

_REST = 0.0005  # s between two rounds


def _identity(path: str) -> int:
    """The kernel's id of the map or link there. Raises OSError."""
    fd = lib().bpf_obj_get(path.encode())
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd), path)
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    finally:
        os.close(fd)
    return next(int(line.split()[1]) for line in lines if line.startswith(("map_id:", "link_id:")))


def main() -> None:
    """Open until stdin is closed."""
    paths: list[str] = []
    made, paused = 0, True
    failures: list[str] = []
    seen: dict[str, set[int]] = {}
    while True:
        if select.select([0], [], [], None if paused else _REST)[0]:
            command, _, rest = sys.stdin.readline().strip().partition(" ")
            if not command:
                return
            if rest:
                paths, failures = rest.split(), []
            paused = command == "pause" or (paused and command != "go")
            told = {path: sorted(ids) for path, ids in seen.items()}
            print(json.dumps({"made": made, "failures": failures, "seen": told}), flush=True)
            seen = {}
        if paused:
            continue
        try:
            for path in paths:
                seen.setdefault(path, set()).add(_identity(path))
            made += 1
        except OSError as error:
            failures.append(f"{error.filename}: {error.strerror}")
            time.sleep(0.01)


if __name__ == "__main__":
    main()
