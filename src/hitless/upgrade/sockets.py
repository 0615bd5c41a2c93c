"""Carrying sockets: each is added to the new map, and stays in the old one.

No socket is ever taken out of the old map. Out of its last map, it would lose what was redirected to it and is not
read yet; and while a reader waits, it would keep its programs all the same and so be refused by the new map. In both
maps it lives on undisturbed: the programs that it was added under go on serving it, by the old map, which the kernel
keeps for them until the last such socket closes.

Where these programs are hooks of the release, they go over with the sockets: :mod:`hitless.upgrade.moving`.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from hitless.errors import VerifyError
from hitless.kernel.libbpf import check
from hitless.kernel.maps import ANY, NOEXIST, Map, Rows
from hitless.kernel.sockets import Adder, Remover, Sockets, create_base, list_sockets
from hitless.layout.conversion import Conversion
from hitless.upgrade.carrier import Aside, Carrier, Passage, Tally

__all__ = ["SocketMap", "carry_sockets"]

# The socket has programs and the map too; it is in a state that no map takes, such as half closed.
_REFUSED = (errno.EBUSY, errno.EOPNOTSUPP)
_MOST_ROUNDS = 100


class SocketMap:
    """One sockmap or sockhash on its way. The base holds which socket was carried from which key of the source."""

    def __init__(
        self, name: str, source: Map, target: Map, base: Map, key: Conversion | None, back: Conversion | None,
        writing: threading.RLock, aside: Aside | None, back_aside: Aside | None,
    ) -> None:  # fmt: skip
        self.name = name
        self.tally = Tally()
        self._source = source
        self._target = target
        self._base = base
        self._key = key
        self._back = back
        self._writing = writing
        self._aside = aside
        self._back_aside = back_aside
        self._adder = Adder(name, source, target, base)
        self._remover = Remover(name, target)

    def copy(self, progress: Callable[[int], None]) -> None:
        """See :class:`Carrier`."""
        found, _ = self._round(last=False)
        self.tally.copied = self.tally.entries = found
        progress(found)

    def catch_up(self, last: bool = False) -> int:
        """See :class:`Carrier`. What the new map refuses is counted in the tally, and stays with the old one."""
        total = 0
        with self._writing:
            for _ in range(_MOST_ROUNDS if last else 1):
                found, refused = self._round(last)
                total += found
                if not found:
                    break
        self.tally.caught_up += total
        self.tally.lost = {
            f"sockets that stay with the old release ({errno.errorcode[number]})": count
            for number, count in refused.items()
        }
        return total

    def _round(self, last: bool) -> tuple[int, dict[int, int]]:
        """Carry what differs; how many did, and how many the target refused, by errno."""
        old, new, base = list_sockets(self._source), list_sockets(self._target), self._noted()
        places = self._places([*old, *base])
        gone = {key: cookie for key, cookie in base.items() if key not in old}
        self._remover.remove({places[key]: cookie for key, cookie in gone.items() if new.get(places[key]) == cookie})
        for key in gone:
            self._base.delete(key)
        wanted, flags = [], []
        for key, cookie in old.items():
            was, there = base.get(key), new.get(places[key])
            if cookie == was:
                continue
            if there not in (None, was):  # there already, or the new release put one of its own there: its word wins
                self._base.update(key, cookie.to_bytes(8, "little"))
                continue
            wanted.append(key)
            flags.append(NOEXIST if there is None else ANY)
        outcomes = self._add([(key, old[key], places[key], flag) for key, flag in zip(wanted, flags, strict=True)])
        self.tally.rounds += 1
        refused = {number: outcomes.count(-number) for number in _REFUSED if -number in outcomes}
        self._raise_others(outcomes, last)
        return len(gone) + outcomes.count(0), refused

    def _add(self, wanted: list[tuple[bytes, int, bytes, int]]) -> list[int | None]:
        """What came of adding sockets: key and cookie, the key in the target, and how it is to be put there."""
        outcomes = self._add_now(wanted)
        refused = [index for index, outcome in enumerate(outcomes) if outcome == -errno.EBUSY]
        if refused and self._aside is not None:  # they have a program, and the target has one too
            with self._aside():
                again = self._add_now([wanted[index] for index in refused])
            for index, outcome in zip(refused, again, strict=True):
                outcomes[index] = outcome
        return outcomes

    def _add_now(self, wanted: list[tuple[bytes, int, bytes, int]]) -> list[int | None]:
        return self._adder.add(
            _rows([key for key, *_ in wanted], self._source.info.key_size),
            [cookie for _, cookie, *_ in wanted],
            _rows([place for *_, place, _ in wanted], self._target.info.key_size),
            [flag for *_, flag in wanted],
        )

    def _raise_others(self, outcomes: list[int | None], last: bool) -> None:
        can_wait = not last and self._target.info.max_entries >= self._source.info.max_entries
        passed = (None, 0, -errno.EEXIST, *(-number for number in _REFUSED), *((-errno.E2BIG,) if can_wait else ()))
        for outcome in outcomes:
            if outcome is not None and outcome not in passed:
                what = f"map {self.name}, whose max_entries is {self._target.info.max_entries}"
                check(outcome, "adding a socket", what)

    def _noted(self) -> Sockets:
        keys, cookies = self._base.entries()
        numbers = np.ascontiguousarray(cookies).view(np.uint64).reshape(-1).tolist()
        return dict(zip((key.tobytes() for key in keys), numbers, strict=True))

    def _places(self, keys: Iterable[bytes]) -> Mapping[bytes, bytes]:
        """Keys of the target by those of the source."""
        unique = list(dict.fromkeys(keys))
        if self._key is None:
            return {key: key for key in unique}
        made = self._key.apply(_rows(unique, self._source.info.key_size)).records
        return {key: row.tobytes() for key, row in zip(unique, made, strict=True)}

    def verify(self) -> None:
        """See :class:`Carrier`. A socket that closed meanwhile is in neither map."""
        base, new = self._noted(), list_sockets(self._target)
        places = self._places(base)
        old = list_sockets(self._source)  # read last: what is still there was there all the time
        wrong = [key for key, cookie in base.items() if old.get(key) == cookie and new.get(places[key]) != cookie]
        if wrong:
            raise VerifyError(
                f"map {self.name}: {len(wrong)} sockets are not in the new map, the first with key {wrong[0].hex()}; "
                "nothing was switched, the running release is untouched",
                map=self.name,
                key=wrong[0].hex(),
                count=len(wrong),
            )

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """See :class:`Carrier`."""
        if fresh:
            base = create_base(self._target, f"back_{self.name}")
            noted = self._noted()
            places = self._places(noted)
            for key, cookie in noted.items():
                base.update(places[key], cookie.to_bytes(8, "little"))
            base.pin(pin)
        else:
            base = Map.open(pin)
        asides = self._back_aside, self._aside
        return SocketMap(self.name, self._target, self._source, base, self._back, self._key, self._writing, *asides)


def carry_sockets(passage: Passage) -> SocketMap:
    """The carrier of sockets. Raises KernelError if the verifier refuses its programs."""
    if passage.fresh:
        base = create_base(passage.source, f"base_{passage.name}")
        base.pin(passage.pin)
    else:
        base = Map.open(passage.pin)
    key = passage.diff.key
    back = key.inverse() if key else None
    asides = passage.target_aside, passage.source_aside
    return SocketMap(passage.name, passage.source, passage.target, base, key, back, passage.writing, *asides)


def _rows(keys: list[bytes], size: int) -> Rows:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), size)
