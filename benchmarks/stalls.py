"""How long another task waits for the CPU on which a map is copied."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import msgspec

from benchmarks.build import TOOLS, write_releases
from benchmarks.copying import WAYS, command_of
from benchmarks.running import Background, Bench, Way, fill, made_map, on_cpu, worker

__all__ = ["PROBES", "UPGRADE", "Stall", "measure_stalls"]

PROBES = {
    "fifo": "real-time, wakes every ms",
    "fair": "ordinary, wakes every ms",
    "busy": "ordinary, never sleeps",
}
"""The tasks that watch, and what they are."""

UPGRADE = "hitless, a whole upgrade"

_BATCH = 65536

Row = dict[str, float]


class Stall(msgspec.Struct, frozen=True):
    """How long ``probe`` had to wait beside ``what``, in milliseconds, over ``samples`` of all rounds.

    ``longest`` is the longest of all rounds, ``typical_longest`` the median of the rounds' longest.
    """

    what: str
    probe: str
    samples: int
    p99: float
    typical_longest: float
    longest: float


def measure_stalls(bench: Bench, entries: int, rounds: int, cpu: int, seconds: float) -> list[Stall]:
    """Every way beside every probe, both pinned to ``cpu``, in turn; ``seconds`` each where nothing is copied."""
    bench.say(f"Stalls of another task on CPU {cpu} while {entries:,} entries are copied there.")
    here = _Cpu(bench, entries, cpu, seconds)
    beside: dict[str, Callable[[str], Row]] = {
        "nothing": here.nothing,
        "a loop in user space": here.loop,
        **{WAYS[way]: partial(here.copy, way) for way in ("ours", "ours-base")},
        UPGRADE: here.upgrade,
        "the new map made, not filled": here.create,
        WAYS["batch"]: partial(here.copy, "batch"),
        f"{WAYS['c']}, {_BATCH:,} each": partial(here.copy, "c"),
        WAYS["pass"]: partial(here.copy, "pass"),
    }
    seen: dict[tuple[str, str], list[Row]] = {(what, probe): [] for what in beside for probe in PROBES}
    with made_map(here.releases[0], bench.source):
        fill(bench.source, entries)
        for _ in range(rounds):
            for (what, probe), rows in seen.items():
                rows.append(beside[what](probe))
    return [_stall(what, probe, rows) for (what, probe), rows in seen.items()]


def _stall(what: str, probe: str, rows: list[Row]) -> Stall:
    longest = [row["longest"] / 1000 for row in rows]
    return Stall(
        what=what,
        probe=probe,
        samples=sum(int(row["samples"]) for row in rows),
        p99=statistics.median(row["p99"] for row in rows) / 1000,
        typical_longest=statistics.median(longest),
        longest=max(longest),
    )


class _Cpu:
    """What each row of the table does there, while a probe watches."""

    def __init__(self, bench: Bench, entries: int, cpu: int, seconds: float) -> None:
        self.releases = write_releases(bench.files, entries, 0)
        self._bench = bench
        self._entries = entries
        self._cpu = cpu
        self._seconds = seconds

    def nothing(self, probe: str) -> Row:
        self._bench.settle()
        with self._watching(probe) as watcher:
            time.sleep(self._seconds)
            return _seen(watcher)

    def loop(self, probe: str) -> Row:
        return self._beside(probe, worker("spin", self._seconds))

    def create(self, probe: str) -> Row:
        return self._beside(probe, worker("create", self.releases[1]))

    def copy(self, way: str, probe: str) -> Row:
        bench = self._bench
        with made_map(self.releases[1], bench.target), bench.room():
            return self._beside(probe, command_of(way, bench, self.releases[0].parent, _BATCH))

    def upgrade(self, probe: str) -> Row:
        with self._bench.running(self.releases, self._entries) as root:
            return self._beside(probe, self._bench.upgrade(root, self.releases))

    def _beside(self, probe: str, command: list[str]) -> Row:
        self._bench.settle()
        with Way(self._bench.lab, on_cpu(self._cpu, command)) as run, self._watching(probe) as watcher:
            run.step()
            return _seen(watcher)

    def _watching(self, probe: str) -> Background:
        return Background(self._bench.lab, [str(TOOLS / "probe"), probe, str(self._cpu)])


def _seen(watcher: Background) -> Row:
    row: Row = json.loads(watcher.stop())
    return row
