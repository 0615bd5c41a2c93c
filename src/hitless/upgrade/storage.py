"""Carrying local storage: its owners (sockets, tasks, cgroups) live on, and get storage of the new release.

The kernel tells which owners' values differ from their base, user space converts them, and the kernel merges them
(:mod:`hitless.kernel.storage`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from hitless.errors import KernelError, LossNotAllowedError, VerifyError
from hitless.kernel.maps import Map, Rows
from hitless.kernel.merger import Mode
from hitless.kernel.storage import Settler, Teller, Told, create_base
from hitless.layout.conversion import Conversion, Leaf, leaves
from hitless.layout.model import MapSpec
from hitless.layout.rules import MapRules
from hitless.upgrade.carrier import Carrier, Passage, Tally
from hitless.upgrade.copy import _turned

__all__ = ["Storage", "carry_storage"]

_TRIES = 100  # at owners that are busy or have no room


class _Way(msgspec.Struct, frozen=True):
    """One direction: values of ``source`` become values of ``target``; None where the bytes stay as they are."""

    source: Map
    target: Map
    value: Conversion | None
    leaves: tuple[Leaf, ...]

    def convert(self, rows: Rows) -> Rows:
        return self.value.apply(rows).records if self.value else rows


class Storage:
    """One storage map on its way. The base holds values in the layout of the release that ran before, always."""

    def __init__(
        self, name: str, ahead: _Way, back: _Way, base: Map, lossy_allowed: bool, writing: threading.RLock,
        going_back: bool = False,
    ) -> None:  # fmt: skip
        self.name = name
        self.tally = Tally()
        self._ahead = ahead
        self._back = back
        self._base = base
        self._lossy_allowed = lossy_allowed
        self._writing = writing
        self._going_back = going_back
        self._left = 0  # owners that the last round could not settle
        way = back if going_back else ahead
        self._teller = Teller(name, way.source, base, differing=not going_back)
        self._settler = Settler(name, way.target, base, way.leaves)

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`."""
        self.tally.copied = self.tally.entries = self._round(set())
        progress(self.tally.copied)
        self.catch_up()

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`; the last one repeats until a pass finds nothing new, since one may miss owners."""
        settled: set[bytes] = set()
        found = tries = 0
        with self._writing:
            while True:
                known = len(settled)
                differed = self._round(settled)
                found += differed
                if not last or not differed:
                    break
                if len(settled) == known:
                    tries += 1
                    if self._left == 0:  # someone who holds the old map goes on writing them: they are not left behind
                        break
                    if tries == _TRIES:
                        raise KernelError(
                            f"map {self.name}: {self._left} values could not be brought into the new map in {tries} "
                            "tries; the kernel has no room for storage of their owners (of sockets: see optmem_max)",
                            map=self.name,
                            count=self._left,
                        )
        self.tally.caught_up += found
        return found

    def _round(self, settled: set[bytes]) -> int:
        """Merge what differs; adds the owners to ``settled`` and returns how many differed."""
        found = self._left = 0
        way = self._back if self._going_back else self._ahead
        owners = [way.source, self._base] if way.source.info.type == "sk_storage" else [self._base]
        for over in owners:  # those that lost their value have storage in the base only
            told = self._teller.tell(over)
            modes = np.where(told.has, np.where(told.held, Mode.CHANGED, Mode.INSERTED), Mode.DELETED).astype(np.uint8)
            base, values, held = self._returned(told) if self._going_back else self._forward(told)
            base = np.where(told.held[:, None], base, 0).astype(np.uint8)
            rows = np.arange(len(modes))
            if self._going_back:
                rows = np.flatnonzero((modes != Mode.CHANGED) | (base != values).any(axis=1))
            self._left += self._settler.settle(modes[rows], told.numbers[rows], base[rows], values[rows], held[rows])
            settled.update(number.tobytes() for number in told.numbers[rows])
            found += len(rows)
        self.tally.rounds += 1
        return found

    def _forward(self, told: Told) -> tuple[Rows, Rows, Rows]:
        """Base and value in the target's layout, and what the base is to hold."""
        values = told.values
        if self._ahead.value:
            converted = self._ahead.value.apply(values)
            for misfit in converted.misfits:
                if not self._lossy_allowed:
                    raise LossNotAllowedError(
                        f"map {self.name}: {misfit.count} value(s) of {misfit.path} do not fit the new layout; allow "
                        f"it with --allow-loss {self.name}, or widen the field",
                        maps=[self.name],
                        field=misfit.path,
                        count=misfit.count,
                    )
                self.tally.lost[misfit.path] = self.tally.lost.get(misfit.path, 0) + misfit.count
            values = converted.records
        return self._ahead.convert(told.base), values, told.values

    def _returned(self, told: Told) -> tuple[Rows, Rows, Rows]:
        # What only the old layout can hold is in neither of the two, so that the merge leaves it as it is.
        values = self._back.convert(told.values)
        return self._back.convert(self._ahead.convert(told.base)), values, values

    def verify(self) -> None:
        """See :class:`Carrier`. Fields that keep a greatest or smallest value, or bits, may rightly differ."""
        teller = Teller(f"{self.name}_check", self._ahead.target, self._base, differing=False)
        told = teller.tell(self._base)
        teller.close()
        expected = self._ahead.convert(told.base)
        wrong = told.held & ~told.has
        for leaf in self._ahead.leaves:
            if leaf.merge in ("keep", "sum"):
                part = slice(leaf.offset, leaf.offset + leaf.size)
                wrong |= told.held & (told.values[:, part] != expected[:, part]).any(axis=1)
        if wrong.any():
            raise VerifyError(
                f"map {self.name}: {int(wrong.sum())} owners have a value in the new map that is not the old one as "
                "converted; nothing was switched, the running release is untouched",
                map=self.name,
                count=int(wrong.sum()),
            )

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`. The base is the same: what it holds is in the layout of the old release."""
        return Storage(self.name, self._ahead, self._back, self._base, True, self._writing, going_back=True)


def carry_storage(passage: Passage) -> Storage:
    """The carrier of local storage. Raises KernelError if the verifier refuses its programs."""
    source, target = passage.source, passage.target
    if passage.fresh:
        base = create_base(source, f"base_{passage.name}", source.info.value_size)
        base.pin(passage.pin)
    else:
        base = Map.open(passage.pin)
    value = passage.diff.value
    ahead = _Way(source, target, value, _leaves(passage.new, passage.rules))
    back = _Way(target, source, value.inverse() if value else None, _leaves(passage.old, _turned(passage.rules)))
    return Storage(passage.name, ahead, back, base, passage.lossy_allowed, passage.writing)


def _leaves(spec: MapSpec, rules: MapRules) -> tuple[Leaf, ...]:
    assert spec.value is not None  # the plan carries no storage without a layout
    return leaves(spec.value, rules, spec.tags)
