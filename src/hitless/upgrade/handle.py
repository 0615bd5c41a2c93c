"""Writing the maps of a node with plain Python values, to both releases while an upgrade runs."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hitless.errors import KernelError, NodeError
from hitless.kernel.base import padded
from hitless.kernel.maps import Map, possible_cpus
from hitless.layout.codec import decode, encode
from hitless.layout.model import MapSpec, Type
from hitless.upgrade.carrier import Carrier
from hitless.upgrade.copy import Carriage
from hitless.upgrade.merge import merge_entry, merge_round
from hitless.upgrade.record import map_pin, read_record

__all__ = ["Access", "MapHandle", "Staged"]


class Staged(msgspec.Struct):
    """The maps of a generation that is being built, and those of them that are carried from the old one."""

    maps: dict[str, Map]
    specs: dict[str, MapSpec]
    carried: dict[str, Carrier]


class Access:
    """Where writes to the maps under ``root`` go: the running generation, and ``staged`` if one is being built.

    ``writing`` is held by every write, and by an upgrade around each step that must not meet one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.writing = threading.RLock()
        self.staged: Staged | None = None


class MapHandle:
    """One map of the running release by name, opened anew at each use, so that it follows upgrades.

    Keys and values are what :mod:`hitless.layout.codec` makes of their types: dicts for structs, ints, bytes,
    str, lists; values of a per-CPU map are lists with one for each possible CPU.
    While an upgrade in this process runs, they are in the layout of the new release, and writes go to
    both maps; an entry that the old release has no place or no room for is in the new one's only. Safe to use from
    several threads.
    """

    def __init__(self, access: Access, name: str) -> None:
        self._access = access
        self._name = name

    @property
    def spec(self) -> MapSpec:
        """Definition and layouts that keys and values have now. Raises NodeError if there is no such map."""
        with self._opened() as (_, spec, _carriage):
            return spec

    def get(self, key: Any) -> Any:
        """The value at ``key``, or None. In an upgrade it includes what the old release's programs just wrote."""
        with self._opened() as (live, spec, carriage):
            raw = encode(_key(spec), key)
            old_key = None if carriage is None else _back_key(carriage, raw)
            if carriage is not None and old_key is not None:
                merge_entry(carriage, old_key)
            found = live.lookup(raw)
            return None if found is None else _decoded(live, spec, found)

    def __setitem__(self, key: Any, value: Any) -> None:
        with self._opened() as (live, spec, carriage):
            _write(live, carriage, encode(_key(spec), key), _encoded(live, spec, value))

    def update_many(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Set many entries; other writes and an upgrade's steps do not come between them."""
        with self._opened() as (live, spec, carriage):
            for key, value in pairs:
                _write(live, carriage, encode(_key(spec), key), _encoded(live, spec, value))

    def __delitem__(self, key: Any) -> None:
        with self._opened() as (live, spec, carriage):
            raw = encode(_key(spec), key)
            there = live.delete(raw)
            old_key = None if carriage is None else _back_key(carriage, raw)
            if carriage is not None and old_key is not None:
                there |= carriage.source.delete(old_key)
                carriage.base.erase(old_key)
            if not there:
                raise KeyError(key)

    def items(self) -> list[tuple[Any, Any]]:
        """All entries as (key, value) pairs. In an upgrade they include what the old release's programs just wrote."""
        with self._opened() as (live, spec, carriage):
            if carriage is not None:
                merge_round(carriage)
            keys, values = live.entries()
            key = _key(spec)
            return [
                (decode(key, k.tobytes()), _decoded(live, spec, v.tobytes())) for k, v in zip(keys, values, strict=True)
            ]

    @contextmanager
    def _opened(self) -> Iterator[tuple[Map, MapSpec, Carriage | None]]:
        access = self._access
        with access.writing:
            staged = access.staged
            if staged is not None:
                if self._name not in staged.maps:
                    raise self._absent(staged.maps)
                carrier = staged.carried.get(self._name)
                if carrier is not None and not isinstance(carrier, Carriage):
                    raise NodeError(
                        f"map {self._name} is a {staged.specs[self._name].type}, which cannot be used by its entries "
                        "while an upgrade carries it; try again when that is done",
                        map=self._name,
                    )
                yield staged.maps[self._name], staged.specs[self._name], carrier
                return
            path = map_pin(access.root / "current", self._name)
            if not path.exists():
                known = (access.root / "maps").iterdir() if (access.root / "maps").exists() else ()
                raise self._absent(path.name for path in known)
            with Map.open(path) as live:
                spec = live.spec(self._name)
                if spec.key is None or spec.value is None:
                    spec = read_record(access.root / "current" / "record").maps[self._name]
                yield live, spec, None

    def _absent(self, known: Iterable[str]) -> NodeError:
        names = ", ".join(sorted(known)) or "none"
        return NodeError(f"{self._access.root} has no map {self._name}; its maps: {names}", map=self._name)


def _key(spec: MapSpec) -> Type:
    if spec.key is None:
        raise NodeError(f"map {spec.name} carries no key type, so its keys cannot be written by name", map=spec.name)
    return spec.key


def _value(spec: MapSpec) -> Type:
    if spec.value is None:
        raise NodeError(f"map {spec.name} carries no value type, so it cannot be written by name", map=spec.name)
    return spec.value


def _encoded(live: Map, spec: MapSpec, value: Any) -> bytes:
    if not live.info.per_cpu:
        return encode(_value(spec), value)
    if not isinstance(value, list) or len(value) != possible_cpus():
        raise NodeError(
            f"map {spec.name} holds a value for each CPU: give a list of {possible_cpus()}, one for each possible CPU",
            map=spec.name,
        )
    return b"".join(encode(_value(spec), one).ljust(padded(spec.value_size), b"\0") for one in value)


def _decoded(live: Map, spec: MapSpec, raw: bytes) -> Any:
    if not live.info.per_cpu:
        return decode(_value(spec), raw)
    step = padded(spec.value_size)
    return [decode(_value(spec), raw[at : at + spec.value_size]) for at in range(0, len(raw), step)]


def _write(live: Map, carriage: Carriage | None, key: bytes, value: bytes) -> None:
    live.update(key, value)
    if carriage is None:
        return
    old_key = _back_key(carriage, key)
    if old_key is None:
        return
    # Fields that only the old release has keep what they hold.
    held = carriage.source.lookup(old_key) if carriage.back_value is not None else None
    onto = np.frombuffer(held, np.uint8).reshape(1, -1) if held is not None else None
    old_value = carriage.back(np.frombuffer(value, np.uint8).reshape(1, -1), onto).tobytes()
    carriage.make_room(1)
    try:
        carriage.source.update(old_key, old_value)
    except KernelError as error:
        if error.facts["errno"] != errno.E2BIG:
            raise
        return  # only the new release has room for it: that is what the map was made larger for
    # The base moves along, so that the merge sees no difference and leaves what was written in the new map alone.
    carriage.base.put(old_key, old_value)


def _back_key(carriage: Carriage, key: bytes) -> bytes | None:
    """The key in the old layout, None if it has no place there: it would become that of another entry."""
    if carriage.back_key is None:
        return key
    old_key = carriage.back_key.apply(np.frombuffer(key, np.uint8).reshape(1, -1)).records
    return old_key.tobytes() if carriage.keys(old_key).tobytes() == key else None


