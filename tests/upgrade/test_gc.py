"""What gc drops: the last generation and the rests of upgrades; never what others pinned, or what nobody has read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.links import Link
from hitless.kernel.maps import Map, create, is_alive
from hitless.kernel.programs import Program
from hitless.upgrade.record import create_record, read_record, write_record
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade
from tests.upgrade.conftest import Make, Release
from tests.upgrade.test_map_types import RING, connect, reader
from tests.upgrade.test_verify import holding, problems, twin, wait_until

BACK = ("tally", "limit", "extra")


@pytest.fixture
def upgraded(node: hitless.Node, release: Release) -> hitless.Node:
    """Release 2 runs, and release 1 is kept as the previous one."""
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    return node


def pins(node: hitless.Node) -> list[str]:
    return sorted(str(path) for path in node.root.rglob("*"))


def paths(found: hitless.Garbage) -> set[str]:
    return {str(Path(item.path).relative_to(found.root)) for item in found.items}


def test_gc_drops_the_last_generation_and_its_maps_are_gone_from_the_kernel(upgraded: hitless.Node) -> None:
    with Map.open(upgraded.previous / "maps" / "tally") as tally:
        number = tally.info.id
    found = hitless.gc(upgraded)
    assert paths(found) == {f"previous/{one}" for one in ("maps/tally", "maps/limit", "maps/owner", "progs/count4",
                                                          "record")}  # fmt: skip
    assert not upgraded.previous.exists()
    wait_until(lambda: not is_alive(number))
    assert problems(upgraded) == {}
    assert upgraded.observe().previous is None


def test_the_running_release_works_on_after_gc(
    upgraded: hitless.Node, release: Release
) -> None:
    upgraded.map("owner")[5] = 55
    hitless.gc(upgraded)
    assert upgraded.map("owner").get(5) == 55
    hitless.apply(upgraded, release(1), allow_loss=BACK)
    assert upgraded.map("owner").get(5) == 55
    assert problems(upgraded) == {}


def test_a_dry_run_lists_the_same_and_changes_nothing(upgraded: hitless.Node) -> None:
    before = pins(upgraded), upgraded.observe()
    would = hitless.gc(upgraded, dry_run=True)
    assert (pins(upgraded), upgraded.observe()) == before
    did = hitless.gc(upgraded)
    assert (would.items, would.freed, would.dry_run, did.dry_run) == (did.items, did.freed, True, False)


def test_gc_tells_what_memory_comes_back_and_that_kept_maps_give_none(upgraded: hitless.Node) -> None:
    items = {Path(item.path).name: item for item in hitless.gc(upgraded).items}
    assert items["tally"].kept_by is None
    assert items["tally"].memory > 64 * 1024
    assert items["owner"].kept_by == "the running generation"
    assert hitless.gc(upgraded).freed == 0


def test_gc_counts_only_what_nothing_holds(upgraded: hitless.Node) -> None:
    with holding(upgraded.previous / "maps" / "tally") as process:
        found = hitless.gc(upgraded)
        items = {Path(item.path).name: item for item in found.items}
        assert items["tally"].kept_by == f"process {process.pid}"
        assert found.freed == sum(item.memory for item in found.items if item.kept_by is None)
        assert process.stdin is not None
        process.stdin.close()


def test_a_second_gc_finds_nothing(upgraded: hitless.Node) -> None:
    hitless.gc(upgraded)
    assert hitless.gc(upgraded).items == ()


def test_gc_of_a_root_that_is_not_there_finds_nothing(node: hitless.Node) -> None:
    assert hitless.gc(node).items == ()
    assert not node.root.exists()


@pytest.mark.parametrize("step", ["copy", "verify"])
def test_gc_drops_the_rest_of_an_upgrade_that_had_switched_no_hook(
    node: hitless.Node, release: Release, step: str, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade(step, node, releases[2], {"cgroup": str(lab.cgroup)})
    found = hitless.gc(node)
    assert "next/maps/limits" in paths(found)
    assert not node.next.exists()
    assert problems(node) == {}


def test_gc_leaves_the_rest_of_an_upgrade_alone_if_somebody_pinned_something_in_it(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade("copy", node, releases[2], {"cgroup": str(lab.cgroup)})
    create(1, "theirs", 4, 4, 1).pin(node.next / "maps" / "theirs")
    with pytest.raises(hitless.NodeError, match="next/maps/theirs was not made by hitless"):
        hitless.gc(node)
    assert (node.next / "maps" / "limits").exists()


def test_gc_drops_a_next_that_has_no_record(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.next.mkdir()
    assert paths(hitless.gc(node)) == {"next"}
    assert not node.next.exists()


@pytest.mark.parametrize("step", ["merge", "clean-up"])
def test_gc_leaves_an_upgrade_alone_that_had_begun_to_switch_hooks(
    node: hitless.Node, release: Release, step: str, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade(step, node, releases[2], {"cgroup": str(lab.cgroup)})
    before = pins(node)
    with pytest.raises(hitless.InterruptedUpgradeError, match=r"an upgrade to 2\.0 was interrupted.*hitless recover"):
        hitless.gc(node)
    assert pins(node) == before
    hitless.recover(node)
    hitless.gc(node)
    assert problems(node) == {}


def test_gc_waits_for_an_upgrade_and_then_names_it(upgraded: hitless.Node) -> None:
    with upgraded.lock(), pytest.raises(hitless.BusyError, match="is being upgraded by process"):
        hitless.gc(hitless.Node(upgraded.root), wait=0.1)


def test_a_link_pin_that_is_dead_goes_and_applying_again_attaches_it(upgraded: hitless.Node, release: Release) -> None:
    with Link.open(upgraded.links / "connect4") as link:
        link.detach()
    found = hitless.gc(upgraded)
    assert "links/connect4" in paths(found)
    assert not (upgraded.links / "connect4").exists()
    hitless.apply(upgraded, release(2))
    assert problems(upgraded) == {}


def test_a_link_that_runs_stays(upgraded: hitless.Node) -> None:
    hitless.gc(upgraded)
    assert (upgraded.links / "connect4").exists()


def test_a_dead_link_of_somebody_elses_program_stays(upgraded: hitless.Node, make: Make, lab: Lab) -> None:
    other = hitless.Node(upgraded.root.with_name("other"))
    hitless.apply(other, make("1.0", "MAP(held, HASH, 64, __u32, __u64);\n"))
    with Program.open(other.current / "progs" / "count4") as theirs:
        link = Link.attach_cgroup(theirs, lab.cgroup, "cgroup_inet4_connect")
    link.pin(upgraded.links / "theirs")
    link.detach()
    hitless.gc(upgraded)
    assert (upgraded.links / "theirs").exists()
    hitless.unload(other)


def test_scratch_directories_of_upgrades_go(upgraded: hitless.Node) -> None:
    (upgraded.current / "base").mkdir()
    create(1, "base", 4, 4, 1).pin(upgraded.current / "base" / "tally")
    assert "current/base/tally" in paths(hitless.gc(upgraded))
    assert not (upgraded.current / "base").exists()
    assert problems(upgraded) == {}


def foreign_name(node: hitless.Node) -> Path:
    path = node.previous / "maps" / "theirs"
    create(1, "theirs", 4, 4, 1).pin(path)
    return path


def foreign_map(node: hitless.Node) -> Path:
    path = node.previous / "maps" / "tally"
    other = twin(path)
    path.unlink()
    other.pin(path)
    return path


def foreign_program(node: hitless.Node) -> Path:
    path = node.previous / "progs" / "count4"
    path.unlink()
    with Program.open(node.current / "progs" / "count4") as other:
        other.pin(path)
    return path


def foreign_directory(node: hitless.Node) -> Path:
    path = node.root / "theirs"
    path.mkdir()
    return path


@pytest.mark.parametrize("put", [foreign_name, foreign_map, foreign_program, foreign_directory])
def test_gc_removes_nothing_while_something_foreign_is_in_what_it_would_drop(
    upgraded: hitless.Node, put: Callable[[hitless.Node], Path]
) -> None:
    path = put(upgraded)
    before = pins(upgraded)
    with pytest.raises(hitless.NodeError) as caught:
        hitless.gc(upgraded)
    assert str(path) in caught.value.message
    assert pins(upgraded) == before


def test_a_last_generation_without_a_record_cannot_be_told_from_others_and_stays(upgraded: hitless.Node) -> None:
    (upgraded.previous / "record").unlink()
    with pytest.raises(hitless.NodeError, match=r"previous has no record.*rm -r"):
        hitless.gc(upgraded)
    assert (upgraded.previous / "maps" / "tally").exists()


def test_a_gc_that_was_killed_half_way_is_finished_by_the_next(upgraded: hitless.Node) -> None:
    for pin in ("maps/tally", "progs/count4"):
        (upgraded.previous / pin).unlink()
    hitless.gc(upgraded)
    upgraded.previous.mkdir()  # killed between the record and the directory
    hitless.gc(upgraded)
    assert not upgraded.previous.exists()


def test_the_previous_record_of_a_newer_hitless_is_left_to_it(upgraded: hitless.Node) -> None:
    record = upgraded.previous / "record"
    write_record(record, msgspec.structs.replace(read_record(record), schema=99))
    with pytest.raises(hitless.NodeError, match="newer hitless"):
        hitless.gc(upgraded)


def test_a_first_start_that_was_killed_is_dropped_and_the_root_stays(
    node: hitless.Node, releases: dict[int, Path], lab: Lab
) -> None:
    kill_upgrade("copy", node, releases[1], {"cgroup": str(lab.cgroup)})
    hitless.gc(node)
    assert not node.next.exists()
    assert node.observe().current is None


def test_unread_bytes_of_a_ring_buffer_are_not_lost_unless_that_is_allowed(
    node: hitless.Node, make: Make, lab: Lab
) -> None:
    hitless.apply(node, make("1.0", RING % 4096, program=""))
    connect(lab, 5)
    hitless.apply(node, make("2.0", RING % 8192, program=""))
    would = hitless.gc(node, dry_run=True)
    assert would.blocked == ("held",)
    with pytest.raises(hitless.LossNotAllowedError, match=r"80 bytes in the ring buffer held.*--allow-loss held"):
        hitless.gc(node)
    assert node.previous.exists()
    hitless.gc(node, allow_loss=["held"])
    assert not node.previous.exists()


def test_a_ring_buffer_that_a_reader_holds_lives_on_and_needs_no_allowance(
    node: hitless.Node, make: Make, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hitless.upgrade.ring._DRAIN_SECONDS", 0.1)
    hitless.apply(node, make("1.0", RING % 4096, program=""))
    connect(lab, 5)
    with reader(node) as process:
        hitless.apply(node, make("2.0", RING % 8192, program=""))
        found = hitless.gc(node)
        assert {item.kept_by for item in found.items if item.path.endswith("held")} == {f"process {process.pid}"}


def test_a_record_with_many_maps_has_room_for_their_ids(node: hitless.Node, make: Make) -> None:
    many = "".join(f"MAP(m{number}, ARRAY, 1, __u32, __u64);\n" for number in range(400))
    hitless.apply(node, make("1.0", many))
    record = read_record(node.current / "record")
    assert len(record.pinned_maps) == 400
    assert problems(node) == {}


def test_a_record_that_outgrows_its_map_is_refused_and_the_old_one_stays(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    record = read_record(node.current / "record")
    node.next.mkdir()
    create_record(node.next / "record", record)
    huge = msgspec.structs.replace(record, converters={str(n): str(n * n * 7919) for n in range(9000)})
    with pytest.raises(hitless.NodeError, match="does not fit"):
        write_record(node.next / "record", huge)
    assert read_record(node.next / "record") == record
