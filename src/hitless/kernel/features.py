"""What this kernel can do, found by trying: a version says little, since distributions carry features over.

What the names mean, and what is done without, is in :mod:`hitless.features`.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from hitless.carry import ITERATE_HASH, VISITED, visiting
from hitless.errors import KernelError, UnsupportedError
from hitless.features import (
    CGROUP_UNIX,
    EVENT_INFO,
    FILTERS,
    INNER_LOCK,
    KERNEL_MEMORY,
    MEMBARRIER,
    NETFILTER_LINK,
    STRUCT_OPS_LINK,
)
from hitless.hooks import SLEEPABLE, SOCKMAP_LINK, TCX
from hitless.kernel.barrier import call_membarrier, wait_for_sleepable_programs
from hitless.kernel.codegen import EXIT, FP, MOV_IMM, R0, R1, R2, R3, Assembler
from hitless.kernel.filters import probe_filters
from hitless.kernel.iterators import Iterator
from hitless.kernel.libbpf import PASSING, check, ffi, lib, options
from hitless.kernel.maps import create, create_as
from hitless.kernel.names import attach_number, program_number
from hitless.kernel.programs import Program, load_code
from hitless.kernel.sockets import probe_sockets
from hitless.kernel.storage import create_storage, probe_storage
from hitless.kernel.tracing import attach_event
from hitless.layout.answers import ANSWERS, answer
from hitless.layout.model import Field, Int, MapSpec, Record

__all__ = ["absence", "boot_id", "features", "is_known", "release"]

_HASH, _ARRAY_OF_MAPS, _BLOOM_FILTER, _USER_RINGBUF, _ARENA = 1, 12, 30, 31, 33  # BPF_MAP_TYPE_*
_F_NO_PREALLOC, _F_MMAPABLE = 1, 1 << 10  # BPF_F_*
_PROBE_READ_KERNEL = 113  # bpf_probe_read_kernel
_NO_INTERFACE = 0x7FFFFFFF
_NO_FILE = -1
_NEVER = 1 << 62  # a period that no count reaches
_WITH_ELDERS = (TCX, SOCKMAP_LINK)  # what else would be done because of who asks, and be said to be for the kernel
_TRACE_FENTRY = 24  # BPF_TRACE_FENTRY: libbpf looks for a function by its own name


def release() -> str:
    """The release of the kernel that runs, as ``uname -r`` prints it."""
    return os.uname().release


def boot_id() -> str:
    """The kernel's id of this run of the machine: after the next start it is another one, and so are all its ids."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def features() -> Container[str]:
    """The names of all features that this kernel has and this process may use; each is tried when first asked for.

    Asking raises KernelError where trying failed for another reason than that the kernel has not got it (ENOMEM).
    """
    return _Features()


def is_known(name: str) -> bool:
    """Whether ``name`` is that of a feature that can be tried here."""
    return name in _PROBES


@functools.cache
def absence(name: str) -> str | None:
    """What trying feature ``name`` came to: the kernel's answer, or None if it is there.

    Raises KernelError as :func:`features` does.
    """
    try:
        _PROBES[name]()
    except (KernelError, UnsupportedError) as error:
        number = error.facts.get("errno")
        if number in PASSING or (number == errno.EPERM and name in _WITH_ELDERS):
            raise  # a plan made without the feature would promise less than this kernel can keep
        return error.message.partition("\n")[0].rstrip(":")
    return None


class _Features(Container[str]):
    def __contains__(self, name: object) -> bool:
        return is_known(str(name)) and absence(str(name)) is None


def _code(value: int = 0) -> bytes:
    asm = Assembler()
    asm.emit(MOV_IMM, R0, imm=value)
    asm.emit(EXIT)
    return asm.code()


def _iterate_hash() -> None:
    iterator = Iterator.load(ITERATE_HASH.removeprefix("iter/"), _code(), "probe")
    try:
        with create(_HASH, "probe", 4, 4, 1) as probe:
            iterator.run(probe)
    finally:
        iterator.close()


def _visit(kind: str) -> None:
    if answer(kind).kind == "sockets":
        probe_sockets()
    else:
        probe_storage(kind)


def _read_kernel_memory() -> None:
    asm = Assembler()
    asm.pointer(R1, FP, -8)
    asm.emit(MOV_IMM, R2, imm=8)
    asm.emit(MOV_IMM, R3, imm=0)
    asm.call(_PROBE_READ_KERNEL)
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)
    Iterator.load("task", asm.code(), "probe").close()


def _load(program: str, attach_type: str) -> Program:
    what = f"a {program} program that does nothing"
    fields = {"expected_attach_type": attach_number(attach_type)} if attach_type else {}
    return load_code(program_number(program), "probe", _code(1), what, **fields)


def _load_only(program: str, attach_type: str) -> None:
    _load(program, attach_type).close()


def _link(program: str, attach_type: str, loaded_as: str, target: int, answered: int) -> None:
    """Ask for a link on what does not exist: a kernel that has such links looks for it, and says ``answered``."""
    with _load(program, loaded_as) as loaded:
        fd = lib().bpf_link_create(loaded.fd, target, attach_number(attach_type), ffi.NULL)
    if fd >= 0 or -fd != answered:
        check(fd, "BPF_LINK_CREATE", f"{attach_type} of what does not exist")


def _tell_of_an_event() -> None:
    cpu = min(os.sched_getaffinity(0))
    with _load("perf_event", "") as loaded, attach_event(loaded, "page-faults", _NEVER, cpu) as link:
        if not link.info.attach_type:
            raise UnsupportedError("the kernel does not tell what such a link is attached to", feature=EVENT_INFO)


def _search(function: str) -> None:
    what = f"{function} of the kernel's BTF (/sys/kernel/btf/vmlinux)"
    check(lib().libbpf_find_vmlinux_btf_id(function.encode(), _TRACE_FENTRY), "libbpf_find_vmlinux_btf_id", what)


def _put_lock_into_inner_map() -> None:
    word = Int("__u32", 4, False)
    lock = Record("bpf_spin_lock", 4, (Field("val", word, 0),))
    spec = MapSpec("probe", "array", 4, 4, 1, key=word, value=Record("held", 4, (Field("lock", lock, 0),)))
    with create_as(spec) as inner:
        create(_ARRAY_OF_MAPS, "probe", 4, 4, 1, options("bpf_map_create_opts", inner_map_fd=inner.fd)).close()


def _make(kind: int, value_size: int, max_entries: int, flags: int = 0) -> None:
    create(kind, "probe", 0, value_size, max_entries, options("bpf_map_create_opts", map_flags=flags)).close()


def _make_storage(kind: str) -> None:
    create_storage(kind, _F_NO_PREALLOC, "probe", 8).close()


_PROBES: Mapping[str, Callable[[], None]] = {
    ITERATE_HASH: _iterate_hash,
    **{visiting(kind): functools.partial(_visit, kind) for kind, found in ANSWERS.items() if found.kind in VISITED},
    MEMBARRIER: call_membarrier,
    SLEEPABLE: wait_for_sleepable_programs,
    TCX: functools.partial(_link, "sched_cls", "tcx_ingress", "", _NO_INTERFACE, errno.ENODEV),
    FILTERS: probe_filters,
    NETFILTER_LINK: functools.partial(_load_only, "netfilter", "netfilter"),
    EVENT_INFO: _tell_of_an_event,
    SOCKMAP_LINK: functools.partial(_link, "sk_msg", "sk_msg_verdict", "sk_msg_verdict", _NO_FILE, errno.EBADF),
    KERNEL_MEMORY: _read_kernel_memory,
    STRUCT_OPS_LINK: functools.partial(_search, "bpf_struct_ops_link_create"),
    CGROUP_UNIX: functools.partial(_load_only, "cgroup_sock_addr", "cgroup_unix_connect"),
    INNER_LOCK: _put_lock_into_inner_map,
    "map/bloom_filter": functools.partial(_make, _BLOOM_FILTER, 4, 1),
    "map/user_ringbuf": functools.partial(_make, _USER_RINGBUF, 0, os.sysconf("SC_PAGE_SIZE")),
    "map/cgrp_storage": functools.partial(_make_storage, "cgrp_storage"),
    "map/arena": functools.partial(_make, _ARENA, 0, 1, _F_MMAPABLE),
}
