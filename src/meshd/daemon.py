"""The daemon: put a release of the mesh on the node, keep its maps as the control planes say, leave in order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec

import hitless
from hitless.errors import HitlessError
from meshd.events import Events
from meshd.health import Health
from meshd.keeper import Keeper
from meshd.kube import Announcer, Pod
from meshd.leaving import ExitType, leaving
from meshd.metrics import Metrics
from meshd.model import NOWHERE, Locality
from meshd.releases import RELEASES, Release
from meshd.sources.wanted import Wanted, sources
from meshd.systemd import Notifier, own_unit
from meshd.web import Page, Pages, Web

__all__ = ["Daemon", "ExitType", "Settings"]

_PROGRESS = 0.2  # s between two lines about the same step
_LOOK = 0.05  # s between looks whether a signal came, and whether the keeper is still there


class Settings(msgspec.Struct, frozen=True):
    """What a daemon is started with.

    ``exit_type`` None: decided at the end, see :mod:`meshd.leaving`. ``allow_loss`` names maps that may lose what the
    plan says they lose. ``here`` is where the node is. With ``access_log`` the programs keep one. ``pod`` is
    ``NAMESPACE/NAME`` of the pod that this runs in, ``listen`` the address and port for metrics and health.
    """

    release: Release
    root: Path
    cgroup: Path
    wanted: Wanted
    allow_loss: frozenset[str] = frozenset()
    exit_type: ExitType | None = None
    here: Locality = NOWHERE
    access_log: bool = False
    pod: str | None = None
    listen: tuple[str, int] | None = None


class Daemon:
    """One run of meshd in the main thread, from start to end.

    Raises SourceError if a source cannot be set up, UnsupportedError if a pod's API is out of reach for a reason that
    stays.
    """

    def __init__(self, settings: Settings, events: Events) -> None:
        self._settings = settings
        self._events = events
        self._node = hitless.Node(settings.root)
        self._stop = threading.Event()
        heard = sources(settings.wanted, settings.release, settings.cgroup)
        self._keeper = Keeper(
            self._node, settings.release, heard, events, self._stop, settings.here, settings.access_log
        )
        self._told: tuple[str, float] = ("", 0.0)
        self._pod = Pod.own(settings.pod)
        self._unit = own_unit()
        self._notifier = Notifier()
        # Nodes of their own: this one's maps are both releases' while it upgrades, and reading them is work then.
        self._health = Health(hitless.Node(settings.root), self._keeper)
        self._announcer = Announcer(self._pod) if self._pod is not None else None
        self._metrics = Metrics(hitless.Node(settings.root), self._keeper, self._health, self._announcer)
        events.listen(self._metrics.hear)
        if self._announcer is not None:
            events.listen(self._announcer.hear)

    def run(self) -> None:
        """Start, restart or upgrade the mesh, follow the control planes until SIGTERM or SIGINT, then leave.

        A signal during an upgrade takes effect when the upgrade is done; one before it, while the control planes are
        asked, lets it not begin. Raises HitlessError when the mesh cannot be started: what was live before is live
        still.
        """
        with _signals_noted() as noted, self._seen():
            self._keeper.load()
            try:
                if not noted:
                    self._keeper.listen()
                    self._start()
                    self._keep(noted)
            finally:
                self._stop.set()
                self._keeper.finish()
            self._leave()

    @contextmanager
    def _seen(self) -> Iterator[None]:
        """Meanwhile others see how it goes: service managers, who asks for metrics and health, who reads events."""
        if self._pod is not None and (trouble := self._pod.look()) is not None:
            self._events.tell("kubernetes-away", message=f"the owner of the pod is not known yet: {trouble}")
        web = Web(self._settings.listen, self._pages(), self._events) if self._settings.listen is not None else None
        self._notifier.watch(lambda: not self._health.alive(), self._stop)
        try:
            yield
        finally:
            if web is not None:
                web.close()
            if self._announcer is not None:
                self._announcer.finish()

    def _pages(self) -> Pages:
        return {
            "/metrics": self._metrics.page,
            "/healthz": lambda: Page.of(self._health.alive()),
            "/readyz": lambda: Page.of(self._health.ready()),
        }

    def _start(self) -> None:
        settings = self._settings
        bundle = hitless.Bundle.load(settings.release.bundle, {"cgroup": str(settings.cgroup)})
        state = self._node.observe()
        is_upgrade = state.current is not None and state.version != settings.release.version
        for release in RELEASES.values():
            if is_upgrade and release.version == state.version:
                self._keeper.bound(release)
        self._notifier.tell(f"STATUS=bringing release {settings.release.version} to {settings.root}")
        with self._events.upgrading() if is_upgrade else nullcontext():
            try:
                result = hitless.apply(
                    self._node, bundle, allow_loss=settings.allow_loss, prepare=self._prepare,
                    progress=self._tell_progress,
                )  # fmt: skip
            except HitlessError as error:
                if is_upgrade:
                    what = f"{state.version} to {settings.release.version}"
                    self._events.tell("upgrade-failed", code=error.code, message=f"from {what}: {error.message}")
                raise
            self._keeper.upgraded()
            facts = msgspec.to_builtins(result)
            event = "upgraded" if facts["start_type"] == "update" else "ready"
            self._events.tell(event, start_type=facts["start_type"], version=settings.release.version, result=facts)

    def _prepare(self, node: hitless.Node) -> None:
        # The maps are right before any hook runs the new programs, and stay so however long the upgrade takes.
        self._keeper.take_over()

    def _tell_progress(self, progress: hitless.Progress) -> None:
        self._metrics.step = progress.step
        what = f"{progress.step} {progress.map}"
        before, told = self._told
        now = time.monotonic()
        if what == before and now - told < _PROGRESS:
            return
        self._told = (what, now)
        self._events.tell("progress", **msgspec.to_builtins(progress))

    def _keep(self, noted: list[int]) -> None:
        """Until a signal comes, or there is nothing to keep any more."""
        while not noted and not self._keeper.ended():
            if self._health.look():
                self._tell_ready()
            time.sleep(_LOOK)
        if self._keeper.successor is not None and (self._pod is not None or self._unit is not None):
            # Whoever ends there is started again, and would take the mesh back to this release.
            self._notifier.tell(f"STATUS={self._health.ready()[0]}")
            while not noted:
                time.sleep(_LOOK)

    def _tell_ready(self) -> None:
        problems = self._health.ready()
        version = self._settings.release.version
        if problems:
            message = "; ".join(problems)
            self._notifier.tell(f"STATUS=not ready: {message}"[:2000].replace("\n", " "))
            self._events.tell("not-ready", message=message, problems=problems)
        else:
            self._notifier.tell("READY=1", f"STATUS=release {version} is live")
            self._events.tell("verified", version=version)

    def _leave(self) -> None:
        settings = self._settings
        self._notifier.tell("STOPPING=1")
        found = leaving(
            superseded=self._keeper.superseded,
            given=settings.exit_type,
            pod=self._pod,
            unit=self._unit,
            services=settings.wanted.services,
        )
        if found.exit_type == "normal":
            hitless.unload(self._node)
        self._events.tell("stopped", exit_type=found.exit_type, why=found.why)


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
