"""Layouts as a snapshot and as text."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from hitless.errors import LayoutError, UnsupportedError
from hitless.layout.diff import diff_map
from hitless.layout.model import MapSpec, ObjectSpec
from hitless.layout.show import show_diff, show_map, show_type
from hitless.layout.snapshot import dump, load

Read = Callable[..., ObjectSpec]
MakeMap = Callable[..., MapSpec]

SOURCE = """
enum state { NEW, OLD = 5 };
struct node { struct node *next; __u32 x:3; __u32 y:5; };
struct value { __u8 a; __u32 b TAG("hitless:was=c"); struct node n[2]; enum state s; union { __u32 v4; char t[8]; }; };
"""


def test_a_snapshot_comes_back_as_it_was(a_map: MakeMap) -> None:
    registry = {"z.o": ObjectSpec("z.o", (a_map(SOURCE),), (), "GPL"), "a.o": ObjectSpec("a.o", (), ())}
    assert load(dump(registry)) == registry
    assert dump(registry) == dump(dict(reversed(registry.items())))
    assert json.loads(dump(registry))["schema"] == 1


def test_a_layout_from_a_snapshot_is_identical_to_the_one_it_was_made_from(a_map: MakeMap) -> None:
    spec = a_map(SOURCE)
    loaded = load(dump({"a": ObjectSpec("a", (spec,), ())}))["a"].maps[0]
    assert diff_map(loaded, spec).verdict == "identical"


def test_a_snapshot_of_a_later_schema_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="schema 2"):
        load(b'{"schema": 2, "objects": []}')


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b'{"schema": "1"}', b'{"schema": 1}', b'{"schema": 1, "objects": {"a": 1}}', b"\xff" * 9],
)
def test_a_damaged_snapshot_is_refused(data: bytes) -> None:
    with pytest.raises(LayoutError, match="snapshot: damaged"):
        load(data)


def test_a_snapshot_cut_short_anywhere_is_refused(a_map: MakeMap) -> None:
    data = dump({"a": ObjectSpec("a", (a_map(SOURCE),), ())})
    for size in range(0, len(data), 16):
        with pytest.raises(LayoutError):
            load(data[:size])


@pytest.mark.parametrize(
    ("was", "becomes", "message"),
    [
        (b'"value_size":', b'"value_size":1', "but its type has"),
        (b'"offset":32', b'"offset":3200000', "lies outside"),
        (b'"offset":32', b'"offset":-32', "lies outside"),
        (b'"offset":32', b'"offset":33', "lies outside"),
        (b'"bits":3', b'"bits":64', "lies outside|bits"),
        (b'"count":2', b'"count":-2', "impossible"),
        (b'"name":"__u8","size":1', b'"name":"__u8","size":3', "cannot have 3 bytes"),
    ],
)
def test_a_snapshot_that_contradicts_itself_is_refused(
    a_map: MakeMap, was: bytes, becomes: bytes, message: str
) -> None:
    data = dump({"a": ObjectSpec("a", (a_map(SOURCE),), ())})
    assert was in data
    with pytest.raises(LayoutError, match=message):
        load(data.replace(was, becomes, 1))


def test_a_type_is_shown_with_offsets_sizes_holes_and_tags(a_map: MakeMap) -> None:
    made = a_map(SOURCE).value
    assert made is not None
    assert [" ".join(line.split()) for line in show_type(made).split("\n")] == [
        "struct value {",
        "__u8 a; /* 0 1 */",
        "/* XXX 3 bytes hole */",
        "__u32 b; /* 4 4 hitless:was=c */",
        "struct node {",
        "struct node *next; /* 8 8 */",
        "__u32 x:3; /* 16: 0 4 */",
        "__u32 y:5; /* 16: 3 4 */",
        "/* XXX 7 bytes padding */",
        "} n[2]; /* 8 32 */",
        "enum state s; /* 40 4 */",
        "union {",
        "__u32 v4; /* 44 4 */",
        "char t[8]; /* 44 8 */",
        "}; /* 44 8 */",
        "/* XXX 4 bytes padding */",
        "/* size: 56, members: 5, holes: 1, sum holes: 3, padding: 4 */",
        "};",
    ]


def test_places_are_those_of_pahole_with_bitfields_by_the_unit_that_holds_them(a_map: MakeMap) -> None:
    # What pahole 1.24 prints for the same object: `g` is bit 3 of the unit at 16, `n[0].b` is at 24.
    made = a_map(
        "struct in { int a; char b; };"
        "struct value { char c; __u64 x; int f:3; int g:5; struct in n[2]; union { int u; __u64 w; }; char tail; };"
    ).value
    assert made is not None
    found = {
        line.split("/*")[0].split()[-1].strip(";"): line.split("/*")[1].split("*/")[0].split()
        for line in show_type(made).split("\n")
        if ";" in line and "/*" in line
    }
    assert found == {
        "c": ["0", "1"], "x": ["8", "8"], "f:3": ["16:", "0", "4"], "g:5": ["16:", "3", "4"], "a": ["20", "4"],
        "b": ["24", "1"], "n[2]": ["20", "16"], "u": ["40", "4"], "w": ["40", "8"], "}": ["40", "8"],
        "tail": ["48", "1"],
    }  # fmt: skip
    holes = [line.split()[2:5] for line in show_type(made).split("\n") if "XXX" in line]
    assert holes == [
        ["7", "bytes", "hole"], ["3", "bytes", "hole"], ["3", "bytes", "padding"], ["4", "bytes", "hole"],
        ["7", "bytes", "padding"],
    ]  # fmt: skip


def test_a_map_is_shown_with_its_definition_and_what_is_not_known() -> None:
    text = show_map(MapSpec("m", "hash", 4, 8, 16, 1, pinned_by_name=True, tags=("hitless:was=n",)))
    assert text.split("\n") == [
        "map m: hash, key 4 bytes, value 8 bytes, 16 entries, flags 0x1, pinned by name, tag hitless:was=n",
        "    key: 4 bytes, type not known",
        "    value: 8 bytes, type not known",
    ]


def test_a_difference_is_shown_old_beside_new_with_the_loss_below(a_map: MakeMap) -> None:
    old, new = (a_map(f"struct value {{ {text} }};") for text in ("__u32 a; __u32 b;", "__u64 a; __u64 c;"))
    lines = show_diff(diff_map(old, new)).split("\n")
    assert lines[0] == "m: lossy"
    assert [line.split() for line in lines[1:]] == [
        ["~", "a", "__u32", "->", "__u64", "widened"],
        ["+", "c", "->", "__u64", "added"],
        ["-", "b", "__u32", "->", "removed"],
        ["lost:", "b", "is", "dropped"],
    ]
