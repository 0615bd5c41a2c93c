"""The kernels that people run: tests inside virtual machines, and on other Pythons and libbpfs. See ``__main__``."""

from __future__ import annotations

from pathlib import Path

from hitless.errors import HitlessError

__all__ = ["HOUSE", "STATE", "MatrixError"]

HOUSE = Path(__file__).parents[2]
"""The project: in a guest it lies at the same path."""

STATE = HOUSE / "build" / "matrix"
"""Where everything is kept: packages, roots, logs and results."""


class MatrixError(HitlessError):
    """A row of the matrix cannot be had: says what was missing or went wrong, and where its log is."""

    code = "matrix"
