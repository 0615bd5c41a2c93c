"""`meshd check` tells what is wrong with a services file, to people and to tools, and needs no privilege."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshd.cli import main

GOOD = "services: [{name: web, address: 10.96.0.10, port: 80, backends: []}]\n"
BAD = "services:\n- {name: web, address: 10.96.0.10, port: 0, backends: []}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "services.yaml"


def test_a_good_file_passes(file: Path) -> None:
    file.write_text(GOOD)
    done = CliRunner().invoke(main, ["check", str(file)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert "services=1 policies=0" in done.stdout


def test_a_bad_file_fails_and_the_error_is_on_standard_error(file: Path) -> None:
    file.write_text(BAD)
    done = CliRunner().invoke(main, ["check", str(file)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"{file}:2: services[0].port: '0' is no whole number from 1 to 65535\n"


def test_for_tools_a_bad_file_is_one_object_with_line_and_field(file: Path) -> None:
    file.write_text(BAD)
    done = CliRunner().invoke(main, ["check", "--json", str(file)])
    event = json.loads(done.stdout)
    assert done.exit_code == 1
    assert event["event"] == "config-error"
    assert (event["file"], event["line"], event["field"]) == (str(file), 2, "services[0].port")


def test_how_many_backends_fit_depends_on_the_release(file: Path) -> None:
    many = ", ".join(f"{{address: 10.1.0.{n}, port: 1}}" for n in range(1, 13))
    file.write_text(GOOD.replace("[]", f"[{many}]"))
    for release, code in (("1", 1), ("2", 1), ("3", 0)):
        assert CliRunner().invoke(main, ["check", str(file), "--release", release]).exit_code == code


@pytest.mark.parametrize("command", [[], ["run"], ["check"], ["top"], ["metrics"]])
def test_every_command_has_help_with_an_example(command: list[str]) -> None:
    done = CliRunner().invoke(main, [*command, "--help"])
    assert done.exit_code == 0
    assert not command or "Example: meshd" in done.stdout
