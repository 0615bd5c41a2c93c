"""Every state that can be reached, breadth first, so that the first way to a wrong one is a shortest one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tests.model.machine import State, World, problem, rank, start, steps

__all__ = ["Found", "explore"]


@dataclass(frozen=True)
class Found:
    """How much was seen, and what is wrong, if anything, with the ``trace`` of what led to it."""

    states: int
    transitions: int
    problem: str | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.problem is None:
            return f"{self.states:,} states, {self.transitions:,} transitions, nothing wrong"
        way = "\n".join(f"  {number:>3}. {line}" for number, line in enumerate(self.trace, 1))
        return f"{self.problem}, after {len(self.trace)} steps ({self.states:,} states were seen):\n{way}"


def explore(world: World) -> Found:
    """Look at everything that can happen in ``world``, up to the first thing that is wrong."""
    first = start(world)
    came_from: dict[State, tuple[State, str] | None] = {first: None}
    waiting = deque([first])
    transitions = 0
    while waiting:
        state = waiting.popleft()
        wrong = problem(state, world)
        here, none = rank(state), True
        for label, after in () if wrong else steps(state, world):
            none = False
            transitions += 1
            if rank(after) >= here:
                wrong = f"`{label}` could be repeated for ever"
            if after not in came_from:
                came_from[after] = (state, label)
                waiting.append(after)
        if none and not wrong and state.todo:
            wrong = f"nobody can go on, and {state.todo[0]} is still to be done"
        if wrong:
            return Found(len(came_from), transitions, wrong, _trace(came_from, state))
    return Found(len(came_from), transitions)


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    lines = []
    before = came_from[state]
    while before is not None:
        lines.append(f"{before[1]:<88} {_changed(before[0], state)}")
        state, before = before[0], came_from[before[0]]
    return tuple(reversed(lines))


_SHOWN = ("phase", "public", "hooks", "old", "new", "base", "back")


def _changed(before: State, after: State) -> str:
    shown = ((name, getattr(before, name), getattr(after, name)) for name in _SHOWN)
    return " ".join(f"{name}={now}" for name, was, now in shown if was != now).rstrip()
