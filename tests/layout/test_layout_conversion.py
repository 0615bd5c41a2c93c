"""Converting records: every value arrives where C would look for it, and what does not fit is counted."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hitless.errors import LayoutError
from hitless.layout.codec import decode, encode
from hitless.layout.conversion import Conversion, Leaf, Move, Records, Repeat, leaves
from hitless.layout.diff import MapDiff, diff_map
from hitless.layout.model import Array, Field, Int, MapSpec, Record, Type
from hitless.layout.rules import FieldRule, MapRules

Compare = Callable[..., MapDiff]
MakeMap = Callable[..., MapSpec]

OLD = """
struct backend { __u8 addr[16]; __be16 port; __u32 weight; };
struct times { __u64 opened; __s32 skew; };
struct value {
    __u32 hits; __u16 kind; __s16 delta; char name[12]; struct backend backends[3]; struct times t;
    union { __u32 v4; __u8 raw[16]; } ip; __u32 one; __u32 dropped; __u8 old_name; __u32 low:3, high:5;
};
"""
NEW = """
struct backend { __u8 addr[16]; __u32 zone; __be16 port; __u64 weight; };
struct times { __u32 extra; __s64 skew; __u64 opened; };
struct value {
    __u16 inserted; __u64 hits; __s32 delta; struct times t; __u32 kind; char name[16]; struct backend backends[5];
    union { __u32 v4; __u8 raw[16]; } ip; __u32 one[2]; __u8 new_name TAG("hitless:was=old_name");
    __u32 low:3, high:5;
};
"""
BY_HAND = """
#include <stdio.h>
#include <string.h>
int main(void) {
    struct old o; struct new n;
    while (fread(&o, sizeof o, 1, stdin) == 1) {
        memset(&n, 0, sizeof n);
        n.hits = o.hits; n.kind = o.kind; n.delta = o.delta;
        memcpy(n.name, o.name, sizeof o.name);
        for (int i = 0; i < 3; i++) {
            memcpy(n.backends[i].addr, o.backends[i].addr, 16);
            n.backends[i].port = o.backends[i].port; n.backends[i].weight = o.backends[i].weight;
        }
        n.t.opened = o.t.opened; n.t.skew = o.t.skew;
        memcpy(&n.ip, &o.ip, sizeof o.ip);
        n.one[0] = o.one; n.new_name = o.old_name; n.low = o.low; n.high = o.high;
        fwrite(&n, sizeof n, 1, stdout);
    }
    return 0;
}
"""


def rows(*values: bytes) -> Records:
    return np.frombuffer(b"".join(values), np.uint8).reshape(len(values), -1)


def value_of(diff: MapDiff) -> Conversion:
    assert diff.value is not None
    return diff.value


def carry(old: MapSpec, new: MapSpec, *values: object, rules: MapRules = MapRules()) -> list[Any]:  # noqa: B008 - frozen
    assert old.value is not None and new.value is not None
    conversion = value_of(diff_map(old, new, rules))
    done = conversion.apply(rows(*(encode(old.value, value) for value in values)))
    return [decode(new.value, row.tobytes()) for row in done.records]


def test_a_rich_conversion_does_what_c_assignments_do(a_map: MakeMap, preamble: str, tmp_path: Path) -> None:
    old, new = a_map(OLD), a_map(NEW)
    types = preamble.replace("#define TAG(text) __attribute__((btf_decl_tag(text)))", "#define TAG(text)")
    for side, text in (("old", OLD), ("new", NEW)):
        for name in ("backend", "times"):
            text = text.replace(f"struct {name}", f"struct {side}_{name}")
        types += text.replace("struct value", f"struct {side}")
    program = tmp_path / "by_hand"
    command = ["cc", "-x", "c", "-o", str(program), "-"]
    subprocess.run(command, input=types + BY_HAND, text=True, check=True, timeout=60)
    records = np.random.default_rng(1).integers(0, 256, (200, old.value_size), dtype=np.uint8)
    by_hand = subprocess.run(
        [str(program)], input=records.tobytes(), capture_output=True, check=True, timeout=60
    ).stdout
    wanted = np.frombuffer(by_hand, np.uint8).reshape(-1, new.value_size)
    assert new.value is not None
    got = value_of(diff_map(old, new)).apply(records)
    assert got.misfits == ()
    assert len(wanted) == 200
    for ours, theirs in zip(got.records, wanted, strict=True):
        assert decode(new.value, ours.tobytes()) == decode(new.value, theirs.tobytes())


def test_a_removed_field_is_the_only_thing_missing_after_there_and_back(a_map: MakeMap) -> None:
    old, new = a_map(OLD), a_map(NEW)
    assert old.value is not None
    there, back = value_of(diff_map(old, new)), value_of(diff_map(new, old))
    value = {"hits": 7, "delta": -3, "name": "web", "dropped": 9, "old_name": 4, "high": 17, "t": {"skew": -1}}
    record = rows(encode(old.value, value))
    first = decode(old.value, record[0].tobytes())
    last = decode(old.value, back.apply(there.apply(record).records).records[0].tobytes())
    assert last == {**first, "dropped": 0}


def test_negative_numbers_stay_negative_when_widened(a_map: MakeMap) -> None:
    old, new = a_map("struct value { __s8 a; };"), a_map("struct value { __s64 a; };")
    assert carry(old, new, {"a": -5}) == [{"a": -5}]


def test_values_that_do_not_fit_are_counted_named_and_never_wrapped(compare: Compare) -> None:
    diff = compare("__u32 a; __s64 b;", "__u16 a; __s16 b;")
    old = [(1, 2), (65535, -32768), (65536, 5), (70000, -32769), (3, 1 << 40)]
    records = rows(*(a.to_bytes(8, "little") + b.to_bytes(8, "little", signed=True) for a, b in old))
    done = value_of(diff).apply(records)
    assert [(m.path, m.count, m.first) for m in done.misfits] == [("a", 2, (2, 3)), ("b", 2, (3, 4))]
    numbers = [(int(row[:2].view("<u2")[0]), int(row[2:].view("<i2")[0])) for row in done.records]
    assert numbers == [(1, 2), (65535, -32768), (65535, 5), (65535, -32768), (3, 32767)]


def test_a_misfit_names_ten_rows_and_counts_all(compare: Compare) -> None:
    records = np.full((500, 4), 255, np.uint8)
    (misfit,) = value_of(compare("__u32 a;", "__u8 a;")).apply(records).misfits
    assert (misfit.count, misfit.first) == (500, tuple(range(10)))


def test_elements_that_are_cut_off_are_misfits_only_where_they_held_something(compare: Compare) -> None:
    conversion = value_of(compare("__u32 a[3];", "__u32 a[2];"))
    done = conversion.apply(rows(bytes(12), bytes(8) + b"\1\0\0\0"))
    assert [(m.path, m.count, m.first) for m in done.misfits] == [("a", 1, (1,))]
    assert not conversion.exact


def test_zero_is_the_default_and_a_tag_or_rule_says_otherwise(a_map: MakeMap) -> None:
    old = a_map("struct value { __u32 a; };")
    new = a_map(
        'struct value { __u32 a; __u32 b; __u32 c TAG("hitless:default=0x10"); char d[4] TAG("hitless:default=hi"); };'
    )
    rules = MapRules(fields={"b": FieldRule(default=5)})
    assert carry(old, new, {"a": 1}, rules=rules) == [{"a": 1, "b": 5, "c": 16, "d": "hi"}]


def test_defaults_reach_added_fields_of_every_element_and_all_of_the_new_ones(a_map: MakeMap) -> None:
    old = a_map("struct e { __u32 x; }; struct value { struct e a[1]; };")
    new = a_map('struct e { __u32 x; __u8 w TAG("hitless:default=1"); }; struct value { struct e a[2]; };')
    assert carry(old, new, {"a": [{"x": 7}]}) == [{"a": [{"x": 7, "w": 1}, {"x": 0, "w": 1}]}]


def test_a_default_may_be_an_enums_name(a_map: MakeMap) -> None:
    old = a_map("struct value { __u32 a; };")
    new = a_map('struct value { __u32 a; enum { DENY = 3, ALLOW } b TAG("hitless:default=ALLOW"); };')
    assert carry(old, new, {"a": 1}) == [{"a": 1, "b": 4}]


def test_a_rule_fetches_a_field_from_another_place_and_the_rest_is_zero(a_map: MakeMap) -> None:
    old = a_map("struct value { __u32 endpoint_count; __u32 x; };")
    new = a_map("struct value { __u32 x; __u64 prio_count[3]; };")
    rules = MapRules(fields={"prio_count[0]": FieldRule("endpoint_count")})
    assert carry(old, new, {"endpoint_count": 4, "x": 2}, rules=rules) == [{"x": 2, "prio_count": [4, 0, 0]}]


def test_a_number_becomes_an_element_or_a_member_and_comes_back(a_map: MakeMap) -> None:
    plain = a_map("struct value { __u32 a; __u32 b; };")
    wrapped = a_map("struct value { __u64 a[2]; struct { __u32 v; } b; };")
    assert carry(plain, wrapped, {"a": 1, "b": 2}) == [{"a": [1, 0], "b": {"v": 2}}]
    assert carry(wrapped, plain, {"a": [1, 9], "b": {"v": 2}}) == [{"a": 1, "b": 2}]


def test_a_background_keeps_its_bytes_where_nothing_is_written(compare: Compare) -> None:
    conversion = value_of(compare("__u8 a; __u8 b;", "__u8 b; __u8 x; __u8 a;"))
    onto = rows(b"\x09\x09\x09")
    assert conversion.apply(rows(b"\1\2"), onto).records.tobytes() == b"\2\x09\1"
    assert onto.tobytes() == b"\x09\x09\x09"


def test_no_records_convert_to_no_records(compare: Compare) -> None:
    assert value_of(compare("__u8 a;", "__u64 a;")).apply(np.empty((0, 1), np.uint8)).records.shape == (0, 8)


def test_records_that_are_a_slice_of_something_larger_are_taken_as_they_are(compare: Compare) -> None:
    whole = np.arange(32, dtype=np.uint8).reshape(4, 8)
    done = value_of(compare("__u32 a;", "__u64 a;")).apply(whole[::2, 2:6])
    assert done.records[1].tobytes() == bytes([18, 19, 20, 21, 0, 0, 0, 0])


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (4,)])
def test_records_of_another_size_are_refused(compare: Compare, shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="want uint8 of shape"):
        value_of(compare("__u32 a;", "__u64 a;")).apply(np.zeros(shape, np.uint8))


def test_neighbours_that_stay_together_are_copied_as_one_block(compare: Compare) -> None:
    conversion = value_of(
        compare("__u32 a, b, c; char n[4]; __u32 d[8];", "__u64 x; __u32 a, b, c; char n[4]; __u32 d[8];")
    )
    assert conversion.moves == (Move("a..d[]", 0, 48, 8, 48),)


def test_repeated_moves_say_how_often_and_how_far(compare: Compare) -> None:
    old = "struct e { __u16 a; __u16 b; }; struct value { struct e s[3]; };"
    new = "struct e { __u16 a; __u16 x; __u32 b; }; struct value { struct e s[3]; };"
    assert value_of(compare(old, new)).moves == (
        Move("s[].a", 0, 2, 0, 2, repeat=(Repeat(3, 4, 8),)),
        Move("s[].b", 2, 2, 4, 4, repeat=(Repeat(3, 4, 8),)),
    )


def test_leaves_are_every_number_and_byte_string_without_padding(a_map: MakeMap) -> None:
    made = a_map(
        "struct e { __s16 x; __u32 y; }; struct value { __u8 a; struct e s[2]; char n[4]; union { __u32 u; } v; };"
    ).value
    assert made is not None
    assert leaves(made) == (
        Leaf("a", 0, 1),
        Leaf("s[0].x", 4, 2, True),
        Leaf("s[0].y", 8, 4),
        Leaf("s[1].x", 12, 2, True),
        Leaf("s[1].y", 16, 4),
        Leaf("n", 20, 4, kind="bytes"),
        Leaf("v", 24, 4, kind="bytes"),
    )


def test_a_policy_holds_for_what_is_inside_and_the_nearest_one_wins(a_map: MakeMap) -> None:
    made = a_map(
        'struct c { __u64 hits; __u64 last TAG("hitless:merge=max"); };'
        'struct value { __u32 a; struct c c TAG("hitless:merge=sum"); __u32 d[2] TAG("hitless:merge=or"); };'
    ).value
    assert made is not None
    rules = MapRules(fields={"a": FieldRule(merge="min"), "d[1]": FieldRule(merge="sum")})
    found = {leaf.path: leaf.merge for leaf in leaves(made, rules)}
    assert found == {"a": "min", "c.hits": "sum", "c.last": "max", "d[0]": "or", "d[1]": "sum"}


def test_a_value_that_is_one_number_takes_the_policy_of_its_map(read: Callable[..., Any]) -> None:
    spec = read(
        "struct { __uint(type, 1); __uint(max_entries, 4); __type(key, __u32); __type(value, __u64); }"
        ' hits SEC(".maps") TAG("hitless:merge=sum");'
    ).maps[0]
    assert leaves(spec.value, MapRules(), spec.tags) == (Leaf("value", 0, 8, merge="sum"),)
    assert leaves(spec.value, MapRules(fields={"value": FieldRule(merge="max")}))[0].merge == "max"


@pytest.mark.parametrize("field", ["char a[8]", "__be32 a", "union { __u32 b; } a", "void *a"])
def test_a_sum_of_what_is_no_number_is_refused(a_map: MakeMap, field: str) -> None:
    made = a_map(f'struct value {{ {field} TAG("hitless:merge=sum"); }};').value
    assert made is not None
    with pytest.raises(LayoutError, match="merge=sum needs an integer"):
        leaves(made)


@pytest.mark.parametrize("field", ["_Bool a", "enum { A } a", "char a"])
def test_a_sum_of_a_number_that_stands_for_something_else_is_refused(a_map: MakeMap, field: str) -> None:
    made = a_map(f'struct value {{ {field} TAG("hitless:merge=sum"); }};').value
    assert made is not None
    with pytest.raises(LayoutError, match=r"merge=sum of .* has no meaning"):
        leaves(made)


NUMBERS = [
    Int(f"{'s' if signed else 'u'}{8 * size}", size, signed) for size in (1, 2, 4, 8) for signed in (False, True)
]


def laid_out(parts: list[tuple[str, Type]]) -> Record:
    """A struct as C would lay it out, alignment being that of the widest number inside."""

    def alignment(made: Type) -> int:
        if isinstance(made, Array):
            return alignment(made.element)
        if isinstance(made, Record):
            return max((alignment(field.type) for field in made.fields), default=1)
        return made.size

    at, widest, fields = 0, 1, []
    for name, made in parts:
        step = alignment(made)
        at = -(-at // step) * step
        fields.append(Field(name, made, 8 * at))
        at, widest = at + made.size, max(widest, step)
    return Record("value", -(-at // widest) * widest, tuple(fields))


numbers: st.SearchStrategy[Type] = st.sampled_from(NUMBERS)
types: st.SearchStrategy[Type] = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.builds(Array, inner, st.integers(1, 3)),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda parts: laid_out([(f"m{i}", p) for i, p in enumerate(parts)])
        ),
    ),
    max_leaves=5,
)
fields = st.dictionaries(st.sampled_from("abcdef"), types, min_size=1, max_size=5)


@st.composite
def evolved(draw: st.DrawFn, made: Type) -> Type:
    """A type into which every value of ``made`` fits."""
    match made:
        case Int(size=size, signed=signed):
            fitting = [n for n in NUMBERS if n.signed == signed and n.size >= size]
            return draw(st.sampled_from(fitting))
        case Array(element=element, count=count):
            return Array(draw(evolved(element)), count + draw(st.integers(0, 2)))
        case Record(fields=inner):
            parts = [(field.name, draw(evolved(field.type))) for field in inner]
            if draw(st.booleans()):
                parts.append(("extra", draw(numbers)))
            return laid_out(draw(st.permutations(parts)))
    raise AssertionError(made)


def known(new: Any, old: Any) -> Any:
    """The part of a new value that the old one had as well; byte strings as lists, which widening makes of them."""
    if isinstance(old, dict):
        return {name: known(new[name], part) for name, part in old.items()}
    if isinstance(old, list | bytes):
        return [known(new[i], part) for i, part in enumerate(old)]
    return new


@settings(deadline=None, max_examples=150)
@given(st.data(), fields)
def test_any_value_survives_any_lossless_change_and_the_way_back(data: st.DataObject, parts: dict[str, Type]) -> None:
    old = laid_out(list(parts.items()))
    new = data.draw(evolved(old))
    record = data.draw(st.binary(min_size=old.size, max_size=old.size))
    diff = diff_map(
        MapSpec("m", "hash", 4, old.size, 1, 0, NUMBERS[4], old),
        MapSpec("m", "hash", 4, new.size, 1, 0, NUMBERS[4], new),
    )
    assert diff.verdict in ("identical", "lossless")
    if diff.value is None:
        assert old.size == new.size
        return
    assert diff.value.exact
    there = diff.value.apply(rows(record))
    before = decode(old, record)
    back = decode(old, diff.value.inverse().apply(there.records).records[0].tobytes())
    assert (there.misfits, back) == ((), before)
    assert known(decode(new, there.records[0].tobytes()), before) == known(before, before)


@settings(deadline=None, max_examples=100)
@given(st.data(), fields)
def test_any_value_is_the_same_after_encoding_and_decoding(data: st.DataObject, parts: dict[str, Type]) -> None:
    made = laid_out(list(parts.items()))
    value = decode(made, data.draw(st.binary(min_size=made.size, max_size=made.size)))
    assert decode(made, encode(made, value)) == value


@settings(deadline=None, max_examples=150)
@given(st.data(), fields, fields)
def test_any_two_layouts_get_a_verdict_and_a_conversion_that_stays_inside_its_records(
    data: st.DataObject, before: dict[str, Type], after: dict[str, Type]
) -> None:
    old, new = laid_out(list(before.items())), laid_out(list(after.items()))
    diff = diff_map(
        MapSpec("m", "hash", 4, old.size, 1, 0, NUMBERS[4], old),
        MapSpec("m", "hash", 4, new.size, 1, 0, NUMBERS[4], new),
    )
    assert diff.verdict in ("identical", "lossless", "lossy", "needs-converter")
    assert (diff.verdict == "lossy") <= any(change.loss for change in diff.changes)
    assert (diff.verdict == "needs-converter") == any(change.reason for change in diff.changes)
    if diff.value is None:
        return
    ends = [m.new_offset + m.new_size + sum((r.count - 1) * r.new_stride for r in m.repeat) for m in diff.value.moves]
    assert all(end <= new.size for end in ends)
    count = data.draw(st.integers(1, 3))
    records = rows(*(data.draw(st.binary(min_size=old.size, max_size=old.size)) for _ in range(count)))
    done = diff.value.apply(records)
    assert done.records.shape == (count, new.size)
    assert not done.misfits or diff.verdict == "lossy"
