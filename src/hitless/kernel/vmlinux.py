"""Where the kernel keeps what, by its own word: the BTF that it carries of itself."""

from __future__ import annotations

import functools
from pathlib import Path

from hitless.errors import UnsupportedError
from hitless.layout.btf import Btf
from hitless.layout.model import Record

__all__ = ["offsets"]

_PATH = Path("/sys/kernel/btf/vmlinux")


@functools.cache  # of the answers: all of the kernel's types take seconds to read again, and much memory to keep
def offsets(what: str, without: str, *members: str) -> dict[str, int]:
    """Where each of ``members``, such as ``sock.sk_state``, begins in its struct, in bytes.

    ``what`` is kept there, and ``without`` says what cannot be done if the kernel does not tell: UnsupportedError.
    """
    types = Btf.parse(_PATH.read_bytes(), str(_PATH)) if _PATH.exists() else None
    found = {}
    for each in members:
        struct, _, member = each.partition(".")
        made = types.find(f"struct {struct}") if types else None
        fields = made.fields if isinstance(made, Record) else ()
        place = next((field.offset // 8 for field in fields if field.name == member), None)
        if place is None:
            raise UnsupportedError(
                f"this kernel does not tell how it keeps {what} ({member} of struct {struct} in {_PATH}), so that "
                f"{without}",
                feature=f"struct {struct}",
            )
        found[each] = place
    return found
