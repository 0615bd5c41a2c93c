"""Python values and the bytes that C sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hitless.errors import LayoutError
from hitless.layout.codec import decode, encode
from hitless.layout.model import Int, MapSpec, Type

MakeMap = Callable[..., MapSpec]

SOURCE = """
enum action { DENY, ALLOW = 7 };
struct value {
    __u8 addr[4]; char name[8]; __be16 port; __s16 delta; _Bool on; enum action action; __u32 list[3];
    struct { __u32 x; } in; union { __u32 v4; __u8 v6[8]; } ip; union { __u16 p; __u32 q; };
    __u32 low:3; __s32 high:5; void *ptr;
};
"""


@pytest.fixture
def made(a_map: MakeMap) -> Type:
    value = a_map(SOURCE).value
    assert value is not None
    return value


def test_every_kind_of_field_has_its_python_value(made: Type) -> None:
    value: dict[str, Any] = {
        "addr": b"\1\2\3\4", "name": "web", "port": 80, "delta": -2, "on": True, "action": "ALLOW", "list": [1, 2],
        "in": {"x": 5}, "ip": {"v4": 9}, "q": 3, "low": 5, "high": -3, "ptr": 1 << 40,
    }  # fmt: skip
    got = decode(made, encode(made, value))
    ip = (9).to_bytes(8, "little")
    anonymous = {"{p|q}": (3).to_bytes(4, "little")}
    wanted = {**value, "action": 7, "list": [1, 2, 0], "ip": ip, **anonymous}
    del wanted["q"]
    assert got == wanted
    assert encode(made, got) == encode(made, value)


def test_what_is_left_out_is_zero(made: Type) -> None:
    assert encode(made, {}) == bytes(made.size)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prot": 1}, "prot: no such field"),
        ({"in": {"y": 1}}, "in.y: no such field"),
        ({"port": 65536}, "port: 65536 does not fit"),
        ({"port": -1}, "port: -1 does not fit"),
        ({"port": "http"}, "port: want a number"),
        ({"port": 1.5}, "port: want a number"),
        ({"action": "MAYBE"}, "action: want one of DENY, ALLOW"),
        ({"on": 2}, "on: want true or false"),
        ({"addr": b"\1\2\3"}, "addr: want 4 bytes"),
        ({"name": "a long name"}, "name: 'a long name' is longer than 8 bytes"),
        ({"list": [1, 2, 3, 4]}, "list: 4 elements do not fit 3"),
        ({"list": 1}, "list: want a list"),
        ({"list": [1, -1]}, r"list\[\]: -1 does not fit"),
        ({"ip": {"v4": 1, "v6": bytes(8)}}, "a union is given by one member"),
        ({"ip": {"v5": 1}}, "ip.v5: no such member"),
        ({"low": 8}, "low: want a number from 0 to 7"),
        (5, "value: want a dict"),
    ],
)
def test_a_wrong_value_is_refused_and_its_field_named(made: Type, value: object, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        encode(made, value)


def test_bytes_of_another_length_are_refused(made: Type) -> None:
    with pytest.raises(LayoutError, match="bytes, got 3"):
        decode(made, b"abc")


def test_text_ends_at_the_first_nul_and_bytes_that_are_no_utf8_come_back(a_map: MakeMap) -> None:
    made = a_map("struct value { char n[6]; };").value
    assert made is not None
    assert decode(made, b"ab\0cd\0") == {"n": "ab"}
    assert encode(made, decode(made, b"\xff\xfe\0\0\0\0")) == b"\xff\xfe\0\0\0\0"
    assert decode(made, encode(made, {"n": "éa"})) == {"n": "éa"}


def test_types_that_come_and_go_do_not_get_each_others_values() -> None:
    for size in (1, 2, 4, 8) * 200:
        made = Int(f"u{8 * size}", size, False)
        assert encode(made, 1) == b"\1" + bytes(size - 1)
        assert decode(made, b"\2" + bytes(size - 1)) == 2
