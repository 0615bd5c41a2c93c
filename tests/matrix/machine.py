"""Where tests run: guests in qemu, and this machine. Each is dead when its ``with`` ends or this process does."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from tests.matrix import HOUSE, MatrixError
from tests.matrix.packages import Kernel
from tests.matrix.selection import SLOWNESS, arguments

__all__ = ["Brought", "Guest", "Here", "Progress", "Run", "look_for_qemu", "progress", "settings"]

QEMU = "qemu-system-x86_64"
_MEMORY = 3072  # MiB
_BOOT = 240.0  # s until init runs, most of them to unpack the root
_LONGEST_HERE = 1800.0
_CLEANS_UP = 30.0
_LINE = re.compile(r"^(tests/\S+?::.+?)(?: (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b.*)?$", re.MULTILINE)


class Brought(msgspec.Struct, frozen=True):
    """What a run brings back: pytest's JUnit file and exit code, and what `hitless doctor --json` printed."""

    junit: bytes
    code: int
    doctor: bytes | None = None


class Progress(msgspec.Struct, frozen=True):
    """How far pytest is: tests that have ended, the last of them, and the one that has begun since."""

    ended: int
    last: str | None
    running: str | None

    def __str__(self) -> str:
        if self.ended == 0:
            return f"in the first test, {self.running}" if self.running else "before the first test"
        done = f"after {self.ended} test{'s' if self.ended > 1 else ''}"
        return f"{done}, in {self.running}" if self.running else f"{done}, of which the last was {self.last}"


def progress(log: Path) -> Progress:
    """Read it from what ``pytest -v`` has printed."""
    text = log.read_text(errors="replace").replace("\r", "") if log.exists() else ""
    ended, last, running = 0, None, None
    for name, outcome in _LINE.findall(text.partition("short test summary info")[0]):
        running = None if outcome else name.strip()
        if outcome:
            ended, last = ended + 1, name
    return Progress(ended, last, running)


class Run:
    """A process that runs tests, with its ``log``; use it as a context manager."""

    _end = signal.SIGKILL

    def __init__(self, name: str, folder: Path, limit: float) -> None:
        self.name = name
        self.folder = folder
        self.limit = limit
        self.log = folder / "serial.log"
        self._started = 0.0

    def __enter__(self) -> Self:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._started = time.monotonic()
        with (self.folder / "errors.log").open("wb") as errors:
            # Its parent's death is its own, however the parent dies.
            command = ["setpriv", "--pdeathsig", self._end.name, "--", *self._command()]
            self._process = subprocess.Popen(
                command, cwd=HOUSE, env=self._environment(), stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(self._end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLEANS_UP)
        self._process.kill()
        self._process.wait()

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._started

    def ended(self) -> bool:
        """Whether there is nothing to wait for any more. Raises MatrixError when it takes too long."""
        if self._process.poll() is not None:
            return True
        if self.seconds > self.limit:
            raise self._error(f"was not ready in {self.limit:.0f} s and was ended {self.reached()}")
        return False

    def reached(self) -> str:
        """How far it is, in words."""
        return str(progress(self.log))

    def brought(self) -> Brought:
        """What it brings, after its end. Raises MatrixError."""
        raise NotImplementedError

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _environment(self) -> Mapping[str, str]:
        return os.environ

    def _error(self, what: str) -> MatrixError:
        return MatrixError(f"{self.name}: {what}; see {self.log}")


class Here(Run):
    """The same tests on the kernel of this machine. What they compile, guests find in ``objects``."""

    _end = signal.SIGTERM  # whose tests clean up before they go

    def __init__(self, folder: Path, tests: tuple[str, ...], objects: Path) -> None:
        super().__init__("here", folder, _LONGEST_HERE)
        self.log = folder / "errors.log"
        self._tests = tests
        self._objects = objects

    def _command(self) -> Sequence[str]:
        return [sys.executable, "-m", "pytest", *arguments(self._tests), f"--junitxml={self.folder / 'junit.xml'}"]

    def _environment(self) -> Mapping[str, str]:
        return {**os.environ, "HITLESS_OBJECTS": str(self._objects), "PYTHONPATH": str(HOUSE / "src")}

    def brought(self) -> Brought:
        junit = self.folder / "junit.xml"
        if not junit.exists():
            raise self._error(f"pytest ended with {self._process.returncode} and no results, {self.reached()}")
        command = [sys.executable, "-m", "hitless", "doctor", "--json"]
        doctor = subprocess.run(command, cwd=HOUSE, env=self._environment(), capture_output=True, check=False)
        told = doctor.stdout if doctor.returncode in (0, 1) else None  # 1: no bpffs is mounted
        return Brought(junit.read_bytes(), self._process.returncode, told)


class Guest(Run):
    """A kernel in a virtual machine, which boots, runs its tests and switches itself off.

    ``parameters`` are for its command line, and ``what`` it is besides its version is in the name of its row.
    """

    def __init__(
        self, kernel: Kernel, initrd: Path, folder: Path, limit: float, accel: str, parameters: str = "", what: str = ""
    ) -> None:
        super().__init__(f"Linux {kernel.name}{what}", folder, limit)
        self._kernel = kernel
        self._parameters = parameters
        self._initrd = initrd
        self._accel = accel
        self._back = folder / "back.tar.gz"

    def _command(self) -> Sequence[str]:
        # With a thread for each CPU, qemu before 8.1 may execute breakpoints that the kernel has taken away already, as
        # it sets them while replacing BPF programs: a panic. Besides, so each of two guests has a CPU here.
        # qemu 7.2 gets AVX2 wrong, by which numpy sorts: of 3000 sorted arrays 2218 were not. A named older processor
        # has no stable time stamps, and the kernel's other clocks are slow to read.
        accels = {"tcg": ("tcg,thread=single", "max,-avx,-avx2,-f16c,-fma"), "kvm": ("kvm", "host")}
        accel = ["-accel", accels[self._accel][0], "-cpu", accels[self._accel][1]]
        devices = ["-display", "none", "-nic", "none", "-no-reboot"]
        serial = ["-serial", f"file:{self.log}", "-serial", f"file:{self._back}"]
        boot = ["-kernel", str(self._kernel.image), "-initrd", str(self._initrd)]
        line = ["-append", f"console=ttyS0 panic=-1 quiet {self._parameters}"]
        return [QEMU, "-M", "q35", *accel, "-m", str(_MEMORY), "-smp", "2", *devices, *serial, *boot, *line]

    def reached(self) -> str:
        return super().reached() if self._said("guest: up") else "before its init ran"

    def ended(self) -> bool:
        if self.seconds > _BOOT and not self._said("guest: up"):
            raise self._error(f"did not boot in {_BOOT:.0f} s")
        return super().ended()

    def brought(self) -> Brought:
        if not self._said("guest: up"):
            raise self._error(f"did not boot: {self._last_words()}")
        if not self._said("guest: done"):
            raise self._error(f"died {self.reached()}: {self._last_words()}")
        try:
            with tarfile.open(fileobj=io.BytesIO(self._back.read_bytes())) as archive:
                files = {each.name.removeprefix("./"): archive.extractfile(each) for each in archive if each.isfile()}
                there = {name: file.read() for name, file in files.items() if file}
        except (OSError, tarfile.TarError, EOFError) as error:
            raise self._error(f"what it sent back through its second serial port is damaged ({error})") from error
        if "junit.xml" not in there:
            raise self._error(f"pytest ended with {int(there['code'])} and wrote no JUnit file, {self.reached()}")
        return Brought(there["junit.xml"], int(there["code"]), there.get("doctor.json"))

    def _said(self, what: str) -> bool:
        return self.log.exists() and what in self.log.read_text(errors="replace")

    def _last_words(self) -> str:
        panic = re.search(r"Kernel panic.*", self.log.read_text(errors="replace")) if self.log.exists() else None
        if panic:
            return panic.group().strip()
        errors = (self.folder / "errors.log").read_text(errors="replace").splitlines()
        said = f", and said: {errors[-1]}" if errors else ""
        hint = " (emulated, without --accel kvm, it may do better)" if self._accel == "kvm" else ""
        return f"{QEMU} ended with {self._process.returncode}{said}{hint}"


def look_for_qemu() -> None:
    """Raise MatrixError unless it is installed, and this is a machine whose programs its guests can run."""
    machine = platform.machine()
    if machine != "x86_64":
        raise MatrixError(f"Guests run this machine's programs on kernels for x86_64, and it is one of {machine}")
    if shutil.which(QEMU) is None:
        raise MatrixError(f"{QEMU} is not installed: apt-get install qemu-system-x86, or use `make matrix`")


def settings(tests: tuple[str, ...], objects: Path) -> dict[str, str]:
    """What the init of a guest reads, as variables of bash."""
    return {
        "HOUSE": shlex.quote(str(HOUSE)),
        "PYTHON": shlex.quote(sys.executable),
        "SLOWNESS": str(SLOWNESS),
        "OBJECTS": shlex.quote(str(objects)),
        "PYTEST": f"({shlex.join(arguments(tests))})",
    }
