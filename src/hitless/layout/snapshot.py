"""Layouts as JSON: what a release looked like, for when neither its objects nor its live maps are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from hitless.errors import LayoutError, UnsupportedError
from hitless.layout.model import Array, Enum, Int, MapSpec, ObjectSpec, Record, Type

__all__ = ["SCHEMA", "dump", "load"]

SCHEMA = 1
_MAX_DEPTH = 64


class _Head(msgspec.Struct):
    schema: int


class _Snapshot(msgspec.Struct):
    schema: Literal[1]
    objects: dict[str, ObjectSpec]


def dump(registry: Mapping[str, ObjectSpec]) -> bytes:
    """The snapshot of a release, its objects by name: JSON, the same bytes for the same release."""
    ordered = {name: registry[name] for name in sorted(registry)}
    return msgspec.json.encode(_Snapshot(1, ordered))


def load(data: bytes) -> dict[str, ObjectSpec]:
    """The objects of a snapshot.

    Raises :class:`LayoutError` if it is damaged or its layouts contradict themselves, :class:`UnsupportedError` if
    it was written in a schema that came later.
    """
    try:
        schema = msgspec.json.decode(data, type=_Head).schema
        if schema != SCHEMA:
            raise UnsupportedError(
                f"snapshot: schema {schema} is not known, only {SCHEMA} is", feature=f"snapshot schema {schema}"
            )
        objects = msgspec.json.decode(data, type=_Snapshot).objects
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LayoutError(f"snapshot: damaged: {error}") from error
    for name, spec in objects.items():
        for item in spec.maps:
            _check_map(item, f"snapshot: object {name!r}: map {item.name!r}")
    return objects


def _check_map(spec: MapSpec, where: str, depth: int = 0) -> None:
    for side, made, size in (("key", spec.key, spec.key_size), ("value", spec.value, spec.value_size)):
        if made is not None:
            _check(made, f"{where}: {side}", 0)
            if made.size != size:
                raise LayoutError(f"{where}: {side} is {size} bytes but its type has {made.size}")
    if spec.inner is not None:
        if depth:
            raise LayoutError(f"{where}: maps are nested more than two deep")
        _check_map(spec.inner, where, depth + 1)


def _check(made: Type, where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise LayoutError(f"{where}: nested more than {_MAX_DEPTH} deep")
    if made.size < 0 or made.size >= 1 << 32:
        raise LayoutError(f"{where}: impossible size {made.size}")
    match made:
        case Array(element=element, count=count):
            if count < 0 or (count and not element.size):
                raise LayoutError(f"{where}: impossible count {count}")
            _check(element, f"{where}[]", depth + 1)
        case Int() | Enum() if made.size not in (1, 2, 4, 8, 16):
            raise LayoutError(f"{where}: a number of {made.size} bytes")
        case Record(size=size, fields=fields):
            for field in fields:
                _check(field.type, f"{where}.{field.name}", depth + 1)
                end = field.offset + (field.bits or 8 * field.type.size)
                if field.offset < 0 or field.bits < 0 or (not field.bits and field.offset % 8) or end > 8 * size:
                    raise LayoutError(f"{where}: field {field.name!r} lies outside its {size} bytes")
                if field.bits and (not isinstance(field.type, Int | Enum) or field.bits > 8 * field.type.size):
                    raise LayoutError(f"{where}: bitfield {field.name!r} has {field.bits} bits")
