"""struct_ops: structs of functions of the kernel whose functions are programs. A map takes a program's place there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hitless.errors import NodeError
from hitless.kernel.libbpf import Object
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, ProgramInfo

__all__ = ["StructOps", "congestion_controls"]

_CONGESTION = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")


class StructOps(Program):
    """A struct_ops map, held by a descriptor: on a hook it is what a program is on others. ``info.id`` is the map's."""

    def __init__(self, fd: int, what: object = None) -> None:
        """Take over ``fd``, which errors call ``what``. Raises NodeError if it is another map."""
        Object.__init__(self, fd)
        with Map(os.dup(fd), what) as held:
            info = held.info
        if info.type != "struct_ops":
            raise NodeError(f"{what or info.label} is a {info.type}, not a struct_ops map; it is not from hitless")
        self.info = ProgramInfo(info.id, info.type, info.name, "")

    @property
    def users(self) -> int:
        """How many links and sockets of the kernel have it: a connection keeps what it began with until it ends."""
        with Map(os.dup(self.fd)) as held:
            value = held.lookup(bytes(held.info.key_size)) or b""
        return int.from_bytes(value[:4], sys.byteorder)  # struct bpf_struct_ops_common_value

    @classmethod
    def open(cls, path: Path) -> StructOps:
        """Open the map pinned at ``path``. Raises NodeError if something else is pinned there, KernelError."""
        with Map.open(path) as held:
            return cls(os.dup(held.fd), path)

    @classmethod
    def by_id(cls, program_id: int) -> StructOps:
        """Open the map with the kernel's id. Raises KernelError (ENOENT if it is gone)."""
        with Map.by_id(program_id) as held:
            return cls(os.dup(held.fd), f"map {program_id}")


def congestion_controls() -> list[str]:
    """The names of all that the kernel offers, whoever registered them."""
    return _CONGESTION.read_text().split()
