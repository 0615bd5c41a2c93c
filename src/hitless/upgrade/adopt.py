"""Taking over a node that another loader made: what runs there gets a record, and is one of hitless's nodes then.

Nothing that runs changes. All that is to be ``hitless/`` is built beside it, with further pins of the same maps,
programs and links, and one rename puts it there: who is killed before leaves what the next one removes. What follows,
the public paths that lead there from then on, is what follows any commit, and is finished by recover.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import msgspec

from hitless.bundle import Bundle
from hitless.carry import is_global
from hitless.errors import BusyError, KernelError, NodeError
from hitless.kernel.bpffs import (
    make_directory,
    move,
    remove_tree,
    require_bpffs,
    require_own,
    require_private,
    require_writable,
)
from hitless.kernel.features import features
from hitless.kernel.libbpf import system_call
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.public import ADOPTING
from hitless.upgrade import attaching
from hitless.upgrade.describe import describe
from hitless.upgrade.drift import half_done, loaded_again, other_release, recovering, with_ids
from hitless.upgrade.finish import finish, pin_as_noted
from hitless.upgrade.fitted import fitted
from hitless.upgrade.model import NodeState, PinnedProgram, Record, ReplacedProgram
from hitless.upgrade.node import PUBLIC, Node, live_map
from hitless.upgrade.public import path_problems, pins_of, require_room
from hitless.upgrade.recognise import FoundHook, FoundMap, Recognised, recognise
from hitless.upgrade.record import create_record, map_pin, write_record
from hitless.upgrade.refused import without_refused
from hitless.upgrade.steps import in_step

__all__ = ["Adopted", "adopt", "adopt_for", "as_renewed", "recognise_running", "renew"]


class Adopted(msgspec.Struct, frozen=True):
    """What was taken over, or would be. ``notes`` are sentences about what was seen and is left as it is."""

    root: str
    name: str
    version: str
    maps: tuple[FoundMap, ...]
    hooks: tuple[FoundHook, ...]
    notes: tuple[str, ...] = ()
    adopted: bool = True
    schema: int = 1


def recognise_running(node: Node, bundle: Bundle) -> Adopted:
    """What :func:`adopt` would take over; looks only. Raises as that does."""
    _require_daemon(node)
    with _recognised(node, fitted(without_refused(bundle), features())) as found:
        return _told(node, found, adopted=False)


@in_step("adopt")
def adopt(node: Node, bundle: Bundle, wait: float = 10.0) -> Adopted:
    """Take over what runs below ``node``'s root, which is the release ``bundle``, started by another loader.

    From then on it is a node like any other, with what is hitless's own in ``hitless/`` below that root. Waits up to
    ``wait`` seconds for another process that adopts. Raises NodeError with what is asked for (``facts["questions"]``)
    or if it was adopted before, KernelError, BusyError; then nothing is changed.
    """
    _require_daemon(node)
    require_writable(node.root)
    bundle = fitted(without_refused(bundle), features())
    try:
        made = _beside(node)
        with made.lock(wait), _removed_by_error(made.root):
            _refuse_adopted(node)  # by one that was waited for
            for path in made.root.iterdir():
                remove_tree(path)  # of one that was killed
            made.access.lock.make()
            with _recognised(node, bundle) as found:
                pins = pins_of(node, found.record)
                _build(made, found)
                if pins_of(node, found.record) != pins:
                    raise BusyError(
                        f"{node.base}: the daemon's own loader started or stopped meanwhile, and its pins are others "
                        "now; nothing was changed: adopt again when that is done",
                        path=str(node.base),
                        pid=None,
                    )
                move(made.root, node.root)
                node.find()
                finish(node)
                return _told(node, found, adopted=True)
    except BusyError:
        _refuse_adopted(node)  # by the one that was waited for, which took with it what was waited at
        raise


def adopt_for(node: Node, into: Bundle, running: Bundle | None = None, wait: float = 10.0) -> Adopted | None:
    """Take over what runs, to upgrade it to ``into``; ``running`` is its release, if that is at hand.

    Without that it is described by what the node tells (:func:`hitless.upgrade.describe`). None, and nothing
    done, if nothing of the daemon runs there, or if it says itself that ``into`` is what runs. Raises as :func:`adopt`.
    """
    node.move_below()
    if not node.base.exists():
        return None
    _require_daemon(node)
    found = describe(node.base, into)
    if found is None or found.version == into.version:
        return None
    return adopt(node, running or found, wait)


def _require_daemon(node: Node) -> None:
    """Raise NodeError unless there is a directory of a daemon on a bpffs, which hitless has not taken over yet."""
    node.move_below()
    if "." in node.base.name:
        require_bpffs(node.base)  # which has no such name
    if not node.base.is_dir():
        what = "is no directory" if node.base.exists() else "is not there"
        raise NodeError(
            f"{node.base} {what}, so nothing runs there that could be adopted: give the directory in which the "
            "daemon's own loader pins its maps and links (--root)",
            path=str(node.base),
        )
    _refuse_adopted(node)
    if node.root.is_symlink() or (node.root.exists() and not (node.root.is_dir() and not any(node.root.iterdir()))):
        raise NodeError(
            f"{node.root} is there, where hitless would keep what is its own, and no release of hitless runs in it: "
            "it is somebody else's, or the rest of an unload that was killed; nothing was changed: unload again "
            f"(hitless unload --root {quote(str(node.base))}), or look at it, then remove it",
            path=str(node.root),
        )
    require_bpffs(node.root)
    require_private(node.root)


def _refuse_adopted(node: Node) -> None:
    if node.current.exists():
        state = node.observe()
        assert state.current is not None  # it is there
        record = state.current.record
        problem = next(iter(path_problems(node, record)), None)
        half = half_done(node, state)
        but = f"; but {half}: {recovering(node)}" if half else f"; but {problem}" if problem else ": apply a release"
        raise NodeError(
            f"{node.base} was adopted already, and runs {record.name} {record.version}{but}", path=str(node.root)
        )


def _beside(node: Node) -> Node:
    """Where the node is built; what one that was killed has left there goes once it is locked."""
    path = node.base / ADOPTING
    if os.path.lexists(path):
        require_own(path)  # before it is resolved: behind a link there could be anything
        if not path.is_dir():
            raise NodeError(
                f"{path} is no directory, and hitless would build there what it adopts: another program uses that "
                "name; nothing was changed: look at it, then remove it",
                path=str(path),
            )
    make_directory(path, exist_ok=True)
    return Node(path)


@contextmanager
def _removed_by_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        remove_tree(path)
        raise


@contextmanager
def _recognised(node: Node, bundle: Bundle) -> Iterator[Recognised]:
    found = recognise(node.base, bundle)
    try:
        require_room(node, found.record)
        yield found
    finally:
        for one in (*found.maps.values(), *found.programs.values(), *found.links.values()):
            one.close()


def _build(made: Node, found: Recognised) -> None:
    for directory in (made.current, made.links, *(made.current / name for name in ("maps", "data", "progs"))):
        make_directory(directory)
    for name, held in found.maps.items():
        held.pin(map_pin(made.current, name))
    for name, program in found.programs.items():
        program.pin(made.current / "progs" / name)
    for name, link in found.links.items():
        link.pin(made.links / name)
    for hook in found.noted:
        with attaching.adopt(hook, made.links, made.current / "maps"):
            pass  # a note; what runs there is not touched
    for name in PUBLIC:
        with system_call("symlink", made.root / name):
            (made.root / name).symlink_to(f"current/{name}")
    create_record(made.current / "record", with_ids(found.record, found.maps, found.programs, None))


def _told(node: Node, found: Recognised, adopted: bool) -> Adopted:
    record = found.record
    told = found.told_maps, found.told_hooks, found.notes
    return Adopted(str(node.root), record.name, record.version, *told, adopted=adopted)


def as_renewed(node: Node, state: NodeState) -> NodeState:
    """``state`` as :func:`renew` makes it; looks only. Raises as that does."""
    if state.current is None or state.current.record.public is None or state.recovery != "nothing":
        return state
    current, record = state.current, state.current.record
    own = {program.id for program in record.pinned_programs.values()}
    programs, noted = dict(current.programs), dict(record.pinned_programs)
    maps, pinned = dict(current.maps), dict(record.pinned_maps)
    replaced = list(record.replaced_programs)
    for hook in record.hooks:
        link, was = state.links.get(hook.link), noted.get(hook.program)
        if link is None or link.is_dead or was is None or link.program_id in own:
            continue
        with Program.by_id(link.program_id) as program:
            if program.info.tag not in loaded_again(hook, record):
                raise NodeError(
                    other_release(hook, record, program.info), link=hook.link, program=program.info.id
                )
            if was.id not in own:
                continue  # this program was found on another hook before
            replaced.append(ReplacedProgram(was.id, hook.program, record.generation, was.tag))
            noted[hook.program] = PinnedProgram(program.info.id, program.info.tag)
            programs[hook.program] = program.info
            for name, held in _new_variables(record, hook.program, program):
                with held:
                    pinned[name] = msgspec.structs.replace(pinned[name], id=held.info.id)
                    maps[name] = live_map(held, name, record.maps[name])
    if noted == record.pinned_programs:
        return state
    renewed = msgspec.structs.replace(
        record, pinned_programs=noted, pinned_maps=pinned, replaced_programs=tuple(replaced)
    )
    generation = msgspec.structs.replace(current, record=renewed, maps=maps, programs=programs)
    return msgspec.structs.replace(state, current=generation)


@in_step("begin")
def renew(node: Node) -> None:
    """Pin what the daemon's own loader has put on the hooks since: the same programs, loaded by it once more.

    That is what its own start does, and what it wants to run; their variables are new with them. By the kernel's tag
    they are the same. Who is killed here leaves what finish ends. Raises NodeError if they are others: that release
    nobody described.
    """
    state = node.observe()
    seen = as_renewed(node, state)
    if seen is state or seen.current is None:
        return
    record = seen.current.record
    write_record(node.current / "record", msgspec.structs.replace(record, phase="cutover"))
    try:
        pin_as_noted(node, record)
    except KernelError:
        pin_as_noted(node, record)  # an error that passed leaves nothing to recover
    write_record(node.current / "record", record)


def _new_variables(record: Record, name: str, program: Program) -> Iterator[tuple[str, Map]]:
    """The maps of variables that ``program`` uses in the place of those that are pinned."""
    item = next(item for item in record.objects if any(one.name == name for one in item.programs))
    pinned = {held.id for held in record.pinned_maps.values()}
    for section in record.maps:
        if not is_global(section) or not section.startswith(f"{item.name}."):
            continue
        fit = []
        for number in program.map_ids - pinned:
            held = Map.by_id(number)
            same = held.info.type == "array" and held.info.value_size == record.maps[section].value_size
            if same and held.info.name.endswith(section[len(item.name) :][:15]):
                fit.append(held)
        if len(fit) == 1:
            yield section, fit[0]
