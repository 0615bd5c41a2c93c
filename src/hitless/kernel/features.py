"""What this kernel can do, found by trying: a version says little, since distributions carry features over."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Container
from pathlib import Path

from hitless.carry import VISITED, visiting
from hitless.errors import KernelError, UnsupportedError
from hitless.hooks import SLEEPABLE, TCX
from hitless.kernel.barrier import can_wait_for_sleepable
from hitless.kernel.codegen import EXIT, MOV_IMM, R0, Assembler
from hitless.kernel.iterators import Iterator
from hitless.kernel.libbpf import PASSING
from hitless.kernel.links import Link
from hitless.kernel.maps import create
from hitless.kernel.programs import load_code
from hitless.kernel.sockets import probe_sockets
from hitless.kernel.storage import probe_storage
from hitless.layout.answers import ANSWERS, answer

__all__ = ["ITERATE_HASH", "boot_id", "features", "is_known", "release"]

ITERATE_HASH = "iter/bpf_map_elem"
"""A program of ours can be run for each entry of a hash map."""

_HASH = 1  # BPF_MAP_TYPE_HASH
_SCHED_CLS = 3  # BPF_PROG_TYPE_SCHED_CLS
_NO_INTERFACE = 0x7FFFFFFF  # the highest index, which the kernel does not come to


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


def _visits(kind: str) -> bool:
    try:
        if answer(kind).kind == "sockets":
            probe_sockets()
        else:
            probe_storage(kind)
    except (KernelError, UnsupportedError) as error:
        return _is_absent(error)
    return True


def _has_tcx() -> bool:
    asm = Assembler()
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)
    with load_code(_SCHED_CLS, "probe", asm.code(), "a program that tries tcx") as program:
        try:
            Link.attach(program, _NO_INTERFACE, "tcx_ingress", "no interface").close()
        except KernelError as error:
            if error.facts["errno"] not in (errno.ENODEV, errno.EINVAL):
                raise
            return bool(error.facts["errno"] == errno.ENODEV)  # else it does not even look for the interface
    raise AssertionError("an interface has the highest index that there can be")


def _is_absent(error: KernelError | UnsupportedError) -> bool:
    """False, the answer of a probe; but raises ``error`` where it says nothing of what the kernel can do.

    A plan made without the feature would promise less than this kernel can keep.
    """
    if error.facts.get("errno") in PASSING:
        raise error
    return False


_PROBES = {ITERATE_HASH: _iterates_hash, SLEEPABLE: can_wait_for_sleepable, TCX: _has_tcx} | {
    visiting(kind): functools.partial(_visits, kind) for kind, found in ANSWERS.items() if found.kind in VISITED
}
