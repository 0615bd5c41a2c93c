"""``python -m benchmarks.interfaces``: how long upgrades take with XDP and tcx on interfaces of many namespaces."""

from __future__ import annotations

import argparse
import itertools
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

import hitless
from benchmarks.machine import this_machine
from meshd.demo.lab import Lab
from meshd.demo.pods import Pods

__all__ = ["main"]

_SOURCE = Path(__file__).parent / "interfaces.bpf.c"
_MANIFEST = """
[bundle]
name = "interfaces"
version = "{number}.0"

[[object]]
file = "interfaces.bpf.o"

[[attach]]
program = "early"
hook = "xdp"
target = "eth0"
netns = "${{pods}}"
link = "early"

[[attach]]
program = "late"
hook = "tcx-ingress"
target = "eth0"
netns = "${{pods}}"
link = "late"
"""


class Row(msgspec.Struct, frozen=True):
    """Medians in ms with so many pods: of the first start, of an upgrade, and from its first hook to its last."""

    pods: int
    hooks: int
    start: float
    upgrade: float
    switch: float


def main(args: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interfaces", description=__doc__)
    parser.add_argument("--pods", type=_numbers, default=[1, 10, 50, 100, 200], metavar="N,N,...")
    parser.add_argument("--upgrades", type=int, default=5, help="with each number of pods (5)")
    chosen = parser.parse_args(args)
    console = Console()
    rows = [_measure(number, chosen.upgrades) for number in chosen.pods]
    table = Table(title="XDP and tcx on one interface of each pod (ms, medians)")
    for name in ("pods", "hooks", "first start", "upgrade", "first to last hook", "us a hook"):
        table.add_column(name, justify="right")
    for row in rows:
        each = row.switch * 1000 / row.hooks
        figures = (f"{number:.1f}" for number in (row.start, row.upgrade, row.switch, each))
        table.add_row(str(row.pods), str(row.hooks), *figures)
    console.print(table)
    for few, many in itertools.pairwise(rows):
        console.print(
            f"{many.pods / few.pods:.1f} times the pods: {many.upgrade / few.upgrade:.2f} times the upgrade, "
            f"{many.switch / few.switch:.2f} times the switch"
        )
    command = shlex.join(["python", "-m", "benchmarks.interfaces", *(sys.argv[1:] if args is None else args)])
    console.print(f"{this_machine()}\n{command}", highlight=False, soft_wrap=True)
    return 0


def _measure(number: int, upgrades: int) -> Row:
    with Lab() as lab:
        pods = Pods(lab)
        pods.add(number)
        releases = [_release(lab, each, str(pods.directory / "*")) for each in (1, 2)]
        node = hitless.Node(lab.bpffs / "interfaces")
        started = time.perf_counter()
        hitless.apply(node, releases[0])
        start = (time.perf_counter() - started) * 1e3
        took, switched, hooks = [], [], 0
        for turn in range(upgrades):
            started = time.perf_counter()
            result = hitless.apply(node, releases[(turn + 1) % 2])
            took.append((time.perf_counter() - started) * 1e3)
            switched.append(result.cutover.first_to_last_us / 1e3)
            hooks = result.cutover.hooks
        hitless.unload(node)
    return Row(number, hooks, start, statistics.median(took), statistics.median(switched))


def _release(lab: Lab, number: int, pods: str) -> hitless.Bundle:
    directory = lab.scratch / str(number)
    directory.mkdir()
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    command = ["clang-19", "-target", "bpf", "-g", "-O2", "-Wall", include, f"-DRELEASE={number}", "-c", str(_SOURCE)]
    subprocess.run([*command, "-o", str(directory / "interfaces.bpf.o")], check=True)
    (directory / "bundle.toml").write_text(_MANIFEST.format(number=number))
    return hitless.Bundle.load(directory, {"pods": pods})


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
