"""Carrying the variables of one section of global data, which may come from several maps of the running release.

A section is a map of one entry, so the carrier of entries does the work, once for each source: it converts and merges
just the variables that come from there. What it cannot know is that the entry has other bytes. The copy of each source
writes a whole value; here the variables of all are put together with what the new object says of the rest. No program
runs on the new map while that is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hitless.kernel.bpffs import make_directory
from hitless.kernel.maps import Map
from hitless.layout.conversion import Conversion
from hitless.upgrade.carrier import Carrier, Passage, Tally
from hitless.upgrade.copy import carry_entries

__all__ = ["SectionCarrier", "carry_section"]

Bits = npt.NDArray[np.uint8]

_KEY = bytes(4)


class SectionCarrier:
    """The carrier of one section: a carrier of entries for each of its ``parts``, and the bits that are its own."""

    def __init__(self, name: str, target: Map, parts: Sequence[Carrier], masks: Sequence[Bits]) -> None:
        self._name = name
        self._target = target
        self._parts = parts
        self._masks = masks
        self._tally = Tally()

    @property
    def name(self) -> str:
        """See :class:`Carrier`."""
        return self._name

    @property
    def tally(self) -> Tally:
        """The parts' counts; a section is one entry."""
        counts = [part.tally for part in self._parts]
        self._tally.entries = max(count.entries for count in counts)
        self._tally.copied = max(count.copied for count in counts)
        self._tally.rounds = max(count.rounds for count in counts)
        self._tally.caught_up = sum(count.caught_up for count in counts)
        self._tally.differing = sum(count.differing for count in counts)
        self._tally.left_behind = next((count.left_behind for count in counts if count.left_behind), None)
        self._tally.last_round = sum(count.last_round for count in counts)
        self._tally.lost = {path: number for count in counts for path, number in count.lost.items()}
        return self._tally

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`."""
        value = self._value()  # what the new object says, as libbpf put it there
        for part, mask in zip(self._parts, self._masks, strict=True):
            part.copy(progress)
            value = value & ~mask | self._value() & mask
        self._target.update(_KEY, value.tobytes())

    def verify(self) -> None:
        """See :class:`Carrier`."""
        for part in self._parts:
            part.verify()

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`."""
        return sum(part.catch_up(last) for part in self._parts)

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`."""
        if fresh:
            make_directory(pin)
        backs = [part.turned(pin / str(index), fresh) for index, part in enumerate(self._parts)]
        return SectionCarrier(self._name, self._target, backs, self._masks)

    def _value(self) -> Bits:
        found = self._target.lookup(_KEY)
        assert found is not None  # an array has all its entries
        return np.frombuffer(found, np.uint8)


def carry_section(name: str, passages: Sequence[Passage]) -> SectionCarrier:
    """The carrier of section ``name``; ``passages``, one for each source, go to one map and pin below one directory.

    Raises KernelError if the verifier refuses a merge program.
    """
    if passages[0].fresh:
        make_directory(passages[0].pin.parent)
    parts = [carry_entries(passage) for passage in passages]
    masks = [_written(passage.diff.value) for passage in passages if passage.diff.value is not None]
    return SectionCarrier(name, passages[0].target, parts, masks)


def _written(conversion: Conversion) -> Bits:
    """The bits of a new value that the conversion writes, whatever the old value is."""
    nothing = np.zeros((1, conversion.old_size), np.uint8)
    ones = np.full((1, conversion.new_size), 0xFF, np.uint8)
    return np.asarray(~(conversion.apply(nothing).records ^ conversion.apply(nothing, ones).records)[0])
