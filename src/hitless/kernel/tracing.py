"""Programs of tracepoints: raw ones, which are given what the kernel passes, and those of perf, in fixed records.

The kernel cannot exchange the program of such a link (BPF_LINK_UPDATE: EINVAL).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hitless.errors import NodeError
from hitless.kernel.libbpf import check, ffi, lib, machine_call, system_call
from hitless.kernel.links import Link
from hitless.kernel.programs import Program

__all__ = ["attach_raw_tracepoint", "attach_tracepoint", "tracepoint_id"]

_PERF_TYPE_TRACEPOINT = 2
_PERF_EVENT_ATTACH = 41  # BPF_PERF_EVENT, an attach type
_EVENT_CLOSED_ON_EXEC = 8  # PERF_FLAG_FD_CLOEXEC
_CLOSED_ON_EXEC = 1  # FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
_CREATE = 6  # FSCONFIG_CMD_CREATE


def attach_raw_tracepoint(program: Program, name: str) -> Link:
    """Let ``program`` (raw_tracepoint, or tracing of a ``tp_btf`` section) run at tracepoint ``name``.

    Raises KernelError (ENOENT: this kernel has no such tracepoint).
    """
    # What was loaded for one tracepoint of the kernel's types attaches to that one, and takes no name.
    label = ffi.NULL if program.info.type == "tracing" else name.encode()
    what = f"tracepoint {name}"
    return Link(check(lib().bpf_raw_tracepoint_open(label, program.fd), "BPF_RAW_TRACEPOINT_OPEN", what))


def attach_tracepoint(program: Program, name: str) -> Link:
    """Let ``program`` run at ``name``, a ``category/event`` of the kernel's, on all CPUs.

    Raises NodeError if this kernel has no such event, KernelError.
    """
    wanted = ffi.new("struct perf_event_attr *")
    wanted.type, wanted.size = _PERF_TYPE_TRACEPOINT, ffi.sizeof("struct perf_event_attr")
    wanted.config, wanted.sample_period = tracepoint_id(name), 1
    what = f"tracepoint {name}"
    # The event is of one CPU, as it must be of some; programs belong to the tracepoint, and run on every one.
    event = machine_call("perf_event_open", what, wanted, -1, 0, -1, _EVENT_CLOSED_ON_EXEC)
    try:
        made = lib().bpf_link_create(program.fd, event, _PERF_EVENT_ATTACH, ffi.NULL)
        return Link(check(made, "BPF_LINK_CREATE", what))
    finally:
        os.close(event)  # the link holds it


def tracepoint_id(name: str) -> int:
    """The kernel's number of the event ``category/event``. Raises NodeError if there is none, KernelError."""
    with _tracefs() as directory:
        try:
            fd = os.open(f"events/{name}/id", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            raise NodeError(
                f"this kernel has no tracepoint {name}; see `perf list tracepoint`, or events/ of a tracefs",
                tracepoint=name,
            ) from None
        with os.fdopen(fd) as file:
            return int(file.read())


@contextmanager
def _tracefs() -> Iterator[int]:
    """A mount of tracefs of our own, in no namespace: nobody has to have mounted one, and nobody sees this."""
    context = machine_call("fsopen", "tracefs", ffi.new("char[]", b"tracefs"), _CLOSED_ON_EXEC)
    try:
        machine_call("fsconfig", "tracefs", context, _CREATE, 0, 0, 0)
        directory = machine_call("fsmount", "tracefs", context, _CLOSED_ON_EXEC, 0)
    finally:
        os.close(context)
    try:
        with system_call("reading", "tracefs"):
            yield directory
    finally:
        os.close(directory)
