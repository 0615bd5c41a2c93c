"""Which backends a connect would get and why, told from the kernel's maps alone."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from hitless.errors import NodeError
from meshd.config import cgroup_id
from meshd.model import Address, Protocol
from meshd.recall import has_tables, network_of
from meshd.tables import LEVELS, PROTOCOLS, address_of, packed, read_slots, shares

if TYPE_CHECKING:
    import hitless

__all__ = ["Explanation", "Share", "explain", "words"]

_ACTIONS = ("allow", "deny")


class Share(msgspec.Struct, frozen=True):
    """A backend and the part of new connections that it gets, from 0 to 1."""

    address: Address
    port: int
    weight: int
    share: float


class Explanation(msgspec.Struct, frozen=True):
    """What becomes of a connect to ``address``.

    ``outcome``: ``served`` by one of ``backends``; ``denied`` by ``policy``; ``refused``, as the service has nobody;
    ``passed`` on as it is, since no service has that address. ``policy`` says which entry decides, with its hits; None
    if none speaks of it. ``table`` is the number of the table that the backends are from, ``level`` how near they are,
    ``affinity`` how many seconds a client keeps its backend; ``known`` and ``healthy`` count the backends that the
    control plane told of. What the running release does not have is None.
    """

    outcome: str
    address: Address
    port: int
    protocol: Protocol
    client: int
    policy: dict[str, Any] | None
    backends: tuple[Share, ...] = ()
    table: int | None = None
    level: str | None = None
    affinity: int | None = None
    known: int | None = None
    healthy: int | None = None


def explain(
    node: hitless.Node, address: Address, port: int, protocol: Protocol = "tcp", client: Path | None = None
) -> Explanation:
    """Say what a process in the cgroup ``client`` (None: in one that no policy names) gets that connects there.

    Raises HitlessError when no mesh is live or its maps cannot be read, NodeError when ``client`` is no cgroup.
    """
    source = 0
    if client is not None:
        try:
            source = cgroup_id(client)
        except OSError as error:
            raise NodeError(f"{client} is no cgroup2 directory: {error.strerror}", path=str(client)) from error
    tables = has_tables(node)
    raw = packed(address)
    service = {"addr": raw, "port": socket.htons(port), "proto": PROTOCOLS[protocol], "pad": 0}
    policy = _policy(node, service, source, tables)
    found = Explanation("passed", address, port, protocol, source, policy)
    value = node.map("service").get(service)
    if value is not None:
        found = _with_table(node, found, value) if tables else _with_entry(found, value)
    if policy is not None and policy["action"] == "deny":
        return msgspec.structs.replace(found, outcome="denied")
    return found


def _with_table(node: hitless.Node, found: Explanation, value: dict[str, Any]) -> Explanation:
    table = value["table"]
    keys, values = node.map("slot").rows()
    words = keys.reshape(-1).view(np.uint32).reshape(-1, 2)
    mine = np.flatnonzero(words[:, 0] == table)
    mine = mine[np.argsort(words[mine, 1])]
    if len(mine) != value["count"]:
        raise NodeError(
            f"table {table} has {len(mine)} of its {value['count']} slots: the service was just changed, or somebody "
            "else deleted them, which the daemon repairs; try again",
            table=table,
        )
    slots = read_slots(values[mine].tobytes())
    backends = tuple(
        Share(slot.address, slot.port, slot.weight, share) for slot, share in zip(slots, shares(slots), strict=True)
    )
    return msgspec.structs.replace(
        found,
        outcome="served" if backends else "refused",
        backends=backends,
        table=table,
        level=LEVELS[value["level"]],
        affinity=value["affinity_s"],
        known=value["known"],
        healthy=value["healthy"],
    )


def _with_entry(found: Explanation, value: dict[str, Any]) -> Explanation:
    total = value["total_weight"]
    backends = tuple(
        Share(address_of(one["addr"]), socket.ntohs(one["port"]), one["weight"], one["weight"] / max(total, 1))
        for one in value["backends"][: value["count"]]
    )
    return msgspec.structs.replace(found, outcome="served" if total else "refused", backends=backends)


def _policy(node: hitless.Node, service: dict[str, Any], source: int, tables: bool) -> dict[str, Any] | None:
    """The entry that decides, looked for in the order in which the programs do."""
    sources = (source, 0) if source else (0,)
    for one in sources:
        held = node.map("policy").get({"source": one, "service": service, "pad": 0})
        if held is not None:
            return _told("service", one, held)
    if not tables:
        return None
    held_networks = [(key, value) for key, value in node.map("outbound").items() if key["proto"] == service["proto"]]
    for one in sources:
        halves = list(struct.unpack("=II", struct.pack("=Q", one)))
        for port in (service["port"], 0):
            matching = [
                (key, value)
                for key, value in held_networks
                if key["source"] == halves and key["port"] == port and _holds(key, service["addr"])
            ]
            if matching:
                key, value = max(matching, key=lambda entry: int(entry[0]["prefixlen"]))
                network, number, _ = network_of(key, key["prefixlen"] - 96)
                return _told("destination", one, value) | {"destination": str(network), "port": number}
    return None


def _holds(key: dict[str, Any], address: bytes) -> bool:
    rest = 128 - (key["prefixlen"] - 96)
    return bool(int.from_bytes(key["addr"], "big") >> rest == int.from_bytes(address, "big") >> rest)


def _told(kind: str, source: int, held: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "action": _ACTIONS[held["action"]], "source": source, "hits": held["hits"]}


def words(found: Explanation) -> list[str]:
    """The same for people, in lines."""
    where = f"[{found.address}]" if found.address.version == 6 else str(found.address)
    lines = [f"{where}:{found.port}/{found.protocol}: {_OUTCOMES[found.outcome]}"]
    policy = found.policy
    if policy is None:
        lines.append("policy: none speaks of it, so it is allowed")
    else:
        who = f"cgroup id {policy['source']}" if policy["source"] else "any client"
        what = "this service"
        if policy["kind"] == "destination":
            what = f"{policy['destination']}, port {policy['port'] or 'any'}"
        lines.append(f"policy: {policy['action']} for {who} to {what}, {policy['hits']} hits until now")
    if found.table is not None:
        lines.append(f"table: {found.table}, {len(found.backends)} of {found.known} backends, {found.healthy} healthy")
        if found.known and not found.healthy:
            lines.append("health: no backend is healthy, so all are used")
        lines.append(f"near: {_LEVELS[found.level or 'any']}")
        lines.append(f"affinity: {found.affinity} s" if found.affinity else "affinity: none")
    for one in found.backends:
        lines.append(f"  {one.share:7.2%}  {one.address} port {one.port}, weight {one.weight}")
    return lines


_OUTCOMES = {
    "served": "a connect goes to one of the backends below",
    "denied": "a connect is denied (EPERM)",
    "refused": "a connect is refused (ECONNREFUSED), since the service has no backend",
    "passed": "no service: a connect goes there as it is",
}
_LEVELS = {
    "any": "not asked for",
    "node": "on this node",
    "zone": "in this node's zone, since none on the node serves",
    "region": "in this node's region, since none in the zone serves",
    "far": "anywhere, since none in the region serves",
}
