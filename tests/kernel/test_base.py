"""The base of a merge over its segments: how it grows, what it takes, and what is there when its process is gone."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hitless.errors import KernelError
from hitless.kernel.base import Base
from hitless.kernel.maps import Map, create
from hitless.kernel.merger import Merger, Mode
from hitless.layout.conversion import Leaf
from meshd.demo.lab import Lab

SIZE = 8


def key(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def value(number: int) -> bytes:
    return number.to_bytes(SIZE, sys.byteorder)


def hash_map(entries: int, size: int = SIZE) -> Map:
    return create(1, "old", 4, size, entries)


def filled(base: Base, rows: int) -> Base:
    """Rows as a pass writes them, while there is room."""
    keys = np.arange(rows, dtype=np.uint32).view(np.uint8).reshape(-1, 4)
    base.append(keys, np.arange(rows, dtype=np.uint64).view(np.uint8).reshape(-1, SIZE))
    base.settle()
    return base


def segments(base: Base) -> int:
    return base.capacity // base.segments.each


def memory(base: Base) -> int:
    """Bytes that the kernel holds for it."""
    held = []
    for row in range(0, base.capacity, base.segments.each):
        with base.segments.segment(row) as segment:
            held.append(Path(f"/proc/self/fdinfo/{segment.fd}").read_text())
    held.append(Path(f"/proc/self/fdinfo/{base.segments.map.fd}").read_text())
    return sum(int(line.split()[1]) for text in held for line in text.splitlines() if line.startswith("memlock:"))


def mapped() -> int:
    """Bytes of BPF maps that are mapped into this process."""
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "bpf-map" in line)
    bounds = ([int(bound, 16) for bound in line[0].split("-")] for line in lines)
    return sum(end - start for start, end in bounds)


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("entries", [1, 5, 100])
def test_a_base_of_few_rows_takes_little_memory(entries: int) -> None:
    with hash_map(entries) as model:
        base = Base.create(model, "base", entries)
        assert base.capacity >= entries
        assert memory(base) <= 16 << 10


def test_a_base_of_many_rows_takes_little_more_than_they_need() -> None:
    rows = 100_000
    with hash_map(rows, 64) as model:
        base = Base.create(model, "base", rows)
        assert segments(base) > 8
        key = 8  # which older kernels count for each row, though an array has none
        assert memory(base) < 1.1 * rows * (8 + 8 + 64 + key)


@pytest.mark.parametrize("size", [4, 1020, 5000, 1 << 16])
def test_no_segment_is_large_whatever_the_size_of_a_row(size: int) -> None:
    with hash_map(2000, size) as model:
        base = Base.create(model, "base", 2000)
        assert base.segments.each * base.segments.row_size <= 2 << 20
        base.put(key(7), b"x" * size)
        assert base.get(key(7)) == b"x" * size


def test_growing_moves_no_row() -> None:
    with hash_map(1000) as model:
        base = filled(Base.create(model, "base", 1000), 1000)
        before = base.keys, base.values
        base.grow(5000)
        assert base.capacity >= 6000
        base.put(key(999), value(1))
        base.put(key(5000), value(2))
        assert (base.get(key(998)), base.get(key(999)), base.get(key(5000))) == (value(998), value(1), value(2))
        assert bool((before[0] == base.keys[: len(before[0])]).all())
        assert bool((before[1] == base.values[: len(before[1])]).all())


def test_a_merge_program_reaches_rows_that_came_after_it() -> None:
    leaves = (Leaf("count", 0, SIZE, merge="sum"),)
    with hash_map(4000) as old, hash_map(4000) as new:
        base = Base.create(old, "base", 10)
        merger = Merger("grown", old, new, base, leaves)
        base.grow(3990)
        assert segments(base) > 3
        keys = np.arange(4000, dtype=np.uint32).view(np.uint8).reshape(-1, 4)
        values = np.arange(4000, dtype=np.uint64).view(np.uint8).reshape(-1, SIZE)
        places = np.array([base.take(row.tobytes()) for row in keys], np.intp)
        merger.merge(Mode.INSERTED, places, keys, keys, np.zeros_like(values), values, values)
        merger.close()
        assert bool((base.keys[:4000] == keys).all())
        assert bool((base.values[:4000] == values).all())
        assert bool(base.live[:4000].all())


def test_a_base_has_an_end() -> None:
    with hash_map(10) as model:
        base = Base.create(model, "endless", 10)
        with pytest.raises(KernelError, match="endless has room for") as raised:
            base.grow(100_000)
        assert raised.value.facts["errno_name"] == "ENOSPC"


FILLING = """
import os, signal, sys
from pathlib import Path
from tests.kernel.test_base import Base, filled, hash_map, key, value
base = filled(Base.create(hash_map(3000), "base", 3000), 3000)
base.segments.map.pin(Path(sys.argv[1]))
base.grow(1000)
base.put(key(3500), value(7))
base.erase(key(1))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_another_process_finds_all_rows_after_a_kill(lab: Lab) -> None:
    pin = lab.bpffs / "base"
    done = subprocess.run([sys.executable, "-c", FILLING, str(pin)], check=False)
    assert done.returncode == -signal.SIGKILL
    with hash_map(3000) as model:
        base = Base.open(pin, model)
        assert segments(base) > 3
        assert base.used == 3001
        assert base.get(key(1)) is None
        assert all(base.get(key(number)) == value(number) for number in (0, 2, 1500, 2999))
        assert base.get(key(3500)) == value(7)
        base.put(key(4000), value(8))
        assert base.get(key(4000)) == value(8)


def test_its_memory_is_unmapped_with_the_last_array_of_it() -> None:
    gc.collect()
    before, open_before = mapped(), descriptors()
    with hash_map(5000) as model:
        base = filled(Base.create(model, "base", 5000), 5000)
        values = base.values[4999:5000]
        base.close()
        del base
        assert mapped() > before
        assert values.tobytes() == value(4999)
        del values
    assert mapped() == before
    assert descriptors() == open_before
