"""The commands as a user types them: words, JSON, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.kernel.programs import Program
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade
from tests.upgrade.conftest import Release, node, release, releases

__all__ = ["node", "release", "releases"]  # fixtures


def hitless_command(*args: object, code: int = 0) -> str:
    """Run the command, check its exit code and that it never shows a traceback; returns its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "hitless", *map(str, args)], capture_output=True, text=True, timeout=30, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def as_json(*args: object, code: int = 0) -> Any:
    return json.loads(hitless_command(*args, "--json", code=code))


def test_inspect_shows_structs_as_c_with_offsets(releases: dict[int, Path]) -> None:
    text = hitless_command("inspect", releases[2])
    assert "struct tally {" in text
    assert "hitless:was=last" in text
    assert "count4" in text
    assert "cgroup_inet4_connect" in text
    facts = as_json("inspect", releases[2])
    assert set(facts["maps"]) == {"tally", "limits", "owner", "extra"}


def test_diff_says_what_changed_and_exits_1(releases: dict[int, Path]) -> None:
    found = as_json("diff", releases[1], releases[2], code=1)
    verdicts = {entry["name"]: (entry["was"], entry["verdict"]) for entry in found["maps"]}
    assert verdicts == {
        "tally": (None, "lossless"),
        "limits": ("limit", "lossless"),
        "owner": (None, "identical"),
        "extra": (None, "added"),
    }
    kinds = {(change["path"], change["kind"]) for entry in found["maps"] for change in entry["changes"]}
    assert {("since", "added"), ("count", "widened"), ("port", "renamed"), ("class", "added")} <= kinds
    assert hitless_command("diff", releases[1], releases[2], code=1).endswith("All state survives the upgrade.\n")


def test_diff_of_the_same_exits_0_and_of_nothing_2(releases: dict[int, Path], tmp_path: Path) -> None:
    assert as_json("diff", releases[1], releases[1])["verdict"] == "identical"
    found = as_json("diff", releases[1], tmp_path / "nothing", code=2)
    assert found["error"]["code"] == "bundle"
    assert "is not there" in found["error"]["message"]


def test_a_snapshot_file_stands_for_its_release(releases: dict[int, Path], tmp_path: Path) -> None:
    file = tmp_path / "one.json"
    file.write_text(hitless_command("snapshot", releases[1]))
    assert as_json("diff", file, releases[1])["verdict"] == "identical"
    assert as_json("diff", file, releases[2], code=1)["verdict"] == "lossless"
    assert set(as_json("inspect", file)["maps"]) == {"tally", "limit", "owner"}


def test_a_snapshot_in_the_shape_of_kmesh_stands_for_its_release_too(releases: dict[int, Path], tmp_path: Path) -> None:
    file = tmp_path / "mapspecs_by_prog.json"
    file.write_text(hitless_command("snapshot", releases[1], "--format", "kmesh"))
    assert set(json.loads(file.read_text())["maps"]["store"]) == {"tally", "limit", "owner"}
    verdicts = {entry["name"]: entry["verdict"] for entry in as_json("check", file, releases[1], code=1)["maps"]}
    # An array has no type name there.
    assert verdicts == {"tally": "unknown", "limit": "identical", "owner": "identical"}
    assert "? label;" in hitless_command("inspect", file)


def test_the_header_is_where_the_command_says() -> None:
    assert (Path(hitless_command("include").strip()) / "hitless.h").exists()
    assert as_json("include")["include"] == hitless.include_dir()


def test_plan_apply_status_unload_from_nothing_to_nothing(
    node: hitless.Node, releases: dict[int, Path], lab: Lab
) -> None:
    where = ["--root", node.root, "--set", f"cgroup={lab.cgroup}"]
    assert as_json("plan", releases[1], *where, code=2)["start_type"] == "normal"
    assert as_json("apply", releases[1], *where)["committed"] is True
    assert as_json("plan", releases[1], *where)["start_type"] == "restart"
    planned = as_json("plan", releases[2], *where, code=2)
    done = as_json("apply", releases[2], *where)
    keys = ("name", "was", "action", "method", "exactness", "loss")
    assert [[entry[key] for key in keys] for entry in planned["maps"]] == [
        [entry[key] for key in keys] for entry in done["maps"]
    ]
    assert planned["hooks"] == done["hooks"]
    assert (done["from"], done["to"], done["generation"]) == ("1.0", "2.0", 2)
    assert {"hooks", "first_to_last_us", "stale_window_us"} <= set(done["cutover"])
    assert {"entries", "copied", "rounds", "caught_up", "lost", "seconds"} <= set(done["maps"][0])
    seen = as_json("status", "--root", node.root)
    assert (seen["generation"], seen["version"], seen["phase"], seen["problems"]) == (2, "2.0", "committed", [])
    assert as_json("diff", node.root / "maps" / "tally", node.root / "maps" / "tally")["verdict"] == "identical"
    assert "struct tally" in hitless_command("inspect", node.root / "maps" / "tally")
    assert as_json("diff", node.root, releases[2])["verdict"] == "identical"
    assert as_json("unload", "--root", node.root)["removed"]
    assert as_json("status", "--root", node.root)["version"] is None


def test_a_refused_loss_is_told_with_what_to_do(
    node: hitless.Node, release: Release, releases: dict[int, Path]
) -> None:
    hitless.apply(node, release(2))
    cgroup = release(2).attach[0].target
    where = ["--root", node.root, "--set", f"cgroup={cgroup}"]
    found = as_json("apply", releases[1], *where, code=1)
    assert found["error"]["code"] == "loss"
    assert found["error"]["maps"] == ["tally", "limit"]
    assert "--allow-loss tally --allow-loss limit" in found["error"]["message"]
    plan = hitless_command("plan", releases[1], *where, code=2)
    assert "apply will refuse this" in plan
    assert re.search(r"  tally loses: count: values outside 0 to \d+ do not fit  \(not allowed\)\n", plan), plan
    hitless_command("apply", releases[1], *where, "--allow-loss", "tally", "--allow-loss", "limit")


def test_verify_says_what_it_proved_and_on_how_much_and_exits_0(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    text = hitless_command("verify", "--root", node.root)
    assert "store 2.0, generation 2, under" in text
    assert "ok  maps" in text
    assert "not checked: what the maps hold" in text
    assert text.endswith("all agree\n")
    found = as_json("verify", "--root", node.root)
    assert (found["schema"], found["generation"], found["version"], found["problems"]) == (1, 2, "2.0", [])
    assert {check["name"]: check["looked_at"] for check in found["checks"]}["maps"] == 4
    assert set(found["checks"][0]) == {"name", "looked_at", "proves", "problems", "untold"}


def test_verify_names_what_is_wrong_and_exits_1(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    (node.current / "maps" / "tally").unlink()
    text = hitless_command("verify", "--root", node.root, code=1)
    assert "wrong  maps" in text
    assert f"problem: {node.current / 'maps' / 'tally'} is missing" in text
    assert text.endswith("1 problem\n")
    assert len(as_json("verify", "--root", node.root, code=1)["problems"]) == 1


def test_gc_lists_what_goes_with_its_memory_and_a_dry_run_lists_the_same(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    hitless.apply(node, release(2))
    would = hitless_command("gc", "--root", node.root, "--dry-run")
    assert node.previous.exists()
    did = hitless_command("gc", "--root", node.root)
    assert not node.previous.exists()
    assert would.splitlines()[:-2] == did.splitlines()[:-2]
    assert would.splitlines()[-2].startswith("would remove 5 pins; the kernel gets back about ")
    assert did.splitlines()[-2].startswith("removed 5 pins; the kernel gets back about ")
    assert did.splitlines()[-1] == "going back to 1.0 is no longer possible"
    assert any("previous/maps/owner" in line and "kept by the running generation" in line for line in did.splitlines())
    assert hitless_command("gc", "--root", node.root) == f"{node.root}: nothing to remove\n"
    found = as_json("gc", "--root", node.root)
    assert (found["schema"], found["dry_run"], found["items"], found["freed"]) == (1, False, [], 0)


@pytest.mark.parametrize("command", [["status"], ["verify"], ["gc"], ["gc", "--dry-run"]])
@pytest.mark.parametrize(
    ("put", "code", "words"),
    [
        (lambda root: (root / "current" / "record").unlink(), 1, "has no record"),
        (lambda root: (root / "maps").rename(root / "theirs"), 1, "theirs"),
        (lambda root: (root / "current" / "maps" / "owner").unlink(), 1, "owner is missing"),
        (lambda root: hitless.unload(hitless.Node(root)), None, "nothing"),
    ],
    ids=["no record", "foreign", "no pin", "empty"],
)
def test_what_was_changed_by_hand_is_named_by_every_command_without_a_traceback(
    node: hitless.Node,
    release: Release,
    command: list[str],
    put: Callable[[Path], object],
    code: int | None,
    words: str,
) -> None:
    hitless.apply(node, release(1))
    put(node.root)
    line = [sys.executable, "-m", "hitless", *command, "--root", str(node.root)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == (code if code is not None else int(command == ["verify"]))
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("step", "command", "words"),
    [
        ("copy", "verify", "an upgrade to 2.0 was interrupted before its commit"),
        ("copy", "status", "an upgrade to 2.0 was interrupted in phase staging"),
        ("copy", "gc", None),
        ("merge", "verify", "an upgrade to 2.0 was interrupted before its commit"),
        ("merge", "status", "an upgrade to 2.0 was interrupted in phase cutover"),
        ("merge", "gc", "an upgrade to 2.0 was interrupted before its commit"),
        ("clean-up", "verify", "an upgrade to 2.0 was interrupted after its commit"),
        ("clean-up", "status", "the upgrade to 2.0 is done but not cleaned up"),
        ("clean-up", "gc", "an upgrade to 2.0 was interrupted after its commit"),
    ],
)
def test_a_killed_upgrade_is_told_by_name(
    node: hitless.Node,
    release: Release,
    releases: dict[int, Path],
    lab: Lab,
    step: str,
    command: str,
    words: str | None,
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade(step, node, releases[2], {"cgroup": str(lab.cgroup)})
    line = [sys.executable, "-m", "hitless", command, "--root", str(node.root)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == int(words is not None), done.stdout + done.stderr
    assert (words or "next/maps/limits") in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_verify_of_a_root_that_is_being_upgraded_names_the_process(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    told = []
    hitless.apply(node, release(2), prepare=lambda node: told.append(as_json("verify", "--root", node.root, code=1)))
    assert (told[0]["error"]["code"], told[0]["error"]["pid"]) == ("busy", os.getpid())


def test_status_shows_what_is_left_of_earlier_generations(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    with Program.open(node.current / "progs" / "count4") as old:
        hitless.apply(node, release(2))
        hitless.apply(node, release(1), allow_loss=["tally", "limit", "extra"])
        text = hitless_command("status", "--root", node.root)
        assert "left of earlier generations:" in text
        assert f"program  count4  {old.info.id}" in text
        assert f"held by process {os.getpid()}" in text
        left = as_json("status", "--root", node.root)["remnants"]
        assert {entry["name"] for entry in left} == {"count4", "tally"}


@pytest.mark.parametrize(
    "command", ["inspect", "diff", "check", "snapshot", "plan", "apply", "recover", "status", "verify", "gc", "unload"]
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"Example: hitless {command}" in hitless_command(command, "--help")


def test_an_error_goes_to_stderr_and_a_traceback_only_with_debug(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hitless", "inspect", str(tmp_path / "gone")]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (plain.returncode, plain.stdout) == (1, "")
    assert plain.stderr.startswith("hitless: ")
    assert plain.stderr.count("\n") == 1
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" in debug.stderr


def test_a_bundle_that_is_not_there_is_told_without_the_errno(tmp_path: Path) -> None:
    found = as_json("plan", tmp_path / "gone", "--root", tmp_path, code=1)["error"]["message"]
    assert found.startswith(f"{tmp_path}/gone/bundle.toml cannot be read: No such file or directory; a bundle is")


def test_a_reader_that_has_seen_enough_gets_no_error(releases: dict[int, Path]) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hitless", "inspect", str(releases[2])]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "x"], 1, "Missing option '--root'"),
        (["plan", "x", "--root", "/r", "--set", "y"], 1, "'y' is not NAME=VALUE"),
        (["diff", "x"], 2, "Missing argument 'NEW'"),
        (["nonsense"], 1, "No such command 'nonsense'"),
    ],
)
def test_bad_arguments_are_trouble_and_json_where_that_was_asked_for(
    arguments: list[str], code: int, words: str
) -> None:
    found = as_json(*arguments, code=code)
    assert found["error"]["code"] == "usage"
    assert words in found["error"]["message"]
    assert hitless_command(*arguments, code=code) == ""


def test_an_upgrade_whose_progress_nobody_reads_goes_on(
    node: hitless.Node, release: Release, releases: dict[int, Path]
) -> None:
    hitless.apply(node, release(1))
    command = [sys.executable, "-m", "hitless", "apply", str(releases[2]), "--root", str(node.root)]
    with Path("/dev/full").open("w") as nowhere:
        done = subprocess.run(
            [*command, "--set", f"cgroup={release(2).attach[0].target}"],
            stdout=subprocess.DEVNULL, stderr=nowhere, stdin=subprocess.DEVNULL, timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert node.observe().version == "2.0"
