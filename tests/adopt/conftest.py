"""A node that another loader made: it pins maps by their names and links where it likes, without hitless."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.bundle import unite_maps
from hitless.kernel.libbpf import check, lib
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, load_object
from hitless.layout.elf import read_object
from hitless.public import version_number
from meshd.demo.lab import Lab
from tests.releases import write_release

# As Kmesh declares its maps: sizes only.
BARE = """
#define BARE(name, kind, entries, key_type, value_type) \\
    struct { __uint(type, BPF_MAP_TYPE_##kind); __uint(max_entries, entries); \\
             __uint(key_size, sizeof(key_type)); __uint(value_size, sizeof(value_type)); } name SEC(".maps")
"""
OLD = BARE + """
struct tally { __u32 count; __u32 last; };
struct tally *kept;  // so that the compiler keeps the type
BARE(tally, HASH, 4096, __u32, struct tally);
BARE(version_of, ARRAY, 1, __u32, __u32);
BARE(idle, HASH, 16, __u32, __u64);
__u64 calls;
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u32 port = __builtin_bswap16(ctx->user_port);
    struct tally *found = bpf_map_lookup_elem(&tally, &port);
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    __sync_fetch_and_add(&calls, 1);
    bpf_map_lookup_elem(&version_of, &port);
    bpf_map_lookup_elem(&idle, &port);
    return kept != (void *)1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
NEW = OLD.replace("__u32 count; __u32 last;", "__u64 since; __u64 count; __u32 last;")
MANIFEST = """
[public]
maps = "map"
version_map = "version_of"

[map.idle]
key = "__u32"
value = "__u64"

[map.version_of]
key = "__u32"
value = "__u32"

[map.tally]
key = "__u32"
value = "tally"
field.count.merge = "sum"

[[attach]]
program = "count4"
hook = "cgroup"
target = "${cgroup}"
link = "connect4"
pin = "sockconn/connect_prog"
"""


class Loader:
    """The daemon's own loader: it uses what is pinned already, or fails; what is not there it makes and pins."""

    def __init__(self, root: Path, cgroup: Path) -> None:
        self.root = root
        self.link = "sockconn/connect_prog"
        self._cgroup = cgroup

    def start(self, data: bytes, version: str) -> list[str]:
        """Run the object, as after any start of the daemon; returns the names of the maps that were there."""
        (self.root / "map").mkdir(parents=True, exist_ok=True)
        (self.root / "sockconn").mkdir(exist_ok=True)
        spec = read_object(data, "tally")
        there = {}
        for one in (one for one in spec.maps if "." not in one.name):
            path = self.root / "map" / one.name
            if path.exists():
                there[one.name] = found = Map(pinned(path))
                seen = found.info
                assert (seen.key_size, seen.value_size, seen.max_entries) == (
                    one.key_size, one.value_size, one.max_entries,
                ), f"{path} is another map: its contents are gone"  # fmt: skip
        sections = {name: one for name, one in unite_maps([spec]).items() if "." in name}
        loaded = load_object(data, "tally", there, sections)
        for name, held in loaded.maps.items():
            if "." not in name and name not in there:
                held.pin(self.root / "map" / name)
        loaded.maps["version_of"].update(bytes(4), version_number(version).to_bytes(4, "little"))
        program = loaded.programs["count4"]
        if (self.root / self.link).exists():
            with Link(pinned(self.root / self.link)) as link, Program.by_id(link.info.program_id) as old:
                link.update(program, old)
            return sorted(there)
        fd = os.open(self._cgroup, os.O_RDONLY)
        try:
            with Link.attach(program, fd, "cgroup_inet4_connect", self._cgroup) as link:
                link.pin(self.root / self.link)
        finally:
            os.close(fd)
        return sorted(there)


def pinned(path: Path) -> int:
    """A descriptor of what is pinned there, as any loader gets it."""
    return check(lib().bpf_obj_get(os.fsencode(path)), "BPF_OBJ_GET", path)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two releases of the daemon, as somebody describes them to hitless: tallies have 8 bytes, and then 24."""
    top = tmp_path_factory.mktemp("adopt")
    return {
        1: write_release(top / "1", "1.0", OLD, MANIFEST),
        2: write_release(top / "2", "2.0", NEW, MANIFEST),
    }


@pytest.fixture
def release(bundles: dict[int, Path], lab: Lab) -> Callable[[int], hitless.Bundle]:
    """Release 1 or 2."""
    return lambda number: hitless.Bundle.load(bundles[number], {"cgroup": str(lab.cgroup_of("clients"))})


@pytest.fixture
def loader(lab: Lab, release: Callable[[int], hitless.Bundle]) -> Loader:
    """The daemon's loader, which has started release 1 and filled its maps."""
    made = Loader(lab.bpffs / "daemon", lab.cgroup_of("clients"))
    made.start(release(1).objects[0].data, "1.0")
    with Map(pinned(made.root / "map" / "tally")) as held:
        for port in (80, 443, *range(1000, 3000)):
            held.update(port.to_bytes(4, "little"), (port * 3).to_bytes(4, "little") + (port * 7).to_bytes(4, "little"))
    return made


@pytest.fixture
def node(loader: Loader) -> hitless.Node:
    """The daemon's directory."""
    return hitless.Node(loader.root)


def connect(lab: Lab, port: int, count: int) -> None:
    """Connects from within the cgroup, which nobody answers."""
    code = (
        "import socket\n"
        f"for _ in range({count}):\n"
        "    one = socket.socket()\n"
        f"    one.connect_ex(('127.0.0.1', {port}))\n"
        "    one.close()\n"
    )
    assert lab.run_python("-c", code, cgroup="clients").returncode == 0
