"""A client that keeps its own books: ``python -m tests.soak.client INDEX SEED``.

It does at random what the mesh counts: connects that are answered, refused or forbidden, connections that it holds
for a while, and UDP messages. It prints how many operations it did, four times a second. At the first line on stdin it
stops and prints its books; the connections that it still holds it holds until stdin is closed.
"""

from __future__ import annotations

import json
import math
import os
import random
import select
import socket
import struct
import sys
import time
from collections import Counter

from meshd.demo.traffic import Target
from tests.soak.world import ECHO, EMPTY, FORBIDDEN, SINK

_BURST = 64
_REPORT_EVERY = 0.25
# Seconds between bursts, another one after each report: an upgrade meets storms and has to get on as well.
_RESTS = (0.0, 0.001, 0.004)
_NICE = 5
_HELD = 40
_SO_COOKIE = 57
# Closing with a reset leaves no TIME_WAIT behind: ports do not run out.
_RESET = struct.pack("ii", 1, 0)
_ACCOUNTS = 1500  # of each client: there is room for those of 40


class Client:
    """The books of one client, and what it does to fill them."""

    def __init__(self, index: int, seed: int) -> None:
        self.operations = 0
        self.opened: Counter[Target] = Counter()
        self.closed: Counter[Target] = Counter()
        self.refused = self.forbidden = 0
        self.messages: Counter[int] = Counter()
        self.bytes: Counter[int] = Counter()
        self.sizes: Counter[int] = Counter()
        self.held: list[tuple[Target, socket.socket]] = []
        self._random = random.Random(f"{seed} {index}")
        self._accounts = (index + 1) << 16
        self._sent = 0
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._turned_away = socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    def work(self, count: int) -> None:
        """Do some operations. Raises OSError for one that ends as it must not."""
        ways = (self.message, self.ask_forbidden, self.ask_empty, self.connect, self.hold)
        for way in self._random.choices(ways, (50, 20, 15, 12, 3), k=count):
            way()
            self.operations += 1

    def message(self) -> None:
        """Send a message of some size for some account; new accounts appear ever more seldom."""
        account = self._accounts + self._random.randrange(min(1 + math.isqrt(self._sent), _ACCOUNTS))
        size = self._random.randint(4, 400)
        self._sender.sendto(struct.pack("=I", account).ljust(size, b"."), SINK)
        self._sent += 1
        self.messages[account] += 1
        self.bytes[account] += size
        self.sizes[size % 64] += 1

    def ask_forbidden(self) -> None:
        """Connect where a policy forbids it."""
        try:
            self._turned_away.connect((FORBIDDEN.address, FORBIDDEN.port))
        except PermissionError:
            self.forbidden += 1
        else:
            raise OSError("connected to a service that is forbidden")

    def ask_empty(self) -> None:
        """Connect to a service that has no backend."""
        try:
            self._turned_away.connect((EMPTY.address, EMPTY.port))
        except ConnectionRefusedError:
            self.refused += 1
        else:
            raise OSError("connected to a service without a backend")

    def connect(self) -> None:
        """Connect to a service and close."""
        self._close(*self._open())

    def hold(self) -> None:
        """Connect and keep that; when there are enough, one of them has to go."""
        self.held.append(self._open())
        if len(self.held) > _HELD:
            self._close(*self.held.pop(self._random.randrange(len(self.held))))

    def _open(self) -> tuple[Target, socket.socket]:
        target = self._random.choice(ECHO)
        made = target.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        made.connect((target.address, target.port))
        self.opened[target] += 1
        return target, made

    def _close(self, target: Target, made: socket.socket) -> None:
        made.close()
        self.closed[target] += 1

    def books(self) -> dict[str, object]:
        """All that it counted, and the socket cookies of what it holds by service."""
        return {
            "operations": self.operations,
            "opened": [self.opened[target] for target in ECHO],
            "closed": [self.closed[target] for target in ECHO],
            "refused": self.refused,
            "forbidden": self.forbidden,
            "messages": self.messages,
            "bytes": self.bytes,
            "sizes": self.sizes,
            "held": [[_cookie(made) for target, made in self.held if target is echo] for echo in ECHO],
        }


def _cookie(of: socket.socket) -> int:
    return int.from_bytes(of.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


def _say(facts: dict[str, object]) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    """Run one client on the CPU of its index."""
    index, seed = int(sys.argv[1]), int(sys.argv[2])
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[index % len(cpus)]})
    os.nice(_NICE)
    client = Client(index, seed)
    report_at = rest = 0.0
    paces = random.Random(f"{seed} {index} paces")
    while not select.select([0], [], [], rest)[0]:
        client.work(_BURST)
        now = time.monotonic()
        if now >= report_at:
            _say({"operations": client.operations})
            report_at = now + _REPORT_EVERY
            rest = paces.choice(_RESTS)
    sys.stdin.readline()
    _say({"books": client.books()})
    sys.stdin.read()


if __name__ == "__main__":
    main()
