"""The moment hooks run the new programs: each link by compare-and-swap, one right after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hitless.hooks import HOOKS
from hitless.kernel.bpffs import unpin
from hitless.kernel.libbpf import system_call
from hitless.kernel.links import Link
from hitless.kernel.programs import Program
from hitless.upgrade.model import HookPlan

__all__ = ["attach", "detach_hooks", "switch_back", "switch_hooks"]

_XDP_MODES = {"generic": 2, "native": 4}  # XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE


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
                if there.info.program_id == program.info.id and not there.info.is_dead:
                    return
            unpin(pin)  # its target is gone, and the link with it
        with attach(hook, program) as link:
            link.pin(pin)

    return change


def attach(hook: HookPlan, program: Program) -> Link:
    """Attach the program to its hook, by a link that nobody has pinned yet. Raises NodeError, KernelError."""
    what = f"{hook.target} in {hook.netns}" if hook.netns else hook.target
    match HOOKS[hook.hook].on:
        case "interface":
            flags = _XDP_MODES[hook.mode] if hook.mode else 0
            return Link.attach(program, hook.target_id, hook.attach_type, what, flags)
        case _:
            with _opened(Path(hook.target)) as target:
                return Link.attach(program, target, hook.attach_type, what)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    with system_call("open", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


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
                if not link.info.is_dead:
                    link.detach()
            unpin(pin)


def _pin_of(hook: HookPlan, links: Path) -> Path:
    """Where the link is pinned now: under its old name until the commit, if that changed."""
    renamed = links / hook.was if hook.was else None
    return renamed if renamed is not None and renamed.exists() else links / hook.link
