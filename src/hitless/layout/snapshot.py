"""Layouts as JSON: what a release looked like, for when neither its objects nor its live maps are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from hitless.errors import LayoutError, UnsupportedError
from hitless.layout.members import overlapping, repeated
from hitless.layout.model import Array, Enum, Field, Float, Int, MapSpec, ObjectSpec, Pointer, Record, Type

__all__ = ["SCHEMA", "check", "dump", "load"]

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
    check(objects, "snapshot")
    return objects


def check(objects: Mapping[str, ObjectSpec], what: str) -> None:
    """Whether these objects, read from ``what``, can be. Raises :class:`LayoutError` that names map and field."""
    for name, spec in objects.items():
        where = f"{what}: object {name!r}"
        _check_text(where, name, spec.name, spec.license)
        for program in spec.programs:
            _check_text(where, program.name, program.section, program.type, program.attach_type)
        seen: set[str] = set()
        for item in spec.maps:
            if item.name in seen:
                raise LayoutError(f"{where}: map {item.name!r} is there twice")
            seen.add(item.name)
            _check_map(item, f"{where}: map {item.name!r}")


def _check_text(where: str, *texts: str) -> None:
    # What is shown must not be able to give orders to a terminal.
    for text in texts:
        if not text.isprintable():
            raise LayoutError(f"{where}: {text!r} has control characters")


def _check_map(spec: MapSpec, where: str, depth: int = 0) -> None:
    _check_text(where, spec.name, spec.type, *spec.tags, *((spec.ops.type, spec.ops.name) if spec.ops else ()))
    numbers = (spec.key_size, spec.value_size, spec.max_entries, spec.flags, spec.extra)
    if not all(0 <= number < 1 << 64 for number in numbers):
        raise LayoutError(f"{where}: its sizes, entries, flags and extra are impossible: {numbers}")
    for side, made, size in (("key", spec.key, spec.key_size), ("value", spec.value, spec.value_size)):
        if made is not None:
            _check(made, f"{where}: {side}", 0)
            if made.size != size:
                raise LayoutError(f"{where}: {side} is {size} bytes but its type has {made.size}")
    if spec.inner is not None:
        if depth:
            raise LayoutError(f"{where}: maps are nested more than two deep")
        _check_map(spec.inner, f"{where}: inner", depth + 1)


def _check(made: Type, where: str, depth: int) -> None:
    # From the inside out: the size of an array is worked out from that of its element.
    if depth > _MAX_DEPTH:
        raise LayoutError(f"{where}: nested more than {_MAX_DEPTH} deep")
    match made:
        case Array(element=element, count=count):
            _check(element, f"{where}[]", depth + 1)
            if count < 0 or (count and not element.size):
                raise LayoutError(f"{where}: impossible count {count}")
        case Record(fields=fields):
            for field in fields:
                _check_field(field, made, where, depth)
            twice = repeated(fields)
            if twice is not None:
                raise LayoutError(f"{where}: two fields are called {twice!r}")
            clash = None if made.union else overlapping(fields)
            if clash is not None:
                raise LayoutError(f"{where}: fields {clash[0].name!r} and {clash[1].name!r} overlap")
        case Enum(values=values):
            _check_text(where, *(name for name, _ in values))
        case Pointer(target=target):
            _check_text(where, target)
    if made.size < 0 or made.size >= 1 << 32:
        raise LayoutError(f"{where}: impossible size {made.size}")
    sizes = {Int: (1, 2, 4, 8, 16), Enum: (1, 2, 4, 8), Float: (2, 4, 8, 12, 16), Pointer: (4, 8)}.get(type(made))
    if sizes is not None and made.size not in sizes:
        raise LayoutError(f"{where}: {made.name!r} cannot have {made.size} bytes")
    if isinstance(made, Int) and made.encoding not in ("", "char", "bool"):
        raise LayoutError(f"{where}: {made.name!r} has an unknown encoding {made.encoding!r}")
    _check_text(where, made.name)


def _check_field(field: Field, made: Record, where: str, depth: int) -> None:
    _check_text(where, field.name, *field.tags)
    _check(field.type, f"{where}.{field.name}", depth + 1)
    end = field.offset + (field.bits or 8 * field.type.size)
    if field.offset < 0 or field.bits < 0 or (not field.bits and field.offset % 8) or end > 8 * made.size:
        raise LayoutError(f"{where}: field {field.name!r} lies outside its {made.size} bytes")
    if field.bits and (not isinstance(field.type, Int | Enum) or field.bits > 8 * field.type.size):
        raise LayoutError(f"{where}: bitfield {field.name!r} has {field.bits} bits")
