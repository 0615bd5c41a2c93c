"""libbpf is the oracle for reading: what it says of an object or a BTF blob, we must say too, type by type."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cffi
import pytest
from elftools.elf.elffile import ELFFile

from hitless.errors import LayoutError
from hitless.layout.btf import Btf
from hitless.layout.elf import read_btf, read_object
from hitless.layout.model import Array, Enum, Float, Int, MapSpec, ObjectSpec, Pointer, Record, Type
from hitless.layout.sections import SECTIONS

Compile = Callable[..., bytes]

RELEASES = Path(__file__).parents[2] / "src" / "meshd" / "bpf"
VMLINUX = Path("/sys/kernel/btf/vmlinux")

# A binding of the test's own: the product's would share its mistakes.
ffi: Any = cffi.FFI()
ffi.cdef(
    """
    typedef uint32_t __u32;
    typedef uint64_t __u64;
    struct btf; struct bpf_object; struct bpf_map; struct bpf_program;

    struct btf_type { __u32 name_off; __u32 info; __u32 size; };
    struct btf_array { __u32 type; __u32 index_type; __u32 nelems; };
    struct btf_member { __u32 name_off; __u32 type; __u32 offset; };
    struct btf_enum { __u32 name_off; int32_t val; };
    struct btf_enum64 { __u32 name_off; __u32 val_lo32; __u32 val_hi32; };
    struct btf_var_secinfo { __u32 type; __u32 offset; __u32 size; };

    struct btf *btf__new(const void *data, __u32 size);
    void btf__free(struct btf *btf);
    __u32 btf__type_cnt(const struct btf *btf);
    const struct btf_type *btf__type_by_id(const struct btf *btf, __u32 id);
    const char *btf__name_by_offset(const struct btf *btf, __u32 offset);
    int64_t btf__resolve_size(const struct btf *btf, __u32 type_id);
    int btf__resolve_type(const struct btf *btf, __u32 type_id);

    struct bpf_object_open_opts { size_t sz; const char *object_name; bool relaxed_maps; };
    __u32 libbpf_major_version(void);
    __u32 libbpf_minor_version(void);
    void *libbpf_set_print(void *fn);
    struct bpf_object *bpf_object__open_mem(const void *buf, size_t size, const struct bpf_object_open_opts *opts);
    void bpf_object__close(struct bpf_object *obj);
    struct btf *bpf_object__btf(const struct bpf_object *obj);
    struct bpf_map *bpf_object__next_map(const struct bpf_object *obj, const struct bpf_map *map);
    struct bpf_program *bpf_object__next_program(const struct bpf_object *obj, struct bpf_program *prog);

    const char *bpf_map__name(const struct bpf_map *map);
    bool bpf_map__is_internal(const struct bpf_map *map);
    int bpf_map__type(const struct bpf_map *map);
    __u32 bpf_map__key_size(const struct bpf_map *map);
    __u32 bpf_map__value_size(const struct bpf_map *map);
    __u32 bpf_map__max_entries(const struct bpf_map *map);
    __u32 bpf_map__map_flags(const struct bpf_map *map);
    __u64 bpf_map__map_extra(const struct bpf_map *map);
    __u32 bpf_map__btf_key_type_id(const struct bpf_map *map);
    __u32 bpf_map__btf_value_type_id(const struct bpf_map *map);
    const char *bpf_map__pin_path(const struct bpf_map *map);
    struct bpf_map *bpf_map__inner_map(struct bpf_map *map);

    const char *bpf_program__name(const struct bpf_program *prog);
    const char *bpf_program__section_name(const struct bpf_program *prog);
    int bpf_program__type(const struct bpf_program *prog);
    int bpf_program__expected_attach_type(const struct bpf_program *prog);
    bool bpf_program__autoload(const struct bpf_program *prog);

    const char *libbpf_bpf_map_type_str(int type);
    const char *libbpf_bpf_prog_type_str(int type);
    const char *libbpf_bpf_attach_type_str(int type);
    int libbpf_prog_type_by_name(const char *name, int *prog_type, int *attach_type);
    """
)
lib: Any = ffi.dlopen("libbpf.so.1")


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """libbpf's printing is the whole process's: hitless has it as it was, once these tests are over."""
    previous = lib.libbpf_set_print(ffi.NULL)
    yield
    lib.libbpf_set_print(previous)


INT, PTR, ARRAY, STRUCT, UNION, ENUM = 1, 2, 3, 4, 5, 6
DATASEC, FLOAT, DECL_TAG, ENUM64 = 15, 16, 17, 19

EVERYTHING = (Path(__file__).parent / "everything.bpf.c").read_text()
NO_DATA = 'struct { __uint(type, 2); __uint(max_entries, 1); __type(key, int); __type(value, long); } m SEC(".maps");'
KCONFIG = """
#define __kconfig __attribute__((section(".kconfig")))
#define __weak __attribute__((weak))
extern int LINUX_KERNEL_VERSION __kconfig;
extern _Bool CONFIG_BPF __kconfig __weak;
extern char CONFIG_DEFAULT_HOSTNAME[16] __kconfig __weak;
extern unsigned long CONFIG_HZ __kconfig __weak;
extern char CONFIG_LOCALVERSION[9] __kconfig __weak;
SEC("xdp") int told(void *ctx)
{ return LINUX_KERNEL_VERSION + CONFIG_HZ + CONFIG_BPF + CONFIG_DEFAULT_HOSTNAME[0] + CONFIG_LOCALVERSION[0]; }
"""
SOURCES = {"everything": EVERYTHING, "no data": NO_DATA, "kconfig": NO_DATA + KCONFIG}


class Tally:
    """What was compared, for the line that a run prints."""

    def __init__(self) -> None:
        self.types = self.members = self.maps = self.programs = 0

    def __str__(self) -> str:
        return f"{self.types} types, {self.members} members, {self.maps} maps, {self.programs} programs"


class Raw(NamedTuple):
    kind: int
    flag: bool
    vlen: int
    name: str
    size: int
    items: Any


class Oracle:
    """libbpf's view of one BTF blob. Reading members is libbpf's own inline functions, by the book."""

    def __init__(self, handle: Any) -> None:
        assert handle != ffi.NULL
        self.handle = handle

    def __len__(self) -> int:
        return int(lib.btf__type_cnt(self.handle))

    def size(self, type_id: int) -> int:
        """Bytes of the type, negative if it has no size."""
        return int(lib.btf__resolve_size(self.handle, type_id))

    def text(self, offset: int) -> str:
        return bytes(ffi.string(lib.btf__name_by_offset(self.handle, offset))).decode()

    def raw(self, type_id: int) -> Raw:
        it = lib.btf__type_by_id(self.handle, type_id)
        return Raw(it.info >> 24 & 0x1F, bool(it.info >> 31), it.info & 0xFFFF, self.text(it.name_off), it.size, it + 1)


@contextmanager
def opened_btf(data: bytes) -> Iterator[Oracle]:
    handle = lib.btf__new(data, len(data))
    try:
        yield Oracle(handle)
    finally:
        lib.btf__free(handle)


@contextmanager
def opened(data: bytes) -> Iterator[Any]:
    name = ffi.new("char[]", b"o")
    opts = ffi.new("struct bpf_object_open_opts *", {"sz": ffi.sizeof("struct bpf_object_open_opts")})
    opts.object_name = name
    handle = lib.bpf_object__open_mem(data, len(data), opts)
    assert handle != ffi.NULL, f"libbpf does not open it: errno {ffi.errno}"
    try:
        yield handle
    finally:
        lib.bpf_object__close(handle)


def compare_types(ours: Btf, oracle: Oracle, tally: Tally) -> None:
    """Every type id: libbpf gives it a size exactly if we give it a layout, and they are the same."""
    assert len(ours) == len(oracle)
    for type_id in range(1, len(ours)):
        size = oracle.size(type_id)
        raw = oracle.raw(type_id)
        if raw.kind == DATASEC:
            continue  # empty until it is linked; compared with the map that it becomes
        try:
            made = ours.layout(type_id)
        except LayoutError as error:
            # To libbpf a tag has the size of what it is on; to us it is no type.
            assert size < 0 or raw.kind == DECL_TAG, f"type {type_id} {raw.name!r} has {size} bytes, we say: {error}"
        else:
            assert made.size == size, f"type {type_id} {raw.name!r}"
            compare_type(made, raw, oracle, tally)
        tally.types += 1


def compare_type(made: Type, raw: Raw, oracle: Oracle, tally: Tally) -> None:
    if raw.kind in (STRUCT, UNION):
        assert isinstance(made, Record)
        assert (made.name, made.union, len(made.fields)) == (raw.name, raw.kind == UNION, raw.vlen)
        members = ffi.cast("struct btf_member *", raw.items)
        for field, member in zip(made.fields, ffi.unpack(members, raw.vlen), strict=True):
            offset, bits = (member.offset & 0xFFFFFF, member.offset >> 24) if raw.flag else (member.offset, 0)
            assert (field.name, field.offset, field.bits) == (oracle.text(member.name_off), offset, bits), raw.name
            assert field.type.size == oracle.size(member.type), f"{raw.name}.{field.name}"
            tally.members += 1
    elif raw.kind == ARRAY:
        assert isinstance(made, Array)
        item = ffi.cast("struct btf_array *", raw.items)
        assert made.element.size == oracle.size(item.type)
        assert made.count == item.nelems or not made.element.size
    elif raw.kind in (ENUM, ENUM64):
        assert isinstance(made, Enum)
        assert (made.name, made.signed) == (raw.name, raw.flag)
        assert made.values == tuple(enumerators(raw, oracle))
    elif raw.kind == INT:
        assert isinstance(made, Int)
        (word,) = ffi.unpack(ffi.cast("__u32 *", raw.items), 1)
        assert (made.name, made.signed, made.encoding == "bool") == (
            raw.name, bool(word >> 24 & 1), bool(word >> 24 & 4),
        )  # fmt: skip
    elif raw.kind in (PTR, FLOAT):
        assert isinstance(made, Pointer if raw.kind == PTR else Float)


def enumerators(raw: Raw, oracle: Oracle) -> Iterator[tuple[str, int]]:
    if raw.kind == ENUM:
        for item in ffi.unpack(ffi.cast("struct btf_enum *", raw.items), raw.vlen):
            yield oracle.text(item.name_off), item.val if raw.flag else item.val & 0xFFFFFFFF
        return
    for item in ffi.unpack(ffi.cast("struct btf_enum64 *", raw.items), raw.vlen):
        whole = item.val_hi32 << 32 | item.val_lo32
        yield oracle.text(item.name_off), int(ffi.cast("int64_t", whole)) if raw.flag else whole


def compare_maps(spec: ObjectSpec, handle: Any, ours: Btf, oracle: Oracle, tally: Tally) -> None:
    left = {item.name: item for item in spec.maps}
    at = lib.bpf_object__next_map(handle, ffi.NULL)
    while at != ffi.NULL:
        name = bytes(ffi.string(lib.bpf_map__name(at))).decode()
        internal = bool(lib.bpf_map__is_internal(at))
        # libbpf puts the object's name before .bss and the like.
        item = left.pop(name.removeprefix("o") if internal else name)
        compare_map(item, at, ours, oracle, tally)
        if internal:
            compare_variables(item, oracle.raw(lib.bpf_map__btf_value_type_id(at)), oracle)
        at = lib.bpf_object__next_map(handle, at)
    assert not left


def compare_map(item: MapSpec, at: Any, ours: Btf, oracle: Oracle, tally: Tally) -> None:
    assert item.type == ffi.string(lib.libbpf_bpf_map_type_str(lib.bpf_map__type(at))).decode()
    for what, got, call in (
        ("key_size", item.key_size, lib.bpf_map__key_size),
        ("value_size", item.value_size, lib.bpf_map__value_size),
        ("max_entries", item.max_entries, lib.bpf_map__max_entries),
        ("map_flags", item.flags, lib.bpf_map__map_flags),
        ("map_extra", item.extra, lib.bpf_map__map_extra),
        ("pinning", item.pinned_by_name, lambda one: lib.bpf_map__pin_path(one) != ffi.NULL),
    ):
        assert got == call(at), f"{item.name}: {what}"
    internal = bool(lib.bpf_map__is_internal(at))
    for what, made, type_id in (
        ("key", item.key, lib.bpf_map__btf_key_type_id(at)),
        ("value", item.value, lib.bpf_map__btf_value_type_id(at)),
    ):
        if internal:
            continue  # its key is an int that libbpf gives no type, its value is compared by variable
        assert (made is not None) == (type_id > 0), f"{item.name}: {what}"
        if made is not None:
            assert made == ours.layout(type_id), f"{item.name}: {what}"
            assert made.size == oracle.size(type_id), f"{item.name}: {what}"
    tally.maps += 1
    inner = lib.bpf_map__inner_map(at)
    assert (item.inner is not None) == (inner != ffi.NULL), item.name
    if item.inner is not None:
        compare_map(item.inner, inner, ours, oracle, tally)


def compare_variables(item: MapSpec, raw: Raw, oracle: Oracle) -> None:
    assert raw.kind == DATASEC
    assert raw.size == item.value_size
    assert isinstance(item.value, Record), item.name
    places = sorted(
        (oracle.raw(place.type).name, 8 * place.offset, place.size)
        for place in ffi.unpack(ffi.cast("struct btf_var_secinfo *", raw.items), raw.vlen)
    )
    assert sorted((field.name, field.offset, field.type.size) for field in item.value.fields) == places, item.name


def compare_programs(spec: ObjectSpec, handle: Any, tally: Tally) -> None:
    left = {item.name: item for item in spec.programs}
    at = lib.bpf_object__next_program(handle, ffi.NULL)
    while at != ffi.NULL:
        item = left.pop(ffi.string(lib.bpf_program__name(at)).decode())
        # The question mark is how C asks for no autoload; libbpf takes it away, we show the section as it is.
        assert item.section.removeprefix("?") == ffi.string(lib.bpf_program__section_name(at)).decode()
        assert item.autoload == lib.bpf_program__autoload(at), item.section
        kind, attach = lib.bpf_program__type(at), lib.bpf_program__expected_attach_type(at)
        compare_kinds(item.section, (item.type, item.attach_type), (kind, attach))
        tally.programs += 1
        at = lib.bpf_object__next_program(handle, at)
    assert not left


def compare_kinds(section: str, ours: tuple[str, str], theirs: tuple[int, int]) -> None:
    kind = ffi.string(lib.libbpf_bpf_prog_type_str(theirs[0])).decode()
    attach = ffi.string(lib.libbpf_bpf_attach_type_str(theirs[1])).decode()
    # To libbpf no attach type is 0, which is cgroup_inet_ingress to those that have one.
    assert ours[0] == (kind if theirs[0] else ""), section
    assert ours[1] == attach or (not ours[1] and not theirs[1]), section


def compare_object(data: bytes, tally: Tally) -> None:
    spec, ours = read_object(data, "o"), read_btf(data, "o")
    with opened(data) as handle:
        oracle = Oracle(lib.bpf_object__btf(handle))
        compare_types(ours, oracle, tally)
        compare_maps(spec, handle, ours, oracle, tally)
        compare_programs(spec, handle, tally)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("flags", [(), ("-O1",), ("-mcpu=v1",)], ids=["plain", "O1", "v1"])
def test_objects_with_everything_are_read_as_libbpf_reads_them(
    compile_bpf: Compile, source: str, flags: tuple[str, ...]
) -> None:
    tally = Tally()
    compare_object(compile_bpf(source, *flags), tally)
    print(f"agreed with libbpf: {tally}")


def test_types_of_the_other_byte_order_are_read_as_libbpf_reads_them(compile_bpf: Compile) -> None:
    data = compile_bpf(EVERYTHING, "-target", "bpfeb")
    # libbpf swaps bytes of BTF, but opens no such object.
    found: Any = ELFFile(io.BytesIO(data)).get_section_by_name(".BTF")
    tally = Tally()
    with opened_btf(found.data()) as oracle:
        compare_types(read_btf(data, "o"), oracle, tally)
    print(f"agreed with libbpf, big-endian: {tally}")


def test_the_daemons_releases_are_read_as_libbpf_reads_them() -> None:
    files = sorted(RELEASES.glob("*/*.bpf.o"))
    assert len(files) >= 7, "the daemon's programs are not compiled"
    tally = Tally()
    for file in files:
        compare_object(file.read_bytes(), tally)
    print(f"agreed with libbpf: {len(files)} objects, {tally}")


def test_the_running_kernels_types_are_read_as_libbpf_reads_them() -> None:
    data = VMLINUX.read_bytes()
    start = time.perf_counter()
    ours = Btf.parse(data)
    walk = time.perf_counter() - start
    tally = Tally()
    with opened_btf(data) as oracle:
        compare_types(ours, oracle, tally)
    seconds = time.perf_counter() - start
    print(f"agreed with libbpf: {tally}; the walk took {walk * 1e3:.0f} ms, laying out and comparing {seconds:.1f} s")
    assert tally.types > 100_000


def test_the_table_of_sections_is_libbpfs() -> None:
    # libbpf 1.1 cannot know these, which came later; 1.7 knows all.
    newer = {
        "kprobe.session+", "uprobe.session+", "uprobe.session.s+", "netfilter", "struct_ops.s+", "tc/ingress",
        "tc/egress", "tcx/ingress", "tcx/egress", "netkit/primary", "netkit/peer", "uprobe.multi+", "uprobe.multi.s+",
        "uretprobe.multi+", "uretprobe.multi.s+", "usdt.s+", "sk_skb/verdict",
    }  # fmt: skip
    unknown = set()
    kind, attach = ffi.new("int *"), ffi.new("int *")
    for name, ours in SECTIONS.items():
        if lib.libbpf_prog_type_by_name(name.replace("+", "/x").encode(), kind, attach):
            unknown.add(name)
        else:
            compare_kinds(name, ours, (kind[0], attach[0]))
    version = (lib.libbpf_major_version(), lib.libbpf_minor_version())
    assert {name for name in unknown if "_unix" not in name} <= (newer if version < (1, 7) else set())
    print(f"agreed with libbpf: {len(SECTIONS) - len(unknown)} section names")
