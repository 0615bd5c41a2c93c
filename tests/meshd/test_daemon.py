"""The daemon follows its services file, writes only differences, and leaves as it was told to."""

from __future__ import annotations

import os
import time

import pytest

from meshd.reconcile import sweep_flows
from tests.meshd.labmesh import A6, VIP, VIP6, A, B, Mesh, denied, service, until


def test_a_change_of_the_file_reaches_the_running_mesh(mesh: Mesh) -> None:
    mesh.start(1)
    mesh.write([service("web", VIP, B), service("web6", VIP6, A6)])
    mesh.next_event(event="config", changed=1)
    assert mesh.connect(VIP)["answers"] == {B: 1}


def test_a_file_written_in_place_is_noticed_too(mesh: Mesh) -> None:
    mesh.start(1)
    text = mesh.file.read_text()
    mesh.file.write_text(text.replace(A, B))
    mesh.next_event(event="config", changed=1)
    assert mesh.connect(VIP)["answers"] == {B: 1}


def test_only_differences_are_written(mesh: Mesh) -> None:
    mesh.write([service("a", VIP, A), service("b", VIP, A, port=81), service("c", VIP, A, port=82)], [denied("a")])
    mesh.start(2)
    mesh.write([service("a", VIP, A), service("b", VIP, B, port=81), service("d", VIP, A, port=83)], [denied("d")])
    changes = mesh.next_event(event="config", services=3, changed=1)
    assert (changes["added"], changes["removed"]) == (2, 2)
    assert len(mesh.values("service")) == 3
    assert len(mesh.values("policy")) == 1


def test_what_programs_counted_is_not_set_back_by_a_change(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A)], [denied("web")])
    mesh.start(3)
    mesh.connect(VIP, count=5, cgroup="denied")
    mesh.write([service("web", VIP, B)], [denied("web", action="allow")])
    mesh.next_event(event="config", changed=2)
    assert mesh.connect(VIP, cgroup="denied")["answers"] == {B: 1}
    (policy,) = mesh.values("policy")
    assert (policy["action"], policy["hits"]) == (0, 6)
    assert policy["last_ns"] > 0


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("services:\n- {name: web, address: 10.96.0.10, port: 0, backends: []}\n", 2, "services[0].port"),
        ("services: [\n", 2, ""),
        ("", 1, "services"),
    ],
)
def test_a_broken_file_leaves_the_running_configuration(mesh: Mesh, text: str, line: int, field: str) -> None:
    mesh.start(1)
    good = mesh.file.read_text()
    mesh.write_text(text)
    error = mesh.next_event(event="config-error")
    assert (error["file"], error["line"], error["field"]) == (str(mesh.file), line, field)
    assert mesh.connect(VIP)["answers"] == {A: 1}
    mesh.write_text(good.replace(A, B))
    mesh.next_event(event="config", changed=1)
    assert mesh.connect(VIP)["answers"] == {B: 1}


def test_a_file_that_is_gone_leaves_the_running_configuration(mesh: Mesh) -> None:
    mesh.start(1)
    mesh.file.unlink()
    assert "No such file" in mesh.next_event(event="config-error")["message"]
    assert mesh.connect(VIP)["answers"] == {A: 1}


def test_what_someone_else_changed_is_put_right(mesh: Mesh) -> None:
    mesh.start(1)
    service_map = mesh.node.map("service")
    (key, value), *_ = service_map.items()
    assert isinstance(key, dict)
    del service_map[key]
    service_map[dict(key, port=1)] = value
    mesh.file.touch()
    os.utime(mesh.file, (1, 1))
    changes = mesh.next_event(event="config", added=1)
    assert changes["removed"] == 1
    assert mesh.connect(VIP)["answers"] == {A: 1}


def test_a_policy_follows_a_cgroup_that_is_made_anew(mesh: Mesh) -> None:
    pod = mesh.lab.cgroup / "pod"
    pod.mkdir()
    mesh.write([service("web", VIP, A)], [denied("web", cgroup="pod")])
    mesh.start(1)
    pod.rmdir()
    assert "no cgroup2 directory" in mesh.next_event(event="config-error")["message"]
    pod.mkdir()
    changes = mesh.next_event(event="config", policies=1)
    assert (changes["added"], changes["removed"]) == (1, 1)
    ((key, _),) = mesh.node.map("policy").items()
    assert isinstance(key, dict)
    assert key["source"] == pod.stat().st_ino


def test_the_daemons_end_leaves_the_data_path_while_the_file_exists(mesh: Mesh) -> None:
    mesh.start(1)
    mesh.connect(VIP, count=3)
    assert mesh.stop()["exit_type"] == "restart"
    assert mesh.connect(VIP)["answers"] == {A: 1}
    again = mesh.start(1)
    assert (again["event"], again["start_type"]) == ("ready", "restart")
    assert mesh.counters("counter")["opened"] == 4


def test_a_change_made_while_no_daemon_ran_is_taken_up_by_a_restart(mesh: Mesh) -> None:
    mesh.start(1)
    mesh.stop()
    mesh.write([service("web", VIP, B)])
    mesh.start(1)
    assert mesh.connect(VIP)["answers"] == {B: 1}
    assert len(mesh.values("service")) == 1


def test_the_daemons_end_unloads_when_the_file_is_gone(mesh: Mesh) -> None:
    mesh.start(2)
    mesh.file.unlink()
    assert mesh.stop()["exit_type"] == "normal"
    assert mesh.connect(VIP)["errors"] == {"ENETUNREACH": 1}
    assert not mesh.root.exists()


@pytest.mark.parametrize(("exit_type", "file_there"), [("normal", True), ("restart", False)])
def test_the_exit_type_can_be_given(mesh: Mesh, exit_type: str, file_there: bool) -> None:
    mesh.start(1, options=("--exit-type", exit_type))
    if not file_there:
        mesh.file.unlink()
    assert mesh.stop()["exit_type"] == exit_type
    assert mesh.root.exists() == (exit_type == "restart")


def test_a_start_with_a_broken_file_changes_nothing(mesh: Mesh) -> None:
    mesh.write_text("services: 1\n")
    error = mesh.try_start(1)
    assert (error["event"], error["line"], error["field"]) == ("config-error", 1, "services")
    assert mesh.daemon is not None
    assert mesh.daemon.process.wait(5) == 1
    assert not mesh.root.exists()


def test_a_start_on_a_place_that_is_no_bpffs_is_an_error_and_no_traceback(mesh: Mesh) -> None:
    args = ["--root", str(mesh.lab.scratch / "x"), "--cgroup", str(mesh.lab.cgroup), "--services", str(mesh.file)]
    done = mesh.lab.run_python("-m", "meshd.cli", "run", *args)
    assert done.returncode == 1
    assert "bpf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_gives_way_when_another_release_takes_over(mesh: Mesh) -> None:
    mesh.start(1)
    older = mesh.daemon
    mesh.start(2)
    assert older is not None
    assert older.lines.wait_for({"event": ("superseded",)}, 15)["version"] == "2.0.0"
    assert older.lines.wait_for({"event": ("stopped",)}, 15)["exit_type"] == "restart"
    assert older.process.wait(5) == 0
    assert mesh.connect(VIP)["answers"] == {A: 1}


def test_the_file_is_followed_even_when_nobody_reads_the_events_any_more(mesh: Mesh) -> None:
    mesh.start(1)
    assert mesh.daemon is not None
    mesh.daemon.stop_reading()
    for backend in (B, A, B):
        mesh.write([service("web", VIP, backend)])
        assert until(lambda wanted=backend: mesh.connect(VIP)["answers"] == {wanted: 1})  # type: ignore[misc]
    assert mesh.daemon.stop() == 0


@pytest.mark.parametrize("release", [2, 4])
def test_flows_that_are_over_are_swept_and_living_ones_stay(mesh: Mesh, release: int) -> None:
    mesh.start(release)
    held = mesh.hold(VIP, 3)
    flow = mesh.node.map("flow")
    value = mesh.values("flow")[0]
    long_ago = {"start_ns": 1, "established_ns": 0}
    flow[1] = value | {"state": 3}
    flow[2] = value | {"state": 1, "times": long_ago}
    flow[3] = value | {"state": 1, "times": {"start_ns": time.monotonic_ns(), "established_ns": 0}}
    flow[4] = value | {"state": 2, "times": long_ago}
    swept = sweep_flows(mesh.node)
    assert swept in (1, 2), "the daemon may have swept one of them itself"
    assert {key for key, _ in flow.items()} == {3, 4, *held.cookies}
    assert held.alive() == 3
    held.close()


def test_the_daemon_itself_sweeps_what_an_upgrade_left(mesh: Mesh) -> None:
    mesh.start(2)
    held = mesh.hold(VIP)
    mesh.node.map("flow")[1] = mesh.values("flow")[0] | {"state": 3}
    mesh.next_event(event="swept", flows=1)
    assert until(lambda: len(mesh.values("flow")) == 1)
    held.close()
