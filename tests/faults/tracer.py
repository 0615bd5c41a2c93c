"""Work in a process of its own, in which one chosen system call is the last, or fails.

The process is forked from this one, so that nothing has to be imported again, and traced by ptrace(2). A seccomp filter
stops it at the system calls that change something; all others run at full speed. At such a stop

- ``before``: it gets SIGKILL. The kernel looks for that before it executes the call, so the call is *not* executed.
- ``after``: the call is executed, and it gets SIGKILL before it returns to user space.
- an errno: the number of the call is overwritten with -1, so it is *not* executed, and that is what it returns.

strace can do the first and the third (``-e inject=bpf:signal=KILL:when=N``, ``:error=ENOMEM``), but delivers a signal
only on entry, and counts for each thread. tests/faults/test_tracer.py measures which is which.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from hitless.errors import HitlessError, UnsupportedError

__all__ = ["AFTER", "BEFORE", "Call", "Fault", "Outcome", "Trace", "alone", "trace"]

BEFORE, AFTER = "before", "after"

# Those of x86-64, as are the two registers below; with the argument that is a path, or -1.
_CALLS = {
    "bpf": (321, -1), "write": (1, -1), "pwrite64": (18, -1), "fsync": (74, -1), "fdatasync": (75, -1),
    "flock": (73, -1), "rename": (82, 1), "renameat": (264, 3), "renameat2": (316, 3), "mkdir": (83, 0),
    "mkdirat": (258, 1), "rmdir": (84, 0), "unlink": (87, 0), "unlinkat": (263, 1), "symlink": (88, 1),
    "symlinkat": (266, 2), "link": (86, 1), "linkat": (265, 3), "chmod": (90, 0), "fchmod": (91, -1),
    "fchmodat": (268, 1), "mount": (165, 1), "umount2": (166, 0), "move_mount": (429, 3), "open_tree": (428, 1),
    "fsopen": (430, -1), "fsmount": (432, -1), "membarrier": (324, -1), "unshare": (272, -1),
    "perf_event_open": (298, -1), "sendto": (44, -1), "sendmsg": (46, -1),
}  # fmt: skip
_SENDS = ("sendto", "sendmsg")  # looked at on sockets of rtnetlink only, and called by their requests
_REQUESTS = {
    18: "RTM_GETLINK", 19: "RTM_SETLINK", 36: "RTM_NEWQDISC", 37: "RTM_DELQDISC", 38: "RTM_GETQDISC",
    44: "RTM_NEWTFILTER", 45: "RTM_DELTFILTER", 46: "RTM_GETTFILTER",
}  # fmt: skip
_PIDFD_GETFD, _NETLINK_ROUTE = 438, 0
_NAMES = {number: (name, path) for name, (number, path) in _CALLS.items()}
_RAX, _ORIG_RAX = 10 * 8, 15 * 8

_COMMANDS = (
    "MAP_CREATE MAP_LOOKUP_ELEM MAP_UPDATE_ELEM MAP_DELETE_ELEM MAP_GET_NEXT_KEY PROG_LOAD OBJ_PIN OBJ_GET PROG_ATTACH "
    "PROG_DETACH PROG_TEST_RUN PROG_GET_NEXT_ID MAP_GET_NEXT_ID PROG_GET_FD_BY_ID MAP_GET_FD_BY_ID OBJ_GET_INFO_BY_FD "
    "PROG_QUERY RAW_TRACEPOINT_OPEN BTF_LOAD BTF_GET_FD_BY_ID TASK_FD_QUERY MAP_LOOKUP_AND_DELETE_ELEM MAP_FREEZE "
    "BTF_GET_NEXT_ID MAP_LOOKUP_BATCH MAP_LOOKUP_AND_DELETE_BATCH MAP_UPDATE_BATCH MAP_DELETE_BATCH LINK_CREATE "
    "LINK_UPDATE LINK_GET_FD_BY_ID LINK_GET_NEXT_ID ENABLE_STATS ITER_CREATE LINK_DETACH PROG_BIND_MAP"
)

_TRACEME, _POKEUSER, _CONT, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 6, 7, 24, 0x4200, 0x420E
_OPTIONS = 1 | 1 << 3 | 1 << 7 | 1 << 20  # TRACESYSGOOD, TRACECLONE, TRACESECCOMP, EXITKILL
_EVENT_SECCOMP = 7
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_WALL = 0x40000000
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_RET_TRACE, _RET_ALLOW = 0x7FF00000, 0x7FFF0000
_LONGEST = 60  # s

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Call(msgspec.Struct, frozen=True):
    """One system call; ``at`` is how many came before it, and ``what`` its path, if it has one."""

    at: int
    name: str
    what: str = ""

    def __str__(self) -> str:
        return f"{self.at} {self.name}" + (f" {self.what}" if self.what else "")


class Fault(msgspec.Struct, frozen=True):
    """What happens at the call number ``at`` of those called ``name``, or of all: BEFORE, AFTER or an errno.

    With an errno and ``+`` that call fails and all of them that follow.
    """

    at: int
    kind: str
    name: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """How work ended: ``value`` is what it returned; an error has a ``message`` and its ``facts``.

    ``crashed`` says that it was no HitlessError, and then the message is a traceback.
    """

    value: Any = None
    message: str = ""
    facts: dict[str, Any] = {}
    crashed: bool = False

    @property
    def failed(self) -> bool:
        return bool(self.message)


class Trace(msgspec.Struct):
    """What work did: its calls, the one that met the fault, and how it ended, None if it was killed."""

    calls: list[Call]
    hit: Call | None = None
    outcome: Outcome | None = None


def trace(work: Callable[[], object], fault: Fault | None = None) -> Trace:
    """Do ``work`` in a process of its own, with ``fault``. What it returns must fit into JSON.

    It is killed after a minute. Raises UnsupportedError on a machine that is not x86-64.
    """
    if platform.machine() != "x86_64":
        raise UnsupportedError("faults are put into system calls on x86-64 only", feature="ptrace")
    pid, answer = _fork(work, traced=True)
    tracer = _Tracer(pid, fault)
    try:
        tracer.run()
    finally:
        tracer.end()
    return Trace(tracer.calls, tracer.hit, _outcome(answer))


def alone(work: Callable[[], object]) -> Outcome | None:
    """Do ``work`` in a process of its own, untraced; None if that was killed."""
    pid, answer = _fork(work, traced=False)
    outcome = _outcome(answer)
    os.waitpid(pid, 0)
    return outcome


def _fork(work: Callable[[], object], traced: bool) -> tuple[int, socket.socket]:
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        _child(work, theirs, traced)
    theirs.close()
    return pid, ours


def _outcome(answer: socket.socket) -> Outcome | None:
    with answer:
        text = b"".join(iter(lambda: answer.recv(1 << 16), b""))
    return msgspec.json.decode(text, type=Outcome) if text else None


def _child(work: Callable[[], object], answer: socket.socket, traced: bool) -> None:
    """The whole life of the process. What it says at its end goes by sendto(2), which is not looked at."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LONGEST)
        if traced:
            os.setpgid(0, 0)
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            _stop_at(sorted(_NAMES))
        try:
            outcome = Outcome(work())
        except HitlessError as error:
            facts = json.loads(json.dumps(error.facts, default=str))
            notes = getattr(error, "__notes__", ())
            outcome = Outcome(message="\n".join((error.message or "no message", *notes)), facts=facts)
        except BaseException:  # noqa: BLE001 - that is what is looked for
            outcome = Outcome(message=traceback.format_exc(), crashed=True)
        answer.sendall(msgspec.json.encode(outcome))
    finally:
        os._exit(0)


def _stop_at(numbers: list[int]) -> None:
    """Stop at these system calls from now on, also in threads to come."""
    load = struct.pack("HBBI", 0x20, 0, 0, 0)  # the number is the first word of struct seccomp_data
    jumps = [struct.pack("HBBI", 0x15, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    ends = [struct.pack("HBBI", 0x06, 0, 0, value) for value in (_RET_ALLOW, _RET_TRACE)]
    code = ctypes.create_string_buffer(b"".join((load, *jumps, *ends)))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(jumps) + 3, ctypes.addressof(code)))
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


class _Tracer:
    def __init__(self, pid: int, fault: Fault | None) -> None:
        self._pid = pid
        self._fault = fault
        self._matching = 0
        self._alike: tuple[object, int] = (None, 0)
        self._leaving = 0  # the thread whose next stop is the end of the call after which all are killed
        self._over = False
        self.calls: list[Call] = []
        self.hit: Call | None = None

    def run(self) -> None:
        """Until the process has ended."""
        os.waitpid(self._pid, _WALL)
        _ptrace(_SETOPTIONS, self._pid, _OPTIONS)
        _ptrace(_CONT, self._pid)
        while not self._over:
            thread, status = os.waitpid(-self._pid, _WALL)
            if not os.WIFSTOPPED(status):
                self._over = thread == self._pid
                continue
            with suppress(ProcessLookupError):  # killed meanwhile
                self._stopped(thread, status)

    def end(self) -> None:
        """Leave nothing of it."""
        while not self._over:
            try:
                os.kill(self._pid, signal.SIGKILL)
                thread, status = os.waitpid(-self._pid, _WALL)
            except (ProcessLookupError, ChildProcessError):
                return
            self._over = thread == self._pid and not os.WIFSTOPPED(status)

    def _stopped(self, thread: int, status: int) -> None:
        signals, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_SECCOMP:
            self._called(thread)
        elif signals == _SYSCALL_STOP and thread == self._leaving:
            os.kill(self._pid, signal.SIGKILL)
        else:
            quiet = event or signals in (signal.SIGSTOP, signal.SIGTRAP, _SYSCALL_STOP)
            _ptrace(_CONT, thread, 0 if quiet else signals)

    def _called(self, thread: int) -> None:
        call = self._look(thread)
        fault = self._fault
        if call is not None and fault is not None and fault.name in ("", call.name):
            self._matching += 1
            stays = fault.kind.endswith("+") and self._matching > fault.at
            if self._matching == fault.at + 1 or stays:
                self.hit = self.hit or call
                self._strike(thread, fault.kind.rstrip("+"))
                return
        _ptrace(_CONT, thread)

    def _strike(self, thread: int, kind: str) -> None:
        if kind == BEFORE:
            os.kill(self._pid, signal.SIGKILL)
        elif kind == AFTER:
            self._leaving = thread
            _ptrace(_SYSCALL, thread)
        else:
            _ptrace(_POKEUSER, thread, -getattr(errno, kind), _RAX)
            _ptrace(_POKEUSER, thread, -1, _ORIG_RAX)
            _ptrace(_CONT, thread)

    def _look(self, thread: int) -> Call | None:
        """The call that a thread is about to make; None for one more of a loop that asks until the answer changes."""
        raw = ctypes.create_string_buffer(88)
        _ptrace(_GET_SYSCALL_INFO, thread, ctypes.addressof(raw), len(raw))
        number, *arguments = struct.unpack_from("7Q", raw, 24)
        name, path = _NAMES[number]
        what = ""
        if name == "bpf":
            command = arguments[0]
            name = f"bpf {(_COMMANDS.split() + [str(command)] * command)[command]}"
            attr = self._memory(arguments[1], min(arguments[2], 128))
            if command in (6, 7):  # BPF_OBJ_PIN, BPF_OBJ_GET
                what = self._text(struct.unpack_from("Q", attr)[0])
            elif command in (0, 5):  # BPF_MAP_CREATE, BPF_PROG_LOAD
                at = 28 if command == 0 else 48
                what = attr[at : at + 16].split(b"\0")[0].decode(errors="replace")
            same = (thread, name, attr[:4])
        elif name in _SENDS:
            if not self._is_routing(arguments[0]):
                return None
            name = f"netlink {self._requested(arguments[1], name == 'sendmsg')}"
            same = (thread, name, b"")
        else:
            what = self._text(arguments[path]) if path >= 0 else ""
            same = (thread, name, bytes(str(arguments[0]), "ascii"))
        polls = name in ("bpf MAP_LOOKUP_ELEM", "flock")
        self._alike = (same, self._alike[1] + 1 if self._alike[0] == same else 1)
        if polls and self._alike[1] > 3:
            return None
        self.calls.append(Call(len(self.calls), name, what))
        return self.calls[-1]

    def _is_routing(self, descriptor: int) -> bool:
        """Whether it is a socket of rtnetlink."""
        process = os.pidfd_open(self._pid)
        try:
            copy = _libc.syscall(_PIDFD_GETFD, process, ctypes.c_long(descriptor), 0)
        finally:
            os.close(process)
        if copy < 0:
            return False
        with socket.socket(fileno=copy) as found:
            return (found.family, found.proto) == (socket.AF_NETLINK, _NETLINK_ROUTE)

    def _requested(self, at: int, is_message: bool) -> str:
        """The request at ``at``, or to which the struct msghdr there leads."""
        if is_message:
            vector = struct.unpack_from("Q", self._memory(at, 32), 16)[0]
            at = struct.unpack_from("Q", self._memory(vector, 16))[0]
        kind = struct.unpack_from("H", self._memory(at, 16), 4)[0]
        return _REQUESTS.get(kind, str(kind))

    def _text(self, at: int) -> str:
        return self._memory(at, 256).split(b"\0")[0].decode(errors="replace")

    def _memory(self, at: int, size: int) -> bytes:
        # To the end of its page at most: what is behind may not be mapped.
        size = min(size, 4096 - at % 4096) or size
        try:
            with Path(f"/proc/{self._pid}/mem").open("rb", buffering=0) as memory:
                memory.seek(at)
                return memory.read(size).ljust(64, b"\0")
        except (OSError, ValueError):
            return bytes(64)


def _ptrace(request: int, pid: int, data: int = 0, address: int = 0) -> None:
    if _libc.ptrace(request, pid, ctypes.c_void_p(address), ctypes.c_void_p(data)) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}")
