"""Giving back what an upgrade left behind: the last generation, and the rests of upgrades that were killed.

Only what is ours goes: what hitless puts under its root, under names and with ids that a record has. Something else in
there, and nothing goes. Links and the running generation stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import msgspec

from hitless.errors import KernelError, LossNotAllowedError, NodeError
from hitless.kernel.bpffs import remove_tree, require_bpffs
from hitless.kernel.links import all_links
from hitless.kernel.maps import Map
from hitless.kernel.processes import holders_of
from hitless.kernel.programs import Program
from hitless.upgrade.attached import open_attached
from hitless.upgrade.drift import interrupted, strangers
from hitless.upgrade.model import LeftRing, NodeState, Record
from hitless.upgrade.node import Node, foreign_error
from hitless.upgrade.record import map_pin, read_record
from hitless.upgrade.remnants import pinned_under
from hitless.upgrade.staging import give_up, remove_last
from hitless.upgrade.steps import in_step

__all__ = ["Garbage", "GarbageItem", "gc"]

_SCRATCH = ("base", "back")
_ROOMS = ("maps", "data", "progs")


class GarbageItem(msgspec.Struct, frozen=True):
    """A pin, or a directory that had none: ``kind`` is ``map``, ``program``, ``link`` or ``directory``.

    ``memory`` are the bytes that the kernel holds for it, which come back unless ``kept_by`` says what else refers to
    it, as far as that can be seen: a pin elsewhere, mapped memory, an attachment without a link, or a connection that
    has a struct_ops cannot.
    """

    path: str
    kind: str
    why: str
    id: int | None = None
    name: str = ""
    memory: int = 0
    kept_by: str | None = None


class Garbage(msgspec.Struct, frozen=True):
    """What gc removes, or in a ``dry_run`` would. ``freed`` are the bytes of all that nothing else keeps.

    ``version`` is the release of the last generation, if that goes. ``left`` are its ring buffers that hold unread
    bytes, ``blocked`` those of them whose bytes nobody can read any more then, and nobody allowed to be lost.
    """

    root: str
    dry_run: bool
    items: tuple[GarbageItem, ...] = ()
    freed: int = 0
    version: str | None = None
    left: tuple[LeftRing, ...] = ()
    blocked: tuple[str, ...] = ()
    schema: int = 1


@in_step("gc")
def gc(node: Node, dry_run: bool = False, allow_loss: Collection[str] = (), wait: float = 10.0) -> Garbage:
    """Drop the last generation, the rest of an upgrade that had switched no hook, dead links, and scratch pins.

    Going back to the last generation is not possible afterwards. ``allow_loss`` names ring buffers of it whose unread
    bytes may be lost. Waits up to ``wait`` seconds for an upgrade of the same root; a ``dry_run`` does as well.

    Raises LossNotAllowedError for unread bytes, NodeError if something foreign is where gc would remove it, BusyError,
    and InterruptedUpgradeError after an upgrade was killed that had begun to switch hooks; then nothing is removed.
    """
    require_bpffs(node.root)
    if not node.root.exists():
        return Garbage(str(node.root), dry_run)
    with node.lock(wait):
        state = node.observe()
        _refuse_unfinished(node, state)
        moved = state.recovery == "put-back"  # by a rollback that was killed: it is the last generation still
        if moved and not dry_run:
            give_up(node)
            state, moved = node.observe(), False
        last = node.next if moved else node.previous
        pins = [*_last(last), *_rest(node, state), *_scratch(node), *_dead_links(node, state)]
        found = _judge(node, state, pins, dry_run, allow_loss)
        if dry_run:
            return found
        _refuse_loss(found)
        for pin in pins:
            if pin.kind == "link":
                pin.path.unlink()
        remove_tree(node.next)
        for name in _SCRATCH:
            remove_tree(node.current / name)
        remove_last(node.previous)
        return found


class _Pin(NamedTuple):
    path: Path
    kind: str
    why: str


def _refuse_unfinished(node: Node, state: NodeState) -> None:
    if state.current is not None and state.current.record.phase != "committed":
        raise interrupted(node, state.current.record.version, committed=True)
    if state.unfinished is not None and not state.abandoned:
        raise interrupted(node, state.unfinished.version, committed=False)


def _refuse_loss(found: Garbage) -> None:
    if not found.blocked:
        return
    unread = {ring.name: ring.unread for ring in found.left}
    lines = [
        f"{unread[name]} bytes in the ring buffer {name} of {found.version}, which nobody read and nobody holds open"
        for name in found.blocked
    ]
    options = " ".join(f"--allow-loss {name}" for name in found.blocked)
    raise LossNotAllowedError(
        f"removing {found.root}/previous would lose {', '.join(lines)}; nothing was removed: read them, or if that is "
        f"fine, say so: {options}",
        maps=list(found.blocked),
    )


def _last(directory: Path) -> Iterator[_Pin]:
    """The pins of the last generation, in ``directory``. Raises NodeError unless all of them are its record's."""
    pins = list(_pins(directory))
    if not (directory / "record").exists():
        if pins:
            raise NodeError(
                f"{directory} has no record, so nobody can tell whose its pins are: look at them, then remove it "
                f"(rm -r {quote(str(directory))})",
                path=str(directory),
            )
        if directory.exists():
            yield _Pin(directory, "directory", "last generation")
        return
    record = read_record(directory / "record")
    foreign = [*strangers(directory, record), *_replaced(directory, record)]
    if foreign:
        raise foreign_error(foreign[0])
    for path, kind in pins:
        yield _Pin(path, kind, "last generation")
    yield _Pin(directory / "record", "map", "last generation")


def _replaced(directory: Path, record: Record) -> Iterator[Path]:
    """Pins under a name of the record that are another map or program than it says."""
    noted = {map_pin(directory, name): one.id for name, one in record.pinned_maps.items()}
    noted |= {directory / "progs" / name: one.id for name, one in record.pinned_programs.items()}
    for path, kind in _pins(directory):
        if path.parent.name in _ROOMS:
            with _open(path, kind) as pinned:
                if noted.get(path, pinned.info.id) != pinned.info.id:
                    yield path


def _rest(node: Node, state: NodeState) -> Iterator[_Pin]:
    """What is left of an upgrade that had switched no hook: what recovery would remove.

    Raises NodeError for a pin that is not its record's; without a record, all of it is the rest of a removal.
    """
    if state.recovery != "remove":
        return
    pins = list(_pins(node.next))
    if state.unfinished is not None:
        for path in strangers(node.next, state.unfinished):
            raise foreign_error(path)
        pins.append((node.next / "record", "map"))
    for path, kind in pins:
        yield _Pin(path, kind, "rest of an upgrade that did not come to its cutover")
    if not pins:
        yield _Pin(node.next, "directory", "rest of an upgrade that did not come to its cutover")


def _scratch(node: Node) -> Iterator[_Pin]:
    for name in _SCRATCH:
        if (node.current / name).is_dir():
            pins = [path for path in sorted((node.current / name).rglob("*")) if not path.is_dir()]
            for path in pins:
                yield _Pin(path, "map", "scratch of an upgrade")
            if not pins:
                yield _Pin(node.current / name, "directory", "scratch of an upgrade")


def _dead_links(node: Node, state: NodeState) -> Iterator[_Pin]:
    """Links that run nowhere any more, on a hook of ours or with a program of ours."""
    if state.current is None:
        return
    record = state.current.record
    names = {hook.link for hook in record.hooks}
    programs = {one.id for one in record.replaced_programs} | {one.id for one in state.current.programs.values()}
    for name, link in state.links.items():
        if link.is_dead and (name in names or link.program_id in programs):
            yield _Pin(node.links / name, "link", "link that runs nowhere")


def _pins(generation: Path) -> Iterator[tuple[Path, str]]:
    """All that is pinned in a generation, but its record, each with its kind."""
    kinds = {"progs": "program", "adopted": "program", "links": "link"}
    for room in ("maps", "data", "progs", "base", "back", "adopted", "links"):
        if (generation / room).is_dir():
            kind = kinds.get(room, "map")
            yield from ((path, kind) for path in sorted((generation / room).rglob("*")) if not path.is_dir())


def _open(path: Path, kind: str) -> Map | Program:
    return Program.open(path) if kind == "program" else Map.open(path)


def _judge(
    node: Node, state: NodeState, pins: Collection[_Pin], dry_run: bool, allow_loss: Collection[str]
) -> Garbage:
    """The pins as items, with their memory and what else keeps them."""
    seen: dict[Path, tuple[int, str, int]] = {}
    uses: dict[int, frozenset[int]] = {}
    for pin in pins:
        if pin.kind in ("map", "program"):
            with _open(pin.path, pin.kind) as held:
                seen[pin.path] = (held.info.id, held.info.name, held.memory)
                if isinstance(held, Program):
                    uses[held.info.id] = held.map_ids
    keepers = _Keepers(node, pins, seen, uses)
    items, freed = [], {}
    for pin in pins:
        number, name, memory = seen.get(pin.path, (None, "", 0))
        kept = keepers.of(pin.kind, number) if number is not None else None
        items.append(GarbageItem(str(pin.path), pin.kind, pin.why, number, name, memory, kept))
        if kept is None:
            freed[pin.kind, number] = memory  # one map may be pinned twice
    return Garbage(
        root=str(node.root),
        dry_run=dry_run,
        items=tuple(items),
        freed=sum(freed.values()),
        version=state.previous,
        left=state.left,
        blocked=tuple(ring.name for ring in state.left if not ring.holders and ring.name not in allow_loss),
    )


class _Keepers:
    """What refers to maps and programs beside the pins that go."""

    def __init__(
        self,
        node: Node,
        pins: Collection[_Pin],
        seen: Mapping[Path, tuple[int, str, int]],
        uses: Mapping[int, frozenset[int]],
    ) -> None:
        going = {pin.path for pin in pins if pin.kind == "link"}
        self._stays = pinned_under(node.current)
        self._links = _running(node, going) if uses else {}
        kinds = {(pin.kind, seen[pin.path][0]) for pin in pins if pin.path in seen}
        self._holders = holders_of(sorted(kinds))
        self._users = {
            number: program
            for program, maps in uses.items()
            if self.of("program", program) is not None
            for number in maps
        }

    def of(self, kind: str, number: int) -> str | None:
        """In words, or None if nothing can be seen."""
        if number in (self._stays.programs if kind == "program" else self._stays.maps | self._stays.used):
            return "the running generation"
        if kind == "program" and number in self._links:
            return f"link {self._links[number]}"
        if pids := self._holders.get((kind, number)):
            return f"{'process' if len(pids) == 1 else 'processes'} {', '.join(map(str, pids))}"
        if kind == "map" and number in self._users:
            return f"program {self._users[number]}"
        return None


def _running(node: Node, going: Collection[Path]) -> dict[int, int]:
    """The links that keep programs, by the id of the program, but for the pins that go."""
    dead = set()
    for path in going:
        with open_attached(path.parent, path.name) as link:
            dead.add(link.info.id)
    found: dict[int, int] = {}
    with suppress(KernelError):  # which takes CAP_SYS_ADMIN; the memory is only told
        found = {link.program_id: link.id for link in all_links() if link.id not in dead and link.type != "struct_ops"}
    return found
