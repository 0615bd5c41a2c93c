"""Taking a node over as a user types it."""

from __future__ import annotations

from pathlib import Path

from meshd.demo.lab import Lab
from tests.adopt.conftest import Loader
from tests.cli.test_commands import as_json, hitless_command


def test_a_node_is_looked_at_taken_over_and_upgraded_by_commands(
    lab: Lab, loader: Loader, bundles: dict[int, Path]
) -> None:
    where = ("--root", loader.root, "--set", f"cgroup={lab.cgroup_of('clients')}")
    would = as_json("adopt", bundles[1], *where, "--dry-run")
    assert (would["adopted"], len(would["maps"]), len(would["hooks"])) == (False, 4, 1)
    assert not (loader.root / "hitless").exists()
    text = hitless_command("adopt", bundles[1], *where)
    assert f"store 1.0 is taken over, as it runs, under {loader.root}/hitless" in text
    assert "sockconn/connect_prog  yes" in text
    again = as_json("adopt", bundles[1], *where, code=1)["error"]
    assert again["message"] == f"{loader.root} was adopted already, and runs store 1.0: apply a release"
    assert as_json("plan", bundles[2], *where, code=2)["start_type"] == "update"
    assert as_json("apply", bundles[2], *where)["committed"] is True
    assert as_json("status", "--root", loader.root)["version"] == "2.0"


def test_an_init_container_upgrades_what_runs_and_leaves_the_rest_to_the_daemon(
    lab: Lab, loader: Loader, bundles: dict[int, Path]
) -> None:
    where = ("--set", f"cgroup={lab.cgroup_of('clients')}", "--adopt", "--running", bundles[1])
    empty = lab.bpffs / "fresh"
    assert as_json("apply", bundles[2], "--root", empty, *where) == {
        "schema": 1, "root": str(empty), "start_type": "none", "committed": False,
    }  # fmt: skip
    assert not empty.exists()
    done = as_json("apply", bundles[2], "--root", loader.root, *where)
    assert (done["from"], done["to"], done["committed"]) == ("1.0", "2.0", True)
    assert as_json("apply", bundles[2], "--root", loader.root, *where)["start_type"] == "restart"


def test_questions_are_printed_one_a_line_with_what_to_say_where(
    lab: Lab, loader: Loader, bundles: dict[int, Path]
) -> None:
    where = ("--root", loader.root, "--set", f"cgroup={lab.cgroup_of('clients')}")
    found = as_json("adopt", bundles[2], *where, code=1)["error"]
    assert len(found["questions"]) >= 1
    assert "cannot be taken over" in found["message"]
    assert "\n  1. map tally at" in found["message"]
    usage = as_json("apply", bundles[2], *where, "--running", bundles[1], code=1)["error"]
    assert usage["message"] == "--running says what --adopt takes over: give both"
