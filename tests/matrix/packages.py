"""Debian's own kernels: found through apt, downloaded and unpacked, never installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.matrix import MatrixError

__all__ = ["KERNELS", "Kernel", "obtain"]

KERNELS = ("6.1", "6.12")
"""The lines of kernels that the matrix has."""

_PATIENCE = 600.0  # s for the registry


class Kernel(msgspec.Struct, frozen=True):
    """An unpacked kernel: ``name`` is its line, ``release`` what `uname -r` says on it."""

    name: str
    release: str
    root: Path

    @property
    def image(self) -> Path:
        """What boots."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        """Its modules, with depmod's tables."""
        return self.root / "lib" / "modules" / self.release


def obtain(name: str, folder: Path) -> Kernel:
    """The newest kernel of a line that apt knows, unpacked below ``folder``, where it is found the next time.

    Raises MatrixError.
    """
    package = _find(name)
    kernel = Kernel(name, package.removeprefix("linux-image-"), folder / package)
    if kernel.root.exists():
        return kernel
    folder.mkdir(parents=True, exist_ok=True)
    refused = f"apt-get could not download {package}, so see whether the registry answers, and run apt-get update"
    _run(["apt-get", "download", package], folder, refused)
    (archive,) = folder.glob(f"{package}_*.deb")
    unpacked = folder / f"{package}.part"
    shutil.rmtree(unpacked, ignore_errors=True)
    _run(["dpkg-deb", "-x", archive.name, unpacked.name], folder, f"{archive} could not be unpacked")
    archive.unlink()
    _run(["depmod", "-b", unpacked.name, kernel.release], folder, f"the modules of {package} are not as depmod wants")
    unpacked.rename(kernel.root)
    return kernel


def _find(name: str) -> str:
    """The package that a package without a version depends on, whatever that version is today."""
    tried = []
    for general in (f"linux-image-{name}-cloud-amd64", "linux-image-cloud-amd64"):
        shown = _run(["apt-cache", "depends", "--important", general], Path("/"), None)
        found = re.findall(r"Depends: (linux-image-\S+)", shown)
        for package in found:
            if re.match(rf"linux-image-{re.escape(name)}[.-]", package):
                return str(package)
        tried.append(f"{general} ({found[0] if found else 'unknown to apt'})")
    raise MatrixError(
        f"Linux {name} is not to be had here: apt was asked for {' and '.join(tried)}; run apt-get update, or take "
        f"Debian 12, whose registry has it"
    )


def _run(command: Sequence[str], folder: Path, otherwise: str | None) -> str:
    """What a command printed; if it fails an error that begins with ``otherwise``, or nothing printed without one."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", check=False, timeout=_PATIENCE
        )
    except FileNotFoundError as error:
        raise MatrixError(f"{command[0]} is not installed: kernels are taken from Debian's packages") from error
    except subprocess.TimeoutExpired as error:
        raise MatrixError(f"{otherwise or command[0]}: it gave no answer in {_PATIENCE:g} s") from error
    if done.returncode and otherwise:
        said = re.findall(r"^(?:E: )?(\S.*)", done.stderr, re.MULTILINE) or [f"exit code {done.returncode}"]
        raise MatrixError(f"{otherwise}: {said[-1]}", command=list(command))
    return done.stdout
