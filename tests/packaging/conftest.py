"""Fixtures: a wheel and an sdist, built by `make dist` in a copy of the tree, and the wheel installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest

import hitless

TREE = Path(__file__).parents[2]
EPOCH = "1700000000"


def say(*command: str | Path, cwd: Path = TREE, env: Mapping[str, str] | None = None) -> str:
    """Run a command that has to end well, and return what it says on stdout."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_tree(to: Path) -> Path:
    """What git has of the tree, and what is new in it, but nothing that is made, and no history."""
    names = say("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, names):
        if (TREE / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(TREE / name, to / name)
    return to


def make_dist(tree: Path) -> tuple[Path, Path]:
    """Wheel and sdist of a copy of the tree, with the packages of this environment."""
    binding = "src/hitless/kernel/_libbpf.py"
    shutil.copyfile(Path(hitless.__file__).parents[1] / "hitless/kernel/_libbpf.py", tree / binding)
    done = ["--old-file=.venv/done", f"--old-file={binding}", f"BIN={sys.prefix}/bin"]
    say("make", "--silent", *done, "dist", cwd=tree, env=environment(tree))
    (wheel,), (sdist,) = (tree / "dist").glob("*.whl"), (tree / "dist").glob("*.tar.gz")
    return wheel, sdist


def environment(tree: Path) -> dict[str, str]:
    """Of this process, but with ``tree`` before all else."""
    return {**os.environ, "PYTHONPATH": str(tree / "src"), "SOURCE_DATE_EPOCH": EPOCH}


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree."""
    return copy_tree(tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="session")
def dist(first: Path) -> tuple[Path, Path]:
    """Wheel and sdist."""
    return make_dist(first)


@pytest.fixture(scope="session")
def installed(dist: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with nothing but the wheel; what it depends on is this environment's."""
    place = tmp_path_factory.mktemp("installed")
    place.chmod(0o755)
    say(sys.executable, "-m", "venv", "--without-pip", place)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", f"--python={place}/bin/python"]
    say(*pip, "install", "--no-index", "--no-deps", dist[0], env={"PATH": os.environ["PATH"]})
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (place / "lib" / version / "site-packages/other.pth").write_text(sysconfig.get_path("purelib"))
    return place
