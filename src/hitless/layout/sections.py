"""What libbpf makes of an ELF section's name: the program type and where it attaches."""

from __future__ import annotations

__all__ = ["SECTIONS", "meant", "program_type"]

#: Section name -> (program type, attach type), names as in the kernel's enums, lower case. A name that ends in
#: ``+`` also stands for every ``name/anything``; the others match exactly. Longest match wins.
SECTIONS: dict[str, tuple[str, str]] = {
    "socket": ("socket_filter", ""),
    "sk_reuseport/migrate": ("sk_reuseport", "sk_reuseport_select_or_migrate"),
    "sk_reuseport": ("sk_reuseport", "sk_reuseport_select"),
    **{name + "+": ("kprobe", "") for name in (
        "kprobe", "kretprobe", "uprobe", "uprobe.s", "uretprobe", "uretprobe.s", "ksyscall", "kretsyscall", "usdt",
        "usdt.s",
    )},
    "kprobe.multi+": ("kprobe", "trace_kprobe_multi"),
    "kretprobe.multi+": ("kprobe", "trace_kprobe_multi"),
    "kprobe.session+": ("kprobe", "trace_kprobe_session"),
    **{name + "+": ("kprobe", "trace_uprobe_multi") for name in (
        "uprobe.multi", "uprobe.multi.s", "uretprobe.multi", "uretprobe.multi.s",
    )},
    "uprobe.session+": ("kprobe", "trace_uprobe_session"),
    "uprobe.session.s+": ("kprobe", "trace_uprobe_session"),
    "tc/ingress": ("sched_cls", "tcx_ingress"),
    "tc/egress": ("sched_cls", "tcx_egress"),
    "tcx/ingress": ("sched_cls", "tcx_ingress"),
    "tcx/egress": ("sched_cls", "tcx_egress"),
    "netkit/primary": ("sched_cls", "netkit_primary"),
    "netkit/peer": ("sched_cls", "netkit_peer"),
    "tc": ("sched_cls", ""),
    "classifier": ("sched_cls", ""),
    "action": ("sched_act", ""),
    "tracepoint+": ("tracepoint", ""),
    "tp+": ("tracepoint", ""),
    "raw_tracepoint+": ("raw_tracepoint", ""),
    "raw_tp+": ("raw_tracepoint", ""),
    "raw_tracepoint.w+": ("raw_tracepoint_writable", ""),
    "raw_tp.w+": ("raw_tracepoint_writable", ""),
    "tp_btf+": ("tracing", "trace_raw_tp"),
    "fentry+": ("tracing", "trace_fentry"),
    "fentry.s+": ("tracing", "trace_fentry"),
    "fexit+": ("tracing", "trace_fexit"),
    "fexit.s+": ("tracing", "trace_fexit"),
    "fmod_ret+": ("tracing", "modify_return"),
    "fmod_ret.s+": ("tracing", "modify_return"),
    "freplace+": ("ext", ""),
    "lsm+": ("lsm", "lsm_mac"),
    "lsm.s+": ("lsm", "lsm_mac"),
    "lsm_cgroup+": ("lsm", "lsm_cgroup"),
    "iter+": ("tracing", "trace_iter"),
    "iter.s+": ("tracing", "trace_iter"),
    "syscall": ("syscall", ""),
    "xdp": ("xdp", "xdp"),
    "xdp.frags": ("xdp", "xdp"),
    "xdp/devmap": ("xdp", "xdp_devmap"),
    "xdp.frags/devmap": ("xdp", "xdp_devmap"),
    "xdp/cpumap": ("xdp", "xdp_cpumap"),
    "xdp.frags/cpumap": ("xdp", "xdp_cpumap"),
    "perf_event": ("perf_event", ""),
    "lwt_in": ("lwt_in", ""),
    "lwt_out": ("lwt_out", ""),
    "lwt_xmit": ("lwt_xmit", ""),
    "lwt_seg6local": ("lwt_seg6local", ""),
    "sockops": ("sock_ops", "cgroup_sock_ops"),
    "sk_skb/stream_parser": ("sk_skb", "sk_skb_stream_parser"),
    "sk_skb/stream_verdict": ("sk_skb", "sk_skb_stream_verdict"),
    "sk_skb/verdict": ("sk_skb", "sk_skb_verdict"),
    "sk_skb": ("sk_skb", ""),
    "sk_msg": ("sk_msg", "sk_msg_verdict"),
    "sk_lookup": ("sk_lookup", "sk_lookup"),
    "lirc_mode2": ("lirc_mode2", "lirc_mode2"),
    "flow_dissector": ("flow_dissector", "flow_dissector"),
    "netfilter": ("netfilter", "netfilter"),
    "struct_ops+": ("struct_ops", ""),
    "struct_ops.s+": ("struct_ops", ""),
    "cgroup_skb/ingress": ("cgroup_skb", "cgroup_inet_ingress"),
    "cgroup_skb/egress": ("cgroup_skb", "cgroup_inet_egress"),
    "cgroup/skb": ("cgroup_skb", ""),
    "cgroup/sock": ("cgroup_sock", "cgroup_inet_sock_create"),
    "cgroup/sock_create": ("cgroup_sock", "cgroup_inet_sock_create"),
    "cgroup/sock_release": ("cgroup_sock", "cgroup_inet_sock_release"),
    "cgroup/post_bind4": ("cgroup_sock", "cgroup_inet4_post_bind"),
    "cgroup/post_bind6": ("cgroup_sock", "cgroup_inet6_post_bind"),
    "cgroup/sysctl": ("cgroup_sysctl", "cgroup_sysctl"),
    "cgroup/getsockopt": ("cgroup_sockopt", "cgroup_getsockopt"),
    "cgroup/setsockopt": ("cgroup_sockopt", "cgroup_setsockopt"),
    "cgroup/dev": ("cgroup_device", "cgroup_device"),
    **{
        f"cgroup/{call}{suffix}": ("cgroup_sock_addr", f"cgroup_{family}_{attach}")
        for suffix, family in (("4", "inet4"), ("6", "inet6"), ("_unix", "unix"))
        for call, attach in (
            ("bind", "bind"), ("connect", "connect"), ("getpeername", "getpeername"), ("getsockname", "getsockname"),
        )
        if (call, suffix) != ("bind", "_unix")
    },
    **{
        f"cgroup/{call}{suffix}": ("cgroup_sock_addr", f"cgroup_{family}_{call}")
        for suffix, family in (("4", "udp4"), ("6", "udp6"), ("_unix", "unix"))
        for call in ("sendmsg", "recvmsg")
    },
}  # fmt: skip


def program_type(section: str) -> tuple[str, str]:
    """(program type, attach type) for a section name, or two empty strings if libbpf would not know it."""
    if section in SECTIONS:
        return SECTIONS[section]
    name = section.split("/", 1)[0]
    return SECTIONS.get(name + "+", ("", ""))


def meant(name: str) -> tuple[str, str] | None:
    """(program type, attach type) of what a person calls a type: a section's name, or a program type of the kernel.

    None if that is neither, or a program type that is attached in several ways, so that only a section's name tells.
    """
    if any(program_type(name)):
        return program_type(name)
    found = {pair for pair in SECTIONS.values() if pair[0] == name}
    return (name, "") if (name, "") in found else found.pop() if len(found) == 1 else None
