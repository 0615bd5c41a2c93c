"""struct_ops: structs of functions of the kernel whose functions are programs. A map takes a program's place there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hitless.errors import GoneError, NodeError
from hitless.kernel.libbpf import Object, system_call
from hitless.kernel.maps import Map
from hitless.kernel.namespaces import entered, namespaces
from hitless.kernel.programs import Program, ProgramInfo

__all__ = ["StructOps", "congestion_controls", "renew_defaults"]

_CONGESTION = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
_DEFAULT = Path("/proc/sys/net/ipv4/tcp_congestion_control")
_NAMED = "/run/netns/*"  # where `ip netns` and container runtimes put namespaces


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
        """How many have it: a link, sockets until they end, and network namespaces whose default it is."""
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


def renew_defaults(name: str) -> None:
    """Give what is called ``name`` now to the network namespaces whose default has this name.

    A link update does not do that: they keep what had the name when it became their default, for sockets to come as
    well. Looks at our own and at those in /run/netns. Raises KernelError.
    """
    for namespace in (*namespaces(""), *namespaces(_NAMED)):
        try:
            with entered(namespace), system_call("write", _DEFAULT):
                if _DEFAULT.read_text().strip() == name:
                    _DEFAULT.write_text(name)
        except GoneError:
            continue
