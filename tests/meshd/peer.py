"""Both ends of a connection, as processes in a lab: `serve ADDRESS...`, `connect ADDRESS PORT COUNT`, `hold ...`,
`transfer ADDRESS PORT SIZE...`, `ask ADDRESS PORT COUNT WAY`, `asking ADDRESS PORT`.

The server sends its own address and then whatever it is sent; to a datagram it answers with its address. A client
prints one JSON object a line.
"""

from __future__ import annotations

import collections
import errno
import json
import signal
import socket
import sys
import threading

PORT = 8080


def main() -> None:
    what, *args = sys.argv[1:]
    if what == "serve":
        serve(*args)
    elif what == "connect":
        connect(*args)
    elif what == "transfer":
        transfer(*args)
    elif what == "ask":
        ask(*args)
    elif what == "asking":
        asking(*args)
    else:
        hold(*args)


def serve(*addresses: str) -> None:
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, PORT), family=family, backlog=512)
        threading.Thread(target=accept, args=(listener, address)).start()
        heard = socket.socket(family, socket.SOCK_DGRAM)
        heard.bind((address, PORT))
        threading.Thread(target=reply, args=(heard, address)).start()
    print(json.dumps({"ready": True}), flush=True)


def accept(listener: socket.socket, address: str) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=answer, args=(connection, address)).start()


def reply(heard: socket.socket, address: str) -> None:
    while True:
        _, client = heard.recvfrom(4096)
        heard.sendto(address.encode(), client)


def answer(connection: socket.socket, address: str) -> None:
    with connection:
        connection.sendall(address.encode() + b"\n")
        while data := connection.recv(4096):
            connection.sendall(data)


def connect(address: str, port: str, count: str, seconds: str = "10") -> None:
    """Open connections one after the other, until SIGINT at most."""
    answers: collections.Counter[str] = collections.Counter()
    errors: collections.Counter[str] = collections.Counter()
    peers = set()
    go = True

    def stop(number: int, frame: object) -> None:
        nonlocal go
        go = False

    signal.signal(signal.SIGINT, stop)
    for _ in range(int(count)):
        if not go:
            break
        try:
            connection, backend = opened(address, int(port), float(seconds))
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


def transfer(address: str, port: str, *sizes: str) -> None:
    """Send so many bytes on a connection each and get them back; the way to end it differs from one to the next."""
    sent = received = 0
    for number, size in enumerate(map(int, sizes)):
        connection, greeting = opened(address, int(port))
        received += len(greeting) + 1
        with connection:
            sender = threading.Thread(target=connection.sendall, args=(bytes(size),))
            sender.start()
            left = size
            while left:
                data = connection.recv(min(left, 65536))
                left -= len(data)
            sender.join()
            sent, received = sent + size, received + size
            if number % 2:
                connection.shutdown(socket.SHUT_WR)
                assert not connection.recv(1)
    print(json.dumps({"sent": sent, "received": received}), flush=True)


def ask(address: str, port: str, count: str, way: str) -> None:
    """Send datagrams and wait for the answers: each by a `connected` socket of its own, or a `fresh` one, or `one`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    answers: collections.Counter[str] = collections.Counter()
    errors: collections.Counter[str] = collections.Counter()
    sources, peers = set(), set()
    asker: socket.socket | None = None
    for _ in range(int(count)):
        if asker is None or way != "one":
            asker = socket.socket(family, socket.SOCK_DGRAM)
            asker.settimeout(1)
        try:
            if way == "connected":
                asker.connect((address, int(port)))
                peers.add(str(asker.getpeername()[:2]))
                asker.send(b"?")
            else:
                asker.sendto(b"?", (address, int(port)))
            data, source = asker.recvfrom(100)
        except OSError as error:
            errors[errno.errorcode.get(error.errno or 0, str(error))] += 1
            continue
        answers[data.decode()] += 1
        sources.add(str(source[:2]))
    said = {"answers": answers, "errors": errors, "sources": sorted(sources), "peers": sorted(peers)}
    print(json.dumps(said), flush=True)


def asking(address: str, port: str) -> None:
    """Ask by one socket, and once more for every line on standard input."""
    asker = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    asker.settimeout(5)
    while True:
        asker.sendto(b"?", (address, int(port)))
        print(json.dumps({"answer": asker.recvfrom(100)[0].decode()}), flush=True)
        if not sys.stdin.readline():
            return


def opened(address: str, port: int, seconds: float = 10) -> tuple[socket.socket, str]:
    connection = socket.create_connection((address, port), timeout=seconds)
    answer = b""
    while not answer.endswith(b"\n"):
        data = connection.recv(100)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed before an answer")
        answer += data
    return connection, answer.decode().strip()


if __name__ == "__main__":
    main()
