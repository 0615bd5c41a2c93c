"""Nodes that are not as they should be: each is refused in a sentence, and left as it is."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hitless
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.upgrade import adopt as adopting
from hitless.upgrade.recognise import Recognised
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.adopt.conftest import MANIFEST, NEW, OLD, Loader, pinned
from tests.adopt.test_adopt import identity
from tests.releases import write_release

Release = Callable[[int], hitless.Bundle]
_MAP_FREEZE = 22


def tree(root: Path) -> list[str]:
    """All that is below, symbolic links with what they lead to."""
    return sorted(f"{path} {path.readlink() if path.is_symlink() else ''}" for path in root.rglob("*"))


@contextmanager
def refused(loader: Loader, match: str) -> Iterator[None]:
    """The block raises NodeError with this text, and leaves every path as it was."""
    before = tree(loader.root)
    with pytest.raises(hitless.NodeError, match=match):
        yield
    assert tree(loader.root) == before


def refuse_all(loader: Loader, node: hitless.Node, bundle: hitless.Bundle, match: str) -> None:
    """So do looking and adopting."""
    with refused(loader, match):
        hitless.recognise_running(node, bundle)
    with refused(loader, match):
        hitless.adopt(node, bundle)


def given(lab: Lab, path: Path) -> hitless.Bundle:
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))})


def test_where_no_daemon_can_be_it_is_said_that_there_is_none(
    lab: Lab, loader: Loader, release: Release, tmp_path: Path
) -> None:
    for root, match in (
        (lab.bpffs / "nowhere", "is not there, so nothing runs there that could be adopted"),
        (loader.root / "map" / "tally", "is no directory, so nothing runs there"),
        (tmp_path, "is on .*, not on a bpffs"),
    ):
        refuse_all(loader, hitless.Node(root), release(1), match)
    assert hitless.adopt_for(hitless.Node(lab.bpffs / "nowhere"), release(2)) is None
    with refused(loader, "not on a bpffs"):
        hitless.adopt_for(hitless.Node(tmp_path), release(2))


def test_what_is_at_a_path_and_is_no_pin_of_its_kind_is_named(
    loader: Loader, node: hitless.Node, release: Release
) -> None:
    idle, link = loader.root / "map" / "idle", loader.root / loader.link
    idle.rename(loader.root / "idle")
    idle.mkdir()
    refuse_all(loader, node, release(1), "is a directory, not a pin")
    idle.rmdir()
    for target in ("../idle", "nowhere"):
        idle.symlink_to(target)
        refuse_all(loader, node, release(1), "is a symbolic link, not a pin")
        idle.unlink()
    with Link(pinned(link)) as held, Program.by_id(held.info.program_id) as program:
        for one, match in ((held, "is a pinned link, not a map"), (program, "is a pinned prog, not a map")):
            one.pin(idle)
            refuse_all(loader, node, release(1), match)
            idle.unlink()
    (loader.root / "idle").rename(idle)
    link.rename(loader.root / "link")
    with Map(pinned(idle)) as other:
        other.pin(link)
    refuse_all(loader, node, release(1), "is a pinned map, not a link")


def test_who_uses_the_names_of_hitless_keeps_what_is_there(
    loader: Loader, node: hitless.Node, release: Release
) -> None:
    made, home = loader.root / "hitless-adopting", loader.root / "hitless"
    with Map(pinned(loader.root / "map" / "idle")) as held:
        held.pin(made)
        with refused(loader, "hitless-adopting is no directory"):
            hitless.adopt(node, release(1))
        made.unlink()
        made.symlink_to("map")
        with refused(loader, "hitless-adopting is a symbolic link to map"):
            hitless.adopt(node, release(1))
        made.unlink()
        made.mkdir(mode=0o700)
        held.pin(made / "precious")
        with refused(loader, "precious was not made by hitless"):
            hitless.adopt(node, release(1))
        (made / "precious").unlink()
        held.pin(home)
        refuse_all(loader, node, release(1), "hitless is there, where hitless would keep what is its own")
        home.unlink()
        home.mkdir(mode=0o700)
        held.pin(home / "precious")
        refuse_all(loader, node, release(1), "hitless is there, where hitless would keep what is its own")
        (home / "precious").unlink()
    hitless.adopt(node, release(1))
    assert not made.exists()


def test_a_directory_that_others_can_change_is_not_believed(
    loader: Loader, node: hitless.Node, release: Release
) -> None:
    for directory in (loader.root, loader.root / "map"):
        directory.chmod(0o777)
        refuse_all(loader, node, release(1), f"{directory} has mode 0777")
        directory.chmod(0o700)
        os.chown(directory, 1000, 1000)
        refuse_all(loader, node, release(1), f"{directory} belongs to user 1000")
        os.chown(directory, 0, 0)


def test_of_two_who_adopt_at_once_one_does_and_the_other_says_so(
    loader: Loader, node: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, told = adopting._build, []

    def slowly(made: hitless.Node, found: Recognised) -> None:
        build(made, found)
        with pytest.raises(hitless.BusyError) as busy:
            hitless.adopt(hitless.Node(loader.root), release(1), wait=0.05)
        told.append(busy.value.message)

    monkeypatch.setattr(adopting, "_build", slowly)
    hitless.adopt(node, release(1))
    assert f"process {os.getpid()}" in told[0]
    assert status(node).problems == ()
    with refused(loader, "was adopted already, and runs store 1.0: apply a release"):
        hitless.adopt(node, release(1))


def test_a_link_that_runs_nowhere_is_no_hook_to_take_over(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    with Link(pinned(loader.root / loader.link)) as link:
        link.detach()
    refuse_all(loader, node, release(1), r"(?s)runs nowhere: what it was on was removed.*or leave the hook out$")


def test_a_version_that_cannot_be_written_is_asked_for(
    loader: Loader, node: hitless.Node, release: Release
) -> None:
    freeze(loader.root / "map" / "version_of")
    refuse_all(loader, node, release(1), "map version_of is frozen or read-only")


def test_there_is_no_way_back_into_a_map_that_takes_no_entries(
    loader: Loader, node: hitless.Node, release: Release
) -> None:
    freeze(loader.root / "map" / "tally")
    hitless.adopt(node, release(1))
    hitless.apply(node, release(2))
    for call in (hitless.plan_rollback, hitless.rollback):
        with refused(loader, "map tally of 1.0 is frozen or read-only, so that the entries of now cannot come back"):
            call(node, ("tally",))
    hitless.apply(node, release(1), allow_loss=("tally",))
    assert node.map("tally").get(80) == {"count": 240, "last": 560}


def freeze(path: Path) -> None:
    fd = pinned(path)
    attributes = ctypes.create_string_buffer(fd.to_bytes(4, "little"), 64)
    assert ctypes.CDLL(None).syscall(321, _MAP_FREEZE, attributes, 4) == 0
    os.close(fd)


def test_a_snapshot_that_cannot_be_read_or_written_is_named(
    lab: Lab, loader: Loader, node: hitless.Node, tmp_path: Path
) -> None:
    for name, match in (("none/x.json", "none is no directory"), ("bad.json", "bad.json, where .* damaged"),
                        ("here.json", "here.json, where .* Is a directory")):  # fmt: skip
        (tmp_path / "bad.json").write_text("{nonsense")
        (tmp_path / "here.json").mkdir(exist_ok=True)
        manifest = MANIFEST.replace("[public]", f'[public]\nsnapshot = "{tmp_path}/{name}"')
        refuse_all(loader, node, given(lab, write_release(tmp_path / name[:3], "1.0", OLD, manifest)), match)


def test_a_release_that_no_longer_says_where_the_pins_are_is_refused_and_one_without_any_removes_them(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release, tmp_path: Path
) -> None:
    hitless.adopt(node, release(1))
    bare = MANIFEST[MANIFEST.index("[map.idle]") :].replace('pin = "sockconn/connect_prog"\n', "")
    for call in (hitless.plan, hitless.apply):
        with refused(loader, "would find none of the 4 that 1.0 has"):
            call(node, given(lab, write_release(tmp_path / "bare", "2.0", NEW, bare)))
    into = given(lab, write_release(tmp_path / "none", "2.0", NEW, f"[public]\n{bare}"))
    assert {(one.path, one.action) for one in hitless.plan(node, into).paths} == {
        (path, "remove") for path in ("map/idle", "map/tally", "map/version_of", loader.link)
    }
    hitless.apply(node, into)
    assert not any(path.is_symlink() for path in (loader.root / "map").iterdir())


def test_without_adopt_the_pins_of_another_loader_are_refused_with_the_way_to_take_them_over(
    loader: Loader, node: hitless.Node, release: Release
) -> None:
    for call in (hitless.plan, hitless.apply):
        with refused(loader, r"idle is there already, .* take over what runs there \(hitless adopt"):
            call(node, release(1))


def test_one_path_is_for_one_map_or_link_and_not_for_what_hitless_makes(lab: Lab, tmp_path: Path) -> None:
    for number, (pin, match) in enumerate((
        ("map/tally", "map idle and map tally are both to be pinned at map/tally"),
        ("map//./tally", "map idle and map tally are both"),
        ("sockconn/connect_prog", "link connect4 and map idle are both"),
        ("map/tally/x", "map idle and map tally are both to be pinned at map/tally"),
        ("sockconn", "link connect4 and map idle are both to be pinned at sockconn"),
        ("hitless/current/maps/idle", "hitless keeps there what is its own"),
        ("hitless-adopting/idle", "hitless keeps there what is its own"),
    )):  # fmt: skip
        manifest = MANIFEST.replace("[map.idle]", f'[map.idle]\npin = "{pin}"')
        with pytest.raises(hitless.BundleError, match=match):
            given(lab, write_release(tmp_path / str(number), "1.0", OLD, manifest))


def test_pins_may_be_on_another_mount_of_a_bpffs_and_on_nothing_else(
    lab: Lab, loader: Loader, node: hitless.Node, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(other)], check=True)
    try:
        with Map(pinned(loader.root / "map" / "idle")) as held:
            (loader.root / "map" / "idle").unlink()
            held.pin(other / "idle")
            number = held.info.id
        elsewhere = MANIFEST.replace("[map.idle]", f'[map.idle]\npin = "{other}/idle"')
        hitless.adopt(node, given(lab, write_release(tmp_path / "1", "1.0", OLD, elsewhere)))
        hitless.apply(node, given(lab, write_release(tmp_path / "2", "2.0", NEW, elsewhere)))
        assert identity(other / "idle") == ("map_id", number)
        assert status(node).problems == ()
        nowhere = MANIFEST.replace("[map.idle]", f'[map.idle]\npin = "{tmp_path}/pins/idle"')
        with refused(loader, "pins/idle, which is to be a path of the daemon's own loader, is on .*, not on a bpffs"):
            hitless.apply(node, given(lab, write_release(tmp_path / "3", "3.0", NEW, nowhere)))
        hitless.unload(node)
        assert not (other / "idle").is_symlink()
    finally:
        subprocess.run(["umount", str(other)], check=True)


def test_a_map_that_is_pinned_where_the_manifest_does_not_say_is_asked_for_and_a_second_pin_is_told(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release, tmp_path: Path
) -> None:
    manifest = MANIFEST.replace('maps = "map"', 'maps = "maps"')
    wrong = given(lab, write_release(tmp_path / "o", "1.0", OLD, manifest))
    refuse_all(loader, node, wrong, f"map tally is pinned at {loader.root}/map/tally, where this manifest does not")
    with Map(pinned(loader.root / "map" / "tally")) as held:
        held.pin(loader.root / "too")
    found = hitless.adopt(node, release(1))
    assert found.notes == (f"{loader.root}/too is another pin of map tally: it stays with the map that is there now",)


def test_a_loader_that_starts_or_stops_meanwhile_is_let_go_first(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = adopting._build
    pins = [loader.root / name for name in ("map/tally", "map/version_of", "map/idle", loader.link)]

    def anew() -> None:
        for path in pins:
            path.unlink()
        loader.start(release(1).objects[0].data, "1.0")

    for meanwhile in (anew, pins[2].unlink):
        monkeypatch.setattr(adopting, "_build", lambda *args, do=meanwhile: (build(*args), do()))
        with pytest.raises(hitless.BusyError, match="the daemon's own loader started or stopped meanwhile"):
            hitless.adopt(node, release(1))
        assert sorted(one.name for one in loader.root.iterdir()) == ["map", "sockconn"]
        assert not pins[0].is_symlink()
    monkeypatch.setattr(adopting, "_build", build)
    loader.start(release(1).objects[0].data, "1.0")
    hitless.adopt(node, release(1))
    assert status(node).problems == ()


def test_unload_leaves_what_the_daemons_own_loader_has_put_in_the_place_of_a_path(
    loader: Loader, node: hitless.Node, release: Release
) -> None:
    hitless.adopt(node, release(1))
    (loader.root / "map" / "idle").unlink()
    loader.start(release(1).objects[0].data, "1.0")
    (told,) = status(node).problems
    assert "idle is not what hitless put there" in told
    with refused(loader, "idle is not what hitless put there: .*; nothing was changed"):
        hitless.apply(node, release(2))
    hitless.unload(node)
    assert [path.name for path in loader.root.rglob("*") if not path.is_dir()] == ["idle"]


def test_a_daemons_directory_may_be_a_whole_mount_and_have_pins_that_are_closed_to_all(
    lab: Lab, release: Release, tmp_path: Path
) -> None:
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0755", "bpf", str(tmp_path)], check=True)
    try:
        loader = Loader(tmp_path, lab.cgroup_of("clients"))
        loader.start(release(1).objects[0].data, "1.0")
        with Map(pinned(tmp_path / "map" / "idle")) as held:
            held.pin(tmp_path / "closed")
        (tmp_path / "closed").chmod(0)
        node = hitless.Node(tmp_path)
        hitless.adopt(node, release(1))
        hitless.apply(node, release(2))
        assert status(node).problems == ()
        hitless.unload(node)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # the node has its lock's directories open
