"""Old beside new: which line stands beside which, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hitless.layout.beside import Row, sides
from hitless.layout.diff import diff_map
from hitless.layout.model import Array, Field, MapSpec, Record, Type
from hitless.layout.rules import FieldRule, MapRules
from hitless.layout.show import diff_lines, show_diff

MakeMap = Callable[..., MapSpec]


@pytest.fixture
def beside(a_map: MakeMap) -> Callable[..., list[tuple[str, str, str, str]]]:
    """Fields of ``struct value``, old and new -> mark, old line, new line and kinds of change of each row."""

    def run(old: str, new: str, rules: MapRules = MapRules(), more: str = "") -> list[tuple[str, str, str, str]]:  # noqa: B008
        before, after = (a_map(f"{more} struct value {{ {text} }};") for text in (old, new))
        (found,), _ = sides(diff_map(before, after, rules), before, after)
        return [_words(row) for row in found.rows]

    return run


def _words(row: Row) -> tuple[str, str, str, str]:
    texts = [f"{cell.text} @{cell.offset // 8}" if cell else "" for cell in (row.old, row.new)]
    return row.mark, texts[0], texts[1], " ".join(change.kind for change in row.changes)


Beside = Callable[..., list[tuple[str, str, str, str]]]


def test_fields_stand_beside_what_they_became_and_holes_are_seen(beside: Beside) -> None:
    assert beside("__u32 a; __u32 gone; __u8 last;", '__u64 a; __u8 name TAG("hitless:was=last"); __u32 b;') == [
        (" ", "struct value { @0", "struct value { @0", ""),
        ("~", "__u32 a; @0", "__u64 a; @0", "widened"),
        ("-", "__u32 gone; @4", "", "removed"),
        ("~", "__u8 last; @8", "__u8 name; @8", "renamed"),
        (" ", "", "/* 3 bytes hole */ @9", ""),
        ("+", "", "__u32 b; @12", "added"),
        (" ", "/* 3 bytes padding */ @9", "", ""),
        (" ", "}; @0", "}; @0", ""),
    ]


def test_arrays_of_structs_are_matched_inside_and_what_did_not_change_is_one_line(a_map: MakeMap) -> None:
    def make(field: str) -> MapSpec:
        kept = "struct kept { __u32 p; __u32 q; };"
        return a_map(f"{kept} struct item {{ {field} }}; struct value {{ struct kept k; struct item i[2]; }};")

    old, new = make("__u32 a;"), make("__u32 a; __u32 b;")
    (found,), rest = sides(diff_map(old, new), old, new)
    assert [_words(row) for row in found.rows] == [
        (" ", "struct value { @0", "struct value { @0", ""),
        (" ", "struct kept k; @0", "struct kept k; @0", ""),
        (" ", "struct item { @8", "struct item { @8", ""),
        (" ", "__u32 a; @8", "__u32 a; @8", ""),
        ("+", "", "__u32 b; @12", "added"),
        ("~", "} i[2]; @8", "} i[2]; @8", "nested"),
        (" ", "}; @0", "}; @0", ""),
    ]
    assert rest == ()


def test_a_number_that_became_a_struct_stands_beside_its_beginning(beside: Beside) -> None:
    rows = beside("__u32 a;", "struct { __u32 in; } a;")
    assert rows[1] == ("~", "__u32 a; @0", "struct { @0", "nested")
    assert rows[3] == ("+", "", "} a; @0", "")


def test_an_anonymous_union_that_moved_is_one_thing(beside: Beside) -> None:
    rows = beside("__u32 a; union { __u32 v4; __u8 v6[16]; };", "__u64 a; union { __u32 v4; __u8 v6[16]; };")
    assert ("~", "}; @4", "}; @8", "moved") in rows


def test_a_field_that_went_into_an_anonymous_union_stands_beside_it(beside: Beside) -> None:
    rows = beside("__u32 a; __u32 v4;", "__u64 a; union { __u32 v4; __u8 v6[16]; };")
    assert [(old, new) for _, old, new, _ in rows if "union" in new] == [("__u32 v4; @4", "union { @8")]


def test_a_field_that_a_rule_brings_from_another_struct_is_not_beside_a_namesake(beside: Beside) -> None:
    rules = MapRules(fields={"hits": FieldRule(was="in.hits")})
    rows = beside("struct { __u32 hits; __u32 more; } in;", "struct { __u32 more; } in; __u32 hits;", rules)
    assert ("~", "", "__u32 hits; @4", "renamed") in [(m.replace("+", "~"), *rest) for m, *rest in rows]


def test_every_change_is_either_in_a_row_or_listed(a_map: MakeMap) -> None:
    old = a_map("struct value { __u32 a; enum { A, B } e; char s[8]; };", entries=8)
    new = a_map("struct value { __s32 a; enum { A, B, C } e; char s[4]; };", entries=9, key="__u64")
    diff = diff_map(old, new)
    found, rest = sides(diff, old, new)
    shown = [change for side in found for row in side.rows for change in row.changes]
    assert sorted(map(repr, (*shown, *rest))) == sorted(map(repr, diff.changes))
    assert [change.kind for change in rest] == ["max-entries"]
    assert [side.side for side in found] == ["key", "value"]


def test_columns_are_aligned_and_a_narrow_terminal_gets_a_list(a_map: MakeMap) -> None:
    old, new = (a_map(f"struct value {{ {text} }};") for text in ("__u32 count; __u8 x;", "__u64 count; __u8 x;"))
    diff = diff_map(old, new)
    bars = {line.index("|") for _, line in diff_lines(diff, old, new) if "  |  " in line}
    assert len(bars) == 1
    assert "  |  " not in show_diff(diff, old, new, width=40)
    assert "widened" in show_diff(diff, old, new, width=40)


def test_a_long_struct_is_folded_where_nothing_changed(a_map: MakeMap) -> None:
    many = " ".join(f"__u32 f{number};" for number in range(200))
    old, new = (a_map(f"struct value {{ {many} {last} }};") for last in ("__u32 a;", "__u64 a;"))
    lines = show_diff(diff_map(old, new), old, new).split("\n")
    assert any(line.strip() == "..." for line in lines)
    assert len(lines) < 15
    assert any("f199" in line for line in lines)


@pytest.mark.parametrize("depth", [1, 40])
def test_depth_is_no_trouble(depth: int, a_map: MakeMap) -> None:
    spec = a_map("struct value { __u32 a; };")
    made: Type | None = spec.value
    assert made is not None
    for _ in range(depth):
        made = Record("r", made.size, (Field("in", Array(made, 1), 0),))
    old = MapSpec("m", "hash", 4, made.size, 8, 0, spec.key, made)
    assert diff_map(old, old).verdict == "identical"
    assert show_diff(diff_map(old, old), old, old) == "m: identical"
