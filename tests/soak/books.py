"""Comparing the books: what clients and control plane counted themselves, and what the maps hold at the end."""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import hitless
from hitless.layout.codec import decode, encode
from meshd.desired import PolicyKey, ServiceKey, policy_key, service_key
from meshd.reconcile import sweep_flows
from tests.soak.control import TABLES, WRITERS, Table, journal_path
from tests.soak.journal import Journal
from tests.soak.world import ECHO, EMPTY, TARGETS, fixed, key_of

__all__ = ["ClientBooks", "Mismatch", "Sum", "compare", "total"]

_ESTABLISHED = 2
_SHARES = 1024


class ClientBooks(msgspec.Struct, frozen=True):
    """What one client, or all of them, counted; lists are by service of ``ECHO``."""

    operations: int
    opened: list[int]
    closed: list[int]
    refused: int
    forbidden: int
    messages: dict[int, int]
    bytes: dict[int, int]
    sizes: dict[int, int]
    held: list[list[int]]


class Mismatch(msgspec.Struct, frozen=True):
    """One place of a map that does not hold what it must."""

    map: str
    key: str
    field: str
    expected: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.map}[{self.key}] {self.field}: expected {self.expected}, found {self.found}"


class Sum(msgspec.Struct, frozen=True):
    """One thing that was counted on both sides."""

    what: str
    expected: int
    found: int


def total(clients: Sequence[ClientBooks]) -> ClientBooks:
    """The books of all clients as one."""
    return ClientBooks(
        operations=sum(one.operations for one in clients),
        opened=[sum(one.opened[n] for one in clients) for n in range(len(ECHO))],
        closed=[sum(one.closed[n] for one in clients) for n in range(len(ECHO))],
        refused=sum(one.refused for one in clients),
        forbidden=sum(one.forbidden for one in clients),
        messages=_added(one.messages for one in clients),
        bytes=_added(one.bytes for one in clients),
        sizes=_added(one.sizes for one in clients),
        held=[[cookie for one in clients for cookie in one.held[n]] for n in range(len(ECHO))],
    )


def compare(node: hitless.Node, books: ClientBooks, journals: Path) -> tuple[list[Sum], list[Mismatch]]:
    """All sums, and every single place that differs; release 1 is live and the clients hold still.

    Raises HitlessError when a map cannot be read.
    """
    expected: dict[str, dict[Any, dict[str, Any]]] = {
        "counter": _counters(books), "policy": _policies(books),
        "sent": {
            account: {"messages": books.messages[account], "bytes": books.bytes[account]} for account in books.messages
        },
        "size": {size: {"count": count} for size, count in books.sizes.items()},
        "share": _shares(books),
    }  # fmt: skip
    found: dict[str, dict[Any, dict[str, Any]]] = {
        "counter": {_told(service_key(key)): value for key, value in node.map("counter").items()},
        "policy": {_told(policy_key(key)): value for key, value in node.map("policy").items()},
        "sent": dict(node.map("sent").items()),
        "size": dict(node.map("size").items()),
        "share": {
            key: {"count": sum(of_cpu["count"] for of_cpu in values)} for key, values in node.map("share").items()
        },
    }
    sums, wrong = [], []
    for name in expected:
        for field in next(iter(expected[name].values())):
            if field != "action":
                sides = [sum(value[field] for value in side[name].values()) for side in (expected, found)]
                sums.append(Sum(f"{name} {field}", *sides))
        # An entry of zeros counts as none: a release may look at a service before it counts anything there.
        wrong += _differences(name, _without_zeros(expected[name]), _without_zeros(found[name]))
    sweep_flows(node)
    flows = {key: _flow(value) for key, value in node.map("flow").items()}
    held = {cookie: _held(number) for number, cookies in enumerate(books.held) for cookie in cookies}
    sums.append(Sum("flow entries", len(held), len(flows)))
    wrong += _differences("flow", held, flows)
    for table in TABLES:
        wanted, there = _entries(node, table, journals)
        sums.append(Sum(f"{table.name} entries", len(wanted), len(there)))
        wrong += _differences(table.name, wanted, there)
    return sums, wrong


def _counters(books: ClientBooks) -> dict[Any, dict[str, Any]]:
    counted: dict[Any, dict[str, Any]] = {
        _told(key_of(target)): {"opened": opened, "established": opened, "closed": closed, "refused": 0}
        for target, opened, closed in zip(ECHO, books.opened, books.closed, strict=True)
    }
    counted[_told(key_of(EMPTY))] = {"opened": 0, "established": 0, "closed": 0, "refused": books.refused}
    return counted


def _policies(books: ClientBooks) -> dict[Any, dict[str, Any]]:
    hits = (*books.opened, books.refused, books.forbidden)
    by_service = {key_of(target): count for target, count in zip(TARGETS, hits, strict=True)}
    return {
        _told(key): {"action": action, "hits": by_service[key.service]} for key, action in fixed().policies.items()
    }


def _shares(books: ClientBooks) -> dict[Any, dict[str, Any]]:
    counts: Counter[int] = Counter()
    for account, messages in books.messages.items():
        counts[account % _SHARES] += messages
    return {share: {"count": count} for share, count in counts.items()}


def _held(number: int) -> dict[str, Any]:
    return {"state": _ESTABLISHED, "service": _told(key_of(ECHO[number])), "to its backends": True}


def _flow(value: Mapping[str, Any]) -> dict[str, Any]:
    service = service_key(value["service"])
    backends = fixed().services.get(service, {"backends": []})["backends"]
    sent_to = bytes(value["backend"]["addr"])
    return {
        "state": value["state"],
        "service": _told(service),
        "to its backends": sent_to in [backend["addr"] for backend in backends],
    }


def _told(key: ServiceKey | PolicyKey) -> str:
    """A key as people write it."""
    if isinstance(key, PolicyKey):
        return f"from {key.source or 'anyone'} to {_told(key.service)}"
    address = ipaddress.IPv6Address(key.addr)
    return f"{address.ipv4_mapped or address} port {socket.ntohs(key.port)}"


def _entries(node: hitless.Node, table: Table, journals: Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What a map of the control plane must hold and what it holds."""
    handle = node.map(table.name)
    key, value = handle.spec.key, handle.spec.value
    assert key is not None
    assert value is not None
    pairs = [(table.key(n), table.value(v)) for n, v in _journalled(journals, table).items()]
    if table.name == "service":
        pairs += [(fixed_key.to_map(), held) for fixed_key, held in fixed().services.items()]
    # As it would be read: with all the fields that were left out when it was written.
    wanted = {str(decode(key, encode(key, k))): decode(value, encode(value, v)) for k, v in pairs}
    return wanted, {str(k): v for k, v in handle.items()}


def _journalled(journals: Path, table: Table) -> dict[int, int]:
    held: dict[int, int] = {}
    for writer in WRITERS:
        state = Journal.read(journal_path(journals, table.name, writer))
        assert not state.pending, f"the write of {state.pending} to {table.name} has no end in the journal"
        held |= state.held
    return held


def _differences(name: str, expected: Mapping[Any, Any], found: Mapping[Any, Any]) -> list[Mismatch]:
    wrong = []
    for key in [*expected, *(key for key in found if key not in expected)]:
        wanted, there = expected.get(key, {}), found.get(key, {})
        wrong += [
            Mismatch(name, str(key), field, wanted.get(field), there.get(field))
            for field in wanted or there
            if wanted.get(field) != there.get(field)
        ]
    return wrong


def _without_zeros(entries: Mapping[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    return {key: value for key, value in entries.items() if any(value.values())}


def _added(parts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    sums: Counter[int] = Counter()
    for part in parts:
        sums.update(part)
    return dict(sums)
