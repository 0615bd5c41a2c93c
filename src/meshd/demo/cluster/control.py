"""The control plane of the cluster in miniature: an API server with services whose endpoints come and go."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from hitless.kernel.namespaces import Namespace
from meshd.demo.cluster.apiserver import ApiServer
from meshd.demo.cluster.fabric import CONTROL, Fabric
from meshd.demo.servers import ECHO_PORT, HTTP_PORT
from meshd.demo.traffic import Target

__all__ = ["ControlPlane", "Targets", "services_of"]

_NAMESPACE = "shop"
_EVERY = 0.2  # s between two changes


class Targets(msgspec.Struct, frozen=True):
    """What clients connect to: ``web`` and ``echo`` services, and those that they are ``denied``."""

    web: tuple[Target, ...]
    echo: tuple[Target, ...]
    denied: tuple[Target, ...]


def services_of(wires: Fabric) -> Targets:
    """Services whose backends are on every node, each with backends of its own: an answer shows where it came from."""
    four, six = wires.backends4, wires.backends6
    web = (
        Target("10.96.0.10", 80, _some(four, 0, 4)),
        Target("fd00:96::10", 80, _some(six, 0, 4)),
        Target("10.96.0.11", 8000, _some(four, 4, 6)),
    )
    echo = (Target("10.96.0.20", 7, _some(four, 6, 8)), Target("fd00:96::20", 7, _some(six, 6, 8)))
    return Targets(web, echo, web[:2])


def _some(backends: Sequence[Sequence[str]], first: int, end: int) -> tuple[str, ...]:
    return tuple(address for node in backends for address in node[first:end])


class ControlPlane:
    """Runs while it is used as a context manager. ``options`` are those by which meshd hears it."""

    told = "the Kubernetes API"

    def __init__(self, wires: Fabric, targets: Targets, seed: int = 2) -> None:
        self.changes = 0
        #: The addresses behind each service now.
        self.said: dict[Target, set[str]] = {}
        self._services: dict[str, tuple[int, dict[str, tuple[Target, ...]]]] = {
            "web": (HTTP_PORT, {"http": (targets.web[0], targets.web[1])}),
            "api": (HTTP_PORT, {"http": (targets.web[2],)}),
            "echo": (ECHO_PORT, {"echo": targets.echo}),
        }
        self._api = ApiServer(Namespace.at(str(wires.switch.netns)), CONTROL)
        self._kubeconfig = wires.switch.scratch / "kubeconfig"
        _write_kubeconfig(self._kubeconfig, self._api.url)
        self.options = ("--kubernetes", "--kubeconfig", str(self._kubeconfig))
        self._random = random.Random(seed)
        self._stop = threading.Event()
        for name, (_, ports) in self._services.items():
            self._api.put("services", _service(name, ports))
            self._change(name)

    def __enter__(self) -> ControlPlane:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()

    def names_of(self, targets: Sequence[Target]) -> list[str]:
        """What meshd calls these services."""
        found = []
        for name, (_, ports) in self._services.items():
            for port, there in ports.items():
                for number, target in enumerate(there):
                    if target in targets:
                        found.append(f"{_NAMESPACE}.{name}.{port}{'.ipv6' if number else ''}")
        return found

    @contextmanager
    def churning(self) -> Iterator[None]:
        """Let endpoints come and go several times a second while the block runs; none is ever without."""
        thread = threading.Thread(target=self._churn, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _churn(self) -> None:
        while not self._stop.wait(_EVERY):
            self._change(self._random.choice(list(self._services)))
            self.changes += 1

    def _change(self, name: str) -> None:
        target_port, ports = self._services[name]
        for port, targets in ports.items():
            for target in targets:
                some = self._random.sample(target.backends, self._random.randint(1, len(target.backends)))
                self._api.put("endpointslices", _slice(name, port, target_port, target, some))
                self.said[target] = set(some)


def _service(name: str, ports: dict[str, tuple[Target, ...]]) -> dict[str, Any]:
    (port, targets), *_ = ports.items()
    addresses = [target.address for target in targets]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": _NAMESPACE},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ports": [{"name": port, "port": targets[0].port, "protocol": "TCP"}],
        },
    }


def _slice(name: str, port: str, target_port: int, target: Target, backends: Sequence[str]) -> dict[str, Any]:
    family = "IPv6" if ":" in target.address else "IPv4"
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-{port}-{family.lower()}",
            "namespace": _NAMESPACE,
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": family,
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in backends],
        "ports": [{"name": port, "port": target_port, "protocol": "TCP"}],
    }


def _write_kubeconfig(path: Path, url: str) -> None:
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "lab",
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
                "clusters": [{"name": "lab", "cluster": {"server": url}}],
                "users": [{"name": "lab", "user": {}}],
            }
        )
    )
