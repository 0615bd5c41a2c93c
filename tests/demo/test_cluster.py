"""A rollout over nodes loses nothing, and stops by itself at a node that cannot be verified."""

from __future__ import annotations

import json
import subprocess
import sys


def test_a_rollout_loses_nothing_and_stops_where_a_node_cannot_be_verified() -> None:
    args = ["--json", "--nodes", "2", "--releases", "3", "4", "--held", "10", "--patience", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "meshd.demo.cluster", *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["losses"] == []
    assert "maps/origin is missing" in report["stopped"]
    assert [(one["from"], one["to"]) for one in report["replacements"]] == [("3", "4")]
    for node in report["nodes"].values():
        assert node["connections"]["tried"] > 0
        assert node["end"]["version"] == "4.0.0"
