"""The three-way merge: what the old programs changed since the base was taken goes into the new map.

For a key with base value b, old value o now and new value n: if o is b, nothing; if it differs, each field is
merged by its policy; a key that is in old only since the base is inserted, one that is in old no more is deleted
if the new release has not touched it. Entry by entry the kernel does it atomically
(:mod:`hitless.kernel.merger`); here the differences are found.

The rows of the base are in the order in which a pass over the old map met them, so the next pass meets most keys in the
same order, and comparing costs little more than reading. What is out of place is matched at the end of the pass.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import numpy.typing as npt

from hitless.kernel.base import Base, Indices
from hitless.kernel.maps import Rows, possible_cpus
from hitless.kernel.merger import Mode
from hitless.upgrade.copy import Carriage, match_rows

__all__ = ["merge_entry", "merge_round", "merge_value"]

_SLACK = 512  # rows beyond a chunk in which its keys are looked for


def merge_round(carriage: Carriage, last: bool = False) -> int:
    """Merge all differences found in one pass over source and base; return how many entries differed.

    Exact when nobody writes the source any more, which ``last`` says; before, it only lessens what is left to do, and
    may leave out what finds the target full. Raises KernelError, LossNotAllowedError.
    """
    leave_out = carriage.going_back or (not last and carriage.can_wait_for_room)
    seen = np.zeros(carriage.base.used, np.bool_)
    strays: list[tuple[Rows, Rows]] = []
    batches = carriage.source.batches()
    position = found = 0
    # A trie cannot be asked whether it has just this key, so nothing may be written while its keys are compared.
    whole_pass = last or carriage.source.info.type == "lpm_trie"
    with carriage.writing if whole_pass else nullcontext():
        while True:
            with carriage.writing:
                batch = next(batches, None)
                if batch is None:
                    break
                placed = carriage.representable(batch[0])
                keys, values = (batch[0], batch[1]) if placed.all() else (batch[0][placed], batch[1][placed])
                rows, position = _aligned(carriage.base, keys, position, len(seen))
                known = np.flatnonzero(rows >= 0)
                if len(known) == len(keys):
                    differs = _differ(values, carriage.base.values, rows)
                else:
                    strays.append((keys[rows < 0], values[rows < 0]))
                    differs = _differ(values[known], carriage.base.values, rows[known])
                seen[rows[known]] = True
                changed = known[differs]
                _changed(carriage, keys[changed], rows[changed], values[changed], leave_out)
                found += len(changed)
            if not last:
                carriage.pace(len(batch[0]))
        with carriage.writing:
            found += _strays(carriage, strays, seen, leave_out)
    carriage.tally.rounds += 1
    carriage.tally.caught_up += found
    return found


def merge_entry(carriage: Carriage, key: bytes) -> None:
    """Merge what differs at one key of the source, so that the target's entry is as new as can be."""
    merge_value(carriage, key, carriage.source.lookup(key))


def merge_value(carriage: Carriage, key: bytes, old: bytes | None) -> None:
    """Merge ``old``, which the source had at ``key`` a moment ago; None if it had nothing there."""
    row = carriage.base.find(key)
    keys = np.frombuffer(key, np.uint8).reshape(1, -1)
    if row is None and old is None:
        return
    if old is None:
        _deleted(carriage, keys, np.array([row], np.intp))
        return
    value = np.frombuffer(old, np.uint8).reshape(1, -1)
    if row is None:
        _inserted(carriage, keys, value, carriage.can_wait_for_room)
    elif (carriage.base.values[row] != value).any():
        _changed(carriage, keys, np.array([row], np.intp), value, carriage.can_wait_for_room)


def _aligned(base: Base, keys: Rows, position: int, used: int) -> tuple[Indices, int]:
    """The row of each key, -1 if it is not near ``position``; and where the next keys are expected."""
    count = len(keys)
    end = position + count
    if end <= used and base.live[position:end].all() and _same(keys, base.keys[position:end]):
        return np.arange(position, end), end
    near = position + np.flatnonzero(base.live[position : min(end + _SLACK, used)])
    rows = np.full(count, -1, np.intp)
    in_both, at_near, _, _ = match_rows(keys, base.keys[near])
    rows[in_both] = near[at_near]
    return rows, int(rows.max()) + 1 if len(in_both) else position


def _same(keys: Rows, others: Rows) -> bool:
    size = keys.shape[1]
    if size % 8 == 0:
        return bool((keys.view(np.uint64) == others.view(np.uint64)).all())
    return bool((keys == others).all())


def _differ(values: Rows, base: Rows, rows: Indices) -> npt.NDArray[np.bool_]:
    """Which of these values are not those of the base's ``rows``."""
    straight = len(rows) > 1 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    others = base[rows[0] : rows[-1] + 1] if straight else base[rows]
    if values.shape[1] % 8 == 0 and len(rows):
        return np.asarray((values.view(np.uint64) != others.view(np.uint64)).any(axis=1), np.bool_)
    return np.asarray((values != others).any(axis=1), np.bool_)


def _strays(
    carriage: Carriage, strays: list[tuple[Rows, Rows]], seen: npt.NDArray[np.bool_], leave_out: bool
) -> int:
    """What the pass found out of place: keys without a row there, and rows without a key."""
    base, source = carriage.base, carriage.source
    live = base.live[: base.used] != 0
    live[: len(seen)] &= ~seen
    rows = np.flatnonzero(live)
    keys: Rows = np.concatenate([part for part, _ in strays] or [base.keys[:0]])
    values: Rows = np.concatenate([part for _, part in strays] or [base.values[:0]])
    if source.info.type != "lpm_trie":
        # Time has passed since they were read, and a scan of a hash in motion is not sure of what it does not find.
        keys = np.concatenate([keys, base.keys[rows]])
        keys, values = _now(carriage, keys)
    in_both, at_rows, inserted, deleted = match_rows(keys, base.keys[rows])
    differs = _differ(values[in_both], base.values, rows[at_rows])
    changed, changed_rows = in_both[differs], rows[at_rows[differs]]
    # Deletions first: a map that was full has room only for what follows them.
    _deleted(carriage, base.keys[rows[deleted]], rows[deleted])
    _changed(carriage, keys[changed], changed_rows, values[changed], leave_out)
    _inserted(carriage, keys[inserted], values[inserted], leave_out)
    return len(changed) + len(inserted) + len(deleted)


def _now(carriage: Carriage, keys: Rows) -> tuple[Rows, Rows]:
    """Those of ``keys`` that the source has at this moment, each once, with their values."""
    found = {key.tobytes(): None for key in keys}
    present = [(key, value) for key in found if (value := carriage.source.lookup(key)) is not None]
    info = carriage.source.info
    now_keys = np.frombuffer(b"".join(key for key, _ in present), np.uint8).reshape(len(present), info.key_size)
    now_values = np.frombuffer(b"".join(value for _, value in present), np.uint8)
    return now_keys, now_values.reshape(len(present), info.entry_size)


def _changed(carriage: Carriage, keys: Rows, rows: Indices, old: Rows, leave_out: bool) -> None:
    if not len(keys):
        return
    base = carriage.base.values[rows]
    if carriage.target.info.type == "lpm_trie":
        there = _exactly_there(carriage, keys)
        for key, value in zip(keys[~there], old[~there], strict=True):
            carriage.base.put(key.tobytes(), value.tobytes())  # the new release deleted it, and that stands
        keys, rows, old, base = keys[there], rows[there], old[there], base[there]
    _merge(carriage, Mode.CHANGED, rows, keys, base, old, leave_out)


def _inserted(carriage: Carriage, keys: Rows, old: Rows, leave_out: bool) -> None:
    if not len(keys):
        return
    carriage.make_room(len(keys))
    rows = np.array([carriage.base.take(key.tobytes()) for key in keys], np.intp)
    for left in _merge(carriage, Mode.INSERTED, rows, keys, np.zeros_like(old), old, leave_out):
        carriage.base.free(int(rows[left]), keys[left].tobytes())


def _deleted(carriage: Carriage, keys: Rows, rows: Indices) -> None:
    if not len(keys):
        return
    base = carriage.base.values[rows]
    if carriage.target.info.per_cpu:  # its program sees one CPU's value: whether all are untouched is seen here
        expected = carriage.untouched(keys, base)
        for key, new_key, row, value in zip(keys, carriage.keys(keys), rows, expected, strict=True):
            if carriage.target.lookup(new_key.tobytes()) == value.tobytes():
                carriage.target.delete(new_key.tobytes())
            carriage.base.free(int(row), key.tobytes())
        return
    _merge(carriage, Mode.DELETED, rows, keys, base, base, True)
    for key, row in zip(keys, rows, strict=True):
        carriage.base.free(int(row), key.tobytes())


def _merge(
    carriage: Carriage, mode: Mode, rows: Indices, keys: Rows, base: Rows, old: Rows, leave_out: bool
) -> Indices:
    if mode is Mode.DELETED:
        values = converted = carriage.untouched(keys, base)
    else:
        values = carriage.values(keys, old)
        # A key that both releases inserted merges against a base of zero, whatever the fields' defaults are.
        converted = np.zeros_like(values) if mode is Mode.INSERTED else carriage.convert(keys, base)
    new_keys = carriage.keys(keys)
    if not carriage.target.info.per_cpu:
        return carriage.merger.merge(mode, rows, keys, new_keys, converted, values, old, leave_out)
    left = np.zeros(len(keys), np.bool_)
    cpus = possible_cpus()
    olds, bases, news, goals = (part.reshape(len(keys), cpus, -1) for part in (old, base, converted, values))
    for cpu in range(cpus):
        # An inserted entry is made on the first CPU, whatever it holds there.
        todo = (olds[:, cpu] != bases[:, cpu]).any(axis=1) | (mode is Mode.INSERTED and cpu == 0)
        at = np.flatnonzero(todo & ~left)
        new_size, old_size = carriage.target.info.value_size, carriage.source.info.value_size
        out = carriage.merger.merge(
            mode, rows[at], keys[at], new_keys[at], news[at, cpu, :new_size], goals[at, cpu, :new_size],
            olds[at, cpu, :old_size], leave_out, cpu,
        )  # fmt: skip
        left[at[out]] = True
    return np.flatnonzero(left)


def _exactly_there(carriage: Carriage, keys: Rows) -> npt.NDArray[np.bool_]:
    """Which of these keys of the source a trie has now, and not only a shorter prefix."""
    there = {key.tobytes() for part, _ in carriage.target.batches() for key in part}
    return np.array([key.tobytes() in there for key in carriage.keys(keys)], np.bool_)
