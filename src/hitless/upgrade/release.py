"""The last release as one that can be applied again: what is pinned of it, and the rules for the way back. Pure.

Its objects are not kept, and need not be: its programs are pinned, and bound to its maps. What is wanted is what a
manifest says. How entries come back is the reverse of how they came; what else holds for its fields is the release's
own word. A ``was`` of its own manifest is passed over: that told of the release before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from hitless.attach import Attach
from hitless.bundle import Bundle, BundleObject
from hitless.carry import is_global
from hitless.layout.diff import MapDiff, diff_maps, resolve, sources_of
from hitless.layout.model import Int, MapSpec
from hitless.layout.model import Record as RecordType
from hitless.layout.rules import INNER, FieldRule, MapRules, bind_old
from hitless.layout.variables import diff_sections
from hitless.upgrade.model import Generation, Record

__all__ = ["last_release"]

_KEY = "key."


def last_release(previous: Generation, current: Generation, path: Path) -> Bundle:
    """The release of ``previous``, pinned at ``path``, with the rules that lead from ``current`` to it.

    Raises LayoutError if the rules by which ``current`` came do not fit what is there.
    """
    record, arrival = previous.record, current.record.rules
    maps = {name: msgspec.structs.replace(spec, name=name) for name, spec in record.maps.items()}
    newer = {name: live.spec for name, live in current.maps.items()}
    became = _matched(maps, newer, arrival)
    for name, laters in became.items():
        for later in laters:
            maps[name] = bind_old(maps[name], _arrived(name, later, arrival))
    rules = {
        name: _way_back(name, maps[name], became.get(name, {}), arrival, record.own_rules.get(name, MapRules()))
        for name in maps
    }
    for name, fields in _variables(maps, newer, arrival).items():
        rules[name] = msgspec.structs.replace(rules[name], fields=_merged(fields, rules[name].fields))
    for name, own in record.own_rules.items():  # what the release says of maps that only the running one has
        rules.setdefault(name, MapRules(on_loss=own.on_loss))
    for name in record.unwritten:
        rules[name] = msgspec.structs.replace(rules[name], programs="read")
    return Bundle(
        path=path,
        name=record.name,
        version=record.version,
        digest=record.digest,
        objects=tuple(BundleObject(spec, b"") for spec in record.objects),
        maps=maps,
        programs=record.programs,
        attach=_attach(record, current.record),
        rules={name: rule for name, rule in rules.items() if rule != MapRules()},
        converters=current.record.converters,
        cutover=record.cutover,
        public=record.public,
    )


def _matched(
    old: Mapping[str, MapSpec], new: Mapping[str, MapSpec], rules: Mapping[str, MapRules]
) -> dict[str, dict[str, MapDiff]]:
    """What each old map became: the differences from it by new name, by old name."""
    out: dict[str, dict[str, MapDiff]] = {}
    for diff in diff_maps(list(old.values()), list(new.values()), rules):
        for was, part in zip(sources_of(diff), diff.parts or (diff,), strict=True):
            if diff.verdict not in ("added", "removed") and was in old and is_global(was) == is_global(diff.name):
                out.setdefault(was, {})[diff.name] = part
    return out


def _arrived(name: str, later: str, arrival: Mapping[str, MapRules]) -> MapRules:
    """The rules by which map ``name`` became ``later``, or a part of it."""
    came = arrival.get(later, MapRules())
    return came.sources.get(name, came)


def _way_back(
    name: str, spec: MapSpec, became: Mapping[str, MapDiff], arrival: Mapping[str, MapRules], mine: MapRules
) -> MapRules:
    """The rules for one map; those for variables come on top. ``mine`` are its release's own."""
    if len(became) <= 1:
        later = next(iter(became), name)
        rules = _way_back_of(name, spec, _arrived(name, later, arrival), mine)
        split = bool(arrival.get(later, MapRules()).sources)  # then one that keeps its name has to say so
        return msgspec.structs.replace(rules, was=later if later != name or split else None)
    # Several maps are to be one again. Unless each had some of the entries, every one has a part of each entry.
    came = {later: _arrived(name, later, arrival) for later in became}
    sources = {later: _way_back_of(name, spec, came[later], mine) for later in became}
    sources = {
        later: msgspec.structs.replace(rule, was=later, fields=_without_defaults(rule.fields, became[later], spec))
        for later, rule in sources.items()
    }
    said = {rule.on_collision for rule in sources.values()}
    policy = said.pop() if len(said) == 1 else None
    if policy is None:
        policy = "merge" if _disjoint(list(became.values()), spec.value_size) else "error"
    return MapRules(
        on_loss=mine.on_loss,
        on_collision=policy,
        fields={path: FieldRule(merge=rule.merge) for one in sources.values() for path, rule in one.fields.items()},
        group=next((rule.group for rule in sources.values() if rule.group), None),
        sources={
            later: msgspec.structs.replace(rule, apart=came[later].function() is not None, on_collision=policy)
            for later, rule in sources.items()
        },
    )


def _without_defaults(
    fields: Mapping[str, FieldRule], diff: MapDiff, spec: MapSpec
) -> dict[str, FieldRule]:
    """The same rules, but that a field which another of the maps brings has no default, which would stand before it."""
    out = {path: msgspec.structs.replace(rule, default=None) for path, rule in fields.items()}
    for change in diff.changes:
        found = resolve(spec.value, change.path) if change.kind == "removed" and spec.value is not None else None
        if found is not None and isinstance(found[0], Int):
            out[change.path] = msgspec.structs.replace(out.get(change.path, FieldRule()), default=0)
    return out


def _way_back_of(name: str, spec: MapSpec, came: MapRules, mine: MapRules) -> MapRules:
    """The reverse of the rules by which a map ``came``."""
    turned = {} if is_global(name) else _turned(came.fields, spec)
    fields = {path: FieldRule(merge=rule.merge, default=rule.default) for path, rule in mine.fields.items()}
    return MapRules(
        on_loss=mine.on_loss,
        fields=_merged(turned, fields),
        on_collision=mine.on_collision or came.on_collision,
        convert=came.convert,
        functions=came.functions,
        group=mine.group or came.group,
        turned=came.convert is not None and not came.turned,
        apart=came.apart,
    )


def _disjoint(diffs: Sequence[MapDiff], size: int) -> bool:
    """Whether no byte of a value of ``size`` bytes went to two of the maps that one was split into."""
    taken = np.zeros(size, np.bool_)
    for diff in diffs:
        if diff.value is None:
            return False
        reached = np.frombuffer(bytes(diff.value.inverse().written()), np.uint8) != 0
        if (taken & reached).any():
            return False
        taken |= reached
    return True


def _turned(fields: Mapping[str, FieldRule], spec: MapSpec) -> dict[str, FieldRule]:
    """Rules for the fields of the newer layout as rules for those of ``spec``, as far as that has them."""
    turned = {rule.was or path: FieldRule(path if rule.was else None, rule.merge) for path, rule in fields.items()}
    return {path: rule for path, rule in turned.items() if _has(spec, path)}


def _has(spec: MapSpec, path: str) -> bool:
    if path.startswith(INNER) and spec.inner is not None:
        return _has(spec.inner, path.removeprefix(INNER))
    if spec.value is not None and (resolve(spec.value, path) is not None or _is_whole(spec, path)):
        return True
    return path.startswith(_KEY) and spec.key is not None and resolve(spec.key, path.removeprefix(_KEY)) is not None


def _is_whole(spec: MapSpec, path: str) -> bool:
    return path == "value" and not isinstance(spec.value, RecordType)


def _variables(
    old: Mapping[str, MapSpec], new: Mapping[str, MapSpec], arrival: Mapping[str, MapRules]
) -> dict[str, dict[str, FieldRule]]:
    """Rules for the variables of the older release, by section: where each has gone, and how it is merged."""
    out: dict[str, dict[str, FieldRule]] = {}
    for section in diff_sections(old.values(), new.values(), arrival):
        name = section.diff.name
        fields = arrival.get(name, MapRules()).fields
        for pair in section.pairs:
            if not is_global(pair.source):
                continue
            found = out.setdefault(pair.source, {})
            rule = fields.get(pair.new.name, FieldRule())
            moved = (pair.source, pair.old.name) != (name, pair.new.name)
            if moved or rule.merge is not None:
                found[pair.old.name] = FieldRule(f"{name}.{pair.new.name}" if moved else None, rule.merge)
            prefixes = f"{pair.new.name}.", f"{pair.new.name}["
            inside = {path: each for path, each in fields.items() if path.startswith(prefixes)}
            found |= _turned(inside, old[pair.source])
    return out


def _merged(turned: Mapping[str, FieldRule], own: Mapping[str, FieldRule]) -> dict[str, FieldRule]:
    """The release's own word on its fields, with where they come from."""
    out = dict(turned)
    for path, rule in own.items():
        came = turned.get(path, FieldRule())
        out[path] = FieldRule(came.was, rule.merge or came.merge, rule.default)
    return {path: rule for path, rule in out.items() if rule != FieldRule()}


def _attach(record: Record, current: Record) -> tuple[Attach, ...]:
    """The entries of the older release, and the links that they have now: under another name if that is the only way.

    Of two entries with the same hook and target nobody can say which of two new names is whose.
    """
    names, taken = {entry.link for entry in record.attach}, {entry.link for entry in current.attach}
    places = Counter(_place(entry, record) for entry in record.attach if entry.link not in taken)
    out = []
    for entry in record.attach:
        here = _place(entry, record)
        renamed = [one.link for one in current.attach if one.link not in names and _place(one, current) == here]
        alone = entry.link not in taken and len(renamed) == 1 and places[here] == 1
        out.append(msgspec.structs.replace(entry, was=renamed[0] if alone else None))
    return tuple(out)


def _place(entry: Attach, record: Record) -> tuple[str, str, str | None, str]:
    return entry.hook, entry.target, entry.netns, entry.attach_type(record.programs[entry.program])
