"""What the live maps say, read back: for a start while the control plane is away."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any, cast

from meshd.model import Action, Address, Backend, Config, Policy, Protocol, Service

if TYPE_CHECKING:
    import hitless

__all__ = ["recall"]

_ACTIONS: tuple[Action, Action] = ("allow", "deny")
_PROTOCOLS: dict[int, Protocol] = {6: "tcp", 17: "udp"}


def recall(node: hitless.Node) -> Config:
    """The services and policies in the maps of the running release, under names made of the services' addresses.

    A client's cgroup is known by its id alone. Raises HitlessError when the maps cannot be read.
    """
    services = []
    for key, value in _entries(node, "service"):
        backends = tuple(Backend(*_place(one), one["weight"]) for one in value["backends"][: value["count"]])
        services.append(Service(_name(key), *_place(key), _PROTOCOLS[key["proto"]], backends))
    policies = [
        Policy(_ACTIONS[value["action"]], _name(key["service"]), None, key["source"])
        for key, value in _entries(node, "policy")
    ]
    return Config(tuple(services), tuple(policies))


def _name(key: dict[str, Any]) -> str:
    address, port = _place(key)
    return f"{address.exploded.replace(':', '-')}.{port}.{_PROTOCOLS[key['proto']]}"


def _place(key: dict[str, Any]) -> tuple[Address, int]:
    packed = bytes(key["addr"])
    mapped = packed[:12] == bytes(10) + b"\xff\xff"
    return ipaddress.ip_address(packed[12:] if mapped else packed), socket.ntohs(key["port"])


def _entries(node: hitless.Node, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return cast("list[tuple[dict[str, Any], dict[str, Any]]]", node.map(name).items())
