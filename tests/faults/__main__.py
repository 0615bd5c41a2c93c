"""``python -m tests.faults``: kill an upgrade at each of its system calls, and let each of them fail."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence

from hitless.errors import HitlessError
from meshd.demo.lab import Lab
from tests.faults.run import ERRORS, KILLS, Options, Report, faults
from tests.faults.scenarios import SCENARIOS
from tests.faults.world import Broken, World


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Kill and fail, call by call.")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="only this one; may be repeated (all)")
    parser.add_argument("--calls", default="", help="only calls whose name begins so, such as 'bpf LINK' (all)")
    parser.add_argument("--stride", type=int, default=1, help="of so many calls one, and those around the cutover (1)")
    parser.add_argument("--kinds", default=",".join((*KILLS, *ERRORS)), help="before,after and errnos (all)")
    parser.add_argument("--doubles", type=int, default=0, help="also kill so many recoveries after kills (0)")
    parser.add_argument("--seed", type=int, default=1, help="of what is chosen at random (1)")
    return parser.parse_args(args)


def _print(report: Report) -> None:
    ends = ", ".join(f"{end} {count}x" for end, count in sorted(report.ends.items()))
    print(
        f"{report.scenario}: {report.calls} calls; {report.kills} kill points and {report.errors} error points tried "
        f"in {report.seconds:.0f} s, {len(report.failures)} failures; {ends}"
    )
    by_name: dict[str, Counter[str]] = {}
    for (kind, name), count in report.points.items():
        by_name.setdefault(name, Counter())[kind if kind not in ERRORS else "errors"] += count
    for name, kinds in sorted(by_name.items()):
        print(f"  {name:<32}" + "".join(f"{kind} {count:>5}  " for kind, count in sorted(kinds.items())))
    for failure in report.failures:
        print(f"  FAILED {failure}")
    sys.stdout.flush()


def main(args: Sequence[str] | None = None) -> int:
    """Run the scenarios and return the exit code: 1 when anything was wrong, 2 when a world could not be made."""
    chosen = _parse(args)
    options = Options(chosen.calls, chosen.stride, chosen.seed, tuple(chosen.kinds.split(",")), chosen.doubles)
    reports = []
    try:
        with Lab() as lab, World(lab) as world:
            for name in chosen.scenario or SCENARIOS:
                reports.append(faults(world, SCENARIOS[name], options, lambda text: print(text, file=sys.stderr)))
                _print(reports[-1])
    except (HitlessError, Broken) as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("faults: interrupted; nothing is left behind", file=sys.stderr)
        return 128 + signal.SIGINT
    points, failures = sum(one.kills + one.errors for one in reports), sum(len(one.failures) for one in reports)
    print(f"{points} points in {sum(one.seconds for one in reports):.0f} s, {failures} failures (pid {os.getpid()})")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
