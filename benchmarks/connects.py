"""How long connect() takes before, during and after an upgrade of the map that its hook uses."""

from __future__ import annotations

import itertools
import time

import msgspec
import numpy as np
import numpy.typing as npt

from benchmarks.build import TOOLS, write_releases
from benchmarks.running import Background, Bench, Way, on_cpu
from meshd.demo.lab import BACKENDS4

__all__ = ["PHASES", "Connects", "measure_connects"]

PHASES = ("before", "during", "after")

_WARM_UP = 0.5
_PORT = 7777

Samples = npt.NDArray[np.uint64]


class Phase(msgspec.Struct, frozen=True):
    """The times of ``samples`` connects, in microseconds."""

    samples: int
    p50: float
    p99: float
    p999: float


class Connects(msgspec.Struct, frozen=True):
    """Clients ``where``; ``phases`` are over all rounds.

    ``ratios`` are each round's p99 during the upgrade over its p99 before; ``noise`` is what that ratio is between
    the second half of the time before and the first, when nothing happened.
    """

    where: str
    phases: dict[str, Phase]
    ratios: tuple[float, ...]
    noise: tuple[float, ...]


def measure_connects(bench: Bench, entries: int, rounds: int, cpus: list[int], seconds: float) -> list[Connects]:
    """Clients on another CPU than the upgrade, and clients anywhere; each phase but the upgrade takes ``seconds``."""
    bench.say(f"Time of connect() while a map of {entries:,} entries is upgraded.")
    places: dict[str, tuple[int | None, int | None]] = {"anywhere": (None, None)}
    if len(cpus) > 1:
        places = {f"pinned to CPU {cpus[0]}, the upgrade to CPU {cpus[-1]}": (cpus[0], cpus[-1]), **places}
    taken: dict[str, list[dict[str, Samples]]] = {where: [] for where in places}
    for _, (where, (client, upgrade)) in itertools.product(range(rounds), places.items()):
        taken[where].append(_round(bench, entries, client, upgrade, seconds))
    return [_connects(where, runs) for where, runs in taken.items()]


def _round(bench: Bench, entries: int, client: int | None, upgrade: int | None, seconds: float) -> dict[str, Samples]:
    releases = write_releases(bench.files, entries, 0)
    out = bench.files / "connects"
    watch = [str(TOOLS / "client"), BACKENDS4[0], str(_PORT), str(out), *([] if client is None else [str(client)])]
    with bench.running(releases, entries) as root:
        bench.settle()
        with (
            Way(bench.lab, on_cpu(upgrade, bench.upgrade(root, releases))) as run,
            Background(bench.lab, watch, "clients") as watcher,
        ):
            time.sleep(_WARM_UP + seconds)
            outcome = run.step()
            time.sleep(seconds)
            watcher.stop()
    rows = np.fromfile(out, np.uint64).reshape(-1, 2)
    out.unlink()
    return _phases(rows, outcome["from"], outcome["to"])


def _phases(rows: Samples, began: int, ended: int) -> dict[str, Samples]:
    """The times by phase; a connect belongs to the phase in which it began."""
    starts, times = rows[:, 0], rows[:, 1]
    warm = starts > starts[0] + np.uint64(_WARM_UP * 1e9)
    return {
        "before": times[warm & (starts < began)],
        "during": times[(starts >= began) & (starts < ended)],
        "after": times[starts >= ended],
    }


def _connects(where: str, runs: list[dict[str, Samples]]) -> Connects:
    phases = {}
    for name in PHASES:
        times = np.concatenate([run[name] for run in runs])
        p50, p99, p999 = (float(part) / 1000 for part in np.percentile(times, (50, 99, 99.9)))
        phases[name] = Phase(len(times), p50, p99, p999)
    halves = [np.array_split(run["before"], 2) for run in runs]
    return Connects(
        where=where,
        phases=phases,
        ratios=tuple(_p99(run["during"]) / _p99(run["before"]) for run in runs),
        noise=tuple(_p99(second) / _p99(first) for first, second in halves),
    )


def _p99(times: Samples) -> float:
    return float(np.percentile(times, 99))
