"""The C programs of the benchmark, and its two releases."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import hitless
from hitless.errors import UnsupportedError

__all__ = ["NO_PREALLOC", "SPARE", "TOOLS", "build_tools", "compile_bpf", "compile_pass", "write_releases"]

HERE = Path(__file__).parent
TOOLS = HERE.parent / "build" / "benchmarks"
NO_PREALLOC = 1  # BPF_F_NO_PREALLOC
SPARE = 1024
"""Places in the map beyond the entries that it is filled with: the hook needs one."""

_PROGRAMS = ("opponent", "entries", "probe", "client", "connections")
_MANIFEST = """[bundle]
name = "bench"
version = "{release}"

[[object]]
file = "flow.bpf.o"

[[attach]]
program = "count"
hook = "cgroup"
target = "${{cgroup}}"
link = "connect4"
"""


def build_tools() -> None:
    """Compile what is not there or older than its source."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    for name in _PROGRAMS:
        source, made = HERE / f"{name}.c", TOOLS / name
        newest = max(source.stat().st_mtime, (HERE / "flow.h").stat().st_mtime)
        if made.exists() and made.stat().st_mtime > newest:
            continue
        flags = ["-O2", "-march=native", "-Wall", "-Wextra", "-Werror"]
        _run(["gcc", *flags, str(source), "-o", str(made), "-lbpf", "-lpthread"])


def write_releases(directory: Path, entries: int, flags: int) -> tuple[Path, Path]:
    """Releases 1 and 2 with a map for ``entries`` entries, below ``directory``."""
    made = []
    for release in (1, 2):
        place = directory / f"{entries}-{flags}" / str(release)
        made.append(place)
        if place.exists():
            continue
        place.mkdir(parents=True)
        defines = [f"-DRELEASE={release}", f"-DENTRIES={entries + SPARE}", f"-DFLAGS={flags}"]
        _bpf(HERE / "flow.bpf.c", place / "flow.bpf.o", *defines)
        (place / "bundle.toml").write_text(_MANIFEST.format(release=release))
    return made[0], made[1]


def compile_pass(directory: Path) -> Path:
    """The object with the unbounded pass, in ``directory``."""
    target = directory / "pass.bpf.o"
    if not target.exists():
        _bpf(HERE / "pass.bpf.c", target)
    return target


def compile_bpf(name: str, directory: Path, *defines: str) -> bytes:
    """The object of ``NAME.bpf.c``, compiled into ``directory``."""
    target = directory / f"{name}.bpf.o"
    _bpf(HERE / f"{name}.bpf.c", target, *defines)
    return target.read_bytes()


def _bpf(source: Path, target: Path, *defines: str) -> None:
    include = [f"-I/usr/include/{platform.machine()}-linux-gnu", f"-I{hitless.include_dir()}"]
    flags = ["-target", "bpf", "-g", "-O2", "-Wall", "-Werror", *include, *defines]
    _run(["clang-19", *flags, "-c", str(source), "-o", str(target)])


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UnsupportedError(
            f"`{command[0]}` is not installed, and the benchmark compiles C with it", feature=command[0]
        ) from error
    if done.returncode:
        raise UnsupportedError(f"`{' '.join(command)}` failed:\n{done.stderr}", feature=command[0])
