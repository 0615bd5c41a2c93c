"""Hooks of a network namespace take turns a thousand times under traffic, and each packet is counted once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.programs import Program
from hitless.upgrade.cutover import switch_hooks
from meshd.demo.lab import Lab
from tests.patience import often, patient
from tests.releases import write_release

REPLACEMENTS = often(1000)

SOURCES = {
    # Which socket a datagram belongs to is looked up once.
    "sk_lookup": """
SEC("sk_lookup") int count(struct bpf_sk_lookup *ctx)
{
    if (ctx->local_port == 4242)
        note();
    return SK_PASS;
}
""",
    # Who asks for the hash of a packet has the kernel look at what it is.
    "flow_dissector": """
#include <bpf/bpf_endian.h>
#include <linux/if_ether.h>
SEC("flow_dissector") int count(struct __sk_buff *ctx)
{
    struct { __u16 from, to; } ports;
    if (ctx->flow_keys->n_proto == bpf_htons(ETH_P_IP) &&
        !bpf_skb_load_bytes(ctx, ctx->flow_keys->thoff + 20, &ports, sizeof(ports)) && ports.to == bpf_htons(4242))
        note();
    return BPF_FLOW_DISSECTOR_CONTINUE;
}
SEC("tc") int ask(struct __sk_buff *ctx)
{
    bpf_set_hash_invalid(ctx);
    bpf_get_hash_recalc(ctx);
    return -1;
}
""",
}

COMMON = """
MAP(seen, ARRAY, 3, __u32, __u64);
static __always_inline void note(void)
{
    __u32 key = RELEASE;
    __u64 *found = bpf_map_lookup_elem(&seen, &key);
    if (found)
        __sync_fetch_and_add(found, 1);
}
%s
char _license[] SEC("license") = "GPL";
"""

ATTACH = """
[[attach]]
program = "count"
hook = "%s"
target = "${netns}"
link = "hook"
"""
ASK = """
[[attach]]
program = "ask"
hook = "tcx-ingress"
target = "lo"
netns = "${netns}"
link = "ask"
"""

# Every datagram comes back, so that none is dropped.
SENDER = """
import select, socket, sys
ends = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
ends[1].bind(("127.0.0.1", 4242))
sent = 0
print("go", flush=True)
while sent < 1_000_000 and not (sent % 16 == 0 and sent and select.select([0], [], [], 0)[0]):
    ends[0].sendto(b"x", ("127.0.0.1", 4242))
    ends[1].recv(1)
    sent += 1
print(sent, flush=True)
"""


def bundle(tmp_path: Path, hook: str, number: int, netns: str) -> hitless.Bundle:
    source = COMMON.replace("RELEASE", str(number)) % SOURCES[hook]
    manifest = ATTACH % hook + (ASK if hook == "flow_dissector" else "")
    path = write_release(tmp_path / str(number), f"{number}.0", source, manifest)
    return hitless.Bundle.load(path, {"netns": netns})


@pytest.mark.parametrize("hook", SOURCES)
def test_each_packet_is_counted_by_one_of_two_programs_that_took_turns_a_thousand_times(
    lab: Lab, tmp_path: Path, hook: str
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    releases = {number: bundle(tmp_path, hook, number, str(lab.netns)) for number in (1, 2)}
    hitless.apply(node, releases[1])
    sender = lab.popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert sender.stdout is not None
    assert sender.stdout.readline() == "go\n"
    result = hitless.apply(node, releases[2])
    assert {update.action for update in result.hooks} == {"update"}
    programs = [Program.open(generation / "progs" / "count") for generation in (node.current, node.previous)]
    for turn in range(REPLACEMENTS):
        there, comes = programs[turn % 2], programs[(turn + 1) % 2]
        update = msgspec.structs.replace(result.hooks[0], expected=there.info.id)
        switch_hooks([update], {update.program: comes}, node.links, node.current / "maps")
    hitless.apply(node, releases[1])
    sent = int(sender.communicate("\n", timeout=patient(10))[0])
    counted = [node.map("seen").get(number) for number in (1, 2)]
    assert sum(counted) == sent
    assert min(counted) > often(100)
    assert hitless.verify(node).problems == ()


def test_a_namespace_that_is_gone_is_named(lab: Lab, tmp_path: Path) -> None:
    gone = lab.scratch / "gone"
    with pytest.raises(hitless.NodeError, match=f"network namespace {gone} is not there"):
        hitless.apply(hitless.Node(lab.bpffs / "store"), bundle(tmp_path, "sk_lookup", 1, str(gone)))
