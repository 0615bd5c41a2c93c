"""Maps that no program writes: the new map is made what the old one says, again and again, and needs no base.

Who writes them is in user space, and during an upgrade writes the old map, or both maps through hitless. So the old
map is right wherever they differ, and nothing has to be remembered of what it held before. But for entries that the
old map cannot hold as they were written through hitless: their keys are *beyond* it, in a small pinned map.

    beyond: key -> 8 bytes, 1 if the old map has the entry | its value there when it was written
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np

from hitless.errors import KernelError, VerifyError
from hitless.kernel.libbpf import options
from hitless.kernel.maps import Map, Rows, create
from hitless.kernel.mirrorer import Mirrorer, Sweeper
from hitless.layout.conversion import Conversion
from hitless.upgrade.carrier import Carrier, Passage, Tally
from hitless.upgrade.copy import CHUNK, Staying, not_written
from hitless.upgrade.pace import Pace

__all__ = ["Mirror", "carry_mirrored"]

_HASH = 1  # BPF_MAP_TYPE_HASH
_NO_PREALLOC = 1 << 0  # BPF_F_NO_PREALLOC
_SAMPLE = 500  # entries that numpy compares
_BEYOND = 1 << 16  # entries; the kernel takes 16 bytes for each at once


class Mirror(msgspec.Struct):
    """One map on its way from ``source`` to ``target``, whose values differ by ``value``; ``back`` is the reverse.

    ``beyond`` holds what is said above. ``held`` is how many entries the target has, None if that is not known.
    """

    name: str
    source: Map
    target: Map
    value: Conversion | None
    back: Conversion | None
    beyond: Map
    mirrorer: Mirrorer
    tally: Tally
    writing: threading.RLock
    pace: Pace
    held: int | None

    # As a carrier

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`."""

        def copied(done: int) -> None:
            self.tally.copied = done
            progress(done)

        self._pass(copied)
        self.tally.entries = self.tally.copied

    def verify(self) -> None:
        """See :class:`Carrier`: a pass compares every entry, and numpy, which knows nothing of it, some of them."""
        self.catch_up()
        wrong = self._wrong(next((keys[:_SAMPLE].copy() for keys, _ in self.source.batches()), None))
        if wrong:
            self.catch_up()  # which brings what was written meanwhile
        still = [key for key, value in wrong.items() if self.source.lookup(key) == value and self._differs(key)]
        if still:
            raise VerifyError(
                f"map {self.name}: {len(still)} entries are wrong, the first with key {still[0].hex()}, which is not "
                "in the new map as converted; nothing was switched, the running release is untouched",
                map=self.name,
                key=still[0].hex(),
                count=len(still),
            )

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`."""
        started = time.perf_counter()
        with self.writing if last else nullcontext():
            found = self._pass(None, last)
            if self.held is None or self.held != self.mirrorer.seen:
                found += self._sweep()
            if last and self.mirrorer.left_out:  # there is room now
                found += self._pass(None, last)
        if last and self.mirrorer.left_out:
            raise not_written(self.name, self.target, errno.E2BIG, self.mirrorer.seen)
        self.tally.rounds += 1
        self.tally.caught_up += found
        self.tally.last_round = time.perf_counter() - started
        return found

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`: what was written to the target is in the source too, or has no place there."""
        return Staying(self.name, None)

    # What a handle asks; keys and values are the target's

    def refresh(self, key: bytes) -> None:
        """Make the target's entry at ``key`` what the source says now."""
        if not self._is_beyond(key):
            self._put_right(key)

    def write(self, key: bytes, value: bytes) -> None:
        """Set an entry of both maps; fields that only the old release has keep what they hold."""
        held = self.source.lookup(key)
        onto = None if held is None else _row(held)
        old = value if self.back is None else self.back.apply(_row(value), onto).records.tobytes()
        if self._converted(old, value) != value:
            self._note_beyond(key, old)
        else:
            self.beyond.delete(key)
        known = self.target.lookup(key) is not None
        self.target.update(key, value)
        if self.held is not None:
            self.held += not known
        try:
            self.source.update(key, old)
        except KernelError as error:
            if error.facts["errno"] != errno.E2BIG:
                raise
            self._note_beyond(key, None)  # only the new release has room for it

    def delete(self, key: bytes) -> bool:
        """Delete an entry of both maps; whether it was in either."""
        self.beyond.delete(key)
        known = self._drop(key)
        return self.source.delete(key) or known

    # The pass

    def _pass(self, progress: Callable[[int], None] | None, last: bool = False) -> int:
        """Add and put right what differs; ``progress`` is given when the target is being filled."""
        mirrorer = self.mirrorer
        mirrorer.begin(filling=progress is not None)
        more = True
        while more:
            with self.writing:
                before = mirrorer.added
                try:
                    more = mirrorer.read(CHUNK)
                except OSError as error:
                    raise not_written(self.name, self.target, error.errno, mirrorer.seen) from None
                if self.held is not None:
                    self.held += mirrorer.added - before
            if progress is not None:
                progress(mirrorer.seen)
            if not last:
                self.pace(CHUNK)
        with self.writing:
            found = self._settle_beyond()
        return found + mirrorer.put_right + (0 if progress is not None else mirrorer.added)

    def _sweep(self) -> int:
        """Delete what the source has no more."""
        sweeper = Sweeper(self.name, self.source, self.target)
        gone = 0
        for keys in sweeper.keys(CHUNK):
            with self.writing:
                for key in keys:
                    if self.source.lookup(key) is None and not self._is_beyond(key):
                        gone += self._drop(key)
        sweeper.close()
        return gone

    def _wrong(self, keys: Rows | None) -> dict[bytes, bytes]:
        """Of these keys those whose entry in the target differs, with what the source has."""
        listed = () if keys is None else (key.tobytes() for key in keys)
        with self.writing:
            seen = ((key, self.source.lookup(key)) for key in listed)
            return {key: value for key, value in seen if value is not None and self._differs(key)}

    # One entry

    def _converted(self, old: bytes, onto: bytes | None) -> bytes:
        """A value of the source as one of the target; what only the new release has is as it is in ``onto``."""
        if self.value is None:
            return old
        if onto is None:
            return self.value.apply(_row(old)).records.tobytes()
        moves = msgspec.structs.replace(self.value, defaults=())
        return moves.apply(_row(old), _row(onto)).records.tobytes()

    def _differs(self, key: bytes) -> bool:
        old, new = self.source.lookup(key), self.target.lookup(key)
        if self._is_beyond(key) or (old is None and new is None):
            return False
        return old is None or new is None or self._converted(old, new) != new

    def _put_right(self, key: bytes) -> bool:
        """Make one entry what the source says; whether it was different."""
        if not self._differs(key):
            return False
        old, new = self.source.lookup(key), self.target.lookup(key)
        if old is None:
            return self._drop(key)
        self.target.update(key, self._converted(old, new))
        if self.held is not None:
            self.held += new is None
        return True

    def _drop(self, key: bytes) -> bool:
        known = self.target.delete(key)
        if self.held is not None:
            self.held -= known
        return known

    # What the old map cannot hold

    def _note_beyond(self, key: bytes, old: bytes | None) -> None:
        had = int(old is not None).to_bytes(8, sys.byteorder)
        try:
            self.beyond.update(key, had + (old or bytes(self.source.info.value_size)))
        except KernelError as error:
            if error.facts["errno"] != errno.E2BIG:
                raise
            raise KernelError(
                f"map {self.name}: {_BEYOND} entries were written during this upgrade that the old release's map "
                "cannot hold, and no more can be told apart; write them after the upgrade, or leave out the promise",
                **error.facts,
                map=self.name,
            ) from None

    def _is_beyond(self, key: bytes) -> bool:
        """Whether the target's entry is what it is although the source's is different, and that as it was then."""
        noted = self.beyond.lookup(key)
        if noted is None:
            return False
        had = int.from_bytes(noted[:8], sys.byteorder)
        return self.source.lookup(key) == (noted[8:] if had else None)

    def _settle_beyond(self) -> int:
        """Put right the entries that the source got meanwhile: they are no more what they were."""
        found = 0
        for key in self.beyond.all_keys():
            if not self._is_beyond(key):
                self.beyond.delete(key)
                found += self._put_right(key)
        return found


def carry_mirrored(passage: Passage) -> Mirror:
    """The carrier of a map that no program writes. Raises KernelError if the verifier refuses its program."""
    source, target, value = passage.source, passage.target, passage.diff.value
    if passage.fresh:
        sizes = source.info.key_size, 8 + source.info.value_size
        flags = options("bpf_map_create_opts", map_flags=_NO_PREALLOC)
        beyond = create(_HASH, f"beyond_{passage.name}", *sizes, _BEYOND, flags)
        beyond.pin(passage.pin)
    else:
        beyond = Map.open(passage.pin)
    return Mirror(
        name=passage.name,
        source=source,
        target=target,
        value=value,
        back=value.inverse() if value is not None else None,
        beyond=beyond,
        mirrorer=Mirrorer(passage.name, source, target, beyond, value),
        tally=Tally(),
        writing=passage.writing,
        pace=passage.pace,
        held=0 if passage.fresh else None,
    )


def _row(data: bytes) -> Rows:
    return np.frombuffer(data, np.uint8).reshape(1, -1)
