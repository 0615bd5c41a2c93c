"""What sockets of a sockhash run, and how they come to run something else: with traffic all the time."""

from __future__ import annotations

import errno
import signal
import time
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

from hitless.kernel import socket_programs
from hitless.kernel.barrier import wait_for_running_programs
from hitless.kernel.dispatcher import Dispatcher, attached_program
from hitless.kernel.maps import ANY, Map
from hitless.kernel.programs import Program
from hitless.kernel.socket_programs import give, programs_of_sockets
from hitless.kernel.sockets import Adder, Sockets, create_base, list_sockets
from meshd.demo.lab import Lab
from tests.kernel.connections import Bench, attach_the_old_way, clients
from tests.kills import die, exit_code_of

pytestmark = pytest.mark.needs("sockmap link")

HOOKS = [("sk_msg_verdict", "to_peer"), ("sk_skb_stream_verdict", "echo")]


def counted(held: Map, hook: str) -> Counter[int]:
    """How many sockets run each program."""
    return Counter(programs_of_sockets(held, hook).values())


@pytest.mark.parametrize(("hook", "name"), HOOKS)
def test_sockets_that_had_a_program_keep_it_and_are_counted(lab: Lab, hook: str, name: str) -> None:
    bench = Bench(lab, releases=2)
    attach_the_old_way(bench.releases[0].programs[name], bench.peers, hook)
    with clients(lab, answers=name == "to_peer") as traffic:
        traffic.say("connect 10")
        assert attached_program(bench.peers, hook) == bench.releases[0].programs[name].info.id
        dispatcher = Dispatcher.attach(bench.peers, hook, bench.releases[1].programs[name], bench.slot, bench.link)
        traffic.say("connect 5")
        old = bench.releases[0].programs[name].info.id
        assert counted(bench.peers, hook) == Counter({old: 20, dispatcher.program_id: 10})
        traffic.say("rounds 1")
        assert [size for _, size in bench.tallies()] == [2 * 16 * 10, 2 * 16 * 5]


@pytest.mark.parametrize(("hook", "name"), HOOKS)
def test_sockets_that_came_before_the_program_are_given_it_while_messages_go(lab: Lab, hook: str, name: str) -> None:
    bench = Bench(lab, releases=1)
    with clients(lab, answers=True) as traffic:
        traffic.say("connect 50")
        assert counted(bench.peers, hook) == Counter({0: 100})
        dispatcher = bench.dispatch(hook, name)
        traffic.say("connect 50")
        if name == "to_peer":  # an echo of the program's would meet that of the server
            traffic.say("run 0")
        with Program.by_id(dispatcher.program_id) as program:
            done = give(bench.peers, hook, program)
            assert (done.given, done.left) == (100, {})
            assert give(bench.peers, hook, program).given == 0
        if name == "to_peer":
            traffic.say("stop")
            before = bench.tallies()[0][0]
            traffic.say("rounds 1")
            assert bench.tallies()[0][0] - before == 200
        assert counted(bench.peers, hook) == Counter({dispatcher.program_id: 200})


@pytest.mark.parametrize(("hook", "name"), HOOKS)
def test_who_is_killed_while_giving_leaves_sockets_what_they_were_given(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, hook: str, name: str
) -> None:
    bench = Bench(lab, releases=1)
    add = socket_programs._add

    def add_and_die(*args: Any) -> None:
        add(*args)
        die()

    with clients(lab, answers=True) as traffic:
        traffic.say("connect 50")
        dispatcher = bench.dispatch(hook, name)
        monkeypatch.setattr(socket_programs, "_add", add_and_die)
        with Program.by_id(dispatcher.program_id) as program:
            assert exit_code_of(partial(give, bench.peers, hook, program)) == -signal.SIGKILL
        for _ in range(10):  # the kernel frees the map of who was killed when it comes to it
            time.sleep(0.05)
            assert counted(bench.peers, hook) == Counter({dispatcher.program_id: 100})


def carry(source: Map, target: Map, wanted: Sockets) -> list[int | None]:
    keys = np.frombuffer(b"".join(wanted), np.uint8).reshape(len(wanted), -1)
    with create_base(source, "base") as base:
        adder = Adder("peers", source, target, base)
        outcomes = adder.add(keys, list(wanted.values()), keys, [ANY] * len(wanted))
        adder.close()
    return outcomes


@pytest.mark.parametrize(
    ("hook", "name", "births"), [("sk_msg_verdict", "to_peer_if_there", 2), ("sk_skb_stream_verdict", "echo", 0)]
)


def test_the_sockets_of_a_map_of_another_shape_all_come_along(lab: Lab, hook: str, name: str, births: int) -> None:
    bench, after = Bench(lab, releases=1), Bench(lab, releases=1, attach=False)
    old, new = bench.releases[0].programs[name], after.releases[0].programs[name]
    pins = lab.bpffs / "new_slot", lab.bpffs / "new_link"
    with clients(lab, answers=name != "echo") as traffic:
        first = bench.dispatch(hook, name)
        traffic.say("connect 200")
        traffic.say("run 2")
        assert set(carry(bench.peers, after.peers, list_sockets(bench.peers))) <= {0, None}
        second = Dispatcher.attach(after.peers, hook, new, *pins)
        assert counted(after.peers, hook).keys() == {first.program_id}
        time.sleep(0.05)
        bench.sockops.update(after.releases[0].programs["note"], bench.releases[0].programs["note"])
        wait_for_running_programs()
        there = list_sockets(after.peers)
        late = {key: cookie for key, cookie in list_sockets(bench.peers).items() if key not in there}
        assert late
        assert set(carry(bench.peers, after.peers, late)) == {-errno.EBUSY}
        time.sleep(0.05)
        traffic.say(f"run {births}")
        second.detach()  # a map without a program takes sockets that have one
        assert set(carry(bench.peers, after.peers, late)) == {0}
        second = Dispatcher.attach(after.peers, hook, new, *pins)
        with Program.by_id(second.program_id) as program:
            assert give(after.peers, hook, program).left == {}
            first.update(program, old)
        sent = traffic.say("stop")
        assert counted(after.peers, hook)[0] == 0
        connections = len(list_sockets(after.peers)) // 2
        assert connections > 200
        before = *bench.tallies(), *after.tallies()
        if not births:
            assert sum(size for _, size in before) == 2 * 16 * sent
        assert traffic.say("rounds 2") - sent == 2 * connections
        now = *bench.tallies(), *after.tallies()
        ran = [calls - earlier for (calls, _), (earlier, _) in zip(now, before, strict=True)]
        assert ran == [0, 2 * 2 * connections]
