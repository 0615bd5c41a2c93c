"""Copying in the kernel, against the conversion that numpy does: the same bytes, whatever structs are paired."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hitless.kernel.base import Base
from hitless.kernel.copier import Checked, Checker, Copier
from hitless.kernel.maps import Map, create
from hitless.layout.conversion import Conversion, Move
from hitless.layout.diff import diff_map
from hitless.layout.elf import read_object
from tests.layout.generate import Maker
from tests.layout.test_compiler_oracle import bpf

ENTRIES = 40
PAIRS = 200


def filled(size: int, entries: int = ENTRIES, seed: int = 1) -> Map:
    made = create(1, "old", 4, size, entries)
    values = np.random.default_rng(seed).integers(0, 256, (entries, size), dtype=np.uint8)
    made.write(np.arange(entries, dtype=np.uint32).view(np.uint8).reshape(-1, 4), values)
    return made


def by_key(held: Map) -> dict[bytes, bytes]:
    return {key.tobytes(): value.tobytes() for key, value in zip(*held.entries(), strict=True)}


def copied(old: Map, new: Map, base: Base, value: Conversion | None, chunk: int = 4096) -> int:
    copier = Copier("test", old, new, base, None, value)
    while copier.read(chunk):
        pass
    done = copier.done
    copier.close()
    return done


def test_structs_of_all_kinds_are_converted_as_numpy_does_it(compile_bpf: Callable[..., bytes]) -> None:
    maker = Maker(7)
    pairs = [maker.pair(index) for index in range(PAIRS)]
    sides = [
        {spec.name: spec for spec in read_object(compile_bpf(bpf(groups), "-w"), "pairs.o").maps}
        for groups in ([pair.old for pair in pairs], [pair.new for pair in pairs])
    ]
    converted = 0
    for name, before in sides[0].items():
        value = diff_map(before, sides[1][name]).value
        if value is None or not value.in_kernel or not value.moves:
            continue
        converted += 1
        with filled(before.value_size) as old, create(1, "new", 4, value.new_size, ENTRIES) as new:
            base = Base.create(old, "base", ENTRIES)
            assert copied(old, new, base, value) == ENTRIES
            keys, values = old.entries()
            wanted = value.apply(values).records
            assert by_key(new) == {k.tobytes(): v.tobytes() for k, v in zip(keys, wanted, strict=True)}, name
            assert bool((base.values[:ENTRIES] == values).all())  # the base is in the order of the pass
    assert converted > 10


def test_the_number_of_entries_a_read_works_through_is_bounded() -> None:
    with filled(8, 1000) as old, create(1, "new", 4, 8, 1000) as new:
        base = Base.create(old, "base", 1000)
        copier = Copier("test", old, new, base, None, None)
        seen = []
        while copier.read(64):
            seen.append(copier.done)
        assert seen == [*range(64, 1000, 64)]
        assert copier.done == 1000  # the last few come with the end
        copier.close()


def test_a_key_that_is_in_the_new_map_already_is_passed_over() -> None:
    with filled(8) as old, create(1, "new", 4, 8, ENTRIES) as new:
        new.update(b"\3\0\0\0", b"newer---")
        base = Base.create(old, "base", ENTRIES)
        assert copied(old, new, base, None) == ENTRIES - 1
        assert new.lookup(b"\3\0\0\0") == b"newer---"
        base.settle()
        assert base.get(b"\3\0\0\0") is None


def test_entries_that_find_the_new_map_full_are_in_neither() -> None:
    with filled(8) as old, create(1, "new", 4, 8, 10) as new:
        base = Base.create(old, "base", ENTRIES)
        assert copied(old, new, base, None) == 10
        assert base.used == 10
        assert {key.tobytes() for key in base.keys[:10]} == set(by_key(new))


def test_a_full_base_grows_and_the_pass_goes_on() -> None:
    with filled(8, 300) as old, create(1, "new", 4, 8, 300) as new:
        base = Base.create(old, "base", 128)
        copier = Copier("test", old, new, base, None, None)
        seen = []
        while copier.read(4096):
            seen.append((copier.done, base.room))
            base.grow(128)
        copier.close()
        assert seen == [(128, 0), (256, 0)]
        assert by_key(new) == by_key(old)
        rows = zip(base.keys[:300], base.values[:300], strict=True)
        assert {key.tobytes(): value.tobytes() for key, value in rows} == by_key(old)


WIDER = Conversion(8, 16, (Move("a", 0, 4, 0, 8), Move("b", 4, 4, 8, 4)))


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_the_check_finds_the_one_entry_that_is_wrong(harm: str) -> None:
    with filled(8) as old, create(1, "new", 4, 16, ENTRIES) as new:
        base = Base.create(old, "base", ENTRIES + 5)
        copied(old, new, base, WIDER)
        key = base.keys[7].tobytes()
        if harm == "missing":
            new.delete(key)
        else:
            value = bytearray(new.lookup(key) or b"")
            value[8] ^= 1
            new.update(key, bytes(value))
        found = checked(new, base)
        assert (found.rows, found.wrong, found.first) == (ENTRIES, 1, 7)


def test_the_check_tells_the_row_of_the_whole_base_whatever_segment_it_is_in() -> None:
    with filled(8, 2000) as old, create(1, "new", 4, 16, 2000) as new:
        base = Base.create(old, "base", 2000)
        assert base.segments.each == 512
        copied(old, new, base, WIDER)
        new.delete(base.keys[1100].tobytes())
        new.delete(base.keys[1900].tobytes())
        assert checked(new, base) == Checked(2000, 2, 1100)


def test_the_check_overlooks_what_only_the_new_layout_has() -> None:
    with filled(8) as old, create(1, "new", 4, 16, ENTRIES) as new:
        base = Base.create(old, "base", ENTRIES)
        copied(old, new, base, WIDER)
        keys, values = new.entries()
        values[:, 12:] = 255
        new.write(keys, values)
        assert checked(new, base).wrong == 0


def checked(new: Map, base: Base) -> Checked:
    checker = Checker("test", new, base, None, WIDER)
    while checker.read(16):
        pass
    found = checker.found
    checker.close()
    return found

