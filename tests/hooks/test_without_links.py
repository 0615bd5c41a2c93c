"""Hooks that no link holds, tc filters and XDP by netlink: upgraded, undone, killed, and adopted from another tool."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.errors import KernelError
from hitless.kernel.filters import Filter, filters
from hitless.kernel.interfaces import Interface, interfaces
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.namespaces import Namespace
from hitless.kernel.programs import Program, load_object
from hitless.kernel.xdp import Xdp
from hitless.upgrade.status import status
from meshd.demo.pods import Pods
from tests.hooks.test_interfaces import SOURCE, counted
from tests.patience import patient
from tests.releases import compile_object, write_release

EARLY = """
[[attach]]
program = "early"
hook = "xdp"
by = "netlink"
target = "eth0"
netns = "${pods}"
link = "early"
"""
LATE = """
[[attach]]
program = "late"
hook = "tc-ingress"
target = "eth*"
netns = "${pods}"
link = "late"
"""
ADOPTING = EARLY + "adopt = true\n" + LATE + "adopt = true\n"

# What filters count is in a struct, which may have a field more.
WIDENED = (
    SOURCE.replace("MAP(by_tcx, ARRAY, 768, __u32, __u64);",
                   'struct tally { BEFORE __u64 n TAG("merge=sum"); }; MAP(by_tcx, ARRAY, 768, __u32, struct tally);')
    .replace("__u64 *seen = bpf_map_lookup_elem(&by_tcx, &pod);",
             "struct tally *found = bpf_map_lookup_elem(&by_tcx, &pod); __u64 *seen = found ? &found->n : 0;")
)  # fmt: skip

Make = Callable[..., hitless.Bundle]


@pytest.fixture
def node(pods: Pods) -> hitless.Node:
    return hitless.Node(pods.lab.bpffs / "store")


@pytest.fixture
def make(pods: Pods, tmp_path: Path) -> Make:
    """Release 1 or 2 on all pods, or on those that another pattern matches."""

    def release(number: int, manifest: str = EARLY + LATE, where: str = "*", source: str = SOURCE) -> hitless.Bundle:
        text = source.replace("RELEASE", str(number))
        path = write_release(tmp_path / f"{number}-{len(manifest)}", f"{number}.0", text, manifest)
        return hitless.Bundle.load(path, {"pods": str(pods.directory / where)})

    return release


class Tool:
    """Another tool with programs of its own, which it does not hold any more once they are attached."""

    def __init__(self, directory: Path) -> None:
        data = compile_object(SOURCE.replace("RELEASE", "0"), directory / "tool.bpf.o").read_bytes()
        loaded = load_object(data, "tool", {}, {})
        self._maps: dict[str, Map] = loaded.maps
        self.programs: dict[str, Program] = loaded.programs
        self.ids = {name: program.info.id for name, program in loaded.programs.items()}

    def leave(self) -> None:
        for program in self.programs.values():
            program.close()

    def counted(self, name: str, pod: int) -> int:
        return int.from_bytes(self._maps[name].lookup(pod.to_bytes(4, sys.byteorder)) or b"", sys.byteorder)


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    return Tool(tmp_path)


def interface(pods: Pods, number: int) -> Interface:
    (found,) = interfaces("eth0", Namespace.at(str(pods.directory / f"pod{number}")))
    return found


def running(pods: Pods, number: int) -> tuple[list[int], list[int]]:
    """Ids of the programs of XDP and of filters on a pod's interface."""
    at = interface(pods, number)
    xdp = Xdp.find(at)
    return [xdp.info.program_id] if xdp else [], [one.program_id for one in filters(at, "ingress")]


def own(node: hitless.Node) -> tuple[list[int], list[int]]:
    """Those of the running release."""
    programs = node.observe().current.programs  # type: ignore[union-attr]
    return [programs["early"].id], [programs["late"].id]


def sums(node: hitless.Node, name: str, numbers: list[int]) -> list[int]:
    old, new = counted(node, name)
    return [old.get(pod, 0) + new.get(pod, 0) for pod in numbers]


def killed(step: str, node: hitless.Node, bundle: hitless.Bundle) -> None:
    """An upgrade whose process is killed when it begins ``step``, or when it is about to attach (``attach``)."""

    def at(event: hitless.Progress) -> None:
        if event.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            if step == "attach":
                Filter.attach = die  # type: ignore[method-assign, assignment]
            hitless.apply(node, bundle, progress=at)
        finally:
            os._exit(1)
    _, code = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(code) == -signal.SIGKILL


def well(node: hitless.Node) -> None:
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


def test_upgrades_count_each_packet_once_while_an_interface_comes_and_another_goes(
    pods: Pods, node: hitless.Node, make: Make
) -> None:
    numbers = pods.add(5)
    goes, stays = numbers[-1], numbers[:-1]
    first, second = make(1), make(2)
    hitless.apply(node, first)
    sending = pods.send(stays, patient(30), 400_000)
    came = []

    def meanwhile(event: hitless.Progress) -> None:
        if event.step == "verify":
            pods.remove(goes)
        elif event.step == "merge":
            came.extend(pods.add(1))

    result = hitless.apply(node, second, progress=meanwhile)
    assert [hook.action for hook in result.hooks].count("update") == 10
    for release in (first, second) * 3:
        hitless.apply(node, release)
    sent = sending.stop()
    assert sums(node, "by_xdp", stays) == sums(node, "by_tcx", stays) == sent
    assert all(min(one[pod] for pod in stays) > 0 for one in counted(node, "by_tcx"))
    (late,) = came
    assert running(pods, late) == own(node)
    assert {path.name.split("@")[0] for path in node.links.iterdir()} == {"early", "late"}
    assert len(list(node.links.iterdir())) == 10
    well(node)


def test_filters_of_packets_that_leave_are_upgraded_too(pods: Pods, node: hitless.Node, make: Make) -> None:
    numbers = pods.add(2)
    leaving = LATE.replace("ingress", "egress").replace('"eth*"', '"veth*"').replace("${pods}", str(pods.lab.netns))
    releases = [make(number, leaving) for number in (1, 2)]
    hitless.apply(node, releases[0])
    sending = pods.send(numbers, patient(20), 100_000)
    for release in (releases[1], *releases):
        hitless.apply(node, release)
    sent = sending.stop()
    assert sums(node, "by_tcx", numbers) == sent
    assert all(min(one[pod] for pod in numbers) > 0 for one in counted(node, "by_tcx"))
    well(node)


def test_a_rollback_takes_every_interface_back(pods: Pods, node: hitless.Node, make: Make) -> None:
    numbers = pods.add(2)
    hitless.apply(node, make(1))
    before = own(node)
    hitless.apply(node, make(2))
    sending = pods.send(numbers, patient(20), 100_000)
    hitless.rollback(node)
    sent = sending.stop()
    assert [running(pods, number) for number in numbers] == [before, before]
    assert sums(node, "by_xdp", numbers) == sums(node, "by_tcx", numbers) == sent
    well(node)


def test_an_upgrade_that_fails_after_the_cutover_puts_the_old_programs_back(
    pods: Pods, node: hitless.Node, make: Make
) -> None:
    (number,) = pods.add(1)
    hitless.apply(node, make(1, EARLY))
    before = running(pods, number)
    sending = pods.send([number], patient(20), 100_000)

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            assert running(pods, number) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, make(2), progress=fail)
    sent = sending.stop()
    assert running(pods, number) == before
    assert sums(node, "by_xdp", [number]) == sent
    assert [path.name for path in node.links.iterdir()] == [hook.link for hook in status(node).hooks]
    well(node)


@pytest.mark.parametrize("step", ["copy", "attach", "cutover", "catch-up", "commit", "clean-up"])
@pytest.mark.parametrize("back", [False, True])
def test_what_a_kill_left_is_finished_or_taken_back(
    pods: Pods, node: hitless.Node, make: Make, step: str, back: bool
) -> None:
    (number,) = pods.add(1)
    hitless.apply(node, make(1, EARLY))
    before = running(pods, number)
    sending = pods.send([number], patient(20), 100_000)
    killed(step, node, make(2))
    if back and step == "clean-up":
        with pytest.raises(hitless.InterruptedUpgradeError, match="committed before it was interrupted"):
            hitless.recover(node, back=back)
        hitless.recover(node)
    else:
        hitless.recover(node, back=back)
    sent = sending.stop()
    if step == "copy" or (back and step != "clean-up"):
        assert running(pods, number) == before
    else:
        assert node.observe().version == "2.0"
        assert running(pods, number) == own(node)
    assert sums(node, "by_xdp", [number]) == sent
    well(node)


def test_a_first_start_that_is_killed_is_gone_back_from_to_nothing(
    pods: Pods, node: hitless.Node, make: Make
) -> None:
    (number,) = pods.add(1)
    killed("commit", node, make(1))
    assert running(pods, number) != ([], [])
    hitless.recover(node, back=True)
    assert running(pods, number) == ([], [])


@pytest.mark.parametrize("place", [Filter, Xdp])
def test_a_program_is_taken_off_again_though_the_answer_to_its_attaching_was_lost(
    pods: Pods, node: hitless.Node, make: Make, monkeypatch: pytest.MonkeyPatch, place: type[Filter] | type[Xdp]
) -> None:
    (number,) = pods.add(1)
    really = place.attach

    def answer_lost(*arguments: object) -> None:
        really(*arguments)  # type: ignore[arg-type]
        raise KernelError("no answer", errno=errno.ENOBUFS)

    with monkeypatch.context() as patched:
        patched.setattr(place, "attach", answer_lost)
        with pytest.raises(KernelError, match="no answer"):
            hitless.apply(node, make(1))
    assert running(pods, number) == ([], [])
    hitless.apply(node, make(1))
    well(node)


def test_unload_leaves_interfaces_without_programs(pods: Pods, node: hitless.Node, make: Make, tool: Tool) -> None:
    (clean, shared) = pods.add(2)
    hitless.apply(node, make(1))
    Filter.attach(tool.programs["late"], interface(pods, shared), "ingress")
    hitless.unload(node)
    assert not node.root.exists()
    assert running(pods, clean) == ([], [])
    assert running(pods, shared) == ([], [tool.ids["late"]])


def test_a_hook_that_goes_is_detached_with_its_last_counts(pods: Pods, node: hitless.Node, make: Make) -> None:
    (number,) = pods.add(1)
    first = WIDENED.replace("BEFORE", "")
    second = WIDENED.replace("BEFORE", "__u64 since;")
    hitless.apply(node, make(1, source=first))
    sending = pods.send([number], patient(20), 100_000)
    hitless.apply(node, make(2, EARLY, source=second))
    assert running(pods, number)[1] == []
    filtered = node.map("by_tcx").get(256 + number)["n"]
    sent = sending.stop()
    assert 0 < filtered <= sent[0]
    assert node.map("by_tcx").get(256 + number)["n"] == filtered
    assert sums(node, "by_xdp", [number]) == sent
    well(node)


def test_programs_of_another_tool_are_adopted_without_a_gap(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    numbers = pods.add(2)
    for number in numbers:
        Xdp.attach(tool.programs["early"], interface(pods, number), "native" if number % 2 else "generic")
        Filter.attach(tool.programs["late"], interface(pods, number), "ingress", 7, 3)
    tool.leave()
    release = make(1, ADOPTING)
    plan = hitless.plan(node, release)
    assert {(hook.action, hook.expected, hook.adopted) for hook in plan.hooks} == {
        ("adopt", tool.ids["early"], "early"), ("adopt", tool.ids["late"], "late")
    }  # fmt: skip
    sending = pods.send(numbers, patient(20), 100_000)
    hitless.apply(node, release)
    hitless.apply(node, make(2, ADOPTING))
    sent = sending.stop()
    for name in ("by_xdp", "by_tcx"):
        before = [tool.counted(name, number) for number in numbers]
        assert min(before) > 0
        assert [sum(pair) for pair in zip(before, sums(node, name, numbers), strict=True)] == sent
    assert all(running(pods, number) == own(node) for number in numbers)
    assert not (node.current / "adopted").exists()
    well(node)


def test_where_another_tool_attached_its_own_it_is_adopted_and_nowhere_else(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool, tmp_path: Path
) -> None:
    managed, alone, foreign = pods.add(3)
    only = EARLY + 'adopt = "only"\n'
    Xdp.attach(tool.programs["early"], interface(pods, managed), "native")
    source = SOURCE.replace("RELEASE", "0").replace("early", "stranger")
    data = compile_object(source, tmp_path / "other.o").read_bytes()
    other = load_object(data, "other", {}, {})
    Xdp.attach(other.programs["stranger"], interface(pods, foreign), "native")
    result = hitless.apply(node, make(1, only))
    assert [(hook.action, hook.target) for hook in result.hooks] == [("adopt", "eth0")]
    assert running(pods, alone)[0] == []
    assert running(pods, foreign)[0] == [other.programs["stranger"].info.id]
    well(node)
    Xdp.attach(tool.programs["early"], interface(pods, alone), "native")  # the tool manages another pod by now
    with Program.open(node.current / "progs" / "early") as ours:
        found = Xdp.find(interface(pods, managed))
        assert found is not None
        found.detach(ours)  # and that one no more
    result = hitless.apply(node, make(2, only))
    assert {(hook.action, hook.link.rpartition("@")[0][-1]) for hook in result.hooks} == {
        ("adopt", str(alone)), ("detach", str(managed)),
    }  # fmt: skip
    assert running(pods, alone)[0] == own(node)[0]
    assert running(pods, managed)[0] == []
    well(node)


@pytest.mark.parametrize("how", ["error", "kill"])
def test_an_undo_gives_an_adopted_hook_back_though_nothing_else_holds_its_program(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool, how: str
) -> None:
    (number,) = pods.add(1)
    Xdp.attach(tool.programs["early"], interface(pods, number), "native")
    Filter.attach(tool.programs["late"], interface(pods, number), "ingress")
    tool.leave()
    theirs = running(pods, number)
    release = make(1, ADOPTING)
    sending = pods.send([number], patient(20), 100_000)
    if how == "kill":
        killed("commit", node, release)
        assert running(pods, number) != theirs
        hitless.recover(node, back=True)
    else:

        def fail(event: hitless.Progress) -> None:
            if event.step == "commit":
                assert running(pods, number) != theirs
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            hitless.apply(node, release, progress=fail)
    sending.stop()
    assert running(pods, number) == theirs == ([tool.ids["early"]], [tool.ids["late"]])
    assert not node.current.exists()
    assert not node.next.exists()
    assert not list(node.links.glob("*"))


def test_a_program_of_another_tool_is_in_the_way_of_xdp_and_of_a_filter_in_its_very_place(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    (number,) = pods.add(1)
    Filter.attach(tool.programs["late"], interface(pods, number), "ingress", 7, 3)
    assert [hook.action for hook in hitless.plan(node, make(1)).hooks] == ["attach", "attach"]
    exact = LATE + "priority = 7\nhandle = 3\n"
    where = rf"program {tool.ids['late']} \(late\) as tc filter with priority 7, handle 0x3, which hitless did not"
    with pytest.raises(hitless.NodeError, match=rf"link late@\S+: interface eth0 in \S+ has {where}.*adopt = true"):
        hitless.plan(node, make(1, exact))
    Xdp.attach(tool.programs["early"], interface(pods, number), "native")
    for manifest, how in ((EARLY, "adopt = true"), (EARLY.replace('by = "netlink"', ""), 'by = "netlink" and adopt')):
        with pytest.raises(hitless.NodeError, match=rf"has program {tool.ids['early']} \(early\) as native XDP.*{how}"):
            hitless.apply(node, make(1, manifest))
    assert not node.root.exists()


def test_a_link_of_another_tool_is_not_adopted(pods: Pods, node: hitless.Node, make: Make, tool: Tool) -> None:
    (number,) = pods.add(1)
    at = interface(pods, number)
    with at.entered():
        link = Link.attach(tool.programs["early"], at.index, "xdp", at)
    with link, pytest.raises(hitless.NodeError, match=r"held by a link of another tool.*let that tool detach it"):
        hitless.plan(node, make(1, ADOPTING))
    hitless.apply(node, make(1, ADOPTING))  # it let go


def test_of_several_filters_of_another_tool_one_is_adopted_by_its_priority(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    (number,) = pods.add(1)
    at = interface(pods, number)
    for priority in (5, 6):
        Filter.attach(tool.programs["late"], at, "ingress", priority, 1)
    adopting = LATE + "adopt = true\n"
    with pytest.raises(hitless.NodeError, match=r"priority 5, .* and .*priority 6, .*: give its priority and handle"):
        hitless.plan(node, make(1, adopting))
    hitless.apply(node, make(1, adopting + "priority = 6\n"))
    (ours,) = own(node)[1]
    assert [(one.priority, one.program_id) for one in filters(at, "ingress")] == [(5, tool.ids["late"]), (6, ours)]
    moved = make(2, adopting + "priority = 5\n")
    with pytest.raises(hitless.UnsupportedError, match=r"is a filter with priority 6 and handle 0x1, and the manifest"):
        hitless.plan(node, moved)


def test_what_another_tool_does_to_our_hooks_is_told_and_put_right(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    (number,) = pods.add(1)
    hitless.apply(node, make(1))
    at = interface(pods, number)
    ours = node.observe().current
    assert ours is not None
    with Program.by_id(ours.programs["early"].id) as early, Program.by_id(ours.programs["late"].id) as late:
        Xdp(at, "native").update(tool.programs["early"], early)
        (there,) = filters(at, "ingress")
        Filter(at, "ingress", there.priority, there.handle).detach(late)
    problems = status(node).problems
    assert hitless.verify(node).problems == problems
    assert len(problems) == 2
    assert f"eth0 in {at.namespace.path} runs program {tool.ids['early']} instead of early" in problems[0]
    assert "is detached: somebody detached it" in problems[1]
    with pytest.raises(hitless.NodeError, match="where ours ran, which hitless did not attach"):
        hitless.apply(node, make(1))
    Xdp(at, "native").detach(tool.programs["early"])
    hitless.apply(node, make(1))
    assert running(pods, number) == own(node)
    well(node)


def test_a_foreign_program_in_our_place_is_taken_over_again_by_who_adopts(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    (number,) = pods.add(1)
    hitless.apply(node, make(1, ADOPTING))
    at = interface(pods, number)
    with Program.open(node.current / "progs" / "early") as early:
        Xdp(at, "native").update(tool.programs["early"], early)
    tool.leave()

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, make(2, ADOPTING), progress=fail)
    assert running(pods, number)[0] == [tool.ids["early"]]
    result = hitless.apply(node, make(2, ADOPTING))
    assert {hook.adopted for hook in result.hooks} == {"early", None}
    assert running(pods, number) == own(node)
    well(node)


def test_a_saved_plan_is_refused_when_another_tool_came_meanwhile(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    (number,) = pods.add(1)
    release = make(1, ADOPTING)
    plan = hitless.plan(node, release)
    at = interface(pods, number)
    theirs = Xdp.attach(tool.programs["early"], at, "native")
    with pytest.raises(hitless.NodeError, match=r"not as it was when this was planned: .*early\) as native XDP came"):
        hitless.apply(node, release, planned=plan)
    theirs.detach(tool.programs["early"])
    hitless.apply(node, release, planned=plan)
    assert running(pods, number) == own(node)


def test_xdp_runs_generic_where_the_driver_has_no_native_one(pods: Pods, node: hitless.Node, make: Make) -> None:
    (number,) = pods.add(1)
    at = interface(pods, number)
    hitless.apply(node, make(1, EARLY.replace('"eth0"', '"lo"')))
    (loopback,) = interfaces("lo", at.namespace)
    place = Xdp.find(loopback)
    assert place is not None
    assert place.mode == "generic"
    well(node)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('by = "link"', 'by is "netlink", for xdp only'),
        ("priority = 7", "priority is a number from 1 to 65535, of a tc filter"),
        ('mode = "fast"', "mode is native or generic"),
    ],
)
def test_a_key_that_does_not_fit_is_refused_with_its_line(make: Make, line: str, words: str) -> None:
    with pytest.raises(hitless.BundleError, match=rf"toml:\d+: .*{words}"):
        make(1, EARLY.replace('by = "netlink"', line))


def test_a_link_adopts_nothing(make: Make) -> None:
    with pytest.raises(hitless.BundleError, match=r"toml:\d+: xdp is attached by a link"):
        make(1, EARLY.replace('by = "netlink"', "adopt = true"))


def test_the_command_shows_what_is_adopted_and_needs_no_more_rights_for_it(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    (number,) = pods.add(1)
    Filter.attach(tool.programs["late"], interface(pods, number), "ingress")
    Xdp.attach(tool.programs["early"], interface(pods, number), "native")
    release = make(1, ADOPTING).path

    def hitless_says(command: str, *arguments: object) -> str:
        line = [sys.executable, "-m", "hitless", command, *map(str, arguments), "--root", str(node.root)]
        return subprocess.run(line, capture_output=True, text=True, timeout=patient(30), check=False).stdout

    options = (release, "--set", f"pods={pods.directory}/*")
    planned = hitless_says("plan", *options)
    for hook, program in (("early", "early"), ("late", "late")):
        words = rf"adopt +{hook}@\S+ +{program} +eth0 in \S+, instead of program {tool.ids[program]} {program}\n"
        assert re.search(words, planned), planned
    hitless_says("apply", *options, "--yes")
    assert running(pods, number) == own(node)
    assert "no problems" in hitless_says("status")
    hitless_says("unload", "--yes")
    assert running(pods, number) == ([], [])


def test_an_interface_that_goes_between_plan_and_cutover_is_left_out_though_it_was_to_be_attached_or_adopted(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    (adopted, attached, stays) = pods.add(3)
    Xdp.attach(tool.programs["early"], interface(pods, adopted), "native")
    Filter.attach(tool.programs["late"], interface(pods, adopted), "ingress")

    def meanwhile(event: hitless.Progress) -> None:
        if event.step == "cutover":
            pods.remove(adopted)
            pods.remove(attached)

    hitless.apply(node, make(1, ADOPTING), progress=meanwhile)
    assert running(pods, stays) == own(node)
    assert len(list(node.links.iterdir())) == 2
    well(node)


def test_another_tool_on_an_interface_that_comes_while_hooks_are_switched_is_named_and_all_is_taken_back(
    pods: Pods, node: hitless.Node, make: Make, tool: Tool
) -> None:
    (first,) = pods.add(1)
    hitless.apply(node, make(1, EARLY.replace('"eth0"', '"eth*"')))
    before = running(pods, first)

    def meanwhile(event: hitless.Progress) -> None:
        if event.step == "merge":
            (number,) = pods.add(1)
            Xdp.attach(tool.programs["early"], interface(pods, number), "native")

    path = re.escape(str(pods.directory))
    words = (
        rf"interface eth0 in {path}/pod2 has program {tool.ids['early']} \(early\) as native XDP, which hitless did "
        r"not attach: let who did take it off, .*adopt = true.*the upgrade is taken back and the old release goes on"
    )
    with pytest.raises(hitless.NodeError, match=words):
        hitless.apply(node, make(2, EARLY.replace('"eth0"', '"eth*"')), progress=meanwhile)
    assert running(pods, first) == before
    assert running(pods, 2) == ([tool.ids["early"]], [])
    assert hitless.verify(node).version == "1.0"
    assert len(list(node.links.iterdir())) == 1


def test_a_rollback_keeps_what_was_adopted(pods: Pods, node: hitless.Node, make: Make, tool: Tool) -> None:
    (number,) = pods.add(1)
    hitless.apply(node, make(1, LATE))
    Xdp.attach(tool.programs["early"], interface(pods, number), "native")
    hitless.apply(node, make(2, ADOPTING))
    assert running(pods, number) == own(node)
    hitless.rollback(node)
    assert running(pods, number) == ([], own(node)[1])  # the release before has no such hook
    hitless.rollback(node)
    assert running(pods, number) == own(node)
    assert not (node.previous / "adopted").exists()
    well(node)


def test_filters_of_one_release_are_beside_each_other_and_keep_their_places(
    pods: Pods, node: hitless.Node, make: Make
) -> None:
    (number,) = pods.add(1)
    both = LATE + LATE.replace('link = "late"', 'link = "later"\npriority = 9\nhandle = 4')
    hitless.apply(node, make(1, both))
    before = [(one.priority, one.handle) for one in filters(interface(pods, number), "ingress")]
    assert before == [(9, 4), (0xC000, 1)]
    hitless.apply(node, make(2, both))
    assert [(one.priority, one.handle) for one in filters(interface(pods, number), "ingress")] == before
    renamed = both.replace('link = "later"', 'link = "last"\nwas = "later"')
    hitless.apply(node, make(1, renamed))
    assert {path.name.split("@")[0] for path in node.links.iterdir()} == {"late", "last"}
    assert [(one.priority, one.handle) for one in filters(interface(pods, number), "ingress")] == before
    well(node)
