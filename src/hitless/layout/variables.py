"""Global variables of two releases: which became which, across the sections of an object, and what is lost.

``.bss`` and ``.data`` are maps of one entry whose fields are variables. The compiler chooses their places, and their
section too: a variable that gets an initialiser goes from ``.bss`` to ``.data``. So variables match one by one: by a
rule's ``was`` or a ``hitless:was`` tag, by name within an object, and by name from one object to another where only
one variable on each side is called so. One that matches none starts with what the new object says, as all do when a
release starts.

``.rodata`` belongs to the release and ``.kconfig`` to the kernel: these are compared as they stand, and never carried.
They are frozen once programs are loaded, and the verifier has taken their values for granted.

A rule's ``was`` names a variable of the same object, or of any section with that in front: ``other.bss.total``. The
``was`` of a section itself names the old section, or the array of one entry, whose fields its variables were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from hitless.errors import LayoutError
from hitless.layout.diff import (
    Change,
    MapDiff,
    Verdict,
    _definition,
    diff_members,
    is_constant,
    match_names,
    phrases,
    same,
    section_of,
)
from hitless.layout.members import SPECIAL
from hitless.layout.model import Field, MapSpec, Record
from hitless.layout.rules import FieldRule, MapRules, parse_tags

__all__ = ["Pair", "Part", "SectionDiff", "diff_sections", "make_part"]


class Pair(msgspec.Struct, frozen=True):
    """A variable that is carried: where it was, in map ``source``, and where it is."""

    source: str
    old: Field
    new: Field


class Part(msgspec.Struct, frozen=True):
    """Variables that go from map ``source`` to one section.

    ``old`` and ``new`` are the maps' definitions with just these as fields; ``diff`` has the conversion of the whole
    values, which moves just these.
    """

    source: str
    old: MapSpec
    new: MapSpec
    rules: MapRules
    diff: MapDiff


class SectionDiff(msgspec.Struct, frozen=True):
    """How a section differs, or what becomes of one that is gone.

    ``pairs`` are the variables that types allow to be carried; ``losses`` say what is not. ``sources`` are the old
    maps that this speaks for.
    """

    diff: MapDiff
    pairs: tuple[Pair, ...] = ()
    losses: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()


#: Map and name of a variable.
_Place = tuple[str, str]


class _Variable(msgspec.Struct, frozen=True):
    map: str
    object: str
    field: Field

    @property
    def place(self) -> _Place:
        return self.map, self.field.name

    @property
    def former(self) -> tuple[str, ...]:
        return parse_tags(self.field.tags, self.field.name).was


def diff_sections(
    old: Iterable[MapSpec], new: Iterable[MapSpec], rules: Mapping[str, MapRules]
) -> tuple[SectionDiff, ...]:
    """Compare the sections of writable variables among all maps of two releases: new ones as given, then those gone.

    Raises :class:`LayoutError` as :func:`hitless.layout.diff.diff_map` does, and for a default of a whole variable.
    """
    everything, after = {spec.name: spec for spec in old}, {spec.name: spec for spec in new}
    # Without its variables on one side, a section can only be compared as a whole.
    whole = {name for specs in (everything, after) for name, spec in specs.items() if not _has_variables(spec)}
    before = {name: spec for name, spec in everything.items() if name not in whole}
    after = {name: spec for name, spec in after.items() if name not in whole}
    objects = {name: _object(spec) for name, spec in before.items()}
    for name, spec in after.items():
        was = rules.get(name, MapRules()).was
        if was is not None and was in everything and (was in before or _is_one_record(everything[was])):
            before[was] = everything[was]
            objects[was] = _object(spec)
    had = [_Variable(name, objects[name], field) for name, spec in before.items() for field in _fields(spec)]
    has = [_Variable(name, _object(spec), field) for name, spec in after.items() for field in _fields(spec)]
    matched = _matched(had, has, rules)
    main = _main(before, after, matched, rules)
    taken = {was.place for was in matched.values()}
    gone = {name: [one for one in had if one.map == name and one.place not in taken] for name in before}
    out = []
    for name, spec in after.items():
        pairs = [(one, matched.get(one.place)) for one in has if one.map == name]
        was = main.get(name)
        dropped = gone[was] if was is not None else []
        out.append(_section(before, spec, was, pairs, dropped, rules.get(name, MapRules())))
    for name, spec in before.items():
        if name not in main.values():
            losses = [Change(one.field.name, "removed", _spell(one), None, _dropped(one)) for one in gone[name]]
            diff = MapDiff(name, None, "removed", (Change("", "removed", spec.type, None), *losses))
            out.append(SectionDiff(diff, (), tuple(phrases(losses)), (name,)))
    return tuple(out)


def make_part(old: MapSpec, new: MapSpec, pairs: Sequence[Pair], rules: MapRules) -> Part:
    """What carries ``pairs`` from one map to a section; ``rules`` are those of the section."""
    before, after = _only(old, [pair.old for pair in pairs]), _only(new, [pair.new for pair in pairs])
    fields: dict[str, FieldRule] = {}
    for pair in pairs:
        fields |= _rules_of(pair.old, pair.new, rules)
    own = MapRules(fields=fields)
    changes, _, value = diff_members(_record(before), _record(after), own, new.order == "big")
    verdict: Verdict = "lossy" if any(change.loss for change in changes) else "lossless"
    was = old.name if old.name != new.name else None
    return Part(old.name, before, after, own, MapDiff(new.name, was, verdict, changes, None, value))


def _has_variables(spec: MapSpec) -> bool:
    return section_of(spec) is not None and not is_constant(spec) and _is_one_record(spec)


def _is_one_record(spec: MapSpec) -> bool:
    if spec.type != "array" or spec.max_entries != 1 or not isinstance(spec.value, Record) or spec.value.union:
        return False
    return spec.value.size == spec.value_size and all(field.name and not field.bits for field in spec.value.fields)


def _object(spec: MapSpec) -> str:
    return spec.name.removesuffix(section_of(spec) or "")


def _record(spec: MapSpec) -> Record:
    assert isinstance(spec.value, Record)  # only such maps come here
    return spec.value


def _fields(spec: MapSpec) -> tuple[Field, ...]:
    return _record(spec).fields


def _only(spec: MapSpec, fields: Sequence[Field]) -> MapSpec:
    chosen = tuple(sorted(fields, key=lambda field: field.offset))
    return msgspec.structs.replace(spec, value=msgspec.structs.replace(_record(spec), fields=chosen))


def _matched(
    had: Sequence[_Variable], has: Sequence[_Variable], rules: Mapping[str, MapRules]
) -> dict[_Place, _Variable]:
    """The old variable of each new one."""
    out: dict[_Place, _Variable] = {}
    taken: set[_Place] = set()

    def take(one: _Variable, was: _Variable) -> None:
        if one.place not in out and was.place not in taken:
            out[one.place] = was
            taken.add(was.place)

    by_path = {f"{one.map}.{one.field.name}": one for one in had}
    for one in has:
        if (was := _was(one, rules)) in by_path:
            take(one, by_path[str(was)])
    for name in dict.fromkeys(one.object for one in has):
        olds = [one for one in had if one.object == name and one.place not in taken]
        news = [one for one in has if one.object == name and one.place not in out]
        # Statics of several files that were linked into one object may share a name: then only in their section.
        twice = _twice(olds) | _twice(news)
        before = {f"{one.map} {one.field.name}" if one.field.name in twice else one.field.name: one for one in olds}
        after = {f"{one.map} {one.field.name}" if one.field.name in twice else one.field.name: one for one in news}
        told = {key: str(was) for key, one in after.items() if (was := _was(one, rules)) in before}
        found = match_names(
            {key: one.former for key, one in before.items()}, {key: one.former for key, one in after.items()}, told
        )
        for key, was_key in found.items():
            take(after[key], before[was_key])
    # Into another object only what can be meant by nothing else.
    several = _twice(has)
    alone = {one.field.name: one for one in had if one.field.name not in _twice(had)}
    alone_by_tag = {former: one for one in alone.values() for former in one.former}
    for one in has:
        if one.field.name not in several:
            for name in (one.field.name, *one.former):
                if name in alone:
                    take(one, alone[name])
            if one.field.name in alone_by_tag:
                take(one, alone_by_tag[one.field.name])
    return out


def _was(one: _Variable, rules: Mapping[str, MapRules]) -> str | None:
    rule = rules.get(one.map, MapRules()).fields.get(one.field.name)
    return rule.was if rule is not None else None


def _twice(variables: Iterable[_Variable]) -> set[str]:
    """Names that more than one of these have."""
    return {name for name, count in Counter(one.field.name for one in variables).items() if count > 1}


def _main(
    before: Mapping[str, MapSpec],
    after: Mapping[str, MapSpec],
    matched: Mapping[_Place, _Variable],
    rules: Mapping[str, MapRules],
) -> dict[str, str]:
    """The old section that each new one continues: of its name, as a rule says, or the only one it has variables of.

    Its map may be kept, and what is lost of it is told there.
    """
    out = {}
    for name in after:
        was = rules.get(name, MapRules()).was
        if was is not None and was in before and name not in before:
            out[name] = was
        elif name in before:
            out[name] = name
    for name, spec in after.items():
        sources = {was.map for (place, _), was in matched.items() if place == name}
        if name not in out and len(sources) == 1:
            (source,) = sources
            if source not in out.values() and section_of(before[source]) == section_of(spec):
                out[name] = source
    return out


def _section(
    before: Mapping[str, MapSpec],
    new: MapSpec,
    was: str | None,
    variables: Sequence[tuple[_Variable, _Variable | None]],
    dropped: Sequence[_Variable],
    rules: MapRules,
) -> SectionDiff:
    changes: list[Change] = []
    kernels: list[Change] = []
    pairs: list[Pair] = []
    old = before[was] if was is not None else None
    if old is not None:
        if old.name != new.name:
            changes.append(Change("", "renamed", old.name, new.name))
        changes += [
            msgspec.structs.replace(change, loss=f"every variable starts anew: {change.reason}")
            if change.reason else change
            for change in _definition(old, new)
        ]  # fmt: skip
    stopped = any(change.reason for change in changes)
    for one, other in variables:
        if other is None:
            _refuse_default(one.field, rules)
            changes.append(_added(one, dropped))
            continue
        found, kept_back = _compared(before[other.map], other.field, new, one.field, rules)
        if other.map != was:  # then its offset was another by chance
            changes.append(Change(one.field.name, "moved", other.map, new.name))
            found = tuple(change for change in found if (change.path, change.kind) != (one.field.name, "moved"))
        changes += found
        kernels += kept_back
        owned = isinstance(one.field.type, Record) and one.field.type.name in SPECIAL
        if not owned and not stopped and not any(change.reason for change in found):
            pairs.append(Pair(other.map, other.field, one.field))
    changes += [Change(one.field.name, "removed", _spell(one), None, _dropped(one)) for one in dropped]
    if old is not None and not changes and old.value_size != new.value_size:
        changes.append(Change("", "resized", f"{old.value_size} bytes", f"{new.value_size} bytes"))
    sources = (was,) if was is not None else ()
    real = [change for change in changes if (change.path, change.kind) != ("", "renamed")]
    if old is not None and not real and section_of(old) == section_of(new):
        named = was if was != new.name else None
        return SectionDiff(MapDiff(new.name, named, "identical", tuple(changes)), tuple(pairs), (), sources)
    if old is None and not any(other for _, other in variables):
        first = Change("", "added", None, new.type)
        return SectionDiff(MapDiff(new.name, None, "added", (first, *changes)), (), (), sources)
    changes += kernels
    losses = tuple(phrases(changes))
    verdict: Verdict = "lossy" if losses else "lossless"
    value = None
    if pairs and len({pair.source for pair in pairs}) == 1:
        value = make_part(before[pairs[0].source], new, pairs, rules).diff.value
    named = was if was != new.name else None
    return SectionDiff(MapDiff(new.name, named, verdict, tuple(changes), None, value), tuple(pairs), losses, sources)


def _compared(
    old: MapSpec, was: Field, new: MapSpec, now: Field, rules: MapRules
) -> tuple[tuple[Change, ...], tuple[Change, ...]]:
    """What changed of one variable, a loss said of what cannot be carried; and what of it belongs to the kernel."""
    _refuse_default(now, rules)
    before, after = _record(_only(old, [was])), _record(_only(new, [now]))
    own = MapRules(fields=_rules_of(was, now, rules))
    changes, kernels, _ = diff_members(before, after, own, new.order == "big")
    if not any(change.reason for change in changes):
        return changes, kernels
    why = next(change.reason for change in changes if change.reason)
    first = msgspec.structs.replace(changes[0], reason=why, loss=f"{now.name} starts anew: {why}")
    return (first, *(msgspec.structs.replace(change, loss=None) for change in changes[1:])), ()


def _rules_of(was: Field, now: Field, rules: MapRules) -> dict[str, FieldRule]:
    """The rules for one variable and what is inside, with the name that it was matched by."""
    inside = (f"{now.name}.", f"{now.name}[")
    fields = {path: rule for path, rule in rules.fields.items() if path == now.name or path.startswith(inside)}
    own = fields.pop(now.name, FieldRule())
    name = was.name if was.name != now.name else None
    if name is not None or own.merge is not None:
        fields[now.name] = msgspec.structs.replace(own, was=name)
    return fields


def _refuse_default(field: Field, rules: MapRules) -> None:
    rule = rules.fields.get(field.name)
    if parse_tags(field.tags, field.name).default is not None or (rule is not None and rule.default is not None):
        raise LayoutError(
            f"variable {field.name}: a default is for what entries lack; say what a variable starts with in C: "
            f"{field.name} = ...",
            field=field.name,
        )


def _added(one: _Variable, dropped: Sequence[_Variable]) -> Change:
    alike = [
        other.field.name for other in dropped
        if other.field.offset == one.field.offset and same(other.field.type, one.field.type)
    ]  # fmt: skip
    hint = f"if this is {alike[0]} under a new name, say so: hitless:was={alike[0]}" if alike else None
    return Change(one.field.name, "added", None, _spell(one), hint=hint)


def _dropped(one: _Variable) -> str:
    return f"{one.field.name} is dropped"


def _spell(one: _Variable) -> str:
    return one.field.type.name or "struct {...}"
