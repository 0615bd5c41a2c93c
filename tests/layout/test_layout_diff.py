"""What makes a change between two layouts, and whether state survives it."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from hitless.errors import LayoutError
from hitless.layout.answers import ANSWERS
from hitless.layout.diff import Change, MapDiff, diff_map, diff_maps
from hitless.layout.elf import MAP_TYPES
from hitless.layout.model import Field, Float, Int, MapSpec, ObjectSpec, Opaque, Record
from hitless.layout.rules import FieldRule, MapRules

Compare = Callable[..., MapDiff]
MakeMap = Callable[..., MapSpec]
Read = Callable[..., ObjectSpec]


def kinds(diff: MapDiff) -> list[tuple[str, str]]:
    return [(change.path, change.kind) for change in diff.changes]


def only(diff: MapDiff, kind: str) -> Change:
    (found,) = [change for change in diff.changes if change.kind == kind]
    return found


def test_the_same_layout_is_identical_and_has_nothing_to_convert(compare: Compare) -> None:
    diff = compare("__u32 a; __u64 b;", "__u32 a; __u64 b;")
    assert (diff.verdict, diff.changes, diff.key, diff.value) == ("identical", (), None, None)


def test_names_of_types_and_qualifiers_make_no_change(compare: Compare) -> None:
    old = "typedef __u32 count_t; struct a { count_t x; }; enum e { E0 }; struct value { struct a s; enum e k; };"
    new = "struct b { const volatile unsigned int x; }; enum f { E0 }; struct value { struct b s; enum f k; };"
    assert compare(old, new).verdict == "identical"


def test_padding_made_explicit_under_a_name_is_an_added_field_at_an_unchanged_size(compare: Compare) -> None:
    diff = compare("__u8 a; __u32 b;", "__u8 a; __u8 c; __u32 b;")
    assert kinds(diff) == [("c", "added")]
    assert diff.verdict == "lossless"
    assert diff.value is not None and diff.value.old_size == diff.value.new_size == 8


def test_an_appended_field_is_lossless(compare: Compare) -> None:
    diff = compare("__u32 a;", "__u32 a; __u32 b;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("b", "added")])


def test_a_field_inserted_in_the_middle_moves_the_next(compare: Compare) -> None:
    diff = compare("__u32 a; __u32 b;", "__u32 a; __u32 x; __u32 b;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("x", "added"), ("b", "moved")])


def test_a_removed_field_is_a_loss_that_is_named(compare: Compare) -> None:
    diff = compare("__u32 a; __u32 b;", "__u32 a;")
    assert diff.verdict == "lossy"
    assert only(diff, "removed").loss == "b is dropped"


def test_a_widened_number_is_lossless(compare: Compare) -> None:
    diff = compare("__u32 a;", "__u64 a;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("a", "widened")])


def test_a_signed_number_widened_to_unsigned_may_lose_negative_values(compare: Compare) -> None:
    diff = compare("__s32 a;", "__u64 a;")
    assert diff.verdict == "lossy"
    assert only(diff, "widened").loss == "values outside 0 to 2147483647 do not fit"


def test_a_narrowed_number_is_lossy_and_names_the_range(compare: Compare) -> None:
    diff = compare("__u64 a;", "__u16 a;")
    assert diff.verdict == "lossy"
    assert only(diff, "narrowed").loss == "values outside 0 to 65535 do not fit"


def test_a_change_of_signedness_alone_is_a_change(compare: Compare) -> None:
    diff = compare("__u32 a;", "__s32 a;")
    assert (diff.verdict, kinds(diff)) == ("lossy", [("a", "retyped")])


def test_a_number_made_bool_is_lossy_and_the_other_way_lossless(compare: Compare) -> None:
    assert compare("__u8 a;", "_Bool a;").verdict == "lossy"
    assert compare("_Bool a;", "__u8 a;").verdict == "lossless"


def test_a_number_in_network_byte_order_is_widened_in_that_order(compare: Compare) -> None:
    diff = compare("__be16 port;", "__be32 port;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("port", "widened")])


@pytest.mark.parametrize("new", ["__u16 port;", "__u32 port;"])
def test_a_number_that_leaves_network_byte_order_needs_a_converter(compare: Compare, new: str) -> None:
    diff = compare("__be16 port;", new)
    assert (diff.verdict, kinds(diff)) == ("needs-converter", [("port", "byte-order")])


def test_a_new_name_without_a_word_about_it_is_a_removal_with_a_hint(compare: Compare) -> None:
    diff = compare("__u32 a; __u32 b;", "__u32 a; __u32 c;")
    assert diff.verdict == "lossy"
    assert only(diff, "added").hint == "if this is b under a new name, say so: hitless:was=b"


def test_a_tag_says_what_a_field_was_called(compare: Compare) -> None:
    diff = compare("__u32 a; __u32 b;", '__u32 a; __u32 c TAG("hitless:was=b");')
    assert (diff.verdict, kinds(diff)) == ("lossless", [("c", "renamed")])


def test_going_back_follows_the_same_tag(compare: Compare) -> None:
    diff = compare('__u32 a; __u32 c TAG("hitless:was=b");', "__u32 a; __u32 b;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("b", "renamed")])


def test_a_tagged_field_that_kept_its_new_name_matches_itself(compare: Compare) -> None:
    text = '__u32 c TAG("hitless:was=b"); __u32 b;'
    assert compare(text, text).verdict == "identical"


def test_a_name_used_again_for_something_else_goes_to_nobody(compare: Compare) -> None:
    new = '__u32 c TAG("hitless:was=b"); __u32 b;'
    forward, back = compare("__u32 b;", new), compare(new, "__u32 b;")
    assert kinds(forward) == [("c", "renamed"), ("b", "added")]
    assert kinds(back) == [("b", "renamed"), ("b", "removed")]


def test_a_rule_renames_without_a_tag(compare: Compare) -> None:
    diff = compare("__u32 b;", "__u32 c;", MapRules(fields={"c": FieldRule("b")}))
    assert (diff.verdict, kinds(diff)) == ("lossless", [("c", "renamed")])


def test_a_reversed_rule_renames_back(compare: Compare) -> None:
    rules = MapRules(fields={"c": FieldRule("b")})
    assert kinds(compare("__u32 c;", "__u32 b;", rules.reversed())) == [("b", "renamed")]


def test_a_rule_brings_a_field_into_a_new_nested_array(compare: Compare) -> None:
    rules = MapRules(fields={"s.list[0]": FieldRule("n")})
    diff = compare("__u32 a; __u32 n;", "__u32 a; struct { __u32 list[4]; } s;", rules)
    assert diff.verdict == "lossless"
    assert ("s.list[0]", "renamed") in kinds(diff)
    assert diff.value is not None and diff.value.inverse().moves[0].old_size == 8


def test_a_rule_renames_in_every_element_of_an_array(compare: Compare) -> None:
    text = "struct e {{ __u32 x; __u32 {}; }}; struct value {{ struct e list[4]; }};"
    rules = MapRules(fields={"list[].weight": FieldRule("list[].share")})
    diff = compare(text.format("share"), text.format("weight"), rules)
    assert (diff.verdict, kinds(diff)) == ("lossless", [("list[]", "nested"), ("list[].weight", "renamed")])


def test_a_rule_brings_a_nested_field_out_and_the_rest_of_its_struct_is_lost(compare: Compare) -> None:
    rules = MapRules(fields={"inside": FieldRule("s.inside")})
    diff = compare("struct { __u32 inside; __u32 other; } s;", "__u64 inside;", rules)
    assert ("inside", "renamed") in kinds(diff) and ("inside", "widened") in kinds(diff)
    assert only(diff, "removed").loss == "s is dropped, except s.inside"


def test_a_rule_that_cannot_be_applied_is_an_error(compare: Compare) -> None:
    rules = MapRules(fields={"list[1]": FieldRule("a")})
    with pytest.raises(LayoutError, match="cannot be applied"):
        compare("__u32 a; __u32 list[2];", "__u32 list[2];", rules)


def test_a_rule_for_a_field_that_does_not_exist_is_an_error_that_names_it(compare: Compare) -> None:
    with pytest.raises(LayoutError, match="no field 'missing'"):
        compare("__u32 a;", "__u32 a;", MapRules(fields={"missing": FieldRule("a")}))


def test_a_rule_whose_old_name_is_gone_already_is_no_error(compare: Compare) -> None:
    assert compare("__u32 c;", "__u32 c;", MapRules(fields={"c": FieldRule("b")})).verdict == "identical"


def test_a_tag_of_ours_that_does_not_exist_is_an_error(compare: Compare) -> None:
    with pytest.raises(LayoutError, match="hitless:wos=b"):
        compare("__u32 a;", '__u32 a TAG("hitless:wos=b");')


def test_a_tag_of_somebody_else_is_passed_over(compare: Compare) -> None:
    assert compare("__u32 a;", '__u32 a TAG("user");').verdict == "identical"


def test_a_change_inside_a_nested_struct_is_found_and_placed(compare: Compare) -> None:
    diff = compare("struct { __u32 x; } s; __u32 z;", "struct { __u32 x; __u32 y; } s; __u32 z;")
    assert kinds(diff) == [("s", "nested"), ("s.y", "added"), ("z", "moved")]
    assert diff.verdict == "lossless"


def test_a_grown_array_is_lossless_and_a_shrunk_one_names_the_lost_elements(compare: Compare) -> None:
    grown, shrunk = compare("__u32 a[2];", "__u32 a[4];"), compare("__u32 a[4];", "__u32 a[2];")
    assert (grown.verdict, kinds(grown)) == ("lossless", [("a", "resized")])
    assert shrunk.verdict == "lossy"
    assert only(shrunk, "resized").loss == "elements 2 to 3 are dropped"


def test_structs_in_an_array_are_converted_one_by_one(compare: Compare) -> None:
    old = "struct e { __u32 x; }; struct value { struct e a[2]; };"
    new = "struct e { __u32 y; __u64 x; }; struct value { struct e a[3]; };"
    diff = compare(old, new)
    assert diff.verdict == "lossless"
    assert ("a[].x", "widened") in kinds(diff) and ("a[].y", "added") in kinds(diff)


def test_a_number_becomes_element_zero_of_an_array_and_back(compare: Compare) -> None:
    assert compare("__u32 a;", "__u32 a[4];").verdict == "lossless"
    back = compare("__u32 a[4];", "__u32 a;")
    assert back.verdict == "lossy"
    assert only(back, "retyped").loss == "elements 1 to 3 are dropped"


def test_a_number_becomes_the_only_member_of_a_struct_and_back(compare: Compare) -> None:
    assert compare("__u32 a;", "struct { __u32 v; } a;").verdict == "lossless"
    assert compare("struct { __u32 v; } a;", "__u64 a;").verdict == "lossless"


def test_a_number_that_becomes_a_struct_of_two_needs_a_converter(compare: Compare) -> None:
    diff = compare("__u32 a;", "struct { __u32 v; __u32 w; } a;")
    assert diff.verdict == "needs-converter"
    assert diff.value is None


def test_text_that_becomes_a_number_needs_a_converter(compare: Compare) -> None:
    assert compare("char name[16];", "__u32 name;").verdict == "needs-converter"
    assert compare("__u32 name;", "char name[16];").verdict == "needs-converter"


def test_an_added_enum_value_is_lossless(compare: Compare) -> None:
    diff = compare("enum { A, B } e;", "enum { A, B, C } e;")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("e", "enum-added")])


def test_an_enum_value_with_a_new_number_is_carried_by_its_name(compare: Compare) -> None:
    diff = compare("enum { A, B } e;", "enum { A, X, B } e;")
    assert (diff.verdict, kinds(diff)) == ("lossy", [("e", "enum-changed"), ("e", "enum-added")])
    assert (diff.changes[0].old, diff.changes[0].new) == ("B = 1", "B = 2")
    assert diff.value is not None and diff.value.moves[0].names == ((0, 0), (1, 2))


def test_a_removed_enum_value_is_lossy(compare: Compare) -> None:
    diff = compare("enum { A, B } e;", "enum { A } e;")
    assert diff.verdict == "lossy"
    assert only(diff, "enum-removed").old == "B = 1"


def test_a_64_bit_enum_compares_like_the_others(compare: Compare) -> None:
    diff = compare("enum { A, B = 1ULL << 40 } e;", "enum { A, B = 1ULL << 40, C } e;")
    assert kinds(diff) == [("e", "enum-added")]


def test_a_union_that_stays_is_carried_through_other_changes(compare: Compare) -> None:
    union = "union { __u32 v4; __u8 v6[16]; } ip;"
    diff = compare(union, f"__u64 x; {union}")
    assert (diff.verdict, kinds(diff)) == ("lossless", [("x", "added"), ("ip", "moved")])


def test_a_union_that_gains_a_member_keeps_its_bytes(compare: Compare) -> None:
    diff = compare("union { __u32 v4; } ip;", "union { __u32 v4; __u8 v6[16]; } ip;")
    assert diff.verdict == "lossless"


def test_a_union_whose_member_changed_is_refused_by_name(compare: Compare) -> None:
    diff = compare("union { __u32 a; __u64 b; } u;", "union { __u64 a; __u64 b; } u;")
    assert diff.verdict == "needs-converter"
    assert "union member 'a' changed" in str(diff.changes[0].reason)


def test_an_anonymous_union_matches_by_its_members(compare: Compare) -> None:
    diff = compare("union { __u32 a; __u16 b; };", "__u32 x; union { __u32 a; __u16 b; };")
    assert diff.verdict == "lossless"


def test_members_of_an_anonymous_struct_are_members_of_the_outer(compare: Compare) -> None:
    assert compare("__u32 a; __u32 b;", "__u32 a; struct { __u32 b; };").verdict == "identical"


def test_bitfields_that_stay_are_carried_through_other_changes(compare: Compare) -> None:
    bits = "__u32 a:3; __u32 b:5; __u32 c:8;"
    diff = compare(f"{bits} __u32 x;", f"__u64 y; {bits} __u32 x;")
    assert diff.verdict == "lossless"


@pytest.mark.parametrize(
    ("new", "verdict", "found"),
    [
        ("__u32 a:4; __u32 b:4;", "lossless", [("a", "widened"), ("b", "moved")]),
        ("__u32 a:2; __u32 b:4;", "lossy", [("a", "narrowed"), ("b", "moved")]),
        ("__u32 b:4; __u32 a:3;", "lossless", [("b", "moved"), ("a", "moved")]),
        ("__u32 a:3; __u32 b:4; __u32 c:1;", "lossless", [("c", "added")]),
        ("__u32 a:3;", "lossy", [("b", "removed")]),
        ("__s32 a:3; __u32 b:4;", "lossy", [("a", "retyped")]),
        ("__u8 a; __u64 b;", "lossless", [("a", "widened"), ("b", "widened"), ("b", "moved")]),
        ("__u8 a[2]; __u32 b:4;", "needs-converter", [("a", "retyped"), ("b", "moved")]),
    ],
)
def test_bitfields_change_one_by_one(
    compare: Compare, new: str, verdict: str, found: list[tuple[str, str]]
) -> None:
    diff = compare("__u32 a:3; __u32 b:4;", new)
    assert (diff.verdict, sorted(kinds(diff))) == (verdict, sorted(found))


def test_a_pointer_is_carried_but_not_when_it_points_elsewhere(compare: Compare) -> None:
    assert compare("void *p;", "__u64 x; void *p;").verdict == "lossless"
    assert compare("void *p;", "struct sock *p;").verdict == "needs-converter"


def test_a_recursive_type_ends_at_its_pointer(compare: Compare) -> None:
    text = "struct value {{ struct value *next; {} x; }};"
    assert compare(text.format("__u32"), text.format("__u32")).verdict == "identical"
    assert compare(text.format("__u32"), text.format("__u64")).verdict == "lossless"


def test_a_pointer_to_a_kernel_object_is_lost_and_said_so(compare: Compare) -> None:
    pointer = 'struct task { int x; }; struct value { struct task TYPE_TAG("kptr") *t; '
    assert compare(pointer + "};", pointer + "};").verdict == "identical"
    diff = compare(pointer + "};", pointer + "__u64 x; };")
    assert diff.verdict == "lossy"
    assert only(diff, "kernel-pointer").loss == "the kernel object that it points to is not carried"


def test_a_lock_moves_without_loss_and_an_armed_timer_does_not(compare: Compare) -> None:
    lock = "struct bpf_spin_lock { __u32 val; }; struct value { struct bpf_spin_lock l; __u32 a; "
    timer = "struct bpf_timer { __u64 o[2]; }; struct value { struct bpf_timer t; __u32 a; "
    locked = compare(lock + "};", lock + "__u32 b; };")
    assert locked.verdict == "lossless"
    assert locked.value is not None and all(move.old_offset >= 4 for move in locked.value.moves)
    assert compare(timer + "};", timer + "__u32 b; };").verdict == "lossy"


def test_a_float_is_carried_at_the_same_size_only(a_map: MakeMap) -> None:
    # clang refuses floating point for BPF, so this BTF kind comes from kernels only.
    spec = a_map("struct value { __u64 x; };")

    def with_float(size: int, pad: int) -> MapSpec:
        fields = (Field("f", Float("f", size), 0), Field("x", Int("__u32", 4, False), 8 * (size + pad)))
        return msgspec.structs.replace(spec, value=Record("value", size + pad + 4, fields), value_size=size + pad + 4)

    assert diff_map(with_float(4, 0), with_float(4, 4)).verdict == "lossless"
    assert diff_map(with_float(4, 0), with_float(8, 0)).verdict == "needs-converter"


def test_bytes_without_a_meaning_are_equal_to_nothing_not_even_themselves(a_map: MakeMap) -> None:
    spec = msgspec.structs.replace(a_map("struct value { __u32 x; };"), value=Opaque("blob", 4))
    assert diff_map(spec, spec).verdict == "unknown"


def test_a_key_that_grows_is_converted_and_one_that_could_collide_is_not(a_map: MakeMap) -> None:
    value = "struct value { __u32 x; };"
    small, large = a_map(value, "__u32"), a_map(value, "__u64")
    grown = diff_map(small, large)
    assert grown.verdict == "lossless" and grown.key is not None and grown.value is None
    shrunk = diff_map(large, small)
    assert shrunk.verdict == "needs-converter"
    assert "two entries could become one" in str(shrunk.changes[0].reason)


def test_a_rule_for_a_key_field_begins_with_key(a_map: MakeMap) -> None:
    value = "struct value { __u32 x; };"
    old, new = (a_map(f"struct key {{ __u32 {name}; }}; {value}", "struct key") for name in ("a", "b"))
    diff = diff_map(old, new, MapRules(fields={"key.b": FieldRule("key.a")}))
    assert (diff.verdict, kinds(diff)) == ("lossless", [("key.b", "renamed")])


def test_a_map_without_types_is_unknown_even_if_the_sizes_agree(read: Read, a_map: MakeMap) -> None:
    blind = read(
        "struct { __uint(type, 1); __uint(max_entries, 64);"
        ' __uint(key_size, 4); __uint(value_size, 4); } m SEC(".maps");'
    )
    typed = a_map("struct value { __u32 x; };")
    assert diff_map(blind.maps[0], blind.maps[0]).verdict == "unknown"
    assert diff_map(blind.maps[0], typed).verdict == "unknown"
    assert "the value's type is not known on the new side" in str(diff_map(typed, blind.maps[0]).changes)


@pytest.mark.parametrize("kind", [3, 4, 17], ids=["prog_array", "perf_event_array", "xskmap"])
def test_a_map_whose_values_have_no_type_is_identical_by_its_sizes(a_map: MakeMap, kind: int) -> None:
    spec = MapSpec("m", MAP_TYPES[kind], 4, 4, 8)
    assert diff_map(spec, spec).verdict == "identical"
    diff = diff_map(spec, msgspec.structs.replace(spec, max_entries=16))
    assert diff.verdict == "not-carried"


def test_a_perf_event_array_that_is_resized_is_not_carried_and_says_why() -> None:
    old, new = MapSpec("r", "perf_event_array", 4, 4, 4), MapSpec("r", "perf_event_array", 4, 4, 8)
    diff = diff_map(old, new)
    assert diff.verdict == "not-carried"
    assert diff.changes[-1].loss == "all entries"
    assert diff.changes[-1].reason == ANSWERS["perf_event_array"].words


def test_a_ring_buffer_that_is_resized_loses_nothing_in_either_direction() -> None:
    small, large = MapSpec("r", "ringbuf", 0, 0, 4096), MapSpec("r", "ringbuf", 0, 0, 8192)
    assert [diff_map(small, large).verdict, diff_map(large, small).verdict] == ["lossless", "lossless"]
    assert only(diff_map(large, small), "max-entries").hint is None


def test_a_map_that_the_release_fills_is_not_carried_and_loses_nothing() -> None:
    old, new = MapSpec("j", "insn_array", 4, 4, 4), MapSpec("j", "insn_array", 4, 4, 8)
    diff = diff_map(old, new)
    assert (diff.verdict, [change.loss for change in diff.changes]) == ("not-carried", [None, None])


def test_the_value_of_a_device_map_is_the_kernels_whatever_type_it_was_given(a_map: MakeMap) -> None:
    old = msgspec.structs.replace(a_map("struct value { __u32 x; };"), type="devmap")
    new = MapSpec("m", "devmap", 4, 8, 64)
    assert diff_map(msgspec.structs.replace(old, key=None), new).verdict == "lossless"
    assert "no place" in str(diff_map(new, msgspec.structs.replace(old, key=None)).changes)


def test_a_type_that_came_after_this_version_is_not_carried() -> None:
    number = Int("__u32", 4, signed=False)
    old = MapSpec("x", "type99", 4, 4, 4, key=number, value=number)
    diff = diff_map(old, msgspec.structs.replace(old, max_entries=8))
    assert diff.verdict == "not-carried"
    assert diff.changes[-1].reason == "maps of type type99 are not known to this version"


def test_a_percpu_map_is_converted_as_any_other(a_map: MakeMap) -> None:
    old, new = (a_map(f"struct value {{ {text} }};", kind=5) for text in ("__u64 a;", "__u64 a; __u64 b;"))
    assert diff_map(old, old).verdict == "identical"
    assert diff_map(old, new).verdict == "lossless"


def test_more_entries_are_lossless_and_fewer_say_when(a_map: MakeMap) -> None:
    value = "struct value { __u32 x; };"
    small, large = a_map(value, entries=8), a_map(value, entries=16)
    assert diff_map(small, large).verdict == "lossless"
    shrunk = diff_map(large, small)
    assert shrunk.verdict == "lossless"
    assert only(shrunk, "max-entries").hint == "refused when there are more than 8 entries"


def test_an_array_that_shrinks_always_loses_its_last_elements(a_map: MakeMap) -> None:
    value = "struct value { __u32 x; };"
    diff = diff_map(a_map(value, kind=2, entries=16), a_map(value, kind=2, entries=8))
    assert diff.verdict == "lossy"


def test_flags_and_the_map_type_change_without_loss(a_map: MakeMap) -> None:
    value = "struct value { __u32 x; };"
    diff = diff_map(a_map(value), a_map(value, kind=9, more="__uint(map_flags, 2);"))
    assert diff.verdict == "lossless"
    assert kinds(diff) == [("", "map-type"), ("", "flags")]


def test_a_hash_that_becomes_an_array_loses_the_keys_beyond_it(a_map: MakeMap) -> None:
    value = "struct value { __u32 x; };"
    diff = diff_map(a_map(value), a_map(value, kind=2))
    assert diff.verdict == "lossy"
    assert only(diff, "map-type").loss == "entries whose key is 64 or more have no element"


def test_inner_maps_are_compared_too(read: Read) -> None:
    text = """struct inner {{ __uint(type, 1); __uint(max_entries, 4); __type(key, __u32); __type(value, {}); }};
    struct {{ __uint(type, 12); __uint(max_entries, 4); __type(key, __u32);
    __array(values, struct inner); }} m SEC(".maps");"""
    old, new = (read(text.format(kind)).maps[0] for kind in ("__u32", "__u64"))
    assert diff_map(old, old).verdict == "identical"
    diff = diff_map(old, new)
    assert diff.verdict == "lossless"
    assert kinds(diff) == [("inner.value", "widened")]
    back = diff_map(new, old)
    assert back.verdict == "lossy"
    assert only(back, "narrowed").loss == "inner.value: values outside 0 to 4294967295 do not fit"


OUTER = """struct inner {{ __uint(type, {type}); __uint(max_entries, {room}); __type(key, __u32); {value} }};
struct value {{ __u32 a; __u32 b; }}; {plain}
struct {{ __uint(type, 13); __uint(max_entries, 4); __type(key, __u32); __array(values, struct inner); }} m
SEC(".maps");"""
PLAIN = """struct { __uint(type, 1); __uint(max_entries, 1); __type(key, __u32); __type(value, struct value); } p
SEC(".maps");"""


@pytest.fixture
def outer(read: Read) -> MakeMap:
    """A hash of maps whose inner maps are of this type, size and value."""

    def make(value: str = "__type(value, struct value);", room: int = 8, kind: int = 1) -> MapSpec:
        maps = read(OUTER.format(value=value, room=room, type=kind, plain=PLAIN)).maps
        return next(spec for spec in maps if spec.name == "m")

    return make


def test_inner_maps_of_a_type_that_cannot_be_carried_make_the_outer_map_not_carried(outer: MakeMap) -> None:
    diff = diff_map(outer("__uint(value_size, 8);", kind=7), outer("__uint(value_size, 16);", kind=7))
    assert diff.verdict == "not-carried"
    change = only(diff, "not-carried")
    assert (change.path, change.loss) == ("inner", "inner: all entries")
    assert change.reason == "inner maps: its stacks cannot be written by anybody but the kernel"


def test_inner_maps_without_types_are_unknown_unless_nothing_else_changed(outer: MakeMap) -> None:
    diff = diff_map(outer("__uint(value_size, 8);"), outer("__uint(value_size, 8);", room=16))
    assert diff.verdict == "unknown"
    assert only(diff, "unknown").path == "inner.value"


def test_smaller_inner_maps_lose_nothing_unless_they_are_too_full(outer: MakeMap) -> None:
    diff = diff_map(outer(), outer(room=4))
    assert (diff.verdict, kinds(diff)) == ("lossless", [("inner", "max-entries")])


def test_rules_reach_fields_of_inner_maps_by_their_path(outer: MakeMap, read: Read) -> None:
    text = OUTER.replace("__u32 a; __u32 b;", "__u32 c; __u32 b;")
    maps = read(text.format(value="__type(value, struct value);", room=8, type=1, plain=PLAIN)).maps
    new = next(spec for spec in maps if spec.name == "m")
    assert diff_map(outer(), new).verdict == "lossy"
    diff = diff_map(outer(), new, MapRules(fields={"inner.c": FieldRule(was="inner.a")}))
    assert (diff.verdict, kinds(diff)) == ("lossless", [("inner.c", "renamed")])
    with pytest.raises(LayoutError, match=r"map 'm\.inner': no field 'd' in its value"):
        diff_map(outer(), new, MapRules(fields={"inner.d": FieldRule(was="inner.a")}))


def test_a_constant_section_that_changed_loses_nothing(read: Read) -> None:
    text = 'struct {{ __uint(type, 27); __uint(max_entries, 4096); }} r SEC(".maps"); const volatile {0} limit = 1;'
    text += 'SEC("xdp") int p(void *c) {{ return limit; }}'
    old, new = (read(text.format(kind)) for kind in ("int", "long"))
    (diff,) = [d for d in diff_maps(old.maps, new.maps, {}) if d.name == ".rodata"]
    assert (diff.verdict, diff.value) == ("lossless", None)


def test_maps_are_matched_by_name_and_the_rest_is_added_or_removed(a_map: MakeMap) -> None:
    spec = a_map("struct value { __u32 x; };")
    other = msgspec.structs.replace(spec, name="other")
    third = msgspec.structs.replace(spec, name="third")
    found = {d.name: d.verdict for d in diff_maps([spec, other], [spec, third])}
    assert found == {"m": "identical", "third": "added", "other": "removed"}


def test_a_renamed_map_is_followed_by_rule_and_by_tag_in_both_directions(a_map: MakeMap) -> None:
    spec = a_map("struct value { __u32 x; };")
    renamed = msgspec.structs.replace(spec, name="n")
    tagged = msgspec.structs.replace(renamed, tags=("hitless:was=m",))
    by_rule = diff_maps([spec], [renamed], {"n": MapRules(was="m")})
    assert [(d.name, d.was, d.verdict) for d in by_rule] == [("n", "m", "identical")]
    assert [(d.name, d.was) for d in diff_maps([spec], [tagged])] == [("n", "m")]
    assert [(d.name, d.was) for d in diff_maps([tagged], [spec])] == [("m", "n")]


def test_one_map_in_several_objects_is_one_map_unless_they_disagree(a_map: MakeMap) -> None:
    spec = a_map("struct value { __u32 x; };")
    assert len(diff_maps([spec, spec], [spec])) == 1
    with pytest.raises(LayoutError, match="two definitions"):
        diff_maps([spec, msgspec.structs.replace(spec, max_entries=1)], [spec])


def test_a_type_that_lies_about_the_maps_size_is_an_error(a_map: MakeMap) -> None:
    spec = a_map("struct value { __u32 x; };")
    with pytest.raises(LayoutError, match="8 bytes but the type"):
        diff_map(spec, msgspec.structs.replace(spec, value_size=8))


def test_a_default_that_its_field_cannot_hold_is_an_error(compare: Compare) -> None:
    with pytest.raises(LayoutError, match="300 does not fit"):
        compare("__u32 a;", '__u32 a; __u8 b TAG("hitless:default=300");')


def test_an_array_of_arrays_resizes_in_each_dimension(compare: Compare) -> None:
    diff = compare("__u16 a[2][3];", "__u16 a[3][4];")
    assert kinds(diff) == [("a", "resized"), ("a[]", "resized")]
