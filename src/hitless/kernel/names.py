"""The kernel's enums by name: libbpf tells them, but for what is newer than the library."""

from __future__ import annotations

import functools
import re
from typing import Any

from hitless.errors import UnsupportedError
from hitless.kernel.libbpf import ffi, lib

__all__ = ["attach_name", "attach_number", "in_kernel", "link_name", "program_name", "program_number"]

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.]")
_LINKS = {10: "netfilter", 11: "tcx", 12: "uprobe_multi", 13: "netkit", 14: "sockmap"}
_PROGRAMS = {32: "netfilter"}
_ATTACH = {
    44: "struct_ops", 45: "netfilter", 46: "tcx_ingress", 47: "tcx_egress", 48: "trace_uprobe_multi",
    49: "cgroup_unix_connect",
    50: "cgroup_unix_sendmsg", 51: "cgroup_unix_recvmsg", 52: "cgroup_unix_getpeername", 53: "cgroup_unix_getsockname",
    54: "netkit_primary", 55: "netkit_peer",
}  # fmt: skip


def in_kernel(name: str) -> bytes:
    """``name`` as the kernel takes names of maps and programs: 15 characters at most, without special ones."""
    return _NOT_IN_NAMES.sub("_", name)[:15].encode()


def link_name(number: int) -> str:
    """The name of a value of enum bpf_link_type, in lower case and without its prefix, as are all names here."""
    return _told(lib().libbpf_bpf_link_type_str(number)) or _LINKS.get(number, f"type{number}")


def program_name(number: int) -> str:
    """The name of a value of enum bpf_prog_type."""
    return _told(lib().libbpf_bpf_prog_type_str(number)) or _PROGRAMS.get(number, f"type{number}")


def attach_name(number: int) -> str:
    """The name of a value of enum bpf_attach_type."""
    return _told(lib().libbpf_bpf_attach_type_str(number)) or _ATTACH.get(number, f"attach{number}")


def program_number(name: str) -> int:
    """The value in enum bpf_prog_type. Raises UnsupportedError."""
    if name not in _program_numbers():
        raise UnsupportedError(f"program type {name} is not known to this libbpf", feature=name)
    return _program_numbers()[name]


def attach_number(name: str) -> int:
    """The value in enum bpf_attach_type. Raises UnsupportedError."""
    if name not in _attach_numbers():
        raise UnsupportedError(f"attach type {name} is not known to this libbpf", feature=name)
    return _attach_numbers()[name]


@functools.cache
def _program_numbers() -> dict[str, int]:
    return {program_name(number): number for number in range(64)}


@functools.cache
def _attach_numbers() -> dict[str, int]:
    return {attach_name(number): number for number in range(64)}


def _told(text: Any) -> str | None:
    return ffi.string(text).decode() if text else None
