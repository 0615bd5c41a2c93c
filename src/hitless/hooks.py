"""The hooks that a manifest can name: what they are attached to, and which programs fit. Pure.

The kernel checks little of that: a link of connect4 takes a program of connect6, and traffic hangs.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from hitless.layout.model import ProgramSpec

__all__ = ["HOOKS", "HookKind"]


class HookKind(msgspec.Struct, frozen=True):
    """A hook ``on`` some kind of target, for programs of type ``program`` (empty: any) with one of ``attach_types``.

    An attach type that ends in ``_`` stands for all that begin so. ``attaches`` is the attach type of the link if the
    hook decides that and not the program, as for tcx, whose programs are all alike. ``linked`` says whether a link
    holds the program there, or the target itself does.
    """

    on: Literal["cgroup", "interface", "map", "netns"]
    program: str
    attach_types: tuple[str, ...]
    attaches: str = ""
    linked: bool = True

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
    "sk_lookup": HookKind("netns", "sk_lookup", ("sk_lookup",)),
    "sk_msg": HookKind("map", "sk_msg", ("sk_msg_verdict",)),
    "sk_skb": HookKind("map", "sk_skb", ("sk_skb_stream_parser", "sk_skb_stream_verdict", "sk_skb_verdict")),
    "tc-egress": HookKind("interface", "sched_cls", ("", "tcx_egress"), "tc_egress", linked=False),
    "tc-ingress": HookKind("interface", "sched_cls", ("", "tcx_ingress"), "tc_ingress", linked=False),
    "tcx-egress": HookKind("interface", "sched_cls", ("", "tcx_egress"), "tcx_egress"),
    "tcx-ingress": HookKind("interface", "sched_cls", ("", "tcx_ingress"), "tcx_ingress"),
    "xdp": HookKind("interface", "xdp", ("xdp",)),
    "xdp-netlink": HookKind("interface", "xdp", ("xdp",), "xdp_netlink", linked=False),
}
"""By their names in a manifest, where ``xdp-netlink`` is ``xdp`` with ``by = "netlink"``."""
