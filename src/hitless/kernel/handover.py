"""Sockets of a map go from the program that they were added under to the one that is attached to the map now.

The kernel hands a socket the programs of a map when the socket is added, together with a psock, which has also what is
queued; it lets go of both when the socket has left its last map and nobody is in the middle of a call on it. So a
socket is taken out of its map and added again, under the same key. An iterator over TCP sockets does that, since it
holds the socket's lock: what is queued cannot change meanwhile. It does so only if nothing is queued and nobody but the
map refers to the psock.

Who comes to take hold of the psock between that look and the removal, which no lock keeps out, keeps it alive with the
old program, and the map refuses the socket (EBUSY). Then it goes into a map beside, which has no program and keeps the
psock, and is tried again. Both that map and the keys are pinned while there may be sockets in it: who is killed leaves
them to the next.

Between removal and addition, microseconds, the socket has no program and is not found under its key. A message that is
sent on it in just that moment goes by without one; what is redirected to it then fails (EPIPE, or as the program says).
Received data waits for the lock.
"""

from __future__ import annotations

import errno
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np

from hitless.errors import GoneError, NodeError
from hitless.kernel.base import padded
from hitless.kernel.bpffs import make_directory
from hitless.kernel.codegen import (
    AND_IMM,
    DELETE,
    EXIT,
    FP,
    JA,
    JEQ,
    JEQ_IMM,
    JNE,
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
    R8,
    R9,
    RSH_IMM,
    STORE,
    STORE_IMM,
    SUB,
    UPDATE,
    Assembler,
    copy_code,
)  # fmt: skip
from hitless.kernel.iterators import Iterator as Pass
from hitless.kernel.maps import ANY, NOEXIST, Map, create
from hitless.kernel.namespaces import Namespace, entered
from hitless.kernel.sockets import Adder, create_base, list_sockets
from hitless.kernel.vmlinux import offsets

__all__ = ["Handover"]

_COOKIE, _READ_KERNEL = 46, 113  # bpf_get_socket_cookie, bpf_probe_read_kernel
_HASH, _SOCKMAP = 1, 15  # BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_SOCKMAP
_SOCKET_OF_TCP = 8  # in struct bpf_iter__tcp, behind the pointer to meta
_IS_PSOCK, _FLAGS = 4, 7  # in the low bits of sock.sk_user_data
_PAUSE = 0.001  # seconds between two passes

# A record of one socket: its number beside, what came of it, its key.
_OUTCOME, _KEY = 4, 8
_UNSEEN, _IN_USE, _QUEUED, _ELSEWHERE = 1, 2, 3, 4
_REASONS = {
    _UNSEEN: "are no TCP sockets of a network namespace that can be found",
    _IN_USE: "are in the middle of a call, such as a read that waits",
    _QUEUED: "have data queued that nobody reads",
    _ELSEWHERE: "are in another map as well",
}
_STACK_KEY = 32  # the key is on the stack below this

_MEMBERS = (
    "sock.sk_user_data", "sk_psock.refcnt", "sk_psock.apply_bytes", "sk_psock.cork", "sk_psock.ingress_msg",
    "sk_psock.ingress_skb", "sk_psock.strp", "strparser.skb_head", "sk_psock.link", "sk_buff_head.qlen",
    "sk_psock_link.link_raw", "sk_psock_link.map", "bpf_map.id", "bpf_shtab_elem.key", "bpf_stab.sks",
)  # fmt: skip


class Handover:
    """Sockets of ``held``, by their cookies, that are to get what is attached to it now."""

    def __init__(self, held: Map, room: Path, name: str, cookies: Iterable[int] = ()) -> None:
        """What it keeps is pinned in ``room`` under ``name``, or opened if somebody who was killed left it there.

        Raises UnsupportedError if this kernel does not tell what is queued for a socket, KernelError.
        """
        self._held = held
        self._pins = room / f"{name}@beside", room / f"{name}@wanted"
        wanted = list(cookies)
        size = _KEY + padded(held.info.key_size)
        if self.was_begun(room, name):
            self._beside, self._wanted = (Map.open(pin) for pin in self._pins)
            return
        self._wanted = create(_HASH, "wanted", 8, size, max(1, len(wanted)))
        self._beside = create(_SOCKMAP, "beside", 4, 8, max(1, len(wanted)))
        for number, cookie in enumerate(wanted):
            record = number.to_bytes(4, sys.byteorder) + _UNSEEN.to_bytes(4, sys.byteorder)
            self._wanted.update(cookie.to_bytes(8, sys.byteorder), record.ljust(size, b"\0"))
        make_directory(room, exist_ok=True)
        for pinned, pin in zip((self._beside, self._wanted), self._pins, strict=True):
            pin.unlink(missing_ok=True)
            pinned.pin(pin)

    @staticmethod
    def was_begun(room: Path, name: str) -> bool:
        """Whether somebody who was killed may have left sockets beside."""
        return (room / f"{name}@wanted").exists()

    def run(self, seconds: float) -> None:
        """Try each socket again until all are handed over or ``seconds`` are over; see :meth:`left`.

        Raises KernelError.
        """
        places = _all_namespaces()
        exchanger = Pass.load("tcp", self._code(), "hand_over")
        until = time.monotonic() + seconds
        try:
            while self.left() and time.monotonic() < until:
                gone = False
                for namespace in places:
                    try:
                        with entered(namespace):
                            exchanger.open(self._held)
                            while exchanger.read(1 << 15):
                                pass
                    except GoneError:
                        gone = True  # with a process by which it was found; others may be in it
                places = _all_namespaces() if gone else places
                time.sleep(_PAUSE)
        finally:
            exchanger.close()

    def left(self) -> dict[str, int]:
        """How many sockets of the map were not handed over, by the reason in words; those that closed do not count."""
        there = {*list_sockets(self._held).values(), *list_sockets(self._beside).values()}
        counts = Counter(outcome for cookie, outcome in self._outcomes().items() if cookie in there)
        return {_REASONS.get(each) or errno.errorcode.get(-each, str(each)): count for each, count in counts.items()}

    def put_back(self, aside: AbstractContextManager[None]) -> None:
        """Add those that are beside to the map again, with the program that they have, then unpin what was kept.

        ``aside`` keeps the map's program off it meanwhile: else it refuses who has one. Raises KernelError.
        """
        beside = list_sockets(self._beside)
        if beside:
            size = self._held.info.key_size
            records = [self._wanted.lookup(cookie.to_bytes(8, sys.byteorder)) or b"" for cookie in beside.values()]
            keys = np.frombuffer(b"".join(record[_KEY : _KEY + size] for record in records), np.uint8)
            numbers = np.frombuffer(b"".join(beside), np.uint8).reshape(-1, 4)
            with create_base(self._beside, "beside_base") as base:
                adder = Adder("back", self._beside, self._held, base)
                with aside:
                    adder.add(numbers, list(beside.values()), keys.reshape(-1, size), [NOEXIST] * len(beside))
                adder.close()
        for pin in reversed(self._pins):  # the sign that there may be sockets beside goes first
            pin.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Give the descriptors back."""
        self._beside.close()
        self._wanted.close()

    def _outcomes(self) -> dict[int, int]:
        """Of those that are not handed over, by their cookies."""
        found: dict[int, int] = {}
        for keys, values in self._wanted.batches():
            outcomes = values[:, _OUTCOME : _OUTCOME + 4].copy().view(np.int32)[:, 0].tolist()
            found.update(zip(keys.copy().view(np.uint64)[:, 0].tolist(), outcomes, strict=True))
        return {cookie: outcome for cookie, outcome in found.items() if outcome}

    def _code(self) -> bytes:
        at = offsets("what is queued for a socket", "no socket can be handed over to another program", *_MEMBERS)
        size = self._held.info.key_size
        key = -_STACK_KEY - padded(size)
        asm = Assembler()

        def read(base: int, offset: int, width: int = 8) -> None:
            """R1 = what is at ``base`` + ``offset`` in the kernel, where no pointer is followed that may be bad."""
            asm.pointer(R1, FP, -8)
            asm.emit(MOV_IMM, R2, imm=width)
            asm.pointer(R3, base, offset)
            asm.call(_READ_KERNEL)
            asm.emit(LOAD[width], R1, FP, -8)

        def add(target: Map, flags: int, at_key: int, offset: int) -> None:
            asm.map(R1, target.fd)
            asm.pointer(R2, at_key, offset)
            asm.emit(MOV, R3, R6)
            asm.emit(MOV_IMM, R4, imm=flags)
            asm.call(UPDATE)

        def remove(target: Map, at_key: int, offset: int) -> None:
            asm.map(R1, target.fd)
            asm.pointer(R2, at_key, offset)
            asm.call(DELETE)

        asm.emit(LOAD[8], R6, R1, _SOCKET_OF_TCP)
        asm.emit(JEQ_IMM, R6, off="end", imm=0)
        asm.emit(MOV, R1, R6)
        asm.call(_COOKIE)
        asm.emit(STORE[8], FP, R0, -16)
        asm.map(R1, self._wanted.fd)
        asm.pointer(R2, FP, -16)
        asm.call(LOOKUP)
        asm.emit(JEQ_IMM, R0, off="end", imm=0)
        asm.emit(MOV, R7, R0)
        asm.emit(LOAD[4], R1, R7, _OUTCOME)
        asm.emit(JEQ_IMM, R1, off="end", imm=0)

        read(R6, at["sock.sk_user_data"])
        asm.emit(MOV, R8, R1)
        asm.emit(AND_IMM, R1, imm=_IS_PSOCK)
        asm.emit(JEQ_IMM, R1, off="end", imm=0)
        asm.emit(AND_IMM, R8, imm=-1 - _FLAGS)
        read(R8, at["sk_psock.refcnt"], 4)
        asm.emit(JNE_IMM, R1, off="in_use", imm=1)
        for offset, width in (
            (at["sk_psock.apply_bytes"], 4),
            (at["sk_psock.cork"], 8),
            (at["sk_psock.ingress_skb"] + at["sk_buff_head.qlen"], 4),
            (at["sk_psock.strp"] + at["strparser.skb_head"], 8),  # the first part of a message
        ):
            read(R8, offset, width)
            asm.emit(JNE_IMM, R1, off="queued", imm=0)
        read(R8, at["sk_psock.ingress_msg"])  # a list that is empty leads to itself
        asm.pointer(R2, R8, at["sk_psock.ingress_msg"])
        asm.emit(JNE, R1, R2, "queued")
        read(R8, at["sk_psock.link"])
        asm.pointer(R2, R8, at["sk_psock.link"])
        asm.emit(JEQ, R1, R2, "end")
        asm.emit(MOV, R9, R1)
        read(R9, at["sk_psock_link.link_raw"])
        asm.emit(STORE[8], FP, R1, -24)
        read(R9, at["sk_psock_link.map"])
        asm.emit(MOV, R9, R1)
        read(R9, at["bpf_map.id"], 4)
        asm.emit(JEQ_IMM, R1, off="beside", imm=self._beside.info.id)
        asm.emit(JNE_IMM, R1, off="elsewhere", imm=self._held.info.id)

        for word in range(0, padded(size), 8):
            asm.emit(STORE_IMM[8], FP, 0, key + word, 0)
        if self._held.info.type == "sockhash":
            asm.emit(LOAD[8], R9, FP, -24)
            asm.pointer(R1, FP, key)
            asm.emit(MOV_IMM, R2, imm=size)
            asm.pointer(R3, R9, at["bpf_shtab_elem.key"])
            asm.call(_READ_KERNEL)
        else:
            read(R9, at["bpf_stab.sks"])
            asm.emit(LOAD[8], R2, FP, -24)
            asm.emit(SUB, R2, R1)
            asm.emit(RSH_IMM, R2, imm=3)
            asm.emit(STORE[4], FP, R2, key)
        remove(self._held, FP, key)
        asm.emit(JNE_IMM, R0, off="note", imm=0)
        asm.emit(JA, off="give")

        asm.label("beside")
        copy_code(asm, padded(size), R7, _KEY, FP, key)
        remove(self._beside, R7, 0)
        asm.emit(JNE_IMM, R0, off="note", imm=0)

        asm.label("give")
        add(self._held, NOEXIST, FP, key)
        asm.emit(JEQ_IMM, R0, off="note", imm=0)
        asm.emit(JEQ_IMM, R0, off="gone", imm=-errno.EEXIST)  # another socket has come to its key
        asm.emit(JNE_IMM, R0, off="note", imm=-errno.EBUSY)
        copy_code(asm, padded(size), FP, key, R7, _KEY)
        add(self._beside, ANY, R7, 0)
        asm.emit(JNE_IMM, R0, off="note", imm=0)
        add(self._held, NOEXIST, FP, key)  # who had taken hold may have let go since
        asm.emit(JNE_IMM, R0, off="in_use", imm=0)
        remove(self._beside, R7, 0)
        asm.label("gone")
        asm.emit(MOV_IMM, R0, imm=0)
        asm.emit(JA, off="note")

        for label, outcome in (("in_use", _IN_USE), ("queued", _QUEUED), ("elsewhere", _ELSEWHERE)):
            asm.label(label)
            asm.emit(MOV_IMM, R0, imm=outcome)
            asm.emit(JA, off="note")
        asm.label("note")
        asm.emit(STORE[4], R7, R0, _OUTCOME)
        asm.label("end")
        asm.emit(MOV_IMM, R0, imm=0)
        asm.emit(EXIT)
        return asm.code()


def _all_namespaces() -> list[Namespace]:
    """The network namespaces in which somebody runs, or that have a path where `ip netns` puts them.

    Sockets of one that may not be entered are left, and counted as such.
    """
    found: dict[tuple[int, int], Namespace] = {}
    for path in ("", *map(str, Path("/run/netns").glob("*")), *map(str, Path("/proc").glob("[0-9]*/ns/net"))):
        with suppress(NodeError):
            namespace = Namespace.at(path)
            found.setdefault((namespace.device, namespace.inode), namespace)
    return list(found.values())
