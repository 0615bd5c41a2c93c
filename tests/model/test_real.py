"""The same as the model, against the real code and kernel: random upgrades, kills and writers, then the books."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import hitless
from hitless.kernel.maps import Map
from hitless.kernel.merger import Merger
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.upgrade.conftest import Release, node, release, releases

__all__ = ["node", "release", "releases"]  # fixtures

EXAMPLES = int(os.environ.get("HITLESS_EXAMPLES", "0"))
BACK = ("tally", "limit")
STEPS = ("stage", "copy", "prepare", "verify", "cutover", "catch-up", "merge", "commit", "clean-up")
COUNTED, SET, STRANGE = (7, 8), (8, 9), 10  # ports: 8 is counted and set
COUNT_AT = {"1.0": ("=I", 0), "2.0": ("=Q", 8)}  # in the value of tally

# Connects when it is told to, to a port that nobody listens on: the program on the hook counts each try.
CLIENT = """
import socket, sys
for line in sys.stdin:
    port, times = map(int, line.split())
    for _ in range(times):
        with socket.socket() as client:
            client.connect_ex(("127.0.0.1", port))
    print("done", flush=True)
"""

Act = tuple[str, int, int]  # what, port, number
Book = dict[int, int]

acts = st.one_of(
    st.tuples(st.just("connect"), st.sampled_from(COUNTED), st.integers(1, 3)),
    st.tuples(st.just("set"), st.sampled_from(SET), st.integers(0, 50)),
    st.tuples(st.just("delete"), st.sampled_from((*COUNTED, *SET)), st.just(0)),
    st.tuples(st.just("stranger sets"), st.just(STRANGE), st.integers(100, 150)),
)
meanwhile = st.lists(st.tuples(st.sampled_from(STEPS), acts), max_size=4)


def enter(book: Book, act: Act) -> None:
    what, port, number = act
    if what == "connect":
        book[port] = book.get(port, 0) + number
    elif what == "delete":
        book.pop(port, None)
    else:
        book[port] = number


class World:
    """A pin root with release 1, a client, and a stranger who holds the map that was there before the upgrade."""

    def __init__(self, lab: Lab, name: str, release: Release, client: Callable[[int, int], None]) -> None:
        self.node = hitless.Node(lab.bpffs / name)
        self.release = release
        self.client = client
        self.book: Book = {}
        hitless.apply(self.node, release(1))

    def other(self) -> int:
        return 2 if self.node.observe().version == "1.0" else 1

    def do(self, act: Act, stranger: tuple[Map, str] | None = None) -> None:
        what, port, number = act
        if what == "connect":
            self.client(port, number)
        elif what == "set":
            self.node.map("tally")[port] = {"count": number}
        elif what == "delete":
            with suppress(KeyError):
                del self.node.map("tally")[port]
        elif stranger is not None:
            held, version = stranger
            layout, offset = COUNT_AT[version]
            value = bytearray(held.info.value_size)
            struct.pack_into(layout, value, offset, number)
            held.update(struct.pack("=I", port), bytes(value))

    def follow(
        self, plan: list[tuple[str, Act]], done: Callable[[Act], None], end: Callable[[str, int], None]
    ) -> Callable[[hitless.Progress], None]:
        """Tell of progress: do what is planned for a step when it begins, then ``end`` may end it all."""
        left = list(plan)
        events = itertools.count()
        state = self.node.observe()
        stranger = Map.open(self.node.current / "maps" / "tally"), str(state.version)

        def told(event: hitless.Progress) -> None:
            for entry in [entry for entry in left if entry[0] == event.step]:
                left.remove(entry)
                if entry[1][0] == "stranger sets" and event.step in ("commit", "clean-up"):
                    continue  # which is too late, as docs/exactness.md says
                self.do(entry[1], stranger)
                done(entry[1])
            end(event.step, next(events))

        return told

    def apply(self, plan: list[tuple[str, Act]], end: Callable[[str, int], None] = lambda step, number: None) -> None:
        progress = self.follow(plan, lambda act: enter(self.book, act), end)
        hitless.apply(self.node, self.release(self.other()), allow_loss=BACK, progress=progress)

    def apply_and_die(self, plan: list[tuple[str, Act]], event: int) -> None:
        """Upgrade in a child that is killed behind so many events; what it did is entered in our book."""
        reading, writing = os.pipe()
        bundle = self.release(self.other())

        def in_child() -> None:
            def done(act: Act) -> None:
                os.write(writing, json.dumps(act).encode() + b"\n")

            hitless.apply(self.node, bundle, allow_loss=BACK, progress=self.follow(plan, done, _die_at(event)))

        _fork(in_child)
        os.close(writing)
        with os.fdopen(reading) as lines:
            for line in lines:
                enter(self.book, tuple(json.loads(line)))

    def recover_and_die(self, event: int) -> None:
        end, events = _die_at(event), itertools.count()
        _fork(lambda: hitless.recover(self.node, lambda told: end(told.step, next(events))))


def _die_at(event: int) -> Callable[[str, int], None]:
    def end(_: str, number: int) -> None:
        if number >= event:
            os.kill(os.getpid(), signal.SIGKILL)

    return end


def _fork(run: Callable[[], object]) -> int:
    """Run it in a child until that ends or kills itself; returns its exit code."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code


@pytest.fixture
def client(lab: Lab) -> Iterator[Callable[[int, int], None]]:
    pipe = subprocess.PIPE
    process = lab.popen([sys.executable, "-c", CLIENT], cgroup="clients", stdin=pipe, stdout=pipe)
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def connect(port: int, times: int) -> None:
        stdin.write(f"{port} {times}\n")
        stdin.flush()
        assert stdout.readline() == "done\n"

    yield connect


def machine(lab: Lab, release: Release, client: Callable[[int, int], None]) -> type[RuleBasedStateMachine]:
    numbers = itertools.count()

    class Upgrades(RuleBasedStateMachine):
        world: World

        @initialize()
        def begin(self) -> None:
            self.world = World(lab, f"store{next(numbers)}", release, client)

        @rule(plan=meanwhile)
        def upgrade(self, plan: list[tuple[str, Act]]) -> None:
            self.world.apply(plan)

        @rule(plan=meanwhile, step=st.sampled_from(STEPS[:-1]))
        def fail(self, plan: list[tuple[str, Act]], step: str) -> None:
            def end(at: str, _: int) -> None:
                if at == step:
                    raise ZeroDivisionError

            before = self.world.node.observe().version
            with pytest.raises(ZeroDivisionError):
                self.world.apply(plan, end)
            assert self.world.node.observe().version == before

        @rule(plan=meanwhile, event=st.integers(0, 16), again=st.lists(st.integers(0, 6), max_size=2))
        def be_killed(self, plan: list[tuple[str, Act]], event: int, again: list[int]) -> None:
            self.world.apply_and_die(plan, event)
            for event_of_recovery in again:
                self.world.recover_and_die(event_of_recovery)
            hitless.recover(self.world.node)

        @rule(act=acts.filter(lambda act: act[0] != "stranger sets"))
        def write(self, act: Act) -> None:
            self.world.do(act)
            enter(self.world.book, act)

        @invariant()
        def the_books_agree(self) -> None:
            if hasattr(self, "world"):
                found = {port: value["count"] for port, value in self.world.node.map("tally").items()}
                assert found == self.world.book
                assert status(self.world.node).problems == ()

        def teardown(self) -> None:
            if hasattr(self, "world"):
                hitless.unload(self.world.node)

    return Upgrades


def test_random_upgrades_failures_kills_and_writers_leave_what_the_journal_says(
    lab: Lab, release: Release, client: Callable[[int, int], None]
) -> None:
    chosen = settings(
        max_examples=EXAMPLES or 6,
        stateful_step_count=6,
        deadline=None,
        derandomize=not EXAMPLES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine(lab, release, client), settings=chosen)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("effect", [1, 2, 3])
def test_a_write_to_both_maps_that_a_kill_cut_in_half_is_there_once_or_not_at_all(
    effect: int, known: bool, node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    if known:
        node.map("tally")[7] = {"count": 5}

    def told(event: hitless.Progress) -> None:
        if event.step == "catch-up":
            _die_behind(effect)
            node.map("tally")[7] = {"count": 100}

    assert _fork(lambda: hitless.apply(node, release(2), progress=told)) == -signal.SIGKILL
    assert hitless.recover(node) == "finished the interrupted upgrade to 2.0"
    held = node.map("tally").get(7)
    assert (held["count"] if held else None) in (5 if known else None, 100)


def _die_behind(effects: int) -> None:
    """Let this process be killed when it has written so many map entries, or merged them."""
    done = itertools.count(1)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*given: Any) -> Any:
            result = call(*given)
            if next(done) == effects:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return watch

    Map.update = watched(Map.update)  # type: ignore[method-assign]
    Merger._run = watched(Merger._run)  # type: ignore[method-assign]
