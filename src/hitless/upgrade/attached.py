"""One hook: what is attached there, found by its pins. (What is not attached yet: :mod:`hitless.upgrade.attaching`.)

``links`` is always the directory of link pins. Hooks of sockmaps and those whose links cannot be updated have a
dispatcher, whose slots are pinned in ``slots/`` beside it, under the same name. A hook without a link has a note there:
see :mod:`hitless.upgrade.notes`, and of a map :mod:`hitless.upgrade.socket_hooks`. Where connections keep to their
release, what is attached is a dispatcher of the board in ``board/`` (:mod:`hitless.upgrade.connections`), and what runs
is in its slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from hitless.errors import NodeError
from hitless.kernel.bpffs import move, unpin
from hitless.kernel.dispatcher import Dispatcher
from hitless.kernel.links import Link, LinkInfo
from hitless.kernel.map_places import MapPlace
from hitless.kernel.programs import Program
from hitless.kernel.switchboard import PARTS, Switchboard
from hitless.upgrade.model import HookPlan
from hitless.upgrade.notes import Noted, read_note
from hitless.upgrade.socket_hooks import SocketHook

__all__ = ["Attached", "BoardHook", "open_attached", "open_below", "pin_of", "remove", "rename", "slot_of"]



class Attached(Protocol):
    """What runs on a hook: a link, a dispatcher of sockets, or what is noted."""

    @property
    def info(self) -> LinkInfo:
        """The program that runs now, and where."""

    def update(self, new: Program, old: Program) -> None:
        """Let the hook run ``new``, if it runs ``old`` now. Raises NodeError if it does not, KernelError."""

    def detach(self) -> None:
        """Take the program off the hook. Raises KernelError."""

    def close(self) -> None:
        """Give the descriptors back."""


class BoardHook:
    """A hook of the board: what is attached is its ``dispatcher`` (an id), and what runs is in its slots."""

    def __init__(self, below: Attached, board: Switchboard, name: str, dispatcher: int) -> None:
        """Take over ``below``, by which the dispatcher is attached, and ``board``."""
        self._below = below
        self._board = board
        self._name = name
        self.dispatcher = dispatcher

    @property
    def info(self) -> LinkInfo:
        """See :class:`Attached`. The program is that of connections that begin now."""
        below = self._below.info
        if below.program_id != self.dispatcher:
            return below  # the dispatcher is not there yet, or somebody has put something else there
        return msgspec.structs.replace(below, program_id=self._board.runs(self._name))

    def update(self, new: Program, old: Program) -> None:
        """See :class:`Attached`. For all connections at once; there is no compare-and-swap, this looks right before."""
        runs = self.info.program_id
        if runs != old.info.id:
            raise NodeError(
                f"hook {self._name} runs program {runs}, not {old.info.id} as expected: someone else changed it "
                "meanwhile; look at who uses this pin root, then plan again",
                link=self._name,
                program=runs,
                expected=old.info.id,
            )
        for epoch in (self._board.epoch, self._board.epoch - 1):
            self._board.put(self._name, new, epoch)

    def detach(self) -> None:
        """See :class:`Attached`."""
        self._below.detach()

    def close(self) -> None:
        """See :class:`Attached`."""
        self._below.close()
        self._board.close()


@contextmanager
def open_attached(links: Path, name: str) -> Iterator[Attached]:
    """What is attached by the link pinned as ``name``. Raises NodeError, KernelError."""
    found = _open(links, name)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def open_below(links: Path, name: str) -> Iterator[Attached]:
    """The same, without regard to the board: if it has the hook, what runs is its dispatcher."""
    found = _open_below(links, name)
    try:
        yield found
    finally:
        found.close()


def pin_of(hook: HookPlan, links: Path) -> str:
    """The name under which the link is pinned now: the old one until the commit, if that changed."""
    return hook.was if hook.was is not None and (links / hook.was).exists() else hook.link


def remove(links: Path, name: str) -> None:
    """Unpin the link and what belongs to it."""
    for path in (links / name, slot_of(links, name), *_on_board(links, name)):
        if path.exists():
            unpin(path)


def rename(links: Path, was: str, name: str) -> None:
    """Give the pins another name; may be repeated after a kill."""
    before, after = ((slot_of(links, each), *_on_board(links, each), links / each) for each in (was, name))
    for old, new in zip(before, after, strict=True):
        if old.exists():
            move(old, new)


def _open(links: Path, name: str) -> Attached:
    below = _open_below(links, name)
    dispatcher, _, _ = _on_board(links, name)
    if not dispatcher.exists():
        return below
    with Program.open(dispatcher) as program:
        return BoardHook(below, Switchboard(links.parent / "board"), name, program.info.id)


def _open_below(links: Path, name: str) -> Attached:
    slot, where = slot_of(links, name), read_note(links / name)
    if isinstance(where, MapPlace):
        return SocketHook(where, slot, links.parent)
    if where is not None:
        return Noted(where, links.parent)
    return Dispatcher.open(slot, links / name) if slot.exists() else Link.open(links / name)


def slot_of(links: Path, name: str) -> Path:
    """Where the slot of the hook's dispatcher is pinned, if it has one."""
    return links.parent / "slots" / name


def _on_board(links: Path, name: str) -> tuple[Path, ...]:
    """What the board has of a hook: the dispatcher first."""
    return tuple(links.parent / "board" / part / name for part in PARTS)
