"""Copying entries from a map of one layout to a map of another, and checking the copy."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hitless.errors import ConverterError, KernelError, LossNotAllowedError, VerifyError
from hitless.kernel.base import Base, Indices, marks, padded
from hitless.kernel.copier import Checker, Copier
from hitless.kernel.maps import F_LOCK, Entries, Map, Rows, possible_cpus
from hitless.kernel.merger import Merger, require_all_cpus
from hitless.kernel.per_entry import EACH
from hitless.layout.conversion import Converted, Leaf, Misfit, leaves
from hitless.layout.members import lock_offset
from hitless.layout.model import MapSpec, Type
from hitless.layout.rules import FieldRule, MapRules, bind_old
from hitless.upgrade.carrier import Carrier, Passage, Tally
from hitless.upgrade.pace import Pace
from hitless.upgrade.selected import Selected
from hitless.upgrade.translate import Translation

__all__ = [
    "CHUNK", "Carriage", "Staying", "carry_entries", "carry_in_kernel", "match_rows", "not_written", "rows_for",
]  # fmt: skip

CHUNK = 2048
"""Entries that one system call works through: a few milliseconds in which nothing else runs on this CPU."""
_SLACK = 64  # one row of so many is kept for keys that come and go
_ROUNDS = 8  # of catching up before the cutover
_FEW = 100  # differences that are not worth another round
_SAMPLE = 1000  # entries by which differences are estimated


class Known(Protocol):
    """What an entry was when it was last converted."""

    def get(self, key: bytes) -> bytes | None:
        """Its value, or None."""


class Carriage(msgspec.Struct):
    """One map on its way: from ``source`` over ``base`` into ``target``.

    ``base`` holds each entry as it was when it was last converted. ``leaves`` are the fields of the target's value,
    ``back_leaves`` those of the source's; ``lock`` and ``back_lock`` where the bpf_spin_lock is in each. ``in_kernel``
    tells the method. ``lossy_allowed`` says whether values may be cut to fit. ``going_back``: the target is the old
    release's map, and an entry that it has no room for stays out, as it would have without an upgrade. ``unchecked``
    are keys of the target where the base does not tell what is there. ``shared``: other maps are carried from the same
    source, so that what is written to the target through hitless may not reach that.
    """

    name: str
    source: Entries
    target: Map
    base: Base
    translation: Translation
    leaves: tuple[Leaf, ...]
    back_leaves: tuple[Leaf, ...]
    lock: int | None
    back_lock: int | None
    in_kernel: bool
    lossy_allowed: bool
    merger: Merger
    tally: Tally
    writing: threading.RLock
    pace: Pace
    unchecked: set[bytes]
    going_back: bool = False
    before: Known | None = None
    shared: bool = False

    # As a carrier

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`: a pass over all entries, then rounds over what differs, while they help."""
        from hitless.upgrade.fold import fold_round  # which builds on this module

        if self.in_kernel:
            self._copy_in_kernel(progress)
        elif self.translation.on_collision is not None:
            # Which entries become one only the whole map can tell, so that the first pass is a merge of all.
            with self.writing:
                self.base.settle()
            self.tally.copied = fold_round(self, filling=True)
            progress(self.tally.copied)
        else:
            self._copy_in_batches(progress)
        with self.writing:
            self.base.settle()
        self.tally.entries = self.tally.copied
        before = self.tally.copied
        for _ in range(_ROUNDS):
            self.tally.differing = self._differing()
            progress(self.tally.copied)
            if self.tally.differing <= max(_FEW, self.tally.copied // 100):
                break  # the last merge looks at every entry anyway, and this few add nothing to its time
            found = self.catch_up()
            if found > before // 2:
                break  # what is written as fast as it is merged never ends
            before = found

    def verify(self) -> None:
        """See :class:`Carrier`: whatever the old release did meanwhile, base and target agree before the cutover."""
        from hitless.upgrade.fold import verify_merged  # which builds on this module

        started = time.perf_counter()
        with self.writing:
            if self.translation.on_collision == "merge":
                verify_merged(self)
            elif self.in_kernel:
                self._verify_in_kernel()
            else:
                self._verify_one_by_one()
        self.tally.last_round = time.perf_counter() - started  # a look at every entry, as a round is

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`. Raises ConverterError; on the way back it leaves this map out then."""
        from hitless.upgrade.fold import fold_round
        from hitless.upgrade.merge import merge_round  # which build on this module

        started = time.perf_counter()
        try:
            found = fold_round(self, last) if self.translation.on_collision is not None else merge_round(self, last)
        except ConverterError as error:
            # The old map is complete without what comes back, and nobody could undo the undoing.
            if not self.going_back:
                raise
            self.tally.left_behind = error.message
            return 0
        self.tally.last_round = time.perf_counter() - started
        return found

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`. What the source's layout cannot hold stays behind."""
        if not self.translation.goes_back:
            return Staying(self.name, "there is no way back, as the plan said")
        if not fresh and not pin.exists():
            return Staying(self.name, "its converter had failed")
        try:
            base = self._base_of_way_back(pin) if fresh else Base.open(pin, self.target)
        except ConverterError as error:  # as in catch_up
            return Staying(self.name, error.message)
        name = f"{self.name}_back"
        return Carriage(
            name=self.name,
            source=self.target,
            target=self.old,
            base=base,
            translation=self.translation.reversed(),
            leaves=self.back_leaves,
            back_leaves=self.leaves,
            lock=self.back_lock,
            back_lock=self.lock,
            in_kernel=False,
            lossy_allowed=True,
            merger=Merger(name, self.target, self.old, base, self.back_leaves, self.back_lock),
            tally=Tally(),
            writing=self.writing,
            pace=self.pace,
            unchecked=set(),
            going_back=True,
            before=self.base,
        )

    # What dual writes ask

    @property
    def old(self) -> Map:
        """The source, where that is one map: it is wherever there is a way back."""
        assert isinstance(self.source, Map)
        return self.source

    def refresh(self, key: bytes) -> None:
        """Bring the target's entry up to date with the source's at ``key``, a key of the source."""
        from hitless.upgrade.merge import merge_entry

        merge_entry(self, key)

    # What the rounds ask

    @property
    def can_wait_for_room(self) -> bool:
        """Whether entries that find the target full may be left to a later merge.

        A pass over a map whose entries come and go sees more of them than are there at once. When nobody writes
        it any more, all of them fit a target that is no smaller.
        """
        return self.target.info.max_entries >= self.source.info.max_entries

    def keys(self, rows: Rows) -> Rows:
        """Keys of the source as keys of the target."""
        made = self.translation.keys_and_misfits(rows)
        if self.translation.on_collision is not None:
            self._count_misfits(made.misfits, rows)
        return made.records

    def representable(self, rows: Rows) -> npt.NDArray[np.bool_]:
        """Which of these keys of the source the target can hold too; the others would become a different key."""
        if "array" in self.target.info.type and self.target.info.max_entries < self.source.info.max_entries:
            return np.asarray(rows.view(np.uint32)[:, 0] < self.target.info.max_entries, np.bool_)
        return self.translation.representable(rows)

    def convert(self, keys: Rows, rows: Rows) -> Rows:
        """Values of the source as values of the target; one that does not fit becomes the nearest that does."""
        return _each(self.translation.values, keys, rows, (self.source, self.target)).records

    def untouched(self, keys: Rows, rows: Rows) -> Rows:
        """What the target's values are, if nobody changed them since the base had ``rows`` for ``keys``.

        On the way back ``before`` tells, which holds the target's own values: the base has been through the other
        layout, which may lack some of the fields.
        """
        expected = self.convert(keys, rows)
        if self.before is not None:
            expected = expected.copy()
            for row, key in enumerate(self.keys(keys)):
                known = self.before.get(key.tobytes())
                if known is not None:
                    expected[row] = np.frombuffer(known, np.uint8)
        return expected

    def values(self, keys: Rows, rows: Rows) -> Rows:
        """The same, watched: ``keys`` name the entries in an error.

        Raises LossNotAllowedError if some do not fit and that is not allowed; else they are counted in the tally.
        """
        converted = _each(self.translation.values, keys, rows, (self.source, self.target))
        self._count_misfits(converted.misfits, keys, possible_cpus() if self.source.info.per_cpu else 1)
        return converted.records

    def back(self, keys: Rows, rows: Rows, onto: Rows | None = None) -> Rows:
        """Values of the target as values of the source; ``onto`` is what holds where the target says nothing."""
        return _each(self.translation.back_values, keys, rows, (self.target, self.source), onto).records

    def make_room(self, rows: int) -> None:
        """See to it that the base has room for ``rows`` more. Raises KernelError (ENOMEM)."""
        if self.base.room < rows:
            self.base.grow(rows - self.base.room)

    # The steps

    def _copy_in_kernel(self, progress: Callable[[int], None]) -> None:
        copier = Copier(self.name, self.old, self.target, self.base, *self.translation.conversions)
        more = True
        while more:
            with self.writing:
                self.make_room(EACH)
                try:
                    more = copier.read(CHUNK)
                except OSError as error:
                    raise not_written(self.name, self.target, error.errno, copier.done) from None
            self.tally.copied = copier.done
            progress(copier.done)
            self.pace(CHUNK)
        copier.close()

    def _copy_in_batches(self, progress: Callable[[int], None]) -> None:
        batches = self.source.batches()
        while True:
            with self.writing:
                batch = next(batches, None)
                if batch is None:
                    break
                keys, values = batch
                # A dual write is newer than what was read, also in the base.
                fresh = self.representable(keys) & ~self.base.set_singly(keys)
                keys, values = keys[fresh], values[fresh]
                self.make_room(len(keys))
                new_keys, new_values = self.keys(keys), self.values(keys, values)
                try:
                    self.target.write(new_keys, new_values)
                except KernelError as error:
                    written = int(str(error.facts["written"]))
                    number = int(str(error.facts["errno"]))
                    if not (self.can_wait_for_room and number == errno.E2BIG):
                        raise not_written(self.name, self.target, number, self.tally.copied + written) from None
                    for new_key in new_keys:  # what is not in the base must not be in the target either
                        self.target.delete(new_key.tobytes())
                    continue
                self.base.append(keys, values)
            self.tally.copied += len(keys)
            progress(self.tally.copied)
            self.pace(len(keys))
        if self.source.info.type == "lpm_trie":
            self.base.free_doubles()  # its batches go from key to key, and begin anew where one was deleted

    def _verify_in_kernel(self) -> None:
        checker = Checker(self.name, self.target, self.base, *self.translation.conversions)
        while checker.read(CHUNK):
            pass
        found = checker.found
        checker.close()
        if found.wrong and self.target.info.type != "lru_hash":  # which evicts as it likes
            key = self.base.keys[found.first]
            raise _wrong(self, key, "is not in the new map as converted", found.wrong)

    def _verify_one_by_one(self) -> None:
        for start in range(0, self.base.used, CHUNK):
            live = start + np.flatnonzero(self.base.live[start : min(start + CHUNK, self.base.used)])
            if self.unchecked:
                made = self.keys(self.base.keys[live])
                live = live[[key.tobytes() not in self.unchecked for key in made]]
            keys, values = self.base.keys[live], self.base.values[live]
            new_keys = self.keys(keys)
            found = [self.target.lookup(key.tobytes()) for key in new_keys]
            there = np.array([value is not None for value in found], np.bool_)
            if not there.all() and self.target.info.type not in ("lru_hash", "lru_percpu_hash"):
                missing = np.flatnonzero(~there)
                raise _wrong(self, keys[missing[0]], "is missing in the new map", len(missing))
            if not there.any():
                continue
            rows = np.frombuffer(b"".join(value for value in found if value is not None), np.uint8)
            rows = rows.reshape(int(there.sum()), -1)
            expected = self.convert(keys[there], values[there])
            if self.translation.by_types and self.translation.goes_back:
                # In terms of the source's layout, since a dual write may have filled fields that only the target has.
                expected, rows = (self.back(new_keys[there], side) for side in (expected, rows))
            wrong = np.flatnonzero((expected != rows).any(axis=1))
            if len(wrong):
                raise _wrong(self, keys[there][wrong[0]], "is not in the new map as converted", len(wrong))

    def _differing(self) -> int:
        """About how many entries differ from the base by now, from a sample of them."""
        with self.writing:
            live = np.flatnonzero(self.base.live[: self.base.used])
            sample = live if len(live) <= _SAMPLE else live[np.linspace(0, len(live) - 1, _SAMPLE).astype(np.intp)]
            now = ((row, self.source.lookup(self.base.keys[row].tobytes())) for row in sample)
            changed = sum(1 for row, value in now if value != self.base.values[row].tobytes())
        return changed * len(live) // max(1, len(sample))

    def _base_of_way_back(self, pin: Path) -> Base:
        """A base with what both sides have in common, in the target's layout."""
        live = np.flatnonzero(self.base.live[: self.base.used])
        base = Base.create(self.target, f"back_{self.name}", len(live) + len(live) // _SLACK + _FEW)
        for start in range(0, len(live), CHUNK):
            rows = live[start : start + CHUNK]
            keys = self.base.keys[rows]
            base.append(self.keys(keys), self.convert(keys, self.base.values[rows]))
        base.settle()
        base.segments.map.pin(pin)
        return base

    def _count_misfits(self, misfits: tuple[Misfit, ...], keys: Rows, each: int = 1) -> None:
        for misfit in misfits:
            if not self.lossy_allowed:
                first = ", ".join(self.translation.shown(keys[row // each]) for row in misfit.first[:3])
                raise LossNotAllowedError(
                    f"map {self.name}: {misfit.count} value(s) of {misfit.path} do not fit the new layout "
                    f"(first keys: {first}); allow it with --allow-loss {self.name}, or widen the field",
                    maps=[self.name],
                    field=misfit.path,
                    count=misfit.count,
                )
            self.tally.lost[misfit.path] = self.tally.lost.get(misfit.path, 0) + misfit.count


def not_written(name: str, target: Map, number: int | None, done: int) -> KernelError:
    """The error for an entry of map ``name`` that could not be written to ``target``, after so many that could."""
    why = errno.errorcode.get(number or 0, str(number))
    full = ": the new map is full" if number == errno.E2BIG else ""
    return KernelError(
        f"map {name}: after {done} entries, writing one to the new map failed with {why}{full} (its max_entries is "
        f"{target.info.max_entries}); the running release is untouched",
        call="BPF_MAP_UPDATE_ELEM", errno=number, errno_name=why, object=target.info.name, map=name, done=done,
    )  # fmt: skip


class Staying:
    """The way back of a map that has none: what the new release wrote stays behind, and ``why``; None if it is nothing.
    """

    def __init__(self, name: str, why: str | None) -> None:
        self.name = name
        self.tally = Tally()
        self.tally.left_behind = why

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`."""

    def verify(self) -> None:
        """See :class:`Carrier`."""

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`."""
        return 0

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`."""
        return self


def carry_in_kernel(passage: Passage) -> Carriage:
    """The carrier of entries that are copied in the kernel. Raises KernelError if the verifier refuses its program."""
    return _carry(passage, True)


def carry_entries(passage: Passage) -> Carriage:
    """The carrier of entries that are copied in batches, and of those that the user's functions convert.

    Raises KernelError if the verifier refuses its program, ConverterError.
    """
    return _carry(passage, False)


def _carry(passage: Passage, in_kernel: bool) -> Carriage:
    source, target = passage.source, passage.target
    old = bind_old(passage.old, passage.rules)
    old_value, new_value = _value_of(old), _value_of(passage.new)
    split = bool(passage.heirs)
    translation = Translation.of(old, passage.new, passage.diff, passage.rules, passage.code, split)
    tally = Tally()
    if split and not translation.by_types:
        source = Selected(source, passage.old.name, translation, passage.heirs, passage.lossy_allowed, tally)
    if passage.fresh:
        translation.load()
    back_lock, lock = lock_offset(old_value), lock_offset(new_value)
    source.lock_flag, target.lock_flag = (0 if at is None else F_LOCK for at in (back_lock, lock))
    if source.info.per_cpu:
        require_all_cpus(passage.name)
    if passage.fresh:
        base = Base.create(source, f"base_{passage.name}", rows_for(source))
        base.segments.map.pin(passage.pin)
    else:
        base = Base.open(passage.pin, source)
    fields = leaves(new_value, passage.rules, passage.new.tags)
    back_fields = leaves(old_value, _turned(passage.rules), old.tags)
    return Carriage(
        name=passage.name,
        source=source,
        target=target,
        base=base,
        translation=translation,
        leaves=fields,
        back_leaves=back_fields,
        lock=lock,
        back_lock=back_lock,
        in_kernel=in_kernel,
        lossy_allowed=passage.lossy_allowed,
        merger=Merger(passage.name, source, target, base, fields, lock),
        tally=tally,
        writing=passage.writing,
        pace=passage.pace,
        unchecked=set(),
        shared=split,
    )


def rows_for(source: Map) -> int:
    """How many rows the base of ``source`` should have: a map that is not preallocated may be nearly empty."""
    info = source.info
    rows = min(info.max_entries, source.most_entries())
    return rows if "array" in info.type else rows + rows // _SLACK + _FEW


def _turned(rules: MapRules) -> MapRules:
    """The merge policies of ``rules`` for the fields of the old release: counts are taken back as counts."""
    fields = {rule.was or path: FieldRule(merge=rule.merge) for path, rule in rules.fields.items()}
    return MapRules(fields=fields)


def _value_of(spec: MapSpec) -> Type:
    assert spec.value is not None  # the plan converts no map without layouts
    return spec.value


def _each(
    translate: Callable[[Rows, Rows, Rows | None], Converted], keys: Rows, rows: Rows, sides: tuple[Entries, Entries],
    onto: Rows | None = None,
) -> Converted:  # fmt: skip
    """Values of one side as values of the other; of a per-CPU map, each CPU's value as a record of its own."""
    one, other = (side.info for side in sides)
    if not one.per_cpu:
        return translate(keys, rows, onto)
    cpus = possible_cpus()
    before = rows.reshape(-1, padded(one.value_size))[:, : one.value_size]
    behind = None if onto is None else onto.reshape(-1, padded(other.value_size))[:, : other.value_size]
    converted = translate(np.repeat(keys, cpus, axis=0), before, behind)
    out: Rows = np.zeros((len(rows) * cpus, padded(other.value_size)), np.uint8)
    out[:, : other.value_size] = converted.records
    return Converted(out.reshape(len(rows), -1), converted.misfits)


def match_rows(rows: Rows, others: Rows) -> tuple[Indices, Indices, Indices, Indices]:
    """Where equal records are: indices in ``rows`` and ``others``, then those in ``rows`` only, in ``others`` only.

    No record is twice on one side.
    """
    matches = np.full(len(rows), -1, np.intp)
    if len(rows) and len(others):
        own_marks, other_marks = marks(rows), marks(others)
        order = np.argsort(other_marks)
        candidates = order[np.searchsorted(other_marks, own_marks, sorter=order).clip(max=len(others) - 1)]
        equal = (rows == others[candidates]).all(axis=1)
        matches[equal] = candidates[equal]
        # Different records may share a mark: the few are looked up one by one.
        for index in np.flatnonzero(~equal & (other_marks[candidates] == own_marks)):
            found = np.flatnonzero((others == rows[index]).all(axis=1))
            matches[index] = found[0] if len(found) else -1
    in_both = np.flatnonzero(matches >= 0)
    at_others = matches[in_both]
    alone = np.ones(len(others), bool)
    alone[at_others] = False
    return in_both, at_others, np.flatnonzero(matches < 0), np.flatnonzero(alone)


def _wrong(carriage: Carriage, key: Rows, how: str, count: int) -> VerifyError:
    return VerifyError(
        f"map {carriage.name}: {count} entries are wrong, the first with key {key.tobytes().hex()}, which {how}; "
        "nothing was switched, the running release is untouched",
        map=carriage.name,
        key=key.tobytes().hex(),
        count=count,
    )
