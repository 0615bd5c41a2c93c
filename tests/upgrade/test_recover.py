"""What recover does about an upgrade that was killed: forward, or back if that was asked for."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import hitless
from hitless.upgrade.recovery import recovery
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.kills import dying_at_record, exit_code_of, kill_upgrade
from tests.upgrade.conftest import Release
from tests.upgrade.test_under_fire import clients, counted

SWITCHED = ["cutover", "catch-up", "merge", "commit"]


@pytest.mark.parametrize("step", ["copy", "prepare", "verify", "cutover"])
def test_an_upgrade_that_was_killed_before_a_hook_switched_or_as_the_first_did_can_be_gone_back_from(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab, step: str
) -> None:
    hitless.apply(node, release(1))
    before = node.observe()
    kill_upgrade(step, node, releases[2], {"cgroup": str(lab.cgroup)})
    assert hitless.recover(node, back=True) is not None
    assert node.observe() == before
    assert status(node).problems == ()


def test_going_back_keeps_every_count_of_the_new_release(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with clients(lab) as tries:
        for step in SWITCHED:
            kill_upgrade(step, node, releases[2], {"cgroup": str(lab.cgroup)})
            assert hitless.recover(node, back=True) == "took back the upgrade to 2.0, which had been interrupted"
            assert (status(node).version, status(node).problems) == ("1.0", ())
            assert hitless.recover(node, back=True) is None
    assert counted(node) == tries


def kill_going_back(phase: str, when: str, node: hitless.Node) -> None:
    def work() -> None:
        dying_at_record(phase, when)
        hitless.recover(hitless.Node(node.root), back=True)

    assert exit_code_of(work) == -signal.SIGKILL


def test_who_is_killed_while_going_back_is_followed_by_one_who_goes_back_and_counts_stay_exact(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with clients(lab) as tries:
        for phase, when in [("undoing", "after"), ("merging-back", "before"), ("merging-back", "after"),
                            ("undone", "before"), ("undone", "after")]:  # fmt: skip
            kill_upgrade("merge", node, releases[2], {"cgroup": str(lab.cgroup)})
            kill_going_back(phase, when, node)
            assert hitless.recover(node) is not None  # not told where to go: the record says it
            assert (status(node).version, status(node).problems) == ("1.0", ())
    assert counted(node) == tries


def test_a_release_that_was_committed_is_not_gone_back_from(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade("clean-up", node, releases[2], {"cgroup": str(lab.cgroup)})
    before = node.observe()
    with pytest.raises(hitless.InterruptedUpgradeError, match="was committed before it was interrupted"):
        hitless.recover(node, back=True)
    assert node.observe() == before
    assert hitless.recover(node) == "finished the clean-up after the upgrade to 2.0"


def test_a_first_start_can_be_gone_back_from_to_nothing(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    kill_upgrade("merge", node, releases[1], {"cgroup": str(lab.cgroup)})
    hitless.recover(node, back=True)
    assert (node.observe().version, node.observe().links) == (None, {})
    assert hitless.apply(node, release(1)).start_type == "normal"


def test_a_recovery_tells_what_it_found_and_did_and_what_runs(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade("merge", node, releases[2], {"cgroup": str(lab.cgroup)})
    found = recovery(node)
    assert found.found == "an upgrade to 2.0 was interrupted in phase cutover"
    assert found.did == "finished the interrupted upgrade to 2.0"
    assert (found.version, found.generation) == ("2.0", 2)
    again = recovery(node)
    assert (again.found, again.did, again.version) == (None, None, "2.0")


def test_there_is_nothing_to_recover_where_nothing_is(node: hitless.Node) -> None:
    assert recovery(node).did is None
    assert not node.root.exists()


def test_every_word_on_a_killed_upgrade_names_the_command(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade("merge", node, releases[2], {"cgroup": str(lab.cgroup)})
    command = f"hitless recover --root {node.root} finishes or undoes it"
    assert command in status(node).problems[0]
    for action in (lambda: hitless.plan(node, release(2)), lambda: hitless.gc(node), lambda: hitless.verify(node)):
        with pytest.raises(hitless.InterruptedUpgradeError, match=command):
            action()
