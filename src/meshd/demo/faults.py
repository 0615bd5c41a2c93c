"""Upgrades broken on purpose: ``python -m meshd.demo.faults NAME run ...`` is ``meshd run ...`` with one fault.

The demo must be able to fail, or its success would show nothing. Each fault replaces a part of hitless in this
process only; no product code knows of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["FAULTS", "main"]

FAULTS: dict[str, Callable[[], None]] = {}


def main() -> None:
    """Plant the named fault, then run meshd's command with the other arguments."""
    from meshd.cli import main as meshd_main

    FAULTS[sys.argv[1]]()
    sys.argv[1:] = sys.argv[2:]
    meshd_main()


if __name__ == "__main__":
    main()
