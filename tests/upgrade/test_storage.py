"""Local storage of sockets, tasks and cgroups: each owner's value goes on in the new release."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.kernel.libbpf import check, libc
from hitless.kernel.maps import Map
from hitless.kernel.storage import Settler
from hitless.layout.codec import decode
from hitless.upgrade import transaction
from hitless.upgrade.status import status
from hitless.upgrade.storage import Storage
from meshd.demo.lab import Lab
from tests.kills import die, exit_code_of
from tests.patience import often
from tests.releases import ATTACH, write_release

TYPES = ("sk", "task", "cgrp")
BACK = tuple(f"of_{owner}" for owner in TYPES)

# Counts connects by socket, by thread and by cgroup. The helper of cgroups is newer than Debian's headers.
COUNTING = """
struct cgroup;
struct css_set { struct cgroup *dfl_cgrp; } __attribute__((preserve_access_index));
struct task_struct { struct css_set *cgroups; } __attribute__((preserve_access_index));
static void *(*bpf_cgrp_storage_get_)(void *map, void *cgroup, void *value, __u64 flags) = (void *)210;
#define STORAGE(name, number) \\
    struct { __uint(type, number); __uint(map_flags, BPF_F_NO_PREALLOC); \\
             __type(key, int); __type(value, struct tally); } name SEC(".maps")
STORAGE(of_sk, BPF_MAP_TYPE_SK_STORAGE);
STORAGE(of_task, BPF_MAP_TYPE_TASK_STORAGE);
STORAGE(of_cgrp, 32);
static __always_inline void count(struct tally *found)
{
    if (found)
        __sync_fetch_and_add(&found->count, 1);
}
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    struct task_struct *task = (void *)bpf_get_current_task_btf();
    struct tally *of_group;
    if (ctx->sk)
        count(bpf_sk_storage_get(&of_sk, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE));
    count(bpf_task_storage_get(&of_task, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE));
    of_group = bpf_cgrp_storage_get_(&of_cgrp, task->cgroups->dfl_cgrp, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
    if (!of_group) // of two CPUs that make it at once, the kernel gives one nothing
        of_group = bpf_cgrp_storage_get_(&of_cgrp, task->cgroups->dfl_cgrp, 0, 0);
    count(of_group);
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
FIRST = 'struct tally { __u32 count TAG("merge=sum"); __u32 mark; __u8 label[6]; };'
SECOND = """
struct tally { __u64 since TAG("default=5"); __u64 count TAG("merge=sum"); __u8 label[7]; __u32 sign TAG("was=mark"); };
"""

# Two threads connect with three sockets each as fast as they can, and say how often when told to stop.
CLIENT = """
import json, socket, sys, threading, time
sockets, threads, go = {}, {}, True
def work():
    mine = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
    counts = [0, 0, 0]
    ready.wait()
    while go:
        for index, each in enumerate(mine):
            each.connect(("127.0.0.1", 7))
            counts[index] += 1
        if counts[0] % 50 == 0:
            time.sleep(0.0005)  # leaves the processor to the upgrade
    sockets.update({each.fileno(): count for each, count in zip(mine, counts)})
    threads[threading.get_native_id()] = sum(counts)
    ready.wait()
    over.wait()
ready, over = threading.Barrier(3), threading.Event()
for _ in range(2):
    threading.Thread(target=work).start()
ready.wait()
print("ready", flush=True)
sys.stdin.readline()
go = False
ready.wait()
print(json.dumps([sockets, threads]), flush=True)
sys.stdin.readline()
over.set()
"""


class Clients:
    """What the clients counted, and what the maps of a node have for the same sockets, threads and cgroup."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        run = [sys.executable, "-c", CLIENT]
        self._processes = [
            lab.popen(run, cgroup="clients", stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)
        ]
        for process in self._processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        self.counts: dict[str, int] = {}
        self._fds: dict[str, int] = {}

    def _say(self, text: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.flush()

    def stop(self) -> None:
        self._say("stop\n")
        for number, process in enumerate(self._processes):
            assert process.stdout is not None
            sockets, threads = json.loads(process.stdout.readline())
            pidfd = os.pidfd_open(process.pid)
            for fd, count in sockets.items():
                name = f"sk {number} {fd}"
                self.counts[name] = count
                self._fds[name] = check(libc().syscall(438, *map(_int, (pidfd, int(fd), 0))), "pidfd_getfd", fd)
            os.close(pidfd)
            for thread, count in threads.items():
                name = f"task {thread}"
                self.counts[name] = count
                self._fds[name] = os.pidfd_open(int(thread), os.O_EXCL)  # PIDFD_THREAD
        self.counts["cgrp"] = sum(count for name, count in self.counts.items() if name.startswith("task"))
        self._fds["cgrp"] = os.open(self._lab.cgroup_of("clients"), os.O_RDONLY)

    def values(self, node: hitless.Node) -> dict[str, Any]:
        found = {}
        for name, fd in self._fds.items():
            with Map.open(node.root / "maps" / f"of_{name.split()[0]}") as held:
                value = held.lookup(fd.to_bytes(4, sys.byteorder))
                layout = held.spec("").value
            assert value is not None, name
            assert layout is not None
            found[name] = decode(layout, value)
        return found

    def write(self, node: hitless.Node, value: bytes) -> None:
        """Set the value of every socket, thread and cgroup."""
        for name, fd in self._fds.items():
            with Map.open(node.root / "maps" / f"of_{name.split()[0]}") as held:
                held.update(fd.to_bytes(4, sys.byteorder), value)

    def counted(self, node: hitless.Node) -> dict[str, int]:
        return {name: value["count"] for name, value in self.values(node).items()}

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        for process in self._processes:
            process.kill()
            process.wait()


def _int(number: int) -> Any:
    from hitless.kernel.libbpf import ffi

    return ffi.cast("long", number)


@contextmanager
def clients(lab: Lab) -> Iterator[Clients]:
    made = Clients(lab)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    top = tmp_path_factory.mktemp("storage")
    return {
        1: write_release(top / "1", "1.0", FIRST + COUNTING, ATTACH),
        2: write_release(top / "2", "2.0", SECOND + COUNTING, ATTACH),
    }


@pytest.fixture
def bundles(directories: dict[int, Path], lab: Lab) -> dict[int, hitless.Bundle]:
    return {number: hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)}) for number, path in directories.items()}


def test_the_plan_says_how_and_how_exactly(node: hitless.Node, bundles: dict[int, hitless.Bundle]) -> None:
    hitless.apply(node, bundles[1])
    plans = hitless.plan(node, bundles[2]).maps
    assert {(entry.action, entry.kind, entry.method) for entry in plans} == {
        ("convert", "storage", "merge in the kernel, owner by owner")
    }
    exactness = {entry.name: entry.exactness for entry in plans}
    both = "exact, but best-effort where programs of both releases write these at once: label"
    assert exactness == {
        "of_sk": both,
        "of_task": f"{both}; only tasks of this process's PID namespace are seen",
        "of_cgrp": f"{both}; only cgroups of this process's cgroup namespace are seen",
    }


def test_every_owner_keeps_its_value_in_the_new_layout(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    hitless.apply(node, bundles[1])
    with clients(lab) as running:
        running.stop()
        running.write(node, (7).to_bytes(4, "little") + (9).to_bytes(4, "little") + b"label!\0\0")
        result = hitless.apply(node, bundles[2])
        assert set(map(repr, running.values(node).values())) == {
            repr({"since": 5, "count": 7, "label": b"label!\0", "sign": 9})
        }
        assert {entry.name: entry.copied for entry in result.maps} == {"of_sk": 12, "of_task": 4, "of_cgrp": 1}
        hitless.apply(node, bundles[1], allow_loss=BACK)
        assert set(map(repr, running.values(node).values())) == {repr({"count": 7, "mark": 9, "label": b"label!"})}


def test_no_count_of_any_owner_is_lost_while_upgrades_go_back_and_forth(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    hitless.apply(node, bundles[1])
    with clients(lab) as running:
        for _ in range(often(15)):
            hitless.apply(node, bundles[2])
            hitless.apply(node, bundles[1], allow_loss=BACK)
        running.stop()
        assert min(running.counts.values()) > often(100)
        assert running.counted(node) == running.counts


def test_without_the_catch_up_counts_are_lost(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "catch_up", lambda carrier, last=False: 0)
    hitless.apply(node, bundles[1])
    with clients(lab) as running:
        for _ in range(5):
            hitless.apply(node, bundles[2])
            hitless.apply(node, bundles[1], allow_loss=BACK)
        running.stop()
        counted = running.counted(node)
        assert all(counted[name] < count for name, count in running.counts.items())


def test_an_upgrade_that_fails_after_the_cutover_takes_the_new_counts_back(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    hitless.apply(node, bundles[1])

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            raise ZeroDivisionError

    with clients(lab) as running:
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                hitless.apply(node, bundles[2], progress=late)
            assert node.observe().version == "1.0"
        running.stop()
        assert running.counted(node) == running.counts
    assert status(node).problems == ()


def upgrade_dying(step: str, fails: bool, node: hitless.Node, bundle: hitless.Bundle) -> None:
    """An upgrade that dies at ``step``, or after it settled so often; one that ``fails`` does so after its cutover."""
    settle, runs = Settler.settle, 0

    def settling(settler: Settler, *parts: Any) -> Any:
        nonlocal runs
        left = settle(settler, *parts)
        runs += 1
        if step == f"settled {runs}":
            die()
        return left

    def progress(event: hitless.Progress) -> None:
        if event.step == step:
            die()
        if fails and event.step == "commit":
            raise ZeroDivisionError

    setattr(Settler, "settle", settling)  # noqa: B010 - of the process that dies
    hitless.apply(hitless.Node(node.root), bundle, progress=progress)


@pytest.mark.parametrize("fails", [False, True], ids=["forward", "taken-back"])
def test_counts_stay_exact_whenever_the_upgrader_is_killed(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab, fails: bool
) -> None:
    hitless.apply(node, bundles[1])
    steps = [f"settled {runs}" for runs in (range(9, 25, 4) if fails else range(1, 16, 4))]
    if not fails:
        steps += ["cutover", "merge"]
    killed = 0
    with clients(lab) as running:
        for step in steps:
            code = exit_code_of(partial(upgrade_dying, step, fails, node, bundles[2]))
            killed += code == -signal.SIGKILL
            assert code in (-signal.SIGKILL, int(fails))  # or there were fewer runs than that
            hitless.recover(node)
            assert status(node).problems == ()
            hitless.apply(node, bundles[1], allow_loss=BACK)
        running.stop()
        assert running.counted(node) == running.counts
    assert killed > 2


def test_a_value_that_does_not_fit_is_counted_and_never_wrapped(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    hitless.apply(node, bundles[2])
    with clients(lab) as running:
        running.stop()
        running.write(node, bytes(8) + (1 << 40).to_bytes(8, "little") + bytes(16))
        loose = [entry for entry in hitless.plan(node, bundles[1]).maps if entry.loss]
        assert {entry.name for entry in loose} == set(BACK)
        result = hitless.apply(node, bundles[1], allow_loss=BACK)
        assert {entry.name: entry.lost_fields["count"] for entry in result.maps} == {
            "of_sk": 12,
            "of_task": 4,
            "of_cgrp": 1,
        }
        assert set(running.counted(node).values()) == {(1 << 32) - 1}


def test_many_cgroups_with_large_values_are_all_carried(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    large = [text.replace("[6]", "[200]").replace("[7]", "[300]") + COUNTING for text in (FIRST, SECOND)]
    one, two = (
        hitless.Bundle.load(
            write_release(tmp_path / str(number), f"{number}.0", source, ATTACH), {"cgroup": str(lab.cgroup)}
        )
        for number, source in enumerate(large, 1)
    )
    hitless.apply(node, one)
    cgroups = [lab.cgroup_of("clients") / f"many{number}" for number in range(300)]
    fds = []
    with Map.open(node.root / "maps" / "of_cgrp") as held:
        for number, cgroup in enumerate(cgroups):
            cgroup.mkdir()
            fds.append(os.open(cgroup, os.O_RDONLY))
            held.update(fds[-1].to_bytes(4, sys.byteorder), number.to_bytes(4, "little") + bytes(204))
    result = hitless.apply(node, two)
    assert {entry.name: entry.copied for entry in result.maps}["of_cgrp"] == 300
    with Map.open(node.root / "maps" / "of_cgrp") as held:
        values = [held.lookup(fd.to_bytes(4, sys.byteorder)) or b"" for fd in fds]
    assert [int.from_bytes(value[8:16], "little") for value in values] == list(range(300))
    for fd in fds:
        os.close(fd)


INHERITED = """
struct { __uint(type, BPF_MAP_TYPE_SK_STORAGE); __uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
         __type(key, int); __type(value, struct tally); } of_sk SEC(".maps");
SEC("sockops") int count4(struct bpf_sock_ops *ctx)
{
    struct tally *found;
    if (!ctx->sk || (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB && ctx->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB))
        return 1;
    found = bpf_sk_storage_get(&of_sk, ctx->sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""

# A listening socket, then a connection to it whenever a line comes in; the accepted sockets are what inherits.
LISTENING = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.fileno(), flush=True)
ends = []
for _ in sys.stdin:
    ends.append((socket.create_connection(listener.getsockname()), listener.accept()[0]))
    print(ends[-1][1].fileno(), flush=True)
"""


def test_a_socket_that_is_accepted_meanwhile_inherits_once(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    first, second = (
        hitless.Bundle.load(
            write_release(tmp_path / str(number), f"{number}.0", text + INHERITED, ATTACH), {"cgroup": str(lab.cgroup)}
        )
        for number, text in enumerate((FIRST, SECOND), 1)
    )
    hitless.apply(node, first)
    run = [sys.executable, "-c", LISTENING]
    process = lab.popen(run, cgroup="clients", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    fds = [int(process.stdout.readline())]

    def accept(_: hitless.Node) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("accept\n")
        process.stdin.flush()
        fds.append(int(process.stdout.readline()))

    accept(node)
    hitless.apply(node, second, prepare=accept)
    accept(node)
    pidfd = os.pidfd_open(process.pid)
    found = []
    with Map.open(node.root / "maps" / "of_sk") as held:
        for fd in fds:
            mine = check(libc().syscall(438, *map(_int, (pidfd, fd, 0))), "pidfd_getfd", fd)
            found.append(int.from_bytes((held.lookup(mine.to_bytes(4, sys.byteorder)) or b"")[8:16], "little"))
            os.close(mine)
    os.close(pidfd)
    process.kill()
    assert found == [1, 2, 2, 2]  # the listener counts itself, each child what it inherited and itself


def test_storage_of_inodes_is_not_carried_and_the_plan_says_why(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    inodes = """
    struct { __uint(type, BPF_MAP_TYPE_INODE_STORAGE); __uint(map_flags, BPF_F_NO_PREALLOC);
             __type(key, int); __type(value, struct tally); } of_inode SEC(".maps");
    char _license[] SEC("license") = "Dual BSD/GPL";
    """
    one, two = (
        hitless.Bundle.load(write_release(tmp_path / str(number), f"{number}.0", text + inodes, ""), {})
        for number, text in enumerate((FIRST, SECOND), 1)
    )
    hitless.apply(node, one)
    (of_inode,) = hitless.plan(node, two).maps
    assert (of_inode.action, of_inode.loss) == (
        "discard",
        ("all entries: the inodes that have a value in it cannot be listed",),
    )
    with pytest.raises(hitless.LossNotAllowedError, match="of_inode loses"):
        hitless.apply(node, two)


def test_what_a_kernel_cannot_visit_is_lost_and_the_plan_says_so(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    hitless.apply(node, bundles[1])
    monkeypatch.setattr(transaction, "features", lambda: {"map/cgrp_storage", "visit/sk_storage"})
    plans = {entry.name: entry for entry in hitless.plan(node, bundles[2]).maps}
    assert plans["of_sk"].action == "convert"
    for name, kind in (("of_task", "task_storage"), ("of_cgrp", "cgrp_storage")):
        assert plans[name].loss == (
            f"all entries: this kernel, or this process's rights, let no program visit what a {kind} map holds",
        )
