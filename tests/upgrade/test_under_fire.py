"""Counters under writers on every CPU, and upgrades whose process is killed: nothing is lost, nothing counted twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import hitless
from hitless.kernel.maps import Map
from hitless.upgrade import finish
from hitless.upgrade.copy import Carriage
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.kills import die, exit_code_of, kill_upgrade, kill_while_undoing
from tests.patience import often, patient
from tests.releases import ATTACH, COUNTING, FIRST, write_release
from tests.upgrade.conftest import Release

BACK = ("tally", "limit")

# Connects to a port that nobody listens on: the program on the hook counts each try before the refusal.
CLIENT = """
import os, signal, socket, sys
os.nice(5)  # who upgrades, and other tests, go first
port, tries, go = int(sys.argv[1]), 0, True
address = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
family = socket.AF_INET6 if ":" in address else socket.AF_INET
def stop(*_):
    global go
    go = False
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while go and tries < 5_000_000:
    with socket.socket(family) as client:
        client.connect_ex((address, port))
    tries += 1
print(tries, flush=True)
"""


@contextmanager
def connecting(lab: Lab, address: str, port: int) -> Iterator[None]:
    """Two clients that connect to this as fast as they can."""
    command = [sys.executable, "-c", CLIENT, str(port), address]
    running = [lab.popen(command, cgroup="clients", stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for client in running:
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
        yield
    finally:
        for client in running:
            client.send_signal(signal.SIGTERM)
            client.communicate(timeout=patient(10))


@contextmanager
def clients(lab: Lab) -> Iterator[dict[int, int]]:
    """Clients that connect as fast as they can, two to one port and one to another; then how often each port."""
    counts: dict[int, int] = {}
    ports = [7, 7, 9]
    running = [
        lab.popen([sys.executable, "-c", CLIENT, str(port)], cgroup="clients", stdout=subprocess.PIPE) for port in ports
    ]
    try:
        for client in running:
            assert client.stdout is not None
            assert client.stdout.readline() == "ready\n"
        yield counts
    finally:
        for client in running:
            client.send_signal(signal.SIGTERM)
        for port, client in zip(ports, running, strict=True):
            counts[port] = counts.get(port, 0) + int(client.communicate(timeout=patient(10))[0])


def counted(node: hitless.Node) -> dict[int, int]:
    return {port: value["count"] for port, value in node.map("tally").items()}


# Counts what goes to ::1 by port, in the same map; a release that has only COUNTING has this hook no more.
GOING = """
SEC("cgroup/connect6") int count6(struct bpf_sock_addr *ctx)
{
    __u32 port = __builtin_bswap16(ctx->user_port);
    struct tally *found = bpf_map_lookup_elem(&tally, &port);
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    return 1;
}
"""
ATTACH_GOING = """
[[attach]]
program = "count6"
hook = "cgroup"
target = "${cgroup}"
link = "connect6"
"""


def count_in(path: Path, offset: int, size: int, port: int) -> int:
    with Map.open(path) as held:
        value = held.lookup(port.to_bytes(4, sys.byteorder))
    assert value is not None
    return int.from_bytes(value[offset : offset + size], sys.byteorder)


@pytest.mark.parametrize("killed", ["", "detach_hooks", "wait_for_running_programs", "make_carriers", "remove_tree"])
def test_what_a_hook_that_goes_counts_until_it_is_gone_comes_along(
    node: hitless.Node, release: Release, lab: Lab, tmp_path: Path, killed: str
) -> None:
    first = write_release(tmp_path / "1", "1.0", FIRST + GOING + COUNTING, ATTACH + ATTACH_GOING)
    bundle = hitless.Bundle.load(first, {"cgroup": str(lab.cgroup)})
    port = 11
    for _ in range(1 if killed else 5):
        hitless.apply(node, bundle)
        node.map("tally")[port] = {"count": 0}
        with connecting(lab, "::1", port):
            if killed:
                lose(lambda: hitless.apply(node, release(2)), killed)
                assert hitless.recover(node) == "finished the clean-up after the upgrade to 2.0"
            else:
                hitless.apply(node, release(2))
        before = count_in(node.previous / "maps" / "tally", 0, 4, port)
        assert before > 0
        assert count_in(node.current / "maps" / "tally", 8, 8, port) == before
        assert not (node.links / "connect6").exists()
        hitless.unload(node)


def lose(work: Callable[[], object], killed: str) -> None:
    """Do ``work`` in a process of its own that dies when its clean-up calls this function."""

    def dying() -> None:
        setattr(finish, killed, lambda *_, **__: die())
        work()

    assert exit_code_of(dying) == -signal.SIGKILL


def test_no_increment_is_lost_or_gained_while_upgrades_go_back_and_forth(
    node: hitless.Node, release: Release, lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with clients(lab) as tries:
        until = time.monotonic() + patient(60)
        rounds = 0
        while (rounds <= often(20) or sum(counted(node).values()) <= often(20_000)) and time.monotonic() < until:
            hitless.apply(node, release(2))
            hitless.apply(node, release(1), allow_loss=BACK)
            rounds += 1
    assert rounds > often(20)
    assert sum(tries.values()) > often(20_000)
    assert counted(node) == tries


def test_without_the_catch_up_increments_are_lost(
    node: hitless.Node, release: Release, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Carriage, "catch_up", lambda carriage, last=False: 0)
    monkeypatch.setattr(Carriage, "verify", lambda carriage: None)
    hitless.apply(node, release(1))
    with clients(lab) as tries:
        for _ in range(often(10)):
            hitless.apply(node, release(2))
            hitless.apply(node, release(1), allow_loss=BACK)
    assert sum(counted(node).values()) < sum(tries.values())


def test_an_error_after_the_cutover_takes_the_new_counts_back_too(
    node: hitless.Node, release: Release, lab: Lab
) -> None:
    hitless.apply(node, release(1))

    def late(event: hitless.Progress) -> None:
        if event.step in ("catch-up", "merge"):
            time.sleep(0.02)  # the new release counts for a while
        if event.step == "commit":
            raise ZeroDivisionError

    with clients(lab) as tries:
        for _ in range(10):
            with pytest.raises(ZeroDivisionError):
                hitless.apply(node, release(2), progress=late)
            assert node.observe().version == "1.0"
    assert counted(node) == tries
    assert status(node).problems == ()


STEPS = ["stage", "copy", "prepare", "verify", "cutover", "catch-up", "merge", "commit", "clean-up"]


def test_a_killed_upgrade_is_undone_or_finished_by_the_next_apply_and_counts_stay_exact(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with clients(lab) as tries:
        for step in STEPS:
            kill_upgrade(step, node, releases[2], {"cgroup": str(lab.cgroup)})
            result = hitless.apply(node, release(2))
            switched = step in ("cutover", "catch-up", "merge", "commit", "clean-up")
            assert (result.recovered is None) == (step == "stage"), "before the first step nothing was begun"
            assert result.start_type == ("restart" if switched else "update"), step
            assert status(node).problems == ()
            hitless.apply(node, release(1), allow_loss=BACK)
    assert counted(node) == tries


def test_a_first_start_that_was_killed_is_finished_by_the_next_apply(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    for step in STEPS:
        kill_upgrade(step, node, releases[1], {"cgroup": str(lab.cgroup)})
        hitless.apply(node, release(1))
        assert status(node).problems == ()
        assert status(node).hooks[0].program == "count4"
        hitless.unload(node)


def test_an_upgrade_killed_while_it_is_taken_back_is_taken_back_and_counts_stay_exact(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    with clients(lab) as tries:
        for phase in ("undoing", "merging-back", "undone"):
            for when in ("before", "after"):
                kill_while_undoing(phase, when, node, releases[2], {"cgroup": str(lab.cgroup)})
                recovered = hitless.recover(node)
                finished = (phase, when) == ("undoing", "before")  # nothing says yet that it is to be undone
                assert recovered is not None
                assert node.observe().version == ("2.0" if finished else "1.0"), recovered
                assert status(node).problems == ()
                hitless.apply(node, release(1), allow_loss=BACK)
    assert counted(node) == tries


def test_status_during_upgrades_names_the_upgrader_and_no_problem(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    over = threading.Event()

    def upgrades() -> None:
        for _ in range(15):
            hitless.apply(node, release(2))
            hitless.apply(node, release(1), allow_loss=BACK)
        over.set()

    upgrading = threading.Thread(target=upgrades)
    upgrading.start()
    looker, busy, looks = hitless.Node(node.root), 0, 0
    both = ({"tally", "limit", "owner"}, {"tally", "limits", "owner", "extra"})
    while not over.is_set():
        seen = status(looker)
        assert seen.problems == ()
        assert {entry.name for entry in seen.maps} in both
        busy += seen.upgrading == os.getpid()
        looks += 1
    upgrading.join()
    assert 0 < busy <= looks


def test_a_plan_during_an_upgrade_says_who_upgrades(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))

    def planned(_: hitless.Node) -> None:
        with pytest.raises(hitless.BusyError, match=f"being upgraded by process {os.getpid()}"):
            hitless.plan(node, release(2))

    hitless.apply(node, release(2), prepare=planned)


def test_a_second_apply_waits_and_then_names_the_holder(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    with (
        node.lock(),
        pytest.raises(hitless.BusyError, match=f"process {os.getpid()}"),
    ):
        hitless.apply(node, release(2), wait=0.1)


def test_looking_while_upgrades_commit_always_sees_one_whole_release(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    maps = {"1.0": {"tally", "limit", "owner"}, "2.0": {"tally", "limits", "owner", "extra"}}
    seen: list[str | None] = []
    done = threading.Event()

    def look() -> None:
        other = hitless.Node(node.root)
        while not done.is_set():
            state = other.observe()
            assert state.current is not None
            assert set(state.current.maps) == maps[state.current.record.version]
            seen.append(state.version)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for _ in range(15):
            hitless.apply(node, release(2))
            hitless.apply(node, release(1), allow_loss=BACK)
        done.set()
        looking.result()
    assert {"1.0", "2.0"} == set(seen)
