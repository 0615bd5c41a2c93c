"""Carrying maps of maps: every inner map becomes a new inner map, and the slots of the new outer map hold those.

Slots are merged as entries are, three ways: the base is the inner map that a slot of the old outer map held when it was
carried. If the old slot holds another one since, or none, the new slot follows, unless the new release changed it
first. Only user space can write slots. It has no compare-and-swap for that, so of two writers who set the same slot of
both outer maps in the same moment either may win. A slot that the old release's user space fills between ``verify`` and
the first catch-up is empty for programs of the new release until then.

Where the definition of inner maps stays as it is, the new outer map gets the same inner maps.

Below the passage's pin there are ``slots``, the base, and for each inner map a directory named after its kernel id,
with its new ``map`` and what its own carrier keeps, ``entries``. The map is pinned there last, when it is filled: until
then no slot and no program has it, so after a kill it is simply made anew.
"""

from __future__ import annotations

import errno
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from hitless.carry import way
from hitless.errors import KernelError, NodeError, VerifyError
from hitless.kernel.bpffs import make_directory, remove_tree
from hitless.kernel.maps import Map, Rows, create, create_as
from hitless.layout.conversion import Conversion
from hitless.layout.diff import MapDiff, diff_inner, diff_map
from hitless.layout.elf import MAP_TYPES
from hitless.layout.model import MapSpec
from hitless.layout.rules import INNER, FieldRule, MapRules, inner_rules, inner_spec
from hitless.upgrade.carrier import Carrier, Passage, Successors, Tally
from hitless.upgrade.pace import Pace

__all__ = ["InnerMaps", "carry_inner_maps"]

_HASH = MAP_TYPES.index("hash")
_DESCRIPTORS = 12  # what one inner map needs at most, with its carrier there and that back


class Trade(msgspec.Struct, frozen=True):
    """What the carriers of inner maps are made from; the same for all inner maps of one outer map."""

    name: str
    old: MapSpec
    new: MapSpec
    diff: MapDiff
    rules: MapRules
    kind: str
    lossy_allowed: bool
    writing: threading.RLock
    pace: Pace

    def carrier(self, source: Map, target: Map, pin: Path, fresh: bool) -> Carrier:
        """A carrier for one inner map. Raises KernelError."""
        from hitless.upgrade.carriers import CARRIERS  # which knows this module

        return CARRIERS[self.kind](
            Passage(
                name=self.name,
                source=source,
                target=target,
                old=self.old,
                new=self.new,
                diff=self.diff,
                rules=self.rules,
                pin=pin,
                fresh=fresh,
                lossy_allowed=self.lossy_allowed,
                writing=self.writing,
                pace=self.pace,
            )
        )

    def target(self, source: Map) -> Map:
        """A new empty inner map to take the place of ``source``. Raises KernelError."""
        spec, room = self.new, self.new.max_entries
        if source.info.max_entries != self.old.max_entries:  # whoever made it chose a size of its own
            room = source.info.max_entries
        return create_as(msgspec.structs.replace(spec, max_entries=room))

    def back(self) -> Trade:
        """The same with the sides changed. What the old layout cannot hold stays behind."""
        key, value = self.diff.key, self.diff.value
        fields = {rule.was or path: FieldRule(merge=rule.merge) for path, rule in self.rules.fields.items()}
        return msgspec.structs.replace(
            self,
            old=self.new,
            new=self.old,
            diff=MapDiff(
                self.name, None, "lossy", (), key.inverse() if key else None, value.inverse() if value else None
            ),
            rules=MapRules(fields=fields),
            lossy_allowed=True,
        )

    def check(self, source: Map) -> None:
        """Raise NodeError if an inner map of the running release carries another layout than its record says."""
        seen = source.spec(self.old.name)
        if seen.key is None or seen.value is None:
            return
        found = diff_map(self.old, msgspec.structs.replace(self.old, key=seen.key, value=seen.value))
        if found.verdict != "identical":
            what = ", ".join(change.path for change in found.changes)
            raise NodeError(
                f"map {self.name}: its inner map {source.info.name} (id {source.info.id}) has another layout ({what}) "
                "than the running release's own record tells, so its entries cannot be converted; find out who put "
                "it there, or take it out",
                map=self.name,
                inner=source.info.id,
            )


class Lane(msgspec.Struct):
    """One inner map and what takes its place; no ``carrier`` if the map is gone since a killed process carried it."""

    target: Map
    source: Map | None = None
    carrier: Carrier | None = None


class InnerMaps:
    """The carrier of one outer map. ``trade`` is None where the inner maps stay the same."""

    def __init__(
        self,
        name: str,
        source: Map,
        target: Map,
        slots: Map,
        key: Conversion | None,
        trade: Trade | None,
        pin: Path,
        successors: Successors,
        writing: threading.RLock,
        going_back: bool = False,
    ) -> None:
        self.name = name
        self.tally = Tally()
        self._source = source
        self._target = target
        self._slots = slots
        self._key = key
        self._trade = trade
        # What inner maps become, whatever the outer map is called.
        self._becomes = msgspec.structs.replace(trade.new, name="", tags=()) if trade is not None else None
        self._pin = pin
        self._successors = successors
        self._writing = writing
        self._going_back = going_back
        self._lanes: dict[int, Lane] = {}
        self._followed = 0  # slots that differed since the copy
        self._checked: set[tuple[int, int, int]] = set()  # types, as BTF and ids in it, that are as recorded

    # The interface

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`; a second pass follows at once, since the first takes long."""
        self._follow_slots(False, progress)
        self.tally.entries = self.tally.copied
        self.catch_up()

    def verify(self) -> None:
        """See :class:`Carrier`; slots are followed first: the hooks change next, and programs look for inner maps."""
        self._follow_slots(False, _unheard)
        with self._writing:
            old, base, new = slots_of(self._source), slots_of(self._slots), slots_of(self._target)
        keys = [key for key, inner in base.items() if old.get(key) == inner]
        for key, there in zip(keys, self._keys_of(keys), strict=True):
            successor = self._successor(base[key])
            if there is not None and (successor is None or new.get(there) != successor.info.id):
                raise VerifyError(
                    f"map {self.name}: slot {key.hex()} does not hold what became of inner map {base[key]}; nothing "
                    "was switched, the running release is untouched",
                    map=self.name,
                    key=key.hex(),
                    count=1,
                )
        for lane in self._carried():
            lane.verify()

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`."""
        started = time.perf_counter()
        found = self._follow_slots(last, _unheard)
        self._followed += found
        for lane in self._carried():
            found += lane.catch_up(last)
        self.tally.rounds += 1
        self.tally.differing = found
        self.tally.last_round = time.perf_counter() - started
        self._count()
        return found

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`. Inner maps that the new release added become new ones of the old layout."""
        if fresh:
            make_directory(pin)
            slots = _new_base(self._target, pin)
            base = slots_of(self._slots)
            pairs = [
                (there, successor.info.id)
                for there, inner in zip(self._keys_of(list(base)), base.values(), strict=True)
                if there is not None and (successor := self._successor(inner)) is not None
            ]
            slots.write(_rows([there for there, _ in pairs]), _numbers([inner for _, inner in pairs]))
        else:
            slots = Map.open(pin / "slots")
        back = InnerMaps(
            name=self.name,
            source=self._target,
            target=self._source,
            slots=slots,
            key=self._key.inverse() if self._key else None,
            trade=self._trade.back() if self._trade else None,
            pin=pin,
            successors=self._successors,
            writing=self._writing,
            going_back=True,
        )
        for lane in self._lanes.values():
            if lane.carrier is None or lane.source is None:
                continue
            inner = lane.target.info.id
            place = pin / str(inner)
            if fresh:
                make_directory(place)
            back.add(inner, Lane(lane.source, lane.target, lane.carrier.turned(place / "entries", fresh)))
        if not fresh:
            back.reopen()
        return back

    # Inner maps

    def add(self, inner: int, lane: Lane) -> None:
        """Take up ``lane`` for the source's inner map with the id ``inner``."""
        self._lanes[inner] = lane
        self._successors[inner, self._becomes] = lane.target

    def reopen(self) -> None:
        """Take up the inner maps that a killed process had filled."""
        for place in self._pin.iterdir():
            known = not place.name.isdecimal() or int(place.name) in self._lanes
            if known or self._trade is None or not (place / "map").exists():
                continue
            source, target = _by_id(int(place.name)), Map.open(place / "map")
            carrier = self._trade.carrier(source, target, place / "entries", fresh=False) if source else None
            self.add(int(place.name), Lane(target, source, carrier))

    def take_prefilled(self) -> None:
        """What libbpf put into slots of the target when it loaded the release stands for what it was in the old one."""
        back = self._key.inverse() if self._key else None
        for there, inner in slots_of(self._target).items():
            former = self._successors.get((inner, None))
            if former is not None:
                key = back.apply(_rows([there])).records.tobytes() if back else there
                self._slots.update(key, former.info.id.to_bytes(4, sys.byteorder))

    def _carried(self) -> list[Carrier]:
        return [lane.carrier for lane in self._lanes.values() if lane.carrier is not None]

    def _successor(self, inner: int) -> Map | None:
        """What takes the place of the inner map with this id, None if that is not made yet, or gone."""
        found = self._successors.get((inner, None))
        if found is not None:
            return found
        return _by_id(inner) if self._trade is None else self._successors.get((inner, self._becomes))

    def _make(self, inner: int, progress: Callable[[int], None]) -> None:
        """A new inner map, filled, for the source's inner map with this id; nothing if that is gone meanwhile."""
        trade, source = self._trade, _by_id(inner)
        if trade is None or source is None:
            return
        types = (source.info.btf_id, source.info.key_type_id, source.info.value_type_id)
        if types not in self._checked:
            trade.check(source)
            self._checked.add(types)
        place = self._pin / str(inner)
        remove_tree(place)
        make_directory(place)
        target = trade.target(source)
        carrier = trade.carrier(source, target, place / "entries", fresh=True)
        before = self.tally.copied
        carrier.copy(lambda done: progress(before + done))
        target.pin(place / "map")
        self.tally.copied += carrier.tally.copied
        self.add(inner, Lane(target, source, carrier))

    # Slots

    def _follow_slots(self, last: bool, progress: Callable[[int], None]) -> int:
        """Bring the target's slots up to date; returns how many differed."""
        old, base = slots_of(self._source), slots_of(self._slots)
        for inner in {inner for key, inner in old.items() if base.get(key) != inner}:
            if self._successor(inner) is None:
                self._make(inner, progress)
        differ = [key for key in {**base, **old} if old.get(key) != base.get(key)]
        filled: list[_Slot] = []
        emptied: list[tuple[bytes, bytes]] = []
        with self._writing:
            new = slots_of(self._target)
            for key, there in zip(differ, self._keys_of(differ), strict=True):
                held, was = old.get(key), base.get(key)
                successor = self._successor(held) if held is not None else None
                if there is None or (held is not None and successor is None):
                    continue  # has no place, or went while we looked: the next round sees that
                former = self._successor(was) if was is not None else None
                wanted = successor.info.id if successor is not None else None
                if new.get(there) not in (wanted, former.info.id if former is not None else None):
                    continue  # the new release's own word wins
                if held is not None and successor is not None:
                    filled.append(_Slot(key, there, held, successor))
                else:
                    emptied.append((key, there))
            self._empty(emptied)
            self._fill(filled, last)
        return len(filled) + len(emptied)

    def _empty(self, emptied: list[tuple[bytes, bytes]]) -> None:
        """Take inner maps out of slots, given by their keys on both sides, and what they came from out of the base."""
        if self._target.info.type == "hash_of_maps":
            # Together, since after each such call the kernel waits for running programs, some milliseconds.
            self._target.remove(_rows([there for _, there in emptied]))
        else:
            for _, there in emptied:
                self._target.delete(there)
        for key, _ in emptied:
            self._slots.delete(key)

    def _fill(self, filled: list[_Slot], last: bool) -> None:
        """Put inner maps into slots of the target, together, and then what they came from into the base."""
        source, target = self._source.info, self._target.info
        leave_out = self._going_back or (not last and target.max_entries >= source.max_entries)
        while filled:
            done = len(filled)
            try:
                self._target.write(_rows([slot.there for slot in filled]), _numbers([s.successor.fd for s in filled]))
            except KernelError as error:
                if error.facts["errno"] != errno.E2BIG or not leave_out:
                    raise KernelError(
                        f"map {self.name}: putting inner maps into its slots: {error.message} (the new map's "
                        f"max_entries is {target.max_entries})",
                        **error.facts,
                        map=self.name,
                    ) from None
                done = int(str(error.facts["written"]))
            self._slots.write(_rows([slot.key for slot in filled[:done]]), _numbers([s.held for s in filled[:done]]))
            filled = filled[done + 1 :]  # what found the target full is left to a later round, or for good

    def _keys_of(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Keys of the source's slots as the target's; None for one that would become another slot's."""
        if self._key is None or not keys:
            return list(keys)
        rows = _rows(keys)
        there = self._key.apply(rows).records
        same = (self._key.inverse().apply(there).records == rows).all(axis=1)
        return [row.tobytes() if fits else None for row, fits in zip(there, same, strict=True)]

    def _count(self) -> None:
        tallies = [carrier.tally for carrier in self._carried()]
        self.tally.caught_up = self._followed + sum(tally.caught_up for tally in tallies)
        self.tally.left_behind = next((tally.left_behind for tally in tallies if tally.left_behind), None)
        self.tally.lost = {}
        for tally in tallies:
            for path, count in tally.lost.items():
                self.tally.lost[INNER + path] = self.tally.lost.get(INNER + path, 0) + count


class _Slot(msgspec.Struct, frozen=True):
    """A slot to be filled: its key on both sides, the source's inner map and what takes the place of that."""

    key: bytes
    there: bytes
    held: int
    successor: Map


def carry_inner_maps(passage: Passage) -> InnerMaps:
    """The carrier of a map of maps. Raises KernelError."""
    old, new = inner_spec(passage.old), inner_spec(passage.new)
    diff = diff_inner(passage.old, passage.new, passage.rules)
    assert old is not None and new is not None and diff is not None  # the plan carries no unknown inner maps
    rules = inner_rules(passage.rules)
    trade = None
    if diff.verdict != "identical":
        found = way(old, new, rules, ())
        assert not isinstance(found, str)
        trade = Trade(
            name=passage.name,
            old=old,
            new=new,
            diff=diff,
            rules=rules,
            kind=found.kind,
            lossy_allowed=passage.lossy_allowed,
            writing=passage.writing,
            pace=passage.pace,
        )
    _allow_descriptors(_DESCRIPTORS * len(set(slots_of(passage.source).values())))
    if passage.fresh:
        make_directory(passage.pin)
    made = InnerMaps(
        name=passage.name,
        source=passage.source,
        target=passage.target,
        slots=_new_base(passage.source, passage.pin) if passage.fresh else Map.open(passage.pin / "slots"),
        key=passage.diff.key,
        trade=trade,
        pin=passage.pin,
        successors=passage.successors,
        writing=passage.writing,
    )
    if passage.fresh:
        made.take_prefilled()
    else:
        made.reopen()
    return made


def slots_of(outer: Map) -> dict[bytes, int]:
    """The slots of an outer map that hold an inner map, with its kernel id; also those of a base."""
    if outer.info.type != "array_of_maps":
        keys, values = outer.entries()
        ids = values.view(np.uint32).ravel().tolist()
        return {key.tobytes(): inner for key, inner in zip(keys, ids, strict=True)}
    found = {}
    for index in range(outer.info.max_entries):  # not in batches: older kernels end one at an empty slot
        key = index.to_bytes(4, sys.byteorder)
        value = outer.lookup(key)
        if value is not None:
            found[key] = int.from_bytes(value, sys.byteorder)
    return found


def _new_base(outer: Map, directory: Path) -> Map:
    # Twice as large, since a pass over slots that come and go sees more of them than are there at once.
    made = create(_HASH, "slots", outer.info.key_size, 4, 2 * outer.info.max_entries)
    made.pin(directory / "slots")
    return made


def _by_id(inner: int) -> Map | None:
    try:
        return Map.by_id(inner)
    except KernelError as error:
        if error.facts["errno"] != errno.ENOENT:
            raise
        return None


def _rows(keys: Sequence[bytes]) -> Rows:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), len(keys[0]) if keys else 0)


def _numbers(numbers: Sequence[int]) -> Rows:
    return np.array(numbers, np.uint32).view(np.uint8).reshape(-1, 4)


def _allow_descriptors(count: int) -> None:
    """Let this process have ``count`` more open files if its hard limit does; else the kernel will say EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = sum(1 for _ in Path("/proc/self/fd").iterdir()) + count
    if wanted > soft:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _unheard(_: int) -> None:
    """Progress after the copy, which nobody asked for."""
