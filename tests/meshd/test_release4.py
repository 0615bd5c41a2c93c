"""What release 4 does that no release before it did: against real servers and clients."""

from __future__ import annotations

import json
import socket
import time
from ipaddress import ip_address, ip_network
from typing import Any, cast

import pytest
from click.testing import CliRunner

import hitless
from hitless.errors import KernelError
from meshd.access import AccessLog, Connection
from meshd.cli import main
from meshd.demo.lab import BACKENDS4, BACKENDS6
from meshd.demo.mesh import Lines
from meshd.model import Backend, Locality, Policy, Service
from meshd.recall import recall
from meshd.reconcile import Changes, Writer
from meshd.registry import Registry
from meshd.releases import RELEASES
from tests.meshd.labmesh import A6, PORT, VIP, VIP6, A, B, Mesh, denied, service, until

C = BACKENDS4[2]


def dns(*backends: str | tuple[str, int], address: str = VIP, **more: object) -> dict[str, Any]:
    return service("dns", address, *backends, port=53, protocol="udp", **more)


def counts_of(mesh: Mesh) -> dict[str, int]:
    return {name: len(mesh.node.map(name).items()) for name in ("service", "slot", "member")}


def tables_of(mesh: Mesh) -> dict[int, int]:
    """Tables by ports in network order."""
    return {key["port"]: value["table"] for key, value in mesh.node.map("service").items()}


# UDP


@pytest.mark.parametrize("way", ["fresh", "one", "connected"])
def test_a_datagram_reaches_a_backend_and_the_answer_seems_to_come_from_the_service(mesh: Mesh, way: str) -> None:
    mesh.write([dns(A), service("dns6", VIP6, A6, port=53, protocol="udp")])
    mesh.start_here()
    said = mesh.ask(VIP, count=3, way=way)
    assert (said["answers"], said["sources"]) == ({A: 3}, [f"('{VIP}', 53)"])
    said = mesh.ask(VIP6, count=3, way=way)
    assert (said["answers"], said["sources"]) == ({A6: 3}, [f"('{VIP6}', 53)"])
    said = mesh.ask(f"::ffff:{VIP}", count=3, way=way)
    assert (said["answers"], said["sources"]) == ({A: 3}, [f"('::ffff:{VIP}', 53)"])


def test_a_connected_udp_socket_sees_the_service_as_its_peer(mesh: Mesh) -> None:
    mesh.write([dns(A)])
    mesh.start_here()
    assert mesh.ask(VIP, way="connected")["peers"] == [f"('{VIP}', 53)"]
    assert mesh.ask(A, way="connected", port=PORT)["peers"] == [f"('{A}', {PORT})"], "what is no service is left alone"


def test_tcp_and_udp_on_one_port_are_two_services(mesh: Mesh) -> None:
    mesh.write([service("tcp", VIP, A, port=53), dns(B)])
    mesh.start_here()
    assert mesh.connect(VIP, port=53)["answers"] == {A: 1}
    assert mesh.ask(VIP)["answers"] == {B: 1}


def test_datagrams_of_fresh_sockets_are_spread_and_one_socket_keeps_its_backend(mesh: Mesh) -> None:
    mesh.write([dns(A, B)])
    mesh.start_here()
    spread = mesh.ask(VIP, count=200)["answers"]
    assert 60 < spread[A] < 140, "half of 200, within five standard deviations"
    assert sorted(mesh.ask(VIP, count=50, way="one")["answers"].values()) == [50]
    assert mesh.counters()["opened"] == 201, "a socket's first datagram is counted"


def test_a_socket_leaves_a_backend_that_is_gone(mesh: Mesh) -> None:
    mesh.write([dns(A)])
    mesh.start_here()
    held = Lines(mesh.python("asking", VIP, "53", cgroup="clients"))
    assert held.wait_for({}, 5)["answer"] == A
    mesh.set([dns(B)])
    assert held.process.stdin is not None
    held.process.stdin.write("\n")
    held.process.stdin.flush()
    assert held.wait_for({}, 5)["answer"] == B
    held.process.stdin.close()


def test_udp_without_a_backend_is_refused_and_with_a_policy_denied(mesh: Mesh) -> None:
    mesh.write([dns(), service("other", VIP, A, port=54, protocol="udp")], [denied("other")])
    mesh.start_here()
    for way in ("fresh", "connected"):
        assert mesh.ask(VIP, way=way)["errors"] == {"ECONNREFUSED": 1}
        assert mesh.ask(VIP, way=way, port=54, cgroup="denied")["errors"] == {"EPERM": 1}
        assert mesh.ask(VIP, way=way, port=54)["answers"] == {A: 1}
    counted = mesh.counters()
    assert (counted["refused"], counted["denied"]) == (2, 2)


# Affinity


def test_a_client_keeps_its_backend_for_as_long_as_the_service_says(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A, B, affinity=1), service("any", VIP, A, B, port=81)])
    mesh.start_here()
    assert sorted(mesh.connect(VIP, count=60)["answers"].values()) == [60]
    assert len(mesh.connect(VIP, count=60, port=81)["answers"]) == 2
    (key,) = (key for key, _ in mesh.node.map("affinity").items())
    value = mesh.node.map("affinity").get(key)
    seen = set()
    for _ in range(30):  # as if the last connect had been long ago
        mesh.node.map("affinity")[key] = value | {"last_ns": 1}
        seen |= mesh.connect(VIP)["answers"].keys()
        if len(seen) == 2:
            break
    assert seen == {A, B}


def test_a_client_keeps_its_backend_when_another_connect_of_it_was_a_moment_quicker(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A, B, affinity=600)])
    mesh.start_here()
    (first,) = mesh.connect(VIP)["answers"]
    kept = mesh.node.map("affinity")
    ((key, value),) = kept.items()
    for _ in range(12):  # the other one wrote after this one asked what time it is
        kept[key] = {**value, "last_ns": time.monotonic_ns() + 10**10}
        assert mesh.connect(VIP)["answers"] == {first: 1}


def test_a_client_leaves_a_backend_that_is_gone_and_only_that(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A, B, affinity=600)])
    mesh.start_here()
    (first,) = mesh.connect(VIP, count=5)["answers"]
    other = B if first == A else A
    mesh.set([service("web", VIP, A, B, C, affinity=600)])
    assert mesh.connect(VIP, count=20)["answers"] == {first: 20}, "another backend came, and that changes nothing"
    mesh.set([service("web", VIP, other, affinity=600)])
    assert mesh.connect(VIP, count=5)["answers"] == {other: 5}
    mesh.set([service("web", VIP, A, B, affinity=600)])
    assert mesh.connect(VIP, count=20)["answers"] == {other: 20}


# Who gets new connections


def test_weights_of_many_backends_are_respected(mesh: Mesh) -> None:
    weights = [1, 2, 3, 5, 8]
    ends = list(zip(BACKENDS4[3:], weights, strict=True))
    server = Lines(mesh.python("serve", *BACKENDS4[3:]))
    server.wait_for({"ready": (True,)}, 10)
    mesh.write([service("web", VIP, *ends)])
    mesh.start_here()
    answers = mesh.connect(VIP, count=1900)["answers"]
    chi = sum((answers.get(end, 0) - 100 * weight) ** 2 / (100 * weight) for end, weight in ends)
    assert chi < 30, f"{answers}: with 4 degrees of freedom 23.5 is exceeded once in 10,000 runs"


def test_clients_fail_over_to_farther_backends_and_come_back(mesh: Mesh) -> None:
    def web(*near_health: bool) -> dict[str, Any]:
        made = service("web", VIP, A, B, local=True)
        made["backends"][0].update(locality={"region": "eu", "zone": "eu-1"}, healthy=near_health[0])
        made["backends"][1].update(locality={"region": "us", "zone": "us-1"}, healthy=near_health[1])
        return made

    mesh.write([web(True, True)])
    mesh.start_here(Locality("eu", "eu-1", "n1"))
    assert mesh.connect(VIP, count=20)["answers"] == {A: 20}
    for health, wanted in (((False, True), {B}), ((False, False), {A, B}), ((True, True), {A})):
        mesh.set([web(*health)])
        assert set(mesh.connect(VIP, count=30)["answers"]) == wanted


# Policies


def test_a_policy_by_destination_is_obeyed_and_the_narrower_one_goes_first(mesh: Mesh) -> None:
    deny = {"action": "deny", "destination": "10.1.0.0/24", "source": {"cgroup": "denied"}}
    allow = {"action": "allow", "destination": f"{B}/32", "source": {"cgroup": "denied"}}
    mesh.write([service("web", VIP, A)], [deny, allow, {"action": "deny", "destination": "fd00:1::/64"}])
    mesh.start_here()
    assert mesh.connect(A, cgroup="denied", port=PORT)["errors"] == {"EPERM": 1}
    assert mesh.connect(B, cgroup="denied", port=PORT)["answers"] == {B: 1}
    assert mesh.connect(A, port=PORT)["answers"] == {A: 1}, "another client"
    assert mesh.connect(A6, port=PORT)["errors"] == {"EPERM": 1}, "any client"
    assert mesh.ask(A, cgroup="denied", port=PORT)["answers"] == {A: 1}, "a policy is for TCP unless it says udp"
    assert mesh.connect(VIP, cgroup="denied")["answers"] == {A: 1}, "the service was asked for, not its backend"
    assert sorted(value["hits"] for value in mesh.values("outbound")) == [1, 1, 1]
    assert [value["count"] for value in mesh.values("denial")] == [1, 1]


def test_of_policies_by_destination_the_own_cgroup_then_the_port_then_the_prefix_decides(mesh: Mesh) -> None:
    own = {"source": {"cgroup": "denied"}}
    mesh.write(
        [service("web", VIP, A)],
        [
            {"action": "deny", "destination": f"{A}/32", "port": PORT},
            {"action": "allow", "destination": "0.0.0.0/0", **own},
            {"action": "deny", "destination": f"{B}/32", **own},
            {"action": "allow", "destination": "10.0.0.0/8", "port": PORT, **own},
            {"action": "deny", "destination": "10.96.0.0/16", **own},
            {"action": "allow", "service": "web", **own},
        ],
    )
    mesh.start_here()
    assert mesh.connect(A, port=PORT)["errors"] == {"EPERM": 1}
    assert mesh.connect(A, cgroup="denied", port=PORT)["answers"] == {A: 1}, "its own cgroup goes before any"
    assert mesh.connect(B, cgroup="denied", port=PORT)["answers"] == {B: 1}, "the port goes before the prefix"
    assert mesh.connect(VIP, cgroup="denied")["answers"] == {A: 1}, "the service goes before its address"
    assert mesh.connect(VIP, cgroup="denied", port=81)["errors"] == {"EPERM": 1}


def test_a_policy_by_clients_is_obeyed_by_servers_in_the_mesh(mesh: Mesh) -> None:
    server = Lines(mesh.python("serve", C, BACKENDS6[2], cgroup="mesh"))
    server.wait_for({"ready": (True,)}, 10)
    mesh.write(
        [],
        [
            {"action": "deny", "clients": "10.1.0.0/24"},
            {"action": "deny", "clients": "fd00:1::/64", "port": PORT},
            {"action": "deny", "clients": "10.1.0.0/24", "protocol": "udp"},
        ],
    )
    mesh.start_here()
    for address in (C, BACKENDS6[2]):
        assert mesh.connect(address, port=PORT, seconds=0.3)["errors"] == {"timed out": 1}
    assert mesh.ask(C, port=PORT)["errors"] == {"timed out": 1}
    assert mesh.connect(A, port=PORT)["answers"] == {A: 1}, "a server outside of the mesh hears everybody"
    allow = {"action": "allow", "clients": f"{C}/32"}  # a client on lo has its server's address
    mesh.set([], [{"action": "deny", "clients": "10.1.0.0/24"}, allow, {**allow, "protocol": "udp"}])
    assert mesh.connect(C, port=PORT)["answers"] == {C: 1}, "the longer prefix"
    assert mesh.ask(C, port=PORT)["answers"] == {C: 1}
    hits = {key["proto"]: value["hits"] for key, value in mesh.node.map("inbound").items() if key["prefixlen"] == 160}
    assert hits == {6: 1, 17: 2}, "a connection is judged once, and of datagrams the answer as well as the question"


# A destination option that says nothing, before the segment or datagram.
HIDDEN = """
import socket, sys
kind = socket.SOCK_STREAM if sys.argv[3] == "tcp" else socket.SOCK_DGRAM
with socket.socket(socket.AF_INET6, kind) as one:
    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))
    one.settimeout(float(sys.argv[4]))
    one.connect((sys.argv[1], int(sys.argv[2])))
    one.send(b"?")
    assert one.recv(1)
"""


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_policy_by_clients_sees_through_extension_headers(mesh: Mesh, protocol: str) -> None:
    server = Lines(mesh.python("serve", BACKENDS6[2], cgroup="mesh"))
    server.wait_for({"ready": (True,)}, 10)
    mesh.write([])
    mesh.start_here()
    hidden = ("-c", HIDDEN, BACKENDS6[2], str(PORT), protocol)
    assert mesh.lab.run_python(*hidden, "5", cgroup="outside").returncode == 0
    mesh.set([], [{"action": "deny", "clients": "fd00:1::/64", "port": PORT, "protocol": protocol}])
    assert "timed out" in mesh.lab.run_python(*hidden, "0.3", cgroup="outside").stderr
    assert [value["hits"] > 0 for value in mesh.values("inbound")] == [True]


def test_an_answer_to_a_client_in_the_mesh_is_not_taken_for_a_question(mesh: Mesh) -> None:
    mesh.write([dns(A)], [{"action": "deny", "clients": "0.0.0.0/0", "protocol": "udp"}])
    mesh.start_here()
    for way in ("fresh", "connected"):
        assert mesh.ask(VIP, way=way)["answers"] == {A: 1}


# What is seen


def test_a_services_bytes_are_what_its_client_counted(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A), service("web6", VIP6, A6)])
    mesh.start_here()
    own = mesh.transfer(0, 0, 1, 1, 1000, 100_000, 3_000_000, 3_000_001)
    assert until(lambda: mesh.counters()["closed"] == 8)
    counted = mesh.counters()
    assert {"sent": counted["sent"], "received": counted["received"]} == own
    assert counted["srtt_us"] > 0
    own6 = mesh.transfer(5000, 5000, address=VIP6)
    assert until(lambda: mesh.counters()["closed"] == 10)
    counted = mesh.counters()
    assert counted["sent"] == own["sent"] + own6["sent"]
    assert counted["received"] == own["received"] + own6["received"]


def log_of(mesh: Mesh, count: int) -> list[Connection]:
    log, found = AccessLog(mesh.node), list[Connection]()
    assert until(lambda: len(found.extend(log.take()) or found) >= count)  # type: ignore[func-returns-value]
    return found


def test_the_access_log_has_a_record_for_every_connection(mesh: Mesh) -> None:
    dead = service("dead", VIP, A, port=82)
    dead["backends"][0]["port"] = 9
    mesh.write([service("web", VIP, A), service("none", VIP, port=81), dead], [denied("web")])
    mesh.start_here(access_log=True)
    own = mesh.transfer(10, 5000)
    mesh.connect(VIP, cgroup="denied")
    mesh.connect(VIP, port=81)
    mesh.connect(VIP, port=82)
    mesh.connect(A, port=PORT)
    found = log_of(mesh, 5)
    assert sorted(one.verdict for one in found) == ["closed", "closed", "denied", "failed", "refused"]
    by = {one.verdict: one for one in found}
    closed = [one for one in found if one.verdict == "closed"]
    assert {"sent": sum(one.sent for one in closed), "received": sum(one.received for one in closed)} == own
    for one in closed:
        assert (str(one.service.address), one.service.port, one.protocol) == (VIP, 80, "tcp")
        assert one.backend is not None
        assert (str(one.backend.address), one.backend.port) == (A, PORT)
        assert one.start < one.end < one.start + 10
        assert one.rtt > 0
        assert one.client == mesh.lab.cgroup_of("clients").stat().st_ino
    assert by["denied"].client == mesh.lab.cgroup_of("denied").stat().st_ino
    assert by["denied"].backend is None
    assert (by["refused"].service.port, by["failed"].service.port) == (81, 82)


def test_the_access_log_is_off_unless_it_is_asked_for(mesh: Mesh) -> None:
    mesh.start(4)
    mesh.connect(VIP, count=3)
    assert until(lambda: mesh.counters()["closed"] == 3)
    assert AccessLog(mesh.node).take() == []
    mesh.stop()
    mesh.start(4, options=("--access-log",))
    mesh.connect(VIP, count=2)
    assert len(log_of(mesh, 2)) == 2


def test_a_thousand_connections_are_a_thousand_records(mesh: Mesh) -> None:
    mesh.start_here(access_log=True)
    log, found = AccessLog(mesh.node), list[Connection]()
    for _ in range(2):
        assert mesh.connect(VIP, count=500)["answers"] == {A: 500}
        found += log.take()
    assert until(lambda: len(found.extend(log.take()) or found) >= 1000)  # type: ignore[func-returns-value]
    assert len(found) == 1000
    assert {one.verdict for one in found} == {"closed"}


def explained(mesh: Mesh, where: str, *options: str) -> dict[str, Any]:
    args = ["explain", where, "--root", str(mesh.root), *options]
    done = CliRunner().invoke(main, [*args, "--json"])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.output)
    for backend in result["backends"]:
        assert backend["address"] in CliRunner().invoke(main, args).output
    return result


def test_explain_says_who_would_be_chosen_and_why(mesh: Mesh) -> None:
    web = service("web", VIP, (A, 1), (B, 3), C, affinity=60, local=True)
    for index, zone in enumerate(("eu-1", "eu-1", "us-1")):
        web["backends"][index]["locality"] = {"region": zone[:2], "zone": zone}
    mesh.write([web, dns()], [denied("web"), {"action": "deny", "destination": "10.1.0.0/16", "port": 22}])
    mesh.start(4, options=("--locality", "eu/eu-1"))
    found = explained(mesh, f"{VIP}:80")
    assert found["outcome"] == "served"
    assert {one["address"]: round(one["share"], 6) for one in found["backends"]} == {A: 0.25, B: 0.75}
    assert (found["level"], found["affinity"], found["known"], found["healthy"]) == ("zone", 60, 3, 3)
    assert found["policy"] is None
    found = explained(mesh, f"{VIP}:80", "--client", str(mesh.lab.cgroup_of("denied")))
    assert (found["outcome"], found["policy"]["kind"], found["policy"]["action"]) == ("denied", "service", "deny")
    assert explained(mesh, f"{VIP}:53/udp")["outcome"] == "refused"
    assert explained(mesh, f"{A}:80")["outcome"] == "passed"
    found = explained(mesh, f"{A}:22")
    assert (found["outcome"], found["policy"]["destination"]) == ("denied", "10.1.0.0/16")


@pytest.mark.parametrize("release", [1, 2, 3])
def test_explain_knows_older_releases(mesh: Mesh, release: int) -> None:
    mesh.write([service("web", VIP, (A, 1), (B, 3))])
    mesh.start(release)
    found = explained(mesh, f"{VIP}:80")
    assert {one["address"]: one["share"] for one in found["backends"]} == {A: 0.25, B: 0.75}
    assert (found["outcome"], found["table"]) == ("served", None)


@pytest.mark.parametrize("where", ["10.96.0.10", "x:80", f"{VIP}:0", f"{VIP}:80/icmp"])
def test_explain_refuses_what_is_no_address_and_port(where: str) -> None:
    done = CliRunner().invoke(main, ["explain", where, "--root", "/nowhere"])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit)


def test_explain_without_a_mesh_says_so(mesh: Mesh) -> None:
    done = CliRunner().invoke(main, ["explain", f"{VIP}:80", "--root", str(mesh.root)])
    assert done.exit_code == 1
    assert "no mesh is live" in done.stderr


# The control plane's side


@pytest.mark.parametrize("release", [1, 2, 3, 4])
def test_what_the_maps_hold_can_be_recalled(mesh: Mesh, release: int) -> None:
    mesh.write([service("web", VIP, (A, 2), (B, 3)), service("web6", VIP6, A6)], [denied("web", action="allow")])
    mesh.start(release)
    found = recall(mesh.node)
    web, web6 = sorted(found.services, key=lambda one: one.address.version)
    assert web == Service(
        f"{VIP}.80.tcp", ip_address(VIP), 80, "tcp",
        (Backend(ip_address(A), PORT, 2), Backend(ip_address(B), PORT, 3)),
    )  # fmt: skip
    assert (web6.address, web6.backends) == (ip_address(VIP6), (Backend(ip_address(A6), PORT),))
    source = mesh.lab.cgroup_of("denied").stat().st_ino
    assert found.policies == (Policy("allow", web.name, None, source),)


def test_policies_by_addresses_are_recalled(mesh: Mesh) -> None:
    mesh.write(
        [dns(A, affinity=7)],
        [
            {"action": "deny", "destination": "10.0.0.0/8", "port": 22, "source": {"cgroup": "denied"}},
            {"action": "allow", "clients": "fd00::/16", "protocol": "udp"},
        ],
    )
    mesh.start_here()
    found = recall(mesh.node)
    assert [(one.protocol, one.affinity) for one in found.services] == [("udp", 7)]
    source = mesh.lab.cgroup_of("denied").stat().st_ino
    assert set(found.policies) == {
        Policy("deny", source=source, destination=ip_network("10.0.0.0/8"), port=22),
        Policy("allow", clients=ip_network("fd00::/16"), protocol="udp"),
    }


def test_a_change_leaves_no_slot_behind(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A, B), dns(A, B)])
    mesh.start_here()
    assert counts_of(mesh) == {"service": 2, "slot": 4, "member": 2}
    assert mesh.set([service("web", VIP, A, B, C), dns(B)]) == Changes(changed=2)
    assert counts_of(mesh) == {"service": 2, "slot": 4, "member": 1}
    assert mesh.set([service("web", VIP)]) == Changes(changed=1, removed=1)
    assert counts_of(mesh) == {"service": 1, "slot": 0, "member": 0}
    assert not mesh.set([service("web", VIP)])
    assert not mesh.resync()


def test_a_change_of_one_service_leaves_the_tables_of_others(mesh: Mesh) -> None:
    mesh.write([service(f"web{n}", VIP, A, B, port=n) for n in range(1, 21)])
    mesh.start_here()
    before = tables_of(mesh)
    mesh.set([service(f"web{n}", VIP, *((A, B) if n != 7 else (A,)), port=n) for n in range(1, 21)])
    changed = {key for key, table in tables_of(mesh).items() if before[key] != table}
    assert changed == {socket.htons(7)}


def test_what_someone_else_broke_is_put_right(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A, B), dns(A), service("lost", VIP, A, port=81)], [denied("web")])
    mesh.start_here()
    node = mesh.node
    slot, member, services, policies = (node.map(name) for name in ("slot", "member", "service", "policy"))
    key, value = slot.items()[0]
    slot[key] = value | {"port": 9}
    del member[member.items()[0][0]]
    lost = next(key for key, _ in services.items() if key["port"] == socket.htons(81))
    services[dict(lost, port=5)] = services.get(lost)
    del services[lost]
    (policy,) = (key for key, _ in policies.items())
    policies[policy] = {"action": 0, "hits": 41, "last_ns": 1}
    policies[dict(policy, source=99)] = {"action": 1, "hits": 0, "last_ns": 0}
    assert mesh.resync()
    assert counts_of(mesh) == {"service": 3, "slot": 4, "member": 1}
    assert [(value["action"], value["hits"]) for _, value in policies.items()] == [(1, 41)]
    assert mesh.connect(VIP, count=20)["errors"] == {}
    assert mesh.connect(VIP, port=81)["answers"] == {A: 1}
    assert mesh.ask(VIP)["answers"] == {A: 1}
    assert not mesh.resync()


def test_a_table_that_nobody_names_is_swept_when_two_looks_have_found_it(mesh: Mesh) -> None:
    mesh.start_here()
    slot = mesh.node.map("slot")
    value = slot.items()[0][1]
    for index in range(3):
        slot[{"table": 77, "index": index}] = value
    mesh.resync()
    assert counts_of(mesh)["slot"] == 5, "another daemon may be about to name it"
    mesh.resync()
    assert counts_of(mesh)["slot"] == 2


class Refusing:
    """A node whose maps refuse one write: that of number ``left``, counted down to it."""

    def __init__(self, node: hitless.Node) -> None:
        self._node = node
        self.left = 0

    def map(self, name: str) -> Any:
        return RefusingMap(self, self._node.map(name))


class RefusingMap:
    """See :class:`Refusing`."""

    def __init__(self, node: Refusing, handle: hitless.MapHandle) -> None:
        self._node = node
        self._handle = handle

    def __getattr__(self, method: str) -> Any:
        if method in ("update_rows", "delete_rows"):
            self._node.left -= 1
            if self._node.left == 0:
                raise KernelError(f"{method} is refused")
        return getattr(self._handle, method)


def test_a_write_that_ends_half_way_is_put_right_by_the_next_look(mesh: Mesh) -> None:
    mesh.write([])
    mesh.start_here()
    refusing = Refusing(mesh.node)
    for number in range(1, 9):
        registry, writer = Registry(["file"], RELEASES[4]), Writer(cast("hitless.Node", refusing), RELEASES[4])
        before = [service("web", VIP, A), dns(A, B), service("old", VIP, A, port=9)], [denied("old"), denied("web")]
        mesh.write(*before)
        registry.replace("file", mesh.parsed())
        writer.resync(registry.all())
        mesh.write([service("web", VIP, B), dns(B), service("new", VIP, B, port=10)], [denied("new")])
        registry.replace("file", mesh.parsed())
        refusing.left = number
        with pytest.raises(KernelError, match="refused"):
            writer.write(registry.take_news())
        assert mesh.connect(VIP)["errors"] == {}, "it is served at any moment"
        writer.resync(registry.all())
        assert mesh.connect(VIP)["answers"] == {B: 1}
        assert mesh.connect(VIP, port=10, cgroup="denied")["errors"] == {"EPERM": 1}
        writer.resync(registry.all())  # what nobody names is deleted at the second look
        assert counts_of(mesh) == {"service": 3, "slot": 3, "member": 1}
        assert len(mesh.values("policy")) == 1
        assert not writer.resync(registry.all())


def test_a_restart_writes_nothing_that_is_there_already(mesh: Mesh) -> None:
    empty = [service("none", VIP, port=9), service("nobody", VIP, port=10, protocol="udp")]
    mesh.write([service("web", VIP, A, (B, 7)), dns(A, B), *empty], [denied("web")])
    mesh.start_here()
    assert not mesh.resync()
    before = tables_of(mesh)
    mesh.connect(VIP, cgroup="denied")
    mesh.start(4)
    assert tables_of(mesh) == before
    assert [value["hits"] for value in mesh.values("policy")] == [1]


def test_the_newest_release_is_the_default() -> None:
    assert "[default: 4]" in CliRunner().invoke(main, ["run", "--help"]).output
