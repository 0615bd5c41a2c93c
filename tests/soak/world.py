"""What the soak's mesh offers: services of each kind, as clients, control plane and books all know them."""

from __future__ import annotations

import ipaddress

from meshd.demo.lab import BACKENDS4, BACKENDS6
from meshd.demo.servers import ECHO_PORT
from meshd.demo.traffic import Target
from meshd.desired import Desired, ServiceKey, desired
from meshd.model import Backend, Config, Policy, Service
from meshd.releases import RELEASES

__all__ = ["ECHO", "EMPTY", "FORBIDDEN", "SINK", "TARGETS", "fixed", "key_of"]

ECHO = (Target("10.96.0.20", 7, BACKENDS4[:2]), Target("fd00:96::20", 7, BACKENDS6[:2]))
"""Services that answer."""

EMPTY = Target("10.96.0.21", 7)
"""A service without a backend: each connect is refused and counted, with no packet sent."""

FORBIDDEN = Target("10.96.0.22", 7)
"""What a policy denies to everyone: each connect ends in EPERM and counts as a hit."""

SINK = ("127.0.0.1", 9)
"""Where UDP messages go; nobody reads them."""

TARGETS = (*ECHO, EMPTY, FORBIDDEN)


def fixed(release: int = 1) -> Desired:
    """The entries of ``service`` and ``policy`` that stay as they are, in the layout of a release."""
    services, policies = [], []
    for number, target in enumerate(TARGETS):
        backends = tuple(Backend(ipaddress.ip_address(one), ECHO_PORT) for one in target.backends)
        address = ipaddress.ip_address(target.address)
        services.append(Service(f"s{number}", address, target.port, "tcp", backends))
        policies.append(Policy("deny" if target is FORBIDDEN else "allow", f"s{number}"))
    return desired(Config(tuple(services), tuple(policies)), RELEASES[release])


def key_of(target: Target) -> ServiceKey:
    """The endpoint of a service, as a key of the maps."""
    return list(fixed().services)[TARGETS.index(target)]
