"""Records as numpy arrays with named fields, which is how a converter written by a user sees them.

A converter is what carries a change of meaning: a string that became an id, a number whose byte order changed. What
types can tell is converted before it is called; it reads ``old``, and writes into ``new`` what only it knows::

    def service(old, new):
        new["port"] = old["port"].byteswap()
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hitless.errors import LayoutError
from hitless.layout.conversion import Conversion, Records
from hitless.layout.members import SPECIAL, inside, is_text, members
from hitless.layout.model import Array, Enum, Float, Int, Order, Pointer, Record, Type

__all__ = ["Converter", "Structured", "convert", "dtype"]

#: Records with named fields, one dimension.
Structured = npt.NDArray[Any]


class Converter(Protocol):
    """A user's function over all records of a batch at once; it may be called several times for one map.

    ``old`` cannot be written. ``new`` has as many records, in the same order: what the types tell is in place,
    everything else is zero. Both are numpy arrays of :func:`dtype`; a converter of a whole value that is no struct
    sees plain numbers.
    """

    def __call__(self, old: Structured, new: Structured, /) -> None:
        """Fill in ``new``."""


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
    converter: Converter, old: Type, new: Type, records: Records, draft: Conversion | None = None,
    order: Order = "little",
) -> Records:  # fmt: skip
    """Records of ``old`` as records of ``new``: what ``draft`` carries, and what the converter makes of the rest.

    Raises :class:`LayoutError` if records are not uint8 of the shape (n, old.size).
    """
    if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != old.size:
        raise LayoutError(f"records: want uint8 of shape (n, {old.size}), got {records.dtype} of {records.shape}")
    out = np.zeros((len(records), new.size), np.uint8) if draft is None else draft.apply(records).records
    if len(records):
        before = np.ascontiguousarray(records).view(_flat(old, order)).reshape(len(records))
        before.flags.writeable = False
        converter(before, out.view(_flat(new, order)).reshape(len(records)))
    return out


def _flat(made: Type, order: Order) -> np.dtype[Any]:
    # A view cannot have a subarray as its type, so that one gets a name.
    whole = dtype(made, order)
    return np.dtype([("value", whole)]) if whole.subdtype else whole
