"""What verify proves, and what it and status say of a node that someone changed by hand: what, where, what to do."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.libbpf import ffi, lib
from hitless.kernel.links import Link
from hitless.kernel.maps import Map, create
from hitless.kernel.programs import Program
from hitless.upgrade.drift import put_back
from hitless.upgrade.record import read_record, write_record
from hitless.upgrade.status import status
from hitless.upgrade.verify import check_generation
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade
from tests.upgrade.conftest import Make, Release

GLOBALS = "__u64 seen; __u32 limit = 7; const volatile __u32 fixed = 3;\nMAP(held, HASH, 64, __u32, __u64);\n"
USING = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u32 key = 1;
    __sync_fetch_and_add(&seen, 1);
    return bpf_map_lookup_elem(&held, &key) ? 1 : limit > fixed;
}
char _license[] SEC("license") = "GPL";
"""


def problems(node: hitless.Node) -> dict[str, tuple[str, ...]]:
    """What verify finds, by the name of the check."""
    return {check.name: check.problems for check in hitless.verify(node).checks if check.problems}


def looked_at(node: hitless.Node) -> dict[str, int]:
    return {check.name: check.looked_at for check in hitless.verify(node).checks}


def twin(path: Path) -> Map:
    """A map of the same type, sizes, flags and types as the one pinned at ``path``."""
    with Map.open(path) as there:
        info = there.info
    opts = ffi.new("struct bpf_map_create_opts *")
    opts.sz, opts.map_flags = ffi.sizeof("struct bpf_map_create_opts"), info.flags
    opts.btf_key_type_id, opts.btf_value_type_id = info.key_type_id, info.value_type_id
    opts.btf_fd = lib().bpf_btf_get_fd_by_id(info.btf_id)
    try:
        return create(1, info.name, info.key_size, info.value_size, info.max_entries, opts)
    finally:
        os.close(opts.btf_fd)


def replace(path: Path, by: Map | Program | Link) -> int:
    """Pin something else at ``path``; returns its id."""
    path.unlink()
    by.pin(path)
    return int(by.info.id)


def test_a_release_that_just_started_agrees_with_its_record(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    found = hitless.verify(node)
    assert (found.problems, found.version, found.generation) == ((), "1.0", 1)
    assert looked_at(node) == {
        "record": 1, "maps": 3, "globals": 0, "programs": 1, "links": 1, "public paths": 2, "nothing foreign": 15,
    }  # fmt: skip


def test_a_release_with_global_variables_agrees_before_and_after_an_upgrade(node: hitless.Node, make: Make) -> None:
    for version, maps in (("1.0", GLOBALS), ("2.0", GLOBALS.replace("__u64 seen", "__u64 more; __u64 seen"))):
        hitless.apply(node, make(version, maps, USING))
        assert problems(node) == {}
        assert looked_at(node)["globals"] == 3


def test_every_generation_agrees_when_upgrades_go_forth_and_back(node: hitless.Node, release: Release) -> None:
    for number in (1, 2, 1, 2):
        hitless.apply(node, release(number), allow_loss=("tally", "limit", "extra"))
        assert problems(node) == {}


def test_a_release_that_was_kept_by_a_restart_agrees(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(1))
    assert problems(node) == {}


def test_verify_changes_nothing(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    before = node.observe()
    hitless.verify(node)
    assert node.observe() == before


def test_a_record_of_an_older_hitless_names_no_ids_and_verify_says_so(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    record = node.current / "record"
    write_record(record, msgspec.structs.replace(read_record(record), pinned_maps={}, pinned_programs={}))
    found = hitless.verify(node)
    assert found.problems == ()
    assert any("names no ids" in text for check in found.checks for text in check.untold)


def test_a_program_that_uses_a_map_which_is_not_pinned_is_found_by_its_id(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    with Map.open(node.current / "maps" / "tally") as tally:
        number = tally.info.id
    record = read_record(node.current / "record")
    maps = {name: spec for name, spec in record.maps.items() if name != "tally"}
    write_record(node.current / "record", msgspec.structs.replace(record, maps=maps, pinned_maps={}))
    (node.current / "maps" / "tally").unlink()
    (told,) = problems(node)["programs"]
    assert f"count4 uses map {number} (tally), which is not pinned under {node.current}" in told


# What changes by hand: each is recognised, named and comes with what to do.


def test_a_map_pin_that_was_removed_is_found_and_the_advice_puts_it_back(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    path = node.current / "maps" / "tally"
    with Map.open(path) as tally:
        number = tally.info.id
    path.unlink()
    (told,) = problems(node)["maps"]
    assert f"{path} is missing" in told
    assert put_back("map", number, path) in told
    with pytest.raises(hitless.NodeError, match="tally is missing"):
        status(node)
    subprocess.run(put_back("map", number, path), shell=True, check=True)
    assert problems(node) == {}


def test_a_removed_map_that_nobody_holds_any_more_cannot_be_put_back(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    (node.current / "maps" / "owner").unlink()  # which no program uses
    wait_until(lambda: "is gone, with all it held" in problems(node)["maps"][0])


def test_a_pin_replaced_by_a_map_of_the_same_shape_is_found_by_its_id(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    path = node.current / "maps" / "tally"
    with Map.open(path) as tally:
        number = tally.info.id
    other = replace(path, twin(path))
    (told,) = problems(node)["maps"]
    assert f"{path} is map {other}, and the record has map {number}" in told
    assert told in status(node).problems
    subprocess.run(put_back("map", number, path), shell=True, check=True)
    assert (problems(node), status(node).problems) == ({}, ())


def test_a_pin_replaced_by_a_map_of_another_shape_is_found_by_its_shape_even_without_ids(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    record = node.current / "record"
    write_record(record, msgspec.structs.replace(read_record(record), pinned_maps={}))
    replace(node.current / "maps" / "tally", create(1, "tally", 4, 8, 1024))
    (told,) = problems(node)["maps"]
    assert "its values have 8 bytes, and those of the record 16" in told


def test_a_map_whose_layout_is_not_the_records_is_found_even_if_the_sizes_agree(
    node: hitless.Node, make: Make
) -> None:
    held = "struct held { __u32 %s; __u32 %s; };\nMAP(held, HASH, 64, __u32, struct held);\n"
    hitless.apply(node, make("1.0", held % ("a", "b")))
    other = hitless.Node(node.root.with_name("other"))
    hitless.apply(other, make("1.1", held % ("b", "a")))
    record = node.current / "record"
    write_record(record, msgspec.structs.replace(read_record(record), pinned_maps={}))
    with Map.open(other.current / "maps" / "held") as theirs:
        replace(node.current / "maps" / "held", theirs)
    (told,) = problems(node)["maps"]
    assert "its layout is not the record's: a: moved" in told
    hitless.unload(other)


def test_a_variable_section_of_another_size_is_found(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", GLOBALS, USING))
    record = node.current / "record"
    write_record(record, msgspec.structs.replace(read_record(record), pinned_maps={}))
    replace(node.current / "data" / "store:bss", create(2, "store.bss", 4, 64, 1))
    (told,) = problems(node)["globals"]
    assert "has 64 bytes, and the record's 8" in told


def test_a_program_pin_that_was_removed_is_found(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    path = node.current / "progs" / "count4"
    with Program.open(path) as program:
        number = program.info.id
    path.unlink()
    (told,) = problems(node)["programs"]
    assert f"{path} is missing" in told
    subprocess.run(put_back("prog", number, path), shell=True, check=True)
    assert problems(node) == {}


def test_a_replaced_program_pin_is_named_and_the_link_is_not_blamed(
    node: hitless.Node, release: Release, make: Make
) -> None:
    hitless.apply(node, release(1))
    other = hitless.Node(node.root.with_name("other"))
    hitless.apply(other, make("1.0", "MAP(held, HASH, 64, __u32, __u64);\n"))
    path = node.current / "progs" / "count4"
    with Program.open(path) as program:
        number = program.info.id
    with Program.open(other.current / "progs" / "count4") as theirs:
        foreign = replace(path, theirs)
    found = problems(node)
    assert set(found) == {"programs"}
    assert f"{path} is program {foreign}, and the record has program {number}" in found["programs"][0]
    assert [text for text in status(node).problems if "link" in text] == []
    assert found["programs"][0] in status(node).problems
    hitless.unload(other)


def test_a_map_pinned_where_a_program_was_is_found(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    replace(node.current / "progs" / "count4", create(1, "theirs", 4, 4, 1))
    (told,) = problems(node)["programs"]
    assert "count4 is a pinned map, not a program" in told


def test_a_link_that_runs_another_program_is_found(node: hitless.Node, release: Release, make: Make) -> None:
    hitless.apply(node, release(1))
    other = hitless.Node(node.root.with_name("other"))
    hitless.apply(other, make("1.0", "MAP(held, HASH, 64, __u32, __u64);\n"))
    with (
        Program.open(node.current / "progs" / "count4") as ours,
        Program.open(other.current / "progs" / "count4") as theirs,
        Link.open(node.links / "connect4") as link,
    ):
        link.update(theirs, ours)
        number = theirs.info.id
    (told,) = problems(node)["links"]
    assert f"link connect4 runs program {number}, not count4" in told
    assert "someone else changed it" in told
    assert told in status(node).problems
    hitless.apply(node, release(1))
    assert problems(node) == {}
    hitless.unload(other)


def test_a_link_that_was_detached_by_hand_is_found_and_applying_again_attaches_it(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    subprocess.run(["bpftool", "link", "detach", "pinned", str(node.links / "connect4")], check=True)
    (told,) = problems(node)["links"]
    assert "link connect4 is detached" in told
    assert "somebody detached it" in told
    assert told in status(node).problems
    hitless.apply(node, release(1))
    assert problems(node) == {}


def test_a_link_pin_that_was_removed_is_found_and_applying_again_attaches_it(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    (node.links / "connect4").unlink()
    (told,) = problems(node)["links"]
    assert "link connect4 is gone" in told
    assert told in status(node).problems
    hitless.apply(node, release(1))
    assert problems(node) == {}


def test_a_link_to_another_target_is_found(node: hitless.Node, release: Release, lab: Lab) -> None:
    hitless.apply(node, release(1))
    elsewhere = lab.cgroup / "elsewhere"
    elsewhere.mkdir()
    with Program.open(node.current / "progs" / "count4") as program:
        replace(node.links / "connect4", Link.attach_cgroup(program, elsewhere, "cgroup_inet4_connect"))
    (told,) = problems(node)["links"]
    assert f"link connect4 is attached to cgroup {elsewhere.stat().st_ino}, not to {lab.cgroup}" in told
    (node.links / "connect4").unlink()
    elsewhere.rmdir()


def test_a_cgroup_that_was_removed_is_named_with_its_link(node: hitless.Node, make: Make, lab: Lab) -> None:
    target = lab.cgroup / "gone"
    target.mkdir()
    bundle = make("1.0", "MAP(held, HASH, 64, __u32, __u64);\n")
    bundle = msgspec.structs.replace(
        bundle, attach=tuple(msgspec.structs.replace(one, target=str(target)) for one in bundle.attach)
    )
    hitless.apply(node, bundle)
    target.rmdir()
    (told,) = problems(node)["links"]
    assert f"{target} was removed" in told
    detached = f"link connect4 is detached: {target} was removed; make it again and apply the same release again"
    wait_until(lambda: problems(node)["links"] == (detached,))  # the kernel takes its time
    assert status(node).problems == (detached,)
    target.mkdir()
    hitless.apply(node, bundle)
    assert problems(node) == {}
    target.rmdir()


def test_a_link_that_the_record_does_not_name_is_found(node: hitless.Node, release: Release, lab: Lab) -> None:
    hitless.apply(node, release(1))
    with Program.open(node.current / "progs" / "count4") as program:
        Link.attach_cgroup(program, lab.cgroup, "cgroup_inet4_connect").pin(node.links / "theirs")
    (told,) = problems(node)["links"]
    assert "links/theirs is not in the record" in told


@pytest.mark.parametrize("target", ["previous/maps", None])
def test_a_public_path_that_is_missing_or_leads_elsewhere_is_found_and_the_advice_puts_it_right(
    node: hitless.Node, release: Release, target: str | None
) -> None:
    hitless.apply(node, release(1))
    advice = f"ln -sfn current/maps {shlex.quote(str(node.root / 'maps'))}"
    (node.root / "maps").unlink()
    if target is not None:
        (node.root / "maps").symlink_to(target)
    found = problems(node)
    assert set(found) == {"public paths"}
    (told,) = found["public paths"]
    assert str(node.root / "maps") in told
    assert advice in told
    if target is None:
        assert status(node).problems == (told,)
    else:
        with pytest.raises(hitless.NodeError, match=f"leads to {target}.*{advice}"):
            status(node)
    subprocess.run(advice, shell=True, check=True)
    assert (problems(node), status(node).problems) == ({}, ())


def test_a_directory_in_the_place_of_a_public_path_is_found(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    (node.root / "progs").unlink()
    (node.root / "progs").mkdir()
    (told,) = problems(node)["public paths"]
    assert "progs is no symbolic link" in told
    assert "remove it, then put it right: ln -sfn current/progs" in told


def test_what_others_put_under_the_root_is_found_all_of_it(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    create(1, "theirs", 4, 4, 1).pin(node.root / "theirs")
    create(1, "theirs", 4, 4, 1).pin(node.current / "maps" / "more")
    (node.current / "odd").mkdir()
    found = problems(node)["nothing foreign"]
    assert len(found) == 3
    for path in (node.root / "theirs", node.current / "maps" / "more", node.current / "odd"):
        assert any(str(path) in text for text in found)
    with pytest.raises(hitless.NodeError, match="choose another root"):
        status(node)


def test_a_record_that_was_removed_is_named_with_what_to_do(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    (node.current / "record").unlink()
    for look in (hitless.verify, status):
        with pytest.raises(hitless.NodeError, match=r"has no record.*hitless unload"):
            look(node)


@pytest.mark.parametrize(("at", "words"), [(0, "not a record of hitless"), (9, "is damaged"), (40, "is damaged")])
def test_a_record_whose_bytes_were_overwritten_is_named_with_what_to_do(
    node: hitless.Node, release: Release, at: int, words: str
) -> None:
    hitless.apply(node, release(1))
    with Map.open(node.current / "record") as record:
        data = bytearray(record.lookup(bytes(4)) or b"")
        data[at] ^= 0xFF
        record.update(bytes(4), bytes(data))
    for look in (hitless.verify, status):
        with pytest.raises(hitless.NodeError, match=rf"{words}.*hitless unload"):
            look(node)


def test_a_record_of_a_newer_hitless_is_named_with_what_to_do(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    record = node.current / "record"
    write_record(record, msgspec.structs.replace(read_record(record), schema=99))
    for look in (hitless.verify, status):
        with pytest.raises(hitless.NodeError, match=r"newer hitless \(record schema 99.*use that version"):
            look(node)


def test_a_damaged_record_of_the_last_generation_is_named_and_need_not_end_the_running_one(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    with Map.open(node.previous / "record") as record:
        record.update(bytes(4), bytes(record.info.value_size))
    advice = f"rm -r {node.previous}"
    with pytest.raises(hitless.NodeError, match=advice):
        status(node)
    assert advice in problems(node)["nothing foreign"][0]
    subprocess.run(advice, shell=True, check=True)
    assert (problems(node), status(node).problems) == ({}, ())


def test_a_root_with_nothing_left_after_a_reboot_is_named_with_what_to_do(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    hitless.unload(node)
    with pytest.raises(hitless.NodeError, match=r"nothing of hitless runs under.*restart of the machine.*apply"):
        hitless.verify(node)
    assert status(node).version is None


# While an upgrade runs, or after one was killed.


def test_verify_during_an_upgrade_names_the_upgrader(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))

    def looks(_: hitless.Node) -> None:
        with pytest.raises(hitless.BusyError, match=f"being upgraded by process {os.getpid()}"):
            hitless.verify(node)

    hitless.apply(node, release(2), prepare=looks)
    assert problems(node) == {}


@pytest.mark.parametrize("step", ["copy", "merge", "clean-up"])
def test_verify_after_a_killed_upgrade_says_that_it_was_interrupted(
    node: hitless.Node, release: Release, step: str, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade(step, node, releases[2], {"cgroup": str(lab.cgroup)})
    with pytest.raises(hitless.InterruptedUpgradeError, match=r"an upgrade to 2\.0 was interrupted"):
        hitless.verify(node)
    (told,) = status(node).problems
    assert "upgrade to 2.0" in told
    hitless.recover(node)
    assert problems(node) == {}


def test_a_generation_that_is_not_what_its_record_says_is_refused_before_its_cutover(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))

    def spoil(node: hitless.Node) -> None:
        create(1, "theirs", 4, 4, 1).pin(node.next / "maps" / "theirs")

    with pytest.raises(hitless.VerifyError, match=r"next/maps/theirs was not made by hitless"):
        hitless.apply(node, release(2), prepare=spoil)
    assert problems(node) == {}
    check_generation(node.current, read_record(node.current / "record"))


# What is left of earlier generations.

HOLD = """
import ctypes, sys
held = [ctypes.CDLL("libbpf.so.1").bpf_obj_get(path.encode()) for path in sys.argv[1:]]
assert min(held) >= 0
print("ready", flush=True)
sys.stdin.read()
"""


def holding(*paths: Path) -> subprocess.Popen[str]:
    """A process that holds what is pinned at ``paths`` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 5
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_status_tells_of_maps_and_programs_of_earlier_generations_and_who_holds_them(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    with Program.open(node.current / "progs" / "count4") as program, Map.open(node.current / "maps" / "tally") as tally:
        ids = program.info.id, tally.info.id
    with holding(node.current / "progs" / "count4") as process:
        hitless.apply(node, release(2))
        (held,) = status(node).remnants
        assert (held.kind, held.id, held.pinned, held.processes) == ("program", ids[0], True, (process.pid,))
        hitless.apply(node, release(1), allow_loss=("tally", "limit", "extra"))
        program_left, *maps_left = sorted(status(node).remnants, key=lambda one: one.kind, reverse=True)
        assert (program_left.id, program_left.name, program_left.generation) == (ids[0], "count4", 1)
        assert (program_left.pinned, program_left.processes) == (False, (process.pid,))
        assert program_left.memory > 0
        assert [(one.id, one.programs) for one in maps_left] == [(ids[1], (ids[0],))]
        assert status(node).problems == ()
        assert process.stdin is not None
        process.stdin.close()
    wait_until(lambda: status(node).remnants == ())


def test_an_old_program_that_still_runs_on_somebodys_link_is_a_problem(
    node: hitless.Node, release: Release, lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with Program.open(node.current / "progs" / "count4") as program:
        link = Link.attach_cgroup(program, lab.cgroup, "cgroup_inet4_connect")
        number = program.info.id
    with link:
        hitless.apply(node, release(2))
        (told,) = status(node).problems
        assert f"program {number} (count4) of generation 1 still runs on link {link.info.id}" in told
        assert "bpftool link detach" in told
        link.detach()
        assert status(node).problems == ()


def test_a_node_after_some_upgrades_has_nothing_left_that_nobody_refers_to(
    node: hitless.Node, release: Release
) -> None:
    for number in (1, 2, 1):
        hitless.apply(node, release(number), allow_loss=("tally", "limit", "extra"))
    assert status(node).remnants == ()
