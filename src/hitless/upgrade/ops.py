"""Connections that go on with the struct_ops that they began with, after an upgrade has put another in its place.

The kernel takes the new one for sockets that ask for its name from then on. Those that have the old one keep it until
they end, and its programs write the maps that they were loaded with. Where a map is kept those are the new release's.
Where it was converted, the last merge waits for the last of those sockets.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Sequence

from hitless.errors import KernelError, NodeError
from hitless.kernel.maps import Map
from hitless.kernel.struct_ops import StructOps
from hitless.upgrade.model import Generation

__all__ = ["connections_of", "wait_for_last"]

_LOOK = 0.1  # s between two looks at how many are left


def connections_of(ids: Iterable[int]) -> int:
    """How many sockets have one of the struct_ops maps with these ids, which are on no link; others do not count."""
    total = 0
    for number in ids:
        try:
            with Map.by_id(number) as held:
                if held.info.type != "struct_ops":
                    continue
            with StructOps.by_id(number) as ops:
                total += ops.users
        except KernelError as error:
            if error.facts["errno"] != errno.ENOENT:
                raise
    return total


def wait_for_last(
    old: Generation, maps: Sequence[str], deadline: float, tell: Callable[[int], None], meanwhile: Callable[[], None]
) -> None:
    """Return when no socket has a struct_ops of ``old`` or of a generation before it.

    ``tell`` is told how many are left, and ``meanwhile`` called, over and over. Raises NodeError after ``deadline``
    seconds: what those sockets write into ``maps`` would be missed.
    """
    ids = [live.info.id for live in old.maps.values()] + [entry.id for entry in old.record.replaced]
    until = time.monotonic() + deadline
    while left := connections_of(ids):
        tell(left)
        if time.monotonic() > until:
            raise NodeError(
                f"{left} sockets still have the struct_ops that they began with after {deadline:g} s, and its programs "
                f"write {', '.join(maps)}, which this release changes: give them longer (deadline in [cutover]), let "
                "them end (ss -ti shows them), or leave those maps as they are",
                sockets=left,
                maps=list(maps),
            )
        meanwhile()
        time.sleep(_LOOK)
