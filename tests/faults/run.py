"""Every call of a scenario in turn: killed before it, killed after it, or failing; then everything must agree."""

from __future__ import annotations

import errno
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

import hitless
from tests.faults.scenarios import AnyWorld, Scenario
from tests.faults.tracer import AFTER, BEFORE, Call, Fault, Outcome, Trace, trace
from tests.faults.world import NEW, OLD, Broken

__all__ = ["ERRORS", "KILLS", "Failure", "Options", "Report", "faults"]

KILLS = (BEFORE, AFTER)
ERRORS = ("ENOMEM", "ENOSPC", "EPERM", "EBUSY", "EINTR", "ENOMEM+")

_AROUND = ("bpf LINK_UPDATE", "renameat2")  # the cutover and the commit: their calls and those beside are in any sample
_BESIDE = 1


class Options(msgspec.Struct, frozen=True):
    """Which points: of all calls whose name begins with ``calls`` every ``stride``-th, each with all of ``kinds``.

    With ``around``, all about the cutover and the commit besides. From which one on is decided by ``seed``. With
    ``doubles``, so many times the recovery after a kill is killed too. ``share`` K, N is the K-th of N parts of all
    this.
    """

    calls: str = ""
    stride: int = 1
    seed: int = 1
    kinds: tuple[str, ...] = (*KILLS, *ERRORS)
    doubles: int = 0
    share: tuple[int, int] = (0, 1)
    around: bool = True


class Failure(msgspec.Struct, frozen=True):
    """A point at which something was wrong."""

    scenario: str
    kind: str
    call: str
    what: str

    def __str__(self) -> str:
        return f"{self.scenario}: {self.kind} at {self.call}: {self.what}"


class Report(msgspec.Struct):
    """How many points were tried, by kind and name of the call with a space between, and what was wrong."""

    scenario: str
    calls: int = 0
    points: dict[str, int] = {}
    ends: dict[str, int] = {}
    failures: list[Failure] = []
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        return sum(count for point, count in self.points.items() if point.split()[0] not in ERRORS)

    @property
    def errors(self) -> int:
        return sum(count for point, count in self.points.items() if point.split()[0] in ERRORS)

    def add(self, other: Report) -> None:
        """What another share of the same points came to."""
        self.calls = max(self.calls, other.calls)
        self.seconds = max(self.seconds, other.seconds)
        self.points = dict(Counter(self.points) + Counter(other.points))
        self.ends = dict(Counter(self.ends) + Counter(other.ends))
        self.failures += other.failures


def faults(world: AnyWorld, scenario: Scenario, options: Options, tell: Callable[[str], None]) -> Report:
    """Try all points of ``options``; the world is settled afterwards. Raises Broken if it is so without a fault."""
    run = _Run(world, scenario, options, tell)
    started = time.monotonic()
    run.all()
    run.report.seconds = time.monotonic() - started
    return run.report


class _Run:
    def __init__(self, world: AnyWorld, scenario: Scenario, options: Options, tell: Callable[[str], None]) -> None:
        self.report = Report(scenario.name)
        self._world = world
        self._scenario = scenario
        self._options = options
        self._tell = tell

    def all(self) -> None:
        share, shares = self._options.share
        calls = self._undisturbed()
        self.report.calls = len(calls)
        self._tell(f"{self._scenario.name}: {len(calls)} calls")
        for kind in self._options.kinds:
            for name, at in chosen(calls, self._options)[share::shares]:
                # Traffic, and what others have in the kernel, decide how many calls of a kind there are.
                if not self._point(Fault(at, kind, name)) and at > 0:
                    self._point(Fault(0, kind, name))
            if self._options.stride == 1:
                for name, count in list(Counter(call.name for call in calls).items())[share::shares]:
                    self._rest(name, count, kind)
            self._tell(f"{self._scenario.name}: {kind} done, {len(self.report.failures)} failures so far")
        dice = random.Random(f"{self._options.seed} {share}")
        for _ in range(share, self._options.doubles, shares):
            self._double(Fault(dice.randrange(len(calls)), dice.choice(KILLS)), dice)

    def _undisturbed(self) -> list[Call]:
        """The calls when nothing is in the way."""
        found = self._do(None)
        end = self._settled(found, None)
        if end != self._scenario.goal:
            raise Broken(f"{self._scenario.name} ends with release {end}, not {self._scenario.goal}")
        self._world.reset()
        return [call for call in found.calls if call.name.startswith(self._options.calls)]

    def _rest(self, name: str, at: int, kind: str) -> None:
        """Traffic decides how many calls there are: go on until there are no more."""
        while self._point(Fault(at, kind, name)):
            at += 1

    def _point(self, fault: Fault) -> bool:
        """Try one point; False if work ended before it."""
        found = None
        try:
            found = self._do(fault)
            if found.hit is not None:
                _count(self.report.points, f"{fault.kind} {found.hit.name}")
            end = self._settled(found, fault)
            _count(self.report.ends, f"{'killed' if fault.kind in KILLS else 'error'}: {end}")
            if end != OLD:
                self._world.reset()
        except Broken as broken:
            self._broken(fault.kind, str(found.hit if found else fault), broken)
        return found is not None and found.hit is not None

    def _double(self, fault: Fault, dice: random.Random) -> None:
        """Kill the work, then the recovery, and recover again."""
        found = again = None
        try:
            found = self._do(fault)
            self._world.served()
            # The recovery has half as many calls, or far fewer if there is nothing but to undo.
            second = Fault(dice.randrange(dice.randrange(1, max(2, self.report.calls // 2))), dice.choice(KILLS))
            again = trace(lambda: hitless.recover(self._world.node), second)
            if again.hit is not None:
                _count(self.report.points, f"double {again.hit.name}")
            self._world.served()
            self._scenario.finish(self._world)
            self._world.check(self._scenario.goal == NEW)
            self._world.reset()
        except Broken as broken:
            where = f"{found.hit if found else fault}, then {again.hit if again else 'nothing'}"
            self._broken(f"double {fault.kind}", where, broken)

    def _do(self, fault: Fault | None) -> Trace:
        self._scenario.prepare(self._world)
        self._world.about_to_write()
        return trace(self._scenario.work(self._world), fault)

    def _settled(self, found: Trace, fault: Fault | None) -> str | None:
        """Judge what came of it, recover where that is due, and return the release that is live. Raises Broken."""
        self._world.served()
        if found.outcome is None:
            if found.hit is None or fault is None or fault.kind not in KILLS:
                raise Broken("it was killed by something else, or took longer than a minute")
            self._scenario.finish(self._world)
        elif found.outcome.failed:
            unsettled = not self._scenario.again and self._world.unsettled()
            self._judge(found.outcome, found, fault, unsettled)
            if self._scenario.again:
                self._scenario.finish(self._world)
            elif unsettled:
                if not (self._scenario.recovers or (fault is not None and fault.kind.endswith("+"))):
                    raise Broken(f"something is left to recover after the error: {found.outcome.message}")
                self._scenario.finish(self._world)
        elif self._scenario.planned:
            raise Broken("it did not fail, as it was planned to")
        end = self._world.check(self._scenario.goal == NEW)
        if end not in self._scenario.ends:
            raise Broken(f"release {end} is live")
        return end

    def _judge(self, outcome: Outcome, found: Trace, fault: Fault | None, unsettled: bool) -> None:
        """An error says in which step, about which object, and which errno; one in the undoing of another, which."""
        if outcome.crashed:
            raise Broken(f"a traceback: {outcome.message}")
        if outcome.facts.get("planned"):
            if unsettled and (fault is None or fault.kind.rstrip("+") not in outcome.message):
                raise Broken(f"it is not undone, and nothing says why: {outcome.message}")
            return
        if fault is None or found.hit is None:
            raise Broken(f"it failed without a fault: {outcome.message}")
        if fault.kind == "EBUSY" and found.hit.name == "netlink RTM_SETLINK":
            return  # taken for the kernel's answer: a link holds what runs there
        if fault.kind == "EPERM" and outcome.facts.get("questions") and found.hit.name == "bpf PROG_LOAD":
            return  # so is this: the kernel refuses the program
        facts = outcome.facts
        kind = fault.kind.rstrip("+")
        named = facts.get("errno") == getattr(errno, kind) and kind in outcome.message
        if not named and not _asks_for_libbpf(found.hit):
            raise Broken(f"the error does not name {fault.kind}: {outcome.message} {facts}")
        if not facts.get("step"):
            raise Broken(f"the error does not name the step: {outcome.message} {facts}")
        if not (facts.get("object") or facts.get("path")):
            raise Broken(f"the error does not name the object: {outcome.message} {facts}")

    def _broken(self, kind: str, call: str, broken: Broken) -> None:
        failure = Failure(self._scenario.name, kind, call, str(broken))
        self.report.failures.append(failure)
        self._tell(f"FAILURE {failure}")
        self._world.begin()


def _count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def _asks_for_libbpf(call: Call) -> bool:
    """Whether libbpf tries with it what the kernel can do: it takes an error for no, and what comes of that is told."""
    asks = call.name in ("bpf PROG_LOAD", "bpf MAP_CREATE", "bpf BTF_LOAD")
    return asks and (not call.what or call.what.startswith("libbpf_"))


def chosen(calls: Sequence[Call], options: Options) -> list[tuple[str, int]]:
    """Which calls of ``calls`` are tried: every so many, and all around the cutover and the commit.

    Each is told by its name and how many so called came before it, which traffic shifts less than its place among all.
    """
    start = random.Random(options.seed).randrange(max(1, min(options.stride, len(calls))))
    every = set(range(start, len(calls), options.stride))
    for at, call in enumerate(calls):
        if options.around and call.name.startswith(_AROUND):
            every |= set(range(max(0, at - _BESIDE), min(len(calls), at + _BESIDE + 1)))
    before: Counter[str] = Counter()
    found = []
    for at, call in enumerate(calls):
        if at in every:
            found.append((call.name, before[call.name]))
        before[call.name] += 1
    return found
