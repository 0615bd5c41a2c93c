"""Kmesh, from v0.5 on: where its loader pins and attaches, and what its maps hold that carry no types. Pure data.

Kept as facts by the names that its objects have: programs, sections, types, and maps by their role (what their name is
without ``map_of_``, ``kmesh_`` and ``km_``, and without underscores).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hitless.known import KnownHook

__all__ = [
    "ADS_ROLES", "BINDINGS", "DISPENSABLE", "GROUP", "HOOKS", "JUMPED", "LATER", "MODE_OBJECTS", "NOTES", "OBJECTS",
    "ONE_OF_A_KIND", "POINTING", "PUBLIC", "SCRATCH", "SECTIONS", "SOCKETS", "STRUCTURES", "STRUCTURES_ASK", "TABLES",
    "Table",
]  # fmt: skip

PUBLIC = {
    "maps": "map",
    "version_map": "kmesh_version",
    "snapshot": "/mnt/kmesh_mapspecs/mapspecs_by_prog.json",
}
"""The same in both modes; what these paths are relative to is ``bpf_kmesh_workload`` or ``bpf_kmesh``."""

OBJECTS = {
    "KmeshCgroupSkb": {"cgroup_skb_ingress_prog"},
    "KmeshSendmsg": {"sendmsg_prog"},
    "KmeshRecvmsg": {"recvmsg_prog"},
    "KmeshTcMarkEncrypt": {"tc_mark_encrypt"},
    "KmeshTcMarkDecrypt": {"tc_mark_decrypt"},
    "KmeshTracePoint": {"connect_ret"},
    "KmeshCgroupSock": {"cgroup_connect4_prog", "cluster_manager"},
    "KmeshSockops": {"sockops_prog", "cluster_manager"},
    "KmeshCgroupSockWorkload": {"cgroup_connect4_prog"},
    "KmeshSockopsWorkload": {"sockops_prog"},
    "KmeshXDPAuth": {"xdp_shutdown_in_userspace"},
    "KmeshTcWorkload": {"tc_prog"},
}
"""Names that its snapshots have for objects, with programs that only that one of them holds; the first match counts."""

MODE_OBJECTS = {
    "workload": {
        "KmeshCgroupSockWorkload", "KmeshSockopsWorkload", "KmeshXDPAuth", "KmeshSendmsg", "KmeshRecvmsg",
        "KmeshCgroupSkb", "KmeshTcWorkload",
    },
    "ads": {"KmeshCgroupSock", "KmeshSockops", "KmeshTracePoint"},
}  # fmt: skip
"""Those that belong to one mode only."""

ADS_ROLES = frozenset({"listener", "cluster", "clusterstats", "clustersock", "routerconfig"})
"""Roles of maps that only kernel-native mode has."""

SECTIONS = {
    "xdp_auth": "xdp",
    "tc_ingress": "tc",
    "tc_egress": "tc",
}
"""What programs are whose section libbpf does not know."""

DISPENSABLE = {
    "cgroup_connect6_prog": "newer kernels refuse it, since it jumps through the same program array as connect4",
}
"""Programs that a release can do without where the kernel refuses them, and why it may."""

SOCKETS = "sockets"
"""Stands for the map of sockets in a target."""

_CGROUP = "${cgroup}"
_HELD_BY_NOTHING = "Kmesh attaches it without a link."


def _linked(pin: str) -> KnownHook:
    return KnownHook({"hook": "cgroup", "target": _CGROUP, "pin": pin})


_XDP = KnownHook(
    {"hook": "xdp", "by": "netlink", "target": "*", "netns": "/run/netns/*", "adopt": "only"},
    note="Kmesh attaches it by netlink in the namespaces of its pods, which container runtimes keep under /run/netns.",
)
_MARKING = KnownHook(
    {"hook": "tc-ingress", "target": "*", "priority": 1, "handle": 1, "adopt": "only"},
    note="Kmesh attaches it with IPsec only, in the node's own namespace.",
)
_GENERAL = {"tc_mark_encrypt": _MARKING, "tc_mark_decrypt": _MARKING}

HOOKS = {
    "workload": {
        "cgroup_connect4_prog": _linked("sockconn/sockconn_prog"),
        "cgroup_connect6_prog": _linked("sockconn/sockconn6_prog"),
        "bpf_redirect_dns_send": _linked("sockconn/sockconn_dns_prog"),
        "bpf_restore_dns_recv": _linked("sockconn/sockconn_dns_recv_prog"),
        "sockops_prog": _linked("sockops/cgroup_sockops_prog"),
        "cgroup_skb_ingress_prog": _linked("cgroup_skb/cgroup_skb_ingress_prog"),
        "cgroup_skb_egress_prog": _linked("cgroup_skb/cgroup_skb_egress_prog"),
        "sendmsg_prog": KnownHook({"hook": "sk_msg", "target": SOCKETS, "adopt": True}, note=_HELD_BY_NOTHING),
        "xdp_authz": _XDP,
        "xdp_shutdown": _XDP,
        **_GENERAL,
    },
    "ads": {
        "cgroup_connect4_prog": _linked("sockconn/prog_link"),
        "sockops_prog": _linked("sockops/prog_link"),
        **_GENERAL,
    },
}
"""By mode and program."""

ONE_OF_A_KIND = {
    "workload": {
        "cgroup/connect4": "cgroup_connect4_prog",
        "cgroup/connect6": "cgroup_connect6_prog",
        "cgroup/sendmsg4": "bpf_redirect_dns_send",
        "cgroup/recvmsg4": "bpf_restore_dns_recv",
        "sockops": "sockops_prog",
        "cgroup_skb/ingress": "cgroup_skb_ingress_prog",
        "cgroup_skb/egress": "cgroup_skb_egress_prog",
        "sk_msg": "sendmsg_prog",
        "xdp_auth": "xdp_authz",
    },
    "ads": {"cgroup/connect4": "cgroup_connect4_prog", "sockops": "sockops_prog"},
}
"""By mode and section: where the one program of a kind is attached, as that one of :data:`HOOKS`."""


class Table(msgspec.Struct, frozen=True):
    """Slots of program arrays that user space fills: of maps by role. ``jumped`` are programs that only run so.

    It is the right one for a release if that has no such program which is not in ``slots``.
    """

    maps: frozenset[str]
    slots: Mapping[int, str]
    jumped: frozenset[str] = frozenset()


_CHECKS = frozenset(
    {"policies_check", "policy_check", "rule_check", "xdp_shutdown_in_userspace", "matchDstPorts", "match_dst_ports"}
)
_MANAGERS = frozenset(
    {"listener_manager", "filter_chain_manager", "filter_manager", "cluster_manager", "route_config_manager"}
)
_FOR_XDP = frozenset({"xdptailcall", "xdptailcallmap", "tailcallprogforxdp"})
_CONNECTING = frozenset({"cgrtailcall", "tailcallprog"})

JUMPED = _CHECKS | _MANAGERS
"""Programs that are attached nowhere, and in slots of program arrays only."""

TABLES = {
    "workload": (
        Table(_CONNECTING, {0: "cgroup_connect4_prog", 1: "cgroup_connect6_prog"}),
        Table(_FOR_XDP, {0: "policies_check", 1: "policy_check", 2: "xdp_shutdown_in_userspace"}, _CHECKS),
        Table(_FOR_XDP, {2: "matchDstPorts"}, _CHECKS),
        Table(_FOR_XDP, {2: "matchDstPorts", 5: "xdp_shutdown_in_userspace"}, _CHECKS),
    ),
    "ads": (
        Table(
            frozenset({"cgrptailcall", "skopstailcall", "tailcallprog"}),
            {
                1: "listener_manager", 2: "filter_chain_manager", 3: "filter_manager", 5: "cluster_manager",
                6: "route_config_manager",
            },
            _MANAGERS,
        ),
    ),
}  # fmt: skip
"""By mode, those first that are of later releases."""

BINDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "version": ((), ("__u32",)),
    "frontend": (("frontend_key",), ("frontend_value",)),
    "service": (("service_key",), ("service_value",)),
    "endpoint": (("endpoint_key",), ("endpoint_value",)),
    "backend": (("backend_key",), ("backend_value",)),
    "wlpolicy": (("__u32",), ("wl_policies_v",)),
    "authz": (("__u32",), ("Istio__Security__Authorization", "_Istio__Security__Authorization")),
    "authzpolicy": (("__u32",), ("Istio__Security__Authorization", "_Istio__Security__Authorization")),
    "tcargs": (("bpf_sock_tuple",), ("match_context", "match_ctx")),
    "tcinfomap": (("bpf_sock_tuple",), ("match_context", "match_ctx")),
    "tailcallinfomap": (("bpf_sock_tuple",), ("match_context", "match_ctx", "match_result")),
    "listener": (
        ("Core__SocketAddress", "_Core__SocketAddress", "address_t"),
        ("Listener__Listener", "_Listener__Listener"),
    ),
    "cluster": (("bytes",), ("Cluster__Cluster", "_Cluster__Cluster")),
    "routerconfig": (("bytes",), ("Route__RouteConfiguration", "_Route__RouteConfiguration")),
    "clustereps": (("bytes",), ("cluster_endpoints",)),
    "clusterepsdata": ((), ("cluster_endpoints",)),
    "epsdata": ((), ("cluster_endpoints",)),
    "clusterstats": (("cluster_stats_key",), ("cluster_stats",)),
    "tailcallctx": (("ctx_key_t",), ("ctx_val_t",)),
}
"""Types of keys and values, by the role of the map. Names of clusters and routes are keys of plain bytes."""

LATER = {
    "auth": "authres", "tuple": "authreq", "dstinfo": "origdst", "tcpinfo": "tcpprobe", "authz": "authzpolicy",
    "tailcallinfomap": "tcargs", "tcinfomap": "tcargs", "clusterepsdata": "epsdata",
}  # fmt: skip
"""Roles by names that earlier releases had for them."""

STRUCTURES = frozenset({"map64", "map192", "map296", "map1600"})
"""Maps of pieces of larger values, which point at each other by an index, and hold whatever fits into them."""

STRUCTURES_ASK = (
    'pieces of the control plane\'s structs: "bytes" if those are the same in both releases (no change under api/v2-c)'
)

GROUP = "structures"
"""The group of the maps that point into each other."""

POINTING = STRUCTURES | {"authz", "authzpolicy", "listener", "cluster", "routerconfig", "outermap", "innermap"}

_PASSING = "passed on from one program to the next within one packet or call"
SCRATCH = {
    "tcargs": _PASSING,
    "tcinfomap": _PASSING,
    "tailcallinfomap": _PASSING,
    "tailcallctx": _PASSING,
    "clusterepsdata": "working memory of a program",
    "epsdata": "working memory of a program",
    "tmpbuf": "working memory of a program",
    "tmplogbuf": "working memory of a program",
}
"""Maps of which nothing has to survive, and why."""

NOTES = ("kmesh_version holds a number that is made of [bundle] version: that is to be what the daemon calls itself.",)
