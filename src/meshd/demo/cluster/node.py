"""One node: its servers, its clients, and its meshd, which is replaced as a DaemonSet replaces a pod."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

import hitless
from hitless.errors import NodeError
from hitless.kernel.maps import Map
from hitless.kernel.namespaces import Namespace, entered
from hitless.upgrade.node import generation_record
from meshd.demo.clients import Traffic
from meshd.demo.lab import Lab
from meshd.demo.mesh import MeshdProcess, take_snapshot
from meshd.demo.report import Counted
from meshd.demo.traffic import Target
from meshd.recall import recall

__all__ = ["ClusterNode", "Replacement"]

_PORT = 9090  # where meshd tells of its health, on the node's loopback
_POLL = 0.1  # s
_DRAIN = 5.0  # s
_FOLLOW = 5.0  # s until the maps are as the control plane said last


class Replacement(msgspec.Struct, frozen=True):
    """One meshd by another: ``seconds`` are from SIGTERM until the new one is ready."""

    node: str
    source: str = msgspec.field(name="from")
    to: str
    seconds: float


class ClusterNode:
    """Node ``name`` in ``lab``. meshd is run with ``options`` beside those that say where it is."""

    def __init__(self, lab: Lab, name: str, options: Sequence[str]) -> None:
        self.name = name
        self.lab = lab
        self.node = hitless.Node(lab.bpffs / "mesh")
        self.traffic: Traffic | None = None
        self._options = options
        self._meshd: MeshdProcess | None = None

    def start(self, release: str, seconds: float, fault: str | None = None) -> None:
        """Start meshd and wait until it is ready. Raises NodeError if that takes too long or it ends."""
        listen = ["--listen", f"127.0.0.1:{_PORT}"]
        self._meshd = MeshdProcess(self.lab, release, [*self._options, *listen], (), fault)
        self.wait_until_ready(seconds)

    def wait_until_ready(self, seconds: float) -> None:
        """Ask it until it says so. Raises NodeError if that takes too long or it ends."""
        assert self._meshd is not None
        until = time.monotonic() + seconds
        why = "it does not answer"
        while time.monotonic() < until:
            if self._meshd.process.poll() is not None:
                self._meshd.wait_until_ready(1.0)  # which raises with what it said
            ready, why = self._readiness()
            if ready:
                return
            time.sleep(_POLL)
        raise NodeError(f"{self.name}: meshd (release {self._meshd.release}) is not ready within {seconds:g} s: {why}")

    def pin_again(self, name: str) -> None:
        """Do what the verification says: the map that lost its pin still lives, so it is pinned again by its id."""
        record = generation_record(self.node.current)
        with Map.by_id(record.pinned_maps[name].id) as held:
            held.pin(self.node.current / "maps" / name)

    def stop(self) -> None:
        """End meshd by SIGTERM. Raises NodeError if it does not end well."""
        assert self._meshd is not None
        if code := self._meshd.stop():
            raise NodeError(f"{self.name}: meshd (release {self._meshd.release}) ended with exit code {code}")

    def replace(self, release: str, seconds: float, fault: str | None = None) -> Replacement:
        """As a DaemonSet does it: the old one gets SIGTERM and ends, the new one starts and becomes ready."""
        assert self._meshd is not None
        before = self._meshd.release
        start = time.monotonic()
        self.stop()
        self.start(release, seconds, fault)
        return Replacement(self.name, before, release, round(time.monotonic() - start, 3))

    def release(self) -> str | None:
        """The version that is live."""
        return self.node.observe().version

    def judge(self) -> Counted:
        """What clients and mesh counted; with all traffic over, which is waited for."""
        assert self.traffic is not None
        until = time.monotonic() + _DRAIN
        while True:
            now = take_snapshot(self.node)
            if now.counters.get("closed") == now.counters.get("opened") or time.monotonic() > until:
                break
            time.sleep(0.1)
        return Counted(self.traffic.short_now, self.traffic.held_now, self.traffic.denied_now, now)

    def missed(self, said: Mapping[Target, set[str]], most: int) -> list[str]:
        """What the maps hold otherwise than the control plane ``said``; waits a while for that to come true.

        Of more than ``most`` backends the release has that many.
        """
        until = time.monotonic() + _FOLLOW
        wanted = {(target.address, target.port): behind for target, behind in said.items()}
        while True:
            live = {
                (str(service.address), service.port): {str(one.address) for one in service.backends}
                for service in recall(self.node).services
            }
            wrong = [
                where
                for where in sorted(live | wanted)
                if live.get(where) != wanted.get(where)
                and not (live.get(where, set()) < wanted.get(where, set()) and len(live[where]) == most)
            ]
            if not wrong or time.monotonic() > until:
                break
            time.sleep(_POLL)
        return [
            f"maps: {where[0]} port {where[1]} leads to {_listed(live, where)}, but the control plane said "
            f"{_listed(wanted, where)}"
            for where in wrong
        ]

    def _readiness(self) -> tuple[bool, str]:
        """Whether meshd says that it is ready, and what it says."""
        with entered(Namespace.at(str(self.lab.netns))):
            connection = http.client.HTTPConnection("127.0.0.1", _PORT, timeout=2.0)
            try:
                connection.request("GET", "/readyz")
                response = connection.getresponse()
                return response.status == 200, response.read(1000).decode(errors="replace").strip()
            except OSError as error:
                return False, f"/readyz: {error}"
            finally:
                connection.close()


def _listed(services: Mapping[tuple[str, int], set[str]], where: tuple[str, int]) -> str:
    return ", ".join(sorted(services.get(where, ()))) or "nobody"


def policies_file(path: Path, services: Sequence[str]) -> None:
    """Write a services file with nothing but denials of these services to the cgroup ``denied``."""
    lines = [f"- {{action: deny, service: {name}, source: {{cgroup: denied}}}}\n" for name in services]
    path.write_text("policies:\n" + "".join(lines))
