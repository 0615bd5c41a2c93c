"""What the tracer says it does with a system call is what happens."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

import hitless
from tests.faults.tracer import AFTER, BEFORE, Fault, trace


def two_directories(top: Path) -> str:
    (top / "one").mkdir()
    (top / "two").mkdir()
    return "done"


def made(top: Path) -> list[str]:
    return sorted(path.name for path in top.iterdir())


def test_without_a_fault_work_is_done_and_its_calls_are_told(tmp_path: Path) -> None:
    found = trace(lambda: two_directories(tmp_path))
    assert found.outcome is not None
    assert (found.outcome.value, found.outcome.failed) == ("done", False)
    assert list(map(str, found.calls)) == [f"0 mkdir {tmp_path}/one", f"1 mkdir {tmp_path}/two"]


@pytest.mark.parametrize(("kind", "there"), [(BEFORE, ["one"]), (AFTER, ["one", "two"])])
def test_a_call_at_whose_begin_it_is_killed_is_not_executed_and_one_at_whose_end_is(
    tmp_path: Path, kind: str, there: list[str]
) -> None:
    found = trace(lambda: two_directories(tmp_path), Fault(1, kind))
    assert found.outcome is None
    assert found.hit is not None and found.hit.what == f"{tmp_path}/two"
    assert made(tmp_path) == there


def test_a_call_that_is_to_fail_is_not_executed(tmp_path: Path) -> None:
    found = trace(lambda: two_directories(tmp_path), Fault(0, "ENOSPC"))
    assert found.outcome is not None and found.outcome.crashed
    assert "No space left on device" in found.outcome.message
    assert made(tmp_path) == []


def test_an_error_that_stays_meets_all_calls_from_there_on(tmp_path: Path) -> None:
    def work() -> list[str]:
        failed = []
        for name in ("one", "two", "three"):
            try:
                (tmp_path / name).mkdir()
            except OSError:
                failed.append(name)
        return failed

    found = trace(work, Fault(1, "ENOMEM+"))
    assert found.hit is not None and found.hit.what == f"{tmp_path}/two"
    assert found.outcome is not None and found.outcome.value == ["two", "three"]
    assert made(tmp_path) == ["one"]


def test_calls_of_other_threads_count_too(tmp_path: Path) -> None:
    def work() -> None:
        thread = threading.Thread(target=lambda: os.mkdir(tmp_path / "one"))  # noqa: PTH102
        thread.start()
        thread.join()
        (tmp_path / "two").mkdir()

    found = trace(work, Fault(0, BEFORE, "mkdir"))
    assert found.hit is not None and found.hit.what == f"{tmp_path}/one"
    assert made(tmp_path) == []


def test_an_error_of_hitless_is_told_with_its_facts() -> None:
    def work() -> None:
        raise hitless.NodeError("no", path="/x")

    outcome = trace(work).outcome
    assert outcome is not None
    assert (outcome.message, outcome.facts, outcome.crashed) == ("no", {"path": "/x"}, False)
