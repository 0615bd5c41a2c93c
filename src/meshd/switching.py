"""Keep release 4's maps as the news say, by writing only what changed.

A service's table never changes while clients may draw from it. A new one is written under a number of its own, then
the service is switched to it by one write, then the old one is deleted. A kill between any two of these leaves a table
that no service names: it is swept when two looks at all the maps, some seconds apart, have found it so, since another
daemon could be about to name it.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from meshd.model import Locality, Policy, Service
from meshd.registry import Frontend, News
from meshd.tables import PROTOCOLS, choose, endpoint, member_keys, packed, slot_keys, slots

if TYPE_CHECKING:
    import hitless

__all__ = ["SERVICE", "Changes", "TableWriter", "entries_of", "policy_entries"]

#: struct service: table, count, affinity_s, level, known, healthy.
SERVICE = struct.Struct("=IIIIII")

_SLOT, _MEMBER, _ENDPOINT = 32, 24, 20  # bytes
_CHUNK = 32768  # slots that are written at once
_POLICY_NEW = struct.Struct("=IIQQ")  # action, hits, last_ns
_ACTIONS = {"allow": 0, "deny": 1}
_POLICY_MAPS = ("policy", "outbound", "inbound")


Rows = npt.NDArray[np.uint8]


class Changes(msgspec.Struct, frozen=True):
    """How many entries were added, changed and removed, over services and policies."""

    added: int = 0
    changed: int = 0
    removed: int = 0

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __add__(self, other: Changes) -> Changes:
        return Changes(self.added + other.added, self.changed + other.changed, self.removed + other.removed)


class _Wanted(msgspec.Struct, frozen=True):
    """What a service should be: its slots' values, and the rest of its entry; ``keeps``: clients come back."""

    slots: bytes
    affinity: int
    level: int
    known: int
    healthy: int
    keeps: bool

    def value(self, table: int) -> bytes:
        count = len(self.slots) // _SLOT
        return SERVICE.pack(table, count, self.affinity, self.level, self.known, self.healthy)


class _Live(msgspec.Struct, frozen=True):
    """What the kernel has of a service, as far as is known; ``keeps``: its members are there."""

    table: int
    value: bytes
    slots: bytes
    keeps: bool


class TableWriter:
    """Writes tables, services and policies to the maps of ``node``, which is ``here``."""

    def __init__(self, node: hitless.Node, here: Locality, access_log: bool) -> None:
        self._node = node
        self._here = here
        self._access_log = access_log
        self._live: dict[bytes, _Live] = {}
        self._meant: dict[bytes, tuple[Service, _Wanted]] = {}  # spares working it out again
        self._policies: dict[str, dict[bytes, int]] = {name: {} for name in _POLICY_MAPS}
        self._used: set[int] = {0}
        self._orphans: set[int] = set()
        # Another daemon may write at the same time, during a hand-over: it will hardly begin at the same number.
        self._next = random.randrange(1, 1 << 32)

    def write(self, news: News) -> Changes:
        """See :meth:`Writer.write`."""
        wanted = {_key(frontend): self._mean(frontend, one) for frontend, one in news.services.items()}
        return self._write(wanted, news.policies)

    def resync(self, everything: News) -> Changes:
        """See :meth:`Writer.resync`."""
        self._write_settings()
        found = _Kernel(self._node)
        wanted = {_key(frontend): self._mean(frontend, one) for frontend, one in everything.services.items()}
        self._meant = {key: self._meant[key] for key in wanted}
        self._live = found.live(wanted)
        self._policies = found.policies
        self._used = {0, *found.tables}
        gone = dict.fromkeys(found.services.keys() - wanted.keys())
        # What is not as it should be is not in self._live, so that it gets a table of its own.
        changes = self._write({**gone, **wanted}, everything.policies, frozenset(found.services))
        self._sweep(found, {live.table for live in self._live.values()})
        return changes

    def _mean(self, frontend: Frontend, service: Service | None) -> _Wanted | None:
        key = _key(frontend)
        if service is None:
            self._meant.pop(key, None)
            return None
        before = self._meant.get(key)
        if before is not None and before[0] is service:
            return before[1]
        chosen = choose(service, self._here)
        keeps = bool(service.affinity) or service.protocol == "udp"
        wanted = _Wanted(
            slots(chosen.backends), service.affinity, chosen.level, chosen.known, chosen.healthy, keeps
        )
        self._meant[key] = (service, wanted)
        return wanted

    def _write(
        self,
        wanted: Mapping[bytes, _Wanted | None],
        policies: Iterable[tuple[Policy, Frontend | None]] | None,
        there: frozenset[bytes] = frozenset(),
    ) -> Changes:
        # A service is never reachable without its policies: they come before it and go after it.
        changes = Changes()
        targets: dict[str, dict[bytes, int]] = {}
        if policies is not None:
            targets = policy_entries(policies)
            for name, target in targets.items():
                changes += self._set_policies(name, target)
        changes += self._write_services(wanted, there)
        for name, target in targets.items():
            gone = [key for key in self._policies[name] if key not in target]
            if gone:
                self._node.map(name).delete_rows(_join(gone, len(gone[0])))
                changes += Changes(removed=len(gone))
            self._policies[name] = target
        return changes

    def _set_policies(self, name: str, target: Mapping[bytes, int]) -> Changes:
        before = self._policies[name]
        new = [key for key in target if key not in before]
        other = [key for key, action in target.items() if key in before and before[key] != action]
        if not new and not other:
            return Changes()
        handle = self._node.map(name)
        # What the programs counted stays.
        held = entries_of(handle) if other else {}
        values = [_POLICY_NEW.pack(target[key], 0, 0, 0) for key in new]
        values += [
            struct.pack("=I", target[key]) + held.get(key, bytes(_POLICY_NEW.size))[4:] for key in other
        ]
        handle.update_rows(_join([*new, *other], len((new or other)[0])), _join(values, _POLICY_NEW.size))
        self._policies[name] = before | {key: target[key] for key in (*new, *other)}
        return Changes(added=len(new), changed=len(other))

    def _write_services(self, wanted: Mapping[bytes, _Wanted | None], there: frozenset[bytes]) -> Changes:
        changes = Changes()
        batch = _Batch()
        # Who goes makes room for who comes.
        for key, one in sorted(wanted.items(), key=lambda entry: entry[1] is not None):
            live = self._live.get(key)
            known = live is not None or key in there
            if one is None:
                if known:
                    batch.removed.append(key)
                    batch.retire(live)
                    batch.live[key] = None
                    changes += Changes(removed=1)
                continue
            if live is not None and live.slots == one.slots and (live.keeps or not one.keeps):
                value = one.value(live.table)
                if value == live.value:
                    continue
                batch.switch(key, _Live(live.table, value, live.slots, live.keeps))
            else:
                table = self._new_table() if one.slots else 0
                batch.put(table, one)
                batch.switch(key, _Live(table, one.value(table), one.slots, one.keeps))
                batch.retire(live)
            changes += Changes(changed=1) if known else Changes(added=1)
            if batch.size >= _CHUNK:
                self._flush(batch)
                batch = _Batch()
        self._flush(batch)
        return changes

    def _flush(self, batch: _Batch) -> None:
        node = self._node
        if batch.slot_keys:
            node.map("slot").update_rows(_join(batch.slot_keys, 8), _join(batch.slot_values, _SLOT))
        if batch.member_keys:
            keys = _join(batch.member_keys, _MEMBER)
            node.map("member").update_rows(keys, np.zeros((len(keys), 4), np.uint8))
        if batch.removed:
            node.map("service").delete_rows(_join(batch.removed, _ENDPOINT))
        if batch.keys:
            node.map("service").update_rows(_join(batch.keys, _ENDPOINT), _join(batch.values, SERVICE.size))
        for key, live in batch.live.items():
            if live is None:
                self._live.pop(key, None)
            else:
                self._live[key] = live
        # Nobody is led there any more.
        if batch.old_slots:
            node.map("slot").delete_rows(_join(batch.old_slots, 8))
        if batch.old_members:
            node.map("member").delete_rows(_join(batch.old_members, _MEMBER))
        self._used -= batch.old_tables

    def _new_table(self) -> int:
        while self._next in self._used:
            self._next = (self._next + 1) % (1 << 32)
        self._used.add(self._next)
        return self._next

    def _sweep(self, found: _Kernel, named: set[int]) -> None:
        wrong = found.replaced - named
        orphans = set(found.tables) - named - wrong
        for table in wrong | (orphans & self._orphans):
            found.delete(table)
            self._used.discard(table)
        self._orphans = orphans - self._orphans

    def _write_settings(self) -> None:
        handle = self._node.map("settings")
        wanted = {"access_log": int(self._access_log), "unused": 0}
        if handle.get(0) != wanted:
            handle[0] = wanted


class _Batch:
    """What is to be written at once, in this order: new tables, services, then what they no longer name is deleted."""

    def __init__(self) -> None:
        self.slot_keys: list[bytes] = []
        self.slot_values: list[bytes] = []
        self.member_keys: list[bytes] = []
        self.keys: list[bytes] = []
        self.values: list[bytes] = []
        self.removed: list[bytes] = []
        self.old_slots: list[bytes] = []
        self.old_members: list[bytes] = []
        self.old_tables: set[int] = set()
        self.live: dict[bytes, _Live | None] = {}
        self.size = 0

    def put(self, table: int, wanted: _Wanted) -> None:
        count = len(wanted.slots) // _SLOT
        if not count:
            return
        self.slot_keys.append(slot_keys(table, count))
        self.slot_values.append(wanted.slots)
        if wanted.keeps:
            self.member_keys.append(member_keys(table, wanted.slots))
        self.size += count

    def switch(self, key: bytes, live: _Live) -> None:
        self.keys.append(key)
        self.values.append(live.value)
        self.live[key] = live
        self.size += 1

    def retire(self, live: _Live | None) -> None:
        if live is None or not live.slots:
            return
        self.old_slots.append(slot_keys(live.table, len(live.slots) // _SLOT))
        if live.keeps:
            self.old_members.append(member_keys(live.table, live.slots))
        self.old_tables.add(live.table)


class _Kernel:
    """What the maps hold, read once."""

    def __init__(self, node: hitless.Node) -> None:
        self._node = node
        self.services = entries_of(node.map("service"))
        self.policies = {
            name: {key: int.from_bytes(value[:4], sys.byteorder) for key, value in entries_of(node.map(name)).items()}
            for name in _POLICY_MAPS
        }
        keys, values = node.map("slot").rows()
        words = keys.reshape(-1).view(np.uint32).reshape(-1, 2)
        order = np.lexsort((words[:, 1], words[:, 0]))
        self._slot_keys, self._slot_values, words = keys[order], values[order], words[order]
        self._spans = _spans(words[:, 0])
        self._indexes = words[:, 1]
        members, _ = node.map("member").rows()
        of = members[:, :4].copy().reshape(-1).view(np.uint32)
        order = np.argsort(of, kind="stable")
        self._members = members[order]
        self._member_spans = _spans(of[order])
        #: Tables that a service names but that are not what it should have.
        self.replaced: set[int] = set()

    @property
    def tables(self) -> set[int]:
        """All that have a slot or a member."""
        return self._spans.keys() | self._member_spans.keys()

    def live(self, wanted: Mapping[bytes, _Wanted | None]) -> dict[bytes, _Live]:
        """The services that have the slots which they are meant to have."""
        found: dict[bytes, _Live] = {}
        named: set[int] = set()
        for key, value in self.services.items():
            table, count, *_ = SERVICE.unpack(value)
            one = wanted.get(key)
            if one is not None and table not in named and self._is(table, count, one):
                keeps = not count or table in self._member_spans
                found[key] = _Live(table, value, one.slots, keeps)
                if count:  # whoever has nobody has no table
                    named.add(table)
            else:
                self.replaced.add(table)
        self.replaced -= named
        return found

    def delete(self, table: int) -> None:
        if table in self._spans:
            start, end = self._spans[table]
            self._node.map("slot").delete_rows(self._slot_keys[start:end])
        if table in self._member_spans:
            start, end = self._member_spans[table]
            self._node.map("member").delete_rows(self._members[start:end])

    def _is(self, table: int, count: int, wanted: _Wanted) -> bool:
        start, end = self._spans.get(table, (0, 0))
        whole = end - start == count and (not count or self._indexes[end - 1] == count - 1)
        if not whole or self._slot_values[start:end].tobytes() != wanted.slots:
            return False
        first, last = self._member_spans.get(table, (0, 0))
        if first == last:
            return not (wanted.keeps and count)
        there = {row.tobytes() for row in self._members[first:last]}
        keys = member_keys(table, wanted.slots)
        return there == {keys[at : at + _MEMBER] for at in range(0, len(keys), _MEMBER)}


def _policy_entry(policy: Policy, frontend: Frontend | None) -> tuple[str, bytes] | None:
    """The map and the key of a policy; None for one that is for a service which is not there."""
    source = struct.pack("=Q", policy.source)
    port = policy.port.to_bytes(2, "big")
    if policy.service:
        return None if frontend is None else ("policy", source + _key(frontend) + bytes(4))
    network = policy.destination or policy.clients
    if network is None:
        return None
    bits = network.prefixlen + (96 if network.version == 4 else 0)
    where = bytes((PROTOCOLS[policy.protocol], 0)) + port + packed(network.network_address)
    if policy.destination is not None:
        return "outbound", struct.pack("=I", 96 + bits) + source + where
    return "inbound", struct.pack("=I", 32 + bits) + where


def policy_entries(policies: Iterable[tuple[Policy, Frontend | None]]) -> dict[str, dict[bytes, int]]:
    """All policies' actions by map and key."""
    found: dict[str, dict[bytes, int]] = {name: {} for name in _POLICY_MAPS}
    for policy, frontend in policies:
        entry = _policy_entry(policy, frontend)
        if entry is not None:
            found[entry[0]].setdefault(entry[1], _ACTIONS[policy.action])
    return found


def _key(frontend: Frontend) -> bytes:
    return endpoint(frontend.address, frontend.port, frontend.protocol)


def entries_of(handle: hitless.MapHandle) -> dict[bytes, bytes]:
    """All entries of a map as the kernel's bytes."""
    keys, values = handle.rows()
    return {key.tobytes(): value.tobytes() for key, value in zip(keys, values, strict=True)}


def _spans(sorted_tables: npt.NDArray[np.uint32]) -> dict[int, tuple[int, int]]:
    tables, starts = np.unique(sorted_tables, return_index=True)
    ends = [*starts[1:].tolist(), len(sorted_tables)]
    return dict(zip(tables.tolist(), zip(starts.tolist(), ends, strict=False), strict=False))


def _join(parts: Iterable[bytes], size: int) -> Rows:
    return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, size)
