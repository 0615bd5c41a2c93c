"""Follow the services file: whenever it changes, bring the maps to what it says, in a thread of its own."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import hitless
from hitless.errors import BusyError, HitlessError
from meshd import config
from meshd.config import Config, ConfigError
from meshd.desired import desired
from meshd.events import Events
from meshd.reconcile import Changes, reconcile, sweep_flows
from meshd.releases import Release

__all__ = ["Follower"]

_POLL = 0.05  # s between looks at the services file
_GLANCE = 1.0  # s between looks at the live release, and at clients' cgroups, which may be made anew under their path
_RESYNC = 10.0  # s between looks at maps and file even if nothing seems to have changed
_RETRY = 1.0  # s until what failed is tried again
_SWEEP_FIRST = 0.5  # s after an upgrade, from when on nothing brings back what is over
_SWEEP = 10.0  # s

_Signature = tuple[int, int, int]


class Follower:
    """Keeps the maps of ``node`` as the services file at ``path`` says.

    A file that is wrong changes nothing: the configuration before it stays, and an event says what is wrong with
    it. Stops by itself when another release than ``release`` turns out to be live, since its maps are not ours to
    write: then ``superseded`` is true.
    """

    def __init__(
        self, node: hitless.Node, release: Release, cgroup: Path, path: Path, events: Events, stop: threading.Event
    ) -> None:
        self.superseded = False
        self._node = node
        self._release = release
        self._cgroup = cgroup
        self._path = path
        self._events = events
        self._stop = stop
        self._config = Config(())
        self._text: str | None = None
        self._wrong = ""  # message about the file as it is now
        self._signature: _Signature | None = None
        self._unsettled: _Signature | None = None
        self._settled = False
        self._sweep_at = float("inf")
        self._pool = ThreadPoolExecutor(1, "follower")
        self._thread: Future[None] | None = None

    def load(self) -> None:
        """Read the services file for the first time. Raises ConfigError."""
        self._signature = _signature(self._path)
        self._text = config.read(self._path)
        self._config = config.parse(self._text, str(self._path), self._release, self._cgroup)

    def reconcile(self) -> None:
        """Bring the maps to the configuration. Raises HitlessError."""
        changes = reconcile(self._node, desired(self._config, self._release))
        self._tell_config(changes)

    def start(self) -> None:
        """Begin to follow, until the stop event is set."""
        self._thread = self._pool.submit(self._follow)

    def upgraded(self) -> None:
        """Say that the upgrade is done, so that what it leaves behind may be swept."""
        self._sweep_at = time.monotonic() + _SWEEP_FIRST
        self._settled = True

    def ended(self) -> bool:
        """Whether following ended before it was told to."""
        return self._thread is not None and self._thread.done()

    def finish(self) -> None:
        """Wait for the thread's end, after the stop event was set. Raises what ended it, if that was a mistake."""
        self._pool.shutdown()
        if self._thread is not None:
            self._thread.result()

    def _follow(self) -> None:
        sync_at = glance_at = 0.0
        told = ""
        while not self._stop.wait(_POLL):
            now = time.monotonic()
            due = self._changed() or now >= sync_at
            glance = now >= glance_at
            try:
                if glance:
                    glance_at = now + _GLANCE
                    due = due or self._cgroups_moved()
                if due or glance:
                    self._look_at_node()
                if self.superseded:
                    return
                if due:
                    self._sync()
                    sync_at = now + _RESYNC
                if now >= self._sweep_at:
                    self._sweep_at = now + _SWEEP
                    self._sweep()
                told = ""
            except HitlessError as error:
                sync_at = now + _RETRY
                if error.message != told:
                    self._events.error(error)
                told = error.message

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
            self.superseded = True
            self._events.tell("superseded", version=version)

    def _sync(self) -> None:
        """Take over the file and put the maps right."""
        loaded = self._reload()
        changes = reconcile(self._node, desired(self._config, self._release))
        if loaded or changes:
            self._tell_config(changes)

    def _tell_config(self, changes: Changes) -> None:
        self._events.tell(
            "config",
            services=len(self._config.services),
            policies=len(self._config.policies),
            added=changes.added,
            changed=changes.changed,
            removed=changes.removed,
        )

    def _reload(self) -> bool:
        """Read the file again if it or the clients' cgroups changed; tell whether there is a new configuration."""
        try:
            text = config.read(self._path)
            if text == self._text and not self._wrong and not self._cgroups_moved():
                return False
            found = config.parse(text, str(self._path), self._release, self._cgroup)
        except ConfigError as error:
            if error.message != self._wrong:
                self._events.tell("config-error", message=error.message, **error.facts)
            self._wrong = error.message
            return False
        changed = text != self._text or found != self._config
        self._text, self._config, self._wrong = text, found, ""
        return changed

    def _sweep(self) -> None:
        count = sweep_flows(self._node)
        if count:
            self._events.tell("swept", flows=count)

    def _changed(self) -> bool:
        seen = _signature(self._path)
        if seen == self._signature:
            return False
        if seen and self._signature and seen[0] == self._signature[0] and seen != self._unsettled:
            # Written in place, so perhaps not to its end: a part of a list can be a valid file.
            self._unsettled = seen
            return False
        self._signature = seen
        return True

    def _cgroups_moved(self) -> bool:
        return any(one.cgroup and _id_or_none(one.cgroup) != one.source for one in self._config.policies)


def _signature(path: Path) -> _Signature | None:
    try:
        seen = path.stat()
    except OSError:
        return None  # reading it will say why
    return seen.st_ino, seen.st_mtime_ns, seen.st_size


def _id_or_none(path: Path) -> int | None:
    try:
        return config.cgroup_id(path)
    except OSError:
        return None
