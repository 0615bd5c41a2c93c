"""One soak in a lab: clients on every CPU, an upgrader with its control plane, and the comparison at the end."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import hitless
from hitless.errors import NodeError
from meshd.demo.lab import Lab
from meshd.demo.mesh import Lines
from meshd.demo.servers import start_echo
from tests.patience import patient
from tests.soak.books import ClientBooks, Mismatch, Sum, compare, total
from tests.soak.releases import write_releases
from tests.soak.upgrader import Task
from tests.soak.world import ECHO

__all__ = ["STEPS", "Options", "Report", "Soak"]

_HOUSE = Path(__file__).parents[2]
_LOOK = 0.2
_UNDO = 0.2
_MOST_CLIENTS = 40  # whose accounts the meter has room for
_SLOWEST = patient(120)  # s that a process may take to come up or to end
_STEP_TAKES = 0.03  # s, more than most steps do: a kill may come in the next one too

STEPS = ("stage", "copy", "prepare", "verify", "cutover", "catch-up", "merge", "commit", "clean-up")
"""What an upgrade says it does, in this order."""


class Options(msgspec.Struct, frozen=True):
    """How long: until there were so many ``upgrades``, ``operations``, ``seconds``, ``kills`` and ``undone``.

    With ``kills`` the upgrader is killed again and again; with ``undone`` some upgrades fail on purpose after the
    cutover and are taken back. ``fault`` is one of the demo's, planted in the upgrader.
    """

    upgrades: int = 0
    operations: int = 0
    seconds: float = 0.0
    kills: int = 0
    undone: int = 0
    seed: int = 1
    fault: str | None = None


class Report(msgspec.Struct, frozen=True):
    """What came of it. ``steps`` are the kinds of writes that each step of upgrades met; ``lost`` counts cut values."""

    options: Options
    cpus: int
    seconds: float
    upgrades: int
    operations: int
    operations_per_second: float
    writes: int
    caught_up: int
    kills: int
    undone: int
    lost: int
    recovered: dict[str, int]
    steps: dict[str, list[str]]
    sums: list[Sum]
    mismatches: list[Mismatch]

    @property
    def exact(self) -> bool:
        """Whether the books agree to the last increment, and no value had to be cut to fit a field."""
        return not self.mismatches and not self.lost


class Soak:
    """A run; the lab removes whatever it leaves, also when it is interrupted."""

    def __init__(self, lab: Lab, options: Options, say: Callable[[str], None]) -> None:
        self.lab = lab
        self.options = options
        self.say = say
        journals = lab.scratch / "journals"
        journals.mkdir()
        self.task = Task(
            root=lab.bpffs / "mesh",
            cgroup=lab.cgroup,
            bundles=write_releases(lab.scratch / "releases"),
            journals=journals,
            seed=options.seed,
            fault=options.fault,
            undo=_UNDO if options.undone else 0.0,
        )
        self._random = random.Random(options.seed)
        self._finished: list[dict[str, Any]] = []
        self._recovered: dict[str, int] = {}

    def run(self) -> Report:
        """Do it all. Raises NodeError when a process fails or an upgrade does."""
        cpus = len(os.sched_getaffinity(0))
        start_echo(self.lab, [address for target in ECHO for address in target.backends])
        self._start_upgrader()
        clients = [self._client(number) for number in range(min(max(2, cpus), _MOST_CLIENTS))]
        started = told = time.monotonic()
        kills = 0
        while not self._enough(clients, time.monotonic() - started, kills):
            if kills < self.options.kills:
                self._kill()
                kills += 1
            else:
                time.sleep(_LOOK)
            self._check(clients)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                done = self._operations(clients), self._sum("upgrades"), kills
                self.say("  {:,} operations, {:,} upgrades, {} kills".format(*done))
        # The last upgrades are under fire too: traffic ends after them.
        final = self._end_upgrader()
        books = total([self._books(client) for client in clients])
        seconds = time.monotonic() - started
        sums, mismatches = compare(hitless.Node(self.task.root), books, self.task.journals)
        return Report(
            options=self.options,
            cpus=cpus,
            seconds=round(seconds, 1),
            upgrades=self._sum("upgrades"),
            operations=books.operations,
            operations_per_second=round(books.operations / seconds),
            writes=self._sum("writes"),
            caught_up=self._sum("caught_up"),
            kills=kills,
            undone=self._sum("undone"),
            lost=self._sum("lost"),
            recovered=self._recovered,
            steps=final["steps"],
            sums=sums,
            mismatches=mismatches,
        )

    def _start_upgrader(self) -> None:
        task = msgspec.structs.replace(self.task, seed=self._random.randrange(2**32))
        argument = msgspec.json.encode(task, enc_hook=str).decode()
        self._upgrader = self._python("the upgrader", "outside", "tests.soak.upgrader", argument)
        ready = self._upgrader.wait_for({"ready": (True,)}, _SLOWEST)
        if ready["recovered"]:
            self._recovered[ready["recovered"]] = self._recovered.get(ready["recovered"], 0) + 1

    def _kill(self) -> None:
        """Kill the upgrader at a random time in a random step, and start another one in its place."""
        step = self._random.choice(STEPS)
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):  # not always in its first upgrade
            self._upgrader.wait_for({"step": (step,)}, _SLOWEST)
        time.sleep(self._random.uniform(0.0, _STEP_TAKES))
        self._upgrader.process.kill()
        self._upgrader.process.wait()
        self._upgrader.closed.wait(_SLOWEST)
        self._finished.append(self._upgrader.last)
        self._start_upgrader()

    def _end_upgrader(self) -> dict[str, Any]:
        process = self._upgrader.process
        assert process.stdin is not None
        process.stdin.close()
        return self._upgrader.wait_for({"final": (True,)}, _SLOWEST)

    def _client(self, number: int) -> Lines:
        return self._python(f"client {number}", "clients", "tests.soak.client", str(number), str(self.options.seed))

    def _books(self, client: Lines) -> ClientBooks:
        stdin = client.process.stdin
        assert stdin is not None
        stdin.write("\n")
        stdin.flush()
        until = time.monotonic() + _SLOWEST
        while "books" not in client.last:
            if client.closed.is_set() or time.monotonic() > until:
                raise NodeError(f"{client.name} did not close its books; its last words: {client.noise[-3:]}")
            time.sleep(0.02)
        return msgspec.convert(client.last["books"], ClientBooks, strict=False)

    def _python(self, name: str, cgroup: str, *args: str) -> Lines:
        command = [sys.executable, "-m", *args]
        pipe = subprocess.PIPE
        process = self.lab.popen(command, cgroup, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, cwd=_HOUSE)
        return Lines(process, name)

    def _check(self, clients: list[Lines]) -> None:
        """Raise NodeError if a process failed or ended by itself, with its last words."""
        for process in (self._upgrader, *clients):
            error = process.last.get("error")
            if error or process.closed.is_set():
                raise NodeError(f"{process.name} failed: {error or process.noise[-3:]}")

    def _enough(self, clients: list[Lines], seconds: float, kills: int) -> bool:
        wanted = self.options
        return (
            seconds >= wanted.seconds
            and kills >= wanted.kills
            and self._sum("undone") >= wanted.undone
            and self._sum("upgrades") >= wanted.upgrades
            and self._operations(clients) >= wanted.operations
        )

    def _sum(self, fact: str) -> int:
        return sum(said.get(fact, 0) for said in (*self._finished, self._upgrader.last))

    def _operations(self, clients: list[Lines]) -> int:
        return sum(client.last.get("operations", 0) for client in clients)
