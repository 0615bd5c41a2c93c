"""BTF by hand, to lie in ways that clang does not."""

from __future__ import annotations

import struct


def blob(*types: bytes, strings: bytes = b"\0a\0b\0") -> bytes:
    """A BTF blob of these types; the name at offset 1 is ``a``, that at 3 ``b``."""
    body = b"".join(types)
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(strings)) + body + strings


def item(kind: int, name: int, word: int, *extra: int, vlen: int = 0, flag: int = 0) -> bytes:
    """One type: kind, offset of its name, size or type, and the words that follow."""
    return struct.pack(f"<III{len(extra)}I", name, flag << 31 | kind << 24 | vlen, word, *extra)
