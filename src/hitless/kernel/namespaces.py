"""Network namespaces: found by path, known by inode, entered by one thread for as long as a block runs."""

from __future__ import annotations

import fcntl
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hitless.errors import GoneError, NodeError
from hitless.kernel.libbpf import check, ffi, libc

__all__ = ["Namespace", "entered", "namespaces"]

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_HERE = Path("/proc/thread-self/ns/net")
_OWN = Path("/proc/self/ns/net")


class Namespace(msgspec.Struct, frozen=True):
    """One network namespace: the ``path`` it was found at, "" for this process's own, and which one was there.

    It is not held: a namespace that its last process and mount leave goes, as if hitless had never seen it.
    """

    path: str
    device: int
    inode: int

    def __str__(self) -> str:
        return f"network namespace {self.path}" if self.path else "this network namespace"

    @classmethod
    def at(cls, path: str) -> Namespace:
        """The namespace at ``path``, as ``/run/netns/NAME`` or ``/proc/PID/ns/net``; "" is this process's own.

        Raises GoneError if nothing is there, NodeError if it is no network namespace or may not be opened.
        """
        found = _look(path)
        if found is None:
            raise NodeError(
                f"{path} is no network namespace: `ip netns add` makes an empty file, then mounts one there, which a "
                "container sees only if its mounts follow the host's (mountPropagation: HostToContainer)",
                namespace=path,
            )
        return found


@contextmanager
def entered(namespace: Namespace) -> Iterator[None]:
    """Let this thread be in ``namespace`` while the block runs; other threads stay where they are.

    Nothing is switched if it is there already, so that blocks of one namespace cost next to nothing inside each other.
    Sockets made inside belong to it for good. ``/sys`` does not change: it shows the namespace it was mounted in.
    Raises GoneError if the namespace is not there any more, NodeError if it may not be entered.
    """
    wanted = namespace.device, namespace.inode
    before = _identity(_HERE.stat())
    if before == wanted:
        yield
        return
    try:
        # What took the place of a namespace may be anything.
        fd = os.open(namespace.path or _OWN, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _trouble(namespace.path, error) from None
    try:
        if _identity(os.fstat(fd)) != wanted:
            raise GoneError(f"{namespace} is gone; another file or namespace took its place", namespace=namespace.path)
        home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # An interrupt may come after any instruction: it must find this thread on its way back.
            try:
                if libc().setns(fd, _CLONE_NEWNET):
                    raise _trouble(namespace.path, OSError(ffi.errno, os.strerror(ffi.errno)))
                yield
            finally:
                if _identity(_HERE.stat()) != before:
                    check(libc().setns(home, _CLONE_NEWNET), "setns", "the network namespace this thread came from")
        finally:
            os.close(home)
    finally:
        os.close(fd)


def namespaces(pattern: str) -> tuple[Namespace, ...]:
    """The network namespaces whose paths match ``pattern``, each once however many paths lead there; "" is our own.

    A path without ``*``, ``?`` and ``[`` must be a namespace. Of those that a pattern matches, files that are none are
    left out, as `ip netns add` makes the file first, and so is what goes away meanwhile; but if it matches such files
    alone, that is an error: a container whose mounts do not follow the host's sees just that. No match at all is
    none. Raises NodeError, which names the path, also for a namespace that this process may not look at.
    """
    if not any(sign in pattern for sign in "*?[") or Path(pattern).exists():
        return (Namespace.at(pattern),)
    found: dict[tuple[int, int], Namespace] = {}
    others = []
    for path in sorted(glob.glob(pattern)):  # noqa: PTH207 - Path.glob fails on patterns that a user may write
        try:
            namespace = _look(path)
        except GoneError:
            continue
        if namespace is None:
            others.append(path)
        else:
            found.setdefault((namespace.device, namespace.inode), namespace)
    if others and not found:
        return (Namespace.at(others[0]),)
    return tuple(found.values())


def _look(path: str) -> Namespace | None:
    """The namespace at ``path``, None if something else is there."""
    place = Path(path or _OWN)
    try:
        # All namespaces are on one file system of the kernel's own. Another file is not opened to see what it is:
        # opening some has effects.
        if place.stat().st_dev != _OWN.stat().st_dev:
            return None
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _trouble(path, error) from None
    try:
        if fcntl.ioctl(fd, _NS_GET_NSTYPE) != _CLONE_NEWNET:
            return None
        return Namespace(path, *_identity(os.fstat(fd)))
    finally:
        os.close(fd)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _trouble(path: str, error: OSError) -> NodeError:
    if isinstance(error, FileNotFoundError | ProcessLookupError):
        return GoneError(f"network namespace {path} is not there; see `ip netns` and `lsns -t net`", namespace=path)
    if isinstance(error, PermissionError):
        return NodeError(
            f"network namespace {path} may not be entered: {error.strerror}; run as root with CAP_SYS_ADMIN in the "
            "user namespace that owns it, or leave it out of the manifest",
            namespace=path,
        )
    return NodeError(f"network namespace {path} cannot be opened: {error.strerror}", namespace=path)
