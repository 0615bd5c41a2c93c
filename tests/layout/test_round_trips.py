"""Whatever a layout can be, it comes out of a snapshot as it went in, and its values out of their bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from hitless.layout.codec import Codec
from hitless.layout.diff import diff_map
from hitless.layout.elf import MAP_TYPES
from hitless.layout.model import (
    Array,
    Enum,
    Field,
    Float,
    Int,
    MapSpec,
    ObjectSpec,
    Opaque,
    Pointer,
    ProgramSpec,
    Record,
    Type,
)  # fmt: skip
from hitless.layout.show import show_map
from hitless.layout.snapshot import dump, load

Draw = Callable[[st.SearchStrategy[Any]], Any]

NAMES = st.text("abcxyz_019é", min_size=1, max_size=6)
TAGS = st.lists(st.text("hitless:merge=sum \"'\\", max_size=12), max_size=2).map(tuple)
NUMBERS = st.one_of(
    st.builds(Int, NAMES, st.sampled_from((1, 2, 4, 8, 16)), st.booleans(), st.sampled_from(("", "char", "bool"))),
    st.builds(
        Enum, NAMES | st.just(""), st.sampled_from((1, 2, 4, 8)), st.booleans(),
        st.lists(st.tuples(NAMES, st.integers(-(1 << 63), (1 << 64) - 1)), max_size=3).map(tuple),
    ),
)  # fmt: skip
SCALARS = st.one_of(
    NUMBERS,
    st.builds(Float, NAMES, st.sampled_from((2, 4, 8, 16))),
    st.builds(Pointer, NAMES, st.sampled_from((4, 8))),
    st.builds(Opaque, NAMES, st.integers(0, 9)),
)


@st.composite
def records(draw: Draw, inside: st.SearchStrategy[Type]) -> Record:
    """A struct or union that a compiler could have made: holes, bitfields, anonymous members, nothing overlapping."""
    union, at, fields = draw(st.booleans()), 0, []
    used: set[str] = set()
    for index in range(draw(st.integers(0, 4))):
        name = f"{draw(NAMES)}{index}"
        if draw(st.integers(0, 3)) == 0:
            made = draw(NUMBERS.filter(lambda one: one.size <= 8))
            bits = draw(st.integers(1, 8 * made.size))
            field = Field(name, made, 0 if union else at, bits, draw(TAGS))
            end = field.offset + bits
        else:
            made = draw(inside)
            hole = 0 if union else draw(st.integers(0, 3))
            nameless = bool(_names(made)) and not used & _names(made) and draw(st.booleans())
            field = Field("" if nameless else name, made, 0 if union else 8 * (-(-at // 8) + hole), 0, draw(TAGS))
            end = field.offset + 8 * made.size
        mine = {field.name} if field.name else _names(field.type)
        if used & mine:
            continue
        used |= mine
        at = max(at, end)
        fields.append(field)
    return Record(draw(NAMES | st.just("")), -(-at // 8) + draw(st.integers(0, 2)), tuple(fields), union)


def _names(made: Type) -> set[str]:
    out: set[str] = set()
    for field in made.fields if isinstance(made, Record) else ():
        out |= {field.name} if field.name else _names(field.type)
    return out


def _array(element: Type, count: int) -> Array:
    return Array(element, count if element.size else 0)


TYPES: st.SearchStrategy[Type] = st.recursive(
    SCALARS,
    lambda inside: st.one_of(st.builds(_array, inside, st.integers(0, 3)), records(inside)),
    max_leaves=10,
)


@st.composite
def maps(draw: Draw, name: str = "m", inner: bool = True) -> MapSpec:
    key, value = draw(st.none() | TYPES), draw(st.none() | TYPES)
    return MapSpec(
        name, draw(st.sampled_from(MAP_TYPES)), key.size if key else draw(st.integers(0, 99)),
        value.size if value else draw(st.integers(0, 99)), draw(st.integers(0, (1 << 32) - 1)),
        draw(st.integers(0, (1 << 32) - 1)), key, value, draw(st.booleans()),
        draw(st.none() | maps(inner=False)) if inner else None, draw(st.integers(0, (1 << 64) - 1)), draw(TAGS),
    )  # fmt: skip


@st.composite
def releases(draw: Draw) -> dict[str, ObjectSpec]:
    return {
        name: ObjectSpec(
            name, tuple(draw(maps(f"m{index}")) for index in range(draw(st.integers(0, 3)))),
            tuple(draw(st.lists(st.builds(ProgramSpec, NAMES, NAMES, NAMES, NAMES, st.booleans()), max_size=2))),
            draw(NAMES),
        )
        for name in draw(st.lists(NAMES, max_size=2, unique=True))
    }  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(releases())
def test_a_snapshot_gives_back_the_release_that_went_in(release: dict[str, ObjectSpec]) -> None:
    data = dump(release)
    assert load(data) == release
    assert dump(load(data)) == data
    shuffled = dict(reversed(release.items()))
    assert dump(shuffled) == data


@settings(max_examples=300, deadline=None)
@given(maps())
def test_every_map_can_be_shown_and_is_the_same_as_itself(spec: MapSpec) -> None:
    assert spec.name in show_map(spec)
    spec = msgspec.structs.replace(spec, tags=(), key=_untagged(spec.key), value=_untagged(spec.value), inner=None)
    verdict = diff_map(spec, spec).verdict
    assert verdict in ("identical", "unknown") or "Opaque" in repr(spec)


def _untagged(made: Type | None) -> Type | None:
    return None if made is None else msgspec.json.decode(_without_tags(msgspec.json.encode(made)), type=Type)


def _without_tags(data: bytes) -> bytes:
    def strip(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: [] if key == "tags" else strip(value) for key, value in node.items()}
        return [strip(one) for one in node] if isinstance(node, list) else node

    return msgspec.json.encode(strip(msgspec.json.decode(data)))


@settings(max_examples=500, deadline=None)
@given(TYPES, st.randoms(use_true_random=False))
def test_bytes_become_values_and_the_same_bytes_again(made: Type, dice: Any) -> None:
    codec = Codec(made)
    value = codec.decode(dice.randbytes(made.size))
    data = codec.encode(value)
    again = codec.decode(data)
    # A float that is no number is not equal to itself, so the bytes are compared as well.
    assert codec.encode(again) == data
    assert len(data) == made.size
    if "float" not in str(msgspec.json.encode(made)):
        assert again == value
