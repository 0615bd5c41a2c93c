"""A dispatcher: the program that a hook keeps for good, and that jumps to the one that is to run.

Hooks whose links cannot be updated (netfilter, tracepoints) have one, and so have sockmaps and sockhashes.

The kernel hands a socket the programs of a map when the socket is added, and never others after that: neither an
update of the map's link nor adding the socket again reaches it. So what sockets are given is a program of ours, which
tail-calls a slot of a program array, and a switch is one write of that slot: every socket, old or new, runs the new
program from its next message on. Without a program in the slot, what comes passes.

The array is pinned before the map's first socket can be given the dispatcher. The kernel empties a program array when
the last reference from user space goes (descriptor or pin), and sockets keep their dispatcher longer than any process
lives.

When a map becomes another, sockets of both have to run for a moment the program that looks for others in their own map.
So the array of a map's hook has two slots, and there is a dispatcher to each, which the maps of a hook have in turn. At
rest both slots hold the same program: whatever map a socket was ever added to, it runs that one, by one tail call.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel.bpffs import move
from hitless.kernel.codegen import EXIT, LOAD, MOV, MOV_IMM, R0, R1, R2, R3, R6, Assembler
from hitless.kernel.libbpf import check, ffi, lib
from hitless.kernel.links import Link, LinkInfo
from hitless.kernel.maps import Map, create
from hitless.kernel.names import attach_number, program_number
from hitless.kernel.programs import Program, load_code

__all__ = ["JUMPS", "SOCKET_HOOKS", "Dispatcher", "Jump", "Slots", "attached_program", "is_dispatcher", "jump_for"]

_TAIL_CALL = 12  # bpf_tail_call
_PROG_ARRAY = 3  # BPF_MAP_TYPE_PROG_ARRAY
_SK_PASS = 1
_NF_ACCEPT = 1
_ON = "on_"  # a slot's name that begins so goes on with the number of its hook's target
_NAMES = ("dispatcher", "dispatcher_odd")
"""Of the dispatchers, by the slot that they jump to."""
_IN = "in_"  # a dispatcher's name that begins so goes on with the inode of the file that its hook is in


class Jump(msgspec.Struct, frozen=True):
    """What a dispatcher is loaded as: the type of its programs, and the attach type that they are loaded for if any.

    ``passing`` is what lets pass what comes while the slot is empty; None is the whole of it, which is what a parser is
    asked for. ``function`` is the kernel's number of the type that tracing programs are loaded for.
    """

    program_type: str
    passing: int | None
    loaded_for: str = ""
    function: int = 0


SOCKET_HOOKS = {
    "sk_msg_verdict": Jump("sk_msg", _SK_PASS),
    "sk_skb_stream_parser": Jump("sk_skb", None),
    "sk_skb_stream_verdict": Jump("sk_skb", _SK_PASS),
    "sk_skb_verdict": Jump("sk_skb", _SK_PASS),
}
"""What can be attached to a sockmap or sockhash, by libbpf's name of the attach type."""

JUMPS = {
    "netfilter": Jump("netfilter", _NF_ACCEPT, "netfilter"),
    "perf_event": Jump("perf_event", 0),
    "raw_tracepoint": Jump("raw_tracepoint", 0),
    "tracepoint": Jump("tracepoint", 0),
    "uprobe": Jump("kprobe", 0),
    "uretprobe": Jump("kprobe", 0),
}
"""Of hooks that are no map's, by their names in a manifest; but see :func:`jump_for`."""


class Dispatcher:
    """What is attached to one hook, by a link, and the slots of which it jumps to its own."""

    def __init__(self, slots: Map, link: Link, own: int = 0) -> None:
        """Take both over; see :meth:`attach`, :meth:`beside` and :meth:`open`."""
        self._slots = slots
        self._link = link
        self._own = own

    @classmethod
    def attach(
        cls, held: Map, attach_type: str, first: Program, slot_pin: Path, link_pin: Path, expected: str | None = None
    ) -> Dispatcher:
        """Let the sockets that are added to ``held`` from now on run ``first``, until an update names another.

        ``expected`` is the attach type that ``first`` was loaded for, if it is not ``attach_type``; empty is none, as
        libbpf has it for programs of a section named just ``sk_skb``. The kernel binds the slots to it and to the type
        of the program, and refuses (EINVAL) what was loaded as something else, now and in updates. The dispatcher takes
        the place of a program that was attached without a link, whichever: look at :func:`attached_program` before.
        Slots that are pinned at ``slot_pin`` already, by one who was killed here, are used again: sockets may have
        their dispatchers. So is the place of a link that was detached.

        Raises KernelError (EBUSY: the map has a link of this type, or its other kind of verdict), UnsupportedError.
        """
        jump, what = _socket_jump(attach_type, expected), f"{attach_type} of map {held.info.label}"

        def link(program: Program) -> Link:
            return Link.attach(program, held.fd, attach_type, f"map {held.info.label}")

        return cls.put(jump, link, first, slot_pin, link_pin, what, slots=len(_NAMES))

    @classmethod
    def put(
        cls,
        jump: Jump,
        link_to: Callable[[Program], Link],
        first: Program,
        slot_pin: Path,
        link_pin: Path,
        what: str,
        target_id: int = 0,
        slots: int = 1,
        file: int = 0,
    ) -> Dispatcher:
        """The same for any hook, which ``link_to`` attaches a program to; ``slots`` is how many it has.

        ``target_id`` and ``file`` are kept where the kernel does not tell of the link what it is attached to, see
        LinkInfo.
        """
        name = f"{_ON}{target_id}" if target_id else "dispatcher"
        kept = os.path.lexists(slot_pin)
        array = Map.open(slot_pin) if kept else create(_PROG_ARRAY, name, 4, 4, slots)
        if kept and array.info.name != name:
            slot_pin.unlink()  # of one who was killed here when something else was there
            kept, array = False, create(_PROG_ARRAY, name, 4, 4, slots)
        with _load(jump, array, 0, what, f"{_IN}{file:x}" if file else None) as program:
            if not kept:
                _fill(array, first)
                array.pin(slot_pin)
            try:
                link = link_to(program)
            except KernelError:
                if not kept:
                    slot_pin.unlink()
                raise
        if kept:
            _fill(array, first)
        if os.path.lexists(link_pin):
            with Link.open(link_pin) as before:
                if before.info.is_dead:
                    link_pin.unlink()
        link.pin(link_pin)
        return cls(array, link)

    @classmethod
    def beside(cls, other: Dispatcher, held: Map, attach_type: str, link_pin: Path) -> Dispatcher:
        """The dispatcher for ``held``, which is to take the place of the map of ``other``: to the other slot.

        That slot keeps what it holds. ``held`` may have sockets of the other map already, and none that come later can
        be added to it: see :meth:`aside`. Raises UnsupportedError, KernelError as :meth:`attach`.
        """
        slots, own, what = Map.by_id(other._slots.info.id), 1 - other._own, f"{attach_type} of map {held.info.label}"
        if slots.info.max_entries < len(_NAMES):
            raise UnsupportedError(
                f"the dispatcher of {what} was made by a hitless that knew of one slot: take the hook out of one "
                "release and into the next again, or keep the definition of the map",
                feature="socket hook on a changed map",
            )
        with _load(_socket_jump(attach_type), slots, own, what) as program:
            link = Link.attach(program, held.fd, attach_type, f"map {held.info.label}")
        link.pin(link_pin)
        return cls(slots, link, own)

    @classmethod
    def open(cls, slot_pin: Path, link_pin: Path) -> Dispatcher:
        """The dispatcher that is pinned there. Raises NodeError if the two do not belong together, KernelError."""
        slots, link = Map.open(slot_pin), Link.open(link_pin)
        with Program.by_id(link.info.program_id) as program:
            own = _slot_of(program.info.name)
            if program.map_ids != {slots.info.id} or own is None:
                raise NodeError(
                    f"the link {link_pin} runs program {program.info.id} ({program.info.name}), which is no dispatcher "
                    f"to the slot {slot_pin}: someone else updated the link; look at who uses this pin root",
                    link=str(link_pin),
                    slot=str(slot_pin),
                    program=program.info.id,
                )
            return cls(slots, link, own)

    @property
    def program_id(self) -> int:
        """The kernel's id of the program that jumps, which is what a map and its sockets have."""
        return self._link.info.program_id

    @property
    def info(self) -> LinkInfo:
        """The link's facts as they are now, but with the program in the slot; its id is 0 if all passes."""
        link = self._link.info
        name = self._slots.info.name
        target = int(name.removeprefix(_ON)) if name.startswith(_ON) else link.target_id
        file = 0
        if link.attach_type.startswith(("uprobe ", "uretprobe ")):
            with Program.by_id(link.program_id) as program:
                noted = program.info.name
            file = int(noted.removeprefix(_IN), 16) if noted.startswith(_IN) else 0
        return msgspec.structs.replace(link, program_id=self._runs(), target_id=target, file=file)

    def update(self, new: Program, old: Program) -> None:
        """Let all sockets run ``new`` from their next message on, if those of this map run ``old`` now.

        A slot has no compare-and-swap: this looks right before it writes, so that it does not see one who writes in
        the microseconds between. Programs that had begun may run on; wait for them as after any cutover. Raises
        NodeError if the slot has another program, KernelError (EINVAL: ``new`` was loaded as another type).
        """
        self.update_own(new, old)
        _fill(self._slots, new)

    def update_own(self, new: Program, old: Program) -> None:
        """The same for the sockets alone that got the dispatcher of this map, or of one before the last."""
        runs = self._runs()
        if runs != old.info.id:
            raise NodeError(
                f"the slot of link {self._link.info.id} has program {runs}, not {old.info.id} as expected: someone "
                "else changed it meanwhile; look at who uses this pin root, then plan again",
                link=self._link.info.id,
                program=runs,
                expected=old.info.id,
            )
        self._slots.update(_number(self._own), _descriptor(new))

    @contextmanager
    def aside(self, held: Map, attach_type: str, link_pin: Path, spare: Path) -> Iterator[None]:
        """Take the dispatcher off ``held``, its map, meanwhile: a map without a program takes sockets that have one.

        What is added meanwhile and has none gets none: see :func:`hitless.kernel.socket_programs.give`. Who is killed
        here leaves a link that is dead, see :meth:`attach_again`. Raises KernelError.
        """
        self._link.detach()
        try:
            yield
        finally:
            self.attach_again(held, attach_type, link_pin, spare)

    def attach_again(self, held: Map, attach_type: str, link_pin: Path, spare: Path) -> None:
        """Attach the dispatcher, which was detached, to ``held`` again by a link that takes the place of the dead one.

        It is pinned at ``spare`` before; one that is there is of somebody who was killed here. Raises KernelError.
        """
        if os.path.lexists(spare):
            with Link.open(spare) as left:
                left.detach()  # at once; without its pin it would hold the map's hook for a moment more
            spare.unlink()
        with Program.by_id(self._link.info.program_id) as program:
            link = Link.attach(program, held.fd, attach_type, f"map {held.info.label}")
        link.pin(spare)
        move(spare, link_pin)
        self._link.close()
        self._link = link

    def detach(self) -> None:
        """Take the dispatcher off its map: sockets that are added later get none.

        Those that have it keep it, and run what is in the slot as long as the slot is pinned; then all passes. On other
        hooks all passes from now on, and the dispatcher is gone with the pins.
        """
        if self._link.info.type == "sockmap":
            self._link.detach()
        else:
            self._slots.delete(_number(self._own))

    def close(self) -> None:
        """Give the descriptors back; the pins keep the hook working."""
        self._slots.close()
        self._link.close()

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runs(self) -> int:
        return int.from_bytes(self._slots.lookup(_number(self._own)) or b"", sys.byteorder)


class Slots:
    """The slots of a map's hook whose dispatcher no link holds: any number of dispatchers jump to the first of them."""

    def __init__(self, array: Map) -> None:
        """Take it over; see :meth:`make` and :meth:`open`."""
        self._array = array

    @classmethod
    def make(cls, first: Program, pin: Path) -> Slots:
        """Those pinned at ``pin``, or new ones, with ``first`` in them. Raises KernelError (EINVAL: see :meth:`fill`).
        """
        kept = os.path.lexists(pin)
        array = Map.open(pin) if kept else create(_PROG_ARRAY, _NAMES[0], 4, 4, len(_NAMES))
        made = cls(array)
        made.fill(first)
        if not kept:
            array.pin(pin)
        return made

    @classmethod
    def open(cls, pin: Path) -> Slots:
        """Those that are pinned there. Raises KernelError."""
        return cls(Map.open(pin))

    @property
    def program_id(self) -> int:
        """The program in the slots; 0 if all passes."""
        return int.from_bytes(self._array.lookup(_number(0)) or b"", sys.byteorder)

    def has(self, program_id: int) -> bool:
        """Whether that program is a dispatcher to these slots; false if it is gone. Raises KernelError."""
        if not is_dispatcher(program_id):
            return False
        with Program.by_id(program_id) as program:
            return bool(program.map_ids == {self._array.info.id})

    def fill(self, program: Program) -> None:
        """Let all who have a dispatcher to these run ``program`` from their next message on.

        Raises KernelError (EINVAL: it was loaded for another attach type than what the slots had first).
        """
        _fill(self._array, program)

    def dispatcher(self, attach_type: str) -> Program:
        """A new one. Raises KernelError."""
        return _load(_socket_jump(attach_type), self._array, 0, attach_type)

    def close(self) -> None:
        """Give the descriptor back."""
        self._array.close()


def jump_for(hook: str, target: str) -> Jump:
    """What a dispatcher of ``hook`` is, which is no map's. Raises UnsupportedError if the kernel has no ``target``."""
    if hook != "tp_btf":
        return JUMPS[hook]
    function = lib().libbpf_find_vmlinux_btf_id(target.encode(), attach_number("trace_raw_tp"))
    if function < 0:
        raise UnsupportedError(
            f"this kernel tells of no tracepoint {target}: it has none, or no BTF of its own (/sys/kernel/btf/vmlinux)",
            feature=f"tp_btf/{target}",
        )
    return Jump("tracing", 0, "trace_raw_tp", function)


def attached_program(held: Map, attach_type: str) -> int:
    """The id of the program of ``held`` that sockets get when they are added, however it was attached; 0 if none.

    Raises KernelError (EBUSY: asked for one kind of verdict while the map has the other).
    """
    ids, count = ffi.new("__u32[1]"), ffi.new("__u32 *", 1)
    result = lib().bpf_prog_query(held.fd, attach_number(attach_type), 0, ffi.NULL, ids, count)
    check(result, "BPF_PROG_QUERY", f"{attach_type} of map {held.info.label}")
    return int(ids[0])


def is_dispatcher(program_id: int) -> bool:
    """Whether a program is a dispatcher, by its name; false if it is gone. Raises KernelError."""
    try:
        with Program.by_id(program_id) as program:
            return _slot_of(program.info.name) is not None
    except KernelError as error:
        if error.facts["errno"] != errno.ENOENT:
            raise
        return False


def _slot_of(name: str) -> int | None:
    """The slot that a dispatcher of this name jumps to, None if no dispatcher is called so."""
    if name.startswith(_IN):
        return 0
    return _NAMES.index(name) if name in _NAMES else None


def _socket_jump(attach_type: str, expected: str | None = None) -> Jump:
    hook = SOCKET_HOOKS.get(attach_type)
    if hook is None:
        raise UnsupportedError(
            f"no dispatcher is known for {attach_type}, only for {', '.join(SOCKET_HOOKS)}", feature=attach_type
        )
    return msgspec.structs.replace(hook, loaded_for=attach_type if expected is None else expected)


def _load(jump: Jump, slots: Map, own: int, what: str, title: str | None = None) -> Program:
    fields = {
        "expected_attach_type": attach_number(jump.loaded_for) if jump.loaded_for else 0,
        "attach_btf_id": jump.function,
    }
    code = _code(slots, own, jump.passing)
    name = title or _NAMES[own]
    return load_code(program_number(jump.program_type), name, code, f"the dispatcher of {what}", **fields)


def _fill(slots: Map, program: Program) -> None:
    for number in range(slots.info.max_entries):
        slots.update(_number(number), _descriptor(program))


def _number(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def _descriptor(program: Program) -> bytes:
    return _number(program.fd)


def _code(slots: Map, own: int, passing: int | None) -> bytes:
    asm = Assembler()
    asm.emit(MOV, R6, R1)
    asm.map(R2, slots.fd)
    asm.emit(MOV_IMM, R3, imm=own)  # a constant: the kernel makes a direct jump of it
    asm.call(_TAIL_CALL)  # does not come back, unless the slot is empty
    if passing is None:
        asm.emit(LOAD[4], R0, R6, 0)  # __sk_buff.len
    else:
        asm.emit(MOV_IMM, R0, imm=passing)
    asm.emit(EXIT)
    return asm.code()
