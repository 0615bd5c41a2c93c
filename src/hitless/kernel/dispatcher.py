"""A dispatcher: the program that a hook keeps for good, and that jumps to the one that is to run.

Hooks whose links cannot be updated (netfilter, tracepoints) have one, and so have sockmaps and sockhashes.

The kernel hands a socket the programs of a map when the socket is added, and never others after that: neither an
update of the map's link nor adding the socket again reaches it. So what sockets are given is a program of ours, which
tail-calls the only slot of a program array, and a switch is one write of that slot: every socket, old or new, runs the
new program from its next message on. Without a program in the slot, what comes passes.

The array is pinned before the map's first socket can be given the dispatcher. The kernel empties a program array when
the last reference from user space goes (descriptor or pin), and sockets keep their dispatcher longer than any process
lives.

A map of another shape has a dispatcher and a slot of its own: its sockets run the new program from the first on, and
those of the old map the old one until they are in the new map too. Then the old slot is updated to the new map's
dispatcher, and from there on one slot switches them all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.kernel.codegen import EXIT, LOAD, MOV, MOV_IMM, R0, R1, R2, R3, R6, Assembler
from hitless.kernel.libbpf import check, ffi, lib
from hitless.kernel.links import Link, LinkInfo
from hitless.kernel.maps import Map, create
from hitless.kernel.names import attach_number, program_number
from hitless.kernel.programs import Program, load_code

__all__ = ["JUMPS", "SOCKET_HOOKS", "Dispatcher", "Jump", "attached_program", "jump_for"]

_TAIL_CALL = 12  # bpf_tail_call
_PROG_ARRAY = 3  # BPF_MAP_TYPE_PROG_ARRAY
_SK_PASS = 1
_NF_ACCEPT = 1
_ON = "on_"  # a slot's name that begins so goes on with the number of its hook's target
_IN = "in_"  # a dispatcher's name that begins so goes on with the inode of the file that its hook is in
_FIRST = bytes(4)


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
    """The slot of one hook of a map, and the link by which the map has the dispatcher."""

    def __init__(self, slot: Map, link: Link) -> None:
        """Take both over; see :meth:`attach` and :meth:`open`."""
        self._slot = slot
        self._link = link

    @classmethod
    def attach(
        cls, held: Map, attach_type: str, first: Program, slot_pin: Path, link_pin: Path, expected: str | None = None
    ) -> Dispatcher:
        """Let the sockets that are added to ``held`` from now on run ``first``, until an update names another.

        ``expected`` is the attach type that ``first`` was loaded for, if it is not ``attach_type``; empty is none, as
        libbpf has it for programs of a section named just ``sk_skb``. The kernel binds the slot to it and to the type
        of the program, and refuses (EINVAL) what was loaded as something else, now and in updates. The dispatcher takes
        the place of a program that was attached without a link, whichever: look at :func:`attached_program` before. A
        slot that is pinned at ``slot_pin`` already, by one who was killed here, is used again: sockets may have its
        dispatcher. So is the place of a link that was detached.

        Raises KernelError (EBUSY: the map has a link of this type, or its other kind of verdict), UnsupportedError.
        """
        hook = SOCKET_HOOKS.get(attach_type)
        if hook is None:
            raise UnsupportedError(
                f"no dispatcher is known for {attach_type}, only for {', '.join(SOCKET_HOOKS)}", feature=attach_type
            )
        what = f"{attach_type} of map {held.info.label}"
        jump = msgspec.structs.replace(hook, loaded_for=attach_type if expected is None else expected)

        def link(program: Program) -> Link:
            return Link.attach(program, held.fd, attach_type, f"map {held.info.label}")

        return cls.put(jump, link, first, slot_pin, link_pin, what)

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
        file: int = 0,
    ) -> Dispatcher:
        """The same for any hook, which ``link_to`` attaches a program to.

        ``target_id`` and ``file`` are kept where the kernel does not tell of the link what it is attached to, see
        LinkInfo.
        """
        name = f"{_ON}{target_id}" if target_id else "dispatcher"
        kept = os.path.lexists(slot_pin)
        slot = Map.open(slot_pin) if kept else create(_PROG_ARRAY, name, 4, 4, 1)
        if kept and slot.info.name != name:
            slot_pin.unlink()  # of one who was killed here when something else was there
            kept, slot = False, create(_PROG_ARRAY, name, 4, 4, 1)
        kind, code = program_number(jump.program_type), _code(slot, jump.passing)
        fields = {
            "expected_attach_type": attach_number(jump.loaded_for) if jump.loaded_for else 0,
            "attach_btf_id": jump.function,
        }
        title = f"{_IN}{file:x}" if file else "dispatcher"
        with load_code(kind, title, code, f"the dispatcher of {what}", **fields) as program:
            if not kept:
                slot.update(_FIRST, _descriptor(first))
                slot.pin(slot_pin)
            try:
                link = link_to(program)
            except KernelError:
                if not kept:
                    slot_pin.unlink()
                raise
        if kept:
            slot.update(_FIRST, _descriptor(first))
        if os.path.lexists(link_pin):
            with Link.open(link_pin) as before:
                if before.info.is_dead:
                    link_pin.unlink()
        link.pin(link_pin)
        return cls(slot, link)

    @classmethod
    def open(cls, slot_pin: Path, link_pin: Path) -> Dispatcher:
        """The dispatcher that is pinned there. Raises NodeError if the two do not belong together, KernelError."""
        made = cls(Map.open(slot_pin), Link.open(link_pin))
        with Program.by_id(made._link.info.program_id) as program:
            if program.map_ids != {made._slot.info.id}:
                raise NodeError(
                    f"the link {link_pin} runs program {program.info.id} ({program.info.name}), which is no dispatcher "
                    f"to the slot {slot_pin}: someone else updated the link; look at who uses this pin root",
                    link=str(link_pin),
                    slot=str(slot_pin),
                    program=program.info.id,
                )
        return made

    @property
    def program_id(self) -> int:
        """The kernel's id of the program that jumps, which is what a map and its sockets have."""
        return self._link.info.program_id

    @property
    def info(self) -> LinkInfo:
        """The link's facts as they are now, but with the program in the slot; its id is 0 if all passes."""
        link = self._link.info
        name = self._slot.info.name
        target = int(name.removeprefix(_ON)) if name.startswith(_ON) else link.target_id
        file = 0
        if link.attach_type.startswith(("uprobe ", "uretprobe ")):
            with Program.by_id(link.program_id) as program:
                noted = program.info.name
            file = int(noted.removeprefix(_IN), 16) if noted.startswith(_IN) else 0
        return msgspec.structs.replace(link, program_id=self._runs(), target_id=target, file=file)

    def update(self, new: Program, old: Program) -> None:
        """Let all sockets run ``new`` from their next message on, if they run ``old`` now.

        A slot has no compare-and-swap: this looks right before it writes, so that it does not see one who writes in
        the microseconds between. Programs that had begun may run on; wait for them as after any cutover. Raises
        NodeError if the slot has another program, KernelError (EINVAL: ``new`` was loaded as another type).
        """
        runs = self._runs()
        if runs != old.info.id:
            raise NodeError(
                f"the slot of link {self._link.info.id} has program {runs}, not {old.info.id} as expected: someone "
                "else changed it meanwhile; look at who uses this pin root, then plan again",
                link=self._link.info.id,
                program=runs,
                expected=old.info.id,
            )
        self._slot.update(_FIRST, _descriptor(new))

    def detach(self) -> None:
        """Take the dispatcher off its map: sockets that are added later get none.

        Those that have it keep it, and run what is in the slot as long as the slot is pinned; then all passes. On other
        hooks all passes from now on, and the dispatcher is gone with the pins.
        """
        if self._link.info.type == "sockmap":
            self._link.detach()
        else:
            self._slot.delete(_FIRST)

    def close(self) -> None:
        """Give the descriptors back; the pins keep the hook working."""
        self._slot.close()
        self._link.close()

    def __enter__(self) -> Dispatcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _runs(self) -> int:
        return int.from_bytes(self._slot.lookup(_FIRST) or b"", sys.byteorder)


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


def _descriptor(program: Program) -> bytes:
    return program.fd.to_bytes(4, sys.byteorder)


def _code(slot: Map, passing: int | None) -> bytes:
    asm = Assembler()
    asm.emit(MOV, R6, R1)
    asm.map(R2, slot.fd)
    asm.emit(MOV_IMM, R3, imm=0)  # a constant: the kernel makes a direct jump of it
    asm.call(_TAIL_CALL)  # does not come back, unless the slot is empty
    if passing is None:
        asm.emit(LOAD[4], R0, R6, 0)  # __sk_buff.len
    else:
        asm.emit(MOV_IMM, R0, imm=passing)
    asm.emit(EXIT)
    return asm.code()
