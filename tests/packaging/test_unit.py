"""systemd understands the unit, and meshd the command in it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hitless.kernel.capabilities import USED
from tests.packaging.chart import options
from tests.packaging.conftest import TREE

UNIT = TREE / "packaging/systemd/meshd.service"
VARIABLES = TREE / "packaging/systemd/meshd.env"


def verify(text: str, where: Path) -> subprocess.CompletedProcess[str]:
    """What systemd says about the unit, with a meshd that is there."""
    unit = where / "meshd.service"
    unit.write_text(text.replace("/opt/hitless/bin/meshd", f"{sys.prefix}/bin/meshd"))
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_systemd_has_nothing_to_say_about_the_unit(tmp_path: Path) -> None:
    done = verify(UNIT.read_text(), tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("line", "broken"), [("Restart=always", "Restart=forever"), ("KillMode", "KilMode")])
def test_systemd_would_say_what_is_wrong(tmp_path: Path, line: str, broken: str) -> None:
    assert line in UNIT.read_text()
    assert "ignoring" in verify(UNIT.read_text().replace(line, broken), tmp_path).stderr


def test_meshd_knows_what_the_unit_gives_it() -> None:
    (start,) = re.findall("^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    words = shlex.split(start)
    assert {word for word in words if word.startswith("--")} <= options()
    given = dict(line.split("=", 1) for line in VARIABLES.read_text().splitlines() if not line.startswith("#"))
    assert set(re.findall(r"\$\{?(\w+)", start)) == given.keys()


def test_the_unit_keeps_no_capability_that_hitless_does_not_use() -> None:
    (kept,) = re.findall("^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    names = set(kept.split())
    assert {one.name for one in USED if one.needed} <= names <= {one.name for one in USED}
