"""Hooks whose links the kernel cannot update: a dispatcher stays attached, and programs take turns in its slot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.dispatcher import Dispatcher
from hitless.kernel.links import Link, all_links
from hitless.kernel.programs import Program, is_loaded
from hitless.upgrade.cutover import switch_back, switch_hooks
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from meshd.demo.pods import Pods
from tests.kills import kill_upgrade
from tests.patience import often, patient
from tests.releases import write_release

REPLACEMENTS = often(1000)

# Every datagram passes input once; every name that the sender gives itself is one passage of the tracepoint.
ADDRESS = 0x7E1200000000
FAULTED = f"if (((struct bpf_perf_event_data *)ctx)->addr >> 12 == {ADDRESS >> 12:#x}) note(); return 0;"
SOURCES = {
    "netfilter": ("netfilter", "note(); return 1;"),
    "perf_event": ("perf_event", FAULTED),
    "raw_tracepoint": ("raw_tp/task_rename", "note_own(); return 0;"),
    "tp_btf": ("tp_btf/task_rename", "note_own(); return 0;"),
    "tracepoint": ("tp/task/task_rename", "note_own(); return 0;"),
    "uprobe": ("uprobe/probed", "note(); return 0;"),
    "uretprobe": ("uretprobe/probed", "note(); return 0;"),
}
TARGETS = {
    "netfilter": "${netns}",
    "perf_event": "page-faults:1",
    "tracepoint": "task/task_rename",
    "uprobe": "${library}:probed",
    "uretprobe": "${library}:probed",
}
POINT = 'family = "ipv4"\npoint = "input"\npriority = -100\n'

COMMON = """
#define __maybe_unused __attribute__((unused))
#include <linux/bpf_perf_event.h>
MAP(seen, ARRAY, 3, __u32, __u64);
static __always_inline void note(void)
{
    __u32 key = RELEASE;
    __u64 *found = bpf_map_lookup_elem(&seen, &key);
    if (found)
        __sync_fetch_and_add(found, 1);
}
static __always_inline __maybe_unused void note_own(void)
{
    union { char text[16]; __u64 word; } comm, sender = { .text = "counted" };
    bpf_get_current_comm(&comm, sizeof(comm));
    if (comm.word == sender.word)
        note();
}
SEC("SECTION") int count(void *ctx) { BODY }
char _license[] SEC("license") = "GPL";
"""
ATTACH = """
[[attach]]
program = "count"
hook = "%s"
target = "%s"
link = "hook"
"""

ON_REQUEST = "not (sent % 16 == 0 and sent and select.select([0], [], [], 0)[0])"
DATAGRAMS = f"""
import select, socket, sys
ends = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
ends[1].bind(("127.0.0.1", 4242))
sent = 0
print("go", flush=True)
while sent < 1_000_000 and {ON_REQUEST}:
    ends[0].sendto(b"x", ("127.0.0.1", 4242))
    ends[1].recv(1)
    sent += 1
print(sent, flush=True)
"""
NAMES = f"""
import os, select
comm = os.open("/proc/self/comm", os.O_WRONLY)
os.write(comm, b"counted")
sent = 0
print("go", flush=True)
while sent < 1_000_000 and {ON_REQUEST}:
    os.write(comm, b"counted")
    sent += 1
print(sent, flush=True)
"""


CALLS = f"""
import ctypes, select, sys
library = ctypes.CDLL(sys.argv[1])
sent = 0
print("go", flush=True)
while sent < 1_000_000 and {ON_REQUEST}:
    library.probed()
    sent += 1
print(sent, flush=True)
"""
FAULTS = f"""
import ctypes, mmap, select
library = ctypes.CDLL(None)
library.mmap.restype = ctypes.c_void_p
library.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4
library.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
fixed = 0x100000  # MAP_FIXED_NOREPLACE
place = library.mmap({ADDRESS}, 4096, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed, -1, 0)
assert place == {ADDRESS}
byte = ctypes.c_char.from_address(place)
sent = 0
print("go", flush=True)
while sent < 1_000_000 and {ON_REQUEST}:
    byte.value = b"x"
    library.madvise(place, 4096, mmap.MADV_DONTNEED)
    sent += 1
print(sent, flush=True)
"""
SENDERS = {"netfilter": DATAGRAMS, "perf_event": FAULTS, "uprobe": CALLS, "uretprobe": CALLS}


def library(tmp_path: Path) -> Path:
    """With a function ``probed``, which nobody but the sender calls."""
    made = tmp_path / "probed.so"
    if not made.exists():
        command = ["clang-19", "-shared", "-x", "c", "-", "-o", str(made)]
        subprocess.run(command, input="int probed(void) { return 0; }", text=True, check=True)
    return made


def bundle(tmp_path: Path, hook: str, number: int, netns: str, point: str = POINT) -> hitless.Bundle:
    section, body = SOURCES[hook]
    source = COMMON.replace("RELEASE", str(number)).replace("SECTION", section).replace("BODY", body)
    manifest = ATTACH % (hook, TARGETS.get(hook, "task_rename")) + (point if hook == "netfilter" else "")
    path = write_release(tmp_path / str(number), f"{number}.0", source, manifest)
    return hitless.Bundle.load(path, {"netns": netns, "library": str(library(tmp_path))})


def start(lab: Lab, tmp_path: Path, hook: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SENDERS.get(hook, NAMES), str(library(tmp_path))]
    sender = lab.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert sender.stdout is not None
    assert sender.stdout.readline() == "go\n"
    return sender


def stop(sender: subprocess.Popen[str]) -> int:
    return int(sender.communicate("\n", timeout=patient(10))[0])


@pytest.mark.parametrize("hook", SOURCES)
def test_each_event_is_counted_by_one_of_two_programs_that_took_turns_a_thousand_times(
    lab: Lab, tmp_path: Path, hook: str
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    releases = {number: bundle(tmp_path, hook, number, str(lab.netns)) for number in (1, 2)}
    hitless.apply(node, releases[1])
    sender = start(lab, tmp_path, hook)
    result = hitless.apply(node, releases[2])
    assert {(update.action, update.method) for update in result.hooks} == {("update", "slot of its dispatcher")}
    programs = [Program.open(generation / "progs" / "count") for generation in (node.current, node.previous)]
    for turn in range(REPLACEMENTS):
        there, comes = programs[turn % 2], programs[(turn + 1) % 2]
        updates = [msgspec.structs.replace(update, expected=there.info.id) for update in result.hooks]
        switch_hooks(updates, {"count": comes}, node.links, node.current / "maps")
    hitless.rollback(node)
    hitless.apply(node, releases[2])
    hitless.apply(node, releases[1])
    sent = stop(sender)
    counted = [node.map("seen").get(number) for number in (1, 2)]
    assert sum(counted) == sent
    assert min(counted) > often(100)
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


@pytest.mark.parametrize("hook", SOURCES)
def test_an_upgrade_that_fails_after_the_cutover_counts_everything_in_the_old_release(
    lab: Lab, tmp_path: Path, hook: str
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(tmp_path, hook, 1, str(lab.netns)))

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            raise ZeroDivisionError

    sender = start(lab, tmp_path, hook)
    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, bundle(tmp_path, hook, 2, str(lab.netns)), progress=fail)
    sent = stop(sender)
    assert sum(node.map("seen").get(number) for number in (1, 2)) == sent
    assert hitless.verify(node).problems == ()
    with Program.open(node.current / "progs" / "count") as program:
        number = program.info.id
    hitless.unload(node)
    assert not is_loaded(number)


@pytest.mark.parametrize("hook", ["netfilter", "tp_btf", "uprobe"])
@pytest.mark.parametrize("back", [False, True])
def test_a_killed_upgrade_is_finished_or_taken_back_and_counts_stay_exact(
    lab: Lab, tmp_path: Path, hook: str, back: bool
) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(tmp_path, hook, 1, str(lab.netns)))
    second = bundle(tmp_path, hook, 2, str(lab.netns)).path
    sender = start(lab, tmp_path, hook)
    for step in ("cutover", "merge", "commit"):
        kill_upgrade(step, node, second, {"netns": str(lab.netns), "library": str(library(tmp_path))})
        assert hitless.recover(node, back=back) is not None
        assert status(node).version == ("1.0" if back else "2.0")
        assert status(node).problems == ()
        if not back:
            hitless.rollback(node)
    sent = stop(sender)
    assert sum(node.map("seen").get(number) for number in (1, 2)) == sent
    assert hitless.verify(node).problems == ()


def test_netfilter_of_all_pods_is_replaced_and_follows_a_path_to_another_namespace(pods: Pods, tmp_path: Path) -> None:
    node = hitless.Node(pods.lab.bpffs / "store")
    numbers = pods.add(3)
    releases = {number: bundle(tmp_path, "netfilter", number, str(pods.directory / "*")) for number in (1, 2)}
    assert len(hitless.apply(node, releases[1]).hooks) == 3
    sending = pods.send(numbers, patient(30), 100_000)
    hitless.apply(node, releases[2])
    sent = sum(sending.stop())
    counted = [node.map("seen").get(number) for number in (1, 2)]
    assert sum(counted) == sent
    assert counted[0] > 0
    pods.forget(numbers[0])
    (late,) = pods.add(1)
    (pods.directory / f"pod{late}").rename(pods.directory / f"pod{numbers[0]}")
    (told,) = status(node).problems
    assert "is attached to netns" in told
    again = hitless.apply(node, releases[2])
    assert sorted(hook.action for hook in again.hooks) == ["attach", "keep", "keep"]
    assert status(node).problems == ()
    sent += sum(pods.send([late], patient(5), 100).all())
    assert sum(node.map("seen").get(number) for number in (1, 2)) == sent


@pytest.mark.parametrize("hook", ["netfilter", "tracepoint"])
def test_a_hook_whose_pin_somebody_removed_is_told_and_attached_again(lab: Lab, tmp_path: Path, hook: str) -> None:
    node = hitless.Node(lab.bpffs / "store")
    release = bundle(tmp_path, hook, 1, str(lab.netns))
    hitless.apply(node, release)
    (node.links / "hook").unlink()
    assert [told for told in status(node).problems if "link hook is gone" in told]
    assert [again.action for again in hitless.apply(node, release).hooks] == ["attach"]
    sent = stop(start(lab, tmp_path, hook))
    assert node.map("seen").get(1) == sent
    assert status(node).problems == ()


def test_an_undo_goes_on_where_one_was_killed_that_had_emptied_the_slot(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hooks = hitless.apply(node, bundle(tmp_path, "netfilter", 1, str(lab.netns))).hooks
    with Dispatcher.open(node.root / "slots" / "hook", node.links / "hook") as there:
        there.detach()
    with Program.open(node.current / "progs" / "count") as program:
        switch_back(hooks, {"count": program}, node.links, node.current / "maps")
    assert [*node.links.iterdir(), *(node.root / "slots").iterdir()] == []


def test_a_probed_file_that_another_took_the_place_of_is_told(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(tmp_path, "uprobe", 1, str(lab.netns)))
    assert (status(node).problems, hitless.verify(node).problems) == ((), ())
    probed = library(tmp_path)
    newer = tmp_path / "newer.so"
    newer.write_bytes(probed.read_bytes())
    newer.replace(probed)
    for problems in (status(node).problems, hitless.verify(node).problems):
        assert [one for one in problems if f"link hook is in the file that was at {probed} before" in one]


def test_another_point_needs_another_link(lab: Lab, tmp_path: Path) -> None:
    node = hitless.Node(lab.bpffs / "store")
    hitless.apply(node, bundle(tmp_path, "netfilter", 1, str(lab.netns)))
    moved = bundle(tmp_path, "netfilter", 2, str(lab.netns), POINT.replace("input", "output"))
    with pytest.raises(hitless.UnsupportedError, match="hook is on netfilter ipv4 input -100, and count attaches to"):
        hitless.plan(node, moved)


def test_a_priority_that_is_taken_is_named_and_nothing_stays(lab: Lab, tmp_path: Path) -> None:
    hitless.apply(hitless.Node(lab.bpffs / "store"), bundle(tmp_path, "netfilter", 1, str(lab.netns)))
    before = {link.id for link in all_links() if link.type == "netfilter"}
    other = hitless.Node(lab.bpffs / "other")
    with Link.open(lab.bpffs / "store" / "links" / "hook") as link:
        taking = link.info.id
    (planned,) = hitless.plan(other, bundle(tmp_path, "netfilter", 3, str(lab.netns))).hooks
    assert taking in planned.clashes
    with pytest.raises(hitless.KernelError, match=rf"netfilter ipv4 input -100 .*EBUSY.* the links .*\b{taking}\b"):
        hitless.apply(other, bundle(tmp_path, "netfilter", 2, str(lab.netns)))
    assert {link.id for link in all_links() if link.type == "netfilter"} == before
    assert not other.root.exists()


def test_a_tracepoint_that_this_kernel_has_not_is_named(lab: Lab, tmp_path: Path) -> None:
    source = COMMON.replace("RELEASE", "1").replace("SECTION", "tp/task/none").replace("BODY", "note(); return 0;")
    path = write_release(tmp_path / "one", "1.0", source, ATTACH % ("tracepoint", "task/none"))
    with pytest.raises(hitless.NodeError, match="this kernel has no tracepoint task/none"):
        hitless.plan(hitless.Node(lab.bpffs / "store"), hitless.Bundle.load(path, {}))


def test_a_function_that_the_file_has_not_is_named(lab: Lab, tmp_path: Path) -> None:
    source = COMMON.replace("RELEASE", "1").replace("SECTION", "uprobe/x").replace("BODY", "note(); return 0;")
    path = write_release(tmp_path / "one", "1.0", source, ATTACH % ("uprobe", f"{library(tmp_path)}:none"))
    with pytest.raises(hitless.NodeError, match="has no function none"):
        hitless.plan(hitless.Node(lab.bpffs / "store"), hitless.Bundle.load(path, {}))


def test_a_program_that_may_sleep_is_refused_where_a_dispatcher_may_not(lab: Lab, tmp_path: Path) -> None:
    source = COMMON.replace("RELEASE", "1").replace("SECTION", "uprobe.s/x").replace("BODY", "note(); return 0;")
    path = write_release(tmp_path / "one", "1.0", source, ATTACH % ("uprobe", f"{library(tmp_path)}:probed"))
    with pytest.raises(hitless.UnsupportedError, match="may sleep"):
        hitless.Bundle.load(path, {})


@pytest.mark.parametrize("hook", ["fentry", "lsm", "kprobe"])
def test_a_hook_that_is_not_supported_is_refused_by_name(lab: Lab, tmp_path: Path, hook: str) -> None:
    source = COMMON.replace("RELEASE", "1").replace("SECTION", "raw_tp/x").replace("BODY", "note(); return 0;")
    path = write_release(tmp_path / "one", "1.0", source, ATTACH % (hook, "x"))
    with pytest.raises(hitless.UnsupportedError, match=f"hook {hook} is not supported: "):
        hitless.Bundle.load(path, {})
