"""Programs of netfilter: run for the packets of one network namespace, at one point of their way, by priority.

The kernel cannot exchange the program of such a link (BPF_LINK_UPDATE: EOPNOTSUPP), and shows a packet to one program
for each priority: a second one beside the first would see the same packets, or be refused.
"""

from __future__ import annotations

import errno

from hitless.errors import KernelError
from hitless.hooks import FAMILIES, POINTS, NetfilterPoint
from hitless.kernel.libbpf import ffi
from hitless.kernel.links import Link, all_links, create_link
from hitless.kernel.names import attach_number
from hitless.kernel.programs import Program

__all__ = ["attach_netfilter"]


def attach_netfilter(program: Program, point: NetfilterPoint) -> Link:
    """Let ``program`` run at ``point`` of the network namespace that this thread is in.

    Raises KernelError (EBUSY: another one has the priority, EINVAL: the priority is none, or the point is not known).
    """
    wanted = ffi.new("struct netfilter_link_create *")
    wanted.prog_fd, wanted.attach_type = program.fd, attach_number("netfilter")
    wanted.pf, wanted.hooknum, wanted.priority = FAMILIES[point.family], POINTS.index(point.point), point.priority
    try:
        return create_link(wanted, f"netfilter {point}")
    except KernelError as error:
        if error.facts["errno"] != errno.EBUSY:
            raise
        there = [link.id for link in all_links() if link.attach_type == f"netfilter {point}"]
        links = f" (one of the links {', '.join(map(str, there))}: bpftool link show)" if there else ""
        raise KernelError(
            f"{error.message}; another program has this priority{links}: choose another priority, or let who attached "
            "it take it off",
            **error.facts,
        ) from error
