"""A configuration becomes exactly the bytes' worth of keys and values that each release's programs read."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from meshd.desired import PolicyKey, ServiceKey, desired, policy_key, service_key
from meshd.model import Backend, Config, Policy, Service
from meshd.releases import RELEASES

WEB = Service(
    "web",
    ip_address("10.96.0.10"),
    80,
    "tcp",
    (Backend(ip_address("10.1.0.1"), 8080, 3), Backend(ip_address("10.1.0.2"), 8080, 0)),
)
WEB6 = Service("web6", ip_address("fd00::10"), 443, "tcp", ())
MAPPED = bytes(10) + b"\xff\xff"


def key_of(address: bytes, port: bytes) -> ServiceKey:
    return ServiceKey(address, int.from_bytes(port, "little"))


def test_an_address_is_sixteen_bytes_and_a_port_is_in_network_order() -> None:
    wanted = desired(Config((WEB, WEB6)), RELEASES[1])
    assert set(wanted.services) == {
        key_of(MAPPED + bytes([10, 96, 0, 10]), b"\x00\x50"),
        key_of(ip_address("fd00::10").packed, b"\x01\xbb"),
    }


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_service_fills_the_whole_value_of_its_release(number: int) -> None:
    release = RELEASES[number]
    (value,) = desired(Config((WEB,)), release).services.values()
    assert (value["total_weight"], value["count"]) == (3, 2)
    assert len(value["backends"]) == release.backends
    assert [backend["weight"] for backend in value["backends"]] == [3, 0] + [0] * (release.backends - 2)
    assert value["backends"][0]["addr"] == MAPPED + bytes([10, 1, 0, 1])
    assert value["backends"][2]["addr"] == bytes(16)


def test_a_service_without_backends_has_no_weight() -> None:
    (value,) = desired(Config((WEB6,)), RELEASES[1]).services.values()
    assert (value["total_weight"], value["count"]) == (0, 0)


def test_a_policy_names_its_service_by_address_and_its_client_by_cgroup_id() -> None:
    wanted = desired(Config((WEB,), (Policy("deny", "web", None, 7), Policy("allow", "web"))), RELEASES[1])
    (web,) = wanted.services
    assert wanted.policies == {PolicyKey(7, web): 1, PolicyKey(0, web): 0}


def test_keys_come_back_from_a_map_as_they_went_in() -> None:
    service = key_of(ip_address("fd00::10").packed, b"\x00\x50")
    assert service_key(service.to_map()) == service
    assert policy_key(PolicyKey(9, service).to_map()) == PolicyKey(9, service)
