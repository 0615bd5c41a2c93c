"""Held connections whose ends are in a sockhash with a redirection: upgrades reach all of them, and none falls."""

from __future__ import annotations

from pathlib import Path

import pytest

import hitless
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.kernel.connections import CONNECTIONS, SERVER, clients
from tests.releases import write_release

UPGRADES = 100

# Every connection is noted by its ports, both ends; what one end sends goes straight to the other end's queue.
SOURCE = """
#include <bpf/bpf_endian.h>
struct ports { __u32 local, remote; };
MAP(peers, SOCKHASH, 4096, struct ports, __u64);
MAP(by_release, ARRAY, 3, __u32, __u64);
MAP(counted, HASH, 64, __u32, struct calls);
SEC("sockops") int note(struct bpf_sock_ops *ops)
{
    struct ports key = { .local = ops->local_port, .remote = bpf_ntohl(ops->remote_port) };
    if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB || ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        bpf_sock_hash_update(ops, &peers, &key, BPF_ANY);
    return 1;
}
SEC("sk_msg") int redirect(struct sk_msg_md *msg)
{
    struct ports key = { .local = bpf_ntohl(msg->remote_port), .remote = msg->local_port };
    __u32 release = RELEASE, port = PORT;
    __u64 *mine = bpf_map_lookup_elem(&by_release, &release);
    struct calls *found = bpf_map_lookup_elem(&counted, &port), none = {};
    if (!found) {
        bpf_map_update_elem(&counted, &port, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&counted, &port);
    }
    if (found)
        __sync_fetch_and_add(&found->calls, 1);
    if (mine)
        __sync_fetch_and_add(mine, 1);
    return bpf_msg_redirect_hash(msg, &peers, &key, BPF_F_INGRESS);
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
CALLS = {
    1: 'struct calls { __u32 calls TAG("merge=sum"); };',
    2: 'struct calls { __u64 since; __u64 calls TAG("merge=sum"); };',
}
BY_CONNECTION = """
[cutover]
consistency = "connection"
deadline = 0
"""
NOTE = """
[[attach]]
program = "note"
hook = "cgroup"
target = "${cgroup}"
link = "note"
"""
REDIRECT = """
[[attach]]
program = "redirect"
hook = "sk_msg"
target = "peers"
link = "redirect"
"""


def bundle(
    lab: Lab, tmp_path: Path, number: int, manifest: str = NOTE + REDIRECT, source: str = SOURCE
) -> hitless.Bundle:
    text = f"{CALLS[number]}\n{source.replace('RELEASE', str(number)).replace('PORT', str(SERVER))}"
    path = write_release(tmp_path / f"{number}-{len(manifest)}", f"{number}.0", text, manifest)
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})


@pytest.mark.parametrize(("rule", "upgrades"), [("", UPGRADES), (BY_CONNECTION, UPGRADES // 10)])
def test_five_hundred_connections_are_served_through_a_hundred_upgrades_by_the_release_that_runs(
    lab: Lab, tmp_path: Path, rule: str, upgrades: int
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    first, second = (bundle(lab, tmp_path, number, rule + NOTE + REDIRECT) for number in (1, 2))
    hitless.apply(node, first)
    with clients(lab, answers=True) as held:
        held.say(f"connect {CONNECTIONS}")
        held.say("run 0")
        for _ in range(upgrades // 2):
            for release in (second, first):
                result = hitless.apply(node, release, allow_loss=("counted",))
        assert {hook.link: hook.action for hook in result.hooks} == {"note": "update", "redirect": "update"}
        messages = held.say("stop")
        calls = 2 * messages  # there and back
        assert node.map("counted").get(SERVER)["calls"] == calls
        assert sum(node.map("by_release").get(number) for number in (1, 2)) == calls
        before = node.map("by_release").get(2)
        assert before > 1000
        held.say("rounds 3")
        assert node.map("by_release").get(2) == before
        assert node.map("counted").get(SERVER)["calls"] == calls + 6 * CONNECTIONS
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()
    hitless.rollback(node, allow_loss=("counted",))
    assert hitless.verify(node).problems == ()


def test_sockets_that_came_before_the_hook_are_given_it_and_lose_it_with_the_hook(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, 1, NOTE))
    with clients(lab, answers=True) as held:
        held.say(f"connect {CONNECTIONS}")
        held.say("rounds 2")
        assert node.map("by_release").get(1) == 0
        hitless.apply(node, bundle(lab, tmp_path, 2))
        held.say("rounds 2")
        assert node.map("by_release").get(2) == 4 * CONNECTIONS
        hitless.apply(node, bundle(lab, tmp_path, 1, NOTE), allow_loss=("counted",))
        held.say("rounds 2")
        assert [node.map("by_release").get(number) for number in (1, 2)] == [0, 4 * CONNECTIONS]
    assert not list((node.root / "slots").iterdir())
    assert hitless.verify(node).problems == ()


def test_an_upgrade_that_fails_after_the_cutover_gives_all_connections_back(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, 1))

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            raise ZeroDivisionError

    with clients(lab, answers=True) as held:
        held.say(f"connect {CONNECTIONS}")
        held.say("run 0")
        with pytest.raises(ZeroDivisionError):
            hitless.apply(node, bundle(lab, tmp_path, 2), progress=fail)
        calls = 2 * held.say("stop")
        assert node.map("counted").get(SERVER)["calls"] == calls
        before = node.map("by_release").get(2)
        held.say("rounds 2")
        assert node.map("by_release").get(2) == before
        assert node.map("by_release").get(1) == calls + 4 * CONNECTIONS - before


def test_a_sockhash_with_a_hook_that_becomes_another_map_is_refused_by_name(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, 1))
    larger = bundle(lab, tmp_path, 2, source=SOURCE.replace("SOCKHASH, 4096", "SOCKHASH, 8192"))
    with pytest.raises(hitless.UnsupportedError, match="map peers has hook redirect"):
        hitless.plan(node, larger)


def test_a_hook_of_sockets_needs_a_map_of_sockets(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(hitless.BundleError, match="is on a sockmap or sockhash of this bundle, which has: peers"):
        bundle(lab, tmp_path, 1, REDIRECT.replace('target = "peers"', 'target = "counted"'))
