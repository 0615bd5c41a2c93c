"""The source that is a services file: looked at twenty times a second, taken over when it is whole and right."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from meshd import config
from meshd.config import ConfigError
from meshd.model import Config
from meshd.releases import Release
from meshd.sources import Sink

__all__ = ["FileSource"]

_POLL = 0.05  # s between looks at the file
_GLANCE = 1.0  # s between looks at clients' cgroups, which may be made anew under their path
_RESYNC = 10.0  # s between readings of the file even if nothing seems to have changed

_Signature = tuple[int, int, int]


class FileSource:
    """The services file at ``path``: see :class:`Source`.

    A file that is wrong changes nothing. Clients' cgroups are looked up under ``cgroup``. If other sources have
    services too (``alone`` is false), its policies may name theirs.
    """

    name = "file"
    may_be_empty = True

    def __init__(self, path: Path, release: Release, cgroup: Path, alone: bool = True) -> None:
        self._path = path
        self._release = release
        self._cgroup = cgroup
        self._alone = alone
        self._config = Config(())
        self._text: str | None = None
        self._wrong = ""  # message about the file as it is now
        self._signature: _Signature | None = None
        self._unsettled: _Signature | None = None

    def load(self) -> Config:
        """Read the file for the first time. Raises ConfigError."""
        self._signature = _signature(self._path)
        self._text = config.read(self._path)
        self._config = self._parse(self._text)
        return self._config

    def follow(self, sink: Sink, stop: threading.Event) -> None:
        """See :class:`Source`."""
        glance_at = resync_at = 0.0
        while not stop.wait(_POLL):
            now = time.monotonic()
            changed = self._changed()
            due = changed or now >= resync_at
            if now >= glance_at:
                glance_at = now + _GLANCE
                due = due or self._cgroups_moved()
            if due:
                resync_at = now + _RESYNC
                self._read(sink, changed)

    def _read(self, sink: Sink, touched: bool) -> None:
        """Read the file again and hand it on if it or the clients' cgroups changed, or somebody ``touched`` it."""
        try:
            text = config.read(self._path)
            if text == self._text and not (self._wrong or touched or self._cgroups_moved()):
                return
            found = self._parse(text)
        except ConfigError as error:
            if error.message != self._wrong:
                sink.trouble(error)
            self._wrong = error.message
            return
        self._text, self._config, self._wrong = text, found, ""
        sink.replace(found)

    def _parse(self, text: str) -> Config:
        return config.parse(text, str(self._path), self._release, self._cgroup, alone=self._alone)

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
