"""Tables of backends: who gets a service's connections, and with which chance, as release 4's programs read it. Pure.

A table has a slot for each backend. By the alias method a slot is drawn with equal chance, and who draws it stays with
a chance of ``cut`` in 2**32, or goes to the slot ``alias``: two reads at any number of backends.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from fractions import Fraction

import msgspec

from meshd.model import Address, Backend, Locality, Protocol, Service

__all__ = [
    "LEVELS", "PROTOCOLS", "Choice", "Slot", "address_of", "choose", "endpoint", "member_keys", "packed", "read_slots",
    "shares", "slot_keys", "slots",
]  # fmt: skip

#: From how far away a service's backends are; the kernel has the index. ``any``: the service did not ask for near ones.
LEVELS = ("any", "node", "zone", "region", "far")

PROTOCOLS: dict[Protocol, int] = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}

_ALL = (1 << 32) - 1  # a cut that nobody exceeds
_MAPPED = bytes(10) + b"\xff\xff"
_ENDPOINT = struct.Struct("=16s2sBB")
_SLOT = struct.Struct("=16s2sHIII")
_SLOT_KEY = struct.Struct("=II")
_MEMBER = struct.Struct("=I2sH16s")


class Choice(msgspec.Struct, frozen=True):
    """Who is to get a service's new connections, by weight; one of weight 0 gets none.

    ``level`` is an index of :data:`LEVELS`, ``known`` how many backends there are, and ``healthy`` how many of them
    are: if none is, all are chosen.
    """

    backends: tuple[Backend, ...]
    level: int
    known: int
    healthy: int


class Slot(msgspec.Struct, frozen=True):
    """One slot of a table."""

    address: Address
    port: int
    cut: int
    alias: int
    weight: int


def choose(service: Service, here: Locality) -> Choice:
    """Who gets the new connections of ``service`` from clients on a node that is ``here``."""
    known = service.backends
    healthy = tuple(one for one in known if one.healthy)
    if not healthy:
        return Choice(known, 0, len(known), 0)
    if not service.local:
        return Choice(healthy, 0, len(known), len(healthy))
    levels = [_level(one.locality, here) for one in healthy]
    # Backends that drain do not make a level one that serves.
    nearest = min((level for level, one in zip(levels, healthy, strict=True) if one.weight), default=len(LEVELS) - 1)
    chosen = tuple(one for level, one in zip(levels, healthy, strict=True) if level == nearest)
    return Choice(chosen, nearest, len(known), len(healthy))


def _level(there: Locality, here: Locality) -> int:
    if here.node and there.node == here.node:
        return 1
    if here.zone and (there.region, there.zone) == (here.region, here.zone):
        return 2
    if here.region and there.region == here.region:
        return 3
    return 4


def endpoint(address: Address, port: int, protocol: Protocol) -> bytes:
    """The bytes of the kernel's ``struct endpoint``."""
    return _ENDPOINT.pack(packed(address), port.to_bytes(2, "big"), PROTOCOLS[protocol], 0)


def packed(address: Address) -> bytes:
    """An address as the kernel's 16 bytes: IPv4 as ::ffff:a.b.c.d."""
    found = address.packed
    return found if len(found) == 16 else _MAPPED + found


def address_of(raw: bytes) -> Address:
    """The reverse."""
    return ipaddress.ip_address(raw[12:] if raw[:12] == _MAPPED else raw)


def slots(backends: Sequence[Backend]) -> bytes:
    """The values of a table's slots, one after the other; backends of weight 0 have none."""
    weighed = [one for one in backends if one.weight]
    cuts = _aliases([one.weight for one in weighed])
    return b"".join(
        _SLOT.pack(packed(one.address), one.port.to_bytes(2, "big"), 0, cut, alias, min(one.weight, _ALL))
        for one, (cut, alias) in zip(weighed, cuts, strict=True)
    )


def read_slots(values: bytes) -> list[Slot]:
    """The slots in such bytes."""
    return [
        Slot(address_of(raw), int.from_bytes(port, "big"), cut, alias, weight)
        for raw, port, _, cut, alias, weight in _SLOT.iter_unpack(values)
    ]


def slot_keys(table: int, count: int) -> bytes:
    """The keys of the slots of a table, one after the other."""
    return b"".join(_SLOT_KEY.pack(table, index) for index in range(count))


def member_keys(table: int, values: bytes) -> bytes:
    """The keys by which those in a table are found, one after the other; ``values`` are its slots."""
    return b"".join(_MEMBER.pack(table, port, 0, raw) for raw, port, *_ in _SLOT.iter_unpack(values))


def shares(table: Sequence[Slot]) -> list[float]:
    """The chance of each slot of a table to be where a connection goes."""
    found = [Fraction(0)] * len(table)
    for index, slot in enumerate(table):
        stays = Fraction(slot.cut, 1 << 32) if slot.alias != index else Fraction(1)
        found[index] += stays
        if slot.alias < len(table):
            found[slot.alias] += 1 - stays
    return [float(share / len(table)) for share in found]


def _aliases(weights: Sequence[int]) -> list[tuple[int, int]]:
    """For each weight, its slot's cut and alias: Vose's method in whole numbers."""
    total, count = sum(weights), len(weights)
    found = [(_ALL, index) for index in range(count)]
    if len(set(weights)) <= 1:
        return found
    left = [weight * count for weight in weights]  # of a slot's size, which is the total
    small = [index for index, size in enumerate(left) if size < total]
    large = [index for index, size in enumerate(left) if size > total]
    while small and large:
        lacking, giving = small.pop(), large[-1]
        found[lacking] = (min((left[lacking] << 32) // total, _ALL), giving)
        left[giving] -= total - left[lacking]
        if left[giving] <= total:
            large.pop()
            if left[giving] < total:
                small.append(giving)
    return found
