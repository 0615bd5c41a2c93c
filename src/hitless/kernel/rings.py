"""Ring buffers: what is in them unread, and who holds a map open."""

from __future__ import annotations

import mmap
import struct
from contextlib import suppress
from pathlib import Path

from hitless.kernel.maps import Map

__all__ = ["holders", "unread_bytes"]


def unread_bytes(ring: Map) -> int:
    """Bytes of a ring buffer that no reader has taken, with the 8 that head each record; discarded ones count too."""
    # The consumer's position is in the first page, the producer's in the second.
    with mmap.mmap(ring.fd, 2 * mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ) as pages:
        consumer, producer = (struct.unpack_from("=Q", pages, at)[0] for at in (0, mmap.PAGESIZE))
    return int(producer - consumer) & (1 << 64) - 1


def holders(map_id: int) -> tuple[int, ...]:
    """Ids of the processes, this one included, that have a descriptor of the map with the kernel's ``map_id``.

    One that has mapped its memory and closed the descriptor is not seen.
    """
    wanted = f"map_id:\t{map_id}\n"
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # the process ended meanwhile
            if str(link.readlink()) == "anon_inode:bpf-map":
                process = link.parents[1]
                if wanted in (process / "fdinfo" / link.name).read_text():
                    found.add(int(process.name))
    return tuple(sorted(found))
