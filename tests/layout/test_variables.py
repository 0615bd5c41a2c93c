"""Which variable of an old section becomes which of a new one, and what is lost: decided from the objects alone."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from hitless.carry import section_way
from hitless.errors import LayoutError
from hitless.layout.diff import diff_maps, resolve
from hitless.layout.elf import read_object
from hitless.layout.model import MapSpec
from hitless.layout.rules import FieldRule, MapRules
from hitless.layout.variables import SectionDiff, diff_sections

Maps = dict[str, MapSpec]
Read = Callable[..., Maps]

SPARE = 'struct { __uint(type, 27); __uint(max_entries, 4096); } r SEC(".maps");\n'


@pytest.fixture
def read(compile_bpf: Callable[..., bytes]) -> Read:
    """The sections of an object with these variables, called ``<name>.bss`` and so on."""

    def sections(text: str, name: str = "") -> Maps:
        spec = read_object(compile_bpf(SPARE + text), name or "o")
        return {
            name + one.name: msgspec.structs.replace(one, name=name + one.name)
            for one in spec.maps if one.name.startswith(".")
        }  # fmt: skip

    return sections


def compared(old: Maps, new: Maps, rules: dict[str, MapRules] | None = None) -> dict[str, SectionDiff]:
    return {item.diff.name: item for item in diff_sections(old.values(), new.values(), rules or {})}


def pairs(found: SectionDiff) -> list[tuple[str, str, str]]:
    return sorted((pair.source, pair.old.name, pair.new.name) for pair in found.pairs)


def test_sections_that_are_the_same_are_identical(read: Read) -> None:
    text = '__u64 a; __u32 b = 1; __u32 c SEC(".data.far") = 1; const volatile __u32 d = 1;'
    old, new = read(text), read(text)
    assert {name: item.diff.verdict for name, item in compared(old, new).items()} == {
        ".bss": "identical", ".data": "identical", ".data.far": "identical",
    }  # fmt: skip
    assert {diff.verdict for diff in diff_maps([*old.values()], [*new.values()])} == {"identical"}


def test_a_variable_is_found_in_whichever_section_of_its_object_it_is(read: Read) -> None:
    old, new = read("__u64 a, b; __u64 c = 1;"), read('__u64 a; __u64 b = 1; __u64 c SEC(".data.far") = 1;')
    found = compared(old, new)
    assert {name: (item.diff.verdict, pairs(item)) for name, item in found.items()} == {
        ".bss": ("lossless", [(".bss", "a", "a")]),
        ".data": ("lossless", [(".bss", "b", "b")]),
        ".data.far": ("lossless", [(".data", "c", "c")]),
    }
    (moved,) = [change for change in found[".data.far"].diff.changes if change.path == "c"]
    assert (moved.kind, moved.old, moved.new) == ("moved", ".data", ".data.far")


def test_each_variable_is_told_by_itself(read: Read) -> None:
    old = read("__u64 same; __u32 wider; __u64 gone; __u32 swapped; __u64 text;")
    new = read("__u64 first; __u64 wider; __u64 same; __be32 swapped; char text[8];")
    found = compared(old, new)[".bss"]
    kinds = {(change.path, change.kind) for change in found.diff.changes}
    assert {("first", "added"), ("wider", "widened"), ("gone", "removed"), ("text", "retyped")} <= kinds
    assert found.diff.verdict == "lossy"
    assert sorted(loss.split(":")[0] for loss in found.losses) == [
        "gone is dropped", "swapped starts anew", "text starts anew",
    ]  # fmt: skip
    assert [name for _, name, _ in pairs(found)] == ["same", "wider"]


def test_only_bytes_of_carried_variables_are_moved(read: Read) -> None:
    old, new = read("__u64 a, b;"), read("__u64 a, c; __u64 b = 1;")
    found = compared(old, new)
    (part,) = section_way(found[".bss"], old, new, {}).parts
    assert part.diff.value is not None
    made = part.diff.value.apply(np.full((1, 16), 1, np.uint8), np.full((1, 16), 9, np.uint8)).records[0]
    assert isinstance(part.new.value, type(new[".bss"].value))
    assert made.tolist() == [1] * 8 + [9] * 8


def test_a_new_name_is_followed_by_tag_and_by_rule_in_both_directions(read: Read) -> None:
    old = read("__u64 tries;")
    tagged = read('__u64 attempts __attribute__((btf_decl_tag("hitless:was=tries"))) = 1;')
    assert pairs(compared(old, tagged)[".data"]) == [(".bss", "tries", "attempts")]
    assert pairs(compared(tagged, old)[".bss"]) == [(".data", "attempts", "tries")]
    rule = {".data": MapRules(fields={"attempts": FieldRule("tries")})}
    assert pairs(compared(old, read("__u64 attempts = 1;"), rule)[".data"]) == [(".bss", "tries", "attempts")]


def test_a_vanished_variable_beside_one_of_its_type_is_hinted_at_and_never_taken_for_it(read: Read) -> None:
    found = compared(read("__u64 tries;"), read("__u64 attempts;"))[".bss"]
    assert found.losses == ("tries is dropped",)
    assert found.pairs == ()
    (added,) = [change for change in found.diff.changes if change.kind == "added"]
    assert added.hint == "if this is tries under a new name, say so: hitless:was=tries"


def test_objects_are_never_mixed_but_one_name_may_wander(read: Read) -> None:
    old = {**read("__u64 count, wanders;", "a"), **read("__u64 count, both;", "b")}
    new = {**read("__u64 count, both;", "a"), **read("__u64 count, wanders, both;", "b")}
    found = compared(old, new)
    assert pairs(found["a.bss"]) == [("a.bss", "count", "count")]
    assert pairs(found["b.bss"]) == [
        ("a.bss", "wanders", "wanders"), ("b.bss", "both", "both"), ("b.bss", "count", "count"),
    ]  # fmt: skip
    rule = {"b.bss": MapRules(fields={"both": FieldRule("a.bss.count")})}
    assert ("a.bss", "count", "both") in pairs(compared(old, new, rule)["b.bss"])


def test_statics_of_two_functions_are_two_variables(read: Read) -> None:
    text = "".join(
        f'SEC("xdp") int {name}(void *c) {{ static volatile {kind} n; return n += 1; }}\n'
        for name, kind in (("f", "%s"), ("g", "int"))
    )
    old, new = read(text % "int"), read(text % "long")
    found = compared(old, new)[".bss"]
    assert pairs(found) == [(".bss", "f.n", "f.n"), (".bss", "g.n", "g.n")]
    assert ("f.n", "widened") in {(change.path, change.kind) for change in found.diff.changes}
    value = new[".bss"].value
    assert value is not None and resolve(value, "g.n") is not None
    rule = {".bss": MapRules(fields={"g.n": FieldRule("f.n"), "f.n": FieldRule("g.n")})}
    assert pairs(compared(old, new, rule)[".bss"]) == [(".bss", "f.n", "g.n"), (".bss", "g.n", "f.n")]


def test_what_became_a_constant_is_dropped_and_a_constant_that_became_a_variable_loses_nothing(read: Read) -> None:
    old, new = read("__u64 a, b; const volatile __u64 c = 1;"), read("__u64 b, c; const volatile __u64 a = 1;")
    found = compared(old, new)
    assert found[".bss"].losses == ("a is dropped",)
    assert set(found) == {".bss"}


def test_a_default_of_a_variable_is_refused_since_c_says_what_it_starts_with(read: Read) -> None:
    rule = {".bss": MapRules(fields={"b": FieldRule(default=3)})}
    with pytest.raises(LayoutError, match="variable b: a default is for what entries lack"):
        compared(read("__u64 a;"), read("__u64 a, b;"), rule)


def test_sections_of_two_byte_orders_are_not_carried(read: Read) -> None:
    old = read("__u64 a;")
    new = {name: msgspec.structs.replace(spec, order="big") for name, spec in old.items()}
    found = compared(old, new)[".bss"]
    assert found.pairs == ()
    assert "every variable starts anew" in found.losses[0]
