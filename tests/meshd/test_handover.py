"""A daemon takes over from one that lives: nobody is missing meanwhile, nobody fights, and the older one ends."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from meshd.events import Events
from meshd.keeper import Keeper
from meshd.model import Config
from meshd.releases import RELEASES
from meshd.sources import Sink, SourceAwayError
from meshd.turn import Turn
from tests.meshd.labmesh import A6, VIP, VIP6, B, Churn, Mesh, Meshd, denied, is_as_the_file_says, service, until

FAULTY = str(Path(__file__).parent / "faulty.py")


def ended(older: Meshd | None) -> dict[str, object]:
    assert older is not None
    last = older.lines.wait_for({"event": ("stopped",)}, 15)
    assert older.process.wait(5) == 0
    return last


@pytest.mark.parametrize(("first", "second", "how"), [(2, 2, "restart"), (2, 3, "update")])
def test_a_second_daemon_takes_over_while_the_file_changes(mesh: Mesh, first: int, second: int, how: str) -> None:
    with Churn(mesh):
        mesh.start(first)
        older = mesh.daemon
        clients = mesh.python("connect", VIP, "80", "100000", cgroup="clients")
        assert mesh.start(second)["start_type"] == how
        assert ended(older)["exit_type"] == "restart"
        for _ in range(3):  # and it is followed still
            mesh.next_event(event="config")
        clients.send_signal(signal.SIGINT)
        said, _ = clients.communicate(timeout=10)
        assert '"errors": {}' in said
    assert until(lambda: is_as_the_file_says(mesh, second), 1)


@pytest.mark.parametrize("fault", ["fails-after-cutover", "dies-before-cutover"])
def test_a_daemon_that_comes_to_grief_in_its_upgrade_leaves_the_older_one_in_charge(mesh: Mesh, fault: str) -> None:
    mesh.start(2)
    older = mesh.daemon
    failing = mesh.launch(3, command=[FAULTY, fault])
    assert failing.process.wait(15) != 0
    mesh.daemon = older
    mesh.write([service("web", VIP, B)])
    mesh.next_event(event="config", services=1, removed=1)
    assert is_as_the_file_says(mesh, 2)
    assert mesh.connect(VIP)["answers"] == {B: 1}
    mesh.start(3)
    assert ended(older)["exit_type"] == "restart"


def test_a_daemon_that_was_stopped_while_it_writes_is_waited_for_and_named(mesh: Mesh) -> None:
    mesh.start(2)
    turn = Turn(mesh.root)
    turn.seize(5)
    turn.settle()
    with turn.writing():
        refused = mesh.try_start(2)
    assert (refused["event"], refused["code"]) == ("error", "busy")
    assert "without an end" in refused["message"]


class Away:
    """A control plane that does not answer."""

    name = "away"
    may_be_empty = False

    def load(self) -> Config:
        raise SourceAwayError("it does not answer", source=self.name)

    def follow(self, sink: Sink, stop: threading.Event) -> None:
        stop.wait()


def test_without_a_control_plane_all_that_the_older_one_wrote_until_the_last_moment_stays(mesh: Mesh) -> None:
    mesh.start_here()
    stop = threading.Event()
    stop.set()  # nothing is kept beyond the take-over
    keeper = Keeper(mesh.node, RELEASES[4], [Away()], Events(), stop)
    keeper.load()
    mesh.set([service("web", VIP, B), service("web6", VIP6, A6)], [denied("web")])
    keeper.take_over()
    keeper.finish()
    assert is_as_the_file_says(mesh, 4)
    assert mesh.connect(cgroup="denied")["errors"] == {"EPERM": 1}
