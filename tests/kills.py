"""Processes that die in the middle of an upgrade: forks, for a start of Python takes longer than most upgrades."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hitless
from hitless.upgrade import record, transaction

__all__ = ["die", "dying_at", "dying_at_record", "exit_code_of", "kill_upgrade", "kill_while_undoing"]

_SECONDS = 60


def exit_code_of(work: Callable[[], object]) -> int:
    """Do ``work`` in a process of its own; returns its exit code (1 after an error), or minus the signal of its end."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_SECONDS)
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    """Be killed, here and now."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(step: str) -> Callable[[hitless.Progress], None]:
    """What ``progress`` may be, to be killed when ``step`` begins."""

    def progress(event: hitless.Progress) -> None:
        if event.step == step:
            die()

    return progress


def kill_upgrade(step: str, node: hitless.Node, bundle: Path, variables: Mapping[str, str]) -> None:
    """An upgrade by a process that is killed when ``step`` begins."""

    def work() -> None:
        hitless.apply(hitless.Node(node.root), hitless.Bundle.load(bundle, variables), progress=dying_at(step))

    assert exit_code_of(work) == -signal.SIGKILL


def dying_at_record(phase: str, when: str) -> None:
    """From now on this process dies before or after (``when``) it writes down that an upgrade is in ``phase``."""
    def write(path: Path, now: Any) -> None:
        if (now.phase, when) == (phase, "before"):
            die()
        record.write_record(path, now)
        if now.phase == phase:
            die()

    setattr(transaction, "write_record", write)  # noqa: B010 - of this process, which is about to die


def kill_while_undoing(
    phase: str, when: str, node: hitless.Node, bundle: Path, variables: Mapping[str, str]
) -> None:
    """An upgrade that fails after its cutover, by a process that is killed while it takes that back."""

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            raise ZeroDivisionError

    def work() -> None:
        dying_at_record(phase, when)
        hitless.apply(hitless.Node(node.root), hitless.Bundle.load(bundle, variables), progress=fail)

    assert exit_code_of(work) == -signal.SIGKILL
