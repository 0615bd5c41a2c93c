"""What carries the contents of one map of the running release into its successor: one kind of carrier a kind of map.

:mod:`hitless.carry` says which kind a map gets, so that the plan can name it; the transaction calls every carrier in
the same order: ``copy``, ``verify``, ``catch_up`` any number of times, ``catch_up(last=True)``; and, if the upgrade is
taken back, ``turned`` and the last catch-up of what that returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from hitless.kernel.maps import Map
from hitless.layout.diff import MapDiff
from hitless.layout.model import MapSpec
from hitless.layout.rules import MapRules
from hitless.upgrade.pace import Pace

__all__ = ["Aside", "Carrier", "Passage", "Successors", "Tally"]


Successors = dict[tuple[int, MapSpec | None], Map]
"""Which map takes the place of another, by the kernel's id of that, in both directions. The second part is None for
maps of the releases; for inner maps it is what they become, so that outer maps which share one find it."""


Aside = Callable[[], AbstractContextManager[None]]
"""What is entered around additions to a map of sockets that has hooks."""


class Tally:
    """Counts of one map's journey, filled while it goes on; what did not fit is in ``lost``, by field path.

    ``seconds`` are those of all work on it, ``last_round`` those of the latest pass over what differs;
    ``differing`` is about how many entries differed when that was last looked at. ``unread`` bytes are left in an old
    ring buffer. ``left_behind`` says, on the way back, why what the new release wrote in this map did not come along.
    """

    def __init__(self) -> None:
        self.entries = 0
        self.copied = 0
        self.rounds = 0
        self.caught_up = 0
        self.seconds = 0.0
        self.last_round = 0.0
        self.differing = 0
        self.unread = 0
        self.lost: dict[str, int] = {}
        self.left_behind: str | None = None


class Passage(msgspec.Struct, frozen=True):
    """All that a carrier is made from: one map from ``source`` to ``target``.

    ``old`` and ``new`` are their definitions with layouts, ``diff`` what changed, ``rules`` the new release's.
    ``pin`` is a path in the generation being built that is the carrier's own: what must survive the death of this
    process is pinned there, or below it as a directory. It goes with the commit. ``fresh`` is false when a
    killed process left it filled. ``lossy_allowed`` says whether values may be cut to fit. ``writing`` is held
    around each step that must not meet a dual write, for some milliseconds at most while the old release runs.
    ``pace`` is called without it after each part of the work. ``code`` is the source of the module that
    ``rules.convert`` names.
    ``successors`` is shared by all passages of an upgrade. ``heirs`` are the maps that the old one is split into, if
    it is. ``source_aside`` and ``target_aside`` keep the hooks of a map of sockets off it, so that sockets which have a
    program already can be added.
    """

    name: str
    source: Map
    target: Map
    old: MapSpec
    new: MapSpec
    diff: MapDiff
    rules: MapRules
    pin: Path
    fresh: bool
    lossy_allowed: bool
    writing: threading.RLock
    pace: Pace = msgspec.field(default_factory=Pace)
    code: str = ""
    successors: Successors = {}
    heirs: tuple[str, ...] = ()
    source_aside: Aside | None = None
    target_aside: Aside | None = None


class Carrier(Protocol):
    """One map on its way."""

    @property
    def name(self) -> str:
        """Name of the map in the new release."""

    @property
    def tally(self) -> Tally:
        """What came of it so far."""

    def copy(self, progress: Callable[[int], None]) -> None:
        """Carry what can be carried while the old release runs and writes; ``progress`` gets the number done so far.

        Leaves the source as it is. May leave everything to the catch-up. Raises KernelError, LossNotAllowedError.
        """

    def verify(self) -> None:
        """Show that what was copied is there as the conversion says; no hook has changed yet. Raises VerifyError."""

    def catch_up(self, last: bool = False) -> int:
        """Bring the target up to date with the source; returns how many entries differed.

        Hooks may run the new release, which wins where both wrote, unless the field's merge policy says how both
        count. ``last``: no program of the old release runs any more; nothing is left behind then. May be repeated, also
        after a kill.
        """

    def turned(self, pin: Path, fresh: bool) -> Carrier:
        """The carrier that brings back what the target gained, once the old release's programs run again.

        ``pin`` is its own path, as in :class:`Passage`; ``fresh`` is false if a killed process had filled it. Only
        ``catch_up(last=True)`` of it is called.
        """
