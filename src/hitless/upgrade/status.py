"""What runs under a pin root and whether it hangs together, as a value to print."""

from __future__ import annotations

import errno

import msgspec

from hitless.errors import BusyError, KernelError
from hitless.kernel.maps import Map
from hitless.upgrade.drift import (
    expected_program,
    half_done,
    hook_problem,
    public_problems,
    recovering,
    replaced_pins,
    unhooked,
)
from hitless.upgrade.holders import Holders, find_holders
from hitless.upgrade.model import LeftRing, NodeState
from hitless.upgrade.node import Node
from hitless.upgrade.public import path_problems
from hitless.upgrade.record import map_pin
from hitless.upgrade.remnants import Remnant, find_remnants, remnant_problems

__all__ = ["HookStatus", "MapStatus", "Status", "status"]

# Maps whose keys can be listed by batches, so that their entries can be counted.
_COUNTABLE = ("hash", "lru_hash", "lpm_trie")


class MapStatus(msgspec.Struct, frozen=True):
    """A live map. ``entries`` is None where they cannot be counted; ``layout`` says where its types come from."""

    name: str
    id: int
    type: str
    key_size: int
    value_size: int
    max_entries: int
    entries: int | None
    layout: str


class HookStatus(msgspec.Struct, frozen=True):
    """A hook: the program that runs on it now, by name if it is one of the running generation.

    ``netns`` is the network namespace of an interface, None for hitless' own.
    """

    link: str
    hook: str
    target: str
    attach_type: str
    program: str | None
    program_id: int | None
    netns: str | None = None


class Status(msgspec.Struct, frozen=True):
    """What is live. ``problems`` are sentences, each with what to do; empty when all is well.

    ``upgrading`` is the id of the process that upgrades right now: what is between two releases is no problem then.
    ``holders`` are the processes that hold the maps, and those that still hold maps which an upgrade has replaced.
    ``left`` are ring buffers of the last release that hold unread bytes; the next upgrade removes them. ``remnants``
    are maps and programs of earlier generations that the kernel still has though no pin here refers to them, and pinned
    programs of them that something else still uses.
    """

    root: str
    name: str | None
    generation: int | None
    version: str | None
    previous: str | None
    phase: str | None
    maps: tuple[MapStatus, ...]
    hooks: tuple[HookStatus, ...]
    problems: tuple[str, ...]
    upgrading: int | None = None
    holders: Holders = Holders()
    left: tuple[LeftRing, ...] = ()
    remnants: tuple[Remnant, ...] = ()
    schema: int = 1


def status(node: Node) -> Status:
    """Look at ``node`` and judge. Raises NodeError if the root cannot be read as one of hitless."""
    state, upgrading = node.observe_with_holder()
    problems = []
    found = half_done(node, state)
    if found is not None:
        problems.append(f"{found}: {recovering(node)}")
    if state.current is None:
        told = () if upgrading else tuple(problems)
        return Status(state.root, None, None, None, state.previous, None, (), (), told, upgrading)
    record = state.current.record
    maps = tuple(
        MapStatus(
            name=name,
            id=live.info.id,
            type=live.info.type,
            key_size=live.info.key_size,
            value_size=live.info.value_size,
            max_entries=live.info.max_entries,
            entries=_count(node, name) if live.info.type in _COUNTABLE else None,
            layout=live.source,
        )
        for name, live in state.current.maps.items()
    )
    pinned = {name: program.id for name, program in state.current.programs.items()}
    # A pin that was replaced says nothing of what runs on a hook; the record does.
    names = {number: name for name, number in pinned.items()}
    names |= {program.id: name for name, program in record.pinned_programs.items()}
    if not upgrading:
        problems += [*replaced_pins(node.current, state.current), *public_problems(node)]
        problems += path_problems(node, record)
    # Between two releases, links run the programs of one or the other: that is told already, and nobody else's doing.
    settled = record.phase == "committed" and (state.unfinished is None or state.abandoned)
    hooks = []
    for hook in record.hooks:
        link = state.links.get(hook.link)
        expected = expected_program(hook, record, pinned, link)
        runs = hook.program if link and link.program_id == expected else names.get(link.program_id) if link else None
        if hook.hook == "struct_ops":
            runs = hook.program if link and link.program_id == expected else None
        problem = hook_problem(hook, link, expected, node.links, record)
        if problem is not None and settled:
            problems.append(problem)
        hooks.append(
            HookStatus(
                link=hook.link,
                hook=hook.hook,
                target=hook.target,
                netns=hook.netns,
                attach_type=hook.attach_type,
                program=runs,
                program_id=link.program_id if link else None,
            )
        )
    if settled and not upgrading:
        problems += unhooked(record, state.links)
    remnants = () if upgrading else _remnants(node, state)
    problems += remnant_problems(remnants)
    return Status(
        root=state.root,
        name=record.name,
        generation=record.generation,
        version=record.version,
        previous=state.previous,
        phase=record.phase,
        maps=maps,
        hooks=tuple(hooks),
        problems=() if upgrading else tuple(problems),
        upgrading=upgrading,
        holders=find_holders(node, state.current),
        left=state.left,
        remnants=remnants,
    )


def _remnants(node: Node, state: NodeState) -> tuple[Remnant, ...]:
    try:
        return node.at_rest(lambda: find_remnants(node, state))
    except BusyError:
        return ()  # upgrade after upgrade: what is left changes all the time
    except KernelError as error:
        if error.facts["errno"] not in (errno.EPERM, errno.ENOENT):
            raise
        return ()  # without CAP_SYS_ADMIN, or of a generation that an upgrade has removed since it was seen


def _count(node: Node, name: str) -> int | None:
    try:
        with Map.open(map_pin(node.current, name)) as live:
            return sum(len(keys) for keys, _ in live.batches())
    except KernelError as error:
        if error.facts["errno"] != errno.ENOENT:
            raise
        return None  # an upgrade has dropped the map since it was seen
