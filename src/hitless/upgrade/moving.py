"""A map of sockets that has hooks becomes another one, and its hooks come along: no socket is without its program.

A socket keeps the programs that it was first added under, and a map that has programs refuses it then (EBUSY). And the
old program looks for other sockets in the old map, the new one in the new map. So the order is everything:

1. Sockets are added to the new map while it has no program; the old one keeps them (:mod:`hitless.upgrade.sockets`).
2. The new map gets the hooks too, with a dispatcher to the other slot (:func:`lead`). That slot is switched together
   with all other hooks of the release, so that whoever comes to the new map runs the new program.
3. Who was added to the old map in between is added to the new one; the hooks are off it meanwhile (:func:`aside`).
4. The slot of the old map's sockets is switched (:func:`settle`): all are in the new map.
5. After the commit, the link of the new map takes the place of the old one's (:func:`come_along`).

Going back is the same, from the new map to the old one. The links of the new map are pinned in ``links/`` of the
generation that is being built. Each step may be repeated after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hitless.errors import VerifyError
from hitless.kernel.bpffs import make_directory, move, remove_tree
from hitless.kernel.dispatcher import Dispatcher
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.kernel.socket_programs import programs_of_sockets
from hitless.upgrade.attached import pin_of, slot_of
from hitless.upgrade.model import HookPlan
from hitless.upgrade.socket_hooks import give_all

__all__ = ["aside", "come_along", "lead", "read_types", "reattach", "require_moved", "settle"]


def read_types(hook: HookPlan, held: Map) -> None:
    """Look at what sockets run: the kernel's types are read then, which takes half a second once in a process."""
    programs_of_sockets(held, hook.attach_type)


@contextmanager
def lead(hook: HookPlan, links: Path, room: Path, held: Map) -> Iterator[Dispatcher]:
    """What ``hook`` has on ``held``, the new map, made if need be; its link is pinned in ``room``. Raises KernelError.
    """
    make_directory(room, exist_ok=True)
    if (room / hook.link).exists():
        reattach(hook, links, room, held)
        made = _open(hook, links, room)
    else:
        with _open(hook, links, links) as before:
            made = Dispatcher.beside(before, held, hook.attach_type, room / hook.link)
    try:
        yield made
    finally:
        made.close()


def reattach(hook: HookPlan, links: Path, room: Path, held: Map) -> None:
    """Attach what somebody who was killed had taken off ``held``; its link is pinned in ``room``. Raises KernelError.
    """
    with _open(hook, links, room) as there:
        if there.info.is_dead:
            there.attach_again(held, hook.attach_type, *_pins(hook, links, room))


@contextmanager
def aside(hooks: Sequence[HookPlan], links: Path, room: Path, held: Map) -> Iterator[None]:
    """Keep the hooks off ``held``, as far as they are on it; who comes meanwhile is given their programs afterwards."""
    there = [hook for hook in hooks if _pin(hook, links, room).exists()]
    with ExitStack() as off:
        for hook in there:
            dispatcher = off.enter_context(_open(hook, links, room))
            off.enter_context(dispatcher.aside(held, hook.attach_type, *_pins(hook, links, room)))
        yield
    for hook in there:
        with _open(hook, links, room) as dispatcher:
            give_all(held, hook.attach_type, dispatcher.program_id)


def settle(hook: HookPlan, program: Program, links: Path, room: Path, held: Map) -> None:
    """Let all sockets run ``program``, if those of ``held`` do, the map whose link is pinned in ``room``.

    If they run something else it is another's, which is left alone and found by who verifies. Raises KernelError.
    """
    if not _pin(hook, links, room).exists():
        return
    with _open(hook, links, room) as there:
        if there.info.program_id == program.info.id:
            there.update(program, program)
            give_all(held, hook.attach_type, there.program_id)


def require_moved(hook: HookPlan, program: Program, links: Path, room: Path) -> None:
    """Raise VerifyError unless ``hook`` is on the new map, whose link is pinned in ``room``, and runs ``program``."""
    with _open(hook, links, room) as there:
        found = there.info
    if found.is_dead or found.program_id != program.info.id:
        what = "is off" if found.is_dead else f"runs program {found.program_id} on"
        raise VerifyError(
            f"hook {hook.link} {what} the new map {hook.target}, just after it was put there: someone else changes "
            "this pin root's links; find out who, then apply again",
            link=hook.link,
            program=found.program_id,
            expected=program.info.id,
        )


def come_along(hooks: Sequence[HookPlan], links: Path, room: Path) -> None:
    """Let the links in ``room`` take the places of the old ones, whose maps are without a program then."""
    for hook in hooks:
        if (room / hook.link).exists():
            move(room / hook.link, links / hook.link)
    remove_tree(room)


def _open(hook: HookPlan, links: Path, room: Path) -> Dispatcher:
    return Dispatcher.open(slot_of(links, pin_of(hook, links)), _pin(hook, links, room))


def _pins(hook: HookPlan, links: Path, room: Path) -> tuple[Path, Path]:
    """Where the link is pinned, and a place for one that is to replace it: never among the links that others see."""
    spares = links.parent / "next" / "links" if room == links else room
    make_directory(spares, exist_ok=True)
    return _pin(hook, links, room), spares / f"{hook.link}@again"


def _pin(hook: HookPlan, links: Path, room: Path) -> Path:
    return room / (pin_of(hook, links) if room == links else hook.link)
