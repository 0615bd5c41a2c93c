"""What is fuzzed: each reader, and what a user does next with what it read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from hitless.bundle import MANIFEST, Bundle
from hitless.errors import BundleError, LayoutError, UnsupportedError
from hitless.layout import kmesh
from hitless.layout.btf import Btf
from hitless.layout.codec import Codec
from hitless.layout.diff import diff_maps
from hitless.layout.elf import read_object
from hitless.layout.model import MapSpec, ObjectSpec
from hitless.layout.show import show_diff, show_map, show_type
from hitless.layout.snapshot import dump, load
from tests.compilers import compiled

__all__ = ["REFUSALS", "Target", "seeds", "targets"]

#: Reads bytes, and raises one of REFUSALS if they are bad.
Target = Callable[[bytes], None]
REFUSALS = (LayoutError, UnsupportedError, BundleError)

ROOT = Path(__file__).parents[2]
EVERYTHING = ROOT / "tests" / "layout" / "everything.bpf.c"
RELEASES = ROOT / "src" / "meshd" / "bpf"

SMALL = """
#define SEC(name) __attribute__((section(name), used))
struct value { unsigned long long hits; int port; };
struct { int (*type)[1]; int (*max_entries)[8]; int *key; struct value *value; } service SEC(".maps");
struct { int (*type)[1]; int (*max_entries)[8]; int (*key_size)[4]; int (*value_size)[16]; } blind SEC(".maps");
int counter;
struct { int (*type)[3]; int (*max_entries)[4]; int (*key_size)[4]; int (*value_size)[4]; } jumps SEC(".maps");
struct { int (*type)[18]; int (*max_entries)[4]; int (*key_size)[4]; int (*value_size)[8]; } peers SEC(".maps");
SEC("sk_msg") int redirect(void *ctx) { return 1; }
SEC("xdp") int early(void *ctx) { return 2; }
SEC("netfilter") int guard(void *ctx) { return 1; }
SEC("uprobe/probed") int probed(void *ctx) { return 0; }
SEC("perf_event") int sampled(void *ctx) { return 0; }
SEC("tc") int late(void *ctx) { return -1; }
SEC("cgroup/connect4") int connect4(void *ctx) { counter++; return 1; }
SEC("sockops") int ops(void *ctx) { return 1; }
char LICENSE[] SEC("license") = "GPL";
"""
MANIFESTS = (
    b"""[bundle]
name = "mesh"
version = "1.0.0"
[[object]]
file = "small.bpf.o"
[[attach]]
program = "connect4"
hook = "cgroup"
target = "${cgroup}"
link = "connect4"
[map.service]
was = "old_service"
[map.service.field."hits"]
was = "count"
merge = "sum"
default = 0
[map.blind]
key = "int"
value = "struct value"
[map.gone]
on_loss = "discard"
[map.jumps.slots]
3 = "connect4"
[cutover]
consistency = "connection"
deadline = 2.5
""",
    b"""object = [{ file = "small.bpf.o" }]
attach = [
    { program = "connect4", hook = "cgroup", target = "/sys/fs/cgroup", link = "connect4", was = "old" }, # comment
    { program = "ops", hook = "cgroup", target = "${cgroup}/${cgroup}", link = "ops" },
    { program = "redirect", hook = "sk_msg", target = "peers", link = "redirect" },
    { program = "early", hook = "xdp", target = "eth*", netns = "${cgroup}*", mode = "generic", link = "early" },
    { program = "guard", hook = "netfilter", target = "*", family = "ipv6", point = "input", priority = 1, link = "n" },
    { program = "probed", hook = "uprobe", target = "${cgroup}:probed", link = "probed" },
    { program = "sampled", hook = "perf_event", target = "cpu-clock:1000000", link = "sampled" },
    { program = "early", hook = "xdp", by = "netlink", target = "eth0", adopt = true, link = "earlier" },
    { program = "late", hook = "tc-ingress", target = "eth0", priority = 7, handle = 1, link = "late" },
]
[bundle]
name = 'mesh'
version = "2.0.0-\xc3\xa9"
[map]
service = { on_loss = "discard", field = { hits = { merge = "max" }, port = { default = 7 } } }
blind.key = "int"
"small.bss".was = "small.data"
""",
)


def object_of(source: str, target: str = "bpf") -> bytes:
    """The object that clang makes of C source."""
    return compiled(["clang-19", "-target", target, "-g", "-O2", "-x", "c", "-c", "-o", "-", "-"], source)


def btf_of(data: bytes) -> bytes:
    """The .BTF section of an object."""
    found: Any = ELFFile(io.BytesIO(data)).get_section_by_name(".BTF")
    return bytes(found.data())


def seeds(name: str) -> list[bytes]:
    """Whole files of one format, from real objects."""
    if name == "manifest":
        return list(MANIFESTS)
    objects = [object_of(EVERYTHING.read_text()), object_of(SMALL), object_of(SMALL, "bpfeb")]
    if name == "elf":
        return objects
    objects += [file.read_bytes() for file in sorted(RELEASES.glob("*/*.bpf.o"))]
    if name == "btf":
        return [btf_of(data) for data in objects]
    write = kmesh.dump if name == "kmesh" else dump
    return [write({"o": read_object(data, "o")}) for data in objects]


def targets(folder: Path) -> dict[str, Target]:
    """Every target by name; ``folder`` is where the manifests are put, with an object beside them."""
    (folder / "small.bpf.o").write_bytes(object_of(SMALL))
    return {
        "elf": read_elf,
        "btf": lay_out,
        "snapshot": lambda data: read_snapshot(data, load),
        "kmesh": lambda data: read_snapshot(data, kmesh.load),
        "manifest": lambda data: read_manifest(folder, data),
    }


def read_elf(data: bytes) -> None:
    """An object that is accepted can be kept in a snapshot."""
    spec = read_object(data, "o")
    keep({"o": spec})
    use(spec.maps)


def keep(registry: dict[str, ObjectSpec]) -> None:
    """Write a snapshot and read it back."""
    try:
        same = load(dump(registry)) == registry
    except REFUSALS as error:
        raise AssertionError(f"what one reader accepts the other refuses: {error}") from error
    if not same:
        raise AssertionError("a snapshot is not what was put into it")


def use(maps: tuple[MapSpec, ...]) -> None:
    """Show maps, work out codecs, decode an entry of zeros, compare with itself."""
    for spec in maps:
        if not show_map(spec).replace("\n", "").isprintable():
            raise AssertionError(f"map {spec.name!r} is shown with characters that a terminal obeys")
        for made in (spec.key, spec.value):
            if made is not None and made.size < 1 << 16:
                codec = Codec(made)
                codec.encode(codec.decode(bytes(made.size)))
    for diff in diff_maps(maps, maps, {}):
        show_diff(diff)


def lay_out(data: bytes) -> None:
    """Every type of a blob: each is laid out and shown, or refused."""
    btf = Btf.parse(data)
    refusal = None
    for type_id in range(len(btf)):
        try:
            made = btf.layout(type_id)
        except REFUSALS as error:
            # Every blob has types without a layout, and an object's sections have no size before it is loaded.
            if not any(why in error.message for why in ("no layout", "is a tag", "lies outside section")):
                refusal = error
            continue
        if type_id % 8 == 0:
            show_type(made)
    btf.find("struct value")
    btf.sections()
    if refusal is not None:
        raise refusal


def read_snapshot(data: bytes, reader: Callable[[bytes], dict[str, ObjectSpec]]) -> None:
    """A snapshot that is accepted is the same after another round."""
    found = reader(data)
    keep(found)
    for spec in found.values():
        use(spec.maps)


def read_manifest(folder: Path, data: bytes) -> None:
    """A bundle with this manifest."""
    (folder / MANIFEST).write_bytes(data)
    Bundle.load(folder, {"cgroup": "/sys/fs/cgroup"})
