"""Print the catalogue: ``sudo .venv/bin/python -m tests.catalogue``. Exit code 1 if a kind is not as it should be."""

from __future__ import annotations

import sys

from meshd.demo.lab import Lab
from tests.catalogue.changes import CHANGES
from tests.catalogue.run import compiled, run, table


def main() -> int:
    """Run every kind in a lab of its own."""
    with Lab() as lab:
        objects = compiled(lab.scratch, (kind.source for kind in CHANGES))
        outcomes = [run(kind, number, lab, objects) for number, kind in enumerate(CHANGES)]
    print(table(outcomes))
    problems = [one.problem for one in outcomes if one.problem is not None]
    refused = sum(one.refusal is not None for one in outcomes)
    print(f"\n{len(outcomes)} kinds: {len(outcomes) - refused} carried, {refused} refused", *problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
