"""An upgrade that is killed, or whose system calls fail, leaves nothing behind, and everything is counted exactly.

`make faults` does it at every call and with every errno; here it is a sample, with all calls about cutover and commit.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from meshd.demo.lab import Lab
from tests.faults.run import ERRORS, KILLS, Options, faults
from tests.faults.scenarios import SCENARIOS
from tests.faults.world import World


@pytest.fixture(scope="module")
def world(module_lab: Lab) -> Iterator[World]:
    with World(module_lab) as made:
        yield made


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_before_or_after_a_call_it_is_finished_or_undone_with_nothing_lost(world: World, name: str) -> None:
    report = faults(world, SCENARIOS[name], Options(stride=40, kinds=KILLS), print)
    assert report.failures == []
    assert report.kills > 10


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_that_fails_is_an_error_that_names_it_and_undoes_everything(world: World, name: str) -> None:
    for seed, kind in enumerate(ERRORS):
        report = faults(world, SCENARIOS[name], Options(stride=120, seed=seed, kinds=(kind,)), print)
        assert report.failures == []
        assert report.errors > 3


def test_a_recovery_that_is_killed_too_is_finished_by_the_next(world: World) -> None:
    report = faults(world, SCENARIOS["upgrade"], Options(kinds=(), doubles=20), print)
    assert report.failures == []
    assert report.kills > 10
