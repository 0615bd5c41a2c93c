"""Programs whose section says nothing to libbpf, programs that are left out, and questions that nobody answered."""

from __future__ import annotations

from pathlib import Path

import pytest

import hitless
from meshd.demo.lab import Lab
from tests.releases import ATTACH, write_release

SOURCE = """
MAP(tally, ARRAY, 4, __u32, __u64);
SEC("cgroup/connect4/mesh") int count4(struct bpf_sock_addr *ctx)
{
    __u32 key = 0;
    __u64 *found = bpf_map_lookup_elem(&tally, &key);
    if (found)
        __sync_fetch_and_add(found, 1);
    return 1;
}
SEC("xdp_auth") int early(struct xdp_md *ctx) { return XDP_PASS; }
SEC("xdp") int refused(struct xdp_md *ctx) { return *(int *)(long)ctx->data; }
char _license[] SEC("license") = "GPL";
"""
CONNECT = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
TYPES = """
[object.program.count4]
type = "cgroup/connect4"
[object.program.early]
type = "xdp"
"""
SKIP = "[object.program.refused]\nskip = true\n"


def load(directory: Path, lab: Lab, manifest: str) -> hitless.Bundle:
    return hitless.Bundle.load(write_release(directory, "1.0", SOURCE, manifest), {"cgroup": str(lab.cgroup)})


def test_types_are_given_and_a_program_that_the_kernel_refuses_is_left_out(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, load(tmp_path, lab, TYPES + SKIP + ATTACH))
    lab.run_python("-c", CONNECT, cgroup="mesh")
    assert node.map("tally").get(0) == 1
    assert {path.name for path in (node.current / "progs").iterdir()} == {"count4", "early"}
    assert not hitless.verify(node).problems


def test_a_program_that_is_not_left_out_is_loaded_and_refused(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(hitless.KernelError, match="verifier refused"):
        hitless.apply(node, load(tmp_path, lab, TYPES + ATTACH))


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (SKIP, r"toml:5: store: libbpf does not know section cgroup/connect4/mesh: say what program count4 is"),
        (TYPES.replace("xdp", "packets"), r"toml:\d+: 'packets' is no type of programs: give a section's name"),
        (TYPES.replace('"xdp"', '"cgroup_sock_addr"'), r"'cgroup_sock_addr' is no type of programs"),
        (TYPES + "[object.program.late]\nskip = true\n", r"toml:12: store has no program late; there are: count4"),
        (TYPES + "[object.program.refused]\nskip = 1\n", r"toml:13: skip must be of type bool or str, not int"),
        (TYPES + SKIP + ATTACH.replace("count4", "refused"), r"toml:16: refused \(section xdp\) is left out"),
        (TYPES.replace('"xdp"', '"..."') + '[map.tally]\nwas = "..."\n',
         r"questions that wait for an answer \(line 11: object.0.program.early.type; line 13: map.tally.was\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_line(lab: Lab, tmp_path: Path, manifest: str, words: str) -> None:
    with pytest.raises(hitless.BundleError, match=words):
        load(tmp_path, lab, manifest)
