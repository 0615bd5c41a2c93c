"""bpf_links: made once, then updated in place by compare-and-swap, so that a hook is never without a program."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from hitless.errors import KernelError, NodeError
from hitless.hooks import EVENTS, FAMILIES, POINTS, NetfilterPoint
from hitless.kernel.libbpf import Object, check, ffi, lib, machine_call, options, pinned_kind
from hitless.kernel.mounts import filesystem
from hitless.kernel.names import attach_name, attach_number, link_name
from hitless.kernel.programs import Program

__all__ = ["TARGETS", "Link", "LinkInfo", "all_links", "cgroup_id", "create_link"]

_F_REPLACE = 1 << 2  # BPF_F_REPLACE
_LINK_CREATE = 28  # a command of bpf(2)
_TRACE_ITER = 28  # BPF_TRACE_ITER
_PARENTS_FIRST = 2  # BPF_CGROUP_ITER_DESCENDANTS_PRE
_PERF_EVENTS = {1: "uprobe", 2: "uretprobe", 5: "tracepoint"}  # enum bpf_perf_event_type
_PERF_SAMPLED = 6  # BPF_PERF_EVENT_EVENT
_NAME_BYTES = 4096  # a path's

TARGETS = {
    "cgroup": ("cgroup", "cgroup_id"),
    "netns": ("netns", "netns_ino"),
    "sockmap": ("map", "map_id"),
    "tc": ("interface", "ifindex"),
    "tcx": ("interface", "ifindex"),
    "xdp": ("interface", "ifindex"),
    "xdp_netlink": ("interface", "ifindex"),
}
"""By type of link: what it is attached to, and the kernel's name for the number that it has.

``tc`` and ``xdp_netlink`` are no links, but told in the same words: see :mod:`hitless.upgrade.notes`.
"""


class LinkInfo(msgspec.Struct, frozen=True):
    """What the kernel says of a link.

    ``target_id`` is the number of what it is attached to, for the types in TARGETS: of a cgroup its id, of an interface
    its index, of a network namespace its inode, of a map its id; of a probe of user code the place in the file, in
    bytes; of a sampled event its CPU's number and one. 0 is none. ``attach_type`` is the kernel's name of the
    hook, and of those that are many things at once (netfilter, tracepoints, iterators) which one it is. Of what is
    attached without a link ``id`` is 0, and a tc filter has its ``priority`` and ``handle``. Of a link of struct_ops
    ``program_id`` is the id of the map. ``file`` is the inode of the file that a probe is in, 0 if nobody noted it.
    """

    id: int
    type: str
    program_id: int
    target_id: int = 0
    attach_type: str = ""
    priority: int = 0
    handle: int = 0
    file: int = 0

    @property
    def is_dead(self) -> bool:
        """Whether it runs nowhere: its target was removed, or somebody detached it.

        Told of types in TARGETS and of struct_ops only.
        """
        return (self.type in TARGETS and self.target_id == 0) or (self.type == "struct_ops" and self.program_id == 0)

    @property
    def where(self) -> str:
        """What it is attached to, as in ``cgroup 17``."""
        where = "netns" if self.type == "netfilter" else TARGETS.get(self.type, (self.type,))[0]
        return f"{where} {self.target_id}" if self.target_id or self.type in TARGETS else where


class Link(Object):
    """One bpf_link, held by a descriptor."""

    @property
    def info(self) -> LinkInfo:
        """The link's facts as they are now: its program changes."""
        raw = ffi.new("struct bpf_link_info *")
        length = ffi.new("__u32 *", ffi.sizeof("struct bpf_link_info"))
        check(lib().bpf_obj_get_info_by_fd(self.fd, raw, length), "BPF_OBJ_GET_INFO_BY_FD", "link")
        kind = link_name(raw.type)
        if kind == "struct_ops":
            return LinkInfo(id=raw.id, type=kind, program_id=raw.struct_ops.map_id, attach_type=kind)
        if kind not in TARGETS:
            probed = kind == "perf_event" and raw.perf_event.type != _PERF_SAMPLED
            target = raw.iter.cgroup_id if kind == "iter" else raw.perf_event.offset if probed else 0
            place = self._place(kind, raw)
            return LinkInfo(id=raw.id, type=kind, program_id=raw.prog_id, target_id=target, attach_type=place)
        own = getattr(raw, kind)
        return LinkInfo(
            id=raw.id,
            type=kind,
            program_id=raw.prog_id,
            target_id=getattr(own, TARGETS[kind][1]),
            attach_type="xdp" if kind == "xdp" else attach_name(own.attach_type),
        )

    def _place(self, kind: str, told: Any) -> str:
        if kind == "netfilter":
            own = told.netfilter
            family = next((name for name, number in FAMILIES.items() if number == own.pf), f"family{own.pf}")
            return f"netfilter {NetfilterPoint(family, POINTS[own.hooknum], own.priority)}"
        if kind == "perf_event" and told.perf_event.type in _PERF_EVENTS:
            return f"{_PERF_EVENTS[told.perf_event.type]} {self._name(kind)}"
        if kind == "perf_event" and told.perf_event.type == _PERF_SAMPLED:
            own = told.sampled.type, told.sampled.config
            return f"perf_event {next((name for name, numbers in EVENTS.items() if numbers == own), own)}"
        return f"{kind} {self._name(kind)}" if kind in ("iter", "raw_tracepoint") else ""

    def _name(self, kind: str) -> str:
        """Of the tracepoint, the probed file, or what is iterated over."""
        raw, buffer = ffi.new("struct bpf_link_info *"), ffi.new("char[]", _NAME_BYTES)
        own = getattr(raw, kind)
        own.name, own.name_len = int(ffi.cast("uintptr_t", buffer)), _NAME_BYTES
        length = ffi.new("__u32 *", ffi.sizeof("struct bpf_link_info"))
        check(lib().bpf_obj_get_info_by_fd(self.fd, raw, length), "BPF_OBJ_GET_INFO_BY_FD", "link")
        return str(ffi.string(buffer).decode())

    @classmethod
    def open(cls, path: Path) -> Link:
        """Open the link pinned at ``path``. Raises NodeError if something else is pinned there, KernelError."""
        fd, kind = pinned_kind(path)
        if kind != "link":
            os.close(fd)
            raise NodeError(f"{path} is a pinned {kind}, not a link; it is not from hitless", path=str(path))
        return cls(fd)

    @classmethod
    def attach_cgroup(cls, program: Program, cgroup: Path, attach_type: str) -> Link:
        """Attach ``program`` to the cgroup v2 directory ``cgroup``, beside whatever is attached there already."""
        target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return cls.attach(program, target, attach_type, cgroup)
        finally:
            os.close(target)

    @classmethod
    def by_id(cls, link_id: int) -> Link:
        """Open the link with the kernel's ``link_id``. Raises KernelError (ENOENT if it is gone)."""
        return cls(check(lib().bpf_link_get_fd_by_id(link_id), "BPF_LINK_GET_FD_BY_ID", f"link {link_id}"))

    @classmethod
    def attach(cls, program: Program, target: int, attach_type: str, what: object, flags: int = 0) -> Link:
        """Attach ``program`` to ``target``, which errors call ``what``.

        That is an interface's index in the network namespace of this thread, or a descriptor of a network namespace, a
        cgroup or a map; of struct_ops, 0. ``flags`` are those of the attach type (XDP_FLAGS_SKB_MODE).
        Raises KernelError.
        """
        opts = options("bpf_link_create_opts", flags=flags) if flags else ffi.NULL
        fd = lib().bpf_link_create(program.fd, target, attach_number(attach_type), opts)
        return cls(check(fd, "BPF_LINK_CREATE", f"{attach_type} of {what}"))

    @classmethod
    def iterate(cls, program: Program, what: object, cgroup: int = -1) -> Link:
        """Let who reads the pin of the link read what ``program``, an iterator, writes of all there is of ``what``.

        ``cgroup`` is a descriptor of the one from which an iterator over cgroups goes down. Raises KernelError.
        """
        info = ffi.new("union bpf_iter_link_info *")
        if cgroup >= 0:
            info.cgroup.order, info.cgroup.cgroup_fd = _PARENTS_FIRST, cgroup
        size = ffi.sizeof("union bpf_iter_link_info") if cgroup >= 0 else 0
        opts = options("bpf_link_create_opts", iter_info=info if size else ffi.NULL, iter_info_len=size)
        fd = lib().bpf_link_create(program.fd, 0, _TRACE_ITER, opts)
        return cls(check(fd, "BPF_LINK_CREATE", f"an iterator over {what}"))

    def update(self, new: Program, old: Program) -> None:
        """Let the hook run ``new`` from now on, if it runs ``old`` now (compare-and-swap).

        The kernel checks attach types of cgroup links hardly (a connect4 link takes a connect6 program), so the
        caller must have compared them. Raises NodeError if the hook runs something else, KernelError.
        """
        opts = options("bpf_link_update_opts", flags=_F_REPLACE, old_prog_fd=old.fd)
        try:
            check(lib().bpf_link_update(self.fd, new.fd, opts), "BPF_LINK_UPDATE", f"link {self.info.id}")
        except KernelError as error:
            if self.info.program_id not in (old.info.id, new.info.id):
                raise NodeError(
                    f"link {self.info.id} runs program {self.info.program_id}, not {old.info.id} as expected: "
                    "someone else changed it meanwhile; look at who uses this pin root, then plan again",
                    link=self.info.id,
                    program=self.info.program_id,
                    expected=old.info.id,
                ) from error
            raise

    def detach(self) -> None:
        """Take the program off its hook now, whoever still holds the link.

        An iterator has no hook: it is gone with the link's last pin, and who is reading then reads to the end.
        """
        if self.info.type != "iter":
            check(lib().bpf_link_detach(self.fd), "BPF_LINK_DETACH", f"link {self.info.id}")


def create_link(wanted: Any, what: object) -> Link:
    """The link that ``wanted`` asks bpf(2) for (BPF_LINK_CREATE), where libbpf has no options. Raises KernelError."""
    return Link(machine_call("bpf", f"{what} (BPF_LINK_CREATE)", _LINK_CREATE, wanted, ffi.sizeof(wanted[0])))


def all_links() -> Iterator[LinkInfo]:
    """Every link that the kernel has now, whoever made it. Raises KernelError (EPERM without CAP_SYS_ADMIN)."""
    number = ffi.new("__u32 *")
    while True:
        result = lib().bpf_link_get_next_id(number[0], number)
        if result < 0 and ffi.errno == errno.ENOENT:
            return
        check(result, "BPF_LINK_GET_NEXT_ID", "links")
        fd = lib().bpf_link_get_fd_by_id(number[0])
        if fd < 0 and ffi.errno in (errno.ENOENT, errno.EAGAIN):
            continue  # gone meanwhile, or not yet complete
        with Link(check(fd, "BPF_LINK_GET_FD_BY_ID", f"link {number[0]}")) as link:
            yield link.info


def cgroup_id(path: Path) -> int:
    """The kernel's id of the cgroup v2 directory ``path``. Raises NodeError if it is none, or a cgroup v1 one."""
    if not path.is_dir():
        raise NodeError(f"cgroup {path} is not a directory; make it, or correct the target", path=str(path))
    kind = filesystem(path)
    if kind != "cgroup2":
        what = "a cgroup v1 directory" if kind == "cgroup" else f"on {kind}"
        raise NodeError(
            f"{path} is {what}, not a cgroup v2 directory: BPF attaches to cgroup v2 only; "
            "see `mount -t cgroup2` for where it is mounted",
            path=str(path),
            filesystem=kind,
        )
    return path.stat().st_ino
