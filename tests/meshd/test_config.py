"""A services file is taken as a whole or not at all, and every mistake in it is named with line and field."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd import config
from meshd.config import ConfigError, Problem
from meshd.model import Backend, Config, Locality, Policy, Service
from meshd.releases import RELEASES

GOOD = """\
services:
  - name: web
    address: 10.96.0.10
    port: 80
    protocol: tcp
    backends:
      - {address: 10.1.0.1, port: 8080, weight: 3}
      - {address: 10.1.0.2, port: 8080}
  - name: web6
    address: fd00::10
    port: 80
    backends: []
policies:
  - action: deny
    service: web
"""


def parse(text: str, release: int = 1, cgroup: Path | None = None) -> Config:
    return config.parse(text, "services.yaml", RELEASES[release], cgroup)


def problems(text: str, release: int = 1, cgroup: Path | None = None) -> list[tuple[int | None, str]]:
    with pytest.raises(ConfigError) as caught:
        parse(text, release, cgroup)
    return [(problem.line, problem.field) for problem in caught.value.problems]


def backends(count: int) -> str:
    return "[" + ", ".join(f"{{address: 10.1.{n >> 8}.{n & 255}, port: 1}}" for n in range(count)) + "]"


def service(**fields: str) -> str:
    all_fields = {"name": "web", "address": "10.96.0.10", "port": "80", "backends": "[]", **fields}
    return "services:\n- " + "\n  ".join(f"{name}: {value}" for name, value in all_fields.items()) + "\n"


def test_a_good_file_becomes_values() -> None:
    found = parse(GOOD)
    assert found == Config(
        services=(
            Service(
                "web",
                ip_address("10.96.0.10"),
                80,
                "tcp",
                (Backend(ip_address("10.1.0.1"), 8080, 3), Backend(ip_address("10.1.0.2"), 8080, 1)),
            ),
            Service("web6", ip_address("fd00::10"), 80, "tcp", ()),
        ),
        policies=(Policy("deny", "web"),),
    )


def test_policies_may_be_left_out() -> None:
    assert parse(service()).policies == ()


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("", 1, "services"),
        ("# nothing\n", 1, "services"),
        ("services: [", 2, ""),
        ("services: 5\n", 1, "services"),
        ("- 1\n", 1, ""),
        ("services: []\nservice: []\n", 2, "service"),
        ("services: []\nservices: []\n", 2, "services"),
        ("services: [*nowhere]\n", 1, ""),
        ("a: 1\n---\nb: 2\n", 2, ""),
        ("services:\n- null\n", 2, "services[0]"),
        (service(colour="red"), 6, "services[0].colour"),
        (service(name="''"), 2, "services[0].name"),
        (service(name="a b"), 2, "services[0].name"),
        (service(name="x" * 254), 2, "services[0].name"),
        (service(address="10.0.0.256"), 3, "services[0].address"),
        (service(address="10.96.0.10/24"), 3, "services[0].address"),
        (service(address="example.org"), 3, "services[0].address"),
        (service(address="0.0.0.0"), 3, "services[0].address"),
        (service(address="224.0.0.1"), 3, "services[0].address"),
        (service(address="fe80::1%eth0"), 3, "services[0].address"),
        (service(address='"::ffff:10.0.0.1"'), 3, "services[0].address"),
        (service(address="[10.96.0.10]"), 3, "services[0].address"),
        (service(port="0"), 4, "services[0].port"),
        (service(port="65536"), 4, "services[0].port"),
        (service(port="-1"), 4, "services[0].port"),
        (service(port="80.5"), 4, "services[0].port"),
        (service(port="http"), 4, "services[0].port"),
        (service(port="0x50"), 4, "services[0].port"),
        (service(port="1:20"), 4, "services[0].port"),
        (service(port="9" * 5000), 4, "services[0].port"),
        (service(protocol="udp"), 6, "services[0].protocol"),
        (service(backends="{}"), 5, "services[0].backends"),
        (service(backends="[{address: 10.1.0.1}]"), 5, "services[0].backends[0].port"),
        (service(backends="[{address: 10.1.0.1, port: 1, weight: 65536}]"), 5, "services[0].backends[0].weight"),
        (service(backends="[{address: 10.1.0.1, port: 1, weight: yes}]"), 5, "services[0].backends[0].weight"),
        (service(backends="[{address: 'fd00::1', port: 1}]"), 5, "services[0].backends[0].address"),
        (service() + "policies: [{action: forbid, service: web}]", 6, "policies[0].action"),
        (service() + "policies: [{action: deny, service: webb}]", 6, "policies[0].service"),
        (service() + "policies: [{action: deny}]", 6, "policies[0].service"),
        (service() + "policies: [{action: deny, service: web, source: all}]", 6, "policies[0].source"),
        (service() + "policies: [{action: deny, service: web, source: {pod: x}}]", 6, "policies[0].source.pod"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_field(text: str, line: int, field: str) -> None:
    assert (line, field) in problems(text)


def test_a_message_has_file_line_field_and_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(service(port="70000"))
    assert caught.value.message == "services.yaml:4: services[0].port: '70000' is no whole number from 1 to 65535"
    assert caught.value.facts["line"] == 4
    assert caught.value.facts["field"] == "services[0].port"


def test_all_mistakes_are_told_at_once_and_each_only_once() -> None:
    text = service(port="0", address="nowhere") + "policies: [{action: deny, service: web}, {action: x, service: no}]"
    assert problems(text) == [
        (3, "services[0].address"),
        (4, "services[0].port"),
        (6, "policies[1].action"),
    ]


def test_two_services_may_not_share_a_name_or_an_address_and_port() -> None:
    twice = service() + service()[len("services:\n") :]
    assert problems(twice) == [(6, "services[1].name"), (6, "services[1].address")]
    other_port = service() + service(name="web2", port="81")[len("services:\n") :]
    assert len(parse(other_port).services) == 2


def test_a_backend_or_policy_may_not_be_given_twice() -> None:
    again = "[{address: 10.1.0.1, port: 1}, {address: 10.1.0.1, port: 1, weight: 2}]"
    assert problems(service(backends=again)) == [(5, "services[0].backends[1].address")]
    policies = "policies: [{action: deny, service: web}, {action: allow, service: web}]"
    assert problems(service() + policies) == [(6, "policies[1].service")]


@pytest.mark.parametrize("number", RELEASES)
def test_a_service_may_have_as_many_backends_as_the_release_has_room_for(number: int) -> None:
    room = RELEASES[number].backends
    assert len(parse(service(backends=backends(room)), number).services[0].backends) == room
    assert problems(service(backends=backends(room + 1)), number) == [(5, "services[0].backends")]


def test_a_clients_cgroup_is_looked_up_under_that_of_the_mesh(tmp_path: Path) -> None:
    for name in ("mesh", "mesh/denied", "outside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    mesh, denied = tmp_path / "mesh", tmp_path / "mesh/denied"

    def policy(path: str) -> str:
        return service() + f"policies: [{{action: deny, service: web, source: {{cgroup: {path}}}}}]"

    for path in ("denied", str(denied)):
        assert parse(policy(path), cgroup=mesh).policies[0].source == denied.stat().st_ino
    field = "policies[0].source.cgroup"
    for path in ("gone", "../outside", str(tmp_path / "outside"), "''", "denied/cgroup.procs"):
        assert problems(policy(path), cgroup=mesh) == [(6, field)]


def test_one_cgroup_under_two_names_is_one_source(tmp_path: Path) -> None:
    (tmp_path / "denied").mkdir()
    (tmp_path / "denied" / "cgroup.procs").touch()
    names = ("denied", str(tmp_path / "denied"), "./denied/../denied")
    policies = [f"{{action: deny, service: web, source: {{cgroup: {name}}}}}" for name in names]
    text = service() + f"policies: [{', '.join(policies)}]"
    assert problems(text, cgroup=tmp_path) == [(6, "policies[1].service"), (6, "policies[2].service")]


def test_a_file_that_is_missing_too_large_or_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "services.yaml"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.read(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.read(tmp_path)
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ConfigError, match=r"services.yaml:2: is not UTF-8 text"):
        config.read(path)
    path.write_bytes(b" " * (config.SIZE_LIMIT + 1))
    with pytest.raises(ConfigError, match="is the limit"):
        config.read(path)
    path.write_bytes(b" " * config.SIZE_LIMIT)
    assert len(config.read(path)) == config.SIZE_LIMIT


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 100_000, "services: &a [*a]", "{" * 100_000])
def test_a_file_nested_without_end_is_refused_and_not_followed_into_the_depth(text: str) -> None:
    assert problems(text)


def test_an_alias_is_not_multiplied() -> None:
    many = ", ".join(["*b"] * 1024)
    text = f"x: &b {backends(9)}\nservices: [{many}]\n"
    assert (1, "x") in problems(text)


def test_a_long_list_of_problems_is_shown_in_part() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("services: [" + "1, " * 100 + "]")
    assert len(caught.value.problems) == 100
    assert caught.value.message.endswith("and 80 more")
    assert caught.value.problems[0] == Problem(1, "services[0]", caught.value.problems[0].message)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["web", "10.0.0.1", "deny"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["services", "policies", "name", "address", "port", "backends", "weight", "source", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=20,
    )
)
def test_whatever_the_file_holds_it_is_values_or_an_error_with_lines(content: object) -> None:
    import yaml

    try:
        found = parse(yaml.safe_dump(content))
    except ConfigError as error:
        assert all(problem.line is not None for problem in error.problems)
    else:
        assert isinstance(found, Config)


@given(st.text(max_size=200))
def test_any_text_is_values_or_an_error(text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        assert error.message.startswith("services.yaml:")


RICH = """\
services:
  - name: dns
    address: 10.96.0.10
    port: 53
    protocol: udp
    affinity: 600
    local: true
    backends:
      - {address: 10.1.0.1, port: 53, healthy: false, locality: {region: eu, zone: eu-1, node: n1}}
  - {name: dns-tcp, address: 10.96.0.10, port: 53, backends: []}
policies:
  - {action: deny, destination: 10.0.0.0/8, port: 22}
  - {action: deny, destination: 10.0.0.0/8, port: 22, protocol: udp}
  - {action: allow, clients: "fd00::/16"}
"""


def test_what_release_4_brought_becomes_values() -> None:
    found = parse(RICH, 4)
    backend = Backend(ip_address("10.1.0.1"), 53, 1, False, Locality("eu", "eu-1", "n1"))
    assert found.services[0] == Service("dns", ip_address("10.96.0.10"), 53, "udp", (backend,), 600, True)
    assert found.services[1].protocol == "tcp"
    assert found.policies == (
        Policy("deny", destination=ip_network("10.0.0.0/8"), port=22),
        Policy("deny", destination=ip_network("10.0.0.0/8"), port=22, protocol="udp"),
        Policy("allow", clients=ip_network("fd00::/16")),
    )


@pytest.mark.parametrize("release", [1, 2, 3])
def test_what_an_older_release_has_no_place_for_is_named_by_line(release: int) -> None:
    assert problems(RICH, release) == [
        (5, "services[0].protocol"),
        (6, "services[0].affinity"),
        (12, "policies[0].destination"),
        (13, "policies[1].destination"),
        (14, "policies[2].clients"),
    ]


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ("{action: deny}", "service"),
        ("{action: deny, service: web, destination: 10.0.0.0/8}", "service"),
        ("{action: deny, service: web, port: 80}", "port"),
        ("{action: deny, clients: 10.0.0.0/8, source: {cgroup: x}}", "source"),
        ("{action: deny, clients: 10.0.0.1/8}", "clients"),
        ("{action: deny, clients: web}", "clients"),
        ('{action: deny, destination: "::ffff:10.0.0.0/104"}', "destination"),
        ("{action: deny, destination: 10.0.0.0/8, port: 0}", "port"),
        ("{action: deny, destination: 10.0.0.0/8, protocol: icmp}", "protocol"),
        ("{action: deny, destination: [10.0.0.0/8]}", "destination"),
    ],
)
def test_a_policy_that_makes_no_sense_is_named(policy: str, field: str) -> None:
    assert problems(service() + f"policies: [{policy}]", 4) == [(6, f"policies[0].{field}")]


@pytest.mark.parametrize(
    ("name", "value"),
    [("affinity", "-1"), ("affinity", "86401"), ("local", "maybe"), ("protocol", "sctp"), ("local", "[]")],
)
def test_a_field_of_a_service_that_makes_no_sense_is_named(name: str, value: str) -> None:
    assert problems(service(**{name: value}), 4) == [(6, f"services[0].{name}")]


@pytest.mark.parametrize("more", ["healthy: 2", "locality: eu", "locality: {city: x}", "locality: {zone: ''}"])
def test_a_field_of_a_backend_that_makes_no_sense_is_named(more: str) -> None:
    ((line, field),) = problems(service(backends=f"[{{address: 10.1.0.1, port: 1, {more}}}]"), 4)
    assert line == 5
    assert field.startswith(f"services[0].backends[0].{more.partition(':')[0]}")


def test_the_same_policy_by_addresses_may_not_be_given_twice() -> None:
    one = "{action: deny, destination: 10.0.0.0/8}"
    assert problems(service() + f"policies: [{one}, {one}]", 4) == [(6, "policies[1].destination")]
