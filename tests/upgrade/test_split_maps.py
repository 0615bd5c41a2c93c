"""One map that is split into several: by fields, or by functions that say which entries are whose."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import hitless
from hitless.compare import compare
from hitless.kernel.maps import Map, possible_cpus
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade
from tests.upgrade.conftest import Make, everything
from tests.upgrade.test_folded_maps import COUNTING_ONE, COUNTING_TWO, Folds, bundles, number
from tests.upgrade.test_under_fire import clients

__all__ = ["bundles"]  # a fixture

OLD = """
struct service { __u32 hits TAG("merge=sum"); __u32 addr; __u32 kind; };
MAP(service, HASH, 64, __u32, struct service);
"""
BY_FIELDS = """
struct count { __u32 hits TAG("merge=sum"); };
struct place { __u32 addr; __u32 kind; };
MAP(counts, HASH, 64, __u32, struct count);
MAP(places, HASH, 64, __u32, struct place);
"""
FIELDS = '[map.counts]\nwas = "service"\n[map.places]\nwas = "service"\n'
BY_KIND = """
struct service { __u64 hits TAG("merge=sum"); __u32 addr; __u32 kind; };
MAP(local, HASH, 64, __u32, struct service);
MAP(remote, HASH, 8, __u32, struct service);
"""
KINDS = (
    '[map.local]\nwas = "service"\nconvert = "converters:local"\n'
    '[map.remote]\nwas = "service"\nconvert = "converters:remote"\n'
)
FUNCTIONS = """
def local(keys, old, new):
    return new, old["kind"] == 1

def local_back(keys, old, new):
    return new

def remote(keys, old, new):
    return new, old["kind"] == 2

def remote_back(keys, old, new):
    return new
"""


def value(hits: int, kind: int = 1, addr: int = 9) -> bytes:
    return number(hits) + number(addr) + number(kind)


def filled(node: hitless.Node, bundles: Folds, entries: dict[int, tuple[int, int]]) -> Map:
    """The old release runs with these hits and kinds; its map as its programs have it."""
    hitless.apply(node, bundles("1.0", OLD))
    held = Map.open(node.root / "maps" / "service")
    for key, (hits, kind) in entries.items():
        held.update(number(key), value(hits, kind))
    return held


def hits(node: hitless.Node, name: str) -> dict[int, int]:
    return {key: entry["hits"] for key, entry in node.map(name).items()}


def test_each_heir_gets_the_fields_that_it_has_and_nothing_is_lost(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {1: (10, 1), 2: (20, 2)})
    second = bundles("2.0", BY_FIELDS, FIELDS)
    planned = hitless.plan(node, second).maps
    assert [(entry.name, entry.action, entry.was, entry.loss) for entry in planned] == [
        ("counts", "convert", "service", ()),
        ("places", "convert", "service", ()),
    ]
    hitless.apply(node, second)
    assert hits(node, "counts") == {1: 10, 2: 20}
    assert dict(node.map("places").items()) == {1: {"addr": 9, "kind": 1}, 2: {"addr": 9, "kind": 2}}


def test_a_field_that_no_heir_has_is_a_loss(node: hitless.Node, bundles: Folds, tmp_path: Path) -> None:
    filled(node, bundles, {1: (10, 1)})
    second = bundles("2.0", BY_FIELDS.replace(" __u32 kind;", ""), FIELDS)
    losses = {entry.name: entry.loss for entry in hitless.plan(node, second).maps}
    assert all(len(found) == 1 and found[0].startswith("kind") for found in losses.values())
    assert [item.name for item in compare(str(tmp_path / "1.0"), str(tmp_path / "2.0")).lost] == ["counts", "places"]
    with pytest.raises(hitless.LossNotAllowedError, match="kind"):
        hitless.apply(node, second)
    told = bundles("2.1", BY_FIELDS.replace(" __u32 kind;", ""), f'{FIELDS}[map.service]\non_loss = "discard"\n')
    assert compare(str(tmp_path / "1.0"), str(tmp_path / "2.1")).lost == ()
    hitless.apply(node, told)


def test_functions_say_which_entries_are_whose(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {key: (key, 1 + key % 2) for key in range(16)})
    second = bundles("2.0", BY_KIND, KINDS, FUNCTIONS)
    (planned, _) = hitless.plan(node, second).maps
    assert "an entry that no map takes is lost" in planned.exactness
    hitless.apply(node, second)
    assert hits(node, "local") == {key: key for key in range(0, 16, 2)}
    assert hits(node, "remote") == {key: key for key in range(1, 16, 2)}


def test_entries_that_no_heir_takes_are_counted_and_refused_until_their_loss_is_allowed(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: (10, 1), 2: (20, 2), 3: (30, 3), 4: (40, 4)})
    before = everything(node)
    second = bundles("2.0", BY_KIND, KINDS, FUNCTIONS)
    with pytest.raises(hitless.LossNotAllowedError, match="map service: 2 entries go to none of local, remote") as seen:
        hitless.apply(node, second)
    assert (seen.value.facts["count"], seen.value.facts["maps"]) == (2, ["service"])
    assert everything(node) == before
    result = hitless.apply(node, second, allow_loss=["service"])
    assert [entry.lost_fields for entry in result.maps] == [{"entries that no map takes": 2}, {}]
    assert (hits(node, "local"), hits(node, "remote")) == ({1: 10}, {2: 20})


def test_a_manifest_may_say_that_such_entries_can_go(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {1: (10, 1), 3: (30, 3)})
    rules = f'{KINDS}[map.service]\non_loss = "discard"\n'
    result = hitless.apply(node, bundles("2.0", BY_KIND, rules, FUNCTIONS))
    assert sum(entry.lost for entry in result.maps) == 1


def test_an_entry_that_changes_sides_while_the_old_release_writes_is_in_one_map_only(
    node: hitless.Node, bundles: Folds
) -> None:
    held = filled(node, bundles, {1: (10, 1), 2: (20, 2), 3: (30, 1), 4: (1, 1)})

    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            held.update(number(1), value(11, 2))
            held.update(number(2), value(22, 1))
            held.update(number(5), value(50, 2))
            held.update(number(3), value(33, 1))
            held.delete(number(4))

    hitless.apply(node, bundles("2.0", BY_KIND, KINDS, FUNCTIONS), progress=late)
    assert (hits(node, "local"), hits(node, "remote")) == ({2: 22, 3: 33}, {1: 11, 5: 50})


writes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 100), st.sampled_from([1, 2, None])), max_size=12)


@given(start=writes, meanwhile=writes, late=writes)
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True,
    database=None, phases=[Phase.generate],
)  # fmt: skip
def test_each_entry_is_where_the_old_release_left_it_whatever_it_writes_until_the_last_merge(
    node: hitless.Node,
    bundles: Folds,
    start: list[tuple[int, int, int | None]],
    meanwhile: list[tuple[int, int, int | None]],
    late: list[tuple[int, int, int | None]],
) -> None:
    held = filled(node, bundles, {})
    oracle: dict[int, tuple[int, int]] = {}

    def write(todo: list[tuple[int, int, int | None]]) -> None:
        for key, count, kind in todo:
            if kind is None:
                held.delete(number(key))
                oracle.pop(key, None)
            else:
                held.update(number(key), value(count, kind))
                oracle[key] = count, kind

    write(start)

    def in_the_merge(event: hitless.Progress) -> None:
        if event.step == "merge":
            write(late)

    try:
        second = bundles("2.0", BY_KIND, KINDS, FUNCTIONS)
        hitless.apply(node, second, prepare=lambda _: write(meanwhile), progress=in_the_merge)
        assert hits(node, "local") == {key: count for key, (count, kind) in oracle.items() if kind == 1}
        assert hits(node, "remote") == {key: count for key, (count, kind) in oracle.items() if kind == 2}
    finally:
        hitless.unload(node)


def test_an_entry_for_nobody_that_comes_after_the_cutover_has_the_upgrade_taken_back(
    node: hitless.Node, bundles: Folds
) -> None:
    held = filled(node, bundles, {1: (10, 1)})

    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            held.update(number(3), value(30, 3))

    with pytest.raises(hitless.LossNotAllowedError, match="1 entries go to none"):
        hitless.apply(node, bundles("2.0", BY_KIND, KINDS, FUNCTIONS), progress=late)
    assert node.observe().version == "1.0"
    assert hits(node, "service") == {1: 10, 3: 30}


def counted_late(node: hitless.Node, name: str, key: int, more: int, size: int) -> Callable[[hitless.Progress], None]:
    """A new program has counted when the upgrade fails, after the cutover."""

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            with Map.open(node.next / "maps" / name) as new:
                entry = new.lookup(number(key)) or b""
                new.update(number(key), number(int.from_bytes(entry[:size], "little") + more, size) + entry[size:])
            raise ZeroDivisionError

    return late


def test_what_new_programs_counted_comes_back_from_the_heir_that_has_the_field(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: (10, 1)})
    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, bundles("2.0", BY_FIELDS, FIELDS), progress=counted_late(node, "counts", 1, 5, 4))
    assert dict(node.map("service").items()) == {1: {"hits": 15, "addr": 9, "kind": 1}}


def test_what_new_programs_counted_comes_back_from_the_heir_that_took_the_entry(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: (10, 1), 2: (20, 2)})
    second = bundles("2.0", BY_KIND, KINDS, FUNCTIONS)
    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, second, progress=counted_late(node, "remote", 2, 5, 8))
    assert hits(node, "service") == {1: 10, 2: 25}


def test_a_rollback_puts_the_fields_of_all_heirs_together_and_the_next_one_parts_them(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: (10, 1), 2: (20, 2)})
    hitless.apply(node, bundles("2.0", BY_FIELDS, FIELDS))
    node.map("counts")[1] = {"hits": 15}
    node.map("places")[2] = {"addr": 4, "kind": 7}
    hitless.rollback(node)
    both = {1: {"hits": 15, "addr": 9, "kind": 1}, 2: {"hits": 20, "addr": 4, "kind": 7}}
    assert dict(node.map("service").items()) == both
    hitless.rollback(node)
    assert hits(node, "counts") == {1: 15, 2: 20}
    hitless.rollback(node)
    assert dict(node.map("service").items()) == both


def test_a_rollback_takes_no_default_for_a_field_that_another_heir_brings(node: hitless.Node, bundles: Folds) -> None:
    old = OLD.replace("__u32 kind;", '__u32 kind TAG("default=5");')
    hitless.apply(node, bundles("1.1", old))
    Map.open(node.root / "maps" / "service").update(number(1), value(10, 2))
    hitless.apply(node, bundles("2.0", BY_FIELDS, FIELDS))
    hitless.rollback(node)
    assert dict(node.map("service").items()) == {1: {"hits": 10, "addr": 9, "kind": 2}}


def test_a_rollback_of_a_split_by_functions_brings_all_entries_back(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {1: (10, 1), 2: (20, 2)})
    hitless.apply(node, bundles("2.0", BY_KIND, KINDS, FUNCTIONS))
    node.map("remote")[5] = {"hits": 50, "addr": 1, "kind": 2}
    hitless.rollback(node)
    assert hits(node, "service") == {1: 10, 2: 20, 5: 50}
    hitless.rollback(node)
    assert (hits(node, "local"), hits(node, "remote")) == ({1: 10}, {2: 20, 5: 50})


@pytest.mark.parametrize(("rule", "wanted"), [("", None), ('on_collision = "first"\n', 10)])
def test_what_two_heirs_have_alike_goes_back_only_by_a_rule(
    node: hitless.Node, bundles: Folds, rule: str, wanted: int | None
) -> None:
    filled(node, bundles, {1: (10, 1)})
    rules = f'[map.local]\nwas = "service"\n{rule}[map.remote]\nwas = "service"\n{rule}'
    hitless.apply(node, bundles("2.0", BY_KIND, rules))
    node.map("remote")[1] = {"hits": 99, "addr": 9, "kind": 1}
    if wanted is None:
        with pytest.raises(hitless.LossNotAllowedError, match="local 01000000 and remote 01000000"):
            hitless.rollback(node, allow_loss=["service"])
        assert (hits(node, "local"), hits(node, "remote")) == ({1: 10}, {1: 99})
    else:
        hitless.rollback(node, allow_loss=["service"])
        assert hits(node, "service") == {1: wanted}


def test_a_write_during_the_split_reaches_the_map_it_is_for_and_no_other(node: hitless.Node, bundles: Folds) -> None:
    held = filled(node, bundles, {1: (10, 1), 2: (20, 2)})

    def control_plane(node: hitless.Node) -> None:
        counts = node.map("counts")
        counts[1] = {"hits": 500}
        counts[9] = {"hits": 900}
        del counts[2]
        held.update(number(1), value(16))

    hitless.apply(node, bundles("2.0", BY_FIELDS, FIELDS), prepare=control_plane)
    assert hits(node, "counts") == {1: 506, 9: 900}
    assert sorted(key for key, _ in node.map("places").items()) == [1, 2]


def test_a_map_that_keeps_its_name_may_give_a_part_away(node: hitless.Node, bundles: Folds) -> None:
    filled(node, bundles, {1: (10, 1)})
    new = OLD + BY_FIELDS.replace("MAP(places, HASH, 64, __u32, struct place);\n", "")
    rules = '[map.service]\nwas = "service"\n[map.counts]\nwas = "service"\n'
    hitless.apply(node, bundles("2.0", new, rules))
    assert hits(node, "service") == hits(node, "counts") == {1: 10}
    result = hitless.apply(node, bundles("2.1", new, '[map.counts]\nwas = "counts"\n'))
    assert [entry.action for entry in result.maps] == ["keep", "keep"]


def test_a_map_that_gave_a_part_away_takes_it_in_again_and_gives_it_once_more(
    node: hitless.Node, bundles: Folds
) -> None:
    filled(node, bundles, {1: (10, 1), 2: (20, 2)})
    new = BY_KIND.replace("MAP(local,", "MAP(service,")
    rules = KINDS.replace("[map.local]", "[map.service]")
    hitless.apply(node, bundles("2.0", new, rules, FUNCTIONS))
    for _ in range(2):
        assert (hits(node, "service"), hits(node, "remote")) == ({1: 10}, {2: 20})
        hitless.rollback(node)
        assert hits(node, "service") == {1: 10, 2: 20}
        hitless.rollback(node)


@pytest.mark.parametrize("step", ["copy", "verify", "cutover", "merge", "commit"])
def test_a_killed_split_is_finished_or_undone_and_no_entry_is_lost(
    node: hitless.Node, bundles: Folds, lab: Lab, tmp_path: Path, step: str
) -> None:
    held = filled(node, bundles, {1: (10, 1), 2: (20, 2), 3: (30, 1)})
    bundles("2.0", BY_KIND, KINDS, FUNCTIONS)
    kill_upgrade(step, node, tmp_path / "2.0", {"cgroup": str(lab.cgroup)})
    held.update(number(1), value(11))
    held.update(number(3), value(33, 2))
    held.update(number(4), value(44, 2))
    held.delete(number(2))
    hitless.recover(node)
    if node.observe().version == "1.0":
        hitless.apply(node, hitless.Bundle.load(tmp_path / "2.0", {"cgroup": str(lab.cgroup)}))
    assert (hits(node, "local"), hits(node, "remote")) == ({1: 11}, {3: 33, 4: 44})


BY_PORT = """
def seven(keys, old, new):
    return new, keys == 7

def nine(keys, old, new):
    return new, keys == 9
"""
SEVEN = "".join(f'[map.{name}]\nwas = "both"\nconvert = "converters:{name}"\n' for name in ("seven", "nine"))


def test_no_increment_is_lost_while_maps_are_folded_and_split_again(
    node: hitless.Node, bundles: Folds, lab: Lab
) -> None:
    by_port = "key = __builtin_bswap16(ctx->user_port);"
    two, one = (text.replace("key = 1;", by_port) for text in (COUNTING_TWO, COUNTING_ONE))
    first = bundles("1.0", two.replace("__u32 count", "__u64 count"), SEVEN, BY_PORT)
    second = bundles("2.0", one, '[map.both]\nwas = ["seven", "nine"]\n')
    hitless.apply(node, second)
    with clients(lab) as tries:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            hitless.apply(node, first)
            hitless.apply(node, second)
    assert {port: entry["count"] for port, entry in node.map("both").items()} == tries


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("new, old['kind']", "beside the records it returned an array of uint32"),
        ("new, (old['kind'] == 1)[:1].repeat(len(old) + 1)", r"not an array of bool and shape \(1,\)"),
        ("new, True", "beside the records it returned a bool"),
        ("new, old['kind'] == 1, 3", "returned a tuple"),
        ("new, (old['kind'] == 1) & (len(old) > 1)", "may depend on nothing but the entry"),
    ],
)
def test_a_function_that_does_not_say_whose_entries_are_is_refused(
    node: hitless.Node, bundles: Folds, returned: str, words: str
) -> None:
    entries = {1: (10, 1)} if "shape" in words else {1: (10, 1), 2: (20, 2), 3: (30, 1)}
    filled(node, bundles, entries)
    before = everything(node)
    code = FUNCTIONS.replace('new, old["kind"] == 1', returned)
    with pytest.raises(hitless.ConverterError, match=words):
        hitless.apply(node, bundles("2.0", BY_KIND, KINDS, code))
    assert everything(node) == before


def test_a_function_of_a_map_that_is_not_split_cannot_leave_entries_out(node: hitless.Node, build: Make) -> None:
    tally = "struct tally { __u64 count; };\nMAP(tally, HASH, 64, __u32, struct tally);\n"
    hitless.apply(node, build("1.0", tally.replace("__u64", "__u32")))
    node.map("tally")[1] = {"count": 1}
    code = "def tally(keys, old, new):\n    return new, keys > 0\n"
    with pytest.raises(hitless.ConverterError, match="returned a tuple"):
        hitless.apply(node, build("2.0", tally, '[map.tally]\nconvert = "converters:tally"\n', code))


@pytest.mark.parametrize(
    ("kind", "rules", "words"),
    [
        ("QUEUE", '[map.one]\nwas = "old"\n[map.two]\nwas = "old"\n', "splitting a map of type queue"),
        (
            "ARRAY",
            '[map.one]\nwas = "old"\nconvert = "converters:local"\n[map.two]\nwas = "old"\n',
            "selecting entries for a map of type array",
        ),
    ],
)
def test_a_type_that_cannot_be_split_is_refused_by_name(
    node: hitless.Node, bundles: Folds, kind: str, rules: str, words: str
) -> None:
    text = (
        "struct {{ __uint(type, BPF_MAP_TYPE_{0}); __uint(max_entries, 8); {1} __type(value, __u32); }} {2} "
        'SEC(".maps");\n'
    )
    key = "" if kind == "QUEUE" else "__type(key, __u32);"
    hitless.apply(node, bundles("1.0", text.format(kind, key, "old")))
    new = text.format(kind, key, "one") + text.format(kind, key, "two")
    with pytest.raises(hitless.LossNotAllowedError, match=words):
        hitless.apply(node, bundles("2.0", new, rules, FUNCTIONS))


def test_a_trie_is_split_by_functions_while_the_old_release_writes(node: hitless.Node, bundles: Folds) -> None:
    text = (
        "struct prefix { __u32 bits; __u8 addr[4]; };\nstruct { __uint(type, BPF_MAP_TYPE_LPM_TRIE);"
        " __uint(max_entries, 64); __uint(map_flags, BPF_F_NO_PREALLOC); __type(key, struct prefix);"
        ' __type(value, __u32); } all SEC(".maps");\n'
    )
    (types, declared) = text.split("\n")[:2]
    hitless.apply(node, bundles("1.0", text))
    held = Map.open(node.root / "maps" / "all")
    for at in range(8):
        held.update(number(8 + at) + bytes([at, 1, 1, 1]), number(at))

    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            held.update(number(8) + bytes([0, 1, 1, 1]), number(101))
            held.update(number(9) + bytes([1, 1, 1, 1]), number(102))
            held.delete(number(10) + bytes([2, 1, 1, 1]))

    new = "\n".join((types, declared.replace(" all ", " even "), declared.replace(" all ", " odd "), ""))
    rules = "".join(f'[map.{name}]\nwas = "all"\nconvert = "converters:{name}"\n' for name in ("even", "odd"))
    code = "".join(
        f"def {name}(keys, old, new):\n    return new, old % 2 == {rest}\n" for rest, name in enumerate(("even", "odd"))
    )
    hitless.apply(node, bundles("2.0", new, rules, code), progress=late)
    assert sorted(entry for _, entry in node.map("even").items()) == [4, 6, 102]
    assert sorted(entry for _, entry in node.map("odd").items()) == [3, 5, 7, 101]


def test_counts_of_each_processor_are_parted_by_fields(node: hitless.Node, bundles: Folds) -> None:
    old = OLD.replace("HASH", "PERCPU_HASH")
    hitless.apply(node, bundles("1.0", old))
    node.map("service")[1] = [{"hits": cpu, "addr": 2 * cpu, "kind": 3} for cpu in range(possible_cpus())]
    hitless.apply(node, bundles("2.0", BY_FIELDS.replace("HASH", "PERCPU_HASH"), FIELDS))
    assert node.map("counts").get(1) == [{"hits": cpu} for cpu in range(possible_cpus())]
    assert node.map("places").get(1) == [{"addr": 2 * cpu, "kind": 3} for cpu in range(possible_cpus())]
