"""bpffs: the directories that hold generations, who may change them, and the two renames that make a commit."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from shlex import quote

from hitless.errors import NodeError
from hitless.kernel.libbpf import check, libc, system_call
from hitless.kernel.mounts import filesystem, is_read_only

__all__ = [
    "exchange",
    "make_directory",
    "make_private",
    "move",
    "remove_tree",
    "require_bpffs",
    "require_own",
    "require_private",
    "require_writable",
    "unpin",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def require_bpffs(path: Path) -> None:
    """Raise NodeError unless ``path``, or the nearest of its parents that exists, is a directory on a bpffs.

    It must not be read-only as a whole, since the kernel opens no map there then. What is read-only by its mount alone,
    as in a container that may only look, is fine here; see :func:`require_writable`.
    """
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
    if is_read_only(existing):
        raise _read_only(path, existing, "maps cannot even be opened, nor anything be pinned,")
    if "." in path.name:
        raise NodeError(f"pin root {path}: a bpffs refuses names with a dot; choose another name", path=str(path))
    if not _exists(path.parent):
        raise NodeError(f"pin root {path} cannot be made: {path.parent} is not there; make it first", path=str(path))
    if path.is_mount():
        raise NodeError(
            f"pin root {path} is a whole bpffs mount: choose a directory in it, such as {path / 'mesh'}", path=str(path)
        )


def require_writable(path: Path) -> None:
    """Raise NodeError if nothing can be changed at ``path``, or made there, since its mount is read-only."""
    existing = path if path.exists() else path.parent
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise _read_only(path, existing, "nothing can be pinned or unpinned")


def _read_only(root: Path, existing: Path, what: str) -> NodeError:
    mount = next(place for place in (existing, *existing.parents) if place.is_mount())
    return NodeError(
        f"the bpffs at {mount} is mounted read-only, so that {what} under {root}; nothing was changed, and hooks run "
        f"on: mount -o remount,rw {quote(str(mount))}, then try again",
        path=str(root),
        mount=str(mount),
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


def require_private(root: Path) -> None:
    """Raise NodeError unless nobody but root and this user decides what is at ``root``, which need not exist yet.

    That takes ``root`` and the directories above it, up to the mount of the bpffs. Above ``root`` anybody may write
    where the sticky bit is set, as at the top of a bpffs that was mounted without a mode: it keeps others from
    renaming and removing what is not theirs.
    """
    for directory in (root, *root.parents):
        if os.path.lexists(directory):
            require_own(directory, sticky=directory != root)
        if directory.is_mount():
            return


def require_own(path: Path, sticky: bool = False) -> None:
    """Raise NodeError if ``path`` is a symbolic link, of another user than root or this one, or others may write it.

    With ``sticky`` they may, if it has the sticky bit. Raises FileNotFoundError if it is not there.
    """
    seen = path.lstat()
    mode = stat.S_IMODE(seen.st_mode)
    if stat.S_ISLNK(seen.st_mode):
        raise NodeError(
            f"{path} is a symbolic link to {path.readlink()}, where hitless makes none: what is behind it is not "
            f"looked at; find out who made it, then remove it (rm {path})",
            path=str(path),
        )
    if seen.st_uid not in (0, os.geteuid()):
        raise NodeError(
            f"{path} belongs to user {seen.st_uid}, who could change at any time what hitless reads there; nothing was "
            f"read: find out who made it, and remove it, or, if it is yours: chown root:root {path}",
            path=str(path),
            owner=seen.st_uid,
            mode=f"{mode:04o}",
        )
    if mode & _OTHERS_WRITE and not (sticky and mode & stat.S_ISVTX):
        raise NodeError(
            f"{path} has mode {mode:04o}, so that others than its owner could change at any time what hitless reads "
            f"there; nothing was read: chmod go-w {path}",
            path=str(path),
            owner=seen.st_uid,
            mode=f"{mode:04o}",
        )


def make_directory(path: Path, exist_ok: bool = False) -> None:
    """Make the directory ``path``, which its owner alone can enter, whatever the umask is.

    Raises KernelError (EEXIST unless ``exist_ok``).
    """
    with system_call("mkdir", path):
        try:
            path.mkdir(0o700)
        except FileExistsError:
            # It is left as it is: somebody else may have put it there, or a link to a directory of the system.
            if not exist_ok:
                raise
            return
    with system_call("chmod", path):
        path.chmod(0o700)


def make_private(root: Path) -> None:
    """Close to others what is at and below ``root`` (0700, pins 0600), which a hitless of before left open to read.

    Raises NodeError as :func:`require_own` for all of it, but for the symbolic links in ``root`` itself.
    """
    inside = (Path(top, name) for top, directories, files in os.walk(root) for name in (*directories, *files))
    for path in (root, *inside):
        if path.parent == root and path.is_symlink():
            continue
        require_own(path)
        wanted = 0o700 if path.is_dir() else 0o600
        if stat.S_IMODE(path.lstat().st_mode) != wanted:
            with system_call("chmod", path):
                path.chmod(wanted)


def exchange(one: Path, other: Path) -> None:
    """Swap two paths in one atomic step; both must exist. Raises KernelError."""
    result = libc().renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    check(result, "renameat2(RENAME_EXCHANGE)", f"{one} and {other}")


def move(path: Path, target: Path) -> None:
    """Rename ``path``. Raises KernelError."""
    with system_call("rename", f"{path} to {target}"):
        path.rename(target)


def unpin(path: Path) -> None:
    """Remove the pin or symbolic link at ``path``. Raises KernelError."""
    with system_call("unlink", path):
        path.unlink()


def remove_tree(path: Path) -> None:
    """Unpin all below ``path`` and remove it; nothing to do if it is not there. Symbolic links are not followed.

    Raises KernelError.
    """
    if not path.is_symlink() and path.is_dir():
        for child in path.iterdir():
            remove_tree(child)
        with system_call("rmdir", path):
            path.rmdir()
    elif path.is_symlink() or path.exists():
        unpin(path)
