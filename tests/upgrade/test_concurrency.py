"""Commands at once on one root, in processes of their own: one runs, the others wait or say who does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.kernel.processes import is_stopped
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade
from tests.patience import patient
from tests.upgrade.conftest import Release

# Holds the root's lock in the middle of an upgrade until a line comes in.
HOLDER = """
import sys, hitless
root, bundle, cgroup = sys.argv[1:]
def wait(node):
    print("holding", flush=True)
    sys.stdin.readline()
hitless.apply(hitless.Node(root), hitless.Bundle.load(bundle, {"cgroup": cgroup}), prepare=wait)
"""


@contextmanager
def upgrading(node: hitless.Node, bundle: Path, lab: Lab) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of an upgrade; it finishes at the end of the block, if it still can."""
    command = [sys.executable, "-c", HOLDER, str(node.root), str(bundle), str(lab.cgroup)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "holding\n"
            yield holder
        finally:
            if holder.poll() is None:
                holder.send_signal(signal.SIGCONT)
                holder.communicate("go\n", timeout=patient(30))


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hitless", *map(str, arguments), "--json"]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, Any]:
    """Exit code and JSON of a command, which showed no traceback."""
    out, errors = process.communicate(timeout=patient(60))
    assert "Traceback" not in errors
    return process.returncode, json.loads(out)


def run(*arguments: object) -> tuple[int, Any]:
    return ended(started(*arguments))


def arguments_of(command: str, node: hitless.Node, bundle: Path, lab: Lab) -> list[object]:
    release = [bundle, "--set", f"cgroup={lab.cgroup}"] if command in ("apply", "plan") else []
    return [command, *release, "--root", node.root]


@pytest.mark.parametrize("command", ["apply", "recover", "unload", "gc"])
def test_a_command_that_changes_a_root_waits_so_long_as_it_was_told_and_names_the_holder(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab, command: str
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab) as holder:
        before = time.monotonic()
        code, found = run(*arguments_of(command, node, releases[2], lab), "--wait", "0.3")
        assert time.monotonic() - before < 8
        assert (code, found["error"]["code"], found["error"]["pid"]) == (1, "busy", holder.pid)
        assert f"process {holder.pid} ({sys.executable} -c" in found["error"]["message"]
        assert "waited 0.3 s" in found["error"]["message"]
    assert (status(node).version, status(node).problems) == ("2.0", ())


@pytest.mark.parametrize("command", ["verify", "plan"])
def test_a_command_that_only_looks_does_not_wait_and_names_the_holder(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab, command: str
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab) as holder:
        code, found = run(*arguments_of(command, node, releases[2], lab))
        assert (code, found["error"]["code"], found["error"]["pid"]) == (1, "busy", holder.pid)
        assert f"process {holder.pid} (" in found["error"]["message"]


def test_status_shows_what_runs_and_who_upgrades_it(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab) as holder:
        code, seen = run("status", "--root", node.root)
        assert (code, seen["version"], seen["upgrading"], seen["problems"]) == (0, "1.0", holder.pid, [])


def waiting(command: list[object], root: Path) -> subprocess.Popen[str]:
    """The command, when it has come to the lock that somebody holds: until it has that it cannot end."""
    process = started(*command, "--wait", "40")
    until = time.monotonic() + patient(30)
    while process.poll() is None and not has_open(process.pid, root) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert process.poll() is None
    assert has_open(process.pid, root)
    return process


def has_open(pid: int, path: Path) -> bool:
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(file) == str(path):  # noqa: PTH115
                return True
    return False


def test_of_two_applies_the_second_waits_and_finds_the_work_done(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab):
        second = waiting(arguments_of("apply", node, releases[2], lab), node.root)
    code, result = ended(second)
    assert (code, result["start_type"], result["generation"]) == (0, "restart", 2)


def test_a_recover_that_waited_for_an_upgrade_finds_nothing_to_do(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab):
        second = waiting(["recover", "--root", node.root], node.root)
    code, found = ended(second)
    assert (code, found["found"], found["did"], found["version"]) == (0, None, None, "2.0")


def test_an_unload_that_waited_for_an_upgrade_unloads_what_it_made(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab):
        second = waiting(["unload", "--root", node.root], node.root)
    assert ended(second)[0] == 0
    assert not node.root.exists()


def test_a_gc_that_waited_for_an_upgrade_drops_the_release_before_it(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab):
        second = waiting(["gc", "--root", node.root], node.root)
    code, found = ended(second)
    assert (code, found["version"]) == (0, "1.0")
    assert (status(node).version, status(node).previous) == ("2.0", None)


def test_an_upgrade_whose_plan_was_overtaken_while_it_waited_is_refused(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, release(1))
    hitless.save_plan(hitless.plan(node, release(2)), tmp_path / "plan")
    with upgrading(node, releases[2], lab):
        second = waiting([*arguments_of("apply", node, releases[2], lab), "--plan", tmp_path / "plan"], node.root)
    code, found = ended(second)
    assert (code, found["error"]["code"]) == (1, "node")
    assert "now generation 2" in found["error"]["message"]


def test_many_applies_recovers_and_looks_at_once_leave_one_whole_release(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    node.map("owner")[1] = 111
    changing = [arguments_of("apply", node, releases[2], lab), ["recover", "--root", node.root]] * 2
    looking = [["status", "--root", node.root], ["verify", "--root", node.root]]
    running = [started(*command, "--wait", "60") for command in changing] + [started(*command) for command in looking]
    results = [ended(process) for process in running]
    assert [code for code, _ in results[: len(changing)]] == [0] * len(changing)
    assert sorted(result["start_type"] for _, result in results[: len(changing) : 2]) == ["restart", "update"]
    for code, found in results[len(changing) :]:
        assert code == 0 or found["error"]["code"] == "busy", found
    assert (status(node).version, status(node).problems) == ("2.0", ())
    assert node.map("owner").get(1) == 111


def test_a_holder_that_is_killed_leaves_no_stuck_lock(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab) as holder:
        second = waiting(arguments_of("apply", node, releases[2], lab), node.root)
        holder.kill()
        holder.wait(patient(10))
        code, result = ended(second)
    assert (code, result["start_type"]) == (0, "update")
    assert result["recovered"] == "undid an upgrade that had not switched any hook"
    assert node.holder() is None


def test_a_holder_that_is_stopped_is_named_with_what_lets_it_go_on(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with upgrading(node, releases[2], lab) as holder:
        holder.send_signal(signal.SIGSTOP)
        until = time.monotonic() + patient(10)
        while not is_stopped(holder.pid) and time.monotonic() < until:
            time.sleep(0.01)
        code, found = run("unload", "--root", node.root, "--wait", "0")
        assert (code, found["error"]["pid"]) == (1, holder.pid)
        assert f"which is stopped (kill -CONT {holder.pid} lets it go on)" in found["error"]["message"]
    assert node.observe().version == "2.0"


def test_a_process_that_runs_is_not_taken_for_a_stopped_one() -> None:
    assert not is_stopped(os.getpid())


def test_two_recovers_of_one_killed_upgrade_do_it_once(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade("merge", node, releases[2], {"cgroup": str(lab.cgroup)})
    both = [started("recover", "--root", node.root) for _ in range(2)]
    results = [ended(process) for process in both]
    assert [code for code, _ in results] == [0, 0]
    assert sorted(found["did"] or "" for _, found in results) == ["", "finished the interrupted upgrade to 2.0"]
    assert status(node).problems == ()
