"""Maps that no program writes: the new map is made what the old one says, again and again, and needs no base.

Who writes them is in user space, and during an upgrade writes the old map, or both maps through hitless. So the old
map is right wherever they differ, and nothing has to be remembered of what it held before.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np

from hitless.errors import VerifyError
from hitless.kernel.copier import Mirrorer
from hitless.kernel.maps import Map, Rows
from hitless.layout.conversion import Conversion
from hitless.upgrade.carrier import Carrier, Passage, Tally
from hitless.upgrade.copy import CHUNK, not_written
from hitless.upgrade.pace import Pace

__all__ = ["Mirror", "carry_mirrored"]


class Mirror(msgspec.Struct):
    """One map on its way from ``source`` to ``target``; the fields are those of a Carriage.

    ``added`` counts the entries that it put into the target, ``touched`` tells whether a dual write made it uncertain
    that the target has no others.
    """

    name: str
    source: Map
    target: Map
    back_key: Conversion | None
    back_value: Conversion | None
    key: Conversion | None
    value: Conversion | None
    mirrorer: Mirrorer
    tally: Tally
    writing: threading.RLock
    pace: Pace
    added: int = 0
    touched: bool = False

    # As a carrier

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`."""

        def copied(done: int) -> None:
            self.tally.copied = done
            progress(done)

        self._pass(last=False, progress=copied)
        self.tally.entries = self.tally.copied

    def verify(self) -> None:
        """See :class:`Carrier`: a pass that compares every entry; what was written meanwhile is put right at once."""
        with self.writing:
            self.catch_up()
            if self.catch_up():
                raise VerifyError(
                    f"map {self.name} is written so fast from outside, or by a program although its release says that "
                    "none does, that its copy never agrees with it; nothing was switched, the running release is "
                    "untouched",
                    map=self.name,
                )

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`."""
        started = time.perf_counter()
        found = self._pass(last)
        self.tally.rounds += 1
        self.tally.caught_up += found
        self.tally.last_round = time.perf_counter() - started
        return found

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`: nothing was written to the target alone."""
        return _Nothing(self.name)

    # What dual writes ask

    def keys(self, rows: Rows) -> Rows:
        """Keys of the source as keys of the target."""
        return self.key.apply(rows).records if self.key else rows

    def back(self, rows: Rows, onto: Rows | None = None) -> Rows:
        """Values of the target as values of the source; ``onto`` is what holds where the target says nothing."""
        return self.back_value.apply(rows, onto).records if self.back_value else rows

    def refresh(self, key: bytes) -> None:
        """The target's entry is as new as the last pass or dual write made it: no program changes it."""

    def remember(self, key: bytes, value: bytes) -> None:
        """A dual write set ``key`` of the source."""
        self.touched = True

    def forget(self, key: bytes) -> None:
        """A dual write deleted ``key`` of the source."""
        self.touched = True

    # The pass

    def _pass(self, last: bool, progress: Callable[[int], None] | None = None) -> int:
        mirrorer = self.mirrorer
        mirrorer.begin()
        more = True
        with self.writing if last else nullcontext():
            while more:
                with self.writing:
                    try:
                        more = mirrorer.read(CHUNK)
                    except OSError as error:
                        raise not_written(self.name, self.target, error.errno, mirrorer.seen) from None
                if progress is not None:
                    progress(mirrorer.seen)
                if not last:
                    self.pace(CHUNK)
            self.added += mirrorer.added
            with self.writing:
                gone = self._drop_deleted() if last or progress is None else 0
        if last and mirrorer.left_out:
            raise not_written(self.name, self.target, errno.E2BIG, mirrorer.seen)
        return (0 if progress is not None else mirrorer.added) + mirrorer.put_right + gone

    def _drop_deleted(self) -> int:
        """Delete what the source has no more, if the numbers say that there is anything."""
        if not self.touched and self.added == self.mirrorer.seen:
            return 0
        gone = 0
        held = 0
        for new_keys, _ in self.target.batches():
            old_keys = self.back_key.apply(new_keys).records if self.back_key else new_keys
            for new_key, old_key in zip(new_keys.copy(), np.array(old_keys), strict=True):
                if self.source.lookup(old_key.tobytes()) is None:
                    self.target.delete(new_key.tobytes())
                    gone += 1
                else:
                    held += 1
        self.added, self.touched = held, False
        return gone


class _Nothing:
    """Brings nothing back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tally = Tally()

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


def carry_mirrored(passage: Passage) -> Mirror:
    """The carrier of a map that no program writes. Raises KernelError if the verifier refuses its program."""
    diff = passage.diff
    return Mirror(
        name=passage.name,
        source=passage.source,
        target=passage.target,
        back_key=diff.key.inverse() if diff.key else None,
        back_value=diff.value.inverse() if diff.value else None,
        key=diff.key,
        value=diff.value,
        mirrorer=Mirrorer(passage.name, passage.source, passage.target, diff.key, diff.value),
        tally=Tally(),
        writing=passage.writing,
        pace=passage.pace,
    )
