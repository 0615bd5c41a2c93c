"""The short run of the fuzzer that every change gets; `make fuzz` is the long one."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutate import MUTATORS
from tests.fuzz.targets import seeds, targets

ROOT = Path(__file__).parents[2]


def test_no_damage_gets_anything_but_a_clear_refusal_out_of_the_readers() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout.splitlines()[-1]


def test_a_failure_is_found_and_its_bytes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fuzz import __main__ as fuzzer

    monkeypatch.setattr(fuzzer, "OUT", tmp_path)
    monkeypatch.setattr(fuzzer, "MAX_SECONDS", 0.2)
    run = fuzzer.Run("snapshot", tmp_path)

    def spin(data: bytes) -> None:
        while data == b"hang":
            pass
        if data == b"crash":
            raise ZeroDivisionError

    monkeypatch.setattr(run, "_target", spin)
    for data in (b"hang", b"fine", b"crash", b"crash"):
        run.case(data)
    assert [place.partition(" ")[0] for place in run.failures] == ["TooSlow", "ZeroDivisionError"]
    assert {file.read_bytes() for file in tmp_path.glob("snapshot-*")} == {b"hang", b"crash"}
    assert (run.cases, run.accepted) == (4, 1)


@pytest.mark.parametrize("name", MUTATORS)
def test_what_the_fuzzer_begins_with_is_accepted_and_its_damage_is_reproducible(name: str, tmp_path: Path) -> None:
    target = targets(tmp_path)[name]
    for data in seeds(name):
        target(data)
        once, again = (MUTATORS[name](data, random.Random(7)) for _ in range(2))
        assert once == again
