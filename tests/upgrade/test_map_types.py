"""Every type of map that the running kernel knows has a decided answer, and an upgrade does what it says."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import hitless
from hitless.cli.output import show_status
from hitless.kernel import queues
from hitless.kernel.libbpf import check, ffi, lib
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, run_code
from hitless.kernel.rings import unread_bytes
from hitless.layout.answers import ANSWERS, table
from hitless.layout.btf import Btf
from hitless.layout.elf import MAP_TYPES
from hitless.layout.model import Enum, Record
from hitless.upgrade import transaction
from hitless.upgrade.model import LeftRing, MapPlan
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.releases import ATTACH, write_release

Make = Callable[..., hitless.Bundle]

PROGRAM = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "GPL";
"""


@pytest.fixture
def make(lab: Lab, tmp_path: Path) -> Make:
    """A release of some version with these maps."""

    def release(version: str, maps: str) -> hitless.Bundle:
        path = write_release(tmp_path / version, version, maps + PROGRAM)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    return release


def held(node: hitless.Node) -> Map:
    return Map.open(node.current / "maps" / "held")


def planned(node: hitless.Node, bundle: hitless.Bundle) -> MapPlan:
    return next(entry for entry in hitless.plan(node, bundle).maps if entry.name == "held")


def test_every_type_that_the_running_kernel_knows_has_an_answer() -> None:
    known = Btf.parse(Path("/sys/kernel/btf/vmlinux").read_bytes()).find("enum bpf_map_type")
    assert isinstance(known, Enum)
    numbers = {value for name, value in known.values if not name.startswith("__")} - {0}
    spelled = {name.removeprefix("BPF_MAP_TYPE_").lower(): value for name, value in known.values}
    answered = {spelled[kind] for kind in ANSWERS if kind in spelled}
    assert {name for name, value in spelled.items() if value in numbers - answered} == set()


def test_the_page_of_map_types_agrees_with_the_answers() -> None:
    page = Path(__file__).parents[2] / "docs" / "map-types.md"
    assert table() in page.read_text()


# Queues and stacks


def queue(kind: str, fields: str, entries: int = 64) -> str:
    return (
        f"struct held {{ {fields} }};\nstruct {{ __uint(type, BPF_MAP_TYPE_{kind}); __uint(max_entries, {entries}); "
        '__type(value, struct held); } held SEC(".maps");\n'
    )


def push(pushed: Map, *values: int, size: int = 4) -> None:
    for value in values:
        data = value.to_bytes(size, "little").ljust(pushed.info.value_size, b"\0")
        check(lib().bpf_map_update_elem(pushed.fd, ffi.NULL, ffi.from_buffer(data), 0), "push", "held")


def pop_all(popped: Map, size: int = 4, offset: int = 0) -> list[int]:
    """Take all elements; returns the number of ``size`` bytes at ``offset`` in each."""
    pop = ctypes.CDLL("libbpf.so.1", use_errno=True).bpf_map_lookup_and_delete_elem
    value = ctypes.create_string_buffer(popped.info.value_size)
    taken = []
    while pop(popped.fd, None, value) == 0:
        taken.append(int.from_bytes(value.raw[offset : offset + size], "little"))
    assert ctypes.get_errno() == errno.ENOENT
    return taken


NARROW, WIDE = "__u32 a;", "__u64 before; __u64 a;"


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
def test_elements_are_carried_into_a_new_layout_in_their_order(node: hitless.Node, make: Make, kind: str) -> None:
    hitless.apply(node, make("1.0", queue(kind, NARROW, 1000)))
    push(held(node), *range(1000))
    result = hitless.apply(node, make("2.0", queue(kind, WIDE, 2000)))
    (told,) = (entry for entry in result.maps if entry.name == "held")
    assert (told.action, told.entries, told.caught_up) == ("convert", 1000, 1000)
    order = list(range(1000))
    assert pop_all(held(node), 8, 8) == (order if kind == "QUEUE" else order[::-1])


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
def test_what_the_new_release_pushed_before_the_move_comes_behind_the_old_elements(
    node: hitless.Node, make: Make, kind: str
) -> None:
    hitless.apply(node, make("1.0", queue(kind, NARROW)))
    push(held(node), 0, 1, 2)

    def new_program(event: hitless.Progress) -> None:
        if event.step == "catch-up":
            with Map.open(node.next / "maps" / "held") as new:
                push(new, 3, 4)

    hitless.apply(node, make("2.0", queue(kind, "__u32 a; __u32 b;")), progress=new_program)
    order = [0, 1, 2, 3, 4]
    assert pop_all(held(node)) == (order if kind == "QUEUE" else order[::-1])


def after_runs(monkeypatch: pytest.MonkeyPatch, runs: int, then: Callable[[], None]) -> None:
    """Moves go three elements a run, and ``then`` is called instead of one more run than ``runs``."""
    monkeypatch.setattr(queues, "_ELEMENTS_A_RUN", 3)
    seen: list[str] = []

    def run(program: Program, doing: str) -> int:
        if doing.startswith("moving"):
            seen.append(doing)
            if len(seen) == runs + 1:
                then()
        return run_code(program, doing)

    monkeypatch.setattr(queues, "run_code", run)


RUNS = 12  # what ten old elements and four new ones take


def pushed_by_the_new_release(node: hitless.Node, *values: int) -> Callable[[hitless.Progress], None]:
    def progress(event: hitless.Progress) -> None:
        if event.step == "catch-up":
            with Map.open(node.next / "maps" / "held") as new:
                push(new, *values)

    return progress


def order(node: hitless.Node, kind: str) -> list[int]:
    """All elements, the oldest first."""
    popped = pop_all(held(node))
    return popped if kind == "QUEUE" else popped[::-1]


def upgrade_in_a_child(node: hitless.Node, second: hitless.Bundle, prepare: Callable[[], None]) -> int:
    """Upgrade in a process of its own, in which the new release pushes 10 to 13; returns how it ended."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            hitless.apply(node, second, progress=pushed_by_the_new_release(node, 10, 11, 12, 13))
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
def test_a_kill_while_elements_move_loses_and_doubles_none(
    node: hitless.Node, make: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    first, second = make("1.0", queue(kind, NARROW)), make("2.0", queue(kind, "__u32 a; __u32 b;"))
    for runs in range(RUNS):
        hitless.apply(node, first)
        push(held(node), *range(10))
        ended = upgrade_in_a_child(node, second, partial(after_runs, monkeypatch, runs, kill))
        assert ended == signal.SIGKILL
        assert hitless.recover(node) == "finished the interrupted upgrade to 2.0"
        assert order(node, kind) == list(range(14))
        hitless.unload(node)


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
def test_an_upgrade_that_is_taken_back_brings_all_elements_back_in_their_order(
    node: hitless.Node, make: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    first, second = make("1.0", queue(kind, NARROW)), make("2.0", queue(kind, "__u32 a; __u32 b;"))
    hitless.apply(node, first)
    for runs in range(RUNS):
        push(held(node), *range(10))
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            after_runs(patched, runs, fail)
            hitless.apply(node, second, progress=pushed_by_the_new_release(node, 10, 11, 12, 13))
        assert node.observe().version == "1.0"
        assert order(node, kind) == list(range(14))


@pytest.mark.parametrize("kind", ["QUEUE", "STACK"])
def test_a_kill_while_elements_are_brought_back_loses_and_doubles_none(
    node: hitless.Node, make: Make, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    first, second = make("1.0", queue(kind, NARROW)), make("2.0", queue(kind, "__u32 a; __u32 b;"))
    hitless.apply(node, first)
    for runs, later in itertools.product(range(0, RUNS, 3), range(3)):
        push(held(node), *range(10))

        def fail_then_be_killed(later: int = later) -> None:
            after_runs(monkeypatch, later, kill)
            fail()

        ended = upgrade_in_a_child(node, second, partial(after_runs, monkeypatch, runs, fail_then_be_killed))
        assert ended == signal.SIGKILL
        assert hitless.recover(node) == "took back the upgrade to 2.0, which had failed"
        assert order(node, kind) == list(range(14))


def test_a_queue_that_is_made_too_small_is_refused_before_anything_changes(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", queue("QUEUE", NARROW)))
    push(held(node), *range(10))
    with pytest.raises(hitless.LossNotAllowedError, match=r"has 10 entries, and release 2\.0 has room for 9"):
        hitless.apply(node, make("2.0", queue("QUEUE", NARROW, 9)))
    assert node.observe().version == "1.0"
    assert pop_all(held(node)) == list(range(10))


def test_a_queue_that_the_new_release_filled_meanwhile_is_taken_back_and_keeps_its_elements(
    node: hitless.Node, make: Make
) -> None:
    hitless.apply(node, make("1.0", queue("QUEUE", NARROW)))
    push(held(node), *range(10))
    with pytest.raises(hitless.KernelError, match="the map is full"):
        hitless.apply(
            node, make("2.0", queue("QUEUE", NARROW, 12)), progress=pushed_by_the_new_release(node, 10, 11, 12)
        )
    assert node.observe().version == "1.0"
    assert pop_all(held(node)) == list(range(13))


def test_a_number_in_a_queue_that_does_not_fit_is_cut_and_counted_if_that_is_allowed(
    node: hitless.Node, make: Make
) -> None:
    hitless.apply(node, make("1.0", queue("QUEUE", "__u32 a; __s32 b[2];")))
    one = (70_000).to_bytes(4, "little") + (-1).to_bytes(4, "little", signed=True) * 2
    two = (7).to_bytes(4, "little") + (-200).to_bytes(4, "little", signed=True) + bytes(4)
    push(held(node), *(int.from_bytes(data, "little") for data in (one, two)), size=12)
    second = make("2.0", queue("QUEUE", "__u16 a; __s8 b[2];"))
    with pytest.raises(hitless.LossNotAllowedError, match="a"):
        hitless.apply(node, second)
    result = hitless.apply(node, second, allow_loss=["held"])
    (told,) = (entry for entry in result.maps if entry.name == "held")
    assert told.lost_fields == {"a": 1, "b[]": 1}
    assert pop_all(held(node), 4) == [0xFFFF | 0xFFFF << 16, 7 | 0x80 << 16]


def test_a_bitfield_in_a_queue_cannot_change_and_the_plan_says_so(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", queue("QUEUE", "__u32 a : 4; __u32 b : 28;")))
    second = make("2.0", queue("QUEUE", "__u32 a : 5; __u32 b : 27;"))
    assert "aligned number" in planned(node, second).loss[0]


# Pushes the port of each connect, so that a client knows what must be in the queue, and in which order.
PUSHING = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    struct held pushed = {};
    pushed.a = __builtin_bswap16(ctx->user_port);
    bpf_map_push_elem(&held, &pushed, 0);
    return 1;
}
char _license[] SEC("license") = "GPL";
"""
CLIENT = """
import socket
print("ready", flush=True)
for port in range(1, 60001):
    with socket.socket() as client:
        client.connect_ex(("127.0.0.1", port))
print("done", flush=True)
"""


def test_programs_that_push_all_the_while_lose_no_element_to_upgrades(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    releases = {}
    for version, fields in (("1.0", NARROW), ("2.0", WIDE)):
        directory = write_release(tmp_path / version, version, queue("QUEUE", fields, 65536) + PUSHING)
        releases[version] = hitless.Bundle.load(directory, {"cgroup": str(lab.cgroup)})
    hitless.apply(node, releases["1.0"])
    client = lab.popen([sys.executable, "-c", CLIENT], cgroup="clients", stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == "ready\n"
    upgrades = 0
    while client.poll() is None:
        for version in ("2.0", "1.0"):
            hitless.apply(node, releases[version], allow_loss=["held"])
            upgrades += 1
    assert upgrades >= 4
    assert sorted(pop_all(held(node))) == list(range(1, 60001))


# Maps whose entries refer to devices or processors

REDIRECTING = """
SEC("xdp/devmap") int on_device(struct xdp_md *ctx) { return XDP_PASS; }
SEC("xdp/cpumap") int on_processor(struct xdp_md *ctx) { return XDP_PASS; }
"""
LOOPBACK = 1  # the index of `lo` in every network namespace


def sized(kind: str, key: int, value: int, entries: int, more: str = "") -> str:
    key_is = "__type(key, __u32)" if key else "__uint(key_size, 0)"
    value_is = "__type(value, __u32)" if kind == "BLOOM_FILTER" else f"__uint(value_size, {value})"
    return (
        f"struct {{ __uint(type, {MAP_TYPES.index(kind.lower())}); {key_is}; {value_is}; "
        f'__uint(max_entries, {entries}); {more} }} held SEC(".maps");\n'
    )


def words(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def program(node: hitless.Node, name: str) -> Program:
    return Program.open(node.current / "progs" / name)


@pytest.mark.parametrize(
    ("kind", "name", "key", "number"),
    [
        ("DEVMAP", "on_device", 2, LOOPBACK),
        ("DEVMAP_HASH", "on_device", 70, LOOPBACK),
        ("CPUMAP", "on_processor", 0, 192),
    ],
)
def test_an_entry_that_names_a_device_or_processor_is_carried_with_its_program(
    node: hitless.Node, make: Make, kind: str, name: str, key: int, number: int
) -> None:
    hitless.apply(node, make("1.0", sized(kind, 4, 8, 4) + REDIRECTING))
    with program(node, name) as running:
        held(node).update(words(key), words(number, running.fd))
        entry = words(number, running.info.id)
    assert held(node).lookup(words(key)) == entry
    result = hitless.apply(node, make("2.0", sized(kind, 4, 8, 8) + REDIRECTING))
    (told,) = (item for item in result.maps if item.name == "held")
    assert (told.action, told.loss, told.entries, told.copied) == ("convert", (), 1, 1)
    assert held(node).info.max_entries == 8
    assert held(node).lookup(words(key)) == entry


def test_what_is_written_to_the_old_device_map_after_the_copy_is_carried_too(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", sized("DEVMAP_HASH", 4, 4, 4)))
    old = held(node)
    for key in (1, 2):
        old.update(words(key), words(LOOPBACK))

    def meanwhile(_: hitless.Node) -> None:
        old.delete(words(1))
        old.update(words(3), words(LOOPBACK))

    hitless.apply(node, make("2.0", sized("DEVMAP_HASH", 4, 8, 8)), prepare=meanwhile)
    assert held(node).all_keys() == {words(2), words(3)}


def test_a_device_map_comes_back_with_what_the_new_release_wrote(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", sized("DEVMAP_HASH", 4, 4, 4)))
    held(node).update(words(1), words(LOOPBACK))

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            with Map.open(node.next / "maps" / "held") as new:
                new.update(words(9), words(LOOPBACK, 0))
                new.delete(words(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, make("2.0", sized("DEVMAP_HASH", 4, 8, 8)), progress=late)
    assert held(node).all_keys() == {words(9)}


def test_a_device_map_without_room_for_an_entry_is_refused_before_anything_changes(
    node: hitless.Node, make: Make
) -> None:
    hitless.apply(node, make("1.0", sized("DEVMAP", 4, 4, 8)))
    held(node).update(words(5), words(LOOPBACK))
    with pytest.raises(hitless.LossNotAllowedError, match="has an entry at 5 and would have 4 places"):
        hitless.apply(node, make("2.0", sized("DEVMAP", 4, 4, 4)))
    assert node.observe().version == "1.0"


def test_programs_of_device_entries_are_a_loss_where_the_new_map_has_no_place_for_them(
    node: hitless.Node, make: Make
) -> None:
    hitless.apply(node, make("1.0", sized("DEVMAP", 4, 8, 4) + REDIRECTING))
    with program(node, "on_device") as running:
        held(node).update(words(0), words(LOOPBACK, running.fd))
    second = make("2.0", sized("DEVMAP", 4, 4, 4) + REDIRECTING)
    assert planned(node, second).loss == ("value: the programs of its entries have no place",)
    hitless.apply(node, second, allow_loss=["held"])
    assert held(node).lookup(words(0)) == words(LOOPBACK)


# Ring buffers

# One record of 8 bytes and its header of 8 for each connect.
RING = """
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, %d); } held SEC(".maps");
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u64 port = __builtin_bswap16(ctx->user_port);
    bpf_ringbuf_output(&held, &port, sizeof(port), 0);
    return 1;
}
char _license[] SEC("license") = "GPL";
"""
RECORD = 16

# Holds the ring open, says what is in it, and takes everything once a line comes in.
READER = """
import ctypes, mmap, sys
fd = ctypes.CDLL("libbpf.so.1").bpf_obj_get(sys.argv[1].encode())
consumer = memoryview(mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)).cast("Q")
producer = memoryview(mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=mmap.PAGESIZE)).cast("Q")
print("ready", flush=True)
for line in sys.stdin:
    taken = producer[0] - consumer[0]
    consumer[0] = producer[0]
    print(taken, flush=True)
"""


@pytest.fixture
def ring(lab: Lab, tmp_path: Path) -> Callable[[str, int], hitless.Bundle]:
    """A release of some version with a ring buffer of so many bytes."""

    def release(version: str, size: int) -> hitless.Bundle:
        return hitless.Bundle.load(
            write_release(tmp_path / version, version, RING % size), {"cgroup": str(lab.cgroup)}
        )

    return release


Ring = Callable[[str, int], hitless.Bundle]


def connect(lab: Lab, times: int) -> None:
    code = f"import socket\nfor _ in range({times}): socket.socket().connect_ex(('127.0.0.1', 9))"
    lab.run([sys.executable, "-c", code], cgroup="clients")


@contextmanager
def reader(node: hitless.Node) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", READER, str(node.current / "maps" / "held")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()


def take(process: subprocess.Popen[str]) -> int:
    """Let the reader take what is there; returns the bytes."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("take\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def test_an_old_ring_buffer_stays_until_its_reader_has_drained_it(node: hitless.Node, ring: Ring, lab: Lab) -> None:
    hitless.apply(node, ring("1.0", 4096))
    connect(lab, 5)
    with reader(node) as process:
        taken = []

        def drained(event: hitless.Progress) -> None:
            if event.step == "drain":
                taken.append(take(process))

        result = hitless.apply(node, ring("2.0", 8192), progress=drained)
        assert taken == [5 * RECORD]
    (told,) = result.maps
    assert (told.action, told.loss, told.unread) == ("convert", (), 0)
    assert status(node).left == ()
    connect(lab, 3)
    assert unread_bytes(held(node)) == 3 * RECORD


def test_status_tells_what_an_old_ring_buffer_still_holds_and_who_has_it_open(
    node: hitless.Node, ring: Ring, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hitless.upgrade.ring._DRAIN_SECONDS", 0.1)
    hitless.apply(node, ring("1.0", 4096))
    connect(lab, 5)
    with reader(node) as process:
        (told,) = hitless.apply(node, ring("2.0", 8192)).maps
        assert told.unread == 5 * RECORD
        assert status(node).left == (LeftRing("held", 5 * RECORD, (process.pid,)),)
        # It lives on for who has it open, even when the next upgrade removes its pin.
        (told,) = hitless.apply(node, ring("3.0", 4096)).maps
        assert told.loss == ()
        assert take(process) == 5 * RECORD


def test_removing_a_ring_buffer_that_nobody_has_read_is_a_loss(
    node: hitless.Node, ring: Ring, lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    hitless.apply(node, ring("1.0", 4096))
    connect(lab, 5)
    (told,) = hitless.apply(node, ring("2.0", 8192)).maps
    assert (told.unread, told.loss) == (5 * RECORD, ())
    show_status(status(node))
    assert "ring buffer held of 1.0 holds 80 unread bytes; nobody has it open" in capsys.readouterr().out
    with pytest.raises(hitless.LossNotAllowedError, match=r"80 bytes in the ring buffer of 1\.0"):
        hitless.apply(node, ring("3.0", 4096))
    hitless.apply(node, ring("3.0", 4096), allow_loss=["held"])
    assert status(node).left == ()


def test_a_ring_buffer_that_did_not_change_is_kept_with_what_is_in_it(
    node: hitless.Node, ring: Ring, lab: Lab
) -> None:
    hitless.apply(node, ring("1.0", 4096))
    connect(lab, 5)
    (told,) = hitless.apply(node, ring("2.0", 4096)).maps
    assert (told.action, told.loss) == ("keep", ())
    assert unread_bytes(held(node)) == 5 * RECORD
    assert status(node).left == ()


# Types whose contents nobody can carry


def _cgroup(filled: Map, lab: Lab) -> None:
    cgroup = os.open(lab.cgroup, os.O_RDONLY)
    filled.update(words(0), words(cgroup))
    os.close(cgroup)


def _listener(filled: Map, _: Lab) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    filled.update(words(0), listener.fileno().to_bytes(8, "little"))
    _open.append(listener)


def _packet_socket(filled: Map, _: Lab) -> None:
    af_xdp = 44
    opened = socket.socket(af_xdp, socket.SOCK_RAW)
    filled.update(words(0), words(opened.fileno()))
    _open.append(opened)


def _mark(filled: Map, _: Lab) -> None:
    push(filled, 7)


def _memory(filled: Map, _: Lab) -> None:
    with mmap.mmap(filled.fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) as pages:
        pages[0] = 1


def _nothing(_: Map, __: Lab) -> None:
    """What is in it comes from programs, and is not looked at."""


_open: list[socket.socket] = []

NOT_CARRIED = [
    pytest.param("PERF_EVENT_ARRAY", 4, 4, (2, 4), "", _nothing, id="perf_event_array"),
    pytest.param("STACK_TRACE", 4, 1016, (2, 4), "", _nothing, id="stack_trace"),
    pytest.param("CGROUP_ARRAY", 4, 4, (2, 4), "", _cgroup, id="cgroup_array"),
    pytest.param("XSKMAP", 4, 4, (2, 4), "", _packet_socket, id="xskmap"),
    pytest.param("REUSEPORT_SOCKARRAY", 4, 8, (2, 4), "", _listener, id="reuseport_sockarray"),
    pytest.param("BLOOM_FILTER", 0, 4, (2, 4), "", _mark, id="bloom_filter"),
    pytest.param("USER_RINGBUF", 0, 0, (4096, 8192), "", _nothing, id="user_ringbuf"),
    pytest.param("ARENA", 0, 0, (2, 4), "__uint(map_flags, BPF_F_MMAPABLE);", _memory, id="arena"),
]


def test_a_map_of_a_type_that_the_kernel_has_not_is_refused_by_name_before_anything_happens(
    node: hitless.Node, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make("1.0", sized("ARENA", 0, 0, 2, "__uint(map_flags, BPF_F_MMAPABLE);"))
    monkeypatch.setattr(transaction, "features", set)
    with pytest.raises(hitless.UnsupportedError, match=r"map held is of type arena.*Linux 6\.9 or later") as raised:
        hitless.plan(node, bundle)
    assert raised.value.facts["feature"] == "map/arena"


@pytest.mark.parametrize(("kind", "key", "value", "entries", "more", "fill"), NOT_CARRIED)
def test_what_cannot_be_carried_is_a_loss_that_somebody_must_allow(
    node: hitless.Node,
    make: Make,
    lab: Lab,
    kind: str,
    key: int,
    value: int,
    entries: tuple[int, int],
    more: str,
    fill: Callable[[Map, Lab], None],
) -> None:
    before, after = entries
    hitless.apply(node, make("1.0", sized(kind, key, value, before, more)))
    fill(held(node), lab)
    number = held(node).info.id

    assert planned(node, make("1.1", sized(kind, key, value, before, more))).action == "keep"
    hitless.apply(node, make("1.1", sized(kind, key, value, before, more)))
    assert held(node).info.id == number

    second = make("2.0", sized(kind, key, value, after, more))
    told = planned(node, second)
    assert (told.verdict, told.action) == ("not-carried", "discard")
    assert told.loss == (f"all entries: {ANSWERS[kind.lower()].words}",)
    with pytest.raises(hitless.LossNotAllowedError):
        hitless.apply(node, second)
    assert held(node).info.id == number
    hitless.apply(node, second, allow_loss=["held"])
    assert held(node).info.max_entries == after


TAIL_CALLS = """
SEC("cgroup/connect4") int leaf(struct bpf_sock_addr *ctx) { return 1; }
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, %d); __uint(key_size, 4);
         __array(values, int (void *)); } held SEC(".maps") = { .values = { [0] = (void *)&leaf } };
"""


def test_a_program_array_is_filled_anew_from_the_release(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", TAIL_CALLS % 2))
    with program(node, "leaf") as leaf:
        held(node).update(words(1), words(leaf.fd))
    second = make("2.0", TAIL_CALLS % 4)
    told = "slots that neither release fills itself: 1; name their programs in [map.held.slots]"
    assert planned(node, second).loss == (told,)
    hitless.apply(node, second, allow_loss=["held"])
    with program(node, "leaf") as leaf:
        assert held(node).lookup(words(0)) == words(leaf.info.id)
    assert held(node).lookup(words(1)) is None
    third = make("3.0", TAIL_CALLS % 2)
    assert (planned(node, third).action, planned(node, third).loss) == ("discard", ())


JUMPS = """
MAP(seen, ARRAY, 3, __u32, __u64);
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 4); __uint(key_size, 4); __uint(value_size, 4); }
    held SEC(".maps");
SEC("cgroup/connect4") int leaf(struct bpf_sock_addr *ctx)
{
    __u32 key = RELEASE;
    __u64 *found = bpf_map_lookup_elem(&seen, &key);
    if (found)
        __sync_fetch_and_add(found, 1);
    return 1;
}
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    bpf_tail_call(ctx, &held, 3);
    return 0;
}
char _license[] SEC("license") = "GPL";
"""


def test_slots_that_the_manifest_fills_are_there_before_any_hook_jumps_by_them(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    def release(number: int) -> hitless.Bundle:
        manifest = f'{ATTACH}\n[map.held.slots]\n3 = "leaf"\n'
        path = write_release(tmp_path / str(number), f"{number}.0", JUMPS.replace("RELEASE", str(number)), manifest)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    hitless.apply(node, release(1))
    connect(lab, 7)
    assert planned(node, release(2)).loss == ()
    hitless.apply(node, release(2))
    connect(lab, 7)
    hitless.rollback(node)
    connect(lab, 7)
    assert [node.map("seen").get(number) for number in (1, 2)] == [14, 7]


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ('4 = "leaf"', "'4' is no slot of held, which has 4 of them"),
        ('first = "leaf"', "'first' is no slot of held"),
        ('3 = "leave"', "no object has a program 'leave' that is loaded; there are: count4, leaf"),
        ('3 = ["leaf"]', r"no object has a program \['leaf'\]"),
    ],
)
def test_slots_that_cannot_be_filled_so_are_refused_with_their_line(tmp_path: Path, slots: str, words: str) -> None:
    manifest = f"{ATTACH}\n[map.held.slots]\n{slots}\n"
    write_release(tmp_path, "1.0", JUMPS.replace("RELEASE", "1"), manifest)
    with pytest.raises(hitless.BundleError, match=words) as caught:
        hitless.Bundle.load(tmp_path)
    assert caught.value.facts["line"] == "15"


# Values that hold objects of the kernel

OBJECTS = {
    "bpf_timer": ("struct bpf_timer timer;", "timer: an armed timer is not carried"),
    "bpf_wq": ("struct bpf_wq work;", "work: queued work is not carried"),
    "kptr": (
        'struct task_struct __attribute__((btf_type_tag("kptr_untrusted"))) *task;',
        "task: the kernel object that it points to is not carried",
    ),
}
KERNEL_TYPES = """
struct bpf_wq { __u64 opaque[2]; } __attribute__((aligned(8)));
struct task_struct { int pid; } __attribute__((preserve_access_index));
"""


def with_object(field: str, count: str, entries: int = 64) -> str:
    made = f"struct held {{ __u32 a; {field} {count} b; }};\n"
    return KERNEL_TYPES + made + f"MAP(held, HASH, {entries}, __u32, struct held);\n"


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("change", ["layout", "size"])
def test_around_an_object_of_the_kernel_the_value_is_carried_and_the_loss_is_named(
    node: hitless.Node, make: Make, name: str, change: str
) -> None:
    field, loss = OBJECTS[name]
    hitless.apply(node, make("1.0", with_object(field, "__u32")))
    layout = node.map("held").spec.value
    assert isinstance(layout, Record)
    at = next(inside.offset // 8 for inside in layout.fields if inside.name == "b")
    held(node).update(words(1), (words(7).ljust(at, b"\0") + words(9)).ljust(layout.size, b"\0"))
    second = make("2.0", with_object(field, "__u64") if change == "layout" else with_object(field, "__u32", 32))
    assert planned(node, second).loss == (loss,)
    with pytest.raises(hitless.LossNotAllowedError):
        hitless.apply(node, second)
    hitless.apply(node, second, allow_loss=["held"])
    assert {key: (found["a"], found["b"]) for key, found in node.map("held").items()} == {1: (7, 9)}
