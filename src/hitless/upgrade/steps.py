"""In which step of an upgrade something went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hitless.errors import HitlessError

__all__ = ["in_step"]


@contextmanager
def in_step(name: str) -> Iterator[None]:
    """Let every HitlessError of the block, or of a function that this decorates, have ``name`` as its fact ``step``.

    That of the innermost block stands, which knows best.
    """
    try:
        yield
    except HitlessError as error:
        error.facts.setdefault("step", name)
        raise
