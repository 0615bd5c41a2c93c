"""Network interfaces of a namespace, by name or pattern."""

from __future__ import annotations

import errno
import fnmatch
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from hitless.errors import GoneError, KernelError, NodeError
from hitless.kernel.libbpf import system_call
from hitless.kernel.namespaces import Namespace, entered

__all__ = ["Interface", "interfaces"]


class Interface(msgspec.Struct, frozen=True):
    """One interface: its name when it was found, and its index, which the namespace gives to no other after it."""

    name: str
    index: int
    namespace: Namespace

    def __str__(self) -> str:
        return f"interface {self.name} of {self.namespace}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread be in the interface's namespace; ENODEV in the block says that the interface is gone.

        Raises GoneError, NodeError as :func:`hitless.kernel.namespaces.entered`.
        """
        with entered(self.namespace):
            try:
                yield
            except KernelError as error:
                if error.facts["errno"] != errno.ENODEV:
                    raise
                raise GoneError(
                    f"{self} (index {self.index}) is not there any more: it was removed, or moved to another namespace",
                    interface=self.name,
                    index=self.index,
                    namespace=self.namespace.path,
                ) from error


def interfaces(pattern: str, namespace: Namespace) -> tuple[Interface, ...]:
    """Those of ``namespace`` whose names match ``pattern``, by index; a name without ``*``, ``?``, ``[`` must exist.

    An alternative name (`ip link property`) is found if it is given in full. Raises NodeError; GoneError if the
    namespace is not there any more.
    """
    with entered(namespace):  # and not /sys/class/net, which shows the namespace that /sys was mounted in
        if any(sign in pattern for sign in "*?["):
            with system_call("RTM_GETLINK", f"interfaces of {namespace}"):
                found = sorted((index, name) for index, name in socket.if_nameindex())
            matching = ((index, name) for index, name in found if fnmatch.fnmatchcase(name, pattern))
            return tuple(Interface(name, index, namespace) for index, name in matching)
        try:
            return (Interface(pattern, socket.if_nametoindex(pattern), namespace),)
        except OSError:  # it says nothing more
            raise NodeError(
                f"interface {pattern} of {namespace} is not there; see `ip link` for those that are, and correct the "
                "target",
                interface=pattern,
                namespace=namespace.path,
            ) from None
