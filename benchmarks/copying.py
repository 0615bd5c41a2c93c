"""Speed and memory of each way to copy a map, all ways in turn."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.build import NO_PREALLOC, TOOLS, compile_pass, write_releases
from benchmarks.running import Bench, Outcome, Way, digest, fill, made_map, memory_of, worker

__all__ = ["WAYS", "Copying", "Figure", "Setting", "Upgrade", "command_of", "measure_copying"]

WAYS = {
    "ours": "hitless in the kernel, no base",
    "ours-base": "hitless in the kernel, with a base",
    "batch": "hitless' batch copy, no base",
    "batch-base": "hitless' batch copy, with a base",
    "c": "C, batch calls, no base",
    "c-array": "C, batch calls, base in an array",
    "c-file": "C, batch calls, base in a tmpfs file",
    "c-single": "C, entry by entry",
    "naive": "Python, entry by entry",
    "pass": "one unbounded pass in the kernel",
}
"""The ways by name, and what they are."""

# The C program's ways that have a batch size, and where each keeps its base.
_BASES = {"c": "none", "c-array": "array", "c-file": "file"}
# The ways that are carriers, which go on after the copy, and the kind of each.
_CARRIED = {"ours": "mirrored", "ours-base": "entries-in-kernel", "batch-base": "entries"}
_SIZES = tuple(1024 << shift for shift in range(7))
_TRIES = 2
_MOST_TO_TRY = 1_000_000  # larger maps get the batch size that suited the next smaller best


def command_of(way: str, bench: Bench, releases: Path, batch: int | None = None) -> list[str]:
    """What to run for ``way``; ``releases`` is the directory of both, ``batch`` the C program's batch size."""
    maps = [str(bench.source), str(bench.target)]
    if way in _BASES:
        where = str(bench.base_file) if _BASES[way] == "file" else _BASES[way]
        return [str(TOOLS / "opponent"), "batch", str(batch), where, *maps]
    if way == "c-single":
        return [str(TOOLS / "opponent"), "single", *maps]
    if way in _CARRIED:
        return worker("carrier", _CARRIED[way], releases, *maps, bench.carried / "flow")
    if way == "batch":
        return worker("batch", releases, *maps)
    if way == "pass":
        return worker("pass", compile_pass(bench.files), *maps)
    return worker("naive", *maps)


class Setting(msgspec.Struct, frozen=True):
    """One map: how many entries, and whether they are preallocated. Sizes in bytes, as the kernel tells them."""

    entries: int
    preallocated: bool
    source_bytes: int
    target_bytes: int


class Figure(msgspec.Struct, frozen=True):
    """What a way took in a setting: medians over rounds of seconds, the most of bytes.

    ``cpu`` are seconds of CPU time, which other work on the machine disturbs less. ``prepared`` is the part of
    ``seconds`` that goes by before the first entry. ``rest`` is what hitless does after its pass over all entries until
    the new map is exact: rounds over what differs, checks, catch-up. ``digest`` says what the new map then held.
    """

    way: str
    seconds: float
    fastest: float
    slowest: float
    cpu: float
    user_bytes: int
    kernel_bytes: int
    prepared: float = 0.0
    rest: float | None = None
    rest_bytes: int = 0
    batch: int | None = None
    digest: str = ""


class Upgrade(msgspec.Struct, frozen=True):
    """A whole apply of a release with this one map: medians of seconds, and of its steps."""

    seconds: float
    steps: dict[str, float]


class Copying(msgspec.Struct, frozen=True):
    """All that was measured in one setting."""

    setting: Setting
    figures: dict[str, Figure]
    upgrade: Upgrade


def measure_copying(bench: Bench, sizes: Sequence[int], rounds: int) -> list[Copying]:
    """Every way in every setting."""
    made = []
    for preallocated in (True, False):
        batches: dict[str, int] = {}
        for entries in sorted(sizes):
            bench.say(f"Copying {entries:,} entries, {'preallocated' if preallocated else 'BPF_F_NO_PREALLOC'}.")
            run = _Run(bench, entries, preallocated)
            if not batches or entries <= _MOST_TO_TRY:
                batches = run.best_batches(min(rounds, _TRIES))
            made.append(run.measure(rounds, batches))
    return made


class _Run:
    def __init__(self, bench: Bench, entries: int, preallocated: bool) -> None:
        self._bench = bench
        self._entries = entries
        self._preallocated = preallocated
        self._releases = write_releases(bench.files, entries, 0 if preallocated else NO_PREALLOC)

    def measure(self, rounds: int, batches: dict[str, int]) -> Copying:
        """All ways in turn, again and again."""
        bench = self._bench
        with made_map(self._releases[0], bench.source) as source:
            fill(bench.source, self._entries)
            took: dict[str, list[list[Outcome]]] = {way: [] for way in WAYS}
            digests: dict[str, str] = {}
            upgrades: list[Outcome] = []
            target_bytes = 0
            order = [*took, "upgrade"]
            for turn in range(rounds):
                for way in order[turn % len(order) :] + order[: turn % len(order)]:
                    if way == "upgrade":
                        upgrades.append(self._upgrade())
                        continue
                    with made_map(self._releases[1], bench.target) as target:
                        steps = self._run(way, batches, source.info.id, target.info.id)
                        took[way].append(steps)
                        if turn == 0:
                            digests[way] = digest(bench.target)
                        target_bytes = memory_of(target)
            setting = Setting(self._entries, self._preallocated, memory_of(source), target_bytes)
        figures = {way: _figure(way, runs, batches.get(way), digests[way]) for way, runs in took.items()}
        whole = Upgrade(
            seconds=statistics.median(each["seconds"] for each in upgrades),
            steps={step: statistics.median(each["steps"][step] for each in upgrades) for step in upgrades[0]["steps"]},
        )
        return Copying(setting, figures, whole)

    def best_batches(self, tries: int) -> dict[str, int]:
        """The batch size that suits each of the C program's ways best, found by trying each ``tries`` times."""
        bench = self._bench
        best: dict[str, dict[int, float]] = {way: {} for way in _BASES}
        with made_map(self._releases[0], bench.source) as source:
            fill(bench.source, self._entries)
            for _, way, size in itertools.product(range(tries), _BASES, _SIZES):
                if size <= max(self._entries, _SIZES[0]):
                    with made_map(self._releases[1], bench.target) as target:
                        (outcome,) = self._run(way, {way: size}, source.info.id, target.info.id)
                    best[way][size] = min(best[way].get(size, float("inf")), outcome["seconds"])
        chosen = {way: min(tried, key=tried.__getitem__) for way, tried in best.items()}
        for way, tried in best.items():
            rates = ", ".join(f"{size >> 10}k {self._entries / seconds / 1e6:.2f}" for size, seconds in tried.items())
            bench.say(f"  {WAYS[way]}: best batch {chosen[way]:,} (M entries/s by size: {rates})")
        return chosen

    def _run(self, way: str, batches: dict[str, int], source: int, target: int) -> list[Outcome]:
        bench = self._bench
        bench.settle()
        command = command_of(way, bench, self._releases[0].parent, batches.get(way))
        with bench.room(), Way(bench.lab, command) as run:
            return [run.step((source, target)) for _ in range(2 if way in _CARRIED else 1)]

    def _upgrade(self) -> Outcome:
        bench = self._bench
        with bench.running(self._releases, self._entries) as root:
            bench.settle()
            with Way(bench.lab, bench.upgrade(root, self._releases)) as run:
                return run.step()


def _figure(way: str, runs: list[list[Outcome]], batch: int | None, held: str) -> Figure:
    copies = [steps[0] for steps in runs]
    seconds = [copy["seconds"] for copy in copies]
    rests = [steps for steps in runs if len(steps) > 1]
    return Figure(
        way=way,
        seconds=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        cpu=statistics.median(copy["cpu"] for copy in copies),
        user_bytes=max(copy["user"] for copy in copies),
        kernel_bytes=max(copy["kernel"] for copy in copies),
        prepared=statistics.median(copy.get("prepared", 0.0) for copy in copies),
        rest=statistics.median(copy["tail"] + rest["seconds"] for copy, rest in rests) if rests else None,
        rest_bytes=max((rest["user"] + rest["kernel"] for _, rest in rests), default=0),
        batch=batch,
        digest=held,
    )
