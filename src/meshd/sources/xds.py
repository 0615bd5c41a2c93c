"""The source that is an xDS server: clusters, endpoints and listeners over one ADS stream, as a sidecar hears them.

A cluster has no address that clients could connect to: a service is a listener at an address of its own whose
connections go to one cluster. The messages are those of the package xds-protos, which the gRPC project releases.
"""

from __future__ import annotations

import math
import queue
import re
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import msgspec
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3 import address_pb2, health_check_pb2
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.extensions.clusters.aggregate.v3.cluster_pb2 import ClusterConfig
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from envoy.extensions.filters.udp.udp_proxy.v3.udp_proxy_pb2 import UdpProxyConfig
from envoy.service.discovery.v3.ads_pb2_grpc import AggregatedDiscoveryServiceStub
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from google.protobuf.message import DecodeError

from meshd.model import Address, Backend, Config, Locality, Protocol, Service
from meshd.sources import Sink, SourceAwayError, SourceError, checks

__all__ = ["CLUSTERS", "ENDPOINTS", "LISTENERS", "Picture", "XdsSource"]

_TYPE = "type.googleapis.com/envoy.config."
CLUSTERS = _TYPE + "cluster.v3.Cluster"
ENDPOINTS = _TYPE + "endpoint.v3.ClusterLoadAssignment"
LISTENERS = _TYPE + "listener.v3.Listener"
_MESSAGES = {CLUSTERS: Cluster, ENDPOINTS: ClusterLoadAssignment, LISTENERS: Listener}
_WORDS = {CLUSTERS: "cluster", ENDPOINTS: "endpoints", LISTENERS: "listener"}

_PATIENCE = 5.0  # s that a start waits for a server, and a first picture for endpoints that do not come
_HELD = 1.0  # s after which a stream counts as one that works
_STOP = 0.1  # s between looks whether to stop
_MESSAGE_BYTES = 64 << 20
_RESOURCES = 100_000  # of a kind
_HOSTS = 100_000  # of a cluster
_ALL_HOSTS = 1_000_000
_NESTED = 100  # clusters that one listener may reach
_PROBLEMS = 1000  # that are remembered
_TOLD = 20  # problems that are told one by one at a time
_WEIGHT_MAX = 65535
_AFFINITY = 10800  # s; xDS says that a client stays, and not for how long
_INVALID_ARGUMENT = 3  # of gRPC's codes, for a NACK
_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 300_000),  # servers hang up on who asks more often
    ("grpc.use_local_subchannel_pool", 1),  # each try dials anew
    ("grpc.enable_retries", 0),
]

_USABLE = (health_check_pb2.UNKNOWN, health_check_pb2.HEALTHY)
_HASHING = (Cluster.RING_HASH, Cluster.MAGLEV)
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]")

Group = tuple[int | None, tuple[Backend, ...]]  # hosts of one locality with its weight, if it has one
Levels = tuple[tuple[Group, ...], ...]  # by priority, the first first
Place = tuple[Address, int, Protocol]


class _Cluster(msgspec.Struct, frozen=True):
    """``eds``: whose endpoints it has; ``levels``: its own; ``parts``: the clusters it is made of; ``why``: none."""

    eds: str = ""
    levels: Levels = ()
    parts: tuple[str, ...] = ()
    why: str = ""
    near: bool = False
    hashing: bool = False


class _Listener(msgspec.Struct, frozen=True):
    places: tuple[Place, ...]
    clusters: tuple[tuple[str, int], ...] = ()  # with weights
    by_client: bool = False
    why: str = ""  # it is none of the mesh's


class _Known(msgspec.Struct):
    """What is known of one kind; and of this connection, whether it was ``answered`` and what a request repeats."""

    resources: dict[str, Any] = {}
    answered: bool = False
    version: str = ""
    nonce: str = ""


class _UnknownError(Exception):
    """What a listener means cannot be said yet."""


class Picture:
    """All that the server said, and what it means for the mesh; no effects.

    A resource that cannot be used leaves the earlier one of its name in force, and is refused by name.
    """

    def __init__(self) -> None:
        self._known = {kind: _Known() for kind in _MESSAGES}
        self._wanted: set[str] = set()  # whose endpoints to ask for
        self._names_wanted: list[str] = []  # the same in order
        self._hosts = 0
        self._names: dict[tuple[str, Place], str] = {}  # of the services, by listener and place
        self._users: dict[str, set[tuple[str, Place]]] = defaultdict(set)  # of endpoints
        self._said: dict[tuple[str, Place], Service] = {}
        self._problems: dict[tuple[str, str], str] = {}
        self._told: set[str] = set()

    def begin(self) -> list[DiscoveryRequest]:
        """What to ask on a new connection."""
        for known in self._known.values():
            known.answered, known.version, known.nonce = False, "", ""
        asked = [CLUSTERS, LISTENERS] + ([ENDPOINTS] if self._wanted else [])
        return [self._request(kind) for kind in asked]

    def hear(self, response: DiscoveryResponse) -> tuple[list[DiscoveryRequest], dict[str, Service | None]]:
        """Take a response; returns what to send, and the services that changed, by name, None for gone."""
        kind = response.type_url
        if kind not in _MESSAGES:
            return [], {}  # never asked for
        known = self._known[kind]
        wanted = self._wanted
        refused = self._take(kind, response.resources)
        known.answered, known.nonce = True, response.nonce
        if not refused:
            known.version = response.version_info
        requests = [self._request(kind, refused)]
        if kind == CLUSTERS and self._wanted != wanted and self._wanted:
            requests.append(self._request(ENDPOINTS))
        if kind == ENDPOINTS:
            touched = {use for any_ in response.resources for use in self._users.get(_name(kind, any_.value), ())}
            return requests, self._mean(touched)
        return requests, self._mean_all()

    @property
    def listed(self) -> bool:
        """Whether the server said on this connection which clusters and listeners there are."""
        return self._known[CLUSTERS].answered and self._known[LISTENERS].answered

    @property
    def whole(self) -> bool:
        """Whether the endpoints of all clusters are known, too."""
        return self.listed and self._wanted <= self._known[ENDPOINTS].resources.keys()

    def config(self) -> Config:
        """All services."""
        return Config(tuple(self._said.values()))

    def take_problems(self, settled: bool = True) -> list[str]:
        """What is wrong and was not told yet, a sentence each; not what may become right, unless it is ``settled``."""
        now = {problem for (what, _), problem in self._problems.items() if settled or what != "use"}
        new = sorted(now - self._told)
        self._told = now
        return new

    def _request(self, kind: str, refused: Sequence[str] = ()) -> DiscoveryRequest:
        known = self._known[kind]
        request = DiscoveryRequest(type_url=kind, version_info=known.version, response_nonce=known.nonce)
        if kind == ENDPOINTS:
            request.resource_names.extend(self._names_wanted)
        if refused:
            more = f"; and {len(refused) - _TOLD} more" if len(refused) > _TOLD else ""
            request.error_detail.code = _INVALID_ARGUMENT
            request.error_detail.message = "; ".join(refused[:_TOLD]) + more
        return request

    def _take(self, kind: str, resources: Iterable[Any]) -> list[str]:
        """Take the resources of one response and return what is wrong with some."""
        known = self._known[kind]
        refused: list[str] = []
        found: dict[str, Any] = {}
        kept: set[str] = set()
        for key in [key for key in self._problems if key[0] == kind]:
            del self._problems[key]
        for number, any_ in enumerate(resources):
            name = _name(kind, any_.value) if any_.type_url == kind else ""
            try:
                if not name:
                    raise ValueError(f"number {number} of the response is no such resource or has no name")
                if name in found or name in kept:
                    raise ValueError("is there twice")
                if len(found) >= _RESOURCES:
                    raise ValueError(f"no more than {_RESOURCES} are taken")
                if kind == ENDPOINTS and name not in self._wanted:
                    continue  # some servers tell more than they are asked
                found[name] = self._read(kind, name, any_.value)
            except (DecodeError, ValueError) as error:
                refused.append(f"{_WORDS[kind]} {name[:253]}: {error}".replace(" :", ":"))
                self._note(kind, name, f"{refused[-1]}; what it was before stays")
                kept.add(name)
        if kind == ENDPOINTS:
            known.resources.update(found)
        else:
            kept_values = {name: known.resources[name] for name in kept if name in known.resources}
            known.resources = {**kept_values, **found}
        if kind == CLUSTERS:
            self._wanted = {one.eds for one in known.resources.values() if one.eds}
            self._names_wanted = sorted(self._wanted)
            assigned = self._known[ENDPOINTS]
            for name in assigned.resources.keys() - self._wanted:
                self._hosts -= _size(assigned.resources.pop(name))
        return refused

    def _read(self, kind: str, name: str, data: bytes) -> Any:
        message = _MESSAGES[kind].FromString(data)
        if kind == CLUSTERS:
            return _cluster(message)
        if kind == LISTENERS:
            return _listener(message)
        levels = _levels(message)
        more = _size(levels) - _size(self._known[ENDPOINTS].resources.get(name, ()))
        if self._hosts + more > _ALL_HOSTS:
            raise ValueError(f"no more than {_ALL_HOSTS} endpoints are taken in all")
        self._hosts += more
        return levels

    def _mean_all(self) -> dict[str, Service | None]:
        """Name all services anew, and return what changed."""
        before = {one.name: one for one in self._said.values()}
        self._name_all()
        self._said = {use: one for use, one in self._said.items() if use in self._names}
        self._mean(self._names)
        now = {one.name: one for one in self._said.values()}
        gone = dict.fromkeys(before.keys() - now.keys())
        return {**gone, **{name: one for name, one in now.items() if before.get(name) != one}}

    def _name_all(self) -> None:
        self._names.clear()
        self._users.clear()
        owners: dict[Place, str] = {}
        groups: dict[str, list[tuple[str, Place]]] = defaultdict(list)
        for key in [key for key in self._problems if key[0] in ("name", "use")]:
            del self._problems[key]
        for name, listener in sorted(self._known[LISTENERS].resources.items()):
            if listener.why:
                self._note("name", name, f"listener {name}: is not served: {listener.why}")
            for place in listener.places if listener.clusters else ():
                if place in owners:
                    where = f"{place[0]} port {place[1]} ({place[2]})"
                    self._note("name", name, f"listener {name}: {where} is listener {owners[place]}'s already")
                    continue
                owners[place] = name
                label = _label(listener.clusters[0][0] if len(listener.clusters) == 1 else name)
                groups[label].append((name, place))
                for eds in self._reached(listener):
                    self._users[eds].add((name, place))
        taken: set[str] = set()
        for label, uses in sorted(groups.items()):
            first, *others = sorted(uses, key=lambda use: (use[1][0].version, *use[1][1:], int(use[1][0])))
            names = {first: label, **{use: f"{label}.{use[1][0]}-{use[1][1]}-{use[1][2]}" for use in others}}
            for use, text in names.items():
                name = text.replace(":", "-")
                if not name or name in taken:
                    self._note("name", use[0], f"listener {use[0]}: {name or 'its cluster'!r} cannot name a service")
                    continue
                taken.add(name)
                self._names[use] = name

    def _reached(self, listener: _Listener) -> set[str]:
        """Whose endpoints it may need."""
        found, seen, todo = set(), set[str](), [name for name, _ in listener.clusters]
        while todo and len(seen) <= _NESTED:
            name = todo.pop()
            cluster = self._known[CLUSTERS].resources.get(name)
            if name not in seen and cluster is not None:
                seen.add(name)
                found.add(cluster.eds)
                todo.extend(cluster.parts)
        return found - {""}

    def _mean(self, uses: Iterable[tuple[str, Place]]) -> dict[str, Service | None]:
        changes: dict[str, Service | None] = {}
        for use in uses:
            if use not in self._names:
                continue
            name, place = use
            self._problems.pop(("use", name), None)
            before = self._said.get(use)
            try:
                service = self._service(self._known[LISTENERS].resources[name], self._names[use], place)
            except _UnknownError as error:
                self._note("use", name, f"listener {name}: {error}")
                if before is None:
                    continue
                service = msgspec.structs.replace(before, name=self._names[use])  # as it was
            self._said[use] = service
            if service != before:
                changes[service.name] = service
        return changes

    def _service(self, listener: _Listener, name: str, place: Place) -> Service:
        clusters = [self._known[CLUSTERS].resources.get(one) for one, _ in listener.clusters]
        groups: list[Group] = []
        for cluster, weight in listener.clusters:
            budget = iter(range(_NESTED))
            groups.append((weight, _chosen(self._levels_of(cluster, (), budget))))
        near = any(one is not None and one.near for one in clusters)
        backends = _merged(_spread(groups))
        for backend in backends:
            if backend.address.version != place[0].version:
                raise _UnknownError(f"{backend.address} cannot serve {place[0]}: both must be IPv4 or both IPv6")
        if near:
            backends = tuple(
                msgspec.structs.replace(one, locality=msgspec.structs.replace(one.locality, node=""))
                for one in backends
            )
        stays = listener.by_client and any(one is not None and one.hashing for one in clusters)
        return Service(name, *place, backends, _AFFINITY if stays else 0, near)

    def _levels_of(self, name: str, above: tuple[str, ...], budget: Iterator[int]) -> Levels:
        if name in above:
            raise _UnknownError(f"cluster {name} is made of itself, by way of {', '.join(above[above.index(name):])}")
        if next(budget, None) is None:
            raise _UnknownError(f"it reaches more than {_NESTED} clusters")
        cluster = self._known[CLUSTERS].resources.get(name)
        if cluster is None:
            raise _UnknownError(f"there is no cluster {name}")
        if cluster.why:
            raise _UnknownError(f"cluster {name}: {cluster.why}")
        if cluster.parts:
            return tuple(one for part in cluster.parts for one in self._levels_of(part, (*above, name), budget))
        if not cluster.eds:
            return cluster.levels  # type: ignore[no-any-return]
        levels = self._known[ENDPOINTS].resources.get(cluster.eds)
        if levels is None:
            raise _UnknownError(f"the endpoints of cluster {name} are not known yet")
        return levels  # type: ignore[no-any-return]

    def _note(self, what: str, name: str, message: str) -> None:
        if len(self._problems) < _PROBLEMS:
            self._problems[what, name] = message


def _no_authority(file: Path, why: str | None) -> SourceError:
    return SourceError(
        f"the certificate authority of the xDS server cannot be read from {file}: {why}; name a file with its "
        "certificates in PEM with --xds-ca"
    )


class XdsSource:
    """The services of an xDS server at ``target`` (HOST:PORT, or unix:PATH): see :class:`Source`.

    ``node_id`` is what this client calls itself; istiod wants its own form. With ``ca``, a file, TLS is spoken and
    the server's certificate has to be of that authority. Raises SourceError if the file holds none.
    """

    name = "xds"
    may_be_empty = False

    def __init__(self, target: str, node_id: str, ca: Path | None = None) -> None:
        self._target = target
        self._node_id = node_id
        self._ca: bytes | None = None
        if ca is not None:
            try:
                self._ca = ca.read_bytes()
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=self._ca.decode("ascii"))
            except OSError as error:
                # Of an SSLError strerror is OpenSSL's word.
                why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror
                raise _no_authority(ca, why) from error
            except ValueError as error:
                raise _no_authority(ca, "it holds no certificate") from error
        self._picture = Picture()
        self._complete = False

    def load(self) -> Config:
        """See :class:`Source`. Waits up to 5 s for a server that does not answer."""
        pace = checks.Pace()
        until = time.monotonic() + _PATIENCE
        last: SourceAwayError | None = None
        while True:
            try:
                with closing(self._dial()) as stream:
                    while not self._picture.whole and time.monotonic() < until:
                        self._exchange(stream)
                    if not self._picture.listed:
                        raise last or self._away("it did not say in time which clusters and listeners there are")
                self._complete = True
                return self._picture.config()
            except SourceAwayError as error:
                if time.monotonic() >= until:
                    raise
                last = error
                time.sleep(pace.wait())

    def follow(self, sink: Sink, stop: threading.Event) -> None:
        """See :class:`Source`."""
        pace = checks.Pace()
        told = ""
        while not stop.is_set():
            began = time.monotonic()
            try:
                with closing(self._dial()) as stream:
                    while not stop.is_set():
                        if self._hear(stream, sink, began):
                            told = ""
            except SourceAwayError as error:
                if error.message != told:
                    sink.trouble(error)
                told = error.message
            if time.monotonic() - began > _HELD:
                pace.reset()
            stop.wait(pace.wait())

    def _hear(self, stream: _Stream, sink: Sink, began: float) -> bool:
        """Wait for one response and tell what it means; whether there was one."""
        heard = self._exchange(stream)
        if not self._picture.listed:
            return heard is not None
        if not self._complete:
            self._complete = self._picture.whole or time.monotonic() - began > _PATIENCE
            if not self._complete:
                return heard is not None
            sink.replace(self._picture.config())
        elif heard is not None:
            kind, changes = heard
            if kind == ENDPOINTS and changes:
                sink.update(changes)
            elif kind != ENDPOINTS:
                sink.replace(self._picture.config())
        if heard is not None:
            self._complain(sink, settled=heard[0] != CLUSTERS)  # after which listeners and endpoints may come
        return heard is not None

    def _dial(self) -> _Stream:
        stream = _Stream(self._target, self._ca, self._away)
        for request in self._picture.begin():
            request.node.id = self._node_id
            request.node.user_agent_name = "meshd"
            stream.send(request)
        return stream

    def _exchange(self, stream: _Stream) -> tuple[str, dict[str, Service | None]] | None:
        response = stream.receive(_STOP)
        if response is None:
            return None
        requests, changes = self._picture.hear(response)
        for request in requests:
            stream.send(request)
        return response.type_url, changes

    def _complain(self, sink: Sink, settled: bool) -> None:
        problems = self._picture.take_problems(settled)
        for problem in problems[:_TOLD]:
            sink.trouble(SourceError(f"xds: {checks.plain(problem)}", source=self.name))
        if len(problems) > _TOLD:
            sink.trouble(SourceError(f"xds: and {len(problems) - _TOLD} more of that kind", source=self.name))

    def _away(self, why: str) -> SourceAwayError:
        what = f"the xDS server at {self._target} cannot be used: {checks.plain(why)}"
        return SourceAwayError(what, source=self.name)


class _Stream:
    """One ADS stream. What comes is held back until it is wanted, so that a server cannot fill memory."""

    def __init__(self, target: str, ca: bytes | None, away: Callable[[str], SourceAwayError]) -> None:
        self._away = away
        self._out: queue.SimpleQueue[DiscoveryRequest | None] = queue.SimpleQueue()
        self._in: queue.Queue[DiscoveryResponse | grpc.RpcError | None] = queue.Queue(1)
        self._closed = threading.Event()
        credentials = grpc.ssl_channel_credentials(ca) if ca is not None else None
        self._channel = (
            grpc.secure_channel(target, credentials, _OPTIONS)
            if credentials is not None
            else grpc.insecure_channel(target, _OPTIONS)
        )
        self._call = AggregatedDiscoveryServiceStub(self._channel).StreamAggregatedResources(iter(self._out.get, None))
        self._reader = threading.Thread(target=self._read, name="xds", daemon=True)
        self._reader.start()

    def send(self, request: DiscoveryRequest) -> None:
        """Send a request, some time."""
        self._out.put(request)

    def receive(self, seconds: float) -> DiscoveryResponse | None:
        """The next response, None if there is none in time. Raises SourceAwayError when the stream has ended."""
        try:
            found = self._in.get(timeout=seconds)
        except queue.Empty:
            return None
        if found is None:
            raise self._away("it ended the stream")
        if isinstance(found, grpc.RpcError):
            raise self._away(f"{found.code().name}: {found.details()}")
        return found

    def close(self) -> None:
        """End the stream."""
        self._closed.set()
        self._out.put(None)
        self._call.cancel()
        self._channel.close()
        self._reader.join()

    def _read(self) -> None:
        last: grpc.RpcError | None = None
        try:
            for response in self._call:
                self._put(response)
        except grpc.RpcError as error:
            last = error
        self._put(last)

    def _put(self, found: DiscoveryResponse | grpc.RpcError | None) -> None:
        while not self._closed.is_set():
            try:
                self._in.put(found, timeout=_STOP)
                return
            except queue.Full:
                pass


def _name(kind: str, data: bytes) -> str:
    """The name of a resource, empty if it cannot be read."""
    try:
        message = _MESSAGES[kind].FromString(data)
    except DecodeError:
        return ""
    return str(message.cluster_name if kind == ENDPOINTS else message.name)


def _label(name: str) -> str:
    """What a service is called after its cluster; ``outbound|80||web.shop.svc.cluster.local`` is ``shop.web.80``."""
    parts = name.split("|")
    if len(parts) == 4 and parts[0] == "outbound":
        _, port, subset, host = parts
        words = host.split(".")
        if len(words) >= 3 and words[2] == "svc":
            host, port = f"{words[1]}.{words[0]}.{port}", ""
        name = ".".join(part for part in (host, port, subset) if part)
    return _NO_NAME.sub("-", name)[:200].strip(".-_")


def _cluster(message: Any) -> _Cluster:
    near = message.common_lb_config.HasField("zone_aware_lb_config")
    hashing = message.lb_policy in _HASHING
    if message.HasField("cluster_type"):
        config = message.cluster_type.typed_config
        if not config.Is(ClusterConfig.DESCRIPTOR):
            return _Cluster(why=f"clusters of type {message.cluster_type.name[:60]!r} are not supported")
        parts = ClusterConfig.FromString(config.value).clusters
        if not parts:
            raise ValueError("is made of no clusters")
        return _Cluster(parts=tuple(parts), near=near, hashing=hashing)
    if message.type == Cluster.EDS:
        return _Cluster(eds=message.eds_cluster_config.service_name or message.name, near=near, hashing=hashing)
    if message.type == Cluster.STATIC:
        return _Cluster(levels=_levels(message.load_assignment), near=near, hashing=hashing)
    return _Cluster(why=f"clusters of type {Cluster.DiscoveryType.Name(message.type)} are not supported")


def _levels(message: Any) -> Levels:
    found: dict[int, list[Group]] = defaultdict(list)
    size = sum(len(one.lb_endpoints) for one in message.endpoints)
    if size > _HOSTS:
        raise ValueError(f"has {size} endpoints, and no more than {_HOSTS} are taken")
    for group in message.endpoints:
        where = Locality(group.locality.region, group.locality.zone, group.locality.sub_zone)
        weight = group.load_balancing_weight.value if group.HasField("load_balancing_weight") else None
        found[group.priority].append((weight, tuple(_backend(one, where) for one in group.lb_endpoints)))
    return tuple(tuple(found[priority]) for priority in sorted(found))


def _backend(message: Any, where: Locality) -> Backend:
    place = message.endpoint.address.socket_address
    weight = message.load_balancing_weight.value if message.HasField("load_balancing_weight") else 1
    if weight < 1:
        raise ValueError("an endpoint has the weight 0")
    healthy = message.health_status in _USABLE
    return Backend(checks.address(place.address), checks.port(place.port_value), weight, healthy, where)


def _listener(message: Any) -> _Listener:
    addresses = [message.address, *(one.address for one in message.additional_addresses)]
    places = []
    for one in addresses:
        place = one.socket_address
        # Where a sidecar listens itself: it names no service.
        if one.WhichOneof("address") != "socket_address" or place.address in ("0.0.0.0", "::", "127.0.0.1", "::1"):
            continue
        protocol: Protocol = "udp" if place.protocol == address_pb2.SocketAddress.UDP else "tcp"
        places.append((checks.virtual_address(place.address), checks.port(place.port_value), protocol))
    if not places:
        return _Listener(())
    for config in _filters(message):
        if config.Is(TcpProxy.DESCRIPTOR):
            tcp = TcpProxy.FromString(config.value)
            by_client = any(one.HasField("source_ip") for one in tcp.hash_policy)
            if tcp.cluster:
                return _Listener(tuple(places), ((tcp.cluster, 1),), by_client)
            weighted = tuple((one.name, one.weight) for one in tcp.weighted_clusters.clusters if one.weight)
            if len(weighted) > _NESTED:
                raise ValueError(f"goes to {len(weighted)} clusters, and no more than {_NESTED} are taken")
            if weighted:
                return _Listener(tuple(places), weighted, by_client)
        if config.Is(UdpProxyConfig.DESCRIPTOR):
            udp = UdpProxyConfig.FromString(config.value)
            if udp.cluster:
                return _Listener(tuple(places), ((udp.cluster, 1),), any(one.source_ip for one in udp.hash_policies))
    return _Listener(tuple(places), why="it has no TCP or UDP proxy to a cluster for all of its connections")


def _filters(message: Any) -> Iterator[Any]:
    """The configurations of the filters that any connection passes."""
    for one in message.listener_filters:
        yield one.typed_config
    chains = [one for one in message.filter_chains if not one.filter_chain_match.ListFields()]
    for chain in chains[:1] or [message.default_filter_chain]:
        for one in chain.filters:
            yield one.typed_config


def _size(levels: Levels) -> int:
    return sum(len(hosts) for level in levels for _, hosts in level)


def _chosen(levels: Levels) -> tuple[Backend, ...]:
    """The hosts of the first priority with a healthy one, if there is any, with what their localities weigh."""
    full = [level for level in levels if any(hosts for _, hosts in level)]
    able = [level for level in full if any(host.healthy for _, hosts in level for host in hosts)]
    level = (able or full or [()])[0]
    weighted = any(weight is not None for weight, _ in level)
    if not weighted:
        return tuple(host for _, hosts in level for host in hosts)
    return _spread([(weight or 0, hosts) for weight, hosts in level])


def _spread(groups: Sequence[Group]) -> tuple[Backend, ...]:
    """The hosts of all groups, so weighted that each group has its share, and in it each host its own."""
    sums = [sum(host.weight for host in hosts) for _, hosts in groups]
    common = math.lcm(*(one for one in sums if one))
    shares = [
        (weight or 0) * host.weight * (common // total)
        for (weight, hosts), total in zip(groups, sums, strict=True)
        if total
        for host in hosts
    ]
    least = math.gcd(*shares) or 1
    most = max(shares, default=0) // least
    hosts = [host for (_, group), total in zip(groups, sums, strict=True) if total for host in group]
    weights = [share // least for share in shares]
    if most > _WEIGHT_MAX:
        weights = [max(1, one * _WEIGHT_MAX // most) if one else 0 for one in weights]
    return tuple(msgspec.structs.replace(host, weight=one) for host, one in zip(hosts, weights, strict=True))


def _merged(hosts: Iterable[Backend]) -> tuple[Backend, ...]:
    """One backend for each address and port, in their order."""
    found: dict[tuple[int, int], Backend] = {}
    for host in hosts:
        place = int(host.address), host.port
        before = found.get(place)
        if before is not None:
            weight = min(before.weight + host.weight, _WEIGHT_MAX)
            host = msgspec.structs.replace(before, weight=weight, healthy=before.healthy or host.healthy)
        found[place] = host
    return tuple(found[place] for place in sorted(found))
