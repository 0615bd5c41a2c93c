"""The moment hooks run the new programs: each link by compare-and-swap, one right after the other."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hitless.errors import GoneError, KernelError
from hitless.hooks import HOOKS
from hitless.kernel.bpffs import unpin
from hitless.kernel.interfaces import interfaces
from hitless.kernel.libbpf import system_call
from hitless.kernel.links import Link
from hitless.kernel.namespaces import Namespace
from hitless.kernel.programs import Program
from hitless.upgrade.model import HookPlan

__all__ = ["attach", "detach_hooks", "switch_back", "switch_hooks"]

_XDP_MODES = {"generic": 2, "native": 4}  # XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE


def switch_hooks(hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path) -> float:
    """Attach new hooks and update live ones to ``programs``, in the plan's order, but XDP first.

    Each change of XDP waits some milliseconds for packets on their way; the others follow within microseconds.
    ``links`` is the directory of link pins. A hook that runs its new program already is left alone, so this may
    be repeated after a kill; one that a pattern led to and whose target is gone, too. Returns the microseconds from
    before the first change to after the last. Raises NodeError if a hook runs neither what was expected nor the new
    program, GoneError if its target is gone, KernelError.
    """
    # Everything that can be opened is opened before the first hook changes, so that the gap holds nothing else.
    changes: list[tuple[HookPlan, Callable[[], None]]] = []
    for hook in sorted(hooks, key=lambda hook: hook.hook != "xdp"):
        if hook.action == "attach":
            changes.append((hook, _attaching(hook, programs[hook.program], links / hook.link)))
        elif hook.action == "update" and hook.expected is not None:
            program = programs[hook.program]
            link = Link.open(_pin_of(hook, links))
            if link.info.program_id != program.info.id:
                changes.append((hook, _updating(link, program, Program.by_id(hook.expected))))
    started = time.perf_counter()
    for hook, change in changes:
        with _may_go(hook):
            change()
    return (time.perf_counter() - started) * 1e6


@contextmanager
def _may_go(hook: HookPlan) -> Iterator[None]:
    """Around a change of a hook: what a pattern led to may be removed by anybody at any time."""
    try:
        yield
    except GoneError:
        if not hook.matched:
            raise
    except KernelError as error:
        if error.facts["errno"] != errno.ENOLINK:
            raise
        if not hook.matched:
            raise GoneError(
                f"{hook.target}, which link {hook.link} was on, is gone: put it back, or take it out of the manifest",
                link=hook.link,
                target=hook.target,
            ) from error


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
    if HOOKS[hook.hook].on == "interface":
        (interface,) = interfaces(hook.target, Namespace.at(hook.netns or ""))
        if interface.index != hook.target_id:
            raise GoneError(
                f"{interface} is another one than when this was planned: its index was {hook.target_id}, and is "
                f"{interface.index}; plan again",
                interface=interface.name,
                index=interface.index,
            )
        flags = _XDP_MODES[hook.mode] if hook.mode else 0
        with interface.entered():
            return Link.attach(program, interface.index, hook.attach_type, interface, flags)
    with _opened(Path(hook.target)) as target:
        return Link.attach(program, target, hook.attach_type, hook.target)


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
                _detach(link)
                unpin(pin)
            elif hook.action == "update" and hook.expected is not None and not link.info.is_dead:
                with Program.by_id(hook.expected) as old, _gone_is_done():
                    link.update(old, program)


def detach_hooks(names: Sequence[str], links: Path) -> None:
    """Take programs off the hooks whose links are pinned under ``names`` and remove the pins."""
    for name in names:
        pin = links / name
        if pin.exists():
            with Link.open(pin) as link:
                _detach(link)
            unpin(pin)


def _detach(link: Link) -> None:
    if not link.info.is_dead:
        with _gone_is_done():
            link.detach()


@contextmanager
def _gone_is_done() -> Iterator[None]:
    """Around what takes a program off a hook: if its target goes meanwhile, that is done."""
    try:
        yield
    except KernelError as error:
        if error.facts["errno"] not in (errno.ENOLINK, errno.ENODEV):
            raise


def _pin_of(hook: HookPlan, links: Path) -> Path:
    """Where the link is pinned now: under its old name until the commit, if that changed."""
    renamed = links / hook.was if hook.was else None
    return renamed if renamed is not None and renamed.exists() else links / hook.link
