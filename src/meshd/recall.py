"""What the live maps of any release say, read back: for a start while the control plane is away."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hitless.errors import NodeError
from meshd.model import Action, Address, Backend, Config, Network, Policy, Protocol, Service
from meshd.switching import SERVICE, entries_of
from meshd.tables import PROTOCOLS, address_of, read_slots

if TYPE_CHECKING:
    import hitless

__all__ = ["has_tables", "name_of", "network_of", "recall"]

_PROTOCOLS: dict[int, Protocol] = {number: name for name, number in PROTOCOLS.items()}
_ACTIONS: tuple[Action, Action] = ("allow", "deny")


def has_tables(node: hitless.Node) -> bool:
    """Whether the running release keeps backends in tables. Raises NodeError if no mesh is live."""
    state = node.observe()
    if state.current is None:
        raise NodeError(f"no mesh is live under {node.root}: start one with `meshd run`", path=str(node.root))
    return "slot" in state.current.maps


def name_of(address: Address, port: int, protocol: Protocol) -> str:
    """A name for a service of which only the address is known."""
    return f"{address.exploded.replace(':', '-')}.{port}.{protocol}"


def recall(node: hitless.Node) -> Config:
    """The services and policies in the maps of the running release, under names made of the services' addresses.

    A release with tables has only the backends that get new connections; a client's cgroup is known by its id alone.
    Raises HitlessError when the maps cannot be read.
    """
    tables = has_tables(node)
    services = tuple(_by_table(node) if tables else _by_value(node))
    policies = list(_of_services(node))
    if tables:
        policies += _by_networks(node)
    return Config(services, tuple(policies))


def _by_value(node: hitless.Node) -> Iterator[Service]:
    for key, value in _records(node, "service"):
        backends = tuple(
            Backend(address_of(one["addr"]), socket.ntohs(one["port"]), one["weight"])
            for one in value["backends"][: value["count"]]
        )
        where = _endpoint(key)
        yield Service(name_of(*where), *where, backends)


def _by_table(node: hitless.Node) -> Iterator[Service]:
    keys, values = node.map("slot").rows()
    words = keys.reshape(-1).view(np.uint32).reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))
    tables, values = words[order, 0], values[order]
    for key, value in entries_of(node.map("service")).items():
        table, _, affinity, *_ = SERVICE.unpack(value)
        first, last = np.searchsorted(tables, table), np.searchsorted(tables, table, side="right")
        slots = read_slots(values[first:last].tobytes())
        backends = tuple(Backend(slot.address, slot.port, slot.weight) for slot in slots)
        address, port, protocol = address_of(key[:16]), int.from_bytes(key[16:18], "big"), _PROTOCOLS[key[18]]
        yield Service(name_of(address, port, protocol), address, port, protocol, backends, affinity)


def _of_services(node: hitless.Node) -> Iterator[Policy]:
    for key, value in _records(node, "policy"):
        yield Policy(_ACTIONS[value["action"]], name_of(*_endpoint(key["service"])), None, key["source"])


def _by_networks(node: hitless.Node) -> Iterator[Policy]:
    for key, value in _records(node, "outbound"):
        network, port, protocol = network_of(key, key["prefixlen"] - 96)
        source = struct.unpack("=Q", struct.pack("=II", *key["source"]))[0]
        yield Policy(_ACTIONS[value["action"]], "", None, source, network, None, port, protocol)
    for key, value in _records(node, "inbound"):
        network, port, protocol = network_of(key, key["prefixlen"] - 32)
        yield Policy(_ACTIONS[value["action"]], "", None, 0, None, network, port, protocol)


def network_of(key: dict[str, Any], bits: int) -> tuple[Network, int, Protocol]:
    """The network, port and protocol of a key of a policy by addresses; ``bits`` are of its 128-bit prefix."""
    address = address_of(key["addr"]) if bits >= 96 else ipaddress.IPv6Address(key["addr"])
    network = ipaddress.ip_network((address, bits - 96 if address.version == 4 else bits))
    return network, socket.ntohs(key["port"]), _PROTOCOLS[key["proto"]]


def _endpoint(key: dict[str, Any]) -> tuple[Address, int, Protocol]:
    return address_of(key["addr"]), socket.ntohs(key["port"]), _PROTOCOLS[key["proto"]]


def _records(node: hitless.Node, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return cast("list[tuple[dict[str, Any], dict[str, Any]]]", node.map(name).items())
