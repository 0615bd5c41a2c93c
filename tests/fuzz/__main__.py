"""Runs the fuzzer: ``python -m tests.fuzz [--seconds N] [--seed N] [--only FORMAT] [FILE...]``.

Each format has its share of the time, in a process of its own. A file runs just that case again, its format being the
first word of its name, as in the files that a failure leaves in ``build/fuzz``. Without a seed the clock gives one; it
is printed.

atheris guides the mutators by what code they reach. Where it is not to be had (it has wheels for x86_64 only) they
work blindly, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.mutate import MUTATORS, Mutator

OUT = Path(__file__).parents[2] / "build" / "fuzz"
GUIDED = importlib.util.find_spec("atheris") is not None

#: A case may cost this much. Time is that of the CPU: others may be at work on this machine.
MAX_SECONDS = 2.0
MAX_BYTES = 1 << 30
_MAX_CASE = 1 << 16


class TooSlow(BaseException):
    """A case used more than its time. No Exception: a reader that catches those must not catch this."""


class Run:
    """One target under fire: counts what happens, and keeps the bytes of what must not."""

    def __init__(self, name: str, folder: Path) -> None:
        from tests.fuzz.targets import REFUSALS, targets

        self.name = name
        self.cases = self.accepted = 0
        self.refusals: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.slowest = 0.0
        self.started = time.monotonic()
        self._target = targets(folder)[name]
        self._refused = REFUSALS
        signal.signal(signal.SIGPROF, _too_slow)

    def case(self, data: bytes) -> None:
        """Run one case; a failure is recorded with its bytes, the first of each place only."""
        self.cases += 1
        begun = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        try:
            self._target(data)
            self.accepted += 1
        except self._refused as error:
            if not error.message or not error.message.isprintable():
                self._fail(data, f"a message that a terminal would obey: {error.message!r}", "message")
            self.refusals[f"{type(error).__name__}: {re.sub(_NAMES, '_', error.message)}"] += 1
        except (Exception, TooSlow) as error:  # noqa: BLE001 - whatever else it is, it is a failure
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
            self._fail(data, "".join(traceback.format_exception(error)), f"{type(error).__name__} at {place}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest = max(self.slowest, time.process_time() - begun)
        if _peak() > MAX_BYTES:
            self._fail(data, f"memory grew to {_peak() >> 20} MiB", "memory")
            self.finish()

    def finish(self) -> None:
        """Hand what was counted to the parent, and end: atheris does not come back."""
        seconds = time.monotonic() - self.started
        facts = {
            "cases": self.cases, "accepted": self.accepted, "distinct": len(self.refusals), "seconds": seconds,
            "slowest": self.slowest, "peak": _peak(), "failures": self.failures, "refusals": self.refusals,
        }  # fmt: skip
        print(f"\n{_RESULT}{json.dumps(facts)}", flush=True)
        os._exit(0)

    def _fail(self, data: bytes, story: str, place: str) -> None:
        if place not in self.failures:
            OUT.mkdir(parents=True, exist_ok=True)
            file = OUT / f"{self.name}-{hashlib.sha256(data).hexdigest()[:12]}"
            file.write_bytes(data)
            self.failures[place] = f"{story.rstrip()}\n  again: python -m tests.fuzz {file}"


_RESULT = "result: "
_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\d+|(?<=map )\S+|(?<=struct )\S+|(?<=line )\S+")


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TooSlow(f"more than {MAX_SECONDS} s of CPU")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(name: str, folder: Path, seconds: float, seed: int) -> None:
    """Fuzz one format and end this process."""
    mutate, dice = MUTATORS[name], random.Random(seed)
    with _instrumented():
        run = Run(name, folder)
        from tests.fuzz.targets import seeds
    whole = seeds(name)
    for data in whole:
        run.case(data)
    until = time.monotonic() + seconds

    def case(data: bytes) -> None:
        if time.monotonic() >= until:
            run.finish()
        run.case(data)

    if GUIDED:
        _guided(case, mutate, whole, folder / "corpus", seed)
    while True:
        data = dice.choice(whole)
        for _ in range(dice.choice((1, 1, 2, 4))):
            data = mutate(data, dice)
        case(data)


def _instrumented() -> Any:
    if not GUIDED:
        return contextlib.nullcontext()
    import atheris

    return atheris.instrument_imports(include=["hitless.layout", "hitless.bundle"])


def _guided(case: Callable[[bytes], None], mutate: Mutator, whole: list[bytes], corpus: Path, seed: int) -> None:
    import atheris

    def custom(data: bytes, max_size: int, number: int) -> bytes:
        dice = random.Random(number)
        match dice.randrange(10):
            case 0:
                return bytes(atheris.Mutate(data, max_size))
            case 1 | 2 | 3 | 4:  # what is kept for its coverage is soon all rubbish: begin anew
                data = dice.choice(whole)
        return mutate(bytes(data), dice)[:max_size]

    corpus.mkdir()
    for index, data in enumerate(whole):
        (corpus / str(index)).write_bytes(data)
    # Its own limits are a second net, for what holds the interpreter and so keeps ours from being looked at.
    limits = ["-timeout=60", f"-rss_limit_mb={MAX_BYTES >> 20}", f"-max_len={_MAX_CASE}", f"-seed={seed}"]
    os.chdir(corpus.parent)
    atheris.Setup([sys.argv[0], "-verbosity=0", *limits, str(corpus)], case, custom_mutator=custom)
    atheris.Fuzz()


def again(file: Path) -> None:
    """Run one saved case, its errors as they come."""
    from tests.fuzz.targets import REFUSALS, targets

    with tempfile.TemporaryDirectory() as folder:
        try:
            targets(Path(folder))[file.name.partition("-")[0]](file.read_bytes())
        except REFUSALS as error:
            print(f"{file}: refused: {type(error).__name__}: {error}")
        else:
            print(f"{file}: accepted")


def campaign(names: list[str], seconds: float, seed: int, verbose: bool) -> bool:
    """Fuzz each format in a process of its own and report; whether nothing was found."""
    how = "guided by coverage (atheris)" if GUIDED else "blind: atheris is not installed"
    print(f"Fuzzing {', '.join(names)} for {seconds:g} s, {how}, seed {seed}; limits: {MAX_SECONDS:g} s and "
          f"{MAX_BYTES >> 20} MiB a case.", flush=True)  # fmt: skip
    cases, failures = 0, 0
    for name in names:
        share = seconds / len(names)
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            command = [sys.executable, "-m", "tests.fuzz", "--child", folder, "--only", name, "--seconds", str(share)]
            done = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True, errors="replace")
            left = [*Path(folder).glob("crash-*"), *Path(folder).glob("timeout-*"), *Path(folder).glob("oom-*")]
            for file in left:
                OUT.mkdir(parents=True, exist_ok=True)
                (OUT / f"{name}-{file.name}").write_bytes(file.read_bytes())
        result = next((line for line in done.stdout.splitlines() if line.startswith(_RESULT)), None)
        if result is None:
            failures += 1
            kept = ", ".join(str(OUT / f"{name}-{file.name}") for file in left) or "none"
            print(f"  {name}: DIED with {done.returncode}; saved: {kept}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            continue
        facts = json.loads(result.removeprefix(_RESULT))
        cases += facts["cases"]
        failures += len(facts["failures"])
        print(
            f"  {name + ':':9} {facts['cases']:8,} cases, {facts['cases'] / facts['seconds']:7,.0f} a second, "
            f"{facts['accepted']:,} accepted, {facts['distinct']} distinct refusals, slowest "
            f"{facts['slowest'] * 1e3:,.0f} ms, peak {facts['peak'] >> 20} MiB, {len(facts['failures'])} failures",
            flush=True,
        )
        if verbose:
            for text, count in sorted(facts["refusals"].items(), key=lambda item: -item[1]):
                print(f"    {count:7,} {text}")
        for place, story in facts["failures"].items():
            print(f"    FAILURE {place}\n" + "\n".join(f"      {line}" for line in story.splitlines()))
    print(f"{cases:,} cases, {failures} failures.", flush=True)
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=time.time_ns() % (1 << 31))
    parser.add_argument("--only", choices=list(MUTATORS), help="this format only")
    parser.add_argument("--verbose", action="store_true", help="show every distinct refusal")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="run these saved cases instead")
    args = parser.parse_args()
    for file in args.files:
        again(file)
    if args.files:
        return 0
    if args.child:
        fuzz(args.only, args.child, args.seconds, args.seed)
    return 0 if campaign([args.only] if args.only else list(MUTATORS), args.seconds, args.seed, args.verbose) else 1


if __name__ == "__main__":
    sys.exit(main())
