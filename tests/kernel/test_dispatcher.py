"""A dispatcher on a sockhash: connections that are redirected go from program to program, and no message notices."""

from __future__ import annotations

import os
import signal
import time

import pytest

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel.dispatcher import Dispatcher, attached_program
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from meshd.demo.lab import Lab
from tests.kernel.connections import CONNECTIONS, Bench, clients
from tests.patience import often

pytestmark = pytest.mark.needs("sockmap link")

HOOKS = [("sk_msg_verdict", "to_peer"), ("sk_skb_stream_verdict", "echo")]


@pytest.mark.parametrize(("hook", "name"), HOOKS)
@pytest.mark.parametrize("times", [100, 1000])
def test_500_redirected_connections_go_through_switches_and_no_message_is_lost(
    lab: Lab, hook: str, name: str, times: int
) -> None:
    bench = Bench(lab, releases=10)
    dispatcher = bench.dispatch(hook, name)
    with clients(lab, answers=name == "to_peer") as traffic:
        traffic.say(f"connect {CONNECTIONS}")
        traffic.say("run 0")
        current = bench.switch(dispatcher, name, times, seconds=1.5)
        sent = traffic.say("stop")
        during = bench.tallies()
        assert sent > often(10 * CONNECTIONS)
        assert sum(size for _, size in during) == 2 * 16 * sent
        assert sum(calls for calls, _ in during) == 2 * sent
        assert all(calls for calls, _ in during)
        after = traffic.say("rounds 3") - sent
        assert after == 3 * CONNECTIONS
        ran = [calls - before for (calls, _), (before, _) in zip(bench.tallies(), during, strict=True)]
    assert ran == [2 * after if index == current else 0 for index in range(10)]


@pytest.mark.parametrize(("hook", "name"), HOOKS)
def test_a_kill_of_whoever_switches_leaves_a_working_hook(lab: Lab, hook: str, name: str) -> None:
    bench = Bench(lab, releases=2)
    bench.dispatch(hook, name).close()
    with clients(lab, answers=name == "to_peer") as traffic:
        traffic.say(f"connect {CONNECTIONS}")
        traffic.say("run 0")
        for number in range(10):
            pid = os.fork()
            if not pid:
                with_pins = Dispatcher.open(bench.slot, bench.link)
                running = with_pins.info.program_id
                first = [release.programs[name] for release in bench.releases]
                old, new = first if running == first[0].info.id else first[::-1]
                while True:
                    with_pins.update(new, old)
                    old, new = new, old
            time.sleep(0.02 + 0.01 * number)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        sent = traffic.say("stop")
        assert sum(size for _, size in bench.tallies()) == 2 * 16 * sent
        dispatcher = Dispatcher.open(bench.slot, bench.link)
        runs = [release.programs[name].info.id for release in bench.releases].index(dispatcher.info.program_id)
        dispatcher.update(bench.releases[1 - runs].programs[name], bench.releases[runs].programs[name])
        before = bench.releases[1 - runs].tally()[0]
        traffic.say(f"connect {CONNECTIONS}")
        traffic.say("rounds 1")
        assert bench.releases[1 - runs].tally()[0] - before == 4 * CONNECTIONS


@pytest.mark.parametrize(("hook", "name"), HOOKS)
def test_what_comes_while_the_slot_is_empty_passes(lab: Lab, hook: str, name: str) -> None:
    bench = Bench(lab, releases=1)
    dispatcher = bench.dispatch(hook, name)
    with clients(lab, answers=True) as traffic:
        with Map.open(bench.slot) as slot:
            assert slot.delete(bytes(4))
        assert dispatcher.info.program_id == 0
        traffic.say("connect 20")
        assert traffic.say("rounds 5") == 100
        assert bench.tallies() == [(0, 0)]


def test_messages_pass_whole_while_the_slot_of_a_parser_is_empty(lab: Lab) -> None:
    bench = Bench(lab, releases=1)
    programs = bench.releases[0].programs
    with Dispatcher.attach(
        bench.peers, "sk_skb_stream_parser", programs["whole"], lab.bpffs / "parser", lab.bpffs / "parsing"
    ) as parser, bench.dispatch("sk_skb_stream_verdict", "echo"), clients(lab, answers=False) as traffic:
        with Map.open(lab.bpffs / "parser") as slot:
            assert slot.delete(bytes(4))
        assert parser.info.program_id == 0
        traffic.say("connect 20")
        assert traffic.say("rounds 5") == 100
        assert sum(size for _, size in bench.tallies()) == 2 * 16 * 100


def test_a_dispatcher_tells_what_it_runs_and_where(lab: Lab) -> None:
    bench = Bench(lab, releases=2)
    one, two = (release.programs["to_peer"] for release in bench.releases)
    bench.dispatch("sk_msg_verdict", "to_peer").close()
    with Dispatcher.open(bench.slot, bench.link) as dispatcher:
        dispatcher.update(two, one)
        told = dispatcher.info
        assert (told.program_id, told.target_id) == (two.info.id, bench.peers.info.id)
        assert told.attach_type == "sk_msg_verdict"
        assert attached_program(bench.peers, "sk_msg_verdict") == dispatcher.program_id


def test_a_slot_that_someone_else_changed_is_left_alone(lab: Lab) -> None:
    bench = Bench(lab, releases=3)
    one, two, three = (release.programs["to_peer"] for release in bench.releases)
    with bench.dispatch("sk_msg_verdict", "to_peer") as dispatcher:
        dispatcher.update(two, one)
        with pytest.raises(NodeError, match=f"has program {two.info.id}, not {one.info.id} as expected"):
            dispatcher.update(three, one)
        assert dispatcher.info.program_id == two.info.id


@pytest.mark.parametrize("other", ["other", "echo", "note"])
def test_a_program_of_another_type_is_refused_by_the_kernel(lab: Lab, other: str) -> None:
    bench = Bench(lab, releases=1)
    programs = bench.releases[0].programs
    with bench.dispatch("sk_msg_verdict", "to_peer") as dispatcher:
        with pytest.raises(KernelError, match="EINVAL"):
            dispatcher.update(programs[other], programs["to_peer"])
        assert dispatcher.info.program_id == programs["to_peer"].info.id


def test_a_parser_is_refused_where_a_verdict_runs(lab: Lab) -> None:
    bench = Bench(lab, releases=1)
    programs = bench.releases[0].programs
    with bench.dispatch("sk_skb_stream_verdict", "echo") as dispatcher, pytest.raises(KernelError, match="EINVAL"):
        dispatcher.update(programs["whole"], programs["echo"])


def test_a_link_that_runs_something_else_is_no_dispatcher(lab: Lab) -> None:
    bench = Bench(lab, releases=1)
    program = bench.releases[0].programs["to_peer"]
    with bench.dispatch("sk_msg_verdict", "to_peer"), Link.open(bench.link) as link:
        with Program.by_id(attached_program(bench.peers, "sk_msg_verdict")) as dispatcher:
            link.update(program, dispatcher)
        with pytest.raises(NodeError, match="no dispatcher to the slot"):
            Dispatcher.open(bench.slot, bench.link)


def test_a_second_dispatcher_of_a_map_is_refused(lab: Lab) -> None:
    bench = Bench(lab, releases=1)
    program = bench.releases[0].programs["to_peer"]
    with bench.dispatch("sk_msg_verdict", "to_peer"), pytest.raises(KernelError, match="EBUSY"):
        Dispatcher.attach(bench.peers, "sk_msg_verdict", program, lab.bpffs / "more", lab.bpffs / "again")
    assert not (lab.bpffs / "more").exists()


def test_sockets_of_an_attach_that_did_not_come_to_its_end_are_switched_after_the_next(lab: Lab) -> None:
    bench = Bench(lab, releases=2)
    one, two = (release.programs["to_peer"] for release in bench.releases)
    with clients(lab, answers=True) as traffic:
        begun = bench.dispatch("sk_msg_verdict", "to_peer")
        traffic.say("connect 10")
        bench.link.unlink()
        begun.close()
        assert attached_program(bench.peers, "sk_msg_verdict") == 0
        with bench.dispatch("sk_msg_verdict", "to_peer") as dispatcher:
            dispatcher.update(two, one)
            traffic.say("connect 10")
            traffic.say("rounds 1")
        assert [calls for calls, _ in bench.tallies()] == [0, 40]


def test_a_detached_dispatcher_serves_the_sockets_that_have_it_and_is_attached_again_in_its_place(lab: Lab) -> None:
    bench = Bench(lab, releases=1)
    with clients(lab, answers=True) as traffic:
        with bench.dispatch("sk_msg_verdict", "to_peer") as dispatcher:
            traffic.say("connect 10")
            dispatcher.detach()
            assert dispatcher.info.target_id == 0
        traffic.say("connect 10")
        traffic.say("rounds 1")
        assert bench.tallies()[0][0] == 20
        with bench.dispatch("sk_msg_verdict", "to_peer") as again:
            assert again.info.target_id == bench.peers.info.id
            assert Dispatcher.open(bench.slot, bench.link).info == again.info


@pytest.mark.parametrize("hook", ["sk_skb_stream_verdict", "sk_skb_verdict"])
def test_programs_loaded_without_an_attach_type_have_a_dispatcher_of_their_own_kind(lab: Lab, hook: str) -> None:
    bench = Bench(lab, releases=2)
    one, two = (release.programs["plain"] for release in bench.releases)
    typed = bench.releases[0].programs["echo"]
    with (
        clients(lab, answers=True) as traffic,
        Dispatcher.attach(bench.peers, hook, one, bench.slot, bench.link, expected="") as dispatcher,
    ):
        traffic.say("connect 10")
        dispatcher.update(two, one)
        with pytest.raises(KernelError, match="EINVAL"):
            dispatcher.update(typed, two)
        traffic.say("rounds 1")
        assert bench.tallies() == [(0, 0), (20, 2 * 16 * 10)]


def test_an_unknown_hook_is_unsupported(lab: Lab) -> None:
    bench = Bench(lab, releases=1)
    with pytest.raises(UnsupportedError, match="no dispatcher is known for xdp"):
        bench.dispatch("xdp", "other")
