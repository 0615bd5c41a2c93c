"""The control plane's journal: every write is in a file before it is done, and again when it is done.

Whoever reads it knows what a map must hold, even if the writer was killed in the middle of a write: then each key of
that one write may hold what it held before or what was being written, and nothing else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

__all__ = ["Journal", "State"]

Values = dict[int, int | None]


class State(msgspec.Struct):
    """What a map must hold by number of key; ``pending`` are the keys of a write that has no end, with its values."""

    held: dict[int, int]
    pending: Values


class Journal:
    """One writer's file. Keys and values are numbers; what they stand for in a map is not known here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def begin(self, values: Mapping[int, int | None]) -> None:
        """A write of ``values`` comes; None stands for a deletion."""
        self._line({"begin": dict(values)})

    def end(self, values: Mapping[int, int | None]) -> None:
        """This write is done; after a kill, this is what came of it."""
        self._line({"end": dict(values)})

    def _line(self, facts: object) -> None:
        # One write to the kernel: it is there whole or not at all, whenever this process dies.
        os.write(self._file, json.dumps(facts).encode() + b"\n")

    @staticmethod
    def read(path: Path) -> State:
        """What the journal says now."""
        state = State({}, {})
        for line in path.read_text().splitlines() if path.exists() else ():
            facts = json.loads(line)
            values: Values = {int(key): value for key, value in (facts.get("begin") or facts.get("end")).items()}
            if "begin" in facts:
                state.pending = values
                continue
            state.pending = {}
            for key, value in values.items():
                if value is None:
                    state.held.pop(key, None)
                else:
                    state.held[key] = value
        return state
