"""What a release says about its maps beyond their types: rules from the manifest and tags in the C source.

A tag is a ``btf_decl_tag`` on a field or on a map's variable: ``hitless:was=old_name``, ``hitless:merge=sum``,
``hitless:default=7``. A rule in the manifest says the same for a field that it names by path. Here it wins over a tag;
a bundle whose manifest contradicts the tags of its own source is refused when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, cast

import msgspec

from hitless.errors import LayoutError

__all__ = ["PREFIX", "FieldRule", "MapRules", "Merge", "OnCollision", "OnLoss", "Tags", "parse_tags"]

Merge = Literal["keep", "sum", "max", "min", "or"]
OnLoss = Literal["error", "discard"]
OnCollision = Literal["error", "first", "last", "merge"]

PREFIX = "hitless:"
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
    every element), ``list[0]``; a path that begins with ``key.`` is in the key if the value has no field ``key``.
    ``on_collision`` says what becomes of entries whose keys become one; None refuses a change that could do that.
    """

    was: str | None = None
    key: str | None = None
    value: str | None = None
    old_value: str | None = None
    on_loss: OnLoss = "error"
    fields: Mapping[str, FieldRule] = {}
    on_collision: OnCollision | None = None

    def field(self, path: str) -> FieldRule | None:
        """The rule for a field: by its exact path, else with ``[]`` in place of every index."""
        return self.fields.get(path) or self.fields.get(_INDEX.sub("[]", path))

    def reversed(self) -> MapRules:
        """The same renames seen from the other direction, for going back to the older release."""
        fields = {rule.was: FieldRule(path) for path, rule in self.fields.items() if rule.was is not None}
        value = self.old_value or self.value
        return MapRules(None, self.key, value, self.value, self.on_loss, fields, self.on_collision)


class Tags(msgspec.Struct, frozen=True):
    """The hitless tags of one field or map; ``was`` may hold several former names, ``default`` is text."""

    was: tuple[str, ...] = ()
    merge: Merge | None = None
    default: str | None = None


def parse_tags(tags: tuple[str, ...], where: str) -> Tags:
    """Read declaration tags; those without the prefix ``hitless:`` belong to others and are passed over.

    Raises :class:`LayoutError` for a hitless tag that does not exist, has a bad value, or is given twice.
    """
    was: list[str] = []
    merge: str | None = None
    default: str | None = None
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
        else:
            raise bad
    return Tags(tuple(was), cast("Merge | None", merge), default)
