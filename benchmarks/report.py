"""The goals, what was measured against each, and all of it as tables."""

from __future__ import annotations

from functools import partial
from typing import Literal

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.connects import PHASES, Connects
from benchmarks.copying import WAYS, Copying, Figure
from benchmarks.machine import Machine
from benchmarks.stalls import PROBES, UPGRADE, Stall

__all__ = ["Goal", "Report", "goals_of", "print_report"]

NO_BASE, WITH_BASE, WHOLE, NAIVE = 1.4, 0.95, 2.0, 10.0
STALL_MS = 5.0
P99 = 1.1
# The C program too is slower on large maps, which fit no cache: growth is linear if it is no worse than the program's.
GROWTH = 1.1
GROWTH_FROM = 100_000
SAME_MEMORY = 1.1


class Goal(msgspec.Struct, frozen=True):
    """One goal in one setting: what was ``wanted`` and ``measured``."""

    what: str
    where: str
    wanted: str
    measured: float
    met: bool


class Report(msgspec.Struct, frozen=True):
    """One run. ``quiet`` is false if the machine did other work, which makes all figures doubtful."""

    machine: Machine
    command: str
    rounds: int
    copying: list[Copying]
    stalls: list[Stall]
    connects: list[Connects]
    goals: list[Goal]
    quiet: bool


def goals_of(copying: list[Copying], stalls: list[Stall], connects: list[Connects]) -> list[Goal]:
    """Every goal in every setting."""
    goals = [goal for run in copying for goal in _copying_goals(run)]
    for preallocated in (True, False):
        goals += _growth_goals([run for run in copying if run.setting.preallocated == preallocated])
    for stall in stalls:
        if stall.what in (WAYS["ours"], WAYS["ours-base"], UPGRADE) and stall.probe != "busy":
            where = f"{stall.what}; {PROBES[stall.probe]}"
            goals.append(_at_most("longest stall on the copying CPU, ms", where, STALL_MS, stall.longest))
    for each in connects:
        before = each.phases["before"]
        for name in ("during", "after"):
            ratio = each.phases[name].p99 / before.p99
            goals.append(_at_most(f"p99 of connect(), {name} over before", f"clients {each.where}", P99, ratio))
    return goals


def _copying_goals(run: Copying) -> list[Goal]:
    where, figures, memory = _where(run), run.figures, run.setting.source_bytes
    base, ours = figures["ours-base"], figures["ours"]
    c, naive = figures["c"].seconds, figures["naive"].seconds
    steps = base.seconds + (base.rest or 0.0)
    return [
        _at_least("speed without a base, over C batch calls", where, NO_BASE, c / ours.seconds),
        *(
            _at_least(f"speed with a base, over {WAYS[way]}", where, WITH_BASE, figures[way].seconds / base.seconds)
            for way in ("c-array", "c-file")
        ),
        _below("time of a whole apply, over C batch calls", where, WHOLE, run.upgrade.seconds / c),
        _below("time of the carrier's steps, over C batch calls", where, WHOLE, steps / c),
        _at_least("speed without a base, over the naive loop", where, NAIVE, naive / ours.seconds),
        _at_least("speed with a base, over the naive loop", where, NAIVE, naive / base.seconds),
        _below("memory of the copy with a base, over the old map's", where, 1.0, _bytes(base) / memory),
        _below("memory of all steps with a base, over the old map's", where, 1.0, _all_bytes(base) / memory),
    ]


def _growth_goals(runs: list[Copying]) -> list[Goal]:
    """How the largest map compares with that of 100 thousand entries."""
    small = next((run for run in runs if run.setting.entries >= GROWTH_FROM), None)
    if small is None or small is runs[-1]:
        return []
    large = runs[-1]
    where = f"{_where(large)}, against {small.setting.entries:,}"
    goals = []
    for way in ("ours", "ours-base"):
        growth, usual = (_each(large, name) / _each(small, name) for name in (way, "c"))
        what = f"time an entry, {WAYS[way]}: growth {growth:.2f}, over that of C batch calls, {usual:.2f}"
        goals.append(_at_most(what, where, GROWTH, growth / usual))
    grown = _all_bytes(large.figures["ours"]) / max(1, _all_bytes(small.figures["ours"]))
    goals.append(_at_most("memory without a base", where, SAME_MEMORY, grown))
    return goals


def _each(run: Copying, way: str) -> float:
    return run.figures[way].seconds / run.setting.entries


def _bytes(figure: Figure) -> int:
    return figure.user_bytes + figure.kernel_bytes


def _all_bytes(figure: Figure) -> int:
    return max(_bytes(figure), figure.rest_bytes)


def _where(run: Copying) -> str:
    return f"{run.setting.entries:,}{'' if run.setting.preallocated else ', NO_PREALLOC'}"


def _at_least(what: str, where: str, wanted: float, measured: float) -> Goal:
    return Goal(what, where, f"at least {wanted:g}", measured, measured >= wanted)


def _at_most(what: str, where: str, wanted: float, measured: float) -> Goal:
    return Goal(what, where, f"at most {wanted:g}", measured, measured <= wanted)


def _below(what: str, where: str, wanted: float, measured: float) -> Goal:
    return Goal(what, where, f"below {wanted:g}", measured, measured < wanted)


def print_report(console: Console, report: Report) -> None:
    """Print all tables, the goals last."""
    say = partial(console.print, highlight=False)
    say(str(report.machine))
    say(f"{report.command}  ({report.rounds} rounds of all ways in turn; medians)\n")
    for run in report.copying:
        _print_copying(console, run)
    if report.copying:
        say(
            "Seconds count from the open maps to the last entry, with all that a way prepares for itself; rounds over "
            "what was written meanwhile come after. Memory is "
            "besides the two maps: user is the growth of the process at its peak (VmHWM, mapped files included), "
            "kernel what its other maps and programs hold by the kernel's word (memlock in fdinfo).\n"
        )
    if report.stalls:
        _print_stalls(console, report.stalls)
    for each in report.connects:
        _print_connects(console, each)
    _print_goals(console, report.goals)
    if not report.quiet:
        console.print("The machine did other work meanwhile: do not trust these figures.", style="bold yellow")


def _print_copying(console: Console, run: Copying) -> None:
    setting = run.setting
    sizes = f"the old map takes {_size(setting.source_bytes)}, the new {_size(setting.target_bytes)}"
    table = _table(
        f"{_where(run)} entries; {sizes}",
        "way", ">M entries/s", ">seconds", ">of that prepared", ">from", ">to", ">CPU s", ">user", ">kernel", ">batch",
    )  # fmt: skip
    for figure in run.figures.values():
        table.add_row(
            WAYS[figure.way],
            f"{setting.entries / figure.seconds / 1e6:.2f}",
            f"{figure.seconds:.3f}",
            f"{figure.prepared:.3f}" if figure.prepared else "",
            f"{figure.fastest:.3f}",
            f"{figure.slowest:.3f}",
            f"{figure.cpu:.3f}",
            _size(figure.user_bytes),
            _size(figure.kernel_bytes),
            f"{figure.batch:,}" if figure.batch else "",
        )
    console.print(table)
    for figure in run.figures.values():
        if figure.rest is not None:
            console.print(
                f"  {WAYS[figure.way]}: {figure.rest:.3f} s more until it is exact, {_size(figure.rest_bytes)}",
                highlight=False,
            )
    steps = ", ".join(f"{step} {seconds:.3f}" for step, seconds in run.upgrade.steps.items() if seconds >= 0.0005)
    console.print(f"  a whole apply: {run.upgrade.seconds:.3f} s ({steps})\n", highlight=False)


def _print_stalls(console: Console, stalls: list[Stall]) -> None:
    headings = [f">{kind}: {column}" for kind in PROBES for column in ("p99", "longest")]
    table = _table("Wait of another task on the copying CPU, ms", "beside", *headings)
    for what in dict.fromkeys(stall.what for stall in stalls):
        of = {stall.probe: stall for stall in stalls if stall.what == what}
        table.add_row(what, *(f"{value:.2f}" for kind in PROBES for value in (of[kind].p99, of[kind].longest)))
    console.print(table)
    kinds = "; ".join(f"{kind}: {label}" for kind, label in PROBES.items())
    console.print(f"  {kinds}. The last shares the CPU by turns and sees the other's turns too.\n", highlight=False)


def _print_connects(console: Console, each: Connects) -> None:
    table = _table(f"connect(), clients {each.where}, us", "", ">samples", ">p50", ">p99", ">p99.9")
    for name in PHASES:
        phase = each.phases[name]
        table.add_row(name, f"{phase.samples:,}", f"{phase.p50:.1f}", f"{phase.p99:.1f}", f"{phase.p999:.1f}")
    console.print(table)
    noise = f"between two halves of the time before: {_list(each.noise)}"
    console.print(f"  p99 during over before, by round: {_list(each.ratios)}; {noise}\n", highlight=False)


def _print_goals(console: Console, goals: list[Goal]) -> None:
    table = _table("Goals", "", "entries or where", ">wanted", ">measured", "")
    for goal in goals:
        verdict = "met" if goal.met else "[red]NOT MET[/red]"
        table.add_row(goal.what, goal.where, goal.wanted, f"{goal.measured:.2f}", verdict)
    console.print(table)
    met = sum(goal.met for goal in goals)
    console.print(f"{met} met, {len(goals) - met} not met.", highlight=False)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, min_width=len(title))
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=justify)
    return table


def _size(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


def _list(ratios: tuple[float, ...]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)
