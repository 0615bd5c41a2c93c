"""Values as Python objects and back to the bytes that C sees.

A struct is a dict by field name, an array a list, ``char[N]`` a str (up to the first NUL), an array of unsigned bytes
``bytes``, an enum its number, a union its bytes. When encoding, fields that are left out are zero, an enum may be given
by name, and a union as a dict with the one member that is meant.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from hitless.errors import LayoutError
from hitless.layout.members import Member, is_bytes, is_text, join, members
from hitless.layout.model import Array, Enum, Field, Float, Int, Opaque, Order, Pointer, Record, Type

__all__ = ["Codec", "decode", "encode"]

_Encoder = Callable[[Any, bytearray, int], None]
_Decoder = Callable[[bytes, int], Any]
_FLOATS = {2: "e", 4: "f", 8: "d"}
_MARK = {"little": "<", "big": ">"}


class Codec:
    """Encoder and decoder for one type, worked out once; use it where many values pass."""

    def __init__(self, made: Type, order: Order = "little") -> None:
        self.type = made
        self._size = made.size
        self._encode = _encoder(made, "", order)
        self._decode = _decoder(made, order)

    def encode(self, value: object) -> bytes:
        """The bytes of a value. Raises :class:`LayoutError` naming the field that is unknown or does not fit."""
        out = bytearray(self._size)
        self._encode(value, out, 0)
        return bytes(out)

    def decode(self, data: bytes) -> Any:
        """The value in these bytes. Raises :class:`LayoutError` if there are too few or too many."""
        if len(data) != self._size:
            raise LayoutError(f"{self.type.name!r} has {self._size} bytes, got {len(data)}", size=self._size)
        return self._decode(data, 0)


def encode(made: Type, value: object, order: Order = "little") -> bytes:
    """The bytes of a value of this type; see :class:`Codec`."""
    return _codec(made, order).encode(value)


def decode(made: Type, data: bytes, order: Order = "little") -> Any:
    """The value of this type in these bytes; see :class:`Codec`."""
    return _codec(made, order).decode(data)


# By identity, as hashing a deep type costs more than it saves. A codec holds its type, so an id cannot come to mean
# another one while it is here.
_codecs: dict[tuple[int, Order], Codec] = {}
_MAX_CODECS = 256


def _codec(made: Type, order: Order) -> Codec:
    found = _codecs.get((id(made), order))
    if found is None:
        if len(_codecs) >= _MAX_CODECS:
            _codecs.clear()
        found = _codecs[id(made), order] = Codec(made, order)
    return found


def _bad(path: str, why: str) -> LayoutError:
    return LayoutError(f"{path or 'value'}: {why}", path=path)


def _encoder(made: Type, path: str, order: Order) -> _Encoder:
    match made:
        case Int():
            return _encode_int(made, path, order, {})
        case Enum():
            return _encode_int(made, path, order, dict(made.values))
        case Float():
            return _encode_float(made, path, order)
        case Pointer():
            return _encode_int(Int("pointer", made.size, False), path, order, {})
        case Array():
            return _encode_array(made, path, order)
        case Record(union=True):
            return _encode_union(made, path, order)
        case Record():
            return _encode_record(made, path, order)
        case Opaque():
            return _encode_raw(made.size, path)


def _encode_int(made: Int | Enum, path: str, order: Order, names: Mapping[str, int]) -> _Encoder:
    size, signed = made.size, made.signed
    boolean = isinstance(made, Int) and made.encoding == "bool"

    def put(value: Any, out: bytearray, at: int) -> None:
        number = names.get(value) if isinstance(value, str) else value
        if number is None or not isinstance(number, int):
            wanted = f"one of {', '.join(names)} or a number" if names else "a number"
            raise _bad(path, f"want {wanted}, got {value!r}")
        if boolean and number not in (0, 1):
            raise _bad(path, f"want true or false, got {value!r}")
        try:
            out[at : at + size] = number.to_bytes(size, order, signed=signed)
        except OverflowError as error:
            raise _bad(path, f"{number} does not fit {made.name or 'an enum'} ({size} bytes)") from error

    return put


def _encode_float(made: Float, path: str, order: Order) -> _Encoder:
    form = _FLOATS.get(made.size)
    if form is None:
        return _encode_raw(made.size, path)

    def put(value: Any, out: bytearray, at: int) -> None:
        try:
            struct.pack_into(_MARK[order] + form, out, at, value)
        except (struct.error, OverflowError) as error:
            raise _bad(path, f"want a number that fits {made.name}, got {value!r}") from error

    return put


def _encode_raw(size: int, path: str) -> _Encoder:
    def put(value: Any, out: bytearray, at: int) -> None:
        if not isinstance(value, bytes | bytearray | memoryview) or len(value) != size:
            raise _bad(path, f"want {size} bytes, got {value!r}")
        out[at : at + size] = value

    return put


def _encode_array(made: Array, path: str, order: Order) -> _Encoder:
    size, step = made.size, made.element.size
    if is_text(made):

        def put_text(value: Any, out: bytearray, at: int) -> None:
            data = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
            if not isinstance(data, bytes | bytearray):
                raise _bad(path, f"want text, got {value!r}")
            if len(data) > size:
                raise _bad(path, f"{value!r} is longer than {size} bytes")
            out[at : at + len(data)] = data

        return put_text
    if is_bytes(made):
        return _encode_raw(size, path)
    inner = _encoder(made.element, f"{path}[]", order)

    def put(value: Any, out: bytearray, at: int) -> None:
        if not isinstance(value, list | tuple):
            raise _bad(path, f"want a list, got {value!r}")
        if len(value) > made.count:
            raise _bad(path, f"{len(value)} elements do not fit {made.count}")
        for index, item in enumerate(value):
            inner(item, out, at + index * step)

    return put


def _encode_record(made: Record, path: str, order: Order) -> _Encoder:
    parts: dict[str, tuple[_Encoder, int]] = {}
    for member in members(made):
        if member.bits:
            for field in _bit_fields(member):
                encoder = _encode_bits(field, join(path, field.name), member.type.size, order)
                parts[field.name] = (encoder, member.offset)
            continue
        parts[member.name] = (_encoder(member.type, join(path, member.name), order), member.offset)
        if member.parts and isinstance(member.type, Record):
            for name, inner in _union_parts(member.type, path, order).items():
                parts[name] = (inner, member.offset)

    def put(value: Any, out: bytearray, at: int) -> None:
        if not isinstance(value, Mapping):
            raise _bad(path, f"want a dict by field name, got {value!r}")
        for name, item in value.items():
            part = parts.get(name)
            if part is None:
                known = ", ".join(sorted(parts))
                raise _bad(join(path, str(name)), f"no such field in {made.name or 'this struct'}; it has {known}")
            part[0](item, out, at + part[1])

    return put


def _encode_bits(field: Field, path: str, size: int, order: Order) -> _Encoder:
    names = dict(field.type.values) if isinstance(field.type, Enum) else {}
    signed = isinstance(field.type, Int | Enum) and field.type.signed
    bits = field.bits
    # Bits are counted from the low end of a little-endian number, from the high end of a big-endian one.
    shift = field.offset if order == "little" else 8 * size - field.offset - bits
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)

    def put(value: Any, out: bytearray, at: int) -> None:
        number = names.get(value) if isinstance(value, str) else value
        if not isinstance(number, int) or not low <= number <= high:
            raise _bad(path, f"want a number from {low} to {high}, got {value!r}")
        whole = int.from_bytes(out[at : at + size], order)
        mask = (1 << bits) - 1
        whole = whole & ~(mask << shift) | (number & mask) << shift
        out[at : at + size] = whole.to_bytes(size, order)

    return put


def _union_parts(made: Record, path: str, order: Order) -> dict[str, _Encoder]:
    out: dict[str, _Encoder] = {}
    for member in members(made):
        if member.bits:
            for field in _bit_fields(member):
                out[field.name] = _encode_bits(field, join(path, field.name), member.type.size, order)
        else:
            out[member.name] = _encoder(member.type, join(path, member.name), order)
            if isinstance(member.type, Record) and member.name.startswith("{anonymous"):
                opened = _union_parts if member.type.union else _struct_parts
                out |= opened(member.type, path, order)
    return out


def _struct_parts(made: Record, path: str, order: Order) -> dict[str, _Encoder]:
    def shifted(inner: _Encoder, by: int) -> _Encoder:
        return lambda value, out, at: inner(value, out, at + by)

    plain = [m for m in members(made) if not m.parts]
    return {m.name: shifted(_encoder(m.type, join(path, m.name), order), m.offset) for m in plain}


def _encode_union(made: Record, path: str, order: Order) -> _Encoder:
    raw = _encode_raw(made.size, path)
    parts = _union_parts(made, path, order)

    def put(value: Any, out: bytearray, at: int) -> None:
        if not isinstance(value, Mapping):
            raw(value, out, at)
            return
        if len(value) != 1:
            raise _bad(path, f"a union is given by one member, got {', '.join(map(str, value)) or 'none'}")
        ((name, item),) = value.items()
        if name not in parts:
            raise _bad(join(path, str(name)), f"no such member; the union has {', '.join(sorted(parts))}")
        parts[name](item, out, at)

    return put


def _bit_fields(member: Member) -> tuple[Field, ...]:
    # Unnamed bitfields are padding.
    return tuple(f for f in member.type.fields if f.name) if isinstance(member.type, Record) else ()


def _decoder(made: Type, order: Order) -> _Decoder:
    match made:
        case Int(encoding="bool"):
            return lambda data, at: any(data[at : at + made.size])
        case Int() | Enum():
            return _decode_int(made.size, made.signed, order)
        case Pointer():
            return _decode_int(made.size, False, order)
        case Float(size=size) if size in _FLOATS:
            form = struct.Struct(_MARK[order] + _FLOATS[size])
            return lambda data, at: form.unpack_from(data, at)[0]
        case Array() if is_text(made):
            return _decode_text(made.size)
        case Array() if not is_bytes(made):
            return _decode_array(made, order)
        case Record(union=False):
            return _decode_record(made, order)
    size = made.size
    return lambda data, at: bytes(data[at : at + size])


def _decode_int(size: int, signed: bool, order: Order) -> _Decoder:
    return lambda data, at: int.from_bytes(data[at : at + size], order, signed=signed)


def _decode_text(size: int) -> _Decoder:
    return lambda data, at: bytes(data[at : at + size]).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _decode_array(made: Array, order: Order) -> _Decoder:
    code, step, count = _code(made.element), made.element.size, made.count
    if code is not None and not code.endswith("s"):
        whole = struct.Struct(f"{_MARK[order]}{count}{code}")
        return lambda data, at: list(whole.unpack_from(data, at))
    inner = _decoder(made.element, order)
    return lambda data, at: [inner(data, at + index * step) for index in range(count)]


def _decode_record(made: Record, order: Order) -> _Decoder:
    # One struct.Struct reads every plain member at once. The others get an empty place in it, which keeps the order
    # of the fields, and are filled in after.
    names: list[str] = []
    rest: list[tuple[str, _Decoder, int]] = []
    form, end = _MARK[order], 0
    for member in members(made):
        code = None if member.bits else _code(member.type)
        if code is not None and member.offset >= end:
            form += f"{member.offset - end}x{code}"
            end = member.offset + member.type.size
            names.append(member.name)
            continue
        if member.bits:
            parts = _bit_decoders(member, order)
        else:
            parts = [(member.name, _decoder(member.type, order), member.offset)]
        form += "0s" * len(parts)
        names += [name for name, _, _ in parts]
        rest += parts
    plain = struct.Struct(form)

    def get(data: bytes, at: int) -> dict[str, Any]:
        out = dict(zip(names, plain.unpack_from(data, at), strict=True))
        for name, inner, offset in rest:
            out[name] = inner(data, at + offset)
        return out

    return get


def _code(made: Type) -> str | None:
    """The ``struct`` format of what it can read by itself."""
    match made:
        case Int(encoding="bool", size=1):
            return "?"
        case Int(encoding="bool") | Int(size=16):
            return None
        case Int() | Enum():
            code = {1: "b", 2: "h", 4: "i", 8: "q"}[made.size]
            return code if made.signed else code.upper()
        case Pointer(size=size):
            return {4: "I", 8: "Q"}[size]
        case Float(size=size) if size in _FLOATS:
            return _FLOATS[size]
        case Record(union=False):
            return None
        case Array() if is_text(made) or not is_bytes(made):
            return None
    return f"{made.size}s"


def _bit_decoders(member: Member, order: Order) -> list[tuple[str, _Decoder, int]]:
    return [(f.name, _decode_bits(f, member.type.size, order), member.offset) for f in _bit_fields(member)]


def _decode_bits(field: Field, size: int, order: Order) -> _Decoder:
    signed = isinstance(field.type, Int | Enum) and field.type.signed
    bits = field.bits
    # Bits are counted from the low end of a little-endian number, from the high end of a big-endian one.
    shift = field.offset if order == "little" else 8 * size - field.offset - bits

    def get(data: bytes, at: int) -> int:
        number = int.from_bytes(data[at : at + size], order) >> shift & (1 << bits) - 1
        return number - (1 << bits) if signed and number >> bits - 1 else number

    return get
