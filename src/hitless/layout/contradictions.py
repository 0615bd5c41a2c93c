"""Whether what a release says about one map agrees with itself: its rules with its types and tags, two objects."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from hitless.errors import LayoutError
from hitless.layout.codec import encode
from hitless.layout.conversion import leaves
from hitless.layout.diff import diff_map, resolve
from hitless.layout.members import join
from hitless.layout.model import Array, Field, MapSpec, Record, Type
from hitless.layout.rules import INNER, FieldRule, MapRules, Tags, inner_rules, inner_spec, only_read, parse_tags

__all__ = ["check_rules", "differences"]


def check_rules(spec: MapSpec, rules: MapRules) -> None:
    """Hold the rules of a manifest against the map that they are for.

    Raises :class:`LayoutError`, whose ``facts["field"]`` is the path of the rule or None, for a rule that names no
    field, or one of a side whose type is not known, a default that the field cannot hold, a merge that it cannot have,
    and for a rule that contradicts a tag in the source: neither is taken for what was meant.
    """
    tags = parse_tags(spec.tags, f"map {spec.name}")
    if rules.was is not None and tags.was and rules.was not in tags.was:
        raise _clash(spec, None, "was", rules.was, " or ".join(tags.was))
    if rules.group is not None and tags.group not in (None, rules.group):
        raise _clash(spec, None, "group", rules.group, tags.group)
    if spec.type != "hash" and only_read(spec, rules):
        raise LayoutError(
            f"map {spec.name}: programs = \"read\" is for maps of type hash, whose copy it spares memory; a "
            f"{spec.type} map needs no such promise",
            map=spec.name,
            field=None,
        )
    inner = inner_spec(spec)
    if inner is not None:
        try:
            check_rules(inner, inner_rules(rules))
        except LayoutError as error:
            field = error.facts.get("field")
            raise LayoutError(error.message, map=spec.name, field=f"{INNER}{field}" if field else None) from error
    for path, rule in rules.fields.items():
        if inner is None or not path.startswith(INNER):
            _check_field(spec, path, rule)
    if spec.value is not None and any(rule.merge for rule in rules.fields.values()):
        try:
            leaves(spec.value, rules, spec.tags)
        except LayoutError as error:
            raise LayoutError(error.message, map=spec.name, field=error.facts.get("path")) from error


def differences(one: MapSpec, other: MapSpec) -> list[str]:
    """What two definitions of one map disagree about, in words; empty if they mean the same.

    A side whose type only one of them has, or neither, is no disagreement: both have the same size.
    """
    out = [
        f"{what} {getattr(one, name)} and {getattr(other, name)}"
        for name, what in (
            ("type", "type"), ("key_size", "key_size"), ("value_size", "value_size"), ("max_entries", "max_entries"),
            ("flags", "map_flags"), ("extra", "map_extra"), ("pinned_by_name", "pinning"),
        )
        if getattr(one, name) != getattr(other, name)
    ]  # fmt: skip
    if not out:
        # Names of types may differ: what they mean decides.
        for change in diff_map(_completed(one, other), _completed(other, one)).changes:
            if change.kind in ("inferred", "unknown"):
                continue
            what = f"{change.path}: {change.kind}, {change.old or 'nothing'} and {change.new or 'nothing'}"
            out.append(change.reason or what)
    for side, mine, yours in (("key", one.key, other.key), ("value", one.value, other.value)):
        if not out and mine is not None and yours is not None:
            mine_tags, yours_tags = dict(_tags(mine, side)), dict(_tags(yours, side))
            paths = [path for path in mine_tags | yours_tags if mine_tags.get(path) != yours_tags.get(path)]
            out += [f"the tags of {path}" for path in paths]
    if not out and one.tags != other.tags:
        out.append("the tags of the map")
    return out


def _completed(spec: MapSpec, other: MapSpec) -> MapSpec:
    key = other.key if spec.key is None else spec.key
    return msgspec.structs.replace(spec, key=key, value=other.value if spec.value is None else spec.value)


def _check_field(spec: MapSpec, path: str, rule: FieldRule) -> None:
    def bad(why: str) -> LayoutError:
        return LayoutError(f"map {spec.name!r}: {why}", map=spec.name, field=path)

    side, made, inner = "value", spec.value, path
    if path.startswith("key.") and not (isinstance(made, Record) and _field(made, "key")):
        side, made, inner = "key", spec.key, path.removeprefix("key.")
    if made is None:
        raise bad(f'a rule for {path!r}, but the type of its {side} is not known: bind one with {side} = "NAME"')
    whole = inner == "value" and side == "value" and not isinstance(made, Record)
    found = (made, 0) if whole else resolve(made, inner)
    if found is None:
        has = f"; it has {', '.join(_names(made))}" if isinstance(made, Record) else ""
        raise bad(f"no field {path!r} in its {side}{has}")
    try:
        data = None if rule.default is None else encode(found[0], rule.default)
    except LayoutError as error:
        raise bad(f"the default of {path!r}: {error.message.removeprefix('value: ')}") from error
    tags = parse_tags(spec.tags, f"map {spec.name}") if whole else _tags_at(made, inner)
    if rule.merge is not None and tags.merge is not None and rule.merge != tags.merge:
        raise _clash(spec, path, "merge", rule.merge, tags.merge)
    former = {join(inner.rpartition(".")[0], was) for was in tags.was}
    if rule.was is not None and former and rule.was.removeprefix("key.") not in former:
        raise _clash(spec, path, "was", rule.was, " or ".join(tags.was))
    if data is not None and tags.default is not None and data != _default(found[0], tags.default):
        raise _clash(spec, path, "default", rule.default, tags.default)


def _clash(spec: MapSpec, path: str | None, word: str, rule: object, tag: object) -> LayoutError:
    what = f"map {spec.name!r}" + (f": field {path!r}" if path else "")
    why = f"the manifest says {word} = {rule}, but the tag in the source says {word} = {tag}: make them agree"
    return LayoutError(f"{what}: {why}", map=spec.name, field=path)


def _default(made: Type, text: str) -> bytes | None:
    for value in (text, {"true": True, "false": False}.get(text), _number(text, int), _number(text, float)):
        try:
            return encode(made, value)
        except LayoutError:
            continue
    return None


def _number(text: str, kind: type[int] | type[float]) -> int | float | None:
    try:
        return int(text, 0) if kind is int else float(text)
    except ValueError:
        return None


def _tags_at(made: Type, path: str) -> Tags:
    parent, _, last = path.rpartition(".")
    found = resolve(made, parent) if parent else (made, 0)
    field = _field(found[0], last) if found and isinstance(found[0], Record) else None
    return parse_tags(field.tags, path) if field else Tags()


def _field(record: Record, name: str) -> Field | None:
    for field in record.fields:
        if field.name == name:
            return field
        inner = _field(field.type, name) if not field.name and isinstance(field.type, Record) else None
        if inner is not None:
            return inner
    return None


def _names(record: Record) -> Iterator[str]:
    for field in record.fields:
        if field.name:
            yield field.name
        elif isinstance(field.type, Record):
            yield from _names(field.type)


def _tags(made: Type, path: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(made, Array):
        yield from _tags(made.element, f"{path}[]")
    elif isinstance(made, Record):
        for field in made.fields:
            here = f"{path}.{field.name}"
            if field.tags:
                yield here, field.tags
            yield from _tags(field.type, here)
