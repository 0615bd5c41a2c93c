"""An upgrade from start to end, its undoing, and what finishes it when its process was killed.

What a phase means, in which order they come, and what is done with what a kill left, is told as data in
:mod:`hitless.upgrade.phases`; here each phase is written into the record of ``next/`` before its work begins. A
rollback is the same upgrade, but for its beginning and for the end of its undoing: ``next/`` is not made and removed,
it is ``previous/``, moved there and back (:mod:`hitless.upgrade.staging`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec

from hitless.bundle import Bundle
from hitless.errors import (
    BusyError,
    HitlessError,
    InterruptedUpgradeError,
    KernelError,
    LossNotAllowedError,
    NodeError,
)
from hitless.kernel.barrier import wait_for_running_programs
from hitless.kernel.bpffs import exchange, make_directory, move, remove_tree, require_bpffs, require_writable
from hitless.kernel.features import boot_id, features, release
from hitless.kernel.libbpf import system_call
from hitless.kernel.maps import Map
from hitless.kernel.processes import who
from hitless.kernel.programs import Program
from hitless.kernel.switchboard import Left, Switchboard
from hitless.layout.model import ProgramSpec
from hitless.upgrade.adopt import as_renewed, renew
from hitless.upgrade.attached import open_attached
from hitless.upgrade.carrier import Carrier, Tally
from hitless.upgrade.checks import (
    refuse_exclusive,
    refuse_frozen,
    refuse_loss,
    refuse_overfull,
    refuse_replaced_pins,
    refuse_sockets,
    refuse_taken_names,
    verify_hooks,
    verify_pins,
    with_clashes,
)
from hitless.upgrade.connections import install, turn, turn_back, wait
from hitless.upgrade.cutover import detach_hooks, hold_adopted, switch_back, switch_hooks, with_ops
from hitless.upgrade.drift import interrupted, recovering
from hitless.upgrade.fingerprint import Asked, fingerprint, require_meant, require_same, require_unchanged
from hitless.upgrade.finish import finish
from hitless.upgrade.fitted import fitted
from hitless.upgrade.handle import Staged
from hitless.upgrade.model import (
    Cutover,
    Generation,
    MapPlan,
    MapResult,
    NodeState,
    Plan,
    Progress,
    Record,
    Result,
)
from hitless.upgrade.moving import read_types, require_moved, settle
from hitless.upgrade.node import Node
from hitless.upgrade.ops import still_used, wait_for_last
from hitless.upgrade.pace import Pace
from hitless.upgrade.passages import Sides, make_carriers
from hitless.upgrade.places import Place, find_places
from hitless.upgrade.plan import awaited, hooks_of, late_hooks, make_plan
from hitless.upgrade.public import publish, refuse_taken_paths, withdraw
from hitless.upgrade.record import map_pin, pin_name, read_record, write_record
from hitless.upgrade.refused import refuse_left_out, without_refused
from hitless.upgrade.release import last_release
from hitless.upgrade.ring import drain
from hitless.upgrade.socket_plans import with_socket_hooks
from hitless.upgrade.staging import Built, build_next, give_up, open_programs, remove_last, restage_last
from hitless.upgrade.steps import in_step
from hitless.upgrade.verify import check_generation

# Seconds that the barrier takes at most: 8 to 16 ms were measured.
_BARRIER = 0.02

# Seconds for which an upgrade that is taken back waits for sockets that got its struct_ops meanwhile.
_LAST_SOCKETS = 1.0

_LEFT = "the rest is done by the next apply or recover (hitless recover)"

__all__ = ["apply", "plan", "plan_rollback", "recover", "rollback", "unload"]


def plan(node: Node, bundle: Bundle, allow_loss: Collection[str] = ()) -> Plan:
    """What :func:`apply` would do now; looks only. It may be kept (:func:`save_plan`) and given to apply.

    Raises HitlessError by kind, BusyError while another process upgrades, InterruptedUpgradeError after one was killed.
    """
    if bundle.public is not None:
        node.move_below()
    state = _settled(node)
    return _plan(node, state, *_for_this_kernel(bundle), allow_loss)


def plan_rollback(node: Node, allow_loss: Collection[str] = ()) -> Plan:
    """What :func:`rollback` would do now; looks only. Raises as :func:`plan`, and NodeError if there is no way back."""
    return node.at_rest(lambda: _plan_back(node, _settled(node), allow_loss)[0])


def _settled(node: Node) -> NodeState:
    """What is live, if no upgrade is going on or was killed."""
    state, pid = node.observe_with_holder()
    if state.unfinished is not None or state.litter:
        if pid is not None:
            raise BusyError(
                f"{node.root} is being upgraded by {who(pid)}, so what runs is about to change; plan again when it is "
                "done",
                path=str(node.root),
                pid=pid,
            )
        what = f"to {state.unfinished.version} " if state.unfinished else ""
        raise InterruptedUpgradeError(
            f"{node.root}: an upgrade {what}was interrupted, so what runs is about to change: {recovering(node)}; then "
            "plan again",
            path=str(node.root),
        )
    return as_renewed(node, state)


@in_step("plan")
def _for_this_kernel(bundle: Bundle) -> tuple[Bundle, Asked]:
    """The release as this kernel can have it, to be planned and built, and what the kernel was asked for that."""
    asked = Asked(features())
    return fitted(without_refused(bundle), asked), asked


@in_step("plan")
def _plan(
    node: Node,
    state: NodeState,
    bundle: Bundle,
    asked: Asked,
    allow_loss: Collection[str],
    planned: Plan | None = None,
) -> Plan:
    """What is to be done; with a plan made before that or nothing, decided anew and not taken from it."""
    machine = release(), boot_id()
    if planned is not None:
        require_meant(planned, state.root, bundle)
        allow_loss = {entry.name for entry in planned.maps if entry.allowed}
    places = find_places(bundle.attach, bundle.programs)
    targets = _targets(places, state)
    if planned is not None and planned.fingerprint is not None:
        able = {name: name in asked for name in planned.fingerprint.features}
        require_unchanged(planned, fingerprint(state, targets, able, *machine))
    if state.current is not None:
        refuse_replaced_pins(node.current, state.current)
    refuse_taken_paths(node, bundle, state.current.record if state.current is not None else None)
    refuse_left_out(bundle, state.current.record if state.current is not None else None)
    decided = make_plan(state, bundle, places, asked, allow_loss)
    decided = with_socket_hooks(node, state, decided, bundle.attach, asked)
    if planned is not None:
        require_same(planned, decided)
    refuse_overfull(node, state, bundle, decided)
    refuse_exclusive(decided)
    refuse_taken_names(decided)
    refuse_sockets(node, state, decided)
    decided = with_clashes(decided, state)
    return msgspec.structs.replace(decided, fingerprint=fingerprint(state, targets, asked.answers, *machine))


def _targets(places: Sequence[Place], state: NodeState) -> dict[str, int]:
    """The numbers of what hooks are for, and of the programs of other tools there that decide about the plan."""
    own = {link.program_id for link in state.links.values()}
    targets = {str(place): place.id for place in places}
    for place in places:
        if place.entry.adopt or place.entry.hook.startswith("xdp"):
            others = (one for one in place.occupants if one.program_id not in own)
            targets |= {f"on {place}: {one}": one.program_id for one in others}
    return targets


@in_step("plan")
def _plan_back(node: Node, state: NodeState, allow_loss: Collection[str]) -> tuple[Plan, Bundle]:
    """The plan of a rollback, and the release that it goes back to."""
    if state.current is None:
        raise NodeError(f"nothing of hitless runs under {node.root}, so there is no way back", path=str(node.root))
    refuse_replaced_pins(node.current, state.current)
    last = node.last()
    refuse_replaced_pins(node.previous, last)
    release = last_release(last, state.current, node.previous)
    refuse_taken_paths(node, release, state.current.record)
    decided = make_plan(
        state, release, find_places(release.attach, release.programs), features(), allow_loss, last
    )
    refuse_frozen(node.previous, decided)
    decided = with_socket_hooks(node, state, decided, release.attach, features())
    refuse_overfull(node, state, release, decided)
    refuse_exclusive(decided)
    refuse_taken_names(decided)
    refuse_sockets(node, state, decided)
    return decided, release


@in_step("begin")
def apply(
    node: Node,
    bundle: Bundle,
    allow_loss: Collection[str] = (),
    prepare: Callable[[Node], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    wait: float = 10.0,
    pace: Pace | None = None,
    planned: Plan | None = None,
) -> Result:
    """Bring ``node`` to ``bundle``: from nothing, from the same release, or from another one.

    ``prepare(node)`` is called once when the new release's maps exist and are filled and before a hook runs it:
    a control plane fills or corrects them through ``node.map()``, and may go on writing from other threads.
    ``progress`` is told what goes on. Waits up to ``wait`` seconds for another upgrade of the same root, and as long
    for writers in other processes before the commit. ``pace`` limits how fast entries are worked through before hooks
    switch. With ``planned``, a plan made before, exactly that is done or nothing: it says itself what may be lost.

    With ``planned`` it raises BundleError if the bundle is another than was planned, NodeError with what changed if
    the node did, PlanError if the plan is for another root, InterruptedUpgradeError if there is something to recover.
    Raises LossNotAllowedError when the plan loses what ``allow_loss`` does not name, and other HitlessErrors; then
    the old release runs as before, complete.
    """
    tell = progress or _nobody
    if bundle.public is not None:
        node.move_below()
    bundle, asked = _for_this_kernel(bundle)
    _plan_first(node, bundle, asked, allow_loss, planned)
    made = not node.root.exists()
    make_directory(node.root, exist_ok=True)
    with node.lock(wait):
        try:
            node.access.lock.make()
            if planned is not None:
                _refuse_unfinished(node)
            recovered = _recover(node, tell, wait)
            renew(node)
            state = node.observe()
            decided = _plan(node, state, bundle, asked, allow_loss, planned)
            refuse_loss(decided)
            upgrade = _Upgrade(node, decided, state.current, tell, wait, pace)
            if decided.start_type == "restart":
                result = upgrade.restart(prepare)
            else:
                upgrade.build(lambda: build_next(node, bundle, decided, state.current), prepare)
                result = upgrade.switch()
            return msgspec.structs.replace(result, recovered=recovered)
        except BaseException:
            if made and not node.current.exists():
                _remove_if_empty(node)
            raise


@in_step("plan")
def _plan_first(
    node: Node, bundle: Bundle, asked: Asked, allow_loss: Collection[str], planned: Plan | None
) -> None:
    """Find what is wrong before anything is locked, made or recovered."""
    if planned is not None and allow_loss:
        raise LossNotAllowedError(
            f"what may be lost was said when this was planned, and {', '.join(allow_loss)} cannot be added now: plan "
            "again with all that may be lost",
            maps=list(allow_loss),
        )
    require_bpffs(node.root)
    require_writable(node.root)
    state = node.observe()
    if state.recovery == "nothing":
        refuse_loss(_plan(node, as_renewed(node, state), bundle, asked, allow_loss, planned))


def _refuse_unfinished(node: Node) -> None:
    """What a plan was made for is not what there is after a recovery, so who has a plan looks at that first."""
    state = node.observe()
    if state.current is not None and state.current.record.phase != "committed":
        raise interrupted(node, state.version, committed=True)
    if state.unfinished is not None or state.litter:
        raise interrupted(node, state.unfinished.version if state.unfinished else None, committed=False)


@in_step("begin")
def rollback(
    node: Node,
    allow_loss: Collection[str] = (),
    progress: Callable[[Progress], None] | None = None,
    wait: float = 10.0,
    pace: Pace | None = None,
) -> Result:
    """Upgrade ``node`` to the last release, kept in ``previous/``, with all that the running one has learned.

    Entries come back by the reverse of the conversion that brought them; the running release becomes the last one, so
    that the next rollback goes forth again. Its programs and maps are used as they are, no bundle is needed. For
    ``allow_loss``, ``progress``, ``wait`` and ``pace`` see :func:`apply`.

    Raises NodeError if there is no last release, LossNotAllowedError when it has no place for something that
    ``allow_loss`` does not name, and other HitlessErrors; then the running release runs as before, complete, and there
    still is a way back.
    """
    tell = progress or _nobody
    require_bpffs(node.root)

    def look() -> int | None:
        state = node.observe()
        if state.recovery == "nothing":
            refuse_loss(_plan_back(node, as_renewed(node, state), allow_loss)[0])
        return state.generation

    seen = node.at_rest(look)  # find what is wrong before anything is locked or moved
    with node.lock(wait):
        node.access.lock.make()
        recovered = _recover(node, tell, wait)
        renew(node)
        state = node.observe()
        if recovered is None and state.generation != seen:  # else of two rollbacks at once one would undo the other
            raise BusyError(
                f"{node.root} was changed by another process meanwhile, and runs {state.version}, generation "
                f"{state.generation}, now: see whether that is to be gone back from",
                path=str(node.root),
                pid=None,
            )
        decided, release = _plan_back(node, state, allow_loss)
        refuse_loss(decided)
        current = state.current
        assert current is not None  # or there is no plan
        upgrade = _Upgrade(node, decided, current, tell, wait, pace)
        upgrade.build(lambda: restage_last(node, release, decided, current), None)
        return msgspec.structs.replace(upgrade.switch(), recovered=recovered)


@in_step("recover")
def recover(
    node: Node, progress: Callable[[Progress], None] | None = None, wait: float = 10.0, back: bool = False
) -> str | None:
    """Finish or undo an upgrade whose process was killed; says what was done, None if nothing was to do.

    What had begun to switch hooks is finished, or taken ``back`` with what the new release learned meanwhile. Who is
    killed here leaves what the next one finishes, in the same direction.

    Raises InterruptedUpgradeError if it cannot be: without a record's plan, or ``back`` once it was committed;
    NodeError if the root is no place for pins, BusyError.
    """
    require_bpffs(node.root)
    if not node.root.exists():
        return None
    with node.lock(wait):
        node.access.lock.make()
        return _recover(node, progress or _nobody, wait, back)


@in_step("recover")
def _recover(node: Node, tell: Callable[[Progress], None], wait: float, back: bool = False) -> str | None:
    state = node.observe()
    match state.recovery:
        case "nothing":
            return None
        case "clean-up":
            if back:
                raise InterruptedUpgradeError(
                    f"{node.root}: the upgrade to {state.version} was committed before it was interrupted, so it "
                    "cannot be taken back any more, and nothing was done: recover without --back, then roll back "
                    "(hitless rollback)",
                    path=str(node.root),
                )
            finish(node)
            return f"finished the clean-up after the upgrade to {state.version}"
        case "remove":
            give_up(node)
            return "undid an upgrade that had not switched any hook"
        case "put-back":
            give_up(node)
            return "undid a rollback that had not switched any hook"
    record = state.unfinished
    assert record is not None  # a phase to go on from
    if record.plan is None:
        raise InterruptedUpgradeError(
            f"{node.next}: the record of the interrupted upgrade to {record.version} has no plan, so it cannot be "
            "finished; the old release's hooks and maps are in current/",
            path=str(node.next),
        )
    tell(Progress("recover"))
    upgrade = _Upgrade(node, record.plan, state.current, tell, wait)
    upgrade.reopen(record)
    failed = state.recovery == "take-back"
    if failed or back:
        upgrade.take_back(filled=record.phase == "merging-back")
        why = ", which had failed" if failed else ", which had been interrupted"
        return "; ".join((f"took back the upgrade to {record.version}{why}", *upgrade.left_behind))
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
            with open_attached(node.links, name):
                pass
        removed = [str(path) for path in sorted(node.root.rglob("*")) if not path.is_dir()]
        removed += map(str, withdraw(node))
        detach_hooks(names, node.links)
        _remove_all(node)
    return removed


def _remove_all(node: Node) -> None:
    """Unpin everything, in an order that leaves to one who comes after a kill what a first apply may leave as well."""
    remove_tree(node.next)
    remove_last(node.previous)
    if (node.current / "record").exists():
        with suppress(NodeError):  # one that cannot be read
            record = read_record(node.current / "record")
            write_record(node.current / "record", msgspec.structs.replace(record, phase="undone", former=None))
            move(node.current, node.next)
    # A dispatcher without its slot, or a witness that writes to a storage of its own, must not be found by the next.
    for part in ("dispatchers", "witnesses"):
        remove_tree(node.root / "board" / part)
    remove_tree(node.root)


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
        self._board: Switchboard | None = None  # where connections keep to their release
        self._moved = [hook for hook in decided.hooks if hook.moved]
        self.left_behind: list[str] = []  # by the way back, in words

    def restart(self, prepare: Callable[[Node], None] | None) -> Result:
        """The same release runs already: use all of it, attach or correct what hangs loose."""
        self._programs = with_ops(self._plan.hooks, open_programs(self._node.current), self._node.current)
        with self._step("prepare"):
            if prepare is not None:
                prepare(self._node)
        with self._step("cutover"):
            record = read_record(self._node.current / "record")
            hooks = hooks_of(self._plan.hooks)
            if hooks != record.hooks:
                write_record(self._node.current / "record", msgspec.structs.replace(record, hooks=hooks))
            gap = switch_hooks(self._plan.hooks, self._programs, self._node.links, self._node.current / "maps")
            detach_hooks([hook.link for hook in self._plan.hooks if hook.action == "detach"], self._node.links)
            publish(self._node, read_record(self._node.current / "record"), None)
        return self._result(Cutover(sum(hook.action != "keep" for hook in self._plan.hooks), gap))

    @in_step("stage")
    def build(self, stage: Callable[[], Built], prepare: Callable[[Node], None] | None) -> None:
        """Everything that comes before a hook changes, beginning with ``stage``; undone by an error."""
        node = self._node
        try:
            with self._step("stage"):
                built = stage()
                self._record, self._maps = built.record, built.maps
                self._programs = with_ops(self._plan.hooks, built.programs, node.next)
            with self._step("copy"):
                copying = self._phase("copying")
                write_record(node.next / "record", copying)
                self._carry(fresh=True)
                with node.access.writing:
                    node.access.staged = Staged(self._maps, copying.maps, self._carried)
                for hook in self._moved:
                    read_types(hook, self._maps[hook.target])
                for carrier in self._carried.values():
                    self._copy(carrier)
            with self._step("prepare"):
                if prepare is not None:
                    prepare(node)
            with self._step("verify"):
                for carrier in self._carried.values():
                    carrier.verify()
                verify_pins(node, self._current, self._maps)
                check_generation(node.next, copying)
                with node.access.alone(self._wait):
                    pass  # a writer that holds its lock without an end is found before a hook changes
        except BaseException as error:
            with _undoing(error):
                self._drop()
            raise

    @in_step("recover")
    def reopen(self, record: Record) -> None:
        """Take up what a killed process had built, from the pins in ``next/``."""
        self._record = record
        for name in record.maps:
            self._maps[name] = Map.open(map_pin(self._node.next, name))
        self._programs = with_ops(self._plan.hooks, open_programs(self._node.next), self._node.next)
        self._carry(fresh=False)

    @in_step("cutover")
    def switch(self) -> Result:
        """Cutover, barrier, catch-up, commit; taken back by an error that comes before the commit."""
        node = self._node
        try:
            with node.access.writing:  # a write that a kill cuts is undone before this, and merged after it
                write_record(node.next / "record", self._phase("cutover"))
                if node.access.staged is not None:
                    node.access.staged.switching = True
            make_directory(node.links, exist_ok=True)
            with self._step("cutover"):
                hold_adopted(self._plan.hooks, node.next / "adopted")
                started = time.perf_counter()
                gap = self._switch()
                self._switch_late()
            moved = self._wait_for_connections()
            self._wait_for_ops()
            with self._step("catch-up"):
                self._move_sockets()
                # A first merge at once keeps short the time in which new programs miss what old ones wrote last.
                self._merge()
                wait_for_running_programs(self._current is not None and self._current.record.may_sleep)
            with node.access.alone(self._wait):
                with self._step("merge"):
                    self._merge(last=True)
                    stale = (time.perf_counter() - started) * 1e6
                with self._step("commit"):
                    self._switch_late()
                    self._verify_hooks()
                    verify_pins(node, self._current, self._maps)
                    self._commit()
        except BaseException as error:
            if not self._is_committed():
                with _undoing(error):
                    self.take_back()
                for left in self.left_behind:
                    error.add_note(left)
                raise
            with node.access.writing:
                node.access.staged = None
            error.add_note(f"{self._plan.to_version} is live all the same: this came behind the commit")
            with _undoing(error):
                finish(node)
            raise
        with self._step("clean-up"):
            try:
                finish(node)
            except KernelError:
                self._finish_again()  # nobody should have to come back because of an error that passed
        self._drain()
        switched = sum(hook.action in ("attach", "update", "adopt") for hook in self._plan.hooks)
        return self._result(Cutover(switched, gap, stale if self._current else 0.0, moved))

    # The steps

    def _switch(self) -> float:
        """The hooks go over, each connection by itself if that is wanted; microseconds from the first to the last."""
        node, hooks = self._node, self._plan.hooks
        if self._plan.cutover.consistency == "connection":
            self._board = install(hooks, self._specs(), node.links, node.next / "maps")
            turn(self._board, hooks, self._programs, node.links)
            return 0.0
        for name in dict.fromkeys(hook.target for hook in self._moved):
            self._carried[name].catch_up()  # so that few come to the old map behind it
        return switch_hooks(hooks, self._programs, node.links, node.next / "maps")

    def _move_sockets(self) -> None:
        """Bring to the new maps who came to the old ones meanwhile; from here on all sockets run the new programs."""
        for name in dict.fromkeys(hook.target for hook in self._moved):
            self._carried[name].catch_up()
        for hook in self._moved:
            new = self._maps[hook.target]
            settle(hook, self._programs[hook.program], self._node.links, self._node.next / "links", new)

    def _specs(self) -> dict[str, ProgramSpec]:
        """The programs of both releases; the new one's count where a name is in both."""
        records = (self._current.record if self._current else None, self._record)
        return {spec.name: spec for record in records if record for item in record.objects for spec in item.programs}

    def _wait_for_connections(self) -> int | None:
        """Until those that began with the old release have ended; its maps are merged meanwhile."""
        if self._board is None:
            return None

        def told(left: Left) -> None:
            self._tell(Progress("connections", done=left.before))

        def merge() -> None:
            for carrier in self._carried.values():
                carrier.catch_up()

        with self._step("connections"):
            return wait(self._board, self._plan.cutover.deadline, told, merge)

    def _wait_for_ops(self) -> None:
        """Until no connection goes on with the old release's struct_ops, if that writes maps that are converted."""
        late = awaited(self._plan.maps, self._current) if self._current else ()
        if not late or self._current is None:
            return

        def told(left: int) -> None:
            self._tell(Progress("connections", done=left))

        def merge() -> None:
            for carrier in self._carried.values():
                carrier.catch_up()

        # Those of earlier generations as well, but for what a rollback has put on the link again.
        ids = {live.info.id for live in self._current.maps.values()}
        ids |= {entry.id for entry in self._current.record.replaced}
        ids -= {held.info.id for held in self._maps.values()}
        with self._step("connections"):
            left = wait_for_last(ids, self._plan.cutover.deadline, told, merge)
        if left:
            raise still_used(left, late, self._plan.cutover.deadline)

    def _carry(self, fresh: bool) -> None:
        """Prepare the maps to be converted; ``fresh`` is false if another process had filled what they keep."""
        assert self._record is not None  # what was staged, or given to reopen
        sides = Sides(self._node.current, self._node.next, self._node.access.writing)
        self._carried = make_carriers(sides, self._record, self._maps, self._current, self._pace, fresh)

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

    def _switch_late(self) -> None:
        """Attach the release to what patterns match by now and did not when it was planned."""
        assert self._record is not None  # what was staged, or given to reopen
        patterns = [entry for entry in self._record.attach if entry.is_pattern]
        while late := late_hooks(self._plan, self._record, find_places(patterns, self._record.programs)):
            known = {hook.link for hook in late}
            others = [hook for hook in self._plan.hooks if hook.link not in known]
            self._plan = msgspec.structs.replace(self._plan, hooks=(*late, *others))
            self._record = msgspec.structs.replace(self._record, plan=self._plan, hooks=hooks_of(self._plan.hooks))
            write_record(self._node.next / "record", self._record)  # first, so that a recovery knows of them
            hold_adopted(late, self._node.next / "adopted")
            switch_hooks(late, self._programs, self._node.links, self._node.next / "maps")

    def _verify_hooks(self) -> None:
        verify_hooks(self._plan.hooks, self._programs, self._node.links)
        for hook in self._moved:
            require_moved(hook, self._programs[hook.program], self._node.links, self._node.next / "links")

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
        give_up(self._node)

    @in_step("undo")
    def take_back(self, filled: bool = False) -> None:
        """Undo after the cutover: old programs back on the hooks, then what the new ones learned into the old maps.

        Each phase may be repeated after a kill; ``filled`` says that the bases of the way back were made already.
        """
        node = self._node
        record = node.next / "record"
        if not filled:
            write_record(record, self._phase("undoing"))
            self._merge_before_going_back()
        if self._plan.cutover.consistency == "connection" and (node.root / "board").exists():
            turn_back(Switchboard(node.root / "board"), self._plan.hooks, self._programs, node.links)
        switch_back(self._plan.hooks, self._programs, node.links, node.current / "maps")
        if not filled:
            remove_tree(node.next / "back")
            make_directory(node.next / "back")
        sockets = self._move_sockets_back(filled)
        wait_for_running_programs(self._record is not None and self._record.may_sleep)
        if self._current is not None and awaited(self._plan.maps, self._current):
            new = {held.info.id for held in self._maps.values()}
            left = wait_for_last(new, _LAST_SOCKETS, lambda _: None, lambda: None)
            if left:
                what = f"what {left} sockets write that have a struct_ops of {self._plan.to_version}"
                self.left_behind.append(f"{what} stays behind: they keep it until they end")
        with node.access.alone(self._wait):
            backs = [*sockets.values(), *(self._turned(name, filled) for name in self._carried if name not in sockets)]
            if not filled:
                write_record(record, self._phase("merging-back"))
            for back in backs:
                back.catch_up(last=True)
                if back.tally.left_behind is not None:
                    what = f"what the new release wrote in map {back.name} after the cutover stays behind"
                    self.left_behind.append(f"{what}: {back.tally.left_behind}")
            write_record(record, self._phase("undone"))
        self._drop()

    def _move_sockets_back(self, filled: bool) -> dict[str, Carrier]:
        """As :meth:`_move_sockets`; returns the carriers of their maps, by name."""
        backs = {hook.target: self._turned(hook.target, filled) for hook in self._moved}
        for back in backs.values():
            back.catch_up()
        for hook in self._moved:
            assert hook.moved is not None and hook.expected is not None
            with Program.by_id(hook.expected) as old, Map.open(map_pin(self._node.current, hook.moved)) as held:
                settle(hook, old, self._node.links, self._node.links, held)
        return backs

    def _merge_before_going_back(self) -> None:
        """Let the bases know what old programs wrote last, if all hooks run new ones: so no old program is about.

        An entry that an old program inserted behind the last pass, and a new one has touched since, would else look
        like the new release's own, and come back after the old one, on its hooks again, deleted it.
        """
        try:
            self._verify_hooks()
        except HitlessError:
            return  # some hooks run old programs still, which go on inserting and deleting
        try:
            wait_for_running_programs(self._current is not None and self._current.record.may_sleep)
            for carrier in self._carried.values():
                carrier.catch_up(last=True)
        except HitlessError as error:
            what = "what the old release inserted last could not be told from what the new one did"
            self.left_behind.append(f"{what}, and may come back where the old one deletes it: {error.message}")

    def _turned(self, name: str, filled: bool) -> Carrier:
        """The carrier with the sides changed; what it keeps is made new, or opened if it is ``filled``."""
        return self._carried[name].turned(self._node.next / "back" / pin_name(name), not filled)

    def _finish_again(self) -> None:
        try:
            finish(self._node)
        except HitlessError as error:
            error.add_note(f"{self._plan.to_version} is live and complete; {_LEFT}")
            raise

    def _is_committed(self) -> bool:
        """Whether the exchange happened, by what is there: a signal may come right behind it."""
        record = self._node.current / "record"
        if not record.exists():
            return False
        return read_record(record).generation == self._plan.generation

    # Small things

    def _phase(self, phase: str) -> Record:
        assert self._record is not None  # what was staged, or given to reopen
        self._record = msgspec.structs.replace(self._record, phase=phase)
        return self._record

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
            left_out=self._plan.left_out,
        )


@contextmanager
def _undoing(error: BaseException) -> Iterator[None]:
    """Around what undoes or finishes because of ``error``, which stays the one that is told if this fails too."""
    try:
        yield
    except HitlessError as second:
        error.add_note(f"and then: {second.message}; {_LEFT}")


def _remove_if_empty(node: Node) -> None:
    with suppress(OSError):
        for name in ("maps", "progs"):
            link = node.root / name
            if link.is_symlink():
                link.unlink()
        for directory in (node.links, node.links.parent / "slots"):
            if directory.exists():
                directory.rmdir()
        node.access.lock.remove()
        node.root.rmdir()


def _nobody(_: Progress) -> None:
    """Told of progress when no one listens."""
