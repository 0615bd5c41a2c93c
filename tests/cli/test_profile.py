"""A manifest for objects as Kmesh has them: what its profile fills in, and what stays open."""

from __future__ import annotations

import ctypes
import tomllib
from pathlib import Path
from typing import Any

import pytest

import hitless
from meshd.demo.lab import Lab
from tests.cli.test_commands import as_json
from tests.cli.test_init import complete, planned
from tests.releases import compile_object

SIZED = """
#define SIZED(name, kind, entries, keys, values) struct { __uint(type, BPF_MAP_TYPE_##kind); \\
    __uint(max_entries, entries); __uint(key_size, keys); __uint(value_size, values); } name SEC(".maps")
"""
# Every object declares the tables, and only one has a function with the types in its signature.
TABLES = SIZED + """
typedef struct { __u32 service_id; } service_key;
typedef struct { __u32 endpoints; __u32 policy; } service_value;
typedef struct { __u32 ip[4]; } frontend_key;
typedef struct { __u32 upstream; } frontend_value;
SIZED(km_service, HASH, 8, sizeof(service_key), sizeof(service_value));
SIZED(km_frontend, HASH, 8, sizeof(frontend_key), sizeof(frontend_value));
SIZED(kmesh_map64, HASH, 8, 4, 64);
static __always_inline int routed(__u32 ip)
{
    frontend_key where = { { ip } };
    frontend_value *to = bpf_map_lookup_elem(&km_frontend, &where);
    __u32 zero = 0;
    return to && bpf_map_lookup_elem(&km_service, &to->upstream) && bpf_map_lookup_elem(&kmesh_map64, &zero);
}
"""
CONNECTING = TABLES + """
SIZED(km_cgr_tailcall, PROG_ARRAY, 8, 4, 4);
static __attribute__((noinline)) int weigh(service_value *value, service_key *key, frontend_key *a, frontend_value *b)
{
    return value && key && a && b ? value->endpoints + key->service_id + a->ip[0] + b->upstream : 0;
}
SEC("cgroup/connect4") int cgroup_connect4_prog(struct bpf_sock_addr *ctx)
{
    service_value value = {};
    service_key key = {};
    frontend_key where = {};
    frontend_value to = {};
    if (routed(ctx->user_ip4))
        bpf_tail_call(ctx, &km_cgr_tailcall, 0);
    return weigh(&value, &key, &where, &to) != 7;
}
"""
AUTHORIZING = TABLES + """
struct match_context { __u32 action; __u32 rule; };
typedef struct { __u32 rules; __u32 action; } Istio__Security__Authorization;
SIZED(km_xdp_tailcall, PROG_ARRAY, 8, 4, 4);
SIZED(km_tcargs, HASH, 8, sizeof(struct bpf_sock_tuple), sizeof(struct match_context));
SIZED(km_authz_policy, HASH, 8, 4, sizeof(Istio__Security__Authorization));
static __attribute__((noinline)) int weigh(struct match_context *one, Istio__Security__Authorization *two,
                                           struct bpf_sock_tuple *three)
{
    return one && two && three ? one->rule + two->rules + three->ipv4.saddr : 0;
}
SEC("xdp_auth") int xdp_authz(struct xdp_md *ctx)
{
    bpf_tail_call(ctx, &km_xdp_tailcall, 0);
    return routed(7) ? XDP_PASS : XDP_PASS;
}
SEC("xdp_auth") int policies_check(struct xdp_md *ctx)
{
    struct match_context one = {};
    Istio__Security__Authorization two = {};
    struct bpf_sock_tuple three = {};
    __u32 key = 0;
    bpf_map_update_elem(&km_tcargs, &three, &one, 0);
    return bpf_map_lookup_elem(&km_authz_policy, &key) ? weigh(&one, &two, &three) & 2 : XDP_PASS;
}
SEC("xdp_auth") int policy_check(struct xdp_md *ctx) { return XDP_PASS; }
SEC("xdp_auth") int xdp_shutdown_in_userspace(struct xdp_md *ctx) { return XDP_PASS; }
"""
MORE = 'SEC("xdp_auth") int rule_check(struct xdp_md *ctx) { return XDP_PASS; }\n'
OBSERVING = TABLES + """
struct { __uint(type, BPF_MAP_TYPE_SOCKHASH); __uint(max_entries, 8); __type(key, struct bpf_sock_tuple);
         __type(value, __u32); } km_socket SEC(".maps");
SEC("sockops") int sockops_prog(struct bpf_sock_ops *ctx)
{
    struct bpf_sock_tuple key = {};
    if (routed(ctx->remote_ip4))
        bpf_sock_hash_update(ctx, &km_socket, &key, BPF_ANY);
    return 1;
}
"""
SENDING = TABLES + 'SEC("sk_msg") int sendmsg_prog(struct sk_msg_md *msg) { return routed(1) ? SK_PASS : SK_PASS; }\n'
SKB = TABLES + """
SEC("cgroup_skb/ingress") int cgroup_skb_ingress_prog(struct __sk_buff *ctx) { return routed(1) | 1; }
SEC("cgroup_skb/egress") int cgroup_skb_egress_prog(struct __sk_buff *ctx) { return routed(2) | 1; }
"""
MARKING = SIZED + """
SIZED(km_nodeinfo, HASH, 8, 4, 4);
SEC("tc_ingress") int tc_mark_encrypt(struct __sk_buff *ctx)
{
    __u32 key = 0;
    return bpf_map_lookup_elem(&km_nodeinfo, &key) ? 0 : 0;
}
"""
OBJECTS = {
    "kmeshcgroupsockworkload_bpfel.o": CONNECTING,
    "kmeshxdpauth_bpfel.o": AUTHORIZING,
    "kmeshsockopsworkload_bpfel.o": OBSERVING,
    "kmeshsendmsg_bpfel.o": SENDING,
    "kmeshcgroupskb_bpfel.o": SKB,
    "kmeshtcmarkencrypt_bpfel.o": MARKING,
}
LICENSE = 'char _license[] SEC("license") = "GPL";\n'


def stripped(path: Path) -> Path:
    """The object as libbpf's linker writes it: with BTF, and without the debug information that holds all types."""
    out = path.with_suffix(".out")
    libbpf = ctypes.CDLL("libbpf.so.1")
    libbpf.bpf_linker__new.restype = ctypes.c_void_p
    linker = ctypes.c_void_p(libbpf.bpf_linker__new(bytes(out), None))
    assert libbpf.bpf_linker__add_file(linker, bytes(path), None) == 0
    assert libbpf.bpf_linker__finalize(linker) == 0
    libbpf.bpf_linker__free(linker)
    return out.rename(path)


def kmesh(folder: Path, sources: dict[str, str]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [stripped(compile_object(text + LICENSE, folder / file)) for file, text in sources.items()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return kmesh(tmp_path_factory.mktemp("kmesh"), OBJECTS)


def drawn(objects: list[Path], out: Path, *options: str) -> tuple[dict[str, Any], dict[str, Any]]:
    asked = as_json("init", *objects, "-o", out, "--profile", "kmesh", *options)
    return asked, tomllib.loads((out / "bundle.toml").read_text())


def test_the_places_of_kmesh_are_filled_in(built: list[Path], tmp_path: Path) -> None:
    _, manifest = drawn(built, tmp_path / "out")
    assert manifest["public"] == {
        "maps": "map", "version_map": "kmesh_version", "snapshot": "/mnt/kmesh_mapspecs/mapspecs_by_prog.json",
    }  # fmt: skip
    assert [entry["name"] for entry in manifest["object"]] == [
        "KmeshCgroupSockWorkload", "KmeshXDPAuth", "KmeshSockopsWorkload", "KmeshSendmsg", "KmeshCgroupSkb",
        "KmeshTcMarkEncrypt",
    ]  # fmt: skip
    hooks = {entry.pop("program"): entry for entry in manifest["attach"]}
    assert {name: entry["pin"] for name, entry in hooks.items() if "pin" in entry} == {
        "cgroup_connect4_prog": "sockconn/sockconn_prog",
        "sockops_prog": "sockops/cgroup_sockops_prog",
        "cgroup_skb_ingress_prog": "cgroup_skb/cgroup_skb_ingress_prog",
        "cgroup_skb_egress_prog": "cgroup_skb/cgroup_skb_egress_prog",
    }
    assert hooks["sendmsg_prog"] == {
        "hook": "sk_msg", "target": "km_socket", "adopt": True, "link": "sendmsg_prog",
    }  # fmt: skip
    assert hooks["xdp_authz"] == {
        "hook": "xdp", "target": "*", "by": "netlink", "netns": "/run/netns/*", "adopt": "only", "link": "xdp_authz",
    }  # fmt: skip
    assert hooks["tc_mark_encrypt"] == {
        "hook": "tc-ingress", "target": "*", "priority": 1, "handle": 1, "adopt": "only", "link": "tc_mark_encrypt",
    }  # fmt: skip
    assert "policy_check" not in hooks


def test_slots_types_and_groups_are_filled_in(built: list[Path], tmp_path: Path) -> None:
    asked, manifest = drawn(built, tmp_path / "out")
    maps = manifest["map"]
    assert maps["km_xdp_tailcall"]["slots"] == {
        "0": "policies_check", "1": "policy_check", "2": "xdp_shutdown_in_userspace",
    }  # fmt: skip
    assert maps["km_cgr_tailcall"]["slots"] == {"0": "cgroup_connect4_prog"}
    assert maps["km_service"] == {"key": "service_key", "value": "service_value"}
    assert maps["km_authz_policy"] == {
        "key": "__u32", "value": "Istio__Security__Authorization", "group": "structures",
    }  # fmt: skip
    assert maps["km_tcargs"]["on_loss"] == "discard"
    assert maps["kmesh_map64"]["group"] == "structures"
    questions = [(entry["key"], entry["candidates"]) for entry in asked["questions"]]
    assert ("value", ["bytes"]) in questions and "target" not in [key for key, _ in questions]
    assert "# from BTF, by its name" in (tmp_path / "out" / "bundle.toml").read_text()


def test_a_bundle_takes_it_when_the_questions_are_answered(built: list[Path], tmp_path: Path) -> None:
    asked, _ = drawn(built, tmp_path / "out")
    complete(tmp_path / "out", asked["questions"], {"version": "v1.1.0"})
    release = hitless.Bundle.load(tmp_path / "out")
    for name in ("km_service", "km_frontend"):  # of which one object alone knows the types
        assert release.maps[name].value is not None, name
    assert release.public is not None and release.public.links["sockops_prog"] == "sockops/cgroup_sockops_prog"


def test_slots_of_a_release_that_nobody_knows_are_asked(tmp_path: Path) -> None:
    objects = kmesh(tmp_path / "objects", {"kmeshxdpauth_bpfel.o": AUTHORIZING + MORE})
    asked, manifest = drawn(objects, tmp_path / "out")
    assert manifest["map"]["km_xdp_tailcall"]["slots"] == {"0": "..."}
    question = next(entry for entry in asked["questions"] if entry["key"] == "0")
    assert "rule_check" in question["candidates"] and question["optional"]


def test_what_no_profile_knows_is_asked_as_ever(tmp_path: Path) -> None:
    source = AUTHORIZING + 'SEC("xdp_auth") int xdp_new(struct xdp_md *ctx) { return XDP_PASS; }\n'
    source += "SIZED(km_brand_new, HASH, 8, 8, 24);\n"
    _, manifest = drawn(kmesh(tmp_path / "objects", {"kmeshxdpauth_bpfel.o": source}), tmp_path / "out")
    assert manifest["object"][0]["program"]["xdp_new"] == {"type": "xdp"}
    assert next(entry for entry in manifest["attach"] if entry["program"] == "xdp_new")["hook"] == "..."
    assert manifest["map"]["km_brand_new"]["value"] == "..."


def test_what_is_one_of_a_kind_may_be_called_otherwise(tmp_path: Path) -> None:
    source = CONNECTING.replace("cgroup_connect4_prog", "connect_by_any_name") + (
        'SEC("cgroup/connect4/policy") int beyond(struct bpf_sock_addr *ctx) { return 1; }\n'
        'SEC("tc_egress") int leaving(struct __sk_buff *ctx) { return 0; }\n'
        'SEC("xdp_auth/check") int checking(struct xdp_md *ctx) { return XDP_PASS; }\n'
    )
    asked, manifest = drawn(kmesh(tmp_path / "objects", {"kmeshcgroupsockworkload_bpfel.o": source}), tmp_path / "out")
    hooks = {entry["program"]: entry for entry in manifest["attach"]}
    assert hooks["connect_by_any_name"]["pin"] == "sockconn/sockconn_prog"
    assert hooks["beyond"]["hook"] == "..." and "pin" not in hooks["beyond"]
    assert manifest["object"][0]["program"]["beyond"] == {"type": "cgroup/connect4"}
    assert manifest["object"][0]["program"]["checking"] == {"type": "xdp"}
    assert ["tc-egress", "tc-ingress"] in [entry["candidates"] for entry in asked["questions"]]


def test_what_newer_kernels_refuse_may_be_left_out(lab: Lab, tmp_path: Path) -> None:
    source = CONNECTING + """
SEC("cgroup/connect6") int cgroup_connect6_prog(struct bpf_sock_addr *ctx)
{
    bpf_tail_call(ctx, &km_cgr_tailcall, 1);
    return 1;
}
"""
    objects = kmesh(tmp_path / "objects", {"kmeshcgroupsockworkload_bpfel.o": source})
    asked, manifest = drawn(objects, tmp_path / "out")
    assert manifest["object"][0]["program"]["cgroup_connect6_prog"] == {"skip": "refused"}
    assert manifest["map"]["km_cgr_tailcall"]["slots"] == {"0": "cgroup_connect4_prog", "1": "cgroup_connect6_prog"}
    complete(tmp_path / "out", asked["questions"], {"version": "v1.1.0"})
    (lab.bpffs / "kmesh").mkdir()
    path = tmp_path / "out" / "bundle.toml"
    path.write_text(path.read_text().replace("/mnt/kmesh_mapspecs", str(tmp_path)))
    found = planned(tmp_path / "out", hitless.Node(lab.bpffs / "kmesh"), lab)
    there = {hook.program for hook in found.hooks}
    assert there | set(found.left_out) == {"cgroup_connect4_prog", "cgroup_connect6_prog"}


def test_an_object_alone_leaves_open_what_another_tells(tmp_path: Path) -> None:
    objects = kmesh(tmp_path / "objects", {"kmeshsendmsg_bpfel.o": SENDING})
    _, manifest = drawn(objects, tmp_path / "out")
    assert manifest["attach"][0]["target"] == "..."


def test_maps_are_recognised_under_their_former_names(tmp_path: Path) -> None:
    before = OBSERVING.replace("km_service", "map_of_service").replace("km_frontend", "kmesh_frontend")
    before = before.replace("__u32 ip[4]; } frontend_key", "__u32 ip; } frontend_key").replace("{ { ip } }", "{ ip }")
    old = kmesh(tmp_path / "old", {"kmeshsockopsworkload_bpfel.o": before})
    new = kmesh(tmp_path / "new", {"kmeshsockopsworkload_bpfel.o": OBSERVING})
    asked, _ = drawn(new, tmp_path / "out", "--from", str(old[0]))
    assert asked["renames"] == {"km_service": "map_of_service", "km_frontend": "kmesh_frontend"}


def test_of_all_objects_that_a_daemon_embeds_those_of_one_node_are_taken(built: list[Path], tmp_path: Path) -> None:
    sources = {
        "kmeshxdpauthcompat_bpfel.o": AUTHORIZING,
        "kmeshcgroupsock_bpfel.o": CONNECTING,
    }
    others = kmesh(tmp_path / "objects", sources)
    refused = as_json("init", *built, *others, "-o", tmp_path / "no", "--profile", "kmesh", code=1)
    assert "--mode" in refused["error"]["message"]
    _, manifest = drawn([*built, *others], tmp_path / "out", "--mode", "dual-engine")
    assert len(manifest["object"]) == len(built)
    text = (tmp_path / "out" / "bundle.toml").read_text()
    assert "# left out: kmeshxdpauthcompat_bpfel.o" in text and "# left out: kmeshcgroupsock_bpfel.o" in text
    assert not (tmp_path / "out" / "kmeshcgroupsock_bpfel.o").exists()
    _, manifest = drawn(others[1:], tmp_path / "ads", "--mode", "kernel-native")
    assert manifest["attach"][0]["pin"] == "sockconn/prog_link"


def test_a_mode_is_one_of_a_daemon(built: list[Path], tmp_path: Path) -> None:
    refused = as_json("init", *built, "-o", tmp_path / "out", "--mode", "ads", code=1)
    assert "--profile" in refused["error"]["message"]


def test_plan_takes_what_is_drawn_up(lab: Lab, tmp_path: Path) -> None:
    objects = kmesh(tmp_path / "objects", {name: OBJECTS[name] for name in list(OBJECTS)[:3]})
    asked, _ = drawn(objects, tmp_path / "out")
    complete(tmp_path / "out", asked["questions"], {"version": "v1.1.0"})
    (lab.bpffs / "kmesh").mkdir()
    manifest = tmp_path / "out" / "bundle.toml"
    manifest.write_text(manifest.read_text().replace("/mnt/kmesh_mapspecs", str(tmp_path)))
    assert planned(tmp_path / "out", hitless.Node(lab.bpffs / "kmesh"), lab).start_type == "normal"
