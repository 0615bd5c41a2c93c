"""What is explored: each scenario has those take part who can meet, and no more, so that all of it can be seen."""

from __future__ import annotations

from tests.model.machine import World

__all__ = ["PLANTED", "SCENARIOS"]

SCENARIOS = {
    "counting": World(),
    "counting a new key": World(starts=None, kills=1),
    "a hook is new": World(hooks=("attach", "update"), kills=1),
    "a hook goes": World(hooks=("update", "detach"), kills=1),
    "a hook goes that inserts and deletes": World(keys="B", hooks=("update", "detach"), kills=1, errors=0),
    "a hook goes, and a process writes": World(
        keys="B", hooks=("detach",), runs=1, writer="locked", writes=1, kills=1, errors=0
    ),
    "connections keep to their release": World(board=True, runs=3, kills=1),
    "inserting and deleting by connection": World(board=True, keys="B", runs=2, kills=1),
    "a thread writes while connections are waited for": World(
        board=True, keys="B", runs=1, writer="dual", writes=1, kills=1
    ),
    "inserting and deleting": World(keys="B", runs=3, kills=1),
    "both keys": World(keys="AB", hooks=("update",), kills=1, errors=0),
    "a thread that writes to both maps": World(keys="B", runs=1, writer="dual", writes=1),
    "a thread that sets a counter": World(keys="B", runs=0, writer="dual", writes=2, policy="sum"),
    "a writer in another process": World(keys="B", runs=1, writer="locked", writes=2, kills=1),
    "a writer with an old descriptor": World(keys="B", runs=1, writer="foreign", writes=1),
}

PLANTED = {
    "base stays": "counting",
    "base after": "counting",
    "base in memory": "counting",
    "no barrier": "counting",
    "no barrier back": "counting",
    "no last merge": "counting",
    "commit before the last merge": "counting",
    "commit in two": "counting",
    "phase after the hooks": "counting",
    "undone before the merge back": "counting",
    "back made again": "counting",
    "gone without a word": "a hook goes",
    "never settled": "connections keep to their release",
    "writers stay in": "a writer in another process",
    "deletes what was touched": "inserting and deleting",
    "new map first": "a thread that sets a counter",
}
"""Where each fault shows."""
