"""Both ends of a connection, as processes in a lab: `serve ADDRESS...`, `connect ADDRESS PORT COUNT`, `hold ...`.

The server sends its own address and then whatever it is sent. A client prints one JSON object a line.
"""

from __future__ import annotations

import collections
import errno
import json
import socket
import sys
import threading

PORT = 8080


def main() -> None:
    what, *args = sys.argv[1:]
    {"serve": serve, "connect": connect, "hold": hold}[what](*args)


def serve(*addresses: str) -> None:
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, PORT), family=family, backlog=512)
        threading.Thread(target=accept, args=(listener, address)).start()
    print(json.dumps({"ready": True}), flush=True)


def accept(listener: socket.socket, address: str) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, address)).start()


def answer(connection: socket.socket, address: str) -> None:
    with connection:
        connection.sendall(address.encode() + b"\n")
        while data := connection.recv(4096):
            connection.sendall(data)


def connect(address: str, port: str, count: str) -> None:
    answers: collections.Counter[str] = collections.Counter()
    errors: collections.Counter[str] = collections.Counter()
    peers = set()
    for _ in range(int(count)):
        try:
            connection, backend = opened(address, int(port))
        except OSError as error:
            errors[errno.errorcode.get(error.errno or 0, str(error))] += 1
            continue
        with connection:
            peers.add(str(connection.getpeername()[:2]))
        answers[backend] += 1
    print(json.dumps({"answers": answers, "errors": errors, "peers": sorted(peers)}), flush=True)


def hold(address: str, port: str, count: str) -> None:
    """Open connections, then exchange a message on each for every line on standard input."""
    held = [opened(address, int(port))[0] for _ in range(int(count))]
    cookies = [int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder) for one in held]
    print(json.dumps({"held": len(held), "cookies": cookies}), flush=True)
    for number, _ in enumerate(sys.stdin):
        alive = 0
        for one in held:
            message = b"%d\n" % number
            one.sendall(message)
            alive += one.recv(100) == message
        print(json.dumps({"alive": alive}), flush=True)


def opened(address: str, port: int) -> tuple[socket.socket, str]:
    connection = socket.create_connection((address, port), timeout=10)
    answer = b""
    while not answer.endswith(b"\n"):
        data = connection.recv(100)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed before an answer")
        answer += data
    return connection, answer.decode().strip()


if __name__ == "__main__":
    main()
