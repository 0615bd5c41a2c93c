"""Connections whose both ends are in a sockhash, and programs for it that count; one process has all of them."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from hitless.kernel.dispatcher import Dispatcher
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.names import attach_number
from hitless.kernel.programs import Program, load_object
from meshd.demo.lab import Lab
from tests.releases import compile_object

__all__ = ["CONNECTIONS", "Bench", "Clients", "Release", "attach_the_old_way", "clients"]

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
static int redirect(struct sk_msg_md *msg)
{
    struct ports key = { .local = bpf_ntohl(msg->remote_port), .remote = msg->local_port };
    count(msg->size);
    return bpf_msg_redirect_hash(msg, &peers, &key, BPF_F_INGRESS);
}
SEC("sk_msg") int to_peer(struct sk_msg_md *msg)
{
    return redirect(msg);
}
/* The same, but by the network where the other end is in no such map. */
SEC("sk_msg") int to_peer_if_there(struct sk_msg_md *msg)
{
    redirect(msg);
    return SK_PASS;
}
SEC("sk_msg") int passed(struct sk_msg_md *msg)
{
    count(msg->size);
    return SK_PASS;
}
/* What comes to the server's end goes out of it again; the client's end gets it as it is. */
SEC("sk_skb/stream_verdict") int echo(struct __sk_buff *skb)
{
    struct ports key = { .local = skb->local_port, .remote = bpf_ntohl(skb->remote_port) };
    count(skb->len);
    return skb->local_port == SERVER ? bpf_sk_redirect_hash(skb, &peers, &key, 0) : SK_PASS;
}
SEC("sk_skb") int plain(struct __sk_buff *skb)
{
    count(skb->len);
    return SK_PASS;
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
import json, select, socket, sys, threading, time
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
def pass_by():
    add()
    client, server = pairs.pop()
    for one, other in ((client, server), (server, client)):
        one.sendall(b"%015d\\n" % rounds)
        assert take(other) == b"%015d\\n" % rounds
    client.close()
    server.close()


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
running, more, passing, sent = False, 0, 0, 0
while True:
    if running and not waiting.poll(0):
        for _ in range(more):
            add()
        for _ in range(passing):
            pass_by()
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
        more, passing = int(word[1]), int((word + [0])[2])
    elif word[0] == "stop":
        running, more, passing = False, 0, 0
        for client, server in pairs:
            for end in (client, server):
                end.setblocking(False)
                try:
                    raise AssertionError("too much: %r" % end.recv(100))
                except BlockingIOError:
                    end.settimeout(5)
    elif word[0] == "wait":
        readers = [threading.Thread(target=server.recv, args=(16,)) for _, server in pairs[: int(word[1])]]
        for reader, (_, server) in zip(readers, pairs):
            server.settimeout(None)
            reader.start()
        time.sleep(0.05)
    elif word[0] == "wake":
        for reader, (client, server) in zip(readers, pairs):
            client.sendall(b"%015d\\n" % rounds)
            reader.join()
            server.settimeout(5)
    elif word[0] == "rounds":
        for _ in range(int(word[1])):
            turn()
            sent += len(pairs)
    print(json.dumps(sent), flush=True)
"""


def attach_the_old_way(program: Program, held: Map, hook: str) -> None:
    """Without a link, as other tools do."""
    libbpf = ctypes.CDLL("libbpf.so.1")
    assert libbpf.bpf_prog_attach(program.fd, held.fd, attach_number(hook), 0) == 0


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

    def __init__(self, lab: Lab, releases: int, attach: bool = True) -> None:
        source = f"#define SERVER {SERVER}\n{SOURCE}"
        data = compile_object(source, lab.scratch / "hooks.bpf.o").read_bytes()
        loaded = load_object(data, "hooks", {}, {})
        self.peers = loaded.maps["peers"]
        self.releases = [Release(loaded.programs, loaded.maps["counted"])]
        for _ in range(releases - 1):
            again = load_object(data, "hooks", {"peers": self.peers}, {})
            self.releases.append(Release(again.programs, again.maps["counted"]))
        if attach:
            self.sockops = Link.attach_cgroup(loaded.programs["note"], lab.cgroup, "cgroup_sock_ops")
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
