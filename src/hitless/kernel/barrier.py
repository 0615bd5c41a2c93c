"""Waiting until no CPU still runs a program that was taken off its hook.

A kernel that leaves CPUs alone (``nohz_full=``) refuses membarrier(2) for all of them. There a map of maps is updated:
the kernel ends that call when all programs that may be using the old inner map have ended (its commit 1ae80cf31938).

Two waits, since the kernel guards programs that may sleep by another kind of RCU (tasks trace). No system call is made
for waiting on that one; but a probe of user code that is taken away waits for it, whatever the code is. Ours is a byte
of a file in memory that nobody executes.
"""

from __future__ import annotations

import errno
import os
import sys

from hitless.errors import KernelError, UnsupportedError
from hitless.hooks import SLEEPABLE
from hitless.kernel.libbpf import machine_call, options
from hitless.kernel.maps import create
from hitless.kernel.tracing import PROBES, open_probe

__all__ = ["call_membarrier", "wait_for_running_programs", "wait_for_sleepable_programs"]

_ARRAY, _ARRAY_OF_MAPS = 2, 12  # BPF_MAP_TYPE_*
_CMD_GLOBAL = 1  # MEMBARRIER_CMD_GLOBAL: synchronize_rcu() in the kernel
_SINCE = (6, 13)  # before, a probe waited for another kind of RCU, which no try would show


def wait_for_running_programs(sleepable: bool = False) -> None:
    """Return once every BPF program that ran at the time of the call has ended: 8 ms typical, 80 with ``sleepable``.

    Without ``sleepable``, programs that may sleep are left out. An iterator runs during each read of its output, and
    again in the next one. Raises UnsupportedError on a machine or kernel where there is no way, KernelError.
    """
    try:
        call_membarrier()
    except KernelError as error:
        if error.facts["errno"] != errno.EINVAL:
            raise
        _update_map_of_maps()
    if sleepable:
        wait_for_sleepable_programs()


def call_membarrier() -> None:
    """The part of it for programs that may not sleep. Raises KernelError: EINVAL where there is another way."""
    machine_call("membarrier", "all CPUs (MEMBARRIER_CMD_GLOBAL)", _CMD_GLOBAL, 0, 0)


def _update_map_of_maps() -> None:
    with create(_ARRAY, "waited", 4, 4, 1) as inner:
        opts = options("bpf_map_create_opts", inner_map_fd=inner.fd)
        with create(_ARRAY_OF_MAPS, "waiting", 4, 4, 1, opts) as outer:
            outer.update(bytes(4), inner.fd.to_bytes(4, sys.byteorder))


def wait_for_sleepable_programs() -> None:
    """The part of it for programs that may sleep. Raises UnsupportedError where there is no way, KernelError."""
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    if (major, minor) < _SINCE or not PROBES.exists():
        raise UnsupportedError(
            f"this kernel ({os.uname().release}) has no way to wait for sleepable programs: hitless knows of one in "
            f"Linux {'.'.join(map(str, _SINCE))} and later, with probes of user code ({PROBES})",
            feature=SLEEPABLE,
        )
    file = os.memfd_create("barrier", os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, 1)
        os.close(open_probe(f"/proc/self/fd/{file}"))
    finally:
        os.close(file)
