"""The daemon: put a release of the mesh on the node, keep its maps as the services file says, leave in order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

import hitless
from meshd.events import Events
from meshd.keeper import Keeper
from meshd.releases import Release
from meshd.sources.file import FileSource

__all__ = ["Daemon", "ExitType", "Settings"]

ExitType = Literal["restart", "normal"]

_PROGRESS = 0.2  # s between two lines about the same step
_LOOK = 0.05  # s between looks whether a signal came, and whether the keeper is still there


class Settings(msgspec.Struct, frozen=True):
    """What a daemon is started with.

    ``exit_type`` None: decided at the end, by whether the services file still exists. ``allow_loss`` names maps that
    may lose what the plan says they lose.
    """

    release: Release
    root: Path
    cgroup: Path
    services: Path
    allow_loss: frozenset[str] = frozenset()
    exit_type: ExitType | None = None


class Daemon:
    """One run of meshd in the main thread, from start to end."""

    def __init__(self, settings: Settings, events: Events) -> None:
        self._settings = settings
        self._events = events
        self._node = hitless.Node(settings.root)
        self._stop = threading.Event()
        sources = [FileSource(settings.services, settings.release, settings.cgroup)]
        self._keeper = Keeper(self._node, settings.release, sources, events, self._stop)
        self._told: tuple[str, float] = ("", 0.0)

    def run(self) -> None:
        """Start, restart or upgrade the mesh, follow the services file until SIGTERM or SIGINT, then leave.

        A signal during an upgrade takes effect when the upgrade is done. Raises HitlessError when the mesh cannot
        be started: what was live before is live still.
        """
        with _signals_noted() as noted:
            self._keeper.load()
            try:
                self._keeper.listen()
                self._start()
                while not noted and not self._keeper.ended():
                    time.sleep(_LOOK)
            finally:
                self._stop.set()
                self._keeper.finish()
            self._leave()

    def _start(self) -> None:
        settings = self._settings
        bundle = hitless.Bundle.load(settings.release.bundle, {"cgroup": str(settings.cgroup)})
        result = hitless.apply(
            self._node, bundle, allow_loss=settings.allow_loss, prepare=self._prepare, progress=self._tell_progress
        )
        self._keeper.upgraded()
        facts = msgspec.to_builtins(result)
        event = "upgraded" if facts["start_type"] == "update" else "ready"
        self._events.tell(event, start_type=facts["start_type"], version=settings.release.version, result=facts)

    def _prepare(self, node: hitless.Node) -> None:
        # The maps are right before any hook runs the new programs, and stay so however long the upgrade takes.
        self._keeper.take_over()

    def _tell_progress(self, progress: hitless.Progress) -> None:
        what = f"{progress.step} {progress.map}"
        before, told = self._told
        now = time.monotonic()
        if what == before and now - told < _PROGRESS:
            return
        self._told = (what, now)
        self._events.tell("progress", **msgspec.to_builtins(progress))

    def _leave(self) -> None:
        settings = self._settings
        exit_type: ExitType = settings.exit_type or ("restart" if settings.services.exists() else "normal")
        if self._keeper.superseded:
            exit_type = "restart"  # what is live is another daemon's
        if exit_type == "normal":
            hitless.unload(self._node)
        self._events.tell("stopped", exit_type=exit_type)


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are put on the list and do nothing else.

    A handler that set the stop event could wait for ever: the thread that it interrupts may hold the event's lock.
    """
    noted: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda got, _frame: noted.append(got)) for number in numbers]
    try:
        yield noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
