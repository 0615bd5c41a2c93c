"""A rollout over nodes loses nothing, and stops by itself at a node that cannot be verified."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from meshd.demo.cluster import node as cluster
from meshd.demo.lab import Lab
from meshd.demo.traffic import Target
from tests.meshd.labmesh import A6, VIP, VIP6, A, B, Mesh, service


def test_a_rollout_loses_nothing_and_stops_where_a_node_cannot_be_verified() -> None:
    args = ["--json", "--nodes", "2", "--releases", "3", "4", "--held", "10", "--patience", "10"]
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


def test_a_node_that_does_not_follow_its_control_plane_is_named(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(lab)
    mesh.write([service("web", VIP, A), service("web6", VIP6, A6)])
    mesh.start_here()
    node = cluster.ClusterNode(mesh.lab, "node1", [])
    web, web6 = Target(VIP, 80, (A, B)), Target(VIP6, 80, (A6,))
    assert node.missed({web: {A}, web6: {A6}}, 8) == []
    monkeypatch.setattr(cluster, "_FOLLOW", 0.0)
    assert node.missed({web: {A, B}, web6: {A6}}, 1) == []
    assert node.missed({web: {A, B}, web6: {A6}}, 2) == [
        f"maps: {VIP} port 80 leads to {A}, but the control plane said {A}, {B}"
    ]
    assert node.missed({web: {A}}, 8) == [
        f"maps: {VIP6} port 80 leads to {A6}, but the control plane said nobody"
    ]
