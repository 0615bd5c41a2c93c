"""The moment hooks run the new programs: each link by compare-and-swap, one right after the other."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from hitless.errors import GoneError, KernelError
from hitless.hooks import HOOKS
from hitless.kernel.bpffs import make_directory, unpin
from hitless.kernel.dispatcher import Dispatcher
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.kernel.struct_ops import StructOps, renew_defaults
from hitless.kernel.xdp import quick
from hitless.upgrade.attached import Attached, BoardHook, open_attached, pin_of, remove
from hitless.upgrade.attaching import adopt, attach
from hitless.upgrade.model import HookPlan
from hitless.upgrade.moving import lead, reattach
from hitless.upgrade.record import map_pin, pin_name
from hitless.upgrade.socket_hooks import SocketHook

__all__ = ["detach_hooks", "hold_adopted", "switch_back", "switch_hooks", "with_ops"]


def with_ops(hooks: Sequence[HookPlan], programs: Mapping[str, Program], generation: Path) -> dict[str, Program]:
    """What the hooks can run: the generation's ``programs``, and its struct_ops maps, opened. Raises KernelError."""
    ops = (hook.program for hook in hooks if hook.hook == "struct_ops" and hook.action != "detach")
    return {**programs, **{name: StructOps.open(map_pin(generation, name)) for name in ops}}


def switch_hooks(hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path, maps: Path) -> float:
    """Attach new hooks and update live ones to ``programs``, in the plan's order.

    ``links`` is the directory of link pins, ``maps`` that of the release's maps. A hook that runs its new program
    already is left alone, so this may be repeated after a kill; one that a pattern led to and whose target is gone,
    too. Returns the microseconds from before the first change to after the last. Raises NodeError if a hook runs
    neither what was expected nor the new program, GoneError if its target is gone, KernelError.
    """
    with ExitStack() as held:
        # Everything that can be opened is opened before the first hook changes, so that the gap holds nothing else.
        changes: list[tuple[HookPlan, Callable[[], None]]] = []
        xdp: dict[int, Program] = {}
        for hook in hooks:
            if hook.action == "attach":
                changes.append((hook, partial(_attach, hook, programs[hook.program], links, maps)))
            elif hook.action in ("update", "adopt"):
                new = programs[hook.program]
                if hook.moved:
                    target = held.enter_context(Map.open(maps / pin_name(hook.target)))
                    leads = held.enter_context(lead(hook, links, maps.parent / "links", target))
                    if leads.info.program_id != new.info.id:
                        changes.append((hook, partial(leads.update_own, new, held.enter_context(_expected(hook)))))
                    continue
                with _may_go(hook):
                    adopted = hook.action == "adopt"
                    there = held.enter_context(
                        adopt(hook, links, maps) if adopted else open_attached(links, pin_of(hook, links))
                    )
                    if there.info.program_id == new.info.id:
                        continue
                    old = held.enter_context(_expected(hook))
                    if isinstance(there, SocketHook):
                        there.take(old)
                        if hook.handed:
                            there.hand_over()
                    changes.append((hook, partial(there.update, new, old)))
                    if hook.hook in ("xdp", "xdp-netlink"):
                        xdp |= {program.info.id: program for program in (old, new)}
        if xdp:
            held.enter_context(quick(list(xdp.values())))
        started = time.perf_counter()
        for hook, change in changes:
            with _may_go(hook):
                change()
        gap = (time.perf_counter() - started) * 1e6
    _renew(hooks)
    return gap


def _renew(hooks: Sequence[HookPlan]) -> None:
    """Behind the links, whether changed now or before a kill: what is the default somewhere is exchanged there too."""
    for hook in hooks:
        if hook.hook == "struct_ops" and hook.action == "update":
            renew_defaults(hook.target)


def hold_adopted(hooks: Sequence[HookPlan], directory: Path) -> None:
    """Pin in ``directory`` the programs of other tools that a switch takes off their hooks: to put them back, an undo
    needs them alive, and maybe nothing else holds them. May be repeated. Raises GoneError if one is gone, KernelError.
    """
    for hook in hooks:
        pin = directory / hook.link
        if hook.adopted is None or pin.exists():
            continue
        make_directory(directory, exist_ok=True)
        with _may_go(hook), _expected(hook) as old:
            old.pin(pin)


def _expected(hook: HookPlan) -> Program:
    assert hook.expected is not None  # of what is updated
    kind = StructOps if hook.hook == "struct_ops" else Program
    try:
        return kind.by_id(hook.expected)
    except KernelError as error:
        if error.facts["errno"] != errno.ENOENT:
            raise
        raise GoneError(
            f"program {hook.expected}, which ran on {hook.target} when this was planned, is not there any more: "
            f"somebody took it off the hook of link {hook.link}, or the target away; plan again",
            link=hook.link,
            target=hook.target,
            program=hook.expected,
        ) from error


def _attach(hook: HookPlan, program: Program, links: Path, maps: Path) -> None:
    if (links / hook.link).exists():
        with open_attached(links, hook.link) as there:
            found = there.info
            meant = hook.point is None or found.target_id == hook.target_id  # see plan: its death is not told
            if found.program_id == program.info.id and not found.is_dead and meant:
                return
        if HOOKS[hook.hook].on == "map":
            unpin(links / hook.link)  # the slots are its sockets', who have a dispatcher still
        else:
            remove(links, hook.link)  # its target is gone, and the link with it
    attach(hook, program, links, maps)


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


def switch_back(hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path, maps: Path) -> None:
    """Undo :func:`switch_hooks`, as far as it came; ``maps`` has the old release's. Raises NodeError, KernelError.

    In the plan's order as well, not from its end: that says which program may be the newer one for a moment, and going
    back the old release comes. A program that notes something must not go back before the one that ends it. Hooks that
    only the new release has go last.
    """
    for hook in sorted(hooks, key=lambda hook: hook.action == "attach"):
        name = pin_of(hook, links)
        program = programs.get(hook.program)
        if program is None or not (links / name).exists():
            if hook.action == "attach":
                remove(links, hook.link)
            continue
        if hook.moved:
            with Map.open(maps / pin_name(hook.moved)) as old_map:
                reattach(hook, links, links, old_map)
        with open_attached(links, name) as there:
            if isinstance(there, SocketHook) and hook.action != "attach":
                there.settle()
            runs = there.info.program_id
            ours = runs == program.info.id
            if hook.action == "attach":
                ours = ours or not runs or isinstance(there, BoardHook)  # nothing: one was killed here
            if ours and hook.action == "attach":
                _detach(there)
            elif ours and hook.action in ("update", "adopt") and not there.info.is_dead:
                with _expected(hook) as old, _gone_is_done():
                    if isinstance(there, Dispatcher) and hook.moved:
                        there.update_own(old, program)  # the others when they are in the old map
                    else:
                        there.update(old, program)
            if isinstance(there, SocketHook) and hook.action == "adopt":
                with _expected(hook) as old:
                    there.give_back(old)
        if hook.action == "adopt" or (hook.action == "attach" and (ours or not HOOKS[hook.hook].linked)):
            remove(links, name)
    _renew(hooks)


def detach_hooks(names: Sequence[str], links: Path) -> None:
    """Take programs off the hooks whose links are pinned under ``names`` and remove the pins."""
    for name in names:
        if (links / name).exists():
            with open_attached(links, name) as there:
                _detach(there)
        remove(links, name)


def _detach(there: Attached) -> None:
    if not there.info.is_dead:
        with _gone_is_done():
            there.detach()


@contextmanager
def _gone_is_done() -> Iterator[None]:
    """Around what takes a program off a hook: if its target goes meanwhile, that is done."""
    try:
        yield
    except GoneError:
        pass
    except KernelError as error:
        if error.facts["errno"] not in (errno.ENOLINK, errno.ENODEV):
            raise
