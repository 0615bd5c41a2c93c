"""What is done while calls are killed or fail: upgrades, a rollback, what is taken back, and recovery after kills.

A scenario begins with release OLD live and settled; ``prepare`` may leave something for ``work`` to recover.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

import hitless
from tests.faults.tracer import AFTER, BEFORE, Fault, trace
from tests.faults.world import NEW, OLD, Broken, World

__all__ = ["SCENARIOS", "Scenario"]


class Scenario(msgspec.Struct, frozen=True):
    """``work`` runs in a process of its own. ``goal`` is the release that runs when nothing is in its way.

    ``recovers`` says that after an error something may be left for the next recovery; ``planned``, that it fails
    anyway. ``ends`` are the releases that may run in the end.
    """

    name: str
    work: Callable[[World], Callable[[], object]]
    goal: str
    prepare: Callable[[World], None] = lambda world: None
    recovers: bool = False
    planned: bool = False
    ends: tuple[str, ...] = (OLD, NEW)


def _recover(world: World) -> Callable[[], object]:
    return lambda: hitless.recover(world.node)


def _killed(work: Callable[[World], Callable[[], object]], fault: Fault) -> Callable[[World], None]:
    """Leave ``work`` killed at one of its calls."""

    def prepare(world: World) -> None:
        world.about_to_write()
        found = trace(work(world), fault)
        if found.hit is None or found.outcome is not None:
            raise Broken(f"{fault} did not kill: {found.outcome}")

    return prepare


def _upgrade(world: World) -> Callable[[], object]:
    return world.upgrade


def _rollback(world: World) -> Callable[[], object]:
    return lambda: bool(hitless.rollback(world.node, world.allowed))


def _failing(world: World) -> Callable[[], object]:
    return world.upgrade_that_fails


SCENARIOS = {
    one.name: one
    for one in (
        Scenario("upgrade", _upgrade, NEW),
        Scenario("rollback", _rollback, OLD, World.settle_new),
        Scenario("undo", _failing, OLD, recovers=True, planned=True, ends=(OLD, NEW)),
        Scenario("recover", _recover, NEW, _killed(_upgrade, Fault(0, BEFORE, "renameat2")), recovers=True),
        Scenario("recover-committed", _recover, NEW, _killed(_upgrade, Fault(0, AFTER, "renameat2")), recovers=True),
        Scenario("recover-built", _recover, OLD, _killed(_upgrade, Fault(0, AFTER, "bpf ITER_CREATE")), recovers=True),
        Scenario("recover-undo", _recover, OLD, _killed(_failing, Fault(1, AFTER, "bpf LINK_UPDATE")), recovers=True),
    )
}
"""By name."""
