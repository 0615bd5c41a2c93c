"""A client that lets every hook of the world of hooks see something: ``python -m tests.faults.packets NAME POD...``.

In each turn it sends a datagram from this network namespace to each of those at the paths POD, which echoes it; sends
a byte over a TCP connection of this namespace, and calls itself NAME. A datagram that does not come is sent once more:
a veth throws away what it holds when its first XDP program comes or its last one goes. A line on stdin is answered with
how many turns came to their end and what went wrong: ``pause`` and ``go``, ``step`` for five turns more, ``connect``
for a new connection.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
import sys

_REST = 0.001  # s between two turns
_PORT = 4242
_STEPS = 5
_LONGEST = 5.0  # s that a packet may take, on a machine that is busy
_libc = ctypes.CDLL(None, use_errno=True)


def _receiver(pod: str) -> socket.socket:
    """A socket in the namespace at ``pod``, where it stays."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(pod, os.O_RDONLY)
    for fd in (there, home):
        if fd == home:
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            made.bind(("0.0.0.0", _PORT))
            made.settimeout(_LONGEST)
        if _libc.setns(fd, 0):
            raise OSError(ctypes.get_errno(), "setns")
    return made


class _Client:
    def __init__(self, name: str, pods: list[str]) -> None:
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sender.settimeout(_LONGEST)
        self._pods = [(f"10.9.{number}.2", _receiver(pod)) for number, pod in enumerate(pods, 1)]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: tuple[socket.socket, ...] = ()
        self._comm = os.open("/proc/self/comm", os.O_WRONLY)
        self._name = name.encode()
        self.resent = 0
        self.connect()

    def connect(self) -> None:
        for end in self._ends:
            end.close()
        client = socket.create_connection(self._listener.getsockname(), timeout=_LONGEST)
        server = self._listener.accept()[0]
        server.settimeout(_LONGEST)
        self._ends = (client, server)

    def turn(self) -> None:
        for address, receiver in self._pods:
            self._sender.sendto(b"x", (address, _PORT))
            try:
                _, sender = receiver.recvfrom(1)
            except TimeoutError:
                self.resent += 1
                self._sender.sendto(b"x", (address, _PORT))
                _, sender = receiver.recvfrom(1)
            receiver.sendto(b"x", sender)
            self._sender.recv(1)
        self._ends[0].send(b"x")
        self._ends[1].recv(1)
        os.write(self._comm, self._name)


def main() -> None:
    """Take turns until stdin is closed."""
    client = _Client(sys.argv[1], sys.argv[2:])
    made, paused, steps = 0, True, 0
    failures: list[str] = []
    while True:
        if not steps and select.select([0], [], [], None if paused else _REST)[0]:
            command = sys.stdin.readline().strip()
            if not command:
                return
            paused = command != "go" and (paused or command == "pause")
            if command == "connect":
                client.connect()
            steps = _STEPS if command == "step" else 0
            if not steps:
                print(json.dumps({"made": made, "failures": failures, "resent": client.resent}), flush=True)
        if paused and not steps:
            continue
        try:
            client.turn()
            made += 1
        except OSError as error:
            failures.append(f"turn {made + 1}: {error}")
        if steps:
            steps -= 1
            if not steps:
                print(json.dumps({"made": made, "failures": failures, "resent": client.resent}), flush=True)


if __name__ == "__main__":
    main()
