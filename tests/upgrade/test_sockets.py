"""Sockets of a sockhash: connections that are redirected stay so, through upgrades, kills and ways back."""

from __future__ import annotations

import ctypes
import json
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
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.kernel.sockets import Adder, list_sockets
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.kills import die, exit_code_of
from tests.releases import write_release

# Each established connection is noted by its ports; what one end sends goes straight to the other end's queue.
REDIRECTING = """
MAP(redirected, ARRAY, 1, __u32, __u64);
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
    __u32 zero = 0;
    __u64 *count = bpf_map_lookup_elem(&redirected, &zero);
    if (bpf_msg_redirect_hash(msg, &peers, &key, BPF_F_INGRESS) == SK_PASS && count)
        __sync_fetch_and_add(count, 1);
    return SK_PASS;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
HEAD = "#include <bpf/bpf_endian.h>\n"
FIRST = HEAD + "struct ports { __u32 local, remote; };\nMAP(peers, SOCKHASH, 256, struct ports, __u64);\n"
SECOND = HEAD + "struct ports { __u32 remote, local; };\nMAP(peers, SOCKHASH, 512, struct ports, __u64);\n"
ATTACH = """
[[attach]]
program = "note"
hook = "cgroup"
target = "${cgroup}"
link = "sockops"
"""

# One end of each pair sends numbered messages without a pause, the other checks that they come whole and in order. A
# blocking recv() of a socket in such a map ends with EAGAIN when anything wakes it, such as a shutdown() of its own.
PAIRS = """
import json, socket, sys, threading, time
go, sent, received, wrong = True, [], [], []
listener = socket.create_server(("127.0.0.1", 0))
def pair():
    client = socket.create_connection(listener.getsockname())
    return client, listener.accept()[0]
def send(end):
    number = 0
    while go:
        end.sendall(b"%015d\\n" % number)
        number += 1
        if number % 20 == 0:
            time.sleep(0.001)
    end.shutdown(socket.SHUT_WR)
    sent.append(number)
def receive(end):
    number, rest = 0, b""
    while not wrong:
        try:
            some = end.recv(1 << 16)
        except BlockingIOError:
            continue
        if not some:
            break
        *lines, rest = (rest + some).split(b"\\n")
        for line in lines:
            if line != b"%015d" % number:
                wrong.append([number, line.decode()])
                break
            number += 1
    if rest:
        wrong.append([number, rest.decode()])
    received.append(number)
ends = [pair() for _ in range(3)]
threads = []
for client, server in ends:
    for one, other in ((client, server), (server, client)):
        threads += [threading.Thread(target=send, args=[one]), threading.Thread(target=receive, args=[other])]
for line in sys.stdin:
    if line == "go\\n":
        for thread in threads:
            thread.start()
        print("going", flush=True)
    elif line == "more\\n":
        client, server = pair()
        for one, other in ((client, server), (server, client)):
            one.sendall(b"hello")
            assert other.recv(5) == b"hello"
        ends.append((client, server))
        print("more", flush=True)
    else:
        go = False
        for thread in threads:
            thread.join()
        print(json.dumps([sent, received, wrong]), flush=True)
"""


def attach(program: Path, held: Path) -> None:
    """Let the sk_msg program see what sockets send that are added to the map from now on."""
    libbpf = ctypes.CDLL("libbpf.so.1")
    with Program.open(program) as verdict, Map.open(held) as sockets:
        assert libbpf.bpf_prog_attach(verdict.fd, sockets.fd, 7, 0) == 0  # BPF_SK_MSG_VERDICT


class Pairs:
    """A process with three pairs of connected sockets in the clients' cgroup."""

    def __init__(self, lab: Lab) -> None:
        run = [sys.executable, "-c", PAIRS]
        self._process = lab.popen(run, cgroup="clients", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def say(self, word: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def stop(self) -> int:
        """The number of messages sent, all of which came, in order."""
        sent, received, wrong = json.loads(self.say("stop"))
        assert wrong == []
        assert sorted(received) == sorted(sent)
        assert len(sent) == 6
        return sum(sent)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def redirected(node: hitless.Node, bundle: hitless.Bundle, lab: Lab) -> Iterator[Pairs]:
    """Pairs under the release, whose messages are redirected from the first one on."""
    hitless.apply(node, bundle)
    attach(node.root / "progs" / "redirect", node.root / "maps" / "peers")
    made = Pairs(lab)
    try:
        made.say("go")
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    top = tmp_path_factory.mktemp("sockets")
    return {
        1: write_release(top / "1", "1.0", FIRST + REDIRECTING, ATTACH),
        2: write_release(top / "2", "2.0", SECOND + REDIRECTING, ATTACH),
    }


@pytest.fixture
def bundles(directories: dict[int, Path], lab: Lab) -> dict[int, hitless.Bundle]:
    return {number: hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)}) for number, path in directories.items()}


def counted(node: hitless.Node) -> int:
    count: int = node.map("redirected").get(0)
    return count


def attaching(node: hitless.Node) -> None:
    """What a control plane does before the cutover: programs for the new map, which has the old sockets already."""
    attach(node.next / "progs" / "redirect", node.next / "maps" / "peers")


def test_the_plan_says_how_and_how_exactly(node: hitless.Node, bundles: dict[int, hitless.Bundle]) -> None:
    hitless.apply(node, bundles[1])
    (peers,) = [entry for entry in hitless.plan(node, bundles[2]).maps if entry.name == "peers"]
    assert (peers.action, peers.kind, peers.method) == (
        "convert",
        "sockets",
        "added to the new map, and kept in the old one",
    )
    assert peers.exactness.startswith("exact; a socket keeps the programs that it was added under")


def test_every_socket_is_in_the_new_map_under_its_new_key(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    with redirected(node, bundles[1], lab):
        before = list_sockets(Map.open(node.root / "maps" / "peers"))
        result = hitless.apply(node, bundles[2])
        after = list_sockets(Map.open(node.root / "maps" / "peers"))
    assert len(before) == 6
    assert {key[4:] + key[:4]: cookie for key, cookie in before.items()} == after
    assert [entry.copied for entry in result.maps if entry.name == "peers"] == [6]


def test_redirected_connections_go_on_through_upgrades_and_every_byte_comes_in_order(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    with redirected(node, bundles[1], lab) as pairs:
        for _ in range(5):
            hitless.apply(node, bundles[2], prepare=attaching)
            hitless.apply(node, bundles[1], prepare=attaching)
        assert len(list_sockets(Map.open(node.root / "maps" / "peers"))) == 6
        assert pairs.stop() == counted(node) > 1000


def test_connections_made_after_an_upgrade_are_redirected_by_the_new_release(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    with redirected(node, bundles[1], lab) as pairs:
        hitless.apply(node, bundles[2], prepare=attaching)
        messages = pairs.stop()
        assert pairs.say("more") == "more\n"
        assert counted(node) == messages + 2
        assert len(list_sockets(Map.open(node.root / "maps" / "peers"))) == 8


def test_sockets_added_between_copy_and_cutover_are_carried_by_the_catch_up(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    def prepare(_: hitless.Node) -> None:
        pairs.say("more")

    with redirected(node, bundles[1], lab) as pairs:
        result = hitless.apply(node, bundles[2], prepare=prepare)
        assert len(list_sockets(Map.open(node.root / "maps" / "peers"))) == 8
        assert pairs.stop() + 2 == counted(node)
    (peers,) = [entry for entry in result.maps if entry.name == "peers"]
    assert (peers.copied, peers.caught_up, peers.lost) == (6, 2, 0)


def test_sockets_that_come_when_the_new_map_has_programs_stay_with_the_old_release_and_are_told(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    def prepare(node: hitless.Node) -> None:
        attaching(node)
        pairs.say("more")

    with redirected(node, bundles[1], lab) as pairs:
        result = hitless.apply(node, bundles[2], prepare=prepare)
        (peers,) = [entry for entry in result.maps if entry.name == "peers"]
        assert peers.lost_fields == {"sockets that stay with the old release (EBUSY)": 2}
        assert pairs.stop() + 2 == counted(node)


def test_a_socket_taken_out_of_the_old_release_map_leaves_the_new_one_too(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    def prepare(node: hitless.Node) -> None:
        with Map.open(node.current / "maps" / "peers") as old:
            for key in list(list_sockets(old))[:2]:
                old.delete(key)

    with redirected(node, bundles[1], lab) as pairs:
        hitless.apply(node, bundles[2], prepare=prepare)
        assert len(list_sockets(Map.open(node.root / "maps" / "peers"))) == 4
        pairs.stop()


def test_an_upgrade_that_fails_after_the_cutover_brings_new_sockets_back(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab
) -> None:
    def late(event: hitless.Progress) -> None:
        if event.step == "merge":
            pairs.say("more")
        if event.step == "commit":
            raise ZeroDivisionError

    with redirected(node, bundles[1], lab) as pairs:
        before = list_sockets(Map.open(node.root / "maps" / "peers"))
        with pytest.raises(ZeroDivisionError):
            hitless.apply(node, bundles[2], progress=late)
        after = list_sockets(Map.open(node.root / "maps" / "peers"))
        assert len(after) == 8
        assert before.items() <= after.items()
        assert pairs.stop() == counted(node)
    assert status(node).problems == ()


def upgrade_dying(step: str, fails: bool, node: hitless.Node, bundle: hitless.Bundle) -> None:
    """An upgrade that dies at ``step``, or after it added so often; one that ``fails`` does so after its cutover."""
    add, runs = Adder.add, 0

    def adding(adder: Adder, *parts: Any) -> Any:
        nonlocal runs
        outcomes = add(adder, *parts)
        runs += 1
        if step == f"added {runs}":
            die()
        return outcomes

    def progress(event: hitless.Progress) -> None:
        if event.step == step:
            die()
        if fails and event.step == "commit":
            raise ZeroDivisionError

    setattr(Adder, "add", adding)  # noqa: B010 - of the process that dies
    hitless.apply(hitless.Node(node.root), bundle, progress=progress)


@pytest.mark.parametrize("fails", [False, True], ids=["forward", "taken-back"])
def test_connections_outlive_an_upgrader_that_is_killed(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab, fails: bool
) -> None:
    steps = ["added 1", "verify", "cutover", "added 2", "merge", "added 3", "commit"]
    with redirected(node, bundles[1], lab) as pairs:
        for step in ["added 4"] if fails else steps:
            assert exit_code_of(partial(upgrade_dying, step, fails, node, bundles[2])) == -signal.SIGKILL, step
            hitless.recover(node)
            assert status(node).problems == ()
            assert len(list_sockets(Map.open(node.root / "maps" / "peers"))) == 6
            hitless.apply(node, bundles[1])
        assert len(list_sockets(Map.open(node.root / "maps" / "peers"))) == 6
        assert pairs.stop() == counted(node)


def test_a_new_map_that_is_too_small_stops_the_upgrade_before_anything_is_switched(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab, tmp_path: Path
) -> None:
    small = write_release(tmp_path, "3.0", FIRST.replace("256", "4") + REDIRECTING, ATTACH)
    with redirected(node, bundles[1], lab) as pairs:
        with pytest.raises(hitless.LossNotAllowedError, match=r"map peers has 6 entries, and release 3\.0 has room"):
            hitless.apply(node, hitless.Bundle.load(small, {"cgroup": str(lab.cgroup)}))
        assert node.observe().version == "1.0"
        assert pairs.stop() == counted(node)


# Takes the server's socket out of the only map that it is in, with a message in its queue or a reader that waits.
TAKEN_OUT = """
import socket, struct, sys, threading, time
from pathlib import Path
from hitless.errors import KernelError
from hitless.kernel.maps import Map
peers = Map.open(Path(sys.argv[1]))
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server = listener.accept()[0]
key = struct.pack("=II", server.getsockname()[1], server.getpeername()[1])
server.settimeout(1)
if sys.argv[2] == "queued":
    client.sendall(b"hello")
    peers.delete(key)
    try:
        print(server.recv(5))
    except TimeoutError:
        print("nothing")
else:
    server.settimeout(None)
    threading.Thread(target=server.recv, args=[5], daemon=True).start()
    time.sleep(0.5)
    peers.delete(key)
    try:
        peers.update(key, struct.pack("=Q", server.fileno()))
    except KernelError as error:
        print(error.facts["errno_name"], flush=True)
"""


@pytest.mark.parametrize(("when", "what"), [("queued", "nothing"), ("waiting", "EBUSY")])
def test_a_socket_out_of_its_last_map_loses_its_queue_or_cannot_come_back_so_none_is_moved(
    node: hitless.Node, bundles: dict[int, hitless.Bundle], lab: Lab, when: str, what: str
) -> None:
    hitless.apply(node, bundles[1])
    attach(node.root / "progs" / "redirect", node.root / "maps" / "peers")
    done = lab.run_python("-c", TAKEN_OUT, str(node.root / "maps" / "peers"), when, cgroup="clients")
    assert (done.stdout, done.stderr) == (what + "\n", "")


# A sockmap has slots: the first two connected sockets get the first two.
SLOTS = """
MAP(slots, SOCKMAP, SIZE, __u32, __u64);
MAP(used, ARRAY, 1, __u32, __u32);
SEC("sockops") int note(struct bpf_sock_ops *ops)
{
    __u32 zero = 0, slot, *next = bpf_map_lookup_elem(&used, &zero);
    if (!next || ops->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
        return 1;
    slot = (*next)++;
    bpf_sock_map_update(ops, &slots, &slot, BPF_ANY);
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""


def test_sockets_keep_their_slots_in_a_sockmap_of_another_size(node: hitless.Node, lab: Lab, tmp_path: Path) -> None:
    sizes = {"1.0": 8, "2.0": 16, "3.0": 3}
    bundles = {
        version: hitless.Bundle.load(
            write_release(tmp_path / version, version, SLOTS.replace("SIZE", str(size)), ATTACH),
            {"cgroup": str(lab.cgroup)},
        )
        for version, size in sizes.items()
    }
    hitless.apply(node, bundles["1.0"])
    pairs = Pairs(lab)
    assert pairs.say("more") == "more\n"
    before = list_sockets(Map.open(node.root / "maps" / "slots"))
    assert {int.from_bytes(key, "little") for key in before} == {0, 1, 2, 3}
    hitless.apply(node, bundles["2.0"])
    assert list_sockets(Map.open(node.root / "maps" / "slots")) == before
    with Map.open(node.root / "maps" / "slots") as held:
        for key in [key for key in before if key[0] < 2]:
            held.delete(key)
            del before[key]
    with pytest.raises(hitless.KernelError, match="adding a socket on map slots, whose max_entries is 3: E2BIG"):
        hitless.apply(node, bundles["3.0"])
    assert list_sockets(Map.open(node.root / "maps" / "slots")) == before
    pairs.close()
