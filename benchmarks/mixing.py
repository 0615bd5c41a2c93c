"""``python -m benchmarks.mixing``: connections that see two releases, by mode of the cutover, and what a board costs.

Clients open connections and keep each for up to ``--longest`` ms, while five hooks go from one release to another
and back every ``--every`` ms: by link updates one after the other, then through a board of dispatchers, where each
upgrade waits for the old connections and is over only when none is left. Then programs are timed under the same traffic
with and without dispatchers in front of them, in turns, and one of them by test runs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from benchmarks.build import TOOLS, build_tools, compile_bpf
from benchmarks.machine import this_machine
from benchmarks.running import Background
from hitless.errors import HitlessError
from hitless.kernel.libbpf import check, ffi, lib, options
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, load_object
from hitless.kernel.switchboard import WITNESSES, Switchboard
from meshd.demo.lab import Lab

__all__ = ["MODES", "Stage", "Traffic", "main", "measure_costs", "measure_mixing", "measure_test_runs"]

_HOOKS = {
    "connect4": "cgroup_inet4_connect",
    "ops": "cgroup_sock_ops",
    "egress": "cgroup_inet_egress",
    "ingress": "cgroup_inet_ingress",
    "peername": "cgroup_inet4_getpeername",
}
_WITNESSES = dict(zip(("create", "ops"), WITNESSES, strict=True))
MODES = ("link updates", "a board")
_ENDLESS = 1 << 40
_TEST_RUNS = 500_000
_PACKET = bytes(64)


class Traffic(msgspec.Struct, frozen=True):
    """``connections``, ``threads`` at a time, each kept up to ``longest`` seconds; an upgrade ``every`` so many.

    It ends after ``limit`` seconds even if not all were made.
    """

    connections: int
    threads: int
    longest: float
    every: float
    limit: float


class Mixing(msgspec.Struct, frozen=True):
    """What became of ``connections`` (both ends of each count in the others) over ``upgrades`` in ``seconds``.

    ``drained`` are the milliseconds until no old connection was left: median and longest. ``moved`` were left after
    the time for that.
    """

    mode: str
    connections: int
    upgrades: int
    seconds: float
    old_first: int
    new_first: int
    mixed: int
    moved: int = 0
    drained: tuple[float, float] = (0.0, 0.0)

    @property
    def share(self) -> float:
        """The part of all ends that saw both releases."""
        return self.mixed / max(1, self.old_first + self.new_first)


class Costs(msgspec.Struct, frozen=True):
    """One round, without and with a board: nanoseconds a run of each hook's program, and connections a second."""

    without: dict[str, float]
    behind: dict[str, float]
    rates: tuple[float, float]


class Stage:
    """Two releases for the lab's cgroup, and the hooks there."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        shared: dict[str, Map] = {}
        self.releases = []
        for release in (0, 1):
            data = compile_bpf("mixing", lab.scratch, f"-DRELEASE={release}")
            loaded = load_object(data, "mixing", shared, {})
            shared = loaded.maps
            self.releases.append(loaded.programs)
        self._ends = shared["ends"]

    def ends(self) -> tuple[int, int, int]:
        """Ends of connections by what they saw, and begin to count anew."""
        counts = []
        for which in range(3):
            key = which.to_bytes(4, "little")
            counts.append(int.from_bytes(self._ends.lookup(key) or b"", "little"))
            self._ends.update(key, bytes(8))
        old, new, mixed = counts
        return old, new, mixed

    @contextmanager
    def plain(self, release: dict[str, Program]) -> Iterator[dict[str, Link]]:
        """``release`` on all hooks."""
        links = {}
        for name, kind in _HOOKS.items():
            links[name] = Link.attach_cgroup(release[name], self.lab.cgroup, kind)
        yield links
        for link in links.values():
            link.close()

    @contextmanager
    def board(self, release: dict[str, Program]) -> Iterator[tuple[Switchboard, dict[str, Program]]]:
        """``release`` behind dispatchers, and the dispatchers."""
        made = Switchboard.create(self.lab.bpffs / f"board{time.monotonic_ns()}")
        hooks = {**{name: kind for name, kind in _WITNESSES.items() if kind not in _HOOKS.values()}, **_HOOKS}
        dispatchers = {name: made.add(name, kind, release.get(name)) for name, kind in hooks.items()}
        links = [Link.attach_cgroup(dispatchers[name], self.lab.cgroup, kind) for name, kind in hooks.items()]
        yield made, dispatchers
        for link in links:
            link.close()
        made.close()

    def clients(self, count: int, threads: int, longest: float) -> Background:
        """Clients that make ``count`` connections, each for up to ``longest`` seconds."""
        command = [TOOLS / "connections", count, threads, int(longest * 1e6)]
        return Background(self.lab, [str(word) for word in command], "clients")


def measure_mixing(stage: Stage, mode: str, traffic: Traffic) -> Mixing:
    """Upgrade all the time while connections are made."""
    drained, moved = [], 0
    stage.ends()
    if mode == MODES[0]:
        with stage.plain(stage.releases[0]) as links:

            def update(upgrade: int, until: float) -> None:
                old, new = stage.releases[upgrade % 2], stage.releases[1 - upgrade % 2]
                for name, link in links.items():
                    link.update(new[name], old[name])

            connections, upgrades, seconds = _upgrade(stage, traffic, update)
    else:
        with stage.board(stage.releases[0]) as (board, _):
            board.left()  # the first time reads the kernel's types, which takes long

            def turn(upgrade: int, until: float) -> None:
                nonlocal moved
                for name in _HOOKS:
                    board.put(name, stage.releases[1 - upgrade % 2][name], board.epoch + 1)
                began = time.monotonic()
                board.flip()
                while board.left().before and time.monotonic() < until:
                    time.sleep(0.001)
                drained.append((time.monotonic() - began) * 1000)
                moved += board.settle()

            connections, upgrades, seconds = _upgrade(stage, traffic, turn)
    spread = (statistics.median(drained), max(drained)) if drained else (0.0, 0.0)
    return Mixing(mode, connections, upgrades, seconds, *stage.ends(), moved, spread)


def _upgrade(stage: Stage, traffic: Traffic, change: Callable[[int, float], None]) -> tuple[int, int, float]:
    began = time.monotonic()
    upgrades = 0
    with stage.clients(traffic.connections, traffic.threads, traffic.longest) as clients:
        while clients.is_running() and time.monotonic() < began + traffic.limit:
            due = began + (upgrades + 1) * traffic.every
            time.sleep(max(0.0, due - time.monotonic()))
            change(upgrades, time.monotonic() + 5.0)
            upgrades += 1
        made = int(clients.stop())
    return made, upgrades, time.monotonic() - began


def measure_costs(stage: Stage, rounds: int, seconds: float, threads: int) -> list[Costs]:
    """Programs that do nothing, under traffic, as the kernel counts their time.

    They do nothing so that nothing else is counted, such as storage that is there already when they ask for it.
    """
    bare = load_object(compile_bpf("bare", stage.lab.scratch), "bare", {}, {}).programs
    found = []
    for _ in range(rounds):
        with stage.plain(bare):
            without, rate = _timed(stage, {name: bare[name] for name in _HOOKS}, seconds, threads)
        with stage.board(bare) as (_, dispatchers):
            behind, slower = _timed(stage, dispatchers, seconds, threads)
        found.append(Costs(without, behind, (rate, slower)))
    return found


def _timed(
    stage: Stage, programs: dict[str, Program], seconds: float, threads: int
) -> tuple[dict[str, float], float]:
    began = time.monotonic()
    with stage.clients(_ENDLESS, threads, 0.0) as clients:
        counting = check(ctypes.CDLL("libbpf.so.1").bpf_enable_stats(0), "BPF_ENABLE_STATS", "BPF_STATS_RUN_TIME")
        before = {name: _counters(program) for name, program in programs.items()}
        time.sleep(seconds)
        after = {name: _counters(program) for name, program in programs.items()}
        os.close(counting)
        made = int(clients.stop())
    times = {name: (after[name][0] - before[name][0]) / (after[name][1] - before[name][1]) for name in programs}
    return times, made / (time.monotonic() - began)


def _counters(program: Program) -> tuple[int, int]:
    """Nanoseconds and runs."""
    facts = dict(re.findall(r"(\w+):\s*(\d+)", Path(f"/proc/self/fdinfo/{program.fd}").read_text()))
    return int(facts["run_time_ns"]), int(facts["run_cnt"])


def measure_test_runs(stage: Stage, rounds: int) -> dict[str, list[float]]:
    """Nanoseconds a run of programs that do nothing: alone, and behind a dispatcher."""
    board = Switchboard.create(stage.lab.bpffs / "bare")
    kind = _HOOKS["egress"]
    with Map.open(stage.lab.bpffs / "bare" / "storage") as storage:
        bare = load_object(compile_bpf("bare", stage.lab.scratch), "bare", {"board_storage": storage}, {}).programs
    ways = {
        "egress": bare["bound"],
        "egress behind a dispatcher, its socket bound to an epoch": board.add("bound", kind, bare["bound"]),
        "egress behind a dispatcher, its socket older than that": board.add("egress", kind, bare["egress"]),
        "XDP": bare["frame"],
        "XDP behind a dispatcher, which knows of no sockets": board.add("frame", "xdp", bare["frame"]),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, program in ways.items():
            taken[way].append(_test_run(program))
    board.close()
    return taken


def _test_run(program: Program) -> int:
    packet = ffi.from_buffer(_PACKET)
    asked = options("bpf_test_run_opts", data_in=packet, data_size_in=len(_PACKET), repeat=_TEST_RUNS)
    check(lib().bpf_prog_test_run_opts(program.fd, asked), "BPF_PROG_TEST_RUN", program.info.name)
    return int(asked.duration)


def main(args: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixing", description=__doc__)
    parser.add_argument("--connections", type=int, default=200_000, help="in each mode")
    parser.add_argument("--every", type=float, default=100.0, metavar="MS", help="an upgrade")
    parser.add_argument("--longest", type=float, default=20.0, metavar="MS", help="that a connection is kept")
    parser.add_argument("--threads", type=int, default=64, help="connections at a time")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="for each mode")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    settings = parser.parse_args(args)
    longest, every = settings.longest / 1000, settings.every / 1000
    traffic = Traffic(settings.connections, settings.threads, longest, every, settings.limit)
    print(f"{this_machine()}\n{shlex.join(['python', '-m', 'benchmarks.mixing', *sys.argv[1:]])}\n")
    try:
        build_tools()
        with Lab() as lab:
            stage = Stage(lab)
            for mode in MODES:
                _print_mixing(measure_mixing(stage, mode, traffic))
            _print_costs(measure_costs(stage, settings.rounds, 1.0, settings.threads))
            _print_test_runs(measure_test_runs(stage, settings.rounds))
    except HitlessError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


def _print_mixing(found: Mixing) -> None:
    ends = found.old_first + found.new_first
    print(
        f"{found.mode}: {found.connections:,} connections, {found.upgrades:,} upgrades in {found.seconds:.1f} s; "
        f"{found.mixed:,} of {ends:,} ends saw two releases ({found.share:.2%})"
    )
    if found.mode == "a board":
        median, longest = found.drained
        print(f"  old connections were gone {median:.0f} ms after a flip ({longest:.0f} at most); {found.moved} moved")


def _print_costs(rounds: list[Costs]) -> None:
    print("\nns a run of programs that do nothing, under traffic, by the kernel's count; medians (from, to)")
    for name in rounds[0].behind:
        without, behind = [each.without.get(name, 0.0) for each in rounds], [each.behind[name] for each in rounds]
        more = [after - before for before, after in zip(without, behind, strict=True)]
        print(f"  {name:10} alone {_spread(without)}   behind a dispatcher {_spread(behind)}   more {_spread(more)}")
    for side, where in enumerate(("without a board", "with a board")):
        print(f"  connections a second, {where}: {_spread([each.rates[side] for each in rounds])}")


def _print_test_runs(taken: dict[str, list[float]]) -> None:
    print(f"\nns a run of programs that do nothing, in {_TEST_RUNS:,} test runs; medians (from, to)")
    for way, times in taken.items():
        print(f"  {way:58} {_spread(times)}")


def _spread(times: list[float]) -> str:
    return f"{statistics.median(times):6.1f} ({min(times):.1f} to {max(times):.1f})"


if __name__ == "__main__":
    sys.exit(main())
