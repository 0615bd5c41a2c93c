"""``python -m benchmarks``: measure, then print tables and goals, or JSON."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

import msgspec
from rich.console import Console

from benchmarks.build import build_tools
from benchmarks.connects import measure_connects
from benchmarks.copying import measure_copying
from benchmarks.machine import this_machine
from benchmarks.report import Report, goals_of, print_report
from benchmarks.running import Bench
from benchmarks.stalls import measure_stalls
from hitless.errors import HitlessError
from meshd.demo.lab import Lab

__all__ = ["main"]

_WIDTH = 150  # of the tables
_PARTS = ("copying", "stalls", "connects")


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark; a goal that is not met is no failure of the run."""
    options = _parse(args)
    console = Console(stderr=options.json)
    console.width = max(console.width, _WIDTH)
    try:
        with Lab() as lab:
            report = _measure(lab, options, console)
    except HitlessError as error:
        console.print(error.message, style="red", highlight=False, markup=False)
        return 1
    if options.json:
        print(msgspec.json.encode(report).decode())
    else:
        print_report(console, report)
    return 0


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--entries", type=_numbers, default=[10_000, 100_000, 1_000_000, 4_000_000], metavar="N,N,...")
    parser.add_argument("--rounds", type=int, default=3, help="how often every way is measured")
    parser.add_argument("--parts", type=_parts, default=list(_PARTS), metavar=",".join(_PARTS))
    parser.add_argument("--quick", action="store_true", help="10,000 entries, one round: whether it works, no figures")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(args)
    options.beside, options.seconds, options.patience = 1_000_000, 2.0, 10.0
    if options.quick:
        options.entries, options.rounds = [10_000], 1
        options.beside, options.seconds, options.patience = 10_000, 0.2, 0.0
    return options


def _numbers(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if not set(parts) <= set(_PARTS):
        raise argparse.ArgumentTypeError(f"want some of {', '.join(_PARTS)}")
    return parts


def _measure(lab: Lab, options: argparse.Namespace, console: Console) -> Report:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    build_tools()
    bench = Bench(lab, options.patience, say)
    cpus = sorted(os.sched_getaffinity(0))
    rounds, entries, seconds = options.rounds, options.beside, options.seconds
    copying = measure_copying(bench, options.entries, rounds) if "copying" in options.parts else []
    stalls = measure_stalls(bench, entries, rounds, cpus[-1], seconds) if "stalls" in options.parts else []
    connects = measure_connects(bench, entries, rounds, cpus, seconds) if "connects" in options.parts else []
    return Report(
        machine=this_machine(),
        command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        rounds=rounds,
        copying=copying,
        stalls=stalls,
        connects=connects,
        goals=goals_of(copying, stalls, connects),
        quiet=bench.quiet,
    )


if __name__ == "__main__":
    sys.exit(main())
