"""The carrier of maps whose entries refer to devices or processors and programs: devmap, devmap_hash, cpumap.

User space reads the id of an entry's program and writes a descriptor of it, and no program may write such a map. So
entries are few and change seldom: single calls, and a base of what was carried, to tell who changed an entry since.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hitless.errors import LossNotAllowedError, VerifyError
from hitless.kernel.maps import Map, create
from hitless.kernel.programs import Program
from hitless.upgrade.carrier import Carrier, Passage, Tally

__all__ = ["carry_references"]

_MAP_TYPE_HASH = 1


class _Entry(NamedTuple):
    """A device's index or a processor's queue size, and the kernel's id of the program, 0 if there is none."""

    number: int
    program: int = 0


class _References:
    """One such map on its way: see :class:`Carrier`. ``base`` holds each entry as it was last carried."""

    def __init__(self, name: str, source: Map, target: Map, base: Map, writing: threading.RLock) -> None:
        self.name = name
        self.tally = Tally()
        self._source = source
        self._target = target
        self._base = base
        self._writing = writing

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`."""
        entries = _entries(self._source)
        self._refuse_misfits(entries)
        self.tally.entries = len(entries)
        self.catch_up()
        self.tally.copied, self.tally.caught_up, self.tally.rounds = self.tally.caught_up, 0, 0
        progress(self.tally.copied)

    def verify(self) -> None:
        """See :class:`Carrier`."""
        with self._writing:
            there, carried = _entries(self._target), _entries(self._base)
            for key, entry in _entries(self._source).items():
                if entry == carried.get(key) and key not in there:
                    raise VerifyError(
                        f"map {self.name}: the entry with key {key.hex()} is missing in the new map; nothing was "
                        "switched, the running release is untouched",
                        map=self.name,
                        key=key.hex(),
                    )

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`; an entry that both releases changed stays as the new one has it."""
        with self._writing:
            now, before, there = _entries(self._source), _entries(self._base), _entries(self._target)
            changed = [key for key in now.keys() | before.keys() if now.get(key) != before.get(key)]
            for key in changed:
                old, base = now.get(key), before.get(key)
                if there.get(key) == (self._fitted(base) if base else None):
                    _set(self._target, key, self._fitted(old) if old else None)
                if old is None:
                    self._base.delete(key)
                else:
                    self._base.update(key, struct.pack("=II", *old))
        self.tally.rounds += 1
        self.tally.caught_up += len(changed)
        return len(changed)

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`; the base is what both sides have in common, in either direction."""
        return _References(self.name, self._target, self._source, self._base, self._writing)

    def _fitted(self, entry: _Entry) -> _Entry:
        return entry if self._target.info.value_size == 8 else _Entry(entry.number)

    def _refuse_misfits(self, entries: dict[bytes, _Entry]) -> None:
        room = self._target.info.max_entries
        if self._target.info.type == "devmap_hash":
            why = f"holds {len(entries)} entries and would have room for {room}" if len(entries) > room else ""
        else:
            last = max((struct.unpack("=I", key)[0] for key in entries), default=0)
            why = f"has an entry at {last} and would have {room} places" if last >= room else ""
        if why:
            raise LossNotAllowedError(
                f"map {self.name} {why}; nothing was changed; take entries out first, or make it larger",
                maps=[self.name],
                room=room,
            )


def carry_references(passage: Passage) -> Carrier:
    """The carrier of entries that refer to devices or processors. Raises KernelError."""
    if passage.fresh:
        room = passage.source.info.max_entries + passage.target.info.max_entries
        base = create(_MAP_TYPE_HASH, f"base_{passage.name}", 4, 8, room)
        base.pin(passage.pin)
    else:
        base = Map.open(passage.pin)
    return _References(passage.name, passage.source, passage.target, base, passage.writing)


def _entries(held: Map) -> dict[bytes, _Entry]:
    """What is there; an array of them has places without anything."""
    found = {}
    for key in held.all_keys():
        value = held.lookup(key)
        if value is not None:
            entry = _Entry(*struct.unpack_from(f"={len(value) // 4}I", value))
            if entry.number:
                found[key] = entry
    return found


def _set(target: Map, key: bytes, entry: _Entry | None) -> None:
    if entry is None:
        target.delete(key)
        return
    if not entry.program:
        target.update(key, struct.pack("=II", entry.number, 0)[: target.info.value_size])
        return
    with Program.by_id(entry.program) as program:
        target.update(key, struct.pack("=Ii", entry.number, program.fd))
