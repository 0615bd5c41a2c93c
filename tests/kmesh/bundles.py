"""The releases of the fixture as bundles, described as a Kmesh release would be."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from hitless.bundle import object_name
from hitless.headers import compile_header
from hitless.layout import kmesh
from hitless.layout.elf import read_object
from tests.kmesh.structs import RENAMED, SCHEMAS

__all__ = ["VERSIONS", "snapshot_of", "variables", "write_bundle"]

VERSIONS = {1: "v1.0.0", 2: "v1.1.0"}

# What programs are whose section libbpf does not know, and the one that newer kernels refuse.
_PROGRAMS = {
    "sockconn": {"cgroup_connect4_policy": 'type = "cgroup/connect4"', "cgroup_connect6_policy": "skip = true"},
    "sockconn_dns": {},
    "sockops": {},
    "sendmsg": {},
    "xdp_auth": {"xdp_auth_prog": 'type = "xdp"', "xdp_auth_check": 'type = "xdp"'},
    "cgroup_skb": {},
    "tc_workload": {"tc_workload_prog": 'type = "tc"'},
    "tc_mark_encrypt": {"tc_mark_encrypt_prog": 'type = "tc"'},
    "tc_mark_decrypt": {"tc_mark_decrypt_prog": 'type = "tc"'},
}
_CGROUP = {
    "cgroup_connect4_prog": ("connect4", "sockconn/sockconn_prog"),
    "cgroup_connect6_prog": ("connect6", "sockconn/sockconn6_prog"),
    "cgroup_sendmsg4_prog": ("sendmsg4", "sockconn/sockconn_dns_prog"),
    "cgroup_recvmsg4_prog": ("recvmsg4", "sockconn/sockconn_dns_recv_prog"),
    "sockops_prog": ("sockops", "cgroup_sockops_prog"),
    "cgroup_skb_ingress_prog": ("skb_ingress", "cgroup_skb_ingress_prog"),
    "cgroup_skb_egress_prog": ("skb_egress", "cgroup_skb_egress_prog"),
}
_PEERNAME = {"cgroup_getpeername4_prog": ("peername4", "sockconn/sockconn_peername_prog")}
_WITHOUT_LINK = """
[[attach]]
program = "sendmsg_prog"
hook = "sk_msg"
target = "km_sockhash"
link = "sendmsg"
adopt = true

[[attach]]
program = "xdp_auth_prog"
hook = "xdp"
by = "netlink"
mode = "generic"
target = "eth0"
netns = "${pods}"
link = "xdp_auth"
adopt = "only"
"""
_FILTERS = {
    "tc_workload_prog": ("tc-ingress", "workload", 1),
    "tc_mark_decrypt_prog": ("tc-ingress", "mark_decrypt", 2),
    "tc_mark_encrypt_prog": ("tc-egress", "mark_encrypt", 1),
}

# What a map holds, where that is not named after it.
_TYPES = {
    "kmesh_version": (None, "__u32"),
    "km_authz_policies": ("policy_key", "policy_value"),
    "km_tally": ("backend_key", "tally_value"),
    "km_backend_stats": ("backend_key", "tally_value"),
    "km_auth_res": ("auth_key", "auth_value"),
    "km_pods": ("pod_key", "pod_value"),
    "km_hooks": (None, "hook_value"),
    "km_nodeinfo": ("node_key", "node_value"),
    "km_dns_orig": ("__u64", "dns_value"),
    "km_config": (None, "config_value"),
    "km_orig_dst": (None, None),
    "km_sockhash": ("tuple_key", None),
}
_SUMS = {
    "km_tally": ("connects", "denied"),
    "km_backend_stats": ("connects", "denied"),
    "km_authz_policies": ("hits",),
    "km_auth_res": ("hits",),
    "km_pods": ("rx_udp", "tx_udp", "rx_bytes", "tx_bytes"),
    "km_hooks": ("packets", "bytes"),
    "km_dns_orig": ("answers",),
    "km_orig_dst": ("messages", "bytes"),
    "sockops.bss": ("established", "closed", "untold"),
    "tc_mark_decrypt.bss": ("from_nodes",),
}
_NEW = ("km_waypoint",)
# Whose values are ids of each other's entries.
_GROUP = ("km_frontend", "km_service", "km_endpoint", "km_backend")


def variables(cgroup: Path, pods: Path, snapshot: Path) -> dict[str, str]:
    """What a bundle's ``${...}`` stand for on a node."""
    return {"cgroup": str(cgroup), "pods": str(pods / "*"), "snapshot": str(snapshot)}


def snapshot_of(objects: Path) -> bytes:
    """What the daemon keeps of its maps' layouts: no more than its objects tell by themselves."""
    found = {path: object_name(path.name) for path in sorted(objects.iterdir())}
    return kmesh.dump({name: read_object(path.read_bytes(), name) for path, name in found.items()})


def write_bundle(
    directory: Path, release: int, objects: Path, header: Path | None = None, before: Path | None = None
) -> Path:
    """The bundle of a release in ``directory``, which it returns, with copies of all ``objects``.

    Stripped objects need the ``header`` with the types of their maps. With the header of the release ``before`` the
    bundle tells by itself, too, what the maps of that hold.
    """
    directory.mkdir(parents=True)
    for name in _PROGRAMS:
        shutil.copy(objects / f"{name}.bpf.o", directory)
    if header is not None:
        types = directory / "types.h"
        old = re.sub(r"struct (\w+) {", r"struct old_\1 {", before.read_text()) if before is not None else ""
        types.write_text(old + header.read_text())
        (directory / "types.bpf.o").write_bytes(compile_header(types))
        types.unlink()
    (directory / "bundle.toml").write_text("\n".join(_manifest(release, header is not None, before is not None)))
    return directory


def _manifest(release: int, typed: bool, told: bool) -> Iterator[str]:
    yield f'[bundle]\nname = "kmesh"\nversion = "{VERSIONS[release]}"\n'
    yield '[public]\nmaps = "map"\nversion_map = "kmesh_version"\nsnapshot = "${snapshot}"\n'
    if typed:
        yield '[types]\nfile = "types.bpf.o"\n'
    for name, programs in _PROGRAMS.items():
        yield f'[[object]]\nfile = "{name}.bpf.o"'
        for program, said in programs.items():
            yield f"[object.program.{program}]\n{said}"
        yield ""
    for program, (link, pin) in (_CGROUP | (_PEERNAME if release > 1 else {})).items():
        yield f'[[attach]]\nprogram = "{program}"\nhook = "cgroup"\ntarget = "${{cgroup}}"'
        yield f'link = "{link}"\npin = "{pin}"\n'
    yield _WITHOUT_LINK
    for program, (hook, link, priority) in _FILTERS.items():
        yield f'[[attach]]\nprogram = "{program}"\nhook = "{hook}"\ntarget = "eth0"\nnetns = "${{pods}}"'
        yield f'link = "{link}"\npriority = {priority}\nhandle = 1\nadopt = "only"\n'
    was = {new: old for old, new in RENAMED.items()} if release > 1 else RENAMED
    for name in (*SCHEMAS[release], "km_sockhash", *(one for one in _SUMS if one.endswith(".bss"))):
        yield f'[map."{name}"]'
        kind = name.removeprefix("km_")
        bound = _TYPES.get(name, (f"{kind}_key", f"{kind}_value")) if not name.endswith(".bss") else (None, None)
        yield from (f'{part} = "{said}"' for part, said in zip(("key", "value"), bound, strict=True) if said)
        if told and name not in _NEW:
            old = [said if said is None or said.startswith("__") else f"old_{said}" for said in bound]
            yield from (f'old_{part} = "{said}"' for part, said in zip(("key", "value"), old, strict=True) if said)
        if name in was:
            yield f'was = "{was[name]}"'
        if (release, name) == (1, "km_endpoint"):
            yield 'on_collision = "error"'  # who goes back to shorter keys hopes that none become one
        if name in _GROUP:
            yield 'group = "workload"'
        yield from (f'[map."{name}".field.{field}]\nmerge = "sum"' for field in _SUMS.get(name, ()))
        yield ""
    for name, program in (("km_cgr_tailcall", "cgroup_connect4_policy"), ("km_xdp_tailcall", "xdp_auth_check")):
        yield f'[map.{name}.slots]\n0 = "{program}"\n'
    if release == 1:
        yield '[map.km_waypoint]\non_loss = "discard"\n'
