"""``hitless doctor``, and what is said where a feature or a right was taken away."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from hitless.cli import main
from hitless.features import FEATURES
from hitless.kernel import features
from hitless.layout.answers import ANSWERS
from meshd.demo.lab import Lab


def doctor(*prefix: str) -> tuple[int, dict[str, object], str]:
    """Its exit code, its JSON, and what it wrote to stderr, run behind the command ``prefix``."""
    command = [*prefix, sys.executable, "-m", "hitless", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_it_says_that_hitless_can_work_here_and_names_each_feature_and_type_of_map(lab: Lab) -> None:
    done = CliRunner().invoke(main, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["schema"], told["problems"]) == (0, 1, [])
    assert str(lab.bpffs) in told["bpffs"]
    assert [each["name"] for each in told["features"]] == [feature.name for feature in FEATURES]
    assert [each["type"] for each in told["maps"]] == list(ANSWERS)
    assert all((each["why"] is None) == each["there"] for each in told["features"])


def test_people_read_it_line_by_line(lab: Lab) -> None:
    lines = CliRunner().invoke(main, ["doctor"]).stdout.splitlines()
    assert lines[0].startswith("Linux ")
    assert any("iter/bpf_map_elem" in line for line in lines)
    assert lines[-1] == "hitless can work here."


def test_the_features_that_have_a_name_are_those_that_can_be_tried() -> None:
    assert {feature.name for feature in FEATURES} == features._PROBES.keys()


@pytest.mark.parametrize(
    ("prefix", "what"),
    [
        (("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"), "CAP_SYS_ADMIN"),
        (("unshare", "--user", "--map-root-user"), "EPERM"),
    ],
    ids=["without CAP_SYS_ADMIN", "in a user namespace"],
)
def test_a_process_without_rights_is_told_what_it_lacks_and_tries_nothing(prefix: tuple[str, ...], what: str) -> None:
    code, told, errors = doctor(*prefix)
    assert (code, told["features"], errors) == (1, [], "")
    assert what in str(told["problems"])
