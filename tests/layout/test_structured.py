"""Records as numpy arrays with named fields, as a converter sees them; and numbers at the edges of what moves."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from hitless.errors import LayoutError
from hitless.layout.conversion import Records, collisions
from hitless.layout.diff import MapDiff, diff_map, draft
from hitless.layout.model import MapSpec
from hitless.layout.rules import MapRules
from hitless.layout.structured import Structured, convert, dtype, select

Compare = Callable[..., MapDiff]
MakeMap = Callable[..., MapSpec]

RICH = """
struct end { __u8 addr[16]; __be16 port; };
struct value {
    __u32 a; __s64 b; char name[6]; _Bool on; enum { A } e; struct end ends[2]; union { __u32 v4; __u8 v6[16]; };
    union { __u64 x; __u16 y; } u; __u32 low:3, high:5; struct { __u16 inner; }; void *p; __u32 grid[2][3];
    unsigned __int128 wide;
};
"""


def rows(*records: bytes) -> Records:
    return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)


def test_every_field_has_its_name_and_is_where_c_has_it(a_map: MakeMap) -> None:
    spec = a_map(RICH)
    assert spec.value is not None
    made = dtype(spec.value)
    assert made.itemsize == spec.value_size
    assert made.fields is not None
    assert set(made.names or ()) == {
        "a", "b", "name", "on", "e", "ends", "v4", "v6", "u", "{low,high}", "inner", "p", "grid", "wide",
    }  # fmt: skip
    record = np.zeros(2, made)
    record["a"], record["b"], record["name"] = [1, 2], [-1, -2], [b"web", b"longer"]
    record["ends"]["port"][:, 1] = 80
    record["v4"][0] = 0x01020304
    record["u"]["y"][1] = 7
    record["grid"][0, 1, 2] = 9
    raw = record.view(np.uint8).reshape(2, -1)
    assert raw[0, 8:16].tobytes() == struct.pack("<q", -1)
    assert record["ends"]["port"].tobytes() == struct.pack(">4H", 0, 80, 0, 80)
    assert record["v6"][0, :4].tolist() == [4, 3, 2, 1]
    assert (int(record["u"]["x"][1]), record["name"].tolist()) == (7, [b"web", b"longer"])


def test_a_converter_gets_what_the_types_tell_in_place_and_cannot_write_the_old_records(a_map: MakeMap) -> None:
    old, new = a_map("struct value { __u32 a; __u32 ms; };"), a_map("struct value { __u64 a; char ms[8]; };")
    assert diff_map(old, new).verdict == "needs-converter"
    seen = []

    def spelled(old: Structured, new: Structured) -> Structured:
        seen.append(new["a"].tolist())
        new["ms"] = np.char.mod("%dms", old["ms"])
        with pytest.raises(ValueError, match="read-only"):
            old["ms"] = 0
        return new

    assert old.value is not None and new.value is not None
    records = rows(struct.pack("<II", 1, 50), struct.pack("<II", 2, 7))
    made = convert(spelled, [(old.value, records)], new.value, draft(old, new)[1].apply(records).records)
    assert made.tobytes() == struct.pack("<Q8sQ8s", 1, b"50ms", 2, b"7ms")
    assert seen == [[1, 2]]


def test_a_converter_of_plain_values_sees_plain_numbers(a_map: MakeMap) -> None:
    value = "struct value { __u32 x; };"
    old, new = a_map(value, "__u32"), a_map(value, "__be32")
    assert old.key is not None and new.key is not None

    def swapped(old: Structured, new: Structured) -> Structured:
        new[:] = old
        return new

    records = rows(struct.pack("<I", 5))
    assert convert(swapped, [(old.key, records)], new.key, np.zeros_like(records)).tobytes() == struct.pack(">I", 5)


@pytest.mark.parametrize(
    ("converter", "what"),
    [
        (lambda old, new: None, "None"),
        (lambda old, new: [1], "a list"),
        (lambda old, new: new[:1], r"shape \(1,\)"),
        (lambda old, new: old, r"shape \(2,\)"),
        (lambda old, new: new["x"].astype("f8"), "float64"),
    ],
)
def test_what_is_no_array_of_the_new_records_is_refused(
    a_map: MakeMap, converter: Callable[..., object], what: str
) -> None:
    old, new = (a_map(f"struct value {{ {text} }};").value for text in ("__u16 x;", "__u32 x;"))
    assert old is not None and new is not None
    with pytest.raises(LayoutError, match=f"it returned .*{what}"):
        convert(converter, [(old, np.zeros((2, 2), np.uint8))], new, np.zeros((2, 4), np.uint8))


def test_a_converter_may_say_which_records_it_takes_and_else_takes_all(a_map: MakeMap) -> None:
    spec = a_map("struct value { __u32 a; };")
    assert spec.value is not None
    old = rows(*(struct.pack("<I", number) for number in range(4)))

    def odd(values: Structured, new: Structured) -> object:
        return new, values["a"] % 2 == 1

    made, taken = select(odd, [(spec.value, old)], spec.value, old)
    assert (made.tolist(), taken.tolist()) == (old.tolist(), [False, True, False, True])
    assert select(lambda _, new: new, [(spec.value, old)], spec.value, old)[1].all()
    with pytest.raises(LayoutError, match="returned a tuple"):
        convert(odd, [(spec.value, old)], spec.value, old)
    for wrong in (None, [True] * 4, np.ones(4), np.ones((4, 1), np.bool_), np.ones(3, np.bool_)):
        with pytest.raises(LayoutError, match=r"beside the records it returned .* array of bool and shape \(4,\)"):
            select(lambda _, new: (new, wrong), [(spec.value, old)], spec.value, old)  # noqa: B023 - called at once


def test_what_a_converter_leaves_between_fields_is_zero(a_map: MakeMap) -> None:
    made = a_map("struct value { __u8 a; __u32 b[2]; struct { __u16 c; __u8 d; } e; __u8 bits:3; };").value
    assert made is not None
    dirty = np.full((1, made.size), 0xFF, np.uint8)
    done = convert(lambda new: new, [], made, dirty)
    assert done.tobytes() == b"\xff\0\0\0" + b"\xff" * 8 + b"\xff" * 3 + b"\0" + b"\xff" + b"\0" * 3


def test_records_of_another_shape_are_refused(a_map: MakeMap) -> None:
    made = a_map("struct value { __u32 x; };").value
    assert made is not None
    with pytest.raises(LayoutError, match="want uint8 of shape"):
        convert(lambda old, new: new, [(made, np.zeros((2, 5), np.uint8))], made, np.zeros((2, 4), np.uint8))


def test_integers_of_16_bytes_are_widened_narrowed_and_checked(compare: Compare) -> None:
    wide = compare("__s64 a; __u64 b;", "__int128 a; unsigned __int128 b;")
    assert wide.verdict == "lossless" and wide.value is not None
    record = rows(struct.pack("<qQ", -5, 2**64 - 1))
    made = wide.value.apply(record).records
    assert made.tobytes() == (-5).to_bytes(16, "little", signed=True) + (2**64 - 1).to_bytes(16, "little")
    narrow = compare("__int128 a; unsigned __int128 b;", "__s64 a; __u64 b;")
    assert narrow.value is not None
    over = rows(made.tobytes(), (1 << 100).to_bytes(16, "little") * 2)
    done = narrow.value.apply(over)
    assert done.records.tobytes() == record.tobytes() + struct.pack("<qQ", 2**63 - 1, 2**64 - 1)
    assert [(misfit.path, misfit.first) for misfit in done.misfits] == [("a", (1,)), ("b", (1,))]


def test_network_order_is_kept_while_a_number_grows_and_shrinks(compare: Compare) -> None:
    grown, shrunk = compare("__be16 p;", "__be32 p;"), compare("__be32 p;", "__be16 p;")
    assert grown.value is not None and shrunk.value is not None
    made = grown.value.apply(rows(struct.pack(">H", 443))).records
    assert made.tobytes() == struct.pack(">I", 443)
    done = shrunk.value.apply(rows(made.tobytes(), struct.pack(">I", 70_000)))
    assert done.records.tobytes() == struct.pack(">HH", 443, 65535)
    assert [misfit.first for misfit in done.misfits] == [(1,)]


def test_a_bitfields_neighbours_and_the_background_stay_as_they_are(compare: Compare) -> None:
    diff = compare("__u8 a:2; __u8 b:6;", '__u16 x:3 TAG("hitless:default=5"); __u16 b:8; __u16 a:2;')
    assert diff.value is not None
    background = rows(b"\xff\xff")
    made = diff.value.apply(rows(bytes([0b101101 << 2 | 0b01])), background).records
    assert int(made.view("<u2")[0, 0]) == 0b111 << 13 | 0b01 << 11 | 0b101101 << 3 | 5
    back = diff.value.inverse().apply(made)
    assert (back.records.tobytes(), back.misfits) == (bytes([0b101101 << 2 | 0b01]), ())


def test_collisions_are_found_among_a_million_keys_in_no_time(a_map: MakeMap) -> None:
    value = "struct value { __u32 x; };"
    old, new = (a_map(f"struct key {{ {text} }}; {value}", "struct key") for text in ("__u32 a; __u32 b;", "__u32 a;"))
    key = diff_map(old, new, MapRules(on_collision="first")).key
    assert key is not None
    numbers = np.arange(1_000_000, dtype=np.uint32)
    keys = np.stack([numbers % 999_998, numbers], axis=1).view(np.uint8)
    assert collisions(key, keys) == ((0, 999_998), (1, 999_999))
    assert collisions(key, keys[:1000]) == collisions(key, keys[:0]) == ()


def test_rules_reach_the_members_of_an_anonymous_union(compare: Compare) -> None:
    old, new = "__u32 addr; __u32 x;", 'union { __u32 ip4 TAG("hitless:was=addr"); __u8 ip6[16]; }; __u32 x;'
    there, back = compare(old, new), compare(new, old)
    assert there.verdict == "lossless" and back.verdict == "lossy"
    assert there.value is not None and back.value is not None
    made = there.value.apply(rows(struct.pack("<II", 7, 1))).records
    assert made.tobytes() == struct.pack("<I12xI", 7, 1)
    assert back.value.apply(made).records.tobytes() == struct.pack("<II", 7, 1)
