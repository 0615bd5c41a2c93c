"""A hook whose program no link holds, but the interface, cgroup or map: under ``links/`` is a note of where that is.

The note is pinned before the program is attached and goes after it was detached, so whoever is killed between leaves
word of what there may be. What runs there is never noted: the kernel is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hitless.errors import HitlessError, NodeError
from hitless.kernel.bpffs import unpin
from hitless.kernel.cgroups import CgroupPlace
from hitless.kernel.filters import Filter
from hitless.kernel.libbpf import pinned_kind
from hitless.kernel.links import LinkInfo
from hitless.kernel.map_places import MapPlace
from hitless.kernel.maps import Map, create
from hitless.kernel.programs import Program
from hitless.kernel.xdp import Xdp

__all__ = ["Noted", "Where", "note", "noted", "own_programs", "read_note"]

Where = Filter | Xdp | CgroupPlace | MapPlace

_KEY = bytes(4)
_ARRAY = 2
_ROOM = 4096
_NAME = "note"


class _Note(msgspec.Struct, frozen=True, omit_defaults=True):
    filter: Filter | None = None
    xdp: Xdp | None = None
    cgroup: CgroupPlace | None = None
    map: MapPlace | None = None


class Noted:
    """What runs at ``where``; ``root`` is the pin root, whose programs are ours.

    Of a map see :mod:`hitless.upgrade.socket_hooks`.
    """

    def __init__(self, where: Filter | Xdp | CgroupPlace, root: Path) -> None:
        self.where = where
        self._root = root

    @property
    def info(self) -> LinkInfo:
        """The program that runs there now, in the words of a link. Raises KernelError, NodeError."""
        if isinstance(self.where, CgroupPlace):
            # Others may be attached there the same way; only ours is what the note is about.
            own = own_programs(self._root)
            runs = next((one for one in self.where.programs() if one in own), 0)
            return LinkInfo(0, "cgroup", runs, self.where.id if runs else 0, self.where.attach_type)
        found = self.where.info
        target = 0 if found.is_dead else found.target_id
        if isinstance(self.where, Xdp):
            return LinkInfo(0, "xdp_netlink", found.program_id, target, "xdp_netlink")
        numbers = self.where.priority, self.where.handle
        return LinkInfo(0, "tc", found.program_id, target, f"tc_{self.where.direction}", *numbers)

    def update(self, new: Program, old: Program) -> None:
        """Let it run ``new`` if it runs ``old`` now. Raises NodeError, GoneError if nothing runs there, KernelError."""
        self.where.update(new, old)

    def detach(self) -> None:
        """Take a program of this root off; another's stays. Raises as :meth:`update`."""
        runs = self.info.program_id
        if runs in (own := own_programs(self._root)):
            with Program.open(own[runs]) as program:
                self.where.detach(program)

    def close(self) -> None:
        """Nothing is held."""


def own_programs(root: Path) -> dict[int, Path]:
    """The pins of programs under a root, by the programs' ids. Raises KernelError."""
    own = {}
    for pin in (*root.glob("*/progs/*"), *root.glob("board/dispatchers/*")):
        with Program.open(pin) as program:
            own[program.info.id] = pin
    return own


def note(pin: Path, where: Where) -> None:
    """Pin a note of ``where``. Raises KernelError."""
    match where:
        case Xdp():
            made = _Note(xdp=where)
        case Filter():
            made = _Note(filter=where)
        case CgroupPlace():
            made = _Note(cgroup=where)
        case MapPlace():
            made = _Note(map=where)
    with create(_ARRAY, _NAME, 4, _ROOM, 1) as pinned:
        pinned.update(_KEY, msgspec.json.encode(made).ljust(_ROOM))
        pinned.pin(pin)


@contextmanager
def noted(pin: Path, where: Filter | Xdp, program: Program) -> Iterator[None]:
    """Around what attaches ``program`` at ``where``: the note goes if that failed."""
    note(pin, where)
    try:
        yield
    except HitlessError:
        # An error can come after the effect, as when the kernel's answer is lost.
        if where.info.program_id != program.info.id:
            unpin(pin)
        raise


def read_note(pin: Path) -> Where | None:
    """Where it says; None if no note is pinned there. Raises NodeError if what is there is neither that nor a link."""
    fd, kind = pinned_kind(pin)
    if kind != "map":
        os.close(fd)
        return None
    with Map(fd) as pinned:
        text = pinned.lookup(_KEY) if pinned.info.type == "array" and pinned.info.name == _NAME else None
    try:
        made = msgspec.json.decode(text or b"", type=_Note)
    except msgspec.DecodeError:
        made = _Note()
    where = made.xdp or made.filter or made.cgroup or made.map
    if where is None:
        raise NodeError(f"{pin} is a pinned map, not a link; it is not from hitless", path=str(pin))
    return where
