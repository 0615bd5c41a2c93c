"""Copying entries from a map of one layout to a map of another, and checking the copy."""

from __future__ import annotations

import errno
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hitless.errors import KernelError, LossNotAllowedError, VerifyError
from hitless.kernel.codegen import Merger
from hitless.kernel.maps import Map, Rows, create_like
from hitless.layout.conversion import Conversion, Converted, Leaf, leaves
from hitless.layout.model import MapSpec, Type
from hitless.layout.rules import FieldRule, MapRules
from hitless.upgrade.carrier import Carrier, Passage, Tally

__all__ = [
    "Carriage",
    "carry_entries",
    "copy_entries",
    "fill_way_back",
    "match_rows",
    "verify_copy",
    "way_back",
]

Indices = npt.NDArray[np.intp]

# Keys may come from the network: nobody outside can make many of them share a mark.
_SEED = np.uint64(secrets.randbits(64))


class Carriage(msgspec.Struct):
    """One map on its way: from ``source`` over ``base`` into ``target``.

    ``base`` is shaped like ``source`` and holds each value as it was when it was last converted. ``key`` or
    ``value`` is None where the bytes stay as they are. ``back_value`` is the conversion from target to source.
    ``leaves`` are the fields of the target's value, ``back_leaves`` those of the source's. ``lossy_allowed`` says
    whether values may be cut to fit. ``written`` are the source's keys that this process has written since the copy
    began. ``going_back``: the target is the old release's map, and an entry that it has no room for stays out, as it
    would have without an upgrade.
    """

    name: str
    source: Map
    target: Map
    base: Map
    key: Conversion | None
    value: Conversion | None
    back_key: Conversion | None
    back_value: Conversion | None
    leaves: tuple[Leaf, ...]
    back_leaves: tuple[Leaf, ...]
    lossy_allowed: bool
    merger: Merger
    tally: Tally
    written: set[bytes]
    writing: threading.RLock
    going_back: bool = False

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`; a second pass follows at once, since the first takes long."""
        copy_entries(self, self.writing, progress)
        self.tally.entries = self.tally.copied
        self.catch_up()

    def verify(self) -> None:
        """See :class:`Carrier`."""
        verify_copy(self, self.writing)

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`."""
        from hitless.upgrade.merge import merge_round  # which builds on this module

        with self.writing:
            return merge_round(self, last)

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`."""
        base = fill_way_back(self) if fresh else Map.open(pin)
        if fresh:
            base.pin(pin)
        return way_back(self, base)

    @property
    def can_wait_for_room(self) -> bool:
        """Whether entries that find the target full may be left to a later merge.

        A pass over a map whose entries come and go sees more of them than are there at once. When nobody writes
        it any more, all of them fit a target that is no smaller.
        """
        return self.target.info.max_entries >= self.source.info.max_entries

    def keys(self, rows: Rows) -> Rows:
        """Keys of the source as keys of the target."""
        return self.key.apply(rows).records if self.key else rows

    def representable(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of these keys of the source the target can hold too; the others would become a different key."""
        if self.key is None or self.back_key is None:
            return np.ones(len(rows), np.bool_)
        there_and_back = self.back_key.apply(self.key.apply(rows).records).records
        return np.asarray((there_and_back == rows).all(axis=1), np.bool_)

    def convert(self, rows: Rows) -> Rows:
        """Values of the source as values of the target; one that does not fit becomes the nearest that does."""
        return self.value.apply(rows).records if self.value else rows

    def values(self, rows: Rows, keys: Rows) -> Rows:
        """The same, watched: ``keys`` name the entries in an error.

        Raises LossNotAllowedError if some do not fit and that is not allowed; else they are counted in the tally.
        """
        if self.value is None:
            return rows
        converted = self.value.apply(rows)
        self._count_misfits(converted, keys)
        return converted.records

    def _count_misfits(self, converted: Converted, keys: Rows) -> None:
        for misfit in converted.misfits:
            if not self.lossy_allowed:
                first = ", ".join(keys[row].tobytes().hex() for row in misfit.first[:3])
                raise LossNotAllowedError(
                    f"map {self.name}: {misfit.count} value(s) of {misfit.path} do not fit the new layout "
                    f"(first keys: {first}); allow it with --allow-loss {self.name}, or widen the field",
                    maps=[self.name],
                    field=misfit.path,
                    count=misfit.count,
                )
            self.tally.lost[misfit.path] = self.tally.lost.get(misfit.path, 0) + misfit.count


def carry_entries(passage: Passage) -> Carriage:
    """The carrier of entries, its merge program loaded. Raises KernelError if the verifier refuses that."""
    source, target, diff = passage.source, passage.target, passage.diff
    if passage.fresh:
        base = create_like(source, f"base_{passage.name}")
        base.pin(passage.pin)
    else:
        base = Map.open(passage.pin)
    fields = leaves(_value_of(passage.new), passage.rules, passage.new.tags)
    back_fields = leaves(_value_of(passage.old), _turned(passage.rules), passage.old.tags)
    return Carriage(
        name=passage.name,
        source=source,
        target=target,
        base=base,
        key=diff.key,
        value=diff.value,
        back_key=diff.key.inverse() if diff.key else None,
        back_value=diff.value.inverse() if diff.value else None,
        leaves=fields,
        back_leaves=back_fields,
        lossy_allowed=passage.lossy_allowed,
        merger=Merger(passage.name, source, target, base, fields),
        tally=Tally(),
        written=set(),
        writing=passage.writing,
    )


def _turned(rules: MapRules) -> MapRules:
    """The merge policies of ``rules`` for the fields of the old release: counts are taken back as counts."""
    fields = {rule.was or path: FieldRule(merge=rule.merge) for path, rule in rules.fields.items()}
    return MapRules(fields=fields)


def _value_of(spec: MapSpec) -> Type:
    assert spec.value is not None  # the plan converts no map without layouts
    return spec.value


def fill_way_back(carriage: Carriage) -> Map:
    """A new base for :func:`way_back`: what both sides have in common, in the target's layout."""
    base = create_like(carriage.target, f"back_{carriage.name}")
    keys, values = carriage.base.entries()
    base.write(carriage.keys(keys), carriage.convert(values))
    return base


def way_back(carriage: Carriage, base: Map) -> Carriage:
    """The same map with the sides changed, for what the target gained since ``base``.

    What the source's layout cannot hold stays behind with the release that is taken back.
    """
    return Carriage(
        name=carriage.name,
        source=carriage.target,
        target=carriage.source,
        base=base,
        key=carriage.back_key,
        value=carriage.back_value,
        back_key=carriage.key,
        back_value=carriage.value,
        leaves=carriage.back_leaves,
        back_leaves=carriage.leaves,
        lossy_allowed=True,
        merger=Merger(f"{carriage.name}_back", carriage.target, carriage.source, base, carriage.back_leaves),
        tally=Tally(),
        written=set(),
        writing=carriage.writing,
        going_back=True,
    )


def copy_entries(carriage: Carriage, writing: threading.RLock, progress: Callable[[int], None]) -> None:
    """Convert every entry into the target and its base; ``progress`` gets the number done so far.

    ``writing`` is held for one batch at a time, so that a dual write is never overwritten by what was read
    before it. Raises KernelError (the target is full), LossNotAllowedError.
    """
    batches = carriage.source.batches()
    while True:
        with writing:
            batch = next(batches, None)
            if batch is None:
                break
            keys, values = batch
            if carriage.written:  # a dual write is newer than what was read, in both maps and in the base
                fresh = [row for row, key in enumerate(keys) if key.tobytes() not in carriage.written]
                keys, values = keys[fresh], values[fresh]
            new_keys, new_values = carriage.keys(keys), carriage.values(values, keys)
            try:
                carriage.target.write(new_keys, new_values)
                carriage.base.write(keys, values)
            except KernelError as error:
                if carriage.can_wait_for_room and error.facts["errno"] == errno.E2BIG:
                    _leave_to_merge(carriage, keys, new_keys)
                    continue
                raise KernelError(
                    f"map {carriage.name}: after {carriage.tally.copied + int(str(error.facts['written']))} entries: "
                    f"{error.message} (the new map's max_entries is {carriage.target.info.max_entries})",
                    **error.facts,
                    map=carriage.name,
                ) from None
        carriage.tally.copied += len(keys)
        progress(carriage.tally.copied)


def _leave_to_merge(carriage: Carriage, keys: Rows, new_keys: Rows) -> None:
    # What is in the target must be in the base too, or the merge would count it a second time.
    for key, new_key in zip(keys, new_keys, strict=True):
        carriage.target.delete(new_key.tobytes())
        carriage.base.delete(key.tobytes())


def verify_copy(carriage: Carriage, writing: threading.RLock) -> None:
    """Every entry that nobody touched since its base was taken is in the target as the conversion says.

    Compared in terms of the source's layout, since a dual write may have filled fields that only the target has.
    Raises VerifyError naming the first key.
    """
    with writing:
        target_keys, target_values = carriage.target.entries()
        base_keys, base_values = carriage.base.entries()
        source_keys, source_values = carriage.source.entries()
    in_both, at_base, _, _ = match_rows(source_keys, base_keys)
    # What was touched meanwhile is brought up to date by the merge; the rest must be there as converted.
    untouched = at_base[(source_values[in_both] == base_values[at_base]).all(axis=1)]
    keys = carriage.keys(base_keys[untouched])
    expected = carriage.convert(base_values[untouched])
    there, at_target, missing, _ = match_rows(keys, target_keys)
    if len(missing) and carriage.target.info.type != "lru_hash":  # which evicts as it likes
        raise _wrong(carriage, base_keys[untouched[missing[0]]], "is missing in the new map", len(missing))
    found = target_values[at_target]
    if carriage.back_value is not None:
        expected, found = carriage.back_value.apply(expected).records, carriage.back_value.apply(found).records
    wrong = np.flatnonzero((expected[there] != found).any(axis=1))
    if len(wrong):
        key = base_keys[untouched[there[wrong[0]]]]
        raise _wrong(carriage, key, "is not in the new map as converted", len(wrong))


def match_rows(rows: Rows, others: Rows) -> tuple[Indices, Indices, Indices, Indices]:
    """Where equal records are: indices in ``rows`` and ``others``, then those in ``rows`` only, in ``others`` only.

    No record is twice on one side.
    """
    matches = np.full(len(rows), -1, np.intp)
    if len(rows) and len(others):
        marks, other_marks = _marks(rows), _marks(others)
        order = np.argsort(other_marks)
        candidates = order[np.searchsorted(other_marks, marks, sorter=order).clip(max=len(others) - 1)]
        equal = (rows == others[candidates]).all(axis=1)
        matches[equal] = candidates[equal]
        # Different records may share a mark: the few are looked up one by one.
        for index in np.flatnonzero(~equal & (other_marks[candidates] == marks)):
            found = np.flatnonzero((others == rows[index]).all(axis=1))
            matches[index] = found[0] if len(found) else -1
    in_both = np.flatnonzero(matches >= 0)
    at_others = matches[in_both]
    alone = np.ones(len(others), bool)
    alone[at_others] = False
    return in_both, at_others, np.flatnonzero(matches < 0), np.flatnonzero(alone)


def _marks(rows: Rows) -> npt.NDArray[np.uint64]:
    """A number for each record that is the same for equal ones and seldom for others."""
    words = np.zeros((len(rows), (rows.shape[1] + 7) // 8 * 8), np.uint8)
    words[:, : rows.shape[1]] = rows
    marks = np.full(len(rows), _SEED, np.uint64)
    for word in words.view(np.uint64).T:
        marks = (marks ^ word) * np.uint64(0x9E3779B97F4A7C15)
        marks ^= marks >> np.uint64(29)
    return marks


def _wrong(carriage: Carriage, key: Rows, how: str, count: int) -> VerifyError:
    return VerifyError(
        f"map {carriage.name}: {count} entries are wrong, the first with key {key.tobytes().hex()}, which {how}; "
        "nothing was switched, the running release is untouched",
        map=carriage.name,
        key=key.tobytes().hex(),
        count=count,
    )
