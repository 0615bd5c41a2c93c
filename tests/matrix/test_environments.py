"""Where Pythons and libbpfs of the matrix come from, and what is said where they are not to be had."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.matrix import MatrixError
from tests.matrix.environments import find_python, libbpf_of, venv_of

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
TOOLS = ("mkdir", "cp", "cat", "echo")

# What a venv has of it answers as pip does when it cannot find a package, unless the file `works` is beside it.
PYTHON = """#!/bin/bash
echo "$@" >>"$CALLS"
if [[ $2 == venv ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; fi
[[ -e $WORKS ]] && exit
echo "WARNING: a location is ignored" >&2
echo "ERROR: No matching distribution found for cffi==2.1.1" >&2
exit 1
"""

Program = Callable[[str, str], Path]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Make a script by name and text: with some tools, all that is on PATH. There is no pyenv."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool) or tool)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))

    def make(name: str, text: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    return make


def test_a_python_that_only_pretends_is_passed_over_for_one_that_runs(tmp_path: Path, program: Program) -> None:
    program(f"python{VERSION}", "#!/bin/bash\necho pyenv: command not found >&2; exit 127\n")
    real = tmp_path / "pyenv" / "versions" / f"{VERSION}.0" / "bin" / f"python{VERSION}"
    real.parent.mkdir(parents=True)
    real.symlink_to(Path(sys.executable).resolve())
    assert find_python(VERSION) == real


def test_a_python_that_is_not_there_is_told_in_a_sentence(tmp_path: Path, program: Program) -> None:
    with pytest.raises(MatrixError, match=r"^Python 3\.12 is not on this machine: .*pyenv install 3\.12") as caught:
        find_python("3.12")
    assert "\n" not in caught.value.message
    shim = program("python3.12", "#!/bin/bash\necho pyenv: command not found >&2; exit 127\n")
    with pytest.raises(MatrixError, match=rf"where {shim} \(pyenv: command not found\) cannot be used"):
        find_python("3.12")


def test_a_venv_is_made_once_and_again_when_its_python_is_another(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("WORKS", "/")
    one, other = program("one", PYTHON), program("other", PYTHON)
    inside = venv_of(one, tmp_path / "venv")
    assert calls.read_text().count("pip install") == 2
    assert venv_of(one, tmp_path / "venv") == inside
    assert calls.read_text().count("pip install") == 2
    venv_of(other, tmp_path / "venv")
    assert calls.read_text().count("pip install") == 4


def test_a_package_that_is_not_to_be_had_is_told_in_a_sentence_and_no_venv_is_kept(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("WORKS", "/nowhere")
    python = program("python", PYTHON)
    with pytest.raises(MatrixError, match=r"install requirements.txt, .*: No matching distribution .*; see \S+$"):
        venv_of(python, tmp_path / "venv")
    monkeypatch.setenv("WORKS", "/")
    venv_of(python, tmp_path / "venv")
    assert (tmp_path / "calls").read_text().count("-m venv") == 2


@pytest.mark.parametrize(
    ("apt", "said"),
    [
        (None, "apt-get is not installed"),
        ("exit 0", "apt knows no mirror of Debian on this machine: run apt-get update"),
        (
            'if [[ $1 == indextargets ]]; then echo a:b; else echo "E: Failed to fetch a:b" >&2; exit 100; fi',
            "libbpf's source is not to be had from Debian unstable: Failed to fetch a:b",
        ),
        ("[[ $1 == indextargets ]] && echo a:b; exit 0", "what apt-get downloaded has no libbpf_"),
    ],
)
def test_a_libbpf_that_is_not_to_be_had_is_told_in_a_sentence(
    tmp_path: Path, program: Program, apt: str | None, said: str
) -> None:
    if apt:
        program("apt-get", f"#!/bin/bash\n{apt}\n")
    with pytest.raises(MatrixError) as caught:
        libbpf_of("unstable", tmp_path)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert not (tmp_path / "libbpf-unstable").exists()


def test_a_libbpf_that_is_there_is_not_asked_for_again(tmp_path: Path, program: Program) -> None:
    program("apt-get", "#!/bin/bash\nexit 100\n")
    (tmp_path / "libbpf-unstable").mkdir()
    assert libbpf_of("unstable", tmp_path) == tmp_path / "libbpf-unstable"
