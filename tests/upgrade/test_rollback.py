"""Going back to the last release and forth again: what comes along, what is named as lost, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import hitless
from hitless.cli.commands import main
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.upgrade import finish, staging, transaction
from hitless.upgrade.model import Record
from hitless.upgrade.phases import PHASES, recovery
from hitless.upgrade.record import read_record, write_record
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.cli.test_commands import as_json, hitless_command
from tests.patience import often
from tests.releases import ATTACH, COUNTING, write_release
from tests.upgrade import test_globals, test_map_types, test_sockets
from tests.upgrade.conftest import Make, Release, everything
from tests.upgrade.test_map_types import NARROW, WIDE, pop_all, push, queue
from tests.upgrade.test_storage import COUNTING as STORING
from tests.upgrade.test_storage import FIRST as STORED
from tests.upgrade.test_storage import SECOND as STORED_WIDER
from tests.upgrade.test_storage import clients as owners
from tests.upgrade.test_under_fire import clients, counted

# What release 1 of tests.releases has no place for: tally.since, limits.class, extra.
LOST = ("tally", "limit", "extra")
COUNTERS = "struct tally {{ {} }};\nMAP(tally, HASH, 1024, __u32, struct tally);\n"
ONE = COUNTERS.format('__u32 count TAG("merge=sum"); __u32 last;')
TWO = COUNTERS.format('__u32 last; __u32 count TAG("merge=sum");')


# What comes along


def test_what_the_newer_release_learned_is_in_the_older_ones_layout(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.map("tally")[7] = {"count": 1, "last": 70}
    node.map("limit")[1] = {"rate": 10, "burst": 2}
    hitless.apply(node, release(2))
    node.map("tally")[7] = {"count": 5, "port": 71, "since": 0}
    node.map("tally")[9] = {"count": 3, "port": 90}
    del node.map("limits")[1]
    node.map("limits")[2] = {"rate": 20, "burst": 4}
    node.map("owner")[1] = 100
    result = hitless.rollback(node, allow_loss=LOST)
    assert (result.start_type, result.from_version, result.to_version, result.generation) == (
        "rollback", "2.0", "1.0", 3,
    )  # fmt: skip
    assert {port: (entry["count"], entry["last"]) for port, entry in node.map("tally").items()} == {
        7: (5, 71),
        9: (3, 90),
    }
    assert dict(node.map("limit").items()) == {2: {"rate": 20, "burst": 4}}
    assert dict(node.map("owner").items()) == {1: 100}
    assert hitless.verify(node).problems == ()
    assert status(node).problems == ()


def test_what_has_no_place_in_the_older_release_is_named_and_refused(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    before = everything(node)
    blocked = {entry.name: entry.loss for entry in hitless.plan_rollback(node).blocked}
    assert any("since is dropped" in loss for loss in blocked["tally"])
    assert set(blocked) == {"tally", "limit"}  # release 1 says itself that `extra` may go
    with pytest.raises(hitless.LossNotAllowedError, match=r"going from 2\.0 to 1\.0 would lose state"):
        hitless.rollback(node)
    assert everything(node) == before


def test_back_and_forth_ten_times_loses_nothing_that_both_layouts_hold(
    node: hitless.Node, build: Make
) -> None:
    hitless.apply(node, build("1.0", ONE))
    hitless.apply(node, build("2.0", TWO))
    entries = {port: {"count": port * 3, "last": port} for port in range(500)}
    for port, entry in entries.items():
        node.map("tally")[port] = entry
    for turn in range(10):
        hitless.rollback(node)
        assert node.observe().version == ("1.0" if turn % 2 == 0 else "2.0")
        assert node.observe().generation == turn + 3
        assert dict(node.map("tally").items()) == entries
        assert hitless.verify(node).problems == ()
    assert status(node).problems == ()


def test_no_increment_is_lost_or_gained_while_it_goes_back_and_forth(
    node: hitless.Node, release: Release, lab: Lab
) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    with clients(lab) as tries:
        until, turns = time.monotonic() + 5, 0
        while time.monotonic() < until:
            hitless.rollback(node, allow_loss=LOST)
            turns += 1
    assert turns >= often(10)
    assert sum(tries.values()) > often(5_000)
    assert counted(node) == tries


def test_fields_that_the_newer_release_lacks_start_anew_and_the_plan_says_so(node: hitless.Node, build: Make) -> None:
    first = COUNTERS.format('__u32 count TAG("merge=sum"); __u32 mark TAG("default=4");')
    hitless.apply(node, build("1.0", first))
    node.map("tally")[1] = {"count": 1, "mark": 9}
    hitless.apply(node, build("2.0", COUNTERS.format('__u32 count TAG("merge=sum");')), allow_loss=("tally",))
    (entry,) = hitless.plan_rollback(node).maps[:1]
    assert entry.notes == ("mark is its default, or zero, in every entry: 2.0 does not have it",)
    hitless.rollback(node)
    assert dict(node.map("tally").items()) == {1: {"count": 1, "mark": 4}}


def test_a_map_that_the_newer_release_lacks_is_as_the_older_one_left_it(node: hitless.Node, build: Make) -> None:
    hitless.apply(node, build("1.0", ONE + "MAP(only, HASH, 8, __u32, __u64);\n"))
    node.map("only")[1] = 11
    hitless.apply(node, build("2.0", TWO), allow_loss=("only",))
    planned = {entry.name: entry for entry in hitless.plan_rollback(node).maps}["only"]
    assert (planned.action, planned.method) == ("create", "as 1.0 left it")
    hitless.rollback(node)
    assert dict(node.map("only").items()) == {1: 11}


def test_renames_and_policies_of_a_manifest_hold_in_both_directions(
    node: hitless.Node, build: Make, lab: Lab
) -> None:
    plain = "struct entry {{ __u32 {}; __u32 {}; }};\nMAP({}, HASH, 64, __u32, struct entry);\n"
    rules = '[map.second]\nwas = "first"\n[map.second.field.now]\nwas = "then"\nmerge = "sum"\n'
    hitless.apply(node, build("1.0", ONE + plain.format("then", "other", "first")))
    node.map("first")[1] = {"then": 5, "other": 6}
    hitless.apply(node, build("2.0", ONE + plain.format("other", "now", "second"), rules))
    assert dict(node.map("second").items()) == {1: {"now": 5, "other": 6}}

    def both_count(event: hitless.Progress) -> None:
        if event.step == "catch-up":
            for directory, name, at in ((node.current, "second", 4), (node.next, "first", 0)):
                with Map.open(directory / "maps" / name) as held:
                    value = bytearray(held.lookup((1).to_bytes(4, "little")) or b"")
                    value[at] += 10
                    held.update((1).to_bytes(4, "little"), bytes(value))

    hitless.rollback(node, progress=both_count)
    assert dict(node.map("first").items()) == {1: {"then": 25, "other": 6}}
    hitless.rollback(node)
    assert dict(node.map("second").items()) == {1: {"now": 25, "other": 6}}


CONVERTED = "struct price {{ __u64 {}; }};\nMAP(price, HASH, 64, __u32, struct price);\n"
RULES = '[map.price]\nconvert = "converters:price"\n'
THERE = "def price(keys, old, new):\n    new['cents'] = old['euros'] * 100\n    return new\n"
BACK = "def price_back(keys, new, old):\n    old['euros'] = new['cents'] // 100\n    return old\n"


def test_a_converter_with_a_function_back_converts_there_and_back(node: hitless.Node, build: Make) -> None:
    hitless.apply(node, build("1.0", ONE + CONVERTED.format("euros")))
    hitless.apply(node, build("2.0", ONE + CONVERTED.format("cents"), RULES, THERE + BACK))
    node.map("price")[1] = {"cents": 700}
    hitless.rollback(node)
    assert dict(node.map("price").items()) == {1: {"euros": 7}}
    node.map("price")[2] = {"euros": 3}
    hitless.rollback(node)
    assert dict(node.map("price").items()) == {1: {"cents": 700}, 2: {"cents": 300}}


def test_without_a_function_back_the_loss_is_named(node: hitless.Node, build: Make) -> None:
    hitless.apply(node, build("1.0", ONE + CONVERTED.format("euros")))
    hitless.apply(node, build("2.0", ONE + CONVERTED.format("cents"), RULES, THERE))
    node.map("price")[1] = {"cents": 700}
    with pytest.raises(hitless.LossNotAllowedError, match="has no function price_back"):
        hitless.rollback(node)
    hitless.rollback(node, allow_loss=("price",))
    assert dict(node.map("price").items()) == {}


# Kinds of maps

ENTRY = "struct entry {{ {} }};\n{}"
OLD_ENTRY, NEW_ENTRY = '__u32 n TAG("merge=sum"); __u32 same;', '__u32 same; __u32 n TAG("merge=sum");'


@pytest.mark.parametrize("kind", ["HASH", "ARRAY", "LRU_HASH", "PERCPU_HASH", "PERCPU_ARRAY"])
def test_entries_come_back_and_stale_ones_do_not(node: hitless.Node, build: Make, kind: str) -> None:
    maps = f"MAP(held, {kind}, 64, __u32, struct entry);\n"
    hitless.apply(node, build("1.0", ONE + ENTRY.format(OLD_ENTRY, maps)))
    with Map.open(node.root / "maps" / "held") as held:
        size = held.info.entry_size
        for key in range(8):
            held.update(key.to_bytes(4, "little"), b"\1".ljust(size, b"\0"))
    hitless.apply(node, build("2.0", ONE + ENTRY.format(NEW_ENTRY, maps)))
    with Map.open(node.root / "maps" / "held") as held:
        for key in range(8):
            key_bytes = key.to_bytes(4, "little")
            if "ARRAY" in kind:
                held.update(key_bytes, bytes(size))
            else:
                assert held.delete(key_bytes)
        held.update((3).to_bytes(4, "little"), b"\0\0\0\0\5".ljust(size, b"\0"))  # n is 5
    hitless.rollback(node)
    with Map.open(node.root / "maps" / "held") as held:
        found = {key.tobytes(): value.tobytes() for key, value in zip(*held.entries(), strict=True)}
    assert {key: value for key, value in found.items() if any(value)} == {
        (3).to_bytes(4, "little"): b"\5".ljust(size, b"\0")
    }
    assert len(found) == (64 if "ARRAY" in kind else 1)


def test_prefixes_of_a_trie_come_back(node: hitless.Node, build: Make) -> None:
    trie = (
        "struct prefix { __u32 bits; __u32 addr; };\n"
        "struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(max_entries, 64); __uint(map_flags, 1);\n"
        '  __type(key, struct prefix); __type(value, struct entry); } held SEC(".maps");\n'
    )
    hitless.apply(node, build("1.0", ONE + ENTRY.format(OLD_ENTRY, trie)))
    node.map("held")[{"bits": 8, "addr": 10}] = {"n": 1}
    hitless.apply(node, build("2.0", ONE + ENTRY.format(NEW_ENTRY, trie)))
    del node.map("held")[{"bits": 8, "addr": 10}]
    node.map("held")[{"bits": 16, "addr": 11}] = {"n": 2, "same": 3}
    hitless.rollback(node)
    assert node.map("held").items() == [({"bits": 16, "addr": 11}, {"n": 2, "same": 3})]


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
def test_elements_come_back_in_their_order(node: hitless.Node, make: Make, kind: str) -> None:
    hitless.apply(node, make("1.0", queue(kind, NARROW)))
    with Map.open(node.root / "maps" / "held") as held:
        push(held, 1, 2, 3)
    hitless.apply(node, make("2.0", queue(kind, WIDE)))
    hitless.rollback(node, allow_loss=("held",))
    with Map.open(node.root / "maps" / "held") as held:
        push(held, 4)
    hitless.rollback(node)
    with Map.open(node.root / "maps" / "held") as held:
        assert pop_all(held, 8, 8) == ([1, 2, 3, 4] if kind == "QUEUE" else [4, 3, 2, 1])


def test_inner_maps_come_back_and_shared_ones_stay_shared(node: hitless.Node, build: Make) -> None:
    outer = (
        "struct per {{ __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); __type(key, __u32);\n"
        "  __type(value, struct entry); }};\nMAP(shown, ARRAY, 1, __u32, struct entry);\n"
        "struct per one SEC(\".maps\");\n"
        "struct {{ __uint(type, BPF_MAP_TYPE_HASH_OF_MAPS); __uint(max_entries, 8); __type(key, __u32);\n"
        '  __array(values, struct per); }} held SEC(".maps") = {{ .values = {{ [1] = &one, [2] = &one }} }};\n'
    ).format()
    hitless.apply(node, build("1.0", ONE + ENTRY.format(OLD_ENTRY, outer)))
    hitless.apply(node, build("2.0", ONE + ENTRY.format(NEW_ENTRY, outer)))
    node.map("one")[5] = {"n": 50, "same": 51}
    hitless.rollback(node)
    assert dict(node.map("one").items()) == {5: {"n": 50, "same": 51}}
    with Map.open(node.root / "maps" / "held") as held, Map.open(node.root / "maps" / "one") as one:
        slots = [held.lookup(slot.to_bytes(4, "little")) for slot in (1, 2)]
        assert slots == [one.info.id.to_bytes(4, "little")] * 2


def test_variables_come_back_and_the_others_are_as_they_were(node: hitless.Node, build: Make, lab: Lab) -> None:
    directory = Path(build("0", ONE).path)

    def release(version: str, source: str) -> hitless.Bundle:
        path = write_release(directory / version, version, source, ATTACH)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    hitless.apply(node, release("1.0", test_globals.FIRST))
    hitless.apply(node, release("2.0", test_globals.SECOND), allow_loss=("store.data",))
    allowed = tuple(entry.name for entry in hitless.plan_rollback(node).blocked)
    with clients(lab) as tries:
        for _ in range(10):
            hitless.rollback(node, allow_loss=(*allowed, "store.data"))
    assert node.observe().version == "2.0"
    with Map.open(node.current / "data" / "store:data") as data:
        spec = node.observe().current.maps["store.data"].spec  # type: ignore[union-attr]
        from hitless.layout.codec import decode

        assert spec.value is not None
        value = decode(spec.value, data.lookup(bytes(4)) or b"")
    assert value["attempts"] == sum(tries.values())


def test_storage_of_sockets_tasks_and_cgroups_comes_back(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    def release(version: str, fields: str) -> hitless.Bundle:
        path = write_release(tmp_path / version, version, fields + STORING, ATTACH)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    hitless.apply(node, release("1.0", STORED))
    with owners(lab) as running:
        hitless.apply(node, release("2.0", STORED_WIDER))
        for _ in range(4):
            hitless.rollback(node, allow_loss=("of_sk", "of_task", "of_cgrp"))
        running.stop()
        assert running.counted(node) == running.counts


@pytest.mark.parametrize("kind", ["DEVMAP", "DEVMAP_HASH", "CPUMAP"])
def test_entries_that_name_devices_or_processors_come_back(node: hitless.Node, make: Make, kind: str) -> None:
    number = 192 if kind == "CPUMAP" else test_map_types.LOOPBACK
    hitless.apply(node, make("1.0", test_map_types.sized(kind, 4, 4, 4)))
    test_map_types.held(node).update(test_map_types.words(1), test_map_types.words(number))
    hitless.apply(node, make("2.0", test_map_types.sized(kind, 4, 4, 8)))
    test_map_types.held(node).update(test_map_types.words(0), test_map_types.words(number))
    test_map_types.held(node).delete(test_map_types.words(1))
    hitless.rollback(node)
    assert test_map_types.held(node).lookup(test_map_types.words(0)) == test_map_types.words(number)
    assert test_map_types.held(node).lookup(test_map_types.words(1)) in (None, bytes(4))


def test_redirected_connections_go_on(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    def release(version: str, source: str) -> hitless.Bundle:
        path = write_release(tmp_path / version, version, source + test_sockets.REDIRECTING, test_sockets.ATTACH)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    with test_sockets.redirected(node, release("1.0", test_sockets.FIRST), lab) as pairs:
        hitless.apply(node, release("2.0", test_sockets.SECOND))
        hitless.rollback(node)
        hitless.rollback(node)
        assert pairs.stop() > 0


def test_a_ring_buffer_comes_back_with_what_nobody_has_read(node: hitless.Node, make: Make) -> None:
    ring = 'struct {{ __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, {}); }} events SEC(".maps");\n'
    hitless.apply(node, make("1.0", "MAP(spare, HASH, 8, __u32, __u64);\n" + ring.format(4096)))
    with Map.open(node.root / "maps" / "events") as first:
        number = first.info.id
    hitless.apply(node, make("2.0", "MAP(spare, HASH, 8, __u32, __u64);\n" + ring.format(8192)))
    hitless.rollback(node)
    with Map.open(node.root / "maps" / "events") as again:
        assert again.info.id == number


def test_a_link_that_was_renamed_is_updated_in_place_and_renamed_back(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    renamed = ATTACH.replace('link = "connect4"', 'link = "connecting"\nwas = "connect4"')
    paths = {
        "1.0": write_release(tmp_path / "1", "1.0", ONE + COUNTING),
        "2.0": write_release(tmp_path / "2", "2.0", TWO + COUNTING, renamed),
    }
    for path in paths.values():
        hitless.apply(node, hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)}))
    link = node.observe().links["connecting"].id
    for name in ("connect4", "connecting"):
        hitless.rollback(node)
        assert {name: one.id for name, one in node.observe().links.items()} == {name: link}


# What can go wrong


def test_after_a_first_install_there_is_no_way_back(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    with pytest.raises(hitless.NodeError, match="has no last release to go back to: nothing was upgraded yet"):
        hitless.rollback(node)


def test_after_gc_there_is_no_way_back(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    hitless.gc(node)
    with pytest.raises(hitless.NodeError, match="or gc has removed it; apply the older release's bundle instead"):
        hitless.rollback(node, allow_loss=LOST)


def test_where_nothing_runs_there_is_no_way_back(node: hitless.Node) -> None:
    with pytest.raises(hitless.NodeError, match="nothing of hitless runs"):
        hitless.rollback(node)
    assert not node.root.exists()


def test_pins_of_the_last_release_that_were_replaced_by_hand_are_refused(node: hitless.Node, build: Make) -> None:
    hitless.apply(node, build("1.0", ONE))
    hitless.apply(node, build("2.0", TWO))
    pin = node.previous / "maps" / "tally"
    pin.unlink()
    with Map.open(node.current / "maps" / "tally") as other:
        other.pin(pin)
    with pytest.raises(hitless.NodeError, match="somebody pinned another one there"):
        hitless.rollback(node)


@pytest.mark.parametrize("again", [1, 2])
def test_a_program_pin_that_was_replaced_by_hand_stops_apply(
    node: hitless.Node, release: Release, again: int
) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    pin = node.current / "progs" / "count4"
    pin.unlink()
    with Program.open(node.previous / "progs" / "count4") as other:
        other.pin(pin)
    with pytest.raises(hitless.NodeError, match=r"progs/count4 is program \d+, and the record has program"):
        hitless.apply(node, release(again), allow_loss=LOST)


@pytest.mark.parametrize("step", ["stage", "copy", "verify", "cutover", "catch-up", "merge", "commit"])
def test_an_error_leaves_the_running_release_as_it_was_and_the_way_back_open(
    node: hitless.Node, build: Make, step: str
) -> None:
    hitless.apply(node, build("1.0", ONE))
    node.map("tally")[1] = {"count": 1}
    hitless.apply(node, build("2.0", TWO))
    node.map("tally")[2] = {"count": 2, "last": 3}
    before, record = everything(node), read_record(node.previous / "record")

    def fails(event: hitless.Progress) -> None:
        if event.step == step:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.rollback(node, progress=fails)
    assert everything(node) == before
    assert read_record(node.previous / "record") == record
    hitless.rollback(node)
    assert dict(node.map("tally").items()) == {1: {"count": 1, "last": 0}, 2: {"count": 2, "last": 3}}


def test_of_two_rollbacks_at_once_only_one_goes_back(node: hitless.Node, build: Make) -> None:
    upgraded(node, build)
    with ThreadPoolExecutor(1) as threads:
        others: list[Future[hitless.Result]] = []

        def another(event: hitless.Progress) -> None:
            if event.step == "prepare":
                others.append(threads.submit(hitless.rollback, hitless.Node(node.root)))
                time.sleep(0.3)  # it has looked, and waits for the lock

        hitless.rollback(node, progress=another)
        assert "runs 1.0, generation 3, now" in str(others[0].exception())
    assert node.observe().version == "1.0"


# Kills


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(module: object, name: str) -> Callable[[], None]:
    """Be killed right after a function of a module has done its work."""
    function = getattr(module, name)

    def work(*arguments: object, **more: object) -> None:
        function(*arguments, **more)
        die()

    return lambda: setattr(module, name, work)


def before(module: object, name: str) -> Callable[[], None]:
    """Be killed right before."""
    return lambda: setattr(module, name, die)


def killed(
    node: hitless.Node,
    prepare: Callable[[], None],
    step: str = "",
    fails: str = "",
    allow_loss: tuple[str, ...] = (),
) -> None:
    """A rollback whose process is killed as ``prepare`` says, or at ``step``; at ``fails`` it meets an error."""

    def progress(event: hitless.Progress) -> None:
        if event.step == step:
            die()
        if event.step == fails:
            raise ZeroDivisionError

    child = os.fork()
    if not child:
        try:
            prepare()
            hitless.rollback(node, allow_loss, progress)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


ENTRIES = {1: {"count": 1, "last": 0}, 2: {"count": 2, "last": 3}}


def upgraded(node: hitless.Node, build: Make) -> None:
    hitless.apply(node, build("1.0", ONE))
    node.map("tally")[1] = {"count": 1}
    hitless.apply(node, build("2.0", TWO))
    node.map("tally")[2] = {"count": 2, "last": 3}


NOT_SWITCHED: dict[str, tuple[Callable[[], None], str, str]] = {
    "moved": (before(staging, "read_record"), "", ""),
    "new record made": (after(staging, "create_record"), "", ""),
    "new record in place": (before(staging, "empty"), "", ""),
    "emptied": (after(staging, "empty"), "", ""),
    "copying": (lambda: None, "copy", ""),
    "verifying": (lambda: None, "verify", ""),
    "putting back": (before(staging, "write_record"), "", "verify"),
    "former record written": (after(staging, "write_record"), "", "verify"),
    "scratch removed": (after(staging, "remove_tree"), "", "verify"),
}


@pytest.mark.parametrize("when", NOT_SWITCHED)
def test_killed_before_the_cutover_it_is_undone_and_the_last_release_is_still_there(
    node: hitless.Node, build: Make, when: str
) -> None:
    upgraded(node, build)
    record = read_record(node.previous / "record")
    killed(node, *NOT_SWITCHED[when])
    assert "a rollback to 1.0 was interrupted before its cutover" in status(node).problems[0]
    assert hitless.recover(node) == "undid a rollback that had not switched any hook"
    assert hitless.recover(node) is None
    assert node.observe().version == "2.0"
    assert read_record(node.previous / "record") == record
    assert dict(node.map("tally").items()) == ENTRIES
    assert hitless.verify(node).problems == ()
    hitless.rollback(node)
    assert (node.observe().version, dict(node.map("tally").items())) == ("1.0", ENTRIES)


SWITCHED: dict[str, tuple[Callable[[], None], str, str]] = {
    "cutover": (lambda: None, "cutover", ""),
    "catching up": (lambda: None, "catch-up", ""),
    "merging": (lambda: None, "merge", ""),
    "committing": (lambda: None, "commit", ""),
    "exchanged": (after(transaction, "exchange"), "", ""),
    "cleaning up": (lambda: None, "clean-up", ""),
    "moved the newer one": (after(finish, "move"), "", ""),
}


@pytest.mark.parametrize("when", SWITCHED)
def test_killed_after_the_cutover_began_it_is_finished(node: hitless.Node, build: Make, when: str) -> None:
    upgraded(node, build)
    killed(node, *SWITCHED[when])
    done = hitless.recover(node)
    assert done in ("finished the interrupted upgrade to 1.0", "finished the clean-up after the upgrade to 1.0")
    assert (node.observe().version, node.observe().previous) == ("1.0", "2.0")
    assert dict(node.map("tally").items()) == ENTRIES
    assert hitless.verify(node).problems == ()
    hitless.rollback(node)
    assert (node.observe().version, dict(node.map("tally").items())) == ("2.0", ENTRIES)


@pytest.mark.parametrize("phase", ["undoing", "merging-back", "undone"])
def test_killed_while_it_is_taken_back_it_is_taken_back(node: hitless.Node, build: Make, phase: str) -> None:
    upgraded(node, build)
    write = write_record

    def written(path: Path, record: Record) -> None:
        write(path, record)
        if record.phase == phase:
            die()

    killed(node, lambda: setattr(transaction, "write_record", written), fails="commit")
    assert hitless.recover(node) is not None
    assert (node.observe().version, node.observe().previous) == ("2.0", "1.0")
    assert dict(node.map("tally").items()) == ENTRIES
    assert hitless.verify(node).problems == ()
    hitless.rollback(node)
    assert dict(node.map("tally").items()) == ENTRIES


def test_counts_stay_exact_over_kills_under_traffic(node: hitless.Node, release: Release, lab: Lab) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    with clients(lab) as tries:
        for step in ("copy", "cutover", "merge", "commit", "clean-up"):
            killed(node, lambda: None, step, allow_loss=LOST)
            assert hitless.recover(node) is not None
    assert counted(node) == tries


def test_gc_of_a_killed_rollback_removes_what_was_the_last_release(node: hitless.Node, build: Make) -> None:
    upgraded(node, build)
    killed(node, lambda: None, "copy")
    told = hitless.gc(node, dry_run=True)
    assert any(item.path.endswith("next/maps/tally") for item in told.items)
    hitless.gc(node)
    assert not node.next.exists()
    assert not node.previous.exists()
    assert dict(node.map("tally").items()) == ENTRIES


def test_apply_undoes_a_killed_rollback_first(node: hitless.Node, build: Make) -> None:
    upgraded(node, build)
    killed(node, lambda: None, "copy")
    result = hitless.apply(node, build("3.0", ONE))
    assert result.recovered == "undid a rollback that had not switched any hook"
    assert dict(node.map("tally").items()) == ENTRIES


# The phases as data


def test_every_phase_has_one_way_out_of_it() -> None:
    names = [one.name for one in PHASES]
    for one in PHASES:
        assert set(one.then) <= set(names)
        assert one.error is None or one.error in one.then
    assert recovery(None, False, None, False) == "nothing"
    assert recovery("committed", True, "committed", False) == "put-back"
    assert recovery("committed", True, "copying", False) == "remove"
    assert recovery("committed", True, "copying", True) == "put-back"
    assert recovery("committed", True, "cutover", True) == "forward"
    assert recovery("committed", True, "merging-back", False) == "take-back"
    assert recovery("cutover", True, "committed", False) == "clean-up"


# The command


def test_the_command_names_losses_then_goes_back_and_says_so(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    told = hitless_command("rollback", "--root", node.root, "--dry-run", code=2)
    assert told.startswith(f"store 2.0 -> 1.0 under {node.root} (rollback)\n")
    assert "tally loses: since is dropped  (not allowed)" in told
    assert "rollback will refuse this: it loses state. If that is fine, add --allow-loss tally" in told
    refused = as_json("rollback", "--root", node.root, code=1)["error"]
    assert refused["maps"] == ["tally", "limit"]
    allowed = [word for name in LOST for word in ("--allow-loss", name)]
    assert "done: generation 3, version 1.0\n" in hitless_command("rollback", "--root", node.root, *allowed)
    facts = as_json("rollback", "--root", node.root)
    assert (facts["start_type"], facts["from"], facts["to"], facts["generation"]) == ("rollback", "1.0", "2.0", 4)
    assert facts["committed"] is True
    assert "rollback" in main.commands
