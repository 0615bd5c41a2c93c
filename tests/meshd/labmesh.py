"""A mesh in a lab: backends that say who they are, a services file, and meshd as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import hitless
from meshd import config
from meshd.demo.lab import BACKENDS4, BACKENDS6, Lab
from meshd.demo.mesh import Lines
from meshd.model import NOWHERE, Config, Locality
from meshd.recall import has_tables, recall
from meshd.reconcile import Changes, Writer
from meshd.registry import Frontend, Registry
from meshd.releases import RELEASES

PEER = str(Path(__file__).parent / "peer.py")
PORT = 8080
VIP, VIP6 = "10.96.0.10", "fd00:96::10"
A, B, A6 = BACKENDS4[0], BACKENDS4[1], BACKENDS6[0]


class Mesh:
    """What a test needs of a mesh: ``write`` the services file, ``start`` a release, look with ``node``."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.file = lab.scratch / "services.yaml"
        self.root = lab.bpffs / "mesh"
        self.daemon: Meshd | None = None
        self._registry: Registry | None = None
        self._writer: Writer | None = None
        server = Lines(self.python("serve", A, B, A6))
        server.wait_for({"ready": (True,)}, 10)

    @property
    def node(self) -> hitless.Node:
        return hitless.Node(self.root)

    def python(self, *args: str, cgroup: str = "outside") -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return self.lab.popen([sys.executable, PEER, *args], cgroup, stdin=pipe, stdout=pipe)

    def write(self, services: Sequence[dict[str, Any]], policies: Sequence[dict[str, Any]] = ()) -> None:
        self.write_text(yaml.safe_dump({"services": list(services), "policies": list(policies)}))

    def write_text(self, text: str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.rename(self.file)

    def start_here(self, here: Locality = NOWHERE, access_log: bool = False) -> None:
        """Start the newest release in this process, which is quicker; then :meth:`set` says what it does."""
        release = RELEASES[max(RELEASES)]
        self._registry = Registry(["file"], release)
        node = self.node
        self._writer = Writer(node, release, here, access_log)
        self._registry.replace("file", self.parsed())
        bundle = hitless.Bundle.load(release.bundle, {"cgroup": str(self.lab.cgroup)})

        def prepare(_: hitless.Node) -> None:
            self.resync()

        hitless.apply(node, bundle, prepare=prepare)

    def set(self, services: Sequence[dict[str, Any]], policies: Sequence[dict[str, Any]] = ()) -> Changes:
        """Say what the mesh is to do, by news of what changed alone."""
        assert self._registry is not None
        assert self._writer is not None
        self.write(services, policies)
        self._registry.replace("file", self.parsed())
        return self._writer.write(self._registry.take_news())

    def resync(self) -> Changes:
        """Read the maps and put them right."""
        assert self._registry is not None
        assert self._writer is not None
        return self._writer.resync(self._registry.all())

    def parsed(self) -> Config:
        """What the file says to the newest release."""
        return config.parse(self.file.read_text(), "services.yaml", RELEASES[max(RELEASES)], self.lab.cgroup)

    def start(self, release: int, *allow_loss: str, options: Sequence[str] = ()) -> dict[str, Any]:
        """Start meshd and return the event that says the release is live."""
        event = self.try_start(release, *allow_loss, options=options)
        assert event["event"] in ("ready", "upgraded"), event
        return event

    def try_start(self, release: int, *allow_loss: str, options: Sequence[str] = ()) -> dict[str, Any]:
        """Start meshd and return the event that says how that went."""
        launched = self.launch(release, *options, *(f"--allow-loss={name}" for name in allow_loss))
        return launched.lines.wait_for({"event": ("ready", "upgraded", "error", "config-error")}, 30)

    def launch(
        self, release: int, *options: str, command: Sequence[str] = ("-m", "meshd"), env: Mapping[str, str] = {}
    ) -> Meshd:
        """Start meshd, or another ``command`` of this Python that is like it, and do not wait for anything."""
        self.daemon = Meshd(self, release, options, command, env)
        return self.daemon

    def next_event(self, **wanted: object) -> dict[str, Any]:
        assert self.daemon is not None
        return self.daemon.lines.wait_for({key: (value,) for key, value in wanted.items()}, 15)

    def stop(self) -> dict[str, Any]:
        """End meshd by SIGTERM and return its last event."""
        assert self.daemon is not None
        assert self.daemon.stop() == 0
        return self.next_event(event="stopped")

    def connect(
        self, address: str = VIP, count: int = 1, cgroup: str = "clients", port: int = 80, seconds: float = 10
    ) -> dict[str, Any]:
        done = self.lab.run_python(PEER, "connect", address, str(port), str(count), str(seconds), cgroup=cgroup)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def transfer(self, *sizes: int, address: str = VIP) -> dict[str, int]:
        """Send so many bytes on connections and get them back: what the client itself counted."""
        done = self.lab.run_python(PEER, "transfer", address, "80", *map(str, sizes), cgroup="clients")
        assert done.returncode == 0, done.stderr
        result: dict[str, int] = json.loads(done.stdout)
        return result

    def ask(
        self, address: str = VIP, count: int = 1, way: str = "fresh", cgroup: str = "clients", port: int = 53
    ) -> dict[str, Any]:
        """Send datagrams: each by a `connected` socket of its own, or a `fresh` one, or all by `one`."""
        done = self.lab.run_python(PEER, "ask", address, str(port), str(count), way, cgroup=cgroup)
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    def hold(self, address: str = VIP, count: int = 1) -> Held:
        return Held(Lines(self.python("hold", address, "80", str(count), cgroup="clients")))

    def values(self, name: str) -> list[dict[str, Any]]:
        return [value for _, value in self.node.map(name).items() if isinstance(value, dict)]

    def counters(self, name: str = "service_counter") -> dict[str, int]:
        """Sums over all services."""
        sums: dict[str, int] = {}
        for value in self.values(name):
            for field, count in value.items():
                sums[field] = sums.get(field, 0) + count
        return sums


class Churn:
    """Meanwhile backends, a service and a policy in the file come and go; the last file stays."""

    def __init__(self, mesh: Mesh, every: float = 0.05) -> None:
        self._mesh = mesh
        self._every = every
        self._number = 0
        self._stop = threading.Event()
        self._thread = threading.Thread()

    def __enter__(self) -> None:
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._number += 1
            number = self._number
            services = [service("web", VIP, (A, 1 + number % 7), B), service("web6", VIP6, A6)]
            extra = [service(f"x{number % 5}", "10.96.1.1", A, port=1 + number % 5)] if number % 3 else []
            self._mesh.write([*services, *extra], [denied("web6")] if number % 2 else [])
            if self._stop.wait(self._every):
                return


def is_as_the_file_says(mesh: Mesh, release: int) -> bool:
    """Whether the live maps hold what the services file says, and nothing else."""
    found = config.parse(mesh.file.read_text(), str(mesh.file), RELEASES[release], mesh.lab.cgroup)
    live = recall(mesh.node)
    if has_tables(mesh.node) and mesh.node.map("slot").count() != sum(len(one.backends) for one in live.services):
        return False  # slots that no service has
    return _meaning(live) == _meaning(found)


def _meaning(found: Config) -> tuple[dict[Frontend, set[Any]], set[Any]]:
    """What a configuration comes to, whatever its services are called."""
    frontends = {one.name: Frontend.of(one) for one in found.services}
    services = {Frontend.of(one): {(b.address, b.port, b.weight) for b in one.backends} for one in found.services}
    policies = {(one.action, one.source, frontends[one.service]) for one in found.policies}
    return services, policies


class Meshd:
    """`meshd run` as a process in the lab but outside of the mesh."""

    def __init__(
        self, mesh: Mesh, release: int, options: Sequence[str], command: Sequence[str], env: Mapping[str, str]
    ) -> None:
        lab = mesh.lab
        args = ["--release", str(release), "--root", str(mesh.root), "--cgroup", str(lab.cgroup)]
        args += ["--services", str(mesh.file), "--json", *options]
        self.process = lab.popen([sys.executable, *command, "run", *args], stdout=subprocess.PIPE, env=os.environ | env)
        self.lines = Lines(self.process)

    def stop_reading(self) -> None:
        """Close the end of the pipe at which its events arrive."""
        stdout = self.process.stdout
        assert stdout is not None
        # Closing the file would wait for the thread that reads it.
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, stdout.fileno())
        os.close(nothing)

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.terminate()
        return self.process.wait(20)


class Held:
    """Connections that stay open until told otherwise."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self.cookies: list[int] = lines.wait_for({}, 15)["cookies"]

    def alive(self) -> int:
        """Exchange one message on each, and return on how many that worked."""
        stdin = self._lines.process.stdin
        assert stdin is not None
        stdin.write("\n")
        stdin.flush()
        return int(self._lines.wait_for({}, 15)["alive"])

    def close(self) -> None:
        stdin = self._lines.process.stdin
        assert stdin is not None
        stdin.close()
        self._lines.process.wait(10)


def service(
    name: str, address: str, *backends: str | tuple[str, int], port: int = 80, protocol: str = "tcp", **more: object
) -> dict[str, Any]:
    """A service of the file; a backend is an address, or an address and a weight."""
    weighted = [(one, 1) if isinstance(one, str) else one for one in backends]
    return {
        "name": name,
        "address": address,
        "port": port,
        "protocol": protocol,
        "backends": [{"address": where, "port": PORT, "weight": weight} for where, weight in weighted],
        **more,
    }


def denied(service: str, cgroup: str = "denied", action: str = "deny") -> dict[str, Any]:
    """A policy of the file."""
    return {"action": action, "service": service, "source": {"cgroup": cgroup}}


def until(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    """Whether ``condition`` came true within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False
