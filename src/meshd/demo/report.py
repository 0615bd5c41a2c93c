"""What a run showed: plain values, what of it counts as a loss, and how it is printed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from meshd.demo.mesh import Snapshot

__all__ = ["Counted", "Denials", "HeldTraffic", "Report", "ShortTraffic", "Upgrade", "print_report"]

_RESETS = ("ECONNRESET", "EPIPE")


class ShortTraffic(msgspec.Struct, frozen=True):
    """Short connections: how many were tried, went well, stalled; ``failed`` by kind; ``slowest`` in seconds."""

    tried: int = 0
    ok: int = 0
    failed: dict[str, int] = {}
    stalled: int = 0
    slowest: float = 0.0

    @classmethod
    def sum(cls, parts: Sequence[Mapping[str, Any]]) -> ShortTraffic:
        """Add up what several clients told."""
        failed: dict[str, int] = {}
        for part in parts:
            for kind, count in part.get("failed", {}).items():
                failed[kind] = failed.get(kind, 0) + count
        return cls(
            tried=sum(part.get("tried", 0) for part in parts),
            ok=sum(part.get("ok", 0) for part in parts),
            failed=failed,
            stalled=sum(part.get("stalled", 0) for part in parts),
            slowest=max((part.get("slowest", 0.0) for part in parts), default=0.0),
        )

    @property
    def reset(self) -> int:
        """How many of the failed ones were reset."""
        return sum(self.failed.get(kind, 0) for kind in _RESETS)


class HeldTraffic(msgspec.Struct, frozen=True):
    """Held connections and their numbered messages; ``trouble`` is what ended some, by kind."""

    connections: int = 0
    alive: int = 0
    sent: int = 0
    received: int = 0
    stalled: int = 0
    trouble: dict[str, int] = {}


class Denials(msgspec.Struct, frozen=True):
    """What the denied clients tried: ``through`` got a connection, ``other`` failed in another way than by policy.

    ``longest_gap`` is the longest time between two attempts, in seconds.
    """

    tried: int = 0
    denied: int = 0
    through: int = 0
    other: dict[str, int] = {}
    longest_gap: float = 0.0


class Counted(msgspec.Struct, frozen=True):
    """What the clients of a mesh counted, and what it counted itself: ``end`` was read with all traffic over."""

    connections: ShortTraffic
    held: HeldTraffic
    denied: Denials
    end: Snapshot | None

    @property
    def opened(self) -> int:
        """Connections that the clients opened."""
        return self.connections.tried + self.held.connections

    def losses(self) -> list[str]:
        """What was lost, one sentence each."""
        lost = _lost_traffic(self.connections, self.held, self.denied)
        end = self.end
        if end is not None:
            # All traffic is over: what was opened was established, and then closed.
            for counter in ("opened", "established", "closed"):
                counted = end.counters.get(counter, 0)
                if counted != self.opened:
                    lost.append(f"counters: the mesh counted {counted:,} {counter}, its clients opened {self.opened:,}")
            if left := sum(count for state, count in end.flows.items() if state != "closed"):
                lost.append(f"flows: {left:,} entries are left of connections that are over ({end.flows})")
            if end.hits != self.denied.denied:
                lost.append(f"policies: the mesh counted {end.hits:,} denials, its clients {self.denied.denied:,}")
        return lost


class Upgrade(msgspec.Struct, frozen=True, kw_only=True):
    """One upgrade. ``seconds`` is from SIGTERM to the old daemon until the new one said it is done.

    ``maps`` are names by action; ``planned`` tells whether the plan made before named the same actions.
    """

    number: int
    source: str = msgspec.field(name="from")
    to: str
    start_type: str
    maps: dict[str, list[str]]
    entries: int
    planned: bool
    allowed_loss: list[str]
    lost: dict[str, Any]
    steps: dict[str, float]
    seconds: float
    first_to_last_us: float | None
    stale_window_us: float | None
    connections: int
    before: Snapshot
    after: Snapshot


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One whole run; ``losses`` is empty when nothing was lost."""

    schema: int = 1
    ok: bool
    losses: list[str]
    fault: str | None
    seconds: float
    connections: ShortTraffic
    held: HeldTraffic
    denied: Denials
    upgrades: list[Upgrade]
    end: Snapshot | None
    opened_by_clients: int
    config_changes: int

    @classmethod
    def make(
        cls,
        *,
        fault: str | None,
        seconds: float,
        short: ShortTraffic,
        held: HeldTraffic,
        denied: Denials,
        upgrades: Sequence[Upgrade],
        wanted_upgrades: int,
        end: Snapshot | None,
        config_changes: int,
        trouble: Sequence[str] = (),
    ) -> Report:
        """Judge a run. ``end`` was read with all traffic over, ``trouble`` is what went wrong beside the traffic."""
        counted = Counted(short, held, denied, end)
        losses = [
            *trouble,
            *counted.losses(),
            *(loss for upgrade in upgrades for loss in _lost_by(upgrade, held.connections)),
        ]
        if len(upgrades) < wanted_upgrades:
            losses.append(f"only {len(upgrades)} of {wanted_upgrades} upgrades were done")
        return cls(
            ok=not losses, losses=losses, fault=fault, seconds=round(seconds, 3), connections=short, held=held,
            denied=denied, upgrades=list(upgrades), end=end, opened_by_clients=counted.opened,
            config_changes=config_changes,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        told: dict[str, Any] = msgspec.to_builtins(self)
        told["connections"]["reset"] = self.connections.reset
        return told


def _lost_traffic(short: ShortTraffic, held: HeldTraffic, denied: Denials) -> list[str]:
    lost = []
    if short.tried == 0:
        lost.append("connections: none was tried, so nothing was shown")
    for kind, count in sorted(short.failed.items()):
        lost.append(f"connections: {count:,} of {short.tried:,} failed with {kind}")
    if short.stalled:
        lost.append(f"connections: {short.stalled:,} took longer than a second")
    for kind, count in sorted(held.trouble.items()):
        lost.append(f"held connections: {count} ended with {kind}")
    if held.received < held.sent:
        lost.append(f"held connections: {held.sent - held.received:,} of {held.sent:,} messages never came back")
    if held.stalled:
        lost.append(f"held connections: {held.stalled:,} messages took longer than a second")
    if denied.tried == 0:
        lost.append("policies: no denied client tried, so nothing was shown")
    if denied.through:
        lost.append(f"policies: a denied client got through {denied.through:,} times")
    for kind, count in sorted(denied.other.items()):
        lost.append(f"policies: {count:,} attempts were not denied by policy but failed with {kind}")
    return lost


def _lost_by(upgrade: Upgrade, held: int) -> list[str]:
    name = f"upgrade {upgrade.number} ({upgrade.source} to {upgrade.to})"
    lost = []
    if upgrade.start_type != "update":
        lost.append(f"{name}: start type {upgrade.start_type}, not update")
    if not upgrade.planned:
        lost.append(f"{name}: it did not do what its plan said")
    if upgrade.after.held < held:
        lost.append(f"{name}: {held - upgrade.after.held} of {held} held connections have no established flow entry")
    before, after = upgrade.before, upgrade.after
    for counter in ("opened", "established", "closed"):
        if after.counters.get(counter, 0) < before.counters.get(counter, 0):
            was, now = before.counters[counter], after.counters.get(counter, 0)
            lost.append(f"{name}: the counter {counter} went from {was:,} back to {now:,}")
    if after.hits < before.hits:
        lost.append(f"{name}: the policies' hits went from {before.hits:,} back to {after.hits:,}")
    for map_name, what in upgrade.lost.items():
        lost.append(f"{name}: map {map_name} lost {what}")
    return lost


def print_report(report: Report, console: Console) -> None:
    """Print it for a person."""
    console.print()
    table = _table("Upgrades", "#", "release", "maps", ">seconds", ">first to last", ">stale")
    for one in report.upgrades:
        maps = "\n".join(f"{action} {', '.join(names)}" for action, names in one.maps.items())
        table.add_row(
            str(one.number), f"{one.source} > {one.to}", maps, f"{one.seconds:.2f}",
            _micro(one.first_to_last_us), _micro(one.stale_window_us),
        )  # fmt: skip
    console.print(table)

    headings = ("#", ">flows", ">held", ">policies", ">denials", ">connections counted")
    table = _table("Before > after each upgrade", *headings)
    for one in report.upgrades:
        a, b = one.before, one.after
        table.add_row(
            str(one.number), _pair(sum(a.flows.values()), sum(b.flows.values())), _pair(a.held, b.held),
            _pair(a.policies, b.policies), _pair(a.hits, b.hits),
            _pair(a.counters.get("opened", 0), b.counters.get("opened", 0)),
        )  # fmt: skip
    console.print(table)

    steps: dict[str, list[float]] = {}
    for one in report.upgrades:
        for step, seconds in one.steps.items():
            steps.setdefault(step, []).append(seconds)
    if steps:
        told = (f"{name} {sum(all_) / len(all_) * 1e3:.1f} ({max(all_) * 1e3:.1f})" for name, all_ in steps.items())
        console.print("Milliseconds a step, mean (most): " + ", ".join(told), highlight=False)
        console.print()

    short, held, denied = report.connections, report.held, report.denied
    say = functools.partial(console.print, highlight=False)
    say(
        f"Connections:       {short.tried:,} tried, {sum(short.failed.values()):,} failed, {short.reset:,} reset, "
        f"{short.stalled:,} stalled; slowest {short.slowest * 1000:.0f} ms; "
        f"{short.tried / report.seconds if report.seconds else 0:,.0f} a second"
    )
    say(
        f"Held connections:  {held.alive} of {held.connections} alive; {held.received:,} of {held.sent:,} numbered "
        f"messages came back in order, {held.stalled:,} stalled"
    )
    say(
        f"Denied client:     {denied.tried:,} attempts, {denied.denied:,} denied, {denied.through:,} got through; "
        f"never more than {denied.longest_gap * 1000:.0f} ms between two attempts"
    )
    if report.end is not None:
        say(
            f"Counters:          the mesh counted {report.end.counters.get('opened', 0):,} opened connections and "
            f"{report.end.hits:,} denials; its clients {report.opened_by_clients:,} and {denied.denied:,}"
        )
    say(
        f"Upgrades:          {len(report.upgrades)} in {report.seconds:.0f} s of traffic, while the service file "
        f"changed {report.config_changes:,} times"
    )
    planned = sum(upgrade.planned for upgrade in report.upgrades)
    say(f"Plans:             {planned} of {len(report.upgrades)} upgrades did just what their plan had said before")
    console.print()
    if report.ok:
        console.print("Nothing was lost.", style="bold green")
        return
    console.print("LOST:", style="bold red")
    for loss in report.losses:
        console.print(f"  - {loss}", style="red", highlight=False)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in headings:
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        table.add_column(heading.removeprefix(">"), justify=justify, no_wrap=heading != "maps")
    return table


def _pair(before: int, after: int) -> str:
    return f"{before:,} > {after:,}"


def _micro(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f} us"
