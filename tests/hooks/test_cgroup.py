"""Every attach type of cgroups: a thousand replacements under traffic, each call counted by exactly one program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.programs import Program
from hitless.upgrade.cutover import switch_hooks
from hitless.upgrade.model import HookPlan
from meshd.demo.lab import Lab
from tests.patience import often, patient
from tests.releases import write_release

REPLACEMENTS = often(1000)

ANY = "1"
ESTABLISHED = "ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB"
# WHAT of tests/hooks/traffic.py: section, context, which calls are counted, what is returned
HOOKS = {
    **{f"{call}{family}": (f"cgroup/{call}{family}", "bpf_sock_addr", ANY, 1)
       for family in ("4", "6", "_unix")
       for call in ("connect", "sendmsg", "recvmsg", "getpeername", "getsockname", "bind")
       if (call, family) != ("bind", "_unix")},
    **{f"post_bind{family}": (f"cgroup/post_bind{family}", "bpf_sock", ANY, 1) for family in "46"},
    "sock_create": ("cgroup/sock_create", "bpf_sock", ANY, 1),
    "sock_release": ("cgroup/sock_release", "bpf_sock", ANY, 1),
    "getsockopt": ("cgroup/getsockopt", "bpf_sockopt", ANY, 1),
    "setsockopt": ("cgroup/setsockopt", "bpf_sockopt", ANY, 1),
    "sysctl": ("cgroup/sysctl", "bpf_sysctl", ANY, 1),
    "dev": ("cgroup/dev", "bpf_cgroup_dev_ctx", ANY, 1),
    "sock_ops": ("sockops", "bpf_sock_ops", ESTABLISHED, 1),
    "ingress": ("cgroup_skb/ingress", "__sk_buff", ANY, 1),
    "egress": ("cgroup_skb/egress", "__sk_buff", ANY, 1),
}  # fmt: skip

SOURCE = """
MAP(seen, ARRAY, 3, __u32, __u64);
SEC("%s") int count(struct %s *ctx)
{
    __u32 key = %d;
    __u64 *found = bpf_map_lookup_elem(&seen, &key);
    if (found && (%s))
        __sync_fetch_and_add(found, 1);
    return %d;
}
char _license[] SEC("license") = "GPL";
"""

ATTACH = """
[[attach]]
program = "count"
hook = "cgroup"
target = "${cgroup}"
link = "hook"
"""


def bundle(lab: Lab, directory: Path, what: str, number: int) -> hitless.Bundle:
    section, context, counted, verdict = HOOKS[what]
    source = SOURCE % (section, context, number, counted, verdict)
    path = write_release(directory / str(number), f"{number}.0", source, ATTACH)
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))})


class Traffic:
    """A client in ``lab`` that does WHAT between ``go`` and ``stop`` only, which tells how often."""

    def __init__(self, lab: Lab, what: str) -> None:
        command = [sys.executable, "-m", "tests.hooks.traffic", what]
        house = Path(__file__).parents[2]
        self._client = lab.popen(command, "clients", stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=house)
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._client.stdout is not None
        return self._client.stdout.readline().strip()

    def _say(self) -> None:
        assert self._client.stdin is not None
        self._client.stdin.write("\n")

    def go(self) -> None:
        self._say()

    def stop(self) -> int:
        self._say()
        return int(self._line())

    def end(self) -> None:
        self._say()
        assert self._client.wait(timeout=patient(10)) == 0


@pytest.mark.parametrize("what", HOOKS)
def test_each_call_is_counted_by_one_of_two_programs_that_took_turns_a_thousand_times(
    module_lab: Lab, tmp_path: Path, what: str
) -> None:
    lab = module_lab
    node = hitless.Node(lab.bpffs / what)
    releases = {number: bundle(lab, tmp_path, what, number) for number in (1, 2)}
    hitless.apply(node, releases[1])
    result = hitless.apply(node, releases[2])
    assert [(hook.link, hook.action) for hook in result.hooks] == [("hook", "update")]
    traffic = Traffic(lab, what)
    counts = node.map("seen")
    for number in (1, 2):
        counts[number] = 0
    traffic.go()
    take_turns(node, result.hooks[0])
    hitless.apply(node, releases[1])
    done = traffic.stop()
    counted = [counts.get(number) for number in (1, 2)]
    traffic.end()
    hitless.unload(node)
    assert sum(counted) == done
    assert min(counted) > often(100)


def take_turns(node: hitless.Node, hook: HookPlan) -> None:
    programs = [Program.open(generation / "progs" / "count") for generation in (node.current, node.previous)]
    for turn in range(REPLACEMENTS):
        there, comes = programs[turn % 2], programs[(turn + 1) % 2]
        update = msgspec.structs.replace(hook, action="update", expected=there.info.id)
        switch_hooks([update], {hook.program: comes}, node.links, node.current / "maps")
