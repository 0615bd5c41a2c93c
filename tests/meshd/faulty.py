"""`python tests/meshd/faulty.py FAULT run ...` is `meshd run ...` that comes to grief as FAULT says."""

from __future__ import annotations

import os
import signal
import sys
from unittest import mock

from hitless.errors import VerifyError
from hitless.upgrade import transaction
from meshd.cli import main


def die(*_: object) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def refuse(*_: object) -> None:
    raise VerifyError("a hook is not as it should be", link="connect4")


FAULTS = {
    "dies-before-cutover": lambda: mock.patch.object(transaction, "switch_hooks", die),
    "fails-after-cutover": lambda: mock.patch.object(transaction._Upgrade, "_verify_hooks", refuse),
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]().start()
    sys.argv[1:] = sys.argv[2:]
    main()
