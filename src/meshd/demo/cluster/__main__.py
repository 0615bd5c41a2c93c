"""``python -m meshd.demo.cluster``: upgrade a cluster in miniature under traffic, as a DaemonSet does it.

Nodes are replaced one at a time: SIGTERM, a new process, readiness. The last rollout meets a node that cannot be
verified, and has to stop there by itself, until somebody has mended it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence

import msgspec

from hitless.errors import HitlessError, NodeError
from meshd.demo.clients import Traffic
from meshd.demo.cluster.control import ControlPlane, services_of
from meshd.demo.cluster.fabric import Fabric, fabric
from meshd.demo.cluster.node import ClusterNode, Replacement, policies_file
from meshd.demo.faults import LOST
from meshd.demo.lab import Lab
from meshd.demo.report import Counted
from meshd.demo.servers import start_echo, start_nginx
from meshd.releases import RELEASES

__all__ = ["main"]

_READY = 60.0  # s that a node gets to become ready
_SETTLE = 1.0  # s between two nodes, as minReadySeconds


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run; ``losses`` is empty when nothing was lost. ``stopped`` says where the last rollout stopped and why."""

    schema: int = 1
    losses: list[str]
    seconds: float
    replacements: list[Replacement]
    stopped: str
    changes: int
    nodes: dict[str, Counted]


class Cluster:
    """One run over ``nodes`` on a fabric."""

    def __init__(self, wires: Fabric, options: argparse.Namespace) -> None:
        self.wires = wires
        self.options = options
        self.targets = services_of(wires)
        self.losses: list[str] = []
        self.replacements: list[Replacement] = []

    def run(self) -> Report:
        """Do it all. Raises HitlessError when the run itself cannot go on."""
        releases: list[str] = self.options.releases
        for lab, four, six in zip(self.wires.nodes, self.wires.backends4, self.wires.backends6, strict=True):
            start_nginx(lab, (*four, *six))
            start_echo(lab, (*four, *six))
        with ControlPlane(self.wires, self.targets) as control:
            nodes = [self._node(lab, f"node{number}", control) for number, lab in enumerate(self.wires.nodes, 1)]
            for node in nodes:
                node.start(releases[0], _READY)
            _say(f"{len(nodes)} nodes run meshd {nodes[0].release()} as {control.told} says.")
            for node in nodes:
                node.traffic = Traffic(
                    node.lab, self.options.held, self.targets.web, self.targets.echo, self.targets.denied, short=1
                )
            start = time.monotonic()
            with control.churning():
                for release in releases[1:-1]:
                    self._roll_out(nodes, release)
                stopped = self._roll_out_with_fault(nodes, releases[-1])
            seconds = time.monotonic() - start
            most = RELEASES[int(releases[-1])].backends
            for node in nodes:
                self.losses += [f"{node.name}: {what}" for what in node.missed(control.said, most)]
            _say("The traffic ends, and the books are compared.")
            counted = self._judge(nodes)
            return Report(
                losses=self.losses, seconds=round(seconds, 1), replacements=self.replacements, stopped=stopped,
                changes=control.changes, nodes=counted,
            )  # fmt: skip

    def _node(self, lab: Lab, name: str, control: ControlPlane) -> ClusterNode:
        policies = lab.scratch / "policies.yaml"
        policies_file(policies, control.names_of(self.targets.denied))
        return ClusterNode(lab, name, ["--services", str(policies), *control.options])

    def _roll_out(self, nodes: Sequence[ClusterNode], release: str) -> None:
        _say(f"Rollout of release {release}:")
        for node in nodes:
            self._replace(node, release, _READY)
            time.sleep(_SETTLE)

    def _roll_out_with_fault(self, nodes: Sequence[ClusterNode], release: str) -> str:
        """A rollout whose second node cannot be verified: it has to stop there. Returns what it said.

        Then somebody does what that said, and the rollout goes on.
        """
        _say(f"Rollout of release {release}, in which {nodes[1].name} loses a pin:")
        stopped = ""
        for number, node in enumerate(nodes):
            try:
                if number == 1:
                    self._replace(node, release, self.options.patience, "lost-pin")
                else:
                    self._replace(node, release, _READY)
            except NodeError as error:
                if number != 1:
                    raise
                behind = [later.name for later in nodes[number + 1 :] if later.release() == nodes[-1].release()]
                stopped = f"{error.message} ({', '.join(behind)} left as before)"
                _say(f"  stopped: {stopped}")
                node.pin_again(LOST)
                node.wait_until_ready(_READY)
                _say(f"  {node.name}: the map is pinned again, and the node is ready; the rollout goes on")
        if not stopped:
            self.losses.append(f"rollout: it went on past {nodes[1].name}, which had lost a pin")
        return stopped

    def _replace(self, node: ClusterNode, release: str, seconds: float, fault: str | None = None) -> None:
        done = node.replace(release, seconds, fault)
        self.replacements.append(done)
        _say(f"  {done.node}: release {done.source} to {done.to}, ready after {done.seconds:.2f} s")

    def _judge(self, nodes: Sequence[ClusterNode]) -> dict[str, Counted]:
        for node in nodes:
            assert node.traffic is not None
            trouble = node.traffic.stop(*node.traffic.short, node.traffic.denied)
            trouble += node.traffic.stop(node.traffic.held)
            self.losses += [f"{node.name}: {what}" for what in trouble]
        counted = {node.name: node.judge() for node in nodes}
        self.losses += [f"{name}: {loss}" for name, one in counted.items() for loss in one.losses()]
        return counted


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(report: Report) -> None:
    for name, one in report.nodes.items():
        short, held, denied, end = one.connections, one.held, one.denied, one.end
        assert end is not None
        print(
            f"{name} ({end.version}): {short.tried:,} connections, {sum(short.failed.values()):,} failed, "
            f"{short.reset:,} reset, slowest {short.slowest * 1000:.0f} ms; "
            f"{held.alive} of {held.connections} held alive, {held.received:,} of {held.sent:,} messages; "
            f"{denied.denied:,} of {denied.tried:,} denied, {denied.through:,} got through; the mesh counted "
            f"{end.counters.get('opened', 0):,} opened of {one.opened:,}, {end.hits:,} denials of {denied.denied:,}"
        )
    print(
        f"{len(report.replacements)} daemons replaced in {report.seconds:.0f} s of traffic, while endpoints changed "
        f"{report.changes:,} times."
    )
    print(f"The last rollout stopped by itself: {report.stopped}")
    print("Nothing was lost." if not report.losses else "LOST:")
    for loss in report.losses:
        print(f"  - {loss}")


def main(args: Sequence[str] | None = None) -> int:
    """Run it and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m meshd.demo.cluster",
        description="Upgrade a cluster in miniature under traffic: exit code 1 if anything was lost, 2 if it could not "
        "run.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; progress goes to stderr")
    parser.add_argument("--nodes", type=int, default=3, help="how many (3)")
    parser.add_argument("--held", type=int, default=60, help="connections held on each node (60)")
    parser.add_argument("--releases", nargs="+", default=["1", "2", "3", "4"], help="rolled out in turn (1 2 3 4)")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds until a rollout gives a node up (10)")
    options = parser.parse_args(args)
    try:
        with fabric(options.nodes) as wires:
            report = Cluster(wires, options).run()
    except HitlessError as error:
        print(f"meshd cluster: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("meshd cluster: interrupted; nothing is left behind", file=sys.stderr)
        return 128 + signal.SIGINT
    if options.json:
        print(json.dumps(msgspec.to_builtins(report)))
    else:
        _print(report)
    return 1 if report.losses else 0


if __name__ == "__main__":
    sys.exit(main())
