"""Types from debug information: BTF of the same types, which the same compiler wrote, is the measure."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hitless.bundle import Bundle
from hitless.errors import HitlessError, LayoutError
from hitless.layout.diff import diff_map
from hitless.layout.dwarf import Dwarf
from hitless.layout.elf import Binding, read_btf, read_object
from hitless.layout.model import MapSpec
from hitless.layout.show import show_map

Compile = Callable[..., bytes]

TYPES = """
typedef __u64 nanoseconds;
struct far;
enum small { A, B = 5 }; enum large { L = 1ULL << 40 }; enum negative { N = -1, P };
struct part { char text[3]; _Bool on; signed char s; };
union either { __u32 q; __u8 raw[16]; };
typedef struct { __u32 x; } nameless;
struct service_key { __be32 addr; __be16 port; __u16 pad; };
struct __attribute__((packed)) tight { __u8 a; __u64 b; };
struct service_value {
    const volatile nanoseconds since TAG("hitless:merge=max"); struct part parts[2][3]; enum small e; enum large g;
    enum negative n; __u32 f1:3, f2:7; __s64 f3:40; union { int i; char *p; }; union either u; nameless no;
    struct service_value *next; const struct far *f; void **v; unsigned __int128 wide; struct tight t;
    struct far TYPE_TAG("kptr") *k; struct { __u8 inner; }; __u32 last[];
};
"""
NAMES = (
    "service_value", "service_key", "part", "either", "nameless", "tight", "small", "large", "negative", "nanoseconds",
    "struct part", "union either", "enum small",
)  # fmt: skip
SIZED = """
struct {
    __uint(type, 1); __uint(max_entries, 4); __uint(key_size, 8); __uint(value_size, sizeof(struct service_value));
} km_service SEC(".maps");
static void *(*lookup)(void *, const void *) = (void *)1;
SEC("xdp") int use(void *c) {
    struct service_key key = { 1, 2, 0 };
    struct service_value *value = lookup(&km_service, &key);
    return value ? value->f1 : 0;
}
"""


@pytest.mark.parametrize("flags", [(), ("-gdwarf-4",), ("-gdwarf-3",), ("-target", "bpfeb")])
def test_debug_information_tells_the_same_types_as_btf(compile_bpf: Compile, flags: tuple[str, ...]) -> None:
    variables = "struct service_value one; struct service_key two; nanoseconds three; union either four; nameless five;"
    data = compile_bpf(TYPES + variables + SIZED, "-Wno-everything", *flags)
    dwarf, btf = Dwarf.parse(data, "a.o"), read_btf(data, "a.o")
    for name in NAMES:
        assert dwarf.find(name) == btf.find(name) is not None, name
    assert set(dwarf.names()) >= {"service_value", "nanoseconds", "nameless", "either"}
    assert (dwarf.find("missing"), dwarf.find("union part")) == (None, None)


def test_a_map_with_sizes_only_is_bound_to_a_type_that_only_the_debug_information_has(compile_bpf: Compile) -> None:
    data = compile_bpf(TYPES + SIZED, "-Wno-everything")
    assert read_btf(data, "a.o").find("service_value") is None
    bound = read_object(data, "a.o", {"km_service": Binding("service_key", "service_value")}).maps[0]
    assert bound.key is not None and bound.value is not None
    assert (bound.key.name, bound.key.size, bound.value.size) == ("service_key", 8, bound.value_size)
    assert diff_map(bound, bound).verdict == "identical"
    with pytest.raises(LayoutError, match="no type 'gone' in the object's BTF or debug information"):
        read_object(data, "a.o", {"km_service": Binding("gone")})


def test_damaged_debug_information_is_an_error_of_ours(compile_bpf: Compile) -> None:
    data = bytearray(compile_bpf(TYPES + SIZED, "-Wno-everything"))
    dice = random.Random(5)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(20):
            broken[dice.randrange(64, len(broken))] = dice.randrange(256)
        try:
            Dwarf.parse(bytes(broken), "a.o").find("service_value")
        except HitlessError:
            refused += 1
    assert refused


def infer(compile_bpf: Compile, types: str, accept: bool) -> MapSpec:
    # Globals put the types into BTF, as functions of the object that take them would.
    source = types + (
        'struct { __uint(type, 1); __uint(max_entries, 4); __uint(key_size, 8); __uint(value_size, 4); }'
        ' km_service SEC(".maps");'
    )
    return read_object(compile_bpf(source), "a.o", {"km_service": Binding(infer=accept)} if accept else None).maps[0]


ONE = "struct service_key { __u64 a; } k; struct service_value { __u32 b; } v;"


def test_a_type_that_alone_fits_by_size_and_name_is_proposed_and_the_layout_stays_unknown(compile_bpf: Compile) -> None:
    spec = infer(compile_bpf, ONE, accept=False)
    assert (spec.key, spec.value) == (None, None)
    assert spec.inferred == (("key", "service_key"), ("value", "service_value"))
    diff = diff_map(spec, spec)
    assert diff.verdict == "unknown"
    assert diff.changes[0].hint == (
        'service_key alone fits by size and name: if it is that, say key = "service_key" or infer = true'
    )


def test_an_accepted_proposal_gives_the_type_and_is_shown_as_inferred(compile_bpf: Compile) -> None:
    spec = infer(compile_bpf, ONE, accept=True)
    assert spec.key is not None and spec.key.name == "service_key"
    diff = diff_map(spec, spec)
    assert diff.verdict == "identical"
    assert [(c.path, c.kind, c.old, c.new) for c in diff.changes] == [
        ("key", "inferred", "service_key", "service_key"), ("value", "inferred", "service_value", "service_value"),
    ]  # fmt: skip
    grown = infer(compile_bpf, ONE.replace("__u32 b", "__u16 b, c"), accept=True)
    changed = diff_map(spec, grown)
    assert changed.verdict == "lossy"
    assert changed.value is not None


def test_what_was_inferred_is_shown_as_such(compile_bpf: Compile) -> None:
    assert "value (inferred): struct service_value {" in show_map(infer(compile_bpf, ONE, accept=True))
    proposed = show_map(infer(compile_bpf, ONE, accept=False))
    assert "value: 4 bytes, type not known; service_value alone fits by size and name" in proposed


def test_a_manifest_accepts_it_map_by_map(compile_bpf: Compile, tmp_path: Path) -> None:
    (tmp_path / "a.bpf.o").write_bytes(compile_bpf(TYPES + SIZED, "-Wno-everything"))
    manifest = '[bundle]\nname = "a"\nversion = "1"\n[[object]]\nfile = "a.bpf.o"\n'
    (tmp_path / "bundle.toml").write_text(manifest)
    assert Bundle.load(tmp_path).maps["km_service"].value is None
    (tmp_path / "bundle.toml").write_text(manifest + "[map.km_service]\ninfer = true\n")
    assert Bundle.load(tmp_path).maps["km_service"].inferred == (("key", "service_key"), ("value", "service_value"))


@pytest.mark.parametrize(
    "types",
    [
        "struct service_value { __u32 b; } v; struct km_service_value { __u32 c; } w;",
        "struct service_value { __u64 b; } v;",
        "struct backend_value { __u32 b; } v;",
        "struct value { __u32 b; } v;",
    ],
    ids=["two fit", "size differs", "name differs", "no name of the map"],
)
def test_what_does_not_fit_alone_is_not_proposed_and_cannot_be_accepted(compile_bpf: Compile, types: str) -> None:
    types += "struct service_key { __u64 a; } k;"
    assert infer(compile_bpf, types, accept=False).inferred == (("key", "service_key"),)
    with pytest.raises(LayoutError, match="infer: no type, or more than one, fits its value of 4 bytes by name"):
        infer(compile_bpf, types, accept=True)


def test_what_is_accepted_may_come_from_the_debug_information(compile_bpf: Compile) -> None:
    data = compile_bpf(TYPES + SIZED, "-Wno-everything")
    spec = read_object(data, "a.o", {"km_service": Binding(infer=True)}).maps[0]
    assert spec.inferred == (("key", "service_key"), ("value", "service_value"))
    assert spec.value is not None
