"""The old cgroup storage: kept as it is, or refused, since the kernel would let a new program overrun the old one's."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import hitless
from hitless.errors import KernelError
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import load_object
from meshd.demo.lab import Lab
from tests.releases import ATTACH, compile_object, write_release

STORED = """
struct { __uint(type, BPF_MAP_TYPE_CGROUP_STORAGE);
         __type(key, struct bpf_cgroup_storage_key); __type(value, struct tally); } stored SEC(".maps");
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    struct tally *found = bpf_get_local_storage(&stored, 0);
    __sync_fetch_and_add(&found->count, 1);
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
TALLY = "struct tally { __u64 count; };"
WIDER = "struct tally { __u32 other; __u32 spare; __u64 count; };"
UNUSED = """
MAP(other, ARRAY, 1, __u32, __u32);
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "Dual BSD/GPL";
"""
CONNECT = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 7))"


def counted(held: Map, cgroup: Path) -> int | None:
    key = cgroup.stat().st_ino.to_bytes(8, "little") + (10).to_bytes(8, "little")  # BPF_CGROUP_INET4_CONNECT
    value = held.lookup(key)
    return None if value is None else int.from_bytes(value[-8:], "little")


def bundle(directory: Path, version: str, source: str, lab: Lab) -> hitless.Bundle:
    return hitless.Bundle.load(write_release(directory / version, version, source, ATTACH), {"cgroup": str(lab.cgroup)})


def test_a_program_updated_in_place_gets_no_storage_of_its_own_or_is_refused(lab: Lab, tmp_path: Path) -> None:
    first, second = (
        load_object(compile_object(text + STORED, tmp_path / f"{name}.o").read_bytes(), name, {}, {})
        for name, text in (("first", TALLY), ("second", TALLY))
    )
    with Link.attach_cgroup(first.programs["count4"], lab.cgroup, "cgroup_inet4_connect") as link:
        try:
            link.update(second.programs["count4"], first.programs["count4"])
        except KernelError as error:  # older kernels (6.1, 6.12) see that it has another map
            assert error.facts["errno"] == errno.EINVAL
        assert lab.run_python("-c", CONNECT, cgroup="clients").returncode == 0
        assert counted(first.maps["stored"], lab.cgroup) == 1
        assert counted(second.maps["stored"], lab.cgroup) is None


def test_storage_that_did_not_change_is_kept_with_what_it_holds(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    hitless.apply(node, bundle(tmp_path, "1.0", TALLY + STORED, lab))
    lab.run_python("-c", CONNECT, cgroup="clients")
    hitless.apply(node, bundle(tmp_path, "2.0", TALLY + STORED, lab))
    lab.run_python("-c", CONNECT, cgroup="clients")
    assert counted(Map.open(node.root / "maps" / "stored"), lab.cgroup) == 2


def test_storage_of_another_layout_is_refused_by_the_plan(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    hitless.apply(node, bundle(tmp_path, "1.0", TALLY + STORED, lab))
    with pytest.raises(hitless.UnsupportedError, match="map stored of type cgroup_storage changed, and link connect4"):
        hitless.plan(node, bundle(tmp_path, "2.0", WIDER + STORED, lab), allow_loss=["stored"])


def test_a_program_that_begins_to_use_storage_is_refused_before_it_is_attached(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, bundle(tmp_path, "1.0", UNUSED, lab))
    with pytest.raises(hitless.UnsupportedError, match="program count4 uses cgroup storage that the program on link"):
        hitless.apply(node, bundle(tmp_path, "2.0", TALLY + STORED, lab), allow_loss=["other"])
    assert node.observe().version == "1.0"
    assert not node.next.exists()
