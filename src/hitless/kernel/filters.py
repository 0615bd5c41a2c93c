"""tc filters: programs in direct-action mode at the clsact queueing discipline of an interface, the way before tcx.

No descriptor holds a filter, and there is no compare-and-swap: the kernel replaces a filter whatever it runs.
"""

from __future__ import annotations

import errno
import itertools
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import msgspec

from hitless.errors import GoneError, KernelError, NodeError
from hitless.kernel.codegen import EXIT, MOV_IMM, R0, Assembler
from hitless.kernel.interfaces import Interface
from hitless.kernel.libbpf import check, libc, options
from hitless.kernel.programs import Program, load_code
from hitless.kernel.rtnetlink import ask, attributes, listed, request

__all__ = ["Direction", "Filter", "FilterInfo", "filters", "free_place", "probe_filters"]

Direction = Literal["ingress", "egress"]

_POINTS = {"ingress": 1, "egress": 2}  # BPF_TC_INGRESS, BPF_TC_EGRESS
_PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_CLSACT = 0xFFFFFFF1
_F_REPLACE = 1  # BPF_TC_F_REPLACE
_SCHED_CLS = 3  # BPF_PROG_TYPE_SCHED_CLS
_CLONE_NEWNET = 0x40000000
_LOOPBACK = 1  # its index in every network namespace

_GET_QDISC, _GET_FILTER = 38, 46  # RTM_
_TCMSG = struct.Struct("=BxxxiIII")  # family, interface, handle, parent, priority << 16 | protocol
_KIND, _OPTIONS, _CHAIN = 1, 2, 11  # TCA_
_NAME, _FLAGS, _ID = 7, 8, 11  # TCA_BPF_
_DIRECT_ACTION = 1
_FIRST_PRIORITY = 0xC000  # which the kernel chooses where nothing is
_IN_TURN = range(0x1000, 0x8000)  # people give lower numbers, and the kernel chooses higher ones
_ALL_PROTOCOLS = socket.htons(3)  # ETH_P_ALL


class FilterInfo(msgspec.Struct, frozen=True):
    """What the kernel says of one filter. ``target_id`` is the index of the interface.

    ``program_id`` is 0 if there is no such filter; so is ``target_id`` if the interface is gone. ``is_plain`` tells
    whether it is in direct-action mode, for all protocols and in chain 0: another would be another one replaced.
    """

    program_id: int
    target_id: int
    attach_type: Direction
    priority: int
    handle: int
    name: str = ""
    is_plain: bool = True
    type: str = "tc"

    @property
    def is_dead(self) -> bool:
        """Whether nothing runs there: somebody removed the filter, or its interface."""
        return self.program_id == 0


class Filter(msgspec.Struct, frozen=True):
    """One filter, known by where it is."""

    interface: Interface
    direction: Direction
    priority: int
    handle: int

    def __str__(self) -> str:
        where = f"{self.direction} of {self.interface}"
        return f"tc filter with priority {self.priority} and handle {self.handle:#x} at {where}"

    @classmethod
    def attach(
        cls, program: Program, interface: Interface, direction: Direction, priority: int = 0, handle: int = 0
    ) -> Filter:
        """Attach ``program`` beside the filters that are there; what is 0 is chosen by the kernel.

        The interface gets a clsact if it has none. Nothing of hitless removes that again, as another's filters would
        go with it. Raises NodeError if the place is taken, GoneError if the interface is, KernelError.
        """
        with interface.entered():
            _make_clsact(interface, direction)
            opts = options("bpf_tc_opts", prog_fd=program.fd, priority=priority, handle=handle)
            try:
                request("bpf_tc_attach", f"{direction} of {interface}", _hook(interface, direction), opts)
            except KernelError as error:
                if error.facts["errno"] != errno.EEXIST:
                    raise
                found = cls(interface, direction, priority, handle)
                raise NodeError(
                    f"{found} is there already and runs program {found._look().program_id}: somebody else attached it; "
                    "choose another priority, or remove it (tc filter del)",
                    interface=interface.name,
                    namespace=interface.namespace.path,
                ) from error
            return cls(interface, direction, opts.priority, opts.handle)

    @property
    def info(self) -> FilterInfo:
        """The filter's facts as they are now. Raises KernelError, NodeError."""
        try:
            with self.interface.entered():
                return self._look()
        except GoneError:
            return FilterInfo(0, 0, self.direction, self.priority, self.handle)

    def update(self, new: Program, old: Program) -> None:
        """Let the filter run ``new`` from now on, if it runs ``old`` now: each packet is seen by one of the two.

        It is looked at right before, some 20 us, since the kernel compares nothing: what another process attaches in
        that time in this filter's place is replaced. Raises NodeError if it runs something else, GoneError if the
        filter or its interface is not there any more, KernelError.
        """
        with self.interface.entered():
            self._require(old)
            opts = options("bpf_tc_opts", prog_fd=new.fd, flags=_F_REPLACE, priority=self.priority, handle=self.handle)
            request("bpf_tc_attach", self, _hook(self.interface, self.direction), opts)

    def detach(self, old: Program) -> None:
        """Remove the filter if it runs ``old``; looked at right before, as for :meth:`update`, and with its errors."""
        with self.interface.entered():
            self._require(old)
            opts = options("bpf_tc_opts", priority=self.priority, handle=self.handle)
            request("bpf_tc_detach", self, _hook(self.interface, self.direction), opts)

    def _look(self) -> FilterInfo:
        message = _TCMSG.pack(0, self.interface.index, self.handle, _PARENTS[self.direction], self.priority << 16)
        try:
            found = _filter(ask(_GET_FILTER, message, "RTM_GETTFILTER", self), self.direction)
        except KernelError as error:
            if error.facts["errno"] not in (errno.ENOENT, errno.EINVAL):  # no filter there; not even a clsact
                raise
            found = None
        return found or FilterInfo(0, self.interface.index, self.direction, self.priority, self.handle)

    def _require(self, old: Program) -> None:
        found = self._look()
        facts = {
            "interface": self.interface.name,
            "namespace": self.interface.namespace.path,
            "program": found.program_id,
            "expected": old.info.id,
        }
        if found.is_dead:
            raise GoneError(f"{self} is not there any more: somebody removed it; plan again", **facts)
        if found.program_id != old.info.id:
            raise NodeError(
                f"{self} runs program {found.program_id}, not {old.info.id} as expected: someone else changed it "
                "meanwhile; look at who uses this interface (tc filter show), then plan again",
                **facts,
            )
        if not found.is_plain:
            raise NodeError(
                f"{self} is not in direct-action mode for all protocols in chain 0: another attached it so, and a "
                "replacement would be; attach it anew (tc filter replace ... protocol all ... direct-action)",
                **facts,
            )


def filters(interface: Interface, direction: Direction) -> tuple[FilterInfo, ...]:
    """The programs that filters run at ``direction`` of ``interface``, in the order they run; others are left out.

    Raises GoneError if its namespace is not there any more; of an interface that is not, there are none.
    """
    with interface.entered():
        message = _TCMSG.pack(0, interface.index, 0, _PARENTS[direction], 0)
        answers = listed(_GET_FILTER, message, "RTM_GETTFILTER", f"filters at {direction} of {interface}")
    return tuple(info for answer in answers if (info := _filter(answer, direction)) is not None)


def free_place(
    interface: Interface, direction: Direction, priority: int = 0, handle: int = 0, in_turn: bool = False
) -> tuple[int, int]:
    """A priority and a handle that no filter has there; what is not 0 is taken as it is.

    As the kernel would, it chooses the priority before all others, and the first handle; or, ``in_turn``, one behind
    those that were chosen so before, as programs of tcx run, and before those that the kernel chose. Raises GoneError,
    NodeError if there is no lower priority.
    """
    with interface.entered():
        message = _TCMSG.pack(0, interface.index, 0, _PARENTS[direction], 0)
        answers = listed(_GET_FILTER, message, "RTM_GETTFILTER", f"filters at {direction} of {interface}")
    there = {(info >> 16, taken) for _, _, taken, _, info in map(_TCMSG.unpack_from, answers)}
    if not priority and in_turn:
        priority = max((other for other, _ in there if other in _IN_TURN), default=_IN_TURN[0] - 1) + 1
    if not priority:
        priority = min((other for other, _ in there), default=_FIRST_PRIORITY + 1) - 1
        if not priority:
            raise NodeError(
                f"{direction} of {interface} has a filter with priority 1, so none can be before it: give the priority "
                "in the manifest",
                interface=interface.name,
                namespace=interface.namespace.path,
            )
    return priority, handle or next(number for number in itertools.count(1) if (priority, number) not in there)


def _filter(answer: bytes, direction: Direction) -> FilterInfo | None:
    """What an RTM_NEWTFILTER says; None of another classifier, and of the head that each priority has."""
    _, index, handle, _, info = _TCMSG.unpack_from(answer)
    found = attributes(answer[_TCMSG.size :])
    inner = attributes(found.get(_OPTIONS, b""))
    if found[_KIND] != b"bpf\0" or _ID not in inner:
        return None
    chain = _number(found.get(_CHAIN, b""))
    return FilterInfo(
        program_id=_number(inner[_ID]),
        target_id=index,
        attach_type=direction,
        priority=info >> 16,
        handle=handle,
        name=inner.get(_NAME, b"").rstrip(b"\0").decode(errors="replace"),
        is_plain=bool(_number(inner.get(_FLAGS, b"")) & _DIRECT_ACTION)
        and info & 0xFFFF == _ALL_PROTOCOLS
        and chain == 0,
    )


def _make_clsact(interface: Interface, direction: Direction) -> None:
    hook = options("bpf_tc_hook", ifindex=interface.index, attach_point=_POINTS["ingress"] | _POINTS["egress"])
    try:
        request("bpf_tc_hook_create", f"clsact of {interface}", hook)
    except KernelError as error:
        if error.facts["errno"] != errno.EEXIST:
            raise
        message = _TCMSG.pack(0, interface.index, 0, _CLSACT, 0)
        answer = ask(_GET_QDISC, message, "RTM_GETQDISC", f"clsact of {interface}")
        kind = attributes(answer[_TCMSG.size :])[_KIND].rstrip(b"\0").decode()
        # The kernel takes a filter for egress there, and runs it at ingress.
        if kind != "clsact" and direction == "egress":
            raise NodeError(
                f"{interface} has the queueing discipline {kind} in the place of clsact, which has no egress; let who "
                f"made it use clsact, or remove it with its filters (tc qdisc del dev {interface.name} {kind})",
                interface=interface.name,
                namespace=interface.namespace.path,
            ) from error


def _hook(interface: Interface, direction: Direction) -> Any:
    return options("bpf_tc_hook", ifindex=interface.index, attach_point=_POINTS[direction])


def _number(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def probe_filters() -> None:
    """Attach a filter in a network namespace that is made for it, which goes with it. Raises KernelError."""
    with ThreadPoolExecutor(1) as alone:  # the namespace is one thread's
        alone.submit(_try).result()


def _try() -> None:
    check(libc().unshare(_CLONE_NEWNET), "unshare", "a network namespace (CLONE_NEWNET)")
    loopback = options("bpf_tc_hook", ifindex=_LOOPBACK, attach_point=_POINTS["ingress"])
    asm = Assembler()
    asm.emit(MOV_IMM, R0, imm=-1)  # TC_ACT_UNSPEC
    asm.emit(EXIT)
    with load_code(_SCHED_CLS, "probe", asm.code(), "a filter that does nothing") as program:
        request("bpf_tc_hook_create", "clsact of a loopback", loopback)
        request("bpf_tc_attach", "ingress of a loopback", loopback, options("bpf_tc_opts", prog_fd=program.fd))
