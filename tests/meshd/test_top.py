"""`meshd top` shows a mesh from the kernel's maps, on a terminal and in a pipe, with a daemon and without."""

from __future__ import annotations

import ipaddress
import json

from rich.console import Console

from meshd import top
from meshd.registry import Frontend
from meshd.seen import Filled, Seen
from tests.meshd.labmesh import VIP, VIP6, Mesh

SEEN = Seen(
    version="1.0.0", generation=4, going_to="2.0.0", phase="copying", upgrading=1, hooks=3, attached=2,
    maps={"flow": Filled(62000, 65536), "service": Filled(2, 1024)},
    counters={
        Frontend(ipaddress.ip_address(VIP6), 80, "tcp"): {"opened": 10, "denied": 1, "established": 9, "closed": 8},
        Frontend(ipaddress.ip_address(VIP), 53, "udp"): {"opened": 3000},
    },
)  # fmt: skip


def on_screen(view: top.View, height: int) -> list[str]:
    console = Console(width=110, height=height, force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(top._screen(view, height))
    return captured.get().splitlines()


def test_a_terminal_shows_the_upgrade_that_runs_and_the_busiest_service_first() -> None:
    before = Seen(counters={frontend: dict.fromkeys(counts, 0) for frontend, counts in SEEN.counters.items()})
    view = top.View("/bpf/mesh", 0.0, SEEN, tuple(top._rows(SEEN, before, 2.0)))
    lines = on_screen(view, 20)
    assert lines[0].rstrip() == "/bpf/mesh: release 1.0.0, generation 4, hooks 2 of 3"
    assert lines[1].rstrip() == "upgrade to 2.0.0: copying"
    assert "flow 62000/65536" in lines[2]
    assert lines[4].split() == [f"{VIP}:53/udp", "3,000", "1,500.0", "3,000"]
    assert lines[5].split() == [f"[{VIP6}]:80", "2", "5.0", "10", "1", "9", "8"]
    assert lines[6].startswith("2 services: 3,010 opened, 1 denied, 0 failed, 0 refused")


def test_what_does_not_fit_on_the_terminal_is_counted() -> None:
    frontends = [Frontend(ipaddress.ip_address(VIP), port, "tcp") for port in range(1, 200)]
    seen = Seen("1.0.0", counters={frontend: {"opened": 1} for frontend in frontends})
    lines = on_screen(top.View("/bpf/mesh", 0.0, seen, tuple(top._rows(seen, Seen(), 1.0))), 12)
    assert len(lines) <= 12
    assert "199 services, 193 of them not shown" in lines[-1]


def test_without_a_daemon_the_kernel_is_shown_as_plain_lines_and_as_json(mesh: Mesh) -> None:
    mesh.start(2)
    mesh.connect(VIP, count=3)
    mesh.stop()
    plain = mesh.lab.run_python("-m", "meshd", "top", "--root", str(mesh.root), "--once")
    assert plain.returncode == 0
    assert plain.stdout.startswith(f"{mesh.root}: release 2.0.0, generation 1, hooks 3 of 3\nmaps: ")
    assert f"{VIP}:80 open=0 opened=3 denied=0 established=3 closed=3 refused=0" in plain.stdout
    done = mesh.lab.run_python("-m", "meshd", "top", "--root", str(mesh.root), "--once", "--json")
    found = json.loads(done.stdout)
    assert (found["schema"], found["version"], found["maps"]["service"]["entries"]) == (1, "2.0.0", 2)
    assert found["services"][0]["counters"]["opened"] == 3


def test_where_no_mesh_is_live_that_is_said(mesh: Mesh) -> None:
    done = mesh.lab.run_python("-m", "meshd", "top", "--root", str(mesh.root), "--once")
    assert (done.returncode, done.stdout) == (1, f"{mesh.root}: no mesh is live\n")
    done = mesh.lab.run_python("-m", "meshd", "top", "--root", str(mesh.lab.scratch / "x"), "--once")
    assert (done.returncode, "not on a bpffs" in done.stdout, done.stderr) == (1, True, "")


def test_an_access_log_that_is_not_there_is_told_with_what_to_do(mesh: Mesh) -> None:
    none = mesh.lab.run_python("-m", "meshd", "access", "--root", str(mesh.root))
    assert (none.returncode, none.stdout) == (1, "")
    assert none.stderr == f"meshd: no mesh is live under {mesh.root}: start one with `meshd run`\n"
    mesh.start(1)
    old = mesh.lab.run_python("-m", "meshd", "access", "--root", str(mesh.root))
    assert old.returncode == 1
    assert "release 1.0.0, which is live" in old.stderr
    assert "has no access log" in old.stderr
