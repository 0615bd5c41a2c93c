"""Programs attached to a sockmap or sockhash the old way, without a link (BPF_PROG_ATTACH)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from hitless.errors import GoneError, KernelError
from hitless.kernel.dispatcher import attached_program
from hitless.kernel.libbpf import check, lib, options
from hitless.kernel.maps import Map
from hitless.kernel.names import attach_number
from hitless.kernel.programs import Program

__all__ = ["MapPlace"]


class MapPlace(msgspec.Struct, frozen=True):
    """Where the program of one attach type is attached the old way: the map with the kernel's id ``map_id``.

    The kernel refuses that (EBUSY) where a link holds the program.
    """

    map_id: int
    attach_type: str

    def __str__(self) -> str:
        return f"{self.attach_type} of map {self.map_id}"

    def program(self) -> int | None:
        """The id of what is attached there, 0 if nothing is; None if the map is gone. Raises KernelError."""
        try:
            with self.opened() as held:
                return attached_program(held, self.attach_type)
        except GoneError:
            return None

    def put(self, new: Program) -> None:
        """Let ``new`` take the place of whatever is there: sockets that are added from now on get it, no other does.

        There is no compare-and-swap: look right before. Raises GoneError if the map is gone, KernelError.
        """
        with self.opened() as held:
            opts = options("bpf_prog_attach_opts", flags=0)
            result = lib().bpf_prog_attach_opts(new.fd, held.fd, attach_number(self.attach_type), opts)
            check(result, "BPF_PROG_ATTACH", self)

    def take_off(self, old: Program) -> None:
        """Take ``old`` off the map, if that is what is there; sockets that have it keep it. Raises as :meth:`put`."""
        with self.opened() as held:
            result = lib().bpf_prog_detach2(old.fd, held.fd, attach_number(self.attach_type))
            try:
                check(result, "BPF_PROG_DETACH", self)
            except KernelError as error:
                if error.facts["errno"] != errno.ENOENT:
                    raise

    @contextmanager
    def opened(self) -> Iterator[Map]:
        """The map. Raises GoneError, KernelError."""
        try:
            held = Map.by_id(self.map_id)
        except KernelError as error:
            if error.facts["errno"] != errno.ENOENT:
                raise
            raise GoneError(f"map {self.map_id} is not there any more", map=self.map_id) from error
        with held:
            yield held
