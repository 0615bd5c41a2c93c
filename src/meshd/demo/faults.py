"""Upgrades broken on purpose: ``python -m meshd.demo.faults NAME run ...`` is ``meshd run ...`` with one fault.

The demo must be able to fail, or its success would show nothing. Each fault replaces a part of hitless in its own
process only; no product code knows of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import hitless
from hitless.kernel.links import Link
from hitless.kernel.programs import Program
from hitless.upgrade import transaction
from hitless.upgrade.attaching import attach
from hitless.upgrade.copy import Carriage
from hitless.upgrade.model import HookPlan

__all__ = ["FAULTS", "LOST", "NODE_FAULTS", "main"]

LOST = "origin"
"""The map whose pin gets lost; programs alone use it."""

# What a daemon takes, at the very least, to load a release between detaching the old and attaching the new one.
_LOADING = 0.02


def _reattach() -> None:
    """Links are not updated: old ones go away, new ones come, and for a moment there is no mesh."""

    def switch_hooks(hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path, maps: Path) -> float:
        started = time.perf_counter()
        for hook in hooks:
            if hook.action == "update":
                with Link.open(links / hook.link) as link:
                    link.detach()
                (links / hook.link).unlink()
        time.sleep(_LOADING)
        for hook in hooks:
            if hook.action in ("attach", "update"):
                attach(hook, programs[hook.program], links, maps)
        return (time.perf_counter() - started) * 1e6

    mock.patch.object(transaction, "switch_hooks", switch_hooks).start()


def _skip_copy() -> None:
    """A changed map becomes an empty one; the control plane fills in what it knows."""

    mock.patch.object(Carriage, "copy", lambda carriage, progress: progress(0)).start()
    _skip_catch_up()


def _skip_catch_up() -> None:
    """What old programs wrote after the copy stays behind."""
    mock.patch.object(Carriage, "catch_up", lambda carriage, last=False: 0).start()


def _overwrite() -> None:
    """The catch-up copies once more instead of merging, over what the new programs have written already."""

    def catch_up(carriage: Carriage, last: bool = False) -> int:
        if not last:
            return 0  # before the cutover the verification would find it
        keys, values = carriage.source.entries()
        carriage.target.write(carriage.keys(keys), carriage.values(keys, values))
        return len(keys)

    mock.patch.object(Carriage, "catch_up", catch_up).start()


def _lost_pin() -> None:
    """Somebody removes the pin of a map right after the upgrade: the mesh serves, but it cannot be verified."""
    verify = hitless.verify

    def lose_and_verify(node: hitless.Node) -> hitless.Verification:
        (node.root / "maps" / LOST).unlink()
        patched.stop()
        return verify(node)

    patched = mock.patch.object(hitless, "verify", lose_and_verify)
    patched.start()


FAULTS: dict[str, Callable[[], None]] = {
    "overwrite": _overwrite,
    "reattach": _reattach,
    "skip-catch-up": _skip_catch_up,
    "skip-copy": _skip_copy,
}
"""Those that lose something, which the demo must report."""

NODE_FAULTS: dict[str, Callable[[], None]] = {"lost-pin": _lost_pin}
"""Those that lose nothing and leave a node that is not what it should be, at which a rollout must stop."""


def main() -> None:
    """Plant the named fault, then run meshd's command with the other arguments."""
    from meshd.cli import main as meshd_main

    {**FAULTS, **NODE_FAULTS}[sys.argv[1]]()
    sys.argv[1:] = sys.argv[2:]
    meshd_main()


if __name__ == "__main__":
    main()
