"""An upgrade from start to end, its undoing, and what finishes it when its process was killed.

Until the phase ``cutover`` is in the record of ``next/``, no hook runs the new release and undoing is removing
``next/``. From then on it is finished forward by whoever comes next, or, after an error, taken back together with
what the new programs learned meanwhile. The exchange of ``current`` and ``next`` is the commit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from hitless.bundle import Bundle, unite_maps
from hitless.carry import CGROUP_STORAGE, is_global, section_way
from hitless.errors import (
    BusyError,
    InterruptedUpgradeError,
    KernelError,
    LossNotAllowedError,
    NodeError,
    UnsupportedError,
    VerifyError,
)
from hitless.kernel.barrier import wait_for_running_programs
from hitless.kernel.bpffs import exchange, make_directory, move, remove_tree, require_bpffs
from hitless.kernel.features import features
from hitless.kernel.libbpf import system_call
from hitless.kernel.links import Link, cgroup_id
from hitless.kernel.maps import Map, is_alive
from hitless.kernel.programs import Program, load_object
from hitless.kernel.queues import count_elements
from hitless.kernel.sockets import list_sockets
from hitless.layout.diff import diff_map
from hitless.layout.model import MapSpec
from hitless.layout.rules import MapRules
from hitless.layout.variables import diff_sections
from hitless.upgrade.carrier import Carrier, Passage, Successors, Tally
from hitless.upgrade.carriers import CARRIERS
from hitless.upgrade.cutover import detach_hooks, switch_back, switch_hooks
from hitless.upgrade.drift import with_ids
from hitless.upgrade.handle import Staged
from hitless.upgrade.model import (
    Cutover,
    Generation,
    Hook,
    MapPlan,
    MapResult,
    NodeState,
    Plan,
    Progress,
    Record,
    ReplacedMap,
    Result,
)
from hitless.upgrade.node import Node
from hitless.upgrade.pace import Pace
from hitless.upgrade.plan import make_plan
from hitless.upgrade.record import create_record, map_pin, pin_name, read_record, write_record
from hitless.upgrade.ring import drain
from hitless.upgrade.section import carry_section
from hitless.upgrade.steps import in_step
from hitless.upgrade.unwritten import prove_unwritten
from hitless.upgrade.verify import check_generation

# Seconds that the barrier takes at most: 8 to 16 ms were measured.
_BARRIER = 0.02

__all__ = ["apply", "plan", "recover", "unload"]


def plan(node: Node, bundle: Bundle, allow_loss: Collection[str] = ()) -> Plan:
    """What :func:`apply` would do now; looks only.

    Raises HitlessError by kind, BusyError while another process upgrades, InterruptedUpgradeError after one was killed.
    """
    state, pid = node.observe_with_holder()
    if state.unfinished is not None or state.litter:
        if pid is not None:
            raise BusyError(
                f"{node.root} is being upgraded by process {pid}, so what runs is about to change; plan again when "
                "it is done",
                path=str(node.root),
                pid=pid,
            )
        what = f"to {state.unfinished.version} " if state.unfinished else ""
        raise InterruptedUpgradeError(
            f"{node.root}: an upgrade {what}was interrupted, so what runs is about to change; "
            "apply finishes or undoes it first, alone: apply any release, then plan again",
            path=str(node.root),
        )
    return _plan(node, state, bundle, allow_loss)


@in_step("plan")
def _plan(node: Node, state: NodeState, bundle: Bundle, allow_loss: Collection[str]) -> Plan:
    cgroups = {entry.target: cgroup_id(Path(entry.target)) for entry in bundle.attach}
    decided = make_plan(state, bundle, cgroups, features(), allow_loss)
    _refuse_overfull(node, state, bundle, decided)
    return decided


@in_step("begin")
def apply(
    node: Node,
    bundle: Bundle,
    allow_loss: Collection[str] = (),
    prepare: Callable[[Node], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    wait: float = 10.0,
    pace: Pace | None = None,
) -> Result:
    """Bring ``node`` to ``bundle``: from nothing, from the same release, or from another one.

    ``prepare(node)`` is called once when the new release's maps exist and are filled and before a hook runs it:
    a control plane fills or corrects them through ``node.map()``, and may go on writing from other threads.
    ``progress`` is told what goes on. Waits up to ``wait`` seconds for another upgrade of the same root, and as long
    for writers in other processes before the commit. ``pace`` limits how fast entries are worked through before hooks
    switch.

    Raises LossNotAllowedError when the plan loses what ``allow_loss`` does not name, and other HitlessErrors; then
    the old release runs as before, complete.
    """
    tell = progress or _nobody
    _plan_first(node, bundle, allow_loss)
    made = not node.root.exists()
    make_directory(node.root, exist_ok=True)
    with node.lock(wait):
        try:
            node.access.lock.make()
            recovered = _recover(node, tell, wait)
            state = node.observe()
            decided = _plan(node, state, bundle, allow_loss)
            _refuse_loss(decided)
            upgrade = _Upgrade(node, decided, state.current, tell, wait, pace)
            if decided.start_type == "restart":
                result = upgrade.restart(prepare)
            else:
                upgrade.build(bundle, prepare)
                result = upgrade.switch()
            return msgspec.structs.replace(result, recovered=recovered)
        except BaseException:
            if made and not node.current.exists():
                _remove_if_empty(node)
            raise


@in_step("plan")
def _plan_first(node: Node, bundle: Bundle, allow_loss: Collection[str]) -> None:
    """Find what is wrong before anything is locked, made or recovered."""
    require_bpffs(node.root)
    state = node.observe()
    if state.unfinished is None and not state.litter:
        _refuse_loss(_plan(node, state, bundle, allow_loss))


def _refuse_overfull(node: Node, state: NodeState, bundle: Bundle, decided: Plan) -> None:
    """A smaller map must have room for what is there now; one that evicts makes room by itself."""
    for entry in decided.maps:
        if entry.action != "convert" or state.current is None or is_global(entry.name):
            continue
        was, room = entry.was or entry.name, bundle.maps[entry.name].max_entries
        listed = entry.kind.startswith(("entries", "mirrored")) and "hash" in bundle.maps[entry.name].type
        if room >= state.current.maps[was].info.max_entries or not (listed or entry.kind in ("queue", "sockets")):
            continue
        with Map.open(node.current / "maps" / was) as live:
            entries = _count(live, entry.kind)
        if entries > room and "lru" not in bundle.maps[entry.name].type:
            raise LossNotAllowedError(
                f"map {was} has {entries} entries, and release {bundle.version} has room for {room} "
                f"(max_entries of {entry.name}); nothing was changed: raise it, or delete entries first",
                maps=[entry.name],
                entries=entries,
                room=room,
            )


def _count(live: Map, kind: str) -> int:
    if kind == "queue":
        return count_elements(live)
    if kind == "sockets":
        return len(list_sockets(live))
    return sum(len(keys) for keys, _ in live.batches())


def _refuse_loss(decided: Plan) -> None:
    if not decided.blocked:
        return
    lines = [f"  {entry.name} loses: {loss}" for entry in decided.blocked for loss in entry.loss]
    options = " ".join(f"--allow-loss {entry.name}" for entry in decided.blocked)
    raise LossNotAllowedError(
        f"going from {decided.from_version} to {decided.to_version} would lose state:\n"
        + "\n".join(lines)
        + f"\nnothing was changed; if that is fine, say so: {options}",
        maps=[entry.name for entry in decided.blocked],
        losses={entry.name: list(entry.loss) for entry in decided.blocked},
    )


@in_step("recover")
def recover(node: Node, progress: Callable[[Progress], None] | None = None, wait: float = 10.0) -> str | None:
    """Finish or undo an upgrade whose process was killed; says what was done, None if nothing was to do."""
    if not node.root.exists():
        return None
    with node.lock(wait):
        node.access.lock.make()
        return _recover(node, progress or _nobody, wait)


@in_step("recover")
def _recover(node: Node, tell: Callable[[Progress], None], wait: float) -> str | None:
    state = node.observe()
    if state.current is not None and state.current.record.phase != "committed":
        _finish(node)
        return f"finished the clean-up after the upgrade to {state.version}"
    if state.abandoned:
        remove_tree(node.next)
        return "undid an upgrade that had not switched any hook"
    if state.unfinished is None:
        return None
    record = state.unfinished
    if record.plan is None:
        raise InterruptedUpgradeError(
            f"{node.next}: the record of the interrupted upgrade to {record.version} has no plan, so it cannot be "
            "finished; the old release's hooks and maps are in current/",
            path=str(node.next),
        )
    tell(Progress("recover"))
    upgrade = _Upgrade(node, record.plan, state.current, tell, wait)
    upgrade.reopen(record)
    if record.phase in ("undoing", "merging-back"):
        upgrade.take_back(filled=record.phase == "merging-back")
        return "; ".join((f"took back the upgrade to {record.version}, which had failed", *upgrade.left_behind))
    upgrade.switch()
    return f"finished the interrupted upgrade to {record.version}"


@in_step("unload")
def unload(node: Node, wait: float = 10.0) -> list[str]:
    """Detach every hook and unpin everything under the root (exit type Normal); returns the paths removed.

    Raises NodeError if the root holds what is not ours; then nothing is touched.
    """
    require_bpffs(node.root)
    if not node.root.exists():
        return []
    node.refuse_foreign()
    with node.lock(wait):
        names = sorted(path.name for path in node.links.iterdir()) if node.links.exists() else []
        for name in names:  # all are looked at before any is detached
            Link.open(node.links / name).close()
        removed = [str(path) for path in sorted(node.root.rglob("*")) if not path.is_dir()]
        detach_hooks(names, node.links)
        remove_tree(node.root)
    return removed


class _Upgrade:
    """One apply on its way. ``current`` is the generation it starts from, None if nothing runs."""

    def __init__(
        self,
        node: Node,
        decided: Plan,
        current: Generation | None,
        tell: Callable[[Progress], None],
        wait: float,
        pace: Pace | None = None,
    ) -> None:
        self._node = node
        self._wait = wait
        self._plan = decided
        self._current = current
        self._tell = tell
        self._pace = pace or Pace()
        self._record: Record | None = None
        self._maps: dict[str, Map] = {}
        self._programs: dict[str, Program] = {}
        self._carried: dict[str, Carrier] = {}
        self._steps: dict[str, float] = {}
        self.left_behind: list[str] = []  # by the way back, in words

    def restart(self, prepare: Callable[[Node], None] | None) -> Result:
        """The same release runs already: use all of it, attach or correct what hangs loose."""
        self._programs = self._open_programs(self._node.current)
        with self._step("prepare"):
            if prepare is not None:
                prepare(self._node)
        with self._step("cutover"):
            gap = switch_hooks(self._plan.hooks, self._programs, self._node.links)
            detach_hooks([hook.link for hook in self._plan.hooks if hook.action == "detach"], self._node.links)
        return self._result(Cutover(sum(hook.action != "keep" for hook in self._plan.hooks), gap))

    @in_step("stage")
    def build(self, bundle: Bundle, prepare: Callable[[Node], None] | None) -> None:
        """Everything that comes before a hook changes; undone by an error."""
        node = self._node
        try:
            with self._step("stage"):
                self._stage(bundle)
            with self._step("copy"):
                write_record(node.next / "record", self._phase("copying"))
                self._carry(bundle.maps, bundle.rules, fresh=True)
                with node.access.writing:
                    node.access.staged = Staged(self._maps, self._specs(), self._carried)
                for carrier in self._carried.values():
                    self._copy(carrier)
            with self._step("prepare"):
                if prepare is not None:
                    prepare(node)
            with self._step("verify"):
                for carrier in self._carried.values():
                    carrier.verify()
                self._verify_pins()
                check_generation(node.next, self._phase("copying"))
                with node.access.alone(self._wait):
                    pass  # a writer that holds its lock without an end is found before a hook changes
        except BaseException:
            self._drop()
            raise

    @in_step("recover")
    def reopen(self, record: Record) -> None:
        """Take up what a killed process had built, from the pins in ``next/``."""
        self._record = record
        for name in record.maps:
            self._maps[name] = Map.open(map_pin(self._node.next, name))
        self._programs = self._open_programs(self._node.next)
        self._carry(record.maps, record.rules, fresh=False)

    @in_step("cutover")
    def switch(self) -> Result:
        """Cutover, barrier, catch-up, commit; taken back by an error that comes before the commit."""
        node = self._node
        try:
            write_record(node.next / "record", self._phase("cutover"))
            make_directory(node.links, exist_ok=True)
            with self._step("cutover"):
                started = time.perf_counter()
                gap = switch_hooks(self._plan.hooks, self._programs, node.links)
            with self._step("catch-up"):
                # A first merge at once keeps short the time in which new programs miss what old ones wrote last.
                self._merge()
                wait_for_running_programs()
            with node.access.alone(self._wait):
                with self._step("merge"):
                    self._merge(last=True)
                    stale = (time.perf_counter() - started) * 1e6
                with self._step("commit"):
                    self._verify_hooks()
                    self._verify_pins()
                    self._commit()
        except BaseException as error:
            if not self._is_committed():
                self.take_back()
                for left in self.left_behind:
                    error.add_note(left)
                raise
            with node.access.writing:
                node.access.staged = None
            _finish(node)
            raise
        with self._step("clean-up"):
            try:
                _finish(node)
            except KernelError:
                _finish(node)  # the release is live: nobody should have to come back because of an error that passed
        self._drain()
        switched = sum(hook.action in ("attach", "update") for hook in self._plan.hooks)
        return self._result(Cutover(switched, gap, stale if self._current else 0.0))

    # The steps

    def _stage(self, bundle: Bundle) -> None:
        """Pin kept maps again, create the others, load all programs: the verifier accepts, nothing live changes."""
        node = self._node
        make_directory(node.next)
        self._record = Record(
            generation=self._plan.generation,
            name=bundle.name,
            version=bundle.version,
            digest=bundle.digest,
            phase="staging",
            objects=tuple(item.spec for item in bundle.objects),
            maps=bundle.maps,
            hooks=tuple(
                Hook(hook.link, hook.program, hook.hook, hook.target, hook.attach_type)
                for hook in self._plan.hooks
                if hook.action != "detach"
            ),
            plan=self._plan,
            rules=bundle.rules,
            converters=bundle.converters,
            replaced=self._replaced(),
        )
        create_record(node.next / "record", self._record)
        for directory in ("maps", "data", "progs", "base"):
            make_directory(node.next / directory)
        for entry in self._plan.maps:
            if entry.action == "keep":
                self._maps[entry.name] = Map.open(map_pin(node.current, entry.was or entry.name))
        for item in bundle.objects:
            sections = {name: spec.value_size for name, spec in unite_maps([item.spec]).items() if is_global(name)}
            loaded = load_object(item.data, item.spec.name, self._maps, sections)
            self._maps = {**loaded.maps, **self._maps}
            self._programs.update(loaded.programs)
        self._refuse_foreign_storage()
        unwritten = [name for item in bundle.objects for name in prove_unwritten(item, bundle.rules, self._maps)]
        self._record = msgspec.structs.replace(self._record, unwritten=tuple(dict.fromkeys(unwritten)))
        for name, held in self._maps.items():
            held.pin(map_pin(node.next, name))
        for name, program in self._programs.items():
            program.pin(node.next / "progs" / name)
        self._record = with_ids(self._record, self._maps, self._programs, self._current)

    def _replaced(self) -> tuple[ReplacedMap, ...]:
        """The maps that nobody finds by a path after this upgrade and the last, as far as somebody holds them."""
        if self._current is None:
            return ()
        record = self._current.record
        kept = {entry.was or entry.name for entry in self._plan.maps if entry.action == "keep"}
        now = [
            ReplacedMap(live.info.id, name, record.generation)
            for name, live in self._current.maps.items()
            if name not in kept
        ]
        return (*(entry for entry in record.replaced if is_alive(entry.id)), *now)

    def _refuse_foreign_storage(self) -> None:
        """A link updated in place keeps the cgroup storage of the program that it was made with."""
        live = self._current.maps.values() if self._current else ()
        infos = [held.info for held in (*self._maps.values(), *live)]
        storage = {info.id for info in infos if info.type in CGROUP_STORAGE}
        for hook in self._plan.hooks if storage else ():
            if hook.action == "update" and hook.expected is not None:
                with Program.by_id(hook.expected) as old:
                    foreign = self._programs[hook.program].map_ids & storage - old.map_ids
                if foreign:
                    raise UnsupportedError(
                        f"program {hook.program} uses cgroup storage that the program on link {hook.link} does not "
                        "use, and the kernel gives it only to programs that are newly attached; use cgrp_storage, or "
                        "give the hook a link name of its own",
                        feature="added cgroup storage",
                        link=hook.link,
                    )

    def _carry(self, specs: Mapping[str, MapSpec], rules: Mapping[str, MapRules], fresh: bool) -> None:
        """Prepare the maps to be converted; ``fresh`` is false if another process had filled what they keep."""
        assert self._record is not None  # made by _stage or given to reopen
        successors = self._successors()
        for entry in self._plan.maps:
            if entry.action != "convert":
                continue
            if self._current is None:
                raise NodeError(f"map {entry.name} is to be converted, but nothing runs", map=entry.name)
            name, was = entry.name, entry.was or entry.name
            if entry.kind == "variables":
                self._carried[name] = self._carry_section(entry, specs, rules, fresh)
                continue
            old, new = self._current.maps[was].spec, msgspec.structs.replace(specs[name], name=name)
            rule = rules.get(name, MapRules())
            self._carried[name] = CARRIERS[entry.kind](
                Passage(
                    name=name,
                    source=Map.open(map_pin(self._node.current, was)),
                    target=self._maps[name],
                    old=old,
                    new=new,
                    diff=diff_map(old, new, rule),
                    rules=rule,
                    pin=self._node.next / "base" / name,
                    fresh=fresh,
                    lossy_allowed=entry.allowed,
                    writing=self._node.access.writing,
                    pace=self._pace,
                    code=self._record.converters.get((rule.convert or "").partition(":")[0], ""),
                    successors=successors,
                )
            )

    def _carry_section(
        self, entry: MapPlan, specs: Mapping[str, MapSpec], rules: Mapping[str, MapRules], fresh: bool
    ) -> Carrier:
        assert self._current is not None  # what has a source
        old = {name: live.spec for name, live in self._current.maps.items()}
        new = {name: msgspec.structs.replace(spec, name=name) for name, spec in specs.items()}
        (section,) = (item for item in diff_sections(old.values(), new.values(), rules) if item.diff.name == entry.name)
        passages = [
            Passage(
                name=entry.name,
                source=Map.open(map_pin(self._node.current, part.source)),
                target=self._maps[entry.name],
                old=part.old,
                new=part.new,
                diff=part.diff,
                rules=part.rules,
                pin=self._node.next / "base" / pin_name(entry.name) / str(index),
                fresh=fresh,
                lossy_allowed=entry.allowed,
                writing=self._node.access.writing,
                pace=self._pace,
            )
            for index, part in enumerate(section_way(section, old, new, rules).parts)
        ]
        return carry_section(entry.name, passages)

    def _successors(self) -> Successors:
        """The maps of both releases by what takes their place: outer maps may hold them, in slots of any key."""
        found: Successors = {}
        for entry in self._plan.maps:
            was = entry.was or entry.name
            if self._current is not None and was in self._current.maps and entry.name in self._maps:
                old, new = Map.open(map_pin(self._node.current, was)), self._maps[entry.name]
                found[old.info.id, None], found[new.info.id, None] = new, old
        return found

    def _copy(self, carrier: Carrier) -> None:
        started = time.perf_counter()

        def copied(done: int) -> None:
            rate = done / max(time.perf_counter() - started, 1e-9)
            self._tell(Progress("copy", carrier.name, done, rate, carrier.tally.rounds, carrier.tally.differing))

        carrier.copy(copied)
        carrier.tally.seconds = time.perf_counter() - started

    def _merge(self, last: bool = False) -> None:
        # The quickest first: none of them waits for the others longer than it must.
        for carrier in sorted(self._carried.values(), key=lambda carrier: carrier.tally.last_round):
            if not last and carrier.tally.last_round > _BARRIER:
                continue  # the barrier passes sooner, and the last merge is the whole work anyway
            started = time.perf_counter()
            carrier.catch_up(last)
            carrier.tally.seconds += time.perf_counter() - started

    def _drain(self) -> None:
        """Give the readers of old ring buffers a while to take what is left."""
        rings = [entry for entry in self._plan.maps if entry.kind == "ring"]
        if rings:
            with self._step("drain"):
                for entry in rings:
                    path = self._node.previous / "maps" / (entry.was or entry.name)
                    self._carried[entry.name].tally.unread = drain(path)

    def _verify_pins(self) -> None:
        """The maps under both generations' paths are still those that were seen and made, not somebody else's."""
        seen = self._current.maps if self._current is not None else {}
        expected = {map_pin(self._node.current, name): live.info.id for name, live in seen.items()}
        expected |= {map_pin(self._node.next, name): held.info.id for name, held in self._maps.items()}
        for path, wanted in expected.items():
            if not path.exists():
                raise VerifyError(
                    f"{path} was removed by somebody else while the upgrade ran; the old release goes on as it was: "
                    "pin its map there again (bpftool map pin), then apply again",
                    path=str(path), expected=wanted, found=None,
                )  # fmt: skip
            with Map.open(path) as held:
                found = held.info.id
            if found != wanted:
                raise VerifyError(
                    f"{path} is map {found}, and was map {wanted} when the upgrade began: somebody else pinned another "
                    "one there; the old release goes on as it was: find out who did, then apply again",
                    path=str(path), expected=wanted, found=found,
                )  # fmt: skip

    def _verify_hooks(self) -> None:
        for hook in self._plan.hooks:
            if hook.action not in ("attach", "update"):
                continue
            pin = self._node.links / hook.link
            renamed = self._node.links / hook.was if hook.was else pin
            with Link.open(pin if pin.exists() else renamed) as link:
                expected, runs = self._programs[hook.program].info.id, link.info.program_id
            if runs != expected:
                raise VerifyError(
                    f"link {hook.link} runs program {runs}, not {expected}, just after it was switched: someone else "
                    "changes this pin root's links; find out who, then apply again",
                    link=hook.link,
                    program=runs,
                    expected=expected,
                )

    def _commit(self) -> None:
        node = self._node
        if self._current is None:
            for name in ("maps", "progs"):
                with system_call("symlink", node.root / name), suppress(FileExistsError):
                    (node.root / name).symlink_to(f"current/{name}")
            move(node.next, node.current)
        else:
            exchange(node.current, node.next)
        node.access.staged = None

    @in_step("undo")
    def _drop(self) -> None:
        """Undo before the cutover: nothing public changed."""
        with self._node.access.writing:
            self._node.access.staged = None
        remove_tree(self._node.next)

    @in_step("undo")
    def take_back(self, filled: bool = False) -> None:
        """Undo after the cutover: old programs back on the hooks, then what the new ones learned into the old maps.

        Each phase may be repeated after a kill; ``filled`` says that the bases of the way back were made already.
        """
        node = self._node
        record = node.next / "record"
        if not filled:
            write_record(record, self._phase("undoing"))
        switch_back(self._plan.hooks, self._programs, node.links)
        wait_for_running_programs()
        with node.access.alone(self._wait):
            backs = self._ways_back(node.next / "back", filled)
            if not filled:
                write_record(record, self._phase("merging-back"))
            for back in backs:
                back.catch_up(last=True)
                if back.tally.left_behind is not None:
                    what = f"what the new release wrote in map {back.name} after the cutover stays behind"
                    self.left_behind.append(f"{what}: {back.tally.left_behind}")
            write_record(record, self._phase("undone"))
        self._drop()

    def _ways_back(self, directory: Path, filled: bool) -> list[Carrier]:
        """The carriers with the sides changed; what they keep is made new, or opened if it is ``filled``."""
        if not filled:
            remove_tree(directory)
            make_directory(directory)
        return [carrier.turned(directory / pin_name(name), not filled) for name, carrier in self._carried.items()]

    def _is_committed(self) -> bool:
        """Whether the exchange happened, by what is there: a signal may come right behind it."""
        record = self._node.current / "record"
        if not record.exists():
            return False
        return read_record(record).generation == self._plan.generation

    # Small things

    def _open_programs(self, generation: Path) -> dict[str, Program]:
        return {path.name: Program.open(path) for path in (generation / "progs").iterdir()}

    def _phase(self, phase: str) -> Record:
        assert self._record is not None  # made by _stage or given to reopen
        self._record = msgspec.structs.replace(self._record, phase=phase)
        return self._record

    def _specs(self) -> dict[str, MapSpec]:
        assert self._record is not None
        return self._record.maps

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self._tell(Progress(name))
        started = time.perf_counter()
        try:
            with in_step(name):
                yield
        finally:
            self._steps[name] = time.perf_counter() - started

    def _result(self, cutover: Cutover) -> Result:
        results = []
        for entry in self._plan.maps:
            tally = self._carried[entry.name].tally if entry.name in self._carried else Tally()
            results.append(
                MapResult(
                    **{name: getattr(entry, name) for name in MapPlan.__struct_fields__},
                    entries=tally.entries,
                    copied=tally.copied,
                    rounds=tally.rounds,
                    caught_up=tally.caught_up,
                    lost=sum(tally.lost.values()),
                    lost_fields=tally.lost,
                    unread=tally.unread,
                    seconds=tally.seconds,
                )
            )
        return Result(
            root=self._plan.root,
            name=self._plan.name,
            start_type=self._plan.start_type,
            from_version=self._plan.from_version,
            to_version=self._plan.to_version,
            generation=self._plan.generation,
            maps=tuple(results),
            hooks=self._plan.hooks,
            cutover=cutover,
            steps=self._steps,
        )


@in_step("clean-up")
def _finish(node: Node) -> None:
    """Everything that follows a commit; may be repeated."""
    record = read_record(node.current / "record")
    if node.next.exists():
        remove_tree(node.previous)
        move(node.next, node.previous)
    for generation in (node.current, node.previous):
        remove_tree(generation / "base")
    for hook in record.plan.hooks if record.plan else ():
        if hook.was and (node.links / hook.was).exists():
            move(node.links / hook.was, node.links / hook.link)
    kept = {hook.link for hook in record.hooks}
    present = [path.name for path in node.links.iterdir()] if node.links.exists() else []
    detach_hooks([name for name in present if name not in kept], node.links)
    committed = msgspec.structs.replace(record, phase="committed", plan=None, rules={}, converters={})
    write_record(node.current / "record", committed)


def _remove_if_empty(node: Node) -> None:
    with suppress(OSError):
        for name in ("maps", "progs"):
            link = node.root / name
            if link.is_symlink():
                link.unlink()
        if node.links.exists():
            node.links.rmdir()
        node.access.lock.remove()
        node.root.rmdir()


def _nobody(_: Progress) -> None:
    """Told of progress when no one listens."""
