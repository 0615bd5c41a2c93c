"""Where there is little room: full maps, keys that one release alone can hold, odd maps, odd roots, interrupts."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.kernel.bpffs import exchange
from hitless.kernel.maps import Map, possible_cpus
from hitless.upgrade import transaction
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.releases import ATTACH, write_release
from tests.upgrade.conftest import PROGRAM, Make, Release


def store(value: str, entries: int = 64, key: str = "__u32", kind: str = "HASH") -> str:
    return f"struct held {{ {value} }};\nMAP(held, {kind}, {entries}, {key}, struct held);\n"


def filled(node: hitless.Node, bundle: hitless.Bundle, count: int = 64) -> Map:
    """The release runs, its map holds ``count`` entries; returns the map as a program of the release has it."""
    hitless.apply(node, bundle)
    node.map("held").update_many((key, {"a": key}) for key in range(count))
    return Map.open(node.root / "maps" / "held")


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def test_a_full_map_whose_entries_come_and_go_is_carried(node: hitless.Node, make: Make) -> None:
    old = filled(node, make("1.0", store("__u32 a;")))

    def programs_of_the_old_release(_: hitless.Node) -> None:
        for key in range(10):
            old.delete(number(key))
            old.update(number(1000 + key), number(7))

    hitless.apply(node, make("2.0", store("__u64 a;")), prepare=programs_of_the_old_release)
    expected = {key: key for key in range(10, 64)} | {1000 + key: 7 for key in range(10)}
    assert {key: value["a"] for key, value in node.map("held").items()} == expected


def test_a_full_map_is_carried_while_its_entries_come_and_go_all_the_time(node: hitless.Node, make: Make) -> None:
    one, other = make("1.0", store("__u32 a;", 4096)), make("2.0", store("__u64 a;", 4096))
    for _ in range(5):
        old = filled(node, one, 4096)
        still = threading.Event()

        def programs_of_the_old_release(old: Map = old, still: threading.Event = still) -> None:
            key = 0
            while not still.is_set():
                old.delete(number(key))
                old.update(number(key + 4096), number(key + 4096))
                key += 1

        writer = threading.Thread(target=programs_of_the_old_release)

        def progress(
            event: hitless.Progress, still: threading.Event = still, writer: threading.Thread = writer
        ) -> None:
            if event.step == "merge":  # behind the barrier no program of the old release runs any more
                still.set()
                writer.join()

        writer.start()
        hitless.apply(node, other, progress=progress)
        keys, _values = old.entries()
        assert {key: value["a"] for key, value in node.map("held").items()} == {
            key: key for key in (int.from_bytes(row.tobytes(), "little") for row in keys)
        }
        hitless.unload(node)


def test_an_lru_map_may_evict_during_the_upgrade(node: hitless.Node, make: Make) -> None:
    filled(node, make("1.0", store("__u32 a;", 1024, kind="LRU_HASH")), 1024)
    more = [(key, {"a": key}) for key in range(5000, 9000)]
    hitless.apply(
        node,
        make("2.0", store("__u64 a;", 1024, kind="LRU_HASH")),
        prepare=lambda node: node.map("held").update_many(more),
    )
    found = node.map("held").items()
    assert len(found) > 500
    assert all(value["a"] == key for key, value in found)


@pytest.mark.parametrize("kind", ["HASH", "ARRAY"])
def test_a_map_made_larger_takes_more_entries_before_the_cutover(node: hitless.Node, make: Make, kind: str) -> None:
    filled(node, make("1.0", store("__u32 a;", kind=kind)))
    more = make("2.0", store("__u64 a;", entries=128, kind=kind))
    hitless.apply(node, more, prepare=lambda node: node.map("held").update_many([(100, {"a": 5})]))
    assert node.map("held").get(100) == {"a": 5}
    assert node.map("held").get(63) == {"a": 63}


def test_what_the_full_old_map_cannot_take_back_does_not_stop_the_taking_back(node: hitless.Node, make: Make) -> None:
    filled(node, make("1.0", store("__u32 a;")))

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            new = Map.open(node.next / "maps" / "held")
            new.update(number(90), number(1, 8))
            new.update(number(3), number(33, 8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, make("2.0", store("__u64 a;", entries=128)), progress=late)
    assert {key: value["a"] for key, value in node.map("held").items()} == {key: key for key in range(64)} | {3: 33}
    assert status(node).problems == ()


def test_counts_by_a_rule_of_the_manifest_are_taken_back_as_counts(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    rule = ATTACH + '[map.held.field.a]\nmerge = "sum"\n'
    variables = {"cgroup": str(lab.cgroup)}
    one, two = (
        hitless.Bundle.load(write_release(tmp_path / version, version, store(value) + PROGRAM, rule), variables)
        for version, value in (("1.0", "__u32 a;"), ("2.0", "__u64 a;"))
    )
    old = filled(node, one, 1)

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            Map.open(node.next / "maps" / "held").update(number(0), number(7, 8))
            old.update(number(0), number(5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, two, progress=late)
    assert node.map("held").get(0) == {"a": 12}


def test_a_key_that_only_the_new_release_can_hold_touches_no_old_entry(node: hitless.Node, make: Make) -> None:
    last = (1 << 32) - 1
    old = filled(node, make("1.0", store("__u32 a;")), 3)
    node.map("held")[last] = {"a": 77}
    seen = []

    def control_plane(node: hitless.Node) -> None:
        held = node.map("held")
        held[1 << 40] = {"a": 1}
        held[1 << 41] = {"a": 2}
        del held[1 << 41]
        seen.append(old.lookup(number(last)))

    hitless.apply(node, make("2.0", store("__u64 a;", key="__u64")), prepare=control_plane)
    assert seen == [number(77)]
    found = {key: value["a"] for key, value in node.map("held").items()}
    assert found == {0: 0, 1: 1, 2: 2, last: 77, 1 << 40: 1}


def test_a_new_key_that_the_old_release_cannot_hold_is_left_out_when_the_upgrade_is_taken_back(
    node: hitless.Node, make: Make
) -> None:
    last = (1 << 32) - 1
    filled(node, make("1.0", store("__u32 a;")), 3)
    node.map("held")[last] = {"a": 77}

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            Map.open(node.next / "maps" / "held").update(number(1 << 40, 8), number(1, 8))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, make("2.0", store("__u64 a;", key="__u64")), progress=late)
    assert {key: value["a"] for key, value in node.map("held").items()} == {0: 0, 1: 1, 2: 2, last: 77}


def test_entries_of_a_per_cpu_map_are_lists_with_a_value_for_each_cpu(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", "MAP(held, PERCPU_HASH, 16, __u32, __u32);\n"))
    held = node.map("held")
    held[1] = list(range(possible_cpus()))
    assert held.get(1) == list(range(possible_cpus()))
    assert held.items() == [(1, list(range(possible_cpus())))]
    with pytest.raises(hitless.NodeError, match="a value for each CPU"):
        held[1] = 5


TAIL_CALL = """
SEC("cgroup/connect4") int leaf(struct bpf_sock_addr *ctx) { return %d; }
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 2); __uint(key_size, 4);
         __array(values, int (void *)); } held SEC(".maps") = { .values = { [0] = (void *)&leaf } };
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { bpf_tail_call(ctx, &held, 0); return 1; }
char _license[] SEC("license") = "GPL";
"""


def slots(node: hitless.Node) -> object:
    path = str(node.root / "maps" / "held")
    shown = subprocess.run(["bpftool", "-j", "map", "dump", "pinned", path], capture_output=True, check=True)
    return json.loads(shown.stdout)


def test_loading_a_release_leaves_the_live_program_array_alone(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", TAIL_CALL % 1, program=""))
    before = slots(node)
    seen = []
    second = make("2.0", TAIL_CALL % 0, program="")
    hitless.apply(node, second, prepare=lambda node: seen.append(slots(node)))
    assert seen == [before]
    assert slots(node) != before


def test_a_map_that_programs_may_not_write_is_not_converted(node: hitless.Node, make: Make) -> None:
    barred = (
        "struct held { %s a; };\nstruct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); "
        "__uint(map_flags, BPF_F_RDONLY_PROG); __type(key, __u32); __type(value, struct held); } held SEC(\".maps\");\n"
    )
    hitless.apply(node, make("1.0", barred % "__u32"))
    before = node.observe()
    with pytest.raises(hitless.LossNotAllowedError, match="flags bar programs"):
        hitless.apply(node, make("2.0", barred % "__u64"))
    assert node.observe() == before


def test_a_value_too_large_for_the_merge_is_refused_in_the_plan(node: hitless.Node, make: Make) -> None:
    filled(node, make("1.0", store("__u32 a; __u64 b[9000];")), 1)
    with pytest.raises(hitless.LossNotAllowedError, match=r"take .* in a merge, and more than .* are not supported"):
        hitless.apply(node, make("2.0", store("__u64 a; __u64 b[9000];")))


@pytest.mark.parametrize(("one", "other"), [("__u64 a; __u64 b[1990];", "__u32 a; __u64 b[1990];"),
                                            ("__u64 a; struct { __u32 c TAG(\"merge=max\"); } b[480];",
                                             "__u32 a; struct { __u32 c TAG(\"merge=max\"); } b[480];")])  # fmt: skip
def test_a_value_as_large_as_the_merge_allows_is_merged(node: hitless.Node, make: Make, one: str, other: str) -> None:
    old = filled(node, make("1.0", store(other)), 1)

    def programs_of_the_old_release(_: hitless.Node) -> None:
        for key in range(2):
            old.update(number(key), bytes([1]) * old.info.value_size)

    hitless.apply(node, make("2.0", store(one)), prepare=programs_of_the_old_release)
    assert [node.map("held").get(key)["a"] for key in range(2)] == [0x01010101, 0x01010101]


def test_an_interrupt_in_the_clean_up_of_a_first_start_keeps_the_public_paths(
    node: hitless.Node, release: Release
) -> None:
    with pytest.raises(KeyboardInterrupt):
        hitless.apply(node, release(1), progress=interrupt("clean-up"))
    assert hitless.apply(node, release(1)).start_type == "restart"
    assert (node.root / "maps" / "tally").exists()
    node.map("limit")[1] = {"rate": 1, "burst": 1}


def test_an_interrupt_right_behind_the_commit_ends_the_writing_to_both(
    node: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    hitless.apply(node, release(1))

    def interrupted(one: Path, other: Path) -> None:
        exchange(one, other)
        raise KeyboardInterrupt

    monkeypatch.setattr(transaction, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hitless.apply(node, release(2))
    assert node.observe().version == "2.0"
    assert node.access.staged is None


def interrupt(step: str) -> Callable[[hitless.Progress], None]:
    def progress(event: hitless.Progress) -> None:
        if event.step == step:
            raise KeyboardInterrupt

    return progress


def test_a_program_pin_that_was_removed_by_hand_is_named(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    (node.current / "progs" / "count4").unlink()
    with pytest.raises(hitless.NodeError, match="count4 is missing"):
        hitless.apply(node, release(1))


def test_a_root_given_as_a_symbolic_link_is_unloaded_whole(node: hitless.Node, release: Release, lab: Lab) -> None:
    hitless.apply(node, release(1))
    (lab.bpffs / "alias").symlink_to(node.root.name)
    hitless.unload(hitless.Node(lab.bpffs / "alias"))
    assert not node.root.exists()


def test_the_same_command_may_be_given_twice(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1), allow_loss=["extra"])  # on a node where nothing runs yet
    hitless.apply(node, release(2))
    hitless.apply(node, release(1), allow_loss=["tally", "limit", "extra"])
    assert hitless.apply(node, release(1), allow_loss=["tally", "limit", "extra"]).start_type == "restart"


def test_a_program_that_is_loaded_only_when_asked_for_is_left_out(node: hitless.Node, make: Make) -> None:
    optional = 'SEC("?cgroup/connect6") int spare(struct bpf_sock_addr *ctx) { return 1; }\n'
    hitless.apply(node, make("1.0", store("__u32 a;"), optional + PROGRAM))
    assert [path.name for path in (node.root / "progs").iterdir()] == ["count4"]
    with pytest.raises(hitless.BundleError, match=r"left out: by skip = true, or by the [?] before its section"):
        make("2.0", store("__u32 a;"), PROGRAM.replace("cgroup/connect4", "?cgroup/connect4"))
