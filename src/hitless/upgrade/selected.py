"""An old map as one of those sees it that it is split into: the entries that this one's function takes.

Which these are may change while the old release writes: an entry that changes sides goes away for the one and comes for
the other, as if it had been deleted and inserted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from hitless.errors import LossNotAllowedError
from hitless.kernel.maps import Map, Rows
from hitless.upgrade.carrier import Tally
from hitless.upgrade.translate import Translation

__all__ = ["Selected"]

_NAMED = 3  # keys that an error names
_LEFT = "entries that no map takes"


class Selected(Map):
    """The entries of map ``name`` that ``translation`` takes; ``heirs`` are all that it is split into.

    With ``rivals``, which are the selections of all other heirs, entries that nobody takes are looked for in every
    pass: they are counted in ``tally`` if they may be ``lost``, else the pass ends with LossNotAllowedError.
    """

    def __init__(
        self, held: Map, name: str, translation: Translation, heirs: tuple[str, ...], lost: bool, tally: Tally
    ) -> None:
        super().__init__(os.dup(held.fd))
        self.lock_flag = held.lock_flag
        self.heirs = heirs
        self.rivals: tuple[Selected, ...] | None = None
        self._name = name
        self._translation = translation
        self._lost = lost
        self._tally = tally

    def lookup(self, key: bytes) -> bytes | None:
        """As that of the map, None too for an entry of another heir. Raises ConverterError, as all others do."""
        value = super().lookup(key)
        if value is None:
            return None
        keys, values = (np.frombuffer(part, np.uint8).reshape(1, -1) for part in (key, value))
        return value if self.takes(keys, values)[0] else None

    def batches(self) -> Iterator[tuple[Rows, Rows]]:
        """As those of the map."""
        count = 0
        first: list[str] = []
        for keys, values in super().batches():
            taken = self.takes(keys, values)
            left = np.flatnonzero(~taken) if self.rivals is not None else np.zeros(0, np.intp)
            for rival in self.rivals or ():
                left = left[~rival.takes(keys[left], values[left])]
            count += len(left)
            first += [keys[row].tobytes().hex() for row in left[: _NAMED - len(first)]]
            if taken.any():
                yield keys[taken], values[taken]
        if count and not self._lost:
            raise LossNotAllowedError(
                f"map {self._name}: {count} entries go to none of {', '.join(self.heirs)} (first keys: "
                f"{', '.join(first)}), whose functions say which are theirs; the running release was left as it was; "
                f"let one of them take these, or allow that they are lost with --allow-loss {self._name}",
                maps=[self._name],
                count=count,
                keys=first,
            )
        self._tally.lost.pop(_LEFT, None)
        if count:
            self._tally.lost[_LEFT] = count

    def takes(self, keys: Rows, values: Rows) -> npt.NDArray[np.bool_]:
        """Which of these entries are the heir's."""
        return self._translation.taken(keys, values)
