"""Sockets are handed over from the program that they were added under to the one that their map has now."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from hitless.kernel.handover import Handover
from hitless.kernel.map_places import MapPlace
from hitless.kernel.maps import ANY
from hitless.kernel.socket_programs import programs_of_sockets
from hitless.kernel.sockets import Adder, Remover, create_base, list_sockets
from meshd.demo.lab import Lab
from tests.kernel.connections import Bench, attach_the_old_way, clients
from tests.patience import patient

KIND = "sk_msg_verdict"
PASSES = 20


class Handing:
    """Connections whose sockets run one of two programs."""

    def __init__(self, lab: Lab) -> None:
        self.bench = Bench(lab, 2)
        self.programs = [release.programs["passed"] for release in self.bench.releases]
        self.peers = self.bench.peers
        self._room = lab.bpffs / "room"
        self.attach(0)

    def attach(self, number: int) -> None:
        attach_the_old_way(self.programs[number], self.peers, KIND)

    def run_by(self) -> Counter[int]:
        return Counter(programs_of_sockets(self.peers, KIND).values())

    def begin(self) -> Handover:
        there = programs_of_sockets(self.peers, KIND)
        return Handover(self.peers, self._room, "hook", there)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The second program is taken off the map meanwhile."""
        MapPlace(self.peers.info.id, KIND).take_off(self.programs[1])
        yield
        self.attach(1)

    @property
    def pins(self) -> list[str]:
        return sorted(path.name for path in self._room.iterdir())

    def put_beside(self, handover: Handover) -> None:
        """As who is killed where somebody had taken hold of the sockets leaves them."""
        sockets = list_sockets(self.peers)
        for number, (key, cookie) in enumerate(sockets.items()):
            record = number.to_bytes(4, sys.byteorder) + (2).to_bytes(4, sys.byteorder) + key
            handover._wanted.update(cookie.to_bytes(8, sys.byteorder), record)
        keys = np.frombuffer(b"".join(sockets), np.uint8).reshape(len(sockets), -1)
        numbers = np.arange(len(sockets), dtype=np.uint32).reshape(-1, 1).view(np.uint8)
        with create_base(self.peers, "base") as base:
            adder = Adder("beside", self.peers, handover._beside, base)
            assert not any(adder.add(keys, list(sockets.values()), numbers, [ANY] * len(sockets)))
        Remover("beside", self.peers).remove(sockets)
        assert list_sockets(self.peers) == {}


@pytest.fixture
def handing(lab: Lab) -> Handing:
    return Handing(lab)


def test_of_busy_senders_hardly_a_message_passes_without_a_program(
    lab: Lab, handing: Handing, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (program.info.id for program in handing.programs)
    with clients(lab, answers=True) as held:
        held.say("connect 100")
        held.say("run 0")
        for number in range(1, PASSES + 1):
            handing.attach(number % 2)
            handover = handing.begin()
            handover.run(patient(5))
            assert handover.left() == {}
            handover.put_back(handing.aside())
            assert handing.run_by() == {(new if number % 2 else old): 200}
        messages = 2 * held.say("stop")
    assert handing.pins == []
    missed = messages - sum(calls for calls, _ in handing.bench.tallies())
    with capsys.disabled():
        print(f"\n{200 * PASSES} sockets handed over among {messages} messages: {missed} passed without a program")
    assert 0 <= missed <= 2 * PASSES


def test_who_was_killed_leaves_sockets_beside_and_the_next_hands_them_over(lab: Lab, handing: Handing) -> None:
    with clients(lab, answers=True) as held:
        held.say("connect 20")
        handing.attach(1)
        keys = list_sockets(handing.peers)
        handover = handing.begin()
        handing.put_beside(handover)
        held.say("rounds 1")
        handover.close()
        handover = handing.begin()
        handover.run(patient(5))
        assert handover.left() == {}
        handover.put_back(handing.aside())
        assert list_sockets(handing.peers) == keys
        assert handing.run_by() == {handing.programs[1].info.id: 40}
        held.say("rounds 1")
    assert [calls for calls, _ in handing.bench.tallies()] == [40, 40]


def test_sockets_beside_come_back_with_the_program_that_they_have(lab: Lab, handing: Handing) -> None:
    with clients(lab, answers=True) as held:
        held.say("connect 20")
        handing.attach(1)
        keys = list_sockets(handing.peers)
        handover = handing.begin()
        handing.put_beside(handover)
        held.say("wait 2")
        handover.run(patient(1))
        assert handover.left() == {"are in the middle of a call, such as a read that waits": 2}
        handover.put_back(handing.aside())
        held.say("wake")
        assert handing.pins == []
        assert list_sockets(handing.peers) == keys
        assert handing.run_by() == {handing.programs[0].info.id: 2, handing.programs[1].info.id: 38}


def test_a_socket_that_somebody_waits_on_does_not_leave_its_map(lab: Lab, handing: Handing) -> None:
    with clients(lab, answers=True) as held:
        held.say("connect 2")
        handing.attach(1)
        keys = list_sockets(handing.peers)
        held.say("wait 2")
        handover = handing.begin()
        handover.run(patient(1))
        assert list_sockets(handing.peers) == keys
        assert handing.run_by() == {handing.programs[0].info.id: 2, handing.programs[1].info.id: 2}
        handover.put_back(handing.aside())
        held.say("wake")
