"""Keeps the maps as the sources say: each source is heard in a thread of its own, one more thread writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

import hitless
from hitless.errors import BusyError, HitlessError
from meshd.config import ConfigError
from meshd.events import Events
from meshd.model import NOWHERE, Config, Locality, Service
from meshd.recall import recall
from meshd.reconcile import Changes, Writer, sweep_flows
from meshd.registry import LIVE, Frontend, Registry
from meshd.releases import Release
from meshd.sources import Source, SourceAwayError
from meshd.turn import Turn

__all__ = ["Keeper", "KeeperState"]

_SEIZE = 3.0  # s to wait for a write of the daemon that is taken over from
_YIELD = 0.02  # s between looks whether one that takes over has succeeded
_GLANCE = 1.0  # s between looks at the live release
_RESYNC = 10.0  # s between looks at all the maps even if nothing seems to have changed
_TOLD = 20  # services left out that are told one by one at a time
_RETRY = 1.0  # s until what failed is tried again
_SWEEP_FIRST = 0.5  # s after an upgrade, from when on nothing brings back what is over
_SWEEP = 10.0  # s


class KeeperState(msgspec.Struct, frozen=True):
    """How keeping goes: the ``names`` of services in force, how many services and policies are, how many ``left_out``.

    ``sources`` tells when each was heard last, in seconds since the epoch; ``away`` are those that do not answer, or
    say what cannot be used.
    """

    names: dict[Frontend, str]
    counts: dict[str, int]
    left_out: int
    sources: dict[str, float]
    away: frozenset[str]


class Keeper:
    """Keeps the maps of ``node`` as the ``sources`` say, of which the first wins where two claim the same.

    What is wrong or away changes nothing, and an event says so. Stops by itself when another daemon took over, or
    another release than ``release`` turns out to be live, since its maps are not ours to write: then ``superseded``
    is true, and ``successor`` the version that is live, if any. ``kept_at`` is when (CLOCK_MONOTONIC) the maps last
    were as the sources said, as far as one can know; 0 before that.
    ``here`` and ``access_log`` are the :class:`Writer`'s.
    """

    def __init__(
        self,
        node: hitless.Node,
        release: Release,
        sources: Sequence[Source],
        events: Events,
        stop: threading.Event,
        here: Locality = NOWHERE,
        access_log: bool = False,
    ) -> None:
        self.superseded = False
        self.successor: str | None = None
        self.kept_at = 0.0
        self._node = node
        self._turn = Turn(node.root)
        self._release = release
        self._sources = sources
        self._events = events
        self._stop = stop
        self._registry = Registry([source.name for source in sources], release)
        self._heard = threading.Condition()  # guards the registry and what follows
        self._whole = True  # somebody told all it has: the maps are to be read, too
        self._writer = Writer(node, release, here, access_log)
        self._problems: list[str] = []
        self._awaited: set[str] = set()  # sources that have not said anything yet
        self._last: dict[str, float] = {}
        self._away: set[str] = set()
        self._doubted: dict[str, dict[str, Service]] = {}  # what a source says now that is not believed
        self._settled = False
        self._sweep_at = float("inf")
        self._pool = ThreadPoolExecutor(len(sources) + 1, "keeper")
        self._threads: list[Future[None]] = []

    @property
    def version(self) -> str:
        """Of the release whose maps are kept."""
        return self._release.version

    def load(self) -> None:
        """Ask every source for the first time.

        Until one that is away has come, what is live stays. Raises what else :meth:`Source.load` raises.
        """
        for source in self._sources:
            self._events.tell("loading", source=source.name)
            self._awaited.add(source.name)
            try:
                config = source.load()
            except SourceAwayError as error:
                self.hear_trouble(source, error)
                continue
            if not source.may_be_empty and not _backends(config.services):
                self._remember()
            self.hear(source, config)
        if self._awaited:
            self._remember()

    def _remember(self) -> None:
        """Keep what is live until every source was heard."""
        if self._registry.services_of(LIVE) or not self._node.root.exists() or self._node.observe().current is None:
            return
        live = self._recall()
        services, policies = len(live.services), len(live.policies)
        self._events.tell(
            "recalled",
            services=services,
            policies=policies,
            message=f"what is live stays until {' and '.join(sorted(self._awaited))} can be heard: "
            f"{services} services, {policies} policies",
        )

    def _recall(self) -> Config:
        # A node of its own: in an upgrade this one's maps are the new release's.
        live = recall(hitless.Node(self._node.root))
        # Policies for no service come from a file alone, and a file is never awaited.
        found = Config(live.services, tuple(policy for policy in live.policies if policy.service))
        self._registry.replace(LIVE, found)
        return found

    def listen(self) -> None:
        """Begin to follow the sources, until the stop event is set."""
        for source in self._sources:
            self._threads.append(self._pool.submit(source.follow, _Ear(self, source), self._stop))

    def bound(self, release: Release) -> None:
        """Until :meth:`upgraded` let no service have more backends than ``release`` holds, which runs until then."""
        with self._heard:
            self._registry.bound(release.backends)

    def take_over(self) -> None:
        """Bring the maps to what the sources say, and keep them so until the stop event is set.

        Another daemon of this root stops writing. Raises HitlessError; if this one ends before :meth:`upgraded`, the
        other goes on.
        """
        self._turn.seize(_SEIZE)
        with self._heard:
            if self._registry.services_of(LIVE):
                self._recall()  # the other one may have been told more meanwhile
            everything = self._registry.all()
        self._tell_config(self._writer.resync(everything))
        self._threads.append(self._pool.submit(self._keep))

    def upgraded(self) -> None:
        """Say that the upgrade is done: another daemon ends, and what the upgrade leaves behind may be swept."""
        self._turn.settle()
        with self._heard:
            self._registry.bound(None)
            self._heard.notify()
        self._sweep_at = time.monotonic() + _SWEEP_FIRST
        self._settled = True

    def ended(self) -> bool:
        """Whether keeping, or hearing a source, ended before it was told to."""
        return any(thread.done() for thread in self._threads)

    def finish(self) -> None:
        """Wait for the threads' end, after the stop event was set. Raises what ended one, if that was a mistake."""
        with self._heard:
            self._heard.notify()
        self._pool.shutdown()
        for thread in self._threads:
            thread.result()

    def state(self) -> KeeperState:
        """How keeping goes right now."""
        with self._heard:
            return KeeperState(
                names=self._registry.names(),
                counts=self._registry.counts(),
                left_out=len(self._problems),
                sources={source.name: self._last.get(source.name, 0.0) for source in self._sources},
                away=frozenset(self._away),
            )

    def hear(self, source: Source, config: Config) -> None:
        """Take ``config`` for all that ``source`` says."""
        with self._heard:
            lost = self._lost(source, config)
            if lost:
                told = source.name in self._doubted
                self._doubted[source.name] = {one.name: one for one in config.services}
                self._away.add(source.name)
                if told:
                    return
                self._events.tell(
                    "source-empty",
                    source=source.name,
                    message=f"{source.name} says that there is no {lost} at all, which is taken for its own failure: "
                    "what is live stays until it names one",
                )
                return
            self._doubted.pop(source.name, None)
            self._note(source)
            self._registry.replace(source.name, config)
            self._awaited.discard(source.name)
            if not self._awaited:
                self._registry.replace(LIVE, Config(()))
            self._whole = True
            self._heard.notify()

    def _lost(self, source: Source, config: Config) -> str:
        """What a source lost that it cannot mean to have lost, empty for nothing."""
        if source.may_be_empty:
            return ""
        # Of one that was never heard, what is live tells what it may have said to another daemon.
        before = self._registry.services_of(LIVE if source.name in self._awaited else source.name)
        if before and not config.services:
            return "service"
        return "endpoint" if _backends(before.values()) and not _backends(config.services) else ""

    def hear_of(self, source: Source, services: Mapping[str, Service | None]) -> None:
        """Take these services of ``source`` for changed."""
        with self._heard:
            if (doubted := self._doubted.get(source.name)) is not None:
                changed = {**doubted, **services}
                self.hear(source, Config(tuple(one for one in changed.values() if one is not None)))
                return
            self._note(source)
            self._registry.update(source.name, services)
            self._heard.notify()

    def hear_trouble(self, source: Source, error: HitlessError) -> None:
        """Tell of it; nothing else changes."""
        with self._heard:
            self._away.add(source.name)
        if isinstance(error, ConfigError):
            self._events.tell("config-error", message=error.message, **error.facts)
        elif isinstance(error, SourceAwayError):
            self._events.tell("source-away", source=source.name, message=error.message)
        else:
            self._events.error(error)

    def _note(self, source: Source) -> None:
        self._last[source.name] = time.time()
        self._away.discard(source.name)

    def _keep(self) -> None:
        resync_at = glance_at = 0.0
        told = ""
        while not self._stop.is_set():
            now = time.monotonic()
            try:
                if now >= glance_at:
                    glance_at = now + _GLANCE
                    self._look_at_node()
                    if self.superseded:
                        return
                with self._turn.writing() as whose:
                    if whose == "lost":
                        self._give_way(self._node.observe().version)
                        return
                    if whose == "mine":
                        if self._write(now >= resync_at):
                            resync_at = now + _RESYNC
                        if now >= self._sweep_at:
                            self._sweep_at = now + _SWEEP
                            self._sweep()
                self.kept_at = now
                told = ""
                if whose == "wait":
                    resync_at = 0.0  # who takes over writes, too
                    self._stop.wait(_YIELD)
                    continue
            except HitlessError as error:
                # What the maps hold is unsure now: everything is looked at, after a while.
                if error.message != told:
                    self._events.error(error)
                told = error.message
                resync_at = 0.0
                self._stop.wait(_RETRY)
            self._wait(min(glance_at, resync_at, self._sweep_at))

    def _wait(self, until: float) -> None:
        with self._heard:
            if not (self._whole or self._registry.has_news or self._stop.is_set()):
                self._heard.wait(max(until - time.monotonic(), 0))

    def _write(self, due: bool) -> bool:
        """Write what is new, or with ``due`` or after a whole word of a source everything; tells which of both."""
        with self._heard:
            whole, self._whole = due or self._whole, False
            is_news = self._registry.has_news
            news = self._registry.all() if whole else self._registry.take_news()
        changes = self._writer.resync(news) if whole else self._writer.write(news)
        if is_news or whole:
            self._tell_left_out()
        if is_news or changes:
            self._tell_config(changes)
        return whole

    def _tell_left_out(self) -> None:
        with self._heard:
            problems = self._registry.problems()
        known = set(self._problems)
        new = [problem for problem in problems if problem not in known]
        self._problems = problems
        for problem in new[:_TOLD]:
            self._events.tell("left-out", message=problem)
        if len(new) > _TOLD:
            self._events.tell("left-out", message=f"and {len(new) - _TOLD} more services are left out")

    def _look_at_node(self) -> None:
        if not self._settled:
            return
        version = None
        if self._node.root.exists():
            try:
                with self._node.lock(0):
                    version = self._node.observe().version
            except BusyError:
                return  # somebody upgrades it: what comes of that is seen next time
            except FileNotFoundError:
                pass  # unloaded in between
        if version != self._release.version:
            self._give_way(version)

    def _give_way(self, version: str | None) -> None:
        self.successor = version
        self.superseded = True
        self._events.tell("superseded", version=version)

    def _tell_config(self, changes: Changes) -> None:
        with self._heard:
            counts = self._registry.counts()
        self._events.tell(
            "config", **counts, added=changes.added, changed=changes.changed, removed=changes.removed
        )

    def _sweep(self) -> None:
        count = sweep_flows(self._node)
        if count:
            self._events.tell("swept", flows=count)


def _backends(services: Iterable[Service]) -> bool:
    return any(service.backends for service in services)


class _Ear:
    """The keeper as one source knows it: see :class:`Sink`."""

    def __init__(self, keeper: Keeper, source: Source) -> None:
        self._keeper = keeper
        self._source = source

    def replace(self, config: Config) -> None:
        self._keeper.hear(self._source, config)

    def update(self, services: Mapping[str, Service | None]) -> None:
        self._keeper.hear_of(self._source, services)

    def trouble(self, error: HitlessError) -> None:
        self._keeper.hear_trouble(self._source, error)
