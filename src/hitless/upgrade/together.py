"""Several old maps that are folded into one: they are carried as if they were one map, whose keys begin with a number.

The number says which of the maps an entry is in. So it has its own row in the base, is converted by the rules of its
map, and is compared with what it was before. Two may come to one key: that is what :mod:`hitless.upgrade.fold` is for,
whether they were in one map or in two.

When the upgrade is taken back, each map gets what the new release wrote to the entries that came from it alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hitless.kernel.base import Base, Indices
from hitless.kernel.bpffs import make_directory
from hitless.kernel.maps import F_LOCK, Map, MapInfo, Rows
from hitless.kernel.merger import Merger
from hitless.layout.conversion import Converted, Leaf, Misfit, Records, leaves
from hitless.layout.members import lock_offset
from hitless.layout.rules import MapRules, bind_old
from hitless.upgrade.carrier import Carrier, Passage, Tally
from hitless.upgrade.copy import Carriage, Staying, _turned, rows_for
from hitless.upgrade.translate import Steps, Translation

__all__ = ["Together", "carry_folded"]


class Together:
    """Maps as one: keys are a byte with the map's place, its key, zeros; values end with zeros as well."""

    def __init__(self, parts: Sequence[Map]) -> None:
        infos = [part.info for part in parts]
        self.parts = parts
        self.info = MapInfo(
            id=0,
            type="hash",
            name=" and ".join(info.label for info in infos),
            key_size=1 + max(info.key_size for info in infos),
            value_size=max(info.value_size for info in infos),
            max_entries=sum(info.max_entries for info in infos),
            flags=0,
            btf_id=0,
            key_type_id=0,
            value_type_id=0,
        )

    def lookup(self, key: bytes) -> bytes | None:
        """The value at ``key``, or None."""
        part = self.parts[key[0]]
        value = part.lookup(key[1 : 1 + part.info.key_size])
        return None if value is None else value.ljust(self.info.value_size, b"\0")

    def batches(self) -> Iterator[tuple[Rows, Rows]]:
        """Keys and values of all entries, those of the first map first."""
        for place, part in enumerate(self.parts):
            for keys, values in part.batches():
                numbered = np.concatenate([np.full((len(keys), 1), place, np.uint8), keys], axis=1)
                yield _widened(numbered, self.info.key_size), _widened(values, self.info.value_size)

    def entries(self) -> tuple[Rows, Rows]:
        """All of them at once."""
        nothing = np.zeros((0, self.info.key_size), np.uint8), np.zeros((0, self.info.value_size), np.uint8)
        keys, values = zip(nothing, *self.batches(), strict=True)
        return np.concatenate(keys), np.concatenate(values)

    def most_entries(self) -> int:
        """No fewer than there are now."""
        return sum(part.most_entries() for part in self.parts)


class _Joint(Translation):
    """How entries of :class:`Together` are translated: each by the translation of its map. There is no way back."""

    def __init__(self, parts: Sequence[_Part], rules: MapRules) -> None:
        name = parts[0].translation.name
        super().__init__(name, Steps(None, None), Steps(None, None), rules.on_collision or "error")
        self._parts = parts

    @property
    def by_types(self) -> bool:
        """See :class:`Translation`."""
        return False

    def load(self) -> None:
        """See :class:`Translation`."""
        for part in self._parts:
            part.translation.load()

    def keys_and_misfits(self, old: Records) -> Converted:
        """See :class:`Translation`."""
        made, misfits = [], []
        for part, rows, keys, _ in self._shares(old, old):
            found = part.keys_and_misfits(keys)
            made.append((rows, found.records))
            misfits += _placed(found.misfits, rows)
        return Converted(_joined(made, len(old)), tuple(misfits))

    def values(self, keys: Records, old: Records, onto: Records | None = None) -> Converted:
        """See :class:`Translation`."""
        made, misfits = [], []
        for part, rows, own, values in self._shares(keys, old):
            found = part.values(own, values, None if onto is None else onto[rows])
            made.append((rows, found.records))
            misfits += _placed(found.misfits, rows)
        return Converted(_joined(made, len(old)), tuple(misfits))

    def representable(self, old: Records) -> npt.NDArray[np.bool_]:
        """See :class:`Translation`."""
        return np.ones(len(old), np.bool_)

    def _shares(self, keys: Records, values: Records) -> Iterator[tuple[Translation, Indices, Records, Records]]:
        """For each map its translation, the rows that are of it, and their keys and values as they are there."""
        for place, part in enumerate(self._parts):
            rows = np.flatnonzero(keys[:, 0] == place)
            yield part.translation, rows, *_narrowed(part.source.info, keys[rows], values[rows])

    def shown(self, key: Records) -> str:
        """See :class:`Translation`."""
        part = self._parts[int(key[0])]
        return f"{part.name} {key[1 : 1 + part.source.info.key_size].tobytes().hex()}"


class _Folded(Carriage):
    """The carrier of all ``parts``, which knows a way back for entries that came from one of them alone."""

    parts: tuple[_Part, ...] = ()

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`."""
        if not any(part.translation.goes_back for part in self.parts):
            return Staying(self.name, "there is no way back, as the plan said")
        if fresh:
            make_directory(pin)
        rows = np.flatnonzero(self.base.live[: self.base.used])
        own, places = self.base.keys[rows], self.base.keys[rows, 0]
        keys = self.keys(own)
        _, group, sizes = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        alone = sizes[group.reshape(-1)] == 1
        backs = []
        taken: set[bytes] = set()
        for place, part in enumerate(self.parts):
            if not part.translation.goes_back:
                continue
            mine = alone & (places == place)
            known = {key.tobytes() for key in keys[mine]}
            taken |= known
            old_keys, old_values = _narrowed(part.source.info, own[mine], self.base.values[rows[mine]])
            backs.append(self._turned(place, part, known, (keys[mine], old_keys, old_values), pin / str(place), fresh))
        return _Backs(self.name, self.target, backs, taken, {key.tobytes() for key in keys[~alone]})

    def _turned(
        self, place: int, part: _Part, known: set[bytes], entries: tuple[Rows, Rows, Rows], pin: Path, fresh: bool
    ) -> Carriage:
        """The carrier back to one of the maps; ``entries`` are new keys, which are ``known``, old keys and values."""
        keys, old_keys, old_values = entries
        source, name = _Owned(self.target, known), f"{self.name}_{part.name}"
        if fresh:
            base = Base.create(self.target, f"back_{name}", len(keys) + 1)
            base.append(keys, part.translation.values(old_keys, old_values).records)
            base.settle()
            base.segments.map.pin(pin)
        else:
            base = Base.open(pin, self.target)
        return Carriage(
            name=self.name,
            source=source,
            target=part.source,
            base=base,
            translation=part.translation.reversed(),
            leaves=part.leaves,
            back_leaves=self.leaves,
            lock=part.lock,
            back_lock=self.lock,
            in_kernel=False,
            lossy_allowed=True,
            merger=Merger(name, source, part.source, base, part.leaves, part.lock),
            tally=Tally(),
            writing=self.writing,
            pace=self.pace,
            unchecked=set(),
            going_back=True,
            before=_Before(self.base, place, part.source.info),
        )


class _Part(NamedTuple):
    """One of the old maps; ``leaves`` are the fields of its values, ``lock`` is where the bpf_spin_lock is in them."""

    name: str
    source: Map
    translation: Translation
    leaves: tuple[Leaf, ...]
    lock: int | None


class _Owned(Map):
    """The entries of a map with some keys."""

    def __init__(self, held: Map, keys: set[bytes]) -> None:
        super().__init__(os.dup(held.fd))
        self.lock_flag = held.lock_flag
        self._keys = keys

    def lookup(self, key: bytes) -> bytes | None:
        """As that of the map, None too for an entry with another key."""
        return super().lookup(key) if key in self._keys else None

    def batches(self) -> Iterator[tuple[Rows, Rows]]:
        """As those of the map."""
        for keys, values in super().batches():
            mine = np.array([key.tobytes() in self._keys for key in keys], np.bool_)
            yield keys[mine], values[mine]


class _Before:
    """The entries of the map at ``place`` as the base of all has them, by their own keys."""

    def __init__(self, base: Base, place: int, info: MapInfo) -> None:
        self._base = base
        self._place = place
        self._info = info

    def get(self, key: bytes) -> bytes | None:
        """See :class:`Known`."""
        found = self._base.get((bytes([self._place]) + key).ljust(self._base.keys.shape[1], b"\0"))
        return None if found is None else found[: self._info.value_size]


class _Backs:
    """The carriers back to each of the maps, which bring the entries of ``target`` that are ``taken``.

    What was written to entries that several maps ``share`` stays behind, and so does what came new.
    """

    def __init__(
        self, name: str, target: Map, backs: Sequence[Carrier], taken: Collection[bytes], shared: Collection[bytes]
    ) -> None:
        self.name = name
        self.tally = Tally()
        self._target = target
        self._backs = backs
        self._taken = taken
        self._shared = shared

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`."""

    def verify(self) -> None:
        """See :class:`Carrier`."""

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`."""
        found = sum(back.catch_up(last) for back in self._backs)
        there = {key.tobytes() for keys, _ in self._target.batches() for key in keys}
        left = len(there.difference(self._taken, self._shared)), len(there.intersection(self._shared))
        reasons = [back.tally.left_behind for back in self._backs if back.tally.left_behind]
        if any(left):
            reasons.append(
                f"{left[0]} entries that came new or have no way back, and what it wrote to {left[1]} that several "
                "maps have together: nobody can tell whose that is"
            )
        self.tally.left_behind = "; ".join(reasons) or None
        return found

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`."""
        return self


def carry_folded(passages: Sequence[Passage], rules: MapRules) -> Carriage:
    """The carrier of maps that are folded into one; ``passages``, one for each, share all but what is the old map's.

    ``rules`` are those of the map that they become. Raises KernelError if the verifier refuses its program,
    ConverterError.
    """
    one = passages[0]
    parts = []
    for passage in passages:
        old = bind_old(passage.old, passage.rules)
        assert old.value is not None  # the plan folds no map without layouts
        lock = lock_offset(old.value)
        passage.source.lock_flag = 0 if lock is None else F_LOCK
        translation = Translation.of(old, passage.new, passage.diff, passage.rules, passage.code)
        fields = leaves(old.value, _turned(passage.rules), old.tags)
        parts.append(_Part(old.name, passage.source, translation, fields, lock))
    translation = _Joint(parts, rules)
    if one.fresh:
        translation.load()
    source, new_value = Together([passage.source for passage in passages]), one.new.value
    assert new_value is not None
    lock = lock_offset(new_value)
    one.target.lock_flag = 0 if lock is None else F_LOCK
    if one.fresh:
        base = Base.create(source, f"base_{one.name}", sum(rows_for(passage.source) for passage in passages))
        base.segments.map.pin(one.pin)
    else:
        base = Base.open(one.pin, source)
    fields = leaves(new_value, rules, one.new.tags)
    return _Folded(
        name=one.name,
        source=source,
        target=one.target,
        base=base,
        translation=translation,
        leaves=fields,
        back_leaves=(),
        lock=lock,
        back_lock=None,
        in_kernel=False,
        lossy_allowed=one.lossy_allowed,
        merger=Merger(one.name, source, one.target, base, fields, lock),
        tally=Tally(),
        writing=one.writing,
        pace=one.pace,
        unchecked=set(),
        parts=tuple(parts),
    )


def _narrowed(info: MapInfo, keys: Rows, values: Rows) -> tuple[Rows, Rows]:
    """Keys and values as they are in the map itself."""
    own = np.ascontiguousarray(keys[:, 1 : 1 + info.key_size])
    return own, np.ascontiguousarray(values[:, : info.value_size])


def _widened(rows: Rows, size: int) -> Rows:
    wide = np.zeros((len(rows), size), np.uint8)
    wide[:, : rows.shape[1]] = rows
    return wide


def _placed(misfits: Sequence[Misfit], rows: Indices) -> list[Misfit]:
    """Misfits of some rows as those of all."""
    return [Misfit(one.path, one.count, tuple(int(rows[row]) for row in one.first)) for one in misfits]


def _joined(made: Sequence[tuple[Indices, Records]], count: int) -> Records:
    out = np.zeros((count, made[0][1].shape[1]), np.uint8)
    for rows, records in made:
        out[rows] = records
    return out
