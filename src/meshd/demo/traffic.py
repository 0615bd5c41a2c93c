"""Clients that notice everything: ``python -m meshd.demo.traffic short|held|denied TARGET...``.

Each runs until SIGTERM or until its stdin is closed, and prints one JSON object a line: its totals so far, every
quarter of a second, and a last one with ``"final": true``. ``held`` first tells the cookies of its sockets. A TARGET
is ``ADDRESS,PORT,BACKEND+BACKEND+...``: the service to connect to, and the addresses that may answer for it.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

__all__ = ["STALL", "Held", "Target", "denied", "held", "main", "short"]

STALL = 1.0
"""Seconds after which a connection or message counts as stalled, even if it then succeeds."""

_GIVE_UP = 8
_REPORT_EVERY = 0.25
_SO_COOKIE = 57
_MESSAGE = struct.Struct(">QQ")
_REQUEST = b"GET / HTTP/1.1\r\nHost: mesh\r\n\r\n"
_TIMEOUT = struct.pack("ll", _GIVE_UP, 0)
# Attempts of the denied client come in bursts, so that it asks thousands of times a second and still sleeps.
_BURST = 8
_REST = 0.002


@dataclass(frozen=True)
class Target:
    """A service as its clients see it: address, port, and the addresses of those who may answer."""

    address: str
    port: int
    backends: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read ``ADDRESS,PORT,BACKEND+BACKEND``; raises ValueError."""
        address, port, backends = text.split(",")
        return cls(address, int(port), tuple(filter(None, backends.split("+"))))

    def __str__(self) -> str:
        return f"{self.address},{self.port},{'+'.join(self.backends)}"

    @property
    def family(self) -> socket.AddressFamily:
        """AF_INET or AF_INET6."""
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET

    def socket(self) -> socket.socket:
        """Return a new socket, blocking, whose operations give up after some seconds with EAGAIN or EINPROGRESS."""
        made = socket.socket(self.family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEOUT)
        return made


class _Stop:
    """Whether to end, asked for by SIGTERM or by the end of stdin."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)
        threading.Thread(target=self._wait_for_stdin, daemon=True).start()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _wait_for_stdin(self) -> None:
        while os.read(0, 4096):
            pass
        self.asked = True


def _say(facts: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown")


def _whole_response(sock: socket.socket) -> bytes | None:
    """Read one response with a Content-Length; None when it ends early. Raises OSError."""
    data = sock.recv(4096)
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        if end:
            at = head.find(b"Content-Length: ")
            size = int(head[at + 16 :].partition(b"\r\n")[0]) if at >= 0 else -1
            if size < 0 or len(body) >= size:
                return data
        more = sock.recv(4096)
        if not more:
            return None
        data += more


def _answers(response: bytes, backends: frozenset[bytes]) -> bool:
    return response.startswith(b"HTTP/1.1 200 ") and response.rpartition(b"\r\n\r\n")[2] in backends


def short(targets: Sequence[Target]) -> None:
    """Connect, ask, check the answer, close; one after the other, as fast as it goes."""
    stop = _Stop()
    tried = ok = stalled = 0
    slowest = 0.0
    failed: Counter[str] = Counter()
    wanted = [(t, (t.address, t.port), frozenset(f"{b}\n".encode() for b in t.backends)) for t in targets]
    clock = time.monotonic
    report_at = clock() + _REPORT_EVERY

    def facts(final: bool) -> dict[str, object]:
        return {
            "kind": "short", "tried": tried, "ok": ok, "failed": dict(failed), "stalled": stalled,
            "slowest": round(slowest, 6), "final": final,
        }  # fmt: skip

    while not stop.asked:
        target, address, backends = wanted[tried % len(wanted)]
        tried += 1
        start = clock()
        try:
            with target.socket() as sock:
                sock.connect(address)
                sock.sendall(_REQUEST)
                response = _whole_response(sock)
        except OSError as error:
            failed[_name(error)] += 1
        else:
            if response is None:
                failed["early-eof"] += 1
            elif _answers(response, backends):
                ok += 1
            else:
                failed["wrong-answer"] += 1
        now = clock()
        if now - start > slowest:
            slowest = now - start
            stalled += slowest > STALL
        elif now - start > STALL:
            stalled += 1
        if now >= report_at:
            _say(facts(False))
            report_at = now + _REPORT_EVERY
    _say(facts(True))


def denied(targets: Sequence[Target]) -> None:
    """Connect where a policy forbids it, all the time; a connection that is made is a loss."""
    stop = _Stop()
    tried = refused = through = 0
    other: Counter[str] = Counter()
    clock = time.monotonic
    last, longest_gap = clock(), 0.0
    report_at = last + _REPORT_EVERY

    def facts(final: bool) -> dict[str, object]:
        return {
            "kind": "denied", "tried": tried, "denied": refused, "through": through, "other": dict(other),
            "longest_gap": round(longest_gap, 6), "final": final,
        }  # fmt: skip

    while not stop.asked:
        for _ in range(_BURST):
            target = targets[tried % len(targets)]
            tried += 1
            try:
                with target.socket() as sock:
                    sock.connect((target.address, target.port))
            except PermissionError:
                refused += 1
            except OSError as error:
                other[_name(error)] += 1
            else:
                through += 1
            now = clock()
            longest_gap, last = max(longest_gap, now - last), now
        if last >= report_at:
            _say(facts(False))
            report_at = last + _REPORT_EVERY
        time.sleep(_REST)
    _say(facts(True))


class Held:
    """One connection that stays, and exchanges numbered messages: raw ones, or HTTP requests on a kept connection."""

    def __init__(self, target: Target, http: bool) -> None:
        self.http = http
        self.socket = target.socket()
        self.socket.connect((target.address, target.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.cookie = int.from_bytes(self.socket.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
        self.trouble: str | None = None
        self.sent = 0
        self.received = 0
        self.sent_at = 0.0
        self.stalls = 0
        self._stalled = False
        self._data = b""

    def send(self, now: float) -> None:
        """Send the next number."""
        if self.http:
            data = f"GET /echo/{self.sent} HTTP/1.1\r\nHost: mesh\r\n\r\n".encode()
        else:
            data = _MESSAGE.pack(self.cookie, self.sent)
        try:
            if self.socket.send(data) != len(data):
                self.trouble = "short-write"
        except OSError as error:
            self.trouble = _name(error)
        self.sent += 1
        self.sent_at = now
        self._stalled = False

    def receive(self) -> None:
        """Take what came; trouble is anything but the one number that is due."""
        try:
            data = self.socket.recv(4096)
        except OSError as error:
            self.trouble = _name(error)
            return
        if not data:
            self.trouble = "early-eof"
            return
        self._data += data
        if self.http:
            head, end, body = self._data.partition(b"\r\n\r\n")
            due = f"/echo/{self.received}\n".encode()
            if not end or len(body) < len(due):
                return
            good = head.startswith(b"HTTP/1.1 200 ") and body == due
        else:
            if len(self._data) < _MESSAGE.size:
                return
            good = self._data == _MESSAGE.pack(self.cookie, self.received)
        if not good or self.received + 1 != self.sent:
            self.trouble = "gap"
            return
        self._data = b""
        self.received += 1

    def check_stall(self, now: float) -> None:
        """Count a message that has been on its way for too long, once."""
        if self.received < self.sent and not self._stalled and now - self.sent_at > STALL:
            self._stalled = True
            self.stalls += 1


def held(targets: Sequence[Target], count: int, http: int, interval: float) -> None:
    """Hold ``count`` raw connections and ``http`` kept HTTP ones; each sends a number every ``interval`` seconds.

    The last of ``targets`` serves the HTTP ones, the others the raw ones in turn.
    """
    stop = _Stop()
    raw = targets[:-1] if http else targets
    connections = [Held(raw[n % len(raw)], http=False) for n in range(count)]
    connections += [Held(targets[-1], http=True) for _ in range(http)]
    watch = selectors.EpollSelector()
    for connection in connections:
        watch.register(connection.socket, selectors.EVENT_READ, connection)
    clock = time.monotonic
    start = clock()
    due = deque((start + interval * n / len(connections), c) for n, c in enumerate(connections))
    report_at = start
    _say({"kind": "held", "cookies": [c.cookie for c in connections]})

    def facts(final: bool) -> dict[str, object]:
        return {
            "kind": "held", "connections": len(connections), "alive": sum(c.trouble is None for c in connections),
            "sent": sum(c.sent for c in connections), "received": sum(c.received for c in connections),
            "trouble": dict(Counter(c.trouble for c in connections if c.trouble)),
            "stalled": sum(c.stalls for c in connections), "final": final,
        }  # fmt: skip

    def pump(wait: float) -> None:
        for key, _ in watch.select(wait):
            connection: Held = key.data
            connection.receive()
            if connection.trouble is not None:
                watch.unregister(connection.socket)

    while not stop.asked:
        now = clock()
        if now >= report_at:
            for connection in connections:
                connection.check_stall(now)
            _say(facts(False))
            report_at = now + _REPORT_EVERY
        while due and due[0][0] <= now:
            _, connection = due.popleft()
            if connection.trouble is None:
                if connection.received == connection.sent:
                    connection.send(now)
                due.append((now + interval, connection))
        pump(max(0.0, min(report_at, due[0][0] if due else report_at) - clock()))
    end = clock() + _GIVE_UP
    while any(c.trouble is None and c.received < c.sent for c in connections) and clock() < end:
        pump(0.05)
        for connection in connections:
            connection.check_stall(clock())
    _say(facts(True))


def main(args: Sequence[str] | None = None) -> None:
    """Run one kind of client."""
    parser = argparse.ArgumentParser(prog="python -m meshd.demo.traffic", description="Traffic that counts its losses.")
    kinds = parser.add_subparsers(required=True, dest="kind")
    each: dict[str, Callable[[argparse.Namespace], None]] = {
        "short": lambda chosen: short(chosen.targets),
        "denied": lambda chosen: denied(chosen.targets),
        "held": lambda chosen: held(chosen.targets, chosen.count, chosen.http, chosen.interval),
    }
    for kind in each:
        sub = kinds.add_parser(kind)
        sub.add_argument("targets", nargs="+", type=Target.parse, metavar="TARGET")
        if kind == "held":
            sub.add_argument("--count", type=int, default=160)
            sub.add_argument("--http", type=int, default=40)
            sub.add_argument("--interval", type=float, default=0.25)
    chosen = parser.parse_args(args)
    each[chosen.kind](chosen)


if __name__ == "__main__":
    main()
