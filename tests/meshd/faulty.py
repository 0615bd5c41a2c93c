"""`python tests/meshd/faulty.py FAULT run ...` is `meshd run ...` that comes to grief as FAULT says."""

from __future__ import annotations

import os
import signal
import sys
from unittest import mock

from hitless.errors import VerifyError
from hitless.upgrade import transaction
from meshd.cli import main
from meshd.keeper import Keeper


def die(*_: object) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refuse(*_: object) -> None:
    raise VerifyError("a hook is not as it should be", link="connect4")


def lose_a_hook(keeper: Keeper) -> None:
    """The release is live, and then the pin of one of its hooks is somewhere else."""
    links = keeper._node.links
    (links / "connect4").rename(links.parent.parent / "lost")
    keeper._turn.settle()


FAULTS = {
    "loses-a-hook": (Keeper, "upgraded", lose_a_hook),
    "dies-before-cutover": (transaction, "switch_hooks", die),
    "fails-after-cutover": (transaction._Upgrade, "_verify_hooks", refuse),
}

if __name__ == "__main__":
    mock.patch.object(*FAULTS[sys.argv[1]]).start()
    sys.argv[1:] = sys.argv[2:]
    main()
