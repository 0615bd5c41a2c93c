"""What root's power is divided into, and which parts of it hitless uses: found by trying, see docs/security.md."""

from __future__ import annotations

import msgspec

from hitless.errors import NodeError
from hitless.kernel.libbpf import check, ffi, libc

__all__ = ["USED", "Capability", "drop_others", "held", "require"]

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of 32 bits
_CAPBSET_READ, _CAPBSET_DROP, _CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL = 23, 24, 47, 4  # prctl(2)
_SETPCAP = 8


class Capability(msgspec.Struct, frozen=True):
    """One capability, by the kernel's name and number. ``needed``: nothing works without."""

    name: str
    number: int
    purpose: str
    needed: bool = False


USED = (
    Capability(
        "CAP_SYS_ADMIN", 21, "open BTF, programs and maps by their ids, load programs and attach them", needed=True
    ),
    Capability("CAP_SYS_PTRACE", 19, "see which processes hold a map or a ring buffer"),
    Capability("CAP_NET_ADMIN", 12, "change tc filters, and XDP programs that were attached by netlink"),
    Capability("CAP_DAC_READ_SEARCH", 2, "read a release, or Python's modules, in a directory that is closed to root"),
    Capability("CAP_SYS_RESOURCE", 24, "let libbpf raise RLIMIT_MEMLOCK on a kernel that counts maps against it"),
)
"""What hitless uses; all else can go: for bpf(2) CAP_SYS_ADMIN stands for CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN."""


def held() -> frozenset[str]:
    """Names of those in ``USED`` that are in effect in this thread. Raises KernelError."""
    effective, _permitted = _get()
    return frozenset(one.name for one in USED if effective >> one.number & 1)


def require() -> None:
    """Raise NodeError naming every capability that is needed and not in effect, and what it is for."""
    there = held()
    missing = [one for one in USED if one.needed and one.name not in there]
    if missing:
        what = " and ".join(f"{one.name}, which it takes to {one.purpose}" for one in missing)
        raise NodeError(
            f"this process lacks {what}; run as root, or in a container or service that is given it",
            missing=[one.name for one in missing],
        )


def drop_others() -> None:
    """Give up, for good, all capabilities of this thread but those in ``USED``; for a process's first thread, at once.

    Also from the bounding set, where the thread may (CAP_SETPCAP), so that what it executes does not get them back.
    Threads that exist keep theirs, so this comes before numpy is loaded, which starts some. Not for a library to
    call: it changes its caller's process. Raises KernelError.
    """
    used = sum(1 << one.number for one in USED)
    effective, permitted = _get()
    if effective >> _SETPCAP & 1:
        for number in range(64):
            if not used >> number & 1 and _prctl(_CAPBSET_READ, number) == 1:
                check(_prctl(_CAPBSET_DROP, number), "prctl(PR_CAPBSET_DROP)", f"capability {number}")
    _prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL)  # a kernel without it has nothing to clear
    _set(effective & used, permitted & used)


def _get() -> tuple[int, int]:
    """Effective and permitted capabilities, as sets of bits."""
    data = ffi.new("struct cap_data[2]")
    check(libc().capget(_header(), data), "capget", "this thread")
    low, high = data
    return low.effective | high.effective << 32, low.permitted | high.permitted << 32


def _set(effective: int, permitted: int) -> None:
    data = ffi.new("struct cap_data[2]")
    for index, word in enumerate(data):
        word.effective, word.permitted = (bits >> 32 * index & 0xFFFFFFFF for bits in (effective, permitted))
    check(libc().capset(_header(), data), "capset", "this thread")


def _header() -> object:
    return ffi.new("struct cap_header *", {"version": _VERSION})


def _prctl(option: int, argument: int) -> int:
    values = [ffi.cast("unsigned long", value) for value in (argument, 0, 0, 0)]
    return int(libc().prctl(option, *values))
