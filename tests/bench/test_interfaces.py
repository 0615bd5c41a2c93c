"""The benchmark of many interfaces works; its figures are for reading."""

from __future__ import annotations

import pytest

from benchmarks import interfaces


def test_each_number_of_pods_has_a_line_and_its_growth(capsys: pytest.CaptureFixture[str]) -> None:
    assert interfaces.main(["--pods", "1,3", "--upgrades", "1"]) == 0
    told = capsys.readouterr().out
    assert "3.0 times the pods" in told
    assert "python -m benchmarks.interfaces --pods 1,3 --upgrades 1" in told
