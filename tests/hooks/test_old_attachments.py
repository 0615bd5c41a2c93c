"""Programs that another tool attached to a cgroup without a link: in the way of links, or adopted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.kernel.cgroups import CgroupPlace
from hitless.kernel.libbpf import check, lib, options
from hitless.kernel.links import cgroup_id
from hitless.kernel.maps import Map
from hitless.kernel.names import attach_number
from hitless.kernel.programs import Program, load_object
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.hooks.test_cgroup import ATTACH, HOOKS, SOURCE, Traffic
from tests.releases import compile_object, write_release

TYPE = "cgroup_inet4_connect"
NONE, OVERRIDE, MULTI = 0, 1, 2
ADOPT = ATTACH + "adopt = true\n"

Make = Callable[..., hitless.Bundle]


def source(number: int) -> str:
    section, context, counted, verdict = HOOKS["connect4"]
    return SOURCE % (section, context, number, counted, verdict)


@pytest.fixture
def node(lab: Lab) -> hitless.Node:
    return hitless.Node(lab.bpffs / "store")


@pytest.fixture
def make(lab: Lab, tmp_path: Path) -> Make:
    def release(number: int, manifest: str = ADOPT) -> hitless.Bundle:
        path = write_release(tmp_path / f"{number}-{len(manifest)}", f"{number}.0", source(number), manifest)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))})

    return release


class Tool:
    """Another tool, with a program that it does not hold any more once it is attached."""

    def __init__(self, directory: Path) -> None:
        loaded = load_object(compile_object(source(0), directory / "tool.bpf.o").read_bytes(), "tool", {}, {})
        self._seen: Map = loaded.maps["seen"]
        self.program: Program = loaded.programs["count"]
        self.id = self.program.info.id

    def attach(self, cgroup: Path, flags: int) -> None:
        fd = os.open(cgroup, os.O_RDONLY)
        opts = options("bpf_prog_attach_opts", flags=flags)
        check(lib().bpf_prog_attach_opts(self.program.fd, fd, attach_number(TYPE), opts), "attach", cgroup)
        os.close(fd)

    @property
    def counted(self) -> int:
        return int.from_bytes(self._seen.lookup(bytes(4)) or b"", "little")


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    return Tool(tmp_path)


def programs(lab: Lab) -> list[int]:
    cgroup = lab.cgroup_of("clients")
    return CgroupPlace(str(cgroup), cgroup_id(cgroup), TYPE).programs()


@pytest.mark.parametrize("flags", [NONE, OVERRIDE, MULTI])
def test_a_program_without_a_link_is_adopted_and_upgraded_without_a_gap(
    lab: Lab, node: hitless.Node, make: Make, tool: Tool, flags: int
) -> None:
    traffic = Traffic(lab, "connect4")
    tool.attach(lab.cgroup_of("clients"), flags)
    tool.program.close()
    traffic.go()
    result = hitless.apply(node, make(1))
    assert [(hook.action, hook.expected, hook.adopted) for hook in result.hooks] == [("adopt", tool.id, "count")]
    for number in (2, 1, 2):
        hitless.apply(node, make(number))
    done = traffic.stop()
    counted = [tool.counted, *(node.map("seen").get(number) for number in (1, 2))]
    traffic.end()
    assert sum(counted) == done
    assert min(counted) > 0
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()
    hitless.unload(node)
    assert programs(lab) == []


def test_an_undo_puts_it_back(lab: Lab, node: hitless.Node, make: Make, tool: Tool) -> None:
    tool.attach(lab.cgroup_of("clients"), MULTI)
    tool.program.close()

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            assert programs(lab) != [tool.id]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, make(1), progress=fail)
    assert programs(lab) == [tool.id]


def test_our_link_beside_it_and_its_taking_ours_off_are_told_apart(
    lab: Lab, node: hitless.Node, make: Make, tool: Tool
) -> None:
    hitless.apply(node, make(1, ATTACH))  # a link
    assert programs(lab) == []
    tool.attach(lab.cgroup_of("clients"), MULTI)
    assert programs(lab) == [tool.id]
    assert [hook.action for hook in hitless.plan(node, make(2)).hooks] == ["update"]
    hitless.unload(node)
    hitless.apply(node, make(1))
    cgroup = lab.cgroup_of("clients")
    with Program.open(node.current / "progs" / "count") as ours:
        CgroupPlace(str(cgroup), cgroup_id(cgroup), TYPE).detach(ours)
    assert "link hook is detached" in status(node).problems[0]
    hitless.apply(node, make(1))
    assert status(node).problems == ()


@pytest.mark.parametrize("where", ["beside", "below"])
def test_a_program_that_keeps_links_out_is_named_in_the_plan(
    lab: Lab, node: hitless.Node, make: Make, tool: Tool, where: str
) -> None:
    cgroup = lab.cgroup_of("clients")
    there = cgroup if where == "beside" else cgroup.parent
    tool.attach(there, NONE)
    try:
        words = rf"link hook: cgroup {there} has {TYPE} program {tool.id}, .* attaches nothing {where} it"
        with pytest.raises(hitless.NodeError, match=words):
            hitless.apply(node, make(1, ATTACH))
        assert not node.root.exists()
    finally:
        CgroupPlace(str(there), cgroup_id(there), TYPE).detach(tool.program)
    tool.attach(cgroup.parent, OVERRIDE)
    try:
        hitless.apply(node, make(1, ATTACH))
    finally:
        CgroupPlace(str(cgroup.parent), cgroup_id(cgroup.parent), TYPE).detach(tool.program)


def test_of_two_programs_without_a_link_none_is_adopted(
    lab: Lab, node: hitless.Node, make: Make, tmp_path: Path, tool: Tool
) -> None:
    for one in (tool, Tool(tmp_path)):
        one.attach(lab.cgroup_of("clients"), MULTI)
    with pytest.raises(hitless.NodeError, match=r"without a link and program .* nobody can say which one to adopt"):
        hitless.plan(node, make(1))
