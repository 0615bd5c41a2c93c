"""The carriers of an upgrade, made from its plan."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec

from hitless.carry import section_way
from hitless.errors import NodeError
from hitless.kernel.maps import Map
from hitless.layout.diff import diff_map
from hitless.layout.rules import MapRules
from hitless.layout.variables import diff_sections
from hitless.upgrade.carrier import Carrier, Passage, Successors
from hitless.upgrade.carriers import CARRIERS
from hitless.upgrade.model import Generation, MapPlan, Record
from hitless.upgrade.moving import aside
from hitless.upgrade.pace import Pace
from hitless.upgrade.record import map_pin, pin_name
from hitless.upgrade.section import carry_section

__all__ = ["Sides", "make_carriers"]


class Sides(msgspec.Struct, frozen=True):
    """The directories of the two generations, and what a dual write to both of them holds."""

    old: Path
    new: Path
    writing: threading.RLock


def make_carriers(
    sides: Sides, record: Record, maps: Mapping[str, Map], current: Generation | None, pace: Pace, fresh: bool
) -> dict[str, Carrier]:
    """A carrier for each map that the plan in ``record`` converts, from ``current`` to ``maps``.

    ``fresh`` is false if a process that was killed had filled what the carriers keep. Raises KernelError,
    ConverterError, NodeError if there is nothing to carry from.
    """
    successors = _successors(sides.old, record, maps, current)
    carried: dict[str, Carrier] = {}
    for entry in record.plan.maps if record.plan else ():
        if entry.action != "convert":
            continue
        if current is None:
            raise NodeError(f"map {entry.name} is to be converted, but nothing runs", map=entry.name)
        name, was = entry.name, entry.was or entry.name
        if entry.kind == "variables":
            carried[name] = _carry_section(sides, entry, record, maps[name], current, pace, fresh)
            continue
        old, new = current.maps[was].spec, msgspec.structs.replace(record.maps[name], name=name)
        rule = record.rules.get(name, MapRules())
        source, target = Map.open(map_pin(sides.old, was)), maps[name]
        hooks = [hook for hook in record.plan.hooks if hook.moved and hook.target == name] if record.plan else []
        links = sides.new.parent / "links"
        carried[name] = CARRIERS[entry.kind](
            Passage(
                name=name,
                source=source,
                target=target,
                old=old,
                new=new,
                diff=diff_map(old, new, rule),
                rules=rule,
                pin=sides.new / "base" / name,
                fresh=fresh,
                lossy_allowed=entry.allowed,
                writing=sides.writing,
                pace=pace,
                code=record.converters.get((rule.convert or "").partition(":")[0], ""),
                successors=successors,
                source_aside=partial(aside, hooks, links, links, source) if hooks else None,
                target_aside=partial(aside, hooks, links, sides.new / "links", target) if hooks else None,
            )
        )
    return carried


def _carry_section(
    sides: Sides, entry: MapPlan, record: Record, target: Map, current: Generation, pace: Pace, fresh: bool
) -> Carrier:
    old = {name: live.spec for name, live in current.maps.items()}
    new = {name: msgspec.structs.replace(spec, name=name) for name, spec in record.maps.items()}
    sections = diff_sections(old.values(), new.values(), record.rules)
    (section,) = (item for item in sections if item.diff.name == entry.name)
    passages = [
        Passage(
            name=entry.name,
            source=Map.open(map_pin(sides.old, part.source)),
            target=target,
            old=part.old,
            new=part.new,
            diff=part.diff,
            rules=part.rules,
            pin=sides.new / "base" / pin_name(entry.name) / str(index),
            fresh=fresh,
            lossy_allowed=entry.allowed,
            writing=sides.writing,
            pace=pace,
        )
        for index, part in enumerate(section_way(section, old, new, record.rules).parts)
    ]
    return carry_section(entry.name, passages)


def _successors(directory: Path, record: Record, maps: Mapping[str, Map], current: Generation | None) -> Successors:
    """The maps of both releases by what takes their place: outer maps may hold them, in slots of any key."""
    found: Successors = {}
    for entry in record.plan.maps if record.plan else ():
        was = entry.was or entry.name
        if current is not None and was in current.maps and entry.name in maps:
            old, new = Map.open(map_pin(directory, was)), maps[entry.name]
            found[old.info.id, None], found[new.info.id, None] = new, old
    return found
