"""Kmesh's snapshot: written in its shape, and read without believing more than it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from hitless.errors import LayoutError
from hitless.layout.diff import diff_map
from hitless.layout.kmesh import dump, is_kmesh, load
from hitless.layout.model import Field, Int, MapSpec, ObjectSpec, Opaque, Record

MakeMap = Callable[..., MapSpec]


def member(name: str, type_name: str, offset: int, bits: int = 0, nested: Any = None) -> dict[str, Any]:
    made = {"name": name, "typeName": type_name, "offset": offset, "bitfieldsize": bits}
    return made if nested is None else {**made, "nested": nested}


def info(name: str, *members: dict[str, Any]) -> dict[str, Any]:
    # Kmesh writes null for a type that is no struct, and for one whose members it left out.
    return {"name": name, "members": list(members) or None}


def snapshot(value: dict[str, Any], size: int, key: dict[str, Any] | None = None, **more: Any) -> bytes:
    entry = {
        "name": "m", "type": "Hash", "keySize": 4, "valueSize": size, "maxEntries": 64, "flags": 0,
        "keyInfo": key or info("unsigned int"), "valueInfo": value, **more,
    }  # fmt: skip
    return json.dumps({"maps": {"KmeshCgroupSock": {"m": entry}}}).encode()


def read(value: dict[str, Any], size: int, **more: Any) -> MapSpec:
    return load(snapshot(value, size, **more))["KmeshCgroupSock"].maps[0]


def test_it_is_written_in_the_shape_that_kmesh_reads(a_map: MakeMap) -> None:
    spec = a_map("struct in { __u8 b; }; struct value { __u32 x:3; __u32 y; struct in n; __u8 name[4]; void *p; };")
    assert json.loads(dump({"prog": ObjectSpec("prog", (spec,), ())})) == {
        "maps": {
            "prog": {
                "m": {
                    "name": "m", "type": "Hash", "keySize": 4, "valueSize": 24, "maxEntries": 64, "flags": 0,
                    "keyInfo": {"name": "__u32", "members": None},
                    "valueInfo": info(
                        "value",
                        member("x", "__u32", 0, 3), member("y", "__u32", 32),
                        member("n", "in", 64, nested=info("in", member("b", "__u8", 0))),
                        member("name", "", 72), member("p", "", 128),
                    ),
                }
            }
        }
    }  # fmt: skip


def test_what_it_tells_in_full_comes_back_identical(a_map: MakeMap) -> None:
    spec = a_map("struct in { __u64 a; __u8 b; }; struct value { __u16 f; __u32 x:3; __u32 y:5; struct in n; };")
    back = load(dump({"prog": ObjectSpec("prog", (spec,), ())}))["prog"].maps[0]
    assert diff_map(back, spec).verdict == "identical"


def test_a_field_put_into_padding_is_seen_though_every_size_is_the_same(a_map: MakeMap) -> None:
    old = read(info("value", member("a", "__u32", 0), member("b", "__u64", 64)), 16)
    diff = diff_map(old, a_map("struct value { __u32 a; __u32 more; __u64 b; };"))
    assert (diff.verdict, [(c.path, c.kind) for c in diff.changes]) == ("lossless", [("more", "added")])


@pytest.mark.parametrize(
    ("type_name", "believed"),
    [
        ("__u32", Int("__u32", 4, False)), ("__s32", Int("__s32", 4, True)), ("int", Int("int", 4, True)),
        ("unsigned int", Int("unsigned int", 4, False)), ("uint32_t", Int("uint32_t", 4, False)),
        ("__be32", Int("__be32", 4, False)), ("", Opaque("?", 4)), ("my_counter_t", Opaque("my_counter_t", 4)),
        ("state", Opaque("state", 4)), ("size_t", Opaque("size_t", 4)),
    ],
)  # fmt: skip
def test_only_names_that_mean_one_size_and_sign_are_believed(type_name: str, believed: Int | Opaque) -> None:
    made = read(info("value", member("x", type_name, 0), member("end", "__u32", 32)), 8).value
    assert isinstance(made, Record)
    assert made.fields[0] == Field("x", believed, 0)


@pytest.mark.parametrize("type_name", ["", "counter_t"])
def test_what_is_not_known_makes_the_map_unknown_and_never_identical(type_name: str, a_map: MakeMap) -> None:
    old = read(info("value", member("x", type_name, 0), member("y", "__u32", 32)), 8)
    diff = diff_map(old, a_map("struct value { __u32 x; __u32 y; };"))
    assert diff.verdict == "unknown"
    assert [(change.path, change.kind) for change in diff.changes] == [("x", "unknown")]
    assert diff_map(old, old).verdict == "unknown"


@pytest.mark.parametrize(
    "value",
    [
        info("value", member("x", "__u64", 0), member("y", "__u32", 32)),  # no room for x
        info("value", member("x", "__u32", 32), member("y", "__u32", 0)),  # out of order
        info("value", member("x", "__u32", 0), member("y", "__u64", 32)),  # ends behind the whole
        info("value", member("x", "__u32", 3)),  # begins inside a byte
        info("value", member("x", "state", 0, 3)),  # bits of who knows what sign
        info("value", member("x", "__u8", 0, 9)),
        info("", member("x", "__u64", 0)),  # Kmesh takes all structs without a name for one
        info("value"),  # cut down to its name
    ],
)
def test_members_that_cannot_be_what_they_say_make_a_struct_unknown(value: dict[str, Any]) -> None:
    assert isinstance(read(value, 8).value, Opaque)


def test_a_nested_struct_that_was_cut_down_or_has_no_name_is_unknown() -> None:
    for nested in (info("in"), info("", member("a", "__u32", 0))):
        made = read(info("value", member("n", nested["name"], 0, nested=nested), member("y", "__u32", 32)), 8).value
        assert isinstance(made, Record)
        assert isinstance(made.fields[0].type, Opaque)


def test_one_name_for_structs_of_two_sizes_says_nothing_about_either() -> None:
    first = json.loads(snapshot(info("value", member("x", "__u32", 0)), 4))
    other = json.loads(snapshot(info("value", member("x", "__u32", 0)), 8))["maps"]["KmeshCgroupSock"]["m"]
    first["maps"]["KmeshCgroupSock"]["n"] = {**other, "name": "n"}
    for spec in load(json.dumps(first).encode())["KmeshCgroupSock"].maps:
        assert isinstance(spec.value, Opaque)


def test_a_type_without_a_name_is_no_type() -> None:
    spec = read(info(""), 8, key=info("unsigned int"))
    assert spec.key == Int("unsigned int", 4, False)
    assert spec.value is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"maps": {"p": {"m": 1}}}', "damaged"),
        (b'{"maps": [', "damaged"),
        (snapshot(info("v"), 4, type="Nonsense"), "map type 'Nonsense' is not known"),
        (snapshot(info("v"), -4), "32-bit"),
    ],
)
def test_a_damaged_snapshot_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        load(data)


def test_nesting_without_end_is_refused() -> None:
    inner = info("s", member("x", "__u8", 0))
    for _ in range(100):
        inner = info("s", member("n", "s", 0, nested=inner))
    with pytest.raises(LayoutError, match="nested more than"):
        load(snapshot(inner, 8))


def test_it_is_told_from_our_own_snapshot() -> None:
    assert is_kmesh(snapshot(info("v"), 4))
    assert not is_kmesh(b'{"schema": 1, "objects": {}}')
    assert not is_kmesh(b'{"schema": 1, "maps": {}}')
    assert not is_kmesh(b"\xff")
