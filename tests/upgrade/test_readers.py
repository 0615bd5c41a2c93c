"""Other programs that open maps by their paths while upgrades go on: all maps are of one release, and none is missing.

`make soak` runs the same for longer, as HITLESS_UPGRADES=1000 does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

import hitless
from hitless.upgrade.record import read_record, write_record
from meshd.demo.lab import Lab
from tests.bpf import pin_below
from tests.patience import patient
from tests.releases import ATTACH, write_release
from tests.upgrade.conftest import Release
from tests.upgrade.reader import NAMES, WAYS, open_all

UPGRADES = int(os.environ.get("HITLESS_UPGRADES", "50"))
HOUSE = Path(__file__).parents[2]
CONVERTED = NAMES[:-1]
SOURCE = (
    "".join(f"MAP({name}, HASH, 64, __u32, struct entry);\n" for name in CONVERTED)
    + "MAP(kept, HASH, 64, __u32, __u64);\n"
    + 'SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return 1; }\n'
    + 'char _license[] SEC("license") = "GPL";\n'
)
ENTRY = {1: "struct entry { __u32 number; };\n", 2: "struct entry { __u64 since; __u64 number; };\n"}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two releases that convert three maps on the way to each other, and keep one."""
    top = tmp_path_factory.mktemp("readers")
    manifest = ATTACH + "".join(f'[map.{name}]\non_loss = "discard"\n' for name in CONVERTED)
    return {n: write_release(top / str(n), f"{n}.0", ENTRY[n] + SOURCE, manifest) for n in ENTRY}


def maps_of(node: hitless.Node) -> tuple[int, ...]:
    current = node.observe().current
    assert current is not None
    return tuple(current.maps[name].info.id for name in NAMES)


@contextmanager
def reading(node: hitless.Node) -> Iterator[list[dict[str, Any]]]:
    """A reader for each way to open pins below a directory; what they saw is in the list when the block has ended."""
    told: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "tests.upgrade.reader", str(node.root)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen([*command, way], stdin=pipe, stdout=pipe, text=True, cwd=HOUSE) for way in WAYS]
    try:
        for reader in running:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "ready\n"
        yield told
        told += [json.loads(reader.communicate(timeout=patient(30))[0]) for reader in running]
    finally:
        for reader in running:
            reader.kill()
            reader.communicate()


def test_whoever_opens_the_directory_once_gets_all_maps_of_one_release_and_misses_none(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    generations = {maps_of(node)}
    with reading(node) as told:
        for number in range(UPGRADES):
            hitless.apply(node, release(1 if number % 2 else 2))
            generations.add(maps_of(node))
    assert len(generations) == UPGRADES + 1
    for seen in told:
        sets = {tuple(ids): count for ids, count in seen["sets"]}
        mixed = {tuple(ids) for ids in seen["plain"]} - generations
        print(
            f"{sum(sets.values()):,} times all maps, of {len(sets)} generations, {seen['outdated']} handles were too "
            f"old; plain paths gave {len(mixed)} mixtures"  # which nobody promised not to happen
        )
        assert seen["missing"] == []
        assert set(sets) <= generations
        assert len(sets) > UPGRADES // 2, "the reader came too seldom to have seen something"


def opened(node: hitless.Node) -> int:
    return os.open(node.root / "maps", os.O_RDONLY | os.O_DIRECTORY)


def test_a_directory_opened_before_an_upgrade_goes_on_showing_the_maps_of_the_release_before(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    before = maps_of(node)
    directory = opened(node)
    hitless.apply(node, release(2))
    assert open_all(directory, pin_below) == before
    assert maps_of(node) != before
    os.close(directory)


def test_a_directory_opened_before_the_last_upgrade_but_one_is_empty_and_is_opened_again(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    directory = opened(node)
    hitless.apply(node, release(2))
    hitless.apply(node, release(1))
    assert os.listdir(directory) == []  # noqa: PTH208
    for name in NAMES:
        for get in WAYS.values():
            with pytest.raises(FileNotFoundError):
                get(directory, name)
    os.close(directory)
    again = opened(node)
    assert open_all(again, pin_below) == maps_of(node)
    os.close(again)


def test_an_upgrade_that_is_taken_back_shows_readers_nothing(node: hitless.Node, release: Release, lab: Lab) -> None:
    hitless.apply(node, release(1))
    before = maps_of(node)

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            raise ZeroDivisionError

    with reading(node) as told:
        for _ in range(5):
            with pytest.raises(ZeroDivisionError):
                hitless.apply(node, release(2), progress=fail)
    for seen in told:
        assert seen["missing"] == []
        assert {tuple(ids) for ids, _ in seen["sets"]} == {before}


def test_a_record_that_is_being_written_is_read_as_it_was_before_or_after(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    path = node.current / "record"
    committed = read_record(path)
    other = msgspec.structs.replace(committed, phase="cutover", version="9.9")
    writer = os.fork()
    if writer == 0:
        while True:
            write_record(path, committed)
            write_record(path, other)
    try:
        until = time.monotonic() + 3  # without a second look, one in some thousand readings is half of each
        while time.monotonic() < until:
            assert read_record(path) in (committed, other)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
