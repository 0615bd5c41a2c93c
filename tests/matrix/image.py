"""The small root of a guest, as the archive that a kernel unpacks into its memory: the same paths as here."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import py_compile
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from tests.matrix import HOUSE, MatrixError
from tests.matrix.packages import Kernel

__all__ = ["write_archive", "write_base", "write_initrd"]

_DISTRIBUTIONS = ("hitless", "pytest", "hypothesis")
"""With all that they depend on. Extras of hitless are for control planes, which have no part in kernel tests."""

_TOOLS = (
    "bash", "sh", "true", "false", "mount", "umount", "modprobe", "ip", "tc", "nsenter", "unshare", "setpriv", "stty",
    "tar", "gzip", "cat", "chmod", "cp", "env", "id", "kill", "ln", "ls", "mkdir", "mv", "rm", "sleep", "timeout",
    "uname",
)  # fmt: skip
_TOOLS_IF_THERE = ("bpftool", "nginx", "ss", "sysctl", "ethtool")
_FILES = ("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/protocols", "/etc/services", "/etc/nginx/mime.types")
_LINKS = ("/bin", "/sbin", "/lib", "/lib64")  # the kernel itself asks for /sbin/modprobe
_EMPTY = tuple(map(Path, ("/proc", "/sys", "/dev", "/tmp", "/run", "/var", "/var/tmp", "/root", "/mnt", "/back")))
_LOADED_BY_NAME = ("libbpf.so.1", "libgcc_s.so.1", "libnss_files.so.2")  # ldd cannot know

_NOT_OF_PYTHON = {"site-packages", "test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip"}
_INIT = Path(__file__).with_name("guest.sh")


def write_base(target: Path, objects: Path) -> None:
    """Write what every guest needs; ``objects`` is the directory of compiled ones. Raises MatrixError, OSError."""
    paths = {*_project(), *_python(), *_distributions(), *_tools(), *objects.iterdir()}
    for path in [each for each in paths if each.suffix == ".py"]:
        paths.update(_bytecode(path))
    write_archive(target, paths | _libraries(paths))


def write_initrd(target: Path, base: Path, kernel: Kernel, settings: Mapping[str, str]) -> None:
    """Write what one guest boots from: the base and, as a second archive behind it, what is this guest's own.

    Raises MatrixError, OSError.
    """
    modules = sorted(kernel.modules.rglob("*"))
    _look_for_room(target.parent, base.stat().st_size + sum(each.stat().st_size for each in modules))
    with target.open("wb") as out:
        with base.open("rb") as source:
            shutil.copyfileobj(source, out, 1 << 20)
        archive = _Archive(out)
        there = Path("/usr/lib/modules", kernel.release)
        for folder in (*_EMPTY, there.parent, there):
            archive.directory(folder)
        for path in modules:
            archive.add(there / path.relative_to(kernel.modules), path, path.lstat())
        archive.device("/dev/console", 5, 1)
        archive.device("/dev/null", 1, 3)
        archive.text("/init", _INIT.read_text(), 0o755)
        archive.text("/settings", "".join(f"{name}={value}\n" for name, value in settings.items()), 0o644)
        archive.end()


def write_archive(target: Path, paths: Iterable[Path]) -> None:
    """Write these files, with the directories and symlinks on the way to them. Raises MatrixError, OSError."""
    entries: dict[Path, os.stat_result] = {}
    for path in paths:
        at, parts = Path("/"), list(Path(os.path.normpath(path)).parts[1:])
        while parts:
            at /= parts.pop(0)
            entries[at] = entries.get(at) or at.lstat()
            if stat.S_ISLNK(entries[at].st_mode):
                leads = Path(os.path.normpath(at.parent / at.readlink()))
                at, parts = Path("/"), [*leads.parts[1:], *parts]
    _look_for_room(target.parent, sum(status.st_size for status in entries.values()))
    with target.open("wb") as out:
        archive = _Archive(out)
        for path, status in entries.items():
            archive.add(path, path, status)
        archive.end()


def _look_for_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MatrixError(
            f"No room on disk: a guest's root takes {needed >> 20} MiB, and {folder} has {free >> 20} MiB left"
        )


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _project() -> Iterable[Path]:
    """What git knows, and what is generated from it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=HOUSE, capture_output=True, text=True, check=False)
    if listed.returncode:
        said = listed.stderr.partition("\n")[0]
        raise MatrixError(f"A guest gets the files that git knows, and git has no list of them for {HOUSE}: {said}")
    files = [HOUSE / name for name in listed.stdout.split("\0") if name]
    yield from (path for path in files if path.exists())
    yield HOUSE / "src/hitless/kernel/_libbpf.py"
    yield from (HOUSE / "src/meshd/bpf").rglob("*.bpf.o")


def _python() -> Iterable[Path]:
    """The interpreter, its environment, and the standard library without tests."""
    yield Path(sys.executable)
    yield Path(sys.prefix, "pyvenv.cfg")
    library = Path(sysconfig.get_path("stdlib"))
    for path in _all(library):
        parts = set(path.relative_to(library).parts)
        if not parts & _NOT_OF_PYTHON and path.suffix not in (".a", ".pyc"):
            yield path


def _distributions() -> Iterable[Path]:
    wanted, seen = list(_DISTRIBUTIONS), set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for each in distribution.files or ():
            path = Path(os.path.normpath(str(distribution.locate_file(each))))
            if path.exists() and path.suffix != ".pyc" and "tests" not in each.parts:
                yield path
        needed = (each for each in distribution.requires or () if "extra ==" not in each)
        for name in (re.split(r"[^A-Za-z0-9._-]", each)[0] for each in needed):
            try:
                importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # of another platform, or of an older Python
            wanted.append(name)


def _tools() -> Iterable[Path]:
    for name in (*_TOOLS, *_TOOLS_IF_THERE):
        found = shutil.which(name)
        if found is None and name in _TOOLS:
            raise MatrixError(f"`{name}` is not installed, and guests need it: `make matrix` installs what is missing")
        if found:
            yield Path(found)
    yield from (Path(each) for each in (*_FILES, *_LINKS) if Path(each).exists())
    folders = (Path("/usr/lib", f"{os.uname().machine}-linux-gnu"), Path("/usr/lib"), Path("/usr/lib64"))
    for library in _LOADED_BY_NAME:
        yield from [folder / library for folder in folders if (folder / library).exists()][:1]


def _bytecode(path: Path) -> Iterable[Path]:
    """What Python and pytest keep of a source; made if missing, since an emulated machine takes minutes for it."""
    plain = Path(importlib.util.cache_from_source(str(path)))
    if not plain.exists() or plain.stat().st_mtime < path.stat().st_mtime:
        py_compile.compile(str(path), quiet=2)
    return plain.parent.glob(f"{glob.escape(plain.stem)}*.pyc")


def _libraries(paths: Iterable[Path]) -> set[Path]:
    """What the programs and libraries among these are linked with."""
    linked = [str(path) for path in paths if _is_elf(path)]
    done = subprocess.run(["ldd", *linked], capture_output=True, text=True, errors="replace", check=False)
    return {Path(path) for path in re.findall(r"(?:=> )?(/\S+) \(0x", done.stdout)}


def _is_elf(path: Path) -> bool:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or not (status.st_mode & 0o111 or ".so" in path.name):
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


class _Archive:
    """A writer of cpio's newc format, which is all that the kernel reads.

    Modification times stay: Python compares them before it believes its bytecode.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._number = 0

    def add(self, name: Path, source: Path, status: os.stat_result) -> None:
        """A file, a symlink or a directory, as it is at ``source``."""
        if stat.S_ISDIR(status.st_mode):
            self._entry(name, status.st_mode, int(status.st_mtime))
        elif stat.S_ISLNK(status.st_mode):
            self._entry(name, status.st_mode, int(status.st_mtime), os.fsencode(source.readlink()))
        else:
            self._entry(name, status.st_mode, int(status.st_mtime), source.read_bytes())

    def directory(self, name: Path) -> None:
        self._entry(name, stat.S_IFDIR | 0o755, 0)

    def text(self, name: str, text: str, mode: int) -> None:
        self._entry(Path(name), stat.S_IFREG | mode, 0, text.encode())

    def device(self, name: str, major: int, minor: int) -> None:
        self._entry(Path(name), stat.S_IFCHR | 0o600, 0, device=(major, minor))

    def end(self) -> None:
        self._entry(Path("/TRAILER!!!"), 0, 0)

    def _entry(self, name: Path, mode: int, mtime: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._number += 1
        path = os.fsencode(name)[1:] + b"\0"  # relative to the root
        fields = (self._number, mode, 0, 0, 1, mtime, len(data), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        for part in (header + path, data):
            self._out.write(part + b"\0" * (-len(part) % 4))
