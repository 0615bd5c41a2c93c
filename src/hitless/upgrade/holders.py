"""Who holds the maps of a node by a descriptor: a process that does not follow an upgrade writes where nobody reads."""

from __future__ import annotations

import msgspec

from hitless.kernel.processes import command, map_holders
from hitless.upgrade.model import Generation
from hitless.upgrade.node import Node

__all__ = ["Holder", "Holders", "find_holders"]


class Holder(msgspec.Struct, frozen=True):
    """A process that holds a map.

    ``old``: the map belongs to an earlier generation, so what is written to it reaches nobody. ``follows``: the
    process uses hitless's handles, which open the new map at their next use.
    """

    pid: int
    command: str
    map: str
    map_id: int
    old: bool
    follows: bool


class Holders(msgspec.Struct, frozen=True):
    """All that were found; ``unseen`` counts processes that may not be looked at, which takes root."""

    found: tuple[Holder, ...] = ()
    unseen: int = 0

    @property
    def left_behind(self) -> tuple[Holder, ...]:
        """Those that hold an old map and will not let go of it by themselves."""
        return tuple(holder for holder in self.found if holder.old and not holder.follows)


def find_holders(node: Node, generation: Generation) -> Holders:
    """Processes, other than this one, that hold maps of ``generation`` or of an earlier one of ``node``."""
    names = {entry.id: (entry.name, True) for entry in generation.record.replaced}
    names |= {live.info.id: (name, False) for name, live in generation.maps.items()}
    found, unseen = [], 0
    for seen in map_holders(names.keys(), node.access.lock.directory):
        if isinstance(seen, int):
            unseen += 1
            continue
        pid, ids, follows = seen
        text = command(pid)
        found += [Holder(pid, text, names[one][0], one, names[one][1], follows) for one in ids]
    return Holders(tuple(sorted(found, key=lambda holder: (not holder.old, holder.map, holder.pid))), unseen)
