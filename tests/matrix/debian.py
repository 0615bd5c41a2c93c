"""Releases of Debian that apt on this machine does not know, and the running of what gets things from registries."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.matrix import MatrixError

__all__ = ["know", "run"]

_PATIENCE = 900.0  # s for a registry, or for a compiler
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def know(kind: str, releases: Sequence[str], folder: Path, log: Path, otherwise: str) -> tuple[str, ...]:
    """Options with which apt knows these releases of Debian, as they are today, and nothing else.

    ``kind`` is ``deb`` or ``deb-src``. What apt keeps lies in ``folder``; it comes from the mirror of this machine and
    is checked with Debian's keys. The newest version of a package counts, whichever release has it. Raises MatrixError,
    which begins with ``otherwise``.
    """
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    source = f"{kind} [signed-by={_KEYRING}] {_mirror(log)}"
    (folder / "sources.list").write_text("".join(f"{source} {release} main\n" for release in releases))
    (folder / "preferences").write_text("Package: *\nPin: release a=*\nPin-Priority: 500\n")
    own = {
        "Dir::Etc::SourceList": folder / "sources.list", "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": folder / "preferences", "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State::Lists": folder / "lists", "Dir::State::Status": "/dev/null", "Dir::Cache": folder,
        "APT::Sandbox::User": "root", "APT::Update::Error-Mode": "any",
    }  # fmt: skip
    options = tuple(part for name, value in own.items() for part in ("-o", f"{name}={value}"))
    run(["apt-get", *options, "-qq", "update"], log, otherwise)
    return options


def _mirror(log: Path) -> str:
    """Where this machine has Debian from."""
    wanted = ["Created-By: Packages", "Origin: Debian", "Label: Debian"]
    asked = ["apt-get", "indextargets", "--format", "$(SITE)", *wanted]
    said = run(asked, log, "apt-get does not say where this machine has Debian from")
    found = said.split()
    if not found:
        raise MatrixError("apt knows no mirror of Debian on this machine: run apt-get update")
    return found[0]


def run(command: Sequence[str | Path], log: Path, otherwise: str, folder: Path | None = None) -> str:
    """What a command printed, which is in ``log`` too. Raises MatrixError, which begins with ``otherwise``."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False, timeout=_PATIENCE, env={**os.environ, "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
    except FileNotFoundError as error:
        raise MatrixError(f"{otherwise}: {command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise MatrixError(f"{otherwise}: {command[0]} gave no answer in {_PATIENCE:g} s") from error
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        errors = [line for line in lines if re.match(r"E: |ERROR: |.*\berror:", line)] or lines[-1:]
        said = re.sub(r"^(E|ERROR): ", "", errors[0])
        raise MatrixError(f"{otherwise}: {said}; see {log}")
    return done.stdout
