"""A node that another daemon started is taken over and upgraded under traffic, and its own loader goes on with it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.kernel.programs import Program
from hitless.kernel.xdp import Xdp
from hitless.upgrade.status import status
from tests.kmesh.bundles import VERSIONS, write_bundle
from tests.kmesh.node import KmeshNode, Table, Traffic, differences
from tests.kmesh.structs import RENAMED, SCHEMAS

# Fields that programs write, which go on while an upgrade runs; all other fields have to stay as they are.
COUNTED = {
    "km_authz_policies": ("hits",),
    "km_auth_res": ("hits", "reason"),
    "km_tally": ("connects", "denied", "last_service"),
    "km_backend_stats": ("connects", "denied", "last_service"),
    "km_pods": ("rx_udp", "tx_udp", "rx_bytes", "tx_bytes"),
    "km_hooks": ("packets", "bytes"),
    "km_dns_orig": ("answers", "asked"),
    "km_waypoint": ("asked",),
    "kmesh_version": ("hash",),
}
LINKS = (
    "sockconn/sockconn_prog", "sockconn/sockconn6_prog", "sockconn/sockconn_dns_prog",
    "sockconn/sockconn_dns_recv_prog", "cgroup_sockops_prog", "cgroup_skb_ingress_prog", "cgroup_skb_egress_prog",
)  # fmt: skip

Bundles = Callable[..., Path]


@pytest.fixture
def bundle(node: KmeshNode, tmp_path: Path) -> Bundles:
    """The directory of a release's bundle: stripped objects and a header, or objects with debug information."""

    def write(release: int, stripped: bool = True, told: bool = False) -> Path:
        built, directory = node.built, tmp_path / f"bundle{release}{stripped}{told}"
        if not stripped:
            return write_bundle(directory, release, built.objects[release])
        before = built.headers[1] if told else None
        return write_bundle(directory, release, built.stripped[release], built.headers[release], before)

    return write


def load(node: KmeshNode, path: Path) -> hitless.Bundle:
    return hitless.Bundle.load(path, node.variables_of_bundles())


def hitless_command(node: KmeshNode, *words: str | Path) -> str:
    said = [f"--set={name}={value}" for name, value in node.variables_of_bundles().items()]
    done = node.lab.run([sys.executable, "-m", "hitless", *words, *said])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ids_of_links(node: KmeshNode) -> list[int]:
    found = []
    for pin in LINKS:
        with node.link(pin) as link:
            found.append(link.info.id)
    return found


def ids_of_maps(node: KmeshNode, release: int) -> dict[str, int]:
    found = {}
    for name in (*SCHEMAS[release], "km_sockhash", "km_tcp_probe", "km_cgr_tailcall", "km_xdp_tailcall"):
        with node.map(name) as held:
            found[name] = held.info.id
    return found


def lost(before: dict[str, Table], after: dict[str, Table]) -> list[str]:
    told = []
    for name, table in before.items():
        new = RENAMED.get(name, name) if RENAMED.get(name, name) in after else name
        told += [f"{name}: {what}" for what in differences(table, after[new], COUNTED.get(name, ()))]
    return told


def run_for(traffic: Traffic, seconds: float) -> None:
    traffic.go()
    time.sleep(seconds)
    traffic.pause()


def test_an_adopted_node_is_upgraded_under_traffic_and_the_release_that_came_starts_on_all_of_it(
    node: KmeshNode, bundle: Bundles
) -> None:
    daemon = node.start(1)
    node.fill()
    own = hitless.Node(node.root)
    with node.traffic() as traffic:
        run_for(traffic, 0.2)
        assert node.wrong(1, traffic) == []
        before, links = node.dump(1), ids_of_links(node)
        traffic.go()
        hitless.adopt(own, load(node, bundle(1)))
        result = hitless.apply(own, load(node, bundle(2)))
        time.sleep(0.2)
        traffic.pause()
        assert node.wrong(2, traffic) == []
        assert max(one.gap for one in traffic.now.values()) < 1.0
        after = node.dump(2)
        assert lost(before, after) == []
        assert ids_of_links(node) == links
        assert {entry.name: entry.action for entry in result.maps}["km_frontend"] == "convert"
        told = node.variables()
        assert told["sockops.established"] == sum(traffic.connects().values())
        assert told["tc_mark_decrypt.from_nodes"] == traffic.now["questions"].messages["10.96.0.10"]
        assert hitless.verify(own).problems == ()
        assert status(own).problems == ()

        maps = ids_of_maps(node, 2)
        daemon.stop()
        traffic.go()
        started = node.start(2).started
        assert started.start == "Restart"
        assert {name: one.id for name, one in started.pinned.items()} == maps
        assert all(one.reused for one in started.pinned.values())
        time.sleep(0.2)
        traffic.pause()
        assert node.wrong(2, traffic) == []
        assert lost(after, node.dump(2)) == []


def test_an_adoption_alone_changes_nothing_and_the_release_that_runs_starts_on_all_of_it(
    node: KmeshNode, bundle: Bundles
) -> None:
    daemon = node.start(1)
    node.fill(frontends=2000)
    with node.traffic() as traffic:
        run_for(traffic, 0.2)
        before, maps, links = node.dump(1), ids_of_maps(node, 1), ids_of_links(node)
        traffic.go()
        hitless.adopt(hitless.Node(node.root), load(node, bundle(1)))
        daemon.stop()
        started = node.start(1).started
        traffic.pause()
        assert node.wrong(1, traffic) == []
    assert started.start == "Restart"
    assert {name: one.id for name, one in started.pinned.items()} == maps == ids_of_maps(node, 1)
    assert ids_of_links(node) == links
    assert lost(before, node.dump(1)) == []


def test_what_its_loader_started_again_after_the_adoption_is_upgraded_and_taken_back(
    node: KmeshNode, bundle: Bundles
) -> None:
    node.start(1).stop()
    node.fill(frontends=2000)
    own = hitless.Node(node.root)
    hitless.adopt(own, load(node, bundle(1)))
    daemon = node.start(1)
    with node.traffic() as traffic:
        run_for(traffic, 0.2)
        traffic.go()
        hitless.apply(own, load(node, bundle(2)))
        traffic.pause()
        assert node.wrong(2, traffic) == []
        traffic.go()
        hitless.rollback(own, allow_loss=(*SCHEMAS[1], "km_waypoint", "sockops.bss"))
        traffic.pause()
        assert node.wrong(1, traffic) == []
        daemon.stop()
        assert node.start(1).started.start == "Restart"


def test_an_upgrade_that_was_killed_is_taken_back_and_the_release_that_ran_starts_on_all_of_it(
    node: KmeshNode, bundle: Bundles
) -> None:
    daemon = node.start(1)
    node.fill(frontends=2000)
    own, first, second = hitless.Node(node.root), load(node, bundle(1)), load(node, bundle(2))
    with node.traffic() as traffic:
        run_for(traffic, 0.1)
        before, maps = node.dump(1), ids_of_maps(node, 1)
        traffic.go()
        hitless.adopt(own, first)
        pid = os.fork()
        if not pid:
            try:
                hitless.apply(own, second, progress=die_at_merge)
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        hitless.recover(own, back=True)
        traffic.pause()
        assert node.wrong(1, traffic) == []
        assert lost(before, node.dump(1)) == []
    daemon.stop()
    assert node.start(1).started.start == "Restart"
    assert ids_of_maps(node, 1) == maps


def die_at_merge(event: hitless.Progress) -> None:
    if event.step == "merge":
        os.kill(os.getpid(), signal.SIGKILL)


def test_pods_that_came_since_are_upgraded_where_the_daemon_has_put_its_programs(
    node: KmeshNode, bundle: Bundles
) -> None:
    node.start(1, pods=2).stop()
    own = hitless.Node(node.root)
    hitless.adopt(own, load(node, bundle(1)))
    node.start(1, pods=3).stop()
    before = node.programs_of_pods()
    assert [len(programs) for programs in before.values()] == [4, 4, 4]
    node.pods.add(1)

    def fail(event: hitless.Progress) -> None:
        if event.step == "commit":
            raise ZeroDivisionError

    second = load(node, bundle(2))
    with pytest.raises(ZeroDivisionError):
        hitless.apply(own, second, progress=fail)
    assert node.programs_of_pods() == {**before, "pod4": ()}
    hitless.apply(own, second)
    after = node.programs_of_pods()
    assert after["pod1"] == after["pod2"] == after["pod3"] != before["pod1"]
    assert after["pod4"] == ()
    assert hitless.verify(own).problems == ()
    assert status(own).problems == ()

    with Program.by_id(before["pod1"][0]) as old:  # by a daemon that does not know of the upgrade
        Xdp.attach(old, node.device("pod4"), "generic")
    (problem,) = status(own).problems
    assert "pod4 came since, and has program" in problem
    hitless.apply(own, second)
    assert node.programs_of_pods()["pod4"] == after["pod1"][:1]
    assert status(own).problems == ()


@pytest.mark.parametrize("running", [True, False])
def test_one_command_adopts_and_upgrades(node: KmeshNode, bundle: Bundles, running: bool) -> None:
    node.start(1, objects=node.built.objects[1]).stop()
    node.fill(frontends=2000)
    first, second = bundle(1, stripped=False), bundle(2, stripped=not running, told=not running)
    with node.traffic() as traffic:
        run_for(traffic, 0.2)
        before = node.dump(1)
        traffic.go()
        more = ("--running", first) if running else ()
        hitless_command(node, "apply", second, "--adopt", "--root", node.root, *more, "--yes")
        traffic.pause()
        assert node.wrong(2, traffic) == []
        assert lost(before, node.dump(2)) == []
        told = node.variables()
        assert told["sockops.established"] == sum(traffic.connects().values())
        assert told["tc_mark_decrypt.from_nodes"] == traffic.now["questions"].messages["10.96.0.10"]
    assert node.start(2).started.start == "Restart"


def test_where_nothing_runs_the_command_leaves_all_to_the_loader(node: KmeshNode, bundle: Bundles) -> None:
    second = bundle(2)
    hitless_command(node, "apply", second, "--adopt", "--root", node.root, "--yes")
    assert not (node.root / "hitless").exists()
    assert node.start(2).started.start == "Normal"
    assert VERSIONS[2] in hitless_command(node, "adopt", second, "--root", node.root)
