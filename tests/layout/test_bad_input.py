"""Bad input, and what its owner is told: where it is, what is wrong, and what to do. Nothing is guessed."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hitless import Bundle, BundleError, HitlessError, LayoutError, UnsupportedError
from hitless.layout.btf import Btf
from hitless.layout.elf import read_object
from hitless.layout.model import ObjectSpec, Record
from hitless.layout.snapshot import dump, load
from tests.layout.by_hand import blob, item

Compile = Callable[..., bytes]
Read = Callable[..., ObjectSpec]

INT, PTR, ARRAY, STRUCT, UNION, FWD, TYPEDEF, CONST, FUNC, VAR, DATASEC = 1, 2, 3, 4, 5, 7, 8, 10, 12, 14, 15
NUMBER = item(INT, 1, 4, 32)
HUGE = 0xFFFFFFFF

TABLE = """
struct value { __u64 hits TAG("hitless:merge=sum"); __u32 seen TAG("hitless:default=7") TAG("hitless:was=age"); };
struct { __uint(type, 1); __uint(max_entries, 8); __type(key, __u32); __type(value, struct value); }
    table SEC(".maps") TAG("hitless:was=store");
struct { __uint(type, 1); __uint(max_entries, 8); __uint(key_size, 4); __uint(value_size, 8); } blind SEC(".maps");
"""
PROGRAM = 'SEC("cgroup/connect4") int connect4(void *ctx) { return 1; }'


# Types that lie


@pytest.mark.parametrize(
    ("types", "told"),
    [
        pytest.param([item(TYPEDEF, 1, 1)], "BTF: type 1 contains itself, so it has no size", id="typedef of itself"),
        pytest.param(
            [item(TYPEDEF, 1, 2), item(CONST, 0, 1)],
            "BTF: type 1 contains itself, so it has no size",
            id="typedef in a circle",
        ),
        pytest.param(
            [item(ARRAY, 0, 0, 1, 1, 4)], "BTF: type 1 contains itself, so it has no size", id="array of itself"
        ),
        pytest.param(
            [item(ARRAY, 0, 0, 2, 2, 0), item(TYPEDEF, 1, 3), item(ARRAY, 0, 0, 1, 1, 9)],
            "BTF: type 1 contains itself, so it has no size",
            id="arrays and a typedef in a circle",
        ),
        pytest.param(
            [item(STRUCT, 1, 8, 3, 1, 0, vlen=1)],
            "BTF: type 1 contains itself, so it has no size",
            id="struct in itself",
        ),
        pytest.param(
            [item(TYPEDEF, 1, 1 + n + 1) for n in range(70)],
            "BTF: type 66 is nested more than 64 deep",
            id="typedefs without end",
        ),
        pytest.param(
            [item(ARRAY, 0, 0, 2, 2, HUGE), item(INT, 1, 8, 64)],
            "BTF: type 1 claims 34359738360 bytes",
            id="array of a huge count",
        ),
        pytest.param(
            [item(STRUCT, 1, 8, 3, 2, HUGE, vlen=1), NUMBER],
            "BTF: struct a: member 'b' at bit 4294967295 begins inside a byte",
            id="member at a huge offset",
        ),
        pytest.param(
            [item(STRUCT, 1, 4, 3, 2, 8, vlen=1), NUMBER],
            "BTF: struct a: member 'b' at bit 8 lies outside its 4 bytes",
            id="member that sticks out",
        ),
        pytest.param(
            [item(STRUCT, 1, 8, 3, 2, 0, 3, 2, 32, vlen=2), NUMBER],
            "BTF: struct a has two members called 'b'",
            id="two members of one name",
        ),
        pytest.param(
            [item(STRUCT, 1, 8, 3, 2, 16, 1, 2, 0, vlen=2), NUMBER],
            "BTF: struct a: member 'a' at bit 0 overlaps 'b' at 16",
            id="two members in one place",
        ),
        pytest.param(
            [item(STRUCT, 1, 8, 3, 2, 0, 0, 3, 32, vlen=2), NUMBER, item(UNION, 0, 4, 3, 2, 0, vlen=1)],
            "BTF: struct a has two members called 'b'",
            id="a member called like one of an anonymous union",
        ),
        pytest.param(
            [item(STRUCT, 1, 4, 3, 77, 0, vlen=1)], "BTF: reference to type 77, but there are only 2", id="no such type"
        ),
        pytest.param(
            [item(STRUCT, 1, 4, 9, 2, 0, vlen=1), NUMBER],
            "BTF: string offset 9 is outside the string table",
            id="member name outside the strings",
        ),
        pytest.param([item(INT, HUGE, 4, 32)], f"BTF: string offset {HUGE} is outside the string table", id="name"),
        pytest.param([item(FWD, 1, 0)], "BTF: type 1 'a' is only declared and has no layout", id="forward declaration"),
    ],
)
def test_a_type_that_lies_is_refused_by_its_number(types: list[bytes], told: str) -> None:
    with pytest.raises(LayoutError) as caught:
        Btf.parse(blob(*types)).layout(1)
    assert caught.value.message.startswith(told)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (blob(NUMBER)[:20], "BTF: 20 bytes are too few for a header"),
        (blob(NUMBER)[:-1], "BTF: cut short: by its header the strings end at byte 45, but there are 44"),
        (blob(NUMBER[:-2]), "BTF: type 1 at byte 24 is cut short: the types end at byte 38"),
        (blob(item(STRUCT, 1, 4, vlen=HUGE & 0xFFFF)), "BTF: type 1 at byte 24 is cut short: the types end at byte 36"),
        (blob(NUMBER, item(31, 0, 0)), "BTF: type 2 at byte 40 has kind 31, which this parser does not know"),
        (blob(NUMBER, strings=b"\0a\0b"), "BTF: the string table does not begin and end with NUL"),
        (struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, HUGE, 0, 1) + b"\0",
         "BTF: cut short: by its header the types end at byte 4294967319, but there are 25"),
    ],
)  # fmt: skip
def test_a_blob_that_lies_is_refused_by_the_byte(data: bytes, told: str) -> None:
    with pytest.raises(HitlessError) as caught:
        Btf.parse(data)
    assert caught.value.message == told


def test_names_cannot_give_orders_to_a_terminal(compile_bpf: Compile) -> None:
    with pytest.raises(LayoutError, match=r"string at 1 has control characters: '\\x1b\[2J'"):
        Btf.parse(blob(NUMBER, strings=b"\0\x1b[2J\0")).layout(1)
    data = compile_bpf(TABLE).replace(b"table\0", b"ta/le\0")
    with pytest.raises(LayoutError, match=r"map 'ta/le': its name is no C identifier"):
        read_object(data, "mesh.o")
    data = compile_bpf(TABLE + 'SEC("xdp") int entry(void *ctx) { return 2; }').replace(b"entry\0", b"en\x1bry\0")
    with pytest.raises(LayoutError, match=r"program name 'en\\x1bry' is no C identifier"):
        read_object(data, "mesh.o")
    assert HitlessError("a \x1b[31m word").message == r"a \x1b[31m word"


# Objects that lie


def test_an_object_cut_short_says_which_part_is_missing(compile_bpf: Compile) -> None:
    data = compile_bpf(TABLE)
    with pytest.raises(LayoutError, match=r"section headers at byte \d+ end after its \d+ bytes"):
        read_object(data[:-1], "mesh.o")
    (headers,) = struct.unpack_from("<Q", data, 40)
    lying = bytearray(data)
    struct.pack_into("<Q", lying, headers + 64 + 32, 1 << 62)
    with pytest.raises(LayoutError, match=r"section 1 at byte \d+ has 4611686018427387904 bytes and ends after"):
        read_object(bytes(lying), "mesh.o")


def test_two_maps_of_one_name_are_refused(compile_bpf: Compile) -> None:
    data = compile_bpf(TABLE).replace(b"blind\0", b"table\0")
    with pytest.raises(LayoutError, match=r"mesh\.o: map 'table' is defined twice"):
        read_object(data, "mesh.o")


def test_statics_of_one_name_in_a_linked_object_keep_their_places_or_are_refused(
    compile_bpf: Compile, tmp_path: Path
) -> None:
    text = "static volatile int {0}[{1}], only_{2}; int get_{2}(void) {{ return {0}[1] + only_{2}; }}"
    linked = {}
    for what, names in {"different": ("one", "two"), "same": ("same", "same")}.items():
        files = []
        for index, name in enumerate(names):
            files.append(tmp_path / f"{what}-{index}.o")
            source = text.format(name, index + 2, "ab"[index]) + (TABLE if not index else "")
            files[-1].write_bytes(compile_bpf(source))
        out = tmp_path / f"{what}.o"
        subprocess.run(["bpftool", "gen", "object", out, *files], check=True, timeout=60)
        linked[what] = out.read_bytes()
    (bss,) = (one for one in read_object(linked["different"], "o").maps if one.name == ".bss")
    assert isinstance(bss.value, Record)
    places = {field.name: (field.offset // 8, field.type.size) for field in bss.value.fields}
    assert places == {"one": (0, 8), "only_a": (8, 4), "two": (12, 12), "only_b": (24, 4)}
    with pytest.raises(UnsupportedError, match=r"\.bss has two variables called 'same', .* rename one"):
        read_object(linked["same"], "o")


# Snapshots that lie


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b'"schema":1', b'"schema":2', "snapshot: schema 2 is not known, only 1 is"),
        (b'"name":"hits"', b'"name":"seen"', "map 'table': value: two fields are called 'seen'"),
        (b'"name":"blind"', b'"name":"table"', "object 'mesh.o': map 'table' is there twice"),
        (b'"offset":64', b'"offset":32', "map 'table': value: fields 'hits' and 'seen' overlap"),
        (b'"offset":64', b'"offset":99', "map 'table': value: field 'seen' lies outside its 16 bytes"),
        (b'"max_entries":8', b'"max_entries":-8', "map 'table': its sizes, entries, flags and extra are impossible"),
        (b'"value_size":16', b'"value_size":17', "map 'table': value is 17 bytes but its type has 16"),
        (b'"name":"hits"', b'"name":"\\u001b[2J"', r"map 'table': value: '\x1b[2J' has control characters"),
        (b'"size":8', b'"size":null', "snapshot: damaged: Expected `int`, got `null` - at `$.objects[...].maps[0]"),
    ],
)
def test_a_snapshot_that_lies_is_refused_and_says_where(read: Read, old: bytes, new: bytes, told: str) -> None:
    good = dump({"mesh.o": read(TABLE)})
    assert old in good
    with pytest.raises(HitlessError) as caught:
        load(good.replace(old, new, 1))
    assert told in caught.value.message


def test_a_snapshot_nested_without_end_is_refused(read: Read) -> None:
    good = dump({"mesh.o": read(TABLE)})
    leaf = b'{"type":"int","name":"__u64","size":8,"signed":false,"encoding":""}'
    assert leaf in good
    for depth in (70, 900, 100_000):
        deep = b'{"type":"array","count":1,"element":' * depth + leaf + b"}" * depth
        with pytest.raises(LayoutError, match=r"nested more than 64 deep|maximum recursion"):
            load(good.replace(leaf, deep, 1))


# Bundles that contradict themselves


@pytest.fixture
def bundle(compile_bpf: Compile, tmp_path: Path) -> Callable[..., Bundle]:
    """Rules (from line 6 of the manifest on), or C sources of several objects -> their bundle."""

    def load_it(rules: str = "", *sources: str) -> Bundle:
        files = []
        for index, source in enumerate(sources or (TABLE + PROGRAM,)):
            files.append(f"{'abc'[index]}.bpf.o")
            (tmp_path / files[-1]).write_bytes(compile_bpf(source))
        objects = "".join(f'[[object]]\nfile = "{file}"\n' for file in files)
        (tmp_path / "bundle.toml").write_text(f'[bundle]\nname = "mesh"\nversion = "1"\n{objects}{rules}')
        return Bundle.load(tmp_path)

    return load_it


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ('[map.tabel]\nwas = "x"', "toml:6: no object of this bundle has a map tabel; its maps: blind, table"),
        ('[map.table.field.hit]\nmerge = "sum"', "toml:6: map 'table': no field 'hit' in its value; it has hits, seen"),
        ('[map.table.field."hits[0]"]\nwas = "x"', "toml:6: map 'table': no field 'hits[0]' in its value"),
        ('[map.table.field."key.x"]\nwas = "x"', "toml:6: map 'table': no field 'key.x' in its key"),
        (
            '[map.blind.field.x]\nwas = "y"',
            "toml:6: map 'blind': a rule for 'x', but the type of its value is not known",
        ),
        ("[map.table.field.seen]\ndefault = 4294967296", "the default of 'seen': 4294967296 does not fit __u32"),
        ("[map.table.field.seen]\ndefault = 1.5", "the default of 'seen': want a number, got 1.5"),
    ],
)
def test_a_rule_for_what_is_not_there_is_refused_with_its_line(
    bundle: Callable[..., Bundle], rules: str, told: str
) -> None:
    with pytest.raises(BundleError) as caught:
        bundle(rules + "\n")
    assert told in caught.value.message


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ('[map.table]\nwas = "shop"', "the manifest says was = shop, but the tag in the source says was = store"),
        ('[map.table.field.hits]\nmerge = "max"', "field 'hits': the manifest says merge = max, but the tag"),
        ('[map.table.field.seen]\nwas = "old"', "field 'seen': the manifest says was = old, but the tag"),
        ("[map.table.field.seen]\ndefault = 8", "field 'seen': the manifest says default = 8, but the tag"),
    ],
)
def test_a_rule_that_contradicts_a_tag_is_refused(bundle: Callable[..., Bundle], rules: str, told: str) -> None:
    with pytest.raises(BundleError) as caught:
        bundle(rules + "\n")
    assert told in caught.value.message
    assert caught.value.message.endswith("make them agree")


def test_a_rule_that_says_what_the_tag_says_is_fine(bundle: Callable[..., Bundle]) -> None:
    rules = (
        '[map.table]\nwas = "store"\n[map.table.field.hits]\nmerge = "sum"\n'
        '[map.table.field.seen]\nwas = "age"\ndefault = 7\nmerge = "max"\n'
    )
    assert bundle(rules).rules["table"].fields["seen"].default == 7


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("max_entries, 8", "max_entries, 9", "(max_entries 8 and 9)"),
        ("__u32 seen", "__u64 seen", "(value.seen: widened"),
        ("__u32 seen", "__s32 seen", "(value.seen: retyped"),
        ("key, __u32", "key, __u64", "(key_size 4 and 8)"),
        ("merge=sum", "merge=max", "(the tags of value.hits)"),
        ("was=store", "was=shop", "(the tags of the map)"),
        ("__uint(type, 1)", "__uint(type, 9)", "(type hash and lru_hash)"),
    ],
)
def test_objects_that_define_one_map_differently_are_told_what_differs(
    bundle: Callable[..., Bundle], old: str, new: str, told: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        bundle("", TABLE, TABLE.replace(old, new, 1))
    assert caught.value.message.startswith("map table is defined differently by a and b (")
    assert told in caught.value.message.replace("(seen", "(value.seen")


def test_objects_that_define_one_map_in_other_words_share_it(bundle: Callable[..., Bundle]) -> None:
    other = TABLE.replace("struct value", "struct entry").replace("__u32 seen", "unsigned int seen")
    assert set(bundle("", TABLE, other).maps) == {"table", "blind"}


def test_two_programs_of_one_name_are_refused(bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(BundleError, match=r"toml:6: a and b both have a program called connect4: rename one"):
        bundle("", TABLE + PROGRAM, TABLE + PROGRAM)


def test_two_objects_of_one_name_are_refused(bundle: Callable[..., Bundle], tmp_path: Path) -> None:
    made = bundle()
    (tmp_path / "a.o").write_bytes(made.objects[0].data)
    with pytest.raises(BundleError, match=r"toml:6: two \[\[object\]\] are called a"):
        bundle('[[object]]\nfile = "a.o"\n')


def test_a_manifest_nested_without_end_is_refused(bundle: Callable[..., Bundle]) -> None:
    for text in ("x = " + "[" * 3000, "a." * 3000 + "a = 1", "x = " + "{ a = " * 1000):
        with pytest.raises(BundleError, match=r"nested too deeply"):
            bundle(text)


def test_a_manifest_cannot_forge_lines_of_output(bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(BundleError, match=r"toml:7: 'a\\n::error::b' has control characters") as caught:
        bundle('[map.table]\nwas = "a\\n::error::b"\n')
    assert caught.value.message.isprintable()


def test_every_bit_of_an_object_flipped_is_read_or_refused(compile_bpf: Compile) -> None:
    data, dice = compile_bpf(TABLE + PROGRAM, "-Xclang", "-debug-info-kind=constructor"), random.Random(3)
    for _ in range(300):
        at = dice.randrange(4, len(data))
        try:
            read_object(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :], "mesh.o")
        except (LayoutError, UnsupportedError) as error:
            assert error.message.startswith("mesh.o: ")
