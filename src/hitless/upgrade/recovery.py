"""What a recovery found and did, as a value to print."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from hitless.kernel.bpffs import require_bpffs
from hitless.upgrade.drift import half_done
from hitless.upgrade.model import Progress
from hitless.upgrade.node import Node
from hitless.upgrade.transaction import recover

__all__ = ["Recovery", "recovery"]


class Recovery(msgspec.Struct, frozen=True):
    """``found`` is what an upgrade had left behind, ``did`` what became of it; both None if there was nothing.

    ``version`` and ``generation`` are those that run now, None if nothing of hitless does.
    """

    root: str
    found: str | None
    did: str | None
    version: str | None
    generation: int | None
    schema: int = 1


def recovery(
    node: Node, back: bool = False, wait: float = 10.0, progress: Callable[[Progress], None] | None = None
) -> Recovery:
    """:func:`hitless.recover`, with what was there before and what is there now. Raises as that does."""
    require_bpffs(node.root)
    found = half_done(node, node.observe())
    did = recover(node, progress, wait, back)
    now = node.observe()
    return Recovery(str(node.root), found if did is not None else None, did, now.version, now.generation)
