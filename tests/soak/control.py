"""A control plane that writes all the while: inserts, changes and deletes entries of some maps, and keeps a journal."""

from __future__ import annotations

import ipaddress
import random
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import hitless
from meshd.desired import ServiceKey
from tests.soak.journal import Journal

__all__ = ["TABLES", "WRITERS", "ControlPlane", "Lost", "Table", "Writer", "journal_path"]

_KEYS = 200  # of each writer in each map
_MOST = 2**16  # values, as numbers, are below
_PAUSE = 0.002  # s on average
# How often each kind of write comes: so that three of four keys are there.
_KINDS = {"insert": 3, "change": 3, "delete": 5, "many": 1}
_MANY = 8

WRITERS = ("thread", "steps")
"""Those who write: a thread at any time, and the upgrading thread itself at each of its steps."""


class Lost(Exception):  # noqa: N818 - it is what happened
    """An entry that the journal has was not there, or another was in its place."""


class Table(Protocol):
    """How numbers become keys and values of one map; the same Python values mean the same in every release."""

    @property
    def name(self) -> str:
        """The map's."""

    def key(self, number: int) -> Any:
        """A key for the map's handle."""

    def value(self, number: int) -> Any:
        """A value for the map's handle, another one for each number."""


class Services:
    """meshd's own map of services, with up to 8 backends each; no client connects to them."""

    name = "service"

    def key(self, number: int) -> Any:
        """An endpoint in 10.97.0.0/16."""
        address = bytes(10) + b"\xff\xff" + (ipaddress.IPv4Address("10.97.0.0") + number).packed
        return ServiceKey(address, 80).to_map()

    def value(self, number: int) -> Any:
        """Backends whose addresses and weights tell the number."""
        count = 1 + number % 8
        address = bytes(10) + b"\xff\xff\x0a\x62" + number.to_bytes(2, "big")
        backends = [{"addr": address, "port": 80 + n, "weight": 1 + number % 9} for n in range(count)]
        return {"total_weight": count * (1 + number % 9), "count": count, "backends": backends}


class Rules:
    """The meter's map of rules, whose keys change their layout as well."""

    name = "rule"

    def key(self, number: int) -> Any:
        """A rule's id and zone."""
        return {"id": number, "zone": number % 7}

    def value(self, number: int) -> Any:
        """Rate and burst that both tell the number."""
        return {"rate": 3 * number, "burst": number ^ 0xFFFF}


class Prefixes:
    """The meter's trie of prefixes; none of them lies within another."""

    name = "prefix"

    def key(self, number: int) -> Any:
        """A prefix of 24 to 32 bits in 10.98.0.0/15."""
        return {"prefixlen": 24 + number % 9, "addr": (ipaddress.IPv4Address("10.98.0.0") + (number << 8)).packed}

    def value(self, number: int) -> Any:
        """A next hop that is the number."""
        return {"hop": number}


TABLES: tuple[Table, ...] = (Services(), Rules(), Prefixes())


def journal_path(directory: Path, table: str, writer: str) -> Path:
    """Where a writer's journal of a map is."""
    return directory / f"{table}.{writer}.journal"


class Writer:
    """Writes keys of its own in one map, by turns an insertion, a change, a deletion or some at once."""

    def __init__(self, node: hitless.Node, table: Table, name: str, directory: Path, seed: int) -> None:
        self.done = 0
        self._table = table
        self._handle = node.map(table.name)
        self._first = WRITERS.index(name) * _KEYS
        path = journal_path(directory, table.name, name)
        state = Journal.read(path)
        self._held, self._pending = state.held, state.pending
        self._journal = Journal(path)
        self._random = random.Random(f"{seed} {table.name} {name} {len(self._held)}")

    def settle(self) -> None:
        """After a kill, find out what came of the write that it met. Raises Lost if that is not one of the two ends."""
        if not self._pending:
            return
        came = {}
        for number, wanted in self._pending.items():
            key, before = self._table.key(number), self._held.get(number)
            found = self._handle.get(key)
            ends = [end for end in (wanted, before) if self._is(found, end)]
            if not ends:
                ways = " or ".join(str(None if end is None else self._table.value(end)) for end in (before, wanted))
                raise Lost(f"{self._table.name}: a kill met a write of {key}; expected {ways}, found {found}")
            came[number] = ends[0]
        self._note(came)
        self._pending = {}

    def _is(self, found: Any, value: int | None) -> bool:
        if found is None or value is None:
            return found is value
        return _holds(found, self._table.value(value))

    def write(self) -> str:
        """One write; returns its kind: ``insert``, ``change``, ``delete`` or ``many``. Raises Lost, HitlessError."""
        numbers = range(self._first, self._first + _KEYS)
        held = [number for number in numbers if number in self._held]
        free = [number for number in numbers if number not in self._held]
        (kind,) = self._random.choices([*_KINDS], [*_KINDS.values()])
        if not free and kind == "insert":
            kind = "delete"
        if not held and kind in ("change", "delete"):
            kind = "insert"
        if kind == "many":
            self._set_many({number: self._random.randrange(_MOST) for number in self._random.sample(numbers, _MANY)})
        elif kind == "insert":
            self._set(self._random.choice(free), self._random.randrange(_MOST))
        else:
            number = self._random.choice(held)
            self._look_at(number)
            if kind == "delete":
                self._delete(number)
            else:
                self._set(number, self._random.randrange(_MOST))
        self.done += 1
        return kind

    def _look_at(self, number: int) -> None:
        key, value = self._table.key(number), self._table.value(self._held[number])
        found = self._handle.get(key)
        if found is None:
            raise self._gone(key)
        if not _holds(found, value):
            raise Lost(f"{self._table.name}: {key} was changed by someone else; expected {value}, found {found}")

    def _set(self, number: int, value: int) -> None:
        self._journal.begin({number: value})
        self._handle[self._table.key(number)] = self._table.value(value)
        self._note({number: value})

    def _set_many(self, values: Mapping[int, int]) -> None:
        self._journal.begin(values)
        self._handle.update_many([(self._table.key(n), self._table.value(v)) for n, v in values.items()])
        self._note(values)

    def _delete(self, number: int) -> None:
        key = self._table.key(number)
        self._journal.begin({number: None})
        try:
            del self._handle[key]
        except KeyError:
            raise self._gone(key) from None
        self._note({number: None})

    def _gone(self, key: Any) -> Lost:
        return Lost(f"{self._table.name}: {key} is gone before anyone deleted it")

    def _note(self, values: Mapping[int, int | None]) -> None:
        self._journal.end(values)
        for number, value in values.items():
            if value is None:
                self._held.pop(number, None)
            else:
                self._held[number] = value


class ControlPlane:
    """Both writers of every table; the thread writes while this is used as a context manager."""

    def __init__(self, node: hitless.Node, directory: Path, seed: int) -> None:
        self.by_step: dict[str, set[str]] = {}
        self._writers = {name: [Writer(node, table, name, directory, seed) for table in TABLES] for name in WRITERS}
        self._random = random.Random(f"{seed} pauses")
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, "control plane")
        self._thread: Future[None] | None = None

    @property
    def writes(self) -> int:
        """How many writes there were."""
        return sum(writer.done for writers in self._writers.values() for writer in writers)

    def settle(self) -> None:
        """See :meth:`Writer.settle`."""
        for writers in self._writers.values():
            for writer in writers:
                writer.settle()

    def step(self, name: str) -> None:
        """One write of the upgrading thread to each map, as it comes to this step."""
        self.by_step.setdefault(name, set()).update(writer.write() for writer in self._writers["steps"])

    def __enter__(self) -> ControlPlane:
        self._thread = self._pool.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()

    def check(self) -> None:
        """Raise what ended the thread."""
        if self._thread is not None and self._thread.done():
            self._thread.result()

    def _run(self) -> None:
        while not self._stop.wait(self._random.uniform(0, 2 * _PAUSE)):
            self._random.choice(self._writers["thread"]).write()


def _holds(found: Any, written: Any) -> bool:
    """Whether what was read is what was written; fields that were left out are the release's own affair."""
    if isinstance(written, dict):
        return all(_holds(found.get(name), value) for name, value in written.items())
    if isinstance(written, list):
        return all(_holds(*pair) for pair in zip(found, written, strict=False))
    return bool(found == written)
