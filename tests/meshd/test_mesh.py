"""The mesh does what its services file says, on the real kernel, in every release."""

from __future__ import annotations

import pytest

from tests.meshd.labmesh import A6, VIP, VIP6, A, B, Mesh, denied, service, until

RELEASES = pytest.mark.parametrize("release", [1, 2, 3, 4])
COUNTER = {1: "counter", 2: "service_counter", 3: "service_counter", 4: "service_counter"}


@RELEASES
def test_a_connection_to_the_service_address_reaches_a_backend(mesh: Mesh, release: int) -> None:
    assert mesh.start(release)["start_type"] == "normal"
    assert mesh.connect(VIP)["answers"] == {A: 1}
    assert mesh.connect(VIP6)["answers"] == {A6: 1}
    assert mesh.connect(f"::ffff:{VIP}")["answers"] == {A: 1}, "an IPv6 socket may connect to an IPv4 service"


@RELEASES
def test_only_processes_in_the_meshs_cgroup_are_in_the_mesh(mesh: Mesh, release: int) -> None:
    mesh.start(release)
    assert mesh.connect(VIP, cgroup="outside")["errors"] == {"ENETUNREACH": 1}
    assert mesh.connect(VIP, port=81)["errors"] == {"ENETUNREACH": 1}, "another port is no service"
    assert mesh.connect(A, port=8080)["answers"] == {A: 1}, "what is no service is left alone"


@RELEASES
def test_weights_are_respected(mesh: Mesh, release: int) -> None:
    mesh.write([service("web", VIP, (A, 1), (B, 3))])
    mesh.start(release)
    answers = mesh.connect(VIP, count=800)["answers"]
    assert answers[A] + answers[B] == 800
    assert 140 < answers[A] < 260, "a quarter of 800, within five standard deviations"


@RELEASES
def test_a_backend_of_weight_zero_and_a_service_without_backends_get_nothing(mesh: Mesh, release: int) -> None:
    mesh.write([service("web", VIP, (A, 0), (B, 5)), service("none", VIP, port=81)])
    mesh.start(release)
    assert mesh.connect(VIP, count=50)["answers"] == {B: 50}
    assert mesh.connect(VIP, port=81)["errors"] == {"ECONNREFUSED": 1}
    assert mesh.counters(COUNTER[release])["refused"] == 1


@RELEASES
def test_a_denied_client_gets_eperm_while_another_connects(mesh: Mesh, release: int) -> None:
    mesh.write([service("web", VIP, A), service("web6", VIP6, A6)], [denied("web"), denied("web6")])
    mesh.start(release)
    for address in (VIP, f"::ffff:{VIP}", VIP6):
        assert mesh.connect(address, count=5, cgroup="denied")["errors"] == {"EPERM": 5}
        assert mesh.connect(address, count=5)["errors"] == {}
    assert sorted(value["hits"] for value in mesh.values("policy")) == [5, 10]


@RELEASES
def test_a_policy_for_one_cgroup_goes_before_the_one_for_all(mesh: Mesh, release: int) -> None:
    deny_all = {"action": "deny", "service": "web"}
    mesh.write([service("web", VIP, A)], [deny_all, denied("web", cgroup="clients", action="allow")])
    mesh.start(release)
    assert mesh.connect(VIP, cgroup="denied")["errors"] == {"EPERM": 1}
    assert mesh.connect(VIP, cgroup="clients")["answers"] == {A: 1}


@RELEASES
def test_flow_entries_appear_and_go_with_their_connections(mesh: Mesh, release: int) -> None:
    mesh.start(release)
    held = mesh.hold(VIP, 5)
    flows = {key: value for key, value in mesh.node.map("flow").items() if isinstance(value, dict)}
    assert set(flows) == set(held.cookies)
    for value in flows.values():
        assert value["state"] == 2, "established"
        assert value["service"]["addr"].endswith(bytes([10, 96, 0, 10]))
        assert value["backend"]["addr"].endswith(bytes([10, 1, 0, 1]))
    held.close()
    assert until(lambda: not mesh.values("flow"))


@RELEASES
def test_counters_equal_the_clients_own_count(mesh: Mesh, release: int) -> None:
    mesh.write([service("web", VIP, A), service("web6", VIP6, A6), service("dead", VIP, A, port=81)], [denied("web")])
    mesh.start(release)
    assert mesh.connect(VIP, count=300)["answers"] == {A: 300}
    assert mesh.connect(VIP6, count=200)["answers"] == {A6: 200}
    assert mesh.connect(VIP, count=7, cgroup="denied")["errors"] == {"EPERM": 7}
    assert until(lambda: mesh.counters(COUNTER[release])["closed"] == 500)
    counted = mesh.counters(COUNTER[release])
    assert (counted["opened"], counted["established"], counted["refused"]) == (500, 500, 0)
    if release > 1:
        assert counted["denied"] == 7
        assert [value["count"] for value in mesh.values("denial")] == [7]


def test_a_connect_that_fails_leaves_no_flow_and_release_3_counts_it(mesh: Mesh) -> None:
    dead = service("dead", VIP, A)
    dead["backends"][0]["port"] = 9
    mesh.write([dead])
    mesh.start(3)
    assert mesh.connect(VIP, count=20)["errors"] == {"ECONNREFUSED": 20}
    assert until(lambda: not mesh.values("flow"))
    counted = mesh.counters()
    assert {name: counted[name] for name in ("opened", "established", "closed", "failed")} == {
        "opened": 20,
        "established": 0,
        "closed": 20,
        "failed": 20,
    }


def test_from_release_3_on_a_client_sees_the_service_as_its_peer(mesh: Mesh) -> None:
    mesh.start(3)
    assert mesh.connect(VIP)["peers"] == [f"('{VIP}', 80)"]
    assert mesh.connect(VIP6)["peers"] == [f"('{VIP6}', 80)"]
    assert mesh.connect(A, port=8080)["peers"] == [f"('{A}', 8080)"]
