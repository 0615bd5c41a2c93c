"""Writers besides the upgrade: other processes, batches, killed and stuck ones, and those that know nothing of us."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.kernel.maps import Map, is_alive
from hitless.upgrade.handle import Access
from hitless.upgrade.holders import Holder, find_holders
from hitless.upgrade.model import ReplacedMap
from hitless.upgrade.status import status
from hitless.upgrade.writers import WriterLock
from meshd.demo.lab import Lab
from tests.cli.test_commands import as_json, hitless_command
from tests.kills import kill_upgrade
from tests.patience import patient
from tests.releases import ATTACH, write_release

PROGRAM = """
MAP(held, HASH, 2048, __u32, struct entry);
MAP(kept, HASH, 64, __u32, __u64);
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "GPL";
"""
FIRST = "struct entry { __u32 number; __u8 label[6]; };" + PROGRAM
SECOND = "struct entry { __u64 since; __u64 number; __u8 label[6]; };" + PROGRAM
LABEL = b"labels"

Release = Callable[[int], hitless.Bundle]


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two releases with a map ``held`` that is converted both ways, and a map ``kept`` that stays as it is."""
    top = tmp_path_factory.mktemp("writers")
    manifest = ATTACH + '[map.held]\non_loss = "discard"\n'
    sources = {1: FIRST, 2: SECOND}
    return {number: write_release(top / str(number), f"{number}.0", sources[number], manifest) for number in sources}


@pytest.fixture
def release(releases: dict[int, Path], lab: Lab) -> Release:
    return lambda number: hitless.Bundle.load(releases[number], {"cgroup": str(lab.cgroup)})


@pytest.fixture
def node(lab: Lab) -> hitless.Node:
    return hitless.Node(lab.bpffs / "store")


def value(number: int) -> dict[str, Any]:
    return {"number": number, "label": LABEL}


def numbers(node: hitless.Node) -> dict[int, int]:
    return {key: entry["number"] for key, entry in node.map("held").items()}


# A control plane in a process of its own: sets, changes and deletes its own keys until it is told to end, then prints
# what the map must hold of them and how long its writes took.
WRITER = """
import json, random, signal, sys, time
import hitless
root, first, batches = json.loads(sys.argv[1])
held, chance = hitless.Node(root).map("held"), random.Random(first)
journal, took, counts, over = {}, [], dict.fromkeys(("set", "change", "delete", "missed"), 0), []
signal.signal(signal.SIGTERM, lambda *_: over.append(True))
def write(call, *given):
    began = time.perf_counter()
    result = call(*given)
    took.append(time.perf_counter() - began)
    return result
def value():
    return {"number": chance.randrange(1 << 32), "label": chance.randbytes(6)}
held.delete_many(range(first, first + 500))
while not over:
    key = first + chance.randrange(500)
    if batches and chance.random() < 0.05:
        keys = [first + chance.randrange(500) for _ in range(50)]
        if chance.random() < 0.5:
            pairs = [(key, value()) for key in keys]
            write(held.update_many, pairs)
            journal.update(pairs)
        else:
            counts["missed"] += write(held.delete_many, keys) != len(journal.keys() & set(keys))
            journal = {key: value for key, value in journal.items() if key not in keys}
    elif key in journal and chance.random() < 0.3:
        try:
            write(held.__delitem__, key)
        except KeyError:
            counts["missed"] += 1
        del journal[key]
        counts["delete"] += 1
    else:
        counts["change" if key in journal else "set"] += 1
        journal[key] = value()
        write(held.__setitem__, key, journal[key])
    if len(took) == 1:
        print("ready", flush=True)
took.sort()
told = {"journal": {key: [v["number"], v["label"].hex()] for key, v in journal.items()}, "counts": counts}
print(json.dumps(told | {"writes": len(took), "max": took[-1], "p99": took[len(took) * 99 // 100]}), flush=True)
"""


class Told(dict[str, Any]):
    """What a writer said in the end."""


@contextmanager
def writers(node: hitless.Node, count: int = 2, batches: bool = True) -> Iterator[list[Told]]:
    """Writers in processes of their own, each with keys of its own; in the end the list holds their words."""
    told: list[Told] = []
    running = [started(WRITER, str(node.root), 1000 * index, batches) for index in range(1, count + 1)]
    try:
        yield told
    finally:
        for writer in running:
            writer.send_signal(signal.SIGTERM)
        words = [writer.communicate(timeout=patient(20))[0] for writer in running]
    told += [Told(json.loads(text)) for text in words]


def started(script: str, *given: object) -> subprocess.Popen[str]:
    """A Python process with these arguments as JSON, that has said ``ready``."""
    process = subprocess.Popen([sys.executable, "-c", script, json.dumps(given)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def journal(told: list[Told]) -> dict[int, list[object]]:
    return {int(key): entry for one in told for key, entry in one["journal"].items()}


def found(node: hitless.Node) -> dict[int, list[object]]:
    return {key: [entry["number"], entry["label"].hex()] for key, entry in node.map("held").items()}


# Writers in other processes


def test_what_two_other_processes_write_during_50_upgrades_is_in_the_map_to_the_last_entry(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    with writers(node) as told:
        for _ in range(25):
            hitless.apply(node, release(2))
            hitless.apply(node, release(1))
    assert found(node) == journal(told)
    for one in told:
        assert one["counts"].pop("missed") == 0, "all that was to be deleted was there"
        assert min(one["counts"].values()) > 100, "each kind of write was made many times"
        print(f"{one['writes']} writes, p99 {one['p99'] * 1e3:.2f} ms, longest {one['max'] * 1e3:.2f} ms")


def test_what_other_processes_write_stays_when_upgrades_are_taken_back(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))

    def late(event: hitless.Progress) -> None:
        if event.step == "commit":
            raise ZeroDivisionError

    with writers(node) as told:
        for _ in range(15):
            with pytest.raises(ZeroDivisionError):
                hitless.apply(node, release(2), progress=late)
    assert found(node) == journal(told)
    assert [one["counts"]["missed"] for one in told] == [0, 0]


def test_without_the_lock_what_is_written_between_the_last_merge_and_the_commit_is_lost(
    node: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WriterLock, "alone", lambda lock, seconds: nullcontext())
    hitless.apply(node, release(1))
    with writers(node, batches=False) as told:
        hitless.apply(node, release(2), progress=lambda event: time.sleep(0.1 * (event.step == "commit")))
    assert found(node) != journal(told)


def test_a_writer_in_another_process_waits_for_the_last_merge_and_the_exchange_only(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))

    def slow(event: hitless.Progress) -> None:
        time.sleep({"merge": 0, "commit": 0}.get(event.step, 1.5))

    with writers(node) as told:
        hitless.apply(node, release(2), progress=slow)
    assert all(one["max"] < 1.2 for one in told), "no write waited for a step that took 1.5 s"
    with writers(node) as told:
        hitless.apply(node, release(1), progress=lambda event: time.sleep(event.step == "merge"))
    assert all(one["max"] > 0.9 for one in told), "but each waited while the last merge took 1 s"


def test_writers_that_never_rest_do_not_keep_an_upgrade_waiting(node: hitless.Node, release: Release) -> None:
    script = """
import json, sys, time
import hitless
root, number = json.loads(sys.argv[1])
node = hitless.Node(root)
node.map("held")[number] = {"number": number}
print("ready", flush=True)
while True:
    with node.access.to_write("held"):  # as a large batch does
        time.sleep(0.03)
"""
    hitless.apply(node, release(1))
    running = [started(script, str(node.root), number) for number in range(8)]
    try:
        hitless.apply(node, release(2), wait=3)
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert numbers(node) == {number: number for number in range(8)}


WITHIN = """
import json, os, signal, sys, time
import hitless
(root,) = json.loads(sys.argv[1])
node = hitless.Node(root)
with node.access.to_write("held"):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_writer_killed_in_the_middle_of_a_write_blocks_nothing(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    for _ in range(3):
        writer = started(WITHIN, str(node.root))
        writer.kill()
        writer.communicate()
    began = time.monotonic()
    assert hitless.apply(node, release(2)).committed
    assert time.monotonic() - began < 5


def test_a_writer_that_never_ends_is_named_before_a_hook_changes(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    before = node.observe()
    writer = started(WITHIN, str(node.root))
    try:
        with pytest.raises(hitless.BusyError, match=f"(?s)process {writer.pid} .*has been writing") as caught:
            hitless.apply(node, release(2), wait=0.2)
    finally:
        writer.kill()
        writer.communicate()
    assert caught.value.facts["pid"] == writer.pid
    assert node.observe() == before
    assert hitless.apply(node, release(2)).committed


def test_a_writer_that_begins_without_an_end_after_the_cutover_leaves_an_upgrade_that_the_next_apply_takes_back(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    node.map("held")[1] = value(1)
    begun: list[subprocess.Popen[str]] = []

    def progress(event: hitless.Progress) -> None:
        if event.step == "catch-up":
            begun.append(started(WITHIN, str(node.root)))

    with pytest.raises(hitless.BusyError):
        hitless.apply(node, release(2), progress=progress, wait=0.2)
    assert status(node).hooks[0].program == "count4", "the old release's programs are on the hooks"
    begun[0].kill()
    begun[0].communicate()
    assert "took back" in (hitless.recover(node) or "")
    assert numbers(node) == {1: 1}
    assert node.observe().version == "1.0"


@pytest.mark.parametrize("step", ["catch-up", "merge", "commit", "clean-up"])
def test_writers_go_on_when_an_upgrade_is_killed_and_nothing_they_write_is_lost(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab, step: str
) -> None:
    hitless.apply(node, release(1))
    with writers(node) as told:
        for _ in range(2):
            kill_upgrade(step, node, releases[2], {"cgroup": str(lab.cgroup)})
            time.sleep(0.1)
            hitless.apply(node, release(2))
            hitless.apply(node, release(1))
    assert all(one["max"] < 5 for one in told)
    assert found(node) == journal(told)


def test_a_forked_child_does_not_hold_the_lock_that_its_parent_held(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    script = """
import json, os, sys, time
import hitless
(root,) = json.loads(sys.argv[1])
node = hitless.Node(root)
with node.access.to_write("held"):
    if os.fork() == 0:
        node.map("kept")[1] = 1  # takes and lets go of a lock of its own
        os.write(1, b"ready\\n")
        time.sleep(60)
    time.sleep(60)
"""
    parent = started(script, str(node.root))
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    try:
        with pytest.raises(hitless.BusyError):
            hitless.apply(node, release(2), wait=0.1)
        parent.kill()
        parent.wait()
        assert hitless.apply(node, release(2), wait=1).committed
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)


def test_a_handle_reads_and_writes_the_new_release_after_another_process_upgraded(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    held = node.map("held")
    held[1] = value(1)
    where = ["--root", node.root, "--set", f"cgroup={lab.cgroup}"]
    hitless_command("apply", releases[2], *where)
    assert held.get(1) == {"since": 0, **value(1)}
    held[2] = {"since": 5, **value(2)}
    hitless_command("apply", releases[1], *where)
    assert sorted(held.items()) == [(1, value(1)), (2, value(2))]
    assert held.spec.value_size == 12


def test_a_handle_opens_its_map_once_a_generation(
    node: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    hitless.apply(node, release(1))
    opened: list[Path] = []
    really = Map.open

    def noting(path: Path) -> Map:
        opened.append(path)
        return really(path)

    monkeypatch.setattr(Map, "open", noting)
    other = hitless.Node(node.root)
    for version in (2, 1):
        for key in range(50):
            other.map("held")[key] = value(key)
            assert other.map("held").get(key) is not None
        assert opened == [node.current / "maps" / "held"]
        hitless.apply(node, release(version))
        opened.clear()


def test_a_handle_outlives_an_unload_and_is_kept_apart_from_the_next_upgrade(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    other = hitless.Node(node.root)
    held = other.map("held")
    held[1] = value(1)
    hitless.unload(node)
    with pytest.raises(hitless.NodeError, match="has no map held; its maps: none"):
        held[1] = value(1)
    hitless.apply(node, release(1))
    held[2] = value(2)
    assert numbers(node) == {2: 2}
    with other.access.to_write("held"), pytest.raises(hitless.BusyError):
        hitless.apply(node, release(2), wait=0.1)


def test_a_pin_that_is_replaced_by_hand_is_followed(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.map("kept")[1] = 1
    pin = node.root / "maps" / "kept"
    held = Map.open(pin)
    pin.unlink()
    for name in ("kept", "store.bss"):
        with pytest.raises(hitless.NodeError, match=f"has no map {name}; its maps: held"):
            node.map(name).get(1)
    held.pin(pin)
    assert node.map("kept").get(1) == 1


def test_a_write_by_the_thread_that_commits_an_interrupted_upgrade_is_refused_and_not_lost(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    kill_upgrade("merge", node, releases[2], {"cgroup": str(lab.cgroup)})
    refused: list[BaseException] = []

    def progress(event: hitless.Progress) -> None:
        if event.step == "commit":
            try:
                node.map("held")[1] = value(1)
            except hitless.BusyError as error:
                refused.append(error)

    hitless.recover(node, progress=progress)
    assert len(refused) == 1
    node.map("held")[1] = value(1)
    assert numbers(node) == {1: 1}


# Batches


def test_a_batch_that_does_not_fit_says_exactly_what_of_it_is_written(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    kept = node.map("kept")
    kept.update_many((key, key) for key in range(60))
    with pytest.raises(hitless.KernelError, match="4 of 10 entries are done, then key 68000000 was refused") as caught:
        kept.update_many((key, key) for key in range(100, 110))
    assert (caught.value.facts["done"], caught.value.facts["key"]) == (4, "68000000")
    assert caught.value.facts["errno_name"] == "E2BIG"
    assert dict(kept.items()) == {key: key for key in (*range(60), *range(100, 104))}


def test_a_batch_with_an_entry_that_does_not_fit_its_type_writes_nothing(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    with pytest.raises(hitless.LayoutError, match="does not fit"):
        node.map("kept").update_many([(1, 1), (2, 1 << 64)])
    with pytest.raises(hitless.LayoutError, match="does not fit"):
        node.map("kept").delete_many([1, 1 << 32])
    assert node.map("kept").items() == []


def test_many_entries_are_deleted_at_once_and_those_that_are_not_there_are_not_counted(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    held = node.map("held")
    held.update_many((key, value(key)) for key in range(1000))
    assert held.delete_many(range(500, 1500)) == 500
    assert held.delete_many(range(0, 500, 2)) == 250
    assert held.delete_many(range(0, 500, 2)) == held.delete_many([]) == 0
    assert sorted(numbers(node)) == list(range(1, 500, 2))


def test_a_batch_to_a_map_that_refuses_deletion_says_that_none_is_deleted(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    source = 'MAP(held, ARRAY, 4, __u32, __u64);' + PROGRAM.split("\n", 3)[3]
    directory = write_release(tmp_path / "1", "1", source)
    hitless.apply(node, hitless.Bundle.load(directory, {"cgroup": str(lab.cgroup)}))
    held = node.map("held")
    held.update_many([(0, 5), (3, 7)])
    with pytest.raises(hitless.KernelError, match=r"0 of 2 entries are done, then key 00000000 was refused.*EINVAL"):
        held.delete_many([0, 3])
    with pytest.raises(hitless.KernelError, match=r"1 of 2 entries are done, then key 04000000 was refused.*E2BIG"):
        held.update_many([(1, 6), (4, 7)])
    assert held.items() == [(0, 5), (1, 6), (2, 0), (3, 7)]


def test_batches_during_an_upgrade_in_the_same_process_reach_both_releases(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(1))
    node.map("held").update_many((key, value(key)) for key in range(10))
    old = Map.open(node.root / "maps" / "held")
    seen: list[list[int]] = []

    def control_plane(node: hitless.Node) -> None:
        held = node.map("held")
        held.update_many((key, {"since": 9, **value(key + 100)}) for key in range(5, 15))
        assert held.delete_many([0, 1, 14, 77]) == 3
        node.map("kept").update_many((key, key) for key in range(3))
        assert node.map("kept").delete_many([2, 3]) == 1
        keys, _ = old.entries()
        seen.append(sorted(int.from_bytes(key.tobytes(), "little") for key in keys))

    hitless.apply(node, release(2), prepare=control_plane)
    assert seen == [list(range(2, 14))]
    assert numbers(node) == {key: key + 100 * (key >= 5) for key in range(2, 14)}
    assert dict(node.map("kept").items()) == {0: 0, 1: 1}


def test_a_batch_that_an_upgrade_outruns_is_encoded_anew_for_the_new_release(
    node: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    hitless.apply(node, release(1))
    other = hitless.Node(node.root)
    upgraded: list[hitless.Result] = []
    really = Access.to_write

    def late(access: Access, name: str) -> Any:
        if not upgraded:  # after the encoding, before the lock
            upgraded.append(hitless.apply(node, release(2)))
        return really(access, name)

    monkeypatch.setattr(other.access, "to_write", lambda name: late(other.access, name))
    other.map("held").update_many([(1, value(1)), (2, value(2))])
    assert node.map("held").get(2) == {"since": 0, **value(2)}
    assert numbers(node) == {1: 1, 2: 2}


# Processes that know nothing of us

FOREIGN = """
import json, sys, time
from pathlib import Path
from hitless.kernel.maps import Map, is_alive
(path,) = json.loads(sys.argv[1])
held = Map.open(Path(path))
print("ready", flush=True)
time.sleep(60)
"""


@contextmanager
def foreign(node: hitless.Node, name: str) -> Iterator[int]:
    """A process that holds a map by a descriptor and does not know what an upgrade is; its process id."""
    process = started(FOREIGN, str(node.root / "maps" / name))
    try:
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def holders(node: hitless.Node, pid: int) -> list[Holder]:
    return [holder for holder in status(node).holders.found if holder.pid == pid]


def test_a_process_that_holds_an_old_map_is_found_and_named(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab
) -> None:
    hitless.apply(node, release(1))
    old = Map.open(node.root / "maps" / "held").info.id
    where = ["--root", node.root, "--set", f"cgroup={lab.cgroup}"]
    with foreign(node, "held") as pid, foreign(node, "kept") as reader:
        (holder,) = holders(node, pid)
        assert (holder.map, holder.map_id, holder.old, holder.follows) == ("held", old, False, False)
        assert "python" in holder.command
        applied = as_json("apply", releases[2], *where)
        (left,) = applied["left_behind"]
        assert (left["pid"], left["map"], left["map_id"], left["old"]) == (pid, "held", old, True)
        (kept,) = holders(node, reader)
        assert not kept.old, "the map that was kept is no old one"
        hitless.apply(node, release(1))  # now the map is two generations old, and no path leads to it
        text = hitless_command("apply", releases[2], *where)
        assert f"process {pid} (" in text
        assert f"still holds the old map held, id {old}: what it writes reaches nobody" in text
        assert "left behind: its writes reach nobody" in hitless_command("status", "--root", node.root)
        told = as_json("status", "--root", node.root)["holders"]["found"]
        assert {(entry["pid"], entry["map"], entry["old"]) for entry in told} >= {
            (pid, "held", True), (reader, "kept", False)
        }  # fmt: skip
    assert as_json("apply", releases[2], *where)["left_behind"] == []


def test_a_process_that_uses_handles_is_shown_to_follow(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    script = """
import json, sys, time
import hitless
(root,) = json.loads(sys.argv[1])
node = hitless.Node(root)
node.map("held").get(1)
print("ready", flush=True)
time.sleep(60)
"""
    reader = started(script, str(node.root))
    try:
        hitless.apply(node, release(2))
        (holder,) = holders(node, reader.pid)
        assert (holder.old, holder.follows) == (True, True)
        assert status(node).holders.left_behind == ()
    finally:
        reader.kill()
        reader.communicate()


def test_maps_that_nobody_holds_any_more_are_forgotten(node: hitless.Node, release: Release) -> None:
    for version in (1, 2, 1, 2):
        hitless.apply(node, release(version))
    gc.collect()  # this process upgraded, and held all of them
    until = time.monotonic() + 10
    while time.monotonic() < until and sum(is_alive(entry.id) for entry in replaced(node)) > 1:
        time.sleep(0.05)  # the kernel frees a map some time after its last pin went
    hitless.apply(node, release(1))
    assert [entry.generation for entry in replaced(node)] == [3, 4], "those that previous/ held and holds"


def replaced(node: hitless.Node) -> Sequence[ReplacedMap]:
    current = node.observe().current
    assert current is not None
    return current.record.replaced


def test_processes_that_end_during_the_scan_are_no_error(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    current = node.observe().current
    assert current is not None
    over, unseen = threading.Event(), find_holders(node, current).unseen

    def spawn() -> None:
        while not over.is_set():
            subprocess.run(["/bin/true"], check=True)

    spawning = [threading.Thread(target=spawn) for _ in range(2)]
    for thread in spawning:
        thread.start()
    try:
        for _ in range(20):
            assert find_holders(node, current).unseen == unseen
    finally:
        over.set()
        for thread in spawning:
            thread.join()


def test_unload_leaves_nothing_of_the_lock(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(1))
    node.map("held")[1] = value(1)
    hitless.unload(node)
    assert not node.root.exists()
