"""Programs of tracepoints, raw or as perf records them, of probes of user code, and of sampled events.

The kernel cannot exchange the program of such a link (BPF_LINK_UPDATE: EINVAL).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from hitless.errors import NodeError
from hitless.hooks import EVENTS
from hitless.kernel.libbpf import check, ffi, lib, machine_call, system_call
from hitless.kernel.links import Link
from hitless.kernel.programs import Program

__all__ = [
    "PROBES",
    "attach_event",
    "attach_probe",
    "attach_raw_tracepoint",
    "attach_tracepoint",
    "open_probe",
    "probe_offset",
    "tracepoint_id",
]

PROBES = Path("/sys/bus/event_source/devices/uprobe/type")
"""Has the kernel's number of the type of perf events that are probes of user code; not there if it knows none."""

_PERF_TYPE_TRACEPOINT = 2
_PERF_EVENT_ATTACH = 41  # BPF_PERF_EVENT, an attach type
_CLOEXEC = 8  # PERF_FLAG_FD_CLOEXEC
# The processes (all), the CPU, the group (none) and the flags of an event. It must be of some CPU; programs
# belong to what is traced, and run on every one.
_EVERYWHERE = (-1, 0, -1, _CLOEXEC)
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
    return _attach_to(program, machine_call("perf_event_open", what, wanted, *_EVERYWHERE), what)


def _attach_to(program: Program, event: int, what: str) -> Link:
    try:
        made = lib().bpf_link_create(program.fd, event, _PERF_EVENT_ATTACH, ffi.NULL)
        return Link(check(made, "BPF_LINK_CREATE", what))
    finally:
        os.close(event)  # the link holds it


def attach_event(program: Program, event: str, period: int, cpu: int) -> Link:
    """Let ``program`` run on ``cpu`` once in ``period`` of ``event``, one of EVENTS; of clocks, that is nanoseconds.

    Raises KernelError (ENOENT: this machine does not count that, ENODEV: the CPU is not online).
    """
    wanted = ffi.new("struct perf_event_attr *")
    wanted.type, wanted.config = EVENTS[event]
    wanted.size, wanted.sample_period = ffi.sizeof("struct perf_event_attr"), period
    what = f"{event} of CPU {cpu}"
    return _attach_to(program, machine_call("perf_event_open", what, wanted, -1, cpu, -1, _CLOEXEC), what)


def attach_probe(program: Program, path: str, offset: int, at_return: bool) -> Link:
    """Let ``program`` run whenever any process reaches ``offset`` in the file at ``path``, or returns from there.

    Raises KernelError.
    """
    return _attach_to(program, open_probe(path, offset, at_return), f"a probe of {path}, byte {offset}")


def open_probe(path: str, offset: int = 0, at_return: bool = False) -> int:
    """The descriptor of a perf event that is a probe there, which goes with it. Raises KernelError."""
    what = f"a probe of {path}, byte {offset}"
    with system_call("reading", PROBES):
        kind = int(PROBES.read_text())
    name = ffi.new("char[]", os.fsencode(path))
    wanted = ffi.new("struct perf_event_attr *")
    wanted.type, wanted.size, wanted.config = kind, ffi.sizeof("struct perf_event_attr"), int(at_return)
    wanted.config1, wanted.config2 = int(ffi.cast("uintptr_t", name)), offset
    return machine_call("perf_event_open", what, wanted, *_EVERYWHERE)


def probe_offset(path: str, function: str) -> int:
    """Where ``function`` is in the ELF file at ``path``, in bytes. Raises NodeError if it is not there."""
    try:
        with Path(path).open("rb") as file:
            elf = ELFFile(file)
            for section in elf.iter_sections():
                if not isinstance(section, SymbolTableSection):
                    continue
                for symbol in section.get_symbol_by_name(function) or ():
                    offset = next(elf.address_offsets(symbol["st_value"]), None)
                    if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_shndx"] != "SHN_UNDEF" and offset:
                        return int(offset)
    except (OSError, ELFError) as error:
        raise NodeError(f"{path} cannot be probed: {error}", path=path) from None
    raise NodeError(
        f"{path} has no function {function}: look at its symbols (nm -D), which strip may have removed",
        path=path,
        function=function,
    )


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
