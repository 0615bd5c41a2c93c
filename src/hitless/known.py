"""What is known of a daemon besides what its objects say: by a profile, or by what is pinned on a node. Pure.

It fills a manifest that ``hitless init`` draws up; what it does not tell is asked for as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

__all__ = ["MODES", "PROFILES", "Known", "KnownHook", "together"]

PROFILES = ("kmesh",)
"""Daemons that there is a profile of."""

MODES = {"workload": "workload", "dual-engine": "workload", "ads": "ads", "kernel-native": "ads"}
"""The modes that Kmesh runs in, by each of their two names: the one that its profile has."""

_T = TypeVar("_T")


class KnownHook(msgspec.Struct, frozen=True):
    """One ``[[attach]]`` of a program: its ``keys``, and in ``asks`` keys that are open, with the question.

    ``answers`` are, by key, what could be the answer to those. ``note`` is a comment above the entry.
    """

    keys: Mapping[str, str | int | bool]
    asks: Mapping[str, str] = {}
    answers: Mapping[str, tuple[str, ...]] = {}
    note: str = ""


class Known(msgspec.Struct, frozen=True):
    """What is known, by the names of programs and maps; what a release has nothing of is of no effect.

    ``public`` are keys of ``[public]``, ``objects`` names of objects by file. ``types`` says what programs are whose
    section does not tell it, ``dispensable`` which may be left out where a kernel refuses them, and why. ``hooks`` are
    where a program is attached; nowhere, if it has none in there. ``keys`` and ``values`` are types that a map may be
    bound to, the likeliest first; ``asked`` are maps whose value is a question all the same, with what it asks.
    ``slots`` fill program arrays, ``open_slots`` are programs of which nobody knows the slot, ``groups`` and ``pins``
    are those of maps. Maps in ``scratch`` hold nothing that has to survive. ``left_out`` are files that are not taken
    into the bundle, and why. ``related`` are, by map, those of the release before that were for the same under
    another name. ``notes`` are comments below ``[public]``.
    """

    public: Mapping[str, str] = {}
    objects: Mapping[str, str] = {}
    types: Mapping[str, str] = {}
    dispensable: Mapping[str, str] = {}
    hooks: Mapping[str, tuple[KnownHook, ...]] = {}
    keys: Mapping[str, tuple[str, ...]] = {}
    values: Mapping[str, tuple[str, ...]] = {}
    asked: Mapping[str, str] = {}
    slots: Mapping[str, Mapping[int, str]] = {}
    open_slots: Mapping[str, tuple[str, ...]] = {}
    groups: Mapping[str, str] = {}
    pins: Mapping[str, str] = {}
    scratch: Mapping[str, str] = {}
    left_out: Mapping[str, str] = {}
    related: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()


def together(profile: Known, seen: Known) -> Known:
    """Both at once: what was ``seen`` on a node counts, but for targets of hooks, since a profile is for all nodes."""

    def merged(mine: Mapping[str, _T], other: Mapping[str, _T]) -> dict[str, _T]:
        return {**mine, **other}

    hooks = {name: _told_twice(profile.hooks.get(name, ()), found) for name, found in seen.hooks.items()}
    return msgspec.structs.replace(
        profile,
        public=merged(profile.public, seen.public),
        hooks=merged(profile.hooks, hooks),
        pins=merged(profile.pins, seen.pins),
        slots=merged(profile.slots, seen.slots),
        open_slots={name: one for name, one in profile.open_slots.items() if name not in seen.slots},
        notes=(*profile.notes, *seen.notes),
    )


def _told_twice(mine: tuple[KnownHook, ...], seen: tuple[KnownHook, ...]) -> tuple[KnownHook, ...]:
    if not seen or len(mine) != 1 or len(seen) != 1:
        return seen or mine
    one, other = mine[0], seen[0]
    alike = all(one.keys.get(key) == other.keys.get(key) for key in ("hook", "by", "adopt"))
    if not alike or ("pin" in one.keys) != ("pin" in other.keys):
        return seen
    return (msgspec.structs.replace(one, keys={**one.keys, **{k: v for k, v in other.keys.items() if k == "pin"}}),)
