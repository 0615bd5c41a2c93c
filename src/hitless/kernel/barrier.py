"""Waiting until no CPU still runs a program that was taken off its hook."""

from __future__ import annotations

import platform

from hitless.errors import UnsupportedError
from hitless.kernel.libbpf import check, ffi, libc

__all__ = ["wait_for_running_programs"]

_NUMBER = {"x86_64": 324, "aarch64": 283, "riscv64": 283}  # __NR_membarrier
_CMD_GLOBAL = 1  # MEMBARRIER_CMD_GLOBAL: synchronize_rcu() in the kernel


def wait_for_running_programs() -> None:
    """Return once every non-sleepable BPF program that ran at the time of the call has ended (8 ms typical).

    Raises UnsupportedError on a machine whose number of membarrier(2) is not known, KernelError.
    """
    number = _NUMBER.get(platform.machine())
    if number is None:
        raise UnsupportedError(f"membarrier(2) on {platform.machine()} is not known to hitless", feature="membarrier")
    # A variadic C call takes its arguments as they are typed here.
    command, zero = ffi.cast("long", _CMD_GLOBAL), ffi.cast("long", 0)
    check(libc().syscall(number, command, zero, zero), "membarrier(MEMBARRIER_CMD_GLOBAL)", "all CPUs")
