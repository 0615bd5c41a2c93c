"""Where the hooks of a release are on this node: one place for each link, several for a pattern.

A link that a pattern led to is named after its manifest entry, the namespace and the interface: ``xdp@pod1@eth0``. What
is no letter, digit, ``_`` or ``-`` is written as ``~`` and its code in hex, since bpffs takes no dots.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from hitless.bundle import Attach
from hitless.errors import GoneError
from hitless.hooks import HOOKS
from hitless.kernel.dispatcher import jump_for
from hitless.kernel.interfaces import interfaces
from hitless.kernel.links import cgroup_id
from hitless.kernel.namespaces import Namespace, namespaces
from hitless.kernel.tracing import probe_offset, tracepoint_id

__all__ = ["Place", "find_places", "place_id"]

_NAMED = Path("/run/netns")  # where `ip netns` puts namespaces
_CPUS = Path("/sys/devices/system/cpu/online")
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
        case "cpu":
            cpu = int(target.rpartition("@cpu")[2])
            if cpu not in _online():
                raise GoneError(f"CPU {cpu} is not online: put it back, or apply again without it", cpu=cpu)
            return cpu + 1
        case "kernel":
            if hook == "tracepoint":
                tracepoint_id(target)
            elif hook == "tp_btf":
                jump_for(hook, target)
            elif hook in ("uprobe", "uretprobe"):
                return probe_offset(*target.rsplit(":", 1))
            return 0
        case "map":
            return 0  # whichever the release has under this name
        case "netns":
            return Namespace.at(target).inode
        case "interface":
            return interfaces(target, Namespace.at(netns or ""))[0].index


def _online() -> list[int]:
    """The numbers of the CPUs that run, as in 0-3,6."""
    parts = [part.split("-") for part in _CPUS.read_text().strip().split(",")]
    return [number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)]


def _places(entry: Attach) -> Iterator[Place]:
    if HOOKS[entry.hook].on == "cpu":
        for cpu in _online():
            was = f"{entry.was}@cpu{cpu}" if entry.was else None
            yield Place(entry, f"{entry.link}@cpu{cpu}", was, f"{entry.target}@cpu{cpu}", None, cpu + 1)
    elif not entry.is_pattern:
        number = place_id(entry.hook, entry.target, entry.netns)
        yield Place(entry, entry.link, entry.was, entry.target, entry.netns, number)
    elif HOOKS[entry.hook].on == "netns":
        for namespace in namespaces(entry.target):
            names = _names(entry, namespace)
            yield Place(entry, *names, namespace.path, None, namespace.inode)
    else:
        for namespace in namespaces(entry.netns or ""):
            try:
                found = interfaces("*", namespace)
            except GoneError:
                continue  # with all its interfaces
            for interface in found:
                if not fnmatch.fnmatchcase(interface.name, entry.target):
                    continue
                names = _names(entry, namespace, interface.name)
                yield Place(entry, *names, interface.name, namespace.path or None, interface.index)


def _names(entry: Attach, namespace: Namespace, *interface: str) -> tuple[str, str | None]:
    """The link's name, and the one that it had if the entry has another than before."""
    path = Path(namespace.path)
    where = path.name if path.parent == _NAMED else namespace.path
    parts = [_PLAIN.sub(lambda found: f"~{ord(found[0]):02x}", part) for part in (where, *interface) if part]
    return "@".join((entry.link, *parts)), "@".join((entry.was, *parts)) if entry.was else None
