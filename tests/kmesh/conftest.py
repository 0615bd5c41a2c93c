"""The fixture compiled once, and a node of each test's own."""

from __future__ import annotations

import pytest

from meshd.demo.lab import Lab
from tests.kmesh.node import Built, KmeshNode, build


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("kmesh"))


@pytest.fixture
def node(lab: Lab, built: Built) -> KmeshNode:
    """Pods with servers; nothing is loaded yet."""
    return KmeshNode(lab, built)
