"""What the kernel still has of earlier generations, and what keeps it there.

Only what a record names by its id is called ours: a map or program that is in no record may be anybody's.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from hitless.errors import KernelError
from hitless.kernel.links import all_links
from hitless.kernel.maps import Map
from hitless.kernel.processes import holders_of
from hitless.kernel.programs import Program
from hitless.upgrade.model import Generation, NodeState
from hitless.upgrade.node import Node

__all__ = ["Pins", "Remnant", "find_remnants", "pinned_under", "remnant_problems"]

_FREEING = 0.1  # seconds that the kernel may take to free what nothing refers to any more: it waits for RCU


class Remnant(msgspec.Struct, frozen=True):
    """A ``map`` or ``program`` of an earlier ``generation``; ``memory`` in bytes, as the kernel tells.

    ``pinned`` tells whether a pin under the root refers to it. ``processes`` hold it by a descriptor, ``links`` run it
    and are none of ours, ``programs`` are earlier ones that use it. With none of these, something holds it that cannot
    be seen: a pin elsewhere, an attachment without a link, a connection that has a struct_ops, a socket that keeps
    the program of a map, a slot of a program array, or mapped memory.
    """

    kind: str
    id: int
    name: str
    generation: int
    memory: int
    pinned: bool = False
    processes: tuple[int, ...] = ()
    links: tuple[int, ...] = ()
    programs: tuple[int, ...] = ()


class Pins(msgspec.Struct, frozen=True):
    """Ids of what is pinned under some directories; ``used`` are the maps that the pinned programs use."""

    maps: frozenset[int]
    programs: frozenset[int]
    used: frozenset[int]


def find_remnants(node: Node, state: NodeState) -> tuple[Remnant, ...]:
    """Maps and programs that the running record says were replaced, as far as something still refers to them.

    Raises KernelError (EPERM without CAP_SYS_ADMIN, which finding objects by id takes).
    """
    if state.current is None:
        return ()
    own = {link.id for link in state.links.values()}
    found = _find(node, state.current, own)
    if any(not (one.processes or one.links or one.programs or one.pinned) for one in found):
        time.sleep(_FREEING)
        found = _find(node, state.current, own)
    return found


def _find(node: Node, current: Generation, own: Collection[int]) -> tuple[Remnant, ...]:
    record = current.record
    pins = pinned_under(node.current, node.previous)
    links = _links_by_program(own)
    out: list[Remnant] = []
    using: dict[int, set[int]] = {}
    for old in record.replaced_programs:
        with suppress(KernelError), Program.by_id(old.id) as program:
            if program.info.tag == old.tag and old.id not in {one.id for one in current.programs.values()}:
                out.append(
                    Remnant("program", old.id, old.name, old.generation, program.memory, old.id in pins.programs,
                            links=links.get(old.id, ()))
                )  # fmt: skip
                for used in program.map_ids:
                    using.setdefault(used, set()).add(old.id)
    for entry in record.replaced:
        if entry.id not in pins.maps | pins.used:
            with suppress(KernelError), Map.by_id(entry.id) as held:
                programs = tuple(sorted(using.get(entry.id, ())))
                out.append(
                    Remnant("map", entry.id, entry.name, entry.generation, held.memory, programs=programs)
                )  # fmt: skip
    holders = holders_of([(one.kind, one.id) for one in out])
    told = [msgspec.structs.replace(one, processes=holders[one.kind, one.id]) for one in out]
    return tuple(one for one in told if not one.pinned or one.processes or one.links)


def remnant_problems(remnants: Collection[Remnant]) -> Iterator[str]:
    """Old programs that still run on somebody's link: traffic passes them beside the running release's, or instead."""
    for one in remnants:
        for link in one.links:
            yield (
                f"program {one.id} ({one.name}) of generation {one.generation} still runs on link {link}, which "
                f"hitless did not make: find out who did (bpftool link show id {link}), and let them take it off "
                f"(bpftool link detach id {link})"
            )


def _links_by_program(own: Collection[int]) -> Mapping[int, tuple[int, ...]]:
    """Links that run somewhere, other than those with the ids ``own``, by the program that they run."""
    found: dict[int, tuple[int, ...]] = {}
    for link in all_links():
        if link.id not in own and not link.is_dead and link.type != "struct_ops":  # which has a map's id
            found[link.program_id] = (*found.get(link.program_id, ()), link.id)
    return found


def pinned_under(*directories: Path) -> Pins:
    """What is pinned in these generations: among maps, variables and programs."""
    maps, programs, used = set(), set(), set()
    for directory in directories:
        for room in ("maps", "data"):
            for path in _pins(directory / room):
                with Map.open(path) as held:
                    maps.add(held.info.id)
        for path in _pins(directory / "progs"):
            with Program.open(path) as program:
                programs.add(program.info.id)
                used |= program.map_ids
    return Pins(frozenset(maps), frozenset(programs), frozenset(used))


def _pins(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
