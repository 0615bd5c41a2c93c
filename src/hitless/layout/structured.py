"""Records as numpy arrays with named fields, which is how a converter written by a user sees them.

A converter is what carries a change of meaning: a string that became an id, a number whose byte order changed. It is a
function in a Python file beside the manifest, named there as ``convert = "converters:service"``::

    def service(keys, old, new):
        new["port"] = old["port"].byteswap()
        return new

It gets the keys and the values of many entries of the old release, and new values where what the types tell is in
place already and everything else is zero; it returns the new values. Where the types drafted a number that did not fit
and the function leaves it, that is a loss as without a function. Beside it may be:

- ``service_key(old, new)``: the same for keys. They are converted by themselves, whatever the values are.
- ``service_back(keys, old, new)`` and ``service_key_back(old, new)``: the way back, from the new release (``old``) to
  the running one (``new``). ``keys`` are the new release's. With them a write that goes to both releases reaches the
  running one too, and an upgrade that is taken back brings along what the new programs wrote. Where
  ``service_key_back`` does not undo ``service_key``, the upgrade is refused.

Where an old map is split into several, each may have its function, and that may return two things: the new values, and
a boolean array that says which of the entries are this map's; the values of the others are passed over::

    def small(keys, old, new):
        return new, old["size"] <= 64

What such a function may rely on: the file alone, with what Python, numpy and other installed packages offer, none of
the files beside it. What it has to grant: the same entry always gives the same, alone or among others, in any
order, any number of times, also in another process that finishes an upgrade that was killed; it does nothing else. It
is called where the layouts of two releases differ, and never otherwise: a value whose meaning changed needs a field of
a new name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hitless.errors import LayoutError
from hitless.layout.conversion import Records
from hitless.layout.members import SPECIAL, inside, is_text, members
from hitless.layout.model import Array, Enum, Float, Int, Order, Pointer, Record, Type

__all__ = ["Structured", "convert", "dtype", "select"]

#: Records with named fields, one dimension.
Structured = npt.NDArray[Any]


def dtype(made: Type, order: Order = "little") -> np.dtype[Any]:
    """The numpy type that reads what C reads: fields by name and offset, padding left out, sizes the same.

    ``char[N]`` is ``S``, an array a subarray, a number of a network type (``__be32``) big-endian whatever ``order``
    says. Members of a union overlap; those of anonymous structs and unions are named as in C. What numpy has no
    number for is raw bytes (``V``): bitfields, as ``{a,b}`` where they share bytes, 16-byte integers, kernel objects.
    """
    mark = "<" if order == "little" else ">"
    match made:
        case Int(encoding="bool", size=1):
            return np.dtype("?")
        case Int(size=size) | Enum(size=size) if size in (1, 2, 4, 8):
            network = made.name.startswith(("__be", "__sum16", "__wsum"))
            return np.dtype(f"{'>' if network else mark}{'i' if made.signed else 'u'}{size}")
        case Float(size=size) if size in (2, 4, 8):
            return np.dtype(f"{mark}f{size}")
        case Pointer(size=size):
            return np.dtype(f"{mark}u{size}")
        case Array() if is_text(made) and made.count:
            return np.dtype(f"S{made.count}")
        case Array(element=element, count=count):
            return np.dtype((dtype(element, order), (count,)))
        case Record(name=name) if name not in SPECIAL and made.fields:
            return _record(made, order)
    return np.dtype(f"V{made.size}")


def _record(made: Record, order: Order) -> np.dtype[Any]:
    groups = [(m.name, np.dtype(f"V{m.type.size}"), m.offset) for m in members(made) if m.bits]
    plain = [(m.name, dtype(m.type, order), m.offset) for m in inside(made).values() if not m.width]
    names, formats, offsets = zip(*sorted(plain + groups, key=lambda item: item[2]), strict=True)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": made.size})


def convert(
    converter: Callable[..., object], given: Sequence[tuple[Type, Records]], made: Type, draft: Records,
    order: Order = "little",
) -> Records:  # fmt: skip
    """What ``converter`` makes of ``draft``, records of the type ``made``; ``given`` are its arguments before that.

    All have the same number of records, one at least. A type that is no struct is seen as plain numbers. ``given``
    cannot be written. What is between the fields of a result is zero. Whatever the converter raises goes through.

    Raises :class:`LayoutError` if it returns anything but an array of these records, with the fact ``returned``; or if
    the records given to this function are not uint8 of the shape (n, size).
    """
    returned, wanted = _called(converter, given, made, draft, order)
    return _records(returned, wanted, made)


def select(
    converter: Callable[..., object], given: Sequence[tuple[Type, Records]], made: Type, draft: Records,
    order: Order = "little",
) -> tuple[Records, npt.NDArray[np.bool_]]:  # fmt: skip
    """As :func:`convert`, of a converter that may say as well which records it takes; else it takes all."""
    returned, wanted = _called(converter, given, made, draft, order)
    taken: object = np.ones(len(draft), np.bool_)
    if isinstance(returned, tuple) and len(returned) == 2:
        returned, taken = returned
    if not isinstance(taken, np.ndarray) or taken.dtype != np.bool_ or taken.shape != (len(draft),):
        what = _described(taken)
        why = f"beside the records it returned {what}, and not an array of bool and shape ({len(draft)},)"
        raise LayoutError(why, returned=what)
    return _records(returned, wanted, made), taken.copy()


def _called(
    converter: Callable[..., object], given: Sequence[tuple[Type, Records]], made: Type, draft: Records, order: Order
) -> tuple[object, Structured]:
    arguments = []
    for kind, records in given:
        seen = _structured(records, kind, order).copy()
        seen.flags.writeable = False
        arguments.append(seen)
    wanted = _structured(draft.copy(), made, order)
    return converter(*arguments, wanted), wanted


def _records(returned: object, wanted: Structured, made: Type) -> Records:
    if not isinstance(returned, np.ndarray) or returned.dtype != wanted.dtype or returned.shape != wanted.shape:
        what = _described(returned)
        why = f"it returned {what}, and not an array of {wanted.dtype} and shape {wanted.shape}"
        raise LayoutError(why, returned=what)
    out = np.ascontiguousarray(returned).view(np.uint8).reshape(len(wanted), made.size).copy()
    out[:, ~_used(wanted.dtype)] = 0
    return out


def _structured(records: Records, made: Type, order: Order) -> Structured:
    if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != made.size:
        raise LayoutError(f"records: want uint8 of shape (n, {made.size}), got {records.dtype} of {records.shape}")
    return np.ascontiguousarray(records).view(_flat(made, order)).reshape(len(records))


def _described(returned: object) -> str:
    if isinstance(returned, np.ndarray):
        return f"an array of {returned.dtype} and shape {returned.shape}"
    return "None (does it end with return?)" if returned is None else f"a {type(returned).__name__}"


def _used(kind: np.dtype[Any]) -> npt.NDArray[np.bool_]:
    """Which bytes of a record are in a field."""
    if kind.subdtype is not None:
        element, shape = kind.subdtype
        return np.tile(_used(element), int(np.prod(shape)))
    used = np.zeros(kind.itemsize, np.bool_)
    if kind.fields is None:
        used[:] = True
    for field in (kind.fields or {}).values():
        used[field[1] : field[1] + field[0].itemsize] |= _used(field[0])
    return used


def _flat(made: Type, order: Order) -> np.dtype[Any]:
    # A view cannot have a subarray as its type, so that one gets a name.
    whole = dtype(made, order)
    return np.dtype([("value", whole)]) if whole.subdtype else whole
