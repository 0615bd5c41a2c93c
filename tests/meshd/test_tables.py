"""A table gives each backend exactly its share, and holds who should have new connections."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.model import Backend, Locality, Service
from meshd.tables import LEVELS, choose, read_slots, shares, slots

HERE = Locality("eu", "eu-1", "n1")


def backends(*weights: int) -> tuple[Backend, ...]:
    return tuple(Backend(ip_address(f"10.1.{n >> 8}.{n & 255}"), 80, weight) for n, weight in enumerate(weights))


def service(*ends: Backend, local: bool = True) -> Service:
    return Service("web", ip_address("10.96.0.1"), 80, "tcp", ends, local=local)


def at(number: int, *where: str, weight: int = 1, healthy: bool = True) -> Backend:
    return Backend(ip_address(f"10.1.0.{number}"), 80, weight, healthy, Locality(*where))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 65535), max_size=40))
def test_every_backend_has_the_share_that_its_weight_is_of_all(weights: list[int]) -> None:
    table = read_slots(slots(backends(*weights)))
    wanted = [weight for weight in weights if weight]
    assert [slot.weight for slot in table] == wanted
    for got, weight in zip(shares(table), wanted, strict=True):
        assert got == pytest.approx(weight / sum(wanted), abs=1e-8)


def test_ten_thousand_backends_of_very_different_weight_have_their_shares() -> None:
    weights = [1 + (n * 7919) % 65535 for n in range(10_000)]
    for got, weight in zip(shares(read_slots(slots(backends(*weights)))), weights, strict=True):
        assert got == pytest.approx(weight / sum(weights), abs=1e-8)


def test_a_backend_of_either_family_is_read_as_it_was_written() -> None:
    ends = (Backend(ip_address("10.1.0.1"), 8080, 3), Backend(ip_address("fd00::1"), 443, 65535))
    assert [(slot.address, slot.port, slot.weight) for slot in read_slots(slots(ends))] == [
        (one.address, one.port, one.weight) for one in ends
    ]


@pytest.mark.parametrize(
    ("level", "ends", "chosen"),
    [
        ("node", [at(1, "eu", "eu-1", "n1"), at(2, "eu", "eu-1", "n2")], [1]),
        ("zone", [at(1, "eu", "eu-1", "n2"), at(2, "eu", "eu-2", "n3"), at(3, "eu", "eu-1")], [1, 3]),
        ("region", [at(1, "eu", "eu-2"), at(2, "us", "eu-1")], [1]),
        ("far", [at(1, "us"), at(2)], [1, 2]),
        ("zone", [at(1, "eu", "eu-1", "n1", healthy=False), at(2, "eu", "eu-1", "n2"), at(3, "us")], [2]),
        ("zone", [at(1, "eu", "eu-1", "n1", weight=0), at(2, "eu", "eu-1", "n2")], [2]),
        ("any", [at(1, "eu", healthy=False), at(2, "us", healthy=False)], [1, 2]),
    ],
)
def test_clients_are_sent_to_the_nearest_that_serve(level: str, ends: list[Backend], chosen: list[int]) -> None:
    found = choose(service(*ends), HERE)
    assert LEVELS[found.level] == level
    assert [one.address.packed[3] for one in found.backends] == chosen


def test_a_service_that_does_not_ask_for_near_ones_has_all_that_are_healthy() -> None:
    found = choose(service(at(1, "eu"), at(2, healthy=False), at(3, "us"), local=False), HERE)
    assert [one.address.packed[3] for one in found.backends] == [1, 3]
    assert (found.level, found.known, found.healthy) == (0, 3, 2)
