"""Where figures are from."""

from __future__ import annotations

import gzip
import os
import platform
import re
from pathlib import Path

import msgspec

__all__ = ["Machine", "this_machine"]


class Machine(msgspec.Struct, frozen=True):
    """Where figures are from."""

    cpu: str
    cores: int
    kernel: str
    preemption: str

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} cores, Linux {self.kernel}, preemption {self.preemption}"


def this_machine() -> Machine:
    """This one, as it is now."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cpu, cores = model[1] if model else platform.machine(), len(os.sched_getaffinity(0))
    return Machine(cpu, cores, platform.release(), _preemption())


def _preemption() -> str:
    """The kernel's preemption model: as it runs, else as it was told to, else as it was built."""
    running = Path("/sys/kernel/debug/sched/preempt")
    if running.exists() and (chosen := re.search(r"\((\w+)\)", running.read_text())):
        return chosen[1]
    if told := re.search(r"\bpreempt=(\w+)", Path("/proc/cmdline").read_text()):
        return told[1]
    built = Path("/proc/config.gz")
    if built.exists():
        config = gzip.decompress(built.read_bytes()).decode()
        kinds = re.findall(r"^CONFIG_PREEMPT_(NONE|VOLUNTARY|LAZY)=y", config, re.MULTILINE)
        return f"{kinds[0].lower() if kinds else 'full'} (as built)"
    return "unknown"
