"""Secure by default: the pin root and the bundle are root's alone, and nothing is followed out of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hitless
from hitless.kernel.bpffs import remove_tree
from hitless.kernel.maps import Map, create
from meshd.demo.lab import Lab
from tests.releases import ATTACH, FIRST
from tests.upgrade.conftest import Make, Release, everything

SOMEBODY = 1234
VARIABLES = {"cgroup": "/nowhere"}
CONVERTERS = "def limit(keys, old, new):\n    return new\n"


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(root: Path) -> dict[str, str]:
    """What is not a link, with its mode, by what it is."""
    found: dict[str, str] = {}
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            found[str(path.relative_to(root.parent))] = stat.filemode(path.lstat().st_mode)
    return found


def private(root: Path) -> bool:
    return set(modes(root).values()) == {"drwx------", "-rw-------"}


# The pin root


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o277])
def test_nobody_but_root_can_enter_or_read_what_an_upgrade_makes_whatever_the_umask(
    node: hitless.Node, release: Release, mask: int
) -> None:
    seen: list[bool] = []
    with umask(mask):
        hitless.apply(node, release(1))
        hitless.apply(node, release(2), prepare=lambda node: seen.append(private(node.root)))
    assert seen == [True]
    assert private(node.root), modes(node.root)


def test_a_root_of_another_user_is_refused_before_its_record_is_read(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    (node.current / "record").unlink()
    with create(2, "forged", 4, 8, 1) as forged:
        forged.pin(node.current / "record")
    os.chown(node.root, SOMEBODY, SOMEBODY)
    for use in (node.observe, lambda: hitless.apply(node, release(2)), lambda: hitless.unload(node)):
        with pytest.raises(hitless.NodeError, match=rf"belongs to user {SOMEBODY}.*chown root:root {node.root}"):
            use()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_root_that_others_can_write_is_refused(node: hitless.Node, release: Release, mode: int) -> None:
    hitless.apply(node, release(1))
    node.root.chmod(mode)
    with pytest.raises(hitless.NodeError, match=rf"mode {mode:04o}.*chmod go-w {node.root}"):
        hitless.apply(node, release(2))


def test_a_directory_above_the_root_that_others_can_write_is_refused(lab: Lab, release: Release) -> None:
    above = lab.bpffs / "above"
    above.mkdir()
    above.chmod(0o777)
    node = hitless.Node(above / "store")
    with pytest.raises(hitless.NodeError, match=rf"chmod go-w {above}"):
        hitless.apply(node, release(1))
    assert not node.root.exists()


def test_a_sticky_directory_above_the_root_is_fine(lab: Lab, release: Release) -> None:
    lab.bpffs.chmod(0o1777)
    assert hitless.apply(hitless.Node(lab.bpffs / "store"), release(1)).start_type == "normal"


@pytest.mark.parametrize("place", ["current", "current/maps", "current/maps/tally", "links/connect4", "writers"])
def test_a_pin_or_directory_under_the_root_that_another_user_owns_is_refused(
    node: hitless.Node, release: Release, place: str
) -> None:
    hitless.apply(node, release(1))
    os.chown(node.root / place, SOMEBODY, SOMEBODY)
    with pytest.raises(hitless.NodeError, match=f"{place} belongs to user {SOMEBODY}"):
        hitless.apply(node, release(2))


def test_a_writer_does_not_open_a_map_below_a_root_of_another_user(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    os.chown(node.root, SOMEBODY, SOMEBODY)
    with pytest.raises(hitless.NodeError, match=f"belongs to user {SOMEBODY}"):
        node.map("limit")[1] = {"rate": 1, "burst": 1}


def test_recovery_makes_nothing_in_a_root_of_another_user(lab: Lab, node: hitless.Node) -> None:
    node.root.mkdir()
    os.chown(node.root, SOMEBODY, SOMEBODY)
    with pytest.raises(hitless.NodeError, match=f"belongs to user {SOMEBODY}"):
        hitless.recover(node)
    assert list(node.root.iterdir()) == []


def test_a_root_that_an_older_hitless_left_open_to_read_is_closed_by_the_next_apply(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    for path in (node.root, *node.root.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    assert hitless.apply(node, release(1)).start_type == "restart"
    assert private(node.root), modes(node.root)


# Symbolic links


@pytest.mark.parametrize("place", ["current", "links", "previous", "writers", "current/maps", "current/progs"])
def test_a_directory_under_the_root_that_is_a_symbolic_link_is_refused(
    node: hitless.Node, release: Release, place: str
) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    elsewhere = node.root.parent / "elsewhere"
    (node.root / place).rename(elsewhere)
    (node.root / place).symlink_to(elsewhere)
    for use in (node.observe, lambda: hitless.apply(node, release(2)), lambda: hitless.unload(node)):
        with pytest.raises(hitless.NodeError, match=f"{place} is a symbolic link"):
            use()
    assert elsewhere.exists()


@pytest.mark.parametrize("name", ["maps", "progs"])
def test_a_public_path_that_leads_elsewhere_is_refused(node: hitless.Node, release: Release, name: str) -> None:
    hitless.apply(node, release(1))
    (node.root / name).unlink()
    (node.root / name).symlink_to(f"previous/{name}")
    with pytest.raises(hitless.NodeError, match=f"{name} was not made by hitless"):
        node.observe()


@pytest.mark.parametrize("place", ["current/record", "current/maps/tally", "current/progs/count4", "links/connect4"])
def test_a_pin_that_is_a_symbolic_link_is_refused(node: hitless.Node, release: Release, place: str) -> None:
    hitless.apply(node, release(1))
    aside = node.root.parent / "aside"
    (node.root / place).rename(aside)
    (node.root / place).symlink_to(aside)
    with pytest.raises(hitless.NodeError, match=f"{place} is a symbolic link"):
        hitless.apply(node, release(2))


def test_a_map_is_not_opened_through_a_symbolic_link(lab: Lab) -> None:
    with create(2, "held", 4, 8, 1) as held:
        held.pin(lab.bpffs / "held")
    (lab.bpffs / "alias").symlink_to("held")
    with pytest.raises(hitless.NodeError, match="alias is a symbolic link, not a pin"):
        Map.open(lab.bpffs / "alias")


def test_the_opening_of_what_is_not_there_says_so(lab: Lab) -> None:
    with pytest.raises(hitless.KernelError, match="ENOENT") as caught:
        Map.open(lab.bpffs / "nothing")
    assert caught.value.facts["call"] == "BPF_OBJ_GET"


def test_a_symbolic_link_deep_in_what_an_upgrade_keeps_is_refused_when_it_is_locked(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    (node.previous / "base").mkdir(parents=True)
    (node.previous / "base" / "held").symlink_to(node.current)
    with pytest.raises(hitless.NodeError, match="base/held is a symbolic link"), node.lock():
        pass


def test_removing_a_tree_leaves_what_its_symbolic_links_lead_to(lab: Lab) -> None:
    kept, tree = lab.bpffs / "kept", lab.bpffs / "tree"
    for directory in (kept, tree, tree / "deep"):
        directory.mkdir()
    with create(2, "held", 4, 8, 1) as held:
        held.pin(kept / "held")
        held.pin(tree / "deep" / "own")
    (tree / "deep" / "directory").symlink_to(kept)
    (tree / "pin").symlink_to(kept / "held")
    (tree / "dangling").symlink_to("nowhere")
    remove_tree(tree)
    assert not tree.exists()
    assert (kept / "held").exists()


def test_unload_removes_the_public_links_and_nothing_that_is_elsewhere(node: hitless.Node, release: Release) -> None:
    elsewhere = node.root.parent / "elsewhere"
    hitless.apply(hitless.Node(elsewhere), release(1))
    kept = everything(hitless.Node(elsewhere))
    hitless.apply(node, release(1))
    hitless.unload(node)
    assert not node.root.exists()
    assert everything(hitless.Node(elsewhere)) == kept


# The bundle


@pytest.fixture
def bundle(build: Make) -> Path:
    """A bundle with a converter, loaded once: all of it is in order."""
    return build("2.0", FIRST, '[map.limit]\nconvert = "converters:limit"\n', CONVERTERS).path


FILES = ["", "bundle.toml", "store.bpf.o", "converters.py"]


@pytest.mark.parametrize("name", FILES)
def test_a_bundle_that_another_user_owns_is_not_loaded(bundle: Path, name: str) -> None:
    os.chown(bundle / name, SOMEBODY, SOMEBODY)
    with pytest.raises(hitless.BundleError, match=f"belongs to user {SOMEBODY}.*chown root:root {bundle / name}") as e:
        hitless.Bundle.load(bundle, VARIABLES)
    assert (e.value.facts["file"], e.value.facts["owner"]) == (str(bundle / name), SOMEBODY)


@pytest.mark.parametrize("bits", [0o020, 0o002])
@pytest.mark.parametrize("name", FILES)
def test_a_bundle_that_others_can_write_is_not_loaded(bundle: Path, name: str, bits: int) -> None:
    mode = stat.S_IMODE((bundle / name).stat().st_mode) | bits
    (bundle / name).chmod(mode)
    with pytest.raises(hitless.BundleError, match=f"mode {mode:04o} .*chmod go-w {bundle / name}"):
        hitless.Bundle.load(bundle, VARIABLES)


def test_a_bundle_of_who_owns_hitless_itself_is_loaded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone.py"
    clone.touch()
    for path in (clone, bundle, *bundle.iterdir()):
        os.chown(path, SOMEBODY, SOMEBODY)
    monkeypatch.setattr("hitless.bundle.__file__", str(clone))
    assert hitless.Bundle.load(bundle, VARIABLES).version == "2.0"


def test_a_bundle_of_another_user_can_be_looked_at(bundle: Path) -> None:
    for name in FILES:
        os.chown(bundle / name, SOMEBODY, SOMEBODY)
        (bundle / name).chmod(0o777)
    assert hitless.Bundle.load(bundle).version == "2.0"


def test_a_file_of_a_bundle_that_is_a_pipe_is_refused_and_not_waited_for(bundle: Path) -> None:
    (bundle / "store.bpf.o").unlink()
    os.mkfifo(bundle / "store.bpf.o")
    with pytest.raises(hitless.BundleError, match="is no regular file"):
        hitless.Bundle.load(bundle, VARIABLES)


def test_what_was_checked_is_what_is_read(build: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = build("2.0", FIRST).path
    real = os.fstat
    swapped = bundle.with_name("swapped")

    def swap_the_directory_once_it_was_looked_at(descriptor: int) -> os.stat_result:
        seen = real(descriptor)
        if stat.S_ISDIR(seen.st_mode) and not swapped.exists():
            bundle.rename(swapped)
            bundle.mkdir()
            (bundle / "bundle.toml").write_text("forged = 1")
        return seen

    monkeypatch.setattr(os, "fstat", swap_the_directory_once_it_was_looked_at)
    assert hitless.Bundle.load(bundle, VARIABLES).version == "2.0"
    assert swapped.exists()


# The digest


def edit_manifest(bundle: Path) -> None:
    (bundle / "bundle.toml").write_text((bundle / "bundle.toml").read_text() + "# changed\n")


def edit_object(bundle: Path) -> None:
    (bundle / "store.bpf.o").write_bytes((bundle / "store.bpf.o").read_bytes() + b"\0")


def edit_converters(bundle: Path) -> None:
    (bundle / "converters.py").write_text(CONVERTERS + "# changed\n")


@pytest.mark.parametrize("edit", [edit_manifest, edit_object, edit_converters])
def test_a_change_of_any_file_of_a_bundle_is_refused_by_its_pinned_digest(
    bundle: Path, edit: Callable[[Path], None]
) -> None:
    pinned = hitless.Bundle.load(bundle).digest
    hitless.Bundle.load(bundle, VARIABLES, digest=pinned)
    edit(bundle)
    found = hitless.Bundle.load(bundle).digest
    with pytest.raises(hitless.BundleError, match=f"digest {found}, not {pinned}"):
        hitless.Bundle.load(bundle, VARIABLES, digest=pinned)


def test_variables_do_not_change_the_digest(bundle: Path) -> None:
    assert "${cgroup}" in ATTACH
    assert hitless.Bundle.load(bundle, {"cgroup": "/other"}).digest == hitless.Bundle.load(bundle).digest
