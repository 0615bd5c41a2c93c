"""Binding connections that are older than a board of dispatchers, so that they can be counted.

Nothing leads from a cgroup to its sockets. But an iterator program can visit every file of every task, and the socket
behind it, whatever its network namespace is. It does not see sockets that no task has as a file: not yet accepted,
closed but still sending, on their way in a message to another process, or of a task in another PID namespace.
"""

from __future__ import annotations

from collections.abc import Collection

from hitless.kernel.codegen import (
    ATOMIC,
    CMPXCHG,
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
    R8,
    STORE,
    Assembler,
)  # fmt: skip
from hitless.kernel.iterators import Iterator
from hitless.kernel.maps import Map, create
from hitless.kernel.per_entry import Scratch, count
from hitless.kernel.vmlinux import offsets

__all__ = ["bind_elders"]

_STORAGE_GET, _SOCK_FROM_FILE = 107, 162  # bpf_sk_storage_get, bpf_sock_from_file
_F_CREATE = 1  # BPF_SK_STORAGE_GET_F_CREATE
_HASH = 1  # BPF_MAP_TYPE_HASH
_FILE = 24  # in struct bpf_iter__task_file
_INET, _INET6 = 2, 10  # AF_*
_CLOSED, _LISTENING = 7, 10  # TCP_*, and a datagram socket that is not connected is closed
_BOUND = 0  # a counter


def bind_elders(storage: Map, epoch: int, cgroups: Collection[int]) -> int:
    """Give every connection in the cgroups with these ids ``epoch`` in ``storage``, unless it has one.

    Returns how many got it. Sockets that are not connected stay as they are. Raises UnsupportedError if this kernel
    does not tell how a socket is kept, KernelError.
    """
    with create(_HASH, "board_cgroups", 8, 1, max(1, len(cgroups))) as wanted:
        for each in cgroups:
            wanted.update(each.to_bytes(8, "little"), b"\1")
        scratch = Scratch("board_elders")
        iterator = Iterator.load("task_file", _binding(storage, epoch, wanted, scratch), "board_elders")
        try:
            iterator.run(storage)
        finally:
            iterator.close()
            scratch.map.close()
        return scratch[_BOUND]


# Registers: R6 the socket, R7 its word.
def _binding(storage: Map, epoch: int, wanted: Map, scratch: Scratch) -> bytes:
    place = offsets(
        "a socket", "connections older than the dispatchers cannot be counted",
        "socket.sk", "sock_common.skc_family", "sock_common.skc_state", "sock.sk_cgrp_data", "sock_cgroup_data.cgroup",
        "cgroup.kn", "kernfs_node.id",
    )  # fmt: skip
    asm = Assembler()
    asm.emit(LOAD[8], R1, R1, _FILE)
    asm.emit(JEQ_IMM, R1, off="exit", imm=0)  # the last call, after all files, has none
    asm.call(_SOCK_FROM_FILE)
    asm.emit(JEQ_IMM, R0, off="exit", imm=0)
    asm.emit(LOAD[8], R6, R0, place["socket.sk"])
    asm.emit(JEQ_IMM, R6, off="exit", imm=0)
    asm.emit(LOAD[2], R1, R6, place["sock_common.skc_family"])
    asm.emit(JEQ_IMM, R1, off="internet", imm=_INET)
    asm.emit(JNE_IMM, R1, off="exit", imm=_INET6)
    asm.label("internet")
    asm.emit(LOAD[1], R1, R6, place["sock_common.skc_state"])
    asm.emit(JEQ_IMM, R1, off="exit", imm=_CLOSED)
    asm.emit(JEQ_IMM, R1, off="exit", imm=_LISTENING)

    at = place["sock.sk_cgrp_data"] + place["sock_cgroup_data.cgroup"]
    asm.emit(LOAD[8], R1, R6, at)
    asm.emit(LOAD[8], R1, R1, place["cgroup.kn"])
    asm.emit(LOAD[8], R1, R1, place["kernfs_node.id"])
    asm.emit(STORE[8], FP, R1, -8)
    asm.map(R1, wanted.fd)
    asm.pointer(R2, FP, -8)
    asm.call(LOOKUP)
    asm.emit(JEQ_IMM, R0, off="exit", imm=0)

    asm.map(R1, storage.fd)
    asm.emit(MOV, R2, R6)
    asm.emit(MOV_IMM, R3, imm=0)
    asm.emit(MOV_IMM, R4, imm=_F_CREATE)
    asm.call(_STORAGE_GET)
    asm.emit(JEQ_IMM, R0, off="exit", imm=0)  # no memory: it stays an elder that nobody counts
    asm.emit(MOV, R7, R0)
    asm.emit(MOV_IMM, R8, imm=epoch)
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(ATOMIC[4], R7, R8, 0, CMPXCHG)
    asm.emit(JNE_IMM, R0, off="exit", imm=0)
    count(asm, scratch, _BOUND)
    asm.label("exit")
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)
    return asm.code()
