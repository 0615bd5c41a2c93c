"""An upgrade of the mesh keeps connections, policies, flows and counters, and loses only what it was allowed to."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.meshd.labmesh import A6, VIP, VIP6, A, B, Mesh, denied, service, until

# What release 1 has no place for, given up by name.
BACK_TO_1 = ("service", "policy", "flow", "service_counter", "denial")
# What release 3 has no place for; its service entries are written anew before a hook runs it.
BACK_TO_3 = (
    "service", "slot", "member", "service_counter", "affinity", "reply", "outbound", "inbound", "settings", "access",
)  # fmt: skip
COUNTER = {1: "counter", 2: "service_counter", 3: "service_counter", 4: "service_counter"}
STEPS = [(2, ()), (3, ()), (4, ()), (3, BACK_TO_3), (1, BACK_TO_1), (2, ()), (4, ())]


@contextmanager
def traffic(mesh: Mesh, address: str, cgroup: str = "clients") -> Iterator[dict[str, Any]]:
    """Connects as fast as one client can while the block runs; the result is complete behind it."""
    client = mesh.python("connect", address, "80", "1000000", cgroup=cgroup)
    result: dict[str, Any] = {}
    try:
        yield result
    finally:
        client.send_signal(signal.SIGINT)
        assert client.stdout is not None
        result.update(json.loads(client.stdout.readline()))
        client.wait(10)


def test_an_upgrade_there_and_back_keeps_policies_flows_and_counters(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A, B), service("web6", VIP6, A6)], [denied("web"), denied("web6")])
    mesh.start(1)
    held = [mesh.hold(VIP, 20), mesh.hold(VIP6, 20)]
    cookies = {cookie for one in held for cookie in one.cookies}
    opened, hits = 40, 0
    for release, allow_loss in STEPS:
        opened += sum(mesh.connect(VIP, count=50)["answers"].values())
        assert mesh.connect(VIP6, count=10, cgroup="denied")["errors"] == {"EPERM": 10}
        hits += 10
        assert until(lambda: len(mesh.values("flow")) == 40)
        mesh.stop()
        event = mesh.start(release, *allow_loss)
        assert (event["event"], event["start_type"], event["version"]) == ("upgraded", "update", f"{release}.0.0")

        assert [one.alive() for one in held] == [20, 20]
        flows = {key: value for key, value in mesh.node.map("flow").items() if isinstance(value, dict)}
        assert set(flows) == cookies
        assert {value["state"] for value in flows.values()} == {2}
        assert sorted(value["hits"] for value in mesh.values("policy")) == [0, hits]
        counted = mesh.counters(COUNTER[release])
        assert (counted["opened"], counted["established"], counted["closed"]) == (opened, opened, opened - 40)
    for one in held:
        one.close()
    assert until(lambda: not mesh.values("flow")), "a connection opened under one release ends under another"
    assert until(lambda: mesh.counters(COUNTER[2])["closed"] == opened)


def test_times_of_a_flow_survive_their_renaming(mesh: Mesh) -> None:
    mesh.start(1)
    held = mesh.hold()
    began = mesh.values("flow")[0]["times"]["opened_ns"]
    assert began > 0
    for release, allow_loss, name in ((2, (), "start_ns"), (3, (), "start_ns"), (1, BACK_TO_1, "opened_ns")):
        mesh.stop()
        mesh.start(release, *allow_loss)
        assert mesh.values("flow")[0]["times"][name] == began
    held.close()


def test_traffic_during_upgrades_is_neither_failed_nor_miscounted(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A, B), service("web6", VIP6, A6)], [denied("web")])
    mesh.start(1)
    with traffic(mesh, VIP) as four, traffic(mesh, VIP6) as six, traffic(mesh, VIP, "denied") as blocked:
        for release, allow_loss in STEPS:
            mesh.stop()
            mesh.start(release, *allow_loss)
    tried = 0
    for result in (four, six):
        assert result["errors"] == {}
        tried += sum(result["answers"].values())
    assert blocked["answers"] == {}, "the policy held at every moment"
    assert until(lambda: not mesh.values("flow")), "no flow of a connection that is over was brought back for good"
    counted = mesh.counters("service_counter")
    assert counted["opened"] == counted["established"] == counted["closed"] == tried
    (policy,) = mesh.values("policy")
    assert {"EPERM": policy["hits"]} == blocked["errors"]


def test_a_file_that_changes_all_the_time_is_obeyed_during_upgrades(mesh: Mesh) -> None:
    mesh.start(1)
    with traffic(mesh, VIP) as result:
        for turn, (release, allow_loss) in enumerate(STEPS):
            older = mesh.daemon
            assert older is not None
            mesh.stop()
            mesh.start(release, *allow_loss)
            for port in range(100, 110):
                mesh.write([service("web", VIP, (A, B)[turn % 2]), service("other", VIP, A, port=port)])
            assert until(lambda: mesh.connect(VIP, port=109)["errors"] == {})
    assert result["errors"] == {}
    assert len(mesh.values("service")) == 2
    assert set(mesh.connect(VIP, count=20)["answers"]) == {(A, B)[turn % 2]}


@pytest.mark.parametrize(
    ("before", "after", "step"),
    [
        *((1, 2, step) for step in ("stage", "copy", "prepare", "cutover", "catch-up", "commit", "clean-up")),
        *((3, 4, step) for step in ("prepare", "cutover", "catch-up")),
    ],
)
def test_an_upgrade_whose_daemon_is_killed_is_finished_by_the_next_one(
    mesh: Mesh, before: int, after: int, step: str
) -> None:
    mesh.write([service("web", VIP, A, B)], [denied("web")])
    mesh.start(before)
    held = mesh.hold(VIP, 10)
    with traffic(mesh, VIP) as result, traffic(mesh, VIP, "denied") as blocked:
        mesh.stop()
        killed = mesh.launch(after)
        killed.lines.wait_for({"event": ("progress",), "step": (step,)}, 15)
        killed.process.kill()
        killed.process.wait()
        mesh.start(after)
    assert result["errors"] == {}
    assert set(blocked["errors"]) == {"EPERM"}
    assert not blocked["answers"]
    assert held.alive() == 10
    tried = sum(result["answers"].values()) + 10
    counted = mesh.counters()
    assert (counted["opened"], counted["established"]) == (tried, tried)
    assert set(held.cookies) <= {key for key, _ in mesh.node.map("flow").items()}
    held.close()


def test_a_signal_during_an_upgrade_waits_for_its_end(mesh: Mesh) -> None:
    mesh.start(1)
    mesh.stop()
    upgrading = mesh.launch(2)
    upgrading.lines.wait_for({"event": ("progress",), "step": ("stage",)}, 15)
    upgrading.process.terminate()
    assert mesh.next_event(event="upgraded")["version"] == "2.0.0"
    assert mesh.next_event(event="stopped")["exit_type"] == "restart"
    assert upgrading.process.wait(10) == 0
    assert mesh.connect(VIP)["answers"] == {A: 1}


def test_going_back_without_leave_to_lose_is_refused_and_changes_nothing(mesh: Mesh) -> None:
    mesh.start(3)
    mesh.connect(VIP, count=3)
    mesh.stop()
    error = mesh.try_start(1)
    assert (error["event"], error["code"]) == ("error", "loss")
    assert set(error["facts"]["maps"]) >= {"denial", "service"}
    assert mesh.daemon is not None
    assert mesh.daemon.process.wait(5) == 1
    assert mesh.node.observe().version == "3.0.0"
    assert mesh.connect(VIP)["answers"] == {A: 1}


def test_a_release_with_too_little_room_for_the_file_is_refused_before_anything_changes(mesh: Mesh) -> None:
    many = service("web", VIP, *(f"10.1.0.{n}" for n in range(1, 13)))
    mesh.write([many])
    mesh.start(3)
    mesh.stop()
    error = mesh.try_start(1, *BACK_TO_1)
    assert (error["event"], error["field"]) == ("config-error", "services[0].backends")
    assert mesh.node.observe().version == "3.0.0"
    (value,) = mesh.values("service")
    assert value["count"] == 12


def test_the_event_of_an_upgrade_says_what_became_of_each_map(mesh: Mesh) -> None:
    mesh.start(1)
    mesh.stop()
    maps = {entry["name"]: entry for entry in mesh.start(2)["result"]["maps"]}
    assert {name: entry["action"] for name, entry in maps.items()} == {
        "service": "convert",
        "policy": "convert",
        "flow": "convert",
        "service_counter": "convert",
        "denial": "create",
        "origin": "keep",
    }
    assert maps["service_counter"]["was"] == "counter"
    mesh.stop()
    result = mesh.start(3)["result"]
    assert {hook["link"]: hook["action"] for hook in result["hooks"]} == {
        "sockops": "update",
        "connect6": "update",
        "connect4": "update",
        "getpeername6": "attach",
        "getpeername4": "attach",
    }
    assert {entry["name"] for entry in result["maps"] if entry["action"] == "keep"} == {"denial", "origin"}
