"""Held connections whose ends are in a sockhash with a redirection: upgrades reach all of them, and none falls."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

import hitless
from hitless.kernel import dispatcher
from hitless.kernel.dispatcher import Dispatcher
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.kernel.sockets import list_sockets
from hitless.upgrade import finish, transaction
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.bpf import ids
from tests.kernel.connections import CONNECTIONS, SERVER, attach_the_old_way, clients
from tests.patience import often, patient
from tests.releases import write_release

UPGRADES = often(100)
RESHAPED = int(os.environ.get("HITLESS_UPGRADES", often(50)))

# Every connection is noted by its ports, both ends; what one end sends goes straight to the other end's queue.
SOURCE = """
#include <bpf/bpf_endian.h>
struct ports { __u32 local, remote; };
MAP(peers, SOCKHASH, 4096, struct ports, __u64);
MAP(by_release, ARRAY, 3, __u32, __u64);
MAP(counted, HASH, 64, __u32, struct calls);
SEC("sockops") int note(struct bpf_sock_ops *ops)
{
    struct ports key;
    __builtin_memset(&key, 0, sizeof(key));
    key.local = ops->local_port;
    key.remote = bpf_ntohl(ops->remote_port);
    if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB || ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        bpf_sock_hash_update(ops, &peers, &key, BPF_ANY);
    return 1;
}
SEC("sk_msg") int redirect(struct sk_msg_md *msg)
{
    struct ports key;
    __builtin_memset(&key, 0, sizeof(key));
    key.local = bpf_ntohl(msg->remote_port);
    key.remote = msg->local_port;
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
PORTS = "struct ports { __u32 local, remote; };"
TURNED = "struct ports { __u32 remote, local; } __attribute__((aligned(16)));"  # another order, and longer
IF_THERE = SOURCE.replace("return bpf_msg_redirect_hash", "bpf_msg_redirect_hash").replace(
    "BPF_F_INGRESS);", "BPF_F_INGRESS);\n    return SK_PASS;"
)
# What comes to the server's end goes out of it again; the client's end gets it as it is.
ECHOING = SOURCE[: SOURCE.index('SEC("sk_msg")')] + """
SEC("sk_skb/stream_verdict") int echo(struct __sk_buff *skb)
{
    struct ports key;
    __builtin_memset(&key, 0, sizeof(key));
    key.local = skb->local_port;
    key.remote = bpf_ntohl(skb->remote_port);
    __u32 release = RELEASE;
    __u64 *mine = bpf_map_lookup_elem(&by_release, &release);
    if (mine)
        __sync_fetch_and_add(mine, skb->len);
    return skb->local_port == PORT ? bpf_sk_redirect_hash(skb, &peers, &key, 0) : SK_PASS;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
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
ECHO = REDIRECT.replace("redirect", "echo").replace("sk_msg", "sk_skb")


def bundle(
    lab: Lab, tmp_path: Path, number: int, manifest: str = NOTE + REDIRECT, source: str = SOURCE
) -> hitless.Bundle:
    text = f"{CALLS[number]}\n{source.replace('RELEASE', str(number)).replace('PORT', str(SERVER))}"
    path = write_release(tmp_path / f"{number}-{len(manifest)}", f"{number}.0", text, manifest)
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})


@pytest.mark.parametrize(("rule", "upgrades"), [("", UPGRADES), (BY_CONNECTION, often(10))])
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
        assert before > often(1000)
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


def test_a_hook_of_sockets_needs_a_map_of_sockets(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(hitless.BundleError, match="is on a sockmap or sockhash of this bundle, which has: peers"):
        bundle(lab, tmp_path, 1, REDIRECT.replace('target = "peers"', 'target = "counted"'))


def reshaped(lab: Lab, tmp_path: Path, source: str = SOURCE) -> tuple[hitless.Bundle, hitless.Bundle]:
    """Two releases whose sockhash has keys of two shapes."""
    assert PORTS in source
    return bundle(lab, tmp_path, 1, source=source), bundle(lab, tmp_path, 2, source=source.replace(PORTS, TURNED))


LOSS = ("counted",)


def test_five_hundred_connections_stay_through_upgrades_of_which_each_changes_the_shape_of_their_map(
    lab: Lab, tmp_path: Path
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    first, second = reshaped(lab, tmp_path)
    hitless.apply(node, first)
    with clients(lab, answers=True) as held:
        held.say(f"connect {CONNECTIONS}")
        held.say("run 0")
        for _ in range(RESHAPED // 2):
            for release in (second, first):
                result = hitless.apply(node, release, allow_loss=LOSS)
        assert {entry.name: entry.action for entry in result.maps}["peers"] == "convert"
        messages = held.say("stop")
        calls = 2 * messages
        assert node.map("counted").get(SERVER)["calls"] == calls
        assert sum(node.map("by_release").get(number) for number in (1, 2)) == calls
        before = node.map("by_release").get(2)
        held.say("rounds 3")
        assert node.map("by_release").get(2) == before
        assert node.map("counted").get(SERVER)["calls"] == calls + 6 * CONNECTIONS
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


def test_connections_that_come_and_go_while_the_map_changes_its_shape_are_served_by_the_release_that_runs(
    lab: Lab, tmp_path: Path
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    first, second = reshaped(lab, tmp_path, IF_THERE)
    hitless.apply(node, first)
    with clients(lab, answers=True) as held:
        held.say("connect 50")
        held.say("run 2 5")
        for _ in range(often(10)):
            for release in (second, first):
                hitless.apply(node, release, allow_loss=LOSS)
        held.say("stop")
        before = node.map("by_release").get(1)
        with Map.open(node.root / "maps" / "peers") as peers:
            ends = len(list_sockets(peers))
        said = held.say("rounds 1")
        assert node.map("by_release").get(1) - before == ends
        assert held.say("rounds 1") - said == ends // 2 > 100
    assert hitless.verify(node).problems == ()


def test_verdicts_on_received_data_go_to_a_map_of_another_shape_and_every_byte_is_seen_once(
    lab: Lab, tmp_path: Path
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    shapes = ECHOING, ECHOING.replace(PORTS, TURNED)
    first, second = (bundle(lab, tmp_path, 1 + each, NOTE + ECHO, shapes[each]) for each in (0, 1))
    hitless.apply(node, first)
    with clients(lab, answers=False) as held:
        held.say("connect 100")
        held.say("run 0")
        for _ in range(often(5)):
            for release in (second, first):
                hitless.apply(node, release, LOSS)
        sent = held.say("stop")
        assert sum(node.map("by_release").get(number) for number in (1, 2)) == 2 * 16 * sent
        before = node.map("by_release").get(1)
        held.say("connect 100")
        held.say("rounds 1")
        assert node.map("by_release").get(1) == before + 2 * 16 * 200
    assert hitless.verify(node).problems == ()


def test_a_rollback_of_a_map_of_another_shape_gives_all_connections_back(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    first, second = reshaped(lab, tmp_path)
    hitless.apply(node, first)
    with clients(lab, answers=True) as held:
        held.say("connect 100")
        hitless.apply(node, second, allow_loss=LOSS)
        held.say("connect 100")
        held.say("run 0")
        for _ in range(4):
            hitless.rollback(node, allow_loss=LOSS)
        hitless.rollback(node, allow_loss=LOSS)
        calls = 2 * held.say("stop")
        before = node.map("by_release").get(2)
        held.say("rounds 1")
        assert node.map("by_release").get(2) == before
        assert node.map("counted").get(SERVER)["calls"] == calls + 400
    assert hitless.verify(node).problems == ()


def test_a_failure_after_the_cutover_gives_old_and_new_connections_the_map_of_the_old_shape(
    lab: Lab, tmp_path: Path
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    first, second = reshaped(lab, tmp_path)
    hitless.apply(node, first)

    def fail(event: hitless.Progress) -> None:
        if event.step == "merge":
            held.say("connect 100")  # which the new release adds to its map
        if event.step == "commit":
            held.say("run 0")
            raise ZeroDivisionError

    with clients(lab, answers=True) as held:
        held.say("connect 100")
        with pytest.raises(ZeroDivisionError):
            hitless.apply(node, second, LOSS, progress=fail)
        calls = 2 * held.say("stop")
        before = node.map("by_release").get(2)
        held.say("rounds 1")
        assert node.map("by_release").get(2) == before
        assert node.map("counted").get(SERVER)["calls"] == calls + 400
        hitless.apply(node, second, LOSS)
        held.say("rounds 1")
        assert node.map("by_release").get(2) == before + 400
        with pytest.raises(ZeroDivisionError):
            hitless.rollback(node, LOSS, progress=fail)
        held.say("stop")
        before = node.map("by_release").get(2)
        held.say("rounds 1")
        assert node.map("by_release").get(2) == before + 600
        hitless.rollback(node, LOSS)
        held.say("rounds 1")
        assert node.map("by_release").get(2) == before + 600
    assert hitless.verify(node).problems == ()
    assert status(node).problems == ()


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_amid(node: hitless.Node, release: hitless.Bundle, step: str) -> None:
    """An apply in a process of its own, which is killed at ``step``."""
    pid = os.fork()
    if not pid:
        with pytest.MonkeyPatch.context() as patch:
            beside = Dispatcher.beside

            def and_aside(before: Dispatcher, held: Map, hook: str, pin: Path) -> None:
                with beside(before, held, hook, pin).aside(held, hook, pin, pin.with_name("redirect@again")):
                    if step == "aside":
                        die()

            if step in ("aside", "again"):
                patch.setattr(Dispatcher, "beside", and_aside)
            for name, owner, called in (
                ("again", dispatcher, "move"),
                ("moved", transaction, "settle"),
                ("finished", finish, "come_along"),
                ("back", transaction._Upgrade, "_move_sockets_back"),
                ("dropped", transaction._Upgrade, "_drop"),
            ):
                if step == name:
                    patch.setattr(owner, called, die)

            def progress(event: hitless.Progress) -> None:
                if event.step == step:
                    die()
                if step in ("back", "dropped") and event.step == "commit":
                    raise ZeroDivisionError

            try:
                hitless.apply(node, release, LOSS, progress=progress)
            finally:
                os._exit(1)
    _, ended = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(ended)


STEPS = ["verify", "moved", "aside", "again", "merge", "commit", "finished", "back", "dropped"]


@pytest.mark.needs("sockmap link")
@pytest.mark.parametrize("step", STEPS)
def test_connections_outlive_whoever_changes_the_shape_of_their_map_and_is_killed(
    lab: Lab, tmp_path: Path, step: str
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    first, second = reshaped(lab, tmp_path)
    hitless.apply(node, first)
    with clients(lab, answers=True) as held:
        held.say("connect 50")
        held.say("run 0")
        die_amid(node, second, step)
        held.say("connect 50")
        held.say("run 0")
        if step == "dropped":
            assert {item.kind for item in hitless.gc(node, dry_run=True).items} >= {"link", "map", "program"}
            hitless.gc(node)
        else:
            hitless.recover(node)
        calls = 2 * held.say("stop")
        before = {number: node.map("by_release").get(number) for number in (1, 2)}
        held.say("rounds 1")
        runs = 1 if step in ("verify", "back", "dropped") else 2
        assert node.observe().version == f"{runs}.0"
        assert node.map("by_release").get(runs) == before[runs] + 200
        assert node.map("counted").get(SERVER)["calls"] == calls + 200
        assert status(node).problems == ()
        assert hitless.verify(node).problems == ()
        hitless.apply(node, first if runs == 2 else second, LOSS)
        held.say("rounds 1")
        assert node.map("by_release").get(3 - runs) == before[3 - runs] + 200


@pytest.mark.needs("sockmap link")
def test_an_upgrade_that_was_killed_behind_its_cutover_is_taken_back_with_its_new_connections(
    lab: Lab, tmp_path: Path
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    first, second = reshaped(lab, tmp_path)
    hitless.apply(node, first)
    with clients(lab, answers=True) as held:
        held.say("connect 50")
        die_amid(node, second, "merge")
        held.say("connect 50")
        held.say("rounds 1")
        assert node.map("by_release").get(1) == 0  # as it is in the map of the release that is not committed
        hitless.recover(node, back=True)
        before = node.map("by_release").get(1)
        held.say("rounds 1")
        assert node.map("by_release").get(1) == before + 200
    assert hitless.verify(node).problems == ()


def test_nothing_is_left_of_maps_of_other_shapes_when_their_sockets_are_closed(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    first, second = reshaped(lab, tmp_path)
    hitless.apply(node, first)
    with Map.open(node.root / "slots" / "redirect") as slots:
        number = slots.info.id
    with clients(lab, answers=True) as held:
        for _ in range(5):
            for release in (second, first):
                held.say("connect 5")
                hitless.apply(node, release, LOSS)
        held.say("rounds 1")
        assert len(using(number)) > 5
    hitless.gc(node, allow_loss=LOSS)
    until = time.monotonic() + patient(5)
    # The kernel gives programs and maps back a moment after their last user is gone.
    while (len(using(number)) > 1 or status(node).remnants) and time.monotonic() < until:
        time.sleep(0.02)
    with Link.open(node.links / "redirect") as link:
        assert using(number) == [link.info.program_id]
    assert [path.name for path in (node.root / "slots").iterdir()] == ["redirect"]
    assert status(node).remnants == ()
    hitless.unload(node)
    assert not node.root.exists()


def test_a_map_of_sockets_that_starts_empty_cannot_take_its_hook_along(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, 1))
    source = SOURCE.replace(PORTS, "struct ports { __u16 remote; __u32 local; };")
    with pytest.raises(hitless.UnsupportedError, match=r"on map peers, which becomes .*its sockets do not come along"):
        hitless.plan(node, bundle(lab, tmp_path, 2, source=source), LOSS)


def test_a_hook_does_not_go_to_another_map_of_sockets(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    source = SOURCE.replace("MAP(by_release", "MAP(others, SOCKHASH, 16, struct ports, __u64);\nMAP(by_release")
    hitless.apply(node, bundle(lab, tmp_path, 1, source=source))
    other = bundle(lab, tmp_path, 2, NOTE + REDIRECT.replace('"peers"', '"others"'), source)
    with pytest.raises(hitless.UnsupportedError, match=r"and would go to map others.*the sockets of peers would go"):
        hitless.plan(node, other, LOSS)


def test_a_map_of_another_shape_and_connections_that_keep_to_their_release_do_not_go_together(
    lab: Lab, tmp_path: Path
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, 1))
    shape = SOURCE.replace(PORTS, TURNED)
    with pytest.raises(hitless.UnsupportedError, match='leave out consistency = "connection" in this upgrade'):
        hitless.plan(node, bundle(lab, tmp_path, 2, BY_CONNECTION + NOTE + REDIRECT, shape), LOSS)
    hitless.apply(node, bundle(lab, tmp_path, 2, BY_CONNECTION + NOTE + REDIRECT), LOSS)
    with pytest.raises(hitless.UnsupportedError, match="has dispatchers that keep each connection with its release"):
        hitless.plan(node, bundle(lab, tmp_path, 1, source=shape), LOSS)


def test_a_hook_is_refused_where_sockets_run_the_program_of_somebody_else(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, 1, NOTE))
    with Program.open(node.root / "progs" / "redirect") as program, Map.open(node.root / "maps" / "peers") as peers:
        number = program.info.id
        attach_the_old_way(program, peers, "sk_msg_verdict")
    hooked = bundle(lab, tmp_path, 2)
    with clients(lab, answers=True) as held:
        held.say("connect 5")
        with pytest.raises(hitless.NodeError, match=f"program {number} \\(10 sockets run it\\), which hitless did not"):
            hitless.plan(node, hooked, LOSS)
        held.say("rounds 1")
    with pytest.raises(hitless.NodeError, match=f"program {number} \\(0 sockets run it\\), which hitless did not"):
        hitless.apply(node, hooked, LOSS)
    assert hitless.verify(node).problems == ()


def test_a_hook_under_another_name_is_told_what_its_link_is_called(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(lab, tmp_path, 1))
    renamed = REDIRECT.replace('link = "redirect"', 'link = "peers"')
    with pytest.raises(hitless.NodeError, match="of link redirect of this bundle, and takes one only: name that link"):
        hitless.plan(node, bundle(lab, tmp_path, 2, NOTE + renamed), LOSS)
    was = renamed + 'was = "redirect"\n'
    with clients(lab, answers=True) as held:
        held.say("connect 5")
        shape = bundle(lab, tmp_path, 2, NOTE + was, SOURCE.replace(PORTS, TURNED))
        hitless.apply(node, shape, LOSS)
        held.say("rounds 1")
        assert node.map("by_release").get(2) == 10
    assert [path.name for path in (node.root / "slots").iterdir()] == ["peers"]
    assert hitless.verify(node).problems == ()


def using(map_id: int) -> list[int]:
    """The programs that use a map."""
    found = []
    for number in ids("program"):
        with suppress(hitless.KernelError), Program.by_id(number) as program:
            if map_id in program.map_ids:
                found.append(number)
    return found
