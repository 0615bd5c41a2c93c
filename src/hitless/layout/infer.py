"""Guessing which type a map holds that carries only sizes: a proposal for the user to accept, never a fact.

A type fits one side of a map if it has that side's size, and its name is one or more words of the map's name, in
order and side by side, followed by ``key``, or by ``value`` or ``val``: ``service_key`` fits the key of
``km_service``. The type is proposed when exactly one fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from hitless.layout.model import Type

__all__ = ["fits", "fitting"]

_SIDES = {"key": ("key",), "value": ("value", "val")}


def fits(name: str, side: Literal["key", "value"], type_name: str) -> bool:
    """Whether a type of this name can be meant for this side of map ``name``."""
    words, mine = type_name.lower().split("_"), name.lower().split("_")
    if words[-1] == "t":
        words.pop()
    if not words or words.pop() not in _SIDES[side] or not words:
        return False
    return any(mine[start : start + len(words)] == words for start in range(len(mine)))


def fitting(
    name: str, side: Literal["key", "value"], size: int, names: Iterable[str], find: Callable[[str], Type | None]
) -> str | None:
    """The one type among ``names`` that fits by name and by size in bytes, or None if none or several do."""
    named = sorted({other for other in names if fits(name, side, other)})
    found = [other for other in named if (made := find(other)) is not None and made.size == size]
    return found[0] if len(found) == 1 else None
