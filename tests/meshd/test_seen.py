"""What an operator sees: metrics, health, readiness, words for systemd, events that say of which upgrade they are."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.error import HTTPError, URLError

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from hitless.errors import UnsupportedError
from meshd.cli import main
from meshd.events import Events
from meshd.health import Health
from meshd.keeper import Keeper
from meshd.metrics import METRICS
from meshd.systemd import Notifier
from meshd.web import Page, Web
from tests.meshd.labmesh import A6, VIP, VIP6, A, Mesh, service, until

FAULTY = str(Path(__file__).parent / "faulty.py")
GET = """
import sys, urllib.request, urllib.error
try:
    with urllib.request.urlopen(sys.argv[1], timeout=10) as answer: print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error: print(error.code, error.read().decode())
"""


def get(mesh: Mesh, port: int, path: str) -> tuple[int, str]:
    done = mesh.lab.run_python("-c", GET, f"http://127.0.0.1:{port}{path}")
    status, _, text = done.stdout.partition(" ")
    return int(status), text


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and labels' values; fails for a metric that is not defined, or not as it is defined."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            defined = METRICS[sample.name]
            assert (family.type, set(sample.labels)) == (defined.kind, set(defined.labels)), sample.name
            assert family.documentation == defined.help
            found[sample.name, tuple(sample.labels[name] for name in defined.labels)] = sample.value
    return found


def test_metrics_tell_of_the_kernel_of_the_daemon_and_of_the_last_upgrade(mesh: Mesh) -> None:
    mesh.write([service("web", VIP, A), service("web6", VIP6, A6), service("none", VIP, port=81)])
    mesh.start(1)
    mesh.connect(VIP, count=3)
    mesh.stop()
    daemon = mesh.launch(3, "--listen", "127.0.0.1:0")
    port = daemon.lines.wait_for({"event": ("listening",)}, 10)["port"]
    daemon.lines.wait_for({"event": ("verified",)}, 15)
    mesh.connect(VIP, count=2)
    mesh.connect(VIP, port=81)
    assert until(lambda: mesh.counters()["closed"] == 5)
    status, text = get(mesh, port, "/metrics")
    found = samples(text)
    assert status == 200
    web, none = ("web", f"{VIP}:80", "tcp"), ("none", f"{VIP}:81", "tcp")
    states = {state: found["meshd_service_connections_total", (*web, state)] for state in ("opened", "closed")}
    assert states == {"opened": 5, "closed": 5}
    assert found["meshd_service_connections_total", (*none, "refused")] == 1
    assert found["meshd_release_info", ("3.0.0", "3.0.0")] == found["meshd_ready", ()] == 1
    assert found["meshd_generation", ()] == 2
    assert found["meshd_hooks_expected", ()] == found["meshd_hooks_attached", ()] == 5
    assert (found["meshd_map_entries", ("service",)], found["meshd_map_max_entries", ("service",)]) == (3, 2048)
    assert found["meshd_upgrades_total", ("update", "done")] == 1
    assert found["meshd_upgrade_phase", ("none",)] == 1
    # That of the first release is named counter, and only one service had one.
    assert [found["meshd_upgrade_entries", ("service_counter", what)] for what in ("found", "copied")] == [1, 1]
    assert {value for (name, _), value in found.items() if name == "meshd_upgrade_lost_values"} == {0}
    assert found["meshd_upgrade_stale_window_seconds", ()] > 0
    assert found["meshd_services", ()] == 3
    assert found["meshd_source_away", ("file",)] == 0
    assert time.time() - found["meshd_source_heard_timestamp_seconds", ("file",)] < 60
    assert found["meshd_kept_age_seconds", ()] < 5
    assert get(mesh, port, "/healthz") == get(mesh, port, "/readyz") == (200, "ok\n\n")
    assert get(mesh, port, "/")[0] == 404
    mesh.write_text("services: 1\n")
    mesh.next_event(event="config-error")
    assert samples(get(mesh, port, "/metrics")[1])["meshd_source_away", ("file",)] == 1


@pytest.fixture
def told(mesh: Mesh) -> Iterator[list[str]]:
    """What a service manager hears."""
    words: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(str(mesh.lab.scratch / "notify"))

        def hear() -> None:
            while (said := there.recv(4096)) != b"end":
                words.extend(said.decode().splitlines())

        thread = threading.Thread(target=hear)
        thread.start()
        yield words
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"end", there.getsockname())
        thread.join()


def test_nobody_is_told_that_the_mesh_is_ready_before_it_was_verified(mesh: Mesh, told: list[str]) -> None:
    env = {"NOTIFY_SOCKET": str(mesh.lab.scratch / "notify"), "WATCHDOG_USEC": "200000"}
    daemon = mesh.launch(2, "--listen", "127.0.0.1:0", command=[FAULTY, "loses-a-hook"], env=env)
    port = daemon.lines.wait_for({"event": ("listening",)}, 10)["port"]
    why = daemon.lines.wait_for({"event": ("not-ready",)}, 15)["message"]
    assert "connect4" in why
    status, text = get(mesh, port, "/readyz")
    assert (status, "connect4" in text) == (503, True)
    assert get(mesh, port, "/healthz")[0] == 200
    assert until(lambda: "WATCHDOG=1" in told)
    assert "READY=1" not in told
    (mesh.lab.bpffs / "lost").rename(mesh.root / "links" / "connect4")
    daemon.lines.wait_for({"event": ("verified",)}, 15)
    assert get(mesh, port, "/readyz")[0] == 200
    assert until(lambda: "READY=1" in told)
    assert any(word.startswith("STATUS=not ready: ") for word in told)
    mesh.stop()
    assert until(lambda: "STOPPING=1" in told)


def test_a_watchdog_of_another_process_and_a_manager_that_is_gone_are_no_trouble(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone"), "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"})
    before = threading.active_count()
    notifier.watch(lambda: True, threading.Event())
    notifier.tell("READY=1")
    assert threading.active_count() == before


def test_every_event_of_an_upgrade_carries_its_id_and_no_other_one_does(mesh: Mesh) -> None:
    mesh.start(1)
    mesh.stop()
    daemon = mesh.launch(2, "--node", "n7")
    events: list[dict[str, Any]] = []
    while not events or events[-1]["event"] != "verified":
        events.append(daemon.lines.wait_for({}, 15))
    assert {event["node"] for event in events} == {"n7"}
    names = [event["event"] for event in events]
    until_done = names.index("upgraded") + 1
    assert names[0] == "loading"
    during = [event.get("upgrade") for event in events[1:until_done]]
    assert len(set(during)) == 1
    assert len(during[0] or "") == 32
    assert "upgrade" not in events[-1]
    assert {"progress", "config"} <= set(names[:until_done])


# The server, in this process


@pytest.fixture
def events() -> Events:
    return Events(json=True, out=cast("Any", SimpleNamespace(write=lambda _: 0, flush=lambda: None)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as there:
        port: int = there.getsockname()[1]
        return port


def answer(port: int) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/who", timeout=2) as page:
            text: str = page.read().decode()
            return text
    except HTTPError as error:
        return str(error.code)
    except (URLError, OSError):
        return None


def test_a_port_that_is_taken_is_served_as_soon_as_it_is_free(events: Events) -> None:
    port = free_port()
    first = Web(("127.0.0.1", port), {"/who": lambda: Page(200, b"first")}, events)
    assert until(lambda: answer(port) == "first")
    second = Web(("127.0.0.1", port), {"/who": lambda: Page(200, b"second")}, events)
    assert answer(port) == "first"
    first.close()
    assert until(lambda: answer(port) == "second")
    second.close()
    assert answer(port) is None


def test_who_connects_and_says_nothing_is_cut_off_and_keeps_nobody_out(events: Events) -> None:
    port = free_port()
    web = Web(("127.0.0.1", port), {"/who": lambda: Page(200, b"me")}, events)
    before = threading.active_count()
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    assert until(lambda: threading.active_count() > before)
    assert threading.active_count() <= before + 32  # a thread and a time limit for each of 16
    assert until(lambda: answer(port) == "me", 6)
    for one in idle:
        one.close()
    web.close()


def test_an_address_of_another_machine_is_an_error(events: Events) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot listen at 192.0.2.1 port 1: .*; give an address of this"):
        Web(("192.0.2.1", 1), {}, events)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"kept_at": 0.0}, ()),
        ({"kept_at": float("inf")}, ()),
        ({"kept_at": 1.0}, ("nobody could keep the maps for ",)),
        ({"kept_at": 1.0, "superseded": True}, ()),
        ({"kept_at": float("inf"), "ended": lambda: True}, ("a thread that keeps the maps, or one that hears",)),
    ],
)
def test_the_daemon_is_alive_while_its_threads_are_and_the_maps_are_kept(
    facts: dict[str, Any], says: tuple[str, ...]
) -> None:
    keeper = SimpleNamespace(**{"superseded": False, "ended": lambda: False} | facts)
    found = Health(cast("Any", None), cast("Keeper", keeper)).alive()
    assert len(found) == len(says)
    assert all(one.startswith(start) for one, start in zip(found, says, strict=True))


OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


def test_the_document_has_the_metrics_as_the_command_prints_them() -> None:
    done = CliRunner().invoke(main, ["metrics"])
    assert done.exit_code == 0
    assert done.stdout in OPERATING.read_text(), "write what `meshd metrics` prints into docs/operating.md"


DASHBOARD = Path(__file__).parents[2] / "packaging" / "grafana" / "meshd.json"


def test_the_dashboard_asks_for_nothing_that_is_not_exported() -> None:
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    names = {word for expr in asked for word in metric_names(expr)}
    assert len(asked) >= 12
    assert names <= set(METRICS)
    assert {"meshd_upgrade_lost_values", "meshd_upgrade_phase", "meshd_service_connections_total"} <= names


def metric_names(expr: str) -> list[str]:
    return [word for word in "".join(c if c.isalnum() or c == "_" else " " for c in expr).split() if "meshd_" in word]
