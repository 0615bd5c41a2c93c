"""Connections that see two releases are counted, and so is what it costs that none does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.build import build_tools
from benchmarks.mixing import MODES, Stage, Traffic, measure_costs, measure_mixing, measure_test_runs
from meshd.demo.lab import Lab


@pytest.fixture(scope="module")
def stage(module_lab: Lab) -> Iterator[Stage]:
    build_tools()
    yield Stage(module_lab)


@pytest.mark.parametrize("mode", MODES)
def test_connections_are_mixed_by_link_updates_and_not_by_a_board(stage: Stage, mode: str) -> None:
    found = measure_mixing(stage, mode, Traffic(2000, 32, longest=0.02, every=0.1, limit=60.0))
    assert (found.connections, found.old_first + found.new_first) == (2000, 4000)
    assert found.upgrades >= 2
    assert (found.mixed > 0) == (mode == MODES[0])
    assert found.moved == 0


def test_every_hook_has_its_cost(stage: Stage) -> None:
    (costs,) = measure_costs(stage, rounds=1, seconds=0.2, threads=8)
    assert set(costs.behind) == {"create", *costs.without}
    assert min(*costs.behind.values(), *costs.without.values(), *costs.rates) > 0


def test_a_dispatcher_takes_time_in_test_runs(stage: Stage) -> None:
    taken = measure_test_runs(stage, rounds=1)
    assert all(times[0] > 0 for times in taken.values())
