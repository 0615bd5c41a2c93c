"""Emptying maps that hold what they held when their release last ran, before they are filled anew.

No hook runs the programs of that release, so that nobody misses what goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hitless.kernel.maps import Map
from hitless.kernel.merger import Mode
from hitless.kernel.storage import Settler, Teller, create_base
from hitless.layout.answers import answer

__all__ = ["empty"]

_AT_ONCE = 4096  # entries of an array that one system call clears
_PASSES = 100  # over owners of storage, of which one pass may miss some


def empty(held: Map) -> None:
    """Delete all entries of ``held``, a map that :func:`hitless.carry.emptied` names; those of an array become zero.

    Raises KernelError.
    """
    _WAYS[answer(held.info.type).kind](held)


def _empty_entries(held: Map) -> None:
    info = held.info
    if "array" in info.type:
        for start in range(0, info.max_entries, _AT_ONCE):
            indices = np.arange(start, min(start + _AT_ONCE, info.max_entries), dtype=np.uint32)
            held.write(indices.view(np.uint8).reshape(-1, 4), np.zeros((len(indices), info.entry_size), np.uint8))
    elif info.type == "lpm_trie":  # whose batches begin anew where an entry was deleted
        _delete_keys(held)
    else:
        for keys, _ in held.batches():
            held.remove(keys)


def _delete_keys(held: Map) -> None:
    for key in held.all_keys():
        held.delete(key)


def _empty_slots(held: Map) -> None:
    if held.info.type == "hash_of_maps":
        # Together, since after each such call the kernel waits for running programs, some milliseconds.
        held.remove(np.frombuffer(b"".join(held.all_keys()), np.uint8).reshape(-1, held.info.key_size))
        return
    for key in held.all_keys():
        if held.lookup(key) is not None:
            held.delete(key)


def _pop_all(held: Map) -> None:
    while held.pop() is not None:
        pass


def _empty_storage(held: Map) -> None:
    name, size = f"reset_{held.info.name}", held.info.value_size
    with create_base(held, name, size) as base:
        teller, settler = Teller(name, held, base, differing=False), Settler(name, held, base, ())
        over = held if held.info.type == "sk_storage" else base
        for _ in range(_PASSES):
            told = teller.tell(over)
            if not told.has.any():
                break
            values = told.values[told.has]
            modes = np.full(len(values), Mode.DELETED, np.uint8)
            settler.settle(modes, told.numbers[told.has], values, values, values)
        teller.close()
        settler.close()


_WAYS: Mapping[str, Callable[[Map], None]] = {
    "entries": _empty_entries,
    "inner-maps": _empty_slots,
    "queue": _pop_all,
    "references": _empty_slots,
    "storage": _empty_storage,
}
