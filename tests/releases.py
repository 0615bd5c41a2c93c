"""Small real releases for tests: C compiled by clang, with a manifest, in a directory of the test's own."""

from __future__ import annotations

import platform
from pathlib import Path

from tests.compilers import compiled

HEADER = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#define TAG(text) __attribute__((btf_decl_tag("hitless:" text)))
#define MAP(name, kind, entries, key_type, value_type) \\
    struct { __uint(type, BPF_MAP_TYPE_##kind); __uint(max_entries, entries); \\
             __type(key, key_type); __type(value, value_type); } name SEC(".maps")
"""

# Counts connects by port: written by the program on every one.
COUNTING = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u32 port = __builtin_bswap16(ctx->user_port);
    struct tally *found = bpf_map_lookup_elem(&tally, &port);
    if (!found) {
        struct tally none = {};
        bpf_map_update_elem(&tally, &port, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&tally, &port);
    }
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""

FIRST = """
struct tally { __u32 count TAG("merge=sum"); __u32 last; __u8 label[6]; };
struct limit { __u32 rate; __u16 burst; };
MAP(tally, HASH, 1024, __u32, struct tally);
MAP(limit, HASH, 64, __u32, struct limit);
MAP(owner, HASH, 64, __u32, __u64);
"""

# A field in front and in the middle, widened, renamed; a map renamed; a map more; another size.
SECOND = """
struct tally { __u64 since; __u64 count TAG("merge=sum"); __u8 label[6]; __u32 port TAG("was=last"); };
struct limit { __u32 rate; __u16 class TAG("default=3"); __u32 burst; };
MAP(tally, HASH, 2048, __u32, struct tally);
MAP(limits, HASH, 64, __u32, struct limit);
MAP(owner, HASH, 64, __u32, __u64);
MAP(extra, ARRAY, 4, __u32, __u64);
"""

ATTACH = """
[[attach]]
program = "count4"
hook = "cgroup"
target = "${cgroup}"
link = "connect4"
"""


def compile_object(source: str, target: Path) -> Path:
    """Compile BPF C to ``target``, with its source beside it."""
    target.with_suffix(".c").write_text(HEADER + source)
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    command = ["clang-19", "-target", "bpf", "-g", "-O2", "-Wall", "-Werror", include, "-x", "c", "-", "-c", "-o", "-"]
    target.write_bytes(compiled(command, HEADER + source))
    return target


def write_release(directory: Path, version: str, source: str, manifest: str = ATTACH, name: str = "store") -> Path:
    """A bundle with one object in ``directory``; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    compile_object(source, directory / "store.bpf.o")
    head = f'[bundle]\nname = "{name}"\nversion = "{version}"\n\n[[object]]\nfile = "store.bpf.o"\n'
    (directory / "bundle.toml").write_text(head + manifest)
    return directory
