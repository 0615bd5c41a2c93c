"""An upgrade that is killed, or whose system calls fail, leaves nothing behind, and everything is counted exactly.

`make faults` does it at every call and with every errno; here it is a sample, with all calls about cutover and commit.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import pytest

from hitless.upgrade.section import SectionCarrier
from meshd.demo.lab import Lab
from tests.faults.run import ERRORS, KILLS, Options, faults
from tests.faults.scenarios import SCENARIOS, WORLDS
from tests.faults.tracer import BEFORE
from tests.faults.world import Broken, World

MESH = [name for name, one in SCENARIOS.items() if one.world == "mesh"]
OTHERS = [name for name in SCENARIOS if name not in MESH]


@pytest.fixture(scope="module")
def world(module_lab: Lab) -> Iterator[World]:
    with World(module_lab) as made:
        yield made


@pytest.mark.parametrize("name", MESH)
def test_killed_before_or_after_a_call_it_is_finished_or_undone_with_nothing_lost(world: World, name: str) -> None:
    report = faults(world, SCENARIOS[name], Options(stride=120, kinds=KILLS), print)
    assert report.failures == []
    assert report.kills >= 2


@pytest.mark.parametrize(("name", "kind"), list(zip(MESH, cycle(ERRORS), strict=False)))
def test_a_call_that_fails_is_an_error_that_names_it_and_undoes_everything(world: World, name: str, kind: str) -> None:
    report = faults(world, SCENARIOS[name], Options(stride=150, kinds=(kind,)), print)
    assert report.failures == []
    assert report.errors >= 1


@pytest.mark.parametrize("kind", dict.fromkeys(SCENARIOS[name].world for name in OTHERS))
def test_so_it_is_on_every_kind_of_hook_by_connection_and_when_all_comes_or_goes(lab: Lab, kind: str) -> None:
    names = [name for name in OTHERS if SCENARIOS[name].world == kind]
    with WORLDS[kind](lab) as other:
        for name, error in zip(names, cycle(ERRORS), strict=False):
            report = faults(other, SCENARIOS[name], Options(stride=1000, kinds=(BEFORE, error), around=False), print)
            assert report.failures == []
            assert report.kills + report.errors >= 2


def test_a_recovery_that_is_killed_too_is_finished_by_the_next(world: World) -> None:
    report = faults(world, SCENARIOS["upgrade"], Options(kinds=(), doubles=8), print)
    assert report.failures == []
    assert report.kills >= 2


def test_with_the_catch_up_of_globals_switched_off_the_books_do_not_agree(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SectionCarrier, "catch_up", lambda carrier, last=False: 0)
    with pytest.raises(Broken, match="was counted, and clients made"):
        faults(world, SCENARIOS["recover"], Options(kinds=()), print)
    monkeypatch.undo()
    world.begin()
