"""Several old maps that are folded into one: they are carried as if they were one map, whose keys begin with a number.

The number says which of the maps an entry is in. So it has its own row in the base, is converted by the rules of its
map, and is compared with what it was before. Two may come to one key: that is what :mod:`hitless.upgrade.fold` is for,
whether they were in one map or in two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hitless.kernel.base import Base, Indices
from hitless.kernel.maps import F_LOCK, Map, MapInfo, Rows
from hitless.kernel.merger import Merger
from hitless.layout.conversion import Converted, Misfit, Records, leaves
from hitless.layout.members import lock_offset
from hitless.layout.rules import MapRules, bind_old
from hitless.upgrade.carrier import Passage, Tally
from hitless.upgrade.copy import Carriage, rows_for
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

    def __init__(self, parts: Sequence[Translation], sides: Sequence[MapInfo], names: Sequence[str], rules: MapRules):
        super().__init__(parts[0].name, Steps(None, None), Steps(None, None), rules.on_collision or "error")
        self._parts = parts
        self._sides = sides
        self._names = names

    @property
    def by_types(self) -> bool:
        """See :class:`Translation`."""
        return False

    def load(self) -> None:
        """See :class:`Translation`."""
        for part in self._parts:
            part.load()

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
        for place, (part, side) in enumerate(zip(self._parts, self._sides, strict=True)):
            rows = np.flatnonzero(keys[:, 0] == place)
            own = np.ascontiguousarray(keys[rows, 1 : 1 + side.key_size])
            yield part, rows, own, np.ascontiguousarray(values[rows, : side.value_size])

    def shown(self, key: Records) -> str:
        """See :class:`Translation`."""
        place = int(key[0])
        return f"{self._names[place]} {key[1 : 1 + self._sides[place].key_size].tobytes().hex()}"


def carry_folded(passages: Sequence[Passage], rules: MapRules) -> Carriage:
    """The carrier of maps that are folded into one; ``passages``, one for each, share all but what is the old map's.

    ``rules`` are those of the map that they become. Raises KernelError if the verifier refuses its program,
    ConverterError.
    """
    one = passages[0]
    parts = []
    for passage in passages:
        old = bind_old(passage.old, passage.rules)
        assert old.value is not None and passage.new.value is not None  # the plan folds no map without layouts
        passage.source.lock_flag = 0 if lock_offset(old.value) is None else F_LOCK
        parts.append(Translation.of(old, passage.new, passage.diff, passage.rules, passage.code))
    infos = [passage.source.info for passage in passages]
    translation = _Joint(parts, infos, [passage.old.name for passage in passages], rules)
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
    return Carriage(
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
    )


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
