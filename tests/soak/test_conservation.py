"""Conservation: whoever counts for himself finds his own numbers in the maps, after upgrades back and forth under fire.

`make soak` runs the same for much longer, and once more with an upgrader that is killed again and again.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hitless.errors import NodeError
from meshd.demo.lab import Lab
from tests.patience import often
from tests.soak.journal import Journal, State
from tests.soak.run import STEPS, Options, Report, Soak


def soak(lab: Lab, **options: object) -> Report:
    return Soak(lab, Options(**options), print).run()  # type: ignore[arg-type]


def test_a_minute_of_upgrades_under_fire_loses_nothing_and_counts_nothing_twice(lab: Lab) -> None:
    report = soak(lab, seconds=60, upgrades=often(40), operations=often(200_000))
    assert report.mismatches == []
    assert all(one.expected == one.found > 0 for one in report.sums), report.sums
    assert report.caught_up > 0, "nothing was written while it was copied, so nothing was shown"
    assert report.lost == 0
    for step in STEPS:
        assert {"insert", "change", "delete"} <= set(report.steps[step]), f"the control plane did too little in {step}"


def test_with_the_catch_up_switched_off_the_same_soak_finds_losses(lab: Lab) -> None:
    report = soak(lab, upgrades=often(12), operations=often(50_000), fault="skip-catch-up")
    assert not report.exact
    counted = {one.what: one for one in report.sums}
    assert counted["counter opened"].found < counted["counter opened"].expected
    assert counted["sent bytes"].found < counted["sent bytes"].expected
    assert {wrong.map for wrong in report.mismatches} >= {"counter", "policy", "sent", "size", "share"}


def test_an_entry_of_the_control_plane_that_vanishes_is_noticed(lab: Lab) -> None:
    with pytest.raises(NodeError, match="is gone before anyone deleted it"):
        soak(lab, upgrades=1000, fault="skip-copy")


def test_a_journal_tells_what_a_write_may_have_left_that_has_no_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a")
    for values in ({1: 10, 2: 20}, {2: None}):
        journal.begin(values)
        journal.end(values)
    journal.begin({1: 11})
    assert Journal.read(tmp_path / "a") == State(held={1: 10}, pending={1: 11})
    journal.end({1: 11})
    assert Journal.read(tmp_path / "a") == State(held={1: 11}, pending={})
