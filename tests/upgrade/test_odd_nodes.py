"""Nodes that are not as they should be: a read-only bpffs, what a restart of the machine leaves, stale directories."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.patience import patient
from tests.upgrade.conftest import Release, empty_bpffs, everything


@pytest.fixture
def read_only(node: hitless.Node, release: Release, lab: Lab) -> Iterator[Path]:
    """Release 1 runs, and then the bpffs is made read-only."""
    hitless.apply(node, release(1))
    before = everything(node)
    mount(lab, "remount,ro")
    yield lab.bpffs
    mount(lab, "remount,rw")
    assert everything(node) == before


def mount(lab: Lab, options: str) -> None:
    subprocess.run(["mount", "-o", options, str(lab.bpffs)], check=True)


def failing(*arguments: object) -> Any:
    """The error of a command that ends with 1, without a traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "hitless", *map(str, arguments), "--json"],
        capture_output=True, text=True, timeout=patient(30), check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == 1, done.stdout
    return json.loads(done.stdout)["error"]


@pytest.mark.parametrize("command", ["apply", "plan", "status", "verify", "recover", "gc", "unload"])
def test_a_read_only_bpffs_is_told_by_name_with_what_to_do(
    node: hitless.Node, releases: dict[int, Path], lab: Lab, read_only: Path, command: str
) -> None:
    release = [releases[2], "--set", f"cgroup={lab.cgroup}"] if command in ("apply", "plan") else []
    error = failing(command, *release, "--root", node.root)
    assert (error["code"], error["mount"]) == ("node", str(read_only))
    assert f"the bpffs at {read_only} is mounted read-only" in error["message"]
    assert f"mount -o remount,rw {read_only}" in error["message"]


def test_a_first_start_on_a_read_only_bpffs_is_told_by_name(node: hitless.Node, release: Release, lab: Lab) -> None:
    mount(lab, "remount,ro")
    try:
        with pytest.raises(hitless.NodeError, match="is mounted read-only"):
            hitless.apply(node, release(1))
    finally:
        mount(lab, "remount,rw")
    assert not node.root.exists()


def test_where_the_mount_alone_is_read_only_one_may_look_and_not_change(
    node: hitless.Node, release: Release, lab: Lab
) -> None:
    hitless.apply(node, release(1))
    mount(lab, "remount,bind,ro")
    try:
        assert status(node).problems == ()
        assert hitless.plan(node, release(2)).start_type == "update"
        actions: list[Callable[[], object]] = [
            lambda: hitless.apply(node, release(2)),
            lambda: hitless.recover(node),
            lambda: hitless.unload(node),
        ]
        for action in actions:
            with pytest.raises(hitless.NodeError, match="read-only, so that nothing can be pinned or unpinned"):
                action()
    finally:
        mount(lab, "remount,bind,rw")
    assert status(node).version == "1.0"


def test_after_a_restart_of_the_machine_status_says_that_nothing_runs_and_recover_that_nothing_is_to_do(
    node: hitless.Node, release: Release, lab: Lab
) -> None:
    hitless.apply(node, release(1))
    empty_bpffs(node, lab)
    assert (status(node).version, status(node).problems) == (None, ())
    assert hitless.recover(node) is None
    assert hitless.apply(node, release(1)).start_type == "normal"


def test_an_empty_directory_where_a_root_was_is_started_in(node: hitless.Node, release: Release) -> None:
    node.root.mkdir(0o700)
    assert hitless.recover(node) is None
    assert hitless.apply(node, release(1)).start_type == "normal"


def test_a_generation_without_a_record_is_named_and_unload_clears_it(node: hitless.Node, release: Release) -> None:
    (node.current / "maps").mkdir(parents=True)
    for action in (lambda: hitless.plan(node, release(1)), lambda: hitless.apply(node, release(1))):
        with pytest.raises(hitless.NodeError, match=f"{node.current} has no record.*hitless unload --root {node.root}"):
            action()
    hitless.unload(node)
    assert hitless.apply(node, release(1)).start_type == "normal"
