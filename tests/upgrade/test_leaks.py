"""Upgrades leave no more behind than the first of them did: in the kernel, in the process, and under the pin root.

`make soak` runs the same for longer, as HITLESS_UPGRADES=1000 does. What is counted carries a name of this process'
own, for other tests may run at the same time. The garbage collector is off: a daemon that upgrades in its own process
gets its memory back when an upgrade is over, not when Python happens to look.
"""

from __future__ import annotations

import gc
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hitless
from hitless.errors import KernelError
from hitless.kernel.links import all_links
from hitless.kernel.maps import Map, btf_bytes
from hitless.kernel.programs import Program
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.bpf import ids
from tests.releases import COUNTING, FIRST, SECOND, write_release
from tests.upgrade.conftest import Release

UPGRADES = int(os.environ.get("HITLESS_UPGRADES", "16"))
SETTLED = 10.0  # s until the kernel has given back what is held no more

OURS = f"l{os.getpid():x}"  # short, for the kernel cuts names to 15 characters
BACK = (f"{OURS}tally", f"{OURS}limit")

Times = Counter[str]


def ours(source: str) -> str:
    """The source with names of our own for maps and the program."""
    source = re.sub(r"MAP\((\w+)", rf"MAP({OURS}\1", source)
    return source.replace("&tally", f"&{OURS}tally").replace("int count4", f"int {OURS}count")


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    top = tmp_path_factory.mktemp("leaks")
    attach = f'[[attach]]\nprogram = "{OURS}count"\nhook = "cgroup"\ntarget = "${{cgroup}}"\nlink = "connect4"\n'
    back = attach + f'[map.{OURS}limit]\nwas = "{OURS}limits"\n[map.{OURS}extra]\non_loss = "discard"\n'
    there = attach + f'[map.{OURS}limits]\nwas = "{OURS}limit"\n'
    return {
        1: write_release(top / "1", "1.0", ours(FIRST + COUNTING), back, OURS),
        2: write_release(top / "2", "2.0", ours(SECOND + COUNTING), there, OURS),
    }


def held(node: hitless.Node, lab: Lab) -> Times:
    """What there is now, of each kind by name."""
    found: Times = Counter()
    for kind, name in (*_maps(), *_programs(), *_types()):
        found[f"{kind} {name}"] += 1
    found["links"] = sum(link.target_id == lab.cgroup.stat().st_ino for link in all_links())
    for path in node.root.rglob("*"):
        found[f"{'directory' if path.is_dir() else 'pin'} {path.name}"] += 1
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        except FileNotFoundError:
            continue  # the one that lists them
        found[f"descriptor {target}"] += 1
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "bpf" in line.rpartition(" ")[2]:
            found["mapping of a map"] += 1
    return found


def _maps() -> Iterator[tuple[str, str]]:
    for number in ids("map"):
        try:
            with Map.by_id(number) as one:
                name = one.info.name
                if OURS in name or (name == "record" and _is_our_record(one)):
                    yield "map", name
        except KernelError:
            continue  # of another test, and gone meanwhile


def _is_our_record(one: Map) -> bool:
    data = one.lookup(b"\0\0\0\0") or b""
    try:
        return OURS.encode() in zlib.decompressobj().decompress(data[12:])
    except zlib.error:
        return False


def _programs() -> Iterator[tuple[str, str]]:
    for number in ids("program"):
        try:
            with Program.by_id(number) as one:
                if OURS in one.info.name:
                    yield "program", one.info.name
        except KernelError:
            continue


def _types() -> Iterator[tuple[str, str]]:
    for number in ids("btf"):
        try:
            if OURS.encode() in btf_bytes(number):
                yield "BTF", "object"
        except KernelError:
            continue


def more(before: Times, node: hitless.Node, lab: Lab) -> Times:
    """What there is more than ``before``, when the kernel had its time to give things back."""
    until = time.monotonic() + SETTLED
    while (found := held(node, lab) - before) and time.monotonic() < until:
        time.sleep(0.1)
    return found


@pytest.fixture
def collected_by_nobody() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def there_and_back(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(2))
    hitless.apply(node, release(1), allow_loss=BACK)


def rolled_back(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(2))
    hitless.rollback(node, allow_loss=BACK)


def failing(node: hitless.Node, release: Release) -> None:
    """Once before the cutover, once after it."""
    for step in ("verify", "commit"):

        def fail(event: hitless.Progress, step: str = step) -> None:
            if event.step == step:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            hitless.apply(node, release(2), progress=fail)


def with_a_control_plane(node: hitless.Node, release: Release) -> None:
    for number, allowed in ((2, ()), (1, BACK)):
        tally = node.map(f"{OURS}tally")
        tally[number] = {"count": number}
        hitless.apply(node, release(number), allow_loss=allowed, prepare=lambda _: _write(node))
        tally[number] = {"count": number}


def _write(node: hitless.Node) -> None:
    node.map(f"{OURS}tally")[7] = {"count": 1}
    node.map(f"{OURS}tally").items()


def looking(node: hitless.Node, release: Release) -> None:
    there_and_back(node, release)
    hitless.plan(node, release(2))
    status(node)


def restarting(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))


def unloading(node: hitless.Node, release: Release) -> None:
    there_and_back(node, release)
    hitless.unload(node)
    hitless.apply(node, release(1))


ROUNDS: dict[str, Callable[[hitless.Node, Release], None]] = {
    one.__name__.replace("_", " "): one
    for one in (there_and_back, rolled_back, failing, with_a_control_plane, looking, restarting, unloading)
}


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_of_upgrades_in_one_process_leave_no_more_than_the_first_round_did(
    name: str, node: hitless.Node, release: Release, lab: Lab, collected_by_nobody: None
) -> None:
    hitless.apply(node, release(1))
    there_and_back(node, release)
    ROUNDS[name](node, release)
    first = held(node, lab)
    assert first["links"] == 1
    assert first[f"map {OURS}tally"] > 0
    for _ in range(UPGRADES // 2 if name in ("there and back", "rolled back") else max(3, UPGRADES // 10)):
        ROUNDS[name](node, release)
    assert more(first, node, lab) == Counter()


def test_nothing_is_held_by_the_process_when_an_upgrade_is_over(
    node: hitless.Node, release: Release, lab: Lab, collected_by_nobody: None
) -> None:
    hitless.apply(node, release(1))
    before = held(node, lab)
    there_and_back(node, release)
    after = held(node, lab) - before
    assert {what for what in after if what.startswith(("descriptor anon_inode:bpf", "mapping"))} == set()


def test_nothing_is_held_for_nodes_that_nobody_uses_any_more(
    node: hitless.Node, release: Release, collected_by_nobody: None
) -> None:
    hitless.apply(node, release(1))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(5):
        again = hitless.Node(node.root)
        again.map(f"{OURS}tally").items()
        with again.lock():
            pass
        del again
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_kills_and_recoveries_leave_no_more_than_the_first_did(
    node: hitless.Node, release: Release, lab: Lab, collected_by_nobody: None
) -> None:
    def killed(step: str) -> None:
        child = os.fork()
        if child == 0:
            hitless.apply(node, release(2), progress=lambda event: os._exit(0) if event.step == step else None)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        hitless.recover(node)
        if node.observe().version == "2.0":
            hitless.apply(node, release(1), allow_loss=BACK)

    hitless.apply(node, release(1))
    there_and_back(node, release)
    for step in ("verify", "merge"):
        killed(step)
    first = held(node, lab)
    for _ in range(max(2, UPGRADES // 10)):
        for step in ("copy", "verify", "cutover", "merge", "clean-up"):
            killed(step)
    assert more(first, node, lab) == Counter()
