"""What is done while calls are killed or fail: upgrades, a rollback, what is taken back, and recovery after kills.

A scenario begins with release OLD live and settled; ``prepare`` may leave something for ``work`` to recover.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import msgspec

import hitless
from meshd.demo.lab import Lab
from tests.faults.adopted import AdoptedWorld
from tests.faults.hooks import HookWorld
from tests.faults.tracer import AFTER, BEFORE, Fault, trace
from tests.faults.world import NEW, OLD, Broken, World

__all__ = ["SCENARIOS", "WORLDS", "AnyWorld", "Scenario"]

AnyWorld = World | HookWorld | AdoptedWorld
Work = Callable[[Any], Callable[[], object]]

WORLDS: dict[str, Callable[[Lab], AbstractContextManager[AnyWorld]]] = {
    "mesh": World,
    "hooks": HookWorld,
    "adopted": AdoptedWorld,
    "board": partial(World, by_connection=True),
}
"""What a scenario is done in, by name."""


def _recovered(world: AnyWorld) -> None:
    """A fresh process puts all in order, and the next finds nothing to do."""
    world.must(lambda: hitless.recover(world.node))
    left = world.must(lambda: hitless.recover(world.node)).value
    if left is not None:
        raise Broken(f"a second recovery was needed: {left}")


class Scenario(msgspec.Struct, frozen=True):
    """``work`` runs in a process of its own. ``goal`` is the release that runs when nothing is in its way.

    ``finish`` is what finishes it after a kill. ``recovers`` says that after an error something may be left for that,
    and ``again``, that it is due after any error; ``planned``, that work fails anyway. ``ends`` are the releases that
    may run in the end, None for none.
    """

    name: str
    work: Work
    goal: str | None
    prepare: Callable[[Any], None] = lambda world: None
    recovers: bool = False
    planned: bool = False
    ends: tuple[str | None, ...] = (OLD, NEW)
    world: str = "mesh"
    finish: Callable[[Any], None] = _recovered
    again: bool = False


def _recover(world: AnyWorld) -> Callable[[], object]:
    return lambda: hitless.recover(world.node)


def _killed(work: Work, fault: Fault) -> Callable[[Any], None]:
    """Leave ``work`` killed at one of its calls."""

    def prepare(world: AnyWorld) -> None:
        world.about_to_write()
        found = trace(work(world), fault)
        if found.hit is None or found.outcome is not None:
            raise Broken(f"{fault} did not kill: {found.outcome}")

    return prepare


def _upgrade(world: AnyWorld) -> Callable[[], object]:
    return world.upgrade


def _rollback(world: AnyWorld) -> Callable[[], object]:
    return lambda: bool(hitless.rollback(world.node, world.allowed))


def _failing(world: World | HookWorld) -> Callable[[], object]:
    return world.upgrade_that_fails


def _adopt(world: AdoptedWorld) -> Callable[[], object]:
    return world.adopt


def _apply(world: AnyWorld) -> Callable[[], object]:
    return lambda: bool(hitless.apply(world.node, world.bundles[OLD]))


def _unload(world: AnyWorld) -> Callable[[], object]:
    return lambda: bool(hitless.unload(world.node))


def _gc(world: AnyWorld) -> Callable[[], object]:
    return lambda: bool(hitless.gc(world.node))


def _done_again(work: Work) -> Callable[[AnyWorld], None]:
    """Doing it once more is enough."""

    def finish(world: AnyWorld) -> None:
        world.must(work(world))

    return finish


def _recovered_and_applied(world: HookWorld) -> None:
    """After a recovery the node is in order, whichever way it went; then the next apply comes to its end."""
    _recovered(world)
    world.check(forward=True)
    world.must(_apply(world))


_FIRST_COMMIT = Fault(0, BEFORE, "renameat2")
_COMMITTED = Fault(0, AFTER, "renameat2")
_BUILT = Fault(0, AFTER, "bpf ITER_CREATE")
_GOING_BACK = Fault(1, AFTER, "bpf LINK_UPDATE")
_HOOKS_GOING_BACK = Fault(4, AFTER, "bpf LINK_UPDATE")  # of three links

SCENARIOS = {
    one.name: one
    for one in (
        Scenario("upgrade", _upgrade, NEW),
        Scenario("rollback", _rollback, OLD, World.settle_new),
        Scenario("undo", _failing, OLD, recovers=True, planned=True),
        Scenario("recover", _recover, NEW, _killed(_upgrade, _FIRST_COMMIT), recovers=True),
        Scenario("recover-committed", _recover, NEW, _killed(_upgrade, _COMMITTED), recovers=True),
        Scenario("recover-built", _recover, OLD, _killed(_upgrade, _BUILT), recovers=True),
        Scenario("recover-undo", _recover, OLD, _killed(_failing, _GOING_BACK), recovers=True),
        Scenario("hooks", _upgrade, NEW, world="hooks"),
        Scenario("hooks-rollback", _rollback, OLD, HookWorld.settle_new, world="hooks"),
        Scenario("hooks-undo", _failing, OLD, recovers=True, planned=True, world="hooks"),
        Scenario("hooks-recover", _recover, NEW, _killed(_upgrade, _FIRST_COMMIT), recovers=True, world="hooks"),
        Scenario("hooks-recover-undo", _recover, OLD, _killed(_failing, _HOOKS_GOING_BACK), recovers=True,
                 world="hooks"),
        Scenario("first", _apply, OLD, HookWorld.unloaded, ends=(OLD, None), world="hooks",
                 finish=_recovered_and_applied),
        Scenario("restart", _apply, OLD, HookWorld.loosened, ends=(OLD,), world="hooks", finish=_done_again(_apply),
                 again=True),
        Scenario("gc", _gc, OLD, HookWorld.with_last, ends=(OLD,), world="hooks", finish=_done_again(_gc), again=True),
        Scenario("unload", _unload, None, HookWorld.about_to_unload, ends=(None,), world="hooks",
                 finish=_done_again(_unload), again=True),
        Scenario("unload-apply", _unload, None, HookWorld.about_to_unload, ends=(OLD, None), world="hooks",
                 finish=_done_again(_apply), again=True),
        Scenario("adopt", _adopt, OLD, AdoptedWorld.started, ends=(OLD,), world="adopted",
                 finish=AdoptedWorld.adopted, again=True),
        Scenario("adopted-upgrade", _upgrade, NEW, world="adopted"),
        Scenario("adopted-apply", _upgrade, NEW, ends=(NEW,), world="adopted", finish=AdoptedWorld.applied, again=True),
        Scenario("adopted-restarted", _upgrade, NEW, AdoptedWorld.started_again, ends=(NEW,), world="adopted",
                 finish=AdoptedWorld.applied, again=True),
        Scenario("adopted-rollback", _rollback, OLD, AdoptedWorld.settle_new, world="adopted"),
        Scenario("board", _upgrade, NEW, world="board"),
        Scenario("board-undo", _failing, OLD, recovers=True, planned=True, world="board"),
        Scenario("board-recover", _recover, NEW, _killed(_upgrade, _FIRST_COMMIT), recovers=True, world="board"),
    )
}  # fmt: skip
"""By name; those of one world stand together."""
