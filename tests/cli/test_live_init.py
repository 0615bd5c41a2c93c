"""A manifest for a node that another loader set up: what is pinned and attached there is filled in, and not touched."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.kernel.filters import Filter
from hitless.kernel.interfaces import interfaces
from hitless.kernel.libbpf import check, lib, options
from hitless.kernel.links import Link
from hitless.kernel.names import attach_number
from hitless.kernel.namespaces import Namespace
from hitless.kernel.programs import Program, load_object
from hitless.kernel.xdp import Xdp
from meshd.demo.lab import Lab
from meshd.demo.pods import Pods
from tests.cli.test_commands import as_json
from tests.cli.test_init import complete
from tests.cli.test_profile import OBJECTS, kmesh
from tests.releases import compile_object

SOURCE = """
#define SIZED(name, kind, entries, keys, values) struct { __uint(type, BPF_MAP_TYPE_##kind); \\
    __uint(max_entries, entries); __uint(key_size, keys); __uint(value_size, values); } name SEC(".maps")
MAP(counted, HASH, 16, __u32, __u64);
MAP(elsewhere, HASH, 16, __u32, __u64);
MAP(unpinned, HASH, 16, __u32, __u64);
SIZED(peers, SOCKHASH, 8, 4, 4);
SIZED(leaves, PROG_ARRAY, 4, 4, 4);
static __always_inline void count(__u32 key)
{
    __u64 one = 1;
    bpf_map_update_elem(&counted, &key, &one, 0);
    bpf_map_update_elem(&elsewhere, &key, &one, 0);
}
SEC("cgroup/connect4") int a_program_with_one_long_name4(struct bpf_sock_addr *c) { count(4); return 1; }
SEC("cgroup/connect6") int a_program_with_one_long_name6(struct bpf_sock_addr *c) { count(6); return 1; }
SEC("cgroup/sendmsg4") int said(struct bpf_sock_addr *c) { count(5); return 1; }
SEC("cgroup/recvmsg4") int nowhere(struct bpf_sock_addr *c) { count(5); return 1; }
SEC("xdp") int early(struct xdp_md *c) { count(1); bpf_tail_call(c, &leaves, 2); return XDP_PASS; }
SEC("xdp") int leaf(struct xdp_md *c) { count(2); return XDP_PASS; }
SEC("tc") int late(struct __sk_buff *c) { count(3); return 0; }
SEC("sk_msg") int sent(struct sk_msg_md *c)
{
    __u32 key = 1;
    count(7);
    return bpf_msg_redirect_hash(c, &peers, &key, 0);
}
char _license[] SEC("license") = "GPL";
"""


@pytest.fixture
def other(lab: Lab, tmp_path: Path) -> Path:
    """Objects that another loader loaded, pinned and attached, each in one of the ways that there are; its pin root."""
    data = compile_object(SOURCE, tmp_path / "mesh.bpf.o").read_bytes()
    loaded = load_object(data, "mesh", {}, {})
    maps, programs = loaded.maps, loaded.programs
    root = lab.bpffs / "daemon"
    for directory in (root, root / "map", root / "links", root / "other"):
        directory.mkdir(mode=0o700)
    for name in ("counted", "peers", "leaves"):
        maps[name].pin(root / "map" / name)
    maps["elsewhere"].pin(root / "other" / "elsewhere")
    programs["leaf"].pin(root / "other" / "strange")
    for number in (4, 6):
        program = programs[f"a_program_with_one_long_name{number}"]
        Link.attach_cgroup(program, lab.cgroup, f"cgroup_inet{number}_connect").pin(root / "links" / f"c{number}")
    cgroup = os.open(lab.cgroup, os.O_RDONLY)
    attach(programs["said"], cgroup, "cgroup_udp4_sendmsg", 2)
    os.close(cgroup)
    attach(programs["sent"], maps["peers"].fd, "sk_msg_verdict", 0)
    maps["leaves"].update((2).to_bytes(4, sys.byteorder), programs["leaf"].fd.to_bytes(4, sys.byteorder))
    interface = interfaces("lo", Namespace.at(str(lab.netns)))[0]
    Xdp.attach(programs["early"], interface, "generic")
    Filter.attach(programs["late"], interface, "egress", 7, 1)
    return root


def attach(program: Program, target: int, kind: str, flags: int) -> None:
    opts = options("bpf_prog_attach_opts", flags=flags)
    result = lib().bpf_prog_attach_opts(program.fd, target, attach_number(kind), opts)
    check(result, "BPF_PROG_ATTACH", kind)


def drawn(objects: list[Path], out: Path, *options: object) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    asked = as_json("init", *objects, "-o", out, *options)["questions"]
    return asked, tomllib.loads((out / "bundle.toml").read_text())


def test_pins_hooks_and_slots_of_a_node_are_filled_in(other: Path, lab: Lab, tmp_path: Path) -> None:
    _, manifest = drawn([tmp_path / "mesh.bpf.o"], tmp_path / "out", "--root", other)
    assert manifest["public"] == {"maps": "map"}
    assert manifest["map"]["elsewhere"]["pin"] == "other/elsewhere"
    assert manifest["map"]["leaves"]["slots"] == {"2": "leaf"}
    hooks = {entry.pop("program"): entry for entry in manifest["attach"]}
    for number in (4, 6):
        name = f"a_program_with_one_long_name{number}"
        assert hooks[name] == {"hook": "cgroup", "target": str(lab.cgroup), "pin": f"links/c{number}", "link": name}
    assert hooks["said"] == {"hook": "cgroup", "target": str(lab.cgroup), "adopt": True, "link": "said"}
    assert hooks["sent"] == {"hook": "sk_msg", "target": "peers", "adopt": True, "link": "sent"}
    pods = {"target": "lo", "netns": "/run/netns/*", "adopt": "only"}
    assert hooks["early"] == {"hook": "xdp", "by": "netlink", **pods, "link": "early"}
    assert hooks["late"] == {"hook": "tc-egress", "priority": 7, "handle": 1, **pods, "link": "late"}


def test_pods_without_a_name_are_asked_for(lab: Lab, tmp_path: Path) -> None:
    loaded = load_object(compile_object(SOURCE, tmp_path / "mesh.bpf.o").read_bytes(), "mesh", {}, {})
    root = lab.bpffs / "daemon"
    root.mkdir(mode=0o700)
    loaded.maps["counted"].pin(root / "counted")
    pods = Pods(lab)
    for number in pods.add(2):
        place = Namespace.at(str((pods.directory / f"pod{number}").readlink()))
        Xdp.attach(loaded.programs["early"], interfaces("eth0", place)[0], "native")
    asked, manifest = drawn([tmp_path / "mesh.bpf.o"], tmp_path / "out", "--root", root)
    assert "netns" in [entry["key"] for entry in asked]
    assert next(entry for entry in manifest["attach"] if entry["program"] == "early")["target"] == "eth0"
    assert "Found in 2 network namespaces" in (tmp_path / "out" / "bundle.toml").read_text()


def test_what_does_not_match_is_told(other: Path, tmp_path: Path) -> None:
    drawn([tmp_path / "mesh.bpf.o"], tmp_path / "out", "--root", other)
    notes = [line for line in (tmp_path / "out" / "bundle.toml").read_text().splitlines() if "# below" in line]
    text = "\n".join(notes)
    assert "declared by an object, and pinned nowhere there: unpinned" in text
    assert "attached nowhere on this node, and in no slot: nowhere" in text
    fewer = SOURCE.replace("MAP(elsewhere, HASH, 16, __u32, __u64);", "").replace(
        "    bpf_map_update_elem(&elsewhere, &key, &one, 0);\n", ""
    )
    drawn([compile_object(fewer, tmp_path / "fewer.bpf.o")], tmp_path / "less", "--root", other)
    assert "pinned at other/elsewhere, and no object declares it" in (tmp_path / "less" / "bundle.toml").read_text()


def test_a_look_changes_nothing(other: Path, tmp_path: Path) -> None:
    before = sorted(str(path) for path in other.rglob("*"))
    drawn([tmp_path / "mesh.bpf.o"], tmp_path / "out", "--root", other)
    assert sorted(str(path) for path in other.rglob("*")) == before


def test_a_bundle_takes_it_but_for_the_version(other: Path, tmp_path: Path) -> None:
    asked, _ = drawn([tmp_path / "mesh.bpf.o"], tmp_path / "out", "--root", other)
    assert [entry["key"] for entry in asked] == ["version"]
    complete(tmp_path / "out", asked, {"version": "1.0"})
    release = hitless.Bundle.load(tmp_path / "out", {})
    assert release.public is not None and release.public.pin_of("elsewhere") == "other/elsewhere"


def test_a_profile_says_what_holds_on_every_node(lab: Lab, tmp_path: Path) -> None:
    objects = kmesh(tmp_path / "objects", {name: OBJECTS[name] for name in list(OBJECTS)[2:3]})
    loaded = load_object(objects[0].read_bytes(), "sockops", {}, {})
    root = lab.bpffs / "daemon"
    (root / "map").mkdir(parents=True)
    for name, held in loaded.maps.items():
        held.pin(root / "map" / name)
    Link.attach_cgroup(loaded.programs["sockops_prog"], lab.cgroup, "cgroup_sock_ops").pin(root / "odd")
    _, manifest = drawn(objects, tmp_path / "out", "--profile", "kmesh", "--root", root)
    assert manifest["attach"][0]["target"] == "${cgroup}"
    assert manifest["attach"][0]["pin"] == "odd"


def test_a_root_has_to_be_on_a_bpffs(tmp_path: Path) -> None:
    path = compile_object(SOURCE, tmp_path / "mesh.bpf.o")
    error = as_json("init", path, "-o", tmp_path / "out", "--root", tmp_path, code=1)["error"]
    assert "no directory on a bpffs" in error["message"]
    assert not (tmp_path / "out").exists()
