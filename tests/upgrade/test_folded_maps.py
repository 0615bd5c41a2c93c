"""Several maps that are folded into one, also while programs of both releases write, and the way back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import hitless
from hitless.compare import compare
from hitless.kernel.maps import Map
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade, kill_while_undoing
from tests.releases import ATTACH, write_release
from tests.upgrade.conftest import PROGRAM, everything
from tests.upgrade.test_under_fire import clients

OLD = """
struct tcp { __u32 hits TAG("merge=sum"); __u16 port; };
struct udp { __u16 port; __u32 seen TAG("merge=sum"); };
MAP(tcp, HASH, 1024, __u32, struct tcp);
MAP(udp, HASH, 1024, __u32, struct udp);
"""
NEW = """
struct flow { __u64 hits TAG("merge=sum"); __u16 port; __u8 proto; };
MAP(flows, HASH, 2048, __u32, struct flow);
"""
FOLD = """
[map.flows]
was = ["tcp", "udp"]
on_collision = "%s"
[map.flows.from.tcp.field.proto]
default = 6
[map.flows.from.udp.field.proto]
default = 17
[map.flows.from.udp.field.hits]
was = "seen"
"""

Folds = Callable[..., hitless.Bundle]


@pytest.fixture
def bundles(lab: Lab, tmp_path: Path) -> Folds:
    """A release of some version with these maps and programs, with rules and converters."""

    made: dict[tuple[str, ...], hitless.Bundle] = {}

    def bundle(version: str, text: str, rules: str = "", converters: str = "") -> hitless.Bundle:
        what = (version, text, rules, converters)
        if what not in made:
            made[what] = compiled(*what)
        return made[what]

    def compiled(version: str, text: str, rules: str, converters: str) -> hitless.Bundle:
        directory = tmp_path / version
        write_release(directory, version, text if "SEC(\"cgroup" in text else text + PROGRAM, ATTACH + rules)
        (directory / "converters.py").write_text(converters)
        return hitless.Bundle.load(directory, {"cgroup": str(lab.cgroup)})

    return bundle


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def tcp(hits: int, port: int = 80) -> bytes:
    return number(hits) + number(port, 2) + bytes(2)


def udp(seen: int, port: int = 53) -> bytes:
    return number(port, 2) + bytes(2) + number(seen)


def filled(node: hitless.Node, bundles: Folds, ones: dict[int, int], others: dict[int, int]) -> tuple[Map, Map]:
    """The old release runs with these counts by key; its maps as its programs have them."""
    hitless.apply(node, bundles("1.0", OLD))
    maps = Map.open(node.root / "maps" / "tcp"), Map.open(node.root / "maps" / "udp")
    for held, entries, value in zip(maps, (ones, others), (tcp, udp), strict=True):
        for key, hits in entries.items():
            held.update(number(key), value(hits))
    return maps


def hits(node: hitless.Node) -> dict[int, int]:
    return {key: value["hits"] for key, value in node.map("flows").items()}


def test_entries_of_both_maps_are_in_the_new_one_each_as_its_own_rules_say(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: 10}, {2: 20})
    second = bundles("2.0", NEW, FOLD % "error")
    (planned,) = hitless.plan(node, second).maps
    assert (planned.action, planned.sources, planned.loss, planned.was) == ("convert", ("tcp", "udp"), (), None)
    assert "refused before the cutover" in planned.exactness
    assert "best-effort on the way back: after a failed cutover what the new release inserted" in planned.exactness
    result = hitless.apply(node, second)
    assert (result.maps[0].entries, result.maps[0].lost) == (2, 0)
    assert dict(node.map("flows").items()) == {
        1: {"hits": 10, "port": 80, "proto": 6},
        2: {"hits": 20, "port": 53, "proto": 17},
    }


def test_check_says_the_same_without_a_node(bundles: Folds, tmp_path: Path) -> None:
    bundles("1.0", OLD)
    bundles("2.0", NEW, FOLD % "error")
    compared = compare(str(tmp_path / "1.0"), str(tmp_path / "2.0"))
    assert (compared.verdict, compared.lost) == ("lossless", ())
    assert [(change.old, change.new) for change in compared.maps[0].diff.changes if change.kind == "folded"] == [
        ("tcp", "flows"),
        ("udp", "flows"),
    ]


def test_two_maps_that_have_one_key_are_refused_by_name_and_nothing_changes(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: 10, 3: 1}, {1: 20, 4: 1})
    before = everything(node)
    with pytest.raises(hitless.LossNotAllowedError, match="tcp 01000000 and udp 01000000") as caught:
        hitless.apply(node, bundles("2.0", NEW, FOLD % "error"))
    assert caught.value.facts["count"] == 1
    assert everything(node) == before


@pytest.mark.parametrize(("policy", "wanted"), [("first", 10), ("last", 20), ("merge", 30)])
def test_a_key_of_two_maps_becomes_what_the_rule_says(
    node: hitless.Node, bundles: Folds, policy: str, wanted: int
) -> None:
    filled(node, bundles, {1: 10}, {1: 20})
    second = bundles("2.0", NEW, FOLD % policy)
    if policy != "merge":
        with pytest.raises(hitless.LossNotAllowedError, match=f"all but the {policy} that is read"):
            hitless.apply(node, second)
    hitless.apply(node, second, allow_loss=["flows"])
    assert hits(node) == {1: wanted}


operations = st.lists(
    st.tuples(st.sampled_from(["tcp", "udp"]), st.integers(0, 5), st.integers(0, 100) | st.none()), max_size=12
)


@given(start=operations, meanwhile=operations, late=operations)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True,
    database=None, phases=[Phase.generate],
)  # fmt: skip
def test_sums_are_those_of_both_maps_whatever_the_old_release_writes_until_the_last_merge(
    node: hitless.Node,
    bundles: Folds,
    start: list[tuple[str, int, int | None]],
    meanwhile: list[tuple[str, int, int | None]],
    late: list[tuple[str, int, int | None]],
) -> None:
    held = dict(zip(("tcp", "udp"), filled(node, bundles, {}, {}), strict=True))
    oracle: dict[tuple[str, int], int] = {}

    def write(todo: list[tuple[str, int, int | None]]) -> None:
        for name, key, count in todo:
            if count is None:
                held[name].delete(number(key))
                oracle.pop((name, key), None)
            else:
                held[name].update(number(key), (tcp if name == "tcp" else udp)(count))
                oracle[name, key] = count

    write(start)

    def in_the_merge(event: hitless.Progress) -> None:
        if event.step == "merge":
            write(late)

    try:
        hitless.apply(
            node, bundles("2.0", NEW, FOLD % "merge"), prepare=lambda _: write(meanwhile), progress=in_the_merge
        )
        sums: Counter[int] = Counter()
        for (_, key), count in oracle.items():
            sums[key] += count
        assert {key: count for key, count in hits(node).items() if count} == {k: n for k, n in sums.items() if n}
        assert set(hits(node)) >= {key for _, key in oracle}
    finally:
        hitless.unload(node)


COUNTING_TWO = """
struct tally { __u32 count TAG("merge=sum"); };
MAP(seven, HASH, 64, __u32, struct tally);
MAP(nine, HASH, 64, __u32, struct tally);
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u32 port = __builtin_bswap16(ctx->user_port), key = 1;
    struct tally none = {}, *found;
    if (port == 7) {
        bpf_map_update_elem(&seven, &key, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&seven, &key);
    } else {
        bpf_map_update_elem(&nine, &key, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&nine, &key);
    }
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    return 1;
}
char _license[] SEC("license") = "GPL";
"""
COUNTING_ONE = """
struct tally { __u64 count TAG("merge=sum"); };
MAP(both, HASH, 128, __u32, struct tally);
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u32 key = 1;
    struct tally none = {}, *found;
    bpf_map_update_elem(&both, &key, &none, BPF_NOEXIST);
    found = bpf_map_lookup_elem(&both, &key);
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    return 1;
}
char _license[] SEC("license") = "GPL";
"""
MERGE = '[map.both]\nwas = ["seven", "nine"]\non_collision = "merge"\n'


def test_no_increment_is_lost_when_both_maps_count_under_one_key(
    node: hitless.Node, bundles: Folds, lab: Lab
) -> None:
    first = bundles("1.0", COUNTING_TWO)
    second = bundles("2.0", COUNTING_ONE, MERGE)
    hitless.apply(node, first)
    with clients(lab) as tries:
        time.sleep(0.3)
        hitless.apply(node, second)
        time.sleep(0.1)
    assert {key: value["count"] for key, value in node.map("both").items()} == {1: sum(tries.values())}


def test_a_meeting_after_the_cutover_has_the_upgrade_taken_back(node: hitless.Node, bundles: Folds) -> None:
    _, others = filled(node, bundles, {1: 10}, {2: 20})

    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            others.update(number(1), udp(5))

    with pytest.raises(hitless.LossNotAllowedError, match="tcp 01000000 and udp 01000000"):
        hitless.apply(node, bundles("2.0", NEW, FOLD % "error"), progress=late)
    assert node.observe().version == "1.0"
    assert len(node.map("tcp").items()) == 1
    assert len(node.map("udp").items()) == 2


@pytest.mark.parametrize("step", ["copy", "verify", "cutover", "merge", "commit"])
def test_a_killed_fold_is_finished_or_undone_and_no_count_is_lost(
    node: hitless.Node, bundles: Folds, lab: Lab, tmp_path: Path, step: str
) -> None:
    ones, others = filled(node, bundles, {1: 10, 2: 1}, {1: 20, 3: 1})
    bundles("2.0", NEW, FOLD % "merge")
    kill_upgrade(step, node, tmp_path / "2.0", {"cgroup": str(lab.cgroup)})
    ones.update(number(1), tcp(11))
    others.update(number(4), udp(4))
    others.delete(number(3))
    hitless.recover(node)
    if node.observe().version == "1.0":
        hitless.apply(node, hitless.Bundle.load(tmp_path / "2.0", {"cgroup": str(lab.cgroup)}))
    assert hits(node) == {1: 31, 2: 1, 4: 4}


def writing_late(node: hitless.Node) -> Callable[[hitless.Progress], None]:
    """New programs have counted, inserted and deleted when the upgrade fails, after the cutover."""

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            with Map.open(node.next / "maps" / "flows") as new:
                for key, more in ((1, 5), (2, 7), (3, 9)):
                    entry = new.lookup(number(key)) or b""
                    new.update(number(key), number(int.from_bytes(entry[:8], "little") + more, 8) + entry[8:])
                new.delete(number(4))
                new.update(number(9), number(99, 8) + bytes(8))
            raise ZeroDivisionError

    return late


def test_when_a_fold_is_taken_back_each_map_gets_what_was_written_to_its_own_entries(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: 10, 3: 30, 4: 1}, {2: 20, 3: 300})
    with pytest.raises(ZeroDivisionError) as caught:
        hitless.apply(node, bundles("2.0", NEW, FOLD % "merge"), progress=writing_late(node))
    assert node.observe().version == "1.0"
    assert {key: entry["hits"] for key, entry in node.map("tcp").items()} == {1: 15, 3: 30}
    assert {key: entry["seen"] for key, entry in node.map("udp").items()} == {2: 27, 3: 300}
    (note,) = caught.value.__notes__
    assert "1 entries that came new or have no way back, and what it wrote to 1 that several maps have together" in note


@pytest.mark.parametrize("back", ["both", "one", "none"])
def test_when_a_fold_by_functions_is_taken_back_the_maps_that_have_one_back_get_theirs(
    node: hitless.Node, bundles: Folds, back: str
) -> None:
    filled(node, bundles, {1: 10, 3: 30, 4: 1}, {2: 20})
    code = FUNCTIONS.replace("def udp_back", "def u") if back != "both" else FUNCTIONS
    code = code.replace("def tcp_back", "def t") if back == "none" else code
    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, bundles("2.0", NEW, BY_FUNCTIONS, code), progress=writing_late(node))
    ones = {key: entry["hits"] for key, entry in node.map("tcp").items()}
    assert ones == ({1: 10, 3: 30, 4: 1} if back == "none" else {1: 15, 3: 39})
    assert {key: entry["seen"] for key, entry in node.map("udp").items()} == {2: 27 if back == "both" else 20}


@pytest.mark.parametrize(
    ("phase", "when"), [("undoing", "after"), ("merging-back", "before"), ("merging-back", "after")]
)
def test_a_fold_that_is_killed_while_it_is_taken_back_leaves_the_old_maps_complete(
    node: hitless.Node, bundles: Folds, lab: Lab, tmp_path: Path, phase: str, when: str
) -> None:
    filled(node, bundles, {1: 10, 2: 2}, {1: 20, 3: 3})
    before = everything(node)[2]  # type: ignore[index]
    bundles("2.0", NEW, FOLD % "merge")
    kill_while_undoing(phase, when, node, tmp_path / "2.0", {"cgroup": str(lab.cgroup)})
    hitless.recover(node)
    assert everything(node)[2] == before  # type: ignore[index]


def test_the_next_release_with_the_same_manifest_keeps_the_map(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {1: 10}, {2: 20})
    hitless.apply(node, bundles("2.0", NEW, FOLD % "error"))
    result = hitless.apply(node, bundles("2.1", NEW, FOLD % "error"))
    assert [entry.action for entry in result.maps] == ["keep"]


def test_a_release_before_that_has_one_of_the_maps_is_folded_as_well(node: hitless.Node, bundles: Folds) -> None:
    hitless.apply(node, bundles("1.0", OLD.replace("MAP(udp, HASH, 1024, __u32, struct udp);\n", "")))
    Map.open(node.root / "maps" / "tcp").update(number(1), tcp(10))
    hitless.apply(node, bundles("2.0", NEW, FOLD % "error"))
    assert hits(node) == {1: 10}


def test_a_fold_without_functions_back_has_no_way_back_that_keeps_the_entries(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: 10}, {2: 20})
    hitless.apply(node, bundles("2.0", NEW, FOLD % "error"))
    planned = {entry.name: entry for entry in hitless.plan_rollback(node).maps}
    assert all("only a function can tell which entries of flows were of" in planned[n].loss[0] for n in ("tcp", "udp"))
    with pytest.raises(hitless.LossNotAllowedError, match="only a function can tell"):
        hitless.rollback(node)
    assert hits(node) == {1: 10, 2: 20}
    hitless.rollback(node, allow_loss=["tcp", "udp"])
    assert (node.map("tcp").items(), node.map("udp").items()) == ([], [])


FUNCTIONS = """
def tcp(keys, old, new):
    new["proto"] = 6
    return new

def tcp_back(keys, old, new):
    return new, old["proto"] == 6

def udp(keys, old, new):
    new["proto"], new["hits"] = 17, old["seen"]
    return new

def udp_back(keys, old, new):
    new["seen"] = old["hits"]
    return new, old["proto"] == 17
"""
BY_FUNCTIONS = """
[map.flows]
was = ["tcp", "udp"]
[map.flows.from.tcp]
convert = "converters:tcp"
[map.flows.from.udp]
convert = "converters:udp"
"""


def test_with_functions_back_a_rollback_brings_each_entry_to_its_map_and_the_next_one_forth_again(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: 10}, {2: 20})
    hitless.apply(node, bundles("2.0", NEW, BY_FUNCTIONS, FUNCTIONS))
    flows = node.map("flows")
    flows[3] = {"hits": 30, "port": 443, "proto": 6}
    hitless.rollback(node)
    assert dict(node.map("tcp").items()) == {1: {"hits": 10, "port": 80}, 3: {"hits": 30, "port": 443}}
    assert dict(node.map("udp").items()) == {2: {"seen": 20, "port": 53}}
    node.map("udp")[4] = {"seen": 40, "port": 53}
    hitless.rollback(node)
    assert hits(node) == {1: 10, 2: 20, 3: 30, 4: 40}
    hitless.rollback(node)
    assert len(node.map("tcp").items()) == len(node.map("udp").items()) == 2


def test_on_the_way_back_an_entry_that_no_map_takes_is_refused_until_its_loss_is_allowed(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: 10}, {2: 20})
    hitless.apply(node, bundles("2.0", NEW, BY_FUNCTIONS, FUNCTIONS))
    node.map("flows")[3] = {"hits": 30, "port": 443, "proto": 99}
    with pytest.raises(hitless.LossNotAllowedError, match="1 entries go to none of tcp, udp"):
        hitless.rollback(node)
    assert hits(node) == {1: 10, 2: 20, 3: 30}
    result = hitless.rollback(node, allow_loss=["flows"])
    assert sum(entry.lost for entry in result.maps) == 1
    assert len(node.map("tcp").items()) == len(node.map("udp").items()) == 1


def test_a_write_during_the_fold_stands_and_the_old_release_counts_on(node: hitless.Node, bundles: Folds) -> None:
    ones, _ = filled(node, bundles, {1: 10}, {1: 20, 2: 5})

    def control_plane(node: hitless.Node) -> None:
        flows = node.map("flows")
        flows[1] = {"hits": 500, "port": 1, "proto": 1}
        flows[9] = {"hits": 900, "port": 9, "proto": 9}
        del flows[2]
        ones.update(number(1), tcp(16))
        assert flows.get(1)["hits"] == 506

    hitless.apply(node, bundles("2.0", NEW, FOLD % "merge"), prepare=control_plane)
    assert hits(node) == {1: 506, 9: 900}


def test_what_comes_after_the_cutover_into_maps_that_were_empty_adds_to_what_new_programs_count(
    node: hitless.Node, bundles: Folds
) -> None:
    ones, others = filled(node, bundles, {}, {})

    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            with Map.open(node.next / "maps" / "flows") as new:
                new.update(number(1), number(100, 8) + bytes(8))
            ones.update(number(1), tcp(10))
            others.update(number(2), udp(20))

    hitless.apply(node, bundles("2.0", NEW, FOLD % "merge"), progress=late)
    assert hits(node) == {1: 110, 2: 20}


def test_a_new_map_without_room_for_the_entries_of_both_is_refused_before_anything_changed(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, dict.fromkeys(range(6), 1), dict.fromkeys(range(10, 16), 1))
    small = NEW.replace("2048", "8")
    with pytest.raises(hitless.LossNotAllowedError, match="maps tcp and udp have 12 entries, and release"):
        hitless.apply(node, bundles("2.0", small, FOLD % "error"))
    before = everything(node)
    with pytest.raises(hitless.KernelError, match="E2BIG"):
        hitless.apply(node, bundles("2.1", small, FOLD % "merge"))
    assert everything(node) == before


def test_a_map_that_keeps_its_name_takes_in_another_and_gives_it_back(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {1: 10}, {2: 20})
    new = NEW.replace("MAP(flows,", "MAP(tcp,")
    rules = BY_FUNCTIONS.replace("map.flows", "map.tcp")
    planned = bundles("2.0", new, rules, FUNCTIONS)
    hitless.apply(node, planned, planned=hitless.plan(node, planned))
    assert {key: entry["hits"] for key, entry in node.map("tcp").items()} == {1: 10, 2: 20}
    hitless.rollback(node)
    assert {key: entry["hits"] for key, entry in node.map("tcp").items()} == {1: 10}
    assert {key: entry["seen"] for key, entry in node.map("udp").items()} == {2: 20}


def test_folding_into_another_type_of_map_is_refused_by_name(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {1: 10}, {2: 20})
    with pytest.raises(hitless.LossNotAllowedError, match="folding several maps into one of type percpu_hash"):
        hitless.apply(node, bundles("2.0", NEW.replace("HASH", "PERCPU_HASH"), FOLD % "merge"))


def test_a_field_that_only_grows_smaller_has_to_be_in_every_map(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {1: 10}, {1: 20})
    new = NEW.replace("__u8 proto;", "__u8 proto; __u32 least TAG(\"merge=min\");")
    with pytest.raises(hitless.LossNotAllowedError, match="it has no least, whose policy is min"):
        hitless.apply(node, bundles("2.0", new, FOLD % "merge"))


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("was = []", "was is the old name of the map, or a list"),
        ("was = [1]", "was is the old name of the map, or a list"),
        ('was = ["tcp", "tcp"]', "was names a map twice: tcp, tcp"),
        ('was = "tcp"\n[map.flows.from.udp]\nold_key = "__u32"', "from is for the maps .* folded into flows: none"),
        ('was = ["tcp", "udp"]\n[map.flows.from.icmp]\nold_key = "__u32"', "folded into flows: tcp, udp"),
        ('was = ["tcp", "udp"]\n[map.flows.from.udp]\nmerge = "sum"', "unknown key 'merge'"),
        ('was = ["tcp", "udp"]\n[map.flows.from.udp.field.hits]\nmerge = "sum"', "unknown key 'merge'"),
        ('was = ["tcp", "udp"]\n[map.flows.from.udp.field.size]\nwas = "x"', "no field 'size'"),
        ('was = ["tcp", "udp"]\n[map.flows.from.udp]\nconvert = "converters:gone"', "has no function gone"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_its_line(bundles: Folds, rules: str, words: str) -> None:
    with pytest.raises(hitless.BundleError, match=rf"toml:\d+: .*{words}"):
        bundles("2.0", NEW, f"[map.flows]\n{rules}\n")


def test_a_map_that_is_folded_and_split_at_once_is_refused(bundles: Folds) -> None:
    more = NEW + "MAP(more, HASH, 8, __u32, struct flow);\n"
    rules = '[map.flows]\nwas = ["tcp", "udp"]\n[map.more]\nwas = "tcp"\n'
    with pytest.raises(hitless.UnsupportedError, match="flows and more say that they were tcp"):
        bundles("2.0", more, rules)


def test_keys_and_values_of_several_sizes_types_and_locks_come_together(node: hitless.Node, bundles: Folds) -> None:
    locked = "struct locked { struct bpf_spin_lock lock; __u32 sum TAG(\"merge=sum\"); };\n"
    old = locked + (
        "struct plain { __u32 sum; };\nstruct short_key { __u32 addr; };\n"
        "struct long_key { __u32 addr; __u64 port; };\n"
        "MAP(one, LRU_HASH, 64, struct long_key, struct plain);\nMAP(two, HASH, 64, struct short_key, struct locked);\n"
    )
    new = locked + "struct short_key { __u32 addr; };\nMAP(all, HASH, 128, struct short_key, struct locked);\n"
    hitless.apply(node, bundles("1.0", old))
    for port, count in ((1, 5), (2, 6)):
        node.map("one")[{"addr": 1, "port": port}] = {"sum": count}
    for addr, count in ((1, 7), (2, 8)):
        Map.open(node.root / "maps" / "two").update(number(addr), bytes(4) + number(count))
    rules = '[map.all]\nwas = ["one", "two"]\non_collision = "merge"\non_loss = "discard"\n'
    hitless.apply(node, bundles("2.0", new, rules))
    assert {key["addr"]: entry["sum"] for key, entry in node.map("all").items()} == {1: 18, 2: 8}


def test_elements_of_an_array_and_entries_of_a_hash_come_together(node: hitless.Node, bundles: Folds) -> None:
    hitless.apply(node, bundles("1.0", "MAP(one, ARRAY, 3, __u32, __u64);\nMAP(two, HASH, 8, __u32, __u64);\n"))
    node.map("one")[1] = 5
    node.map("two")[9] = 7
    hitless.apply(node, bundles("2.0", "MAP(all, HASH, 16, __u32, __u64);\n", '[map.all]\nwas = ["one", "two"]\n'))
    assert dict(node.map("all").items()) == {0: 0, 1: 5, 2: 0, 9: 7}
