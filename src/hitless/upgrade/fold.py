"""Keys of which several become one: which entry of the old map makes the new one, and what later changes of each do.

Only the whole map tells which keys meet, so that every pass reads all of it, and the first copy is such a pass, too.
The base holds the entries that have a share in the new map. So it also tells, in another process after a kill, which
of several was kept: under ``first`` and ``last`` the others are not in it, and what becomes of them touches
nothing. Under ``merge`` all are in it: each goes in as if the new release had inserted the key before, against a base
of zero, and later changes of each are brought in by the fields' policies.

When an entry with a share is deleted while others of its key live on, the new entry stays. Under ``first`` and ``last``
another takes its place, as if the entry had changed to that. Under ``merge`` its share is taken out of the sums; what
it gave to other fields cannot be told from what the others gave, and stays. When the last of its key is deleted the new
entry goes too, if it holds just what that one gave; else only the sums go down.
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import numpy.typing as npt

from hitless.errors import KernelError, LossNotAllowedError, VerifyError
from hitless.kernel.base import Indices
from hitless.kernel.maps import Rows
from hitless.kernel.merger import Mode
from hitless.layout.conversion import Leaf
from hitless.upgrade.copy import CHUNK, Carriage, match_rows

__all__ = ["fold_round", "verify_merged"]

_NAMED = 3  # keys that an error names


def fold_round(carriage: Carriage, last: bool = False, filling: bool = False) -> int:
    """One pass over source and base, as :func:`~hitless.upgrade.merge.merge_round`; returns how many entries differed.

    ``filling``: it is the first copy, and no hook runs the new release. Raises LossNotAllowedError if two keys meet and
    the rule is ``error``; then this pass has changed nothing.
    """
    with carriage.writing:
        return _fold(carriage, not last and carriage.can_wait_for_room, filling)


def _fold(carriage: Carriage, leave_out: bool, filling: bool) -> int:
    policy, base = carriage.translation.on_collision, carriage.base
    keys, values = _once(*carriage.source.entries())
    rows = np.flatnonzero(base.live[: base.used])
    in_both, at_rows, inserted, deleted = match_rows(keys, base.keys[rows])
    kept, gone = rows[at_rows], rows[deleted]
    groups = _groups(np.concatenate([carriage.keys(keys), carriage.keys(base.keys[gone])]))
    of_keys, of_gone = groups[: len(keys)], groups[len(keys) :]
    if policy == "error":
        _refuse_meeting(carriage, keys, of_keys)
    differs = (values[in_both] != base.values[kept]).any(axis=1)
    changed, changed_rows = in_both[differs], kept[differs]
    if policy in ("first", "last"):
        inserted = _without_company(inserted if policy == "first" else inserted[::-1], of_keys, of_keys[in_both])
    found = len(changed) + len(gone) + len(inserted)
    if filling:
        inserted = _write_alone(carriage, keys, values, inserted, of_keys)

    lives_on = np.isin(of_gone, of_keys)
    forgotten = gone[~lives_on]
    if policy == "merge":
        forgotten = _alone(carriage, forgotten, of_gone[~lives_on])
    old = base.values[forgotten]
    _merge(carriage, Mode.DELETED, forgotten, base.keys[forgotten], old, old, True)
    left, of_left = gone[lives_on], of_gone[lives_on]
    if policy == "merge":
        _take_out(carriage, left)
    else:
        inserted, left = _replace(carriage, left, of_left, (keys, values, of_keys), inserted)
    for row in (*gone[~lives_on], *left):
        base.free(int(row), base.keys[row].tobytes())
    _merge(carriage, Mode.CHANGED, changed_rows, keys[changed], base.values[changed_rows], values[changed], leave_out)
    if len(inserted):
        carriage.make_room(len(inserted))
        places = np.array([base.take(key.tobytes()) for key in keys[inserted]], np.intp)
        new = values[inserted]
        out = _merge(carriage, Mode.INSERTED, places, keys[inserted], np.zeros_like(new), new, leave_out)
        for index in out:
            base.free(int(places[index]), keys[inserted[index]].tobytes())
    carriage.tally.rounds += 1
    carriage.tally.caught_up += found
    return found


def verify_merged(carriage: Carriage) -> None:
    """Every entry is in the target and holds what all that became it make together, as the base has them.

    Raises VerifyError naming the first key.
    """
    base = carriage.base
    rows = np.flatnonzero(base.live[: base.used])
    keys = carriage.keys(base.keys[rows])
    if carriage.unchecked:
        checked = [key.tobytes() not in carriage.unchecked for key in keys]
        rows, keys = rows[checked], keys[checked]
    if not len(rows):
        return
    groups = _groups(keys)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) > 0])
    new_keys = keys[order][starts]
    found = [carriage.target.lookup(key.tobytes()) for key in new_keys]
    there = np.flatnonzero([value is not None for value in found])
    if len(there) < len(found) and carriage.target.info.type != "lru_hash":  # which evicts as it likes
        raise _wrong(carriage, new_keys[found.index(None)], "is missing in the new map")
    values = np.frombuffer(b"".join(value for value in found if value is not None), np.uint8)
    values = values.reshape(len(there), carriage.target.info.value_size)
    shares = carriage.convert(base.keys[rows], base.values[rows])[order]
    for leaf in carriage.leaves:
        right = _holds(leaf, shares, starts, there, values)
        if not right.all():
            key = new_keys[there[np.flatnonzero(~right)[0]]]
            raise _wrong(carriage, key, f"is not what its entries make together in {leaf.path}")


def _once(keys: Rows, values: Rows) -> tuple[Rows, Rows]:
    """A scan of a map in motion can repeat a key: what it read last counts."""
    last = {int(group): row for row, group in enumerate(_groups(keys))}
    if len(last) == len(keys):
        return keys, values
    rows = sorted(last.values())
    return keys[rows], values[rows]


def _groups(keys: Rows) -> Indices:
    """A number for each key, the same for equal ones."""
    if not len(keys):
        return np.zeros(0, np.intp)
    whole = np.ascontiguousarray(keys).view(f"V{keys.shape[1]}").ravel()
    return np.unique(whole, return_inverse=True)[1].reshape(-1)


def _refuse_meeting(carriage: Carriage, keys: Rows, groups: Indices) -> None:
    order = np.argsort(groups, kind="stable")
    meets = np.flatnonzero(np.diff(groups[order]) == 0)
    if not len(meets):
        return
    shown = carriage.translation.shown
    pairs = [(shown(keys[order[at]]), shown(keys[order[at + 1]])) for at in meets[:_NAMED]]
    first = ", ".join(f"{one} and {other}" for one, other in pairs)
    raise LossNotAllowedError(
        f"map {carriage.name}: {len(meets)} old key(s) become a key that another has already (first: {first}); the "
        'running release was left as it was; say what is to become of them: on_collision = "first", "last" or "merge"',
        maps=[carriage.name],
        count=len(meets),
        keys=[key for pair in pairs for key in pair],
    )


def _without_company(rows: Indices, groups: Indices, taken: Indices) -> Indices:
    """The first of ``rows`` of each group, where no entry of the group has the place already."""
    free = rows[~np.isin(groups[rows], taken)]
    return free[np.sort(np.unique(groups[free], return_index=True)[1])]


def _write_alone(carriage: Carriage, keys: Rows, values: Rows, inserted: Indices, groups: Indices) -> Indices:
    """Write those that share their key with none in batches, for the first copy; returns the rest.

    A kill before the cutover undoes the upgrade, so that entry and base need not come in one run.
    """
    single = np.bincount(groups)[groups[inserted]] == 1
    alone, rest = inserted[single], [inserted[~single]]
    for start in range(0, len(alone), CHUNK):
        rows = alone[start : start + CHUNK]
        new_keys, new_values = carriage.keys(keys[rows]), carriage.values(keys[rows], values[rows])
        # What a dual write has set already is merged.
        free = np.array([key.tobytes() not in carriage.unchecked for key in new_keys], np.bool_)
        carriage.make_room(len(rows))
        try:
            carriage.target.write(new_keys[free], new_values[free])
        except KernelError as error:
            if error.facts["errno"] != errno.E2BIG:
                raise
            for key in new_keys[free]:  # what is not in the base must not be in the target either
                carriage.target.delete(key.tobytes())
            free[:] = False
        carriage.base.append(keys[rows[free]], values[rows[free]])
        rest.append(rows[~free])
    return np.concatenate(rest)


def _replace(
    carriage: Carriage, left: Indices, groups: Indices, there: tuple[Rows, Rows, Indices], inserted: Indices
) -> tuple[Indices, Indices]:
    """Put entries that are read for the first time in the place of those that are gone.

    Each takes over the row of the base in the run that merges it. Returns the entries, and the rows, that are left.
    """
    keys, values, of_keys = there
    at = {int(of_keys[row]): int(row) for row in inserted}
    pairs = [(int(row), at.pop(int(group))) for row, group in zip(left, groups, strict=True) if int(group) in at]
    if not pairs:
        return inserted, left
    places, heirs = (np.array(side, np.intp) for side in zip(*pairs, strict=True))
    before = carriage.convert(carriage.base.keys[places], carriage.base.values[places])
    now = carriage.values(keys[heirs], values[heirs])
    new_keys = carriage.keys(keys[heirs])
    carriage.unchecked.update(key.tobytes() for key in new_keys)
    carriage.merger.merge(Mode.CHANGED, places, keys[heirs], new_keys, before, now, values[heirs])
    return np.setdiff1d(inserted, heirs), np.setdiff1d(left, places)


def _alone(carriage: Carriage, rows: Indices, groups: Indices) -> Indices:
    """Of entries that are gone with all others of their keys, those that the new ones are all made of by now.

    The shares of all others are taken out first, so that what the first of a key gave is left.
    """
    _, firsts = np.unique(groups, return_index=True)
    _take_out(carriage, np.delete(rows, firsts))
    first = rows[firsts]
    keys, values = carriage.base.keys[first], carriage.base.values[first]
    there = [carriage.target.lookup(key.tobytes()) for key in carriage.keys(keys)]
    shares = carriage.convert(keys, values)
    whole = np.array([_is_share(carriage, *pair) for pair in zip(there, shares, strict=True)], np.bool_)
    _take_out(carriage, first[~whole])
    return first[whole]


def _is_share(carriage: Carriage, found: bytes | None, share: Rows) -> bool:
    return found is not None and all(
        found[leaf.offset : leaf.offset + leaf.size] == share[leaf.offset : leaf.offset + leaf.size].tobytes()
        for leaf in carriage.leaves
    )


def _take_out(carriage: Carriage, rows: Indices) -> None:
    """Take the share of entries that are gone out of the sums.

    Each leaves zeros in the base, where a process that goes on after a kill sees that it is done.
    """
    rows = rows[carriage.base.values[rows].any(axis=1)]
    if not len(rows):
        return
    keys, values = carriage.base.keys[rows], carriage.base.values[rows]
    shares = carriage.convert(keys, values)
    rest = shares.copy()
    for leaf in carriage.leaves:
        if leaf.merge == "sum":
            rest[:, leaf.offset : leaf.offset + leaf.size] = 0
    new_keys = carriage.keys(keys)
    carriage.unchecked.update(key.tobytes() for key in new_keys)
    carriage.merger.merge(Mode.CHANGED, rows, keys, new_keys, shares, rest, np.zeros_like(values))


def _merge(
    carriage: Carriage, mode: Mode, rows: Indices, keys: Rows, base: Rows, old: Rows, leave_out: bool
) -> Indices:
    if not len(keys):
        return np.zeros(0, np.intp)
    values = carriage.values(keys, old) if mode is not Mode.DELETED else carriage.convert(keys, old)
    converted = np.zeros_like(values) if mode is Mode.INSERTED else carriage.convert(keys, base)
    return carriage.merger.merge(mode, rows, keys, carriage.keys(keys), converted, values, old, leave_out)


def _holds(leaf: Leaf, shares: Rows, starts: Indices, groups: Indices, found: Rows) -> npt.NDArray[np.bool_]:
    """Whether the field of each target entry is what the shares of its group make of it.

    What only grows, or only falls, may be farther on: it keeps what a share had for a while.
    """
    place = slice(leaf.offset, leaf.offset + leaf.size)
    if leaf.merge == "keep":
        sizes = np.diff(np.r_[starts, len(shares)])
        expected = np.zeros((len(starts), leaf.size), np.uint8)
        expected[groups] = found[:, place]
        same = (shares[:, place] == np.repeat(expected, sizes, axis=0)).all(axis=1)
        return np.asarray(np.logical_or.reduceat(same, starts)[groups], np.bool_)
    kind = f"{'i' if leaf.signed else 'u'}{leaf.size}"
    numbers, there = (np.ascontiguousarray(rows[:, place]).view(kind).ravel() for rows in (shares, found))
    fold, farther = _FOLDS[leaf.merge]
    expected = fold.reduceat(numbers, starts, dtype=numbers.dtype)[groups]
    return np.asarray(farther(there, expected), np.bool_)


def _has_bits(number: Any, bits: Any) -> Any:
    return number & bits == bits


_FOLDS: dict[str, tuple[Any, Any]] = {
    "sum": (np.add, np.equal),
    "max": (np.maximum, np.greater_equal),
    "min": (np.minimum, np.less_equal),
    "or": (np.bitwise_or, _has_bits),
}


def _wrong(carriage: Carriage, key: Rows, how: str) -> VerifyError:
    return VerifyError(
        f"map {carriage.name}: the entry with new key {key.tobytes().hex()} {how}; nothing was switched, the running "
        "release is untouched",
        map=carriage.name,
        key=key.tobytes().hex(),
    )
