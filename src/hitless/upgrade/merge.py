"""The three-way merge: what the old programs changed since the base was taken goes into the new map.

For a key with base value b, old value o now and new value n: if o is b, nothing; if it differs, each field is
merged by its policy; a key that is in old only since the base is inserted, one that is in old no more is deleted
if the new release has not touched it. Entry by entry the kernel does it atomically
(:mod:`hitless.kernel.codegen`); here the differences are found.
"""

from __future__ import annotations

import numpy as np

from hitless.kernel.codegen import Mode
from hitless.kernel.maps import Rows
from hitless.upgrade.copy import Carriage, match_rows

__all__ = ["forget_deleted", "merge_entry", "merge_round"]


def merge_round(carriage: Carriage, last: bool = False) -> int:
    """Merge all differences found in one pass over source and base; return how many entries differed.

    Exact when nobody writes the source any more, which ``last`` says; before, it only lessens what is left to do, and
    may leave out what finds the target full. Raises KernelError, LossNotAllowedError.
    """
    leave_out = carriage.going_back or (not last and carriage.can_wait_for_room)
    old_keys, old_values = carriage.source.entries()
    placed = carriage.representable(old_keys)
    old_keys, old_values = old_keys[placed], old_values[placed]
    base_keys, base_values = carriage.base.entries()
    in_both, at_base, inserted, deleted = match_rows(old_keys, base_keys)
    differs = (old_values[in_both] != base_values[at_base]).any(axis=1)
    changed, changed_base = in_both[differs], at_base[differs]
    # Deletions first: a map that was full has room only for what follows them.
    _merge(carriage, Mode.DELETED, base_keys[deleted], base_values[deleted], base_values[deleted], leave_out)
    _merge(carriage, Mode.CHANGED, old_keys[changed], base_values[changed_base], old_values[changed], leave_out)
    zeros = np.zeros((len(inserted), old_values.shape[1]), np.uint8)
    _merge(carriage, Mode.INSERTED, old_keys[inserted], zeros, old_values[inserted], leave_out)
    found = len(changed) + len(inserted) + len(deleted)
    carriage.tally.rounds += 1
    carriage.tally.caught_up += found
    return found


def merge_entry(carriage: Carriage, key: bytes) -> None:
    """Merge what differs at one key of the source, so that the target's entry is as new as can be."""
    old, base = carriage.source.lookup(key), carriage.base.lookup(key)
    if old == base:
        return
    mode = Mode.INSERTED if base is None else Mode.DELETED if old is None else Mode.CHANGED
    zeros = bytes(carriage.source.info.value_size)
    rows = [np.frombuffer(data, np.uint8).reshape(1, -1) for data in (key, base or zeros, old or base or zeros)]
    _merge(carriage, mode, rows[0], rows[1], rows[2], carriage.can_wait_for_room)


def forget_deleted(carriage: Carriage) -> None:
    """The part of a round that makes room in the base: entries that the old map has no more."""
    old_keys, _ = carriage.source.entries()
    base_keys, base_values = carriage.base.entries()
    *_, deleted = match_rows(old_keys, base_keys)
    _merge(carriage, Mode.DELETED, base_keys[deleted], base_values[deleted], base_values[deleted], leave_out=True)


def _merge(carriage: Carriage, mode: Mode, keys: Rows, base: Rows, old: Rows, leave_out: bool) -> None:
    if not len(keys):
        return
    values = carriage.values(old, keys)
    # A key that both releases inserted merges against a base of zero, whatever the fields' defaults are.
    converted = np.zeros_like(values) if mode is Mode.INSERTED else carriage.convert(base)
    carriage.merger.merge(mode, keys, carriage.keys(keys), converted, values, old, leave_out)
