"""libbpf and the few libc calls beside it: the one place where an errno becomes an exception."""

from __future__ import annotations

import errno as errno_names
import functools
import os
import platform
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel._libbpf import ffi as _generated

__all__ = [
    "ENOTSUPP",
    "PASSING",
    "Object",
    "check",
    "ffi",
    "lib",
    "libc",
    "machine_call",
    "messages",
    "options",
    "pinned_kind",
    "system_call",
]

# C values have no static types.
ffi: Any = _generated

# The kernel's own not-supported errno, which no user-space header and not Python's errno table has.
ENOTSUPP = 524

PASSING = frozenset({errno_names.ENOMEM, errno_names.ENOSPC, errno_names.EBUSY, errno_names.EINTR, errno_names.EAGAIN})
"""Errnos that say nothing of the object or the kernel that was asked: the same call may succeed later."""

_CALLS = {
    "bpf": {"x86_64": 321, "aarch64": 280, "riscv64": 280},
    "fsconfig": {"": 431},  # newer calls have one number on all machines
    "fsmount": {"": 432},
    "fsopen": {"": 430},
    "membarrier": {"x86_64": 324, "aarch64": 283, "riscv64": 283},
    "perf_event_open": {"x86_64": 298, "aarch64": 241, "riscv64": 241},
}

_HINTS = {
    errno_names.EPERM: "run as root with CAP_SYS_ADMIN, and in no user namespace",
    errno_names.ENOSPC: "the kernel has no room for it",
    errno_names.ENOMEM: "the kernel has no memory for it; see the memory limit of this cgroup",
    errno_names.EROFS: "the bpffs is mounted read-only: mount -o remount,rw",
    errno_names.E2BIG: "the map is full; raise its max_entries",
    ENOTSUPP: "this kernel does not support it",
}


@functools.cache
def libc() -> Any:
    """The C library that is already in this process."""
    return ffi.dlopen(None)


@functools.cache
def lib() -> Any:
    """The system's ``libbpf.so.1``. Raises UnsupportedError if there is none."""
    try:
        library = ffi.dlopen("libbpf.so.1")
    except OSError as error:
        raise UnsupportedError(
            f"libbpf.so.1 cannot be loaded: {error}; install it (Debian: apt-get install libbpf1)", feature="libbpf"
        ) from None
    library.libbpf_set_print(_collect)
    return library


def check(result: int, call: str, what: object) -> int:
    """Return ``result`` of libbpf's or libc's ``call`` on ``what``; raise KernelError if it is negative."""
    if result >= 0:
        return result
    # libbpf returns -errno, libc -1; both set errno.
    number = ffi.errno if result == -1 else -result
    name = "ENOTSUPP" if number == ENOTSUPP else errno_names.errorcode.get(number, str(number))
    text = "operation not supported by the kernel" if number == ENOTSUPP else os.strerror(number)
    hint = f"; {_HINTS[number]}" if number in _HINTS else ""
    raise KernelError(
        f"{call} on {what}: {name} ({text}){hint}", call=call, errno=number, errno_name=name, object=str(what)
    )


def machine_call(call: str, what: object, *arguments: Any) -> int:
    """Make system call ``call``, for which libc has no function, with numbers and pointers; return what it returns.

    Raises KernelError about ``what``, UnsupportedError on a machine whose number of the call is not known here.
    """
    number = _CALLS[call].get(platform.machine(), _CALLS[call].get(""))
    if number is None:
        raise UnsupportedError(f"{call}(2) on {platform.machine()} is not known to hitless", feature=call)
    # A variadic C call takes its arguments as they are typed here.
    typed = [ffi.cast("long", one) if isinstance(one, int) else one for one in arguments]
    return check(libc().syscall(number, *typed), call, what)


@contextmanager
def system_call(call: str, what: object) -> Iterator[None]:
    """Let an OSError of the block, which makes system call ``call`` on ``what`` by Python, be a KernelError."""
    try:
        yield
    except OSError as error:
        ffi.errno = error.errno or 0
        check(-1, call, what)


def options(struct: str, **fields: object) -> Any:
    """A zeroed libbpf options structure with its size and ``fields`` filled in."""
    made = ffi.new(f"struct {struct} *")
    made.sz = ffi.sizeof(f"struct {struct}")
    for name, value in fields.items():
        setattr(made, name, value)
    return made


class Object:
    """A kernel object (map, program, link) that this process holds by a file descriptor it owns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Give the descriptor back; the object lives on while pins, links or programs hold it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def memory(self) -> int:
        """Bytes that the kernel holds for it; 0 where the kernel does not tell (links)."""
        for line in Path(f"/proc/self/fdinfo/{self.fd}").read_text().splitlines():
            if line.startswith("memlock:"):
                return int(line.split()[1])
        return 0

    def pin(self, path: Path) -> None:
        """Pin at ``path`` on a bpffs, for its owner alone. Raises KernelError (EEXIST if something is there)."""
        check(lib().bpf_obj_pin(self.fd, os.fsencode(path)), "BPF_OBJ_PIN", path)
        with system_call("chmod", path):
            path.chmod(0o600)  # what the kernel makes of it, if no umask takes from that

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def pinned_kind(path: Path) -> tuple[int, str]:
    """Open the pin at ``path``; return a new descriptor and what it is: ``map``, ``prog``, ``link`` or a name.

    Raises NodeError if ``path`` is a symbolic link, KernelError, also when it is no pin.
    """
    with system_call("BPF_OBJ_GET", path):
        place = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    try:
        if stat.S_ISLNK(os.fstat(place).st_mode):
            raise NodeError(
                f"{path} is a symbolic link, not a pin: hitless makes none there and does not follow it; find out who "
                f"did, then remove it (rm {path})",
                path=str(path),
            )
        if stat.S_ISDIR(os.fstat(place).st_mode):
            raise NodeError(f"{path} is a directory, not a pin; look at it, then remove it", path=str(path))
        # BPF_OBJ_GET follows links, so it gets what was looked at.
        fd = check(lib().bpf_obj_get(f"/proc/self/fd/{place}".encode()), "BPF_OBJ_GET", path)
    finally:
        os.close(place)
    target = str(Path(f"/proc/self/fd/{fd}").readlink())
    return fd, target.removeprefix("anon_inode:").strip("[]").replace("_", "-").removeprefix("bpf-")


# libbpf has one global print function, and calls it in the thread that called libbpf: so who listens is a thread's own.
_ears = threading.local()


@ffi.callback("int (int, const char *, void *)")  # type: ignore[untyped-decorator, unused-ignore]
def _collect(_level: int, template: Any, arguments: Any) -> int:
    heard: list[str] | None = getattr(_ears, "heard", None)
    if heard is not None:
        buffer = ffi.new("char[]", 1 << 16)
        libc().vsnprintf(buffer, len(buffer), template, arguments)
        heard.append(ffi.string(buffer).decode(errors="replace"))
    return 0


@contextmanager
def messages() -> Iterator[list[str]]:
    """Collect what libbpf prints in this thread (its warnings and the verifier's log) while the block runs."""
    previous: list[str] | None = getattr(_ears, "heard", None)
    heard: list[str] = []
    _ears.heard = heard
    try:
        yield heard
    finally:
        _ears.heard = previous
