"""What the maps should hold: a configuration as keys and values in the layout of one release.

Pure. Keys and values are plain Python values as hitless's map handles take and give them; a struct is a dict of all
its fields, so that what is read back equals what was written.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

import msgspec

from meshd.model import NOWHERE, Backend, Config, Locality, Policy, Service
from meshd.registry import Frontend
from meshd.releases import Release
from meshd.tables import choose

__all__ = ["Desired", "PolicyKey", "ServiceKey", "desired", "entries", "policy_key", "service_key"]

_TCP = 6
_NO_BACKEND = Backend(ipaddress.IPv6Address(0), 0, 0)
_ACTIONS = {"allow": 0, "deny": 1}


class ServiceKey(msgspec.Struct, frozen=True):
    """An endpoint as the maps know it: 16 address bytes (IPv4 as ::ffff:a.b.c.d) and the port in network order."""

    addr: bytes
    port: int
    proto: int = _TCP

    def to_map(self) -> dict[str, Any]:
        """Return the struct for a map handle."""
        return {"addr": self.addr, "port": self.port, "proto": self.proto, "pad": 0}


class PolicyKey(msgspec.Struct, frozen=True):
    """A client's cgroup id (0: all clients) and the service that it wants."""

    source: int
    service: ServiceKey

    def to_map(self) -> dict[str, Any]:
        """Return the struct for a map handle."""
        return {"source": self.source, "service": self.service.to_map(), "pad": 0}


class Desired(msgspec.Struct, frozen=True):
    """All entries that the maps should hold: whole values of services, and the action of each policy.

    ``policy_new`` has the fields of a policy entry that programs write from then on, as a new entry has them.
    """

    services: dict[ServiceKey, dict[str, Any]]
    policies: dict[PolicyKey, int]
    policy_new: dict[str, Any]


def desired(config: Config, release: Release) -> Desired:
    """Return what ``config`` means in the maps of ``release``."""
    frontends = {service.name: Frontend.of(service) for service in config.services}
    return entries(config.services, [(one, frontends[one.service]) for one in config.policies], release)


def entries(
    services: Iterable[Service],
    policies: Iterable[tuple[Policy, Frontend | None]],
    release: Release,
    here: Locality = NOWHERE,
) -> Desired:
    """Return what services, and policies with the frontends that they are for, mean in the maps of ``release``.

    For releases before 4: see :mod:`meshd.tables` for what came then. ``here`` is where the node is.
    """
    return Desired(
        services={_endpoint(service): _service(service, release, here) for service in services},
        policies={
            PolicyKey(one.source, _endpoint(frontend)): _ACTIONS[one.action]
            for one, frontend in policies
            if frontend is not None
        },
        policy_new=release.policy_new,
    )


def service_key(key: dict[str, Any]) -> ServiceKey:
    """Return the endpoint that a map handle gave as ``key``."""
    return ServiceKey(bytes(key["addr"]), key["port"], key["proto"])


def policy_key(key: dict[str, Any]) -> PolicyKey:
    """Return the policy key that a map handle gave as ``key``."""
    return PolicyKey(key["source"], service_key(key["service"]))


def _endpoint(of: Service | Backend | Frontend) -> ServiceKey:
    packed = of.address.packed
    if len(packed) == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    return ServiceKey(packed, socket.htons(of.port))


def _service(service: Service, release: Release, here: Locality) -> dict[str, Any]:
    chosen = choose(service, here).backends
    room = [*chosen, *[_NO_BACKEND] * (release.backends - len(chosen))]
    return {
        "total_weight": sum(backend.weight for backend in chosen),
        "count": len(chosen),
        "backends": [_backend(backend, release) for backend in room],
    }


def _backend(backend: Backend, release: Release) -> dict[str, Any]:
    where = _endpoint(backend)
    return {"addr": where.addr, "port": where.port, "weight": backend.weight, **release.backend_unused}
