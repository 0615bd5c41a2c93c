"""Writing the maps of a node with plain Python values, to both releases while an upgrade runs."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hitless.errors import KernelError, LayoutError, NodeError
from hitless.kernel.base import padded
from hitless.kernel.bpffs import require_private
from hitless.kernel.libbpf import ENOTSUPP
from hitless.kernel.maps import Map, Rows, possible_cpus
from hitless.kernel.rings import RingMemory
from hitless.layout.codec import Codec
from hitless.layout.model import MapSpec
from hitless.upgrade.carrier import Carrier
from hitless.upgrade.copy import Carriage
from hitless.upgrade.merge import merge_value
from hitless.upgrade.mirror import Mirror
from hitless.upgrade.record import map_pin, read_record
from hitless.upgrade.writers import WriterLock

__all__ = ["Access", "MapHandle", "RingReader", "Staged"]


class Staged(msgspec.Struct, eq=False):
    """The maps of a generation that is being built, and those of them that are carried from the old one.

    ``switching``: hooks may run it, so that what a kill leaves is merged and not undone.
    """

    maps: dict[str, Map]
    specs: dict[str, MapSpec]
    carried: dict[str, Carrier]
    switching: bool = False


class _Opened:
    """A map that is held open, with what its keys and values mean, for as long as ``token`` is what is there."""

    def __init__(self, token: object, held: Map, spec: MapSpec, carrier: Carriage | Mirror | None = None) -> None:
        self.token = token
        self.map = held
        self.spec = spec
        self.carrier = carrier

    @cached_property
    def key(self) -> Codec:
        spec = self.spec
        if spec.key is None:
            text = f"map {spec.name} carries no key type, so its keys cannot be written by name"
            raise NodeError(text, map=spec.name)
        return Codec(spec.key, spec.order)

    def encode(self, value: Any) -> bytes:
        """A value, as the kernel wants it: of a per-CPU map, one for each possible CPU."""
        if not self.map.info.per_cpu:
            return self._value.encode(value)
        if not isinstance(value, list) or len(value) != possible_cpus():
            raise NodeError(
                f"map {self.spec.name} holds a value for each CPU: give a list of {possible_cpus()}, one for each "
                "possible CPU",
                map=self.spec.name,
            )
        return b"".join(self._value.encode(one).ljust(padded(self.spec.value_size), b"\0") for one in value)

    def decode(self, raw: bytes) -> Any:
        """The reverse."""
        if not self.map.info.per_cpu:
            return self._value.decode(raw)
        size = self.spec.value_size
        return [self._value.decode(raw[at : at + size]) for at in range(0, len(raw), padded(size))]

    @cached_property
    def _value(self) -> Codec:
        spec = self.spec
        if spec.value is None:
            text = f"map {spec.name} carries no value type, so it cannot be written by name"
            raise NodeError(text, map=spec.name)
        return Codec(spec.value, spec.order)


class Access:
    """Where writes to the maps under ``root`` go: the running generation, and ``staged`` if one is being built here.

    ``writing`` keeps the threads of this process apart: it is held by every use, and by an upgrade around each step
    that must not meet one. ``lock`` does the same between processes: a writer in a process that does not upgrade
    holds it shared, and :meth:`alone` keeps everybody out.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.writing = threading.RLock()
        self.lock = WriterLock(root / "writers")
        self._staged: Staged | None = None
        self._opened: dict[str, _Opened] = {}

    @property
    def staged(self) -> Staged | None:
        """The generation that this process is building; set and reset by the upgrade."""
        return self._staged

    @staged.setter
    def staged(self, staged: Staged | None) -> None:
        self._staged = staged
        self._opened.clear()  # which would hold the maps of a generation that is over

    @contextmanager
    def alone(self, seconds: float) -> Iterator[None]:
        """Keep every writer out, of this and other processes, after waiting up to ``seconds`` for those inside.

        Raises BusyError naming a process that writes without an end.
        """
        with self.writing, self.lock.alone(seconds):
            yield

    @contextmanager
    def to_read(self, name: str) -> Iterator[_Opened]:
        """The map ``name`` as it is now, with no thread of this process writing. Raises NodeError if it is absent."""
        with self.writing:
            yield self._current(name) or self._open(name)

    @contextmanager
    def to_write(self, name: str) -> Iterator[_Opened]:
        """The map ``name``, which stays the current one until the block ends. Raises NodeError if it is absent."""
        with self.writing:
            if self._staged is not None:
                yield self._current(name) or self._open(name)
                return
            opened = self._opened.get(name) or self._open(name)
            while True:
                with self.lock:
                    if self._current(name) is opened:
                        yield opened
                        return
                opened = self._open(name)

    def _current(self, name: str) -> _Opened | None:
        """What is open already, if that is still the map which is there."""
        opened = self._opened.get(name)
        if opened is None:
            return None
        token = self._staged if self._staged is not None else self._pin(name)
        return opened if opened.token == token else None

    def _pin(self, name: str) -> tuple[int, int] | None:
        """What tells one pin from the next under its path: each generation has pins of its own, also of kept maps."""
        try:
            # A Path costs as much as the rest of a write.
            path = f"{self.root}/maps/{name}" if "." not in name else map_pin(self.root / "current", name)
            seen = os.stat(path)  # noqa: PTH116
        except FileNotFoundError:
            return None
        except PermissionError:
            if "." in name:  # which a bpffs refuses, so there is no such pin
                return None
            raise
        return seen.st_dev, seen.st_ino

    def _open(self, name: str) -> _Opened:
        opened = self.open_live(name) if self._staged is None else self._open_staged(self._staged, name)
        self._opened[name] = opened
        return opened

    def _open_staged(self, staged: Staged, name: str) -> _Opened:
        if name not in staged.maps:
            raise self._absent(name, staged.maps)
        carrier, spec = staged.carried.get(name), staged.specs[name]
        if carrier is not None and not isinstance(carrier, Carriage | Mirror):
            raise NodeError(
                f"map {name} is a {spec.type}, which cannot be used by its entries while an upgrade carries it; "
                "try again when that is done",
                map=name,
            )
        return _Opened(staged, staged.maps[name], spec, carrier)

    def is_live(self, name: str, token: object) -> bool:
        """Whether the map that was opened with ``token`` is still the running generation's."""
        return self._pin(name) == token

    def open_live(self, name: str) -> _Opened:
        """The map of the running generation, whatever is being built. Raises NodeError if it is absent."""
        while True:
            token = self._pin(name)
            if token is None:
                self._opened.pop(name, None)
                known = (self.root / "maps").iterdir() if (self.root / "maps").exists() else ()
                raise self._absent(name, [path.name for path in known])
            try:
                require_private(self.root)
                live = Map.open(map_pin(self.root / "current", name))
                spec = live.spec(name)
                if spec.key is None or spec.value is None:
                    spec = read_record(self.root / "current" / "record").maps[name]
            except (KernelError, KeyError, FileNotFoundError):
                if self._pin(name) == token:
                    raise
                continue  # an upgrade or unload came between
            if self._pin(name) == token:
                self.lock.renew()  # the root may have been unloaded and made again
                return _Opened(token, live, spec)

    def _absent(self, name: str, known: Iterable[str]) -> NodeError:
        names = ", ".join(sorted(known)) or "none"
        return NodeError(f"{self.root} has no map {name}; its maps: {names}", map=name)


class MapHandle:
    """One map of the running release by name; it follows upgrades, by whichever process.

    Keys and values are what :mod:`hitless.layout.codec` makes of their types: dicts for structs, ints, bytes,
    str, lists; values of a per-CPU map are lists with one for each possible CPU.

    While an upgrade in this process runs, they are in the layout of the new release, and writes go to both maps; an
    entry that the old release has no place or no room for is in the new one's only. While another process upgrades,
    they are in the old release's layout until the commit, and the upgrade brings over what is written; at the commit
    a write waits, for the last merge and the exchange. Safe to use from several threads.
    """

    def __init__(self, access: Access, name: str) -> None:
        self._access = access
        self._name = name

    @property
    def spec(self) -> MapSpec:
        """Definition and layouts that keys and values have now. Raises NodeError if there is no such map."""
        with self._access.to_read(self._name) as opened:
            return opened.spec

    def get(self, key: Any) -> Any:
        """The value at ``key``, or None. In an upgrade it includes what the old release's programs just wrote."""
        with self._access.to_read(self._name) as opened:
            raw, carrier = opened.key.encode(key), opened.carrier
            if isinstance(carrier, Mirror):
                carrier.refresh(raw)
            elif carrier is not None:
                _refresh(carrier, raw)
            found = opened.map.lookup(raw)
            return None if found is None else opened.decode(found)

    def count(self) -> int:
        """How many entries there are, by reading them; nothing is decoded. In an upgrade it may be a few less."""
        with self._access.to_read(self._name) as opened:
            return sum(len(keys) for keys, _ in opened.map.batches())

    def items(self) -> list[tuple[Any, Any]]:
        """All entries as (key, value) pairs. In an upgrade they include what the old release's programs just wrote."""
        with self._access.to_read(self._name) as opened:
            if opened.carrier is not None:
                opened.carrier.catch_up()
            keys, values = opened.map.entries()
            key = opened.key.decode
            return [(key(k.tobytes()), opened.decode(v.tobytes())) for k, v in zip(keys, values, strict=True)]

    def rows(self) -> tuple[Rows, Rows]:
        """All entries as the kernel's bytes, keys and values in rows of two arrays; otherwise as :meth:`items`.

        A hundred times as fast, for who knows the layout: see :attr:`spec`.
        """
        with self._access.to_read(self._name) as opened:
            if opened.carrier is not None:
                opened.carrier.catch_up()
            return opened.map.entries()

    def __setitem__(self, key: Any, value: Any) -> None:
        with self._access.to_write(self._name) as opened:
            _write(opened, opened.key.encode(key), opened.encode(value))

    def __delitem__(self, key: Any) -> None:
        with self._access.to_write(self._name) as opened:
            if not _delete(opened, opened.key.encode(key)):
                raise KeyError(key)

    def update_many(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Set many entries, in this order; other writes through handles and an upgrade's steps come before or after.

        An upgrade waits as long with its commit, so give what may take seconds in parts. Raises LayoutError for an
        entry that does not fit the types, before anything is written; KernelError when one is refused: then
        ``facts["done"]`` says how many of the first are in, and ``facts["key"]`` in hex which one is not: none of the
        rest is, but during an upgrade this one may be in the new release's map.
        """
        given = list(pairs)
        for opened in self._while_current():
            keys = _rows([opened.key.encode(key) for key, _ in given], opened.map.info.key_size)
            values = _rows([opened.encode(value) for _, value in given], opened.map.info.entry_size)
            with self._access.to_write(self._name) as now:
                if now is opened:
                    _write_many(now, keys, values)
                    return

    def update_rows(self, keys: Rows, values: Rows) -> None:
        """Set many entries, given as :meth:`rows` gives them; otherwise as :meth:`update_many`."""
        with self._access.to_write(self._name) as opened:
            _check_rows(opened, keys, opened.map.info.key_size)
            _check_rows(opened, values, opened.map.info.entry_size)
            _write_many(opened, keys, values)

    def delete_rows(self, keys: Rows) -> int:
        """Delete many entries, given as :meth:`rows` gives them; otherwise as :meth:`delete_many`."""
        with self._access.to_write(self._name) as opened:
            _check_rows(opened, keys, opened.map.info.key_size)
            return _delete_many(opened, keys)

    def delete_many(self, keys: Iterable[Any]) -> int:
        """Delete many entries, and return how many of them were there; otherwise as :meth:`update_many`."""
        given = list(keys)
        for opened in self._while_current():
            rows = _rows(map(opened.key.encode, given), opened.map.info.key_size)
            with self._access.to_write(self._name) as now:
                if now is opened:
                    return _delete_many(now, rows)
        raise AssertionError  # the loop has no end of its own

    def _while_current(self) -> Iterator[_Opened]:
        """The map as it is now, again and again: for encoding outside the lock, until no upgrade comes between."""
        while True:
            with self._access.to_read(self._name) as opened:
                pass
            yield opened


class RingReader:
    """Takes the records of one ring buffer of the running release; it follows upgrades, by whichever process.

    A ring buffer has one reader: what it takes, no other one gets.
    """

    def __init__(self, access: Access, name: str) -> None:
        self._access = access
        self._name = name
        self._opened: _Opened | None = None
        self._memory: RingMemory | None = None

    def take(self) -> list[bytes]:
        """The records that are complete and not taken yet, in their order; those of an older release's ring first.

        Raises NodeError if there is no such map.
        """
        found = self._memory.take() if self._memory is not None else []
        if self._opened is None or not self._access.is_live(self._name, self._opened.token):
            # The programs that wrote there are gone: what came until now was the last.
            found += self._memory.take() if self._memory is not None else []
            self._opened = self._access.open_live(self._name)
            self._memory = RingMemory(self._opened.map)
            found += self._memory.take()
        return found


def _check_rows(opened: _Opened, rows: Rows, size: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != size or rows.dtype != np.uint8:
        shape, name = "x".join(map(str, rows.shape)), opened.spec.name
        raise LayoutError(f"map {name}: rows of {size} bytes are wanted, not {shape} of {rows.dtype}", map=name)


def _rows(records: Iterable[bytes], size: int) -> Rows:
    return np.frombuffer(b"".join(records), np.uint8).reshape(-1, size)


def _write_many(opened: _Opened, keys: Rows, values: Rows) -> None:
    if opened.carrier is None:
        try:
            opened.map.write(keys, values)
            return
        except KernelError as error:
            if error.facts["errno"] != ENOTSUPP:
                raise _partly(error, opened, keys, int(str(error.facts["written"]))) from None
    for written, (key, value) in enumerate(zip(keys, values, strict=True)):
        try:
            _write(opened, key.tobytes(), value.tobytes())
        except KernelError as error:
            raise _partly(error, opened, keys, written) from None


def _delete_many(opened: _Opened, keys: Rows) -> int:
    if opened.carrier is None:
        try:
            return opened.map.remove(keys)
        except KernelError as error:
            if error.facts["errno"] != ENOTSUPP:
                raise _partly(error, opened, keys, int(str(error.facts["done"]))) from None
    there = 0
    for done, key in enumerate(keys):
        try:
            there += _delete(opened, key.tobytes())
        except KernelError as error:
            raise _partly(error, opened, keys, done) from None
    return there


def _partly(error: KernelError, opened: _Opened, keys: Rows, done: int) -> KernelError:
    key, name = keys[done].tobytes().hex(), opened.spec.name
    return KernelError(
        f"map {name}: {done} of {len(keys)} entries are done, then key {key} was refused, and the rest not tried: "
        f"{error.message}",
        **{**error.facts, "done": done, "map": name, "key": key},
    )


def _write(opened: _Opened, key: bytes, value: bytes) -> None:
    match opened.carrier:
        case None:
            opened.map.update(key, value)
        case Mirror() as mirror:
            mirror.write(key, value)
        case carriage:
            _write_both(opened, carriage, key, value)


def _delete(opened: _Opened, key: bytes) -> bool:
    match opened.carrier:
        case None:
            return opened.map.delete(key)
        case Mirror() as mirror:
            return mirror.delete(key)
        case carriage:
            return _delete_both(opened, carriage, key)


def _refresh(carriage: Carriage, key: bytes) -> None:
    old_key = _back_key(carriage, key)
    if old_key is not None:
        carriage.refresh(old_key)
    elif not carriage.translation.finds_old:
        carriage.catch_up()  # nobody can tell which entry of the old map it is


def _write_both(opened: _Opened, carriage: Carriage, key: bytes, value: bytes) -> None:
    live = opened.map
    old_key = _back_key(carriage, key)
    if old_key is None:
        live.update(key, value)
        carriage.unchecked.add(key)
        return
    held = carriage.source.lookup(old_key)
    carriage.make_room(1)
    if carriage.shared or not carriage.translation.goes_back:
        live.update(key, value)
        carriage.unchecked.add(key)
        if held is not None:
            # The old map keeps what it has: only what changes there from now on is merged into what was written.
            carriage.base.put(old_key, held)
        return
    # Fields that only the old release has keep what they hold.
    old_value = carriage.back(_row(key), _row(value), _row(held) if held is not None else None).tobytes()
    if not carriage.translation.by_types:
        carriage.unchecked.add(key)
    before = carriage.base.get(old_key)
    try:
        carriage.old.update(old_key, old_value)
    except KernelError as error:
        if error.facts["errno"] != errno.E2BIG:
            raise
        live.update(key, value)  # only the new release has room for it: that is what the map was made larger for
        return
    try:
        # The base moves along, so that the merge sees no difference and leaves what is written to the new map alone.
        if not _is_merged(opened, carriage, old_key, old_value):
            carriage.base.put(old_key, old_value)
        live.update(key, value)
    except KernelError:
        _unwrite(carriage, old_key, held, before)
        raise


def _is_merged(opened: _Opened, carriage: Carriage, old_key: bytes, written: bytes | None) -> bool:
    """Bring what was written to the old map over to the new one by a merge, which moves the base in the same run.

    After the cutover a kill can come between any two steps of a write to both maps, and what it leaves is merged: with
    the base a step before or behind the new map, a counter's difference would come twice, or a deletion never. Not
    before it, when a kill undoes the upgrade; nor in a trie, where a merge lists all of it.
    """
    switching = isinstance(opened.token, Staged) and opened.token.switching
    if not switching or carriage.target.info.type == "lpm_trie":
        return False
    merge_value(carriage, old_key, written)
    return True


def _unwrite(carriage: Carriage, old_key: bytes, held: bytes | None, before: bytes | None) -> None:
    """Put back what the new map refused, as if it had never been written."""
    if held is None:
        carriage.old.delete(old_key)
    else:
        carriage.old.update(old_key, held)
    if before is None:
        carriage.base.erase(old_key)
    else:
        carriage.base.put(old_key, before)


def _delete_both(opened: _Opened, carriage: Carriage, key: bytes) -> bool:
    live = opened.map
    old_key = _back_key(carriage, key)
    if old_key is None:
        carriage.unchecked.add(key)
        return live.delete(key)
    if carriage.shared:  # the other maps keep theirs, and so the old one
        held = carriage.source.lookup(old_key)
        if held is not None:
            carriage.make_room(1)
            carriage.base.put(old_key, held)
        carriage.unchecked.add(key)
        return live.delete(key)
    there = carriage.old.delete(old_key)
    if not _is_merged(opened, carriage, old_key, None):
        carriage.base.erase(old_key)
    return live.delete(key) or there


def _back_key(carriage: Carriage, key: bytes) -> bytes | None:
    """The key in the old layout, None if it has no place there: it would become that of another entry."""
    if not carriage.translation.finds_old:
        return None
    old_key = carriage.translation.reversed_key(_row(key))
    return None if old_key is None else old_key.tobytes()


def _row(data: bytes) -> Rows:
    return np.frombuffer(data, np.uint8).reshape(1, -1)
