"""XDP programs attached by netlink, as `ip link` does it: no link holds them, the interface does."""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import msgspec

from hitless.errors import GoneError, KernelError, NodeError
from hitless.kernel.interfaces import Interface
from hitless.kernel.libbpf import check, ffi, lib, libc, options
from hitless.kernel.programs import Program
from hitless.kernel.rtnetlink import ask, attributes, request

__all__ = ["Mode", "Xdp", "XdpInfo", "quick"]

Mode = Literal["native", "generic"]

_IF_NONE = 1 << 0  # XDP_FLAGS_UPDATE_IF_NOEXIST

_GET_LINK = 18  # RTM_
_IFINFOMSG = struct.Struct("=BxHiII")  # family, type, interface, flags, changed
_XDP = 43  # IFLA_
# XDP_FLAGS_DRV_MODE and IFLA_XDP_DRV_PROG_ID, XDP_FLAGS_SKB_MODE and IFLA_XDP_SKB_PROG_ID
_MODES: dict[Mode, tuple[int, int]] = {"native": (1 << 2, 5), "generic": (1 << 1, 6)}
_CLONE_NEWNET = 0x40000000
_LOOPBACK = 1  # its index in every namespace
_BPF_XDP = 37  # attach type


class XdpInfo(msgspec.Struct, frozen=True):
    """What runs on an interface in one mode, attached by netlink or a link. ``target_id`` is the interface's index.

    ``program_id`` is 0 if nothing does; so is ``target_id`` if the interface is gone.
    """

    program_id: int
    target_id: int
    attach_type: Mode
    type: str = "xdp"

    @property
    def is_dead(self) -> bool:
        """Whether nothing runs there: somebody detached the program, or removed the interface."""
        return self.program_id == 0


class Xdp(msgspec.Struct, frozen=True):
    """The place of one XDP program: an interface, and ``native`` (in the driver) or ``generic`` (after it)."""

    interface: Interface
    mode: Mode

    def __str__(self) -> str:
        return f"{self.mode} XDP on {self.interface}"

    @classmethod
    def attach(cls, program: Program, interface: Interface, mode: Mode) -> Xdp:
        """Attach ``program`` where nothing is attached.

        Raises NodeError if something is, GoneError if the interface is not there any more, KernelError (EOPNOTSUPP of
        a driver that knows no native XDP).
        """
        made = cls(interface, mode)
        made._change(program.fd, _IF_NONE)
        return made

    @classmethod
    def find(cls, interface: Interface) -> Xdp | None:
        """Where on ``interface`` something runs now; the kernel has no two modes at a time. Raises GoneError."""
        with interface.entered():
            return next((place for mode in _MODES if not (place := cls(interface, mode))._look().is_dead), None)

    @property
    def info(self) -> XdpInfo:
        """What runs there now. Raises KernelError, NodeError."""
        try:
            with self.interface.entered():
                return self._look()
        except GoneError:
            return XdpInfo(0, 0, self.mode)

    def update(self, new: Program, old: Program) -> None:
        """Run ``new`` from now on, if ``old`` runs there now (compare-and-swap): each packet is seen by one of the two.

        Takes some 10 ms if ``new`` was attached nowhere before, or ``old`` is nowhere after; see :func:`quick`. Raises
        NodeError if something else runs there, or a link holds it; GoneError if the interface is not there any more;
        KernelError.
        """
        self._change(new.fd, 0, old)

    def is_linked(self, runs: Program) -> bool:
        """Whether a link holds ``runs`` here, which netlink then does not replace. Raises as :meth:`update`.

        It is asked to replace the program by itself: the kernel changes nothing then, and refuses it under a link.
        """
        opts = options("bpf_xdp_attach_opts", old_prog_fd=runs.fd)
        with self.interface.entered():
            try:
                request("bpf_xdp_attach", self, self.interface.index, runs.fd, _MODES[self.mode][0], opts)
            except KernelError as error:
                if error.facts["errno"] != errno.EBUSY:
                    raise
                return True
        return False

    def detach(self, old: Program) -> None:
        """Run nothing there from now on, if ``old`` runs there now (compare-and-swap). Raises as :meth:`update`."""
        self._change(-1, 0, old)

    def _look(self) -> XdpInfo:
        message = _IFINFOMSG.pack(0, 0, self.interface.index, 0, 0)
        answer = ask(_GET_LINK, message, "RTM_GETLINK", self)
        xdp = attributes(attributes(answer[_IFINFOMSG.size :]).get(_XDP, b""))
        program = int.from_bytes(xdp.get(_MODES[self.mode][1], b""), sys.byteorder)
        return XdpInfo(program, self.interface.index, self.mode)

    def _change(self, fd: int, flags: int, old: Program | None = None) -> None:
        opts = options("bpf_xdp_attach_opts", old_prog_fd=old.fd) if old else ffi.NULL  # it adds XDP_FLAGS_REPLACE
        with self.interface.entered():
            try:
                request("bpf_xdp_attach", self, self.interface.index, fd, _MODES[self.mode][0] | flags, opts)
            except KernelError as error:
                if error.facts["errno"] not in (errno.EBUSY, errno.EEXIST):
                    raise
                raise self._unexpected(old, error) from error

    def _unexpected(self, old: Program | None, error: KernelError) -> NodeError:
        place = Xdp.find(self.interface)
        running = place.info.program_id if place else 0
        facts = {
            "interface": self.interface.name,
            "namespace": self.interface.namespace.path,
            "program": running,
            "expected": old.info.id if old else 0,
        }
        if old and not place:
            return GoneError(f"{self}: nothing runs there any more; somebody detached program {old.info.id}", **facts)
        said = error.facts["said"] or error.message
        what = f"not {old.info.id} as expected" if old and running != old.info.id else "and is not to be replaced so"
        return NodeError(
            f"{place or self} runs program {running}, {what}: {said}; look at who attached it (bpftool net, "
            "bpftool link), then plan again",
            **facts,
        )


@contextmanager
def quick(programs: Sequence[Program]) -> Iterator[None]:
    """While the block runs, an interface goes from one of ``programs`` to another in microseconds, not some 10 ms.

    That is for links and netlink alike. The kernel calls XDP programs by a list of all that are attached anywhere (its
    dispatcher), and waits for RCU when one enters or leaves that list, not when an interface changes its program. So
    each is attached here to the loopback of an empty network namespace of its own, which goes with this process if it
    is killed. Entering the block and leaving it wait. Raises KernelError.
    """
    held: list[int] = []

    def hold() -> None:
        for program in programs:
            check(libc().unshare(_CLONE_NEWNET), "unshare", "a network namespace of its own")
            held.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            fd = lib().bpf_link_create(program.fd, _LOOPBACK, _BPF_XDP, ffi.NULL)
            held.append(check(fd, "BPF_LINK_CREATE", f"xdp program {program.info.name} on a loopback interface"))

    try:
        with ThreadPoolExecutor(1) as thread:  # it ends in the last of the namespaces, and needs no way back
            thread.submit(hold).result()
        yield
    finally:
        for fd in reversed(held):
            os.close(fd)
