"""Programs over the sockets of a sockmap or sockhash: they tell which are there, add them to another map, remove them.

A socket is known to user space by its cookie. A program compares the cookie when it acts, so that it never takes one
socket for another that came to the same key meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hitless.kernel.base import padded
from hitless.kernel.codegen import (
    DELETE,
    EXIT,
    FP,
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
    SEQ_WRITE,
    STORE,
    UPDATE,
    Assembler,
    words,
)  # fmt: skip
from hitless.kernel.iterators import Iterator
from hitless.kernel.libbpf import options
from hitless.kernel.maps import Map, Rows, create

__all__ = ["Adder", "Remover", "Sockets", "create_base", "list_sockets", "probe_sockets"]

Sockets = dict[bytes, int]
"""Cookies of sockets by their key in a map."""

_COOKIE = 46  # bpf_get_socket_cookie
_KEY, _SOCKET = 16, 24  # in struct bpf_iter__sockmap, behind the pointers to meta and map
_HASH, _SOCKHASH = 1, 18  # BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_SOCKHASH
_NO_PREALLOC = 1  # BPF_F_NO_PREALLOC
_SLOTS = 4096

# A record of one socket: its cookie, flags of its update, whether that was done, what came of it, the new key.
_FLAGS, _DONE, _OUTCOME, _NEW_KEY = 8, 16, 24, 32


def create_base(source: Map, name: str) -> Map:
    """A hash of cookies by key of ``source``, with room for sockets that come while others are not known to be gone."""
    opts = options("bpf_map_create_opts", map_flags=_NO_PREALLOC)
    return create(_HASH, name, source.info.key_size, 8, 2 * source.info.max_entries, opts)


def list_sockets(held: Map) -> Sockets:
    """The sockets of ``held``. Raises KernelError with the verifier's log."""
    size = held.info.key_size
    asm = Assembler()
    _begin(asm, size)
    asm.emit(LOAD[8], R1, R9, 0)  # meta
    asm.emit(LOAD[8], R9, R1, 0)  # meta->seq
    asm.emit(MOV, R1, R9)
    asm.pointer(R2, FP, -8 - padded(size))  # the key, and the cookie behind it
    asm.emit(MOV_IMM, R3, imm=padded(size) + 8)
    asm.call(SEQ_WRITE)
    _end(asm)
    iterator = Iterator.load("sockmap", asm.code(), "list_sockets")
    rows = np.frombuffer(iterator.run(held), np.uint8).reshape(-1, padded(size) + 8)
    iterator.close()
    cookies = rows[:, padded(size) :].copy().view(np.uint64)[:, 0].tolist()
    return dict(zip((key.tobytes() for key in rows[:, :size]), cookies, strict=True))


def probe_sockets() -> None:
    """Load the programs for sockets. Raises KernelError, UnsupportedError: not all works here."""
    with create(_SOCKHASH, "probe", 4, 8, 1) as held, create_base(held, "probe_base") as base:
        Adder("probe", held, held, base).close()
        Remover("probe", held).close()
        list_sockets(held)


class _Visitor:
    """A program that does something with those sockets of a map that user space names by key and cookie."""

    def __init__(self, name: str, over: Map, new_key_size: int) -> None:
        self._over = over
        self._size = _NEW_KEY + padded(new_key_size)
        opts = options("bpf_map_create_opts", map_flags=_NO_PREALLOC)
        self._records = create(_HASH, f"sockets_{name}", over.info.key_size, self._size, _SLOTS, opts)

    def _load(self, name: str, action: Assembler) -> None:
        self._iterator = Iterator.load("sockmap", action.code(), name)

    def _visit(self, keys: Rows, records: Rows) -> list[int | None]:
        """The outcome for each record, None if its socket was not there."""
        outcomes: list[int | None] = []
        for start in range(0, len(keys), _SLOTS):
            part = keys[start : start + _SLOTS]
            self._records.write(part, records[start : start + _SLOTS])
            self._iterator.run(self._over)
            for key in part:
                found = np.frombuffer(self._records.lookup(key.tobytes()) or bytes(self._size), np.int64)
                outcomes.append(int(found[_OUTCOME // 8]) if found[_DONE // 8] else None)
                self._records.delete(key.tobytes())
        return outcomes

    def close(self) -> None:
        """Give the program back to the kernel."""
        self._iterator.close()
        self._records.close()


def _begin(asm: Assembler, size: int) -> None:
    """R9 the context, R6 the socket; the key on the stack, since helpers take none from a context, then the cookie."""
    asm.emit(MOV, R9, R1)
    asm.emit(LOAD[8], R6, R1, _SOCKET)
    asm.emit(JEQ_IMM, R6, off="end", imm=0)  # the last call, after all sockets, has none
    asm.emit(LOAD[8], R7, R1, _KEY)
    asm.emit(JEQ_IMM, R7, off="end", imm=0)
    key = -8 - padded(size)
    if size % 8:
        asm.emit(MOV_IMM, R1, imm=0)
        asm.emit(STORE[8], FP, R1, -16)
    for width, offset in words(0, size):
        asm.emit(LOAD[width], R1, R7, offset)
        asm.emit(STORE[width], FP, R1, key + offset)
    asm.emit(MOV, R1, R6)
    asm.call(_COOKIE)
    asm.emit(STORE[8], FP, R0, -8)


def _named(asm: Assembler, size: int, records: Map) -> None:
    """R8 the record of this socket; the end if there is none, or if it names another socket."""
    asm.map(R1, records.fd)
    asm.pointer(R2, FP, -8 - padded(size))
    asm.call(LOOKUP)
    asm.emit(MOV, R8, R0)
    asm.emit(JEQ_IMM, R8, off="end", imm=0)
    asm.emit(LOAD[8], R1, R8, 0)
    asm.emit(LOAD[8], R2, FP, -8)
    asm.emit(JNE, R1, R2, "end")


def _note(asm: Assembler) -> None:
    asm.emit(STORE[8], R8, R0, _OUTCOME)
    asm.emit(MOV_IMM, R1, imm=1)
    asm.emit(STORE[8], R8, R1, _DONE)


def _end(asm: Assembler) -> None:
    asm.label("end")
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)


class Adder(_Visitor):
    """Adds sockets of ``source`` to ``target``, and notes them in ``base``; they stay in ``source``."""

    def __init__(self, name: str, source: Map, target: Map, base: Map) -> None:
        """Raises KernelError with the verifier's log."""
        super().__init__(name, source, target.info.key_size)
        size = source.info.key_size
        asm = Assembler()
        _begin(asm, size)
        _named(asm, size, self._records)
        asm.map(R1, target.fd)
        asm.pointer(R2, R8, _NEW_KEY)
        asm.emit(MOV, R3, R6)
        asm.emit(LOAD[8], R4, R8, _FLAGS)
        asm.call(UPDATE)
        _note(asm)
        asm.emit(JNE_IMM, R0, off="end", imm=0)
        asm.map(R1, base.fd)
        asm.pointer(R2, FP, -8 - padded(size))
        asm.pointer(R3, FP, -8)
        asm.emit(MOV_IMM, R4, imm=0)
        asm.call(UPDATE)
        _note(asm)
        _end(asm)
        self._load(f"add_{name}", asm)

    def add(self, keys: Rows, cookies: list[int], new_keys: Rows, flags: list[int]) -> list[int | None]:
        """What BPF_MAP_UPDATE_ELEM made of each: 0, -errno, None if the socket was not there."""
        records = np.zeros((len(keys), self._size), np.uint8)
        records[:, :8] = np.array(cookies, np.uint64).reshape(-1, 1).view(np.uint8)
        records[:, _FLAGS : _FLAGS + 8] = np.array(flags, np.uint64).reshape(-1, 1).view(np.uint8)
        records[:, _NEW_KEY : _NEW_KEY + new_keys.shape[1]] = new_keys
        return self._visit(keys, records)


class Remover(_Visitor):
    """Takes sockets out of ``held``, if they are still those that are named."""

    def __init__(self, name: str, held: Map) -> None:
        """Raises KernelError with the verifier's log."""
        super().__init__(name, held, 0)
        size = held.info.key_size
        asm = Assembler()
        _begin(asm, size)
        _named(asm, size, self._records)
        asm.map(R1, held.fd)
        asm.pointer(R2, FP, -8 - padded(size))
        asm.call(DELETE)
        _note(asm)
        _end(asm)
        self._load(f"remove_{name}", asm)

    def remove(self, sockets: Mapping[bytes, int]) -> None:
        """Take out the sockets at these keys that have these cookies."""
        if not sockets:
            return
        keys = np.frombuffer(b"".join(sockets), np.uint8).reshape(len(sockets), -1)
        records = np.zeros((len(keys), self._size), np.uint8)
        records[:, :8] = np.array(list(sockets.values()), np.uint64).reshape(-1, 1).view(np.uint8)
        self._visit(keys, records)
