"""``python -m meshd.demo``: upgrade a running mesh again and again under traffic, and report what was lost."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

import hitless
from hitless.errors import HitlessError, NodeError
from meshd.demo.clients import Traffic
from meshd.demo.faults import FAULTS
from meshd.demo.lab import BACKENDS4, BACKENDS6, Lab
from meshd.demo.mesh import (
    DENIED,
    ECHO,
    RELEASES,
    WEB,
    Churn,
    MeshdProcess,
    Snapshot,
    bundle_of,
    take_snapshot,
)
from meshd.demo.report import Report, Upgrade, print_report
from meshd.demo.servers import start_echo, start_nginx

__all__ = ["main"]

_REFRESH = 0.1
_DRAIN = 3.0


class Screen:
    """Live progress: a small table on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._say_at = 0.0

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show progress while the body runs."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, transient=True, refresh_per_second=8) as live:
            self._live = live
            yield
        self._live = None

    def say(self, text: str) -> None:
        """Print one line, above the table."""
        self.console.print(text, highlight=False)

    def show(self, traffic: Traffic, done: int, wanted: int, version: str, left: float) -> None:
        """Show the totals: every time on a terminal, else now and then."""
        short, held, denied = traffic.short_now, traffic.held_now, traffic.denied_now
        failed = sum(short.failed.values())
        if self._live is not None:
            table = Table(show_header=False)
            table.add_row("release", version, "upgrades", f"{done} of {wanted}", "next in", f"{max(0.0, left):.0f} s")
            table.add_row("connections", f"{short.tried:,}", "failed", f"{failed:,}", "stalled", f"{short.stalled:,}")
            table.add_row("held alive", f"{held.alive}", "messages", f"{held.received:,}", "trouble", f"{held.trouble}")
            table.add_row("denied", f"{denied.denied:,}", "got through", f"{denied.through:,}", "", "")
            self._live.update(table)
        elif time.monotonic() >= self._say_at:
            self._say_at = time.monotonic() + 5.0
            self.say(
                f"  traffic: {short.tried:,} connections, {failed:,} failed; {held.alive} held, {held.received:,} "
                f"messages; {denied.denied:,} denied, {denied.through:,} got through"
            )


class Demo:
    """One run in a lab."""

    def __init__(self, lab: Lab, screen: Screen, options: argparse.Namespace) -> None:
        self.lab = lab
        self.screen = screen
        self.options = options
        self.node = hitless.Node(lab.bpffs / "mesh")
        self.services = lab.scratch / "services.yaml"
        self._options = ("--services", str(self.services))
        self.upgrades: list[Upgrade] = []
        self.trouble: list[str] = []

    def run(self) -> Report:
        """Do it all; raises HitlessError when the demo itself cannot go on."""
        say, options = self.screen.say, self.options
        say(f"Lab {self.lab.name}: a network namespace, a bpffs and a cgroup of its own.")
        start_nginx(self.lab, (*BACKENDS4, *BACKENDS6))
        start_echo(self.lab, (*BACKENDS4, *BACKENDS6))
        churn = Churn(self.services)
        self.meshd = MeshdProcess(self.lab, RELEASES[0], self._options)
        ready = self.meshd.wait_until_ready()
        say(f"meshd {ready.get('version')} is live (start type {ready.get('start_type')}), with nginx behind it.")
        self.traffic = Traffic(self.lab, options.held, WEB, ECHO, DENIED)
        start = time.monotonic()
        with churn, self.screen.showing():
            done = self._keep_upgrading(start)
        elapsed = time.monotonic() - start
        say("The traffic ends, and the books are compared.")
        self.trouble += self.traffic.stop(*self.traffic.short, self.traffic.denied)
        if done:
            self._compare_with_file(churn)
        self.trouble += self.traffic.stop(self.traffic.held)
        end = self._drained() if done else None
        if done:
            self._unload()
        return Report.make(
            fault=options.fault, seconds=elapsed, short=self.traffic.short_now, held=self.traffic.held_now,
            denied=self.traffic.denied_now, upgrades=self.upgrades, wanted_upgrades=options.upgrades, end=end,
            config_changes=churn.writes, trouble=self.trouble,
        )  # fmt: skip

    def _keep_upgrading(self, start: float) -> bool:
        """Upgrade at even distances until time and connections are enough; False when an upgrade failed."""
        options = self.options
        for number in range(1, options.upgrades + 1):
            self._wait_until(start + options.seconds * number / (options.upgrades + 1))
            try:
                upgrade = self._upgrade(number)
            except HitlessError as error:
                self.trouble.append(f"upgrade {number} failed: {error.message}")
                return False
            self.upgrades.append(upgrade)
            self.screen.say(
                f"Upgrade {number}: {upgrade.source} to {upgrade.to} in {upgrade.seconds:.2f} s: "
                + "; ".join(f"{action} {', '.join(names)}" for action, names in upgrade.maps.items())
            )
        self._wait_until(start + options.seconds)
        latest = start + options.seconds * 1.5
        while self.traffic.short_now.tried < options.connections and time.monotonic() < latest:
            self._wait_until(time.monotonic() + 0.5)
        tried = self.traffic.short_now.tried
        if tried < options.connections:
            self.trouble.append(f"only {tried:,} of {options.connections:,} connections were tried in the given time")
        return True

    def _upgrade(self, number: int) -> Upgrade:
        before_release = self.meshd.release
        release = RELEASES[(RELEASES.index(before_release) + 1) % len(RELEASES)]
        going_back = release < before_release
        plan = hitless.plan(self.node, bundle_of(release, self.lab))
        # Only what the plan named may be lost, and only by going back to a release that has no place for it.
        allowed = [entry.name for entry in plan.blocked] if going_back else []
        before = take_snapshot(self.node, self.traffic.cookies)
        tried = self.traffic.short_now.tried
        start = time.monotonic()
        if code := self.meshd.stop():
            self.trouble.append(f"meshd (release {before_release}) ended with exit code {code}")
        self.meshd = MeshdProcess(self.lab, release, self._options, allowed, self.options.fault)
        event = self.meshd.wait_until_ready()
        seconds = time.monotonic() - start
        after = take_snapshot(self.node, self.traffic.cookies)
        result: dict[str, Any] = event.get("result") or {}
        cutover = result.get("cutover") or {}
        maps: dict[str, list[str]] = {}
        for entry in result.get("maps", []):
            maps.setdefault(entry["action"], []).append(entry["name"])
        return Upgrade(
            number=number,
            source=before.version or "nothing",
            to=after.version or "nothing",
            start_type=str(event.get("start_type")),
            maps=maps,
            entries=sum(entry.get("entries") or 0 for entry in result.get("maps", [])),
            planned=_actions(msgspec.to_builtins(plan)) == _actions(result),
            allowed_loss=allowed,
            lost={entry["name"]: entry["lost"] for entry in result.get("maps", []) if entry.get("lost")},
            steps=dict(result.get("steps") or {}),
            seconds=round(seconds, 4),
            first_to_last_us=cutover.get("first_to_last_us"),
            stale_window_us=cutover.get("stale_window_us"),
            connections=self.traffic.short_now.tried - tried,
            before=before,
            after=after,
        )

    def _wait_until(self, when: float) -> None:
        while time.monotonic() < when:
            left = when - time.monotonic()
            self.screen.show(self.traffic, len(self.upgrades), self.options.upgrades, self.meshd.release, left)
            if self.meshd.process.poll() is not None:
                raise NodeError(f"meshd (release {self.meshd.release}) ended by itself")
            time.sleep(min(_REFRESH, max(0.0, when - time.monotonic())))

    def _compare_with_file(self, churn: Churn) -> None:
        """After the last change of the file, the maps must come to hold just what it says."""
        wanted = (len(churn.last["services"]), len(churn.last["policies"]))
        until = time.monotonic() + _DRAIN
        while True:
            now = take_snapshot(self.node, self.traffic.cookies)
            if (now.services, now.policies) == wanted:
                break
            if time.monotonic() > until:
                self.trouble.append(
                    f"configuration: the file has {wanted[0]} services and {wanted[1]} policies, the mesh "
                    f"{now.services} and {now.policies}"
                )
                break
            time.sleep(0.1)
        if now.held < len(self.traffic.cookies):
            missing = len(self.traffic.cookies) - now.held
            self.trouble.append(f"flows: {missing} held connections have no established flow entry at the end")

    def _drained(self) -> Snapshot:
        """Wait until the last connections are closed, and return what the mesh then says."""
        until = time.monotonic() + _DRAIN
        while True:
            now = take_snapshot(self.node)
            if now.counters.get("closed") == now.counters.get("opened") or time.monotonic() > until:
                return now
            time.sleep(0.1)

    def _unload(self) -> None:
        self.services.unlink()
        if code := self.meshd.stop():
            self.trouble.append(f"meshd (release {self.meshd.release}) ended with exit code {code}")
        state = self.node.observe()
        if state.current is not None or state.links:
            self.trouble.append("meshd ended for good (its service file is gone) but left pins behind")


def _actions(told: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    return (
        {entry["name"]: entry["action"] for entry in told.get("maps", [])},
        {entry["link"]: entry["action"] for entry in told.get("hooks", [])},
    )


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m meshd.demo",
        description="Upgrade a running mesh again and again under traffic, and report what was lost: exit code 1 if "
        "anything was, 2 if the demo could not run.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; progress goes to stderr")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the traffic runs (60)")
    parser.add_argument("--upgrades", type=int, default=12, help="how many upgrades, evenly spread (12)")
    parser.add_argument("--connections", type=int, default=100_000, help="go on longer until so many (100000)")
    parser.add_argument("--held", type=int, default=200, help="how many held connections (200)")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="break the upgrade on purpose: losses must show")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    options = _parse(args)
    out = sys.stderr if options.json else sys.stdout
    console = Console(file=out, width=None if out.isatty() else 132, soft_wrap=not out.isatty())
    screen = Screen(console)
    try:
        with Lab() as lab:
            report = Demo(lab, screen, options).run()
    except HitlessError as error:
        if options.json:
            print(json.dumps({"error": {"code": error.code, "message": error.message, **error.facts}}))
        print(f"meshd demo: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("meshd demo: interrupted; nothing is left behind", file=sys.stderr)
        return 128 + signal.SIGINT
    if options.json:
        print(json.dumps(report.to_dict()))
    print_report(report, console)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
