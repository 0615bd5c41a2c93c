"""Keys of which two become one: what each rule makes of their entries, also while both releases write."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

import numpy as np
import pytest

import hitless
from hitless.kernel.maps import Map
from tests.upgrade.conftest import Make, everything

TALLY = "struct tally { __u64 count; };\nMAP(tally, HASH, 64, __u32, struct tally);\n"
VALUE = (
    "struct held {{ {word} sum TAG(\"merge=sum\"); {word} most TAG(\"merge=max\"); {word} least TAG(\"merge=min\");"
    " {word} bits TAG(\"merge=or\"); {word} name; }};\nMAP(held, HASH, 4096, struct key, struct held);\n"
)
OLD = TALLY + "struct key { __u32 addr; __u32 port; };\n" + VALUE.format(word="__u32")
NEW = TALLY + "struct key { __u32 addr; };\n" + VALUE.format(word="__u64")


def rule(policy: str) -> str:
    return f'[map.held]\non_collision = "{policy}"\non_loss = "discard"\n'


def key(addr: int, port: int) -> bytes:
    return addr.to_bytes(4, "little") + port.to_bytes(4, "little")


def value(*numbers: int) -> bytes:
    return np.array(numbers, "<u4").tobytes()


def filled(node: hitless.Node, build: Make, entries: Mapping[tuple[int, int], tuple[int, ...]]) -> Map:
    """The old release runs with these entries; returns its map as its programs have it."""
    hitless.apply(node, build("1.0", OLD))
    held = Map.open(node.root / "maps" / "held")
    for at, numbers in entries.items():
        held.update(key(*at), value(*numbers))
    return held


def found(node: hitless.Node) -> dict[int, tuple[int, ...]]:
    names = ("sum", "most", "least", "bits", "name")
    return {at["addr"]: tuple(entry[name] for name in names) for at, entry in node.map("held").items()}


TWO = {(1, 80): (10, 5, 5, 1, 7), (1, 443): (20, 9, 3, 4, 8), (2, 80): (1, 1, 1, 1, 1)}


def test_without_a_rule_the_map_cannot_be_carried(node: hitless.Node, build: Make) -> None:
    filled(node, build, TWO)
    with pytest.raises(hitless.LossNotAllowedError, match="in a key two entries could become one"):
        hitless.apply(node, build("2.0", NEW))


def test_error_stops_before_anything_changed_and_names_the_keys(node: hitless.Node, build: Make) -> None:
    filled(node, build, TWO)
    before = everything(node)
    with pytest.raises(hitless.LossNotAllowedError, match="1 old key") as caught:
        hitless.apply(node, build("2.0", NEW, rule("error")))
    assert sorted(caught.value.facts["keys"]) == sorted([key(1, 80).hex(), key(1, 443).hex()])  # type: ignore[call-overload]
    assert everything(node) == before


def test_error_lets_pass_what_does_not_meet(node: hitless.Node, build: Make) -> None:
    held = filled(node, build, {(at, 80): (at, 0, 0, 0, 0) for at in range(3000)})
    second = build("2.0", NEW, rule("error"))
    (planned,) = (entry for entry in hitless.plan(node, second).maps if entry.name == "held")
    assert "refused before the cutover" in planned.exactness
    assert "best-effort on the way back: their old keys cannot be told" in planned.exactness

    def programs_of_the_old_release(_: hitless.Node) -> None:
        held.delete(key(5, 80))
        held.update(key(5, 443), value(55, 0, 0, 0, 0))

    hitless.apply(node, second, prepare=programs_of_the_old_release)
    assert {at: numbers[0] for at, numbers in found(node).items()} == {at: 55 if at == 5 else at for at in range(3000)}


def test_a_meeting_after_the_cutover_has_the_upgrade_taken_back(node: hitless.Node, build: Make) -> None:
    held = filled(node, build, {(1, 80): (1, 1, 1, 1, 1)})

    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            held.update(key(1, 81), value(2, 2, 2, 2, 2))

    with pytest.raises(hitless.LossNotAllowedError, match="was left as it was"):
        hitless.apply(node, build("2.0", NEW, rule("error")), progress=late)
    assert node.observe().version == "1.0"
    assert len(node.map("held").items()) == 2


def test_merge_puts_entries_together_by_their_fields_policies(node: hitless.Node, build: Make) -> None:
    filled(node, build, TWO)
    hitless.apply(node, build("2.0", NEW, rule("merge")))
    entries = found(node)
    assert entries[1][:4] == (30, 9, 3, 5)
    assert entries[1][4] in (7, 8)
    assert entries[2] == (1, 1, 1, 1, 1)


@pytest.mark.parametrize("policy", ["first", "last"])
def test_first_and_last_keep_one_entry_whole(node: hitless.Node, build: Make, policy: str) -> None:
    held = filled(node, build, {(at % 100, at): (at, at, at, at, at) for at in range(1000)})
    order = [int(at.view("<u4")[1]) for at in held.entries()[0]]
    if policy == "last":
        order.reverse()
    kept: dict[int, int] = {}
    for at in order:
        kept.setdefault(at % 100, at)
    hitless.apply(node, build("2.0", NEW, rule(policy)))
    assert found(node) == {addr: (at,) * 5 for addr, at in kept.items()}


def test_merged_sums_stay_exact_while_the_old_release_counts_inserts_and_deletes(
    node: hitless.Node, build: Make
) -> None:
    held = filled(node, build, TWO | {(3, 1): (100, 0, 0, 0, 0), (3, 2): (200, 0, 0, 0, 0), (4, 1): (5, 0, 0, 0, 0)})

    def programs_of_the_old_release(_: hitless.Node) -> None:
        held.update(key(1, 80), value(11, 5, 5, 1, 7))  # counted one more
        held.update(key(1, 443), value(22, 9, 3, 4, 8))  # and two more
        held.update(key(1, 8080), value(4, 0, 3, 0, 0))  # a third entry of the same new key
        held.delete(key(3, 1))
        held.delete(key(4, 1))

    hitless.apply(node, build("2.0", NEW, rule("merge")), prepare=programs_of_the_old_release)
    assert {at: numbers[0] for at, numbers in found(node).items()} == {1: 37, 2: 1, 3: 200}


@pytest.mark.parametrize("policy", ["first", "last"])
def test_changes_of_an_entry_that_was_not_kept_touch_nothing(node: hitless.Node, build: Make, policy: str) -> None:
    held = filled(node, build, TWO)
    keys = [at.tobytes() for at in held.entries()[0] if at[0] == 1]
    winner, loser = keys if policy == "first" else reversed(keys)

    def programs_of_the_old_release(_: hitless.Node) -> None:
        held.update(loser, value(1000, 1000, 0, 1000, 1000))
        held.update(winner, value(40, 40, 2, 40, 40))

    hitless.apply(node, build("2.0", NEW, rule(policy)), prepare=programs_of_the_old_release)
    before = TWO[(1, int.from_bytes(winner[4:], "little"))]
    assert found(node)[1] == (40, 40, 2, before[3] | 40, 40)


@pytest.mark.parametrize("policy", ["first", "last"])
def test_when_the_kept_entry_goes_another_takes_its_place(node: hitless.Node, build: Make, policy: str) -> None:
    held = filled(node, build, TWO)
    keys = [at.tobytes() for at in held.entries()[0] if at[0] == 1]
    winner, loser = keys if policy == "first" else reversed(keys)
    left = TWO[(1, int.from_bytes(loser[4:], "little"))]

    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            with Map.open(node.next / "maps" / "held") as new:  # a new program counts three
                entry = np.frombuffer(new.lookup(key(1, 0)[:4]) or b"", "<u8").copy()
                entry[0] += 3
                new.update(key(1, 0)[:4], entry.tobytes())
            held.delete(winner)

    hitless.apply(node, build("2.0", NEW, rule(policy)), progress=late)
    assert (found(node)[1][0], found(node)[1][4]) == (left[0] + 3, left[4])


def test_a_write_during_the_upgrade_stands_where_old_keys_cannot_be_told(node: hitless.Node, build: Make) -> None:
    held = filled(node, build, TWO)

    def control_plane(node: hitless.Node) -> None:
        new = node.map("held")
        new[{"addr": 1}] = {"sum": 500, "name": 50}
        new[{"addr": 9}] = {"sum": 900}
        del new[{"addr": 2}]
        held.update(key(1, 80), value(10 + 6, 5, 5, 1, 7))
        assert new.get({"addr": 1})["sum"] == 506

    hitless.apply(node, build("2.0", NEW, rule("merge")), prepare=control_plane)
    assert {at: (numbers[0], numbers[4]) for at, numbers in found(node).items()} == {1: (506, 50), 9: (900, 0)}
    assert len(held.entries()[0]) == 3  # the old map has what its own release wrote


def test_a_failure_after_the_cutover_leaves_the_old_map_as_the_old_release_left_it(
    node: hitless.Node, build: Make
) -> None:
    filled(node, build, TWO)
    before = everything(node)

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            with Map.open(node.next / "maps" / "held") as new:
                new.update(key(1, 0)[:4], bytes(40))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, build("2.0", NEW, rule("merge")), progress=late)
    assert everything(node) == before


def killed_at(step: str, before: Callable[[], None]) -> Callable[[hitless.Progress], None]:
    def progress(event: hitless.Progress) -> None:
        if event.step == step:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


@pytest.mark.parametrize("policy", ["merge", "first", "last"])
def test_a_killed_upgrade_is_finished_with_the_same_entries_kept(
    node: hitless.Node, build: Make, policy: str
) -> None:
    held = filled(node, build, TWO)
    keys = [at.tobytes() for at in held.entries()[0] if at[0] == 1]
    winner, loser = reversed(keys) if policy == "last" else keys
    second = build("2.0", NEW, rule(policy))

    def the_old_release_counts_on() -> None:
        held.update(loser, value(2000, 9, 3, 4, 8))
        held.update(winner, value(1000, 9, 3, 4, 8))

    child = os.fork()
    if not child:
        try:
            hitless.apply(node, second, progress=killed_at("merge", the_old_release_counts_on))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert hitless.recover(node) == "finished the interrupted upgrade to 2.0"
    assert found(node)[1][0] == (3000 if policy == "merge" else 1000)


def test_an_entry_that_is_not_what_its_entries_make_together_stops_the_upgrade(
    node: hitless.Node, build: Make
) -> None:
    filled(node, build, TWO)
    before = everything(node)

    def a_stranger(node: hitless.Node) -> None:
        with Map.open(node.next / "maps" / "held") as new:
            entry = np.frombuffer(new.lookup(key(1, 0)[:4]) or b"", "<u8").copy()
            entry[0] += 1
            new.update(key(1, 0)[:4], entry.tobytes())

    with pytest.raises(hitless.VerifyError, match="01000000 is not what its entries make together in sum"):
        hitless.apply(node, build("2.0", NEW, rule("merge")), prepare=a_stranger)
    assert everything(node) == before


def test_a_function_for_keys_may_make_several_one(node: hitless.Node, build: Make) -> None:
    filled(node, build, {(at, 80): (at, 0, 0, 0, 0) for at in range(100)})
    code = (
        "def held(keys, old, new):\n    return new\n"
        "def held_key(old, new):\n    new['addr'] = old['addr'] // 10\n    return new\n"
    )
    rules = '[map.held]\nconvert = "converters:held"\non_collision = "merge"\n'
    hitless.apply(node, build("2.0", NEW, rules, code))
    assert {at: numbers[0] for at, numbers in found(node).items()} == {
        ten: sum(range(10 * ten, 10 * ten + 10)) for ten in range(10)
    }


def test_folding_keys_of_a_per_cpu_map_is_refused_by_name(node: hitless.Node, build: Make) -> None:
    old, new = (maps.replace("MAP(held, HASH", "MAP(held, PERCPU_HASH") for maps in (OLD, NEW))
    hitless.apply(node, build("1.0", old))
    second = build("2.0", new, '[map.held]\non_collision = "merge"\n')
    with pytest.raises(hitless.LossNotAllowedError, match="percpu_hash map of which two may become one"):
        hitless.apply(node, second)
