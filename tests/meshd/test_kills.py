"""meshd is killed at random moments, and clients see nothing of it; the long form is `python -m tests.mesh_kills`."""

from __future__ import annotations

import os

from meshd.demo.lab import Lab
from tests.mesh_kills import run


def test_the_mesh_serves_while_its_daemon_is_killed_and_the_next_one_puts_the_maps_right(
    lab: Lab, bundles: object
) -> None:
    summary = run(lab, seconds=6, seed=os.getpid())
    assert summary.is_good, summary
