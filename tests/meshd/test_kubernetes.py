"""What a cluster's Services and EndpointSlices mean for the mesh, and how a server is followed that goes and comes."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshd.sources.kubernetes as module
from meshd.model import Backend, Config, Locality, Service
from meshd.registry import Registry
from meshd.releases import RELEASES
from meshd.sources import SourceAwayError, SourceError, checks
from meshd.sources.kubernetes import KubernetesSource, Mirror
from tests.meshd.apiserver import SERVICES, SLICES, ApiServer, Object, endpoint, endpoints, service
from tests.meshd.hearing import following, until

VIP, VIP6 = "10.96.0.10", "fd00:96::10"
A, B, C = "10.244.0.1", "10.244.0.2", "10.244.0.3"
NAME = "shop.web.http"


@pytest.fixture
def api() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.away()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.5)


@pytest.fixture
def source(api: ApiServer, tmp_path: Path) -> KubernetesSource:
    return KubernetesSource(api.kubeconfig(tmp_path / "config"))


def meaning(services: list[Object], slices: list[Object], node: str = "") -> dict[str, Service]:
    """What a cluster with these objects means."""
    mirror = Mirror(node)
    mirror.replace([encoded(one) for one in services], [encoded(one) for one in slices])
    mirror.take_changes()
    assert mirror.take_problems() == []
    return {one.name: one for one in mirror.config().services}


def encoded(thing: Any) -> bytes:
    return json.dumps(thing).encode()


def backend(address: str, port: int = 8080, healthy: bool = True, zone: str = "", node: str = "") -> Backend:
    return Backend(checks.address(address), port, 1, healthy, Locality("", zone, node))


def test_a_service_is_its_address_and_port_with_the_endpoints_of_its_slices() -> None:
    found = meaning([service("web", VIP)], [endpoints("web", B, A), endpoints("db", C)])
    assert found == {NAME: Service(NAME, checks.address(VIP), 80, "tcp", (backend(A), backend(B)))}


def test_each_address_family_port_and_protocol_is_a_service_of_its_own() -> None:
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53}]
    far = [{"name": "dns-tcp", "port": 5353, "protocol": "TCP"}, {"name": "dns", "port": 5354, "protocol": "UDP"}]
    found = meaning(
        [service("dns", VIP, VIP6, ports=[*ports, {"name": "s", "port": 9, "protocol": "SCTP"}])],
        [
            endpoints("dns", A, ports=far),
            endpoints("dns", "fd00:244::1", name="dns-6", family="IPv6", ports=far),
            endpoints("dns", "example.com", name="dns-fqdn", family="FQDN", ports=far),
        ],
    )
    assert {name: (str(one.address), one.protocol, one.backends[0].port) for name, one in found.items()} == {
        "shop.dns.dns": (VIP, "udp", 5354),
        "shop.dns.dns-tcp": (VIP, "tcp", 5353),
        "shop.dns.dns.ipv6": (VIP6, "udp", 5354),
        "shop.dns.dns-tcp.ipv6": (VIP6, "tcp", 5353),
    }
    assert [str(one.address) for one in found["shop.dns.dns.ipv6"].backends] == ["fd00:244::1"]


def test_a_port_without_a_name_is_called_by_its_number() -> None:
    found = meaning([service("web", VIP, ports=[{"port": 80}])], [endpoints("web", A, ports=[{"port": 8080}])])
    assert found["shop.web.80"].backends == (backend(A),)


def test_headless_and_external_services_are_not_of_the_mesh() -> None:
    assert meaning([service("none"), service("name", "", type="ExternalName")], [endpoints("none", A)]) == {}


def test_who_is_not_ready_is_left_out_and_who_leaves_serves_only_if_nobody_else_does() -> None:
    slices = [
        endpoints(
            "web",
            endpoint(A, ready=False),
            endpoint(B, ready=False, serving=True, terminating=True),
            endpoint(C, ready=True),
        )
    ]
    assert meaning([service("web", VIP)], slices)[NAME].backends == (backend(B, healthy=False), backend(C))
    everybody = meaning([service("web", VIP, publishNotReadyAddresses=True)], slices)[NAME]
    assert [one.healthy for one in everybody.backends] == [True, True, True]


def test_an_endpoint_in_two_slices_counts_once() -> None:
    found = meaning([service("web", VIP)], [endpoints("web", A), endpoints("web", A, B, name="web-2")])
    assert found[NAME].backends == (backend(A), backend(B))


def test_affinity_to_a_client_lasts_as_long_as_the_service_says() -> None:
    timeout: Object = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}}}
    assert meaning([service("web", VIP, **timeout)], [])[NAME].affinity == 60
    assert meaning([service("web", VIP, sessionAffinity="ClientIP")], [])[NAME].affinity == 10800
    assert meaning([service("web", VIP, sessionAffinity="None")], [])[NAME].affinity == 0


@pytest.mark.parametrize(("wish", "node"), [("PreferSameZone", ""), ("PreferClose", ""), ("PreferSameNode", "n1")])
def test_traffic_that_prefers_what_is_close_goes_there(wish: str, node: str) -> None:
    slices = [endpoints("web", endpoint(A, node="n1", zone="z1"))]
    found = meaning([service("web", VIP, trafficDistribution=wish)], slices)[NAME]
    assert (found.local, found.backends) == (True, (backend(A, zone="z1", node=node),))


def test_traffic_that_must_not_leave_the_node_has_only_its_endpoints() -> None:
    local = service("web", VIP, internalTrafficPolicy="Local")
    slices = [endpoints("web", endpoint(A, node="n1"), endpoint(B, node="n2"))]
    here = meaning([local], slices, node="n2")[NAME]
    assert (here.local, here.backends) == (False, (backend(B, node="n2"),))
    assert meaning([local], slices)[NAME].local


def test_what_the_cluster_says_at_the_start_is_read_page_by_page(api: ApiServer, source: KubernetesSource) -> None:
    for number in range(150):
        api.put(SERVICES, service(f"s{number}", f"10.96.1.{number + 1}"))
        api.put(SLICES, endpoints(f"s{number}", A))
    config = source.load()
    assert len(config.services) == 150
    assert all(one.backends == (backend(A),) for one in config.services)
    assert len(api.requests) == 3


def test_only_one_namespace_is_asked_for_if_that_is_wanted(api: ApiServer, tmp_path: Path) -> None:
    api.put(SERVICES, service("web", VIP))
    api.put(SERVICES, service("other", "10.96.0.11", namespace="else"))
    one = KubernetesSource(api.kubeconfig(tmp_path / "config"), namespace="else")
    assert [found.name for found in one.load().services] == ["else.other.http"]


def test_a_change_of_a_slice_is_told_for_its_service_alone(api: ApiServer, source: KubernetesSource) -> None:
    api.put(SERVICES, service("web", VIP))
    api.put(SERVICES, service("db", "10.96.0.11"))
    api.put(SLICES, endpoints("web", A))
    with following(source, source.load()) as heard:
        api.put(SLICES, endpoints("web", A, B))
        assert heard.backends_come_to(NAME, A, B)
        api.delete(SERVICES, "shop", "db")
        assert heard.comes_to(NAME)
        api.put(SERVICES, service("db", "10.96.0.11"))
        api.put(SLICES, endpoints("db", C))
        assert heard.backends_come_to("shop.db.http", C)
        assert heard.replaced == 0
        assert heard.updates[:2] == [{NAME}, {"shop.db.http"}]
        assert heard.troubles == []


def test_a_watch_that_ends_goes_on_where_it_was(api: ApiServer, source: KubernetesSource) -> None:
    api.put(SERVICES, service("web", VIP))
    api.put(SLICES, endpoints("web", A))
    with following(source, source.load()) as heard:
        assert until(lambda: api.watched() == 2)
        api.bookmark()
        api.put(SLICES, endpoints("web", B))
        assert heard.backends_come_to(NAME, B)
        api.end_watches()
        assert until(lambda: api.watched() == 4)
        api.put(SLICES, endpoints("web", C))
        assert heard.backends_come_to(NAME, C)
        assert heard.replaced == 0, "nothing was to be listed again"
        versions = [one for one in api.requests if "endpointslices" in one and "watch=true" in one]
        assert "resourceVersion=104" in versions[-1], "the last event or bookmark that was seen"


@pytest.mark.parametrize("how", ["status", "event"])
def test_a_server_that_forgot_what_came_after_is_listed_again(
    api: ApiServer, source: KubernetesSource, how: str
) -> None:
    api.put(SERVICES, service("web", VIP))
    api.put(SERVICES, service("db", "10.96.0.11"))
    with following(source, source.load()) as heard:
        assert until(lambda: api.watched() == 2)
        if how == "event":
            api.put(SERVICES, service("new", "10.96.0.12"))
            assert heard.comes_to(NAME, "shop.db.http", "shop.new.http")
            api.event(SERVICES, "ERROR", {"code": 410, "message": "too old resource version"})
        else:
            api.away()
            api.delete(SERVICES, "shop", "db")
            api.put(SLICES, endpoints("web", A))
            api.expire()
            api.back()
        assert until(lambda: heard.replaced == 1)
        assert heard.comes_to(*([NAME] if how == "status" else [NAME, "shop.db.http", "shop.new.http"]))
        assert not any(isinstance(error, SourceError) for error in heard.troubles)


def test_while_the_server_is_away_nothing_changes_and_then_what_was_missed_comes(
    api: ApiServer, source: KubernetesSource
) -> None:
    api.put(SERVICES, service("web", VIP))
    api.put(SLICES, endpoints("web", A))
    with following(source, source.load()) as heard:
        assert until(lambda: api.watched() == 2)
        api.away()
        assert until(lambda: any(isinstance(error, SourceAwayError) for error in heard.troubles))
        assert api.url in heard.words
        api.put(SLICES, endpoints("web", B))
        assert heard.backends(NAME) == [A]
        api.back()
        assert heard.backends_come_to(NAME, B)


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("watch", [False, True])
def test_what_is_nested_without_end_is_not_followed_into_the_depth(
    api: ApiServer, source: KubernetesSource, watch: bool
) -> None:
    api.put(SERVICES, service("web", VIP))
    left = [b'{"type": "MODIFIED", "object": %b}\n' % DEEP if watch else b'{"metadata": {}, "items": [%b]}' % DEEP]

    def answer(path: str, query: dict[str, str]) -> tuple[int, bytes] | None:
        return (200, left.pop()) if left and ("watch" in query) == watch else None

    config = source.load()
    api.override = answer
    if not watch:
        api.expire()
    with following(source, config) as heard:
        assert until(lambda: "recursion depth" in heard.words)
        api.put(SLICES, endpoints("web", C))
        assert heard.backends_come_to(NAME, C)


def test_an_object_that_is_nested_without_end_is_named() -> None:
    mirror = Mirror()
    assert mirror.service(b'{"metadata": {"name": "web", "labels": %b}}' % DEEP) is None
    assert "recursion depth" in mirror.take_problems()[0]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_away_at_the_start_is_waited_for_and_then_followed(
    api: ApiServer, source: KubernetesSource
) -> None:
    api.put(SERVICES, service("web", VIP))
    api.away()
    with pytest.raises(SourceAwayError, match=r"Kubernetes API at http://127.0.0.1:\d+ cannot be used: .*onnect"):
        source.load()
    with following(source) as heard:
        assert until(lambda: heard.troubles)
        api.back()
        assert heard.comes_to(NAME)
        assert heard.replaced == 1


@pytest.mark.usefixtures("impatient")
def test_a_refusal_is_told_in_the_servers_words(api: ApiServer, source: KubernetesSource) -> None:
    api.override = lambda path, query: (403, b'{"message": "services is forbidden"}')
    with pytest.raises(SourceAwayError, match="403: services is forbidden"):
        source.load()


@pytest.mark.usefixtures("impatient")
def test_credentials_that_cannot_be_had_are_told_as_a_server_that_is_away(api: ApiServer, tmp_path: Path) -> None:
    file = api.kubeconfig(tmp_path / "config")
    config = json.loads(file.read_text())
    for command in ("/bin/true", "/bin/false", "/none"):
        config["users"][0]["user"] = {
            "exec": {"apiVersion": "client.authentication.k8s.io/v1beta1", "command": command}
        }
        file.write_text(json.dumps(config))
        with pytest.raises(SourceAwayError, match="cannot be used"):
            KubernetesSource(file).load()


def test_a_servers_words_are_one_line_that_changes_no_terminal(api: ApiServer, source: KubernetesSource) -> None:
    api.put(SERVICES, {"metadata": {"name": "a\n\x1b[31m", "namespace": "shop"}, "spec": 1})
    api.put(SERVICES, service("web", VIP))
    with following(source, source.load()) as heard:
        assert until(lambda: "Service shop/a??[31m: " in heard.words)
        api.override = lambda path, query: (500, b'{"message": "x\\ny"}')
        api.end_watches()
        assert until(lambda: "500: x?y" in heard.words)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"spec": {"clusterIP": 7}}, "Expected `str | null`, got `int`"),
        ({"spec": []}, "Expected `object`, got `array`"),
        ({"spec": {"clusterIP": "127.0.0.1", "ports": [{"port": 80}]}}, "every host's own"),
        ({"spec": {"clusterIP": VIP, "ports": [{"port": 70000}]}}, "70000 is no port"),
        ({"spec": {"clusterIP": VIP, "ports": [{"port": 80}] * 5000}}, "more than 1000 ports"),
        ({"spec": {"clusterIP": "10.96.0.999", "ports": [{"port": 80}]}}, "no IPv4 or IPv6 address"),
    ],
)
def test_a_service_that_is_wrong_is_named_and_spoils_no_other(
    api: ApiServer, source: KubernetesSource, wrong: Object, why: str
) -> None:
    api.put(SERVICES, {"metadata": {"name": "bad", "namespace": "shop"}, **wrong})
    api.put(SERVICES, service("web", VIP))
    api.put(SLICES, endpoints("web", A))
    config = source.load()
    assert [one.name for one in config.services] == [NAME]
    with following(source, config) as heard:
        assert until(lambda: heard.troubles)
        assert "Service shop/bad" in heard.words
        assert why in heard.words


def test_an_object_that_becomes_wrong_stays_as_it_was(api: ApiServer, source: KubernetesSource) -> None:
    api.put(SERVICES, service("web", VIP))
    api.put(SLICES, endpoints("web", A))
    with following(source, source.load()) as heard:
        bad: Object = endpoints("web", *[endpoint(B)] * 1001)
        api.put(SLICES, bad)
        assert until(lambda: "EndpointSlice shop/web-1: has 1001 endpoints" in heard.words)
        assert heard.backends(NAME) == [A]
        api.put(SLICES, {**endpoints("web", B), "endpoints": "many"})
        api.put(SLICES, endpoints("web", C))
        assert heard.backends_come_to(NAME, C)


def test_bytes_that_are_no_events_are_not_believed(api: ApiServer, source: KubernetesSource) -> None:
    api.put(SERVICES, service("web", VIP))
    with following(source, source.load()) as heard:
        api.event(SLICES, "MODIFIED", {"metadata": 3})
        assert until(lambda: "an event cannot be read" in heard.words)
        api.put(SLICES, endpoints("web", C))
        assert heard.backends_come_to(NAME, C)


@pytest.mark.usefixtures("impatient")
def test_answers_without_an_end_are_refused_and_memory_is_bounded(
    api: ApiServer, source: KubernetesSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"metadata": {"resourceVersion": "1", "continue": "1"}, "items": ["' + b"x" * (100 << 20) + b'"]}'
    api.override = lambda path, query: (200, body)
    monkeypatch.setattr(module, "_PAGE_BYTES", 8 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SourceAwayError, match="more than 8 MiB"):
        source.load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
    page = b'{"metadata": {"resourceVersion": "1", "continue": "1"}, "items": [' + b"1," * 999 + b"1]}"
    api.override = lambda path, query: (200, page)
    with pytest.raises(SourceAwayError, match="more than 100000 objects"):
        source.load()


def test_a_line_without_an_end_is_refused(api: ApiServer, source: KubernetesSource) -> None:
    api.put(SERVICES, service("web", VIP))
    config = source.load()
    api.override = lambda path, query: (200, b"x" * (9 << 20)) if "watch" in query else None
    with following(source, config) as heard:
        assert until(lambda: "an event has more than 8 MiB" in heard.words)
        api.override = lambda path, query: None
        api.put(SLICES, endpoints("web", A))
        assert heard.backends_come_to(NAME, A)
        assert heard.comes_to(NAME)


def test_a_server_that_ends_each_watch_at_once_is_asked_ever_more_rarely(
    api: ApiServer, source: KubernetesSource
) -> None:
    api.put(SERVICES, service("web", VIP))
    config = source.load()
    api.override = lambda path, query: (200, b"") if "watch" in query else None
    with following(source, config):
        until(lambda: False, 1.5)
        assert api.watched() <= 12


def test_endless_events_are_followed_in_bounded_memory() -> None:
    mirror = Mirror()
    for number in range(20_000):
        mirror.service(encoded(service("web", f"10.96.{number % 100}.1")))
        mirror.service(b'{"metadata": {"name": "bad-%d"}, "spec": 1}' % number)
    assert len(mirror.take_changes()) == 1
    assert len(mirror.take_problems()) == module._PROBLEMS


def test_a_service_with_more_endpoints_than_a_release_holds_has_as_many_as_fit_and_others_are_served() -> None:
    many = [
        endpoints("huge", *(f"10.{part}.{number // 250}.{number % 250}" for number in range(1000)), name=f"huge-{part}")
        for part in range(10)
    ]
    services = [service("huge", "10.96.0.11"), service("twin", VIP), service("web", VIP)]
    found = meaning(services, [*many, endpoints("twin", A), endpoints("web", B)])
    registry = Registry(["kubernetes"], RELEASES[3])
    registry.replace("kubernetes", Config(tuple(found.values())))
    told = {one.name: len(one.backends) for one in registry.take_news().services.values() if one}
    assert told == {"shop.huge.http": 16, "shop.twin.http": 1}
    assert registry.problems() == [
        "kubernetes: service shop.huge.http has 16 of 10000 backends: release 3.0.0 holds no more for one service",
        f"kubernetes: service {NAME} is left out: {VIP} port 80 (tcp) is shop.twin.http's already",
    ]


def test_a_kubeconfig_that_cannot_be_used_is_one_error(tmp_path: Path) -> None:
    wrong = {
        b"": "it is no kubeconfig", b"hello": "it is no kubeconfig", b"clusters: 1": "it is no kubeconfig",
        b"[": "it is not YAML", b"\xff\xfe": "it is not YAML",
        b"clusters: []\ncontexts: []\ncurrent-context: x": "x",
    }  # fmt: skip
    for text, why in wrong.items():
        (tmp_path / "config").write_bytes(text)
        with pytest.raises(SourceError, match=f"no Kubernetes cluster can be read from .*config: .*{why}.* kubectl"):
            KubernetesSource(tmp_path / "config")
    with pytest.raises(SourceError, match=r"pod: /var/\S+: No such file.* name a file with --kubeconfig"):
        KubernetesSource()


_NAMES = st.sampled_from(["web", "db"])
_ADDRESSES = st.lists(st.sampled_from([A, B, C]), max_size=3)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("service"), _NAMES, st.sampled_from([VIP, "10.96.0.11"])),
        st.tuples(st.just("slice"), _NAMES, _NAMES, st.integers(1, 2), _ADDRESSES),
        st.tuples(st.just("no service"), _NAMES),
        st.tuples(st.just("no slice"), _NAMES, st.integers(1, 2)),
        st.tuples(st.just("list again")),
        st.tuples(st.just("look")),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(_STEPS)
def test_any_events_and_new_lists_come_to_what_a_fresh_list_says(steps: list[Any]) -> None:
    services: dict[str, Object] = {}
    slices: dict[str, Object] = {}
    mirror = Mirror()
    known: dict[str, Service] = {}
    for what, *facts in [*steps, ("look",)]:
        if what == "service":
            services[facts[0]] = service(facts[0], facts[1])
            mirror.service(encoded(services[facts[0]]))
        elif what == "slice":
            name = f"{facts[0]}-{facts[2]}"
            slices[name] = endpoints(facts[1], *facts[3], name=name)  # a slice may move to another service
            mirror.slice(encoded(slices[name]))
        elif what == "no service" and facts[0] in services:
            mirror.service(encoded(services.pop(facts[0])), gone=True)
        elif what == "no slice" and f"{facts[0]}-{facts[1]}" in slices:
            mirror.slice(encoded(slices.pop(f"{facts[0]}-{facts[1]}")), gone=True)
        elif what == "list again":
            mirror.replace(map(encoded, services.values()), map(encoded, slices.values()))
        elif what == "look":
            for name, changed in mirror.take_changes().items():
                if changed is None:
                    del known[name]
                else:
                    known[name] = changed
    assert known == meaning(list(services.values()), list(slices.values()))
