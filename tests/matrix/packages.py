"""Debian's own kernels: found through apt, downloaded and unpacked, never installed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.matrix import MatrixError
from tests.matrix.debian import know, run

__all__ = ["KERNELS", "NEWEST", "Kernel", "obtain", "obtain_newest"]

KERNELS = ("6.1", "6.12")
"""The lines of kernels that the matrix has."""

NEWEST = "newest"
"""The name of a line that has no number: it has the newest kernel, whichever that is today."""

_RELEASES = ("trixie-backports", "unstable")  # of Debian; now one and now the other has the newer kernel
_GENERAL = "linux-image-cloud-amd64"


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
    log = _log(folder, name)
    generals = (f"linux-image-{name}-cloud-amd64", _GENERAL)
    refused = (
        f"Linux {name} is not to be had here, so run apt-get update, or take Debian 12, whose registry has it: "
        f"apt was asked for {' and '.join(generals)}"
    )
    known = [each for each in _depends(generals, (), log, refused) if each.startswith("linux-image-")]
    for package in known:
        if re.match(rf"linux-image-{re.escape(name)}[.-]", package):
            gone = f"apt-get could not download {package}, so see whether the registry answers, and run apt-get update"
            return _unpacked(name, package, folder, (), log, gone)
    raise MatrixError(f"{refused}, and knows {' and '.join(known) or 'no kernel by them'}; see {log}")


def obtain_newest(folder: Path) -> Kernel:
    """The newest kernel that Debian has today, likewise. Raises MatrixError."""
    log = _log(folder, NEWEST)
    refused = f"The newest kernel is not to be had from Debian {' and '.join(_RELEASES)}"
    options = know("deb", _RELEASES, folder / "debian", log, refused)
    for package in _depends([_GENERAL], options, log, refused):
        if line := re.match(r"linux-image-(\d+\.\d+)", package):
            return _unpacked(line[1], package, folder, options, log, refused)
    raise MatrixError(f"{refused}: {_GENERAL} depends on no kernel there; see {log}")


def _log(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    log.write_text("")
    return log


def _depends(packages: Sequence[str], options: Sequence[str], log: Path, otherwise: str) -> list[str]:
    """What these depend on, as far as apt knows them."""
    said = run(["apt-cache", *options, "depends", "--important", *packages], log, otherwise)
    return re.findall(r"Depends: ([^\s<]\S*)", said)


def _unpacked(name: str, package: str, folder: Path, options: Sequence[str], log: Path, otherwise: str) -> Kernel:
    """Newer kernels are in several packages: one depends on the others, whose names end in its release."""
    release = package.removeprefix("linux-image-")
    kernel = Kernel(name, release, folder / package)
    if kernel.root.exists():
        return kernel
    work = folder / f"{package}.part"
    shutil.rmtree(work, ignore_errors=True)
    unpacked = Kernel(name, release, work / "root")
    unpacked.root.mkdir(parents=True)
    others = [each for each in _depends([package], options, log, otherwise) if each.endswith(f"-{release}")]
    run(["apt-get", *options, "download", package, *others], log, otherwise, work)
    for archive in sorted(work.glob("*.deb")):
        run(["dpkg-deb", "-x", archive, unpacked.root], log, f"{archive.name} could not be unpacked")
    _arrange(unpacked)
    if not unpacked.image.exists() or not unpacked.modules.exists():
        raise MatrixError(f"{' and '.join([package, *others])}: no kernel is where Debian puts them; see {work}")
    run(["depmod", "-b", unpacked.root, release], log, f"the modules of {package} are not as depmod wants")
    unpacked.root.rename(kernel.root)
    shutil.rmtree(work)
    return kernel


def _arrange(kernel: Kernel) -> None:
    """Put what newer packages have below /usr where older ones have it, and where depmod looks."""
    usual = kernel.root / "lib"
    if not usual.exists():
        usual.symlink_to("usr/lib")
    image = kernel.modules / "vmlinuz"
    if image.exists():
        kernel.image.parent.mkdir(exist_ok=True)
        image.rename(kernel.image)
