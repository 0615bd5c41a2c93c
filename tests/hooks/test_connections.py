"""Upgrades with consistency = "connection": whoever began with a release stays with it, on all hooks."""

from __future__ import annotations

import os
import signal
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import hitless
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.kernel.test_switchboard import NOTING, Peer
from tests.releases import write_release

HELD = 12

HOOKS = ("connect4", "ops", "egress", "ingress", "peername")
# Counts connects in a map whose layout changes.
TALLY = {
    1: 'struct tally { __u32 count TAG("merge=sum"); };',
    2: 'struct tally { __u64 since; __u64 count TAG("merge=sum"); };',
}
COUNTING = """
MAP(tally, HASH, 16, __u32, struct tally);
static void tell(void)
{
    __u32 key = 7;
    struct tally *found = bpf_map_lookup_elem(&tally, &key), none = {};
    if (!found) {
        bpf_map_update_elem(&tally, &key, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&tally, &key);
    }
    if (found)
        __sync_fetch_and_add(&found->count, 1);
}
"""


def manifest(deadline: float, hooks: tuple[str, ...]) -> str:
    attach = "".join(
        f'\n[[attach]]\nprogram = "{name}"\nhook = "cgroup"\ntarget = "${{cgroup}}"\nlink = "{name}"\n'
        for name in hooks
    )
    return f'\n[cutover]\nconsistency = "connection"\ndeadline = {deadline}\n{attach}'


def bundle(
    lab: Lab, directory: Path, number: int, deadline: float = 30, hooks: tuple[str, ...] = HOOKS
) -> hitless.Bundle:
    code = NOTING.replace("RELEASE", str(number - 1)).replace(
        'int connect4(struct bpf_sock_addr *ctx) { return', "int connect4(struct bpf_sock_addr *ctx) { tell(); return"
    )
    path = directory / f"{number}-{deadline}-{len(hooks)}"
    write_release(path, f"{number}.0", TALLY[number] + COUNTING + code, manifest(deadline, hooks))
    return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})


class Mesh:
    """A node with release 1 and connections that are open; ``made`` counts all that were."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.node = hitless.Node(lab.bpffs / "store")
        self.peer = Peer(lab)
        self.made = 0
        hitless.apply(self.node, self.release(1))

    def release(self, number: int, deadline: float = 30, hooks: tuple[str, ...] = HOOKS) -> hitless.Bundle:
        return bundle(self.lab, self.directory, number, deadline, hooks)

    def open(self, *names: str) -> dict[str, list[int]]:
        self.made += len(names)
        return {name: self.peer("open_tcp", name) for name in names}

    def use(self, held: dict[str, list[int]]) -> set[int]:
        """Use them all; the releases that were seen by any end since they were asked for last."""
        for name in held:
            self.peer("use", name)
        return set().union(*(self.seen(cookie) for cookies in held.values() for cookie in cookies))

    def seen(self, cookie: int) -> set[int]:
        with Map.open(self.node.root / "maps" / "seen") as seen:
            key = struct.pack("=Q", cookie)
            runs = struct.unpack("=10I", seen.lookup(key) or bytes(40))
            seen.delete(key)
        return {release + 1 for release in (0, 1) if any(runs[release::2])}

    def close(self, held: dict[str, list[int]]) -> None:
        for name in held:
            self.peer("close", name)

    def counted(self) -> int:
        found: int = self.node.map("tally").get(7)["count"]
        return found


@pytest.fixture
def mesh(lab: Lab, tmp_path: Path) -> Iterator[Mesh]:
    made = Mesh(lab, tmp_path)
    yield made
    hitless.unload(made.node)


class Upgrading(threading.Thread):
    """An apply in a thread; ``waits`` is set when it waits for connections, and ``left`` how many there were then."""

    def __init__(self, mesh: Mesh, release: hitless.Bundle) -> None:
        super().__init__()
        self._mesh, self._release = mesh, release
        self.waits = threading.Event()
        self.left: list[int] = []
        self.result: hitless.Result | None = None

    def run(self) -> None:
        def told(event: hitless.Progress) -> None:
            if event.step == "connections":
                self.left.append(event.done)
                if len(self.left) > 1:  # the first tells that the step begins
                    self.waits.set()

        self.result = hitless.apply(
            hitless.Node(self._mesh.node.root), self._release, allow_loss=("tally",), progress=told
        )


def test_open_connections_keep_their_release_on_all_hooks_and_the_upgrade_waits_for_their_end(mesh: Mesh) -> None:
    old = mesh.open(*(f"old{number}" for number in range(HELD)))
    assert mesh.use(old) == {1}
    upgrading = Upgrading(mesh, mesh.release(2))
    upgrading.start()
    assert upgrading.waits.wait(20)
    new = mesh.open(*(f"new{number}" for number in range(HELD)))
    for _ in range(5):
        assert (mesh.use(old), mesh.use(new)) == ({1}, {2})
    assert upgrading.is_alive()
    assert mesh.node.observe().version == "1.0"
    mesh.close(old)
    upgrading.join(20)
    assert upgrading.result is not None
    assert upgrading.result.cutover.moved == 0
    assert upgrading.left[1] == 2 * HELD  # both ends are in the cgroup
    assert mesh.node.observe().version == "2.0"
    assert mesh.use(new) == {2}
    assert mesh.counted() == mesh.made
    assert status(mesh.node).problems == ()
    assert hitless.verify(mesh.node).problems == ()


def test_after_the_deadline_those_that_are_left_go_over_and_nothing_is_lost(mesh: Mesh) -> None:
    old = mesh.open(*(f"old{number}" for number in range(HELD)))
    result = hitless.apply(mesh.node, mesh.release(2, deadline=0.3))
    assert result.cutover.moved == 2 * HELD
    assert mesh.use(old) <= {1, 2}  # until the deadline the first
    assert mesh.use(old) == {2}
    hitless.apply(mesh.node, mesh.release(1, deadline=0.3), allow_loss=("tally",))
    assert mesh.use(old) <= {1, 2}
    assert mesh.use(old) == {1}
    mesh.open("another")
    assert mesh.counted() == mesh.made
    assert hitless.verify(mesh.node).problems == ()


def test_an_error_while_it_waits_takes_every_connection_back(mesh: Mesh) -> None:
    old = mesh.open("old")
    seen: list[hitless.Progress] = []

    def told(event: hitless.Progress) -> None:
        if event.step == "connections":
            seen.append(event)
            if len(seen) == 3:
                mesh.open("new")
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(mesh.node, mesh.release(2), progress=told)
    assert mesh.node.observe().version == "1.0"
    held = {"old": old["old"], "new": []}
    mesh.use(held)
    assert mesh.use(old) == {1}
    assert mesh.counted() == mesh.made
    assert status(mesh.node).problems == ()
    assert hitless.verify(mesh.node).problems == ()
    mesh.close(held)
    assert hitless.apply(mesh.node, mesh.release(2)).committed


def test_an_error_while_the_old_release_ends_gives_all_its_hooks_back(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, update, ending = mesh.open("held"), Map.update, []

    def told(event: hitless.Progress) -> None:
        ending.extend([event.step] if event.step == "connections" else [])

    def fail(changed: Map, key: bytes, value: bytes, flags: int = 0) -> None:
        if ending and changed.info.name == "board_ops":  # behind those of egress, which goes
            monkeypatch.undo()
            raise hitless.KernelError("this was to fail", errno=12)
        update(changed, key, value, flags)

    few = tuple(name for name in HOOKS if name != "egress")
    monkeypatch.setattr(Map, "update", fail)
    with pytest.raises(hitless.KernelError, match="this was to fail"):
        hitless.apply(mesh.node, mesh.release(2, deadline=0, hooks=few), progress=told)
    assert status(mesh.node).problems == ()
    assert hitless.verify(mesh.node).problems == ()
    mesh.use(held)
    assert mesh.use(held) == {1}


@pytest.mark.parametrize("step", ["cutover", "connections", "merge", "commit"])
def test_a_killed_upgrade_is_finished_and_its_connections_are_waited_for(mesh: Mesh, step: str) -> None:
    old = mesh.open("old")
    mesh.use(old)
    release = mesh.release(2, deadline=0.5)
    pid = os.fork()
    if pid == 0:
        events = iter(range(1 << 20))

        def die(event: hitless.Progress) -> None:
            if event.step == step and (step != "connections" or next(events) == 2):
                os.kill(os.getpid(), signal.SIGKILL)

        with suppress(BaseException):
            hitless.apply(hitless.Node(mesh.node.root), release, progress=die)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    mesh.open("meanwhile")
    assert hitless.recover(mesh.node) == "finished the interrupted upgrade to 2.0"
    mesh.use(old)
    assert mesh.use(old) == {2}
    assert mesh.counted() == mesh.made
    assert hitless.verify(mesh.node).problems == ()


def test_a_killed_upgrade_can_be_taken_back_with_its_connections(mesh: Mesh) -> None:
    old = mesh.open("old")
    release = mesh.release(2)
    pid = os.fork()
    if pid == 0:
        def die(event: hitless.Progress) -> None:
            if event.step == "connections" and event.done:
                os.kill(os.getpid(), signal.SIGKILL)

        with suppress(BaseException):
            hitless.apply(hitless.Node(mesh.node.root), release, progress=die)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    new = mesh.open("new")
    assert mesh.use(new) == {2}
    assert hitless.recover(mesh.node, back=True) is not None
    mesh.use(new)
    assert (mesh.use(old), mesh.use(new)) == ({1}, {1})
    assert mesh.counted() == mesh.made
    assert hitless.verify(mesh.node).problems == ()


def test_hooks_come_and_go_with_the_releases_that_have_them(mesh: Mesh) -> None:
    few = tuple(name for name in HOOKS if name != "peername")
    old = mesh.open("old")
    upgrading = Upgrading(mesh, mesh.release(2, hooks=few))
    upgrading.start()
    assert upgrading.waits.wait(20)
    assert mesh.use(old) == {1}
    mesh.close(old)
    upgrading.join(20)
    assert not (mesh.node.links / "peername").exists()
    kept = mesh.open("kept")
    assert mesh.use(kept) == {2}
    hitless.apply(mesh.node, mesh.release(1, deadline=0), allow_loss=("tally",))
    assert (mesh.node.links / "peername").exists()
    mesh.use(kept)
    assert mesh.use(kept) == {1}
    assert mesh.counted() == mesh.made
    assert hitless.verify(mesh.node).problems == ()


def test_a_link_that_was_detached_by_hand_gets_its_dispatcher_with_the_next_upgrade(mesh: Mesh) -> None:
    hitless.apply(mesh.node, mesh.release(2, deadline=0))
    with Link.open(mesh.node.links / "peername") as link:
        link.detach()
    assert len(status(mesh.node).problems) == 1
    hitless.apply(mesh.node, mesh.release(1, deadline=0), allow_loss=("tally",))
    held = mesh.open("held")
    assert mesh.use(held) == {1}
    assert status(mesh.node).problems == ()
    hitless.apply(mesh.node, mesh.release(2, deadline=0))
    mesh.use(held)
    assert mesh.use(held) == {2}
    assert mesh.counted() == mesh.made


def test_a_rollback_keeps_to_connections_as_well(mesh: Mesh) -> None:
    hitless.apply(mesh.node, mesh.release(2, deadline=0))
    held = mesh.open("held")
    seen: list[set[int]] = []

    def told(event: hitless.Progress) -> None:
        if event.step == "connections" and event.done:
            seen.append(mesh.use(held))
            mesh.close(held)

    hitless.rollback(mesh.node, allow_loss=("tally",), progress=told)
    assert seen[0] == {2}
    assert mesh.counted() == mesh.made


UNIX = """
MAP(held, ARRAY, 1, __u32, __u32);
SEC("cgroup/connect_unix") int count(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "GPL";
"""


@pytest.mark.needs("cgroup unix hooks")
def test_a_hook_where_no_connection_can_be_told_is_refused_by_name(lab: Lab, tmp_path: Path) -> None:
    write_release(tmp_path, "1.0", UNIX, manifest(1, ("count",)))
    node = hitless.Node(lab.bpffs / "store")
    with pytest.raises(hitless.UnsupportedError, match="hook count is on cgroup_unix_connect, where no connection can"):
        hitless.plan(node, hitless.Bundle.load(tmp_path, {"cgroup": str(lab.cgroup)}))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ('consistency = "always"', "consistency is hook or connection"),
        ("deadline = -1", "deadline is in seconds, from 0"),
    ],
)
def test_a_wrong_rule_is_refused_with_its_line(tmp_path: Path, rule: str, words: str) -> None:
    write_release(tmp_path, "1.0", UNIX, f"\n[cutover]\n{rule}\n")
    with pytest.raises(hitless.BundleError, match=words) as caught:
        hitless.Bundle.load(tmp_path)
    assert "bundle.toml:9:" in caught.value.message
