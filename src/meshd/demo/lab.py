"""A laboratory: one network namespace, one bpffs mount and one cgroup tree, gone when it ends.

Everything that a lab makes carries one name, ``hitless-lab-PID-START-N``: the owner's pid and start time and a
number within the owner. So the leftovers of an owner that was killed can be told from what somebody still uses,
and every new lab first removes those.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any

from hitless.errors import NodeError, UnsupportedError

__all__ = ["BACKENDS4", "BACKENDS6", "CLIENT4", "CLIENT6", "Lab", "find_cgroup2", "leftovers", "sweep"]

BACKENDS4 = tuple(f"10.1.0.{n}" for n in range(1, 9))
BACKENDS6 = tuple(f"fd00:1::{n}" for n in range(1, 9))
CLIENT4 = tuple(f"10.1.0.{n}" for n in range(101, 105))
CLIENT6 = tuple(f"fd00:1::{n:x}" for n in range(0x101, 0x105))

_NAME = re.compile(r"hitless-lab-(\d+)-(\d+)-(\d+)")
_RUN = Path("/run")
_NETNS = Path("/run/netns")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MNT_DETACH = 2
_EMPTY_AFTER = 10.0

# Sub-cgroups. The mesh is attached to `mesh`, so that servers and the daemon itself stay outside of it.
_GROUPS = {"mesh": "mesh", "clients": "mesh/clients", "denied": "mesh/denied", "outside": "outside"}

_SYSCTLS = {
    "net/ipv4/tcp_tw_reuse": "1",
    "net/ipv4/ip_local_port_range": "1024 65535",
    "net/ipv4/tcp_max_syn_backlog": "8192",
    "net/core/somaxconn": "8192",
    "net/ipv6/conf/all/disable_ipv6": "0",
    "net/ipv6/conf/default/disable_ipv6": "0",
    "net/ipv6/conf/lo/disable_ipv6": "0",
}

# Joining needs no Python: the process moves itself, then becomes the wanted program under the same pid. The look at
# the parent is for one that died before its death could be signalled.
_JOIN = '[ "$PPID" = "$0" ] && echo $$ > "$1/cgroup.procs" && N="$2" && shift 2 && exec nsenter --net="$N" -- "$@"'

_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count(1)


class Lab:
    """A private place for a mesh: use it as a context manager.

    ``bpffs`` is the mount of its own bpffs, ``cgroup`` the directory that a mesh is to be attached to (its
    children are the sub-cgroups ``clients`` and ``denied``), ``scratch`` a directory for files, ``netns`` the
    path of the network namespace. In the namespace only ``lo`` exists; it carries ``addresses`` and there is no
    route to anywhere else, so that a packet that misses its backend goes nowhere.

    Raises UnsupportedError when the privilege or a kernel feature is missing.
    """

    def __init__(self, addresses: Sequence[str] = (*BACKENDS4, *BACKENDS6, *CLIENT4, *CLIENT6)) -> None:
        self.name = f"hitless-lab-{os.getpid()}-{_start_time(os.getpid())}-{next(_numbers)}"
        self.addresses = tuple(addresses)
        self.scratch = _RUN / self.name
        self.bpffs = self.scratch / "bpf"
        self.netns = _NETNS / self.name
        self._owner = os.getpid()
        self._top = Path()
        self._processes: list[subprocess.Popen[str]] = []
        self._handlers: dict[int, Any] = {}

    @property
    def cgroup(self) -> Path:
        """The cgroup directory that a mesh is attached to."""
        return self._top / _GROUPS["mesh"]

    def cgroup_of(self, group: str) -> Path:
        """Return the directory of a sub-cgroup: ``mesh``, ``clients``, ``denied`` or ``outside`` (of the mesh)."""
        return self._top / _GROUPS[group]

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise UnsupportedError(
                "a lab needs root, to make a network namespace, a cgroup and a bpffs mount: run it with sudo",
                feature="root",
            )
        self._top = find_cgroup2() / self.name
        sweep()
        atexit.register(self.close)
        self._catch_signals()
        try:
            with _signals_held():
                self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill everything in the lab and remove it; safe to call twice, and in a forked child (no effect)."""
        if os.getpid() != self._owner:
            return
        with _signals_held():
            # One that was only just started is not in its cgroup yet, so killing the cgroup would miss it.
            for process in self._processes:
                process.kill()
            _remove(self.name)
            for process in self._processes:
                process.wait()
                for pipe in (process.stdin, process.stdout, process.stderr):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()
            self._processes.clear()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
        atexit.unregister(self.close)

    def popen(
        self,
        args: Sequence[str | os.PathLike[str]],
        cgroup: str = "outside",
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program in the lab's network namespace and in one of its cgroups; pipes are text.

        It is killed when the lab closes, or when the calling thread dies (so start long-lived ones from the main
        thread). A Ctrl-C on the terminal does not reach it.
        """
        process = subprocess.Popen(
            self._command(args, cgroup),
            stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, text=True, bufsize=1, start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def run(
        self, args: Sequence[str | os.PathLike[str]], cgroup: str = "outside", *, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the lab to its end, within ``timeout`` seconds, and return its output as text."""
        return subprocess.run(
            self._command(args, cgroup),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, start_new_session=True,
            check=False,
        )  # fmt: skip

    def run_python(
        self, *args: str, cgroup: str = "outside", timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run this Python with ``args`` in the lab to its end: ``lab.run_python("-c", "print(1)")``."""
        return self.run([sys.executable, *args], cgroup, timeout=timeout)

    def _command(self, args: Sequence[str | os.PathLike[str]], cgroup: str) -> list[str]:
        place = [str(os.getpid()), str(self.cgroup_of(cgroup)), str(self.netns)]
        join = ["setpriv", "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _JOIN]
        return [*join, *place, *(os.fspath(arg) for arg in args)]

    def _build(self) -> None:
        if not Path("/proc/self/ns/net").exists():
            raise UnsupportedError("this kernel has no network namespaces (CONFIG_NET_NS)", feature="netns")
        _make("a network namespace", "netns", ["ip", "netns", "add", self.name])
        lines = [f"echo {value} > /proc/sys/{name}" for name, value in _SYSCTLS.items()]
        self._inside(["/bin/sh", "-ec", "\n".join(lines)], "set the sysctls of")
        batch = ["link set lo up"]
        batch += [f"addr add {a}/{'128 nodad' if ':' in a else '32'} dev lo" for a in self.addresses]
        self._inside(["ip", "-batch", "-"], "configure", "\n".join(batch))
        if not any(line.split() == ["nodev", "bpf"] for line in Path("/proc/filesystems").read_text().splitlines()):
            raise UnsupportedError("this kernel has no bpf file system (CONFIG_BPF_SYSCALL)", feature="bpffs")
        self.bpffs.mkdir(parents=True)
        _make("a bpf file system", "bpffs", ["mount", "-t", "bpf", "-o", "mode=0700", self.name, str(self.bpffs)])
        try:
            for group in ("", *_GROUPS.values()):
                (self._top / group).mkdir()
        except OSError as error:
            raise UnsupportedError(
                f"a cgroup under {self._top.parent} cannot be made: {error.strerror}; a container needs its cgroup2 "
                "mounted writable for this",
                feature="cgroup2",
            ) from error

    def _inside(self, args: Sequence[str], what: str, text: str = "") -> None:
        done = subprocess.run(
            ["nsenter", f"--net={self.netns}", "--", *args], input=text, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NodeError(f"cannot {what} the lab's network namespace {self.netns}: {done.stderr.strip()}")

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._handlers[number] = signal.signal(number, _leave)


def find_cgroup2() -> Path:
    """Return where the cgroup2 hierarchy is mounted; raises UnsupportedError when only cgroup v1 or none is."""
    kinds = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path, kind in kinds:
        if kind == "cgroup2":
            return Path(path.replace(r"\040", " "))
    has = "only cgroup v1 is mounted" if any(kind == "cgroup" for _, kind in kinds) else "no cgroup is mounted"
    raise UnsupportedError(
        f"no cgroup2 hierarchy, which cgroup hooks need: {has}; mount it with `mount -t cgroup2 none DIRECTORY`",
        feature="cgroup2",
    )


def leftovers() -> list[str]:
    """Return the path of every kernel object and directory that some lab made and that is still there."""
    found = [path for folder in (_NETNS, _RUN) for path in _named(folder)]
    with contextlib.suppress(UnsupportedError):
        found += _named(find_cgroup2())
    return sorted({*map(str, found), *_mounts(_NAME)})


def sweep() -> list[str]:
    """Remove what labs of dead owners left, kill the processes in them, and return those labs' names."""
    names = {match.group() for path in leftovers() if (match := _NAME.search(path))}
    dead = sorted(name for name in names if not _alive(name))
    for name in dead:
        with _signals_held():
            _remove(name)
    return dead


def _alive(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and _start_time(int(match[1])) == int(match[2])


def _start_time(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _named(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []


def _mounts(pattern: re.Pattern[str]) -> list[str]:
    paths = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
    return [path for path in paths if pattern.search(path)]


def _remove(name: str) -> None:
    """Remove everything named so; another process doing the same at the same time is no trouble."""
    with contextlib.suppress(UnsupportedError):
        _remove_cgroup(find_cgroup2() / name)
    for path in reversed(_mounts(re.compile(rf"/{name}(/|$)"))):
        if _libc.umount2(os.fsencode(path), _MNT_DETACH) and ctypes.get_errno() not in (errno.EINVAL, errno.ENOENT):
            raise NodeError(f"cannot unmount {path}: {os.strerror(ctypes.get_errno())}")
    (_NETNS / name).unlink(missing_ok=True)
    _remove_scratch(_RUN / name)


def _remove_scratch(path: Path) -> None:
    # A thread of the owner may still write there, and another sweep may do the same: try more than once.
    for _ in range(20):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.01)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _remove_cgroup(top: Path) -> None:
    until = time.monotonic() + _EMPTY_AFTER
    with contextlib.suppress(FileNotFoundError):
        (top / "cgroup.kill").write_text("1")
    while True:
        try:
            for path in sorted(top.rglob("*/"), reverse=True):
                path.rmdir()
            top.rmdir()
        except FileNotFoundError:
            if not top.exists():
                return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise NodeError(f"cannot remove the cgroup {top}: {error}") from error
        time.sleep(0.005)


def _make(what: str, feature: str, command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UnsupportedError(f"`{command[0]}` is not installed: apt-get install iproute2", feature=feature) from error
    if done.returncode:
        raise UnsupportedError(f"{what} cannot be made here: {done.stderr.strip()}", feature=feature)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(number: int, frame: FrameType | None) -> None:
    # One is enough: a second would strike while the first one's exception makes its way to the clean-up.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


