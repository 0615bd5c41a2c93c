"""Where the hooks of a release are on this node: one place for each link, several for a pattern.

A link that a pattern led to is named after its manifest entry, the namespace and the interface: ``xdp@pod1@eth0``. What
bpffs takes no name for is written as ``~`` and its code in hex.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from hitless.bundle import Attach
from hitless.errors import NodeError
from hitless.hooks import HOOKS
from hitless.kernel.links import cgroup_id

__all__ = ["Place", "find_places", "place_id"]

_PLAIN = re.compile(r"[^A-Za-z0-9_-]")


class Place(msgspec.Struct, frozen=True):
    """One link of a manifest's ``entry``: its pin name ``link``, its ``target`` and the number that this has now."""

    entry: Attach
    link: str
    was: str | None
    target: str
    netns: str | None
    id: int

    def __str__(self) -> str:
        return f"{HOOKS[self.entry.hook].on} {self.target}" + (f" in {self.netns}" if self.netns else "")


def find_places(attach: Iterable[Attach]) -> tuple[Place, ...]:
    """All places of the entries, in their order. Raises NodeError if a target that is no pattern is not there."""
    return tuple(place for entry in attach for place in _places(entry))


def place_id(hook: str, target: str, netns: str | None) -> int:
    """The number of a hook's target: see LinkInfo. Raises NodeError if there is none."""
    match HOOKS[hook].on:
        case "cgroup":
            return cgroup_id(Path(target))
        case "netns":
            return _inode(Path(target))
        case "interface":
            return _index(target)


def _places(entry: Attach) -> Iterator[Place]:
    number = place_id(entry.hook, entry.target, entry.netns)
    yield Place(entry, entry.link, entry.was, entry.target, entry.netns, number)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError as error:
        raise NodeError(f"network namespace {path} cannot be looked at: {error.strerror}", path=str(path)) from None


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise NodeError(f"there is no interface {name} here; make it, or correct the target", interface=name) from None
