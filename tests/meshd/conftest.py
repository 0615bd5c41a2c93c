"""Fixtures: the compiled releases, and a mesh in a lab."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshd
from meshd.demo.lab import Lab
from tests.meshd.labmesh import A6, VIP, VIP6, A, Mesh, service


@pytest.fixture(scope="session")
def bundles() -> Path:
    """The compiled releases."""
    path = Path(meshd.__file__).parent / "bpf"
    subprocess.run(["make", "--silent", "-C", str(path)], check=True)
    return path


@pytest.fixture
def mesh(lab: Lab, bundles: Path) -> Iterator[Mesh]:
    """A lab with backends A, B (IPv4) and A6, and a services file that sends VIP to A and VIP6 to A6."""
    made = Mesh(lab)
    made.write([service("web", VIP, A), service("web6", VIP6, A6)])
    yield made
    if made.daemon is not None and made.daemon.process.poll() is None:
        made.daemon.process.kill()
