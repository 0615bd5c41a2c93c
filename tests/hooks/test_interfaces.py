"""XDP and tcx on interfaces of many namespaces: all are replaced, and every packet is seen by one program of each."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest

import hitless
from hitless.hooks import TCX
from hitless.kernel.links import Link
from hitless.kernel.programs import Program
from hitless.kernel.xdp import quick
from hitless.upgrade.status import status
from meshd.demo.pods import Pods
from tests.patience import often, patient
from tests.releases import write_release

# Counts UDP packets to port 4242 by the number of their pod, which is the third byte of the address.
SOURCE = """
#include <bpf/bpf_endian.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>
MAP(by_xdp, ARRAY, 768, __u32, __u64);
MAP(by_tcx, ARRAY, 768, __u32, __u64);
static __always_inline int is_counted(void *at, void *end, __u32 *pod)
{
    struct ethhdr *frame = at;
    struct iphdr *packet = (void *)(frame + 1);
    struct udphdr *datagram = (void *)(packet + 1);
    if ((void *)(datagram + 1) > end || frame->h_proto != bpf_htons(ETH_P_IP) || packet->protocol != 17 ||
        datagram->dest != bpf_htons(4242))
        return 0;
    *pod = RELEASE * 256 + ((bpf_ntohl(packet->daddr) >> 8) & 0xff);
    return 1;
}
SEC("xdp") int early(struct xdp_md *ctx)
{
    __u32 pod;
    if (is_counted((void *)(long)ctx->data, (void *)(long)ctx->data_end, &pod)) {
        __u64 *seen = bpf_map_lookup_elem(&by_xdp, &pod);
        if (seen)
            __sync_fetch_and_add(seen, 1);
    }
    return XDP_PASS;
}
SEC("tc") int late(struct __sk_buff *ctx)
{
    __u32 pod;
    if (is_counted((void *)(long)ctx->data, (void *)(long)ctx->data_end, &pod)) {
        __u64 *seen = bpf_map_lookup_elem(&by_tcx, &pod);
        if (seen)
            __sync_fetch_and_add(seen, 1);
        return TC_ACT_SHOT;
    }
    return TC_ACT_UNSPEC;
}
char _license[] SEC("license") = "GPL";
"""

ATTACH = """
[[attach]]
program = "early"
hook = "xdp"
target = "eth0"
netns = "${pods}"
link = "early"

[[attach]]
program = "late"
hook = "tcx-ingress"
target = "eth*"
netns = "${pods}"
link = "late"
"""


BY_CONNECTION = """
[cutover]
consistency = "connection"
deadline = 0
"""


def bundle(tmp_path: Path, number: int, pods: str, rule: str = "") -> hitless.Bundle:
    source = SOURCE.replace("RELEASE", str(number))
    path = write_release(tmp_path / str(number), f"{number}.0", source, rule + ATTACH)
    return hitless.Bundle.load(path, {"pods": pods})


def counted(node: hitless.Node, name: str) -> tuple[dict[int, int], dict[int, int]]:
    """Packets by pod, of release 1 and 2."""
    found: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for key, value in node.map(name).items():
        if value:
            found[key // 256 - 1][key % 256] = value
    return found


def test_all_interfaces_of_fifty_pods_are_replaced_and_what_comes_and_goes_meanwhile_is_seen(
    pods: Pods, tmp_path: Path
) -> None:
    numbers = pods.add(50)
    pattern = str(pods.directory / "*")
    node = hitless.Node(pods.lab.bpffs / "store")
    first, second = (bundle(tmp_path, number, pattern) for number in (1, 2))
    assert len(hitless.apply(node, first).hooks) == 100
    goes, stays = numbers[-1], numbers[:-1]
    sending = pods.send(stays, patient(30), 400_000)
    came = []

    def meanwhile(event: hitless.Progress) -> None:
        if event.step == "verify":
            pods.remove(goes)
        elif event.step == "merge":
            came.extend(pods.add(1))

    started = time.monotonic()
    result = hitless.apply(node, second, progress=meanwhile)
    print(f"100 hooks in {time.monotonic() - started:.2f} s, the switch {result.cutover.first_to_last_us / 1e3:.0f} ms")
    sent = dict(zip(stays, sending.stop(), strict=True))
    for name in ("by_xdp", "by_tcx"):
        old, new = counted(node, name)
        assert {pod: old.get(pod, 0) + new.get(pod, 0) for pod in stays} == sent
        assert sum(old.values()) > 0
        assert all(new.get(pod, 0) > 0 for pod in stays)
    (late,) = came
    again = pods.send([late], patient(5), 100).all()
    assert (counted(node, "by_xdp")[1][late], counted(node, "by_tcx")[1][late]) == (*again, *again)
    links = {path.name for path in node.links.iterdir()}
    assert links == {f"{link}@{_path(pods, pod)}@eth0" for link in ("early", "late") for pod in (*stays, late)}
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


def test_an_interface_that_comes_after_the_upgrade_is_told_and_hooked_by_applying_again(
    pods: Pods, tmp_path: Path
) -> None:
    pods.add(1)
    node = hitless.Node(pods.lab.bpffs / "store")
    release = bundle(tmp_path, 1, str(pods.directory / "*"))
    hitless.apply(node, release)
    (late,) = pods.add(1)
    problems = status(node).problems
    assert len(problems) == 2
    assert f"interface eth0 in {pods.directory}/pod{late} came since: hook early means it" in problems[0]
    assert hitless.verify(node).problems == problems
    assert sorted(hook.action for hook in hitless.plan(node, release).hooks) == ["attach", "attach", "keep", "keep"]
    hitless.apply(node, release)
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


def test_an_interface_that_goes_after_the_upgrade_is_no_problem_and_its_links_go_with_the_next(
    pods: Pods, tmp_path: Path
) -> None:
    (goes, stays) = pods.add(2)
    node = hitless.Node(pods.lab.bpffs / "store")
    first, second = (bundle(tmp_path, number, str(pods.directory / "*")) for number in (1, 2))
    hitless.apply(node, first)
    pods.remove(goes)
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()
    hitless.apply(node, second)
    assert {path.name for path in node.links.iterdir()} == {
        f"{link}@{_path(pods, stays)}@eth0" for link in ("early", "late")
    }
    assert hitless.verify(node).problems == ()


def test_in_the_mode_by_connection_packets_without_a_socket_go_over_with_the_same_store(
    pods: Pods, tmp_path: Path
) -> None:
    numbers = pods.add(3)
    node = hitless.Node(pods.lab.bpffs / "store")
    releases = [bundle(tmp_path, number, str(pods.directory / "*"), BY_CONNECTION) for number in (1, 2)]
    hitless.apply(node, releases[0])
    sending = pods.send(numbers, patient(30), 400_000)
    for turn in range(1, 7):
        hitless.apply(node, releases[turn % 2])
    sent = dict(zip(numbers, sending.stop(), strict=True))
    for name in ("by_xdp", "by_tcx"):
        old, new = counted(node, name)
        assert {pod: old.get(pod, 0) + new.get(pod, 0) for pod in numbers} == sent
        assert min(old.values()) > 0
        assert min(new.values()) > 0
    assert hitless.verify(node).problems == ()


def test_a_rollback_takes_every_interface_back(pods: Pods, tmp_path: Path) -> None:
    numbers = pods.add(3)
    node = hitless.Node(pods.lab.bpffs / "store")
    for number in (1, 2):
        hitless.apply(node, bundle(tmp_path, number, str(pods.directory / "*")))
    (late,) = pods.add(1)
    hitless.rollback(node)
    sent = pods.send([*numbers, late], 5, 400).all()
    old, new = counted(node, "by_xdp")
    assert old == dict(zip([*numbers, late], sent, strict=True))
    assert new == {}
    assert hitless.verify(node).problems == ()


def _path(pods: Pods, pod: int) -> str:
    return str(pods.directory / f"pod{pod}").replace("/", "~2f")


@pytest.mark.parametrize(
    ("hook", "program", "seen"),
    [
        ("xdp", "early", "by_xdp"),
        pytest.param("tcx-ingress", "late", "by_tcx", marks=pytest.mark.needs(TCX)),
    ],
)
def test_each_packet_is_counted_by_one_of_two_programs_that_took_turns_a_thousand_times(
    pods: Pods, tmp_path: Path, hook: str, program: str, seen: str
) -> None:
    (pod,) = pods.add(1)
    node = hitless.Node(pods.lab.bpffs / "store")
    for number in (1, 2):
        result = hitless.apply(node, bundle(tmp_path, number, str(pods.directory / f"pod{pod}")))
    (update,) = (one for one in result.hooks if one.hook == hook)
    sending = pods.send([pod], patient(60), 2_000_000)
    programs = [Program.open(generation / "progs" / program) for generation in (node.current, node.previous)]
    with quick(programs) if hook == "xdp" else nullcontext(), Link.open(node.links / update.link) as link:
        for turn in range(often(1000)):
            link.update(programs[(turn + 1) % 2], programs[turn % 2])
            time.sleep(0.001)
    (sent,) = sending.stop()
    old, new = counted(node, seen)
    assert old[pod] + new[pod] == sent
    assert min(old[pod], new[pod]) > often(1000)


def test_an_interface_named_in_full_that_vanishes_is_an_error_and_everything_is_as_before(
    pods: Pods, tmp_path: Path
) -> None:
    (pod,) = pods.add(1)
    node = hitless.Node(pods.lab.bpffs / "store")
    first, second = (bundle(tmp_path, number, str(pods.directory / f"pod{pod}")) for number in (1, 2))
    hitless.apply(node, first)

    def meanwhile(event: hitless.Progress) -> None:
        if event.step == "cutover":
            pods.remove(pod)

    with pytest.raises(hitless.NodeError, match=r"eth0.* is gone") as caught:
        hitless.apply(node, second, progress=meanwhile)
    assert caught.value.facts["step"] == "cutover"
    assert node.observe().version == "1.0"
    assert not node.next.exists()
