"""Other processes, as /proc shows them: who holds a lock, a map or a program, and by which command they go."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["command", "holders_of", "is_stopped", "lock_holder", "map_holders", "who"]

_MAP = "anon_inode:bpf-map"
_IDS = {_MAP: "map_id:", "anon_inode:bpf-prog": "prog_id:"}


def lock_holder(path: Path) -> int | None:
    """Process id of one that holds the directory at ``path`` by flock; None if nobody does or it is not there."""
    try:
        seen = path.stat()
    except FileNotFoundError:
        return None
    place = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}:{seen.st_ino}"
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()  # "1: FLOCK ADVISORY WRITE 1234 00:2a:17 0 EOF", waiters have "->" second
        if fields[1] == "FLOCK" and fields[5] == place:
            return int(fields[4])
    return None


def command(pid: int) -> str:
    """The command line of a process, or what can be said instead."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "gone meanwhile"


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped (SIGSTOP, a terminal's ^Z, a debugger): it keeps its locks and does nothing."""
    try:
        # The state follows the name in parentheses, which may hold anything.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


def who(pid: int | None) -> str:
    """A process in words, with its command, and what to do about it if it is stopped; None is one not to be seen."""
    if pid is None:
        return "another process"
    text = f"process {pid} ({command(pid)})"
    return f"{text}, which is stopped (kill -CONT {pid} lets it go on)" if is_stopped(pid) else text


def map_holders(ids: Collection[int], mark: Path) -> Iterator[tuple[int, frozenset[int], bool] | int]:
    """Which other processes hold the maps ``ids`` by a descriptor: process id, ids, and whether it holds ``mark`` open.

    Yields the bare id of a process that may not be looked at (that takes root). One that ends meanwhile is left out.
    """
    marked = _place(mark)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        pid = int(process.name)
        try:
            held, marks = _look(pid, mark.name)
        except PermissionError:
            yield pid
            continue
        except (FileNotFoundError, ProcessLookupError):
            continue
        found = held & frozenset(ids)
        if found:
            yield pid, found, marked is not None and any(_place(path) == marked for path in marks)


def holders_of(ids: Collection[tuple[str, int]]) -> dict[tuple[str, int], tuple[int, ...]]:
    """Ids of the other processes that hold these by a descriptor; each is ("map" or "program", the kernel's id).

    Those that may not be looked at (that takes root) are left out, and so is one that has mapped a map's memory and
    closed its descriptor.
    """
    found: dict[tuple[str, int], set[int]] = {one: set() for one in ids}
    for link in _descriptors() if ids else ():
        pid = int(link.parts[2])
        try:
            target = "" if pid == os.getpid() else str(link.readlink())
            if target not in _IDS:
                continue
            text = (link.parents[1] / "fdinfo" / link.name).read_text()
        except OSError:
            continue  # closed or ended meanwhile
        number = next((int(line.split()[1]) for line in text.splitlines() if line.startswith(_IDS[target])), 0)
        held = ("map" if target == _MAP else "program", number)
        if held in found:
            found[held].add(pid)
    return {one: tuple(sorted(pids)) for one, pids in found.items()}


def _descriptors() -> Iterator[Path]:
    """Every descriptor of every process that may be looked at."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, which a glob over both would not forgive
            yield from (process / "fd").iterdir()


def _look(pid: int, name: str) -> tuple[frozenset[int], list[Path]]:
    """Ids of the maps that a process holds, and its descriptors of directories called ``name``."""
    held, marks = set(), []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = path.readlink()
            if str(target) == _MAP:
                held.add(_map_id(Path(f"/proc/{pid}/fdinfo/{path.name}")))
            elif target.name == name:
                marks.append(path)
        except FileNotFoundError:
            continue  # closed meanwhile
    return frozenset(held), marks


def _map_id(fdinfo: Path) -> int:
    for line in fdinfo.read_text().splitlines():
        if line.startswith("map_id:"):
            return int(line.split()[1])
    return 0  # closed meanwhile, and its number taken by something else


def _place(path: Path) -> tuple[int, int] | None:
    try:
        seen = path.stat()
    except OSError:
        return None
    return seen.st_dev, seen.st_ino
