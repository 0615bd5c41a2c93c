"""What an xDS server's clusters, endpoints and listeners mean for the mesh, and how it is heard, refused and lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3 import health_check_pb2
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.extensions.clusters.aggregate.v3.cluster_pb2 import ClusterConfig
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryResponse
from hypothesis import given, settings
from hypothesis import strategies as st

import meshd.sources.xds as module
from meshd.desired import entries
from meshd.model import Backend, Locality, Service
from meshd.releases import RELEASES
from meshd.sources import SourceAwayError, SourceError, checks
from meshd.sources.xds import CLUSTERS, ENDPOINTS, LISTENERS, Picture, XdsSource
from tests.meshd.adsserver import AdsServer, add_locality, assignment, cluster, listener
from tests.meshd.apiserver import SERVICES, SLICES, ApiServer, endpoint, endpoints
from tests.meshd.apiserver import service as kubernetes_service
from tests.meshd.hearing import following, until

VIP, VIP6 = "10.96.0.10", "fd00:96::10"
A, B, C = "10.244.0.1", "10.244.0.2", "10.244.0.3"
WEB = "outbound|80||web.shop.svc.cluster.local"
NAME = "shop.web.80"


@pytest.fixture
def ads() -> Iterator[AdsServer]:
    server = AdsServer()
    yield server
    server.away()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 1.0)


@pytest.fixture
def source(ads: AdsServer) -> XdsSource:
    return XdsSource(ads.target, "node-1")


def told(picture: Picture, kind: str, *resources: Any) -> list[str]:
    """Let a picture hear these; returns what it refused."""
    response = DiscoveryResponse(type_url=kind, version_info="1", nonce="1")
    for one in resources:
        response.resources.add().Pack(one)
    requests, _ = picture.hear(response)
    return [one.error_detail.message for one in requests if one.HasField("error_detail")]


def meaning(clusters: list[Any], assignments: list[Any], listeners: list[Any]) -> dict[str, Service]:
    """What a server with these resources means."""
    picture = Picture()
    assert told(picture, CLUSTERS, *clusters) == []
    assert told(picture, ENDPOINTS, *assignments) == []
    assert told(picture, LISTENERS, *listeners) == []
    assert picture.take_problems() == []
    return {one.name: one for one in picture.config().services}


def weights(service: Service) -> dict[str, int]:
    return {str(one.address): one.weight for one in service.backends if one.healthy}


def test_a_service_is_a_listeners_address_with_the_endpoints_of_its_cluster() -> None:
    found = meaning([cluster(WEB)], [assignment(WEB, B, A)], [listener("l", VIP, 80, WEB)])
    backends = tuple(Backend(checks.address(one), 8080) for one in (A, B))
    assert found == {NAME: Service(NAME, checks.address(VIP), 80, "tcp", backends)}


def test_a_static_cluster_has_its_endpoints_with_it() -> None:
    found = meaning([cluster("db", A)], [], [listener("l", VIP, 5432, "db")])
    assert weights(found["db"]) == {A: 1}


def test_a_udp_listener_is_a_udp_service() -> None:
    found = meaning([cluster("dns", A)], [], [listener("l", VIP, 53, "dns", udp=True)])
    assert found["dns"].protocol == "udp"


def test_listeners_of_one_cluster_and_more_addresses_of_a_listener_have_names_of_their_own() -> None:
    both = listener("a", VIP, 80, WEB)
    both.additional_addresses.add().address.CopyFrom(listener("x", "10.96.0.9", 80).address)
    found = meaning([cluster(WEB, A)], [], [both, listener("b", VIP, 81, WEB)])
    assert set(found) == {NAME, f"{NAME}.{VIP}-80-tcp", f"{NAME}.{VIP}-81-tcp"}
    assert str(found[NAME].address) == "10.96.0.9", "the lowest address has the plain name"


def test_where_the_sidecar_itself_listens_is_no_service() -> None:
    assert meaning([cluster("x", A)], [], [listener("virtualOutbound", "0.0.0.0", 15001, "x")]) == {}


def test_names_have_only_signs_that_names_may_have() -> None:
    names = ["outbound|443|v1|api.example.com", "a/b c", "outbound|80|v2|web.shop.svc.cluster.local"]
    clusters = [cluster(name, A) for name in names]
    listeners = [listener(name, f"10.96.1.{number + 1}", 80, name) for number, name in enumerate(names)]
    assert set(meaning(clusters, [], listeners)) == {"api.example.com.443.v1", "a-b-c", "shop.web.80.v2"}


def test_health_decides_who_gets_connections() -> None:
    some = assignment(WEB, A)
    for status in (health_check_pb2.DRAINING, health_check_pb2.DEGRADED):
        add_locality(some, B, status=status)
        found = meaning([cluster(WEB)], [some], [listener("l", VIP, 80, WEB)])[NAME]
        assert [one.healthy for one in found.backends] == [True, False]


def test_a_share_is_the_weight_of_the_locality_by_that_of_the_endpoint_in_it() -> None:
    some = assignment(WEB)
    add_locality(some, A, weight=3, zone="z1")
    add_locality(some, B, C, weight=1, zone="z2")
    some.endpoints[2].lb_endpoints[0].load_balancing_weight.value = 3
    found = meaning([cluster(WEB)], [some], [listener("l", VIP, 80, WEB)])[NAME]
    assert weights(found) == {A: 12, B: 3, C: 1}
    assert found.backends[1].locality == Locality("", "z2", "")


def test_clusters_of_a_listener_have_shares_as_it_says() -> None:
    found = meaning([cluster("a", A), cluster("b", B, C)], [], [listener("l", VIP, 80, ("a", 90), ("b", 10))])
    assert weights(found["l"]) == {A: 18, B: 1, C: 1}


def test_a_priority_serves_only_while_nobody_before_it_is_healthy() -> None:
    some = assignment(WEB)
    add_locality(some, A)
    add_locality(some, B, priority=1)
    listeners = [listener("l", VIP, 80, WEB)]
    assert weights(meaning([cluster(WEB)], [some], listeners)[NAME]) == {A: 1}
    some.endpoints[1].lb_endpoints[0].health_status = health_check_pb2.UNHEALTHY
    assert weights(meaning([cluster(WEB)], [some], listeners)[NAME]) == {B: 1}


def aggregate(name: str, *parts: str) -> Cluster:
    found = Cluster(name=name, lb_policy=Cluster.CLUSTER_PROVIDED)
    found.connect_timeout.FromSeconds(1)
    found.cluster_type.name = "envoy.clusters.aggregate"
    found.cluster_type.typed_config.Pack(ClusterConfig(clusters=parts))
    return found


def test_a_cluster_made_of_others_takes_the_first_that_is_healthy() -> None:
    empty = cluster("empty", load_assignment=assignment("empty"), type=Cluster.STATIC)
    some = [aggregate("all", "empty", "a"), empty, cluster("a", A)]
    assert weights(meaning(some, [], [listener("l", VIP, 80, "all")])["all"]) == {A: 1}


def test_affinity_and_nearness_are_what_the_cluster_balances_by() -> None:
    some = cluster("a", A, lb_policy=Cluster.RING_HASH)
    some.load_assignment.endpoints[0].locality.sub_zone = "n1"
    by_client = listener("l", VIP, 80, "a")
    proxy = TcpProxy(stat_prefix="l", cluster="a")
    proxy.hash_policy.add().source_ip.SetInParent()
    by_client.filter_chains[0].filters[0].typed_config.Pack(proxy)
    found = meaning([some], [], [by_client])["a"]
    assert (found.affinity, found.local, found.backends[0].locality.node) == (10800, False, "n1")
    some.common_lb_config.zone_aware_lb_config.SetInParent()
    found = meaning([some], [], [by_client])["a"]
    assert (found.local, found.backends[0].locality.node) == (True, "")


def test_what_the_server_says_is_taken_and_acknowledged(ads: AdsServer, source: XdsSource) -> None:
    ads.set(cluster(WEB), assignment(WEB, A), assignment("other", B), listener("l", VIP, 80, WEB))
    config = source.load()
    assert [one.name for one in config.services] == [NAME]
    with following(source, config) as heard:
        assert until(lambda: all(ads.acked(kind) for kind in (CLUSTERS, ENDPOINTS, LISTENERS)))
        assert ads.requests[0].node.id == "node-1"
        assert {tuple(one.resource_names) for one in ads.requests if one.type_url == ENDPOINTS} == {(WEB,)}
        assert (ads.nacks(), heard.troubles) == ([], [])


def test_a_change_of_endpoints_is_told_for_their_service_alone(ads: AdsServer, source: XdsSource) -> None:
    ads.set(cluster(WEB), cluster("db"), assignment(WEB, A), assignment("db", A))
    ads.set(listener("l", VIP, 80, WEB), listener("m", VIP, 81, "db"))
    with following(source, source.load()) as heard:
        assert until(lambda: heard.replaced and ads.acked(ENDPOINTS))
        replaced = heard.replaced
        ads.set(assignment(WEB, A, B))
        assert heard.backends_come_to(NAME, A, B)
        assert (heard.updates, heard.replaced) == ([{NAME}], replaced)


def test_services_come_and_go_with_their_listeners(ads: AdsServer, source: XdsSource) -> None:
    ads.set(cluster(WEB), assignment(WEB, A), listener("l", VIP, 80, WEB))
    with following(source, source.load()) as heard:
        ads.set(cluster("db"), assignment("db", B))
        ads.set(listener("m", VIP, 81, "db"))
        assert heard.backends_come_to("db", B)
        ads.remove(LISTENERS, "l")
        assert heard.comes_to("db")
        ads.remove(CLUSTERS, WEB)
        assert until(lambda: ads.acked(CLUSTERS))
        assert heard.backends("db") == [B]


def test_a_bad_resource_is_refused_by_name_and_the_others_are_taken(ads: AdsServer, source: XdsSource) -> None:
    ads.set(cluster(WEB, A), cluster("bad", A), listener("l", VIP, 80, WEB), listener("m", VIP, 81, "bad"))
    with following(source, source.load()) as heard:
        assert until(lambda: heard.replaced)
        bad = cluster("bad", "10.0.0.999")
        ads.set(bad, cluster(WEB, B))
        assert heard.backends_come_to(NAME, B)
        assert until(lambda: ads.nacks())
        assert ads.nacks()[-1] == "cluster bad: '10.0.0.999' is no IPv4 or IPv6 address"
        asked = [one.version_info for one in ads.requests if one.type_url == CLUSTERS and one.version_info]
        nack = next(one for one in ads.requests if one.HasField("error_detail"))
        assert nack.version_info == asked[0], "the last version that was good"
        assert heard.backends("bad") == [A], "as it was"
        ads.set(cluster("bad", C))
        assert heard.backends_come_to("bad", C)
        assert "xds: cluster bad: '10.0.0.999'" in heard.words


@pytest.mark.parametrize(
    ("resource", "why"),
    [
        (listener("bad", "224.0.0.1", 81, WEB), "listener bad: 224.0.0.1 is no address of one host"),
        (listener("bad", "127.0.0.2", 81, WEB), "listener bad: 127.0.0.2 is every host's own"),
        (listener("bad", VIP, 70000, WEB), "listener bad: 70000 is no port"),
        (cluster("bad", *[A] * 100_001), "cluster bad: has 100001 endpoints"),
        (aggregate("bad"), "cluster bad: is made of no clusters"),
    ],
    ids=["multicast", "loopback", "port", "huge", "empty"],
)
def test_what_can_never_be_used_is_refused(ads: AdsServer, source: XdsSource, resource: Any, why: str) -> None:
    ads.set(cluster(WEB, A), listener("l", VIP, 80, WEB), resource)
    config = source.load()
    assert [one.name for one in config.services] == [NAME]
    with following(source, config):
        assert until(lambda: any(why in one for one in ads.nacks()))


def test_bytes_that_are_no_resource_are_refused(ads: AdsServer, source: XdsSource) -> None:
    ads.set(cluster(WEB, A), listener("l", VIP, 80, WEB))
    ads.set_bytes(CLUSTERS, "bad", b"\xff\xff")
    ads.set_bytes(LISTENERS, "bad", cluster("x").SerializeToString(), type_url=CLUSTERS)
    config = source.load()
    assert [one.name for one in config.services] == [NAME]
    with following(source, config):
        wrong = "number 1 of the response is no such resource or has no name"
        assert until(lambda: {f"cluster: {wrong}", f"listener: {wrong}"} <= set(ads.nacks()))


TO_X = listener("m", VIP, 81, "x")
MANY = [aggregate(f"y{n}", *[f"y{n + 1}"] * 9) for n in range(9)]


@pytest.mark.parametrize(
    ("clusters", "to", "why"),
    [
        ([aggregate("x", "y"), aggregate("y", "x")], TO_X, "cluster x is made of itself, by way of x, y"),
        ([aggregate("x", "y0"), *MANY, cluster("y9", A)], TO_X, "it reaches more than 100 clusters"),
        ([], TO_X, "there is no cluster x"),
        ([cluster("x", type=Cluster.STRICT_DNS)], TO_X, "STRICT_DNS are not supported"),
        ([], listener("m", VIP, 80, WEB), f"{VIP} port 80 (tcp) is listener l's already"),
        ([cluster("x", "fd00::1")], TO_X, "cannot serve 10.96.0.10: both must be"),
        ([], Listener(name="m", address=TO_X.address), "no TCP or UDP proxy"),
    ],
    ids=["cycle", "explosion", "missing", "dns", "duplicate", "families", "http"],
)
def test_what_cannot_be_served_is_named_and_spoils_no_other(
    ads: AdsServer, source: XdsSource, clusters: list[Any], to: Any, why: str
) -> None:
    ads.set(cluster(WEB, A), listener("l", VIP, 80, WEB), *clusters, to)
    config = source.load()
    assert [one.name for one in config.services] == [NAME]
    with following(source, config) as heard:
        assert until(lambda: why in heard.words), heard.words
        assert ads.nacks() == []


def test_a_message_that_is_too_large_changes_nothing(ads: AdsServer, source: XdsSource) -> None:
    ads.set(cluster(WEB), assignment(WEB, A), listener("l", VIP, 80, WEB))
    with following(source, source.load()) as heard:
        assert until(lambda: heard.replaced)
        ads.set_bytes(CLUSTERS, "huge", b"x" * (100 << 20))
        assert until(lambda: "RESOURCE_EXHAUSTED" in heard.words)
        assert heard.backends(NAME) == [A]
        ads.remove(CLUSTERS, "huge")
        ads.set(assignment(WEB, B))
        assert heard.backends_come_to(NAME, B)


def test_while_the_server_is_away_nothing_changes_and_then_what_was_missed_comes(
    ads: AdsServer, source: XdsSource
) -> None:
    ads.set(cluster(WEB), assignment(WEB, A), listener("l", VIP, 80, WEB))
    ads.set(cluster("db", A), listener("m", VIP, 81, "db"))
    with following(source, source.load()) as heard:
        assert until(lambda: heard.replaced)
        ads.away()
        assert until(lambda: any(isinstance(error, SourceAwayError) for error in heard.troubles))
        assert ads.target in heard.words
        assert set(heard.services) == {NAME, "db"}
        ads.set(assignment(WEB, B))
        ads.remove(LISTENERS, "m")
        ads.back()
        assert heard.backends_come_to(NAME, B)
        assert heard.comes_to(NAME)


@pytest.mark.usefixtures("impatient")
def test_endpoints_that_do_not_come_are_waited_for_and_then_the_rest_is_served(
    ads: AdsServer, source: XdsSource
) -> None:
    ads.set(cluster(WEB), assignment(WEB, B), listener("l", VIP, 80, WEB))
    ads.set(cluster("db", A), listener("m", VIP, 81, "db"))
    ads.silent = {ENDPOINTS}
    config = source.load()
    assert [one.name for one in config.services] == ["db"]
    with following(source, config) as heard:
        assert until(lambda: f"the endpoints of cluster {WEB} are not known yet" in heard.words)
        ads.silent = set()
        ads.set(assignment(WEB, B))
        assert heard.backends_come_to(NAME, B)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_is_away_at_the_start_is_waited_for_and_then_followed(ads: AdsServer, source: XdsSource) -> None:
    ads.set(cluster(WEB, A), listener("l", VIP, 80, WEB))
    ads.away()
    with pytest.raises(SourceAwayError, match=r"xDS server at 127.0.0.1:\d+ cannot be used: UNAVAILABLE"):
        source.load()
    with following(source) as heard:
        assert until(lambda: heard.troubles)
        ads.back()
        assert heard.comes_to(NAME)


def test_a_server_that_ends_each_stream_is_asked_ever_more_rarely(ads: AdsServer, source: XdsSource) -> None:
    ads.refusing = True
    began = time.monotonic()
    with following(source) as heard:
        assert until(lambda: ads.streams == 4)
        assert time.monotonic() - began > 0.7, "half of 0.2, 0.4 and 0.8 s at least"
        assert len(heard.troubles) == 1


def test_an_authority_that_cannot_be_read_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no certificate")
    (tmp_path / "bytes").write_bytes(b"\xff")
    why = {"none": "No such file", "empty": "no certificate", "text": "no certificate", "bytes": "no certificate"}
    for name, word in why.items():
        with pytest.raises(SourceError, match=f"cannot be read from {tmp_path / name}: .*{word}.*--xds-ca"):
            XdsSource("127.0.0.1:1", "x", tmp_path / name)


_HOSTS = st.lists(st.sampled_from([A, B, C]), max_size=3)
_NAMES = st.sampled_from(["x", "y"])
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("cluster"), _NAMES, _HOSTS),
        st.tuples(st.just("endpoints"), _NAMES, _HOSTS),
        st.tuples(st.just("listener"), st.sampled_from(["l", "m"]), st.integers(80, 81), _NAMES),
        st.tuples(st.just("no listener"), st.sampled_from(["l", "m"])),
        st.tuples(st.just("new connection")),
    ),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(_STEPS)
def test_any_responses_and_new_connections_come_to_what_a_fresh_one_says(steps: list[Any]) -> None:
    clusters = {name: cluster(name) for name in ("x", "y")}
    assignments = {name: assignment(name, A) for name in ("x", "y")}
    listeners: dict[str, Any] = {}
    picture = Picture()

    def tell(kinds: tuple[str, ...] = (CLUSTERS, ENDPOINTS, LISTENERS)) -> None:
        said = {CLUSTERS: clusters, ENDPOINTS: assignments, LISTENERS: listeners}
        for kind in kinds:
            told(picture, kind, *said[kind].values())

    tell()
    for what, *facts in steps:
        if what == "cluster":
            clusters[facts[0]] = cluster(facts[0], *facts[1])
            tell()
        elif what == "endpoints":
            assignments[facts[0]] = assignment(facts[0], *facts[1])
            tell((ENDPOINTS,))
        elif what == "listener":
            listeners[facts[0]] = listener(facts[0], VIP, facts[1], facts[2])
            tell((LISTENERS,))
        elif what == "no listener":
            listeners.pop(facts[0], None)
            tell((LISTENERS,))
        else:
            picture.begin()
            tell()
    fresh = Picture()
    for kind, said in ((CLUSTERS, clusters), (ENDPOINTS, assignments), (LISTENERS, listeners)):
        told(fresh, kind, *said.values())
    assert set(picture.config().services) == set(fresh.config().services)


def test_kubernetes_and_xds_say_the_same_for_the_same_services(ads: AdsServer, tmp_path: Path) -> None:
    from meshd.sources.kubernetes import KubernetesSource

    api = ApiServer()
    try:
        for number in range(20):
            vip, port = f"10.96.3.{number + 1}", 80 + number
            name = f"outbound|{port}||s{number}.shop.svc.cluster.local"
            api.put(SERVICES, kubernetes_service(f"s{number}", vip, ports=[{"port": port}]))
            leaving = endpoint(C, "n1", "z1", ready=False, serving=True, terminating=True)
            at = [endpoint(one, "n1", "z1") for one in (A, B)][: number % 3]
            api.put(SLICES, endpoints(f"s{number}", *at, leaving, ports=[{"port": 8080}]))
            some = assignment(name, *[A, B][: number % 3], zone="z1", sub_zone="n1")
            add_locality(some, C, status=health_check_pb2.DRAINING, zone="z1", sub_zone="n1")
            ads.set(cluster(name), some, listener(f"l{number}", vip, port, name))
        one = KubernetesSource(api.kubeconfig(tmp_path / "config")).load()
        other = XdsSource(ads.target, "x").load()
    finally:
        api.away()
    assert len(one.services) == 20
    assert set(one.services) == set(other.services)
    for release in RELEASES.values():
        assert entries(one.services, (), release) == entries(other.services, (), release)
