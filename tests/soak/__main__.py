"""``python -m tests.soak``: the long run, then one whose upgrader is killed, then one whose upgrades are taken back."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence

import msgspec

from hitless.errors import HitlessError
from meshd.demo.faults import FAULTS
from meshd.demo.lab import Lab
from tests.soak.run import Options, Report, Soak

_SHOWN = 20


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Count, upgrade, compare.")
    parser.add_argument("--upgrades", type=int, default=1_000, help="at least so many in the first run (1000)")
    parser.add_argument("--operations", type=int, default=2_000_000, help="in the first run (2000000)")
    parser.add_argument("--kills", type=int, default=100, help="of the upgrader, in a second run (100; 0: none)")
    parser.add_argument("--undone", type=int, default=0, help="upgrades taken back, in a third run (0: none)")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is random (1)")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="break upgrades on purpose: losses must show")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; the rest goes to stderr")
    return parser.parse_args(args)


def _print(report: Report) -> None:
    wanted = report.options
    print(
        f"{report.upgrades:,} upgrades, {report.undone} taken back, {report.kills} kills, {report.operations:,} "
        f"operations on {report.cpus} CPUs in {report.seconds:.0f} s ({report.operations_per_second:,.0f} a second), "
        f"{report.writes:,} writes of the control plane, {report.caught_up:,} entries caught up, "
        f"{report.lost} values cut, seed {wanted.seed}"
        + (f", with the fault {wanted.fault}" if wanted.fault else ""),
        file=sys.stderr,
    )
    for what, count in report.recovered.items():
        print(f"  {count} times after a kill: {what}", file=sys.stderr)
    for one in report.sums:
        mark = "=" if one.expected == one.found else "DIFFERS FROM"
        print(f"  {one.what:<24} {one.expected:>14,} {mark} {one.found:,}", file=sys.stderr)
    for wrong in report.mismatches[:_SHOWN]:
        print(f"  WRONG {wrong}", file=sys.stderr)
    if len(report.mismatches) > _SHOWN:
        print(f"  and {len(report.mismatches) - _SHOWN} more", file=sys.stderr)
    print("exact: nothing was lost and nothing was counted twice" if report.exact else "NOT exact", file=sys.stderr)


def _soak(options: Options) -> Report:
    with Lab() as lab:
        return Soak(lab, options, lambda text: print(text, file=sys.stderr)).run()


def main(args: Sequence[str] | None = None) -> int:
    """Run them and return the exit code: 1 when books differ, 2 when a run did not come to its end."""
    chosen = _parse(args)
    runs = [Options(chosen.upgrades, chosen.operations, seed=chosen.seed, fault=chosen.fault)]
    if chosen.kills:
        runs.append(Options(kills=chosen.kills, seed=chosen.seed, fault=chosen.fault))
    if chosen.undone:
        runs.append(Options(undone=chosen.undone, seed=chosen.seed, fault=chosen.fault))
    reports = []
    try:
        for options in runs:
            reports.append(_soak(options))
            _print(reports[-1])
    except HitlessError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("soak: interrupted; nothing is left behind", file=sys.stderr)
        return 128 + signal.SIGINT
    if chosen.json:
        print(json.dumps([{**msgspec.to_builtins(one), "exact": one.exact} for one in reports]))
    return 0 if all(one.exact for one in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
