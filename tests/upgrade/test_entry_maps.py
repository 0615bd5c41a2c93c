"""Maps of entries of every kind, changed while programs write them: what clients counted is what the maps hold."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import hitless
from hitless.kernel.maps import Map
from meshd.demo.lab import Lab
from tests.patience import often
from tests.upgrade.conftest import Make
from tests.upgrade.test_under_fire import clients

# Counts the connects by port; without atomic instructions, as programs do where each CPU has a value of its own.
BY_CPU = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u32 port = __builtin_bswap16(ctx->user_port) % 16;
    struct held *found = bpf_map_lookup_elem(&held, &port);
    if (!found) {
        struct held none = {};
        bpf_map_update_elem(&held, &port, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&held, &port);
    }
    if (found) {
        found->count++;
        if (found->most < found->count)
            found->most = found->count;
    }
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""

# Counts under the value's lock, in two places that always agree.
LOCKED = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u32 port = __builtin_bswap16(ctx->user_port) % 16;
    struct held *found = bpf_map_lookup_elem(&held, &port);
    if (found) {
        bpf_spin_lock(&found->lock);
        found->count++;
        found->twice += 2;
        bpf_spin_unlock(&found->lock);
    }
    return 1;
}
char _license[] SEC("license") = "GPL";
"""

OLD = '__u32 count TAG("merge=sum"); __u32 most TAG("merge=max");'
NEW = '__u64 since; __u64 count TAG("merge=sum"); __u32 most TAG("merge=max"); __u32 class TAG("default=7");'


def store(fields: str, kind: str, entries: int = 64, flags: str = "0", key: str = "__u32") -> str:
    return (
        f"struct held {{ {fields} }};\n"
        f"struct {{ __uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, {entries}); __uint(map_flags, {flags});\n"
        f'__type(key, {key}); __type(value, struct held); }} held SEC(".maps");\n'
    )


def sums(node: hitless.Node) -> dict[int, int]:
    """What each port counted, over all CPUs; entries of an array that were never counted are left out."""
    found = {}
    for key, value in node.map("held").items():
        values = value if isinstance(value, list) else [value]
        found[key] = sum(one["count"] for one in values)
    return {key: count for key, count in found.items() if count}


@pytest.mark.parametrize("kind", ["PERCPU_HASH", "PERCPU_ARRAY"])
def test_a_per_cpu_counter_is_exact_under_fire(node: hitless.Node, make: Make, lab: Lab, kind: str) -> None:
    old, new = (make(version, store(fields, kind), BY_CPU) for version, fields in (("1", OLD), ("2", NEW)))
    hitless.apply(node, old)
    with clients(lab) as tries:
        for _ in range(often(10)):
            result = hitless.apply(node, new)
            assert (result.maps[0].action, result.maps[0].exactness) == ("convert", "exact")
            hitless.apply(node, old, allow_loss=["held"])
        hitless.apply(node, new)
    assert sums(node) == tries
    classes = {one["class"] for value in dict(node.map("held").items()).values() for one in value if one["count"]}
    assert classes == {7}


def test_a_per_cpu_map_is_taken_back_with_what_the_new_release_counted(
    node: hitless.Node, make: Make, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (make(version, store(fields, "PERCPU_HASH"), BY_CPU) for version, fields in (("1", OLD), ("2", NEW)))
    hitless.apply(node, old)

    def fail(_: object) -> None:
        raise OSError("planted")

    monkeypatch.setattr("hitless.upgrade.transaction._Upgrade._verify_hooks", fail)
    with clients(lab) as tries:
        for _ in range(5):
            with pytest.raises(OSError, match="planted"):
                hitless.apply(node, new)
    assert sums(node) == tries


@pytest.mark.parametrize("kind", ["HASH", "ARRAY"])
def test_what_a_lock_guards_is_exact_and_stays_consistent(node: hitless.Node, make: Make, lab: Lab, kind: str) -> None:
    old = "struct bpf_spin_lock lock; __u32 count TAG(\"merge=sum\"); __u64 twice TAG(\"merge=sum\");"
    new = "__u64 twice TAG(\"merge=sum\"); __u32 pad; struct bpf_spin_lock lock; __u64 count TAG(\"merge=sum\");"
    bundles = [make(version, store(fields, kind, 16), LOCKED) for version, fields in (("1", old), ("2", new))]
    hitless.apply(node, bundles[0])
    for port in range(16):
        node.map("held")[port] = {"lock": {"val": 0}, "count": 0, "twice": 0}
    with clients(lab) as tries:
        for _ in range(often(10)):
            hitless.apply(node, bundles[1])
            hitless.apply(node, bundles[0], allow_loss=["held"])
    assert sums(node) == tries
    assert all(value["twice"] == 2 * value["count"] for _, value in node.map("held").items())


@pytest.mark.parametrize("there", [True, False])
def test_a_map_changes_to_memory_on_demand_and_back(node: hitless.Node, make: Make, lab: Lab, there: bool) -> None:
    flags = ("0", "BPF_F_NO_PREALLOC") if there else ("BPF_F_NO_PREALLOC", "0")
    first, second = (make(str(at), store(OLD, "HASH", 64, flag), BY_CPU) for at, flag in enumerate(flags))
    hitless.apply(node, first)
    node.map("held").update_many((key, {"count": key, "most": 1}) for key in range(40))
    result = hitless.apply(node, second)
    assert [change.kind for change in result.maps[0].changes] == ["flags"]
    assert result.maps[0].method == "copy and merge in the kernel"
    assert dict(node.map("held").items()) == {key: {"count": key, "most": 1} for key in range(40)}


def test_an_array_that_becomes_smaller_loses_its_end_if_that_is_allowed(node: hitless.Node, make: Make) -> None:
    first, second = (make(str(size), store(OLD, "ARRAY", size), BY_CPU) for size in (16, 10))
    hitless.apply(node, first)
    node.map("held").update_many((key, {"count": key, "most": 0}) for key in range(16))
    with pytest.raises(hitless.LossNotAllowedError, match="elements 10 and above are dropped"):
        hitless.apply(node, second)
    hitless.apply(node, second, allow_loss=["held"])
    assert [value["count"] for _, value in node.map("held").items()] == list(range(10))


@pytest.mark.parametrize(("one", "other"), [("HASH", "LRU_HASH"), ("LRU_HASH", "HASH"), ("ARRAY", "HASH")])
def test_entries_move_to_a_map_of_another_type(node: hitless.Node, make: Make, one: str, other: str) -> None:
    first, second = (make(kind, store(OLD, kind, 256), BY_CPU) for kind in (one, other))
    hitless.apply(node, first)
    node.map("held").update_many((key, {"count": key, "most": 0}) for key in range(100))
    hitless.apply(node, second)
    found = {key: value["count"] for key, value in node.map("held").items()}
    assert {key: count for key, count in found.items() if count} == {key: key for key in range(1, 100)}


def test_a_smaller_lru_map_keeps_what_it_has_room_for(node: hitless.Node, make: Make) -> None:
    first, second = (make(str(size), store(OLD, "LRU_HASH", size), BY_CPU) for size in (4096, 1024))
    hitless.apply(node, first)
    node.map("held").update_many((key, {"count": key, "most": 0}) for key in range(3000))
    with pytest.raises(hitless.LossNotAllowedError, match="the least recently used are evicted"):
        hitless.apply(node, second)
    result = hitless.apply(node, second, allow_loss=["held"])
    assert result.maps[0].exactness.startswith("best-effort")
    kept = dict(node.map("held").items())
    assert 500 < len(kept) <= 1024
    assert all(value["count"] == key for key, value in kept.items())


# Allows a connect if the longest prefix of the address says so.
POLICY = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    struct prefix key = { .bits = 32, .address = ctx->user_ip4 };
    struct held *found = bpf_map_lookup_elem(&held, &key);
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    return !found || found->allow;
}
char _license[] SEC("license") = "GPL";
"""
PREFIX = "struct prefix { __u32 bits; __u32 address; };\n"


def prefix(bits: int, *address: int) -> dict[str, int]:
    return {"bits": bits, "address": int.from_bytes(bytes(address).ljust(4, b"\0"), "little")}


@pytest.fixture
def policies(make: Make) -> Callable[[str], hitless.Bundle]:
    """Release 1 or 2 of a trie of prefixes."""
    count = 'count TAG("merge=sum");'
    fields = {"1": f"__u32 {count} __u8 allow;", "2": f"__u8 allow; __u8 why; __u64 {count}"}

    def release(version: str) -> hitless.Bundle:
        trie = store(fields[version], "LPM_TRIE", 4096, "BPF_F_NO_PREALLOC", "struct prefix")
        return make(version, PREFIX + trie, POLICY)

    return release


def test_a_trie_of_prefixes_is_carried_and_counts_exactly(
    node: hitless.Node, policies: Callable[[str], hitless.Bundle], lab: Lab
) -> None:
    hitless.apply(node, policies("1"))
    held = node.map("held")
    prefixes = [prefix(8, 127), prefix(24, 127, 0, 0), *(prefix(24, 10, 1, number) for number in range(200))]
    held.update_many((key, {"count": 0, "allow": 1}) for key in prefixes)
    with clients(lab) as tries:
        for _ in range(5):
            result = hitless.apply(node, policies("2"))
            assert result.maps[0].method == "batch copy, merge in the kernel"
            hitless.apply(node, policies("1"), allow_loss=["held"])
    found = {(key["bits"], key["address"]): value for key, value in held.items()}
    assert len(found) == len(prefixes)
    longest = prefix(24, 127, 0, 0)
    assert found[24, longest["address"]] == {"count": sum(tries.values()), "allow": 1}


def test_prefixes_that_come_and_go_during_the_upgrade_are_carried_exactly(
    node: hitless.Node, policies: Callable[[str], hitless.Bundle]
) -> None:
    hitless.apply(node, policies("1"))
    held = node.map("held")
    held.update_many((prefix(24, 10, 0, number), {"count": 1, "allow": 1}) for number in range(100))
    held[prefix(8, 10)] = {"count": 9, "allow": 0}  # a parent of all of them, which a lookup of a deleted one finds
    with Map.open(node.root / "maps" / "held") as old:
        trie_key = (24).to_bytes(4, "little") + bytes([10, 0])

        def another_writer(_: hitless.Node) -> None:
            for number in range(0, 100, 10):
                old.delete(trie_key + bytes([number, 0]))
            old.update(trie_key + bytes([200, 0]), (5).to_bytes(4, "little") + b"\1\0\0\0")
            old.update(trie_key + bytes([5, 0]), (4).to_bytes(4, "little") + b"\0\0\0\0")

        hitless.apply(node, policies("2"), prepare=another_writer)
    found = {(key["bits"], key["address"]): value for key, value in held.items()}
    expected = {(24, prefix(24, 10, 0, number)["address"]): (1, 1) for number in range(100) if number % 10}
    expected[24, prefix(24, 10, 0, 200)["address"]] = (5, 1)
    expected[24, prefix(24, 10, 0, 5)["address"]] = (4, 0)
    expected[8, prefix(8, 10)["address"]] = (9, 0)
    assert {key: (value["count"], value["allow"]) for key, value in found.items()} == expected


def test_dual_writes_meet_a_copy_in_the_kernel_without_harm(node: hitless.Node, make: Make) -> None:
    """A control plane sets, changes and deletes while entries are copied: what it wrote last is what is there."""
    layouts = {"1": "__u32 count; __u32 most;", "2": "__u64 count; __u32 most;"}
    bundles = [make(version, store(fields, "HASH", 40_000), BY_CPU) for version, fields in layouts.items()]
    hitless.apply(node, bundles[0])
    held = node.map("held")
    journal = {key: key for key in range(0, 30_000, 2)}
    held.update_many((key, {"count": count, "most": 0}) for key, count in journal.items())
    done = threading.Event()

    def control_plane() -> None:
        number = 0
        while not done.is_set() and number < 20_000:
            number += 1
            key = number * 7919 % 30_000
            if number % 3:
                held[key] = {"count": number, "most": 0}
                journal[key] = number
            elif journal.pop(key, None) is not None:
                del held[key]

    for bundle in (bundles[1], bundles[0], bundles[1]):
        done.clear()
        writer = threading.Thread(target=control_plane)
        writer.start()
        hitless.apply(node, bundle, allow_loss=["held"])
        done.set()
        writer.join()
    assert {key: value["count"] for key, value in held.items()} == journal


def test_the_pace_of_a_copy_can_be_limited(node: hitless.Node, make: Make) -> None:
    bundles = [make(version, store(fields, "HASH", 40_000), BY_CPU) for version, fields in (("1", OLD), ("2", NEW))]
    hitless.apply(node, bundles[0])
    node.map("held").update_many((key, {"count": key, "most": 0}) for key in range(20_000))
    result = hitless.apply(node, bundles[1], pace=hitless.Pace(rate=40_000))
    assert result.steps["copy"] > 0.45  # 20,000 entries


def test_entries_that_come_and_go_while_a_copy_runs_make_the_base_grow_and_the_pass_goes_on(
    node: hitless.Node, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (make(version, store(fields, "HASH", 1024), BY_CPU) for version, fields in (("1", OLD), ("2", NEW)))
    hitless.apply(node, old)
    node.map("held").update_many((key, {"count": key, "most": 1}) for key in range(400))
    monkeypatch.setattr("hitless.upgrade.copy.CHUNK", 64)
    copied = []

    def come_and_go(event: hitless.Progress) -> None:
        if event.step == "copy" and event.done and event.done < 400:
            copied.append(event.done)
            for key in range(1000, 1300):
                node.map("held")[key] = {"count": 1, "most": 1}
                del node.map("held")[key]

    result = hitless.apply(node, new, progress=come_and_go)
    assert copied == [*range(64, 400, 64)]
    assert result.maps[0].entries == 400
    assert {key: value["count"] for key, value in node.map("held").items()} == {key: key for key in range(400)}
