"""Ring buffers: what is in them unread, and who holds a map open."""

from __future__ import annotations

import mmap
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np

from hitless.kernel.maps import Map

__all__ = ["RingMemory", "holders", "unread_bytes"]

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER = 8


def unread_bytes(ring: Map) -> int:
    """Bytes of a ring buffer that no reader has taken, with the 8 that head each record; discarded ones count too."""
    # The consumer's position is in the first page, the producer's in the second.
    with mmap.mmap(ring.fd, 2 * mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ) as pages:
        consumer, producer = (struct.unpack_from("=Q", pages, at)[0] for at in (0, mmap.PAGESIZE))
    return int(producer - consumer) & (1 << 64) - 1


class RingMemory:
    """The memory of a ring buffer, for the one reader that takes its records."""

    def __init__(self, ring: Map) -> None:
        page, size = mmap.PAGESIZE, ring.info.max_entries
        self._size = size
        consumer = mmap.mmap(ring.fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The data is there twice, one behind the other, so that no record is cut at the end.
        produced = mmap.mmap(ring.fd, page + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        # Through numpy a position is one load or store of eight bytes.
        self._consumer = np.frombuffer(consumer, np.uint64)
        self._producer = np.frombuffer(produced, np.uint64, 1)
        self._data = np.frombuffer(produced, np.uint8, offset=page)

    def take(self) -> list[bytes]:
        """The records that are complete and not taken yet, in their order."""
        found = []
        at, end = int(self._consumer[0]), int(self._producer[0])
        while at < end:
            start = at % self._size
            header = int(self._data[start : start + 4].view(np.uint32)[0])
            if header & _BUSY:
                break
            length = header & ~_DISCARDED
            if not header & _DISCARDED:
                found.append(self._data[start + _HEADER : start + _HEADER + length].tobytes())
            at += (length + _HEADER + 7) // 8 * 8
            self._consumer[0] = at
        return found


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
