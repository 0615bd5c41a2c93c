"""A dispatcher on a sockhash: connections that are redirected go from program to program, and no message notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel.dispatcher import Dispatcher, attached_program
from hitless.kernel.libbpf import lib
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, load_object
from meshd.demo.lab import Lab
from tests.releases import compile_object

CONNECTIONS = 500

# Every connection is noted by its ports, both ends. Each hook counts its calls and their bytes.
SOURCE = """
#include <bpf/bpf_endian.h>
struct ports { __u32 local, remote; };
struct calls { __u64 calls, bytes; };
MAP(peers, SOCKHASH, 4096, struct ports, __u64);
MAP(counted, ARRAY, 1, __u32, struct calls);
static void count(__u64 bytes)
{
    __u32 zero = 0;
    struct calls *found = bpf_map_lookup_elem(&counted, &zero);
    if (found) {
        __sync_fetch_and_add(&found->calls, 1);
        __sync_fetch_and_add(&found->bytes, bytes);
    }
}
SEC("sockops") int note(struct bpf_sock_ops *ops)
{
    struct ports key = { .local = ops->local_port, .remote = bpf_ntohl(ops->remote_port) };
    if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB || ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        bpf_sock_hash_update(ops, &peers, &key, BPF_ANY);
    return 1;
}
/* What one end sends goes straight to the other end's queue. */
SEC("sk_msg") int to_peer(struct sk_msg_md *msg)
{
    struct ports key = { .local = bpf_ntohl(msg->remote_port), .remote = msg->local_port };
    count(msg->size);
    return bpf_msg_redirect_hash(msg, &peers, &key, BPF_F_INGRESS);
}
/* What comes to the server's end goes out of it again; the client's end gets it as it is. */
SEC("sk_skb/stream_verdict") int echo(struct __sk_buff *skb)
{
    struct ports key = { .local = skb->local_port, .remote = bpf_ntohl(skb->remote_port) };
    count(skb->len);
    return skb->local_port == SERVER ? bpf_sk_redirect_hash(skb, &peers, &key, 0) : SK_PASS;
}
SEC("sk_skb/stream_parser") int whole(struct __sk_buff *skb)
{
    return skb->len;
}
SEC("xdp") int other(struct xdp_md *ctx)
{
    return XDP_PASS;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
SERVER = 7000

# Rounds of numbered messages over all connections, each to come back whole before the next round begins.
CLIENTS = """
import json, select, socket, sys, time
count, port, answers = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "answers"
listener = socket.create_server(("127.0.0.1", port), backlog=count)
pairs = []
def add():
    client = socket.create_connection(listener.getsockname())
    server = listener.accept()[0]
    for end in (client, server):
        end.settimeout(5)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pairs.append((client, server))
def take(end, size=16):
    got = b""
    while len(got) < size:
        part = end.recv(size - len(got))
        assert part, "closed"
        got += part
    return got
rounds = 0
def turn():
    global rounds
    for index, (client, server) in enumerate(pairs):
        client.sendall(b"%07d %07d\\n" % (index, rounds))
    if answers:
        for client, server in pairs:
            server.sendall(take(server))
    for index, (client, server) in enumerate(pairs):
        assert take(client) == b"%07d %07d\\n" % (index, rounds), (index, rounds)
    rounds += 1
waiting = select.poll()
waiting.register(sys.stdin, select.POLLIN)
running, sent = False, 0
while True:
    if running and not waiting.poll(0):
        turn()
        sent += len(pairs)
        continue
    word = sys.stdin.readline().split()
    if not word:
        break
    if word[0] == "connect":
        for _ in range(int(word[1])):
            add()
    elif word[0] == "run":
        running = True
    elif word[0] == "stop":
        running = False
        for client, server in pairs:
            for end in (client, server):
                end.setblocking(False)
                try:
                    raise AssertionError("too much: %r" % end.recv(100))
                except BlockingIOError:
                    end.settimeout(5)
    elif word[0] == "rounds":
        for _ in range(int(word[1])):
            turn()
            sent += len(pairs)
    print(json.dumps(sent), flush=True)
"""


class Clients:
    """A process with many connections; what it says is how many messages came back so far, of 16 bytes each."""

    def __init__(self, lab: Lab, answers: bool) -> None:
        run = [sys.executable, "-c", CLIENTS, str(CONNECTIONS), str(SERVER), "answers" if answers else "echoes"]
        self._process = lab.popen(run, cgroup="clients", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def say(self, words: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(words + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the clients ended: a message was lost, doubled or out of order"
        return int(json.loads(line))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Release(msgspec.Struct):
    """One load of the object: its programs, and the count of their calls."""

    programs: dict[str, Program]
    counted: Map

    def tally(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """Calls and bytes."""
        return np.frombuffer(self.counted.lookup(bytes(4)) or b"", np.uint64)


class Bench:
    """A sockhash that all connections in the clients' cgroup come into, and releases of programs for it."""

    def __init__(self, lab: Lab, releases: int) -> None:
        self.lab = lab
        source = f"#define SERVER {SERVER}\n{SOURCE}"
        data = compile_object(source, lab.scratch / "hooks.bpf.o").read_bytes()
        loaded = load_object(data, "hooks", {}, {})
        self.peers = loaded.maps["peers"]
        self.releases = [Release(loaded.programs, loaded.maps["counted"])]
        for _ in range(releases - 1):
            again = load_object(data, "hooks", {"peers": self.peers}, {})
            self.releases.append(Release(again.programs, again.maps["counted"]))
        self._sockops = Link.attach_cgroup(loaded.programs["note"], lab.cgroup, "cgroup_sock_ops")
        self.slot, self.link = lab.bpffs / "slot", lab.bpffs / "link"

    def dispatch(self, hook: str, name: str) -> Dispatcher:
        return Dispatcher.attach(self.peers, hook, self.releases[0].programs[name], self.slot, self.link)

    def switch(self, dispatcher: Dispatcher, name: str, times: int, seconds: float) -> int:
        """Switch from release to release, evenly over ``seconds``; the release that runs at the end."""
        begun = time.monotonic()
        current = 0
        for number in range(times):
            after = (current + 1) % len(self.releases)
            dispatcher.update(self.releases[after].programs[name], self.releases[current].programs[name])
            current = after
            time.sleep(max(0, begun + seconds * number / times - time.monotonic()))
        return current

    def tallies(self) -> list[tuple[int, int]]:
        return [(int(calls), int(size)) for calls, size in (release.tally() for release in self.releases)]


@contextmanager
def clients(lab: Lab, answers: bool) -> Iterator[Clients]:
    made = Clients(lab, answers)
    try:
        yield made
    finally:
        made.close()


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
        traffic.say("run")
        current = bench.switch(dispatcher, name, times, seconds=1.5)
        sent = traffic.say("stop")
        during = bench.tallies()
        assert sent > 10 * CONNECTIONS
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
        traffic.say("run")
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
        assert (told.program_id, told.map_id, told.attach_type) == (two.info.id, bench.peers.info.id, "sk_msg_verdict")
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


def test_an_unknown_hook_is_unsupported(lab: Lab) -> None:
    bench = Bench(lab, releases=1)
    with pytest.raises(UnsupportedError, match="no dispatcher is known for xdp"):
        bench.dispatch("xdp", "other")
