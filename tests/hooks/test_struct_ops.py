"""struct_ops by link: a congestion control that a release brings, exchanged while TCP connections ask for it."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hitless
from hitless.kernel.maps import is_alive
from hitless.kernel.struct_ops import StructOps, congestion_controls
from hitless.upgrade.attached import open_attached
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.patience import often, patient
from tests.releases import write_release

REPLACEMENTS = often(1000)

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
PLAIN = """struct tally { __u32 begun TAG("merge=sum"); __u32 ended TAG("merge=sum");
                          __u32 grown TAG("merge=sum"); };"""
WIDER = """struct tally { __u64 since; __u64 ended TAG("merge=sum"); __u64 begun TAG("merge=sum");
                          __u64 grown TAG("merge=sum"); };"""
ATTACH = """
[[attach]]
program = "counting"
hook = "struct_ops"
target = "NAME"
link = "cc"
"""

# Connects and closes until stdin says stop, by as many threads as asked; tells how many connections there were.
CLIENT = f"""
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
for one in running: one.join({patient(20)})
assert len(told) == threads
print(sum(told), flush=True)
"""

PLACE = "hl_placeholders"  # as long as a name can be: the objects are compiled once, for whichever process


class World:
    """A pin root of the test's own, and releases whose congestion control has this process' own name.

    ``directory`` keeps them, since many tests take the same.
    """

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.name = f"hl_{os.getpid()}"
        self.node = hitless.Node(lab.bpffs / "store")

    def bundle(
        self, number: int, tally: str = PLAIN, section: str = ".struct_ops.link", name: str = "",
        manifest: str = ATTACH, change: Callable[[str], str] = str,
    ) -> hitless.Bundle:  # fmt: skip
        source = SOURCE.replace("RELEASE", str(number)).replace("TALLY", tally).replace("SECTION", section)
        source = change(source.replace("NAME", PLACE))
        manifest = manifest.replace("NAME", name or self.name)
        path = self.directory / hashlib.sha256(f"{number} {source} {name} {manifest}".encode()).hexdigest()
        if not path.exists():
            write_release(path, f"{number}.0", source, manifest)
            made, own = path / "store.bpf.o", (name or self.name).encode().ljust(len(PLACE), b"\0")
            made.write_bytes(made.read_bytes().replace(PLACE.encode(), own))
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
        until = time.monotonic() + patient(5)
        while True:
            found = self.counted().values()
            begun, ended = (sum(one[key] for one in found) for key in ("begun", "ended"))
            if begun == ended or time.monotonic() > until:
                return begun, ended
            time.sleep(0.01)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("releases")


@pytest.fixture
def world(lab: Lab, releases: Path) -> Iterator[World]:
    made = World(lab, releases)
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
        with open_attached(node.links, "cc") as link:
            link.update(comes, there)
    hitless.rollback(node)
    done = int(client.communicate("\n", timeout=patient(20))[0])
    assert client.returncode == 0
    assert world.sums() == (done, done)
    assert min(one["begun"] for one in world.counted().values()) > often(100)
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


@pytest.mark.parametrize("section", [".struct_ops", ".struct_ops.link"])
def test_what_an_object_calls_its_section_makes_no_difference(world: World, section: str) -> None:
    hitless.apply(world.node, world.bundle(1, section=section))
    assert world.name in congestion_controls()
    for one in connected(world.name):
        one.close()
    assert world.sums() == (1, 1)
    hitless.unload(world.node)
    assert world.name not in congestion_controls()


def test_a_connection_keeps_what_it_began_with_and_a_kept_map_counts_it_all_the_same(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    ends = connected(world.name)
    result = hitless.apply(world.node, world.bundle(2))
    assert {entry.name: entry.action for entry in result.maps} == {"seen": "keep", "counting": "discard"}
    with StructOps.open(world.node.previous / "maps" / "counting") as old:
        assert old.users == 1
    ends[0].sendall(b"x")
    for one in ends:
        one.close()
    assert world.sums() == (1, 1)
    assert list(world.counted()) == [1]
    with StructOps.open(world.node.previous / "maps" / "counting") as old:
        assert old.users == 0


def test_a_listening_socket_passes_on_what_it_has_until_it_asks_again(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for asked in (1, 2):
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, world.name.encode())
            if asked == 1:
                hitless.apply(world.node, world.bundle(2))
            with socket.create_connection(server.getsockname()), server.accept()[0]:
                assert world.counted()[asked]["begun"] == 1


def test_a_namespace_whose_default_it_is_follows(world: World) -> None:
    def free(text: str) -> str:
        return text.replace("char name[16]", "__u32 flags; char name[16]").replace(".name =", ".flags = 1, .name =")

    default = "/proc/sys/net/ipv4/tcp_congestion_control"
    make = "import socket; a = socket.create_server(('127.0.0.1', 0)); socket.create_connection(a.getsockname())"
    hitless.apply(world.node, world.bundle(1, change=free))
    world.lab.run(["sh", "-c", f"echo {world.name} > {default}"])
    hitless.apply(world.node, world.bundle(2, change=free))
    with StructOps.open(world.node.previous / "maps" / "counting") as old:
        assert old.users == 0
    world.lab.run([sys.executable, "-c", make])
    assert list(world.counted()) == [2]
    world.lab.run(["sh", "-c", f"echo reno > {default}"])


def test_a_converted_map_is_merged_when_the_last_connection_of_the_old_release_has_ended(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    bundle = world.bundle(2, tally=WIDER)
    (note,) = next(entry.notes for entry in hitless.plan(world.node, bundle).maps if entry.name == "seen")
    assert "waits for sockets that have the struct_ops of 1.0" in note
    ends = connected(world.name)
    waited: list[int] = []

    def told(progress: hitless.Progress) -> None:
        if progress.step == "connections" and progress.done:
            waited.append(progress.done)
            if len(waited) == 3:
                for one in ends:
                    one.close()

    hitless.apply(world.node, bundle, progress=told)
    assert waited[:3] == [1, 1, 1]
    assert world.counted()[1]["begun"] == world.counted()[1]["ended"] == 1
    for one in connected(world.name):
        one.close()
    assert world.sums() == (2, 2)


def test_converting_and_back_under_traffic_loses_no_connection(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    client = world.client(2)
    second = world.bundle(2, tally=WIDER)
    for _ in range(5):
        hitless.apply(world.node, second)
        hitless.rollback(world.node, allow_loss=["seen"])
    done = int(client.communicate("\n", timeout=patient(20))[0])
    assert client.returncode == 0
    assert world.sums() == (done, done)
    assert status(world.node).problems == ()


def test_an_upgrade_whose_map_old_connections_go_on_writing_is_taken_back_after_its_deadline(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    ends = connected(world.name)
    manifest = f"{ATTACH}\n[cutover]\ndeadline = 0.2\n"
    with pytest.raises(hitless.NodeError, match=r"1 sockets still have the struct_ops .* write seen, which"):
        hitless.apply(world.node, world.bundle(2, tally=WIDER, manifest=manifest))
    assert hitless.verify(world.node).version == "1.0"
    for one in ends:
        one.close()
    assert world.sums() == (1, 1)
    hitless.apply(world.node, world.bundle(2, tally=WIDER, manifest=manifest))


def test_an_upgrade_that_is_taken_back_tells_of_connections_that_go_on_with_it(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    ends: list[socket.socket] = []

    def told(progress: hitless.Progress) -> None:
        if progress.step == "catch-up":
            ends.extend(connected(world.name))
        elif progress.step == "commit":
            raise ConnectionError("stop here")

    with pytest.raises(ConnectionError) as caught:
        hitless.apply(world.node, world.bundle(2, tally=WIDER), progress=told)
    assert any("what 1 sockets write that have a struct_ops of 2.0" in note for note in caught.value.__notes__)
    for one in ends:
        one.close()
    assert hitless.verify(world.node).version == "1.0"
    assert world.counted()[2]["begun"] == 1  # what they had written until then is there


def test_connections_of_two_releases_before_are_waited_for_as_well(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    ends = connected(world.name)
    hitless.apply(world.node, world.bundle(2))
    hitless.gc(world.node)
    manifest = f"{ATTACH}\n[cutover]\ndeadline = 0.2\n"
    with pytest.raises(hitless.NodeError, match="1 sockets still have the struct_ops"):
        hitless.apply(world.node, world.bundle(1, tally=WIDER, manifest=manifest))
    for one in ends:
        one.close()
    hitless.apply(world.node, world.bundle(1, tally=WIDER, manifest=manifest))
    assert world.sums() == (1, 1)


@pytest.mark.parametrize(
    ("step", "back"),
    [
        ("copy", False), ("catch-up", False), ("catch-up", True), ("commit", False), ("commit", True),
        ("clean-up", False),
    ],
)  # fmt: skip
def test_a_killed_upgrade_is_finished_or_taken_back(world: World, step: str, back: bool) -> None:
    hitless.apply(world.node, world.bundle(1))
    bundle = world.bundle(2, tally=WIDER)
    client = world.client()
    child = os.fork()
    if not child:
        try:
            hitless.apply(world.node, bundle, progress=lambda told: killed(step, told))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert hitless.recover(world.node, back=back) is not None
    assert hitless.verify(world.node).problems == ()
    assert hitless.verify(world.node).version == ("1.0" if back or step == "copy" else "2.0")
    done = int(client.communicate("\n", timeout=patient(20))[0])
    assert client.returncode == 0
    assert world.sums() == (done, done)


def test_who_is_killed_while_waiting_for_connections_waits_again(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    bundle = world.bundle(2, tally=WIDER)
    ends = connected(world.name)
    child = os.fork()
    if not child:
        try:
            hitless.apply(world.node, bundle, progress=lambda told: killed("connections", told))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    seen: list[int] = []

    def told(progress: hitless.Progress) -> None:
        if progress.step == "connections" and progress.done:
            seen.append(progress.done)
            for one in ends:
                one.close()

    assert hitless.recover(world.node, progress=told) == "finished the interrupted upgrade to 2.0"
    assert seen
    assert world.sums() == (1, 1)


@pytest.mark.parametrize("step", ["copy", "catch-up", "commit"])
def test_a_killed_rollback_is_finished_or_undone(world: World, step: str) -> None:
    hitless.apply(world.node, world.bundle(1))
    hitless.apply(world.node, world.bundle(2, tally=WIDER))
    client = world.client()
    child = os.fork()
    if not child:
        try:
            hitless.rollback(world.node, allow_loss=["seen"], progress=lambda told: killed(step, told))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert hitless.recover(world.node) is not None
    assert hitless.verify(world.node).problems == ()
    assert hitless.verify(world.node).version == ("2.0" if step == "copy" else "1.0")
    done = int(client.communicate("\n", timeout=patient(20))[0])
    assert client.returncode == 0
    assert world.sums() == (done, done)


def killed(step: str, told: hitless.Progress) -> None:
    if told.step == step:
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_taken_off_is_gone_from_the_kernel_and_a_restart_puts_back_what_somebody_detached(world: World) -> None:
    first = world.bundle(1)
    hitless.apply(world.node, first)
    (world.node.links / "cc").unlink()
    until = time.monotonic() + patient(5)  # the kernel lets go of a pin a little later
    while world.name in congestion_controls() and time.monotonic() < until:
        time.sleep(0.01)
    assert any("cc is gone" in problem for problem in status(world.node).problems)
    hitless.apply(world.node, first)
    assert world.name in congestion_controls()
    subprocess.run(["bpftool", "link", "detach", "pinned", world.node.links / "cc"], check=True)
    assert any("cc" in problem for problem in status(world.node).problems)
    hitless.apply(world.node, first)
    assert status(world.node).problems == ()
    (hook,) = status(world.node).hooks
    assert (hook.program, hook.attach_type, hook.target) == ("counting", "struct_ops", world.name)
    hitless.apply(world.node, world.bundle(2, manifest=""))
    assert world.name not in congestion_controls()


def without_ops(text: str) -> str:
    return text[: text.index("static __always_inline")] + 'char _license[] SEC("license") = "GPL";\n'


def test_a_release_without_it_takes_it_off_and_loses_nothing(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    ends = connected(world.name)
    hitless.apply(world.node, world.bundle(2, manifest="", change=without_ops))
    assert world.name not in congestion_controls()
    for one in ends:
        one.close()
    assert world.sums() == (1, 1)
    hitless.rollback(world.node)
    assert world.name in congestion_controls()


def test_connections_are_waited_for_also_when_a_release_before_took_it_off(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    ends = connected(world.name)
    hitless.apply(world.node, world.bundle(2, manifest="", change=without_ops))
    hitless.gc(world.node)
    wider = world.bundle(3, tally=WIDER, manifest="[cutover]\ndeadline = 0.2\n", change=without_ops)
    with pytest.raises(hitless.NodeError, match="1 sockets still have the struct_ops"):
        hitless.apply(world.node, wider)
    for one in ends:
        one.close()
    hitless.apply(world.node, wider)
    assert world.sums() == (1, 1)


def test_a_release_without_it_cannot_convert_what_connections_go_on_writing(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    with pytest.raises(hitless.UnsupportedError, match="has no hook cc and changes seen, which connections"):
        hitless.apply(world.node, world.bundle(2, tally=WIDER, manifest="", change=without_ops))


def test_the_variable_may_have_another_name(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    manifest = ATTACH.replace("counting", "paced")
    renamed = world.bundle(2, manifest=manifest, change=lambda text: text.replace("counting", "paced"))
    result = hitless.apply(world.node, renamed)
    assert [(hook.action, hook.program) for hook in result.hooks] == [("update", "paced")]
    hitless.rollback(world.node)
    assert hitless.verify(world.node).problems == ()
    (hook,) = status(world.node).hooks
    assert hook.program == "counting"


def test_the_last_release_goes_and_leaves_nothing(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    hitless.apply(world.node, world.bundle(2))
    with StructOps.open(world.node.previous / "maps" / "counting") as old:
        number = old.info.id
    garbage = hitless.gc(world.node)
    assert number in {item.id for item in garbage.items}
    until = time.monotonic() + patient(5)  # the kernel frees it when no task can be in its trampolines
    while status(world.node).remnants and time.monotonic() < until:
        time.sleep(0.02)
    assert status(world.node).remnants == ()
    assert not is_alive(number)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("no object has a program missing; there are: .*counting", {"manifest": ATTACH.replace("counting", "missing")}),
        ("grow .* is no struct_ops map: .* there are: counting", {"manifest": ATTACH.replace("counting", "grow")}),
        ("counting is for hl_.* not for cubic", {"manifest": ATTACH.replace("NAME", "cubic")}),
        ("counting .* attaches to struct_ops, not to sk_lookup",
         {"manifest": ATTACH.replace("struct_ops", "sk_lookup", 1)}),
        ("counting is a bpf_dummy_ops, which the kernel cannot exchange in place",
         {"change": lambda text: text.replace("tcp_congestion_ops", "bpf_dummy_ops")}),
        ("struct_ops map counting: .* its member `name`, and that is ''",
         {"change": lambda text: re.sub(r'.name = "\w+"', '.name = ""', text)}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_by_the_manifest(world: World, what: str, changes: dict[str, object]) -> None:
    with pytest.raises((hitless.BundleError, hitless.UnsupportedError, hitless.LayoutError), match=what):
        world.bundle(1, **changes)  # type: ignore[arg-type]


def test_a_name_that_another_tool_registered_is_refused_before_anything_is_made(world: World) -> None:
    with pytest.raises(hitless.NodeError, match="the kernel has a congestion control reno already"):
        hitless.apply(world.node, world.bundle(1, name="reno"))
    assert not world.node.root.exists()


def test_another_name_is_refused_in_place_and_taken_under_a_link_of_its_own(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    other = f"{world.name[:-1]}x"
    with pytest.raises(hitless.UnsupportedError, match="exchanges only what has the same name"):
        hitless.apply(world.node, world.bundle(2, name=other))
    hitless.apply(world.node, world.bundle(2, name=other, manifest=ATTACH.replace('"cc"', '"other"')))
    assert other in congestion_controls()
    assert world.name not in congestion_controls()


def without_half(text: str) -> str:
    return re.sub(r'SEC."struct_ops/half".*', "", text).replace(".ssthresh = (void *)half, ", "")


def test_what_the_kernel_refuses_leaves_the_old_release_as_it_was(world: World) -> None:
    hitless.apply(world.node, world.bundle(1))
    with pytest.raises(hitless.KernelError, match="filling struct_ops map counting"):
        hitless.apply(world.node, world.bundle(2, change=without_half))
    assert hitless.verify(world.node).problems == ()
    assert hitless.verify(world.node).version == "1.0"
    assert world.name in congestion_controls()
