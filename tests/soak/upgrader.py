"""The process that upgrades and in which the control plane lives: ``python -m tests.soak.upgrader TASK``.

TASK is a :class:`Task` in JSON. It first puts in order what a killed one left. It tells one JSON object a line:
``ready``, then each ``step`` of an upgrade with the number of ``upgrades`` so far, and when its stdin was closed and
release 1 is live again, ``final``.

It goes through the library in one process. A meshd of each release in turn, as in the demo, would add the end of one
process and the start of another to every upgrade, and its control plane would pause in between.
"""

from __future__ import annotations

import json
import random
import select
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

import hitless
from meshd.demo.faults import FAULTS
from meshd.reconcile import reconcile, sweep_flows
from tests.soak.control import ControlPlane, Lost
from tests.soak.releases import VERSIONS
from tests.soak.world import fixed

__all__ = ["Task"]

_SWEEP_EVERY = 10
_SWITCHED = ("catch-up", "merge", "commit")  # the steps between the cutover and the commit


class Task(msgspec.Struct, frozen=True):
    """Where to upgrade, from which ``bundles``, with which of the demo's faults, if any.

    ``seed`` also says which way to go from release 2, if that is where it starts. ``undo`` is the chance that an
    upgrade fails after its cutover and is taken back.
    """

    root: Path
    cgroup: Path
    bundles: dict[int, Path]
    journals: Path
    seed: int
    fault: str | None = None
    undo: float = 0.0


class Planned(Exception):  # noqa: N818
    """An upgrade was to fail here."""


class Upgrader:
    """Goes 1, 2, 3, 2, 1, again and again."""

    def __init__(self, task: Task) -> None:
        variables = {"cgroup": str(task.cgroup)}
        self.node = hitless.Node(task.root)
        self.bundles = {number: hitless.Bundle.load(path, variables) for number, path in task.bundles.items()}
        self.task = task
        self.upgrades = 0
        self.undone = 0
        self.lost = 0
        self.caught_up = 0
        self._step = ""
        self._random = random.Random(task.seed)
        self._allowed: dict[tuple[int, int], tuple[str, ...]] = {}

    def run(self) -> None:
        """Put in order, upgrade until told to end, and end at release 1. Raises HitlessError, Lost."""
        before = self.node.observe().version
        recovered = hitless.recover(self.node)
        self.upgrades += self.node.observe().version != before  # it was finished forward
        if self.node.observe().current is None:
            hitless.apply(self.node, self.bundles[1], prepare=_fill)
        control = ControlPlane(self.node, self.task.journals, self.task.seed)
        control.settle()
        _say({"ready": True, "recovered": recovered, **self._facts(control)})
        numbers = {version: number for number, version in VERSIONS.items()}
        here, up = numbers[str(self.node.observe().version)], self._random.random() < 0.5
        with control:
            while here != 1 or not select.select([0], [], [], 0)[0]:
                up = here == 1 or (here != 3 and up)
                self._upgrade(here, here + 1 if up else here - 1, control)
                here = numbers[str(self.node.observe().version)]
                control.check()
                if self.upgrades % _SWEEP_EVERY == 0:
                    sweep_flows(self.node)  # as meshd does now and then, or the map would run full
        control.check()
        steps = {step: sorted(kinds) for step, kinds in control.by_step.items()}
        _say({**self._facts(control), "final": True, "steps": steps})

    def _upgrade(self, source: int, target: int, control: ControlPlane) -> None:
        bundle = self.bundles[target]
        if (source, target) not in self._allowed:
            # Only going back loses, and only what the older release has no place for.
            blocked = hitless.plan(self.node, bundle).blocked
            self._allowed[source, target] = tuple(entry.name for entry in blocked)
        try:
            result = hitless.apply(
                self.node, bundle, allow_loss=self._allowed[source, target],
                prepare=lambda _: control.step("prepare"), progress=self._follow(control),
            )  # fmt: skip
        except Planned:
            self.undone += 1
            return
        if result.start_type != "update":
            raise Lost(f"going from release {source} to {target} was a {result.start_type}")
        self.upgrades += 1
        self.lost += sum(entry.lost for entry in result.maps)
        self.caught_up += sum(entry.caught_up for entry in result.maps)

    def _follow(self, control: ControlPlane) -> Callable[[hitless.Progress], None]:
        def told(event: hitless.Progress) -> None:
            step = f"{event.step} {event.map or ''}".strip()
            if step != self._step:
                self._step = step
                _say({"step": event.step, **self._facts(control)})
                control.step(event.step)
                if event.step in _SWITCHED and self._random.random() < self.task.undo / len(_SWITCHED):
                    raise Planned

        return told

    def _facts(self, control: ControlPlane) -> dict[str, object]:
        return {
            "upgrades": self.upgrades, "undone": self.undone, "writes": control.writes, "lost": self.lost,
            "caught_up": self.caught_up,
        }  # fmt: skip


def _fill(node: hitless.Node) -> None:
    reconcile(node, fixed())


def _say(facts: dict[str, object]) -> None:
    print(json.dumps(facts), flush=True)


def main() -> int:
    """Run the task."""
    task = msgspec.json.decode(sys.argv[1], type=Task, dec_hook=lambda kind, value: kind(value))
    if task.fault is not None:
        FAULTS[task.fault]()
    try:
        Upgrader(task).run()
    except (Lost, hitless.HitlessError) as error:
        _say({"error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
