"""The mesh of the demo: its service file, meshd as a process, and what the live maps say."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

import hitless
import meshd
from hitless.errors import NodeError
from meshd.demo.lab import BACKENDS4, BACKENDS6, Lab
from meshd.demo.servers import ECHO_PORT, HTTP_PORT
from meshd.demo.traffic import Target

__all__ = [
    "DENIED",
    "ECHO",
    "RELEASES",
    "WEB",
    "Churn",
    "Lines",
    "MeshdProcess",
    "Snapshot",
    "bundle_of",
    "take_snapshot",
]

RELEASES = ("1", "2", "3", "4")

# Each service has backends of its own: an answer from any other address means a connection went astray.
WEB = (
    Target("10.96.0.10", 80, BACKENDS4[:4]),
    Target("fd00:96::10", 80, BACKENDS6[:4]),
    Target("10.96.0.11", 8000, BACKENDS4[4:6]),
)
ECHO = (Target("10.96.0.20", 7, BACKENDS4[6:8]), Target("fd00:96::20", 7, BACKENDS6[6:8]))
DENIED = WEB[:2]

_SERVICES = {"web": WEB[0], "web6": WEB[1], "api": WEB[2], "echo": ECHO[0], "echo6": ECHO[1]}
_STATES = {1: "connecting", 2: "established", 3: "closed"}


class Snapshot(msgspec.Struct, frozen=True):
    """What the live maps held at one time: entries by state, and sums over services and policies.

    ``held`` is how many of the held connections have a flow entry that says established.
    """

    version: str | None
    services: int
    policies: int
    hits: int
    flows: dict[str, int]
    held: int
    counters: dict[str, int]


def take_snapshot(node: hitless.Node, cookies: Iterable[int] = ()) -> Snapshot:
    """Read the live maps. Raises NodeError if no mesh is live, KernelError."""
    state = node.observe()
    if state.current is None:
        raise NodeError(f"no mesh is live under {state.root}", path=state.root)
    counter = "counter" if "counter" in state.current.maps else "service_counter"
    counters: dict[str, int] = {}
    for _, value in _records(node, counter):
        for name, count in value.items():
            counters[name] = counters.get(name, 0) + count
    # After the counters: a connection that they call closed then has no established flow.
    flows = dict(_records(node, "flow"))
    by_state: dict[str, int] = {}
    for value in flows.values():
        name = _STATES.get(int(value["state"]), "unknown")
        by_state[name] = by_state.get(name, 0) + 1
    policies = _records(node, "policy")
    return Snapshot(
        version=state.version,
        services=len(_records(node, "service")),
        policies=len(policies),
        hits=sum(value["hits"] for _, value in policies),
        flows=by_state,
        held=sum(cookie in flows and int(flows[cookie]["state"]) == 2 for cookie in cookies),
        counters=counters,
    )


def _records(node: hitless.Node, name: str) -> list[tuple[Any, dict[str, Any]]]:
    return [(key, value) for key, value in node.map(name).items() if isinstance(value, dict)]


def bundle_of(release: str, lab: Lab) -> hitless.Bundle:
    """Read the bundle of one of meshd's releases, to be attached to the lab's mesh."""
    path = Path(meshd.__file__).parent / "bpf" / f"v{release}"
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})


class Churn:
    """The control plane: rewrites the service file several times a second, always a valid one, by a rename.

    Weights change, backends come and go, and so does a whole service with its policy. What clients rely on stays:
    every service has a backend, and the denied clients stay denied. It writes from a thread of its own while it is
    used as a context manager; the last file stays.
    """

    def __init__(self, path: Path, every: float = 0.2, seed: int = 2) -> None:
        self.path = path
        self.writes = 0
        self.last: dict[str, list[dict[str, Any]]] = {}
        self._every = every
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.write()

    def __enter__(self) -> Churn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def write(self) -> None:
        """Write one more variant."""
        services = [self._service(name, target) for name, target in _SERVICES.items()]
        policies = [
            {"action": "deny", "source": {"cgroup": "denied"}, "service": name}
            for name, target in _SERVICES.items()
            if target in DENIED
        ]
        if self._random.random() < 0.5:
            services.append(self._service("extra", Target("10.96.1.1", 81, BACKENDS4[:2])))
            policies.append({"action": "deny", "source": {"cgroup": "denied"}, "service": "extra"})
        self.last = {"services": services, "policies": policies}
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(yaml.safe_dump(self.last, sort_keys=False))
        new.rename(self.path)
        self.writes += 1

    def _service(self, name: str, target: Target) -> dict[str, Any]:
        port = ECHO_PORT if target in ECHO else HTTP_PORT
        some = self._random.sample(target.backends, self._random.randint(1, len(target.backends)))
        backends = [{"address": a, "port": port, "weight": self._random.randint(1, 10)} for a in some]
        return {
            "name": name, "address": target.address, "port": target.port, "protocol": "tcp", "backends": backends,
        }  # fmt: skip

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self.write()


class Lines:
    """The JSON lines that a process prints, read as they come; ``last`` is the newest, ``closed`` says it ended."""

    def __init__(self, process: subprocess.Popen[str], name: str = "a process") -> None:
        self.process = process
        self.name = name
        self.last: dict[str, Any] = {}
        self.closed = threading.Event()
        self.queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self.noise: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, wanted: Mapping[str, Sequence[object]], seconds: float) -> dict[str, Any]:
        """Return the next object in which every key of ``wanted`` has one of its values.

        Raises NodeError when the process ends or ``seconds`` pass before it comes.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                said = self.queue.get(timeout=0.05)
            except queue.Empty:
                if self.closed.is_set() and self.queue.empty():
                    break
                continue
            if all(said.get(key) in values for key, values in wanted.items()):
                return said
        wants = ", ".join(f"{key} {' or '.join(map(str, values))}" for key, values in wanted.items())
        ended = self.closed.is_set()
        when = f"but ended ({self.last})" if ended else f"within {seconds:g} s; its last word was {self.last}"
        raise NodeError("\n  ".join([f"{self.name} did not say: {wants}, {when}", *self.noise[-8:]]))

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed under us: the lab is going away
            for line in self.process.stdout:
                try:
                    said = json.loads(line)
                except ValueError:
                    self.noise.append(line.rstrip())
                    continue
                self.last = said
                self.queue.put(said)
        self.closed.set()


class MeshdProcess:
    """``meshd run`` of one release with ``options``, as a process in the lab but outside of the mesh.

    ``fault`` is planted before it runs (:mod:`meshd.demo.faults`).
    """

    def __init__(
        self, lab: Lab, release: str, options: Sequence[str], allow_loss: Sequence[str] = (), fault: str | None = None
    ) -> None:
        module = ["meshd.cli"] if fault is None else ["meshd.demo.faults", fault]
        args = ["run", "--release", release, "--root", str(lab.bpffs / "mesh"), "--cgroup", str(lab.cgroup)]
        args += [*options, "--json"]
        for name in allow_loss:
            args += ["--allow-loss", name]
        self.release = release
        self._log = lab.scratch / "meshd.log"
        with self._log.open("a") as log:
            self.process = lab.popen(
                [sys.executable, "-m", *module, *args], stdout=subprocess.PIPE, stderr=log, env=dict(os.environ)
            )
        self.lines = Lines(self.process, f"meshd (release {release})")

    def wait_until_ready(self, seconds: float = 30.0) -> dict[str, Any]:
        """Return the event that says the release is live; raises NodeError with what meshd printed."""
        try:
            return self.lines.wait_for({"event": ("ready", "upgraded")}, seconds)
        except NodeError as error:
            said = self._log.read_text().strip().splitlines()[-8:]
            raise NodeError("\n  ".join([error.message, *said])) from error

    def stop(self, seconds: float = 20.0) -> int:
        """Ask it to end, and return its exit code; raises NodeError when it does not end."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise NodeError(f"meshd (release {self.release}) did not end within {seconds:g} s of SIGTERM") from error
