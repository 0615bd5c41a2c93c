"""The transaction of :mod:`hitless.upgrade.transaction` as a state machine small enough to see all of it.

A state is what is in the kernel and what the upgrading process has left to do. One transition is one effect that
nothing cuts in half: a system call, or one run of a BPF program. Between any two of them the process can be killed,
an operation of it can fail, a program of either release can begin or write, and a writer in user space can write.

There are two keys. A counts runs of programs and is merged with `sum`. B is inserted, deleted and set. Conversions
change nothing here: that values come out right is for other tests, here it matters that none is left out or used twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

__all__ = ["FAULTS", "WHERE", "State", "World", "problem", "rank", "start", "steps"]

Value = int | None
Values = tuple[Value, Value]
KEYS = "AB"
NOTHING: Values = (None, None)
ONE_OF_B, NEW_OF_B = 1, 4  # what B holds at the start and when a program inserts it; a program of the new release
SET, SET_BY_STRANGER = 2, 3  # what writers in user space set it to

FAULTS = {
    "base stays": "a merge adds the difference and leaves the base as it was",
    "base after": "a merge adds the difference in one step and moves the base in another",
    "base in memory": "the base dies with the process that made it",
    "no barrier": "the last merge does not wait for programs that still run",
    "no barrier back": "what goes back is merged while new programs still run",
    "no last merge": "the upgrade commits after the first merge",
    "commit before the last merge": "the exchange comes first",
    "commit in two": "the public paths change one after the other",
    "phase after the hooks": "the record says `cutover` when the hooks have switched, not before",
    "undone before the merge back": "the record says `undone` before what was learned is taken back",
    "back made again": "a recovery in `merging-back` makes the base of the way back anew",
    "writers stay in": "the last merge and the exchange do not keep writers out",
    "deletes what was touched": "a key that the old release deleted goes although the new one inserted it anew",
    "gone without a word": "a hook that the new release has not goes at the very end, and nothing is merged then",
    "never settled": "connections of the old release are forgotten, and go on after the last merge",
    "new map first": "a dual write goes to the new map, then to the old one, then to the base, each by itself",
}
"""What can be planted, and what it is: the checker must find each."""

WHERE = {
    "stage": "_Upgrade._stage: create_record and pins in next/",
    "copying": "_Upgrade.build: write_record(copying); handles write to both maps from now on",
    "copy": "Carriage.copy: one run of the copier, from one reading into base and new map",
    "verify": "_Upgrade.build: Carriage.verify",
    "cutover": "_Upgrade.switch: write_record(cutover)",
    "hook": "switch_hooks: one link",
    "flip": "connections.turn: Switchboard.flip, all hooks at once",
    "settle": "connections.wait: Switchboard.settle, whoever is left",
    "flip back": "connections.turn_back: flip_back and settle",
    "read": "merge_round: old value and base are read",
    "merge": "Merger.merge: one run, new map and base together",
    "add": "a run that changes the new map only",
    "remember": "the base follows",
    "barrier": "wait_for_running_programs: begins",
    "passed": "wait_for_running_programs: returns",
    "alone": "Access.alone: writers are kept out",
    "commit": "_Upgrade._commit: exchange",
    "open": "Access.alone: writers may come in",
    "detach": "_let_go: detach_hooks",
    "keep": "finish: next/ becomes previous/",
    "forget": "finish: base/ is removed",
    "committed": "finish: write_record(committed)",
    "undoing": "_Upgrade.take_back: write_record(undoing)",
    "unhook": "switch_back: one link",
    "turn": "_Upgrade._turned: the bases of the way back",
    "merging-back": "_Upgrade.take_back: write_record(merging-back)",
    "read-back": "merge_round on the way back: new value and base are read",
    "merge-back": "Merger.merge on the way back: one run, old map and base together",
    "undone": "_Upgrade.take_back: write_record(undone)",
    "drop": "_Upgrade._drop: remove_tree(next)",
    "recover": "_recover: another process looks at the records",
}
"""What each step of the upgrading process is in the code."""

_UNDER_THE_LOCK = ("copy", "verify", "read", "read-back", "alone", "drop")
"""Steps that take Access.writing, which a dual write holds."""


@dataclass(frozen=True)
class World:
    """What takes part, and how often: the bounds of the exploration.

    ``runs`` of programs, up to two at once, on ``hooks`` whose actions are as in a plan; they use ``keys``. ``writes``
    by a ``writer``: ``dual`` is a thread of the upgrading process, ``locked`` another process with a handle,
    ``foreign`` one that holds a descriptor of the old map; ``strict`` demands that what this one writes up to the
    commit is kept. With a ``board`` connections keep to their release, so that after the flip either runs on every
    hook, until the board is settled. ``policy`` is how B is merged. ``starts`` is what A holds at first.
    """

    runs: int = 2
    kills: int = 2
    errors: int = 1
    writes: int = 0
    writer: str = ""
    keys: str = "A"
    hooks: tuple[str, ...] = ("update", "update")
    policy: str = "keep"
    starts: Value = 1
    strict: bool = False
    board: bool = False
    fault: str = ""


class Words(NamedTuple):
    """What those who wrote B want it to be: by the last one who wrote it for both releases, and by those of each since.
    """

    both: frozenset[Value] = frozenset({ONE_OF_B})
    old: frozenset[Value] = frozenset()
    new: frozenset[Value] = frozenset()

    @property
    def accepted(self) -> frozenset[Value]:
        """What B may be: if programs of both releases wrote it, the word of either stands."""
        return self.old | self.new or self.both

    @property
    def accepted_of_new(self) -> frozenset[Value]:
        """What it may be in the new map: a value that a program of the new release wrote there stands."""
        return self.new if self.new and None not in self.new else self.accepted


class State(NamedTuple):
    """``todo`` is what the upgrading process has left; it and what follows up to ``staged`` die with it."""

    todo: tuple[str, ...]
    read: tuple[Value] | None = None  # the value that a merge works with
    alone: bool = False  # writers are kept out
    staged: bool = False  # handles of this process write to both maps
    write: int = 0  # how many effects of a dual write are done
    setting: Value = None  # what it sets B to
    # In the kernel
    phase: str = ""  # in the record of the generation that is being built
    next: str = "absent"  # or whole, or litter: half removed
    public: tuple[str, str] = ("old", "old")  # whose maps two public paths show
    finished: bool = False  # the new generation's record says `committed`
    hooks: tuple[str, ...] = ()  # whose program each runs
    flights: tuple[tuple[str, bool], ...] = ()  # running programs, and whether a barrier waits for them
    old: Values = NOTHING
    new: Values = NOTHING
    base: Values = NOTHING
    back: Values = NOTHING  # the base of the way back
    # What is true: for the invariants
    counted: int = 0
    words: Words = Words()
    # What may still happen
    runs: int = 0
    kills: int = 0
    errors: int = 0
    writes: int = 0


Step = tuple[str, State]


def start(world: World) -> State:
    """The old release runs, and an upgrade begins."""
    return State(
        todo=(*_build(world), *_switch(world)),
        hooks=_before(world),
        old=(world.starts, ONE_OF_B if "B" in world.keys else None),
        counted=world.starts or 0,
        runs=world.runs, kills=world.kills, errors=world.errors, writes=world.writes,
    )  # fmt: skip


# What the process does, in order. A fault is another order.


def _build(world: World) -> tuple[str, ...]:
    return ("stage", "copying", *(f"copy {key}" for key in world.keys), "verify")


def _switch(world: World) -> tuple[str, ...]:
    hooks = [f"hook {at}" for at, action in enumerate(world.hooks) if action != "detach"]
    hooks = [*hooks, "cutover"] if world.fault == "phase after the hooks" else ["cutover", *hooks]
    if world.board:
        hooks = ["cutover", "flip", *_merges(world)]
        if world.fault != "never settled":
            hooks.append("settle")
    barrier = [] if world.fault == "no barrier" else ["barrier", "passed"]
    commit = ["commit 0", "commit 1"] if world.fault == "commit in two" else ["commit"]
    end = [*_merges(world), *commit]
    if world.fault == "no last merge":
        end = commit
    elif world.fault == "commit before the last merge":
        end = [*commit, *_merges(world)]
    if world.fault != "writers stay in":
        end = ["alone", *end, "open"]
    return (*hooks, *_merges(world), *barrier, *end, *_finish(world, kept=False))


def _merges(world: World) -> list[str]:
    parts = ("read", "add", "remember") if world.fault == "base after" else ("read", "merge")
    return [f"{part} {key}" for key in world.keys for part in parts]


def _finish(world: World, kept: bool) -> tuple[str, ...]:
    """``kept``: next/ is previous/ already."""
    gone = [f"detach {at}" for at, action in enumerate(world.hooks) if action == "detach"]
    if gone and world.fault == "gone without a word":
        return ("keep", "forget", *gone, "committed")
    let_go = [*gone, "barrier", "passed", *_merges(world)] if gone and not kept else []
    return (*let_go, "keep", "forget", "committed")


def _take_back(world: World, filled: bool, switched: bool = False) -> tuple[str, ...]:
    """``switched``: all hooks run the new release, so that what old programs did last can be merged first."""
    hooks = [f"unhook {at}" for at, action in enumerate(world.hooks) if action != "detach"]
    if world.board:
        hooks = ["flip back"]
    barrier = [] if world.fault == "no barrier back" else ["barrier", "passed"]
    merges = [f"{part} {key}" for key in world.keys for part in ("read-back", "merge-back")]
    end = ["undone", *merges] if world.fault == "undone before the merge back" else [*merges, "undone"]
    turn = [] if filled else ["turn", "merging-back"]
    first = ["barrier", "passed", *_merges(world)] if switched and not filled else []
    return (*([] if filled else ["undoing"]), *first, *hooks, *barrier, "alone", *turn, *end, "open", *_DROP)


_DROP = ("drop record", "drop rest")


# What can happen


def steps(state: State, world: World) -> Iterator[Step]:
    """All that can happen next, each with what it is called."""
    yield from _upgrader(state, world)
    yield from _programs(state, world)
    yield from _writer(state, world)
    if state.kills and state.todo and state.todo[0] != "recover":
        yield "KILL of the upgrading process", _killed(state, world)


def _killed(state: State, world: World) -> State:
    words = state.words  # of a write that is cut off nobody knows whether the old release's map has it
    return state._replace(
        words=words._replace(old=words.old | words.both) if state.write else words,
        todo=("recover",), read=None, alone=False, staged=False, write=0, setting=None, kills=state.kills - 1,
        flights=tuple(sorted((program, False) for program, _ in state.flights)),
        base=NOTHING if world.fault == "base in memory" else state.base,
    )  # fmt: skip


def _upgrader(state: State, world: World) -> Iterator[Step]:
    if not state.todo:
        return
    step = state.todo[0]
    kind = step.partition(" ")[0]
    if not (state.write and kind in _UNDER_THE_LOCK):
        after = _do(state._replace(todo=state.todo[1:]), step, world)
        if after is not None:
            yield f"{step}: {WHERE[kind]}", after
    if kind == "read" and state.phase == "cutover" and "barrier" in state.todo and "alone" in state.todo:
        yield "_merge: the first is left out, for it would take too long", state._replace(
            todo=state.todo[state.todo.index("settle" if "settle" in state.todo else "barrier") :]
        )
    if state.errors:
        failed = state._replace(errors=state.errors - 1, read=None, alone=False)
        if "verify" in state.todo and state.phase:
            yield "ERROR before the cutover", failed._replace(todo=_DROP)
        elif state.phase == "cutover" and {"commit", "commit 0"} & set(state.todo):
            back = _take_back(world, filled=False, switched=_switched(state))
            yield "ERROR after the cutover", failed._replace(todo=back)


def _do(state: State, step: str, world: World) -> State | None:
    """The state after ``step``; None while it has to wait."""
    kind, _, what = step.partition(" ")
    at = KEYS.find(what) if what in KEYS else -1
    match kind:
        case "recover":
            return state._replace(todo=_recovery(state, world))
        case "stage":
            return state._replace(phase="staging", next="whole")
        case "copying":
            return state._replace(phase=kind, staged=True)
        case "copy":
            if state.old[at] is None or state.base[at] is not None:
                return state
            return state._replace(base=_with(state.base, at, state.old[at]), new=_with(state.new, at, state.old[at]))
        case "cutover" | "undoing" | "merging-back" | "undone":
            return state._replace(phase=kind)
        case "flip" | "settle" | "flip back":
            runs = {"flip": "either", "settle": "new", "flip back": "old"}[step]
            return state._replace(hooks=tuple(runs for _ in state.hooks))
        case "hook":
            return state._replace(hooks=_with(state.hooks, int(what), "new"))
        case "unhook":
            return state._replace(hooks=_with(state.hooks, int(what), _before(world)[int(what)]))
        case "detach":
            return state._replace(hooks=_with(state.hooks, int(what), "off"))
        case "barrier":
            return state._replace(flights=tuple((program, True) for program, _ in state.flights))
        case "passed":
            return None if any(awaited for _, awaited in state.flights) else state
        case "alone" | "open":
            return state._replace(alone=kind == "alone")
        case "read":
            return state._replace(read=(state.old[at],))
        case "read-back":
            return state._replace(read=(state.new[at],))
        case "merge" | "add" | "remember":
            return _merged(state, kind, at, world)
        case "turn":
            return state._replace(back=state.base)
        case "merge-back":
            assert state.read is not None
            untouched = state.old[at] == state.base[at]
            target, base = _merge(state.old[at], state.back[at], state.read[0], untouched, _policy(at, world))
            return state._replace(read=None, old=_with(state.old, at, target), back=_with(state.back, at, base))
        case "commit":
            public = ("new", "new") if not what else _with(state.public, int(what), "new")
            return state._replace(public=public, staged=False)
        case "keep":
            return state._replace(next="absent")
        case "forget":
            return state._replace(base=NOTHING)
        case "committed":
            return state._replace(finished=True)
        case "drop":
            if what == "record":
                return state._replace(phase="", next="litter", staged=False)
            return state._replace(next="absent", new=NOTHING, base=NOTHING, back=NOTHING)
        case _:  # verify: the invariants look at it
            return state


def _recovery(state: State, world: World) -> tuple[str, ...]:
    """What _recover decides to do, from what it finds."""
    if state.public[0] == "new":
        return () if state.finished else _finish(world, kept=state.next == "absent")
    if state.next == "absent":
        return ()
    if state.next == "litter" or state.phase in ("staging", "copying", "undone"):
        return _DROP
    if state.phase == "cutover":
        return _switch(world)
    filled = state.phase == "merging-back" and world.fault != "back made again"
    return _take_back(world, filled, _switched(state))


def _merged(state: State, kind: str, at: int, world: World) -> State:
    assert state.read is not None
    untouched = state.new[at] == state.base[at] or world.fault == "deletes what was touched"
    target, base = _merge(state.new[at], state.base[at], state.read[0], untouched, _policy(at, world))
    if kind == "remember":
        return state._replace(read=None, base=_with(state.base, at, base))
    if kind == "add" or world.fault == "base stays":
        base = state.base[at]
    return state._replace(
        read=state.read if kind == "add" else None,
        new=_with(state.new, at, target), base=_with(state.base, at, base),
    )  # fmt: skip


def _merge(target: Value, base: Value, source: Value, untouched: bool, policy: str) -> tuple[Value, Value]:
    """Target and base after one run of the merge program (:mod:`hitless.kernel.merger`)."""
    if source == base:
        return target, base
    if source is None:  # Mode.DELETED
        return (None if untouched else target), None
    if target is None:  # Mode.INSERTED; in Mode.CHANGED what the target's release deleted stays deleted
        return (source if base is None else None), source
    before = base or 0
    if policy == "sum":
        return target + source - before, source
    return (source if target == before else target), source


def _policy(at: int, world: World) -> str:
    return "sum" if at == 0 else world.policy


def _programs(state: State, world: World) -> Iterator[Step]:
    """A program begins with what its hook runs then, and writes that release's map some time later."""
    if state.todo and state.runs and len(state.flights) < 2:
        for program in sorted(_running(state)):
            flights = tuple(sorted((*state.flights, (program, False))))
            yield f"a program of the {program} release begins", state._replace(flights=flights, runs=state.runs - 1)
    for flight in sorted(set(state.flights)):
        program = flight[0]
        left = list(state.flights)
        left.remove(flight)
        landed = state._replace(flights=tuple(left))
        held = state.old if program == "old" else state.new
        if "A" in world.keys:
            counted = landed._replace(counted=state.counted + 1)
            yield f"it counts A in the {program} map", _put(counted, program, 0, (held[0] or 0) + 1)
        if "B" in world.keys:
            inserted = ONE_OF_B if program == "old" else NEW_OF_B
            value = inserted if held[1] is None else None
            what = "deletes B from" if value is None else "inserts B into"
            yield f"it {what} the {program} map", _said(_put(landed, program, 1, value), program, value)


def _writer(state: State, world: World) -> Iterator[Step]:
    if state.write:
        yield _dual(state, world)
    elif state.todo and state.writes and world.writer:
        for value in (SET_BY_STRANGER,) if world.writer == "foreign" else (SET, None):
            yield from _first(state._replace(writes=state.writes - 1), value, world)


def _first(state: State, value: Value, world: World) -> Iterator[Step]:
    what = "deletes B" if value is None else f"sets B to {value}"
    if world.writer == "dual":
        if state.staged and not state.alone and state.read is None:
            begun = state._replace(setting=value, words=Words(both=state.words.accepted | {value}))
            label, after = _dual(begun, world)
            yield f"{label}, which {what}", after
    elif world.writer == "locked":
        if not state.alone:
            side = state.public[1]
            after = _put(state, side, 1, value)
            if side == "new":  # which ends what was said before, but not what a hook that goes may still say
                after = after._replace(words=Words(frozenset({value})))
            said = _said(after, side, value) if side == "old" or "detach" in world.hooks else after
            yield f"a handle in another process {what}: {side} map", said
    elif state.public[1] == "old":
        # Behind the last look at it he is late, unless the upgrade is taken back or another process looks again.
        late = state.alone and not world.strict and "read B" not in state.todo
        accepted = state.words.accepted | {value} if late else frozenset({value})
        written = _put(state, "old", 1, value)
        yield f"a stranger {what}: old map", written._replace(words=state.words._replace(old=accepted))


def _dual(state: State, world: World) -> Step:
    """The next effect of handle._write_both or _delete_both."""
    order = ("old", "merge", "new")
    if world.fault == "new map first":
        order = ("new", "old", "base")
    match order[state.write]:
        case "merge":
            after = _merged(state._replace(read=(state.setting,)), "merge", 1, world)
        case "base":
            after = state._replace(base=_with(state.base, 1, state.setting))
        case side:
            after = _put(state, side, 1, state.setting)
    label = f"a dual write: {order[state.write]}"
    if state.write + 1 < len(order):
        return label, after._replace(write=state.write + 1)
    words, value = state.words, frozenset({state.setting})
    # A program that wrote B meanwhile came before or after this write.
    said = words._replace(both=value, old=words.old | value if words.old | words.new else words.old)
    return f"{label}, its end", after._replace(write=0, setting=None, words=said)


# What must hold


def problem(state: State, world: World) -> str | None:
    """What is wrong with this state, None if nothing is."""
    if state.public[0] != state.public[1]:
        return "a reader sees maps of both releases"
    running = _running(state) | {program for program, _ in state.flights}
    if "new" in running and state.next != "whole" and state.public[0] == "old":
        return "programs of the new release run, and its maps are gone"
    if state.todo[:1] == ("verify",) and not state.write and state.new != state.base:
        return "the check before the cutover fails, and nothing happened to the new map"
    if state.todo or state.flights or state.write:
        return None
    return _problem_at_the_end(state, world)


def _problem_at_the_end(state: State, world: World) -> str | None:
    committed = state.public[0] == "new"
    wanted = tuple({"detach": "off"}.get(action, "new") for action in world.hooks) if committed else _before(world)
    if state.hooks != wanted:
        return f"the hooks run {state.hooks}, not {wanted}"
    if state.next != "absent" or committed != state.finished:
        return "something is left to do, and nobody does it"
    held = state.new if committed else state.old
    if "A" in world.keys and (held[0] or 0) != state.counted:
        how = "lost" if (held[0] or 0) < state.counted else "counted twice"
        return f"A is {held[0]}, and {state.counted} were counted: an increment is {how}"
    accepted = state.words.accepted_of_new if committed else state.words.accepted
    if "B" in world.keys and held[1] not in accepted:
        wanted_values = " or ".join(sorted(map(str, accepted)))
        return f"B is {held[1]}, and by those who wrote it must be {wanted_values}"
    return None


def rank(state: State) -> tuple[int, ...]:
    """What gets less with every step, so that none of them can go on for ever."""
    return (
        state.kills, state.errors, state.todo == ("recover",), len(state.todo), state.runs, len(state.flights),
        state.writes, -state.write % 3,
    )  # fmt: skip


def _switched(state: State) -> bool:
    return "new" in state.hooks and not {"old", "either"} & set(state.hooks)


def _running(state: State) -> set[str]:
    """Whose programs begin on some hook."""
    return {run for hook in state.hooks for run in ({"old", "new"} if hook == "either" else {hook})} - {"off"}


def _said(state: State, side: str, value: Value) -> State:
    word = frozenset({value})
    if state.write:  # what programs do between two effects of a write goes with it if it is cut off
        word |= state.words.both
    return state._replace(words=state.words._replace(**{side: word}))


def _before(world: World) -> tuple[str, ...]:
    return tuple("off" if action == "attach" else "old" for action in world.hooks)


def _put(state: State, side: str, at: int, value: Value) -> State:
    if side == "old":
        return state._replace(old=_with(state.old, at, value))
    return state._replace(new=_with(state.new, at, value))


T = TypeVar("T", bound=tuple[object, ...])


def _with(values: T, at: int, value: object) -> T:
    return (*values[:at], value, *values[at + 1 :])  # type: ignore[return-value]
