"""Every kind of change that Kmesh's history shows, from C source to converted bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from hitless.layout.conversion import Records, collisions
from hitless.layout.diff import Change, MapDiff, diff_map, diff_maps, draft, sources_of
from hitless.layout.elf import Binding, read_object
from hitless.layout.model import MapSpec, ObjectSpec
from hitless.layout.rules import FieldRule, MapRules, OnCollision
from hitless.layout.structured import Structured, convert

Compare = Callable[..., MapDiff]
MakeMap = Callable[..., MapSpec]
Read = Callable[..., ObjectSpec]


def rows(*records: bytes) -> Records:
    return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)


def carried(diff: MapDiff, *records: bytes) -> list[bytes]:
    assert diff.verdict in ("lossless", "lossy"), diff.changes
    assert diff.value is not None
    return [row.tobytes() for row in diff.value.apply(rows(*records)).records]


def rekeyed(diff: MapDiff, *records: bytes) -> list[bytes]:
    assert diff.verdict in ("lossless", "lossy"), diff.changes
    assert diff.key is not None
    return [row.tobytes() for row in diff.key.apply(rows(*records)).records]


def kinds(diff: MapDiff) -> list[tuple[str, str]]:
    return [(change.path, change.kind) for change in diff.changes]


def only(diff: MapDiff, kind: str) -> Change:
    (found,) = [change for change in diff.changes if change.kind == kind]
    return found


def test_a_field_is_appended(compare: Compare) -> None:
    diff = compare("__u32 a;", "__u32 a; __u32 b;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("b", "added")])
    assert carried(diff, struct.pack("<I", 7)) == [struct.pack("<II", 7, 0)]


def test_a_field_is_inserted_in_the_middle(compare: Compare) -> None:
    diff = compare("__u32 a; __u32 b;", '__u32 a; __u32 x TAG("hitless:default=5"); __u32 b;')
    assert (diff.verdict, kinds(diff)) == ("lossless", [("x", "added"), ("b", "moved")])
    assert carried(diff, struct.pack("<II", 1, 2)) == [struct.pack("<III", 1, 5, 2)]


def test_a_field_is_removed(compare: Compare) -> None:
    diff = compare("__u32 a; __u32 b; __u32 c;", "__u32 a; __u32 c;")
    assert (diff.verdict, only(diff, "removed").loss) == ("lossy", "b is dropped")
    assert carried(diff, struct.pack("<III", 1, 2, 3)) == [struct.pack("<II", 1, 3)]


def test_a_field_is_renamed(compare: Compare) -> None:
    diff = compare("__u32 a; __u32 b;", '__u32 a; __u16 x; __u32 c TAG("hitless:was=b");')
    assert ("c", "renamed") in kinds(diff)
    assert carried(diff, struct.pack("<II", 1, 2)) == [struct.pack("<IHxxI", 1, 0, 2)]


def test_a_number_is_widened(compare: Compare) -> None:
    diff = compare("__u32 a; __s16 b;", "__u64 a; __s32 b;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("a", "widened"), ("b", "moved"), ("b", "widened")])
    assert carried(diff, struct.pack("<Ihxx", 4_000_000_000, -5)) == [struct.pack("<Qixxxx", 4_000_000_000, -5)]


def test_a_number_is_narrowed(compare: Compare) -> None:
    diff = compare("__u32 a;", "__u16 a;")
    assert (diff.verdict, only(diff, "narrowed").loss) == ("lossy", "values outside 0 to 65535 do not fit")
    assert diff.value is not None
    done = diff.value.apply(rows(struct.pack("<I", 80), struct.pack("<I", 70_000)))
    assert done.records.tobytes() == struct.pack("<HH", 80, 65535)
    assert [(misfit.path, misfit.count, misfit.first) for misfit in done.misfits] == [("a", 1, (1,))]


def test_a_number_becomes_a_struct_of_one_and_the_other_way(compare: Compare) -> None:
    there = compare("__u32 id; __u32 b;", "struct { __u32 value; } id; __u64 b;")
    back = compare("struct { __u32 value; } id; __u64 b;", "__u32 id; __u32 b;")
    assert ("id", "nested") in kinds(there) and there.verdict == "lossless"
    made = carried(there, struct.pack("<II", 9, 1))
    assert made == [struct.pack("<IxxxxQ", 9, 1)]
    assert carried(back, *made) == [struct.pack("<II", 9, 1)]


def test_a_number_becomes_element_zero_of_an_array(compare: Compare) -> None:
    diff = compare("__u32 count; __u32 b;", "__u32 count[3]; __u32 b;")
    assert diff.verdict == "lossless" and ("count", "retyped") in kinds(diff)
    assert carried(diff, struct.pack("<II", 4, 1)) == [struct.pack("<IIII", 4, 0, 0, 1)]


def test_an_array_is_grown_and_shrunk(compare: Compare) -> None:
    grown, shrunk = compare("__u16 a[2];", "__u16 a[3];"), compare("__u16 a[3];", "__u16 a[2];")
    assert carried(grown, struct.pack("<HH", 1, 2)) == [struct.pack("<HHH", 1, 2, 0)]
    assert only(shrunk, "resized").loss == "element 2 is dropped"
    assert carried(shrunk, struct.pack("<HHH", 1, 2, 3)) == [struct.pack("<HH", 1, 2)]


def test_an_ipv4_address_becomes_a_struct_that_holds_a_union(compare: Compare) -> None:
    old = "__u32 addr; __u32 port;"
    new = "struct ip_addr { union { __u32 ip4; __u32 ip6[4]; }; }; struct value { struct ip_addr addr; __u32 port; };"
    there, back = compare(old, new), compare(new, old)
    assert there.verdict == "lossless" and ("addr", "nested") in kinds(there)
    made = carried(there, bytes([10, 0, 0, 1]) + struct.pack("<I", 80))
    assert made == [bytes([10, 0, 0, 1]) + bytes(12) + struct.pack("<I", 80)]
    assert back.verdict == "lossy" and "ip6" in str([change.loss for change in back.changes])
    assert carried(back, *made) == [bytes([10, 0, 0, 1]) + struct.pack("<I", 80)]


def test_a_field_goes_into_a_union_and_comes_out(compare: Compare) -> None:
    plain, shared = "__u32 ip4; __u32 port;", "union { __u32 ip4; __u8 ip6[16]; }; __u32 port;"
    there, back = compare(plain, shared), compare(shared, plain)
    assert there.verdict == "lossless" and ("ip4", "nested") in kinds(there)
    assert carried(there, b"\x0a\0\0\1\x50\0\0\0") == [b"\x0a\0\0\1" + bytes(12) + b"\x50\0\0\0"]
    assert only(back, "nested").loss == "entries in which ip6 is in use are misread"
    assert back.value is not None
    done = back.value.apply(rows(b"\x0a\0\0\1" + bytes(12) + b"\x50\0\0\0", bytes(range(1, 17)) + b"\x50\0\0\0"))
    assert done.records[0].tobytes() == b"\x0a\0\0\1\x50\0\0\0"
    assert [(misfit.path, misfit.first) for misfit in done.misfits] == [("ip4", (1,))]


def test_two_fields_that_begin_to_share_their_bytes_need_a_converter(compare: Compare) -> None:
    assert compare("__u32 a; __u32 b;", "union { __u32 a; __u32 b; };").verdict == "needs-converter"
    assert compare("union { __u32 a; __u32 b; };", "__u32 a; __u32 b;").verdict == "needs-converter"


def test_a_field_is_renamed_and_nested_at_once(compare: Compare) -> None:
    rules = MapRules(fields={"prio.count[0]": FieldRule("endpoint_count")})
    diff = compare("__u32 endpoint_count; __u32 b;", "__u32 b; struct { __u64 count[2]; } prio;", rules)
    assert diff.verdict == "lossless" and ("prio.count[0]", "renamed") in kinds(diff)
    assert carried(diff, struct.pack("<II", 3, 1)) == [struct.pack("<IxxxxQQ", 1, 3, 0)]


def test_an_enum_value_is_added(compare: Compare) -> None:
    diff = compare("enum { TCP = 6 } p; __u32 a;", "enum { TCP = 6, UDP = 17 } p; __u64 a;")
    assert diff.verdict == "lossless" and ("p", "enum-added") in kinds(diff)
    assert carried(diff, struct.pack("<II", 6, 1)) == [struct.pack("<IxxxxQ", 6, 1)]


def test_an_enum_is_numbered_anew(compare: Compare) -> None:
    diff = compare("enum { DENY, ALLOW } a;", "enum { UNSET, DENY, ALLOW } a;")
    assert diff.value is not None
    done = diff.value.apply(rows(*(struct.pack("<I", number) for number in (0, 1, 9))))
    assert done.records.view("<u4").ravel().tolist() == [1, 2, 9]
    assert [(misfit.path, misfit.first) for misfit in done.misfits] == [("a", (2,))]


VALUE = "struct value { __u32 x; };"


def keys(a_map: MakeMap, old: str, new: str, rules: MapRules = MapRules()) -> MapDiff:  # noqa: B008 - frozen
    before, after = (a_map(f"struct key {{ {text} }}; {VALUE}", "struct key") for text in (old, new))
    return diff_map(before, after, rules)


def test_a_key_field_is_inserted(a_map: MakeMap) -> None:
    diff = keys(a_map, "__u32 ip; __u16 port; __u16 pad;", "__u32 ip; __u32 netns; __u16 port; __u16 pad;")
    assert diff.verdict == "lossless" and ("key.netns", "added") in kinds(diff)
    assert rekeyed(diff, struct.pack("<IHH", 1, 80, 0)) == [struct.pack("<IIHH", 1, 0, 80, 0)]


def test_a_key_field_is_appended(a_map: MakeMap) -> None:
    diff = keys(a_map, "__u32 ip;", "__u32 ip; __u32 prio;")
    assert rekeyed(diff, struct.pack("<I", 1)) == [struct.pack("<II", 1, 0)]


def test_a_key_field_is_removed_so_that_keys_collide(a_map: MakeMap) -> None:
    old, new = "__u32 ip; __u32 prio;", "__u32 ip;"
    refused = keys(a_map, old, new)
    assert refused.verdict == "needs-converter"
    assert only(refused, "removed").reason == "in a key two entries could become one: prio is dropped"
    diff = keys(a_map, old, new, MapRules(on_collision="error"))
    assert diff.verdict == "lossy" and diff.key is not None
    before = rows(*(struct.pack("<II", ip, prio) for ip, prio in ((1, 0), (2, 0), (1, 1), (3, 0), (2, 5), (1, 7))))
    assert diff.key.apply(before).records.view("<u4").ravel().tolist() == [1, 2, 1, 3, 2, 1]
    assert collisions(diff.key, before) == ((0, 2, 5), (1, 4))


def test_a_key_field_is_widened(a_map: MakeMap) -> None:
    diff = keys(a_map, "__u32 id;", "__u64 id;")
    assert rekeyed(diff, struct.pack("<I", 4_000_000_000)) == [struct.pack("<Q", 4_000_000_000)]


def test_a_key_field_is_retyped(a_map: MakeMap) -> None:
    diff = keys(a_map, "__s32 id;", "__u32 id;", MapRules(on_collision="error"))
    assert diff.verdict == "lossy" and ("key.id", "retyped") in kinds(diff)
    assert rekeyed(diff, struct.pack("<i", 5)) == [struct.pack("<I", 5)]
    assert keys(a_map, "__s32 id;", "__u32 id;").verdict == "needs-converter"


def test_a_string_becomes_an_id_by_a_function_of_the_user(a_map: MakeMap) -> None:
    old = a_map("struct value { char name[8]; __u32 hits; };")
    new = a_map("struct value { __u32 name; __u64 hits; };")
    assert diff_map(old, new).verdict == "needs-converter"
    ids = {b"web": 7, b"db": 9}

    def by_id(old: Structured, new: Structured) -> Structured:
        new["name"] = [ids[name] for name in old["name"]]
        return new

    assert old.value is not None and new.value is not None
    _, value = draft(old, new)
    records = rows(struct.pack("<8sI", b"web", 1), struct.pack("<8sI", b"db", 2))
    made = convert(by_id, [(old.value, records)], new.value, value.apply(records).records)
    assert made.tobytes() == struct.pack("<IxxxxQ", 7, 1) + struct.pack("<IxxxxQ", 9, 2)


def test_text_is_resized_and_counted_as_cut_only_where_letters_are_lost(compare: Compare) -> None:
    grown, shrunk = compare("char n[4];", "char n[8];"), compare("char n[8];", "char n[4];")
    assert carried(grown, b"abcd") == [b"abcd\0\0\0\0"]
    assert shrunk.value is not None
    done = shrunk.value.apply(rows(b"abc\0\0\0\0\0", b"abcdef\0\0"))
    assert (done.records.tobytes(), [misfit.first for misfit in done.misfits]) == (b"abc\0abcd", [(1,)])


def test_a_field_is_put_into_padding_and_the_size_stays(compare: Compare) -> None:
    diff = compare("__u8 a; __u32 b;", "__u8 a; __u8 flag; __u32 b;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("flag", "added")])
    assert carried(diff, b"\1\xee\xee\xee\2\0\0\0") == [b"\1\0\0\0\2\0\0\0"]


def test_the_byte_order_of_a_field_changes_and_nothing_else(a_map: MakeMap) -> None:
    old, new = a_map("struct value { __u16 port; __u16 a; };"), a_map("struct value { __be16 port; __u16 a; };")
    diff = diff_map(old, new)
    assert (diff.verdict, kinds(diff)) == ("needs-converter", [("port", "byte-order")])

    def swapped(old: Structured, new: Structured) -> Structured:
        new["port"] = old["port"]  # numpy knows the order of either side
        return new

    assert old.value is not None and new.value is not None
    records = rows(struct.pack("<HH", 80, 1))
    made = convert(swapped, [(old.value, records)], new.value, draft(old, new)[1].apply(records).records)
    assert made.tobytes() == struct.pack(">H", 80) + struct.pack("<H", 1)


def test_every_map_of_a_release_is_renamed(a_map: MakeMap) -> None:
    spec = a_map(VALUE)
    names = ("frontend", "service", "endpoint")
    old = [msgspec.structs.replace(spec, name=name) for name in names]
    new = [msgspec.structs.replace(spec, name=f"km_{name}") for name in names]
    diffs = diff_maps(old, new, {f"km_{name}": MapRules(was=name) for name in names})
    assert [(diff.name, diff.was, diff.verdict) for diff in diffs] == [
        (f"km_{name}", name, "identical") for name in names
    ]
    (first, gone) = diff_maps(old[:1], new[:1])
    assert (first.verdict, gone.verdict) == ("added", "removed")
    assert gone.changes[0].hint == 'if this is km_frontend now, say so: [map.km_frontend] was = "frontend"'


def test_a_map_is_split(a_map: MakeMap) -> None:
    old = msgspec.structs.replace(a_map("struct value { __u32 a; __u32 b; };"), name="both")
    parts = [
        msgspec.structs.replace(a_map(f"struct value {{ __u32 {name}; }};"), name=name) for name in ("a", "b")
    ]
    *added, gone = diff_maps([old], parts)
    assert ([diff.verdict for diff in added], gone.verdict) == (["added", "added"], "removed")
    assert gone.changes[0].hint == 'if its entries are split among a, b, say was = "both" for each of them'
    carried_part = diff_maps([old], parts, {"a": MapRules(was="both")})[0]
    assert carried(carried_part, struct.pack("<II", 1, 2)) == [struct.pack("<I", 1)]
    assert carried_part.verdict == "lossy"
    first, second = diff_maps([old], parts, {name: MapRules(was="both") for name in ("a", "b")})
    assert (first.verdict, second.verdict, first.was, second.was) == ("lossless", "lossless", "both", "both")
    assert Change("", "split", "both", "a, b") in first.changes
    assert carried(first, struct.pack("<II", 1, 2)) == [struct.pack("<I", 1)]
    assert carried(second, struct.pack("<II", 1, 2)) == [struct.pack("<I", 2)]


def test_a_field_is_lost_where_one_that_has_it_may_get_just_some_of_the_entries(a_map: MakeMap) -> None:
    old = msgspec.structs.replace(a_map("struct value { __u32 a; __u32 b; };"), name="both")
    parts = [
        msgspec.structs.replace(a_map(f"struct value {{ __u32 {name}; }};"), name=name) for name in ("a", "b")
    ]
    by_user = MapRules(was="both", convert="converters:b", functions=("b",))
    first, second = diff_maps([old], parts, {"a": MapRules(was="both"), "b": by_user})
    assert [change.loss for change in first.changes if change.loss] == ["b is dropped"]
    assert second.verdict == "lossless"


def test_parts_of_a_field_are_lost_unless_one_map_has_the_whole_of_it(a_map: MakeMap) -> None:
    inner = "struct inner { __u32 x; __u32 y; }; "
    old = msgspec.structs.replace(a_map(inner + "struct value { struct inner in; __u32 a; };"), name="both")
    half = "struct inner { __u32 x; }; struct value { struct inner in; };"
    parts = [
        msgspec.structs.replace(a_map(text), name=name)
        for name, text in (("a", "struct value { __u32 a; };"), ("b", half))
    ]
    rules = {name: MapRules(was="both") for name in ("a", "b")}
    first, second = diff_maps([old], parts, rules)
    assert [change.path for change in first.changes if change.loss] == []
    assert [change.path for change in second.changes if change.loss] == ["in.y"]


def test_a_map_that_is_split_is_carried_even_where_nothing_else_changed(a_map: MakeMap) -> None:
    old = a_map("struct value { __u32 a; };")
    parts = [msgspec.structs.replace(old, name=name) for name in ("m", "n")]
    diffs = diff_maps([old], parts, {name: MapRules(was="m") for name in ("m", "n")})
    assert [(diff.name, diff.was, diff.verdict) for diff in diffs] == [("m", None, "lossless"), ("n", "m", "lossless")]


def test_two_maps_are_folded_into_one(a_map: MakeMap) -> None:
    first, second = (
        msgspec.structs.replace(a_map(f"struct value {{ __u32 {name}; }};"), name=name) for name in ("a", "b")
    )
    both = msgspec.structs.replace(a_map("struct value { __u32 a; __u32 b; };"), name="both")
    kept, gone = diff_maps([first, second], [both], {"both": MapRules(was="a")})
    assert carried(kept, struct.pack("<I", 1)) == [struct.pack("<II", 1, 0)]
    assert gone.verdict == "removed"
    assert gone.changes[0].hint == 'if its entries are folded into both, say so: [map.both] was = ["a", "b"]'
    rules = MapRules(sources={name: MapRules(was=name) for name in ("a", "b", "never")})
    (folded,) = diff_maps([first, second], [both], {"both": rules})
    assert (folded.verdict, folded.was, sources_of(folded)) == ("lossless", None, ("a", "b"))
    one, other = folded.parts
    assert carried(one, struct.pack("<I", 1)) == [struct.pack("<II", 1, 0)]
    assert carried(other, struct.pack("<I", 2)) == [struct.pack("<II", 0, 2)]


def test_a_fold_is_as_bad_as_the_worst_of_its_maps(a_map: MakeMap) -> None:
    good, bad = (
        msgspec.structs.replace(a_map(f"struct value {{ {word} a; }};"), name=name)
        for name, word in (("good", "__u32"), ("bad", "__be32"))
    )
    both = msgspec.structs.replace(a_map("struct value { __u32 a; };"), name="both")
    rules = MapRules(sources={name: MapRules(was=name) for name in ("good", "bad")})
    (folded,) = diff_maps([good, bad], [both], {"both": rules})
    assert folded.verdict == "needs-converter"
    assert [part.verdict for part in folded.parts] == ["lossless", "needs-converter"]


@pytest.mark.parametrize(("policy", "verdict"), [(None, "lossless"), ("merge", "lossless"), ("first", "lossy")])
def test_a_fold_that_keeps_one_of_two_entries_loses_the_other(
    a_map: MakeMap, policy: OnCollision | None, verdict: str
) -> None:
    spec = a_map("struct value { __u32 a; };")
    olds = [msgspec.structs.replace(spec, name=name) for name in ("one", "two")]
    sources = {name: MapRules(was=name, on_collision=policy) for name in ("one", "two")}
    (folded,) = diff_maps(olds, [spec], {"m": MapRules(on_collision=policy, sources=sources)})
    assert folded.verdict == verdict


GLOBALS = """
struct config {{ __u32 log_level; __u32 node_ip; }};
{}
SEC("xdp") int p(void *c) {{ return {}; }}
"""


def test_a_map_becomes_global_variables(read: Read) -> None:
    array = (
        "struct { __uint(type, 2); __uint(max_entries, 1); __type(key, __u32); __type(value, struct config); }"
        ' config SEC(".maps");'
    )
    ring = 'struct { __uint(type, 27); __uint(max_entries, 4096); } r SEC(".maps"); __u32 node_ip; __u32 log_level;'
    old, new = read(GLOBALS.format(array, "0")).maps, read(GLOBALS.format(ring, "node_ip + log_level")).maps
    (gone,) = [diff for diff in diff_maps(old, new) if diff.verdict == "removed"]
    assert gone.changes[0].hint == 'its fields are variables in .bss now; to carry them: [map.".bss"] was = "config"'
    (kept,) = [diff for diff in diff_maps(old, new, {".bss": MapRules(was="config")}) if diff.was == "config"]
    (section,) = [spec for spec in new if spec.name == ".bss"]
    assert kept.verdict == "lossless" and section.value is not None
    fields = {field.name: field.offset // 8 for field in section.value.fields}  # type: ignore[union-attr]
    (made,) = carried(kept, struct.pack("<II", 3, 0x0A000001))
    assert made[fields["log_level"] :][:4] == struct.pack("<I", 3)
    assert made[fields["node_ip"] :][:4] == struct.pack("<I", 0x0A000001)


def test_a_hash_is_replaced_by_several_of_different_sizes(a_map: MakeMap) -> None:
    old = msgspec.structs.replace(a_map("struct value { char v[1300]; };"), name="all")
    sized = [
        msgspec.structs.replace(a_map(f"struct value {{ char v[{size}]; }};"), name=f"map_of_{size}")
        for size in (64, 192, 1300)
    ]
    *added, gone = diff_maps([old], sized)
    assert {diff.verdict for diff in added} == {"added"}
    assert "split among map_of_64, map_of_192, map_of_1300" in str(gone.changes[0].hint)
    first = diff_maps([old], sized, {"map_of_64": MapRules(was="all")})[0]
    assert carried(first, b"x" * 10 + bytes(1290)) == [b"x" * 10 + bytes(54)]


def test_only_the_number_of_entries_or_the_flags_change(a_map: MakeMap) -> None:
    diff = diff_map(a_map(VALUE, entries=8), a_map(VALUE, entries=16, more="__uint(map_flags, 1);"))
    assert (diff.verdict, kinds(diff)) == ("lossless", [("", "flags"), ("", "max-entries")])
    assert (diff.key, diff.value) == (None, None)


def test_a_ring_buffer_is_resized() -> None:
    old, new = MapSpec("r", "ringbuf", 0, 0, 4096), MapSpec("r", "ringbuf", 0, 0, 8192)
    diff = diff_map(old, new)
    assert (diff.verdict, kinds(diff)) == ("lossless", [("", "max-entries")])


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "gained"])
def test_the_types_are_lost_or_gained_and_the_bytes_stay(compile_bpf: Callable[..., bytes], lost: bool) -> None:
    source = VALUE + "struct key { __u32 k; }; struct key k; struct value v;"
    typed = "__type(key, struct key); __type(value, struct value);"
    sized = "__uint(key_size, 4); __uint(value_size, 4);"
    data = [
        compile_bpf(f'{source} struct {{ __uint(type, 1); __uint(max_entries, 4); {text} }} m SEC(".maps");')
        for text in (typed, sized)
    ]
    known, blind = (read_object(item, "a.o").maps[0] for item in data)
    assert diff_map(*((known, blind) if lost else (blind, known))).verdict == "unknown"
    bound = read_object(data[1], "a.o", {"m": Binding("key", "value")}).maps[0]
    assert diff_map(*((known, bound) if lost else (bound, known))).verdict == "identical"


def test_a_program_or_hook_is_added_or_removed_and_no_map_changes(read: Read) -> None:
    source = VALUE + (
        'struct { __uint(type, 1); __uint(max_entries, 4); __type(key, __u32); __type(value, struct value); }'
        ' m SEC(".maps"); SEC("sockops") int one(void *c) { return 1; }'
    )
    old, new = read(source), read(source + 'SEC("cgroup/connect4") int two(void *c) { return 1; }')
    assert {program.name for program in new.programs} - {program.name for program in old.programs} == {"two"}
    assert [diff.verdict for diff in diff_maps(old.maps, new.maps)] == ["identical"]
