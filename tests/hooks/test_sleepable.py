"""Programs that may sleep: what one that slept over the cutover writes when it wakes up is in the new release."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import hitless
from meshd.demo.lab import Lab
from tests.kernel.pages import Page
from tests.releases import write_release

SOURCE = """
struct bpf_iter__task { void *meta, *task; };
MAP(where, ARRAY, 1, __u32, __u64);
MAP(counted, HASH, 64, __u32, struct calls);
SEC("iter.s/task") int show(struct bpf_iter__task *ctx)
{
    __u32 key = 0;
    __u64 *address = bpf_map_lookup_elem(&where, &key);
    struct calls *found = bpf_map_lookup_elem(&counted, &key);
    char byte;
    if (ctx->task || !found)
        return 0;
    if (address && *address)
        bpf_copy_from_user(&byte, 1, (void *)*address);
    __sync_fetch_and_add(&found->calls, 1);
    return 0;
}
char _license[] SEC("license") = "GPL";
"""
CALLS = {
    1: 'struct calls { __u32 calls TAG("merge=sum"); };',
    2: 'struct calls { __u64 since; __u64 calls TAG("merge=sum"); };',
}
ATTACH = """
[[attach]]
program = "show"
hook = "iter"
target = "task"
link = "show"
"""


def bundle(tmp_path: Path, number: int) -> hitless.Bundle:
    return hitless.Bundle.load(
        write_release(tmp_path / str(number), f"{number}.0", CALLS[number] + SOURCE, ATTACH), {}
    )


def test_what_a_sleeping_program_writes_after_the_cutover_is_not_lost(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(tmp_path, 1))
    node.map("counted")[0] = {"calls": 1}
    with Page() as page:
        node.map("where")[0] = page.address
        reader = threading.Thread(target=(node.links / "show").read_bytes)
        reader.start()
        page.wait()
        given: list[float] = []

        def give(event: hitless.Progress) -> None:
            if event.step == "catch-up" and not given:
                given.append(time.monotonic())
                threading.Timer(0.5, page.give).start()

        hitless.apply(node, bundle(tmp_path, 2), progress=give)
        assert time.monotonic() - given[0] >= 0.5
        reader.join(5)
    assert node.map("counted").get(0)["calls"] == 2
    assert hitless.verify(node).problems == ()
