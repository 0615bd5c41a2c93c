"""Of several daemons of one root exactly one writes: the one that takes over, else the youngest."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hitless.errors import BusyError
from meshd.turn import Turn


def says(turn: Turn) -> str:
    with turn.writing() as whose:
        return whose


@pytest.fixture
def settled(tmp_path: Path) -> Callable[[], Turn]:
    def make() -> Turn:
        turn = Turn(tmp_path)
        turn.seize(1)
        turn.settle()
        return turn

    return make


def test_who_is_alone_writes(settled: Callable[[], Turn]) -> None:
    assert says(settled()) == "mine"


def test_while_another_takes_over_the_older_one_waits_and_the_other_writes(
    tmp_path: Path, settled: Callable[[], Turn]
) -> None:
    older, newer = settled(), Turn(tmp_path)
    newer.seize(1)
    assert (says(older), says(newer)) == ("wait", "mine")


def test_a_failed_take_over_gives_the_turn_back(tmp_path: Path, settled: Callable[[], Turn]) -> None:
    older, newer = settled(), Turn(tmp_path)
    newer.seize(1)
    newer.give_up()
    assert says(older) == "mine"


def test_after_a_take_over_the_older_one_has_lost_and_the_newer_one_writes(settled: Callable[[], Turn]) -> None:
    older, newer, newest = settled(), settled(), settled()
    assert [says(one) for one in (older, newer, newest)] == ["lost", "lost", "mine"]


def test_what_comes_after_the_youngest_died_is_younger_than_all_that_live(settled: Callable[[], Turn]) -> None:
    older, dead = settled(), settled()
    dead.give_up()
    newest = settled()
    assert (says(older), says(newest)) == ("lost", "mine")


def test_nobody_takes_over_in_the_middle_of_a_write(tmp_path: Path, settled: Callable[[], Turn]) -> None:
    older, newer = settled(), Turn(tmp_path)
    with older.writing() as whose:
        assert whose == "mine"
        with pytest.raises(BusyError, match=r"has been writing to the maps of .* for 0.05 s without an end"):
            newer.seize(0.05)
    assert says(older) == "mine"


def test_a_root_that_was_made_again_is_another_ones(tmp_path: Path, settled: Callable[[], Turn]) -> None:
    older = settled()
    tmp_path.rename(tmp_path.with_name("unloaded"))
    assert says(older) == "lost"
    tmp_path.mkdir()
    assert says(older) == "lost"


def test_who_takes_over_never_takes_itself_for_superseded(tmp_path: Path, settled: Callable[[], Turn]) -> None:
    older = [settled() for _ in range(4)]
    for _ in range(50):
        newer, done = Turn(tmp_path), threading.Event()
        said: set[str] = set()
        newer.seize(1)

        def write(turn: Turn, said: set[str], done: threading.Event) -> None:
            while not done.is_set():
                said.add(says(turn))

        thread = threading.Thread(target=write, args=(newer, said, done))
        thread.start()
        newer.settle()
        done.set()
        thread.join()
        newer.give_up()
        assert said <= {"mine"}
    assert says(older[-1]) == "mine"


def test_in_any_order_of_events_no_two_write_at_once(tmp_path: Path, settled: Callable[[], Turn]) -> None:
    inside: list[Turn] = []
    mistakes = []
    done = threading.Event()

    def write(turn: Turn) -> None:
        while not done.is_set():
            with turn.writing() as whose:
                if whose == "lost":
                    return
                if whose == "mine":
                    inside.append(turn)
                    if len(inside) > 1:
                        mistakes.append(list(inside))
                    inside.remove(turn)

    chance = random.Random(1)
    threads = []
    for _ in range(50):
        turn = Turn(tmp_path)
        turn.seize(5)
        if chance.random() < 0.3:
            turn.give_up()
            continue
        threads.append(threading.Thread(target=write, args=(turn,)))
        threads[-1].start()
        turn.settle()
    done.set()
    for thread in threads:
        thread.join(5)
    assert mistakes == []
