"""What users and nodes get wrong: each a clear error, and nothing live changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.kernel.maps import create
from meshd.demo.lab import Lab
from tests.patience import patient
from tests.releases import ATTACH, COUNTING, FIRST, compile_object, write_release
from tests.upgrade.conftest import Release


def manifest(directory: Path, text: str) -> Path:
    """A bundle with this manifest beside a good object."""
    write_release(directory, "1.0", FIRST + COUNTING)
    (directory / "bundle.toml").write_text(text)
    return directory


HEAD = '[bundle]\nname = "store"\nversion = "1.0"\n[[object]]\nfile = "store.bpf.o"\n'


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[bundle]\nname = 'x'\n", 1, "needs version"),
        ("[bundle]\nname = 'x'\nversion = 2\n", 3, "must be of type str"),
        (HEAD + "[bundel]\nx = 1\n", 6, "unknown key 'bundel'"),
        (HEAD + "color = 'red'\n", 6, "unknown key 'color'"),
        (HEAD + "[map.nothing]\nwas = 'x'\n", 6, "no object of this bundle has a map nothing; its maps: limit"),
        (HEAD + "[map.tally]\non_loss = 'ignore'\n", 7, '"error" or "discard"'),
        (HEAD + "[map.tally.field.count]\nmerge = 'add'\n", 7, "merge is keep, sum, max"),
        (HEAD + "[map.tally.field.count]\nwhen = 'now'\n", 7, "unknown key 'when'"),
        (HEAD + ATTACH.replace("count4", "count5"), 8, "no object has a program count5; there are: count4"),
        (HEAD + ATTACH.replace('"cgroup"', '"cgrp"'), 9, "unknown hook 'cgrp'"),
        (HEAD + ATTACH.replace('"connect4"', '"a.b"'), 11, "cannot be a pin name"),
        (HEAD + ATTACH + ATTACH, 17, "two [[attach]] have the link connect4"),
        (HEAD + ATTACH.replace("${cgroup}", "${group}"), 10, "give one with --set group=VALUE"),
        (HEAD.replace("store.bpf.o", "gone.bpf.o"), 5, "cannot be read"),
        (HEAD.replace("store.bpf.o", "../1/store.bpf.o"), 5, "not a file beside the manifest"),
        (HEAD.replace("store.bpf.o", "a\\u0000b"), 5, "'a\\x00b' has control characters"),
        (HEAD + ATTACH.replace('"cgroup"', '"xdp"'), 8, "attaches to cgroup_inet4_connect, not to xdp"),
        (HEAD + ATTACH + "netns = 'x'\n", 12, "netns says where an interface is, and cgroup is on a cgroup"),
        (HEAD + ATTACH + "mode = 'generic'\n", 12, "mode is native or generic, and for xdp only"),
        (HEAD + "[map.tally.slots]\n1 = 'count4'\n", 6, "slots hold programs, and this map is no program array: tally"),
        ("[bundle\n", None, "is not TOML"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_line(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    with pytest.raises(hitless.BundleError) as caught:
        hitless.Bundle.load(manifest(tmp_path, text), {"cgroup": "/nowhere"})
    assert words in caught.value.message
    if line is not None:
        assert f"bundle.toml:{line}:" in caught.value.message


def test_a_rule_for_a_field_that_does_not_exist_is_refused_with_its_line(tmp_path: Path) -> None:
    text = ATTACH + '[map.tally.field.cuont]\nmerge = "sum"\n'
    with pytest.raises(hitless.BundleError, match=r"toml:\d+: map 'tally': no field 'cuont' in its value; it has"):
        hitless.Bundle.load(write_release(tmp_path, "1.1", FIRST + COUNTING, text))


def untouched(node: hitless.Node, kind: type[Exception], words: str, action: Callable[[], object]) -> None:
    """The action fails so, and what is live is what was live."""
    before = node.observe()
    with pytest.raises(kind, match=words):
        action()
    assert node.observe() == before


def test_a_pin_root_that_is_not_on_a_bpffs_is_refused(release: Release, tmp_path: Path) -> None:
    with pytest.raises(hitless.NodeError, match=r"not on a bpffs.*choose a directory under /sys/fs/bpf"):
        hitless.apply(hitless.Node(tmp_path / "mesh"), release(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"), [("a.b", "refuses names with a dot"), ("gone/mesh", "gone is not there; make it first")]
)
def test_a_pin_root_that_cannot_be_made_is_refused(release: Release, lab: Lab, name: str, words: str) -> None:
    with pytest.raises(hitless.NodeError, match=words):
        hitless.apply(hitless.Node(lab.bpffs / name), release(1))


def test_a_whole_mount_is_refused_as_pin_root(release: Release, lab: Lab) -> None:
    with pytest.raises(hitless.NodeError, match="choose a directory in it"):
        hitless.apply(hitless.Node(lab.bpffs), release(1))


def test_another_programs_pins_under_the_root_are_refused_by_path(node: hitless.Node, release: Release) -> None:
    node.root.mkdir()
    create(1, "theirs", 4, 4, 1).pin(node.root / "theirs")
    untouched_root = sorted(node.root.iterdir())
    for action in (lambda: hitless.apply(node, release(1)), lambda: hitless.unload(node)):
        with pytest.raises(hitless.NodeError, match=r"theirs was not made by hitless"):
            action()
    assert sorted(node.root.iterdir()) == untouched_root


def test_another_programs_link_directory_is_not_taken_for_ours(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    create(1, "theirs", 4, 4, 1).pin(node.links / "theirs")
    with pytest.raises(hitless.NodeError, match="theirs is a pinned map, not a link"):
        hitless.apply(node, release(2))


def test_a_directory_where_a_pin_should_be_is_refused(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    pin = node.current / "maps" / "tally"
    pin.unlink()
    pin.mkdir()
    with pytest.raises(hitless.HitlessError, match=r"maps/tally"):
        hitless.apply(node, release(2))


def test_a_program_pinned_where_a_map_should_be_is_refused(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    pin = node.current / "maps" / "tally"
    pin.unlink()
    from hitless.kernel.programs import Program

    Program.open(node.current / "progs" / "count4").pin(pin)
    with pytest.raises(hitless.NodeError, match="tally is a pinned prog, not a map"):
        hitless.apply(node, release(2))


def test_a_pin_that_was_removed_by_hand_is_named(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    (node.current / "maps" / "limit").unlink()
    with pytest.raises(hitless.NodeError, match="limit is missing"):
        hitless.apply(node, release(2))


def test_a_cgroup_v1_path_is_refused(node: hitless.Node, releases: dict[int, Path]) -> None:
    v1 = next(
        (Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines() if " cgroup " in line),
        None,
    )
    path = v1 or Path("/proc")  # a machine without cgroup v1 has other filesystems that are no cgroup v2
    bundle = hitless.Bundle.load(releases[1], {"cgroup": str(path)})
    with pytest.raises(hitless.NodeError, match="cgroup v1 directory" if v1 else "not a cgroup v2 directory"):
        hitless.apply(node, bundle)
    assert not node.root.exists()


def test_a_cgroup_that_is_not_there_is_refused(node: hitless.Node, releases: dict[int, Path]) -> None:
    bundle = hitless.Bundle.load(releases[1], {"cgroup": "/sys/fs/cgroup/nowhere"})
    with pytest.raises(hitless.NodeError, match="nowhere is not a directory"):
        hitless.apply(node, bundle)
    assert not node.root.exists()


def test_another_bundle_is_not_applied_over_this_one(
    node: hitless.Node, release: Release, lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, release(1))
    other = hitless.Bundle.load(
        write_release(tmp_path, "1.0", FIRST + COUNTING, name="other"), {"cgroup": str(lab.cgroup)}
    )
    untouched(node, hitless.BundleError, "runs bundle 'store'", lambda: hitless.apply(node, other))


def test_a_program_that_the_verifier_refuses_leaves_the_old_release(
    node: hitless.Node, release: Release, lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, release(1))
    endless = 'SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return *(volatile int *)0; }\n'
    bad = hitless.Bundle.load(
        write_release(tmp_path, "9.0", FIRST + endless + 'char _license[] SEC("license") = "GPL";\n'),
        {"cgroup": str(lab.cgroup)},
    )
    untouched(node, hitless.KernelError, "the verifier refused a program", lambda: hitless.apply(node, bad))
    assert not node.next.exists()


def test_entries_that_do_not_fit_a_smaller_map_stop_the_upgrade(
    node: hitless.Node, release: Release, lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, release(1))
    node.map("owner").update_many((number, number) for number in range(60))
    small = FIRST.replace("MAP(owner, HASH, 64", "MAP(owner, HASH, 32") + COUNTING
    bad = hitless.Bundle.load(write_release(tmp_path, "1.1", small), {"cgroup": str(lab.cgroup)})
    with pytest.raises(hitless.LossNotAllowedError, match=r"owner has 60 entries, and release 1\.1 has room"):
        hitless.plan(node, bad)
    untouched(node, hitless.LossNotAllowedError, "owner has 60 entries", lambda: hitless.apply(node, bad))
    assert len(node.map("owner").items()) == 60


def test_an_object_without_types_for_a_changed_map_is_not_guessed(
    node: hitless.Node, release: Release, lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, release(1))
    blind = FIRST.replace(
        "MAP(owner, HASH, 64, __u32, __u64);",
        "struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __uint(key_size, 4); "
        '__uint(value_size, 8); } owner SEC(".maps");',
    )
    bad = hitless.Bundle.load(write_release(tmp_path, "1.1", blind + COUNTING), {"cgroup": str(lab.cgroup)})
    untouched(node, hitless.LossNotAllowedError, "owner", lambda: hitless.apply(node, bad))


def test_objects_that_are_none_are_refused(tmp_path: Path) -> None:
    good = compile_object(FIRST + COUNTING, tmp_path / "good.bpf.o").read_bytes()
    plain = tmp_path / "plain.bpf.o"
    include = "-I/usr/include/x86_64-linux-gnu"
    subprocess.run(
        ["clang-19", "-target", "bpf", "-O2", include, "-c", str(tmp_path / "good.bpf.c"), "-o", str(plain)], check=True
    )
    for data, words in [
        (b"no ELF at all", "ELF"),
        (good[: len(good) // 2], "truncated|ELF|cut"),
        (plain.read_bytes(), "BTF"),
    ]:
        directory = manifest(tmp_path / "bundle", HEAD)
        (directory / "store.bpf.o").write_bytes(data)
        with pytest.raises(hitless.HitlessError, match=words):
            hitless.Bundle.load(directory)


def test_objects_for_another_byte_order_are_not_applied(
    node: hitless.Node, release: Release, lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, release(1))
    directory = write_release(tmp_path, "1.1", FIRST + COUNTING)
    include = "-I/usr/include/x86_64-linux-gnu"
    source, target = str(directory / "store.bpf.c"), str(directory / "store.bpf.o")
    subprocess.run(["clang-19", "-target", "bpfeb", "-g", "-O2", include, "-c", source, "-o", target], check=True)
    bundle = hitless.Bundle.load(directory, {"cgroup": str(lab.cgroup)})
    untouched(node, hitless.UnsupportedError, "for a big-endian processor", lambda: hitless.apply(node, bundle))


def test_without_privilege_the_error_says_so(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    before = node.observe()
    bundle = [str(releases[2]), "--set", f"cgroup={lab.cgroup}"]
    for command in (["status"], ["plan", *bundle], ["apply", *bundle]):
        done = subprocess.run(
            ["setpriv", "--bounding-set=-all", sys.executable, "-m", "hitless", *command, "--root", str(node.root)],
            capture_output=True, text=True, timeout=patient(20), check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 1
        assert "lacks CAP_SYS_ADMIN" in done.stderr
        assert "run as root" in done.stderr
        assert "Traceback" not in done.stderr
    assert node.observe() == before
