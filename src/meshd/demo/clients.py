"""The clients of one lab as processes, and what they have told so far."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import msgspec

from meshd.demo.lab import Lab
from meshd.demo.mesh import Lines
from meshd.demo.report import Denials, HeldTraffic, ShortTraffic
from meshd.demo.traffic import Target

__all__ = ["Traffic"]


class Traffic:
    """The client processes of one lab: ``held`` connections to ``echo`` and some to ``web``, and ``short`` processes
    of connections to ``web``; those to ``denied`` come from where a policy forbids them.
    """

    def __init__(
        self,
        lab: Lab,
        held: int,
        web: Sequence[Target],
        echo: Sequence[Target],
        denied: Sequence[Target],
        short: int = 2,
    ) -> None:
        self._lab = lab
        # Connections are held before the others come, so that each upgrade finds all of them.
        http = held // 5
        counts = ["--count", str(held - http), "--http", str(http)]
        self.held = self._start("clients", "held", [*counts], [*echo, web[0]])
        first = self.held.wait_for({"kind": ("held",)}, 30.0)
        self.cookies: tuple[int, ...] = tuple(first["cookies"])
        self.held.wait_for({"connections": (held,)}, 10.0)
        self.short = [self._start("clients", "short", [], web) for _ in range(short)]
        self.denied = self._start("denied", "denied", [], denied)

    def _start(self, cgroup: str, kind: str, options: Sequence[str], targets: Sequence[Target]) -> Lines:
        args = [sys.executable, "-m", "meshd.demo.traffic", kind, *options, *map(str, targets)]
        return Lines(self._lab.popen(args, cgroup, stdin=subprocess.PIPE, stdout=subprocess.PIPE), f"the {kind} client")

    @property
    def short_now(self) -> ShortTraffic:
        """Totals of the short connections so far."""
        return ShortTraffic.sum([lines.last for lines in self.short])

    @property
    def held_now(self) -> HeldTraffic:
        """Totals of the held connections so far."""
        return msgspec.convert(self.held.last, HeldTraffic)

    @property
    def denied_now(self) -> Denials:
        """Totals of the denied client so far."""
        return msgspec.convert(self.denied.last, Denials)

    def stop(self, *lines: Lines) -> list[str]:
        """End these clients, wait for their last word, and return what went wrong with them."""
        trouble = []
        for client in lines:
            assert client.process.stdin is not None
            client.process.stdin.close()
        for client in lines:
            if not client.closed.wait(20.0) or client.process.wait(5.0) or not client.last.get("final"):
                trouble.append(f"{client.name} did not end well (exit code {client.process.poll()})")
        return trouble
