"""What sockets of a sockhash run, and how they come to run something else: with traffic all the time."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections import Counter

import numpy as np
import pytest

from hitless.errors import UnsupportedError
from hitless.kernel.barrier import wait_for_running_programs
from hitless.kernel.dispatcher import Dispatcher, attached_program
from hitless.kernel.maps import ANY, Map
from hitless.kernel.names import attach_number
from hitless.kernel.namespaces import Namespace
from hitless.kernel.programs import Program
from hitless.kernel.socket_programs import give, hand_over, programs_of_sockets
from hitless.kernel.sockets import Adder, Sockets, create_base, list_sockets
from meshd.demo.lab import Lab
from tests.kernel.connections import CONNECTIONS, Bench, clients

HOOKS = [("sk_msg_verdict", "to_peer"), ("sk_skb_stream_verdict", "echo")]


def attach_the_old_way(program: Program, held: Map, hook: str) -> None:
    libbpf = ctypes.CDLL("libbpf.so.1")
    assert libbpf.bpf_prog_attach(program.fd, held.fd, attach_number(hook), 0) == 0


def counted(held: Map, hook: str) -> Counter[int]:
    """How many sockets run each program."""
    return Counter(programs_of_sockets(held, hook).values())


def adopt(bench: Bench, hook: str, name: str) -> Dispatcher:
    """A dispatcher to the second release on a map that has had the program of the first."""
    assert attached_program(bench.peers, hook) == bench.releases[0].programs[name].info.id
    return Dispatcher.attach(bench.peers, hook, bench.releases[1].programs[name], bench.slot, bench.link)


def test_sockets_that_had_a_verdict_of_the_old_way_are_handed_over_and_no_message_is_lost(lab: Lab) -> None:
    bench = Bench(lab, releases=2)
    hook = "sk_skb_stream_verdict"
    attach_the_old_way(bench.releases[0].programs["echo"], bench.peers, hook)
    with clients(lab, answers=False) as traffic:
        traffic.say(f"connect {CONNECTIONS}")
        traffic.say("run 0")
        dispatcher = adopt(bench, hook, "echo")
        with Program.by_id(dispatcher.program_id) as program:
            done = hand_over(bench.peers, hook, program, [Namespace.at(str(lab.netns))])
        assert (done.given, done.left) == (2 * CONNECTIONS, {})
        assert counted(bench.peers, hook) == Counter({dispatcher.program_id: 2 * CONNECTIONS})
        sent = traffic.say("stop")
        assert sum(size for _, size in bench.tallies()) == 2 * 16 * sent
        before = bench.tallies()
        traffic.say("rounds 3")
        after = bench.tallies()
        assert after[0] == before[0]
        assert after[1][1] - before[1][1] == 3 * 2 * 16 * CONNECTIONS


def test_sockets_are_handed_over_again_and_again(lab: Lab) -> None:
    bench = Bench(lab, releases=2)
    hook = "sk_skb_stream_verdict"
    programs = [release.programs["echo"] for release in bench.releases]
    attach_the_old_way(programs[0], bench.peers, hook)
    with clients(lab, answers=False) as traffic:
        traffic.say("connect 100")
        traffic.say("run 0")
        for number in range(30):
            assert hand_over(bench.peers, hook, programs[1 - number % 2], [Namespace.at(str(lab.netns))]).given == 200
        sent = traffic.say("stop")
        assert sum(size for _, size in bench.tallies()) == 2 * 16 * sent


def test_a_kill_of_whoever_hands_over_leaves_every_socket_with_a_verdict(lab: Lab) -> None:
    bench = Bench(lab, releases=2)
    hook = "sk_skb_stream_verdict"
    programs = [release.programs["echo"] for release in bench.releases]
    attach_the_old_way(programs[0], bench.peers, hook)
    with clients(lab, answers=False) as traffic:
        traffic.say("connect 200")
        traffic.say("run 0")
        for number in range(20):
            pid = os.fork()
            if not pid:
                while True:
                    for program in programs:
                        hand_over(bench.peers, hook, program, [Namespace.at(str(lab.netns))])
            time.sleep(0.02 + 0.007 * number)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert set(counted(bench.peers, hook)) <= {program.info.id for program in programs}
        sent = traffic.say("stop")
        assert sum(size for _, size in bench.tallies()) == 2 * 16 * sent


def test_sockets_of_other_network_namespaces_are_left_and_counted(lab: Lab) -> None:
    bench = Bench(lab, releases=2)
    hook = "sk_skb_stream_verdict"
    attach_the_old_way(bench.releases[0].programs["echo"], bench.peers, hook)
    with clients(lab, answers=False) as traffic:
        traffic.say("connect 10")
        done = hand_over(bench.peers, hook, bench.releases[1].programs["echo"], [Namespace.at("")])
        assert (done.given, done.left) == (0, {"no TCP socket of these network namespaces": 20})
        traffic.say("rounds 1")
        assert bench.tallies()[1] == (0, 0)


def test_sockets_that_had_an_sk_msg_program_keep_it_and_are_counted(lab: Lab) -> None:
    bench = Bench(lab, releases=2)
    hook = "sk_msg_verdict"
    attach_the_old_way(bench.releases[0].programs["to_peer"], bench.peers, hook)
    with clients(lab, answers=True) as traffic:
        traffic.say("connect 10")
        dispatcher = adopt(bench, hook, "to_peer")
        traffic.say("connect 5")
        old = bench.releases[0].programs["to_peer"].info.id
        assert counted(bench.peers, hook) == Counter({old: 20, dispatcher.program_id: 10})
        with Program.by_id(dispatcher.program_id) as program, pytest.raises(UnsupportedError, match="until they close"):
            hand_over(bench.peers, hook, program, [Namespace.at(str(lab.netns))])
        traffic.say("rounds 1")
        assert [calls for calls, _ in bench.tallies()] == [20, 10]


def test_sockets_with_a_stream_parser_are_not_handed_over(lab: Lab) -> None:
    bench = Bench(lab, releases=1)
    programs = bench.releases[0].programs
    attach_the_old_way(programs["whole"], bench.peers, "sk_skb_stream_parser")
    attach_the_old_way(programs["echo"], bench.peers, "sk_skb_stream_verdict")
    with clients(lab, answers=False) as traffic:
        traffic.say("connect 10")
        with pytest.raises(UnsupportedError, match="20 sockets of map peers have a stream parser"):
            hand_over(bench.peers, "sk_skb_stream_verdict", programs["echo"], [Namespace.at(str(lab.netns))])


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
