"""bpf(2) as any program can call it that knows nothing of hitless: ids of all objects, and pins below a directory."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ids", "map_id", "pin_below", "pin_below_by_proc"]

_NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280}[platform.machine()]
_OBJ_GET = 7
_NEXT_ID = {"program": 11, "map": 12, "btf": 23, "link": 31}
_F_PATH_FD = 1 << 14

_libc = ctypes.CDLL(None, use_errno=True)


class _Get(ctypes.Structure):
    _fields_ = (
        ("path", ctypes.c_char_p), ("fd", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("directory", ctypes.c_int32),
    )  # fmt: skip


class _Next(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint32), ("next", ctypes.c_uint32), ("flags", ctypes.c_uint32))


def pin_below(directory: int, name: str) -> int:
    """A descriptor of what is pinned under ``name`` in an open directory (BPF_F_PATH_FD, Linux 6.5)."""
    return _bpf(_OBJ_GET, _Get(name.encode(), 0, _F_PATH_FD, directory))


def pin_below_by_proc(directory: int, name: str) -> int:
    """The same before Linux 6.5, and with a libbpf that knows no path_fd."""
    return _bpf(_OBJ_GET, _Get(f"/proc/self/fd/{directory}/{name}".encode(), 0, 0, 0))


def map_id(fd: int) -> int:
    """The kernel's id of the map that a descriptor holds."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("map_id:"))


def ids(kind: str) -> Iterator[int]:
    """The ids of all that the kernel has of a ``kind``: program, map, btf or link."""
    asked = _Next(0, 0, 0)
    while True:
        try:
            _bpf(_NEXT_ID[kind], asked)
        except FileNotFoundError:
            return
        yield asked.next
        asked.start = asked.next


def _bpf(command: int, attributes: ctypes.Structure) -> int:
    result = int(_libc.syscall(_NUMBER, command, ctypes.byref(attributes), ctypes.sizeof(attributes)))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"bpf command {command}: {errno.errorcode[number]} ({os.strerror(number)})")
    return result
