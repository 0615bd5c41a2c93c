"""`meshd check` tells what is wrong with a services file, to people and to tools, and needs no privilege."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshd.cli import main
from meshd.events import Events

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


def test_it_tells_its_version() -> None:
    done = CliRunner().invoke(main, ["--version"])
    assert (done.exit_code, ", version " in done.stdout) == (0, True)


def test_a_client_without_a_cgroup_is_told_without_the_errno(file: Path, tmp_path: Path) -> None:
    file.write_text(GOOD + "policies: [{action: deny, service: web, source: {cgroup: gone}}]\n")
    done = CliRunner().invoke(main, ["check", str(file), "--cgroup", str(tmp_path)])
    assert done.stderr.endswith(f": {tmp_path}/gone is no cgroup2 directory: No such file or directory\n")


def test_people_are_not_told_what_did_not_begin_yet() -> None:
    out = io.StringIO()
    events = Events(out=out)
    events.tell("progress", step="copy", map="flow", done=0, rate=0.0, round=0, differing=0)
    events.tell("progress", step="copy", map="flow", done=7, rate=201.98698, round=1, differing=0)
    assert out.getvalue() == (
        "meshd: progress step=copy map=flow\nmeshd: progress step=copy map=flow done=7 rate=202.0 round=1\n"
    )


def test_the_documents_name_every_page_and_every_event() -> None:
    top = Path(__file__).parents[2]
    readme, operating = (top / "README.md").read_text(), (top / "docs/operating.md").read_text()
    assert [page.name for page in (top / "docs").glob("*.md") if f"(docs/{page.name})" not in readme] == []
    code = "".join(path.read_text() for path in (top / "src/meshd").glob("*.py"))
    told = set(re.findall(r'events\.tell\(\s*"([a-z-]+)"', code))
    assert len(told) > 10
    assert {name for name in told if f"`{name}`" not in operating} == set()
