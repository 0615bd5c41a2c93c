"""Conversions: what moves where, as a value that can be read, saved, turned round and applied to many records at once.

A :class:`Conversion` makes no decisions. :mod:`hitless.layout.diff` decides; code that generates BPF instructions and
:meth:`Conversion.apply` do the same moves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from hitless.errors import LayoutError
from hitless.layout.members import SPECIAL, is_bytes, join, members
from hitless.layout.model import Array, Enum, Int, Pointer, Record, Type
from hitless.layout.rules import MapRules, Merge, parse_tags

__all__ = [
    "Conversion", "Converted", "Cut", "Default", "Leaf", "Misfit", "Move", "Records", "Repeat", "collisions", "leaves",
]  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    #: Records side by side: uint8, shape (number of records, bytes of one).
    Records = npt.NDArray[np.uint8]
else:
    Records = "npt.NDArray[np.uint8]"

    class _Numpy:
        # It takes longer to load than two releases to compare, and only `apply` needs it.
        def __getattr__(self, name):
            import numpy

            return getattr(numpy, name)

    np = _Numpy()

_FIRST = 10  # rows that a misfit names
_MAX_LEAVES = 1_000_000
_MAX_STEPS = 1000  # of a conversion in BPF, whose programs should stay short


class Repeat(msgspec.Struct, frozen=True):
    """Do it ``count`` times, stepping so many bytes in the old and the new record each time."""

    count: int
    old_stride: int
    new_stride: int


class Move(msgspec.Struct, frozen=True):
    """Carry a number, or bytes as they are, from the old record to the new one.

    Offsets and sizes are in bytes. When sizes, signedness and ``bool`` agree, the bytes are copied. Otherwise both
    sides are integers of 1, 2, 4, 8 or 16 bytes: the number is read with the old signedness and written with the new
    size; one that does not fit the new range is a misfit and becomes the nearest number that fits.

    A bitfield has ``bits`` (0: it is none) and begins ``shift`` bits into its first byte, counted from the low end,
    or from the high end where ``big`` says that the number is big-endian; its size is that of the bytes it touches.
    ``names`` are (old, new) numbers of an enum whose names were numbered anew: any other number is a misfit and
    stays what it is.
    """

    path: str
    old_offset: int
    old_size: int
    new_offset: int
    new_size: int
    old_signed: bool = False
    new_signed: bool = False
    old_bool: bool = False
    new_bool: bool = False
    repeat: tuple[Repeat, ...] = ()
    old_bits: int = 0
    old_shift: int = 0
    new_bits: int = 0
    new_shift: int = 0
    old_big: bool = False
    new_big: bool = False
    names: tuple[tuple[int, int], ...] = ()

    @property
    def copies(self) -> bool:
        """Whether the bytes are copied as they are."""
        plain = not (self.old_bits or self.new_bits or self.names) and self.old_big == self.new_big
        return plain and self.old_size == self.new_size and self.bounds is None

    @property
    def bounds(self) -> tuple[int, int] | None:
        """(lowest, highest) number that fits the new side, or None if every number of the old side does."""
        if self.old_size > 16:
            return None  # no number: bytes, of which there may be gigabytes, so that 2**bits must not be worked out
        low, high = _range(self.old_bits or 8 * self.old_size, self.old_signed, self.old_bool)
        new_low, new_high = _range(self.new_bits or 8 * self.new_size, self.new_signed, self.new_bool)
        if new_low <= low and high <= new_high:
            return None
        return max(low, new_low), min(high, new_high)

    @property
    def in_kernel(self) -> bool:
        """Whether BPF can do it with a load and a store: bytes as they are, or an aligned number made wider."""
        if self.copies:
            return True
        if self.old_bits or self.new_bits or self.names or self.old_big or self.new_big:
            return False
        olds = (self.old_offset, *(repeat.old_stride for repeat in self.repeat))
        news = (self.new_offset, *(repeat.new_stride for repeat in self.repeat))
        sides = ((self.old_size, olds), (self.new_size, news))
        return all(size <= 8 and not any(at % size for at in places) for size, places in sides)

    def reversed(self) -> Move:
        """The move that goes back."""
        return Move(
            self.path, self.new_offset, self.new_size, self.old_offset, self.old_size,
            self.new_signed, self.old_signed, self.new_bool, self.old_bool,
            tuple(Repeat(r.count, r.new_stride, r.old_stride) for r in self.repeat),
            self.new_bits, self.new_shift, self.old_bits, self.old_shift, self.new_big, self.old_big,
            tuple((new, old) for old, new in self.names),
        )  # fmt: skip


class Default(msgspec.Struct, frozen=True):
    """Write these bytes where the old record has nothing to give; with a ``mask``, only the bits that it sets."""

    path: str
    offset: int
    data: bytes
    repeat: tuple[Repeat, ...] = ()
    mask: bytes = b""


class Cut(msgspec.Struct, frozen=True):
    """Old bytes that have no place in the new record; a record where they are not all zero is a misfit."""

    path: str
    offset: int
    size: int
    repeat: tuple[Repeat, ...] = ()


class Misfit(msgspec.Struct, frozen=True):
    """In ``count`` records the value at ``path`` did not fit; ``first`` are the row indices of the first ten."""

    path: str
    count: int
    first: tuple[int, ...]


class Converted:
    """The outcome of :meth:`Conversion.apply`: new records in the order of the old, and what did not fit."""

    __slots__ = ("misfits", "records")

    def __init__(self, records: Records, misfits: tuple[Misfit, ...]) -> None:
        self.records = records
        self.misfits = misfits


class Conversion(msgspec.Struct, frozen=True):
    """How a record of ``old_size`` bytes becomes one of ``new_size`` bytes. Bytes that nothing writes are zero."""

    old_size: int
    new_size: int
    moves: tuple[Move, ...]
    defaults: tuple[Default, ...] = ()
    cuts: tuple[Cut, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every record converts without a possible misfit."""
        return not self.cuts and all(move.bounds is None and not move.names for move in self.moves)

    @property
    def in_kernel(self) -> bool:
        """Whether a short BPF program can do it: exact, whole bytes in the processor's order, aligned numbers."""
        return self.exact and all(move.in_kernel for move in self.moves) and self._steps() <= _MAX_STEPS

    def _steps(self) -> int:
        return sum(math.prod(r.count for r in move.repeat) * max(1, move.old_size // 8) for move in self.moves)

    def inverse(self) -> Conversion:
        """The moves backwards: undoes this conversion for every value that fitted.

        It knows nothing of the older release's defaults; a comparison in the other direction does.
        """
        return Conversion(self.new_size, self.old_size, tuple(move.reversed() for move in self.moves))

    def written(self) -> bytes:
        """For each byte of a new record 1 if a move or a default writes to it, else 0."""
        out = bytearray(self.new_size)
        places = [(move.new_offset, move.new_size, move.repeat) for move in self.moves]
        places += [(default.offset, len(default.data), default.repeat) for default in self.defaults]
        for at, size, repeats in places:
            starts = [at]
            for repeat in repeats:
                starts = [start + step * repeat.new_stride for start in starts for step in range(repeat.count)]
            for start in starts:
                out[start : start + size] = b"\1" * size
        return bytes(out)

    def apply(self, records: Records, onto: Records | None = None) -> Converted:
        """Convert records; ``onto`` is a background whose bytes stay where no move and no default writes.

        Raises :class:`LayoutError` if the arrays are not uint8 of the shapes (n, old_size) and (n, new_size).
        """
        _check(records, self.old_size, "records")
        count = len(records)
        if onto is None:
            out = np.zeros((count, self.new_size), np.uint8)
        else:
            _check(onto, self.new_size, "onto")
            if len(onto) != count:
                raise LayoutError(f"onto has {len(onto)} records, records has {count}")
            out = onto.copy(order="C")
        if not count:
            return Converted(out, ())
        old = np.ascontiguousarray(records)
        for default in self.defaults:
            shape = [(r.count, r.new_stride) for r in default.repeat]
            if default.mask:
                window = _view(out, default.offset, "u1", [*shape, (len(default.data), 1)])
                window &= ~np.frombuffer(default.mask, np.uint8)
                window |= np.frombuffer(default.data, np.uint8)
                continue
            target = _view(out, default.offset, f"V{len(default.data)}", shape)
            target[...] = np.frombuffer(default.data, target.dtype)[0]
        misfits: list[Misfit] = []
        for cut in self.cuts:
            shape = [(r.count, r.old_stride) for r in cut.repeat] + [(cut.size, 1)]
            lost = _view(old, cut.offset, "u1", shape) != 0
            _note(misfits, cut.path, lost)
        for move in self.moves:
            old_shape = [(r.count, r.old_stride) for r in move.repeat]
            new_shape = [(r.count, r.new_stride) for r in move.repeat]
            if move.copies:
                kind = f"<u{move.old_size}" if move.old_size in (1, 2, 4, 8) else f"V{move.old_size}"
                _view(out, move.new_offset, kind, new_shape)[...] = _view(old, move.old_offset, kind, old_shape)
                continue
            numbers = _numbers(old, move, old_shape)
            bounds = move.bounds
            clipped, outside = numbers, np.zeros(numbers.shape, np.bool_)
            if bounds is not None:
                outside = (numbers < bounds[0]) | (numbers > bounds[1])
                clipped = numbers.clip(*bounds)
            if move.names:
                clipped, outside = _renumbered(numbers, move.names, clipped)
            _note(misfits, move.path, outside)
            _write(out, move, new_shape, clipped)
        return Converted(out, tuple(misfits))


class Leaf(msgspec.Struct, frozen=True):
    """The smallest part of a value that is merged as one. ``offset`` and ``size`` are in bytes.

    ``kind`` is ``int`` or ``bytes``; only an ``int`` can be added up or compared.
    """

    path: str
    offset: int
    size: int
    signed: bool = False
    merge: Merge = "keep"
    kind: Literal["int", "bytes"] = "int"

    @property
    def atomic(self) -> bool:
        """Whether one atomic instruction of BPF can merge it: an aligned integer of 4 or 8 bytes."""
        return self.kind == "int" and self.size in (4, 8) and self.offset % self.size == 0


def leaves(
    made: Type,
    rules: MapRules = MapRules(),  # noqa: B008 - frozen
    tags: tuple[str, ...] = (),
) -> tuple[Leaf, ...]:
    """Every leaf of a value, in order, with its merge policy.

    A policy on a struct or array holds for all that is inside, unless that says otherwise; a rule wins over a tag.
    ``tags`` are those of the map itself, whose policy holds for the whole value. A value that is one number has the
    path ``value``.
    Padding and what the kernel owns (locks, timers, kptrs) is no leaf. Arrays are unrolled, save arrays of bytes.

    Raises :class:`LayoutError` for a policy that the type cannot have: a sum of something that is no number.
    """
    out: list[Leaf] = []
    path = "" if isinstance(made, Record) and not made.union else "value"
    _collect(made, path, 0, None, tags, rules, out)
    return tuple(out)


def _collect(
    made: Type, path: str, offset: int, inherited: Merge | None, tags: tuple[str, ...], rules: MapRules, out: list[Leaf]
) -> None:
    rule = rules.field(path) if path else None
    merge = (rule.merge if rule else None) or parse_tags(tags, path or "the map").merge or inherited
    if len(out) > _MAX_LEAVES:
        raise LayoutError(f"{path}: more than {_MAX_LEAVES} leaves", path=path)
    if isinstance(made, Array) and not is_bytes(made):
        for index in range(made.count if made.size else 0):
            _collect(made.element, f"{path}[{index}]", offset + index * made.element.size, merge, (), rules, out)
        return
    if isinstance(made, Record) and not made.union:
        if made.name in SPECIAL:
            return
        for member in members(made):
            at = join(path, member.name)
            if member.bits:
                inside = [tag for field in _fields(member.type) for tag in field.tags]
                own = parse_tags(tuple(inside), at).merge or merge or "keep"
                out.append(_leaf(at, offset + member.offset, member.type, own))
            else:
                _collect(member.type, at, offset + member.offset, merge, member.tags, rules, out)
        return
    if isinstance(made, Pointer) and made.kernel:
        return
    if made.size:
        out.append(_leaf(path, offset, made, merge or "keep"))


def _fields(made: Type) -> Any:
    return made.fields if isinstance(made, Record) else ()


def _leaf(path: str, offset: int, made: Type, merge: Merge) -> Leaf:
    number = isinstance(made, Int | Enum) and made.size in (1, 2, 4, 8)
    # Network byte order: neither its sum nor its maximum is what the processor would compute.
    plain = number and not made.name.startswith(("__be", "__sum16", "__wsum"))
    if merge == "sum" and plain and (isinstance(made, Enum) or (isinstance(made, Int) and made.encoding)):
        raise LayoutError(f"{path}: merge=sum of {made.name or 'an enum'} has no meaning", path=path, merge=merge)
    if not plain and merge in ("sum", "max", "min"):
        raise LayoutError(
            f"{path or 'value'}: merge={merge} needs an integer in the processor's byte order, but this is "
            f"{made.name!r}",
            path=path, merge=merge,
        )  # fmt: skip
    signed = made.signed if isinstance(made, Int | Enum) else False
    return Leaf(path, offset, made.size, signed, merge, "int" if number else "bytes")


def collisions(conversion: Conversion, keys: Records) -> tuple[tuple[int, ...], ...]:
    """Which keys become one key: a group of row indices for each new key that several rows of ``keys`` turn into.

    Rows in ascending order, groups by their first row. Equal old keys collide, too. Raises :class:`LayoutError` as
    :meth:`Conversion.apply` does.
    """
    made = conversion.apply(keys).records
    if not len(made) or not conversion.new_size:
        return (tuple(range(len(made))),) if len(made) > 1 else ()
    _, which, counts = np.unique(
        np.ascontiguousarray(made).view(f"V{conversion.new_size}").ravel(), return_inverse=True, return_counts=True
    )
    rows = np.flatnonzero(counts[which] > 1)
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(int(which[row]), []).append(int(row))
    return tuple(tuple(group) for group in groups.values())


def _range(bits: int, signed: bool, boolean: bool) -> tuple[int, int]:
    if boolean:
        return 0, 1
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def _check(records: Records, size: int, what: str) -> None:
    if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != size:
        raise LayoutError(f"{what}: want uint8 of shape (n, {size}), got {records.dtype} of shape {records.shape}")


def _view(records: Records, offset: int, kind: str, shape: list[tuple[int, int]]) -> npt.NDArray[Any]:
    # One element of each record (of each repetition), in place: a strided window, no copy.
    dims = (len(records), *(count for count, _ in shape))
    steps = (records.shape[1], *(stride for _, stride in shape))
    return np.ndarray(dims, np.dtype(kind), records, offset, steps)


def _numbers(records: Records, move: Move, shape: list[tuple[int, int]]) -> npt.NDArray[Any]:
    """The numbers of the old side: integers as they stand, bitfields as 64 bits, 16-byte integers as Python's."""
    size, signed, order = move.old_size, move.old_signed, ">" if move.old_big else "<"
    if not move.old_bits and size != 16:
        return _view(records, move.old_offset, f"{order}{'i' if signed else 'u'}{size}", shape)
    window = _view(records, move.old_offset, "u1", [*shape, (size, 1)])[..., :: -1 if move.old_big else 1]
    low = _joined(window[..., :8])
    if not move.old_bits:
        high = _joined(window[..., 8:])
        return np.asarray(low.astype(object) + ((high.view(np.int64) if signed else high).astype(object) << 64))
    shift = _low_shift(size, move.old_shift, move.old_bits, move.old_big)
    number = low >> np.uint64(shift)
    if size > 8:
        number |= window[..., 8].astype(np.uint64) << np.uint64(64 - shift)
    spare = 64 - move.old_bits
    number <<= np.uint64(spare)
    if signed:
        return np.asarray(number.view(np.int64) >> np.int64(spare))
    return np.asarray(number >> np.uint64(spare))


def _write(out: Records, move: Move, shape: list[tuple[int, int]], numbers: npt.NDArray[Any]) -> None:
    size, order = move.new_size, ">" if move.new_big else "<"
    if not move.new_bits and size != 16:
        target = _view(out, move.new_offset, f"{order}{'i' if move.new_signed else 'u'}{size}", shape)
        target[...] = numbers.astype(target.dtype)
        return
    window = _view(out, move.new_offset, "u1", [*shape, (size, 1)])[..., :: -1 if move.new_big else 1]
    if not move.new_bits:
        whole = numbers.astype(object)
        for index in range(16):
            window[..., index] = (whole >> 8 * index & 0xFF).astype(np.uint8)
        return
    shift = _low_shift(size, move.new_shift, move.new_bits, move.new_big)
    ones = (1 << move.new_bits) - 1
    number = numbers & ones if numbers.dtype == object else numbers.astype(np.uint64) & np.uint64(ones)
    number = number.astype(np.uint64)
    for index in range(size):
        at = 8 * index - shift
        part = number >> np.uint64(at) if at >= 0 else number << np.uint64(-at)
        mask = ones << shift >> 8 * index & 0xFF
        window[..., index] = window[..., index] & (0xFF ^ mask) | (part & np.uint64(mask)).astype(np.uint8)


def _joined(window: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    out = np.zeros(window.shape[:-1], np.uint64)
    for index in range(window.shape[-1]):
        out |= window[..., index].astype(np.uint64) << np.uint64(8 * index)
    return out


def _low_shift(size: int, shift: int, bits: int, big: bool) -> int:
    """How far the bitfield is from the low end of the number that its bytes make."""
    return 8 * size - shift - bits if big else shift


def _renumbered(
    numbers: npt.NDArray[Any], names: tuple[tuple[int, int], ...], unnamed: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    # Sixty-four bits hold every number of an enum modulo 2**64, and writing takes the low bits.
    out = unnamed.astype(np.uint64)
    known = np.zeros(numbers.shape, np.bool_)
    for old, new in names:
        hit = numbers == old
        out[hit] = new & (1 << 64) - 1
        known |= hit
    return out, ~known


def _note(misfits: list[Misfit], path: str, wrong: npt.NDArray[np.bool_]) -> None:
    rows = np.flatnonzero(wrong.reshape(len(wrong), math.prod(wrong.shape[1:])).any(axis=1))
    if len(rows):
        misfits.append(Misfit(path, len(rows), tuple(int(row) for row in rows[:_FIRST])))
