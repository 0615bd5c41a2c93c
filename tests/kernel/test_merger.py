"""The merge program against the protocol's own words, written in Python: every policy, width and sign."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hitless.errors import KernelError
from hitless.kernel.base import Base
from hitless.kernel.maps import create
from hitless.kernel.merger import Merger, Mode
from hitless.layout.conversion import Leaf

# One field of each kind; offsets leave holes, as C does.
LEAVES = (
    Leaf("sum64", 0, 8, merge="sum"),
    Leaf("sum32", 8, 4, merge="sum"),
    Leaf("keep32", 12, 4, merge="keep"),
    Leaf("max64", 16, 8, merge="max"),
    Leaf("max32s", 24, 4, signed=True, merge="max"),
    Leaf("min32", 28, 4, merge="min"),
    Leaf("or32", 32, 4, merge="or"),
    Leaf("keep16", 36, 2, merge="keep"),
    Leaf("sum16", 38, 2, merge="sum"),
    Leaf("max8s", 40, 1, signed=True, merge="max"),
    Leaf("bytes", 41, 11, kind="bytes"),
    Leaf("keep64", 56, 8, merge="keep"),
    Leaf("min64s", 64, 8, signed=True, merge="min"),
)
SIZE = 72
KEY = b"\1\0\0\0"
values = st.binary(min_size=SIZE, max_size=SIZE)


class Maps:
    """Old, new and base map with a merger between them."""

    def __init__(self) -> None:
        self.old = create(1, "old", 4, SIZE, 4)
        self.new = create(1, "new", 4, SIZE, 4)
        self.base = Base.create(self.old, "base", 4)
        self.base.settle()
        self.merger = Merger("test", self.old, self.new, self.base, LEAVES)

    def merge(self, mode: Mode, base: bytes, old: bytes, key: bytes = KEY) -> None:
        keys, b, o = (np.frombuffer(data, np.uint8).reshape(1, -1) for data in (key, base, old))
        row = self.base.find(key)
        if row is None:
            self.base.used = 0
            row = self.base.take(key)
        rows = np.array([row], np.intp)
        self.merger.merge(mode, rows, keys, keys, b, o, o)


@pytest.fixture(scope="module")
def maps() -> Iterator[Maps]:
    made = Maps()
    yield made
    made.merger.close()


def number(data: bytes, leaf: Leaf) -> int:
    return int.from_bytes(data[leaf.offset : leaf.offset + leaf.size], "little", signed=leaf.signed)


def merged(leaf: Leaf, base: bytes, old: bytes, new: bytes) -> bytes:
    """What the protocol says one field becomes."""
    part = slice(leaf.offset, leaf.offset + leaf.size)
    if leaf.merge == "keep":
        return old[part] if new[part] == base[part] else new[part]
    b, o, n = (number(data, leaf) for data in (base, old, new))
    result = {"sum": n + o - b, "max": max(n, o), "min": min(n, o), "or": n | o}[leaf.merge]
    return (result & (1 << 8 * leaf.size) - 1).to_bytes(leaf.size, "little")


@settings(max_examples=300, deadline=None)
@given(base=values, old=values, new=values, same=st.sets(st.sampled_from(range(len(LEAVES)))))
def test_a_changed_entry_is_merged_field_by_field(
    maps: Maps, base: bytes, old: bytes, new: bytes, same: set[int]
) -> None:
    fresh = bytearray(new)
    for index in same:  # fields that the new release has not touched
        part = slice(LEAVES[index].offset, LEAVES[index].offset + LEAVES[index].size)
        fresh[part] = base[part]
    maps.new.update(KEY, bytes(fresh))
    maps.base.put(KEY, base)
    maps.merge(Mode.CHANGED, base, old)
    found = maps.new.lookup(KEY)
    assert found is not None
    for leaf in LEAVES:
        expected = merged(leaf, base, old, bytes(fresh))
        assert found[leaf.offset : leaf.offset + leaf.size] == expected, leaf.path
    assert maps.base.get(KEY) == old


def test_an_inserted_entry_appears_and_enters_the_base(maps: Maps) -> None:
    maps.new.delete(KEY)
    maps.base.erase(KEY)
    maps.merge(Mode.INSERTED, bytes(SIZE), b"\7" * SIZE)
    assert maps.new.lookup(KEY) == maps.base.get(KEY) == b"\7" * SIZE


def test_an_entry_inserted_on_both_sides_is_added_up(maps: Maps) -> None:
    maps.new.update(KEY, (5).to_bytes(8, "little") + bytes(SIZE - 8))
    maps.merge(Mode.INSERTED, bytes(SIZE), (3).to_bytes(8, "little") + bytes(SIZE - 8))
    found = maps.new.lookup(KEY)
    assert found is not None
    assert number(found, LEAVES[0]) == 8


def test_a_changed_entry_that_the_new_release_deleted_stays_deleted(maps: Maps) -> None:
    maps.new.delete(KEY)
    maps.base.put(KEY, bytes(SIZE))
    maps.merge(Mode.CHANGED, bytes(SIZE), b"\1" * SIZE)
    assert maps.new.lookup(KEY) is None


def test_a_deleted_entry_goes_only_if_the_new_release_has_not_touched_it(maps: Maps) -> None:
    for touched in (False, True):
        base = b"\2" * SIZE
        held = base[:-1] + b"\3" if touched else base
        maps.new.update(KEY, held)
        maps.base.put(KEY, base)
        maps.merge(Mode.DELETED, base, base)
        assert maps.new.lookup(KEY) == (held if touched else None)
        assert maps.base.get(KEY) is None


def test_a_full_map_is_an_error_and_the_entry_does_not_enter_the_base(maps: Maps) -> None:
    others = [bytes([number, 9, 9, 9]) for number in range(4)]
    maps.new.delete(KEY)
    for other in others:
        maps.new.update(other, bytes(SIZE))
    maps.base.erase(KEY)
    with pytest.raises(KernelError, match="E2BIG"):
        maps.merge(Mode.INSERTED, bytes(SIZE), b"\1" * SIZE)
    assert maps.base.get(KEY) is None
    for other in others:
        maps.new.delete(other)


def test_thousands_of_records_go_through_in_parts() -> None:
    entries = 3000
    old, new = (create(1, name, 4, 8, entries) for name in ("old", "new"))
    base = Base.create(old, "base", entries)
    merger = Merger("many", old, new, base, (Leaf("count", 0, 8, merge="sum"),))
    keys = np.arange(entries, dtype=np.uint32).view(np.uint8).reshape(-1, 4)
    counts = np.arange(entries, dtype=np.uint64).view(np.uint8).reshape(-1, 8)
    merger.merge(Mode.INSERTED, np.arange(entries), keys, keys, np.zeros_like(counts), counts, counts)
    new_keys, new_values = new.entries()
    found = dict(zip(new_keys.view("u4").ravel().tolist(), new_values.view("u8").ravel().tolist(), strict=True))
    assert found == {number: number for number in range(entries)}
