"""Programs that a release can do without: left out where the kernel refuses them, and said."""

from __future__ import annotations

from pathlib import Path

import pytest

import hitless
from hitless.kernel.maps import Map
from meshd.demo.lab import Lab
from tests.cli.test_commands import hitless_command
from tests.releases import ATTACH, COUNTING, FIRST, write_release

# Whose result is out of range: the verifier refuses it.
REFUSED = 'SEC("cgroup/connect6") int count6(struct bpf_sock_addr *ctx) { return 5; }\n'
FINE = REFUSED.replace("return 5", "return 1")
JUMPS = """
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 2); __uint(key_size, 4);
         __uint(value_size, 4); } jumps SEC(".maps");
"""
SECOND = ATTACH.replace("count4", "count6").replace("connect4", "connect6")
SLOT = '[map.jumps.slots]\n0 = "count6"\n'
OPTIONAL = 'skip = "refused"\n'


def release(folder: Path, lab: Lab, source: str, skip: str = OPTIONAL, version: str = "1.0") -> hitless.Bundle:
    path = write_release(folder / version, version, FIRST + JUMPS + COUNTING + source, ATTACH + SECOND + SLOT)
    manifest = path / "bundle.toml"
    text = manifest.read_text()
    first = text.index("[[attach]]")
    manifest.write_text(f"{text[:first]}[object.program.count6]\n{skip}\n{text[first:]}")
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})


def test_a_program_that_the_kernel_refuses_is_left_out_with_its_hook_and_slot(
    lab: Lab, node: hitless.Node, tmp_path: Path
) -> None:
    bundle = release(tmp_path, lab, REFUSED)
    assert hitless.plan(node, bundle).left_out == ("count6",)
    result = hitless.apply(node, bundle)
    assert result.left_out == ("count6",)
    assert [hook.link for hook in result.hooks] == ["connect4"]
    with Map.open(node.current / "maps" / "jumps") as held:
        assert held.lookup(bytes(4)) is None
    assert hitless.verify(node).problems == ()
    assert not hitless.plan(node, bundle).changes_anything
    places = ("--root", node.root, "--set", f"cgroup={lab.cgroup}")
    assert "count6 is left out, since this kernel refuses it" in hitless_command("plan", bundle.path, *places)


def test_one_that_the_kernel_takes_is_there(lab: Lab, node: hitless.Node, tmp_path: Path) -> None:
    result = hitless.apply(node, release(tmp_path, lab, FINE))
    assert result.left_out == ()
    assert [hook.link for hook in result.hooks] == ["connect4", "connect6"]


def test_without_that_word_a_refused_program_is_refused(lab: Lab, node: hitless.Node, tmp_path: Path) -> None:
    with pytest.raises(hitless.KernelError, match="verifier refused"):
        hitless.apply(node, release(tmp_path, lab, REFUSED, "skip = false\n"))


def test_a_hook_that_runs_is_not_taken_off_by_that(lab: Lab, node: hitless.Node, tmp_path: Path) -> None:
    hitless.apply(node, release(tmp_path, lab, FINE))
    with pytest.raises(hitless.NodeError, match="link connect6 runs one"):
        hitless.apply(node, release(tmp_path, lab, REFUSED, version="2.0"))
    assert hitless.verify(node).problems == ()


def test_another_word_is_no_answer(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(hitless.BundleError, match='true, false or "refused"'):
        release(tmp_path, lab, FINE, 'skip = "sometimes"\n')
