"""Types from a C header, for maps that carry none: compiled by clang, read from the debug information it makes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from hitless.errors import LayoutError, UnsupportedError
from hitless.layout.dwarf import Dwarf

__all__ = ["compile_header", "types_of_header"]

_COMPILERS = ("clang-19", "clang")
_SECONDS = 60  # a header of all the kernel's types takes a few
_LINES = 6


def compile_header(header: Path) -> bytes:
    """An object that holds the types of a C header, of those too that nothing uses, and no code.

    ``$CLANG`` is the compiler, else ``clang-19`` or ``clang``. Raises LayoutError with the compiler's words,
    UnsupportedError if there is no clang.
    """
    if not header.is_file():
        raise LayoutError(f"{header} is not there or no file; name a C header with the types of the maps")
    given = os.environ.get("CLANG")
    clang = next((found for name in ((given,) if given else _COMPILERS) if (found := shutil.which(name))), None)
    if clang is None:
        looked = f"$CLANG is {given!r}, and that is not there" if given else f"looked for {' and '.join(_COMPILERS)}"
        raise UnsupportedError(
            f"{header}: types of a header need clang to compile it ({looked}): install it, or do this where it is, and "
            "take the object types.bpf.o that hitless init writes",
            feature="types from a header",
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "types.bpf.o"
        command = [
            clang, "-target", "bpf", "-g", "-O2", "-fno-eliminate-unused-debug-types", "-Wno-everything",
            f"-fdebug-prefix-map={header.parent.resolve()}=.", "-fdebug-compilation-dir=.",
            f"-I/usr/include/{platform.machine()}-linux-gnu", "-x", "c", "-c", str(header.resolve()), "-o", str(out),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, errors="replace")
        except subprocess.TimeoutExpired:
            raise LayoutError(f"{header}: {clang} was not done in {_SECONDS} s") from None
        if done.returncode:
            said = "\n  ".join(done.stderr.splitlines()[:_LINES])
            raise LayoutError(
                f"{header} does not compile by itself: include what it needs (as <linux/types.h>) in it, or in a "
                f"header that includes it:\n  {said}"
            )
        return out.read_bytes()


def types_of_header(header: Path) -> Dwarf:
    """The types of a C header. Raises as :func:`compile_header`."""
    return Dwarf.parse(compile_header(header), str(header))
