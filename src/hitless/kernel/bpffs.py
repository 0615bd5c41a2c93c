"""bpffs: the directories that hold generations, and the two renames that make a commit."""

from __future__ import annotations

import os
from pathlib import Path

from hitless.errors import NodeError
from hitless.kernel.libbpf import check, libc
from hitless.kernel.mounts import filesystem

__all__ = ["exchange", "remove_tree", "require_bpffs"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def require_bpffs(path: Path) -> None:
    """Raise NodeError unless ``path``, or the nearest of its parents that exists, is a directory on a bpffs."""
    existing = path
    while not _exists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise NodeError(f"{existing} is a file, so {path} cannot be a pin root", path=str(path))
    kind = filesystem(existing)
    if kind != "bpf":
        raise NodeError(
            f"pin root {path} is on {kind}, not on a bpffs: maps cannot be pinned there; "
            "choose a directory under /sys/fs/bpf, or mount one (mount -t bpf bpf DIR)",
            path=str(path),
            filesystem=kind,
        )
    if "." in path.name:
        raise NodeError(f"pin root {path}: a bpffs refuses names with a dot; choose another name", path=str(path))
    if not _exists(path.parent):
        raise NodeError(f"pin root {path} cannot be made: {path.parent} is not there; make it first", path=str(path))
    if path.is_mount():
        raise NodeError(
            f"pin root {path} is a whole bpffs mount: choose a directory in it, such as {path / 'mesh'}", path=str(path)
        )


def _exists(path: Path) -> bool:
    """Whether ``path`` is there; a bpffs answers EPERM when asked for a name with a dot."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except PermissionError as error:
        if "." in path.name:
            return False
        raise NodeError(f"{path} cannot be looked at: {error.strerror}; run as root", path=str(path)) from None
    return True


def exchange(one: Path, other: Path) -> None:
    """Swap two paths in one atomic step; both must exist. Raises KernelError."""
    result = libc().renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    check(result, "renameat2(RENAME_EXCHANGE)", f"{one} and {other}")


def remove_tree(path: Path) -> None:
    """Unpin all below ``path`` and remove it; nothing to do if it is not there. Symbolic links are not followed."""
    if not path.is_symlink() and path.is_dir():
        for child in path.iterdir():
            remove_tree(child)
        path.rmdir()
    elif path.is_symlink() or path.exists():
        path.unlink()
