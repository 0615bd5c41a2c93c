"""The lock between writers in several processes and the commit of an upgrade.

    root/writers/             held shared around each write, and alone around the last merge and the exchange
    root/writers/turnstile/   passed by each writer on its way in; shut by an upgrade that waits for its turn

A shared flock is granted whoever waits, so writers that never rest would keep an upgrade out for ever: behind the
closed turnstile no more come in, and those inside leave. The kernel frees what a process holds when it dies.
The directories are made by the first apply, stay where they are when generations change places, and go with unload.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hitless.errors import BusyError, NodeError
from hitless.kernel.bpffs import make_directory
from hitless.kernel.libbpf import system_call
from hitless.kernel.processes import lock_holder, who

__all__ = ["WriterLock"]

_PAUSE = 0.0002  # s between tries to be alone: what waits meanwhile are writers


class WriterLock:
    """The lock in ``directory``; ``with`` it, a writer keeps the generation from changing.

    Not for several threads at once, which :class:`~hitless.upgrade.handle.Access` sees to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._turnstile = directory / "turnstile"
        self._room_fd = self._turnstile_fd = -1
        self._is_alone = False
        _all.add(self)

    def make(self) -> None:
        """Make the directories, if they are not there."""
        make_directory(self.directory, exist_ok=True)
        make_directory(self._turnstile, exist_ok=True)

    def remove(self) -> None:
        """Remove the directories."""
        for directory in (self._turnstile, self.directory):
            if directory.exists():
                directory.rmdir()

    def renew(self) -> None:
        """Make sure that what is held open is the directory that is there now. Raises NodeError if none is."""
        try:
            there = self.directory.stat().st_ino
            if self._room_fd >= 0 and os.fstat(self._room_fd).st_ino == there:
                return
            self.close()
            self._turnstile_fd = os.open(self._turnstile, os.O_RDONLY | os.O_DIRECTORY)
            self._room_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise NodeError(
                f"{self.directory} is not there, so writes cannot be kept apart from an upgrade: the root was "
                "unloaded, or a hitless from before there were writers' locks made it; apply a release to it",
                path=str(self.directory),
            ) from None

    def close(self) -> None:
        """Let go of the directories; the next use opens them again."""
        for descriptor in (self._turnstile_fd, self._room_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._turnstile_fd = self._room_fd = -1

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> None:
        if self._is_alone:
            raise BusyError(
                "a write from within the commit of an interrupted upgrade, by the thread that finishes it, would "
                "reach the old release only; write when recover or apply has returned",
                path=str(self.directory),
                pid=os.getpid(),
            )
        if self._room_fd < 0:
            self.renew()
        try:
            with system_call("flock", self.directory):
                fcntl.flock(self._turnstile_fd, fcntl.LOCK_SH)
                fcntl.flock(self._room_fd, fcntl.LOCK_SH)
        except BaseException:  # an interrupt while it waited
            self._unlock(self._room_fd)
            raise
        finally:
            self._unlock(self._turnstile_fd)

    def __exit__(self, *_: object) -> None:
        self._unlock(self._room_fd)

    def _unlock(self, *descriptors: int) -> None:
        try:
            for descriptor in descriptors:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        except OSError:
            self.close()  # which frees them too: what was done under the lock is done, and nobody must wait for ever

    @contextmanager
    def alone(self, seconds: float) -> Iterator[None]:
        """Keep all writers out, after waiting up to ``seconds`` for those that are writing. Raises BusyError."""
        self.renew()
        deadline = time.monotonic() + seconds
        try:
            self._shut(self._turnstile_fd, self._turnstile, deadline, seconds)
            self._shut(self._room_fd, self.directory, deadline, seconds)
            self._is_alone = True
            yield
        finally:
            self._is_alone = False
            self._unlock(self._room_fd, self._turnstile_fd)

    def _shut(self, descriptor: int, path: Path, deadline: float, seconds: float) -> None:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                    with system_call("flock", path):
                        raise
            if time.monotonic() > deadline:
                pid = lock_holder(path)
                raise BusyError(
                    f"{who(pid)} has been writing to the maps of {self.directory.parent} for {seconds:g} s without an "
                    "end, and an upgrade cannot commit meanwhile; let it go on or end it, then apply again",
                    path=str(self.directory.parent),
                    pid=pid,
                )
            time.sleep(_PAUSE)


_all: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _forked() -> None:
    # A lock belongs to the open directory, which a child shares: it would hold what its parent held, and undo it.
    for lock in list(_all):
        lock.close()


os.register_at_fork(after_in_child=_forked)
