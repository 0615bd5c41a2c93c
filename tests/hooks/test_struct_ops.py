"""struct_ops by link: a congestion control that a release brings, exchanged while TCP connections ask for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.programs import is_loaded
from hitless.kernel.struct_ops import StructOps, congestion_controls
from hitless.upgrade.cutover import switch_hooks
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.releases import write_release

REPLACEMENTS = 1000

# What its calls were is counted by release: begun, ended, and of that how often the window was to grow.
SOURCE = """
struct sock;
struct tcp_congestion_ops {
    void (*init)(struct sock *sk);
    void (*release)(struct sock *sk);
    __u32 (*ssthresh)(struct sock *sk);
    void (*cong_avoid)(struct sock *sk, __u32 ack, __u32 acked);
    __u32 (*undo_cwnd)(struct sock *sk);
    char name[16];
};
TALLY
MAP(seen, HASH, 16, __u32, struct tally);
static __always_inline struct tally *found(void)
{
    __u32 key = RELEASE;
    struct tally none = {};
    bpf_map_update_elem(&seen, &key, &none, BPF_NOEXIST);
    return bpf_map_lookup_elem(&seen, &key);
}
#define COUNT(field) struct tally *one = found(); if (one) __sync_fetch_and_add(&one->field, 1)
SEC("struct_ops/begin") void begin(unsigned long long *ctx) { COUNT(begun); }
SEC("struct_ops/end") void end(unsigned long long *ctx) { COUNT(ended); }
SEC("struct_ops/grow") void grow(unsigned long long *ctx) { COUNT(grown); }
SEC("struct_ops/half") __u32 half(unsigned long long *ctx) { return 10; }
SEC("struct_ops/whole") __u32 whole(unsigned long long *ctx) { return 10; }
SEC("SECTION") struct tcp_congestion_ops counting = {
    .init = (void *)begin, .release = (void *)end, .cong_avoid = (void *)grow,
    .ssthresh = (void *)half, .undo_cwnd = (void *)whole, .name = "NAME",
};
char _license[] SEC("license") = "GPL";
"""
PLAIN = """struct tally { __u32 begun TAG("merge=sum"); __u32 ended TAG("merge=sum"); __u32 grown TAG("merge=sum"); };"""
WIDER = """struct tally { __u64 since; __u64 ended TAG("merge=sum"); __u64 begun TAG("merge=sum");
                          __u64 grown TAG("merge=sum"); };"""
ATTACH = """
[[attach]]
program = "counting"
hook = "struct_ops"
target = "tcp_congestion_ops"
link = "cc"
"""

# Connects and closes until stdin says stop, by as many threads as asked; tells how many connections there were.
CLIENT = """
import socket, sys, threading
name, threads, told = sys.argv[1].encode(), int(sys.argv[2]), []
stop = threading.Event()
def work():
    server, count = socket.create_server(("127.0.0.1", 0), backlog=64), 0
    while count < 1_000_000 and not stop.is_set():
        with socket.socket() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
            client.connect(server.getsockname())
            with server.accept()[0] as other:
                client.sendall(b"x" * 100)
                assert len(other.recv(100, socket.MSG_WAITALL)) == 100
                other.close()
                assert client.recv(1) == b""
        count += 1
    told.append(count)
running = [threading.Thread(target=work) for _ in range(threads)]
for one in running: one.start()
print("go", flush=True)
sys.stdin.readline()
stop.set()
for one in running: one.join(20)
assert len(told) == threads
print(sum(told), flush=True)
"""


class World:
    """A pin root of the test's own, and releases whose congestion control has a name that is the test's own too."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.name = f"hl_{os.getpid() % 100000}_{time.monotonic_ns() % 100000}"[:15]
        self.node = hitless.Node(lab.bpffs / "store")

    def bundle(
        self, number: int, tally: str = PLAIN, section: str = ".struct_ops.link", name: str = "",
        manifest: str = ATTACH, change: Callable[[str], str] = str,
    ) -> hitless.Bundle:  # fmt: skip
        source = SOURCE.replace("RELEASE", str(number)).replace("TALLY", tally).replace("SECTION", section)
        source = change(source.replace("NAME", name or self.name))
        path = write_release(self.directory / f"{number}-{time.monotonic_ns()}", f"{number}.0", source, manifest)
        return hitless.Bundle.load(path, {})

    def client(self, threads: int = 1) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CLIENT, self.name, str(threads)]
        made = self.lab.popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert made.stdout is not None
        assert made.stdout.readline() == "go\n"
        return made

    def counted(self) -> dict[int, dict[str, int]]:
        seen = self.node.map("seen")
        return {number: found for number in (1, 2) if (found := seen.get(number)) is not None}

    def sums(self) -> tuple[int, int]:
        """Connections begun and ended, over both releases, once the kernel has let go of the last socket."""
        until = time.monotonic() + 5
        while True:
            found = self.counted().values()
            begun, ended = (sum(one[key] for one in found) for key in ("begun", "ended"))
            if begun == ended or time.monotonic() > until:
                return begun, ended
            time.sleep(0.01)


@pytest.fixture
def world(lab: Lab, tmp_path: Path) -> Iterator[World]:
    made = World(lab, tmp_path)
    yield made
    if made.node.root.exists():
        hitless.recover(made.node)
        hitless.unload(made.node)
    assert made.name not in congestion_controls()


def connected(name: str) -> tuple[socket.socket, socket.socket]:
    """A connection of this process whose client's side has the congestion control."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.socket()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        client.connect(server.getsockname())
        return client, server.accept()[0]


def test_each_connection_is_counted_by_one_of_two_releases_that_took_turns_a_thousand_times(world: World) -> None:
    node = world.node
    hitless.apply(node, world.bundle(1))
    client = world.client(2)
    result = hitless.apply(node, world.bundle(2))
    (update,) = result.hooks
    assert (update.action, update.method) == ("update", "link in place; connections keep what they began with")
    ops = [StructOps.open(generation / "maps" / "counting") for generation in (node.current, node.previous)]
    for turn in range(REPLACEMENTS):
        there, comes = ops[turn % 2], ops[(turn + 1) % 2]
        change = msgspec.structs.replace(update, expected=there.info.id)
        switch_hooks([change], {"counting": comes}, node.links, node.current / "maps")
    hitless.rollback(node)
    done = int(client.communicate("\n", timeout=20)[0])
    assert client.returncode == 0
    assert world.sums() == (done, done)
    assert min(one["begun"] for one in world.counted().values()) > 100
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()
