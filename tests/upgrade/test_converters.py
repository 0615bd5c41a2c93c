"""Functions of the user's that convert entries: what they carry, and what becomes of an upgrade when they fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from socket import htons

import pytest

import hitless
from hitless.compare import compare
from hitless.kernel.maps import Map
from meshd.demo.lab import Lab
from tests.upgrade.conftest import Make, everything
from tests.upgrade.test_under_fire import clients, counted

OLD = "struct tally { __u32 count TAG(\"merge=sum\"); __u32 wait_s; __u16 port; };\n"
NEW = "struct tally { __u64 count TAG(\"merge=sum\"); __u64 wait_ms; __be16 port; };\n"
TALLY = "MAP(tally, HASH, 4096, __u32, struct tally);\n"
CONVERT = '[map.tally]\nconvert = "converters:tally"\n'

THERE = """
def tally(keys, old, new):
    new["wait_ms"] = old["wait_s"].astype("u8") * 1000
    new["port"] = old["port"]
    return new
"""
BACK = """
def tally_back(keys, old, new):
    new["wait_s"] = old["wait_ms"] // 1000
    new["port"] = old["port"]
    return new
"""

HELD = "struct held { __u32 a; };\nMAP(held, HASH, 64, %s, struct held);\n"

def filled(node: hitless.Node, build: Make, count: int = 8) -> Map:
    """The old release runs with ``count`` entries; returns its map as its programs have it."""
    hitless.apply(node, build("1.0", OLD + TALLY))
    node.map("tally").update_many((key, {"count": key, "wait_s": 2, "port": 80}) for key in range(count))
    return Map.open(node.root / "maps" / "tally")


def refused(node: hitless.Node, bundle: hitless.Bundle, words: str, **more: object) -> hitless.ConverterError:
    before = everything(node)
    with pytest.raises(hitless.ConverterError, match=words) as caught:
        hitless.apply(node, bundle, **more)  # type: ignore[arg-type]
    assert everything(node) == before
    return caught.value


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def test_a_converter_carries_what_types_cannot_tell(node: hitless.Node, build: Make) -> None:
    filled(node, build, 3000)
    second = build("2.0", NEW + TALLY, CONVERT, THERE)
    (planned,) = hitless.plan(node, second).maps
    assert (planned.action, planned.verdict, planned.loss) == ("convert", "needs-converter", ())
    assert planned.converter == "converters:tally"
    assert planned.method.startswith("converters:tally in batches")
    assert "there is no tally_back" in planned.exactness
    result = hitless.apply(node, second)
    assert result.maps[0].copied == 3000
    assert node.map("tally").get(2999) == {"count": 2999, "wait_ms": 2000, "port": htons(80)}
    assert len(node.map("tally").items()) == 3000


def test_no_increment_is_lost_while_converters_carry_the_counters(node: hitless.Node, build: Make, lab: Lab) -> None:
    turned = BACK.replace("tally_back", "tally") + THERE.replace("tally", "tally_back")
    first = build("1.0", OLD + TALLY, CONVERT, turned)
    second = build("2.0", NEW + TALLY, CONVERT, THERE + BACK)
    hitless.apply(node, first)
    with clients(lab) as tries:
        until = time.monotonic() + 3
        rounds = 0
        while time.monotonic() < until or rounds < 3:
            hitless.apply(node, second)
            hitless.apply(node, first)
            rounds += 1
    assert counted(node) == tries


def test_a_converter_that_raises_in_the_middle_leaves_the_old_release_as_it_was(
    node: hitless.Node, build: Make
) -> None:
    filled(node, build, 4000)
    code = "def tally(keys, old, new):\n    assert 3999 not in keys, 'what is 3999?'\n    return new\n"
    error = refused(node, build("2.0", NEW + TALLY, CONVERT, code), "map tally: converters:tally raised AssertionError")
    assert "what is 3999?" in error.message and "line 2, in tally" in error.message
    assert error.facts["function"] == "converters:tally"


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "returned None"),
        ("[1, 2]", "returned a list"),
        ("new[:-1]", r"shape \(7,\)"),
        ("old", "returned an array of"),
        ("new['count']", "returned an array of uint64"),
        ("new if len(new) > 1 else new + 1", "raised"),
        ("__import__('sys').exit(3)", "raised SystemExit"),
        ("undefined", "raised NameError"),
    ],
)
def test_a_converter_that_returns_no_new_records_is_refused(
    node: hitless.Node, build: Make, returned: str, words: str
) -> None:
    filled(node, build)
    code = f"def tally(keys, old, new):\n    return {returned}\n"
    refused(node, build("2.0", NEW + TALLY, CONVERT, code), words)


def test_a_converter_whose_result_depends_on_the_other_entries_is_refused(node: hitless.Node, build: Make) -> None:
    filled(node, build)
    code = "def tally(keys, old, new):\n    new['wait_ms'] = len(keys)\n    return new\n"
    refused(node, build("2.0", NEW + TALLY, CONVERT, code), "may depend on nothing but the entry")


def test_a_module_that_cannot_be_run_is_refused_even_if_there_is_nothing_to_convert(
    node: hitless.Node, build: Make
) -> None:
    filled(node, build, 0)
    code = "import surely_not_installed\n" + THERE
    refused(node, build("2.0", NEW + TALLY, CONVERT, code), "raised ModuleNotFoundError.*surely_not_installed")


def test_planning_and_checking_run_no_converter(node: hitless.Node, build: Make, tmp_path: Path) -> None:
    filled(node, build)
    marker = tmp_path / "was-run"
    second = build("2.0", NEW + TALLY, CONVERT, f"open({str(marker)!r}, 'w')\n" + THERE)
    hitless.plan(node, second)
    compared = compare(str(tmp_path / "1.0"), str(tmp_path / "2.0"))
    assert (compared.verdict, compared.lost) == ("needs-converter", ())
    assert compared.maps[0].note == "its entries are converted by converters:tally, which was not run"
    assert not marker.exists()
    hitless.apply(node, second)
    assert marker.exists()


def test_a_key_that_only_a_function_can_convert_needs_that_function(node: hitless.Node, build: Make) -> None:
    old, new = (HELD % key for key in ("__u32", "__be32"))
    rules = '[map.held]\nconvert = "converters:held"\n'
    tally = NEW + TALLY
    values = "def held(keys, old, new):\n    return new\n"
    keys = "def held_key(old, new):\n    new[:] = old\n    return new\n"
    hitless.apply(node, build("1.0", old + tally))
    node.map("held").update_many((key, {"a": key}) for key in range(8))
    with pytest.raises(hitless.LossNotAllowedError, match=r"byte order.*converters\.py has no function held_key"):
        hitless.apply(node, build("2.0", new + tally, rules, values))
    hitless.apply(node, build("2.0", new + tally, rules, values + keys + keys.replace("held_key", "held_key_back")))
    found = Map.open(node.root / "maps" / "held").lookup((7).to_bytes(4, "big"))
    assert found == number(7)


def test_a_function_for_keys_that_the_one_back_does_not_undo_is_refused(node: hitless.Node, build: Make) -> None:
    old, new = (HELD % key for key in ("__u32", "__be32"))
    tally = NEW + TALLY
    code = (
        "def held(keys, old, new):\n    return new\n"
        "def held_key(old, new):\n    new[:] = old // 2\n    return new\n"
        "def held_key_back(old, new):\n    new[:] = old * 2\n    return new\n"
    )
    hitless.apply(node, build("1.0", old + tally))
    node.map("held").update_many((key, {"a": key}) for key in range(8))
    second = build("2.0", new + tally, '[map.held]\nconvert = "converters:held"\n', code)
    refused(node, second, "4 keys do not come back")


def test_a_map_whose_layout_did_not_change_is_kept_and_not_converted(node: hitless.Node, build: Make) -> None:
    hitless.apply(node, build("2.0", NEW + TALLY))
    node.map("tally")[1] = {"count": 1, "wait_ms": 5, "port": htons(80)}
    result = hitless.apply(node, build("2.1", NEW + TALLY, CONVERT, THERE))
    assert result.maps[0].action == "keep"
    assert node.map("tally").get(1) == {"count": 1, "wait_ms": 5, "port": htons(80)}


def test_a_write_during_the_upgrade_reaches_the_old_release_through_the_way_back(
    node: hitless.Node, build: Make
) -> None:
    old = filled(node, build)
    seen = []

    def control_plane(node: hitless.Node) -> None:
        node.map("tally")[1] = {"count": 9, "wait_ms": 7000, "port": htons(443)}
        seen.append(old.lookup(number(1)))

    hitless.apply(node, build("2.0", NEW + TALLY, CONVERT, THERE + BACK), prepare=control_plane)
    assert seen == [number(9) + number(7) + number(443)]
    assert node.map("tally").get(1) == {"count": 9, "wait_ms": 7000, "port": htons(443)}


def test_without_a_way_back_a_write_reaches_the_new_release_only(node: hitless.Node, build: Make) -> None:
    old = filled(node, build)
    before = old.lookup(number(1))
    seen = []

    def control_plane(node: hitless.Node) -> None:
        tally = node.map("tally")
        tally[1] = {"count": 100, "wait_ms": 7000, "port": htons(443)}
        tally[99] = {"count": 1, "wait_ms": 1, "port": htons(1)}
        del tally[2]
        seen.extend([old.lookup(number(1)), old.lookup(number(99))])
        old.update(number(1), number(1 + 5) + number(2) + number(80))  # a program of the old release counts five more

    hitless.apply(node, build("2.0", NEW + TALLY, CONVERT, THERE), prepare=control_plane)
    assert seen == [before, None]
    assert node.map("tally").get(1) == {"count": 105, "wait_ms": 7000, "port": htons(443)}
    assert node.map("tally").get(99) == {"count": 1, "wait_ms": 1, "port": htons(1)}
    assert node.map("tally").get(2) is None


@pytest.mark.parametrize("back", ["", BACK])
def test_a_write_between_two_batches_of_the_copy_stands(node: hitless.Node, build: Make, back: str) -> None:
    large = TALLY.replace("4096", "20000")
    hitless.apply(node, build("1.0", OLD + large))
    node.map("tally").update_many((key, {"count": key + 1, "wait_s": 2, "port": 80}) for key in range(20000))
    written: list[int] = []

    def in_the_copy(event: hitless.Progress) -> None:
        if event.map is None or written:
            return
        with Map.open(node.next / "maps" / "tally") as new:
            written.extend(key for key in range(20000) if new.lookup(number(key)) is None)
        value = {"count": 7, "wait_ms": 9000, "port": htons(443)}
        node.map("tally").update_many((key, value) for key in written[:50])

    hitless.apply(node, build("2.0", NEW + large, CONVERT, THERE + back), progress=in_the_copy)
    assert len(written) > 50
    found = [node.map("tally").get(key) for key in written[:50]]
    assert found == [{"count": 7, "wait_ms": 9000, "port": htons(443)}] * 50


def failing_late(node: hitless.Node) -> Callable[[hitless.Progress], None]:
    """New programs have written when the upgrade fails, after the cutover."""

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            with Map.open(node.next / "maps" / "tally") as new:
                value = number(30, 8) + number(9000, 8) + (443).to_bytes(2, "big") + bytes(6)
                new.update(number(3), value)
                new.update(number(77), value)
            raise ZeroDivisionError

    return late


def test_a_number_that_does_not_fit_is_a_loss_only_where_the_converter_leaves_it(
    node: hitless.Node, build: Make
) -> None:
    hitless.apply(node, build("2.0", NEW + TALLY))
    node.map("tally")[1] = {"count": 1 << 40, "wait_ms": 5000, "port": htons(80)}
    before = everything(node)
    code = "def tally(keys, old, new):\n    return new\n"
    with pytest.raises(hitless.LossNotAllowedError, match=r"1 value.* of count do not fit the new layout"):
        hitless.apply(node, build("1.0", OLD + TALLY, CONVERT, code))
    assert everything(node) == before
    code = "def tally(keys, old, new):\n    new['count'] = old['count'] % 1000\n    return new\n"
    hitless.apply(node, build("1.0", OLD + TALLY, CONVERT, code))
    assert node.map("tally").get(1)["count"] == (1 << 40) % 1000


def test_what_new_programs_wrote_comes_back_through_the_function_back(node: hitless.Node, build: Make) -> None:
    filled(node, build)
    second = build("2.0", NEW + TALLY, CONVERT, THERE + BACK)
    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, second, progress=failing_late(node))
    assert node.observe().version == "1.0"
    brought = {"count": 30, "wait_s": 9, "port": 443}
    assert [node.map("tally").get(key) for key in (3, 77)] == [brought, brought]


@pytest.mark.parametrize("back", ["", "def tally_back(keys, old, new):\n    raise ValueError\n"])
def test_without_a_working_way_back_the_old_map_stays_as_the_old_release_left_it(
    node: hitless.Node, build: Make, back: str
) -> None:
    filled(node, build)
    before = everything(node)
    second = build("2.0", NEW + TALLY, CONVERT, THERE + back)
    with pytest.raises(ZeroDivisionError) as caught:
        hitless.apply(node, second, progress=failing_late(node))
    assert everything(node) == before
    (note,) = caught.value.__notes__
    assert note.startswith("what the new release wrote in map tally after the cutover stays behind: ")
    assert ("raised ValueError" if back else "no way back, as the plan said") in note


def test_a_converter_that_fails_after_the_cutover_has_the_upgrade_taken_back(node: hitless.Node, build: Make) -> None:
    old = filled(node, build)
    code = "def tally(keys, old, new):\n    assert 500 not in keys\n    return new\n"

    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            old.update(number(500), bytes(12))

    links = node.observe().links
    with pytest.raises(hitless.ConverterError, match="AssertionError"):
        hitless.apply(node, build("2.0", NEW + TALLY, CONVERT, code), progress=late)
    assert (node.observe().version, node.observe().links) == ("1.0", links)
    assert len(node.map("tally").items()) == 9


def test_a_killed_upgrade_is_finished_with_the_converter_and_without_the_bundle(
    node: hitless.Node, build: Make, tmp_path: Path
) -> None:
    old = filled(node, build)
    second = build("2.0", NEW + TALLY, CONVERT, THERE)

    def killed(event: hitless.Progress) -> None:
        if event.step == "merge":
            old.update(number(600), number(6) + number(3) + number(80))
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            hitless.apply(node, second, progress=killed)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (tmp_path / "2.0" / "converters.py").unlink()
    assert hitless.recover(node) == "finished the interrupted upgrade to 2.0"
    assert node.map("tally").get(600) == {"count": 6, "wait_ms": 3000, "port": htons(80)}
    assert node.map("tally").get(7) == {"count": 7, "wait_ms": 2000, "port": htons(80)}


def test_the_converters_are_part_of_what_a_release_is(build: Make) -> None:
    one, other = (build("2.0", NEW + TALLY, CONVERT, THERE + more) for more in ("", "# changed\n"))
    assert one.digest != other.digest


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ('convert = "tally"', 'convert is "MODULE:FUNCTION"'),
        ('convert = "../x:tally"', 'convert is "MODULE:FUNCTION"'),
        ('convert = "gone:tally"', r"gone\.py cannot be read: No such file"),
        ('convert = "converters:other"', r"converters\.py has no function other; it has: tally"),
        ('on_collision = "sum"', "on_collision is error, first, last or merge, not 'sum'"),
        ('old_value = "tally_v1"', "no object of this bundle has a type 'tally_v1'"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_its_line(build: Make, rule: str, words: str) -> None:
    with pytest.raises(hitless.BundleError, match=rf"toml:\d+: .*{words}"):
        build("2.0", NEW + TALLY, f"[map.tally]\n{rule}\n", THERE)


def test_a_file_of_converters_that_is_no_python_is_refused_with_its_line(build: Make) -> None:
    with pytest.raises(hitless.BundleError, match=r"converters\.py:2 is not Python"):
        build("2.0", NEW + TALLY, CONVERT, "\ndef tally(keys, old, new:\n")


def test_a_file_of_converters_that_others_could_have_written_is_refused(
    node: hitless.Node, build: Make, tmp_path: Path
) -> None:
    build("2.0", NEW + TALLY, CONVERT, THERE)
    file = tmp_path / "2.0" / "converters.py"

    def load() -> hitless.Bundle:
        return hitless.Bundle.load(tmp_path / "2.0", {"cgroup": "/nowhere"})

    file.chmod(0o646)
    with pytest.raises(hitless.BundleError, match="can be written by others"):
        load()
    hitless.Bundle.load(tmp_path / "2.0")  # to look at
    file.chmod(0o644)
    os.chown(file, 1234, 1234)
    with pytest.raises(hitless.BundleError, match="belongs to user 1234"):
        load()
    file.rename(tmp_path / "elsewhere.py")
    file.symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(hitless.BundleError, match="is no regular file"):
        load()


def test_the_old_sides_types_can_be_named_where_another_loader_made_the_map(node: hitless.Node, build: Make) -> None:
    blind = (
        "struct {{ __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 64); __uint(key_size, 4);\n"
        "          __uint(value_size, {size}); }} held SEC(\".maps\");\n"
    )
    typed = "struct held_v1 {{ __u32 a; __u16 b; }}; struct held_v1 *kept;\nstruct held {{ __u64 a; __u16 b; }};\n{map}"
    tally = NEW + TALLY
    hitless.apply(node, build("1.0", blind.format(size=8) + tally))
    held = Map.open(node.root / "maps" / "held")
    held.update(number(5), number(50) + number(7))
    new = typed.format(map="MAP(held, HASH, 64, __u32, struct held);\n") + tally
    with pytest.raises(hitless.LossNotAllowedError, match="type is not known on the old side"):
        hitless.apply(node, build("2.0", new), allow_loss=["store.bss"])
    rules = '[map.held]\nold_value = "held_v1"\nold_key = "int"\n'
    hitless.apply(node, build("2.0", new, rules.replace('"int"', '"__u32"')), allow_loss=["store.bss"])
    assert node.map("held").get(5) == {"a": 50, "b": 7}
    wrong = rules.replace("held_v1", "tally").replace('"int"', '"__u32"')
    hitless.unload(node)
    hitless.apply(node, build("1.0", blind.format(size=8) + tally))
    with pytest.raises(hitless.LayoutError, match="old_value = 'tally' has 24 bytes, but the old value has 8"):
        hitless.apply(node, build("2.0", new, wrong), allow_loss=["store.bss"])
