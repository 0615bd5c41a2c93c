"""A page of this process's memory that is not there until it is given: who needs it sleeps, also in the kernel."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import time

_USERFAULTFD = {"x86_64": 323}.get(platform.machine(), 282)
_API, _REGISTER, _ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
_MISSING = 1
_PAGE = mmap.PAGESIZE


class Page:
    """Made absent; given at the end of the block at the latest."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._given = False
        self._fd = ctypes.CDLL(None, use_errno=True).syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        assert self._fd >= 0, ctypes.get_errno()
        fcntl.ioctl(self._fd, _API, struct.pack("=QQQ", 0xAA, 0, 0))
        fcntl.ioctl(self._fd, _REGISTER, struct.pack("=QQQQ", self.address, _PAGE, _MISSING, 0))

    def wait(self) -> None:
        """Until somebody needs it."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            try:
                os.read(self._fd, 32)
            except BlockingIOError:
                time.sleep(0.001)
            else:
                return
        raise TimeoutError

    def give(self) -> None:
        """Let those go on who wait for it."""
        if not self._given:
            fcntl.ioctl(self._fd, _ZEROPAGE, struct.pack("=QQQq", self.address, _PAGE, 0, 0))
            self._given = True

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.give()
        os.close(self._fd)
