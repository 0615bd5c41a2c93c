"""Taking over a node that another loader made: what runs there gets a record, and is one of hitless's nodes then.

Nothing that runs changes. All that is to be ``hitless/`` is built beside it, with further pins of the same maps,
programs and links, and one rename puts it there: who is killed before leaves what the next one removes. What follows,
the public paths that lead there from then on, is what follows any commit, and is finished by recover.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hitless.bundle import Bundle
from hitless.carry import is_global
from hitless.errors import NodeError
from hitless.kernel.bpffs import make_directory, move, remove_tree, require_bpffs, require_writable
from hitless.kernel.libbpf import system_call
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.upgrade import attaching
from hitless.upgrade.describe import describe
from hitless.upgrade.drift import loaded_again, with_ids
from hitless.upgrade.finish import finish
from hitless.upgrade.model import PinnedProgram, Record, ReplacedProgram
from hitless.upgrade.node import PUBLIC, Node
from hitless.upgrade.public import path_problems
from hitless.upgrade.recognise import ADOPTING, FoundHook, FoundMap, Recognised, recognise
from hitless.upgrade.record import create_record, map_pin, read_record, write_record
from hitless.upgrade.refused import without_refused
from hitless.upgrade.steps import in_step

__all__ = ["Adopted", "adopt", "adopt_for", "recognise_running", "renew"]


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
    with _recognised(node, without_refused(bundle)) as found:
        return _told(node, found, adopted=False)


@in_step("adopt")
def adopt(node: Node, bundle: Bundle, wait: float = 10.0) -> Adopted:
    """Take over what runs below ``node``'s root, which is the release ``bundle``, started by another loader.

    From then on it is a node like any other, with what is hitless's own in ``hitless/`` below that root. Waits up to
    ``wait`` seconds for another process that adopts. Raises NodeError with what is asked for (``facts["questions"]``)
    or if it was adopted before, KernelError, BusyError; then nothing is changed.
    """
    node.move_below()
    require_bpffs(node.root)
    require_writable(node.root)
    if not node.base.is_dir():
        raise NodeError(f"{node.base} is not there: nothing runs that could be adopted", path=str(node.base))
    _refuse_adopted(node)
    bundle = without_refused(bundle)
    made = Node(node.base / ADOPTING)
    make_directory(made.root, exist_ok=True)
    try:
        with made.lock(wait):
            _refuse_adopted(node)  # by one that was waited for
            for path in made.root.iterdir():
                remove_tree(path)  # of one that was killed
            made.access.lock.make()
            with _recognised(node, bundle) as found:
                _build(made, found)
                move(made.root, node.root)
                node.find()
                finish(node)
                return _told(node, found, adopted=True)
    except BaseException:
        remove_tree(made.root)
        raise


def adopt_for(node: Node, into: Bundle, running: Bundle | None = None, wait: float = 10.0) -> Adopted | None:
    """Take over what runs, to upgrade it to ``into``; ``running`` is its release, if that is at hand.

    Without that it is described by what the node tells (:func:`hitless.upgrade.describe`). None, and nothing
    done, if nothing of the daemon runs there, or if it says itself that ``into`` is what runs. Raises as :func:`adopt`.
    """
    node.move_below()
    found = describe(node.base, into)
    if found is None or found.version == into.version:
        return None
    return adopt(node, running or found, wait)


def _refuse_adopted(node: Node) -> None:
    if node.current.exists():
        record = read_record(node.current / "record")
        problem = next(iter(path_problems(node, record)), None)
        raise NodeError(
            f"{node.base} was adopted already, and runs {record.name} {record.version}"
            + (f"; but {problem}" if problem else ": apply a release"),
            path=str(node.root),
        )


@contextmanager
def _recognised(node: Node, bundle: Bundle) -> Iterator[Recognised]:
    found = recognise(node.base, bundle)
    try:
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


@in_step("begin")
def renew(node: Node) -> None:
    """Pin what the daemon's own loader has put on the hooks since: the same programs, loaded by it once more.

    That is what its own start does, and what it wants to run; their variables are new with them. By the kernel's tag
    they are the same. May be repeated. Raises NodeError if they are others: that release nobody described.
    """
    path = node.current / "record"
    if not path.exists():
        return
    record = read_record(path)
    if record.public is None or record.phase != "committed":
        return
    state = node.observe()
    assert state.current is not None  # or there is no record
    own = {program.id for program in record.pinned_programs.values()}
    seen = dict(record.pinned_programs)
    replaced = list(record.replaced_programs)
    maps = dict(record.pinned_maps)
    for hook in record.hooks:
        link, noted = state.links.get(hook.link), record.pinned_programs.get(hook.program)
        if link is None or link.is_dead or noted is None or link.program_id in own:
            continue
        with Program.by_id(link.program_id) as program:
            if program.info.tag not in loaded_again(hook, record):
                raise NodeError(
                    f"link {hook.link} runs program {program.info.id} ({program.info.name}, tag {program.info.tag}), "
                    f"and {record.version} has another there (tag {noted.tag}): the daemon's own loader has put "
                    f"another release there; unload hitless and adopt that one, or let it start {record.version}",
                    link=hook.link,
                    program=program.info.id,
                )
            if seen[hook.program].id in own:
                replaced.append(ReplacedProgram(noted.id, hook.program, record.generation, noted.tag))
                seen[hook.program] = PinnedProgram(program.info.id, program.info.tag)
                _pin_over(program, node.current / "progs" / hook.program)
                for name, held in _new_variables(node, record, hook.program, program):
                    maps[name] = msgspec.structs.replace(maps[name], id=held.info.id)
                    _pin_over(held, map_pin(node.current, name))
                    held.close()
    if seen != record.pinned_programs:
        renewed = msgspec.structs.replace(
            record, pinned_programs=seen, pinned_maps=maps, replaced_programs=tuple(replaced)
        )
        write_record(path, renewed)


def _new_variables(node: Node, record: Record, name: str, program: Program) -> Iterator[tuple[str, Map]]:
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


def _pin_over(one: Map | Program, path: Path) -> None:
    """Replace what is pinned there in one step."""
    beside = path.with_name(f"{path.name}~")
    if beside.exists():
        remove_tree(beside)
    one.pin(beside)
    move(beside, path)
