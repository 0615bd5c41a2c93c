"""``python -m tests.matrix``: the same tests on several kernels, in virtual machines, and one table of them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import msgspec

from tests.matrix import HOUSE, STATE, MatrixError
from tests.matrix.environments import ENVIRONMENTS, Elsewhere, prepare
from tests.matrix.image import write_base, write_initrd
from tests.matrix.machine import Guest, Here, Run, look_for_qemu, settings
from tests.matrix.packages import KERNELS, NEWEST, Kernel, obtain, obtain_newest
from tests.matrix.report import Results, Row, document, load, read, save, table
from tests.matrix.selection import LESS, SAMPLE, SLOWNESS, TESTS

_DOCUMENT = HOUSE / "docs" / "kernels.md"
_AT_ONCE = 2
_TOLD = 30.0  # s between lines about what runs
_LOOK = 0.5
_REST = 300.0  # s: booting, and imports before the first test


def _parse(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Run kernel tests on other kernels.")
    parser.add_argument("--kernel", choices=(*KERNELS, NEWEST), help="only this one (all of them)")
    parser.add_argument("--sample", action="store_true", help="a few tests on that or the oldest kernel: three minutes")
    parser.add_argument("--host", action="store_true", help="no kernels, only the Pythons and libbpfs on this one's")
    parser.add_argument(
        "--accel",
        choices=("tcg", "kvm"),
        default="tcg",
        help="tcg emulates (the default: it needs nothing of the machine, and kvm inside of a virtual machine can hang "
        "before the kernel says a word); kvm is many times quicker where it works",
    )
    parser.add_argument("--docs", action="store_true", help="only write docs/kernels.md, from the last whole run")
    return parser.parse_args(args)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # one is enough: guests are being ended
    raise SystemExit(128 + number)


class _Matrix:
    """What has come of it so far."""

    def __init__(self) -> None:
        self._begun: list[str] = []
        self._rows: list[Row] = []
        self.problems: dict[str, str] = {}
        self.doctor: dict[str, object] = {}

    @property
    def rows(self) -> tuple[Row, ...]:
        """In the order in which they were to begin, whichever ended first."""
        return tuple(sorted(self._rows, key=lambda row: self._begun.index(row.name)))

    def run(self, waiting: Sequence[Run]) -> None:
        """Run them, some side by side, and tell now and then how far they are."""
        queue, told = list(waiting), time.monotonic()
        self._begun += [run.name for run in waiting]
        with contextlib.ExitStack() as stack:
            running: list[Run] = []
            while queue or running:
                while queue and len(running) < _AT_ONCE:
                    running.append(stack.enter_context(queue.pop(0)))
                time.sleep(_LOOK)
                running = [run for run in running if not self._ended(run)]
                if time.monotonic() - told > _TOLD:
                    told = time.monotonic()
                    for run in running:
                        _say(f"  {run.name}: {run.seconds:.0f} s, {run.reached()}")

    def _ended(self, run: Run) -> bool:
        try:
            if not run.ended():
                return False
            brought = run.brought()
            row = read(run.name, brought.junit, brought.code)
        except MatrixError as error:
            told = error.message if str(run.log) in error.message else f"{error.message}; see {run.log}"
            self.problems[run.name] = told
            _say(f"  {told}")
            return True
        self._rows.append(row)
        if brought.doctor is not None:
            self.doctor[run.name] = msgspec.json.decode(brought.doctor)
        skipped = sum(row.skipped.values())
        _say(f"  {run.name}: {row.passed} passed, {skipped} skipped, {len(row.failed)} failed in {run.seconds:.0f} s")
        return True


def _environments(matrix: _Matrix, objects: Path) -> list[Elsewhere]:
    """Those that can be had; why the others cannot is a problem of the matrix."""
    _say("The Pythons and libbpfs for this machine's own kernel are made ready.")
    ready = []
    for environment in ENVIRONMENTS:
        try:
            ready.append(prepare(environment, STATE, objects))
        except MatrixError as error:
            matrix.problems[environment.name] = error.message
            _say(f"  {error.message}")
    return ready


def _run(chosen: argparse.Namespace) -> Results:
    objects = STATE / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    matrix, wanted = _Matrix(), _wanted(chosen)
    if wanted:
        look_for_qemu()
    kernels = [_told(obtain(name, STATE / "packages")) for name in wanted if name != NEWEST]
    newest = _newest(matrix) if NEWEST in wanted else None
    tests = TESTS if kernels and not chosen.sample else SAMPLE
    here: list[Run] = [Here(STATE / "here", tests, objects)] if kernels or newest else []
    others = _environments(matrix, objects) if not chosen.sample and not chosen.kernel else []
    if here:
        _say("The same tests on this machine first, which compiles what guests have no compiler for.")
    matrix.run([*here, *others])
    if here:
        _guests(kernels, newest, chosen, matrix, tests)
    return Results(matrix.rows, matrix.problems, matrix.doctor)


def _wanted(chosen: argparse.Namespace) -> tuple[str, ...]:
    if chosen.host:
        return ()
    if chosen.kernel:
        return (chosen.kernel,)
    return KERNELS[:1] if chosen.sample else (*KERNELS, NEWEST)


def _told(kernel: Kernel) -> Kernel:
    _say(f"Linux {kernel.name} is Debian's {kernel.release}.")
    return kernel


def _newest(matrix: _Matrix) -> Kernel | None:
    """The newest kernel, if it can be had; why not is a problem of the matrix, whose other rows have no part in it."""
    try:
        return _told(obtain_newest(STATE / "packages"))
    except MatrixError as error:
        matrix.problems["newest Linux"] = error.message
        _say(f"  {error.message}")
        return None


def _guests(
    kernels: Sequence[Kernel],
    newest: Kernel | None,
    chosen: argparse.Namespace,
    matrix: _Matrix,
    tests: tuple[str, ...],
) -> None:
    objects = STATE / "objects"
    here = next((row.seconds for row in matrix.rows if row.name == "here"), None)
    if here is None:
        return  # guests could only say the same, and later

    base = STATE / "base.cpio"
    write_base(base, objects)
    _say(f"The root of guests has {base.stat().st_size >> 20} MiB. They emulate, and take about ten times as long.")

    def guest(kernel: Kernel, place: str, tests: tuple[str, ...], parameters: str = "", what: str = "") -> Guest:
        initrd, limit = STATE / f"{place}.cpio", _REST + SLOWNESS * here
        write_initrd(initrd, base, kernel, settings(tests, objects))
        return Guest(kernel, initrd, STATE / place, limit, chosen.accel, parameters, what)

    guests = [guest(kernel, kernel.name, tests) for kernel in kernels]
    if kernels and not chosen.sample:
        guests.append(guest(kernels[-1], "less", SAMPLE, LESS, ", locked down"))
    if newest:
        guests.append(guest(newest, "newest", SAMPLE, what=", newest"))
    matrix.run(guests)


def _document() -> None:
    results = load(STATE / "results.json")
    missing = {f"Linux {name}" for name in KERNELS} - {row.name for row in results.rows}
    if missing:
        raise MatrixError(f"The last run has no row of {', '.join(sorted(missing))}: run the whole `make matrix` first")
    _DOCUMENT.write_text(document(results))


def main(args: Sequence[str] | None = None) -> int:
    """Run it and return the exit code: 1 when a test failed or a kernel has no row, 2 when nothing could begin."""
    chosen = _parse(args)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        if chosen.docs:
            _document()
            return 0
        results = _run(chosen)
        save(results, STATE / "results.json")
    except MatrixError as error:
        _say(f"matrix: {error.message}")
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _say(f"matrix: No room on disk for {error.filename or STATE}: {os.strerror(error.errno)}; make room there")
        return 2
    print(table(results))
    return 0 if results.good else 1


if __name__ == "__main__":
    sys.exit(main())
