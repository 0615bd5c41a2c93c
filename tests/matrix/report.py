"""What came of it: pytest's JUnit files read into rows, the table of them, and docs/kernels.md."""

from __future__ import annotations

import msgspec

__all__ = ["Row"]


class Row(msgspec.Struct, frozen=True):
    """What one run of tests gave, on one kernel with one Python and one libbpf.

    ``skipped`` counts tests by the feature that they did not find; ``failed`` has the names of tests.
    """

    name: str
    kernel: str
    python: str
    libbpf: str
    passed: int
    skipped: dict[str, int]
    failed: tuple[str, ...]
    seconds: float
