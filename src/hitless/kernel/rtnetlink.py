"""rtnetlink in the network namespace of this thread: libbpf's calls with the kernel's words, and what libbpf lacks."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys

from hitless.errors import KernelError
from hitless.kernel.libbpf import check, lib, messages, system_call

__all__ = ["ask", "attributes", "listed", "request"]

# Without an echo the answer about a queueing discipline goes to listeners only; an acknowledgement ends every wait.
_F_REQUEST, _F_ONE, _F_DUMP = 1, 0x4 | 0x8, 0x300
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_ROOM = 1 << 18

_WORDS = "Kernel error message: "  # what libbpf prints before the kernel's


def request(call: str, what: object, *arguments: object) -> None:
    """Let libbpf's function ``call`` make a request about ``what``.

    Raises KernelError, with the kernel's own words, if it had any, as its fact ``said``.
    """
    with messages() as heard:
        result = getattr(lib(), call)(*arguments)
    try:
        check(result, call, what)
    except KernelError as error:
        said = "; ".join(line.partition(_WORDS)[2] for text in heard for line in text.splitlines() if _WORDS in line)
        what = f"{error.message}: {said}" if said else error.message
        if error.facts["errno"] == errno.EPERM:
            what += "; netlink wants CAP_NET_ADMIN in the user namespace that owns the network namespace"
        raise KernelError(what, **error.facts, said=said) from None


def ask(kind: int, message: bytes, call: str, what: object) -> bytes:
    """The one answer to a question of type ``kind``, which errors name by ``call`` and ``what``. Raises KernelError."""
    return _answers(kind, _F_ONE, message, call, what)[0]


def listed(kind: int, message: bytes, call: str, what: object) -> list[bytes]:
    """All answers to such a question (NLM_F_DUMP). Raises KernelError."""
    return _answers(kind, _F_DUMP, message, call, what)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in ``data``, by type."""
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        found[kind & _TYPE_MASK] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]
    return found


def _answers(kind: int, flags: int, message: bytes, call: str, what: object) -> list[bytes]:
    found: list[bytes] = []
    with system_call(call, what), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as asked:
        asked.send(_HEADER.pack(_HEADER.size + len(message), kind, _F_REQUEST | flags, 1, 0) + message)
        while True:
            data = asked.recv(_ROOM)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                body, data = data[_HEADER.size : length], data[_aligned(length) :]
                if kind == _ERROR:
                    number = -int.from_bytes(body[:4], sys.byteorder, signed=True)
                    if number:
                        raise OSError(number, os.strerror(number))
                if kind in (_ERROR, _DONE):
                    return found
                found.append(body)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
