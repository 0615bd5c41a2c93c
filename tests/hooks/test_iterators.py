"""Iterators whose output anybody reads from their pin: every reader gets the whole output of one release."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.programs import Program, is_loaded
from hitless.upgrade.cutover import switch_hooks
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.patience import often, patient
from tests.releases import write_release

REPLACEMENTS = often(1000)
SOCKETS = 200

# One digit for each object, a line's end after the last; the one run after the last is counted.
SOURCE = """
struct bpf_iter_meta { struct seq_file *seq; } __attribute__((preserve_access_index));
struct bpf_iter__KIND { struct bpf_iter_meta *meta; struct OBJECT *OBJECT; } __attribute__((preserve_access_index));
MAP(seen, ARRAY, 3, __u32, __u64);
SEC("iter/KIND") int show(struct bpf_iter__KIND *ctx)
{
    __u32 key = RELEASE;
    __u64 *found = bpf_map_lookup_elem(&seen, &key);
    bpf_seq_write(ctx->meta->seq, ctx->OBJECT ? "RELEASE" : "\\n", 1);
    if (found && !ctx->OBJECT)
        __sync_fetch_and_add(found, 1);
    return 0;
}
char _license[] SEC("license") = "GPL";
"""
OBJECTS = {"tcp": "sk_common", "udp": "udp_sk", "task": "task", "cgroup": "cgroup"}
TARGETS = {"cgroup": "${cgroup}"}
ATTACH = """
[[attach]]
program = "show"
hook = "%s"
target = "%s"
link = "show"
"""

# It has sockets of its own for iterators over sockets, which show those of the reader's network namespace.
READER = f"""
import os, select, socket, sys
kinds = [socket.SOCK_STREAM, socket.SOCK_DGRAM] * {SOCKETS}
sockets = [socket.socket(socket.AF_INET, kind) for kind in kinds]
for one in sockets:
    one.bind(("127.0.0.1", 0))
    if one.type == socket.SOCK_STREAM:
        one.listen(1)
reads = mixed = cut = 0
sizes = set()
print("go", flush=True)
while reads < 1_000_000 and not (reads and select.select([0], [], [], 0)[0]):
    file, size = os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[2])
    parts = []
    while part := os.read(file, size):
        parts.append(part)
    os.close(file)
    text = b"".join(parts)
    reads += 1
    mixed += len(set(text.strip())) != 1
    cut += not text.endswith(b"\\n")
    sizes.add(len(parts))
print(reads, mixed, cut, max(sizes), flush=True)
"""


def bundle(lab: Lab, tmp_path: Path, kind: str, number: int) -> hitless.Bundle:
    source = SOURCE.replace("RELEASE", str(number)).replace("KIND", kind).replace("OBJECT", OBJECTS.get(kind, kind))
    manifest = ATTACH % ("iter-cgroup" if kind == "cgroup" else "iter", TARGETS.get(kind, kind))
    path = write_release(tmp_path / str(number), f"{number}.0", source, manifest)
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})


@pytest.mark.parametrize("kind", OBJECTS)
def test_readers_read_the_whole_output_of_one_of_two_programs_that_took_turns_a_thousand_times(
    lab: Lab, tmp_path: Path, kind: str
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    releases = {number: bundle(lab, tmp_path, kind, number) for number in (1, 2)}
    hitless.apply(node, releases[1])
    # The kernel does not let a pass over cgroups be read in parts.
    size = 1 << 15 if kind == "cgroup" else 16
    reader = lab.popen(
        [sys.executable, "-c", READER, str(node.links / "show"), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "go\n"
    result = hitless.apply(node, releases[2])
    (update,) = result.hooks
    assert (update.action, update.method) == (
        "update",
        "link in place; who is reading reads on by the old program",
    )
    programs = [Program.open(generation / "progs" / "show") for generation in (node.current, node.previous)]
    for turn in range(REPLACEMENTS):
        there, comes = programs[turn % 2], programs[(turn + 1) % 2]
        update = msgspec.structs.replace(result.hooks[0], expected=there.info.id)
        switch_hooks([update], {update.program: comes}, node.links, node.current / "maps")
    hitless.rollback(node)
    reads, mixed, cut, parts = map(int, reader.communicate("\n", timeout=patient(10))[0].split())
    assert (mixed, cut) == (0, 0)
    counted = [node.map("seen").get(number) for number in (1, 2)]
    assert sum(counted) == reads
    assert min(counted) > often(10)
    assert parts > (1 if kind != "cgroup" else 0)
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


def test_who_is_in_the_middle_reads_on_by_the_old_program(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, "task", 1))
    with (node.links / "show").open("rb", buffering=0) as early:
        assert early.read(1) == b"1"
        hitless.apply(node, bundle(lab, tmp_path, "task", 2))
        assert set((node.links / "show").read_bytes().strip()) == {ord("2")}
        assert set(early.read(1 << 15).strip()) == {ord("1")}


def test_an_iterator_is_gone_with_its_release(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, "cgroup", 1))
    with Program.open(node.current / "progs" / "show") as program:
        number = program.info.id
    hitless.unload(node)
    assert not is_loaded(number)


def test_an_iterator_over_one_map_is_refused(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(hitless.UnsupportedError, match="iterators over one map are not supported"):
        bundle(lab, tmp_path, "bpf_map_elem", 1)
