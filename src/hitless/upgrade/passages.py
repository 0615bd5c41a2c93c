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
from hitless.upgrade.copy import Carriage
from hitless.upgrade.model import Generation, MapPlan, Record
from hitless.upgrade.moving import aside
from hitless.upgrade.pace import Pace
from hitless.upgrade.record import map_pin, pin_name
from hitless.upgrade.section import carry_section
from hitless.upgrade.selected import Selected
from hitless.upgrade.together import carry_folded

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
        name = entry.name
        if entry.kind == "variables":
            carried[name] = _carry_section(sides, entry, record, maps[name], current, pace, fresh)
            continue
        new, rule = msgspec.structs.replace(record.maps[name], name=name), record.rules.get(name, MapRules())
        hooks = [hook for hook in record.plan.hooks if hook.moved and hook.target == name] if record.plan else []
        links, target = sides.new.parent / "links", maps[name]
        passages = []
        for was in entry.olds:
            old, own = current.maps[was].spec, rule.sources.get(was, rule)
            source = Map.open(map_pin(sides.old, was))
            passages.append(
                Passage(
                    name=name,
                    source=source,
                    target=target,
                    old=old,
                    new=new,
                    diff=diff_map(old, new, own),
                    rules=own,
                    pin=sides.new / "base" / name,
                    fresh=fresh,
                    lossy_allowed=entry.allowed,
                    writing=sides.writing,
                    pace=pace,
                    code=record.converters.get((own.convert or "").partition(":")[0], ""),
                    successors=successors,
                    heirs=_heirs(record, was),
                    source_aside=partial(aside, hooks, links, links, source) if hooks else None,
                    target_aside=partial(aside, hooks, links, sides.new / "links", target) if hooks else None,
                )
            )
        carried[name] = carry_folded(passages, rule) if entry.sources else CARRIERS[entry.kind](passages[0])
    _set_rivals(carried)
    return carried


def _heirs(record: Record, was: str) -> tuple[str, ...]:
    """The maps that take entries of the old map ``was``, if there are several."""
    plans = record.plan.maps if record.plan else ()
    found = [entry.name for entry in plans if entry.action in ("convert", "discard") and entry.olds == (was,)]
    return tuple(found) if len(found) > 1 else ()


def _set_rivals(carried: Mapping[str, Carrier]) -> None:
    """Have one heir of each map that is split look for entries that none of them takes."""
    for name, carrier in carried.items():
        source = carrier.source if isinstance(carrier, Carriage) else None
        if not isinstance(source, Selected):
            continue
        others = [carried.get(heir) for heir in source.heirs if heir != name]
        rivals = [one.source for one in others if isinstance(one, Carriage) and isinstance(one.source, Selected)]
        if source.heirs[0] == name and len(rivals) == len(others):
            source.rivals = tuple(rivals)


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
        (was, *others) = entry.olds
        alone = not others and not _heirs(record, was)  # else nobody can say which takes the place of which
        if current is not None and was in current.maps and entry.name in maps and alone:
            old, new = Map.open(map_pin(directory, was)), maps[entry.name]
            found[old.info.id, None], found[new.info.id, None] = new, old
    return found
