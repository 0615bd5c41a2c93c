"""The paths by which an adopted daemon's own loader finds its maps and links: kept as the record has them.

Each is a symbolic link into the pin root (see :mod:`hitless.public`), put there by a rename over the daemon's own pin
of the same map or link, so that nobody who opens the path finds nothing. It is relative, since a container may have
the bpffs mounted elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote

from hitless.bundle import Bundle
from hitless.errors import NodeError
from hitless.kernel.bpffs import move, unpin
from hitless.kernel.libbpf import pinned_kind, system_call
from hitless.kernel.maps import Map, create
from hitless.layout import kmesh
from hitless.public import version_number
from hitless.upgrade.model import Record
from hitless.upgrade.node import Node
from hitless.upgrade.record import map_pin, read_record

__all__ = ["path_problems", "publish", "refuse_taken_paths", "same_object", "withdraw"]

_BESIDE = "~hitless"
_ARRAY = 2  # BPF_MAP_TYPE_ARRAY
_KEY = bytes(4)


def publish(node: Node, record: Record, before: Record | None) -> None:
    """Let the public paths lead to what ``record`` has, and tell the daemon the version and the layouts.

    ``before`` is the release before: paths that only it has go. Without one, the daemon's own word on the layouts
    stands. May be repeated after a kill. Raises NodeError if somebody else has put something there, KernelError.
    """
    wanted = _places(node, record)
    for path in _places(node, before).keys() - wanted.keys():
        if _is_ours(node, path):
            unpin(path)
    for path, target in wanted.items():
        if path.is_symlink() and _leads_to(path) == target:
            continue
        _refuse_foreign(node, path, target)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside = path.with_name(path.name + _BESIDE)
        if os.path.lexists(beside):
            unpin(beside)
        with system_call("symlink", beside):
            beside.symlink_to(os.path.relpath(target, os.path.realpath(path.parent)))
        move(beside, path)
    if record.public is None:
        return
    if record.public.snapshot is not None and (before is not None or not Path(record.public.snapshot).exists()):
        _write(Path(record.public.snapshot), kmesh.dump({item.name: item for item in record.objects}))
    if record.public.version_map is not None:
        # Last: who starts now and finds its own version uses all the rest.
        with _version_map(node, record, record.public.version_map) as held:
            held.update(_KEY, version_number(record.public.version).to_bytes(4, sys.byteorder))


def _version_map(node: Node, record: Record, name: str) -> Map:
    """The map of the version: one of the release's, or else one that the daemon itself makes where it looks for it."""
    assert record.public is not None
    pin = record.public.pin_of(name)
    if name in record.maps or pin is None:
        return Map.open(map_pin(node.current, name))
    path = _absolute(node, pin)
    if path.exists():
        return Map.open(path)
    made = create(_ARRAY, name, 4, 4, 1)
    made.pin(path)
    return made


def withdraw(node: Node) -> list[Path]:
    """Remove the public paths that lead into the pin root, of whichever release; returns them. Raises KernelError."""
    gone = []
    for generation in (node.current, node.next, node.previous):
        if (generation / "record").exists():
            with suppress(NodeError):  # one that cannot be read
                for path in _places(node, read_record(generation / "record")):
                    if _is_ours(node, path):
                        unpin(path)
                        gone.append(path)
    return gone


def refuse_taken_paths(node: Node, wanted: Bundle, current: Record | None) -> None:
    """Raise NodeError if a public path that only ``wanted`` has is somebody else's, or one of ``current`` is now."""
    for problem in path_problems(node, current) if current is not None else ():
        raise NodeError(f"{problem}; nothing was changed", path=str(node.base))
    public = wanted.public
    if public is None:
        return
    known = _places(node, current)
    for path in {_absolute(node, path) for path in public.places(wanted.maps, public.links)} - known.keys():
        if os.path.lexists(path) and not _is_ours(node, path):
            raise NodeError(
                f"{path} is there already, and release {wanted.version} wants to have it: another loader pinned it; "
                "nothing was changed: look at it, then remove it, or give the map or link another pin",
                path=str(path),
            )
    if public.snapshot is not None:
        directory = Path(public.snapshot).parent
        if not os.access(directory, os.W_OK | os.X_OK):
            raise NodeError(
                f"{public.snapshot} cannot be written behind the upgrade: {directory} is no directory that this "
                "process can write to; nothing was changed: make it, or mount it",
                path=public.snapshot,
            )


def path_problems(node: Node, record: Record) -> Iterator[str]:
    """The public paths that do not lead to what the record has, in words."""
    for path, target in sorted(_places(node, record).items()):
        if path.is_symlink() and _leads_to(path) == target:
            continue
        relative = os.path.relpath(target, os.path.realpath(path.parent))
        right = f"ln -sfn {quote(relative)} {quote(str(path))}"
        if not os.path.lexists(path):
            yield f"{path} is missing, so the daemon's own loader would make a new one: put it right: {right}"
        elif not path.is_symlink() and target.exists() and same_object(path, target):
            yield f"{path} is a pin of its own, which would not follow the next upgrade: put it right: {right}"
        else:
            yield (
                f"{path} is not what hitless put there: the daemon's own loader, or somebody else, has begun anew with "
                f"another one; if that is what is to stay, unload hitless ({_unload(node)}) and adopt again, else put "
                f"it right: {right}"
            )


def same_object(one: Path, other: Path) -> bool:
    """Whether two pins are of one map, program or link. Raises KernelError."""
    return _identity(one) == _identity(other)


def _identity(path: Path) -> tuple[str, int]:
    fd, kind = pinned_kind(path)
    try:
        text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    name = {"map": "map_id", "prog": "prog_id", "link": "link_id"}[kind]
    return kind, next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


def _places(node: Node, record: Record | None) -> Mapping[Path, Path]:
    """What each public path leads to."""
    if record is None or record.public is None:
        return {}
    links = [hook.link for hook in record.hooks]
    named = record.public.places(record.maps, links)
    return {_absolute(node, path): node.root / target for path, target in named.items()}


def _absolute(node: Node, path: str) -> Path:
    return Path(os.path.normpath(node.base / path))


def _leads_to(path: Path) -> Path:
    return Path(os.path.normpath(Path(os.path.realpath(path.parent)) / path.readlink()))


def _is_ours(node: Node, path: Path) -> bool:
    return path.is_symlink() and _leads_to(path).is_relative_to(node.root)


def _refuse_foreign(node: Node, path: Path, target: Path) -> None:
    if not os.path.lexists(path) or _is_ours(node, path):
        return
    if path.is_symlink() or path.is_dir() or not target.exists() or not same_object(path, target):
        raise NodeError(
            f"{path} is another one than {target}: somebody pinned it meanwhile; look at it, then remove it (rm "
            f"{quote(str(path))}), and let hitless recover finish",
            path=str(path),
        )


def _unload(node: Node) -> str:
    return f"hitless unload --root {quote(str(node.base))}"


def _write(path: Path, data: bytes) -> None:
    """Replace the file in one step, so that who reads it meanwhile has all of the one or of the other."""
    beside = path.with_name(f"{path.name}~")
    with system_call("write", beside):
        beside.write_bytes(data)
    with system_call("rename", path):
        beside.rename(path)
