"""What this kernel can do, found by trying: a version says little, since distributions carry features over."""

from __future__ import annotations

import functools
import os
from collections.abc import Container
from pathlib import Path

from hitless.carry import LATER, VISITED, having, visiting
from hitless.errors import KernelError, UnsupportedError
from hitless.hooks import SLEEPABLE, SOCKMAP_LINK
from hitless.kernel.barrier import can_wait_for_sleepable
from hitless.kernel.codegen import EXIT, MOV_IMM, R0, Assembler
from hitless.kernel.iterators import Iterator
from hitless.kernel.libbpf import PASSING, options
from hitless.kernel.links import Link
from hitless.kernel.maps import create
from hitless.kernel.names import attach_number, program_number
from hitless.kernel.programs import load_code
from hitless.kernel.sockets import probe_sockets
from hitless.kernel.storage import create_storage, probe_storage
from hitless.layout.answers import ANSWERS, answer
from hitless.layout.elf import MAP_TYPES

__all__ = ["ITERATE_HASH", "boot_id", "features", "is_known", "release"]

ITERATE_HASH = "iter/bpf_map_elem"
"""A program of ours can be run for each entry of a hash map."""

_HASH = 1  # BPF_MAP_TYPE_HASH
_NO_PREALLOC, _MMAPABLE = 1, 1 << 10  # BPF_F_NO_PREALLOC, BPF_F_MMAPABLE
# Sizes of key and value, entries and flags of maps that are made for a try.
_SMALLEST = {
    "bloom_filter": (0, 4, 1, 0),
    "user_ringbuf": (0, 0, os.sysconf("SC_PAGESIZE"), 0),
    "arena": (0, 0, 1, _MMAPABLE),
}


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


class _Features(Container[str]):
    def __contains__(self, name: object) -> bool:
        return _has(str(name))


@functools.cache
def _has(name: str) -> bool:
    return name in _PROBES and _PROBES[name]()


def _iterates_hash() -> bool:
    asm = Assembler()
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)
    try:
        iterator = Iterator.load(ITERATE_HASH.removeprefix("iter/"), asm.code(), "probe")
    except (KernelError, UnsupportedError) as error:
        return _is_absent(error)
    try:
        with create(_HASH, "probe", 4, 4, 1) as probe:
            iterator.run(probe)
    except KernelError as error:
        return _is_absent(error)
    finally:
        iterator.close()
    return True


def _links_sockmaps() -> bool:
    asm = Assembler()
    asm.emit(MOV_IMM, R0, imm=1)  # SK_PASS
    asm.emit(EXIT)
    verdict = "sk_msg_verdict"
    with create(MAP_TYPES.index("sockmap"), "probe", 4, 4, 1) as probe:
        try:
            kind = {"expected_attach_type": attach_number(verdict)}
            with load_code(program_number("sk_msg"), "probe", asm.code(), "a probe", **kind) as program:
                Link.attach(program, probe.fd, verdict, "a probe").close()
        except KernelError as error:
            return _is_absent(error)
    return True


def _visits(kind: str) -> bool:
    try:
        if answer(kind).kind == "sockets":
            probe_sockets()
        else:
            probe_storage(kind)
    except (KernelError, UnsupportedError) as error:
        return _is_absent(error)
    return True


def _makes(kind: str) -> bool:
    try:
        if answer(kind).kind == "storage":
            create_storage(kind, _NO_PREALLOC, "probe", 8).close()
        else:
            key, value, entries, flags = _SMALLEST[kind]
            opts = options("bpf_map_create_opts", map_flags=flags)
            create(MAP_TYPES.index(kind), "probe", key, value, entries, opts).close()
    except KernelError as error:
        return _is_absent(error)
    return True


def _is_absent(error: KernelError | UnsupportedError) -> bool:
    """False, the answer of a probe; but raises ``error`` where it says nothing of what the kernel can do.

    A plan made without the feature would promise less than this kernel can keep.
    """
    if error.facts.get("errno") in PASSING:
        raise error
    return False


_PROBES = {
    ITERATE_HASH: _iterates_hash,
    SLEEPABLE: can_wait_for_sleepable,
    SOCKMAP_LINK: _links_sockmaps,
} | {
    visiting(kind): functools.partial(_visits, kind) for kind, found in ANSWERS.items() if found.kind in VISITED
}
_PROBES |= {having(kind): functools.partial(_makes, kind) for kind in LATER}
