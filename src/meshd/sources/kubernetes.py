"""The source that is a Kubernetes cluster: its Services and EndpointSlices, listed once and watched from then on.

lightkube reads kubeconfigs, finds the credentials in a pod and renews them. Listing and watching is done here, since a
page or a line from a server that went wrong has to be bounded, and one bad object must not spoil the others.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import lightkube
import lightkube.core.exceptions
import msgspec
import yaml
from lightkube.config.client_adapter import AsyncClient, ConnectionParams

from meshd.model import Backend, Config, Locality, Protocol, Service
from meshd.sources import Sink, SourceAwayError, SourceError, checks

__all__ = ["KubernetesSource"]

_PATIENCE = 5.0  # s that a start waits for a server that does not answer
_SILENCE = 5.0  # s
_LONGEST = 60.0  # s that all lists together may take at the start
_LONGEST_LATER = 600.0
_WATCH = 60  # s after which the server ends a watch, so that a silent one is noticed
_PAGES = (500, 100)  # objects, of Services and of EndpointSlices, which are larger
_PAGE_BYTES = 64 << 20
_LIST_BYTES = 256 << 20
_LINE_BYTES = 8 << 20
_ERROR_BYTES = 64 << 10
_OBJECTS = 100_000  # of a kind
_ENDPOINTS = 1000  # of a slice; the API allows no more
_ALL_ENDPOINTS = 1_000_000
_PORTS = 1000
_PROBLEMS = 1000  # that are remembered
_TOLD = 20  # problems that are told one by one at a time
_HELD = 1.0  # s after which a watch counts as one that works
_STOP = 0.1  # s between looks whether to stop

_SERVICES = "api/v1{}/services"
_SLICES = "apis/discovery.k8s.io/v1{}/endpointslices"
_SERVICE_LABEL = "kubernetes.io/service-name"
_AFFINITY = 10800  # s, what the API takes if none is given
_ZONE = {"PreferClose", "PreferSameZone"}
_NEAR = _ZONE | {"PreferSameNode"}
_PROTOCOLS: dict[str, Protocol] = {"TCP": "tcp", "UDP": "udp"}
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, ssl.SSLError)
_NO_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_AWAY = (OSError, httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, lightkube.core.exceptions.ConfigError)
_NO_CREDENTIALS = (ValueError, KeyError, TypeError)  # from a program that gives them and said something else

Key = tuple[str, str]  # namespace and name


class _Meta(msgspec.Struct, gc=False):
    name: str
    namespace: str = ""


class _Labels(msgspec.Struct, gc=False):
    service: str = msgspec.field(name=_SERVICE_LABEL, default="")


class _SliceMeta(_Meta, gc=False):
    labels: _Labels | None = None


class _Port(msgspec.Struct, gc=False):
    port: int | None = None
    name: str | None = None
    protocol: str | None = None

    def is_for(self, other: _Port) -> bool:
        return (self.name or "") == (other.name or "") and (self.protocol or "TCP") == (other.protocol or "TCP")


class _ClientIP(msgspec.Struct, rename="camel", gc=False):
    timeout_seconds: int | None = None


class _AffinityConfig(msgspec.Struct, gc=False):
    client: _ClientIP | None = msgspec.field(name="clientIP", default=None)


class _ServiceSpec(msgspec.Struct, rename="camel"):
    type: str | None = None
    cluster_ip: str | None = msgspec.field(name="clusterIP", default=None)
    cluster_ips: list[str] | None = msgspec.field(name="clusterIPs", default=None)
    ports: list[_Port] | None = None
    session_affinity: str | None = None
    session_affinity_config: _AffinityConfig | None = None
    publish_not_ready_addresses: bool | None = None
    internal_traffic_policy: str | None = None
    traffic_distribution: str | None = None


class _Service(msgspec.Struct):
    metadata: _Meta
    spec: _ServiceSpec


class _Conditions(msgspec.Struct, gc=False):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Endpoint(msgspec.Struct, rename="camel"):
    addresses: list[str]
    conditions: _Conditions | None = None
    node_name: str | None = None
    zone: str | None = None


class _Slice(msgspec.Struct, rename="camel"):
    metadata: _SliceMeta
    address_type: str
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None

    @property
    def service(self) -> Key | None:
        name = self.metadata.labels.service if self.metadata.labels else ""
        return (self.metadata.namespace, name) if name else None

    @property
    def size(self) -> int:
        return len(self.endpoints or ())


class _Named(msgspec.Struct):
    metadata: _Meta


class _PageMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str | None = msgspec.field(name="continue", default=None)


class _Page(msgspec.Struct):
    metadata: _PageMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Version(msgspec.Struct, rename="camel"):
    resource_version: str


class _Versioned(msgspec.Struct):
    metadata: _Version


class _Status(msgspec.Struct):
    code: int | None = None
    message: str | None = None


class _StaleError(Exception):
    """The server no longer knows what came after the version that was seen: all is to be listed again."""


T = TypeVar("T")
Object = TypeVar("Object", _Service, _Slice)


class Mirror:
    """The cluster as it was told, and what it means for the mesh; no effects.

    An object that cannot be used leaves the earlier one of its name in force. ``node`` is the name of this node, for
    services whose traffic has to stay on it.
    """

    def __init__(self, node: str = "") -> None:
        self._node = node
        self._services: dict[Key, _Service] = {}
        self._slices: dict[Key, _Slice] = {}
        self._slices_of: dict[Key, set[Key]] = defaultdict(set)
        self._endpoints = 0
        self._said: dict[Key, dict[str, Service]] = {}
        self._changed: set[Key] = set()
        self._problems: dict[tuple[str, Key], str] = {}
        self._told: set[str] = set()

    def replace(self, services: Iterable[bytes | msgspec.Raw], slices: Iterable[bytes | msgspec.Raw]) -> None:
        """Take these objects, as JSON, for all that there are."""
        self._problems.clear()
        for key in self._services.keys() - {self.service(one) for one in services}:
            self._set_service(key, None)
        for key in self._slices.keys() - {self.slice(one) for one in slices}:
            self._set_slice(key, None)

    def service(self, data: bytes | msgspec.Raw, gone: bool = False) -> Key | None:
        """Take a Service for changed, and return its name; None if it has none."""
        key = self._key("Service", data)
        if key is not None:
            with self._noting("Service", key):
                self._set_service(key, None if gone else self._checked_service(key, data))
        return key

    def slice(self, data: bytes | msgspec.Raw, gone: bool = False) -> Key | None:
        """Take an EndpointSlice for changed, and return its name; None if it has none."""
        key = self._key("EndpointSlice", data)
        if key is not None:
            with self._noting("EndpointSlice", key):
                self._set_slice(key, None if gone else self._checked_slice(key, data))
        return key

    def take_changes(self) -> dict[str, Service | None]:
        """The mesh's services that changed since the last call, by name, None for gone."""
        changes: dict[str, Service | None] = {}
        for key in self._changed:
            before, now = self._said.pop(key, {}), {one.name: one for one in self._meaning(key)}
            changes.update(dict.fromkeys(before.keys() - now.keys()))
            changes.update({name: one for name, one in now.items() if before.get(name) != one})
            if now:
                self._said[key] = now
        self._changed.clear()
        return changes

    def config(self) -> Config:
        """All services of the mesh, as they are after :meth:`take_changes`."""
        return Config(tuple(one for said in self._said.values() for one in said.values()))

    def take_problems(self) -> list[str]:
        """What is wrong and was not told yet, a sentence each."""
        now = set(self._problems.values())
        new = sorted(now - self._told)
        self._told = now
        return new

    def _key(self, kind: str, data: bytes | msgspec.Raw) -> Key | None:
        try:
            meta = msgspec.json.decode(data, type=_Named).metadata
        except _NO_JSON as error:
            self._note(kind, ("", ""), f"a {kind} without a usable name: {error}")
            return None
        return meta.namespace, meta.name

    @contextmanager
    def _noting(self, kind: str, key: Key) -> Iterator[None]:
        self._problems.pop((kind, key), None)
        try:
            yield
        except (*_NO_JSON, ValueError) as error:
            self._note(kind, key, f"{kind} {_show(key)}: {error}; what it was before stays")

    def _note(self, kind: str, key: Key, message: str) -> None:
        if len(self._problems) < _PROBLEMS:
            self._problems[kind, key] = message

    def _checked_service(self, key: Key, data: bytes | msgspec.Raw) -> _Service:
        found = msgspec.json.decode(data, type=_Service)
        if len(found.spec.ports or ()) > _PORTS or len(found.spec.cluster_ips or ()) > 2:
            raise ValueError(f"more than {_PORTS} ports or 2 addresses are not taken")
        if key not in self._services and len(self._services) >= _OBJECTS:
            raise ValueError(f"no more than {_OBJECTS} are taken")
        return found

    def _checked_slice(self, key: Key, data: bytes | msgspec.Raw) -> _Slice:
        found = msgspec.json.decode(data, type=_Slice)
        if found.size > _ENDPOINTS or len(found.ports or ()) > _PORTS:
            raise ValueError(f"has {found.size} endpoints; {_ENDPOINTS} are allowed, and {_PORTS} ports")
        before = self._slices.get(key)
        if before is None and len(self._slices) >= _OBJECTS:
            raise ValueError(f"no more than {_OBJECTS} are taken")
        if self._endpoints + found.size - (before.size if before else 0) > _ALL_ENDPOINTS:
            raise ValueError(f"no more than {_ALL_ENDPOINTS} endpoints are taken in all")
        for endpoint in found.endpoints or ():
            del endpoint.addresses[1:]  # nobody uses the others
        return found

    def _set_service(self, key: Key, found: _Service | None) -> None:
        if found is None:
            self._services.pop(key, None)
        else:
            self._services[key] = found
        self._changed.add(key)

    def _set_slice(self, key: Key, found: _Slice | None) -> None:
        before = self._slices.pop(key, None)
        self._problems.pop(("endpoint", key), None)
        self._endpoints += (found.size if found else 0) - (before.size if before else 0)
        if before is not None and before.service is not None:
            self._slices_of[before.service].discard(key)
            if not self._slices_of[before.service]:
                del self._slices_of[before.service]
            self._changed.add(before.service)
        if found is not None:
            self._slices[key] = found
            if found.service is not None:
                self._slices_of[found.service].add(key)
                self._changed.add(found.service)

    def _meaning(self, key: Key) -> Iterator[Service]:
        """What a Service is for the mesh: one of its own for each address and port."""
        self._problems.pop(("meaning", key), None)
        found = self._services.get(key)
        if found is None or found.spec.type == "ExternalName":
            return
        spec = found.spec
        addresses = spec.cluster_ips or [spec.cluster_ip or ""]
        if addresses[0] in ("", "None"):  # not given yet, or headless
            return
        for number, text in enumerate(addresses):
            for port in spec.ports or ():
                protocol = _PROTOCOLS.get(port.protocol or "TCP")
                if protocol is None:
                    continue
                try:
                    address = checks.virtual_address(text)
                    name = f"{key[0]}.{key[1]}.{port.name or port.port}"
                    yield Service(
                        checks.name(name if number == 0 else f"{name}.ipv{address.version}"),
                        address,
                        checks.port(port.port or 0),
                        protocol,
                        self._backends(key, spec, port, address.version),
                        _affinity(spec),
                        spec.traffic_distribution in _NEAR or (self._stays(spec) and not self._node),
                    )
                except ValueError as error:
                    self._note("meaning", key, f"Service {_show(key)}: {error}")

    def _backends(self, key: Key, spec: _ServiceSpec, port: _Port, version: int) -> tuple[Backend, ...]:
        found: dict[tuple[int, int], Backend] = {}
        for at in self._slices_of.get(key, ()):
            one = self._slices[at]
            numbers = [there.port for there in one.ports or () if there.is_for(port) and there.port is not None]
            if one.address_type != f"IPv{version}" or not numbers:
                continue
            for endpoint in one.endpoints or ():
                backend = self._backend(at, endpoint, numbers[0], spec)
                if backend is None:
                    continue
                place = int(backend.address), backend.port
                if place not in found or _rank(backend) > _rank(found[place]):
                    found[place] = backend
        return tuple(found[place] for place in sorted(found))

    def _backend(self, at: Key, endpoint: _Endpoint, port: int, spec: _ServiceSpec) -> Backend | None:
        conditions = endpoint.conditions or _Conditions()
        ready = conditions.ready is not False or bool(spec.publish_not_ready_addresses)
        leaving = bool(conditions.terminating) and conditions.serving is True
        node = endpoint.node_name or ""
        if not (ready or leaving) or (self._stays(spec) and self._node and node != self._node):
            return None
        try:
            if not endpoint.addresses:
                raise ValueError("an endpoint has no address")
            return Backend(
                checks.address(endpoint.addresses[0]),
                checks.port(port),
                healthy=ready,
                # Who wants the zone has no wish for the node.
                locality=Locality("", endpoint.zone or "", "" if spec.traffic_distribution in _ZONE else node),
            )
        except ValueError as error:
            self._note("endpoint", at, f"EndpointSlice {_show(at)}: {error}")
            return None

    def _stays(self, spec: _ServiceSpec) -> bool:
        return spec.internal_traffic_policy == "Local"


def _no_config(error: Exception) -> str:
    """Why credentials cannot be used, also where lightkube stumbles over what it takes for granted."""
    if isinstance(error, (yaml.YAMLError, UnicodeDecodeError)):
        return "it is not YAML"
    if isinstance(error, (KeyError, TypeError, AttributeError)):
        return "it is no kubeconfig: that has clusters, users, contexts and a current-context"
    system = error if isinstance(error, OSError) else error.__context__
    if isinstance(system, OSError) and system.filename is not None:
        return f"{system.filename}: {system.strerror}"
    return str(error)


class KubernetesSource:
    """The Services and EndpointSlices of a cluster, or of one ``namespace`` of it: see :class:`Source`.

    ``kubeconfig`` None: the credentials of the pod that this runs in. ``node`` is this node's name. Raises SourceError
    if the cluster's address and credentials cannot be read.
    """

    name = "kubernetes"
    may_be_empty = False

    def __init__(self, kubeconfig: Path | None = None, namespace: str = "", node: str = "") -> None:
        self._where = f"/namespaces/{namespace}" if namespace else ""
        self._mirror = Mirror(node)
        self._versions: list[str] | None = None  # of the Services and of the EndpointSlices, if they are known
        self._pace = checks.Pace()
        try:
            config = lightkube.KubeConfig.from_file(kubeconfig) if kubeconfig else _of_pod()
            found = config.get()
            if found is None:
                raise ValueError("it has no current context")
            self._config = found
            self._client().is_closed  # noqa: B018 - reads certificates
        except (*_UNREADABLE, lightkube.core.exceptions.ConfigError) as error:
            what = str(kubeconfig) if kubeconfig else "the service account of this pod"
            hint = "; outside of a cluster, name a file with --kubeconfig"
            if kubeconfig:
                hint = "; give a file that kubectl takes with --kubeconfig"
            raise SourceError(f"no Kubernetes cluster can be read from {what}: {_no_config(error)}{hint}") from error
        self._server = self._config.cluster.server

    def load(self) -> Config:
        """See :class:`Source`. Waits up to 5 s for a server that does not answer."""
        asyncio.run(self._first())
        self._mirror.take_changes()
        return self._mirror.config()

    def follow(self, sink: Sink, stop: threading.Event) -> None:
        """See :class:`Source`."""
        self._pace.reset()
        asyncio.run(_until(stop, self._follow(sink)))

    async def _first(self) -> None:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                async with self._client() as client:
                    await self._list(client, _LONGEST)
                return
            except SourceAwayError:
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(self._pace.wait())

    async def _follow(self, sink: Sink) -> None:
        while True:
            try:
                async with self._client() as client:
                    if self._versions is None:
                        await self._list(client, _LONGEST_LATER)
                        self._mirror.take_changes()
                        sink.replace(self._mirror.config())
                    self._complain(sink)
                    await _both(self._watch(client, 0, sink), self._watch(client, 1, sink))
            except _StaleError:
                self._versions = None
            except SourceAwayError as error:
                self._versions = None
                sink.trouble(error)
            await asyncio.sleep(self._pace.wait())

    def _client(self) -> httpx2.AsyncClient:
        # What is compressed has no size that could be bounded before it is unpacked.
        client = AsyncClient(self._config, ConnectionParams(httpx2.Timeout(_SILENCE)))
        client.headers["Accept-Encoding"] = "identity"
        return client

    async def _list(self, client: httpx2.AsyncClient, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                services, first = await self._pages(client, _SERVICES, _PAGES[0])
                slices, second = await self._pages(client, _SLICES, _PAGES[1])
        except TimeoutError:
            raise self._away(f"its lists took more than {seconds:.0f} s") from None
        self._mirror.replace(services, slices)
        self._versions = [first, second]

    async def _pages(self, client: httpx2.AsyncClient, path: str, limit: int) -> tuple[list[msgspec.Raw], str]:
        found: list[msgspec.Raw] = []
        size = 0
        params = {"limit": str(limit)}
        while True:
            body = await self._body(client, path.format(self._where), params)
            try:
                page = msgspec.json.decode(body, type=_Page)
            except _NO_JSON as error:
                raise self._away(f"a page of {path.format(self._where)} is no list: {error}") from error
            found.extend(page.items or ())
            size += len(body)
            if size > _LIST_BYTES:
                raise self._away(f"a list has more than {_LIST_BYTES >> 20} MiB")
            if len(found) > _OBJECTS:
                raise self._away(f"it has more than {_OBJECTS} objects of a kind, and that many are not taken")
            if not page.metadata.continue_:
                return found, page.metadata.resource_version
            params["continue"] = page.metadata.continue_

    async def _body(self, client: httpx2.AsyncClient, path: str, params: dict[str, str]) -> bytes:
        body = bytearray()
        try:
            async with self._answer(client, path, params, _SILENCE) as response:
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > _PAGE_BYTES:
                        raise self._away(f"a page of {path} has more than {_PAGE_BYTES >> 20} MiB")
        except _AWAY as error:
            raise self._away(_words(error)) from error
        return bytes(body)

    @asynccontextmanager
    async def _answer(
        self, client: httpx2.AsyncClient, path: str, params: dict[str, str], silence: float | None
    ) -> AsyncIterator[httpx2.Response]:
        timeout = httpx2.Timeout(_SILENCE, read=silence)
        request = client.build_request("GET", path, params=params, timeout=timeout)
        try:
            response = await client.send(request, stream=True)
        except _NO_CREDENTIALS as error:
            raise self._away(f"no credentials: {_words(error)}") from error
        try:
            await self._check(response)
            yield response
        finally:
            await response.aclose()

    async def _check(self, response: httpx2.Response) -> None:
        if response.status_code == 200 and response.headers.get("Content-Encoding", "identity") == "identity":
            return
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > _ERROR_BYTES:
                break
        if response.status_code == 410:
            raise _StaleError
        why = response.reason_phrase if response.status_code != 200 else "its answer is compressed"
        with suppress(*_NO_JSON):  # a proxy may answer in words of its own
            why = msgspec.json.decode(bytes(body), type=_Status).message or why
        raise self._away(f"{response.status_code}: {why}")

    async def _watch(self, client: httpx2.AsyncClient, at: int, sink: Sink) -> None:
        """Follow one kind for ever. Raises _StaleError, or SourceAwayError if the server refuses."""
        path = (_SERVICES, _SLICES)[at].format(self._where)
        pace = checks.Pace()
        told = False
        while True:
            assert self._versions is not None
            began = time.monotonic()
            try:
                async with asyncio.timeout(_WATCH + _SILENCE):
                    await self._watch_once(client, path, at, sink)
                told = False
            except TimeoutError:
                pass  # fell silent
            except _AWAY as error:
                if not told:
                    sink.trouble(self._away(_words(error)))
                told = True
            finally:
                if time.monotonic() - began > _HELD:
                    pace.reset()
                    self._pace.reset()
            await asyncio.sleep(pace.wait())

    async def _watch_once(self, client: httpx2.AsyncClient, path: str, at: int, sink: Sink) -> None:
        assert self._versions is not None
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(_WATCH),
            "resourceVersion": self._versions[at],
        }
        async with self._answer(client, path, params, None) as response:
            async for lines in self._lines(response):
                for line in lines:
                    self._event(at, line)
                changes = self._mirror.take_changes()
                if changes:
                    sink.update(changes)
                self._complain(sink)

    async def _lines(self, response: httpx2.Response) -> AsyncIterator[list[bytes]]:
        """Whole lines, as many as came together."""
        rest = b""
        async for chunk in response.aiter_raw():
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LINE_BYTES:
                raise self._away(f"an event has more than {_LINE_BYTES >> 20} MiB")
            yield lines

    def _event(self, at: int, line: bytes) -> None:
        if not line:
            return
        try:
            event = msgspec.json.decode(line, type=_Event)
            if event.type == "ERROR":
                status = msgspec.json.decode(event.object, type=_Status)
                if status.code == 410:
                    raise _StaleError
                raise self._away(f"{status.code}: {status.message}")
            version = msgspec.json.decode(event.object, type=_Versioned).metadata.resource_version
        except _NO_JSON as error:
            raise self._away(f"an event cannot be read: {error}") from error
        if event.type != "BOOKMARK":
            take = self._mirror.slice if at else self._mirror.service
            take(event.object, gone=event.type == "DELETED")
        assert self._versions is not None
        self._versions[at] = version

    def _complain(self, sink: Sink) -> None:
        problems = self._mirror.take_problems()
        for problem in problems[:_TOLD]:
            sink.trouble(SourceError(f"kubernetes: {checks.plain(problem)}", source=self.name))
        if len(problems) > _TOLD:
            sink.trouble(SourceError(f"kubernetes: and {len(problems) - _TOLD} more of that kind", source=self.name))

    def _away(self, why: str) -> SourceAwayError:
        what = f"the Kubernetes API at {self._server} cannot be used: {checks.plain(why)}"
        return SourceAwayError(what, source=self.name)


def _of_pod() -> lightkube.KubeConfig:
    return lightkube.KubeConfig.from_service_account()


def _affinity(spec: _ServiceSpec) -> int:
    if spec.session_affinity != "ClientIP":
        return 0
    client = spec.session_affinity_config.client if spec.session_affinity_config else None
    return client.timeout_seconds if client and client.timeout_seconds else _AFFINITY


def _rank(backend: Backend) -> tuple[bool, str, str]:
    """Of two words about one endpoint the better one counts, whatever their order."""
    return backend.healthy, backend.locality.zone, backend.locality.node


def _show(key: Key) -> str:
    return "/".join(part[:253] for part in key if part)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


async def _both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    """Run both until one fails, and raise what that one raised."""
    tasks = [asyncio.create_task(first), asyncio.create_task(second)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until(stop: threading.Event, work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    while not stop.is_set() and not task.done():
        await asyncio.wait({task}, timeout=_STOP)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
