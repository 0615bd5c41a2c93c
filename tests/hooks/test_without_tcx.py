"""Hooks of tcx on a kernel without tcx: filters at clsact, which the plan names, in the same order, without a gap.

Where the kernel has tcx, it is taken from what hitless finds; nothing else is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.cli.output import show_plan
from hitless.errors import UnsupportedError
from hitless.hooks import TCX
from hitless.kernel.filters import Direction, Filter, FilterInfo, filters
from hitless.kernel.programs import Program
from hitless.upgrade.status import status
from meshd.demo.pods import Pods
from tests.hooks.test_interfaces import BY_CONNECTION, SOURCE, counted
from tests.hooks.test_without_links import Tool, interface, killed, well
from tests.patience import patient
from tests.releases import write_release

SAID = "tc filter at clsact, since this kernel has no tcx"
LATE = """
[[attach]]
program = "late"
hook = "tcx-ingress"
target = "eth*"
netns = "${pods}"
link = "late"
"""
INGRESS = SOURCE.replace('SEC("tc")', 'SEC("tcx/ingress")')

# Each hands the packet on with its own mark, and counts those that the one before it in the manifest has marked.
IN_TURN = """
#include <linux/pkt_cls.h>
MAP(seen, ARRAY, 4, __u32, __u64);
static __always_inline int take(struct __sk_buff *ctx, __u32 own)
{
    __u64 *count = bpf_map_lookup_elem(&seen, &own);
    if (count && ctx->protocol == 8 && ctx->mark == own)
        __sync_fetch_and_add(count, 1);
    ctx->mark = own + 1;
    return TC_ACT_UNSPEC;
}
SEC("tc") int first(struct __sk_buff *ctx) { return take(ctx, 0); }
SEC("tc") int second(struct __sk_buff *ctx) { return take(ctx, 1); }
SEC("tc") int third(struct __sk_buff *ctx) { return take(ctx, 2); }
char _license[] SEC("license") = "GPL";
"""

Make = Callable[..., hitless.Bundle]


@pytest.fixture(autouse=True)
def no_tcx(take_away: Callable[[str], None]) -> None:
    take_away(TCX)


@pytest.fixture
def node(pods: Pods) -> hitless.Node:
    return hitless.Node(pods.lab.bpffs / "store")


@pytest.fixture
def make(pods: Pods, tmp_path: Path) -> Make:
    """Release 1 or 2."""

    def release(number: int, manifest: str = LATE, source: str = INGRESS) -> hitless.Bundle:
        path = write_release(tmp_path / str(number), f"{number}.0", source.replace("RELEASE", str(number)), manifest)
        return hitless.Bundle.load(path, {"pods": str(pods.directory / "*")})

    return release


def there(pods: Pods, number: int, direction: Direction = "ingress") -> tuple[FilterInfo, ...]:
    return filters(interface(pods, number), direction)


def in_turn(*programs: str) -> str:
    return "".join(LATE.replace('"late"', f'"{program}"') for program in programs)


def test_each_packet_is_counted_once_over_an_upgrade_and_a_rollback(pods: Pods, node: hitless.Node, make: Make) -> None:
    numbers = pods.add(2)
    hitless.apply(node, make(1))
    (before,) = there(pods, numbers[0])
    sending = pods.send(numbers, patient(30), 400_000)
    came: list[int] = []

    def meanwhile(event: hitless.Progress) -> None:
        if event.step == "merge" and not came:
            came.extend(pods.add(1))

    hitless.apply(node, make(2), progress=meanwhile)
    (after,) = there(pods, numbers[0])
    assert (after.priority, after.handle) == (before.priority, before.handle)
    assert after.program_id != before.program_id
    well(node)
    hitless.rollback(node)
    sent = dict(zip(numbers, sending.stop(), strict=True))
    old, new = counted(node, "by_tcx")
    assert {pod: old[pod] + new[pod] for pod in numbers} == sent
    assert min(*old.values(), *new.values()) > 0
    assert pods.send(came, patient(5), 100).all() == [counted(node, "by_tcx")[0][came[0]]]
    well(node)
    hitless.unload(node)
    assert [there(pods, number) for number in (*numbers, *came)] == [(), (), ()]


def test_the_plan_names_the_filter_in_text_and_in_json(
    pods: Pods, node: hitless.Node, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    pods.add(1)
    release = make(1)
    planned = hitless.plan(node, release)
    show_plan(planned)
    assert SAID in capsys.readouterr().out
    (told,) = json.loads(msgspec.json.encode(planned))["hooks"]
    assert (told["hook"], told["instead_of"], told["method"]) == ("tc-ingress", "tcx-ingress", SAID)
    assert planned.fingerprint is not None
    assert planned.fingerprint.features[TCX] is False
    assert there(pods, 1) == ()
    hitless.apply(node, release, planned=planned)
    assert [(hook.action, hook.method) for hook in hitless.plan(node, release).hooks] == [("keep", SAID)]


def test_programs_run_in_the_order_of_the_manifest_and_before_the_filter_of_another_tool(
    pods: Pods, node: hitless.Node, make: Make, tmp_path: Path
) -> None:
    (pod,) = pods.add(1)
    tool = Tool(tmp_path)
    Filter.attach(tool.programs["late"], interface(pods, pod), "ingress")  # takes all that comes to it
    hitless.apply(node, make(1, in_turn("first", "second"), IN_TURN))
    hitless.apply(node, make(2, in_turn("first", "second", "third"), IN_TURN))
    (sent,) = pods.send([pod], patient(5), 100).all()
    assert [count for _, count in node.map("seen").items()] == [sent, sent, sent, 0]
    assert tool.counted("by_tcx", pod) == sent
    tool.leave()


@pytest.mark.parametrize("step", ["attach", "cutover"])
def test_what_is_left_by_a_kill_is_put_right(pods: Pods, node: hitless.Node, make: Make, step: str) -> None:
    (pod,) = pods.add(1)
    if step == "cutover":
        hitless.apply(node, make(1))
    killed(step, node, make(2))
    hitless.recover(node)
    assert hitless.apply(node, make(2)).to_version == "2.0"
    (sent,) = pods.send([pod], patient(5), 100).all()
    assert counted(node, "by_tcx")[1] == {pod: sent}
    well(node)


def test_a_filter_that_somebody_removed_is_told_and_put_back(pods: Pods, node: hitless.Node, make: Make) -> None:
    (pod,) = pods.add(1)
    hitless.apply(node, make(1))
    (own,) = there(pods, pod)
    at = interface(pods, pod)
    with Program.by_id(own.program_id) as program:
        Filter(at, "ingress", own.priority, own.handle).detach(program)
    assert "link late@" in status(node).problems[0]
    hitless.apply(node, make(1))
    assert len(there(pods, pod)) == 1
    well(node)


def test_egress_has_the_filter_at_egress(pods: Pods, node: hitless.Node, make: Make) -> None:
    (pod,) = pods.add(1)
    hitless.apply(node, make(1, LATE.replace("ingress", "egress"), SOURCE))
    assert (len(there(pods, pod, "egress")), there(pods, pod)) == (1, ())
    well(node)


def test_by_connection_it_is_refused_by_name(pods: Pods, node: hitless.Node, make: Make) -> None:
    pods.add(1)
    with pytest.raises(UnsupportedError, match=f"is a {SAID}, and of a filter no connection can keep") as error:
        hitless.plan(node, make(1, BY_CONNECTION + LATE))
    assert error.value.facts["feature"] == TCX
