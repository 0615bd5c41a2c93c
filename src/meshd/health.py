"""Whether the daemon lives (start it again if not) and is ready (the mesh is live, and what is live hangs together)."""

from __future__ import annotations

import time

import hitless
from hitless.errors import BusyError, HitlessError
from meshd.keeper import Keeper

__all__ = ["Health"]

_SUPERSEDED = "another daemon or release took over, or the mesh was unloaded"
_SILENCE = 30.0  # s after which the keeper is taken for stuck
_LOOK = 10.0  # s between looks while all is well
_LOOK_AGAIN = 1.0  # s while it is not


class Health:
    """What ``/healthz`` and ``/readyz`` say: sentences about what is wrong, none if nothing is."""

    def __init__(self, node: hitless.Node, keeper: Keeper) -> None:
        self._node = node
        self._keeper = keeper
        self._problems: tuple[str, ...] = ("the mesh is not live yet",)
        self._look_at = 0.0

    def alive(self) -> tuple[str, ...]:
        """What is wrong with this process."""
        keeper = self._keeper
        if not keeper.kept_at or keeper.superseded:
            return ()  # it starts or upgrades, or waits for its end
        if keeper.ended():
            return ("a thread that keeps the maps, or one that hears a source, has ended",)
        silent = time.monotonic() - keeper.kept_at
        if silent > _SILENCE:
            return (f"nobody could keep the maps for {silent:.0f} s",)
        return ()

    def ready(self) -> tuple[str, ...]:
        """Why the mesh on this node is not to be relied on."""
        if self._keeper.superseded:
            return (_SUPERSEDED,)
        return self._problems

    def look(self) -> bool:
        """Verify what is live, if it is time to; call it when the mesh is live. Whether it told something new."""
        if time.monotonic() < self._look_at:
            return False
        before = self._problems
        try:
            self._problems = tuple(hitless.verify(self._node).problems)
        except BusyError:
            pass  # somebody upgrades it: what comes of that is seen next time
        except HitlessError as error:
            self._problems = (error.message,)
        self._look_at = time.monotonic() + (_LOOK_AGAIN if self._problems else _LOOK)
        return self._problems != before
