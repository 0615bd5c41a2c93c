"""Groups: maps whose entries refer to each other are carried together or not at all. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from hitless.layout.model import MapSpec
from hitless.layout.rules import MapRules, parse_tags

__all__ = ["group_of", "torn"]


def group_of(old: MapSpec | None, new: MapSpec | None, rules: MapRules) -> str | None:
    """The group of a map: by the manifest's rule, else by a tag in the new release's source, else in the old one's."""
    if rules.group is not None:
        return rules.group
    groups = (parse_tags(spec.tags, f"map {spec.name}").group for spec in (new, old) if spec is not None)
    return next((group for group in groups if group is not None), None)


def torn(groups: Mapping[str, str | None], gone: Mapping[str, str]) -> dict[str, str]:
    """Maps that cannot be carried because another of their group is not, with the reason.

    ``groups`` has the group of each map, ``gone`` the maps that are not carried and why.
    """
    first: dict[str, str] = {}
    for name, group in groups.items():
        if group is not None and name in gone:
            first.setdefault(group, name)
    return {
        name: f"all entries: the group {group} is carried as a whole or not at all, and {first[group]} is not "
        f"({gone[first[group]].removeprefix('all entries: ')})"
        for name, group in groups.items()
        if group in first and name not in gone
    }
