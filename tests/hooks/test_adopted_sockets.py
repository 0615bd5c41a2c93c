"""Programs that another loader attached to a sockhash without a link: taken over, replaced, and taken over again."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.kernel.dispatcher import attached_program, is_dispatcher
from hitless.kernel.handover import Handover
from hitless.kernel.links import Link, all_links
from hitless.kernel.map_places import MapPlace
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, load_object
from hitless.kernel.socket_programs import programs_of_sockets
from hitless.kernel.sockets import list_sockets
from hitless.upgrade import finish, socket_hooks, transaction
from hitless.upgrade.socket_hooks import SocketHook
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.adopt.conftest import pinned
from tests.hooks.test_sockets import BY_CONNECTION, ECHO, ECHOING, LOSS, NOTE, PORTS, REDIRECT, SOURCE, TURNED
from tests.kernel.connections import SERVER, attach_the_old_way, clients
from tests.releases import compile_object, write_release

# What is sent is counted and goes by the network, as nobody looks for another socket.
PASSING = SOURCE.replace(
    "return bpf_msg_redirect_hash(msg, &peers, &key, BPF_F_INGRESS);", "return key.local ? SK_PASS : SK_DROP;"
)
ADOPTED = NOTE + REDIRECT + "adopt = true\n"
CALLS = {
    1: 'struct calls { __u32 calls TAG("merge=sum"); };',
    2: 'struct calls { __u64 since; __u64 calls TAG("merge=sum"); };',
}

Make = Callable[..., hitless.Bundle]


def text(number: int, shape: int = 1, source: str = PASSING) -> str:
    """Release ``number`` of the programs; the map of their calls has one of two shapes."""
    return f"{CALLS[shape]}\n{source.replace('RELEASE', str(number)).replace('PORT', str(SERVER))}"


@pytest.fixture
def node(lab: Lab) -> hitless.Node:
    return hitless.Node(lab.bpffs / "store")


@pytest.fixture
def make(lab: Lab, tmp_path: Path) -> Make:
    def release(number: int, shape: int = 1, manifest: str = ADOPTED, source: str = PASSING) -> hitless.Bundle:
        directory = tmp_path / f"{number}-{shape}-{len(manifest)}-{len(source)}"
        path = write_release(directory, f"{number}.0", text(number, shape, source), manifest)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    return release


class Loader:
    """The daemon's own: it loads its object on the maps that are pinned, attaches its program and forgets it."""

    def __init__(self, node: hitless.Node, directory: Path) -> None:
        self._node = node
        self._directory = directory

    def start(self, number: int = 1, shape: int = 1, source: str = PASSING, program: str = "redirect") -> int:
        kind = "sk_msg_verdict" if program == "redirect" else "sk_skb_stream_verdict"
        data = compile_object(text(number, shape, source), self._directory / "loader.bpf.o").read_bytes()
        pinned = {path.name: Map.open(path) for path in (self._node.root / "maps").iterdir()}
        loaded = load_object(data, "loader", pinned, {})
        attach_the_old_way(loaded.programs[program], pinned["peers"], kind)
        return loaded.programs[program].info.id


@pytest.fixture
def loader(node: hitless.Node, tmp_path: Path) -> Loader:
    return Loader(node, tmp_path)


def peers(node: hitless.Node) -> Map:
    return Map.open(node.root / "maps" / "peers")


def attached(node: hitless.Node, kind: str = "sk_msg_verdict") -> int:
    with peers(node) as held:
        return attached_program(held, kind)


def run_by(node: hitless.Node, kind: str = "sk_msg_verdict") -> Counter[int]:
    """How many sockets run each program."""
    with peers(node) as held:
        return Counter(programs_of_sockets(held, kind).values())


def is_linked(node: hitless.Node) -> bool:
    with peers(node) as held:
        return any((link.type, link.target_id) == ("sockmap", held.info.id) for link in all_links())


def seen(node: hitless.Node, *numbers: int) -> list[int]:
    return [node.map("by_release").get(number) for number in numbers]


def counted(node: hitless.Node, messages: int, missed: int = 0) -> None:
    """Each of the messages was counted once, by old or new release, but for those ``missed`` at most: a message that is
    sent in the microseconds in which its socket is handed over passes without a program.
    """
    calls = node.map("counted").get(SERVER)["calls"]
    assert sum(seen(node, 1, 2)) == calls
    assert 0 <= messages - calls <= missed


def test_open_sockets_keep_the_program_where_all_its_maps_stay_and_new_ones_get_the_release(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1, manifest=NOTE))
    theirs = loader.start()
    with clients(lab, answers=True) as held:
        held.say("connect 50")
        held.say("run 0")
        (_, hook) = sorted(hitless.plan(node, make(2)).hooks, key=lambda each: each.link)
        assert (hook.action, hook.expected, hook.adopted, hook.handed) == ("adopt", theirs, "redirect", False)
        assert f"sockets that run program {theirs} keep it until they close: all its maps stay" in hook.method
        hitless.apply(node, make(2))
        assert not is_linked(node)
        assert run_by(node) == {theirs: 100}
        messages = held.say("stop")
        counted(node, 2 * messages)
        held.say("connect 50")
        before = seen(node, 1, 2)
        held.say("rounds 1")
        assert seen(node, 1, 2) == [before[0] + 100, before[1] + 100]
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


def test_open_sockets_are_handed_over_where_a_map_of_their_program_changes_and_no_message_is_lost(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1, manifest=NOTE))
    theirs = loader.start()
    with clients(lab, answers=True) as held:
        held.say("connect 200")
        held.say("run 0")
        (hook,) = (each for each in hitless.plan(node, make(2, 2)).hooks if each.link == "redirect")
        assert hook.handed
        assert "handed over one by one, since not all its maps stay (counted)" in hook.method
        hitless.apply(node, make(2, 2), LOSS)
        assert theirs not in run_by(node)
        hitless.apply(node, make(1), LOSS)
        for _ in range(3):
            hitless.rollback(node, LOSS)
        assert not is_linked(node)
        messages = held.say("stop")
        counted(node, 2 * messages, missed=4)
        before = seen(node, 1)
        held.say("connect 50")
        held.say("rounds 1")
        assert seen(node, 1) == before
        counted(node, 2 * messages + 500, missed=4)
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()
    hitless.unload(node)
    assert not node.root.exists()


def test_a_loader_that_attaches_its_program_again_is_told_and_its_place_is_taken_again(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1))
    assert is_dispatcher(attached(node))
    with clients(lab, answers=True) as held:
        held.say("connect 50")
        theirs = loader.start()
        held.say("connect 50")
        held.say("run 0")
        assert run_by(node)[theirs] == 100
        for problems in (status(node).problems, hitless.verify(node).problems):
            (problem,) = problems
            assert f"map peers has program {theirs} instead of redirect" in problem
            assert "apply the same release again, which takes the place again" in problem
        result = hitless.apply(node, make(1))
        assert {hook.link: hook.action for hook in result.hooks} == {"note": "keep", "redirect": "update"}
        assert status(node).problems == ()
        assert attached(node) != theirs
        theirs = loader.start()
        held.say("connect 10")
        hitless.apply(node, make(2, 2), LOSS)
        assert len(run_by(node)) == 2  # dispatchers, both to the same slots
        assert all(map(is_dispatcher, run_by(node)))
        messages = held.say("stop")
        counted(node, 2 * messages, missed=4)
        before = seen(node, 1)
        held.say("rounds 1")
        assert seen(node, 1) == before
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()


def test_another_program_in_the_place_of_ours_is_refused_without_adopt(
    node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1))
    theirs = loader.start()
    with pytest.raises(hitless.NodeError, match=f"has program {theirs} where ours ran, which hitless did not"):
        hitless.plan(node, make(2, manifest=NOTE + REDIRECT))
    assert attached(node) == theirs


def test_sockets_that_come_behind_the_plan_are_handed_over_as_well(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1, manifest=NOTE))
    theirs = loader.start()

    def late(event: hitless.Progress) -> None:
        if event.step == "prepare":
            held.say("connect 5")
            assert run_by(node) == {theirs: 10}

    with clients(lab, answers=True) as held:
        hitless.apply(node, make(2, 2), LOSS, progress=late)
        held.say("rounds 1")
        assert seen(node, 1, 2) == [0, 10]


def test_an_upgrade_that_fails_puts_the_program_of_the_loader_back(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1, manifest=NOTE))
    theirs = loader.start()

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            assert attached(node) != theirs
            raise ZeroDivisionError

    with clients(lab, answers=True) as held:
        held.say("connect 50")
        held.say("run 0")
        with pytest.raises(ZeroDivisionError):
            hitless.apply(node, make(2, 2), LOSS, progress=fail)
        assert attached(node) == theirs
        assert status(node).problems == ()
        assert hitless.verify(node).problems == ()
        before = seen(node, 2)
        held.say("connect 50")
        messages = held.say("stop")
        held.say("rounds 1")
        assert seen(node, 2) == before
        counted(node, 2 * messages + 200, missed=2)
        hitless.apply(node, make(2, 2), LOSS)
        held.say("rounds 1")
        assert seen(node, 2) == [before[0] + 200]
    assert hitless.verify(node).problems == ()


def test_sockets_that_somebody_waits_on_make_the_upgrade_fail_and_are_counted(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    hitless.apply(node, make(1, manifest=NOTE))
    theirs = loader.start()
    monkeypatch.setattr(socket_hooks, "_PATIENCE", 0.2)
    with clients(lab, answers=True) as held:
        held.say("connect 5")
        held.say("wait 2")
        with pytest.raises(hitless.NodeError, match=r"2 of its sockets still run.*2 are in the middle of a call"):
            hitless.apply(node, make(2, 2), LOSS)
        assert attached(node) == theirs
        assert status(node).problems == ()
        held.say("wake")
        before = seen(node, 1)
        held.say("rounds 1")
        assert seen(node, 1) == [before[0] + 10]
        hitless.apply(node, make(2, 2), LOSS)
        held.say("rounds 1")
        assert seen(node, 2) == [10]


def test_what_is_attached_without_a_link_goes_with_the_hook(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1, manifest=NOTE))
    theirs = loader.start()
    with clients(lab, answers=True) as held:
        held.say("connect 5")
        hitless.apply(node, make(2))
        held.say("connect 5")
        with pytest.raises(hitless.UnsupportedError, match=f"changes counted, which sockets that run program {theirs}"):
            hitless.plan(node, make(1, 2, manifest=NOTE), LOSS)
        without = make(1, manifest=NOTE)
        hook = next(each for each in hitless.plan(node, without).hooks if each.link == "redirect")
        assert (hook.action, hook.method) == (
            "detach", f"taken off; sockets that run program {theirs} keep it until they close"
        )  # fmt: skip
        hitless.apply(node, without)
        assert attached(node) == 0
        before = seen(node, 1, 2)
        held.say("rounds 1")
        assert seen(node, 1, 2) == [before[0] + 10, before[1]]
        hitless.unload(node)
    assert not node.root.exists()


def test_unload_takes_ours_off_and_leaves_what_another_loader_put_over_it(
    node: hitless.Node, make: Make, loader: Loader
) -> None:
    for over in (False, True):
        hitless.apply(node, make(1))
        with peers(node) as held:
            theirs = loader.start() if over else 0
            hitless.unload(node)
            assert attached_program(held, "sk_msg_verdict") == theirs


def test_verdicts_on_received_data_are_handed_over_and_every_byte_is_seen_once(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    source = ECHOING.replace("if (mine)", "if (mine && bpf_map_lookup_elem(&counted, &release) == 0)").replace(
        "return skb->local_port == PORT ? bpf_sk_redirect_hash(skb, &peers, &key, 0)", "return key.local ? SK_PASS"
    )
    adopted = NOTE + ECHO + "adopt = true\n"
    hitless.apply(node, make(1, manifest=NOTE, source=source))
    theirs = loader.start(source=source, program="echo")
    with clients(lab, answers=True) as held:
        held.say("connect 100")
        held.say("run 0")
        hitless.apply(node, make(2, 2, manifest=adopted, source=source), LOSS)
        assert theirs not in run_by(node, "sk_skb_stream_verdict")
        hitless.apply(node, make(1, 1, manifest=adopted, source=source), LOSS)
        hitless.rollback(node, LOSS)
        messages = held.say("stop")
        assert sum(seen(node, 1, 2)) == 2 * 16 * messages
    assert not is_linked(node)
    assert hitless.verify(node).problems == ()


def test_sockets_of_an_array_are_handed_over_to_their_own_places(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    source = PASSING.replace("SOCKHASH, 4096, struct ports", "SOCKMAP, 64, __u32").replace(
        "bpf_sock_hash_update(ops, &peers, &key, BPF_ANY);",
        "{ __u32 place = key.local == PORT ? key.remote % 31 : 31 + key.local % 31;"
        " bpf_sock_map_update(ops, &peers, &place, BPF_ANY); }",
    )
    hitless.apply(node, make(1, manifest=NOTE, source=source))
    theirs = loader.start(source=source)
    with clients(lab, answers=True) as held:
        held.say("connect 1")
        with peers(node) as map_:
            before = list_sockets(map_)
        assert run_by(node) == {theirs: 2}
        hitless.apply(node, make(2, 2, source=source), LOSS)
        with peers(node) as map_:
            assert list_sockets(map_) == before
        held.say("rounds 1")
        assert seen(node, 1, 2) == [0, 2]


def test_sockets_to_which_a_program_redirects_are_not_handed_over(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1, manifest=NOTE, source=SOURCE))
    theirs = loader.start(source=SOURCE)
    with clients(lab, answers=True) as held:
        held.say("connect 5")
        with pytest.raises(hitless.UnsupportedError, match=f"{theirs} may redirect to sockets of map peers"):
            hitless.plan(node, make(2, 2, source=SOURCE), LOSS)
        hitless.apply(node, make(2, source=SOURCE))
        held.say("rounds 1")
        assert seen(node, 1, 2) == [10, 0]
    with clients(lab, answers=True) as held:
        held.say("connect 5")
        hitless.apply(node, make(1, 2, source=SOURCE), LOSS)
        held.say("rounds 1")
        assert seen(node, 1, 2) == [20, 0]


def test_what_is_only_noted_runs_on_until_an_upgrade_takes_its_place(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1))
    with peers(node) as held, Program.open(node.root / "progs" / "redirect") as program:
        theirs = program.info.id
        attach_the_old_way(program, held, "sk_msg_verdict")
    (node.root / "slots" / "redirect").unlink()
    with clients(lab, answers=True) as clients_:
        clients_.say("connect 20")
        assert status(node).problems == ()
        assert {hook.action for hook in hitless.apply(node, make(1)).hooks} == {"keep"}
        assert run_by(node) == {theirs: 40}

        def fail(event: hitless.Progress) -> None:
            if event.step == "commit":
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            hitless.apply(node, make(2, 2), LOSS, progress=fail)
        before = seen(node, 1, 2)
        clients_.say("rounds 1")
        assert seen(node, 1, 2) == [before[0] + 40, before[1]]
        assert hitless.verify(node).problems == ()
        hitless.apply(node, make(2, 2), LOSS)
        hitless.rollback(node, LOSS)
        hitless.rollback(node, LOSS)
        clients_.say("rounds 1")
        assert seen(node, 1, 2) == [before[0] + 40, before[1] + 40]
    assert not is_linked(node)
    assert hitless.verify(node).problems == ()
    with peers(node) as held:
        hitless.unload(node)
        assert attached_program(held, "sk_msg_verdict") == 0


def start(root: Path, lab: Lab, data: bytes) -> int:
    """What a daemon does at its start that knows nothing of hitless; returns the id of its program for sockets."""
    (root / "map").mkdir(parents=True, exist_ok=True)
    there = {path.name: Map(pinned(path)) for path in (root / "map").iterdir()}
    loaded = load_object(data, "daemon", there, {})
    for name in loaded.maps.keys() - there.keys():
        loaded.maps[name].pin(root / "map" / name)
    if (root / "note").exists():
        with Link(pinned(root / "note")) as link, Program.by_id(link.info.program_id) as old:
            link.update(loaded.programs["note"], old)
    else:
        with Link.attach_cgroup(loaded.programs["note"], lab.cgroup, "cgroup_sock_ops") as link:
            link.pin(root / "note")
    attach_the_old_way(loaded.programs["redirect"], loaded.maps["peers"], "sk_msg_verdict")
    return loaded.programs["redirect"].info.id


def test_a_daemon_that_was_adopted_as_it_ran_is_upgraded_and_started_by_its_own_loader(lab: Lab, make: Make) -> None:
    public = '[public]\nmaps = "map"\n' + NOTE + 'pin = "note"\n' + REDIRECT + "adopt = true\n"
    first, second = (make(number, number, manifest=public) for number in (1, 2))
    root = lab.bpffs / "daemon"
    node = hitless.Node(root)
    theirs = start(root, lab, first.objects[0].data)
    with clients(lab, answers=True) as held:
        held.say("connect 50")
        held.say("run 0")
        found = hitless.adopt(node, first)
        assert {one.link: (one.program_id, one.proven) for one in found.hooks}["redirect"] == (theirs, True)
        assert attached(node) == theirs
        assert hitless.verify(node).problems == ()
        hitless.apply(node, second, LOSS)
        assert run_by(node)[theirs] == 0
        theirs = start(root, lab, second.objects[0].data)
        held.say("connect 50")
        assert attached(node) == theirs
        assert {hook.link: hook.action for hook in hitless.apply(node, second).hooks} == {
            "note": "keep", "redirect": "keep"
        }  # fmt: skip
        assert status(node).problems == ()
        assert hitless.verify(node).problems == ()
        hitless.rollback(node, LOSS)
        assert run_by(node)[theirs] == 0
        counted(node, 2 * held.say("stop"), missed=4)
        before = seen(node, 2)
        held.say("rounds 1")
        assert seen(node, 2) == before
        assert status(node).problems == ()
    assert not is_linked(node)
    hitless.unload(node)


def test_a_dispatcher_that_somebody_took_off_is_attached_again_to_all_sockets(
    lab: Lab, node: hitless.Node, make: Make
) -> None:
    hitless.apply(node, make(1))
    with peers(node) as held, clients(lab, answers=True) as clients_:
        clients_.say("connect 5")
        with Program.by_id(attached(node)) as dispatcher:
            MapPlace(held.info.id, "sk_msg_verdict").take_off(dispatcher)
        clients_.say("connect 5")
        (problem,) = status(node).problems
        assert "link redirect is detached" in problem
        hitless.apply(node, make(1))
        hitless.apply(node, make(2))
        clients_.say("rounds 1")
        assert seen(node, 1, 2) == [0, 20]
    assert not is_linked(node)
    assert hitless.verify(node).problems == ()


def test_one_map_is_no_place_of_many(make: Make) -> None:
    with pytest.raises(hitless.BundleError, match=r"toml:\d+: \"only\" is for places of which some have the hook"):
        make(1, manifest=NOTE + REDIRECT + 'adopt = "only"\n')


def test_what_an_adopted_hook_of_a_map_cannot_do_is_refused_by_name(
    node: hitless.Node, make: Make, loader: Loader
) -> None:
    hitless.apply(node, make(1, manifest=NOTE))
    theirs = loader.start()
    shape = PASSING.replace(PORTS, TURNED)
    with pytest.raises(hitless.UnsupportedError, match=r"map peers without a link.*keep the definition of the map"):
        hitless.plan(node, make(2, source=shape))
    with pytest.raises(hitless.UnsupportedError, match="adopted from another tool, whose program knows"):
        hitless.plan(node, make(2, manifest=BY_CONNECTION + ADOPTED))
    hitless.apply(node, make(1))
    for bundle in (make(2, source=shape), make(2, manifest=BY_CONNECTION + ADOPTED)):
        with pytest.raises(hitless.UnsupportedError):
            hitless.plan(node, bundle)
    assert attached(node) != theirs
    assert hitless.verify(node).problems == ()


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def off_and_die(hook: SocketHook, *_: object) -> None:
    """As within the moment in which sockets come back from beside the map."""
    with Program.by_id(hook.program_id) as dispatcher:
        hook.place.take_off(dispatcher)
    die()


def die_amid(node: hitless.Node, release: hitless.Bundle, step: str) -> None:
    """An apply in a process of its own, which is killed at ``step``."""
    pid = os.fork()
    if not pid:
        with pytest.MonkeyPatch.context() as patch:
            for name, owner, called in (
                ("noted", SocketHook, "take"),
                ("slots", SocketHook, "_put_dispatcher"),
                ("taken", SocketHook, "hand_over"),
                ("begun", Handover, "run"),
                ("handed", Handover, "put_back"),
                ("switching", SocketHook, "update"),
                ("off", SocketHook, "update"),
                ("finished", finish, "come_along"),
                ("back", transaction, "switch_back"),
                ("given", SocketHook, "give_back"),
                ("dropped", transaction._Upgrade, "_drop"),
            ):
                if step == name:
                    patch.setattr(owner, called, off_and_die if step == "off" else die)

            def progress(event: hitless.Progress) -> None:
                if event.step == step:
                    die()
                if step in ("back", "given", "dropped") and event.step == "commit":
                    raise ZeroDivisionError

            try:
                hitless.apply(node, release, LOSS, progress=progress)
            finally:
                os._exit(1)
    _, ended = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(ended)


STEPS = ["noted", "slots", "taken", "begun", "handed", "off", "off, back", "finished", "back", "given", "dropped"]


@pytest.mark.parametrize("step", STEPS)
def test_sockets_outlive_whoever_takes_the_place_of_their_program_and_is_killed(
    lab: Lab, node: hitless.Node, make: Make, loader: Loader, step: str
) -> None:
    hitless.apply(node, make(1, manifest=NOTE))
    theirs = loader.start()
    with clients(lab, answers=True) as held:
        held.say("connect 20")
        held.say("run 0")
        die_amid(node, make(2, 2), step.removesuffix(", back"))
        if not step.startswith("off"):
            held.say("connect 20")
        held.say("run 0")
        if step == "dropped":
            hitless.gc(node)
        else:
            hitless.recover(node, back=step == "off, back")
        if step.startswith("off"):
            held.say("connect 20")
        back = step in ("off, back", "back", "given", "dropped")
        assert (attached(node) == theirs) == back
        messages = held.say("stop")
        before = seen(node, 2)
        held.say("rounds 1")
        assert seen(node, 2) == [before[0] + (0 if back else 80)]
        counted(node, 2 * messages + 80, missed=2)
        assert status(node).problems == ()
        assert hitless.verify(node).problems == ()
        hitless.apply(node, make(2, 2) if back else make(1), LOSS)
        held.say("rounds 1")
        counted(node, 2 * messages + 160, missed=4)
    assert not list((node.root / "slots").glob("*@*"))
