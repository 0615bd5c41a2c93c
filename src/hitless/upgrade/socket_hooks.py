"""A hook of a sockmap or sockhash that no link holds, because another loader attaches its program there without one.

With a link of ours on the map that loader's next start would fail (EBUSY). So what is ours is attached as its program
was: a dispatcher takes the place, and the slots that it jumps to are pinned as those of any such hook. First they hold
the program that was there. The loader may put its own program over the dispatcher at any time, and sockets that are
added from then on run that; the next upgrade takes the place again.

Sockets keep the program that they were added under. Those that have a dispatcher to these slots, whichever, follow
every write of them. Those that have another program are *strays*: they keep it until they close, or are handed over to
the dispatcher, where the maps of their program do not stay (:mod:`hitless.kernel.handover`).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel.bpffs import make_directory, move
from hitless.kernel.dispatcher import Slots
from hitless.kernel.handover import Handover
from hitless.kernel.links import LinkInfo
from hitless.kernel.map_places import MapPlace
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.kernel.socket_programs import give, programs_of_sockets
from hitless.kernel.sockets import list_sockets
from hitless.upgrade.notes import own_programs

__all__ = ["SocketHook", "give_all"]

_PATIENCE = 5.0  # seconds for which sockets that have something queued, or are in a call, are tried again


class SocketHook:
    """What is attached at ``place``, and the slots pinned at ``slot``, if it was ever a dispatcher of ours."""

    def __init__(self, place: MapPlace, slot: Path, root: Path) -> None:
        """``root`` is the pin root, whose programs are ours."""
        self.place = place
        self._slot = slot
        self._root = root
        self._taken: tuple[int, Slots] | None = None  # the dispatcher that is attached, looked at before

    @property
    def info(self) -> LinkInfo:
        """The program of sockets that are added now, in the words of a link. Raises KernelError."""
        there = self.place.program()
        target = self.place.map_id if there else 0
        with self._slots() as slots:
            runs = slots.program_id if slots is not None and slots.has(there or 0) else there or 0
        return LinkInfo(0, "sockmap", runs, target, self.place.attach_type)

    @property
    def program_id(self) -> int:
        """The kernel's id of what is attached, a dispatcher or not; 0 if nothing is."""
        return self.place.program() or 0

    def take(self, first: Program) -> None:
        """Let a dispatcher be what is attached, in the place of ``first`` or of nothing; it runs ``first``.

        Raises NodeError if another program is there, UnsupportedError if ``first`` fits no slot, KernelError.
        """
        there = self.program_id
        if self._taken is not None and self._taken[0] == there:
            return
        with self._slots() as slots:
            ours = slots is not None and slots.has(there)
        if not ours:
            if there not in (0, first.info.id):
                raise self._other(there, first)
            make_directory(self._slot.parent, exist_ok=True)
            if self._left.exists() and not self._slot.exists():
                move(self._left, self._slot)
            self._make_slots(first)
            self._put_dispatcher()
        self._taken = self.program_id, Slots.open(self._slot)

    def update(self, new: Program, old: Program) -> None:
        """Let all sockets but the strays run ``new``, if those that are added now run ``old``.

        There is no compare-and-swap: this looks right before. Raises NodeError if they do not, KernelError.
        """
        self.take(old)
        assert self._taken is not None  # just now
        _, slots = self._taken
        if slots.program_id != old.info.id:
            raise self._other(slots.program_id, old)
        with self._fitting(new):
            slots.fill(new)

    def strays(self) -> dict[int, int]:
        """The programs of sockets in the map that have one and no dispatcher of ours, by the sockets' cookies.

        Raises UnsupportedError if this kernel does not tell, GoneError if the map is gone, KernelError.
        """
        with self.place.opened() as held:
            if not list_sockets(held):
                return {}
            found = programs_of_sockets(held, self.place.attach_type)
        with self._slots() as slots:
            own = {each for each in set(found.values()) if slots is not None and slots.has(each)}
        return {cookie: program for cookie, program in found.items() if program and program not in own}

    def hand_over(self) -> None:
        """Give the strays the dispatcher, which is attached. May be repeated after a kill.

        Raises NodeError with how many cannot be and why, KernelError.
        """
        self.settle()
        strays = self.strays()
        if not strays:
            return
        with self.place.opened() as held:
            handover = Handover(held, self._room, self._slot.name, strays)
            handover.run(_PATIENCE)
            left = handover.left()
            handover.put_back(self._aside(held))
        if left:
            why = ", ".join(f"{count} {reason}" for reason, count in left.items())
            raise NodeError(
                f"{self.place}: {sum(left.values())} of its sockets still run the program that they were added under "
                f"({', '.join(map(str, sorted(set(strays.values()))))}), and not all maps of that stay: {why}; tried "
                f"for {_PATIENCE:g} s. Close those connections, or let them end, then apply again; or keep the "
                "definitions of those maps in this release",
                map=self.place.map_id,
                left=left,
            )

    def settle(self) -> None:
        """Put right what somebody who was killed had taken off the map: dispatcher and sockets. Raises KernelError."""
        if self._slot.exists() and self.place.program() == 0:
            self._put_dispatcher()
        if self._begun:
            with self.place.opened() as held:
                Handover(held, self._room, self._slot.name).put_back(self._aside(held))

    def give_back(self, old: Program) -> None:
        """Attach ``old``, another loader's, in the place of the dispatcher; the slots, which hold it, are kept for
        sockets that have a dispatcher. Raises KernelError.
        """
        with self._slots() as slots:
            if slots is not None and slots.has(self.program_id):
                self.place.put(old)
        if self._slot.exists():
            move(self._slot, self._left)

    def detach(self) -> None:
        """Take a dispatcher of ours off, or a program of this root; another's stays. Strays keep what they have."""
        there = self.program_id
        with self._slots() as slots:
            ours = slots is not None and slots.has(there)
        if ours or there in own_programs(self._root):
            with Program.by_id(there) as program:
                self.place.take_off(program)

    def close(self) -> None:
        """Give the descriptors back."""
        if self._taken is not None:
            self._taken[1].close()

    @property
    def _left(self) -> Path:
        """Where slots are kept after an adoption that was taken back."""
        return self._slot.with_name(f"{self._slot.name}@left")

    @property
    def _room(self) -> Path:
        return self._root / "next" / "base"

    @property
    def _begun(self) -> bool:
        return Handover.was_begun(self._room, self._slot.name)

    @contextmanager
    def _slots(self) -> Iterator[Slots | None]:
        if not self._slot.exists():
            yield None
            return
        slots = Slots.open(self._slot)
        try:
            yield slots
        finally:
            slots.close()

    def _make_slots(self, first: Program) -> None:
        with self._fitting(first):
            Slots.make(first, self._slot).close()

    @contextmanager
    def _fitting(self, program: Program) -> Iterator[None]:
        try:
            yield
        except KernelError as error:
            if error.facts["errno"] != errno.EINVAL:
                raise
            raise UnsupportedError(
                f"{self.place}: program {program.info.id} ({program.info.name}) fits no slot of a dispatcher with the "
                "others of this hook: it was loaded for another attach type, or for none; let its loader load it as "
                "libbpf does (expected_attach_type)",
                feature="socket program of another attach type",
                program=program.info.id,
            ) from error

    def _put_dispatcher(self) -> None:
        was = self.program_id
        with self._slots() as slots:
            assert slots is not None  # which was looked at or made just now
            with slots.dispatcher(self.place.attach_type) as made:
                self.place.put(made)
                if not was:
                    with self.place.opened() as held:
                        give_all(held, self.place.attach_type, made.info.id)

    @contextmanager
    def _aside(self, held: Map) -> Iterator[None]:
        """Take the dispatcher off meanwhile."""
        with Program.by_id(self.program_id) as dispatcher:
            self.place.take_off(dispatcher)
            try:
                yield
            finally:
                self.place.put(dispatcher)
            give_all(held, self.place.attach_type, dispatcher.info.id)

    def _other(self, runs: int, expected: Program) -> NodeError:
        return NodeError(
            f"{self.place} runs program {runs}, not {expected.info.id} as expected: someone else changed it meanwhile; "
            "look at who attaches programs to this map, then plan again",
            map=self.place.map_id,
            program=runs,
            expected=expected.info.id,
        )


def give_all(held: Map, attach_type: str, dispatcher_id: int) -> None:
    """Let also those sockets of ``held`` run the hook that came while it had no program, and would never run one.

    Raises NodeError if not all can, KernelError.
    """
    if not list_sockets(held):
        return
    with Program.by_id(dispatcher_id) as dispatcher:
        given = give(held, attach_type, dispatcher)
    if given.left:
        why = ", ".join(f"{count} {reason}" for reason, count in given.left.items())
        raise NodeError(
            f"map {held.info.label}: not all sockets in it can be given its {attach_type} program ({why}): they run "
            "another one of this kind, from another map; let whoever added them close them, then apply again",
            map=held.info.name,
            left=given.left,
        )
