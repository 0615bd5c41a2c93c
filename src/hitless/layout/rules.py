"""What a release says about its maps beyond their types: rules from the manifest and tags in the C source.

A tag is a ``btf_decl_tag`` on a field or on a map's variable: ``hitless:was=old_name``, ``hitless:merge=sum``,
``hitless:default=7``, and of a map ``hitless:group=auth``, ``hitless:programs=read``. A rule in the manifest says the
same for a field that it names by path. Here it wins over a tag; a bundle whose manifest contradicts the tags of its own
source is refused when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, cast

import msgspec

from hitless.errors import LayoutError
from hitless.layout.model import MapSpec, Type

__all__ = [
    "INNER", "PREFIX", "FieldRule", "MapRules", "Merge", "OnCollision", "OnLoss", "Programs", "Tags", "bind_old",
    "inner_rules", "inner_spec", "only_read", "parse_tags",
]  # fmt: skip

Merge = Literal["keep", "sum", "max", "min", "or"]
OnLoss = Literal["error", "discard"]
OnCollision = Literal["error", "first", "last", "merge"]
Programs = Literal["read"]

PREFIX = "hitless:"
#: What the path of a field of inner maps begins with, in rules and changes of the outer map.
INNER = "inner."
_MERGES = ("keep", "sum", "max", "min", "or")
_INDEX = re.compile(r"\[\d+\]")


class FieldRule(msgspec.Struct, frozen=True):
    """Rule for one field of the new release; None says nothing.

    ``was`` is the path that the field had in the old release, ``merge`` how concurrent changes of it are put
    together, ``default`` the value it gets in an entry that did not have it.
    """

    was: str | None = None
    merge: Merge | None = None
    default: object = None


class MapRules(msgspec.Struct, frozen=True):
    """Rules for one map of the new release.

    ``was`` is the map's old name. ``key``, ``value`` and ``old_value`` name types for a map that carries none.
    ``on_loss`` ``discard`` allows its contents to be lost. ``fields`` maps paths to rules: ``a.b``, ``list[].x`` (in
    every element), ``list[0]``; a path that begins with ``key.`` is in the key if the value has no field ``key``, and
    one that begins with ``inner.`` is in the inner maps of a map of maps.
    ``on_collision`` says what becomes of entries whose keys become one; None refuses a change that could do that.
    ``old_key`` and ``old_value`` name types for the old release's map, if that carries none; ``old_key_type`` and
    ``old_value_type`` are those types. ``convert`` is the user's function as ``module:name``, and ``functions`` are
    the names in its module of those that belong to it: see :mod:`hitless.layout.structured`. Maps of one ``group``
    are carried together or not at all. ``programs`` ``read`` promises that no program of the release writes the map.
    ``slots`` are the programs by name that a program array holds, beside those that its object puts there, by index.
    ``turned``: these are rules for going back, on which the functions for the way back are those for the way there.
    ``sources`` are the old maps that are folded into this one, by name, each with all rules for its own entries; then
    ``was`` is None. ``apart``: of the old map's entries only some are of this one, and a function has to say which.
    In the rules of a source it says that no entry of it was one of another source.
    """

    was: str | None = None
    key: str | None = None
    value: str | None = None
    old_value: str | None = None
    on_loss: OnLoss = "error"
    fields: Mapping[str, FieldRule] = {}
    on_collision: OnCollision | None = None
    old_key: str | None = None
    old_key_type: Type | None = None
    old_value_type: Type | None = None
    convert: str | None = None
    functions: tuple[str, ...] = ()
    group: str | None = None
    programs: Programs | None = None
    slots: Mapping[int, str] = {}
    turned: bool = False
    sources: Mapping[str, MapRules] = {}
    apart: bool = False

    def function(self, suffix: str = "") -> str | None:
        """The user's function ``<name of convert><suffix>`` as ``module:name``, None if there is none.

        Where the rules are ``turned``, what converts there is called ``_back``, and what converts back has no suffix.
        """
        if self.turned:
            suffix = suffix.removesuffix("_back") if suffix.endswith("_back") else f"{suffix}_back"
        if self.convert is None or self.convert.partition(":")[2] + suffix not in self.functions:
            return None
        return self.convert + suffix

    def field(self, path: str) -> FieldRule | None:
        """The rule for a field: by its exact path, else with ``[]`` in place of every index."""
        return self.fields.get(path) or self.fields.get(_INDEX.sub("[]", path))

    def reversed(self) -> MapRules:
        """The same renames seen from the other direction, for going back to the older release."""
        fields = {rule.was: FieldRule(path) for path, rule in self.fields.items() if rule.was is not None}
        value = self.old_value or self.value
        return MapRules(
            None, self.old_key or self.key, value, self.value, self.on_loss, fields, self.on_collision,
            old_key=self.key, group=self.group, programs=self.programs,
        )  # fmt: skip


def bind_old(old: MapSpec, rules: MapRules) -> MapSpec:
    """The old release's map with the types that ``rules`` name for it, on a side where it carries none.

    Raises :class:`LayoutError` if the size of such a type is not that of the map's key or value.
    """
    bound: dict[str, Type] = {}
    for side, had, size, name, made in (
        ("key", old.key, old.key_size, rules.old_key, rules.old_key_type),
        ("value", old.value, old.value_size, rules.old_value, rules.old_value_type),
    ):
        if made is None or had is not None:
            continue
        if made.size != size:
            why = f"old_{side} = {name!r} has {made.size} bytes, but the old {side} has {size}"
            raise LayoutError(f"map {old.name!r}: {why}", map=old.name)
        bound[side] = made
    return msgspec.structs.replace(old, **bound) if bound else old


class Tags(msgspec.Struct, frozen=True):
    """The hitless tags of one field or map; ``was`` may hold several former names, ``default`` is text."""

    was: tuple[str, ...] = ()
    merge: Merge | None = None
    default: str | None = None
    group: str | None = None
    programs: Programs | None = None


def only_read(spec: MapSpec, rules: MapRules) -> bool:
    """Whether the release promises, in its manifest or its source, that none of its programs writes this map."""
    return (rules.programs or parse_tags(spec.tags, f"map {spec.name}").programs) is not None


def inner_spec(spec: MapSpec) -> MapSpec | None:
    """Definition of the inner maps of ``spec``, or None. Tags of the outer map are theirs: no variable is."""
    return msgspec.structs.replace(spec.inner, tags=spec.tags) if spec.inner is not None else None


def inner_rules(rules: MapRules) -> MapRules:
    """What the rules of a map of maps say of its inner maps, with their own paths."""
    fields = {
        path.removeprefix(INNER): msgspec.structs.replace(rule, was=rule.was and rule.was.removeprefix(INNER))
        for path, rule in rules.fields.items()
        if path.startswith(INNER)
    }
    return MapRules(on_loss=rules.on_loss, fields=fields)


def parse_tags(tags: tuple[str, ...], where: str) -> Tags:
    """Read declaration tags; those without the prefix ``hitless:`` belong to others and are passed over.

    Raises :class:`LayoutError` for a hitless tag that does not exist, has a bad value, or is given twice.
    """
    was: list[str] = []
    merge: str | None = None
    default: str | None = None
    group: str | None = None
    programs: str | None = None
    for tag in tags:
        if not tag.startswith(PREFIX):
            continue
        word, equals, text = tag.removeprefix(PREFIX).partition("=")
        bad = LayoutError(f"{where}: tag {tag!r} is not known or has a bad value", path=where, tag=tag)
        if not equals or not text:
            raise bad
        if word == "was":
            was.append(text)
        elif word == "merge" and text in _MERGES and merge in (None, text):
            merge = text
        elif word == "default" and default in (None, text):
            default = text
        elif word == "group" and group in (None, text):
            group = text
        elif (word, text) == ("programs", "read"):
            programs = text
        else:
            raise bad
    return Tags(tuple(was), cast("Merge | None", merge), default, group, cast("Programs | None", programs))
