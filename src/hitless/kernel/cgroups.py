"""Programs attached to a cgroup the old way, without a link (BPF_PROG_ATTACH), and where they keep links out."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hitless.errors import GoneError, KernelError, NodeError
from hitless.kernel.libbpf import check, ffi, lib, options, system_call
from hitless.kernel.links import all_links
from hitless.kernel.mounts import filesystem
from hitless.kernel.names import attach_number
from hitless.kernel.programs import Program

__all__ = ["CgroupPlace", "keeps_links_out"]

_OVERRIDE, _MULTI, _REPLACE = 1, 2, 4  # BPF_F_ALLOW_OVERRIDE, BPF_F_ALLOW_MULTI, BPF_F_REPLACE
_MOST = 64  # programs of one cgroup and attach type


class CgroupPlace(msgspec.Struct, frozen=True):
    """Where programs of one attach type are attached the old way: the cgroup at ``path`` with the kernel's ``id``."""

    path: str
    id: int
    attach_type: str

    def __str__(self) -> str:
        return f"{self.attach_type} of cgroup {self.path}"

    def programs(self) -> list[int]:
        """The ids of those that no link holds, in the order they run; none if the cgroup is gone."""
        try:
            with self._opened() as fd:
                found, _ = _query(fd, self.attach_type, self)
        except GoneError:
            return []
        if not found:
            return []
        linked = Counter(
            link.program_id
            for link in all_links()
            if (link.type, link.target_id, link.attach_type) == ("cgroup", self.id, self.attach_type)
        )
        out = []
        for one in found:
            if linked[one]:
                linked[one] -= 1
            else:
                out.append(one)
        return out

    def update(self, new: Program, old: Program) -> None:
        """Run ``new`` in the place of ``old`` from now on: each call is seen by one of the two.

        This compares and swaps where several programs are allowed (BPF_F_ALLOW_MULTI). Elsewhere there is one, and the
        kernel replaces it whatever it is: it is looked at right before. Raises NodeError if ``old`` is not there,
        GoneError if the cgroup is not, KernelError.
        """
        with self._opened() as fd:
            there, flags = _query(fd, self.attach_type, self)
            if old.info.id not in there:
                raise self._missing(there, old)
            opts = options("bpf_prog_attach_opts", flags=flags)
            if flags & _MULTI:
                opts.flags, opts.replace_prog_fd = flags | _REPLACE, old.fd
            result = lib().bpf_prog_attach_opts(new.fd, fd, attach_number(self.attach_type), opts)
            try:
                check(result, "BPF_PROG_ATTACH", self)
            except KernelError as error:
                if error.facts["errno"] != errno.ENOENT:
                    raise
                raise self._missing(there, old) from error

    def detach(self, old: Program) -> None:
        """Take ``old`` off the cgroup. Raises as :meth:`update`."""
        with self._opened() as fd:
            there, _ = _query(fd, self.attach_type, self)
            if old.info.id not in there:
                raise self._missing(there, old)
            check(lib().bpf_prog_detach2(old.fd, fd, attach_number(self.attach_type)), "BPF_PROG_DETACH", self)

    def _missing(self, there: list[int], old: Program) -> NodeError:
        runs = ", ".join(map(str, there)) or "none"
        return NodeError(
            f"{self} does not run program {old.info.id} as expected: somebody took it off (there: {runs}); look at who "
            "uses this cgroup (bpftool cgroup show), then plan again",
            cgroup=self.path,
            programs=there,
            expected=old.info.id,
        )

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise GoneError(f"cgroup {self.path} is not there any more", cgroup=self.path) from None
        try:
            if os.fstat(fd).st_ino != self.id:
                raise GoneError(f"cgroup {self.path} was removed, and another made in its place", cgroup=self.path)
            yield fd
        finally:
            os.close(fd)


def keeps_links_out(cgroup: Path, attach_type: str) -> tuple[Path, list[int]] | None:
    """Where programs are that allow no others beside or below them, so that no link can be attached to ``cgroup``.

    That is the cgroup itself or one above it, with the ids; None if there are none. Raises KernelError.
    """
    for place in (cgroup, *cgroup.parents):
        if filesystem(place) != "cgroup2":
            break
        with system_call("open", place):
            fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            there, flags = _query(fd, attach_type, place)
        finally:
            os.close(fd)
        if there and not flags & _MULTI and (place == cgroup or not flags & _OVERRIDE):
            return place, there
        if place != cgroup and (there or flags & _MULTI):
            break  # the nearest decides
    return None


def _query(fd: int, attach_type: str, what: object) -> tuple[list[int], int]:
    """Ids of the programs, in the order they run, and the flags that they were attached with."""
    flags, ids, count = ffi.new("__u32 *"), ffi.new("__u32[]", _MOST), ffi.new("__u32 *", _MOST)
    result = lib().bpf_prog_query(fd, attach_number(attach_type), 0, flags, ids, count)
    check(result, "BPF_PROG_QUERY", what)
    return [int(ids[index]) for index in range(count[0])], int(flags[0])
