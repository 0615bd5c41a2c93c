"""The moment hooks run the new programs: each link by compare-and-swap, one right after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hitless.kernel.bpffs import unpin
from hitless.kernel.links import Link
from hitless.kernel.programs import Program
from hitless.upgrade.model import HookPlan

__all__ = ["detach_hooks", "switch_back", "switch_hooks"]


def switch_hooks(hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path) -> float:
    """Attach new hooks and update live ones to ``programs``, in the plan's order.

    ``links`` is the directory of link pins. A hook that runs its new program already is left alone, so this may
    be repeated after a kill. Returns the microseconds from before the first change to after the last. Raises
    NodeError if a hook runs neither what was expected nor the new program, KernelError.
    """
    # Everything that can be opened is opened before the first hook changes, so that the gap holds nothing else.
    changes: list[Callable[[], None]] = []
    for hook in hooks:
        if hook.action == "attach":
            changes.append(_attaching(hook, programs[hook.program], links / hook.link))
        elif hook.action == "update" and hook.expected is not None:
            program = programs[hook.program]
            link = Link.open(_pin_of(hook, links))
            if link.info.program_id != program.info.id:
                changes.append(_updating(link, program, Program.by_id(hook.expected)))
    started = time.perf_counter()
    for change in changes:
        change()
    return (time.perf_counter() - started) * 1e6


def _attaching(hook: HookPlan, program: Program, pin: Path) -> Callable[[], None]:
    def change() -> None:
        if pin.exists():
            with Link.open(pin) as there:
                if there.info.program_id == program.info.id and there.info.cgroup_id:
                    return
            unpin(pin)  # its cgroup is gone, and the link with it
        with Link.attach_cgroup(program, Path(hook.target), hook.attach_type) as link:
            link.pin(pin)

    return change


def _updating(link: Link, new: Program, old: Program) -> Callable[[], None]:
    return lambda: link.update(new, old)


def switch_back(hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path) -> None:
    """Undo :func:`switch_hooks`, as far as it came: the last first. Raises NodeError, KernelError."""
    for hook in reversed(hooks):
        pin = _pin_of(hook, links)
        program = programs.get(hook.program)
        if program is None or not pin.exists():
            continue
        with Link.open(pin) as link:
            if link.info.program_id != program.info.id:
                continue
            if hook.action == "attach":
                link.detach()
                unpin(pin)
            elif hook.action == "update" and hook.expected is not None:
                with Program.by_id(hook.expected) as old:
                    link.update(old, program)


def detach_hooks(names: Sequence[str], links: Path) -> None:
    """Take programs off the hooks whose links are pinned under ``names`` and remove the pins."""
    for name in names:
        pin = links / name
        if pin.exists():
            with Link.open(pin) as link:
                link.detach()
            unpin(pin)


def _pin_of(hook: HookPlan, links: Path) -> Path:
    """Where the link is pinned now: under its old name until the commit, if that changed."""
    renamed = links / hook.was if hook.was else None
    return renamed if renamed is not None and renamed.exists() else links / hook.link
