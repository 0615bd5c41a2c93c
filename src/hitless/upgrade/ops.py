"""Connections that go on with the struct_ops that they began with, after an upgrade has put another in its place.

The kernel takes the new one for sockets that ask for its name from then on. Those that have the old one keep it until
they end, and its programs write the maps that they were loaded with. Where a map is kept those are the new release's.
Where it was converted, the last merge waits for the last of those sockets.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Sequence

from hitless.errors import KernelError, NodeError
from hitless.kernel.maps import Map
from hitless.kernel.struct_ops import StructOps

__all__ = ["still_used", "wait_for_last"]

_LOOK = 0.1  # s between two looks at how many are left


def wait_for_last(
    ids: Collection[int], seconds: float, tell: Callable[[int], None], meanwhile: Callable[[], None]
) -> int:
    """Wait until no socket has one of the struct_ops maps with these ids, which are on no link; others do not count.

    ``tell`` is told how many are left, and ``meanwhile`` called, over and over. Returns how many are left after
    ``seconds``. Raises KernelError.
    """
    until = time.monotonic() + seconds
    while left := sum(map(_users, ids)):
        tell(left)
        if time.monotonic() > until:
            return left
        meanwhile()
        time.sleep(_LOOK)
    return 0


def still_used(left: int, maps: Sequence[str], seconds: float) -> NodeError:
    """The error for ``left`` sockets that go on writing ``maps`` of the old release."""
    return NodeError(
        f"{left} sockets still have the struct_ops that they began with after {seconds:g} s, and its programs write "
        f"{', '.join(maps)}, which this release changes: give them longer (deadline in [cutover]), let them end (ss "
        "-ti shows them; a network namespace whose default it is counts as well), or leave those maps as they are",
        sockets=left,
        maps=list(maps),
    )


def _users(map_id: int) -> int:
    try:
        with Map.by_id(map_id) as held:
            if held.info.type != "struct_ops":
                return 0
        with StructOps.by_id(map_id) as ops:
            return int(ops.users)
    except KernelError as error:
        if error.facts["errno"] != errno.ENOENT:
            raise
        return 0
