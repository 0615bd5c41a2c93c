"""A board of dispatchers: each connection sees one release, whatever happens to the hooks meanwhile."""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from unittest.mock import Mock

import pytest

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, load_object
from hitless.kernel.switchboard import KINDS, WITNESSES, Kind, Left, Switchboard
from meshd.demo.lab import Lab
from tests.releases import compile_object

HOOKS = {
    "connect4": "cgroup_inet4_connect",
    "ops": "cgroup_sock_ops",
    "egress": "cgroup_inet_egress",
    "ingress": "cgroup_inet_ingress",
    "peername": "cgroup_inet4_getpeername",
}

# Each program notes by a socket's cookie that this release ran on this hook; a handshake's packets are the listener's.
NOTING = """
#include <linux/pkt_cls.h>
struct sight { __u32 runs[5][2]; };
MAP(seen, HASH, 65536, __u64, struct sight);
static int note(__u64 cookie, __u32 hook)
{
    struct sight none = {};
    struct sight *sight = bpf_map_lookup_elem(&seen, &cookie);
    if (!sight) {
        bpf_map_update_elem(&seen, &cookie, &none, BPF_NOEXIST);
        sight = bpf_map_lookup_elem(&seen, &cookie);
    }
    if (sight)
        __sync_fetch_and_add(&sight->runs[hook][RELEASE], 1);
    return 1;
}
static int packet(struct __sk_buff *skb, __u32 hook)
{
    struct bpf_sock *sk = skb->sk ? bpf_sk_fullsock(skb->sk) : 0;
    return sk && sk->state != BPF_TCP_LISTEN ? note(bpf_get_socket_cookie(skb), hook) : 1;
}
SEC("cgroup/connect4") int connect4(struct bpf_sock_addr *ctx) { return note(bpf_get_socket_cookie(ctx), 0); }
SEC("sockops") int ops(struct bpf_sock_ops *ctx)
{
    if (ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB || ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB ||
        ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        note(bpf_get_socket_cookie(ctx), 1);
    return 1;
}
SEC("cgroup_skb/egress") int egress(struct __sk_buff *skb) { return packet(skb, 2); }
SEC("cgroup_skb/ingress") int ingress(struct __sk_buff *skb) { return packet(skb, 3); }
SEC("cgroup/sendmsg4") int sendmsg4(struct bpf_sock_addr *ctx) { return note(bpf_get_socket_cookie(ctx), 0); }
SEC("cgroup/recvmsg4") int recvmsg4(struct bpf_sock_addr *ctx) { return note(bpf_get_socket_cookie(ctx), 1); }
SEC("cgroup/sock_release") int release(struct bpf_sock *ctx) { return note(bpf_get_socket_cookie(ctx), 4); }
SEC("tc") int interface(struct __sk_buff *skb) { return packet(skb, 2), TC_ACT_UNSPEC; }
SEC("cgroup/getpeername4") int peername(struct bpf_sock_addr *ctx) { return note(bpf_get_socket_cookie(ctx), 4); }
char _license[] SEC("license") = "Dual BSD/GPL";
"""

# Connections one after the other in two threads: each is opened, asked for its peer, used twice and closed.
CLIENTS = """
import socket, struct, sys, threading
def clients(count):
    listener = socket.create_server(("127.0.0.1", 0))
    for _ in range(count):
        client = socket.create_connection(listener.getsockname())
        server = listener.accept()[0]
        for _ in range(2):
            server.getpeername(), client.sendall(b"a"), server.recv(1), server.sendall(b"b"), client.recv(1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close(), server.close()
threads = [threading.Thread(target=clients, args=[int(sys.argv[1])]) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""

# Does what it is told line by line, and answers with cookies.
PEER = """
import json, socket, sys
COOKIE = 57  # SO_COOKIE
listener, named = socket.create_server(("127.0.0.1", 0)), {}
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(("127.0.0.1", 0))
def cookie(end):
    return int.from_bytes(end.getsockopt(socket.SOL_SOCKET, COOKIE, 8), "little")
def open_tcp(name):
    named[name] = client = socket.create_connection(listener.getsockname())
    named[name + "-server"] = server = listener.accept()[0]
    return [cookie(client), cookie(server)]
def open_udp(name):
    named[name] = client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.connect(datagrams.getsockname())
    return [cookie(client)]
def make(name):
    named[name] = socket.socket()
    return [cookie(named[name])]
def connect(name):
    named[name].connect(listener.getsockname())
    named[name + "-server"] = listener.accept()[0]
    return [cookie(named[name])]
def disconnect(name):
    import ctypes
    assert not ctypes.CDLL(None).connect(named[name].fileno(), bytes(16), 16)  # AF_UNSPEC
    return []
def send(name):
    if name not in named: named[name] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    named[name].sendto(b"a", datagrams.getsockname())
    datagrams.recv(1)
    return [cookie(named[name])]
def exchange(name):
    cookies = send(name)
    datagrams.sendto(b"b", named[name].getsockname())
    named[name].recvfrom(1)
    return cookies
def use(name):
    client, server = named[name], named.get(name + "-server")
    client.getpeername(), client.send(b"a")
    if server:
        server.recv(1), server.getpeername(), server.send(b"b"), client.recv(1)
    else:
        datagrams.recv(1)
    return []
def close(name):
    for end in (name, name + "-server"):
        if end in named: named.pop(end).close()
    return []
for line in sys.stdin:
    what, name = line.split()
    print(json.dumps(globals()[what](name)), flush=True)
"""


class Peer:
    """A process in a cgroup that opens, uses and closes sockets as it is told."""

    def __init__(self, lab: Lab, cgroup: str = "clients") -> None:
        pipe = subprocess.PIPE
        self._process = lab.popen([sys.executable, "-c", PEER], cgroup=cgroup, stdin=pipe, stdout=pipe)

    def __call__(self, what: str, name: str) -> list[int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what} {name}\n")
        cookies: list[int] = json.loads(self._process.stdout.readline())
        return cookies


class Mesh:
    """Two releases, and the hooks of the lab's cgroup: plain, or through a board of dispatchers."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.releases: list[dict[str, Program]] = []
        shared: dict[str, Map] = {}
        for release in (0, 1):
            source = f"#define RELEASE {release}\n{NOTING}"
            target = compile_object(source, lab.scratch / f"release{release}.bpf.o")
            loaded = load_object(target.read_bytes(), "noting", shared, {})
            shared = {"seen": loaded.maps["seen"]}
            self.releases.append(loaded.programs)
        self._seen = shared["seen"]
        self.links: dict[str, Link] = {}
        self.running = self.releases[0]

    def attach(self) -> None:
        for name, kind in HOOKS.items():
            self.links[name] = Link.attach_cgroup(self.running[name], self._lab.cgroup, kind)

    def update(self, to: dict[str, Program]) -> None:
        """The default mode of a cutover."""
        for name, link in self.links.items():
            link.update(to[name], self.running[name])
        self.running = to

    def install(self) -> Switchboard:
        """Dispatchers take the place of the programs on live links, or are attached."""
        board = Switchboard.create(self._lab.bpffs / "board")
        for kind in WITNESSES:
            if kind not in HOOKS.values():
                self.links[kind] = Link.attach_cgroup(board.add(kind, kind, None), self._lab.cgroup, kind)
        for name, kind in HOOKS.items():
            dispatcher = board.add(name, kind, self.running[name])
            if name in self.links:
                self.links[name].update(dispatcher, self.running[name])
            else:
                self.links[name] = Link.attach_cgroup(dispatcher, self._lab.cgroup, kind)
        board.left()  # the first time it reads the kernel's types, which takes as long as thousands of connections
        return board

    def put(self, board: Switchboard, release: dict[str, Program]) -> None:
        for name in HOOKS:
            board.put(name, release[name], board.epoch + 1)

    def seen_by(self, cookie: int) -> list[set[int]]:
        """For each hook the releases that ran for this socket since it was asked for last."""
        key = struct.pack("=Q", cookie)
        runs = struct.unpack("=10I", self._seen.lookup(key) or bytes(40))
        self._seen.delete(key)
        return [{release for release in (0, 1) if runs[2 * hook + release]} for hook in range(len(HOOKS))]

    def shares(self) -> tuple[int, int, int]:
        """How many sockets saw the first release alone, the second alone, and both."""
        _, values = self._seen.entries()
        runs = values.view("u4").reshape(-1, len(HOOKS), 2).sum(axis=1) > 0
        return int((~runs[:, 1]).sum()), int((~runs[:, 0]).sum()), int(runs.all(axis=1).sum())

    def connects(self) -> int:
        """How often a program ran on connect()."""
        return int(self._seen.entries()[1].view("u4").reshape(-1, len(HOOKS), 2)[:, 0].sum())

    def close(self) -> None:
        for link in self.links.values():
            link.close()


@pytest.fixture
def mesh(lab: Lab) -> Iterator[Mesh]:
    made = Mesh(lab)
    yield made
    made.close()


def released(release: int, *hooks: int) -> list[set[int]]:
    """What a socket saw if one release ran for it on these hooks."""
    return [{release} if hook in hooks else set() for hook in range(len(HOOKS))]


def connect_many(lab: Lab, count: int) -> subprocess.Popen[str]:
    return lab.popen([sys.executable, "-c", CLIENTS, str(count // 2)], cgroup="clients")


def test_plain_link_updates_mix_releases_within_a_connection(lab: Lab, mesh: Mesh) -> None:
    mesh.attach()
    clients = connect_many(lab, 2000)
    flips = 0
    while clients.poll() is None:
        mesh.update(mesh.releases[flips % 2])
        flips += 1
        time.sleep(0.0005)
    assert clients.returncode == 0
    assert mesh.shares()[2] > 20


def test_no_connection_sees_two_releases_of_a_board(lab: Lab, mesh: Mesh) -> None:
    board = mesh.install()
    clients = connect_many(lab, 4000)
    flips = moved = 0
    while clients.poll() is None:
        flips += 1
        mesh.put(board, mesh.releases[flips % 2])
        board.flip()
        while board.left().before and clients.poll() is None:
            time.sleep(0.001)
        moved += board.settle()
    old, new, mixed = mesh.shares()
    assert clients.returncode == 0
    assert (mixed, moved) == (0, 0)
    assert (old + new, mesh.connects()) == (8000, 4000)
    assert min(old, new) > 200
    assert flips >= 4


def test_no_connect_is_missed_or_counted_twice_while_connections_are_moved(lab: Lab, mesh: Mesh) -> None:
    board = mesh.install()
    clients = connect_many(lab, 4000)
    flips = 0
    while clients.poll() is None:
        flips += 1
        mesh.put(board, mesh.releases[flips % 2])
        board.flip()
        board.settle()
    assert clients.returncode == 0
    assert mesh.connects() == 4000
    assert flips >= 4


def test_a_connection_keeps_to_its_release_on_every_hook_until_the_board_settles(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    client, server = peer("open_tcp", "first")
    assert mesh.seen_by(client) == released(0, 0, 1, 2, 3)
    assert mesh.seen_by(server)[1] == {0}
    mesh.put(board, mesh.releases[1])
    peer("use", "first")
    assert mesh.seen_by(client) == released(0, 2, 3, 4)
    board.flip()
    later = peer("open_tcp", "second")
    for name in ("first", "second"):
        peer("use", name)
    assert mesh.seen_by(client) == mesh.seen_by(server) == released(0, 2, 3, 4)
    assert mesh.seen_by(later[0]) == released(1, 0, 1, 2, 3, 4)
    assert mesh.seen_by(later[1]) == released(1, 1, 2, 3, 4)
    assert board.left() == Left(2, 2, 0, True)
    assert board.settle() == 2
    peer("use", "first")
    assert mesh.seen_by(client) == mesh.seen_by(server) == released(1, 2, 3, 4)
    assert board.left() == Left(4, 0, 0, False)


def test_connections_that_end_are_left_no_more(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    peer("open_tcp", "first")
    mesh.put(board, mesh.releases[1])
    board.flip()
    assert board.left().before == 2
    peer("close", "first")
    until = time.monotonic() + 5
    while board.left().before and time.monotonic() < until:
        time.sleep(0.01)
    assert board.left().before == 0
    assert board.settle() == 0


def test_connections_older_than_the_board_stay_with_the_release_that_ran_then(lab: Lab, mesh: Mesh) -> None:
    mesh.attach()
    peer = Peer(lab)
    client, server = peer("open_tcp", "elder")
    (datagrams,) = peer("open_udp", "datagrams")
    board = mesh.install()
    mesh.put(board, mesh.releases[1])
    board.flip()
    for name in ("elder", "datagrams"):
        peer("use", name)
    assert 1 not in set().union(*mesh.seen_by(client), *mesh.seen_by(server), *mesh.seen_by(datagrams))
    assert board.left() == Left(0, 0, 0, True)
    board.settle()
    for name in ("elder", "datagrams"):
        peer("use", name)
    assert mesh.seen_by(client) == mesh.seen_by(server) == released(1, 2, 3, 4)
    assert mesh.seen_by(datagrams) == released(1, 2, 4)


def test_connections_older_than_the_board_are_counted_once_they_are_bound(lab: Lab, mesh: Mesh) -> None:
    mesh.attach()
    peer, stranger = Peer(lab), Peer(lab, "outside")
    client, _ = peer("open_tcp", "elder")
    peer("open_udp", "datagrams")
    peer("make", "waiting")
    stranger("open_tcp", "elsewhere")
    board = mesh.install()
    peer("open_tcp", "younger")
    assert board.bind_elders([lab.cgroup]) == 3
    mesh.put(board, mesh.releases[1])
    board.flip()
    assert board.left() == Left(0, 5, 0, True)
    peer("use", "elder")
    assert mesh.seen_by(client)[2:] == [{0}] * 3
    peer("close", "elder"), peer("close", "younger")
    assert board.left().before == 1
    assert board.settle() == 1


def test_packets_that_leave_by_an_interface_keep_to_the_release_of_their_connection(lab: Lab, mesh: Mesh) -> None:
    board, peer = Switchboard.create(lab.bpffs / "board"), Peer(lab)
    for kind in WITNESSES:
        mesh.links[kind] = Link.attach_cgroup(board.add(kind, kind, None), lab.cgroup, kind)
    board.add("egress", "tcx_egress", mesh.releases[0]["interface"], expected=0)
    pinned = lab.bpffs / "board" / "dispatchers" / "egress"
    for command in ("qdisc add dev lo clsact", f"filter add dev lo egress bpf da pinned {pinned}"):
        done = lab.run(["tc", *command.split()])
        assert done.returncode == 0, done.stderr
    (old, _) = peer("open_tcp", "old")
    board.put("egress", mesh.releases[1]["interface"], 2)
    board.flip()
    (new, _) = peer("open_tcp", "new")
    for name in ("old", "new"):
        peer("use", name)
    assert (mesh.seen_by(old), mesh.seen_by(new)) == (released(0, 2), released(1, 2))


def test_connect_again_begins_another_connection(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    (client, _) = peer("open_tcp", "again")
    mesh.put(board, mesh.releases[1])
    board.flip()
    peer("disconnect", "again")
    mesh.seen_by(client)
    peer("connect", "again")
    peer("use", "again")
    assert mesh.seen_by(client) == released(1, 0, 1, 2, 3, 4)


FLIPPING = """
struct epochs { __u32 present, elder, settled; };
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE);
         __type(key, __u32); __type(value, struct epochs); } board_epoch SEC(".maps");
SEC("cgroup/connect4") int flip(struct bpf_sock_addr *ctx)
{
    __u32 zero = 0;
    struct epochs *epochs = bpf_map_lookup_elem(&board_epoch, &zero);
    if (epochs)
        epochs->present = 2;
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""


def test_a_flip_between_two_programs_of_one_connect_does_not_divide_it(lab: Lab, mesh: Mesh) -> None:
    board, peer = Switchboard.create(lab.bpffs / "board"), Peer(lab)
    data = compile_object(FLIPPING, lab.scratch / "flip.bpf.o").read_bytes()
    with Map.open(lab.bpffs / "board" / "epoch") as epochs:
        flip = load_object(data, "flip", {"board_epoch": epochs}, {}).programs["flip"]
    mesh.links["flip"] = Link.attach_cgroup(board.add("flip", HOOKS["connect4"], flip), lab.cgroup, HOOKS["connect4"])
    mesh.install()
    mesh.put(board, mesh.releases[1])
    (client, _) = peer("open_tcp", "amid")
    assert board.epoch == 2
    assert mesh.seen_by(client) == released(0, 0, 1, 2, 3)


def test_without_a_dispatcher_on_connect_the_first_packet_of_tcp_begins_a_connection(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    mesh.links.pop("connect4").detach()
    (client, _) = peer("open_tcp", "again")
    mesh.put(board, mesh.releases[1])
    board.flip()
    peer("use", "again")
    assert mesh.seen_by(client) == released(0, 1, 2, 3, 4)
    peer("disconnect", "again")
    mesh.seen_by(client)
    peer("connect", "again")
    assert mesh.seen_by(client) == released(1, 1, 2, 3)


def test_a_socket_made_before_the_flip_and_connected_after_it_is_new(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    (client,) = peer("make", "waiting")
    mesh.put(board, mesh.releases[1])
    board.flip()
    assert board.left().before == 0
    peer("connect", "waiting")
    assert mesh.seen_by(client) == released(1, 0, 1, 2, 3)


def test_a_connected_datagram_socket_is_a_connection_until_it_is_moved(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    (client,) = peer("open_udp", "datagrams")
    mesh.put(board, mesh.releases[1])
    board.flip()
    peer("use", "datagrams")
    assert mesh.seen_by(client) == released(0, 0, 2, 4)
    assert board.left().before == 1
    assert board.settle() == 1
    peer("use", "datagrams")
    assert mesh.seen_by(client) == released(1, 2, 4)


def test_a_socket_of_datagrams_belongs_to_the_release_of_its_first_one(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    (old,) = peer("send", "old")
    mesh.put(board, mesh.releases[1])
    board.flip()
    (new,) = peer("send", "new")
    peer("send", "old")
    assert board.left() == Left(1, 0, 2, True)  # the receiver, too
    assert (mesh.seen_by(old), mesh.seen_by(new)) == (released(0, 2), released(1, 2))


def test_calls_for_datagrams_and_the_end_of_a_socket_are_of_its_release(lab: Lab, mesh: Mesh) -> None:
    kinds = {"sendmsg4": "cgroup_udp4_sendmsg", "recvmsg4": "cgroup_udp4_recvmsg"}
    kinds["release"] = "cgroup_inet_sock_release"
    board, peer = Switchboard.create(lab.bpffs / "board"), Peer(lab)
    for name, kind in {**dict(zip(WITNESSES, WITNESSES, strict=True)), **kinds}.items():
        mesh.links[name] = Link.attach_cgroup(board.add(name, kind, mesh.running.get(name)), lab.cgroup, kind)
    (old,) = peer("exchange", "old")
    for name in kinds:
        board.put(name, mesh.releases[1][name], 2)
    board.flip()
    (new,) = peer("exchange", "new")
    peer("exchange", "old")
    peer("close", "old"), peer("close", "new")
    assert (mesh.seen_by(old), mesh.seen_by(new)) == (released(0, 0, 1, 4), released(1, 0, 1, 4))


MESSAGES = """
MAP(peers, SOCKHASH, 16, __u32, __u32);
MAP(messages, ARRAY, 2, __u32, __u64);
SEC("sockops") int take(struct bpf_sock_ops *ops)
{
    __u32 port = ops->local_port;
    if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
        bpf_sock_hash_update(ops, &peers, &port, BPF_ANY);
    return 1;
}
SEC("sk_msg") int verdict(struct sk_msg_md *msg)
{
    __u32 release = RELEASE;
    __u64 *count = bpf_map_lookup_elem(&messages, &release);
    if (count)
        __sync_fetch_and_add(count, 1);
    return SK_PASS;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""


def test_sockets_in_a_sockhash_are_served_by_their_release_and_then_by_the_next(lab: Lab) -> None:
    releases, shared = [], dict[str, Map]()
    for release in (0, 1):
        target = compile_object(f"#define RELEASE {release}\n{MESSAGES}", lab.scratch / f"messages{release}.bpf.o")
        loaded = load_object(target.read_bytes(), "messages", shared, {})
        shared = loaded.maps
        releases.append(loaded.programs)

    def messages() -> list[int]:
        return [int.from_bytes(shared["messages"].lookup(struct.pack("=I", n)) or b"", "little") for n in (0, 1)]

    board, peer = Switchboard.create(lab.bpffs / "board"), Peer(lab)
    verdict = board.add("verdict", "sk_msg_verdict", releases[0]["verdict"])
    attached = ctypes.CDLL("libbpf.so.1").bpf_prog_attach(verdict.fd, shared["peers"].fd, 7, 0)  # BPF_SK_MSG_VERDICT
    assert attached == 0
    links = [
        Link.attach_cgroup(board.add(kind, kind, program), lab.cgroup, kind)
        for kind, program in zip(WITNESSES, (None, releases[0]["take"]), strict=True)
    ]
    peer("open_tcp", "old"), peer("use", "old")
    assert messages() == [1, 0]
    board.put("verdict", releases[1]["verdict"], 2)
    board.put(WITNESSES[1], releases[1]["take"], 2)
    board.flip()
    peer("open_tcp", "new"), peer("use", "new"), peer("use", "old")
    assert messages() == [2, 1]
    board.settle()
    peer("use", "new"), peer("use", "old")
    assert messages() == [2, 3]
    for link in links:
        link.close()


def test_a_hook_that_only_the_new_release_has_lets_old_connections_pass(lab: Lab, mesh: Mesh) -> None:
    del mesh.releases[0]["peername"]
    mesh.running = {**mesh.releases[0]}
    board, peer = Switchboard.create(lab.bpffs / "board"), Peer(lab)
    for name, kind in {**{kind: kind for kind in WITNESSES[:1]}, **HOOKS}.items():
        dispatcher = board.add(name, kind, mesh.running.get(name))
        mesh.links[name] = Link.attach_cgroup(dispatcher, lab.cgroup, kind)
    (client, _) = peer("open_tcp", "old")
    mesh.put(board, mesh.releases[1])
    board.flip()
    peer("use", "old")
    assert mesh.seen_by(client)[4] == set()
    (client, _) = peer("open_tcp", "new")
    peer("use", "new")
    assert mesh.seen_by(client)[4] == {1}


def test_a_flip_is_taken_back_with_the_connections_that_began_meanwhile(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    (old, _) = peer("open_tcp", "old")
    mesh.put(board, mesh.releases[1])
    board.flip()
    (new, _) = peer("open_tcp", "new")
    assert [board.flip_back(), board.flip_back()] == [3, 3]
    board.settle()
    for cookie in (old, new):
        mesh.seen_by(cookie)
    for name in ("old", "new"):
        peer("use", name)
    assert mesh.seen_by(old) == mesh.seen_by(new) == released(0, 2, 3, 4)
    (later, _) = peer("open_tcp", "later")
    assert mesh.seen_by(later) == released(0, 0, 1, 2, 3)


def test_a_third_release_is_refused_while_the_first_may_have_connections(lab: Lab, mesh: Mesh) -> None:
    board = mesh.install()
    mesh.put(board, mesh.releases[1])
    board.flip()
    with pytest.raises(NodeError, match="connections may be left of the epoch before 2"):
        mesh.put(board, mesh.releases[0])
    board.settle()
    mesh.put(board, mesh.releases[0])


def test_another_process_finds_the_board_by_its_pins_and_finishes(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    (client, _) = peer("open_tcp", "held")
    mesh.put(board, mesh.releases[1])
    board.flip()
    board.close()
    again = Switchboard(lab.bpffs / "board")
    assert (again.epoch, again.is_settled, again.flip()) == (2, False, 2)
    assert again.hooks() == sorted([*HOOKS, WITNESSES[0]])
    assert again.settle() == 2
    mesh.seen_by(client)
    peer("use", "held")
    assert mesh.seen_by(client) == released(1, 2, 3, 4)


@pytest.mark.parametrize("cut", [0, 1])
def test_settling_that_was_cut_short_is_repeated(
    lab: Lab, mesh: Mesh, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    board, peer = mesh.install(), Peer(lab)
    (client, _) = peer("open_tcp", "held")
    mesh.put(board, mesh.releases[1])
    board.flip()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(board, ("_pass", "hooks")[cut], Mock(side_effect=KeyboardInterrupt))
        board.settle()
    again = Switchboard(lab.bpffs / "board")
    assert not again.is_settled
    with pytest.raises(NodeError, match="settle the board"):
        mesh.put(again, mesh.releases[0])
    again.settle()
    assert again.left() == Left(2, 0, 0, False)
    mesh.put(again, mesh.releases[0])
    mesh.seen_by(client)
    peer("use", "held")
    assert mesh.seen_by(client) == released(1, 2, 3, 4)


def test_a_hook_comes_and_goes_while_two_releases_run(lab: Lab, mesh: Mesh) -> None:
    board, peer = mesh.install(), Peer(lab)
    mesh.links.pop("peername").detach()
    board.remove("peername")
    assert "peername" not in board.hooks()
    (old, _) = peer("open_tcp", "old")
    for name in HOOKS:
        if name != "peername":
            board.put(name, mesh.releases[1][name], 2)
    board.flip()
    (new, _) = peer("open_tcp", "new")
    dispatcher = board.add("peername", HOOKS["peername"], mesh.releases[1]["peername"])
    board.put("peername", mesh.releases[0]["peername"], 1)
    mesh.links["peername"] = Link.attach_cgroup(dispatcher, lab.cgroup, HOOKS["peername"])
    for name in ("old", "new"):
        peer("use", name)
    assert (mesh.seen_by(old)[4], mesh.seen_by(new)[4]) == ({0}, {1})


def test_settling_lets_the_old_programs_go(lab: Lab, mesh: Mesh) -> None:
    board = mesh.install()
    mesh.put(board, mesh.releases[1])
    board.flip()
    board.settle()
    with Map.open(lab.bpffs / "board" / "slots" / "connect4") as slots:
        ids = {struct.unpack("=I", slots.lookup(struct.pack("=I", slot)) or b"")[0] for slot in (0, 1)}
    assert ids == {mesh.releases[1]["connect4"].info.id}


@pytest.mark.parametrize("attach_type", KINDS)
def test_a_dispatcher_can_stand_on(lab: Lab, attach_type: str) -> None:
    board = Switchboard.create(lab.bpffs / "board")
    first = board.add("hook", attach_type, None)
    assert board.add("hook", attach_type, None).info == first.info


@pytest.mark.parametrize(("attach_type", "socket"), [("sk_lookup", 0), ("sk_skb_verdict", 168)])
def test_programs_on_some_hooks_see_a_socket_and_get_no_storage_of_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, attach_type: str, socket: int
) -> None:
    kind = KINDS[attach_type]
    monkeypatch.setitem(KINDS, attach_type, Kind(kind.program, kind.attach, socket))
    board = Switchboard.create(lab.bpffs / "board")
    with pytest.raises(KernelError, match=r"(cannot use helper|unknown func) bpf_sk_storage_get"):
        board.add("hook", attach_type, None)


def test_a_hook_that_calls_no_dispatcher_is_refused(lab: Lab) -> None:
    board = Switchboard.create(lab.bpffs / "board")
    with pytest.raises(UnsupportedError, match="no dispatcher can stand on netfilter"):
        board.add("hook", "netfilter", None)


def test_a_program_with_storage_of_its_cgroup_is_refused_by_the_kernel(lab: Lab) -> None:
    source = """
    struct { __uint(type, BPF_MAP_TYPE_CGROUP_STORAGE); __type(key, struct bpf_cgroup_storage_key);
             __type(value, __u64); } counts SEC(".maps");
    SEC("cgroup_skb/egress") int egress(struct __sk_buff *skb)
    {
        __sync_fetch_and_add((__u64 *)bpf_get_local_storage(&counts, 0), 1);
        return 1;
    }
    char _license[] SEC("license") = "Dual BSD/GPL";
    """
    loaded = load_object(compile_object(source, lab.scratch / "own.bpf.o").read_bytes(), "own", {}, {})
    board = Switchboard.create(lab.bpffs / "board")
    with pytest.raises(UnsupportedError, match="hook egress: the kernel lets no dispatcher lead to program egress"):
        board.add("egress", "cgroup_inet_egress", loaded.programs["egress"])


@pytest.mark.parametrize(("section", "attach_type"), [("cgroup/skb", "cgroup_inet_egress"), ("tc", "tcx_egress")])
def test_a_dispatcher_is_of_the_attach_type_that_the_programs_were_loaded_for(
    lab: Lab, section: str, attach_type: str
) -> None:
    source = f'SEC("{section}") int any(struct __sk_buff *skb) {{ return 1; }} char _license[] SEC("license") = "GPL";'
    loaded = load_object(compile_object(source, lab.scratch / "any.bpf.o").read_bytes(), "any", {}, {})
    board = Switchboard.create(lab.bpffs / "board")
    board.add("own", attach_type, loaded.programs["any"], expected=0)
    with pytest.raises(UnsupportedError, match="loaded for another attach type"):
        board.add("hook", attach_type, loaded.programs["any"])
