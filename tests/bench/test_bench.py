"""The benchmark's ways all do the same work, and its report has every figure."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.build import NO_PREALLOC, TOOLS, build_tools, write_releases
from benchmarks.copying import WAYS, command_of
from benchmarks.running import Background, Bench, BenchError, Way, fill, made_map
from hitless.kernel.maps import Map
from meshd.demo.lab import Lab

ENTRIES = 5000
BEFORE, AFTER = struct.Struct("=II3Q8I"), struct.Struct("=QII3Q8I")


@pytest.fixture(scope="module")
def bench(module_lab: Lab) -> Iterator[Bench]:
    build_tools()
    yield Bench(module_lab, 0.0, lambda text: None)


def contents(held: Map) -> dict[bytes, bytes]:
    keys, values = held.entries()
    return {key.tobytes(): value.tobytes() for key, value in zip(keys, values, strict=True)}


def converted(value: bytes) -> bytes:
    hits, state, *rest = BEFORE.unpack(value)
    return AFTER.pack(hits, state, 0, *rest)


@pytest.mark.parametrize("flags", [0, NO_PREALLOC])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_makes_the_same_new_map(bench: Bench, way: str, flags: int) -> None:
    releases = write_releases(bench.files, ENTRIES, flags)
    with (
        made_map(releases[0], bench.source) as source,
        made_map(releases[1], bench.target) as target,
        bench.room(),
    ):
        fill(bench.source, ENTRIES)
        with Way(bench.lab, command_of(way, bench, releases[0].parent, batch=1000)) as run:
            outcome = run.step((source.info.id, target.info.id))
        assert len(contents(target)) == ENTRIES
        assert contents(target) == {key: converted(value) for key, value in contents(source).items()}
        assert outcome["entries"] in (ENTRIES, 0), "the pass does not count"
        assert outcome["seconds"] > 0


def test_the_rounds_after_the_pass_are_not_counted_as_copying(bench: Bench) -> None:
    releases = write_releases(bench.files, ENTRIES, 0)
    with made_map(releases[0], bench.source), made_map(releases[1], bench.target), bench.room():
        fill(bench.source, ENTRIES)
        with Way(bench.lab, command_of("ours-base", bench, releases[0].parent)) as run:
            copied, rest = run.step(), run.step()
    assert 0 < copied["prepared"] < copied["seconds"]
    assert copied["tail"] > 0
    assert rest["entries"] == ENTRIES


@pytest.mark.parametrize(("way", "whose"), [("c-file", "user"), ("ours-base", "kernel")])
def test_the_memory_of_a_base_is_counted_and_grows_with_the_map(bench: Bench, way: str, whose: str) -> None:
    taken = {}
    for entries in (ENTRIES, 20 * ENTRIES):
        releases = write_releases(bench.files, entries, 0)
        with made_map(releases[0], bench.source) as old, made_map(releases[1], bench.target) as new, bench.room():
            fill(bench.source, entries)
            with Way(bench.lab, command_of(way, bench, releases[0].parent, batch=1024)) as run:
                taken[entries] = run.step((old.info.id, new.info.id))[whose]
    grown = taken[20 * ENTRIES] - taken[ENTRIES]
    base = 19 * ENTRIES * (16 + 64)
    assert 0.95 * base < grown < 1.3 * base


def test_what_a_way_says_when_it_fails_is_in_the_error(bench: Bench) -> None:
    with pytest.raises(BenchError, match=r"opening the maps.*No such file"):
        Way(bench.lab, command_of("c-single", bench, Path("/")))


def test_a_probe_notices_a_task_that_comes_before_it(bench: Bench) -> None:
    spin = "import os, time; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(60)); "
    spin += "end = time.monotonic() + 0.2\nwhile time.monotonic() < end: pass"
    with Background(bench.lab, [str(TOOLS / "probe"), "fifo", "0"]) as probe:
        subprocess.run(["taskset", "-c", "0", sys.executable, "-c", spin], check=True)
        seen = json.loads(probe.stop())
    assert seen["longest"] > 100_000


def test_the_quick_form_has_every_figure_and_a_verdict_on_every_goal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json"],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, timeout=600, check=True,
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    assert [run["setting"]["entries"] for run in report["copying"]] == [10_000, 10_000]
    for run in report["copying"]:
        assert set(run["figures"]) == set(WAYS)
        assert len({figure["digest"] for figure in run["figures"].values()}) == 1
        assert all(figure["seconds"] > 0 for figure in run["figures"].values())
        assert run["figures"]["ours-base"]["kernel_bytes"] > 10_000 * 64
        assert run["upgrade"]["seconds"] > run["upgrade"]["steps"]["copy"] > 0
    # A copy as short as this one can be over before a probe is due.
    assert any(stall["longest"] > 0 for stall in report["stalls"] if stall["probe"] != "busy")
    assert all(phase["samples"] > 0 for each in report["connects"] for phase in each["phases"].values())
    assert {goal["met"] for goal in report["goals"]} <= {True, False, None}
    assert all((goal["met"] is None) == (goal["measured"] is None) for goal in report["goals"])
