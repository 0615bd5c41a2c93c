"""The transaction's state machine in all its interleavings, and that the checker would see if it were wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.model.explore import explore
from tests.model.machine import FAULTS
from tests.model.scenarios import PLANTED, SCENARIOS


@pytest.mark.parametrize("name", SCENARIOS)
def test_whatever_happens_in_whatever_order_nothing_is_lost_and_the_upgrade_ends(name: str) -> None:
    found = explore(SCENARIOS[name])
    print(f"{name}: {found}")
    assert found.problem is None, found


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checker_finds_each_planted_fault(fault: str) -> None:
    found = explore(replace(SCENARIOS[PLANTED[fault]], fault=fault))
    print(f"{FAULTS[fault]}: {found}")
    assert found.problem is not None


def test_what_a_stranger_writes_between_the_last_merge_and_the_commit_is_left_behind() -> None:
    # docs/exactness.md says so: he is caught up with until the last merge, not until the commit.
    found = explore(replace(SCENARIOS["a writer with an old descriptor"], strict=True))
    print(found)
    assert found.problem is not None
    assert "B is 1" in found.problem
