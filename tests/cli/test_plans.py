"""plan --out, apply --plan and recover as a user types them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import hitless
from meshd.demo.lab import Lab
from tests.cli.test_commands import as_json, hitless_command
from tests.kills import kill_upgrade
from tests.upgrade.conftest import Release, node, release, releases

__all__ = ["node", "release", "releases"]  # fixtures


def test_a_plan_is_saved_and_applied(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, release(1))
    where, file = ["--root", node.root, "--set", f"cgroup={lab.cgroup}"], tmp_path / "plan.json"
    text = hitless_command("plan", releases[2], *where, "--out", file, code=2)
    assert text.endswith(f"saved to {file}: apply --plan {file} does exactly this, or refuses if anything changed\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert as_json("apply", releases[2], *where, "--plan", file)["to"] == "2.0"
    stale = as_json("apply", releases[2], *where, "--plan", file, code=1)
    assert stale["error"]["code"] == "node"
    assert "now generation 2" in stale["error"]["changes"][0]


def test_the_plan_that_is_printed_has_the_fingerprint(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    shown = as_json("plan", releases[2], "--root", node.root, "--set", f"cgroup={lab.cgroup}", code=2)["fingerprint"]
    assert (shown["generation"], shown["version"], shown["kernel"]) == (1, "1.0", os.uname().release)
    assert set(shown["maps"]) == {"tally", "limit", "owner"}


def test_a_loss_is_allowed_when_it_is_planned_and_not_when_that_is_applied(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab, tmp_path: Path
) -> None:
    hitless.apply(node, release(2))
    where, file = ["--root", node.root, "--set", f"cgroup={lab.cgroup}"], tmp_path / "plan.json"
    loss = ["--allow-loss", "tally", "--allow-loss", "limit"]
    hitless_command("plan", releases[1], *where, *loss, "--out", file, code=2)
    refused = as_json("apply", releases[1], *where, *loss, "--plan", file, code=1)
    assert refused["error"]["code"] == "usage"
    assert as_json("apply", releases[1], *where, "--plan", file)["to"] == "1.0"


def test_a_plan_that_cannot_be_saved_is_trouble(
    node: hitless.Node, releases: dict[int, Path], lab: Lab, tmp_path: Path
) -> None:
    where = ["--root", node.root, "--set", f"cgroup={lab.cgroup}"]
    others = tmp_path / "others"
    others.mkdir()
    os.chown(others, 65534, 65534)
    for file in (tmp_path / "gone" / "plan", tmp_path, ".", others / "plan"):
        found = as_json("plan", releases[1], *where, "--out", file, code=1)
        assert found["error"]["code"] == "plan"
        assert f"cannot be written to {file}" in found["error"]["message"]


def test_recover_says_what_it_found_and_did(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade("merge", node, releases[2], {"cgroup": str(lab.cgroup)})
    assert hitless_command("recover", "--root", node.root, "--back") == (
        "found: an upgrade to 2.0 was interrupted in phase cutover\n"
        "took back the upgrade to 2.0, which had been interrupted\n"
        "version 1.0 runs, generation 1\n"
    )
    kill_upgrade("merge", node, releases[2], {"cgroup": str(lab.cgroup)})
    found = as_json("recover", "--root", node.root)
    assert (found["schema"], found["did"]) == (1, "finished the interrupted upgrade to 2.0")
    assert (found["version"], found["generation"]) == ("2.0", 2)


def test_recover_with_nothing_to_do_ends_with_0_and_says_so(node: hitless.Node, release: Release) -> None:
    assert hitless_command("recover", "--root", node.root) == (
        f"{node.root}: nothing to recover\nnothing of hitless runs there; apply a release\n"
    )
    hitless.apply(node, release(1))
    assert hitless_command("recover", "--root", node.root) == (
        f"{node.root}: nothing to recover\nversion 1.0 runs, generation 1\n"
    )
