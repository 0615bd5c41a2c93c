"""What compilers make of C, kept on disk for machines that have no compiler: the virtual ones of tests/matrix."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["compiled"]


def compiled(command: Sequence[str], source: str) -> bytes:
    """What ``command`` writes to its standard output for the C ``source`` on its standard input.

    Where HITLESS_OBJECTS names a directory, results are kept there by what they were made of, but for the headers of
    the system, which are taken for what they were. Raises CalledProcessError.
    """
    return _compiled(tuple(command), source)


@functools.cache  # many tests begin with the same release
def _compiled(command: tuple[str, ...], source: str) -> bytes:
    kept = os.environ.get("HITLESS_OBJECTS")
    if not kept:
        return _run(command, source)
    path = Path(kept) / hashlib.sha256("\0".join((*command, source)).encode()).hexdigest()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_suffix(f".{os.getpid()}")
        own.write_bytes(_run(command, source))
        own.rename(path)  # others may make the same one just now
    return path.read_bytes()


def _run(command: Sequence[str], source: str) -> bytes:
    return subprocess.run(command, input=source.encode(), capture_output=True, check=True, timeout=60).stdout
