"""The clients of the demo report a clean network as clean, and each kind of trouble by its name."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest

from meshd.demo.lab import BACKENDS4, BACKENDS6, Lab
from meshd.demo.servers import ECHO_PORT, HTTP_PORT, start_echo, start_nginx
from meshd.demo.traffic import Target

BAD_PORT = 9000
# A server that answers its first connections well, or numbers its first messages well, and then does as told.
BAD_SERVER = """
import socket, struct, sys, time
how = sys.argv[1]
listener = socket.create_server(("10.1.0.1", 9000), backlog=512)
body = b"10.1.0.1\\n"
whole = b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%s" % (len(body), body)
kept = []
while True:
    sock, _ = listener.accept()
    kept.append(sock)
    for n in range(1000):
        data = sock.recv(4096)
        if not data:
            break
        answer = data if len(data) == 16 else whole
        if n != 2 and len(data) == 16:
            sock.sendall(answer)
            continue
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        elif how == "early-eof":
            sock.sendall(answer[:-3]) if len(data) != 16 else None
            sock.close()
        elif how == "gap":
            sock.sendall(data[:8] + struct.pack(">Q", n + 1))
        elif how == "slow":
            time.sleep(1.2)
            sock.sendall(answer)
            continue
        break
"""
AWAIT_BAD_SERVER = """
import socket, time
while socket.socket().connect_ex(("10.1.0.1", 9000)):
    time.sleep(0.02)
"""


def start(
    lab: Lab, kind: str, targets: Sequence[Target], *options: str, cgroup: str = "clients"
) -> subprocess.Popen[str]:
    args = [sys.executable, "-m", "meshd.demo.traffic", kind, *options, *map(str, targets)]
    return lab.popen(args, cgroup, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def finish(client: subprocess.Popen[str]) -> dict[str, Any]:
    """End a client and return its last words."""
    out, _ = client.communicate("", timeout=20)
    assert client.returncode == 0
    last: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert last["final"] is True
    return last


def bad_server(lab: Lab, how: str) -> Target:
    lab.popen([sys.executable, "-c", BAD_SERVER, how])
    lab.run_python("-c", AWAIT_BAD_SERVER)
    return Target("10.1.0.1", BAD_PORT, ("10.1.0.1",))


@pytest.fixture(scope="module")
def served(module_lab: Lab) -> Lab:
    start_nginx(module_lab, (*BACKENDS4, *BACKENDS6))
    start_echo(module_lab, (*BACKENDS4, *BACKENDS6))
    return module_lab


def test_short_connections_to_a_real_server_all_succeed(served: Lab) -> None:
    targets = [Target(a, HTTP_PORT, (a,)) for a in (BACKENDS4[0], BACKENDS6[0])]
    client = start(served, "short", targets)
    time.sleep(1.5)
    last = finish(client)
    assert last["tried"] == last["ok"] > 1000
    assert last["failed"] == {}
    assert last["stalled"] == 0


def test_an_answer_from_another_backend_is_a_failure(served: Lab) -> None:
    client = start(served, "short", [Target(BACKENDS4[0], HTTP_PORT, (BACKENDS4[1],))])
    time.sleep(0.5)
    last = finish(client)
    assert last["ok"] == 0
    assert last["failed"] == {"wrong-answer": last["tried"]}


def test_an_address_without_route_is_a_failure(served: Lab) -> None:
    client = start(served, "short", [Target("10.96.0.10", 80, BACKENDS4)])
    time.sleep(0.5)
    last = finish(client)
    assert last["failed"] == {"ENETUNREACH": last["tried"]}


def test_held_connections_exchange_every_message(served: Lab) -> None:
    targets = [Target(BACKENDS4[0], ECHO_PORT), Target(BACKENDS6[0], ECHO_PORT), Target(BACKENDS4[0], HTTP_PORT)]
    client = start(served, "held", targets, "--count", "20", "--http", "5", "--interval", "0.05")
    time.sleep(1.5)
    last = finish(client)
    assert last["alive"] == last["connections"] == 25
    assert last["sent"] == last["received"] > 25 * 10
    assert last["trouble"] == {}
    assert last["stalled"] == 0


def test_held_connections_first_tell_the_cookies_of_their_sockets(served: Lab) -> None:
    client = start(served, "held", [Target(BACKENDS4[0], ECHO_PORT)], "--count", "7", "--http", "0")
    assert client.stdout is not None
    first = json.loads(client.stdout.readline())
    finish(client)
    assert len(set(first["cookies"])) == 7
    assert all(first["cookies"])


def test_a_denied_client_that_is_not_denied_says_so(served: Lab) -> None:
    targets = [Target(BACKENDS4[0], HTTP_PORT), Target("10.96.0.10", 80)]
    client = start(served, "denied", targets, cgroup="denied")
    time.sleep(0.5)
    last = finish(client)
    assert last["through"] > 100
    assert last["other"]["ENETUNREACH"] > 100
    assert last["denied"] == 0


@pytest.mark.parametrize(("how", "kind"), [("reset", "ECONNRESET"), ("early-eof", "early-eof")])
def test_a_short_connection_that_is_cut_is_counted_by_kind(lab: Lab, how: str, kind: str) -> None:
    client = start(lab, "short", [bad_server(lab, how)])
    time.sleep(0.6)
    last = finish(client)
    assert last["ok"] == 0
    assert last["failed"] == {kind: last["tried"]}


def test_a_slow_answer_counts_as_stalled_though_it_came(lab: Lab) -> None:
    client = start(lab, "short", [bad_server(lab, "slow")])
    time.sleep(0.6)
    last = finish(client)
    assert last["failed"] == {}
    assert last["stalled"] == last["ok"] == last["tried"] >= 1


@pytest.mark.parametrize(("how", "kind"), [("reset", "ECONNRESET"), ("early-eof", "early-eof"), ("gap", "gap")])
def test_a_held_connection_that_is_harmed_is_counted_by_kind(lab: Lab, how: str, kind: str) -> None:
    client = start(lab, "held", [bad_server(lab, how)], "--count", "1", "--http", "0", "--interval", "0.05")
    time.sleep(0.8)
    last = finish(client)
    assert last["alive"] == 0
    assert last["trouble"] == {kind: 1}
    assert last["received"] == 2, "the first two messages came back well"
    assert last["sent"] == 3


def test_a_held_message_that_is_late_counts_as_stalled(lab: Lab) -> None:
    client = start(lab, "held", [bad_server(lab, "slow")], "--count", "1", "--http", "0", "--interval", "0.05")
    time.sleep(1.6)
    last = finish(client)
    assert last["stalled"] == 1
    assert last["received"] >= 3
