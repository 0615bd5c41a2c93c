"""A client that does one thing over and over and counts it: ``python -m tests.hooks.traffic WHAT``.

It begins on a line on stdin, stops on the next, prints how often it did it, and goes on a third. Each time is one call,
or one packet, of the hook that WHAT is named after, so that its programs must have counted exactly as many. What goes
wrong ends it.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial

_MOST = 2_000_000
_LOCAL = {"4": "127.0.0.1", "6": "::1", "_unix": ""}
_FAMILY = {"4": socket.AF_INET, "6": socket.AF_INET6, "_unix": socket.AF_UNIX}
_names = itertools.count()


def _server(version: str) -> socket.socket:
    if version == "_unix":
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"\0hitless-{os.getpid()}-{next(_names)}")
        server.listen(64)
        return server
    return socket.create_server((_LOCAL[version], 0), family=_FAMILY[version], backlog=64)


def _connect(version: str) -> Callable[[], object]:
    server = _server(version)
    target = server.getsockname()

    def once() -> None:
        with socket.socket(_FAMILY[version]) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.connect(target)
            server.accept()[0].close()

    return once


def _connected(version: str) -> tuple[socket.socket, socket.socket]:
    server = _server(version)
    client = socket.socket(_FAMILY[version])
    client.connect(server.getsockname())
    return client, server.accept()[0]


def _getname(version: str, method: str) -> Callable[[], object]:
    client, other = _connected(version)

    def once() -> object:  # of a unix socket without a name of its own nobody asks programs
        return client.getpeername() if method == "getpeername" else other.getsockname()

    return once


def _datagrams(version: str) -> tuple[socket.socket, socket.socket]:
    pair = tuple(socket.socket(_FAMILY[version], socket.SOCK_DGRAM) for _ in range(2))
    for one in pair:
        one.bind(f"\0hitless-{os.getpid()}-{next(_names)}" if version == "_unix" else (_LOCAL[version], 0))
    return pair[0], pair[1]


def _send(version: str) -> Callable[[], object]:
    client, server = _datagrams(version)
    target = server.getsockname()

    def once() -> None:
        client.sendto(b"x", target)
        server.recv(1)

    return once


def _receive(version: str) -> Callable[[], object]:
    client, server = _datagrams(version)
    target = server.getsockname()

    def once() -> None:
        client.sendto(b"x", target)
        server.recvfrom(1)

    return once


def _bind(version: str) -> Callable[[], object]:
    def once() -> None:
        with socket.socket(_FAMILY[version], socket.SOCK_DGRAM) as made:
            made.bind((_LOCAL[version], 0))

    return once


def _create() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()


def _option(method: str) -> Callable[[], object]:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if method == "getsockopt":
        return lambda: made.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    return lambda: made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)


def _sysctl() -> None:
    opened = os.open("/proc/sys/net/ipv4/ip_forward", os.O_RDONLY)
    os.read(opened, 64)
    os.close(opened)


def _device() -> None:
    os.close(os.open("/dev/null", os.O_RDONLY))


def _packet() -> Callable[[], object]:
    client, server = _datagrams("4")
    client.connect(server.getsockname())

    def once() -> None:
        client.send(b"x")
        server.recv(1)

    return once


_TRAFFIC: dict[str, Callable[[], Callable[[], object]]] = {
    **{f"connect{version}": partial(_connect, version) for version in _FAMILY},
    **{f"sendmsg{version}": partial(_send, version) for version in _FAMILY},
    **{f"recvmsg{version}": partial(_receive, version) for version in _FAMILY},
    **{f"{method}{version}": partial(_getname, version, method)
       for version in _FAMILY for method in ("getpeername", "getsockname")},
    **{f"{name}{version}": partial(_bind, version)
       for version in "46" for name in ("bind", "post_bind")},
    "sock_create": lambda: _create,
    "sock_release": lambda: _create,
    "getsockopt": partial(_option, "getsockopt"),
    "setsockopt": partial(_option, "setsockopt"),
    "sysctl": lambda: _sysctl,
    "dev": lambda: _device,
    "sock_ops": partial(_connect, "4"),
    "ingress": _packet,
    "egress": _packet,
}  # fmt: skip


def main() -> None:
    """Do it until stdin says stop."""
    once = _TRAFFIC[sys.argv[1]]()
    print("ready", flush=True)
    sys.stdin.readline()
    count = 0
    while count < _MOST and not (count % 16 == 0 and select.select([0], [], [], 0)[0]):
        once()
        count += 1
    sys.stdin.readline()
    print(count, flush=True)
    sys.stdin.readline()  # whoever set this up goes after the counting


if __name__ == "__main__":
    main()
