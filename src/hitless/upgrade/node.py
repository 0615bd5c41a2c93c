"""A node: what is live under a pin root, read from the kernel and never assumed.

    root/current/      the running generation: maps/ data/ progs/ and its record
    root/maps, progs   symbolic links into current/: the paths that other programs open
    root/links/        the bpf_links, updated in place
    root/slots/        the program array of each link that is a dispatcher, with one slot, or two of a map's
    root/board/        dispatchers that keep each connection with its release
    root/next/         the generation being built; there during an upgrade only
    root/previous/     the last generation
    root/writers/      the lock between writers and a commit

``current`` and ``next`` change places in one exchange, so the public paths show all old or all new. All of it is
root's alone, to read and to write: what is there is believed.

On a node that was adopted, all this is in ``hitless/`` below the directory of the daemon that does not know of it:
see :mod:`hitless.public`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import TypeVar

import msgspec

from hitless.carry import is_global
from hitless.errors import BusyError, HitlessError, KernelError, NodeError
from hitless.kernel.bpffs import make_private, require_bpffs, require_own, require_private, require_writable
from hitless.kernel.libbpf import system_call
from hitless.kernel.maps import Map
from hitless.kernel.processes import lock_holder, who
from hitless.kernel.programs import Program
from hitless.kernel.rings import holders, unread_bytes
from hitless.kernel.switchboard import PARTS
from hitless.layout.model import MapSpec
from hitless.public import HOME
from hitless.upgrade.attached import open_attached
from hitless.upgrade.handle import Access, MapHandle, RingReader
from hitless.upgrade.model import Generation, LeftRing, LiveMap, NodeState, Record
from hitless.upgrade.record import advice, map_pin, read_record

__all__ = ["PUBLIC", "Node", "foreign_error", "generation_record", "live_map", "read_generation"]

T = TypeVar("T")

_DIRECTORIES = ("current", "next", "previous", "links", "slots", "board", "writers")
PUBLIC = ("maps", "progs")
"""The symbolic links under a root that lead into ``current/``, where other programs open maps and programs."""

_LOOK_SECONDS = 5.0
_PINS = ("maps", "data", "progs")
_SUBDIRECTORIES = (*_PINS, "base", "back", "adopted", "links")


class Node:
    """The pin root at ``root``, a directory on a bpffs that may not exist yet. Making a Node has no effect.

    ``base`` is what paths of an adopted daemon's pins are relative to: ``root`` is ``hitless/`` in it then.
    """

    def __init__(self, root: Path | str) -> None:
        # Real, since removing a symbolic link to the root would leave all that is behind it.
        self._given = Path(os.path.realpath(root))
        self.find()

    def find(self) -> None:
        """Look again where hitless keeps what is its own: in the directory given, or below it once that was adopted."""
        home, adopted = self._given / HOME, False
        with suppress(PermissionError):  # a bpffs asked for a name with a dot
            adopted = home.is_dir() and not (self._given / "current").is_dir()
        self.root = home if adopted else self._given
        self.base = self.root.parent if self.root.name == HOME else self.root
        self._settle()

    def move_below(self) -> None:
        """Keep what is hitless's own below the directory given, which another daemon uses, unless it is in it already.

        Nothing is made yet.
        """
        if self.root.name != HOME and not (self.root / "current").is_dir():
            self.root, self.base = self._given / HOME, self._given
            self._settle()

    def _settle(self) -> None:
        self.current = self.root / "current"
        self.next = self.root / "next"
        self.previous = self.root / "previous"
        self.links = self.root / "links"
        self.access = Access(self.root)

    def observe(self) -> NodeState:
        """Look at what is live; needs no lock, and looks again if an upgrade takes a step meanwhile.

        Raises NodeError if the root is no place for pins or holds what is not ours, BusyError if it never rests.
        """
        return self.at_rest(self._look)

    def at_rest(self, look: Callable[[], T]) -> T:
        """What ``look`` sees, called again if an upgrade takes a step meanwhile. Raises BusyError if it never rests."""
        until = time.monotonic() + _LOOK_SECONDS
        while time.monotonic() < until:
            before = self._outline()
            try:
                state = look()
            except (HitlessError, FileNotFoundError):
                if self._outline() == before:
                    raise
                continue
            if self._outline() == before:
                return state
        raise BusyError(f"{self.root} changes too fast to be looked at; try again", path=str(self.root), pid=None)

    def observe_with_holder(self) -> tuple[NodeState, int | None]:
        """What is live, and the id of the process that is changing it right now, if any. Raises as observe."""
        state = self.observe()
        while True:
            holder = self.holder()
            again = self.observe()
            # With nobody there between two looks that agree, what was seen half done is so for good.
            if holder is not None or again == state:
                return again, holder
            state = again

    def _outline(self) -> list[tuple[int, list[str], list[str]]]:
        """All directories under the root, by inode and names: an upgrade that takes a step changes it."""
        outline = []
        for top, directories, files in os.walk(self.root):
            if Path(top).name in ("base", "back"):  # what carriers keep there says nothing of what is live
                directories.clear()
                files.clear()
            with suppress(FileNotFoundError):
                outline.append((Path(top).stat().st_ino, sorted(directories), sorted(files)))
        return outline

    def _look(self) -> NodeState:
        require_bpffs(self.root)
        if not self.root.exists():
            require_private(self.root)  # where it would be made
            return NodeState(str(self.root), None, {})
        self.refuse_foreign()
        links = {}
        for path in _children(self.links):
            with open_attached(self.links, path.name) as link:
                links[path.name] = link.info
        current = read_generation(self.current) if self.current.exists() else None
        unfinished = read_record(self.next / "record") if (self.next / "record").exists() else None
        if current is None and unfinished is None and links:
            names = ", ".join(sorted(links))
            raise NodeError(
                f"{self.links} holds links ({names}) but {self.root} has no generation of hitless: they belong to "
                "another program, or the generation was removed by hand; choose another pin root, or unload",
                path=str(self.links),
            )
        previous = self.previous / "record"
        return NodeState(
            root=str(self.root),
            current=current,
            links=links,
            unfinished=unfinished,
            litter=self.next.exists() and unfinished is None,
            previous=read_record(previous).version if previous.exists() else None,
            left=_left_rings(self.previous, current) if previous.exists() else (),
        )

    def last(self) -> Generation:
        """The last generation, complete. Raises NodeError if there is none, or not all of it any more."""
        instead = "apply the older release's bundle instead"
        if not (self.previous / "record").exists():
            raise NodeError(
                f"{self.root} has no last release to go back to: nothing was upgraded yet, or gc has removed it; "
                f"{instead}",
                path=str(self.previous),
            )
        record = read_record(self.previous / "record")
        pins = [map_pin(self.previous, name) for name in record.maps]
        pins += [self.previous / "progs" / hook.program for hook in record.hooks if hook.hook != "struct_ops"]
        for path in pins:
            if not path.exists():
                raise NodeError(
                    f"{path} is missing, so that {record.version} is no longer complete: a gc was killed, or the pin "
                    f"was removed by hand; run gc, then {instead}",
                    path=str(path),
                )
        return read_generation(self.previous)

    def ring(self, name: str) -> RingReader:
        """A reader of the running release's ring buffer ``name``; see :class:`RingReader`."""
        return RingReader(self.access, name)

    def map(self, name: str) -> MapHandle:
        """A handle on the map ``name`` of the running release; writes reach both releases during an upgrade."""
        return MapHandle(self.access, name)

    @contextmanager
    def lock(self, seconds: float = 10.0) -> Iterator[None]:
        """Hold the pin root alone, waiting up to ``seconds``. The kernel frees it when the holder dies.

        Raises BusyError naming the holder, NodeError if somebody else can change the root or put something into it.
        """
        require_writable(self.root)
        require_private(self.root)
        descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            deadline = time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                        with system_call("flock", self.root):
                            raise
                    if time.monotonic() > deadline:
                        raise self._busy(seconds) from None
                    time.sleep(0.02)
            if _inode(self.root) != os.fstat(descriptor).st_ino:
                raise BusyError(
                    f"{self.root} was unloaded by another process meanwhile; try again", path=str(self.root), pid=None
                )
            self.refuse_foreign()
            make_private(self.root)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """Process id of who holds the lock, that is: upgrades this root now; None if nobody does."""
        return lock_holder(self.root)

    def _busy(self, seconds: float) -> BusyError:
        pid = self.holder()
        return BusyError(
            f"{self.root} is being upgraded by {who(pid)}; waited {seconds:g} s; try again when it is done",
            path=str(self.root),
            pid=pid,
        )

    def refuse_foreign(self) -> None:
        """Raise NodeError if there is anything under the root that hitless does not put there, or cannot trust."""
        self.refuse_untrusted()
        for path in self.foreign():
            raise foreign_error(path)

    def foreign(self) -> Iterator[Path]:
        """What is under the root, or right under a generation, and hitless does not put there."""
        for path in _children(self.root):
            if path.name in PUBLIC:
                if not path.is_symlink() or path.readlink() != Path("current", path.name):
                    yield path
            elif path.name not in _DIRECTORIES or path.is_symlink() or not path.is_dir():
                yield path
        for name in ("current", "next", "previous"):
            for path in _children(self.root / name):
                if not (path.name == "record" or (path.name in _SUBDIRECTORIES and path.is_dir())):
                    yield path

    def refuse_untrusted(self) -> None:
        """Raise NodeError if another user can change the root or what is in it, or if a symbolic link is a pin.

        What carriers keep is left out, which comes and goes: the lock looks at that.
        """
        require_private(self.root)
        for path in _children(self.root):
            if path.name not in PUBLIC:
                require_own(path)
        generations = [self.root / name for name in ("current", "next", "previous")]
        board = [self.root / "board", *(self.root / "board" / part for part in (*PARTS, "witnesses"))]
        for directory in (self.links, self.root / "slots", *board, self.access.lock.directory, *generations):
            for path in _children(directory):
                require_own(path)
        for path in (pin for directory in generations for name in _PINS for pin in _children(directory / name)):
            require_own(path)


def foreign_error(path: Path) -> NodeError:
    """The error for something at ``path`` that is not from hitless."""
    if path.name in PUBLIC and path.is_symlink():
        wanted = f"current/{path.name}"
        return NodeError(
            f"{path} was not made by hitless: it leads to {path.readlink()}, not to {wanted}, so who opens maps or "
            f"programs by it does not get those of the running release; put it right: ln -sfn {wanted} "
            f"{quote(str(path))}",
            path=str(path),
        )
    return NodeError(
        f"{path} was not made by hitless: another program uses this pin root (hitless adopt takes over what that has "
        "started), or it was put there by hand; choose another root (--root), or remove it",
        path=str(path),
    )


def generation_record(directory: Path) -> Record:
    """The record of the generation in ``directory``. Raises NodeError if it has none or it cannot be read."""
    if not (directory / "record").exists():
        raise NodeError(
            f"{directory} has no record: its pins are not from hitless, or it was removed by hand; {advice(directory)}",
            path=str(directory),
        )
    return read_record(directory / "record")


def read_generation(directory: Path) -> Generation:
    """What is pinned in ``directory``, looked up in the kernel. Raises NodeError if it is not what its record says."""
    record = generation_record(directory)
    maps = {}
    for name, declared in record.maps.items():
        path = map_pin(directory, name)
        if not path.exists():
            raise NodeError(
                f"{path} is missing: the record of generation {record.generation} has it, so the pin was removed by "
                "hand; pin the map there again (bpftool map pin), or unload and start anew",
                path=str(path),
            )
        with Map.open(path) as pinned:
            maps[name] = live_map(pinned, name, declared)
    pins = {map_pin(directory, name) for name in maps}
    for path in (*_children(directory / "maps"), *_children(directory / "data")):
        if path not in pins:
            raise NodeError(f"{path} is not in the record: another program pinned it; remove it", path=str(path))
    programs = {}
    for path in _children(directory / "progs"):
        with Program.open(path) as program:
            programs[path.name] = program.info
    for hook in record.hooks:
        if hook.program not in programs and hook.hook != "struct_ops":
            path = directory / "progs" / hook.program
            raise NodeError(
                f"{path} is missing: the record of generation {record.generation} has it on hook {hook.link}, so the "
                "pin was removed by hand; pin the program there again (bpftool prog pin), or unload and start anew",
                path=str(path),
            )
    earlier = {entry.id for entry in record.replaced_programs}
    return Generation(record, maps, programs, _of_ops(earlier | {info.id for info in programs.values()}))


def _of_ops(programs: Iterable[int]) -> frozenset[int]:
    """The maps that struct_ops among ``programs`` use, as far as these are still there: connections may have them."""
    used: frozenset[int] = frozenset()
    for number in programs:
        try:
            with Program.by_id(number) as program:
                used |= program.map_ids if program.info.type == "struct_ops" else frozenset()
        except KernelError as error:
            if error.facts["errno"] not in (errno.ENOENT, errno.EPERM):  # who may not look cannot upgrade either
                raise
    return used


def live_map(pinned: Map, name: str, declared: MapSpec) -> LiveMap:
    """The kernel's word first; the record's for what the kernel does not tell (inner maps, tags, lost BTF)."""
    seen = pinned.spec(name)
    if declared.ops is not None and seen.type == declared.type:  # the kernel tells nothing of what it laid out itself
        return LiveMap(pinned.info, declared, "record")
    typed = seen.value is not None and (seen.key is not None or is_global(name))  # whose key has no type
    if (seen.type, seen.key_size, seen.value_size) != (declared.type, declared.key_size, declared.value_size):
        return LiveMap(pinned.info, seen, "kernel" if typed else "none")
    spec = msgspec.structs.replace(
        declared,
        name=name,  # of one object's .bss its name for the whole release
        max_entries=seen.max_entries if declared.max_entries else 0,  # 0 lets the kernel decide
        flags=seen.flags,
        key=seen.key or declared.key,
        value=seen.value or declared.value,
    )
    source = "kernel" if typed else "record" if declared.value is not None else "none"
    return LiveMap(pinned.info, spec, source, _filled(pinned) if seen.type == "prog_array" else ())


def _filled(array: Map) -> tuple[int, ...]:
    """The slots of a program array that hold a program."""
    filled = (key for key in array.all_keys() if array.lookup(key) is not None)
    return tuple(sorted(int.from_bytes(key, sys.byteorder) for key in filled))


def _left_rings(previous: Path, current: Generation | None) -> tuple[LeftRing, ...]:
    """Ring buffers of the last generation that the running one does not have, and that were not read to the end."""
    kept = {live.info.id for live in current.maps.values()} if current is not None else set()
    left = []
    for name, declared in read_record(previous / "record").maps.items():
        path = previous / "maps" / name
        if declared.type == "ringbuf" and path.exists():
            with Map.open(path) as ring:
                if ring.info.id not in kept and (unread := unread_bytes(ring)):
                    others = tuple(pid for pid in holders(ring.info.id) if pid != os.getpid())
                    left.append(LeftRing(name, unread, others))
    return tuple(left)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _children(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []
