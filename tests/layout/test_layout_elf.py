"""Reading objects: everything that is in them, and a clear error for everything that is not right."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hitless.errors import HitlessError, LayoutError, UnsupportedError
from hitless.layout.btf import Btf
from hitless.layout.elf import Binding, for_old_libbpf, read_btf, read_object
from hitless.layout.model import Array, Field, Int, MapSpec, ObjectSpec, Ops, Pointer, ProgramSpec, Record
from hitless.layout.sections import SECTIONS, program_type
from tests.layout.by_hand import blob, item

Compile = Callable[..., bytes]
Read = Callable[..., ObjectSpec]

SOURCE = """
struct key { __u8 addr[16]; __be16 port; __u8 proto; __u8 pad; };
struct value { __u64 hits TAG("hitless:merge=sum"); __u64 last; };
struct { __uint(type, 1); __uint(max_entries, 1024); __uint(map_flags, 1); __uint(pinning, 1);
    __type(key, struct key); __type(value, struct value); } service SEC(".maps") TAG("hitless:was=vip");
struct { __uint(type, 27); __uint(max_entries, 4096); } events SEC(".maps");
struct { __uint(type, 1); __uint(max_entries, 8); __uint(key_size, 20); __uint(value_size, 16); } blind SEC(".maps");
struct { __uint(type, 3); __uint(max_entries, 2); __uint(key_size, 4);
    __array(values, int (void *)); } tails SEC(".maps");
struct inner { __uint(type, 2); __uint(max_entries, 3); __type(key, __u32); __type(value, __u64); };
struct { __uint(type, 13); __uint(max_entries, 5); __type(key, __u32);
    __array(values, struct inner); } outer SEC(".maps");
int global = 3; static volatile int hidden; __u64 counts[4]; const volatile __u32 limit = 9;
static __attribute__((noinline)) int helper(int x) { return x * hidden; }
SEC("cgroup/connect4") int connect4(void *ctx) {
    struct key k = {}; struct value v = {};
    __asm__ volatile("" :: "r"(&service), "r"(&events), "r"(&blind), "r"(&tails), "r"(&outer), "r"(&k), "r"(&v));
    counts[1] += limit; hidden = 1; return helper(global);
}
SEC("?sockops") int ops(void *ctx) { return 1; }
SEC("xdp_auth") int auth(void *ctx) { return 2; }
char LICENSE[] SEC("license") = "Dual BSD/GPL";
"""


@pytest.fixture(scope="session")
def data(compile_bpf: Compile) -> bytes:
    return compile_bpf(SOURCE)


@pytest.fixture(scope="session")
def spec(data: bytes) -> ObjectSpec:
    return read_object(data, "mesh.o")


def by_name(spec: ObjectSpec) -> dict[str, MapSpec]:
    return {item.name: item for item in spec.maps}


def test_a_map_is_read_with_its_layouts_and_tags(spec: ObjectSpec) -> None:
    byte, word, long = Int("__u8", 1, False), Int("__be16", 2, False), Int("__u64", 8, False)
    assert by_name(spec)["service"] == MapSpec(
        "service", "hash", 20, 16, 1024, 1,
        Record("key", 20, (
            Field("addr", Array(byte, 16), 0), Field("port", word, 128), Field("proto", byte, 144),
            Field("pad", byte, 152),
        )),
        Record("value", 16, (Field("hits", long, 0, 0, ("hitless:merge=sum",)), Field("last", long, 64))),
        pinned_by_name=True, tags=("hitless:was=vip",),
    )  # fmt: skip


def test_maps_without_types_keep_their_sizes(spec: ObjectSpec) -> None:
    maps = by_name(spec)
    assert maps["events"] == MapSpec("events", "ringbuf", 0, 0, 4096)
    assert maps["blind"] == MapSpec("blind", "hash", 20, 16, 8)
    assert maps["tails"] == MapSpec("tails", "prog_array", 4, 4, 2)


def test_an_inner_map_is_part_of_its_outer_map(spec: ObjectSpec) -> None:
    outer = by_name(spec)["outer"]
    assert (outer.type, outer.value_size) == ("hash_of_maps", 4)
    assert outer.inner is not None
    assert (outer.inner.type, outer.inner.max_entries, outer.inner.value) == ("array", 3, Int("__u64", 8, False))


def test_global_data_are_maps_with_each_variable_at_its_place(spec: ObjectSpec) -> None:
    maps = by_name(spec)
    bss = maps[".bss"].value
    assert isinstance(bss, Record)
    assert {field.name: field.offset for field in bss.fields} == {"counts": 0, "hidden": 256}
    assert (maps[".data"].flags, maps[".rodata"].flags, maps[".bss"].value_size) == (0x400, 0x480, 36)


def test_global_data_with_a_lock_are_not_to_be_mapped_into_memory(read: Read) -> None:
    spec = read(
        "struct bpf_spin_lock { int val; }; long other = 1;\n"
        'long held SEC(".data.a") = 1; struct bpf_spin_lock lock SEC(".data.a");'
        'struct { __uint(type, 1); __uint(max_entries, 1); __type(key, int); __type(value, int); } m SEC(".maps");'
    )
    maps = {one.name: one for one in spec.maps}
    assert (maps[".data.a"].flags, maps[".data"].flags) == (0, 0x400)


def test_programs_have_the_type_that_libbpf_gives_their_section(spec: ObjectSpec) -> None:
    assert spec.programs == (
        ProgramSpec("connect4", "cgroup/connect4", "cgroup_sock_addr", "cgroup_inet4_connect"),
        ProgramSpec("ops", "?sockops", "sock_ops", "cgroup_sock_ops", autoload=False),
        ProgramSpec("auth", "xdp_auth"),
    )
    assert spec.license == "Dual BSD/GPL"


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ("cgroup/connect6", ("cgroup_sock_addr", "cgroup_inet6_connect")),
        ("cgroup/getpeername4", ("cgroup_sock_addr", "cgroup_inet4_getpeername")),
        ("cgroup/sendmsg6", ("cgroup_sock_addr", "cgroup_udp6_sendmsg")),
        ("cgroup/recvmsg4", ("cgroup_sock_addr", "cgroup_udp4_recvmsg")),
        ("cgroup/connect_unix", ("cgroup_sock_addr", "cgroup_unix_connect")),
        ("cgroup/post_bind4", ("cgroup_sock", "cgroup_inet4_post_bind")),
        ("cgroup_skb/egress", ("cgroup_skb", "cgroup_inet_egress")),
        ("sk_skb/stream_verdict", ("sk_skb", "sk_skb_stream_verdict")),
        ("sk_msg", ("sk_msg", "sk_msg_verdict")),
        ("sk_lookup", ("sk_lookup", "sk_lookup")),
        ("tc", ("sched_cls", "")),
        ("tcx/egress", ("sched_cls", "tcx_egress")),
        ("xdp", ("xdp", "xdp")),
        ("iter/bpf_map_elem", ("tracing", "trace_iter")),
        ("fentry.s/do_exit", ("tracing", "trace_fentry")),
        ("kprobe", ("kprobe", "")),
        ("cgroup/connect4/mine", ("", "")),
        ("xdp_auth", ("", "")),
    ],
)
def test_a_section_name_means_what_libbpf_says(section: str, wanted: tuple[str, str]) -> None:
    assert program_type(section) == wanted


def test_every_section_of_the_table_finds_itself() -> None:
    for name, wanted in SECTIONS.items():
        assert program_type(name.replace("+", "/x")) == wanted


def test_a_type_can_be_bound_to_a_map_that_carries_none(data: bytes) -> None:
    bound = by_name(read_object(data, "mesh.o", {"blind": Binding("key", "struct value")}))["blind"]
    service = by_name(read_object(data, "mesh.o"))["service"]
    assert (bound.key, bound.value) == (service.key, service.value)


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        ({"blind": Binding("missing")}, "no type 'missing'"),
        ({"blind": Binding("value")}, "key is 20 bytes but type 'value' has 16"),
        ({"nothing": Binding("key")}, "no map nothing"),
    ],
)
def test_a_binding_that_cannot_be_is_an_error(data: bytes, bindings: dict[str, Binding], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        read_object(data, "mesh.o", bindings)


def test_types_are_found_by_name(data: bytes) -> None:
    btf = read_btf(data, "mesh.o")
    assert isinstance(btf.find("struct value"), Record)
    assert btf.find("__u64") == Int("__u64", 8, False)
    assert (btf.find("union value"), btf.find("nothing")) == (None, None)


def test_an_object_without_btf_says_how_to_get_it(compile_bpf: Compile) -> None:
    with pytest.raises(LayoutError, match=r"no \.BTF section: compile with clang -g"):
        read_object(compile_bpf(SOURCE, "-g0"), "mesh.o")


def test_an_object_without_maps_is_refused(compile_bpf: Compile) -> None:
    with pytest.raises(LayoutError, match=r"no \.maps section"):
        read_object(compile_bpf('SEC("xdp") int p(void *c) { return 2; }'), "mesh.o")


def test_legacy_map_definitions_are_refused_by_name(compile_bpf: Compile) -> None:
    with pytest.raises(UnsupportedError, match="legacy map definitions") as caught:
        read_object(compile_bpf('struct bpf_map_def { int type; } m SEC("maps") = { 1 };'), "mesh.o")
    assert caught.value.facts["feature"] == "legacy maps section"


def test_an_object_for_this_machine_is_refused(compile_bpf: Compile) -> None:
    with pytest.raises(LayoutError, match="for machine 62, not BPF"):
        read_object(compile_bpf("int x;", "-target", "x86_64-linux-gnu"), "mesh.o")


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n" * 20], ids=["empty", "four bytes", "script"])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(LayoutError):
        read_object(data, "mesh.o")


def test_an_object_cut_short_anywhere_is_refused(data: bytes) -> None:
    for size in range(0, len(data), 64):
        with pytest.raises(LayoutError):
            read_object(data[:size], "mesh.o")


def test_a_damaged_object_raises_only_our_errors(data: bytes) -> None:
    dice = random.Random(1)
    for _ in range(400):
        bad = bytearray(data)
        for _ in range(dice.randint(1, 8)):
            bad[dice.randrange(4, len(bad))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        try:
            read_object(bytes(bad), "mesh.o")
        except HitlessError as error:
            assert error.message.startswith("mesh.o")


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("__uint(max_entries, 1);", "has no type that is known"),
        ("__uint(type, 99);", "has no type that is known"),
        ("__uint(type, 1); __uint(colour, 1);", "unknown member 'colour'"),
        ("__uint(type, 1); __uint(key_size, 8); __type(key, __u32);", "key_size says 8 bytes but its type has 4"),
        ("__uint(type, 1); int max_entries;", "'max_entries' is not made with __uint"),
        ("__uint(type, 1); int key;", "'key' is not made with __type"),
        ("__uint(type, 1); __type(key, struct nowhere *); void *value;", "void"),
        ("__uint(type, 1); __array(values, int (void *));", "not for a map of type hash"),
        ("__uint(type, 3); __uint(value_size, 8); __array(values, int (void *));", "take 4 bytes, not 8"),
        ("__uint(type, 1); __uint(pinning, 2);", "pinning 2 is not known"),
    ],
)
def test_a_map_definition_that_makes_no_sense_is_an_error(compile_bpf: Compile, definition: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        read_object(compile_bpf(f'struct {{ {definition} }} m SEC(".maps");'), "mesh.o")


# BTF by hand, to lie in ways that clang does not.

INT32 = item(1, 1, 4, 32)


@pytest.mark.parametrize(
    ("btf", "message"),
    [
        (b"", "too few for a header"),
        (b"\0" * 24, "this is no BTF"),
        (blob(INT32)[:-1], "cut short"),
        (blob(INT32[:-1]), "cut short"),
        (blob(item(4, 1, 8, vlen=1000)), "cut short"),
        (blob(INT32, strings=b"ab"), "string table"),
        (blob(INT32, strings=b""), "string table"),
    ],
)
def test_btf_that_is_damaged_does_not_parse(btf: bytes, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Btf.parse(btf)


@pytest.mark.parametrize(
    ("btf", "message"),
    [
        (blob(item(8, 1, 1)), "contains itself"),
        (blob(item(4, 1, 8, 0, 1, 0, vlen=1)), "contains itself"),
        (blob(item(3, 0, 0, 1, 1, 4)), "contains itself"),
        (blob(item(4, 1, 8, 0, 99, 0, vlen=1)), "only 2"),
        (blob(item(4, 1, 2, 1, 2, 0, vlen=1), INT32), "lies outside its 2 bytes"),
        (blob(item(4, 1, 8, 1, 2, 3, vlen=1), INT32), "begins inside a byte"),
        (blob(item(4, 1, 8, 1, 2, 40 << 24, vlen=1, flag=1), INT32), "bitfield 'a' of 40 bits"),
        (blob(item(1, 1, 5, 40)), "claims a size of 5 bytes"),
        (blob(item(1, 99, 4, 32)), "outside the string table"),
        (blob(item(3, 0, 0, 2, 2, 0xFFFFFFFF), INT32), "claims 17179869180 bytes"),
        (blob(item(7, 1, 0)), "only declared"),
        (blob(item(13, 0, 0)), "a function"),
        (blob(item(17, 1, 2, 0xFFFFFFFF), INT32), "not a type"),
        (blob(item(2, 0, 1), INT32), None),
    ],
)
def test_btf_that_lies_is_found_out_when_the_type_is_used(btf: bytes, message: str | None) -> None:
    if message is None:
        assert Btf.parse(btf).find("a") == Int("a", 4, False)
        return
    with pytest.raises(LayoutError, match=message):
        Btf.parse(btf).layout(1)


def test_a_small_blob_that_unfolds_into_a_huge_tree_is_refused() -> None:
    doubling = [item(4, 1, 0, 1, n + 2, 0, 3, n + 2, 0, vlen=2) for n in range(40)]
    with pytest.raises(LayoutError, match="more than 100000 parts"):
        Btf.parse(blob(*doubling, item(4, 1, 0))).layout(1)


def test_btf_of_a_later_version_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="version 2"):
        Btf.parse(blob(INT32)[:2] + b"\2" + blob(INT32)[3:])
    with pytest.raises(UnsupportedError, match="kind 25"):
        Btf.parse(blob(item(25, 0, 0)))


def test_a_bitfield_from_before_the_kind_flag_is_read() -> None:
    btf = Btf.parse(blob(item(4, 1, 4, 1, 2, 0, 3, 2, 3, vlen=2), item(1, 0, 4, 3)))
    made = btf.layout(1)
    assert isinstance(made, Record)
    assert [(field.name, field.offset, field.bits) for field in made.fields] == [("a", 0, 3), ("b", 3, 3)]


TAILS = """
int one(void *c); int two(void *c);
struct inner { __uint(type, 1); __uint(max_entries, 4); __type(key, __u32); __type(value, __u64); } part SEC(".maps");
struct { __uint(type, 3); __uint(max_entries, 4); __uint(key_size, 4); __array(values, int (void *)); } jumps
    SEC(".maps") = { .values = { [1] = (void *)&one, [3] = (void *)&two } };
struct { __uint(type, 12); __uint(max_entries, 2); __type(key, __u32); __array(values, struct inner); } outer
    SEC(".maps") = { .values = { [1] = &part } };
SEC("xdp") int one(void *c) { return 1; }
SEC("xdp") int two(void *c) { return 2; }
"""


@pytest.mark.parametrize("target", ["bpfel", "bpfeb"])
def test_what_a_map_holds_from_the_start_is_read_with_its_places(compile_bpf: Compile, target: str) -> None:
    maps = by_name(read_object(compile_bpf(TAILS, "-target", target), "mesh.o"))
    assert maps["jumps"].slots == ((1, "one"), (3, "two"))
    assert maps["outer"].slots == ((1, "part"),)
    assert maps["outer"].inner is not None and maps["outer"].inner.value_size == 8


def test_a_pointer_names_its_target_and_its_type_tags(compile_bpf: Compile) -> None:
    source = 'struct t; struct holder { struct t TYPE_TAG("kptr") *p; const char *q; void **r; } v; ' + SOURCE
    made = read_btf(compile_bpf(source), "mesh.o").find("holder")
    assert isinstance(made, Record)
    targets = [field.type.target for field in made.fields if isinstance(field.type, Pointer)]
    assert targets == ["kptr struct t", "const char", "pointer to void"]


def test_the_running_kernels_own_types_are_read() -> None:
    btf = Btf.parse(Path("/sys/kernel/btf/vmlinux").read_bytes())
    made = btf.find("struct task_struct")
    assert isinstance(made, Record)
    assert any(field.name == "pid" for field in made.fields)


STRUCT_OPS = """
struct KIND { __u32 (*ssthresh)(void *sk); __u32 flags; char name[16]; };
SEC("struct_ops/half") __u32 half(__u64 *ctx) { return 10; }
SEC("SECTION") struct KIND link = { .ssthresh = (void *)half, .name = "gentle" };
"""


def ops_source(section: str = ".struct_ops.link", kind: str = "tcp_congestion_ops") -> str:
    return STRUCT_OPS.replace("SECTION", section).replace("KIND", kind)


@pytest.mark.parametrize("section", [".struct_ops", ".struct_ops.link"])
def test_a_struct_ops_map_is_read_with_its_own_name_and_needs_no_other_map(read: Read, section: str) -> None:
    spec = read(ops_source(section))
    assert [(one.name, one.type, one.ops) for one in spec.maps] == [
        ("link", "struct_ops", Ops("tcp_congestion_ops", "gentle"))
    ]
    assert [one.name for one in spec.hookable] == ["half", "link"]


def test_a_struct_ops_section_is_called_as_old_libbpf_calls_it_and_nothing_else_changes(compile_bpf: Compile) -> None:
    # The variable's name is the tail of the section's, where a linker may have put it.
    new = compile_bpf(ops_source() + 'const char text[] SEC(".rodata") = ".struct_ops.link";')
    old = for_old_libbpf(new)
    assert len(old) == len(new)
    assert read_object(old, "o") == read_object(new, "o")
    assert old.count(b".struct_ops.link") == 1
    assert for_old_libbpf(old) == old


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (ops_source(kind="bpf_dummy_ops"), "link is a bpf_dummy_ops, which the kernel cannot exchange in place"),
        (ops_source() + 'SEC(".struct_ops") struct tcp_congestion_ops other = { .name = "o" };', "into one section"),
        (ops_source(section="?.struct_ops.link"), "into one section"),
        (ops_source().replace('"gentle"', '""'), "its member `name`, and that is ''"),
        (ops_source().replace('"gentle"', '"a\\nb"'), "its member `name`"),
        (ops_source().replace("name", "other"), "has no member `name`"),
    ],
)
def test_struct_ops_that_cannot_be_exchanged_are_refused(read: Read, source: str, words: str) -> None:
    with pytest.raises((UnsupportedError, LayoutError), match=words):
        read(source)
