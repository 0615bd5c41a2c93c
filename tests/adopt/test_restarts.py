"""A daemon that is adopted starts again by its own loader: plans see that, and what is killed meanwhile is finished."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.upgrade import adopt as adopting
from hitless.upgrade import public as publishing
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.adopt.conftest import MANIFEST, NEW, OLD, Loader, connect
from tests.releases import write_release

Release = Callable[[int], hitless.Bundle]


@pytest.fixture
def restarted(lab: Lab, loader: Loader, node: hitless.Node, release: Release) -> hitless.Node:
    """Adopted, and started again by its own loader since."""
    hitless.adopt(node, release(1))
    loader.start(release(1).objects[0].data, "1.0")
    return node


def test_after_a_start_of_the_daemon_there_is_nothing_to_do_for_the_release_that_runs(
    restarted: hitless.Node, release: Release
) -> None:
    assert not hitless.plan(restarted, release(1)).changes_anything
    assert [hook.action for hook in hitless.apply(restarted, release(1)).hooks] == ["keep"]


def test_a_plan_that_was_made_after_a_start_of_the_daemon_is_done_and_one_from_before_is_not(
    lab: Lab, loader: Loader, restarted: hitless.Node, release: Release
) -> None:
    planned = hitless.plan(restarted, release(2))
    loader.start(release(1).objects[0].data, "1.0")
    with pytest.raises(hitless.NodeError, match="is not as it was when this was planned: "):
        hitless.apply(restarted, release(2), planned=planned)
    connect(lab, 80, 2)
    hitless.apply(restarted, release(2), planned=hitless.plan(restarted, release(2)))
    assert restarted.map("store.bss").get(0)["calls"] == 2
    assert hitless.verify(restarted).problems == ()


def test_who_is_killed_while_taking_up_a_start_of_the_daemon_leaves_what_is_finished(
    lab: Lab, loader: Loader, restarted: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(adopting, "pin_as_noted", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        hitless.apply(restarted, release(2))
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    connect(lab, 80, 3)
    assert hitless.recover(restarted) is not None
    assert status(restarted).problems == ()
    assert hitless.verify(restarted).problems == ()
    assert restarted.map("store.bss").get(0)["calls"] == 3


def test_an_upgrade_that_was_killed_before_its_paths_were_there_is_finished_by_the_next_apply(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hitless.adopt(node, release(1))
    source = NEW.replace("BARE(idle", "BARE(extra, HASH, 16, __u32, __u64);\nBARE(idle")
    manifest = MANIFEST + '[map.extra]\nkey = "__u32"\nvalue = "__u64"\n'
    path = write_release(tmp_path / "3", "3.0", source, manifest)
    into = hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))})
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(publishing, "move", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        hitless.apply(node, into)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert not (loader.root / "map" / "extra").exists()
    told = status(node).problems
    assert len(told) == 1
    assert "is done but not cleaned up" in told[0]
    with pytest.raises(hitless.NodeError, match=r"was adopted already, and runs store 3\.0; but the upgrade to"):
        hitless.adopt(node, release(1))
    assert hitless.apply(node, into).recovered is not None
    assert (loader.root / "map" / "extra").is_symlink()
    assert status(node).problems == ()


def test_programs_of_a_release_that_nobody_described_are_told_of_alike_by_status_and_plan(
    loader: Loader, node: hitless.Node, release: Release, tmp_path: Path
) -> None:
    hitless.adopt(node, release(1))
    other = write_release(tmp_path / "o", "1.5", OLD.replace("&found->count, 1", "&found->count, 2"), MANIFEST)
    loader.start((other / "store.bpf.o").read_bytes(), "1.5")
    (told,) = status(node).problems
    assert "the daemon's own loader has put another release there; let it start 1.0 again" in told
    for call in (hitless.plan, hitless.apply):
        with pytest.raises(hitless.NodeError) as refused:
            call(node, release(2))
        assert refused.value.message == told


def test_rollbacks_go_back_and_forth_on_an_adopted_node(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    hitless.adopt(node, release(1))
    hitless.apply(node, release(2))
    for version in ("1.0", "2.0", "1.0"):
        connect(lab, 80, 1)
        assert hitless.rollback(node, ("tally",)).to_version == version
    assert node.map("tally").get(80)["count"] == 243
    assert status(node).problems == ()
