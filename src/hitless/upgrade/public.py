"""The paths by which an adopted daemon's own loader finds its maps and links: kept as the record has them.

Each is a symbolic link into the pin root (see :mod:`hitless.public`), put there by a rename over the daemon's own pin
of the same map or link, so that nobody who opens the path finds nothing. It is relative, since a container may have
the bpffs mounted elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote

from hitless.bundle import Bundle
from hitless.errors import NodeError
from hitless.kernel.bpffs import move, require_private, unpin
from hitless.kernel.libbpf import pinned_kind, system_call
from hitless.kernel.links import Link
from hitless.kernel.maps import Map, create
from hitless.kernel.mounts import filesystem
from hitless.layout import kmesh
from hitless.public import Public, loaded, version_number
from hitless.upgrade.model import Record
from hitless.upgrade.node import Node
from hitless.upgrade.record import map_pin, read_record

__all__ = [
    "hold_link",
    "identity",
    "keep_leading",
    "path_problems",
    "pins_of",
    "publish",
    "refuse_taken_paths",
    "require_room",
    "same_object",
    "withdraw",
]

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
        _lead(path, target)
    if record.public is None:
        return
    if record.public.snapshot is not None and (before is not None or not Path(record.public.snapshot).exists()):
        _write(Path(record.public.snapshot), kmesh.dump({item.name: item for item in record.objects}))
    if record.public.version_map is not None:
        # Last: who starts now and finds its own version uses all the rest.
        _note_version(node, record, record.public, record.public.version_map)


def keep_leading(node: Node, record: Record) -> None:
    """Right behind the exchange: paths of maps that ``record`` calls otherwise lead there at once."""
    for path, target in _places(node, record).items():
        if _is_ours(node, path) and not path.exists() and target.exists():
            _lead(path, target)


def hold_link(node: Node, record: Record, name: str) -> None:
    """Put pins of the link called ``name`` where paths lead to it, so that they have it while its name changes."""
    for path in _places(node, record):
        if path.is_symlink() and _leads_to(path) == node.links / name and path.exists():
            beside = _beside(path)
            with Link.open(node.links / name) as link:
                link.pin(beside)
            move(beside, path)


def _lead(path: Path, target: Path) -> None:
    """Put a symbolic link there in one step."""
    _make_parents(path)
    beside = _beside(path)
    with system_call("symlink", beside):
        beside.symlink_to(os.path.relpath(target, os.path.realpath(path.parent)))
    move(beside, path)


def _beside(path: Path) -> Path:
    """Where something is made that is then moved to ``path``; nothing of one that was killed is there."""
    beside = path.with_name(path.name + _BESIDE)
    if os.path.lexists(beside):
        unpin(beside)
    return beside


def _note_version(node: Node, record: Record, public: Public, name: str) -> None:
    """In a map of the release, or else in one that the daemon itself makes where it looks for it."""
    number = version_number(public.version).to_bytes(4, sys.byteorder)
    pin = public.pin_of(name)
    path = map_pin(node.current, name) if name in record.maps or pin is None else _absolute(node, pin)
    if os.path.lexists(path):
        with Map.open(path) as held:
            held.update(_KEY, number)
        return
    with create(_ARRAY, name, 4, 4, 1) as made:
        made.update(_KEY, number)  # first: without a number, the daemon would begin anew
        _make_parents(path)
        made.pin(path)


def _make_parents(path: Path) -> None:
    with system_call("mkdir", path.parent):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def withdraw(node: Node) -> list[Path]:
    """Remove the public paths that lead into the pin root, of whichever release; returns them. Raises KernelError.

    A version that the daemon itself keeps becomes 0, which for its next start means that nothing is there.
    """
    gone = []
    for generation in (node.current, node.next, node.previous):
        if (generation / "record").exists():
            with suppress(NodeError):  # one that cannot be read
                record = read_record(generation / "record")
                public = record.public
                pin = public.pin_of(public.version_map) if public and public.version_map else None
                if pin is not None and public and public.version_map not in record.maps:
                    own = _absolute(node, pin)
                    if own.exists():
                        with Map.open(own) as held:
                            held.update(_KEY, bytes(4))
                for path in _places(node, record):
                    if _is_ours(node, path):
                        unpin(path)
                        gone.append(path)
    return gone


def refuse_taken_paths(node: Node, wanted: Bundle, current: Record | None) -> None:
    """Raise NodeError if a public path that only ``wanted`` has is somebody else's, or one of ``current`` is now."""
    for problem in path_problems(node, current) if current is not None else ():
        raise NodeError(f"{problem}; nothing was changed", path=str(node.base))
    public, known = wanted.public, _places(node, current)
    if public is None:
        if current is not None and current.public is not None and known:
            raise NodeError(
                f"release {wanted.version} does not say where the daemon's own loader looks for its pins ([public], pin"
                f"), so that this would find none of the {len(known)} that {current.version} has, and begin anew; "
                f"nothing was changed: give it the paths of {current.version}, or an empty [public] if they are to go",
                path=str(node.base),
            )
        return
    taken = "look at it, then remove it, or give the map or link another pin"
    if current is None:
        taken = "take over what runs there (hitless adopt, or apply --adopt), or give another --root"
    places = public.places(wanted.maps, public.links, loaded(wanted.programs.values()))
    for path in sorted({_absolute(node, path) for path in places} - known.keys()):
        if os.path.lexists(path) and not _is_ours(node, path):
            raise NodeError(
                f"{path} is there already, and release {wanted.version} wants to have it: another loader pinned it; "
                f"nothing was changed: {taken}",
                path=str(path),
            )
        _require_bpffs(path)
    _require_notes(node, public, wanted.maps)


def pins_of(node: Node, record: Record) -> dict[Path, tuple[str, int]]:
    """What is pinned at the public paths of ``record``, by path. Raises NodeError, KernelError."""
    return {path: identity(path) for path in _places(node, record) if os.path.lexists(path)}


def require_room(node: Node, record: Record) -> None:
    """Raise NodeError if what :func:`publish` does for ``record`` would fail or could be changed by anybody."""
    for path in _places(node, record):
        _require_bpffs(path)
        require_private(path)
    if record.public is not None:
        _require_notes(node, record.public, record.maps)


def _require_bpffs(path: Path) -> None:
    existing = next(parent for parent in path.parents if parent.exists())
    kind = filesystem(existing)
    if kind != "bpf":
        raise NodeError(
            f"{path}, which is to be a path of the daemon's own loader, is on {kind}, not on a bpffs: nothing can be "
            "pinned there; nothing was changed: correct the manifest (maps in [public], or pin)",
            path=str(path),
            filesystem=kind,
        )


def _require_notes(node: Node, public: Public, maps: Container[str]) -> None:
    """What is written behind the commit can be: the version, where the daemon itself has a map for it, and layouts."""
    name = public.version_map
    pin = public.pin_of(name) if name is not None and name not in maps else None
    if pin is not None:
        path = _absolute(node, pin)
        _require_bpffs(path)
        if os.path.lexists(path):
            with Map.open(path) as held:
                seen = held.info
                if held.is_read_only or (seen.type, seen.key_size, seen.value_size) != ("array", 4, 4):
                    raise NodeError(
                        f"{path} is to hold the daemon's version, and is no array of 4 bytes that can be written; "
                        "nothing was changed: correct version_map in [public], or leave it out",
                        path=str(path),
                    )
    if public.snapshot is not None:
        directory = Path(public.snapshot).parent
        if not os.access(directory, os.W_OK | os.X_OK):
            raise NodeError(
                f"{public.snapshot} could not be written behind an upgrade: {directory} is no directory that this "
                "process can write to; nothing was changed: make it, or mount it",
                path=public.snapshot,
            )


def path_problems(node: Node, record: Record) -> Iterator[str]:
    """The public paths that do not lead to what the record has, in words; none before all are made (see finish)."""
    if record.phase != "committed":
        return
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
                f"another one; if that is what is to stay, unload hitless ({_unload(node)}), which takes all its hooks "
                f"off, let the daemon start anew, and adopt that; else put it right: {right}"
            )


def same_object(one: Path, other: Path) -> bool:
    """Whether two pins are of one map, program or link. Raises KernelError."""
    return identity(one) == identity(other)


def identity(path: Path) -> tuple[str, int]:
    """What is pinned there: ``map``, ``prog`` or ``link``, and the kernel's id. Raises NodeError, KernelError."""
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
    named = record.public.places(record.maps, links, record.pinned_programs)
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
