"""What hitless uses of a kernel that not every kernel, or not every process, has: values; no kernel is asked here.

:mod:`hitless.kernel.features` tries each, and ``hitless doctor`` prints what came of it. A release that asks for one
that is not there is refused by its name before anything happens; where something else can be done, the plan names that.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import msgspec

from hitless.bundle import Bundle
from hitless.carry import ITERATE_HASH, VISITED, visiting
from hitless.errors import UnsupportedError
from hitless.hooks import SLEEPABLE, SOCKMAP_LINK, TCX
from hitless.layout.answers import ANSWERS
from hitless.layout.members import lock_offset

__all__ = [
    "CGROUP_UNIX", "EVENT_INFO", "FEATURES", "FILTERS", "INNER_LOCK", "KERNEL_MEMORY", "MEMBARRIER", "NETFILTER_LINK",
    "STRUCT_OPS_LINK", "Feature", "require",
]  # fmt: skip

CGROUP_UNIX = "cgroup unix hooks"
EVENT_INFO = "perf_event link info"
FILTERS = "tc filters"
INNER_LOCK = "bpf_spin_lock in an inner map"
KERNEL_MEMORY = "reading kernel memory"
MEMBARRIER = "membarrier"
NETFILTER_LINK = "netfilter link"
STRUCT_OPS_LINK = "struct_ops link"


class Feature(msgspec.Struct, frozen=True):
    """One feature: ``needs`` is what has it first, ``probed`` how it is tried, ``without`` what hitless does else."""

    name: str
    needs: str
    probed: str
    without: str


_NOT_CARRIED = "such a map is kept if it did not change; else its contents are lost, which has to be allowed"
_REFUSED = "a release with %s is refused"

_VISITS: Mapping[str, str] = {
    "sk_storage": "Linux 5.9", "sockmap": "Linux 5.10", "sockhash": "Linux 5.10", "task_storage": "Linux 5.11",
    "cgrp_storage": "Linux 6.2",
}  # fmt: skip
_MAPS: Mapping[str, str] = {
    "bloom_filter": "Linux 5.16", "user_ringbuf": "Linux 6.1", "cgrp_storage": "Linux 6.2", "arena": "Linux 6.9",
}  # fmt: skip

FEATURES: tuple[Feature, ...] = (
    Feature(
        ITERATE_HASH,
        "Linux 5.9 with BTF (CONFIG_DEBUG_INFO_BTF), CAP_SYS_ADMIN",
        "an iterator is loaded and passes over an empty hash",
        "maps are copied by batches in user space",
    ),
    *(
        Feature(
            visiting(kind),
            f"{_VISITS[kind]} with BTF (CONFIG_DEBUG_INFO_BTF), CAP_SYS_ADMIN",
            "the programs that visit one are loaded",
            _NOT_CARRIED,
        )
        for kind, found in ANSWERS.items()
        if found.kind in VISITED
    ),
    Feature(
        MEMBARRIER,
        "CONFIG_MEMBARRIER, and no nohz_full= on the kernel's command line",
        "it is called for all CPUs",
        "running programs are waited for by an update of a map of maps",
    ),
    Feature(
        SLEEPABLE,
        "Linux 6.13 with CONFIG_UPROBES",
        "a probe of user code that nobody executes is attached and taken away",
        _REFUSED % "programs that may sleep",
    ),
    Feature(
        TCX,
        "Linux 6.6 (CONFIG_NET_XGRESS)",
        "a link is asked for on an interface that does not exist",
        "tcx hooks are tc filters at clsact",
    ),
    Feature(
        FILTERS,
        "CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS (modules cls_bpf and sch_ingress), CAP_NET_ADMIN",
        "one is attached in a network namespace that is made for it",
        _REFUSED % "tc hooks" + ", and one with tcx hooks too if there is no tcx",
    ),
    Feature(
        NETFILTER_LINK,
        "Linux 6.4 (CONFIG_NETFILTER_BPF_LINK)",
        "a program that does nothing is loaded",
        _REFUSED % "netfilter hooks",
    ),
    Feature(
        EVENT_INFO,
        "Linux 6.6 with CONFIG_PERF_EVENTS, CAP_PERFMON",
        "one is attached and asked what it is attached to",
        _REFUSED % "hooks of tracepoints, probes or perf events",
    ),
    Feature(
        SOCKMAP_LINK,
        "Linux 6.10",
        "a link is asked for on a map that does not exist",
        "programs are attached to maps of sockets without a link",
    ),
    Feature(
        KERNEL_MEMORY,
        "BTF (CONFIG_DEBUG_INFO_BTF), CAP_SYS_ADMIN, and no lockdown=confidentiality on the kernel's command line",
        "an iterator that reads some is loaded",
        _REFUSED % "hooks of maps of sockets",
    ),
    Feature(
        STRUCT_OPS_LINK,
        "Linux 6.4 with BTF (CONFIG_DEBUG_INFO_BTF)",
        "the kernel's BTF is searched for what makes one",
        _REFUSED % "struct_ops hooks",
    ),
    Feature(
        CGROUP_UNIX,
        "Linux 6.7",
        "a program that does nothing is loaded",
        _REFUSED % "hooks of Unix sockets",
    ),
    Feature(
        INNER_LOCK,
        "Linux 6.2",
        "an array with one is put into a map of maps",
        _REFUSED % "such inner maps",
    ),
    *(Feature(f"map/{kind}", since, "one is made and let go", _REFUSED % "such maps") for kind, since in _MAPS.items()),
)
"""All that can be tried, in the order in which they are told."""

_HOOKS: Mapping[str, str] = {
    "netfilter": NETFILTER_LINK, "perf_event": EVENT_INFO, "sk_msg": KERNEL_MEMORY, "sk_skb": KERNEL_MEMORY,
    "struct_ops": STRUCT_OPS_LINK, "tc-egress": FILTERS, "tc-ingress": FILTERS, "tracepoint": EVENT_INFO,
    "uprobe": EVENT_INFO, "uretprobe": EVENT_INFO,
}  # fmt: skip


def require(bundle: Bundle, features: Container[str], running_may_sleep: bool) -> None:
    """Raise UnsupportedError for the first hook or map of ``bundle`` that takes a feature which is not there.

    So does a program of it that may sleep, or one of what runs now (``running_may_sleep``): before the last merge of
    what it wrote, it has to have ended.
    """
    for entry in bundle.attach:
        attach_type = entry.attach_type(bundle.programs[entry.program])
        name = CGROUP_UNIX if attach_type.startswith("cgroup_unix_") else _HOOKS.get(entry.hook)
        if name is not None and name not in features:
            raise _missing(name, f"hook {entry.link} ({entry.hook})")
    for spec in bundle.maps.values():
        if spec.type in _MAPS and f"map/{spec.type}" not in features:
            raise _missing(f"map/{spec.type}", f"map {spec.name} ({spec.type})")
        inner = spec.inner.value if spec.inner is not None else None
        if inner is not None and lock_offset(inner) is not None and INNER_LOCK not in features:
            raise _missing(INNER_LOCK, f"map {spec.name} ({spec.type})")
    sleeping = [program.name for program in bundle.programs.values() if program.may_sleep]
    if (sleeping or running_may_sleep) and SLEEPABLE not in features:
        who = f"waiting for {', '.join(sleeping) or 'programs of what runs'}, which may sleep,"
        raise _missing(SLEEPABLE, who, programs=sleeping)


def _missing(name: str, who: str, **facts: object) -> UnsupportedError:
    feature = next(one for one in FEATURES if one.name == name)
    return UnsupportedError(
        f"{who} takes the feature {name!r}, which this kernel, or this process's rights, do not give: it needs "
        f"{feature.needs}; leave it out of the release, or run it on such a kernel (`hitless doctor` tells more)",
        feature=name,
        needs=feature.needs,
        **facts,
    )
