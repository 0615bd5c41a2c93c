"""Making ``next/``: anew from a bundle, or from ``previous/``, which is moved there. And giving it up again.

Which states a kill can leave in between, and what they mean, is told in :mod:`hitless.upgrade.phases`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from hitless.bundle import Bundle, unite_maps
from hitless.carry import CGROUP_STORAGE, emptied, is_global
from hitless.errors import UnsupportedError
from hitless.kernel.bpffs import make_directory, move, remove_tree
from hitless.kernel.maps import Map, is_alive
from hitless.kernel.programs import Program, load_object
from hitless.layout.model import MapSpec
from hitless.upgrade.drift import with_ids
from hitless.upgrade.model import Former, Generation, HookPlan, Plan, Record, ReplacedMap
from hitless.upgrade.node import Node
from hitless.upgrade.plan import hooks_of
from hitless.upgrade.record import create_record, map_pin, read_record, write_record
from hitless.upgrade.reset import empty
from hitless.upgrade.unwritten import prove_unwritten

__all__ = ["Built", "build_next", "give_up", "open_programs", "remove_last", "restage_last"]


class Built(msgspec.Struct, frozen=True):
    """A generation in ``next/``: its record, and its maps and programs by name."""

    record: Record
    maps: dict[str, Map]
    programs: dict[str, Program]


def build_next(node: Node, bundle: Bundle, decided: Plan, current: Generation | None) -> Built:
    """Pin kept maps again, create the others, load all programs: the verifier accepts, nothing live changes.

    Raises KernelError, UnsupportedError, BundleError; what was made until then stays.
    """
    make_directory(node.next)
    record = Record(
        generation=decided.generation,
        name=bundle.name,
        version=bundle.version,
        digest=bundle.digest,
        phase="staging",
        objects=tuple(item.spec for item in bundle.objects),
        maps=bundle.maps,
        hooks=hooks_of(decided.hooks),
        attach=bundle.attach,
        cutover=bundle.cutover,
        plan=decided,
        rules=bundle.rules,
        own_rules=bundle.rules,
        converters=bundle.converters,
        replaced=_replaced(decided, current, ()),
        public=bundle.public,
    )
    create_record(node.next / "record", record)
    for directory in ("maps", "data", "progs", "base"):
        make_directory(node.next / directory)
    maps: dict[str, Map] = {}
    programs: dict[str, Program] = {}
    for entry in decided.maps:
        if entry.action == "keep":
            maps[entry.name] = Map.open(map_pin(node.current, entry.was or entry.name))
    for item in bundle.objects:
        sections = {name: spec for name, spec in unite_maps([item.spec]).items() if is_global(name)}
        loaded = load_object(item.data, item.spec.name, maps, sections, item.spec.programs)
        maps = {**loaded.maps, **maps}
        programs.update(loaded.programs)
    for name, rule in bundle.rules.items():
        for slot, leaf in rule.slots.items():  # whole before anybody can jump by it
            maps[name].update(slot.to_bytes(4, sys.byteorder), programs[leaf].fd.to_bytes(4, sys.byteorder))
    _refuse_foreign_storage(decided.hooks, maps, programs, current)
    unwritten = [name for item in bundle.objects for name in prove_unwritten(item, bundle.rules, maps)]
    record = msgspec.structs.replace(record, unwritten=tuple(dict.fromkeys(unwritten)))
    for name, held in maps.items():
        held.pin(map_pin(node.next, name))
    for name, program in programs.items():
        program.pin(node.next / "progs" / name)
    return Built(with_ids(record, maps, programs, current), maps, programs)


def restage_last(node: Node, release: Bundle, decided: Plan, current: Generation) -> Built:
    """Move ``previous/`` to ``next/`` and empty those of its maps that are going to be filled again.

    ``release`` is what :func:`hitless.upgrade.release.last_release` made of it. Raises KernelError, UnsupportedError;
    what was done until then stays.
    """
    move(node.previous, node.next)
    former = read_record(node.next / "record")
    maps = {name: Map.open(map_pin(node.next, name)) for name in former.maps}
    programs = open_programs(node.next)
    _refuse_foreign_storage(decided.hooks, maps, programs, current)
    own = {held.info.id for held in maps.values()}
    record = msgspec.structs.replace(
        with_ids(former, maps, programs, current),
        generation=decided.generation,
        phase="staging",
        maps={name: _typed(spec, release.maps[name]) for name, spec in former.maps.items()},
        plan=decided,
        rules=release.rules,
        converters=release.converters,
        replaced=_replaced(decided, current, own),
        hooks=hooks_of(decided.hooks),
        former=Former(
            former.generation, former.rules, former.converters, former.replaced, former.replaced_programs, former.hooks
        ),
    )
    make_directory(node.next / "base", exist_ok=True)
    # One of its own, since the old one may lack the room; renamed over that, so that there always is one.
    create_record(node.next / "base" / "record", record)
    move(node.next / "base" / "record", node.next / "record")
    for entry in decided.maps:
        held = maps.get(entry.name) if entry.action in ("convert", "discard") else None
        if held is not None and not is_global(entry.name) and emptied(held.info.type):
            empty(held)
    return Built(record, maps, programs)


def give_up(node: Node) -> None:
    """Undo before the cutover, or after everything was taken back: make ``next/`` go; may be repeated.

    It is removed, or it becomes ``previous/`` again, if it was that.
    """
    path = node.next / "record"
    record = read_record(path) if path.exists() else None
    if record is None or (record.former is None and record.phase != "committed"):
        remove_tree(node.next)
        return
    if record.former is not None:
        write_record(path, _as_before(record, record.former))
    for scratch in ("base", "back", "adopted", "links"):
        remove_tree(node.next / scratch)
    move(node.next, node.previous)


def remove_last(directory: Path) -> None:
    """Remove the last generation; its record goes last, so that one who is killed here is understood by the next."""
    if directory.exists():
        for path in directory.iterdir():
            if path.name != "record":
                remove_tree(path)
        remove_tree(directory)


def _typed(spec: MapSpec, bound: MapSpec) -> MapSpec:
    """The definition with types that the running release's manifest named for a map which carries none."""
    return msgspec.structs.replace(spec, key=bound.key, value=bound.value)


def _as_before(record: Record, former: Former) -> Record:
    return msgspec.structs.replace(
        record,
        generation=former.generation,
        phase="committed",
        plan=None,
        rules=former.rules,
        converters=former.converters,
        replaced=former.replaced,
        replaced_programs=former.replaced_programs,
        hooks=former.hooks,
        former=None,
    )


def open_programs(generation: Path) -> dict[str, Program]:
    """The programs pinned in a generation, by name."""
    return {path.name: Program.open(path) for path in (generation / "progs").iterdir()}


def _replaced(decided: Plan, current: Generation | None, own: Collection[int]) -> tuple[ReplacedMap, ...]:
    """The maps that nobody finds by a path after this upgrade and the last, as far as somebody holds them.

    ``own`` are maps that are found again.
    """
    if current is None:
        return ()
    kept = {entry.was or entry.name for entry in decided.maps if entry.action == "keep"}
    now = [
        ReplacedMap(live.info.id, name, current.record.generation)
        for name, live in current.maps.items()
        if name not in kept
    ]
    earlier = (entry for entry in current.record.replaced if entry.id not in own and is_alive(entry.id))
    return (*earlier, *now)


def _refuse_foreign_storage(
    hooks: Collection[HookPlan],
    maps: Mapping[str, Map],
    programs: Mapping[str, Program],
    current: Generation | None,
) -> None:
    """A link updated in place keeps the cgroup storage of the program that it was made with."""
    live = current.maps.values() if current else ()
    infos = [held.info for held in (*maps.values(), *live)]
    storage = {info.id for info in infos if info.type in CGROUP_STORAGE}
    for hook in hooks if storage else ():
        if hook.action == "update" and hook.hook != "struct_ops" and hook.expected is not None:
            with Program.by_id(hook.expected) as old:
                foreign = programs[hook.program].map_ids & storage - old.map_ids
            if foreign:
                raise UnsupportedError(
                    f"program {hook.program} uses cgroup storage that the program on link {hook.link} does not "
                    "use, and the kernel gives it only to programs that are newly attached; use cgrp_storage, or "
                    "give the hook a link name of its own",
                    feature="added cgroup storage",
                    link=hook.link,
                )
