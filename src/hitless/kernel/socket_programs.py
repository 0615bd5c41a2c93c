"""Which program of a sockmap or sockhash each of its sockets runs, and giving sockets another one.

A socket takes the programs of a map when it is added, whatever map that is: they are the socket's from then on, and go
on when it leaves that map. Adding it to a map that has a program of a kind that the socket has already is refused
(EBUSY), even if it is the same program. So

- a socket without a program is given one by adding it to a map that has it (:func:`give`), which may go again;
- a verdict on received data ends when the socket is taken out of any map that has such a verdict, whichever. So a map
  beside takes it away, without the socket leaving a map that is in use, and another gives the next (:func:`hand_over`);
- a verdict on sent messages (sk_msg) ends with the socket, or when it is in no map any more, which loses what was
  redirected to it and is not read yet. It can only be told (:func:`programs_of_sockets`).
"""

from __future__ import annotations

import errno
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from hitless.errors import UnsupportedError
from hitless.kernel.codegen import (
    AND_IMM,
    DELETE,
    EXIT,
    FP,
    JEQ_IMM,
    JNE_IMM,
    LOAD,
    LOOKUP,
    MOV,
    MOV_IMM,
    R0,
    R1,
    R2,
    R3,
    R4,
    R6,
    R7,
    R9,
    SEQ_WRITE,
    STORE,
    STORE_IMM,
    UPDATE,
    Assembler,
)  # fmt: skip
from hitless.kernel.iterators import Iterator as Pass
from hitless.kernel.links import Link
from hitless.kernel.maps import ANY, Map, create
from hitless.kernel.namespaces import Namespace, entered
from hitless.kernel.programs import Program
from hitless.kernel.sockets import Adder, Sockets, create_base, list_sockets
from hitless.kernel.vmlinux import offsets

__all__ = ["Given", "give", "hand_over", "programs_of_sockets"]

_COOKIE, _READ_KERNEL = 46, 113  # bpf_get_socket_cookie, bpf_probe_read_kernel
_HASH, _SOCKMAP = 1, 15  # BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_SOCKMAP
_SOCKET_OF_MAP = 24  # in struct bpf_iter__sockmap, behind the pointers to meta, map and key
_SOCKET_OF_TCP = 8  # in struct bpf_iter__tcp, behind the pointer to meta
_UNTOUCHED = 1  # an outcome that no call has

_PLACES = {
    "sk_msg_verdict": "sk_psock_progs.msg_parser",
    "sk_skb_stream_parser": "sk_psock_progs.stream_parser",
    "sk_skb_stream_verdict": "sk_psock_progs.stream_verdict",
    "sk_skb_verdict": "sk_psock_progs.skb_verdict",
}
_WAY = ("sock.sk_user_data", "sk_psock.progs", "bpf_prog.aux", "bpf_prog_aux.id")
_VERDICTS = ("sk_skb_stream_verdict", "sk_skb_verdict")


class Given(msgspec.Struct, frozen=True):
    """How many sockets got the program, and how many did not, by the reason."""

    given: int
    left: dict[str, int]


def programs_of_sockets(held: Map, attach_type: str) -> dict[int, int]:
    """The id of the program that each socket of ``held`` runs for ``attach_type``, by its cookie; 0 is none.

    Raises UnsupportedError if this kernel does not tell where it keeps that, KernelError.
    """
    asm = Assembler()
    asm.emit(MOV, R9, R1)
    asm.emit(LOAD[8], R6, R1, _SOCKET_OF_MAP)
    asm.emit(JEQ_IMM, R6, off="end", imm=0)
    asm.emit(MOV, R1, R6)
    asm.call(_COOKIE)
    asm.emit(STORE[8], FP, R0, -16)
    asm.emit(STORE_IMM[8], FP, 0, -8, 0)
    kept = offsets("the programs of a socket", "nobody can say which sockets run which", *_WAY, *_PLACES.values())
    program = kept["sk_psock.progs"] + kept[_PLACES[attach_type]]
    for offset in (kept["sock.sk_user_data"], program, kept["bpf_prog.aux"]):
        _follow(asm, offset, 8)
        asm.emit(LOAD[8], R6, FP, -8)
        asm.emit(AND_IMM, R6, imm=-8)  # the low bits of the first are flags of the socket's
        asm.emit(JEQ_IMM, R6, off="none", imm=0)
    _follow(asm, kept["bpf_prog_aux.id"], 4)
    asm.emit(LOAD[4], R6, FP, -8)
    asm.label("none")
    asm.emit(STORE[8], FP, R6, -8)
    asm.emit(LOAD[8], R1, R9, 0)  # meta
    asm.emit(LOAD[8], R1, R1, 0)  # meta->seq
    asm.pointer(R2, FP, -16)
    asm.emit(MOV_IMM, R3, imm=16)
    asm.call(SEQ_WRITE)
    _end(asm)
    iterator = Pass.load("sockmap", asm.code(), "socket_programs")
    rows = np.frombuffer(iterator.run(held), np.uint64).reshape(-1, 2)
    iterator.close()
    return dict(zip(rows[:, 0].tolist(), rows[:, 1].tolist(), strict=True))


def give(held: Map, attach_type: str, program: Program) -> Given:
    """Give ``program`` to each socket of ``held`` that has none for ``attach_type``: it came while the map had none.

    Received data that waited before is seen by a verdict when more comes, unless it is read before. Where this must be
    quick, ask :func:`programs_of_sockets` for something first: it reads the kernel's types once in a process, which
    takes half a second. Raises UnsupportedError as that does, KernelError.
    """
    running = programs_of_sockets(held, attach_type)
    sockets = {key: cookie for key, cookie in list_sockets(held).items() if not running.get(cookie)}
    with _beside(sockets) as giver, _attached(giver, program, attach_type):
        outcomes = _add(held, sockets, giver)
    return _told(outcome for outcome in outcomes if outcome != -errno.EBUSY)  # it came with one after the look


def hand_over(held: Map, attach_type: str, program: Program, namespaces: Iterable[Namespace]) -> Given:
    """Let the sockets of ``held`` run ``program`` for ``attach_type`` instead of what they were added under.

    Each is changed under its own lock: data that comes meanwhile waits for the new program, and no socket leaves
    ``held``. Only TCP sockets of the network ``namespaces`` can be locked; the others are left. Sockets that
    are added meanwhile get what is attached to ``held``, so attach ``program`` there first. It may be repeated. Raises
    UnsupportedError for attach types whose programs the kernel does not let go of, and where a stream parser may hold
    half a message; KernelError.
    """
    if attach_type not in _VERDICTS:
        raise UnsupportedError(
            f"sockets that are in map {held.info.label} already keep their {attach_type} program until they close: "
            "the kernel takes it from a socket only together with what is queued for it",
            feature=attach_type,
        )
    if parsed := sum(map(bool, programs_of_sockets(held, "sk_skb_stream_parser").values())):
        raise UnsupportedError(
            f"{parsed} sockets of map {held.info.label} have a stream parser, which may hold the first part of a "
            f"message: their {attach_type} program stays until they close",
            feature="sk_skb_stream_parser",
            sockets=parsed,
        )
    sockets = list_sockets(held)
    with _beside(sockets) as taker, _beside(sockets) as giver:
        added = _add(held, sockets, taker)  # while it has no program, every socket may come
        wanted = create(_HASH, "wanted", 8, 8, max(1, len(sockets)))
        for number, cookie in enumerate(sockets.values()):
            wanted.update(_bytes(cookie, 8), _bytes(number, 4) + _bytes(_UNTOUCHED, 4))
        with _attached(taker, program, attach_type), _attached(giver, program, attach_type):
            exchanger = Pass.load("tcp", _exchange_code(wanted, taker, giver), "exchange")
            for namespace in namespaces:
                with entered(namespace):
                    exchanger.open(held)
                while exchanger.read(1 << 15):
                    pass
            exchanger.close()
        found = [wanted.lookup(_bytes(cookie, 8)) or b"" for cookie in sockets.values()]
        wanted.close()
    changed = [int.from_bytes(value[4:], sys.byteorder, signed=True) for value in found]
    return _told(after if before == 0 else before for before, after in zip(added, changed, strict=True))


def _exchange_code(wanted: Map, taker: Map, giver: Map) -> bytes:
    """For each TCP socket that is wanted: out of the taker, which ends its verdict, and into the giver."""
    asm = Assembler()
    asm.emit(LOAD[8], R6, R1, _SOCKET_OF_TCP)
    asm.emit(JEQ_IMM, R6, off="end", imm=0)
    asm.emit(MOV, R1, R6)
    asm.call(_COOKIE)
    asm.emit(STORE[8], FP, R0, -8)
    asm.map(R1, wanted.fd)
    asm.pointer(R2, FP, -8)
    asm.call(LOOKUP)
    asm.emit(JEQ_IMM, R0, off="end", imm=0)
    asm.emit(MOV, R7, R0)
    asm.emit(LOAD[4], R1, R7, 0)
    asm.emit(STORE[4], FP, R1, -12)
    asm.map(R1, taker.fd)
    asm.pointer(R2, FP, -12)
    asm.call(DELETE)
    asm.emit(JNE_IMM, R0, off="note", imm=0)  # it was refused there, or it closes
    asm.map(R1, giver.fd)
    asm.pointer(R2, FP, -12)
    asm.emit(MOV, R3, R6)
    asm.emit(MOV_IMM, R4, imm=ANY)
    asm.call(UPDATE)
    asm.label("note")
    asm.emit(STORE[4], R7, R0, 4)
    _end(asm)
    return asm.code()


def _told(outcomes: Iterable[int | None]) -> Given:
    """Counts of outcomes; None is a socket that was gone, which needs nothing any more."""
    counts = Counter(outcome for outcome in outcomes if outcome is not None)
    given = counts.pop(0, 0)
    names = {_UNTOUCHED: "no TCP socket of these network namespaces"}
    return Given(given, {names.get(each) or errno.errorcode.get(-each, str(each)): n for each, n in counts.items()})


@contextmanager
def _beside(sockets: Sockets) -> Iterator[Map]:
    """A sockmap with room for as many; freed, it leaves sockets the programs that they have by then."""
    with create(_SOCKMAP, "beside", 4, 8, max(1, len(sockets))) as made:
        yield made


@contextmanager
def _attached(held: Map, program: Program, attach_type: str) -> Iterator[None]:
    # Detached before the map goes: a socket that leaves a map with a verdict loses its own.
    with Link.attach(program, held.fd, attach_type, f"map {held.info.label}"):
        yield


def _add(held: Map, sockets: Sockets, target: Map) -> list[int | None]:
    """Add sockets of ``held`` to a sockmap, numbered as they are listed; what came of each."""
    if not sockets:
        return []
    keys = np.frombuffer(b"".join(sockets), np.uint8).reshape(len(sockets), -1)
    numbers = np.arange(len(sockets), dtype=np.uint32).reshape(-1, 1).view(np.uint8)
    with create_base(held, "beside_base") as base:
        adder = Adder("beside", held, target, base)
        outcomes = adder.add(keys, list(sockets.values()), numbers, [ANY] * len(sockets))
        adder.close()
    return outcomes


def _follow(asm: Assembler, offset: int, size: int) -> None:
    """``size`` bytes from R6 + ``offset`` in the kernel to the stack, where no pointer is followed that may be bad."""
    asm.pointer(R1, FP, -8)
    asm.emit(MOV_IMM, R2, imm=size)
    asm.pointer(R3, R6, offset)
    asm.call(_READ_KERNEL)


def _end(asm: Assembler) -> None:
    asm.label("end")
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)


def _bytes(number: int, size: int) -> bytes:
    return number.to_bytes(size, sys.byteorder)
