"""Where the hooks of a release are on this node: one place for each link, several for a pattern.

A link that a pattern led to is named after its manifest entry, the namespace and the interface: ``xdp@pod1@eth0``. What
is no letter, digit, ``_`` or ``-`` is written as ``~`` and its code in hex, since bpffs takes no dots.
"""

from __future__ import annotations

import errno
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from hitless.attach import Attach
from hitless.errors import GoneError, KernelError
from hitless.hooks import HOOKS
from hitless.kernel.cgroups import CgroupPlace
from hitless.kernel.dispatcher import jump_for
from hitless.kernel.filters import filters
from hitless.kernel.interfaces import Interface, interfaces
from hitless.kernel.links import cgroup_id
from hitless.kernel.namespaces import Namespace, namespaces
from hitless.kernel.programs import Program
from hitless.kernel.tracing import probe_offset, tracepoint_id
from hitless.kernel.xdp import Xdp
from hitless.layout.model import ProgramSpec

__all__ = ["Occupant", "Place", "as_pin_name", "file_of", "find_places", "place_id"]

_NAMED = Path("/run/netns")  # where `ip netns` puts namespaces
_CPUS = Path("/sys/devices/system/cpu/online")
_INODE = (1 << 48) - 1  # what the name of a dispatcher has room for
_PLAIN = re.compile(r"[^A-Za-z0-9_-]")


class Occupant(msgspec.Struct, frozen=True):
    """A program at a place, whoever attached it: by XDP, as a tc filter, or to a cgroup without a link.

    ``mode`` is XDP's; ``is_linked`` says that a link holds it. That, and what is on a cgroup, is told for entries
    that adopt. ``priority``, ``handle`` and ``is_plain`` are those of a filter.
    """

    program_id: int
    name: str
    mode: str | None = None
    is_linked: bool = False
    priority: int = 0
    handle: int = 0
    is_plain: bool = True

    def __str__(self) -> str:
        name = f"program {self.program_id}{f' ({self.name})' if self.name else ''}"
        if self.mode:
            return f"{name} as {self.mode} XDP"
        filtering = f" as tc filter with priority {self.priority}, handle {self.handle:#x}"
        return name + (filtering if self.priority else " without a link")


class Place(msgspec.Struct, frozen=True):
    """One link of a manifest's ``entry``: its pin name ``link``, its ``target`` and the number that this has now.

    ``occupants`` is what runs there, in the order it runs.
    """

    entry: Attach
    link: str
    was: str | None
    target: str
    netns: str | None
    id: int
    occupants: tuple[Occupant, ...] = ()

    def __str__(self) -> str:
        return f"{HOOKS[self.entry.hook].on} {self.target}" + (f" in {self.netns}" if self.netns else "")


def find_places(attach: Iterable[Attach], programs: Mapping[str, ProgramSpec]) -> tuple[Place, ...]:
    """All places of the entries, in their order. Raises NodeError if a target that is no pattern is not there."""
    return tuple(place for entry in attach for place in _places(entry, programs[entry.program]))


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
            return _interface(target, netns).index


def file_of(hook: str, target: str) -> int | None:
    """The inode of the file that a probe on ``target`` is in, its last 48 bits; None of other hooks, or without one."""
    if hook not in ("uprobe", "uretprobe"):
        return None
    with suppress(OSError):
        return Path(target.rsplit(":", 1)[0]).stat().st_ino & _INODE
    return None


def _online() -> list[int]:
    """The numbers of the CPUs that run, as in 0-3,6."""
    parts = [part.split("-") for part in _CPUS.read_text().strip().split(",")]
    return [number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)]


def _places(entry: Attach, program: ProgramSpec) -> Iterator[Place]:
    if HOOKS[entry.hook].on == "cpu":
        for cpu in _online():
            was = f"{entry.was}@cpu{cpu}" if entry.was else None
            yield Place(entry, f"{entry.link}@cpu{cpu}", was, f"{entry.target}@cpu{cpu}", None, cpu + 1)
    elif not entry.is_pattern and HOOKS[entry.hook].on == "interface":
        interface = _interface(entry.target, entry.netns)
        seen = tuple(_occupants(entry, interface))
        yield Place(entry, entry.link, entry.was, entry.target, entry.netns, interface.index, seen)
    elif not entry.is_pattern:
        number = place_id(entry.hook, entry.target, entry.netns)
        there: list[int] = []
        if entry.adopt and HOOKS[entry.hook].on == "cgroup":  # of a map the release's pins tell which it is
            there = CgroupPlace(entry.target, number, HOOKS[entry.hook].attach_type(program)).programs()
        seen = tuple(Occupant(one.info.id, one.info.name) for one in map(_loaded, there) if one is not None)
        yield Place(entry, entry.link, entry.was, entry.target, entry.netns, number, seen)
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
                try:
                    seen = tuple(_occupants(entry, interface))
                except GoneError:
                    continue
                yield Place(entry, *names, interface.name, namespace.path or None, interface.index, seen)


def _interface(target: str, netns: str | None) -> Interface:
    return interfaces(target, Namespace.at(netns or ""))[0]


def _occupants(entry: Attach, interface: Interface) -> Iterator[Occupant]:
    if entry.hook in ("xdp", "xdp-netlink"):
        found = Xdp.find(interface)
        if found is None:
            return
        runs = _loaded(found.info.program_id)
        if runs is not None:
            linked = entry.adopt and found.is_linked(runs)
            yield Occupant(runs.info.id, runs.info.name, found.mode, linked)
    elif entry.hook in ("tc-ingress", "tc-egress"):
        for one in filters(interface, "ingress" if entry.hook == "tc-ingress" else "egress"):
            runs = _loaded(one.program_id)
            if runs is not None:
                name = runs.info.name
                yield Occupant(
                    one.program_id, name, priority=one.priority, handle=one.handle, is_plain=one.is_plain
                )


def _loaded(program_id: int) -> Program | None:
    """The program, None if it went meanwhile. It has to be looked for by its id: nothing here pins it."""
    try:
        return Program.by_id(program_id)
    except KernelError as error:
        if error.facts["errno"] != errno.ENOENT:
            raise
        return None


def as_pin_name(text: str) -> str:
    """``text`` with what is no letter, digit, ``_`` or ``-`` written as ``~`` and its code in hex."""
    return _PLAIN.sub(lambda found: f"~{ord(found[0]):02x}", text)


def _names(entry: Attach, namespace: Namespace, *interface: str) -> tuple[str, str | None]:
    """The link's name, and the one that it had if the entry has another than before."""
    path = Path(namespace.path)
    where = path.name if path.parent == _NAMED else namespace.path
    parts = [as_pin_name(part) for part in (where, *interface) if part]
    return "@".join((entry.link, *parts)), "@".join((entry.was, *parts)) if entry.was else None
