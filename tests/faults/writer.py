"""A control plane in a process of its own, which keeps a journal: ``python -m tests.faults.writer MAP SEED``.

It inserts, changes and deletes entries through hitless. A line on stdin is answered with the journal; after ``pause``
it rests until ``go ROOT``, and begins a new journal if that is another root.
"""

from __future__ import annotations

import json
import random
import select
import sys

import hitless

_REST = 0.003  # s between two writes
_KEYS = 24


def main() -> None:
    """Write until stdin is closed."""
    name, dice = sys.argv[1], random.Random(sys.argv[2])
    node: hitless.Node | None = None
    held: dict[int, list[int]] = {}
    failures: list[str] = []
    paused, writes = True, 0
    while True:
        if select.select([0], [], [], None if paused else _REST)[0]:
            command, _, root = sys.stdin.readline().strip().partition(" ")
            if not command:
                return
            if root and (node is None or str(node.root) != root):
                node, held = hitless.Node(root), {}
                failures = []
            paused = command == "pause" or (paused and command != "go")
            print(json.dumps({"held": held, "failures": failures, "writes": writes}), flush=True)
        if paused or node is None:
            continue
        key, values = dice.randrange(_KEYS), [dice.randrange(1 << 16), dice.randrange(1 << 16)]
        try:
            if key in held and dice.random() < 0.4:
                del node.map(name)[key]
                del held[key]
            else:
                node.map(name)[key] = {"rate": values[0], "burst": values[1]}
                held[key] = values
            writes += 1
        except Exception as error:  # noqa: BLE001 - told, whatever it is
            failures.append(f"writing {key}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
