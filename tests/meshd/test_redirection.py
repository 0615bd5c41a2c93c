"""Why the mesh hands no data from socket to socket on one node: the kernel does then not what TCP promises.

Whoever reads here that one of these is no longer so may think about it again: see docs/mesh.md.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import hitless
from meshd.demo.lab import Lab
from tests.releases import write_release

# Each end of a connection is noted by its ports; what one sends goes straight to the queue of the other.
REDIRECTING = """
#include <bpf/bpf_endian.h>
struct ports { __u32 local, remote; };
MAP(peers, SOCKHASH, 256, struct ports, __u64);
SEC("sockops") int note(struct bpf_sock_ops *ops)
{
    struct ports key = { .local = ops->local_port, .remote = bpf_ntohl(ops->remote_port) };
    if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB || ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        bpf_sock_hash_update(ops, &peers, &key, BPF_ANY);
    return 1;
}
SEC("sk_msg") int redirect(struct sk_msg_md *msg)
{
    struct ports key = { .local = bpf_ntohl(msg->remote_port), .remote = msg->local_port };
    bpf_msg_redirect_hash(msg, &peers, &key, BPF_F_INGRESS);
    return SK_PASS;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
ATTACH = """
[[attach]]
program = "note"
hook = "cgroup"
target = "${cgroup}"
link = "note"

[[attach]]
program = "redirect"
hook = "sk_msg"
target = "peers"
link = "redirect"
"""
PAIR = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server = listener.accept()[0]
"""
UNREAD = """
client.setblocking(False)
taken, limit, block = 0, 64 << 20, bytes(65536)
try:
    while taken < limit:
        taken += client.send(block)
except BlockingIOError:
    pass
print(taken >= limit, flush=True)
"""
QUEUED = """
client.sendall(bytes(5000))
print("sent", flush=True)
sys.stdin.readline()
server.settimeout(0.5)
try:
    print(len(server.recv(10000)), flush=True)
except TimeoutError:
    print("nothing", flush=True)
"""


@pytest.fixture
def node(lab: Lab) -> hitless.Node:
    return hitless.Node(lab.bpffs / "redirecting")


def start(lab: Lab, node: hitless.Node) -> None:
    path = write_release(lab.scratch / "release", "1.0", REDIRECTING, ATTACH)
    hitless.apply(node, hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)}))


@contextmanager
def talk(lab: Lab, code: str) -> Iterator[subprocess.Popen[str]]:
    pipe = subprocess.PIPE
    process = lab.popen([sys.executable, "-c", PAIR + code], "clients", stdin=pipe, stdout=pipe)
    yield process
    assert process.wait(20) == 0


@pytest.mark.parametrize("redirected", [False, True])
def test_who_sends_to_nobody_that_reads_is_held_back_by_tcp_alone(
    lab: Lab, node: hitless.Node, redirected: bool
) -> None:
    if redirected:
        start(lab, node)
    with talk(lab, UNREAD) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{redirected}\n"


@pytest.mark.parametrize(("redirected", "arrives"), [(False, "5000"), (True, "nothing")])
def test_what_is_queued_is_lost_when_its_socket_leaves_the_map(
    lab: Lab, node: hitless.Node, redirected: bool, arrives: str
) -> None:
    if redirected:
        start(lab, node)
    with talk(lab, QUEUED) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "sent\n"
        if redirected:
            hitless.unload(node)
            time.sleep(1)  # the kernel lets go of a map some moments later
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{arrives}\n"
