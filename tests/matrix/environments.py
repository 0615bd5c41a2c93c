"""Rows on this machine's own kernel: each supported Python, and the oldest and the newest libbpf."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from hitless.kernel.libbpf import lib
from tests.matrix import HOUSE, MatrixError
from tests.matrix.debian import know, run
from tests.matrix.machine import Brought, Run
from tests.matrix.selection import ENVIRONMENT_TESTS, arguments

__all__ = ["ENVIRONMENTS", "Elsewhere", "Environment", "find_python", "libbpf_of", "prepare", "venv_of"]

_LONGEST = 1800.0  # s
_OLDEST = (1, 1)


class Environment(msgspec.Struct, frozen=True):
    """What a row runs on: a Python by its version (None: that of this process), a libbpf by the Debian that has it."""

    name: str
    python: str | None = None
    debian: str = "bookworm"


ENVIRONMENTS = (
    *(Environment(f"Python {version}", version) for version in ("3.11", "3.12", "3.13")),
    Environment("newest libbpf", debian="unstable"),
)
"""The rows: pyproject.toml names these Pythons. bookworm has the oldest supported libbpf, 1.1; unstable the newest."""


class Elsewhere(Run):
    """Tests that run with another Python or libbpf; ``libbpf`` is the directory of it, or None for the system's."""

    _end = signal.SIGTERM  # whose tests clean up before they go

    def __init__(self, name: str, folder: Path, objects: Path, python: Path, libbpf: Path | None) -> None:
        super().__init__(name, folder, _LONGEST)
        self.log = folder / "errors.log"
        self._objects = objects
        self._python = python
        self._libbpf = libbpf

    def _command(self) -> Sequence[str]:
        junit = f"--junitxml={self.folder / 'junit.xml'}"
        here = ["-m", "not timing"]  # there is a compiler
        return [str(self._python), "-m", "pytest", *arguments(ENVIRONMENT_TESTS), *here, junit]

    def _environment(self) -> Mapping[str, str]:
        own = {"HITLESS_OBJECTS": str(self._objects), "PYTHONPATH": str(HOUSE / "src")}
        if self._libbpf:
            others = os.environ.get("LD_LIBRARY_PATH")
            own["LD_LIBRARY_PATH"] = f"{self._libbpf}:{others}" if others else str(self._libbpf)
        return {**os.environ, **own}

    def brought(self) -> Brought:
        """Its JUnit file and exit code. Raises MatrixError."""
        junit = self.folder / "junit.xml"
        if not junit.exists():
            raise self._error(f"pytest ended with {self._process.returncode} and no results, {self.reached()}")
        return Brought(junit.read_bytes(), self._process.returncode)


def prepare(environment: Environment, state: Path, objects: Path) -> Elsewhere:
    """Make what a row needs and is not there yet below ``state``. Raises MatrixError."""
    python = Path(sys.executable)
    if environment.python:
        python = venv_of(find_python(environment.python), state / f"venv-{environment.python}")
    oldest = environment.debian == "bookworm"
    has_oldest = (lib().libbpf_major_version(), lib().libbpf_minor_version()) == _OLDEST
    libbpf = None if oldest and has_oldest else libbpf_of(environment.debian, state)
    folder = state / environment.name.replace(" ", "-")
    return Elsewhere(environment.name, folder, objects, python, libbpf)


def find_python(version: str) -> Path:
    """An interpreter of ``version`` that runs and can make venvs: from PATH, or of pyenv. Raises MatrixError."""
    tried = []
    for found in _pythons(version):
        code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([found, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return found
        said = (done.stderr.strip() or f"it is Python {done.stdout.strip()}").splitlines()[-1]
        tried.append(f"{found} ({said})")
    raise MatrixError(
        f"Python {version} is not on this machine: looked on PATH and below {_pyenv()}"
        + (f", where {', '.join(tried)} cannot be used" if tried else "")
        + f"; install it with its venv module (pyenv install {version})"
    )


def _pyenv() -> Path:
    return Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"


def _pythons(version: str) -> Iterator[Path]:
    on_path = shutil.which(f"python{version}")
    if on_path:
        yield Path(on_path)
    found = sorted(_pyenv().glob(f"{version}.*/bin/python{version}"), reverse=True)
    yield from (one for one in found if os.access(one, os.X_OK))


def venv_of(python: Path, folder: Path) -> Path:
    """The interpreter of a venv in ``folder`` that has what requirements.txt names, made unless it is there.

    The project is installed into it, editable. Raises MatrixError.
    """
    inside = folder / "bin" / "python"
    wanted = _wanted(python)
    done = folder / "made-of"
    if done.exists() and done.read_text() == wanted and inside.exists():
        return inside
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    run([python, "-m", "venv", folder], log, f"{python} cannot make a venv in {folder}")
    pip: list[str | Path] = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    packages = [*pip, "--require-hashes", "--only-binary", ":all:", "-r", HOUSE / "requirements.txt"]
    refused = f"{inside} could not install requirements.txt, so see whether the registry answers"
    run(packages, log, refused)
    run([*pip, "--no-deps", "--no-build-isolation", "-e", HOUSE], log, f"{inside} could not install the project")
    done.write_text(wanted)
    return inside


def _wanted(python: Path) -> str:
    files = b"".join((HOUSE / name).read_bytes() for name in ("requirements.txt", "pyproject.toml"))
    return f"{python.resolve()} {hashlib.sha256(files).hexdigest()}\n"


def libbpf_of(debian: str, state: Path) -> Path:
    """The directory with the libbpf.so.1 that a release of Debian has, compiled from its source unless it is there.

    The source comes by apt, from the mirror of this machine and checked with Debian's keys. Raises MatrixError.
    """
    folder = state / f"libbpf-{debian}"
    if folder.exists():
        return folder
    work = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    log = folder.with_name(f"{folder.name}.log")
    log.write_text("")
    source = _source(debian, work, log)
    made = work / "made"
    flags = ["CFLAGS=-O2 -w -std=gnu89", f"OBJDIR={made}"]  # a compiler that warns of more than Debian's is no error
    run(["make", "-s", "-C", source, *flags, made / "libbpf.so.1"], log, f"libbpf of {debian} cannot be compiled")
    shutil.rmtree(made / "sharedobjs")
    made.rename(folder)
    shutil.rmtree(work)
    return folder


def _source(debian: str, work: Path, log: Path) -> Path:
    """Download and unpack libbpf's source; return where its Makefile is."""
    refused = f"libbpf's source is not to be had from Debian {debian}"
    options = know("deb-src", [debian], work, log, refused)
    run(["apt-get", *options, "-qq", "source", "--download-only", "--only-source", "libbpf"], log, refused, work)
    archives = sorted(work.glob("libbpf_*.orig.tar.*"))
    if not archives:
        raise MatrixError(f"{refused}: what apt-get downloaded has no libbpf_*.orig.tar; see {log}")
    run(["tar", "-xf", archives[0]], log, f"{archives[0]} could not be unpacked", work)
    (makefile,) = work.glob("*/src/Makefile")
    return makefile.parent
