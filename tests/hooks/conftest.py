"""Pods for the tests of hooks on interfaces."""

from __future__ import annotations

import pytest

from meshd.demo.lab import Lab
from meshd.demo.pods import Pods


@pytest.fixture
def pods(lab: Lab) -> Pods:
    """None at first."""
    return Pods(lab)
