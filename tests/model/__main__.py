"""``python -m tests.model``: the exploration with other bounds than those of `make test`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from tests.model.explore import explore
from tests.model.machine import FAULTS
from tests.model.scenarios import SCENARIOS


def main(args: Sequence[str] | None = None) -> int:
    """Explore and print; return 1 if something is wrong in a scenario."""
    parser = argparse.ArgumentParser(prog="python -m tests.model", description="See every state of an upgrade.")
    parser.add_argument("--increments", type=int, help="runs of programs, each counts, inserts or deletes")
    parser.add_argument("--kills", type=int, help="of the upgrading process")
    parser.add_argument("--errors", type=int, help="that make an upgrade be undone")
    parser.add_argument("--writes", type=int, help="from user space")
    parser.add_argument("--fault", choices=FAULTS, help="plant this one")
    parser.add_argument("--only", choices=SCENARIOS, help="this scenario")
    chosen = parser.parse_args(args)
    wrong = 0
    for name, world in SCENARIOS.items():
        if chosen.only not in (None, name):
            continue
        given = {"kills": chosen.kills, "errors": chosen.errors}
        if world.runs:  # where programs take part, whose words its books understand
            given["runs"] = chosen.increments
        if world.writer:
            given["writes"] = chosen.writes
        bounds = {what: number for what, number in given.items() if number is not None}
        started = time.perf_counter()
        found = explore(replace(world, fault=chosen.fault or "", **bounds))
        print(f"{name}: {found} ({time.perf_counter() - started:.1f} s)", flush=True)
        wrong += found.problem is not None
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
