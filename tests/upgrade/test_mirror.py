"""Maps that no program writes are copied without a base: what the old map says is right, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.kernel.maps import Map
from hitless.upgrade import transaction
from tests.upgrade.conftest import Make, everything

TALLY = "struct tally { __u64 count; };\nMAP(tally, HASH, 64, __u32, struct tally);\n"
OLD = TALLY + "struct route { __u32 via; __u8 label[4]; };\nMAP(routes, HASH, 500, __u32, struct route)"
NEW = (
    TALLY
    + 'struct route { __u64 via; __u8 label[4]; __u32 metric TAG("default=7"); };\n'
    + "MAP(routes, HASH, 600, __u32, struct route)"
)
LATER = NEW.replace("__u64 via;", "__u64 via; __u64 cost;")
READ = ' TAG("programs=read");\n'
RULE = '[map.routes]\nprograms = "read"\n'

# Writes a route for every port that is connected to.
WRITER = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u32 port = ctx->user_port;
    struct route *found = bpf_map_lookup_elem(&routes, &port);
    if (found)
        found->via = port;
    return 1;
}
char _license[] SEC("license") = "GPL";
"""


def route(number: int) -> dict[str, Any]:
    return {"via": number, "label": b"abcd"}


@pytest.fixture
def running(node: hitless.Node, build: Make) -> hitless.Node:
    """A node with 300 routes."""
    hitless.apply(node, build("1.0", OLD + READ))
    node.map("routes").update_many([(number, route(number)) for number in range(300)])
    return node


def carried(node: hitless.Node) -> dict[int, tuple[int, int]]:
    return {key: (value["via"], value["metric"]) for key, value in node.map("routes").items()}


@pytest.mark.parametrize(("tag", "rule"), [(READ, ""), (";\n", RULE)])
def test_the_plan_says_that_no_base_is_kept(running: hitless.Node, build: Make, tag: str, rule: str) -> None:
    second = build("2.0", NEW + tag, rule)
    (planned,) = (entry for entry in hitless.plan(running, second).maps if entry.name == "routes")
    assert (planned.method, planned.exactness) == ("copy in the kernel, without a base: no program writes it", "exact")
    hitless.apply(running, second)
    assert carried(running) == {number: (number, 7) for number in range(300)}


def test_the_promise_is_needed_of_both_releases(node: hitless.Node, build: Make) -> None:
    versions = [("1.0", OLD + ";\n"), ("2.0", NEW + READ), ("3.0", LATER + READ), ("4.0", NEW + ";\n")]
    methods = []
    for version, maps in versions:
        bundle = build(version, maps, '[map.routes]\non_loss = "discard"\n')
        methods += [entry.method for entry in hitless.plan(node, bundle).maps if entry.name == "routes"]
        hitless.apply(node, bundle)
    with_base = "copy and merge in the kernel"
    assert methods == ["empty", with_base, "copy in the kernel, without a base: no program writes it", with_base]


def test_a_release_whose_program_writes_the_map_is_refused(
    running: hitless.Node, make: Make, build: Make
) -> None:
    before = everything(running)
    with pytest.raises(hitless.BundleError, match=r"says that none does \(programs = \"read\": routes\)") as caught:
        hitless.apply(running, make("2.0", NEW + READ, WRITER))
    assert "write into map forbidden" in str(caught.value.facts["log"])
    assert everything(running) == before


def test_the_promise_is_refused_for_maps_that_need_none(build: Make) -> None:
    with pytest.raises(hitless.BundleError, match="is for maps of type hash"):
        build("1.0", TALLY + "MAP(list, ARRAY, 4, __u32, __u64);\n", '[map.list]\nprograms = "read"\n')


def test_what_another_process_writes_meanwhile_is_there_afterwards(running: hitless.Node, build: Make) -> None:
    def change(_: hitless.Node) -> None:
        with Map.open(running.root / "maps" / "routes") as old:
            for number in range(0, 100):
                old.delete(number.to_bytes(4, "little"))
            for number in range(100, 200):
                old.update(number.to_bytes(4, "little"), (number + 1000).to_bytes(4, "little") + b"abcd")
            for number in range(300, 350):
                old.update(number.to_bytes(4, "little"), number.to_bytes(4, "little") + b"abcd")

    result = hitless.apply(running, build("2.0", NEW + READ), prepare=change)
    expected = {number: (number + 1000 if number < 200 else number, 7) for number in range(100, 350)}
    assert carried(running) == expected
    (routes,) = (entry for entry in result.maps if entry.name == "routes")
    assert (routes.copied, routes.caught_up) == (300, 250)


def written_to_both(node: hitless.Node) -> None:
    """What a control plane may do through hitless that the old release's layout or room cannot follow."""
    routes = node.map("routes")
    routes[5] = {"via": 1 << 40, "label": b"wide", "metric": 9}
    routes[6] = {"via": 6, "label": b"thin", "metric": 8}
    routes[7] = {"via": 1 << 40, "label": b"then", "metric": 1}
    routes[7] = {"via": 77, "label": b"less", "metric": 2}
    del routes[8]
    for number in range(1000, 1250):  # the old map has room for 500
        routes[number] = {"via": number, "label": b"more", "metric": 3}


WRITTEN = (
    {number: (number, 7) for number in range(300) if number != 8}
    | {5: (1 << 40, 9), 6: (6, 8), 7: (77, 2)}
    | {number: (number, 3) for number in range(1000, 1250)}
)


def test_what_is_written_through_hitless_stays_as_it_was_written(running: hitless.Node, build: Make) -> None:
    hitless.apply(running, build("2.0", NEW + READ), prepare=written_to_both)
    assert carried(running) == WRITTEN


def test_it_stays_so_if_the_upgrade_is_killed_and_finished_by_another(
    running: hitless.Node, build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = build("2.0", NEW + READ)
    child = os.fork()
    if not child:
        monkeypatch.setattr(transaction, "exchange", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        hitless.apply(running, second, prepare=written_to_both)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert transaction.recover(running) == "finished the interrupted upgrade to 2.0"
    assert carried(running) == WRITTEN


def test_an_entry_that_was_beyond_the_old_map_follows_it_once_that_changes(
    running: hitless.Node, build: Make
) -> None:
    def change(node: hitless.Node) -> None:
        written_to_both(node)
        with Map.open(running.root / "maps" / "routes") as old:
            old.update((5).to_bytes(4, "little"), (55).to_bytes(4, "little") + b"abcd")

    hitless.apply(running, build("2.0", NEW + READ), prepare=change)
    assert carried(running) == WRITTEN | {5: (55, 9)}


def test_an_upgrade_that_fails_leaves_the_old_map_as_it_was_written(
    running: hitless.Node, build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(transaction, "exchange", fails)

    def change(node: hitless.Node) -> None:
        node.map("routes")[5] = {"via": 55, "label": b"both", "metric": 9}

    with pytest.raises(OSError, match="no"):
        hitless.apply(running, build("2.0", NEW + READ), prepare=change)
    assert running.map("routes").get(5) == {"via": 55, "label": b"both"}
    assert len(running.map("routes").items()) == 300


def test_it_takes_no_memory_that_grows_with_the_map(
    running: hitless.Node, build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Path] = []

    def look(node: hitless.Node) -> None:
        kept.extend((node.next / "base").iterdir())
        (path,) = kept
        with Map.open(path) as beyond:
            assert beyond.all_keys() == set()

    hitless.apply(running, build("2.0", NEW + READ), prepare=look)
    assert [path.name for path in kept] == ["routes"]


def test_what_threads_write_all_the_while_is_exact(running: hitless.Node, build: Make) -> None:
    over, journal = threading.Event(), {number: number for number in range(300)}

    def write() -> None:
        routes, number = running.map("routes"), 0
        while not over.is_set():
            number += 1
            key = number * 7 % 450
            if key in journal and number % 3 == 0:
                del routes[key]
                del journal[key]
            else:
                routes[key] = {"via": number}
                journal[key] = number

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for version, maps in (("2.0", NEW), ("3.0", LATER), ("4.0", NEW), ("5.0", LATER)):
            hitless.apply(running, build(version, maps + READ, '[map.routes]\non_loss = "discard"\n'))
    finally:
        over.set()
        thread.join()
    assert {key: via for key, (via, _) in carried(running).items()} == journal
