"""What the kernel tells of a mesh right now: read from its pins, so also where no daemon runs. Looks only."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import msgspec

import hitless
from hitless.errors import NodeError
from meshd.desired import ServiceKey, service_key
from meshd.model import Protocol
from meshd.registry import Frontend

__all__ = ["Filled", "Seen", "look"]

_COUNTABLE = ("hash", "lru_hash", "lpm_trie")
_PROTOCOLS: dict[int, Protocol] = {6: "tcp", 17: "udp"}


class Filled(msgspec.Struct, frozen=True):
    """How many entries a map has, and how many it can have."""

    entries: int
    max_entries: int


class Seen(msgspec.Struct, frozen=True):
    """A mesh at one moment; ``version`` is None if none is live.

    ``counters`` are what the programs counted, by what clients connected to. ``going_to`` and ``phase`` are those of an
    upgrade that has begun and not ended, ``upgrading`` the id of the process that is at it; None if that was killed.
    ``attached`` of the ``hooks`` run the programs that they should.
    """

    version: str | None = None
    generation: int = 0
    going_to: str | None = None
    phase: str | None = None
    upgrading: int | None = None
    hooks: int = 0
    attached: int = 0
    maps: dict[str, Filled] = {}
    counters: dict[Frontend, dict[str, int]] = {}


def look(node: hitless.Node) -> Seen:
    """What is live under ``node``. Raises HitlessError if that cannot be read."""
    state = node.observe()
    going_to = state.unfinished.version if state.unfinished is not None else None
    phase = state.unfinished.phase if state.unfinished is not None else None
    upgrading = node.holder() if going_to is not None else None
    if state.current is None:
        return Seen(going_to=going_to, phase=phase, upgrading=upgrading)
    record, programs = state.current.record, state.current.programs
    running = {link: info.program_id for link, info in state.links.items() if not info.is_dead}
    countable = {name: live.info for name, live in state.current.maps.items() if live.info.type in _COUNTABLE}
    try:
        maps = {name: Filled(node.map(name).count(), info.max_entries) for name, info in countable.items()}
        counted = node.map("service_counter" if "service_counter" in state.current.maps else "counter").items()
    except NodeError:
        if node.observe().generation == record.generation:
            raise
        return look(node)  # an upgrade came between
    return Seen(
        version=record.version,
        generation=record.generation,
        going_to=going_to,
        phase=phase,
        upgrading=upgrading,
        hooks=len(record.hooks),
        attached=sum(running.get(hook.link) == programs[hook.program].id for hook in record.hooks),
        maps=maps,
        counters={_frontend(service_key(key)): _numbers(value) for key, value in counted},
    )


def _frontend(key: ServiceKey) -> Frontend:
    address = ipaddress.IPv6Address(key.addr)
    return Frontend(address.ipv4_mapped or address, socket.ntohs(key.port), _PROTOCOLS.get(key.proto, "tcp"))


def _numbers(value: dict[str, Any]) -> dict[str, int]:
    return {name: number for name, number in value.items() if isinstance(number, int)}
