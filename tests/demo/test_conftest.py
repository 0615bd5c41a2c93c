"""The rules for all tests: none is skipped in CI, and a session that leaves something in the kernel fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meshd.demo.lab import leftovers

HOUSE = Path(__file__).parents[2]
CONFTEST = HOUSE / "tests" / "conftest.py"

SKIPPED_TEST = """
import pytest

def test_that_passes():
    pass

@pytest.mark.skip(reason="no time")
def test_that_is_skipped():
    pass
"""
SKIPPED_MODULE = "import pytest\npytest.skip('no such kernel', allow_module_level=True)\n"
CARELESS = """
import os
from meshd.demo.lab import Lab

def test_that_cleans_nothing(lab):
    lab.close = lambda: None
"""


def run(folder: Path, test: str, ci: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(CONFTEST, folder)
    (folder / "test_one.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    env = os.environ | {"CI": ci, "PYTHONPATH": str(HOUSE)}
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("test", [SKIPPED_TEST, SKIPPED_MODULE])
def test_a_skip_is_a_failure_in_ci_only(tmp_path: Path, test: str) -> None:
    in_ci = run(tmp_path, test, "true")
    assert in_ci.returncode not in (0, 5)
    assert "skipped under CI=true, where every test must run" in in_ci.stdout
    assert run(tmp_path, test, "").returncode in (0, 5)


def test_a_session_that_leaves_a_lab_fails_and_names_what_is_left(tmp_path: Path) -> None:
    done = run(tmp_path, CARELESS, "true")
    assert done.returncode == 1
    assert "left behind by this session:" in done.stdout
    assert "/run/netns/hitless-lab-" in done.stdout
    assert not [path for path in leftovers() if path in done.stdout], "the end of the process still cleans"
