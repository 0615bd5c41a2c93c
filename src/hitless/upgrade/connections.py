"""The cutover of ``consistency = "connection"``: who began with the old release stays with it, on all hooks.

The board (:mod:`hitless.kernel.switchboard`) is in ``board/`` under the pin root. Its dispatchers take the place of the
programs on the links once, while both their slots lead to the old release, and stay for the upgrades to come. Then one
store makes the new release present for the connections that begin, and the old one goes on with those that had begun:
its maps are merged on and on, until none is left or a deadline has passed.

Each step may be repeated after a kill: what the board and the links say is what was done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hitless.kernel.bpffs import make_directory
from hitless.kernel.links import Link
from hitless.kernel.names import attach_number
from hitless.kernel.programs import Program
from hitless.kernel.switchboard import WITNESSES, Left, Switchboard
from hitless.layout.model import ProgramSpec
from hitless.upgrade.attached import BoardHook, open_attached, open_below, pin_of, remove
from hitless.upgrade.attaching import attach
from hitless.upgrade.model import HookPlan
from hitless.upgrade.places import as_pin_name

__all__ = ["install", "turn", "turn_back", "wait"]

_LOOK = 0.1  # s between two looks at how many connections are left


def install(
    hooks: Sequence[HookPlan], programs: Mapping[str, ProgramSpec], links: Path, maps: Path
) -> Switchboard:
    """Put a dispatcher on every hook that has none, with the old release behind it; new hooks let pass.

    ``programs`` are those of both releases, by name. Raises NodeError, UnsupportedError, KernelError.
    """
    board = Switchboard.create(links.parent / "board")
    before = set(board.hooks())
    cgroups = [Path(target) for target in dict.fromkeys(h.target for h in hooks if h.hook == "cgroup")]
    for cgroup in cgroups:
        _witness(board, hooks, cgroup, links)
    for hook in hooks:
        name, spec = pin_of(hook, links), programs.get(hook.program)
        loaded_for = attach_number(spec.attach_type) if spec is not None and spec.attach_type else 0
        if hook.action == "attach":
            if (links / hook.link).exists():
                with open_below(links, hook.link) as there:
                    if not there.info.is_dead:
                        continue
                remove(links, hook.link)  # its target is gone, and the link with it
            attach(hook, board.add(hook.link, hook.attach_type, None, loaded_for), links, maps)
        elif hook.action in ("update", "detach") and hook.expected is not None:
            with open_below(links, name) as there, open_attached(links, name) as seen:
                if isinstance(seen, BoardHook) and there.info.program_id == seen.dispatcher:
                    continue
                with Program.by_id(hook.expected) as old:
                    there.update(board.add(name, hook.attach_type, old, loaded_for if spec else None), old)
    if set(board.hooks()) != before and board.is_settled:
        board.bind_elders(cgroups)
    return board


def turn(board: Switchboard, hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path) -> None:
    """Make the new release present, if it is not, on all hooks by one store."""
    if board.is_settled:
        if _is_present(board, hooks, programs, links):
            return
        for hook in hooks:
            program = None if hook.action == "detach" else programs[hook.program]
            board.put(pin_of(hook, links), program, board.epoch + 1)
    board.flip()  # also if a killed process did it: what follows relies on the barrier behind the store


def wait(board: Switchboard, deadline: float, tell: Callable[[Left], None], meanwhile: Callable[[], None]) -> int:
    """Until no connection of the old release is left, or ``deadline`` seconds passed; then end it.

    ``tell`` is told what is left, and ``meanwhile`` called, over and over. Returns how many connections were moved.
    """
    until = time.monotonic() + deadline
    while not board.is_settled:
        left = board.left()
        if left.before:
            tell(left)
        if not left.before or time.monotonic() > until:
            return board.settle()
        meanwhile()
        time.sleep(_LOOK)
    return 0


def turn_back(board: Switchboard, hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path) -> None:
    """Make the old release present for everything, if it is not; ``programs`` are the new release's."""
    if not board.is_settled:
        # An end of the old epoch that an error cut short has let some of its slots go over already.
        _put_back(board, hooks, links, board.settled)
        board.flip_back()
    elif _is_present(board, hooks, programs, links):
        _put_back(board, hooks, links, board.epoch + 1)
        board.flip()
    board.settle()  # and the slots of the other epoch, which may be filled already, get what runs


def _put_back(board: Switchboard, hooks: Sequence[HookPlan], links: Path, epoch: int) -> None:
    """Let the old release's programs have the slots of ``epoch``."""
    known = set(board.hooks())
    for hook in hooks:
        name = pin_of(hook, links)
        if name not in known:
            continue
        if hook.action in ("update", "detach") and hook.expected is not None:
            with Program.by_id(hook.expected) as old:
                board.put(name, old, epoch)
        elif hook.action == "attach":
            board.put(name, None, epoch)


def _is_present(
    board: Switchboard, hooks: Sequence[HookPlan], programs: Mapping[str, Program], links: Path
) -> bool:
    """Whether connections that begin now begin with the new release."""
    known = set(board.hooks())
    return any(
        board.runs(pin_of(hook, links)) == programs[hook.program].info.id
        for hook in hooks
        if hook.action in ("attach", "update") and pin_of(hook, links) in known
    )


def _witness(board: Switchboard, hooks: Sequence[HookPlan], cgroup: Path, links: Path) -> None:
    """Let the board see sockets made and connections established where the release has no program for that."""
    make_directory(links.parent / "board" / "witnesses", exist_ok=True)
    for kind in WITNESSES:
        if any(hook.attach_type == kind and hook.target == str(cgroup) and hook.action != "detach" for hook in hooks):
            continue
        pin = links.parent / "board" / "witnesses" / f"{kind}@{as_pin_name(str(cgroup))}"
        if pin.exists():
            with Link.open(pin) as link:
                if not link.info.is_dead:
                    continue
            pin.unlink()
        with Link.attach_cgroup(board.add(pin.name, kind, None), cgroup, kind) as link:
            link.pin(pin)
