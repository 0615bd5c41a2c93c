"""Which program of a sockmap or sockhash each of its sockets runs, and giving sockets another one.

A socket takes the programs of a map when it is added, whatever map that is: they are the socket's from then on, and go
on when it leaves that map. Adding it to a map that has a program of a kind that the socket has already is refused
(EBUSY), even if it is the same program. So

- a socket without a program is given one by adding it to a map that has it (:func:`give`), which may go again;
- from one that has a program nothing takes it without harm: a verdict on sent messages (sk_msg) ends when the socket is
  in no map any more, which loses what was redirected to it and is not read yet; one on received data ends when it
  leaves any map that has such a verdict, and data comes meanwhile. It can be told (:func:`programs_of_sockets`), and
  goes over to another under the socket's lock where nothing is queued (:mod:`hitless.kernel.handover`).
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from hitless.kernel.codegen import (
    AND_IMM,
    EXIT,
    FP,
    JEQ_IMM,
    LOAD,
    MOV,
    MOV_IMM,
    R0,
    R1,
    R2,
    R3,
    R6,
    R9,
    SEQ_WRITE,
    STORE,
    STORE_IMM,
    Assembler,
)  # fmt: skip
from hitless.kernel.iterators import Iterator as Pass
from hitless.kernel.map_places import MapPlace
from hitless.kernel.maps import ANY, Map, create
from hitless.kernel.programs import Program
from hitless.kernel.sockets import Adder, Sockets, create_base, list_sockets
from hitless.kernel.vmlinux import offsets

__all__ = ["Given", "give", "programs_of_sockets"]

_COOKIE, _READ_KERNEL = 46, 113  # bpf_get_socket_cookie, bpf_probe_read_kernel
_SOCKMAP = 15  # BPF_MAP_TYPE_SOCKMAP
_SOCKET_OF_MAP = 24  # in struct bpf_iter__sockmap, behind the pointers to meta, map and key

_PLACES = {
    "sk_msg_verdict": "sk_psock_progs.msg_parser",
    "sk_skb_stream_parser": "sk_psock_progs.stream_parser",
    "sk_skb_stream_verdict": "sk_psock_progs.stream_verdict",
    "sk_skb_verdict": "sk_psock_progs.skb_verdict",
}
_WAY = ("sock.sk_user_data", "sk_psock.progs", "bpf_prog.aux", "bpf_prog_aux.id")


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
    with _beside(sockets) as giver:
        MapPlace(giver.info.id, attach_type).put(program)
        outcomes = _add(held, sockets, giver)
    return _told(outcome for outcome in outcomes if outcome != -errno.EBUSY)  # it came with one after the look


def _told(outcomes: Iterable[int | None]) -> Given:
    """Counts of outcomes; None is a socket that was gone, which needs nothing any more."""
    counts = Counter(outcome for outcome in outcomes if outcome is not None)
    given = counts.pop(0, 0)
    return Given(given, {errno.errorcode.get(-each, str(each)): count for each, count in counts.items()})


@contextmanager
def _beside(sockets: Sockets) -> Iterator[Map]:
    """A sockmap with room for as many; freed, it leaves sockets the programs that they have by then."""
    # A socket that leaves a map with a verdict loses its own. But the kernel takes the programs of a map off when its
    # last descriptor goes, also that of one who is killed here, and the sockets out of it only after that.
    with create(_SOCKMAP, "beside", 4, 8, max(1, len(sockets))) as made:
        yield made


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
