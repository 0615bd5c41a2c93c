"""A lab is private while it lives, and leaves nothing when it ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hitless.errors import UnsupportedError
from meshd.demo import lab as lab_module
from meshd.demo.lab import BACKENDS4, BACKENDS6, Lab, find_cgroup2, leftovers, sweep

HOLDER = """
import subprocess, sys, time
from meshd.demo.lab import Lab
with Lab() as lab:
    child = lab.popen(["sleep", "1000"], "clients")
    (lab.bpffs / "pins").mkdir()
    print(lab.name, child.pid, flush=True)
    time.sleep(1000)
"""


def hold() -> tuple[subprocess.Popen[str], str, int]:
    """Start another process that owns a lab; return it, the lab's name and the pid of a process in the lab."""
    owner = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    name, child = owner.stdout.readline().split()
    return owner, name, int(child)


def remains(name: str) -> list[str]:
    return [path for path in leftovers() if name in path]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_in_the_lab_sees_only_loopback_with_the_labs_addresses(lab: Lab) -> None:
    links = lab.run(["ip", "-o", "link"]).stdout.splitlines()
    addresses = lab.run(["ip", "-o", "addr"]).stdout
    assert len(links) == 1
    assert "LOOPBACK,UP" in links[0]
    assert all(f" {address}/" in addresses for address in (*BACKENDS4, *BACKENDS6))


def test_a_service_address_has_no_route_in_the_lab(lab: Lab) -> None:
    for address in ("10.96.0.10", "fd00:96::10", "1.1.1.1"):
        done = lab.run(["ip", "route", "get", address])
        assert done.returncode != 0, done.stdout


def test_a_process_starts_in_the_wanted_cgroup(lab: Lab) -> None:
    line = lab.run(["cat", "/proc/self/cgroup"], "denied").stdout.splitlines()[-1]
    assert line == f"0::/{lab.name}/mesh/denied"


def test_a_python_in_the_lab_opens_its_bpffs(lab: Lab) -> None:
    done = lab.run_python("-c", f"import os; os.mkdir({str(lab.bpffs / 'mesh')!r}); print('made')")
    assert done.stdout == "made\n", done.stderr
    assert (lab.bpffs / "mesh").is_dir()


def test_two_labs_at_once_do_not_meet() -> None:
    with Lab() as one, Lab() as two:
        assert one.netns.stat().st_ino != two.netns.stat().st_ino
        (one.bpffs / "x").mkdir()
        assert not (two.bpffs / "x").exists()


def test_nothing_is_left_after_a_lab() -> None:
    with Lab() as lab:
        child = lab.popen(["sleep", "1000"], "clients")
        assert len(remains(lab.name)) == 4, "the scratch directory, the mount in it, the namespace, the cgroup"
    assert remains(lab.name) == []
    assert child.returncode == -signal.SIGKILL


def test_nothing_is_left_after_an_exception() -> None:
    lab = Lab()
    with pytest.raises(ZeroDivisionError), lab:
        lab.popen(["sleep", "1000"])
        raise ZeroDivisionError
    assert remains(lab.name) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_after_a_signal(number: signal.Signals) -> None:
    owner, name, child = hold()
    owner.send_signal(number)
    assert owner.wait(10) != 0
    assert remains(name) == []
    assert not is_running(child)


def test_the_next_lab_sweeps_what_a_killed_owner_left() -> None:
    owner, name, child = hold()
    owner.kill()
    owner.wait()
    until = time.monotonic() + 5
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(child), "a process in the lab dies with the owner"
    assert remains(name), "a killed owner cannot clean"
    with Lab():
        assert remains(name) == []


def test_a_sweep_spares_the_labs_of_living_owners() -> None:
    owner, name, child = hold()
    try:
        assert name not in sweep()
        assert len(remains(name)) == 4
        assert is_running(child)
    finally:
        owner.terminate()
        owner.wait()


def test_without_root_a_lab_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnsupportedError, match=r"needs root.*sudo"), Lab():
        pass


def test_without_cgroup2_a_lab_says_that_only_v1_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text

    def v1_only(path: Path, *args: str) -> str:
        return "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n" if str(path) == "/proc/self/mounts" else real(path, *args)

    monkeypatch.setattr(Path, "read_text", v1_only)
    with pytest.raises(UnsupportedError, match="only cgroup v1 is mounted"):
        find_cgroup2()


def test_without_the_ip_command_a_lab_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UnsupportedError, match="apt-get install iproute2"), Lab():
        pass
    assert lab_module.leftovers() == [path for path in leftovers() if str(os.getpid()) not in path]
