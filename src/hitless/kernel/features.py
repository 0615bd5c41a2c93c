"""What this kernel can do, found by trying: a version says little, since distributions carry features over."""

from __future__ import annotations

import functools

from hitless.errors import KernelError, UnsupportedError
from hitless.kernel.codegen import EXIT, MOV_IMM, R0, Assembler
from hitless.kernel.iterators import Iterator
from hitless.kernel.maps import create

__all__ = ["ITERATE_HASH", "features"]

ITERATE_HASH = "iter/bpf_map_elem"
"""A program of ours can be run for each entry of a hash map."""

_HASH = 1  # BPF_MAP_TYPE_HASH


@functools.cache
def features() -> frozenset[str]:
    """The names of all features that this kernel has and this process may use."""
    return frozenset(name for name, works in _PROBES.items() if works())


def _iterates_hash() -> bool:
    asm = Assembler()
    asm.emit(MOV_IMM, R0, imm=0)
    asm.emit(EXIT)
    try:
        iterator = Iterator.load(ITERATE_HASH.removeprefix("iter/"), asm.code(), "probe")
    except (KernelError, UnsupportedError):
        return False
    try:
        with create(_HASH, "probe", 4, 4, 1) as probe:
            iterator.run(probe)
    except KernelError:
        return False
    finally:
        iterator.close()
    return True


_PROBES = {ITERATE_HASH: _iterates_hash}
