"""Types written back as BTF: read again as what they were, and taken by the kernel."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from hitless.errors import LayoutError
from hitless.kernel.maps import Map, btf_bytes, create_as
from hitless.layout.btf import Btf
from hitless.layout.btf_writer import write_btf
from hitless.layout.model import Array, Enum, Field, Int, MapSpec, Opaque, Pointer, Record, Type

VMLINUX = Path("/sys/kernel/btf/vmlinux")
U32, U64 = Int("__u32", 4, False), Int("__u64", 8, False)
STATE = Enum("state", 4, True, (("GONE", -1), ("HERE", 1)))
WIDE = Enum("wide", 8, False, (("MOST", 1 << 63),))
TEXT = Array(Int("char", 1, True, "char"), 8)
ENTRY = Record(
    "entry",
    48,
    (
        Field("sign", Int("sign_t", 1, True, "char"), 0),
        Field("state", STATE, 32),
        Field("low", U32, 64, 3),
        Field("high", U32, 67, 29),
        Field("", Record("", 8, (Field("seen", U64, 0), Field("name", TEXT, 0)), True), 128),
        Field("wide", WIDE, 192),
        Field("on", Int("_Bool", 1, False, "bool"), 256),
        Field("owner", Pointer("struct owner"), 320),
    ),
)


def without_tags(made: Type) -> Type:
    if isinstance(made, Array):
        return Array(without_tags(made.element), made.count)
    if isinstance(made, Record):
        fields = (msgspec.structs.replace(each, type=without_tags(each.type), tags=()) for each in made.fields)
        return msgspec.structs.replace(made, fields=tuple(fields))
    return made


def test_what_is_written_is_read_as_the_same_types() -> None:
    written = write_btf(U32, ENTRY)
    assert written is not None
    found = Btf.parse(written.data)
    assert [found.layout(each) for each in written.ids] == [U32, ENTRY]


def test_so_are_the_structs_of_the_kernel_itself() -> None:
    kernel = Btf.parse(VMLINUX.read_bytes())
    same = untold = 0
    for name in itertools.islice(sorted(set(kernel.names())), 0, None, 5):
        try:
            made = kernel.find(name)
        except LayoutError:  # a typedef of void, or of a function
            continue
        assert made is not None
        written = write_btf(made)
        if written is None:
            untold += 1
        else:
            assert Btf.parse(written.data).layout(written.ids[0]) == without_tags(made), name
            same += 1
    print(f"{same} structs, unions and typedefs are the same, {untold} have what only their own BTF can tell")
    assert same > 1000


@pytest.mark.parametrize(
    "made",
    [
        Opaque("", 8),
        Pointer("kptr struct owner"),
        Pointer("__u32"),
        Record("a.b", 0, ()),
        Enum("state", 4, False, (("at home", 1),)),
    ],
)
def test_what_only_its_own_btf_could_tell_is_not_written(made: Type) -> None:
    assert write_btf(U32, Record("held", 8, (Field("it", Array(made, 1), 0),))) is None


def test_the_kernel_tells_the_types_that_a_map_was_made_with() -> None:
    with create_as(MapSpec("typed", "hash", 4, ENTRY.size, 8, key=U32, value=ENTRY)) as made:
        found = made.spec("typed")
        assert (found.key, found.value) == (U32, ENTRY)
        kept = Btf.parse(btf_bytes(made.info.btf_id))
        assert kept.layout(made.info.value_type_id) == ENTRY


def test_a_map_of_unknown_types_has_none() -> None:
    with create_as(MapSpec("untyped", "hash", 4, 8, 8, key=U32, value=Opaque("", 8))) as made:
        assert isinstance(made, Map)
        assert made.info.btf_id == 0


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("array", Enum("slot", 4, False, (("FIRST", 0),)), U64),  # it wants a number
        ("percpu_array", Record("slot", 4, (Field("at", U32, 0),)), U64),
        ("lpm_trie", U64, U64),  # it wants a struct
        ("devmap", U32, U32),  # it takes none
        ("percpu_hash", U32, Record("late", 16, (Field("timer", Record("bpf_timer", 16, ()), 0),))),  # no timers there
    ],
)
def test_a_map_whose_types_the_kernel_refuses_has_none(kind: str, key: Type, value: Type) -> None:
    flags = 1 if kind == "lpm_trie" else 0  # BPF_F_NO_PREALLOC
    with create_as(MapSpec("refused", kind, key.size, value.size, 8, flags, key=key, value=value)) as made:
        assert made.info.btf_id == 0
