"""A client that counts its own connects: ``python -m tests.faults.client CPU ADDRESS PORT``.

``ADDRESS`` leads nowhere; the program on the hook turns a connect to it to ``PORT`` of this machine, and counts it. So
each connect shows whether the hook serves. A line on stdin is answered with the counts; after ``pause`` it rests until
``go``.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time

_REST = 0.001  # s between two connects
# Closing with a reset leaves no TIME_WAIT behind: ports do not run out.
_RESET = struct.pack("ii", 1, 0)


def _connect(listener: socket.socket, target: tuple[str, int]) -> None:
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        made.connect(target)
        listener.accept()[0].close()


def main() -> None:
    """Connect until stdin is closed."""
    cpu, target = int(sys.argv[1]), (sys.argv[2], int(sys.argv[3]))
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[cpu % len(cpus)]})
    listener = socket.create_server(("127.0.0.1", target[1]))
    made, paused = 0, True
    failures: list[str] = []
    while True:
        ready = select.select([0], [], [], None if paused else _REST)[0]
        if ready:
            command = sys.stdin.readline().strip()
            if not command:
                return
            paused = command == "pause" or (paused and command != "go")
            print(json.dumps({"made": made, "failures": failures}), flush=True)
        if paused:
            continue
        try:
            _connect(listener, target)
            made += 1
        except OSError as error:
            failures.append(f"connect {made + 1}: {error}")
            time.sleep(0.01)


if __name__ == "__main__":
    main()
