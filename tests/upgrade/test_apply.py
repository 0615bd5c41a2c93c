"""What apply does: start, restart, upgrade, and go back, on the real kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.maps import Map
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.releases import ATTACH, write_release
from tests.upgrade.conftest import Release

BACK = ("tally", "limit")


def actions(entries: object) -> dict[str, str]:
    rows = msgspec.to_builtins(entries)
    return {row.get("name") or row["link"]: row["action"] for row in rows}


def test_a_first_apply_starts_the_release(node: hitless.Node, release: Release) -> None:
    result = hitless.apply(node, release(1))
    assert (result.start_type, result.from_version, result.to_version, result.generation) == ("normal", None, "1.0", 1)
    assert actions(result.maps) == {"tally": "create", "limit": "create", "owner": "create"}
    assert actions(result.hooks) == {"connect4": "attach"}
    assert status(node).problems == ()
    assert (node.root / "maps" / "tally").exists()
    assert (node.root / "links" / "connect4").exists()
    assert not (node.root / "next").exists()


def test_the_same_release_again_is_a_restart_that_keeps_everything(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.map("limit")[7] = {"rate": 1, "burst": 2}
    result = hitless.apply(node, release(1))
    assert (result.start_type, result.generation) == ("restart", 1)
    assert set(actions(result.maps).values()) == set(actions(result.hooks).values()) == {"keep"}
    assert node.map("limit").get(7) == {"rate": 1, "burst": 2}


def test_an_upgrade_carries_every_entry_into_the_new_layout(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.map("tally").update_many((port, {"count": port, "last": 9, "label": b"abcdef"}) for port in range(1000))
    node.map("limit")[5] = {"rate": 50, "burst": 500}
    node.map("owner")[1] = 111
    owner = Map.open(node.root / "maps" / "owner").info.id
    result = hitless.apply(node, release(2))
    assert actions(result.maps) == {"tally": "convert", "limits": "convert", "owner": "keep", "extra": "create"}
    assert result.maps[0].copied == 1000
    assert node.map("tally").get(999) == {"since": 0, "count": 999, "label": b"abcdef", "port": 9}
    assert len(node.map("tally").items()) == 1000
    assert node.map("limits").get(5) == {"rate": 50, "class": 3, "burst": 500}
    assert Map.open(node.root / "maps" / "owner").info.id == owner
    assert not (node.root / "maps" / "limit").exists()
    assert status(node).previous == "1.0"
    assert status(node).problems == ()


def test_a_handle_counts_the_entries_of_its_map(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    assert node.map("tally").count() == 0
    node.map("tally").update_many((port, {"count": 1, "last": 9, "label": b"abcdef"}) for port in range(1000))
    assert node.map("tally").count() == 1000


def test_a_plan_shows_the_same_actions_that_apply_then_reports(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    planned = hitless.plan(node, release(2))
    done = hitless.apply(node, release(2))
    plan_facts, done_facts = msgspec.to_builtins(planned), msgspec.to_builtins(done)
    told = [{key: entry[key] for key in plan_facts["maps"][0]} for entry in done_facts["maps"]]
    assert told == list(plan_facts["maps"])
    assert done_facts["hooks"] == plan_facts["hooks"]
    assert (planned.start_type, planned.from_version, planned.to_version) == ("update", "1.0", "2.0")


def test_a_plan_changes_nothing(node: hitless.Node, release: Release) -> None:
    hitless.plan(node, release(1))
    assert not node.root.exists()
    hitless.apply(node, release(1))
    before = node.observe()
    hitless.plan(node, release(2))
    assert node.observe() == before


def test_loss_is_refused_until_each_map_is_named(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(2))
    before = node.observe()
    with pytest.raises(hitless.LossNotAllowedError, match="since is dropped") as caught:
        hitless.apply(node, release(1), allow_loss=["limit"])
    assert caught.value.facts["maps"] == ["tally"]
    assert node.observe() == before
    assert hitless.apply(node, release(1), allow_loss=BACK).to_version == "1.0"


def test_what_both_layouts_hold_survives_going_there_and_back(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.map("tally")[80] = {"count": 7, "last": 3, "label": b"here.."}
    node.map("limit")[5] = {"rate": 50, "burst": 500}
    for _ in range(3):
        hitless.apply(node, release(2))
        hitless.apply(node, release(1), allow_loss=BACK)
    assert node.map("tally").get(80) == {"count": 7, "last": 3, "label": b"here.."}
    assert node.map("limit").get(5) == {"rate": 50, "burst": 500}


def test_a_value_that_does_not_fit_is_counted_and_never_wrapped(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(2))
    node.map("tally")[80] = {"count": 1 << 40}
    node.map("tally")[81] = {"count": 5}
    result = hitless.apply(node, release(1), allow_loss=BACK)
    tally = next(entry for entry in result.maps if entry.name == "tally")
    assert tally.lost_fields == {"count": 1}
    assert node.map("tally").get(81)["count"] == 5
    assert node.map("tally").get(80)["count"] == (1 << 32) - 1


def test_writes_go_to_both_releases_until_the_commit(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.map("limit")[1] = {"rate": 1, "burst": 1}
    node.map("limit")[2] = {"rate": 2, "burst": 2}
    seen = {}

    def control_plane(node: hitless.Node) -> None:
        limits = node.map("limits")
        limits[1] = {"rate": 10, "burst": 20, "class": 5}
        limits[3] = {"rate": 30, "burst": 30, "class": 6}
        del limits[2]
        old = Map.open(node.current / "maps" / "limit")
        seen.update({key: old.lookup(key.to_bytes(4, "little")) for key in (1, 2, 3)})

    hitless.apply(node, release(2), prepare=control_plane)
    assert seen == {1: bytes([10, 0, 0, 0, 20, 0, 0, 0]), 2: None, 3: bytes([30, 0, 0, 0, 30, 0, 0, 0])}
    assert sorted(node.map("limits").items()) == [
        (1, {"rate": 10, "class": 5, "burst": 20}),
        (3, {"rate": 30, "class": 6, "burst": 30}),
    ]


def test_a_read_in_an_upgrade_sees_what_the_old_programs_just_wrote(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.map("tally").update_many((port, {"count": 100}) for port in range(3))
    old = Map.open(node.root / "maps" / "tally")
    seen: list[object] = []

    def control_plane(node: hitless.Node) -> None:
        for port, count in ((0, 105), (7, 3)):
            old.update(port.to_bytes(4, "little"), count.to_bytes(4, "little") + bytes(12))
        old.delete((1).to_bytes(4, "little"))
        tally = node.map("tally")
        seen.extend([tally.get(0)["count"], tally.get(1), tally.get(7)["count"]])
        seen.append(sorted(port for port, _ in tally.items()))
        tally[0] = {**tally.get(0), "since": 1}

    hitless.apply(node, release(2), prepare=control_plane)
    assert seen == [105, None, 3, [0, 2, 7]]
    assert node.map("tally").get(0) == {"since": 1, "count": 105, "label": bytes(6), "port": 0}


def test_what_a_program_writes_to_the_old_map_after_the_copy_is_merged(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    tally = node.map("tally")
    tally.update_many((port, {"count": 100, "last": 1}) for port in range(4))
    old = Map.open(node.root / "maps" / "tally")

    def meanwhile(_: hitless.Node) -> None:
        # Past every handle, as a program of the old release does.
        old.update((0).to_bytes(4, "little"), (105).to_bytes(4, "little") + bytes([1]) + bytes(11))
        old.delete((1).to_bytes(4, "little"))
        old.update((9).to_bytes(4, "little"), (3).to_bytes(4, "little") + bytes(12))

    result = hitless.apply(node, release(2), prepare=meanwhile)
    assert {key: value["count"] for key, value in tally.items()} == {0: 105, 2: 100, 3: 100, 9: 3}
    assert next(entry for entry in result.maps if entry.name == "tally").caught_up == 3


BLIND = """
struct limit {{ __u32 rate; {burst} burst; }};
struct limit *type_in_btf;
struct {{ __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __uint(key_size, 4);
          __uint(value_size, sizeof(struct limit)); }} limit SEC(".maps");
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{{ __u32 key = 0; return type_in_btf != bpf_map_lookup_elem(&limit, &key); }}
char _license[] SEC("license") = "GPL";
"""


def test_types_from_the_manifest_carry_a_map_that_has_only_sizes(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    bound = ATTACH + '[map.limit]\nkey = "__u32"\nvalue = "limit"\n'
    for version, burst in (("1", "__u16"), ("2", "__u64")):
        directory = write_release(tmp_path / version, version, BLIND.format(burst=burst), bound)
        result = hitless.apply(node, hitless.Bundle.load(directory, {"cgroup": str(lab.cgroup)}))
        if version == "1":
            node.map("limit")[3] = {"rate": 7, "burst": 9}
    assert actions(result.maps)["limit"] == "convert"
    assert node.map("limit").get(3) == {"rate": 7, "burst": 9}


KEPT = """
struct inner { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2); __type(key, __u32); __type(value, __u64); };
struct inner first SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); __uint(max_entries, 2); __type(key, __u32);
         __array(values, struct inner); } outer SEC(".maps") = { .values = { &first } };
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 4096); } ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_LPM_TRIE); __uint(map_flags, BPF_F_NO_PREALLOC); __uint(max_entries, 8);
         __type(key, __u64); __type(value, __u64); } trie SEC(".maps");
MAP(percpu, PERCPU_HASH, 8, __u32, __u64);
MAP(plain, HASH, 8, __u32, %s);
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "GPL";
"""


def test_maps_of_every_type_are_kept_while_their_definition_stays(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    for version, value in (("1", "__u32"), ("2", "__u64")):
        directory = write_release(tmp_path / version, version, KEPT % value)
        result = hitless.apply(node, hitless.Bundle.load(directory, {"cgroup": str(lab.cgroup)}))
    wanted = dict.fromkeys(("first", "outer", "ring", "trie", "percpu"), "keep")
    assert actions(result.maps) == {**wanted, "plain": "convert"}


def test_unload_leaves_nothing(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    hitless.unload(node)
    assert not node.root.exists()
    assert node.observe().version is None
    assert hitless.unload(node) == []


def test_a_detached_hook_is_put_right_by_applying_the_same_release(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    (node.links / "connect4").unlink()
    assert "connect4 is gone" in status(node).problems[0]
    result = hitless.apply(node, release(1))
    assert actions(result.hooks) == {"connect4": "attach"}
    assert status(node).problems == ()


@pytest.mark.parametrize("step", ["stage", "copy", "prepare", "verify", "cutover", "catch-up", "merge", "commit"])
def test_an_error_in_any_step_leaves_the_old_release_complete(
    node: hitless.Node, release: Release, step: str
) -> None:
    hitless.apply(node, release(1))
    node.map("tally").update_many((port, {"count": port, "last": 9}) for port in range(100))
    entries, before = sorted_items(node), node.observe()

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, release(2), progress=failing_at(step))
    assert node.observe() == before
    assert sorted_items(node) == entries
    assert hitless.apply(node, release(2)).start_type == "update"


@pytest.mark.parametrize("step", ["stage", "prepare", "cutover", "commit"])
def test_an_error_in_a_first_start_leaves_nothing(node: hitless.Node, release: Release, step: str) -> None:
    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, release(1), progress=failing_at(step))
    assert not node.root.exists()


def failing_at(step: str) -> Callable[[hitless.Progress], None]:
    def progress(event: hitless.Progress) -> None:
        if event.step == step:
            raise ZeroDivisionError

    return progress


def sorted_items(node: hitless.Node) -> Sequence[object]:
    return sorted(node.map("tally").items())
