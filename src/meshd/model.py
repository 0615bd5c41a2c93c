"""What the mesh is to do, whoever says so: services with their backends, and policies. Frozen values, no effects."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["NOWHERE", "Action", "Address", "Backend", "Config", "Locality", "Network", "Policy", "Protocol", "Service"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Protocol = Literal["tcp", "udp"]
Action = Literal["allow", "deny"]


class Locality(msgspec.Struct, frozen=True, gc=False):
    """Where something runs, from wide to narrow; empty where that is not known."""

    region: str = ""
    zone: str = ""
    node: str = ""


NOWHERE = Locality()


class Backend(msgspec.Struct, frozen=True, gc=False):
    """Where connections to a service may go; ``weight`` is its share, 0 for none (it drains).

    One that is not ``healthy`` gets no new connections, unless none of the service is healthy.
    """

    address: Address
    port: int
    weight: int = 1
    healthy: bool = True
    locality: Locality = NOWHERE


class Service(msgspec.Struct, frozen=True):
    """An address and port that clients connect to, and the backends that answer; of one address family.

    ``name`` is unique among all services, and so are address, port and protocol together. ``affinity`` is for how many
    seconds without a new connection a client keeps its backend; 0: it does not. With ``local`` clients are sent to
    the nearest backends that are healthy: of their own node, else of their zone, their region, anywhere.
    """

    name: str
    address: Address
    port: int
    protocol: Protocol
    backends: tuple[Backend, ...]
    affinity: int = 0
    local: bool = False


class Policy(msgspec.Struct, frozen=True):
    """Whether somebody may connect to something. What no policy speaks of is allowed.

    A policy is for one of these three; the first one that speaks of a connection decides:

    - ``service``: clients in ``cgroup`` (exactly that one, not those below it; None: any) that ask for that service.
    - ``destination``, with ``port`` (0: any) and ``protocol``: clients in ``cgroup`` that ask for such an address. The
      client's own cgroup comes before any, then the given port before any, then the longer prefix.
    - ``clients``, with ``port`` and ``protocol``: what comes from such an address to a port of this node's own servers.
      The given port comes before any, then the longer prefix.

    ``source`` is the kernel's id of ``cgroup``, 0 for any.
    """

    action: Action
    service: str = ""
    cgroup: Path | None = None
    source: int = 0
    destination: Network | None = None
    clients: Network | None = None
    port: int = 0
    protocol: Protocol = "tcp"


class Config(msgspec.Struct, frozen=True):
    """Everything that is asked for at one moment."""

    services: tuple[Service, ...]
    policies: tuple[Policy, ...] = ()
