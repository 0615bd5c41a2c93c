"""Global variables across upgrades: carried by name whichever section they are in, and counters exact under fire."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.compare import compare
from hitless.kernel.bpffs import remove_tree
from hitless.kernel.maps import Map
from hitless.upgrade.record import map_pin, read_record, write_record
from hitless.upgrade.section import SectionCarrier
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade, kill_while_undoing
from tests.patience import often, patient
from tests.releases import ATTACH, compile_object, write_release
from tests.upgrade.test_under_fire import STEPS, clients

# A map of each release's own, since an object without one is none of ours.
SPARE = "MAP(spare, HASH, 8, __u32, __u64);\n"
END = 'char _license[] SEC("license") = "GPL";\n'
PROGRAM = 'SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return 1; }\n'

COUNT = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    static volatile __u64 calls TAG("merge=sum");
    __u32 port = __builtin_bswap16(ctx->user_port);
    __sync_fetch_and_add(&TOTAL, 1);
    __sync_fetch_and_add(&calls, 1);
    __sync_fetch_and_add(&per_port[port == 9].count, 1);
    return 1;
}
"""

# `tries` is in .bss, `level` in .data.
FIRST = SPARE + """
struct seen { __u32 count TAG("merge=sum"); };
static volatile __u32 tries TAG("merge=sum");
struct seen per_port[2];
__u64 level = 7;
""" + COUNT.replace("TOTAL", "tries") + END

# `tries` has another name, is wider and has an initialiser, which brings it into .data; new variables come first.
SECOND = SPARE + """
struct seen { __u64 since; __u64 count TAG("merge=sum"); };
__u64 begun;
__u64 step = 5;
static volatile __u64 attempts TAG("merge=sum") TAG("was=tries") = 100;
struct seen per_port[2];
__u32 level = 9;
""" + COUNT.replace("TOTAL", "attempts") + END

BACK = ("store.bss", "store.data")
THERE = ("store.data",)  # not every level fits

Make = Callable[..., hitless.Bundle]


@pytest.fixture
def make(lab: Lab, tmp_path: Path) -> Make:
    """A release of some version with one object."""

    def release(version: str, source: str, manifest: str = "") -> hitless.Bundle:
        path = write_release(tmp_path / version, version, source, ATTACH + manifest)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    return release


@pytest.fixture
def plain(make: Make) -> Make:
    """A release whose program touches nothing, with these variables."""
    return lambda version, variables, manifest="": make(version, SPARE + variables + PROGRAM + END, manifest)


@pytest.fixture
def node(lab: Lab) -> hitless.Node:
    """A pin root of its own."""
    return hitless.Node(lab.bpffs / "store")


def variables(node: hitless.Node, name: str) -> dict[str, Any]:
    found: dict[str, Any] = node.map(name).get(0)
    return found


def counted(node: hitless.Node) -> tuple[int, int, dict[int, int]]:
    """All connects by both counters, and those by port, whichever release runs."""
    bss = variables(node, "store.bss")
    total = bss["tries"] if "tries" in bss else variables(node, "store.data")["attempts"]
    return total, bss["count4.calls"], {7: bss["per_port"][0]["count"], 9: bss["per_port"][1]["count"]}


def expected(tries: dict[int, int]) -> tuple[int, int, dict[int, int]]:
    return sum(tries.values()), sum(tries.values()), tries


def test_counters_are_exact_while_they_are_moved_widened_and_renamed_back_and_forth(
    node: hitless.Node, make: Make, lab: Lab
) -> None:
    one, two = make("1", FIRST), make("2", SECOND)
    hitless.apply(node, one)
    rounds = 0
    with clients(lab) as tries:
        until = time.monotonic() + patient(60)
        while (rounds <= often(10) or counted(node)[0] <= often(5_000)) and time.monotonic() < until:
            hitless.apply(node, two, allow_loss=THERE)
            hitless.apply(node, one, allow_loss=BACK)
            rounds += 1
        hitless.apply(node, two, allow_loss=THERE)
    assert rounds > often(10)
    assert sum(tries.values()) > 5_000
    assert counted(node) == expected(tries)


def test_without_the_catch_up_increments_are_lost(
    node: hitless.Node, make: Make, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SectionCarrier, "catch_up", lambda carrier, last=False: 0)
    one, two = make("1", FIRST), make("2", SECOND)
    hitless.apply(node, one)
    with clients(lab) as tries:
        for _ in range(often(10)):
            hitless.apply(node, two, allow_loss=THERE)
            hitless.apply(node, one, allow_loss=BACK)
    assert counted(node)[0] < sum(tries.values())


def test_a_variable_keeps_its_value_and_a_new_one_starts_with_that_of_the_object(
    node: hitless.Node, make: Make
) -> None:
    hitless.apply(node, make("1", FIRST))
    node.map("store.bss")[0] = {"tries": 42, "per_port": [{"count": 1}, {"count": 2}], "count4.calls": 3}
    node.map("store.data")[0] = {"level": 8}
    result = hitless.apply(node, make("2", SECOND), allow_loss=THERE)
    assert {entry.name: entry.action for entry in result.maps} == {
        "spare": "keep", "store.bss": "convert", "store.data": "convert",
    }  # fmt: skip
    assert variables(node, "store.data") == {"step": 5, "attempts": 42, "level": 8}
    assert variables(node, "store.bss") == {
        "begun": 0, "per_port": [{"since": 0, "count": 1}, {"since": 0, "count": 2}], "count4.calls": 3,
    }  # fmt: skip
    assert status(node).problems == ()


def test_what_is_new_inside_a_variable_starts_with_the_value_of_the_object_too(node: hitless.Node, plain: Make) -> None:
    text = 'struct took { __u64 longest TAG("merge=max"); %s } took[2] = { %s };'
    old = plain("1", text % ("", "{ 1 }, { 2 }"))
    hitless.apply(node, old)
    node.map("store.data")[0] = {"took": [{"longest": 5}, {"longest": 6}]}
    pinned = Map.open(map_pin(node.current, "store.data"))

    def programs_of_the_old_release(_: hitless.Node) -> None:
        pinned.update(bytes(4), (7).to_bytes(8, "little") + (6).to_bytes(8, "little"))

    more = '__u64 shortest TAG("merge=min");'
    hitless.apply(node, plain("2", text % (more, "{ 1, 99 }, { 2, 98 }")), prepare=programs_of_the_old_release)
    assert variables(node, "store.data") == {
        "took": [{"longest": 7, "shortest": 99}, {"longest": 6, "shortest": 98}],
    }  # fmt: skip


def test_sections_that_did_not_change_are_kept_as_they_are(node: hitless.Node, plain: Make) -> None:
    text = "__u64 zero; __u64 seven = 7; __u64 far SEC(\".data.far\") = 9;"
    hitless.apply(node, plain("1", text))
    before = {name: Map.open(map_pin(node.current, f"store{name}")).info.id for name in (".bss", ".data", ".data.far")}
    node.map("store.data.far")[0] = {"far": 10}
    result = hitless.apply(node, plain("2", text.replace("= 7", "= 8")))
    assert {entry.action for entry in result.maps} == {"keep"}
    for name, map_id in before.items():
        assert Map.open(map_pin(node.current, f"store{name}")).info.id == map_id
    assert variables(node, "store.data") == {"seven": 7}, "what runs wins over another initialiser"
    assert variables(node, "store.data.far") == {"far": 10}


def test_one_section_may_come_from_several_and_feed_several(
    node: hitless.Node, plain: Make, tmp_path: Path
) -> None:
    hitless.apply(node, plain("1", '__u64 a, b; __u64 c = 3; __u64 d SEC(".data.far") = 4; __u64 e SEC(".bss.far");'))
    for name, value in (
        (".bss", {"a": 11, "b": 12}), (".data", {"c": 13}), (".data.far", {"d": 14}), (".bss.far", {"e": 15}),
    ):  # fmt: skip
        node.map(f"store{name}")[0] = value
    text = '__u64 n = 1; __u64 a; __u32 d; __u64 b = 2; __u64 c SEC(".data.far") = 4; __u64 e SEC(".data.x");'
    two = plain("2", text)
    survives = compare(str(tmp_path / "1"), str(tmp_path / "2"), ["store.bss"])
    assert [item.name for item in survives.maps if item.losses] == ["store.bss"]
    assert hitless.plan(node, two, ["store.bss"]).blocked == ()
    hitless.apply(node, two, allow_loss=["store.bss"])  # d may not fit
    assert variables(node, "store.bss") == {"a": 11, "d": 14}
    assert variables(node, "store.data") == {"n": 1, "b": 12}
    assert variables(node, "store.data.far") == {"c": 13}
    assert variables(node, "store.data.x") == {"e": 15}
    assert "store.bss.far" not in {entry.name for entry in status(node).maps}


def test_a_removed_variable_is_a_loss_by_name_for_check_plan_and_apply(
    node: hitless.Node, plain: Make, tmp_path: Path
) -> None:
    hitless.apply(node, plain("1", "__u64 kept, gone;"))
    node.map("store.bss")[0] = {"kept": 1, "gone": 2}
    two = plain("2", "__u32 before; __u64 kept;")
    before = node.observe()
    with pytest.raises(hitless.LossNotAllowedError, match=r"store\.bss loses: gone is dropped"):
        hitless.apply(node, two)
    assert node.observe() == before
    for old in (tmp_path / "1", node.root):
        (lost,) = compare(str(old), str(tmp_path / "2")).lost
        assert (lost.name, lost.losses, lost.whole) == ("store.bss", ("gone is dropped",), False)
    hitless.apply(node, two, allow_loss=["store.bss"])
    assert variables(node, "store.bss") == {"before": 0, "kept": 1}


def test_a_section_that_is_gone_loses_only_what_went_nowhere(node: hitless.Node, plain: Make) -> None:
    hitless.apply(node, plain("1", "__u64 kept, gone;"))
    node.map("store.bss")[0] = {"kept": 1}
    two = plain("2", "__u64 kept = 5;")
    (blocked,) = hitless.plan(node, two).blocked
    assert (blocked.name, blocked.action, blocked.loss) == ("store.bss", "drop", ("gone is dropped",))
    hitless.apply(node, two, allow_loss=["store.bss"])
    assert variables(node, "store.data") == {"kept": 1}


def test_a_variable_whose_meaning_changed_starts_anew_and_the_others_are_carried(
    node: hitless.Node, plain: Make
) -> None:
    hitless.apply(node, plain("1", "__u64 kept; __u64 name;"))
    node.map("store.bss")[0] = {"kept": 1, "name": 2}
    two = plain("2", "__u64 first; __u64 kept; char name[8];")
    with pytest.raises(hitless.LossNotAllowedError, match="name starts anew: no rule makes __u64 into char"):
        hitless.apply(node, two)
    hitless.apply(node, two, allow_loss=["store.bss"])
    assert variables(node, "store.bss") == {"first": 0, "kept": 1, "name": ""}


def test_a_variable_too_large_to_merge_is_lost_alone(node: hitless.Node, plain: Make) -> None:
    hitless.apply(node, plain("1", "__u64 kept; __u32 scratch[2500];"))
    node.map("store.bss")[0] = {"kept": 1}
    two = plain("2", "__u64 first; __u64 kept; __u32 scratch[2500];")
    with pytest.raises(hitless.LossNotAllowedError, match="scratch starts anew: its value takes 2500 steps"):
        hitless.apply(node, two)
    hitless.apply(node, two, allow_loss=["store.bss"])
    assert variables(node, "store.bss")["kept"] == 1


def test_variables_that_together_are_too_large_for_one_merge_are_carried(node: hitless.Node, plain: Make) -> None:
    fields = [f"__u32 v{index}[900];" for index in range(4)]
    hitless.apply(node, plain("1", "".join(fields)))
    node.map("store.bss")[0] = {f"v{index}": [index + 1] * 900 for index in range(4)}
    hitless.apply(node, plain("2", "__u64 first;" + "".join(reversed(fields))))
    found = variables(node, "store.bss")
    assert all(found[f"v{index}"] == [index + 1] * 900 for index in range(4))


def test_a_section_too_large_to_merge_is_a_loss_and_kept_if_it_did_not_change(node: hitless.Node, plain: Make) -> None:
    hitless.apply(node, plain("1", "__u64 kept; __u64 scratch[4096];"))
    node.map("store.bss")[0] = {"kept": 1}
    hitless.apply(node, plain("2", "__u64 kept; __u64 scratch[4096]; __u64 more = 1;"))
    assert variables(node, "store.bss")["kept"] == 1
    with pytest.raises(hitless.LossNotAllowedError, match=r"kept starts anew: .* bytes in a merge"):
        hitless.apply(node, plain("3", "__u64 kept, first; __u64 scratch[4096];"))
    with pytest.raises(hitless.LossNotAllowedError, match=r"kept starts anew: .* bytes in a merge"):
        hitless.apply(node, plain("4", "__u64 kept, first;"))


def test_a_large_section_may_become_a_small_one(node: hitless.Node, plain: Make) -> None:
    hitless.apply(node, plain("1", "__u64 kept; __u64 scratch[3990];"))
    node.map("store.bss")[0] = {"kept": 1}
    hitless.apply(node, plain("2", "__u64 first, kept;"), allow_loss=["store.bss"])
    assert variables(node, "store.bss") == {"first": 0, "kept": 1}


def test_constants_belong_to_the_release(node: hitless.Node, plain: Make, tmp_path: Path) -> None:
    constant = "const volatile __u32 limit = %d; const volatile __u32 more = 1; __u64 state = 1;"
    hitless.apply(node, plain("1", constant % 5))
    hitless.apply(node, plain("2", constant % 6))
    assert variables(node, "store.rodata") == {"limit": 6, "more": 1}
    three = plain("3", "const volatile __u64 limit = 7; __u64 state = 1;")
    assert compare(str(tmp_path / "2"), str(tmp_path / "3")).lost == ()
    hitless.apply(node, three)
    assert variables(node, "store.rodata") == {"limit": 7}


def test_odd_variables_are_carried_too(node: hitless.Node, make: Make) -> None:
    odd = SPARE + """
    struct point { __s16 x, y; char name[4]; };
    struct point points[3]; __int128 wide; static volatile bool on; enum mode { OFF, ON } mode; static struct point *p;
    extern int LINUX_KERNEL_VERSION __kconfig;
    SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
    { static volatile __u32 count; on = !on; count += p != 0; return LINUX_KERNEL_VERSION > 0; }
    SEC("cgroup/connect6") int count6(struct bpf_sock_addr *ctx) { static volatile __u32 count; count++; return 1; }
    """ + END
    odd = odd.replace("bool", "_Bool")
    hitless.apply(node, make("1", odd))
    value = {
        "points": [{"x": n, "y": -n, "name": "abc"} for n in range(3)], "wide": -(1 << 100), "on": True, "mode": "ON",
        "count4.count": 4, "count6.count": 6,
    }  # fmt: skip
    node.map("store.bss")[0] = value
    before = variables(node, "store.bss")
    hitless.apply(node, make("2", odd.replace("struct point points", "__u64 first; struct point points")))
    assert variables(node, "store.bss") == {**before, "first": 0}
    assert before["wide"] == -(1 << 100) and before["count6.count"] == 6


def test_a_section_with_a_lock_is_converted_around_it(node: hitless.Node, plain: Make) -> None:
    lock = '__u64 held SEC(".bss.a"); struct bpf_spin_lock lock SEC(".bss.a") __attribute__((visibility("hidden")));'
    hitless.apply(node, plain("1", lock))
    node.map("store.bss.a")[0] = {"held": 3}
    hitless.apply(node, plain("2", '__u64 first SEC(".bss.a");' + lock))
    found = variables(node, "store.bss.a")
    assert (found["first"], found["held"]) == (0, 3)


def two_objects(directory: Path, version: str, one: str, other: str, manifest: str = "") -> Path:
    """A bundle of two objects, whose files have names that the kernel would not take."""
    directory.mkdir()
    program = PROGRAM.replace("connect4", "connect6").replace("count4", "count6")
    compile_object(SPARE + one + PROGRAM + END, directory / "the-first-of-two-objects.bpf.o")
    compile_object(SPARE + other + program + END, directory / "the-second.v2.bpf.o")
    (directory / "bundle.toml").write_text(
        f'[bundle]\nname = "store"\nversion = "{version}"\n[[object]]\nfile = "the-first-of-two-objects.bpf.o"\n'
        f'[[object]]\nfile = "the-second.v2.bpf.o"\n{ATTACH}{manifest}'
    )
    return directory


A, B = "the-first-of-two-objects", "the-second.v2"


def test_objects_keep_their_own_variables_of_one_name(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    def bundle(version: str, one: str, other: str, manifest: str = "") -> hitless.Bundle:
        path = two_objects(tmp_path / version, version, one, other, manifest)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    hitless.apply(node, bundle("1", "__u64 count; __u64 mine; __u64 wanders;", "__u64 count; __u64 mine;"))
    node.map(f"{A}.bss")[0] = {"count": 1, "mine": 2, "wanders": 3}
    node.map(f"{B}.bss")[0] = {"count": 4, "mine": 5}
    two = bundle("2", "__u32 n; __u64 count; __u64 mine = 9;", "__u32 n; __u64 mine; __u64 count; __u64 wanders;")
    hitless.apply(node, two)
    assert variables(node, f"{A}.bss") == {"n": 0, "count": 1}
    assert variables(node, f"{A}.data") == {"mine": 2}
    assert variables(node, f"{B}.bss") == {"n": 0, "count": 4, "mine": 5, "wanders": 3}
    rule = f'[map."{B}.bss".field.theirs]\nwas = "{A}.bss.count"\n'
    hitless.apply(node, bundle("3", "__u64 mine = 9;", "__u64 mine; __u64 count; __u64 wanders; __u64 theirs;", rule),
                  allow_loss=[f"{A}.bss", f"{B}.bss"])  # fmt: skip
    assert variables(node, f"{B}.bss") == {"mine": 5, "count": 4, "wanders": 3, "theirs": 1}


def test_an_object_that_is_called_otherwise_keeps_its_variables(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    for version, name in (("1", "store"), ("2", "mesh")):
        path = write_release(tmp_path / version, version, SPARE + "__u64 count;" + PROGRAM + END)
        (path / "store.bpf.o").rename(path / f"{name}.bpf.o")
        (path / "bundle.toml").write_text((path / "bundle.toml").read_text().replace("store.bpf.o", f"{name}.bpf.o"))
        result = hitless.apply(node, hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)}))
        if version == "1":
            node.map("store.bss")[0] = {"count": 5}
    (section,) = [entry for entry in result.maps if entry.name == "mesh.bss"]
    assert (section.action, section.was) == ("keep", "store.bss")
    assert variables(node, "mesh.bss") == {"count": 5}


def test_the_fields_of_an_array_become_variables_where_a_rule_says_so(node: hitless.Node, make: Make) -> None:
    array = "struct config { __u32 level; __u32 ip; };\nMAP(config, ARRAY, 1, __u32, struct config);\n"
    hitless.apply(node, make("1", array + PROGRAM + END))
    node.map("config")[0] = {"level": 3, "ip": 4}
    rule = '[map."store.bss"]\nwas = "config"\n'
    hitless.apply(node, make("2", SPARE + "__u32 ip; __u64 level; __u32 more = 1;" + PROGRAM + END, rule))
    assert variables(node, "store.bss") == {"ip": 4, "level": 3}
    assert variables(node, "store.data") == {"more": 1}


def test_a_value_that_does_not_fit_is_counted_and_never_wrapped(node: hitless.Node, plain: Make) -> None:
    hitless.apply(node, plain("1", "__u64 wide = 1;"))
    node.map("store.data")[0] = {"wide": 1 << 40}
    result = hitless.apply(node, plain("2", "__u32 wide = 1;"), allow_loss=["store.data"])
    (section,) = [entry for entry in result.maps if entry.name == "store.data"]
    assert section.lost_fields == {"wide": 1}
    assert variables(node, "store.data") == {"wide": (1 << 32) - 1}


def test_status_and_the_pins_tell_of_every_section(node: hitless.Node, plain: Make) -> None:
    hitless.apply(node, plain("1", "__u64 zero; __u64 seven = 7; const volatile __u32 limit = 1;"))
    shown = {entry.name: (entry.type, entry.entries, entry.layout) for entry in status(node).maps}
    assert {name for name in shown if "." in name} == {"store.bss", "store.data", "store.rodata"}
    assert shown["store.bss"] == ("array", None, "kernel")
    pins = [path.name for path in (node.current / "data").iterdir()]
    assert sorted(pins) == ["store:bss", "store:data", "store:rodata"]
    (node.current / "data" / "store:bss").unlink()
    with pytest.raises(hitless.NodeError, match="store:bss is missing"):
        status(node)


def test_variables_that_an_older_hitless_did_not_pin_are_a_loss(node: hitless.Node, plain: Make) -> None:
    hitless.apply(node, plain("1", "__u64 zero; const volatile __u32 limit = 1;"))
    record = read_record(node.current / "record")
    maps = {name: spec for name, spec in record.maps.items() if "." not in name}
    write_record(node.current / "record", type(record)(**{**_facts(record), "maps": maps}))
    remove_tree(node.current / "data")
    two = plain("2", "__u64 zero; __u64 more;")
    with pytest.raises(hitless.LossNotAllowedError, match=r"store\.bss loses: .* did not keep them"):
        hitless.apply(node, two)
    result = hitless.apply(node, two, allow_loss=["store.bss"])
    assert {entry.name: entry.action for entry in result.maps} == {"spare": "keep", "store.bss": "discard"}
    assert status(node).problems == ()


def _facts(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__}


def test_a_handle_says_why_a_section_cannot_be_written_while_it_is_carried(node: hitless.Node, plain: Make) -> None:
    hitless.apply(node, plain("1", "__u64 zero;"))

    def control_plane(node: hitless.Node) -> None:
        with pytest.raises(hitless.NodeError, match="while an upgrade carries it"):
            node.map("store.bss").get(0)

    hitless.apply(node, plain("2", "__u64 zero; __u64 more;"), prepare=control_plane)


def test_an_error_after_the_cutover_takes_the_new_counts_back_too(node: hitless.Node, make: Make, lab: Lab) -> None:
    hitless.apply(node, make("1", FIRST))
    two = make("2", SECOND)

    def late(event: hitless.Progress) -> None:
        if event.step in ("catch-up", "merge"):
            time.sleep(0.02)  # the new release counts for a while
        if event.step == "commit":
            raise ZeroDivisionError

    with clients(lab) as tries:
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                hitless.apply(node, two, allow_loss=THERE, progress=late)
            assert node.observe().version == "1"
    assert counted(node) == expected(tries)
    assert status(node).problems == ()


def test_a_killed_upgrade_is_undone_or_finished_and_counts_stay_exact(
    node: hitless.Node, make: Make, lab: Lab, tmp_path: Path
) -> None:
    one, two = make("1", FIRST), make("2", SECOND, '[map."store.data"]\non_loss = "discard"\n')
    hitless.apply(node, one)
    with clients(lab) as tries:
        for step in STEPS:
            kill_upgrade(step, node, tmp_path / "2", {"cgroup": str(lab.cgroup)})
            hitless.apply(node, two)
            assert variables(node, "store.data")["step"] == 5
            assert status(node).problems == ()
            hitless.apply(node, one, allow_loss=BACK)
    assert counted(node) == expected(tries)


def test_an_upgrade_killed_while_it_is_taken_back_is_taken_back_and_counts_stay_exact(
    node: hitless.Node, make: Make, lab: Lab, tmp_path: Path
) -> None:
    one = make("1", FIRST)
    make("2", SECOND, '[map."store.data"]\non_loss = "discard"\n')
    hitless.apply(node, one)
    with clients(lab) as tries:
        for phase in ("undoing", "merging-back", "undone"):
            for when in ("before", "after"):
                kill_while_undoing(phase, when, node, tmp_path / "2", {"cgroup": str(lab.cgroup)})
                hitless.recover(node)
                assert status(node).problems == ()
                hitless.apply(node, one, allow_loss=BACK)
    assert counted(node) == expected(tries)
