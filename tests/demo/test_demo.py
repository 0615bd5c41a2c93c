"""The demo shows a clean upgrade as clean, a broken one as broken, and leaves nothing behind in any case."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from meshd.demo.faults import FAULTS
from meshd.demo.lab import find_cgroup2, leftovers, sweep

SHORT = ("--seconds", "8", "--upgrades", "4", "--connections", "2000", "--held", "50")


def run(*options: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "meshd.demo", "--json", *SHORT, *options],
        stdout=subprocess.PIPE, text=True, timeout=120, check=False,
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, report


def start_and_wait_for(words: str) -> tuple[subprocess.Popen[str], str]:
    """Start a short demo, wait until it has printed ``words``, and return it with the name of its lab."""
    options = ("--seconds", "3", "--upgrades", "1", "--connections", "10", "--held", "20")
    args = [sys.executable, "-u", "-m", "meshd.demo", *options]
    demo = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert demo.stdout is not None
    name = ""
    for line in demo.stdout:
        if match := re.search(r"hitless-lab-[\d-]+", line):
            name = match.group()
        if words in line:
            return demo, name
    raise AssertionError(f"the demo ended with {demo.wait()} before it said {words!r}")


def remains(name: str) -> list[str]:
    return [path for path in leftovers() if name in path]


def test_a_clean_run_loses_nothing() -> None:
    code, report = run()
    assert report["losses"] == []
    assert report["ok"] is True
    assert code == 0
    assert [upgrade["start_type"] for upgrade in report["upgrades"]] == ["update"] * 4
    assert [(upgrade["from"], upgrade["to"]) for upgrade in report["upgrades"]] == [
        ("1.0.0", "2.0.0"), ("2.0.0", "3.0.0"), ("3.0.0", "4.0.0"), ("4.0.0", "1.0.0"),
    ]  # fmt: skip
    assert report["connections"]["tried"] == report["connections"]["ok"] > 2000
    assert report["held"]["alive"] == 50
    assert report["denied"]["tried"] == report["denied"]["denied"] > 1000
    assert report["end"]["counters"]["opened"] == report["opened_by_clients"]


LOSS_OF_FAULT = {
    "overwrite": "counters: the mesh counted",
    "reattach": "failed with ENETUNREACH",
    "skip-catch-up": "counters: the mesh counted",
    "skip-copy": "held connections have no established flow entry",
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_run_with_a_planted_fault_reports_losses(fault: str) -> None:
    code, report = run("--fault", fault, "--seconds", "4", "--upgrades", "2")
    assert code == 1
    assert report["ok"] is False
    assert report["fault"] == fault
    assert any(LOSS_OF_FAULT[fault] in loss for loss in report["losses"]), report["losses"]


@pytest.mark.parametrize("moment", ["Lab ", "is live", "Upgrade 1:", "books are compared"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals, code: int, moment: str) -> None:
    demo, name = start_and_wait_for(moment)
    demo.send_signal(number)
    assert demo.wait(30) == code
    assert remains(name) == []


def test_an_impatient_second_interrupt_leaves_nothing_either() -> None:
    demo, name = start_and_wait_for("Upgrade 1:")
    for _ in range(20):
        demo.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert demo.wait(30) != 0
    assert remains(name) == []


def test_the_next_lab_removes_what_a_killed_run_left() -> None:
    demo, name = start_and_wait_for("Upgrade 1:")
    demo.kill()
    demo.wait()
    assert name in sweep()
    assert remains(name) == []
    assert not list(Path(find_cgroup2()).glob(f"{name}*"))
