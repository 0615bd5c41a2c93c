"""Waiting until no CPU still runs a program that was taken off its hook."""

from __future__ import annotations

from hitless.kernel.libbpf import machine_call

__all__ = ["wait_for_running_programs"]

_CMD_GLOBAL = 1  # MEMBARRIER_CMD_GLOBAL: synchronize_rcu() in the kernel


def wait_for_running_programs() -> None:
    """Return once every non-sleepable BPF program that ran at the time of the call has ended (8 ms typical).

    Raises UnsupportedError on a machine whose number of membarrier(2) is not known, KernelError.
    """
    machine_call("membarrier", "all CPUs (MEMBARRIER_CMD_GLOBAL)", _CMD_GLOBAL, 0, 0)
