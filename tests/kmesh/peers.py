"""Both ends of the fixture's traffic, as scripts: `peers.py server ...` in a pod, `peers.py ROLE ...` for a client.

A client begins at a line `go` on its stdin and stops at `pause` or `end`; it answers each line with its totals.
"""

from __future__ import annotations

import contextlib
import json
import select
import selectors
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

MESSAGE = 16
TIMEOUT = 5.0


def serve(address: str, tcp: int, udp: int) -> None:
    """Echo what comes, until killed."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    watched = selectors.DefaultSelector()
    listener = socket.create_server((address, tcp), family=family, backlog=1024)
    questions = socket.socket(family, socket.SOCK_DGRAM)
    questions.bind((address, udp))
    for each in (listener, questions):
        watched.register(each, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in watched.select():
            end = key.fileobj
            assert isinstance(end, socket.socket)
            if end is listener:
                made, _ = listener.accept()
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                watched.register(made, selectors.EVENT_READ)
            elif end is questions:
                text, asker = questions.recvfrom(2048)
                questions.sendto(text, asker)
            else:
                try:
                    data = end.recv(65536)
                except ConnectionError:
                    data = b""
                if data:
                    end.sendall(data)
                else:
                    watched.unregister(end)
                    end.close()


class Totals:
    """What a client did so far; everything that did not go as it should is in ``failed``."""

    def __init__(self) -> None:
        self.connects: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.denied: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.gap = 0.0
        self.sockets: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def watch(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        except OSError as error:
            self.failed[f"{what}: {error}"] += 1
        self.gap = max(self.gap, time.monotonic() - begun)


class WrongError(OSError):
    """An answer that is not the one."""


def take(end: socket.socket) -> bytes:
    got = b""
    while len(got) < MESSAGE:
        part = end.recv(MESSAGE - len(got))
        if not part:
            raise WrongError("closed by the other end")
        got += part
    return got


def ask(end: socket.socket, number: int) -> None:
    sent = b"%016d" % number
    end.sendall(sent)
    if take(end) != sent:
        raise WrongError("another answer than expected")


def connect(vip: str, port: int) -> socket.socket:
    end = socket.create_connection((vip, port), timeout=TIMEOUT)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end


def held(totals: Totals, targets: list[tuple[str, int]], count: int) -> Callable[[int], None]:
    """Connections that stay; a message on each in turn."""
    ends = []
    for number in range(count):
        vip, port = targets[number % len(targets)]
        with totals.watch(f"connect to {vip}"):
            end = connect(vip, port)
            ends.append((vip, end))
            totals.connects[vip] += 1
            totals.sockets.append({"vip": vip, "fd": end.fileno(), "messages": 0})

    def step(number: int) -> None:
        index = number % len(ends)
        vip, end = ends[index]
        with totals.watch(f"held connection to {vip}"):
            ask(end, number)
            totals.messages[vip] += 1
            totals.sockets[index]["messages"] += 1

    return step


def short(totals: Totals, targets: list[tuple[str, int]], _: int) -> Callable[[int], None]:
    """A connection, a message, its end."""

    def step(number: int) -> None:
        vip, port = targets[number % len(targets)]
        with totals.watch(f"connection to {vip}"), connect(vip, port) as end:
            totals.connects[vip] += 1
            end.getpeername()
            ask(end, number)
            totals.messages[vip] += 1

    return step


def denied(totals: Totals, targets: list[tuple[str, int]], _: int) -> Callable[[int], None]:
    """Connections that a policy forbids."""

    def step(number: int) -> None:
        vip, port = targets[number % len(targets)]
        try:
            connect(vip, port).close()
        except PermissionError:
            totals.denied[vip] += 1
        except OSError as error:
            totals.failed[f"denied connection to {vip}: {error}"] += 1
        else:
            totals.failed[f"{vip} was not denied"] += 1

    return step


def questions(totals: Totals, targets: list[tuple[str, int]], _: int) -> Callable[[int], None]:
    """Datagrams whose answers have to come from where they were sent to."""
    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    end.settimeout(TIMEOUT)

    def step(number: int) -> None:
        vip, port = targets[number % len(targets)]
        with totals.watch(f"question to {vip}"):
            sent = b"%016d" % number
            end.sendto(sent, (vip, port))
            totals.messages[vip] += 1
            answer, source = end.recvfrom(2048)
            if (answer, source) != (sent, (vip, port)):
                raise WrongError(f"{answer!r} from {source}")

    return step


ROLES = {"held": held, "short": short, "denied": denied, "questions": questions}


def run(role: str, pause: float, count: int, words: list[str]) -> None:
    targets = [(vip, int(port)) for vip, _, port in (word.rpartition(":") for word in words)]
    totals = Totals()
    step = ROLES[role](totals, targets, count)
    print(json.dumps(vars(totals)), flush=True)
    running, number = False, 0
    while True:
        if running and not select.select([sys.stdin], [], [], pause)[0]:
            step(number)
            number += 1
            continue
        word = sys.stdin.readline().strip()
        running = word == "go"
        print(json.dumps(vars(totals)), flush=True)
        if word in ("", "end"):
            return


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        run(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
