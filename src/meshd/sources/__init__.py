"""Control planes: what tells the mesh its services and policies, each behind the same interface."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Protocol

from hitless.errors import HitlessError
from meshd.model import Config, Service

__all__ = ["Sink", "Source", "SourceAwayError", "SourceError"]


class SourceAwayError(HitlessError):
    """A control plane does not answer; what it said before stays in force."""

    code = "source-away"


class SourceError(HitlessError):
    """A control plane cannot be set up, or says something that cannot be used; what it said before stays in force."""

    code = "source"


class Sink(Protocol):
    """Who hears what one source says. Its methods return at once and may be called from any thread."""

    def replace(self, config: Config) -> None:
        """Take ``config`` for all that this source says: what is not in it is gone."""

    def update(self, services: Mapping[str, Service | None]) -> None:
        """Take these for changed, by their names, None for gone; all else stays as this source said it."""

    def trouble(self, error: HitlessError) -> None:
        """Tell that the source is away, or says something that cannot be used; what it said before stays."""


class Source(Protocol):
    """A control plane. ``name`` tells it from others in events; ``may_be_empty`` whether it can mean it to say nothing.

    No service at all from a source that may not be empty is taken for a failure of the source.
    """

    name: str
    may_be_empty: bool

    def load(self) -> Config:
        """What the source says now. Raises SourceAwayError if it does not answer, HitlessError if it is wrong."""

    def follow(self, sink: Sink, stop: threading.Event) -> None:
        """Tell ``sink`` of every change until ``stop`` is set; begins with what changed since :meth:`load`.

        Comes back to a source that was away by itself. Raises nothing that a source or a network can cause.
        """
