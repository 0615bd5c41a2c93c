"""A real xDS server on loopback: state of the world over one ADS stream, for meshd and for Envoy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.core.v3 import address_pb2
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.extensions.filters.network.tcp_proxy.v3.tcp_proxy_pb2 import TcpProxy
from envoy.extensions.filters.udp.udp_proxy.v3.udp_proxy_pb2 import UdpProxyConfig
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from google.protobuf.any_pb2 import Any as AnyMessage

from meshd.sources.xds import CLUSTERS, ENDPOINTS, LISTENERS

_METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"


class AdsServer:
    """Tells its resources to who asks for them, and again when they change."""

    def __init__(self, socket: Path | None = None) -> None:
        self._socket = socket
        self.requests: list[DiscoveryRequest] = []
        self.silent: set[str] = set()  # kinds that are not answered
        self.refusing = False  # end each stream at once
        self._resources: dict[str, dict[str, AnyMessage]] = {CLUSTERS: {}, ENDPOINTS: {}, LISTENERS: {}}
        self._version = dict.fromkeys(self._resources, 1)
        self._changed = threading.Condition()
        self._port = 0
        self._server: grpc.Server | None = None
        self.streams = 0
        self.back()

    @property
    def target(self) -> str:
        return f"unix:{self._socket}" if self._socket else f"127.0.0.1:{self._port}"

    def set(self, *resources: Any) -> None:
        """Make these messages what there is of their names."""
        with self._changed:
            for one in resources:
                packed = AnyMessage()
                packed.Pack(one)
                name = one.cluster_name if isinstance(one, ClusterLoadAssignment) else one.name
                self._resources[packed.type_url][name] = packed
                self._version[packed.type_url] += 1
            self._changed.notify_all()

    def set_bytes(self, kind: str, name: str, data: bytes, type_url: str = "") -> None:
        """Say these bytes are a resource."""
        with self._changed:
            self._resources[kind][name] = AnyMessage(type_url=type_url or kind, value=data)
            self._version[kind] += 1
            self._changed.notify_all()

    def remove(self, kind: str, *names: str) -> None:
        with self._changed:
            for name in names or list(self._resources[kind]):
                del self._resources[kind][name]
            self._version[kind] += 1
            self._changed.notify_all()

    def away(self) -> None:
        if self._server is not None:
            with self._changed:
                server, self._server = self._server, None
                self._changed.notify_all()
            server.stop(0).wait()

    def back(self) -> None:
        options = [("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(ThreadPoolExecutor(8), options=options)
        handler = grpc.stream_stream_rpc_method_handler(
            self._stream, DiscoveryRequest.FromString, DiscoveryResponse.SerializeToString
        )
        service, method = _METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self._port = self._server.add_insecure_port(self.target)
        self._server.start()

    def nacks(self) -> list[str]:
        """What clients refused, in their words."""
        return [one.error_detail.message for one in self.requests if one.HasField("error_detail")]

    def acked(self, kind: str) -> bool:
        """Whether a client took what there is of a kind now."""
        return any(
            one.type_url == kind and one.version_info == str(self._version[kind]) and not one.HasField("error_detail")
            for one in self.requests
        )

    def _stream(self, requests: Iterator[DiscoveryRequest], context: Any) -> Iterator[DiscoveryResponse]:
        server = self._server
        asked: dict[str, set[str]] = {}
        sent: dict[str, tuple[int, set[str]]] = {}
        self.streams += 1

        def read() -> None:
            try:
                for request in requests:
                    with self._changed:
                        self.requests.append(request)
                        asked[request.type_url] = set(request.resource_names)
                        self._changed.notify_all()
            except grpc.RpcError:
                pass  # the client hung up

        threading.Thread(target=read, daemon=True).start()
        while self._server is server and context.is_active() and not self.refusing:
            with self._changed:
                due = [
                    kind
                    for kind, names in asked.items()
                    if kind in self._version
                    and kind not in self.silent
                    and sent.get(kind) != (self._version[kind], names)
                ]
                if not due:
                    self._changed.wait(0.2)
                responses = []
                for kind in due:
                    names = asked[kind]
                    sent[kind] = (self._version[kind], names)
                    resources = [one for name, one in self._resources[kind].items() if not names or name in names]
                    version = str(self._version[kind])
                    response = DiscoveryResponse(type_url=kind, version_info=version, nonce=f"{kind[-8:]}-{version}")
                    response.resources.extend(resources)
                    responses.append(response)
            yield from responses


def cluster(name: str, *hosts: str, **fields: Any) -> Cluster:
    """A cluster whose endpoints are asked for, or with ``hosts`` (ADDRESS, port 8080) a static one."""
    found = Cluster(name=name, **fields)
    found.connect_timeout.FromSeconds(1)
    if hosts:
        found.type = Cluster.STATIC
        found.load_assignment.CopyFrom(assignment(name, *hosts))
    elif not found.HasField("cluster_type") and "type" not in fields:
        found.type = Cluster.EDS
        found.eds_cluster_config.eds_config.ads.SetInParent()
        found.eds_cluster_config.eds_config.resource_api_version = 2
    return found


def assignment(name: str, *hosts: str, port: int = 8080, **locality: Any) -> ClusterLoadAssignment:
    """Endpoints of one locality."""
    found = ClusterLoadAssignment(cluster_name=name)
    add_locality(found, *hosts, port=port, **locality)
    return found


def add_locality(
    to: ClusterLoadAssignment,
    *hosts: str,
    port: int = 8080,
    weight: int = 0,
    priority: int = 0,
    status: int = 0,
    **locality: Any,
) -> None:
    """Add endpoints of one more locality."""
    group = to.endpoints.add(priority=priority)
    if weight:
        group.load_balancing_weight.value = weight
    for name, value in locality.items():
        setattr(group.locality, name, value)
    for host in hosts:
        endpoint = group.lb_endpoints.add(health_status=status)
        endpoint.endpoint.address.socket_address.address = host
        endpoint.endpoint.address.socket_address.port_value = port


def listener(name: str, address: str, port: int, *clusters: str | tuple[str, int], udp: bool = False) -> Listener:
    """A listener whose connections go to a cluster, or to several with weights."""
    found = Listener(name=name)
    found.address.socket_address.address = address
    found.address.socket_address.port_value = port
    if udp:
        found.address.socket_address.protocol = address_pb2.SocketAddress.UDP
        proxy = UdpProxyConfig(stat_prefix=name, cluster=str(clusters[0]))
        found.listener_filters.add(name="udp").typed_config.Pack(proxy)
        return found
    tcp = TcpProxy(stat_prefix=name)
    if len(clusters) == 1 and isinstance(clusters[0], str):
        tcp.cluster = clusters[0]
    for one in clusters if not tcp.cluster else ():
        tcp.weighted_clusters.clusters.add(name=one[0], weight=int(one[1]))
    found.filter_chains.add().filters.add(name="envoy.filters.network.tcp_proxy").typed_config.Pack(tcp)
    return found
