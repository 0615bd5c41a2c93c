"""Maps of maps: inner maps converted under fire, shared ones kept shared, slots followed, kills survived."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

import hitless
from hitless.compare import compare
from hitless.kernel.maps import Map, create_as
from hitless.layout.codec import decode, encode
from hitless.layout.diff import diff_map
from hitless.layout.members import lock_offset
from hitless.layout.model import MapSpec
from hitless.upgrade.inner_maps import slots_of
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade, kill_while_undoing
from tests.patience import often, patient
from tests.releases import ATTACH, write_release
from tests.upgrade.test_under_fire import CLIENT, STEPS, clients

# Counts connects in the inner map of their port, if it has one.
SOURCE = """
struct tally {{ {tally} }};
enum slot {{ ZERO, FIVE = 5 }};
MAP(whole, ARRAY, 1, __u32, struct tally);  // and it makes the compiler tell the layout
struct per_port {{ __uint(type, BPF_MAP_TYPE_{inner}); __uint(max_entries, 8); __type(key, {slot});
                  __type(value, struct tally); }};
struct {{ __uint(type, BPF_MAP_TYPE_{outer}); __uint(max_entries, {room}); __type(key, {key});
         __array(values, struct per_port); }} ports SEC(".maps");
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{{
    {key} port = __builtin_bswap16(ctx->user_port);
    __u32 slot = 0;
    struct tally *all = bpf_map_lookup_elem(&whole, &slot);
    if (all)
        __sync_fetch_and_add(&all->count, 1);
    void *inner = bpf_map_lookup_elem(&ports, &port);
    if (!inner)
        return 1;
    struct tally *found = bpf_map_lookup_elem(inner, &slot);
    if (!found) {{
        struct tally none = {{}};
        bpf_map_update_elem(inner, &slot, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(inner, &slot);
    }}
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    return 1;
}}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
SMALL = '__u32 count TAG("merge=sum"); __u32 last;'
LARGE = '__u64 since; __u64 count TAG("merge=sum"); __u32 last;'

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a release with a map of maps: its directory."""

    def release(
        version: str, tally: str = SMALL, key: str = "__u32", outer: str = "HASH_OF_MAPS", inner: str = "HASH",
        room: int = 64, manifest: str = ATTACH, slot: str = "__u32",
    ) -> Path:  # fmt: skip
        source = SOURCE.format(tally=tally, key=key, outer=outer, inner=inner, room=room, slot=slot)
        return write_release(tmp_path / version, version, source, manifest)

    return release


def load(path: Path, lab: Lab) -> hitless.Bundle:
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, sys.byteorder)


def outer(node: hitless.Node, generation: str = "current") -> Map:
    return Map.open(node.root / generation / "maps" / "ports")


def inner_spec(node: hitless.Node) -> MapSpec:
    state = node.observe()
    assert state.current is not None
    spec = state.current.maps["ports"].spec.inner
    assert spec is not None
    return spec


def inner_of(release: hitless.Bundle) -> MapSpec:
    spec = release.maps["ports"].inner
    assert spec is not None
    return spec


def put(node: hitless.Node, ports: Sequence[int], entries: Mapping[int, int] | None = None) -> Map:
    """What a daemon does: a new inner map, with counts by slot, for these ports of the running release."""
    spec, held = inner_spec(node), outer(node)
    assert spec.value is not None
    made = create_as(spec)
    for slot, count in (entries or {}).items():
        made.update(number(slot), encode(spec.value, {"count": count}))
    for port in ports:
        held.update(number(port, held.info.key_size), number(made.fd))
    return made


def counts(node: hitless.Node) -> dict[int, dict[int, int]]:
    """The counts of the running release by port and slot."""
    spec = inner_spec(node)
    assert spec.value is not None
    found = {}
    for port, inner in slots_of(outer(node)).items():
        keys, values = Map.by_id(inner).entries()
        by_slot = {
            int.from_bytes(key.tobytes(), sys.byteorder): sum(
                decode(spec.value, cpu.tobytes())["count"] for cpu in value.reshape(-1, spec.value_size)
            )
            for key, value in zip(keys, values, strict=True)
        }
        found[int.from_bytes(port, sys.byteorder)] = by_slot
    return found


def shared(node: hitless.Node) -> set[frozenset[int]]:
    """Which ports have the same inner map."""
    by_map: dict[int, set[int]] = {}
    for port, inner in slots_of(outer(node)).items():
        by_map.setdefault(inner, set()).add(int.from_bytes(port, sys.byteorder))
    return {frozenset(ports) for ports in by_map.values()}


def test_inner_maps_and_outer_keys_are_converted(node: hitless.Node, lab: Lab, write: Write) -> None:
    hitless.apply(node, load(write("1"), lab))
    put(node, [7], {0: 70, 5: 75})
    put(node, [9], {1: 91})
    result = hitless.apply(node, load(write("2", LARGE, "__u64"), lab))
    assert counts(node) == {7: {0: 70, 5: 75}, 9: {1: 91}}
    assert outer(node).info.key_size == 8
    assert inner_spec(node).value_size == 24
    assert (result.maps[1].action, result.maps[1].kind, result.maps[1].copied) == ("convert", "inner-maps", 3)
    assert status(node).problems == ()


def types_of(node: hitless.Node, port: bytes) -> MapSpec:
    """The inner map of a port as the kernel tells of it."""
    return Map.by_id(slots_of(outer(node))[port]).spec("ports")


def test_converted_inner_maps_have_the_types_of_the_new_release(node: hitless.Node, lab: Lab, write: Write) -> None:
    hitless.apply(node, load(write("1"), lab))
    put(node, [7])
    hitless.apply(node, load(write("2", LARGE), lab))
    found, wanted = types_of(node, number(7)), msgspec.structs.replace(inner_spec(node), name="ports")
    assert diff_map(wanted, msgspec.structs.replace(wanted, key=found.key, value=found.value)).verdict == "identical"


def test_inner_maps_whose_types_the_kernel_refuses_are_converted_without_them(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    made = (write(version, tally, inner="ARRAY", slot="enum slot") for version, tally in (("1", SMALL), ("2", LARGE)))
    old, new = (load(path, lab) for path in made)
    hitless.apply(node, old)
    put(node, [7], {0: 70, 5: 75})
    for release in (new, old):
        hitless.apply(node, release, BACK)
        assert {slot: count for slot, count in counts(node)[7].items() if count} == {0: 70, 5: 75}


@pytest.mark.parametrize("inner_kind", ["HASH", "ARRAY"])
def test_inner_maps_whose_values_a_lock_guards_are_converted_with_it(
    node: hitless.Node, lab: Lab, write: Write, inner_kind: str
) -> None:
    lock = "struct bpf_spin_lock lock;"
    old, new = (load(write(n, lock + tally, inner=inner_kind), lab) for n, tally in (("1", SMALL), ("2", LARGE)))
    hitless.apply(node, old)
    put(node, [7], {0: 70, 5: 75})
    for release in (new, old):
        hitless.apply(node, release, BACK)
        value = types_of(node, number(7)).value
        assert value is not None
        assert lock_offset(value) == 0
        assert {slot: count for slot, count in counts(node)[7].items() if count} == {0: 70, 5: 75}


def totals(node: hitless.Node) -> dict[int, int]:
    """What the programs counted, by port, over all slots."""
    return {port: sum(by_slot.values()) for port, by_slot in counts(node).items()}


BACK = ("ports", "whole")  # the way back cuts counts to 32 bits
KINDS = [
    ("HASH_OF_MAPS", "HASH"), ("HASH_OF_MAPS", "ARRAY"), ("HASH_OF_MAPS", "PERCPU_HASH"), ("ARRAY_OF_MAPS", "HASH"),
]  # fmt: skip


@pytest.mark.parametrize(("outer_kind", "inner_kind"), KINDS)
def test_no_increment_in_an_inner_map_is_lost_or_gained_while_upgrades_go_back_and_forth(
    node: hitless.Node, lab: Lab, write: Write, outer_kind: str, inner_kind: str
) -> None:
    old = load(write("1", outer=outer_kind, inner=inner_kind), lab)
    new = load(write("2", LARGE, outer=outer_kind, inner=inner_kind), lab)
    hitless.apply(node, old)
    put(node, [7])
    put(node, [9])
    with clients(lab) as tries:
        for _ in range(often(10)):
            hitless.apply(node, new)
            hitless.apply(node, old, allow_loss=BACK)
    assert sum(tries.values()) > 2000
    assert totals(node) == tries
    assert node.map("whole").get(0)["count"] == sum(tries.values())


def test_inner_maps_that_a_daemon_adds_during_the_upgrade_are_carried_to_the_last_count(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    hitless.apply(node, load(write("1"), lab))
    put(node, [7])
    put(node, [9])
    late: list[subprocess.Popen[str]] = []

    def daemon(event: hitless.Progress) -> None:
        if event.step == "prepare":  # the copy is over
            put(node, [11], {3: 33})
            client = lab.popen([sys.executable, "-c", CLIENT, "11"], cgroup="clients", stdout=subprocess.PIPE)
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
            late.append(client)
        if event.step == "catch-up":
            put(node, [12], {1: 5})

    with clients(lab) as tries:
        hitless.apply(node, load(write("2", LARGE, "__u64"), lab), progress=daemon)
        (client,) = late
        client.send_signal(signal.SIGTERM)
        eleven = int(client.communicate(timeout=patient(10))[0])
    assert totals(node) == {**tries, 11: 33 + eleven, 12: 5}
    assert counts(node)[11][3] == 33


@pytest.mark.parametrize("kind", ["HASH_OF_MAPS", "ARRAY_OF_MAPS"])
def test_slots_that_a_daemon_empties_or_fills_anew_during_the_upgrade_are_followed(
    node: hitless.Node, lab: Lab, write: Write, kind: str
) -> None:
    hitless.apply(node, load(write("1", outer=kind), lab))
    for port in (1, 2, 3, 5, 6):
        put(node, [port], {0: port})

    def daemon(event: hitless.Progress) -> None:
        if event.step == "catch-up":
            for port in (1, 5, 6):
                outer(node).delete(number(port))
            put(node, [2], {0: 22})
            put(node, [4], {0: 44})
            outer(node).delete(number(4))

    key = "__u64" if kind == "HASH_OF_MAPS" else "__u32"
    hitless.apply(node, load(write("2", LARGE, key, outer=kind), lab), progress=daemon)
    assert counts(node) == {2: {0: 22}, 3: {0: 3}}


def test_a_slot_that_the_new_release_set_itself_stays_as_it_set_it(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    hitless.apply(node, load(write("1"), lab))
    put(node, [1, 2], {0: 1})
    new = load(write("2", LARGE, "__u64"), lab)
    own = create_as(inner_of(new))

    def daemons(event: hitless.Progress) -> None:
        if event.step == "catch-up":
            after = outer(node, "next")
            after.update(number(1, 8), number(own.fd))
            after.delete(number(2, 8))
            for port in (1, 2):
                outer(node).delete(number(port))
            put(node, [1, 2], {0: 7})

    hitless.apply(node, new, progress=daemons)
    assert slots_of(outer(node)) == {number(1, 8): own.info.id}


def test_slots_that_share_an_inner_map_keep_sharing_one(node: hitless.Node, lab: Lab, write: Write) -> None:
    old, new = load(write("1"), lab), load(write("2", LARGE), lab)
    hitless.apply(node, old)
    put(node, [1, 2, 3], {0: 5})
    put(node, [4], {0: 6})
    hitless.apply(node, new)
    assert shared(node) == {frozenset({1, 2, 3}), frozenset({4})}
    hitless.apply(node, old, allow_loss=BACK)
    assert shared(node) == {frozenset({1, 2, 3}), frozenset({4})}
    assert counts(node) == {1: {0: 5}, 2: {0: 5}, 3: {0: 5}, 4: {0: 6}}


def test_a_map_in_two_outer_maps_stays_one_map(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    for version, tally in (("1", SMALL), ("2", LARGE)):
        source = SOURCE.format(tally=tally, key="__u32", outer="HASH_OF_MAPS", inner="HASH", room=64, slot="__u32")
        another = "struct {{ __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); __uint(max_entries, 4); __type(key, __u32);"
        another += ' __array(values, struct per_port); }} others SEC(".maps");\nSEC("cgroup'
        source = source.replace('SEC("cgroup', another.format(), 1)
        bundle = load(write_release(tmp_path / version, version, source), lab)
        hitless.apply(node, bundle)
        if version == "1":
            both = put(node, [7], {0: 5})
            Map.open(node.root / "maps" / "others").update(number(2), number(both.fd))
    (inner,) = slots_of(outer(node)).values()
    assert inner != both.info.id
    assert slots_of(Map.open(node.root / "maps" / "others")) == {number(2): inner}
    assert counts(node) == {7: {0: 5}}


def test_a_larger_outer_map_gets_the_same_inner_maps(node: hitless.Node, lab: Lab, write: Write) -> None:
    hitless.apply(node, load(write("1"), lab))
    put(node, [7], {0: 5})
    before = slots_of(outer(node))
    bundle = load(write("2", room=128), lab)
    assert hitless.plan(node, bundle).maps[1].method == "a new outer map with the same inner maps"
    hitless.apply(node, bundle)
    assert slots_of(outer(node)) == before
    assert outer(node).info.max_entries == 128


def test_an_outer_array_that_became_too_small_stops_the_upgrade(node: hitless.Node, lab: Lab, write: Write) -> None:
    hitless.apply(node, load(write("1", outer="ARRAY_OF_MAPS"), lab))
    put(node, range(5), {0: 5})
    before = node.observe()
    with pytest.raises(hitless.KernelError, match=r"map ports: putting inner maps into its slots: .*max_entries is 4"):
        hitless.apply(node, load(write("2", LARGE, outer="ARRAY_OF_MAPS", room=4), lab))
    assert node.observe() == before
    assert counts(node) == {port: {0: 5} for port in range(5)}


NAMED = """
struct per_port {{ __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2); __type(key, __u32);
                  __type(value, {value}); }} first SEC(".maps"), second SEC(".maps");
struct {{ __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); __uint(max_entries, 4); __type(key, __u32);
         __array(values, struct per_port); }} ports SEC(".maps") = {{ .values = {{ &first, &second }} }};
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) {{ return 1; }}
char _license[] SEC("license") = "GPL";
"""


def test_maps_of_the_release_that_its_object_puts_into_slots_stay_in_them(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    for version, value in (("1", "__u32"), ("2", "__u64")):
        hitless.apply(node, load(write_release(tmp_path / version, version, NAMED.format(value=value)), lab))
        maps = {name: Map.open(node.root / "maps" / name) for name in ("first", "second")}
        if version == "1":
            node.map("first")[1] = 11
            outer(node).update(number(3), number(maps["first"].fd))  # a second slot for it
            outer(node).delete(number(1))
    assert slots_of(outer(node)) == {number(0): maps["first"].info.id, number(3): maps["first"].info.id}
    assert node.map("first").get(1) == 11


def test_an_error_after_the_cutover_takes_back_counts_and_slots(node: hitless.Node, lab: Lab, write: Write) -> None:
    old, new = load(write("1"), lab), load(write("2", LARGE, "__u64"), lab)
    hitless.apply(node, old)
    put(node, [7])
    put(node, [9])
    put(node, [3], {0: 3})
    for attempt in range(5):

        def late(event: hitless.Progress, attempt: int = attempt) -> None:
            if event.step != "commit":
                return
            after = outer(node, "next")
            made = create_as(inner_of(new))
            made.update(number(0), number(0, 8) + number(20 + attempt, 8) + bytes(8))
            after.update(number(20 + attempt, 8), number(made.fd))
            after.delete(number(3, 8))
            raise ZeroDivisionError

        with clients(lab) as tries, pytest.raises(ZeroDivisionError):
            hitless.apply(node, new, progress=late)
        assert node.observe().version == "1"
        assert totals(node) == {**tries, **{20 + n: 20 + n for n in range(attempt + 1)}}
        assert status(node).problems == ()
        for port in (7, 9):
            outer(node).delete(number(port))
            put(node, [port])
        put(node, [3], {0: 3})


def test_a_killed_upgrade_is_undone_or_finished_and_counts_stay_exact(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    one, two = write("1"), write("2", LARGE)
    hitless.apply(node, load(one, lab))
    put(node, [7])
    put(node, [9])
    put(node, [20, 21], {0: 20})
    with clients(lab) as tries:
        for step in STEPS:
            kill_upgrade(step, node, two, {"cgroup": str(lab.cgroup)})
            if step in ("cutover", "catch-up", "merge"):  # what a daemon does before somebody takes up the upgrade
                put(node, [30], {0: 30})
                outer(node).delete(number(20))
            hitless.apply(node, load(two, lab))
            assert status(node).problems == ()
            if step in ("cutover", "catch-up", "merge"):
                assert counts(node)[30] == {0: 30}
                assert 20 not in counts(node)
            hitless.apply(node, load(one, lab), allow_loss=BACK)
            outer(node).delete(number(30))
            put(node, [20, 21], {0: 20})
    assert totals(node) == {**tries, 20: 20, 21: 20}


def test_an_upgrade_killed_while_it_is_taken_back_is_taken_back_and_counts_stay_exact(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    one, two = write("1"), write("2", LARGE)
    hitless.apply(node, load(one, lab))
    put(node, [7])
    put(node, [9])
    with clients(lab) as tries:
        for phase in ("undoing", "merging-back", "undone"):
            for when in ("before", "after"):
                kill_while_undoing(phase, when, node, two, {"cgroup": str(lab.cgroup)})
                assert hitless.recover(node) is not None
                assert status(node).problems == ()
                hitless.apply(node, load(one, lab), allow_loss=BACK)
    assert totals(node) == tries


def test_the_plan_names_the_method_and_what_inner_maps_lose(node: hitless.Node, lab: Lab, write: Write) -> None:
    one, two = write("1"), write("2", LARGE)
    hitless.apply(node, load(one, lab))
    planned = hitless.plan(node, load(two, lab)).maps[1]
    assert (planned.action, planned.verdict, planned.exactness, planned.loss) == ("convert", "lossless", "exact", ())
    assert planned.method.startswith("a new map for each inner map (")
    hitless.apply(node, load(two, lab))
    back = hitless.plan(node, load(one, lab)).maps[1]
    losses = ("inner.count: values outside 0 to 4294967295 do not fit", "inner.since is dropped")
    assert (back.action, back.verdict, back.loss) == ("convert", "lossy", losses)


def test_check_judges_inner_maps_as_the_plan_does(write: Write) -> None:
    one, two, wide = (str(path) for path in (write("1"), write("2", LARGE), write("3", LARGE, room=32)))

    def ports(old: str, new: str) -> tuple[str, tuple[str, ...]]:
        (found,) = [item for item in compare(old, new).maps if item.name == "ports"]
        return found.diff.verdict, found.losses

    assert ports(one, two) == ("lossless", ())
    assert ports(one, one) == ("identical", ())
    assert ports(two, wide) == ("lossless", ())
    losses = ("inner.count: values outside 0 to 4294967295 do not fit", "inner.since is dropped")
    assert ports(two, one) == ("lossy", losses)


def test_inner_maps_that_cannot_be_carried_are_named_with_the_reason(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    one, other = write("1"), write("2", LARGE, inner="ARRAY")
    hitless.apply(node, load(one, lab))
    (planned,) = [entry for entry in hitless.plan(node, load(other, lab)).maps if entry.name == "ports"]
    why = "all entries: its inner maps: from a map of type hash to array is not supported yet"
    assert (planned.action, planned.loss[0]) == ("discard", why)
    (checked,) = [item for item in compare(str(one), str(other)).maps if item.name == "ports"]
    assert checked.losses[0] == why


@pytest.mark.parametrize("held", ["struct bpf_spin_lock lock;", "struct bpf_timer timer;"])
def test_inner_maps_that_could_not_be_made_with_what_is_the_kernels_are_named_with_the_reason(
    node: hitless.Node, lab: Lab, write: Write, held: str
) -> None:
    old, new = (load(write(n, f"{held} const char *name; {tally}"), lab) for n, tally in (("1", SMALL), ("2", LARGE)))
    hitless.apply(node, old)
    (planned,) = [entry for entry in hitless.plan(node, new).maps if entry.name == "ports"]
    assert planned.action == "discard"
    assert "which the kernel finds by types that cannot be written anew" in planned.loss[0]
    hitless.apply(node, new, BACK)


def test_a_value_of_an_inner_map_that_does_not_fit_is_counted_once_it_is_allowed(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    one, two = load(write("1"), lab), load(write("2", LARGE), lab)
    hitless.apply(node, two)
    inner = put(node, [7])
    inner.update(number(0), bytes(8) + number(1 << 40, 8) + bytes(8))
    inner.update(number(1), bytes(8) + number(5, 8) + bytes(8))
    result = hitless.apply(node, one, allow_loss=BACK)
    assert result.maps[1].lost_fields == {"inner.count": 1}
    assert counts(node) == {7: {0: (1 << 32) - 1, 1: 5}}


def test_a_rule_in_the_manifest_reaches_fields_of_inner_maps(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    hitless.apply(node, load(write("1"), lab))
    inner = put(node, [7], {0: 3})
    inner.update(number(0), number(3) + number(9))
    renamed = ATTACH + '[map.ports.field."inner.seen"]\nwas = "inner.last"\n'
    renamed += '[map.ports.field."inner.level"]\ndefault = 4\n[map.whole]\non_loss = "discard"\n'
    new = '__u32 count TAG("merge=sum"); __u16 level; __u32 seen;'
    hitless.apply(node, load(write("2", new, manifest=renamed), lab))
    (held,) = slots_of(outer(node)).values()
    assert Map.by_id(held).lookup(number(0)) == number(3) + number(4) + number(9)
    wrong = ATTACH + '[map.ports.field."inner.cuont"]\nmerge = "sum"\n'
    with pytest.raises(hitless.BundleError, match=r"bundle\.toml:13: map 'ports\.inner': no field 'cuont'"):
        load(write("3", manifest=wrong), lab)


def test_an_inner_map_with_another_layout_than_recorded_stops_the_upgrade(
    node: hitless.Node, lab: Lab, write: Write, tmp_path: Path
) -> None:
    hitless.apply(node, load(write("1"), lab))
    tally = "__u32 last; __u32 count;"
    twisted = SOURCE.format(tally=tally, key="__u32", outer="HASH_OF_MAPS", inner="HASH", room=4, slot="__u32")
    twisted = twisted.replace("MAP(whole, ARRAY, 1,", "MAP(whole, HASH, 8,")  # of the size that inner maps have
    stranger = hitless.Node(lab.bpffs / "stranger")
    hitless.apply(stranger, load(write_release(tmp_path / "twisted", "1", twisted), lab))
    whole = Map.open(stranger.root / "maps" / "whole")
    outer(node).update(number(7), number(whole.fd))
    before = node.observe()
    with pytest.raises(hitless.NodeError, match=r"inner map whole \(id \d+\) has another layout"):
        hitless.apply(node, load(write("2", LARGE), lab))
    assert node.observe() == before


def test_so_does_one_beside_others_of_the_same_object_that_have_the_recorded_layout(
    node: hitless.Node, lab: Lab, write: Write, tmp_path: Path
) -> None:
    hitless.apply(node, load(write("1"), lab))
    own = SOURCE.format(tally=SMALL, key="__u32", outer="HASH_OF_MAPS", inner="HASH", room=4, slot="__u32")
    right = [f"right{index}" for index in range(6)]
    more = "".join(f"MAP({name}, HASH, 8, __u32, struct tally);\n" for name in right)
    twisted = "struct twisted { __u32 last; __u32 count; };\nMAP(wrong, HASH, 8, __u32, struct twisted);\n"
    stranger = hitless.Node(lab.bpffs / "stranger")
    hitless.apply(stranger, load(write_release(tmp_path / "many", "1", own + more + twisted), lab))
    for port, name in enumerate([*right, "wrong"]):
        with Map.open(stranger.root / "maps" / name) as held:
            outer(node).update(number(port), number(held.fd))
    with pytest.raises(hitless.NodeError, match=r"inner map wrong \(id \d+\) has another layout"):
        hitless.apply(node, load(write("2", LARGE), lab))


def test_hundreds_of_inner_maps_are_carried_where_few_files_may_be_open(
    node: hitless.Node, lab: Lab, write: Write
) -> None:
    hitless.apply(node, load(write("1", room=1024), lab))
    made = [create_as(inner_spec(node)) for _ in range(300)]
    for index, inner in enumerate(made):
        inner.update(number(0), number(index) + number(1))
    keys = np.arange(300, dtype=np.uint32).view(np.uint8).reshape(-1, 4)
    outer(node).write(keys, np.array([inner.fd for inner in made], np.uint32).view(np.uint8).reshape(-1, 4))
    made.clear()
    new = load(write("2", LARGE, "__u64", room=1024), lab)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (sum(1 for _ in Path("/proc/self/fd").iterdir()) + 50, hard))
    try:
        hitless.apply(node, new)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert counts(node) == {index: {0: index} for index in range(300)}
