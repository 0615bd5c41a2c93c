"""``python -m tests.faults``: kill an upgrade at each of its system calls, and let each of them fail."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby

import msgspec

from hitless.errors import HitlessError
from meshd.demo.lab import Lab
from tests.faults.run import ERRORS, KILLS, Options, Report, faults
from tests.faults.scenarios import SCENARIOS, WORLDS
from tests.faults.world import Broken


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Kill and fail, call by call.")
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="only this one; may be repeated (all)")
    parser.add_argument("--calls", default="", help="only calls whose name begins so, such as 'bpf LINK' (all)")
    parser.add_argument("--stride", type=int, default=1, help="of so many calls one, and those around the cutover (1)")
    parser.add_argument("--kinds", default=",".join((*KILLS, *ERRORS)), help="before,after and errnos (all)")
    parser.add_argument("--doubles", type=int, default=0, help="also kill so many recoveries after kills (0)")
    parser.add_argument("--seed", type=int, default=1, help="of what is chosen at random (1)")
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cpus, help=f"so many worlds side by side ({cpus})")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # which of the jobs this process is
    return parser.parse_args(args)


def _print(report: Report) -> None:
    ends = ", ".join(f"{end} {count}x" for end, count in sorted(report.ends.items()))
    print(
        f"{report.scenario}: {report.calls} calls; {report.kills} kill points and {report.errors} error points tried "
        f"in {report.seconds:.0f} s, {len(report.failures)} failures; {ends}"
    )
    by_name: dict[str, Counter[str]] = {}
    for point, count in report.points.items():
        kind, _, name = point.partition(" ")
        by_name.setdefault(name, Counter())[kind if kind not in ERRORS else "errors"] += count
    for name, kinds in sorted(by_name.items()):
        print(f"  {name:<32}" + "".join(f"{kind} {count:>5}  " for kind, count in sorted(kinds.items())))
    for failure in report.failures:
        print(f"  FAILED {failure}")
    sys.stdout.flush()


def _share(chosen: argparse.Namespace) -> None:
    """Do one share, and print each scenario's report as a line of JSON."""
    kinds = tuple(filter(None, chosen.kinds.split(",")))
    share = (chosen.share, chosen.jobs)
    options = Options(chosen.calls, chosen.stride, chosen.seed, kinds, chosen.doubles, share)
    names = chosen.scenario or SCENARIOS
    for kind, group in groupby((SCENARIOS[name] for name in names), lambda one: one.world):
        with Lab() as lab, WORLDS[kind](lab) as world:
            for scenario in group:
                report = faults(world, scenario, options, lambda text: print(text, file=sys.stderr))
                print(msgspec.json.encode(report).decode(), flush=True)


def _reports(jobs: Sequence[subprocess.Popen[str]], scenarios: int) -> Iterator[Report]:
    """One for each scenario, as soon as all shares of it are done. Raises Broken if one ends before."""
    for _ in range(scenarios):
        whole: Report | None = None
        for job in jobs:
            assert job.stdout is not None  # it is a pipe
            line = job.stdout.readline()
            if not line:
                raise Broken(f"a share ended with {job.wait()}")
            report = msgspec.json.decode(line, type=Report)
            if whole is None:
                whole = report
            else:
                whole.add(report)
        assert whole is not None  # there is a job
        yield whole


def main(args: Sequence[str] | None = None) -> int:
    """Run the scenarios and return the exit code: 1 when anything was wrong, 2 when a world could not be made."""
    given = sys.argv[1:] if args is None else list(args)
    chosen = _parse(given)
    try:
        if chosen.share is not None:
            _share(chosen)
            return 0
        command = [sys.executable, "-m", "tests.faults", *given]
        jobs = [
            subprocess.Popen([*command, "--share", str(share)], stdout=subprocess.PIPE, text=True)
            for share in range(chosen.jobs)
        ]
        reports = []
        try:
            for report in _reports(jobs, len(chosen.scenario or SCENARIOS)):
                reports.append(report)
                _print(report)
        except BaseException:
            for job in jobs:
                job.send_signal(signal.SIGINT)
            raise
        finally:
            for job in jobs:
                job.wait()
    except (HitlessError, Broken) as error:
        print(f"faults: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("faults: interrupted; nothing is left behind", file=sys.stderr)
        return 128 + signal.SIGINT
    kills, errors = sum(one.kills for one in reports), sum(one.errors for one in reports)
    failures = sum(len(one.failures) for one in reports)
    seconds = sum(one.seconds for one in reports)
    print(f"{kills + errors} points ({kills} kills, {errors} errors) in {seconds:.0f} s, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
