"""The hooks that a manifest can name: what they are attached to, and which programs fit. Pure.

The kernel checks little of that: a link of connect4 takes a program of connect6, and traffic hangs.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hitless.layout.model import ProgramSpec

__all__ = [
    "EVENTS", "FAMILIES", "HOOKS", "POINTS", "REFUSED", "SLEEPABLE", "SOCKMAP_LINK", "HookKind", "NetfilterPoint",
]  # fmt: skip

EVENTS = {
    "cpu-clock": (1, 0), "task-clock": (1, 1), "page-faults": (1, 2), "context-switches": (1, 3), "migrations": (1, 4),
    "minor-faults": (1, 5), "major-faults": (1, 6),
    "cycles": (0, 0), "instructions": (0, 1), "cache-references": (0, 2), "cache-misses": (0, 3), "branches": (0, 4),
    "branch-misses": (0, 5),
}  # fmt: skip
"""Perf events that can be sampled, with the kernel's numbers of their type and of what they count."""

SLEEPABLE = "barrier of sleepable programs"
"""A feature of the kernel: running programs that may sleep can be waited for."""

SOCKMAP_LINK = "sockmap link"
"""A feature of the kernel, since Linux 6.10: programs are attached to maps of sockets by links."""

FAMILIES = {"ipv4": 2, "ipv6": 10}
"""What netfilter programs may be for, with the kernel's number of it."""

POINTS = ("prerouting", "input", "forward", "output", "postrouting")
"""Where on its way netfilter shows a packet to programs; the index is the kernel's number of it."""


class NetfilterPoint(msgspec.Struct, frozen=True):
    """Where a netfilter program runs: its ``family`` and ``point``; of all there, those of lower ``priority`` first.

    The kernel takes one program for each priority (EBUSY), and refuses the first and the last (EINVAL).
    """

    family: str
    point: str
    priority: int

    def __str__(self) -> str:
        return f"{self.family} {self.point} {self.priority}"


class HookKind(msgspec.Struct, frozen=True):
    """A hook ``on`` some kind of target, for programs of type ``program`` (empty: any) with one of ``attach_types``.

    An attach type that ends in ``_`` stands for all that begin so. ``attaches`` is the attach type of the link if the
    hook decides that and not the program, as for tcx, whose programs are all alike. ``slot`` says that the kernel
    cannot exchange the program of such a link, or not for all who have it already: a dispatcher stays attached, and
    the slot that it jumps to is written. ``linked`` says whether a link holds the program there, or the target itself
    does.
    """

    on: Literal["cgroup", "interface", "cpu", "kernel", "map", "netns"]
    program: str
    attach_types: tuple[str, ...]
    attaches: str = ""
    slot: bool = False
    linked: bool = True

    @property
    def method(self) -> str:
        """How the program of a live hook is exchanged, in words."""
        if self.attach_types == ("trace_iter",):
            return "link in place; who is reading reads on by the old program"
        if self.program == "struct_ops":
            return "link in place; connections keep what they began with"
        if not self.linked:
            return "where it is, without a link"
        return "slot of its dispatcher" if self.slot else "link in place"

    def fits(self, program: ProgramSpec) -> bool:
        """Whether the program may be attached here."""
        if self.program and program.type != self.program:
            return False
        return any(
            program.attach_type.startswith(known) if known.endswith("_") else program.attach_type == known
            for known in self.attach_types
        )

    def attach_type(self, program: ProgramSpec) -> str:
        """The attach type of a link for the program."""
        return self.attaches or program.attach_type


HOOKS = {
    "cgroup": HookKind("cgroup", "", ("cgroup_",)),
    "flow_dissector": HookKind("netns", "flow_dissector", ("flow_dissector",)),
    "iter": HookKind("kernel", "tracing", ("trace_iter",)),
    "iter-cgroup": HookKind("cgroup", "tracing", ("trace_iter",)),
    "netfilter": HookKind("netns", "netfilter", ("netfilter",), slot=True),
    "perf_event": HookKind("cpu", "perf_event", ("",), slot=True),
    "raw_tracepoint": HookKind("kernel", "raw_tracepoint", ("",), slot=True),
    "sk_lookup": HookKind("netns", "sk_lookup", ("sk_lookup",)),
    "sk_msg": HookKind("map", "sk_msg", ("sk_msg_verdict",), slot=True),
    "sk_skb": HookKind("map", "sk_skb", ("sk_skb_stream_parser", "sk_skb_stream_verdict", "sk_skb_verdict"), slot=True),
    "struct_ops": HookKind("kernel", "struct_ops", ("struct_ops",)),
    "tc-egress": HookKind("interface", "sched_cls", ("", "tcx_egress"), "tc_egress", linked=False),
    "tc-ingress": HookKind("interface", "sched_cls", ("", "tcx_ingress"), "tc_ingress", linked=False),
    "tcx-egress": HookKind("interface", "sched_cls", ("", "tcx_egress"), "tcx_egress"),
    "tcx-ingress": HookKind("interface", "sched_cls", ("", "tcx_ingress"), "tcx_ingress"),
    "tp_btf": HookKind("kernel", "tracing", ("trace_raw_tp",), slot=True),
    "tracepoint": HookKind("kernel", "tracepoint", ("",), slot=True),
    "uprobe": HookKind("kernel", "kprobe", ("",), slot=True),
    "uretprobe": HookKind("kernel", "kprobe", ("",), slot=True),
    "xdp": HookKind("interface", "xdp", ("xdp",)),
    "xdp-netlink": HookKind("interface", "xdp", ("xdp",), "xdp_netlink", linked=False),
}
"""By their names in a manifest, where ``xdp-netlink`` is ``xdp`` with ``by = "netlink"``."""

REFUSED = {
    **dict.fromkeys(
        ("fentry", "fexit", "fmod_ret", "freplace", "lsm"),
        "the kernels that hitless was tried on refuse to load its programs (BPF_PROG_LOAD: EPERM)",
    ),
    **dict.fromkeys(
        ("kprobe", "kretprobe"), "the kernels that hitless was tried on were built without kprobes (CONFIG_KPROBES)"
    ),
}
"""Hooks that this version does not replace, by name, and why."""
