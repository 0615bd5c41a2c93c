"""The phases of an upgrade, as data: in which order they come, and what each means for who finds it. Pure.

The record of a generation names its phase, and is written before what the phase stands for begins. So a process that
finds a record after a kill knows that the phase may have done anything between nothing and all of its work, and that
no later one began.

    staging -> copying -> cutover -> (exchange of current/ and next/) -> committed
                             |
                             +--> undoing -> merging-back -> undone

An apply makes next/ anew; a rollback moves previous/ there, and every way out before the commit moves it back. These
are the states that a kill leaves of a rollback, besides those that it shares with an apply:

    next/ has its former record (committed), no previous/    it was moved, or is about to be moved back: put back
    next/ has a new record, of phase staging or copying      its maps may be empty or half filled: put back
    next/ has a new record, of phase undone                  as before: put back
    the same, with base/ or back/                            scratch, removed before it is moved back: put back
    after the exchange                                       as after an apply: next/ becomes previous/

Putting back is: the former record first, then the scratch away, then one rename. A kill between any two of these leaves
the first or the second line of the table, so that it can be repeated.
"""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["NOT_SWITCHED", "PHASES", "Phase", "Recovery", "phase", "recovery"]

Recovery = Literal["nothing", "clean-up", "remove", "put-back", "forward", "take-back"]
"""What is to be done with what a killed process left.

``clean-up``: it was committed; do the rest, which may be repeated. ``remove``: no hook runs it; remove ``next/``.
``put-back``: no hook runs it, and it was ``previous/``; make it that again. ``forward``: hooks may run it; finish the
upgrade. ``take-back``: it was being undone; undo the rest.
"""


class Phase(msgspec.Struct, frozen=True):
    """One phase: what ``happens`` in it, and which phases may come ``then``.

    ``hooks`` says which release's programs run on the hooks while it lasts, the ``old``, the ``new``, or ``either``.
    ``error`` is the phase that an error leads to; None is out of it by undoing, which is ``remove`` or ``put-back``.
    ``recovery`` is what who finds it after a kill does; for those that are undone it says ``remove``, which for a
    generation that was ``previous/`` is ``put-back``.
    """

    name: str
    happens: str
    then: tuple[str, ...]
    hooks: Literal["old", "either", "new"]
    recovery: Recovery
    error: str | None = None


PHASES = (
    Phase("staging", "maps are made or emptied, programs loaded or opened", ("copying",), "old", "remove"),
    Phase("copying", "maps are filled, and what was copied is verified", ("cutover",), "old", "remove"),
    Phase(
        "cutover", "hooks are switched, barrier, catch-up, verification, exchange", ("committed", "undoing"),
        "either", "forward", "undoing",
    ),
    Phase("undoing", "hooks are switched back, barrier", ("merging-back",), "either", "take-back"),
    Phase("merging-back", "what the new programs learned is merged into the old maps", ("undone",), "old", "take-back"),
    Phase("undone", "the old release has everything; next/ goes", (), "old", "remove"),
    Phase("committed", "the generation runs, or did when it was the last", (), "new", "nothing"),
)  # fmt: skip
"""All phases, in their order."""

_BY_NAME = {one.name: one for one in PHASES}

NOT_SWITCHED = tuple(one.name for one in PHASES if one.recovery == "remove")
"""Phases in which no hook runs the new release: undoing is giving up what was built."""


def phase(name: str) -> Phase:
    """The phase called so. Raises KeyError."""
    return _BY_NAME[name]


def recovery(current: str | None, there: bool, following: str | None, returning: bool) -> Recovery:
    """What to do first with what is under a root, when nobody holds its lock.

    ``current`` is the phase in the record of ``current/``, None if that is not there; ``there`` whether ``next/`` is,
    ``following`` the phase in its record, None if it has none, and ``returning`` whether it came from ``previous/``.
    """
    if current is not None and current != "committed":
        return "clean-up"  # the exchange has happened
    if not there:
        return "nothing"
    if following is None:
        return "remove"  # next/ was just made, or half removed; one that came from previous/ always has a record
    if following == "committed":
        return "put-back"  # nothing that apply makes is committed under this name
    wanted = phase(following).recovery
    return "put-back" if wanted == "remove" and returning else wanted
