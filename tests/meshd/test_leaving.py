"""How the daemon finds out whether its end is a restart (the data path stays) or its being uninstalled."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshd.demo.lab import Lab
from meshd.demo.mesh import Lines
from meshd.kube import Announcer, Pod, announcement
from meshd.leaving import Leaving, leaving
from meshd.systemd import own_unit, unit_file
from tests.meshd import podserver
from tests.meshd.labmesh import VIP, A, Mesh, Meshd
from tests.meshd.podserver import GONE

PORT = 6443
POD, DAEMON_SET = "/api/v1/namespaces/mesh/pods/meshd-x7k2p", "/apis/apps/v1/namespaces/mesh/daemonsets/node-agent"
OWNED = {
    "kind": "Pod",
    "apiVersion": "v1",
    "metadata": {
        "name": "meshd-x7k2p",
        "namespace": "mesh",
        "uid": "pod-uid",
        "ownerReferences": [
            {"apiVersion": "apps/v1", "kind": "DaemonSet", "name": "node-agent", "uid": "ds-1", "controller": True}
        ],
    },
}

UNOWNED = {**OWNED, "metadata": {"name": "meshd-x7k2p", "namespace": "mesh", "uid": "pod-uid"}}


def daemon_set(**metadata: str) -> dict[str, Any]:
    return {
        "kind": "DaemonSet",
        "apiVersion": "apps/v1",
        "metadata": {"name": "node-agent", "namespace": "mesh", "uid": "ds-1"} | metadata,
        "spec": {"selector": {}, "template": {}},
    }


def kubeconfig(directory: Path, port: int) -> Path:
    """The file by which a client on this machine finds the API server at ``port``."""
    cluster = {"name": "lab", "cluster": {"server": f"http://127.0.0.1:{port}"}}
    context = {"name": "lab", "context": {"cluster": "lab", "user": "lab"}}
    user = {"name": "lab", "user": {"token": "x"}}
    lists = {"clusters": [cluster], "contexts": [context], "users": [user]}
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump({**lists, "current-context": "lab"}))
    return path


class Cluster:
    """An API server in the lab, and how meshd gets there."""

    def __init__(self, lab: Lab) -> None:
        pipe = subprocess.PIPE
        script = str(Path(__file__).parent / "podserver.py")
        self.process = lab.popen([sys.executable, script, str(PORT)], stdin=pipe, stdout=pipe)
        self.lines = Lines(self.process)
        self.lines.wait_for({"ready": (True,)}, 10)
        config = kubeconfig(lab.scratch, PORT)
        self.env = {"KUBECONFIG": str(config), "POD_NAMESPACE": "mesh", "POD_NAME": "meshd-x7k2p"}
        self.answer(POD, 200, OWNED)
        self.answer(DAEMON_SET, 200, daemon_set())

    def answer(self, path: str, status: int, body: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({path: [status, body]}) + "\n")
        self.process.stdin.flush()
        self.lines.wait_for({"taken": (True,)}, 10)

    def next_posted(self) -> dict[str, Any]:
        while True:
            said = self.lines.wait_for({}, 10)
            if "posted" in said:
                posted: dict[str, Any] = said["posted"]
                return posted


@pytest.fixture
def cluster(mesh: Mesh) -> Cluster:
    return Cluster(mesh.lab)


def ready(daemon: Meshd) -> dict[str, Any]:
    return daemon.lines.wait_for({"event": ("ready", "upgraded", "error")}, 15)


@pytest.mark.parametrize(
    ("path", "status", "body", "exit_type", "why"),
    [
        (DAEMON_SET, 200, daemon_set(), "restart", "DaemonSet mesh/node-agent exists"),
        (DAEMON_SET, 404, GONE, "normal", "DaemonSet mesh/node-agent is gone"),
        (DAEMON_SET, 200, daemon_set(deletionTimestamp="2026-01-01T00:00:00Z"), "normal", "is being deleted"),
        (DAEMON_SET, 200, daemon_set(uid="ds-2"), "normal", "there is another one of that name"),
        (DAEMON_SET, 403, GONE | {"code": 403, "reason": "Forbidden"}, "restart", "cannot be looked at: 403"),
        (DAEMON_SET, 404, "<html>no such page</html>", "restart", "cannot be looked at: "),
        (DAEMON_SET, 502, "<html>bad gateway</html>", "restart", "cannot be looked at: "),
        (POD, 200, UNOWNED, "restart", "pod mesh/meshd-x7k2p is of no DaemonSet"),
    ],
)
def test_the_daemon_set_of_the_pod_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, status: int, body: Any, exit_type: str, why: str
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), podserver.Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, server.server_port)))
    monkeypatch.setattr(podserver, "ANSWERS", {POD: [200, OWNED], path: [status, body]})
    found = Pod("mesh/meshd-x7k2p").leaving()
    server.shutdown()
    server.server_close()
    assert (found.exit_type, why in found.why) == (exit_type, True), found.why


def test_in_a_pod_the_data_path_stays_while_its_daemon_set_exists(mesh: Mesh, cluster: Cluster) -> None:
    assert ready(mesh.launch(1, env=cluster.env))["event"] == "ready"
    mesh.file.unlink()  # which would else be word that meshd is uninstalled
    stopped = mesh.stop()
    assert (stopped["exit_type"], stopped["why"]) == ("restart", "DaemonSet mesh/node-agent exists")
    assert mesh.connect(VIP)["answers"] == {A: 1}


def test_without_its_daemon_set_the_mesh_is_removed_even_if_the_pod_cannot_be_asked_any_more(
    mesh: Mesh, cluster: Cluster
) -> None:
    ready(mesh.launch(1, env=cluster.env))
    cluster.answer(POD, 404, GONE)
    cluster.answer(DAEMON_SET, 404, GONE)
    assert mesh.stop()["exit_type"] == "normal"
    assert not mesh.root.exists()


def test_with_the_api_server_away_the_mesh_serves_and_its_data_path_stays(mesh: Mesh, cluster: Cluster) -> None:
    cluster.process.kill()
    daemon = mesh.launch(1, "--kubernetes-pod", "mesh/other", env={"KUBECONFIG": cluster.env["KUBECONFIG"]})
    assert "not known yet" in daemon.lines.wait_for({"event": ("kubernetes-away",)}, 10)["message"]
    ready(daemon)
    stopped = mesh.stop()
    assert stopped["exit_type"] == "restart"
    assert "the owner of pod mesh/other is not known: " in stopped["why"]
    assert mesh.connect(VIP)["answers"] == {A: 1}


def test_a_pod_without_a_way_to_the_api_server_is_an_error_at_the_start(mesh: Mesh) -> None:
    nowhere = {"KUBECONFIG": "/nonexistent", "HOME": "/nonexistent"}
    said = ready(mesh.launch(1, "--kubernetes-pod", "mesh/x", env=nowhere))
    assert said["event"] == "error"
    assert "has no way to the API server" in said["message"]
    assert not mesh.root.exists()


def test_a_superseded_pod_stays_until_it_is_told_to_end(mesh: Mesh, cluster: Cluster) -> None:
    older = mesh.launch(1, env=cluster.env)
    ready(older)
    mesh.start(2)
    older.lines.wait_for({"event": ("superseded",)}, 10)
    with pytest.raises(subprocess.TimeoutExpired):
        older.process.wait(0.5)
    assert older.stop() == 0
    assert older.lines.wait_for({"event": ("stopped",)}, 5)["exit_type"] == "restart"


def test_an_upgrade_is_an_event_of_the_pod(mesh: Mesh, cluster: Cluster) -> None:
    mesh.start(1)
    mesh.stop()
    ready(mesh.launch(2, "--node", "n1", env=cluster.env))
    posted = cluster.next_posted()
    assert (posted["reason"], posted["type"], posted["source"]["host"]) == ("Upgraded", "Normal", "n1")
    assert posted["involvedObject"] == {
        "apiVersion": "v1", "kind": "Pod", "name": "meshd-x7k2p", "namespace": "mesh", "uid": "pod-uid",
    }  # fmt: skip
    assert posted["message"] == "from 1.0.0 to 2.0.0, generation 2; 0 values lost"


@pytest.mark.parametrize(
    ("event", "reason", "kind"),
    [
        ({"event": "upgraded", "result": {"from": "3.0.0", "to": "2.0.0", "generation": 4, "maps": []}}, "RolledBack",
         "Normal"),
        ({"event": "upgrade-failed", "message": "x"}, "UpgradeFailed", "Warning"),
        ({"event": "left-out", "message": "x"}, "LeftOut", "Warning"),
        ({"event": "not-ready", "message": "x"}, "NotReady", "Warning"),
        ({"event": "source-away", "message": "x"}, "SourceAway", "Warning"),
    ],
)  # fmt: skip
def test_what_an_operator_is_to_know_is_an_event_of_the_pod(event: dict[str, Any], reason: str, kind: str) -> None:
    said = announcement(event)
    assert said is not None
    assert said[:2] == (reason, kind)


def test_what_happens_all_the_time_is_none() -> None:
    assert announcement({"event": "config", "added": 1}) is None


def test_events_of_the_pod_are_dropped_and_never_waited_for_when_there_are_too_many() -> None:
    class Slow(Pod):
        def __init__(self) -> None: ...

        def post(self, *_: object) -> None:
            time.sleep(0.2)

    announcer = Announcer(Slow())
    began = time.monotonic()
    for _ in range(1000):
        announcer.hear({"event": "left-out", "message": "x", "node": "n"})
    assert time.monotonic() - began < 0.2
    assert announcer.counts["dropped"] >= 1000 - 32 - 1


# systemd


@pytest.fixture
def unit(mesh: Mesh) -> Iterator[Path]:
    """The file of a unit, in a place of the lab's own."""
    path = mesh.lab.scratch / "units" / "mesh-agent.service"
    path.parent.mkdir()
    path.write_text("[Service]\n")
    yield path


def launch_as(mesh: Mesh, unit: Path) -> Meshd:
    """Start meshd as systemd would: in the unit's cgroup, with its variables."""
    cgroup = mesh.lab.cgroup_of("outside") / unit.name
    cgroup.mkdir()
    into = f"import runpy; open({str(cgroup / 'cgroup.procs')!r}, 'w').write('0'); runpy.run_module('meshd')"
    return mesh.launch(1, command=["-c", into], env={"INVOCATION_ID": "1", "SYSTEMD_UNIT_PATH": str(unit.parent)})


def test_under_systemd_the_data_path_stays_while_the_unit_is_installed(mesh: Mesh, unit: Path) -> None:
    ready(launch_as(mesh, unit))
    stopped = mesh.stop()
    assert (stopped["exit_type"], stopped["why"]) == ("restart", f"{unit} exists")


def test_under_systemd_the_data_path_goes_when_the_unit_was_removed(mesh: Mesh, unit: Path) -> None:
    ready(launch_as(mesh, unit))
    unit.unlink()
    stopped = mesh.stop()
    assert (stopped["exit_type"], stopped["why"]) == ("normal", "systemd has no file of mesh-agent.service any more")
    assert not mesh.root.exists()


def test_who_systemd_did_not_start_is_of_no_unit() -> None:
    cgroups = "0::/system.slice/mesh-agent.service\n"
    assert own_unit({}, cgroups) is None
    assert own_unit({"INVOCATION_ID": "1"}, cgroups) == "mesh-agent.service"
    assert own_unit({"INVOCATION_ID": "1"}, "0::/user.slice/session-1.scope\n") is None


def test_a_masked_unit_and_an_instance_of_a_template_are_installed(tmp_path: Path) -> None:
    env = {"SYSTEMD_UNIT_PATH": f"/nonexistent:{tmp_path}"}
    assert unit_file("mesh@a.service", env) is None
    (tmp_path / "mesh@.service").write_text("")
    assert unit_file("mesh@a.service", env) == tmp_path / "mesh@.service"
    (tmp_path / "b.service").symlink_to("/dev/null")
    assert unit_file("b.service", env) == tmp_path / "b.service"


def test_the_first_that_is_known_decides(tmp_path: Path) -> None:
    gone = tmp_path / "services.yaml"
    assert leaving(superseded=True, given="normal", services=gone).exit_type == "restart"
    assert leaving(given="normal", unit="x.service").exit_type == "normal"
    assert leaving(services=gone) == Leaving("normal", f"{gone} exists no more")
    assert leaving() == Leaving("restart", "nothing says that it is uninstalled")
