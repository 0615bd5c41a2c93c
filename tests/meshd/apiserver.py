"""As much of a Kubernetes API server as a client that lists and watches can see, on loopback.

(kmock knows no resourceVersion, no pages, no bookmarks and no 410, which are what such a client has to get right.)
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

SERVICES, SLICES = "services", "endpointslices"
Object = dict[str, Any]


class ApiServer:
    """Holds objects, tells who watches, forgets history when told to; changes may be made while it is ``away``."""

    def __init__(self, netns: Path | None = None) -> None:
        self._netns = netns
        self.requests: list[str] = []
        self.override: Callable[[str, dict[str, str]], tuple[int, bytes] | None] = lambda path, query: None
        self._changed = threading.Condition()
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._history: list[tuple[int, str, str, Object]] = []  # version, kind, type of event, object
        self._lists: dict[tuple[str, str], list[Object]] = {}
        self._version = 100
        self._oldest = 100
        self._generation = 0  # watches of an older one end
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.back()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def kubeconfig(self, path: Path) -> Path:
        path.write_text(
            json.dumps(
                {
                    "current-context": "test",
                    "clusters": [{"name": "test", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "users": [{"name": "test", "user": {"token": "secret"}}],
                }
            )
        )
        return path

    def put(self, kind: str, thing: Object) -> None:
        with self._changed:
            key = (kind, thing["metadata"]["namespace"], thing["metadata"]["name"])
            self._tell("MODIFIED" if key in self._objects else "ADDED", key, thing)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        with self._changed:
            self._tell("DELETED", (kind, namespace, name), self._objects[kind, namespace, name])

    def clear(self) -> None:
        """Lose everything, as a server whose store was emptied."""
        with self._changed:
            self._objects.clear()

    def expire(self) -> None:
        """Forget what happened until now: who asks for it hears 410."""
        with self._changed:
            self._history.clear()
            self._version += 1
            self._oldest = self._version

    def bookmark(self) -> None:
        with self._changed:
            self._version += 1
            for kind in (SERVICES, SLICES):
                bookmark = {"kind": "x", "metadata": {"resourceVersion": str(self._version)}}
                self._history.append((self._version, kind, "BOOKMARK", bookmark))
            self._changed.notify_all()

    def event(self, kind: str, what: str, thing: Any) -> None:
        """Send watchers this, whatever it is."""
        with self._changed:
            self._version += 1
            self._history.append((self._version, kind, what, thing))
            self._changed.notify_all()

    def end_watches(self) -> None:
        with self._changed:
            self._generation += 1
            self._changed.notify_all()

    def watched(self) -> int:
        """How many watches were begun."""
        return sum("watch=true" in one for one in self.requests)

    def away(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            self.end_watches()

    def back(self) -> None:
        thread = threading.Thread(target=self._serve, daemon=True)  # it alone enters the namespace
        with self._changed:
            thread.start()
            assert self._changed.wait_for(lambda: self._server is not None, 5)

    def _serve(self) -> None:
        if self._netns is not None:
            with self._netns.open() as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        server = _Server(("127.0.0.1", self._port), self._handler())
        with self._changed:
            self._server, self._port = server, server.server_address[1]
            self._changed.notify_all()
        server.serve_forever(0.02)

    def _tell(self, what: str, key: tuple[str, str, str], thing: Object) -> None:
        self._version += 1
        thing = {**thing, "metadata": {**thing["metadata"], "resourceVersion": str(self._version)}}
        if what == "DELETED":
            del self._objects[key]
        else:
            self._objects[key] = thing
        self._history.append((self._version, key[0], what, thing))
        self._changed.notify_all()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                api.requests.append(self.path)
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                words = parts.path.strip("/").split("/")
                kind = words[-1]
                namespace = words[words.index("namespaces") + 1] if "namespaces" in words else ""
                other = api.override(self.path, query)
                if other is not None:
                    self.answer(*other)
                elif self.headers["Authorization"] != "Bearer secret":
                    self.answer(401, b"{}")
                elif "watch" in query:
                    self.watch(kind, namespace, int(query["resourceVersion"]))
                else:
                    self.list(kind, namespace, int(query["limit"]), int(query.get("continue", 0)))

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def list(self, kind: str, namespace: str, limit: int, begin: int) -> None:
                with api._changed:
                    if begin == 0:  # later pages are of the same list, as a real server's are
                        ordered = [one for key, one in sorted(api._objects.items()) if key[0] == kind]
                        api._lists[kind, namespace] = [
                            one for one in ordered if namespace in ("", one["metadata"]["namespace"])
                        ]
                    mine = api._lists[kind, namespace]
                    metadata = {"resourceVersion": str(api._version)}
                if begin + limit < len(mine):
                    metadata["continue"] = str(begin + limit)
                self.answer(200, json.dumps({"metadata": metadata, "items": mine[begin : begin + limit]}).encode())

            def watch(self, kind: str, namespace: str, version: int) -> None:
                if version < api._oldest:
                    self.answer(410, b'{"code": 410, "message": "too old"}')
                    return
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                generation = api._generation
                while generation == api._generation:
                    with api._changed:
                        if not any(one[0] > version for one in api._history):
                            api._changed.wait(1)
                        new = [one for one in api._history if one[0] > version]
                        version = max([version, *(one[0] for one in new)])
                    for _, its_kind, what, thing in new:
                        if its_kind == kind and (not namespace or namespace == thing["metadata"]["namespace"]):
                            self.wfile.write(json.dumps({"type": what, "object": thing}).encode() + b"\n")
                self.close_connection = True

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that goes away in the middle of an answer is what tests do


def service(
    name: str, *addresses: str, namespace: str = "shop", ports: list[Object] | None = None, **spec: Any
) -> Object:
    """A Service with these ClusterIPs."""
    return {
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": addresses[0] if addresses else "None",
            "clusterIPs": list(addresses) or ["None"],
            "ports": ports if ports is not None else [{"name": "http", "port": 80, "protocol": "TCP"}],
            **spec,
        },
    }


def endpoints(
    of: str,
    *addresses: str | Object,
    name: str = "",
    namespace: str = "shop",
    ports: list[Object] | None = None,
    family: str = "IPv4",
) -> Object:
    """An EndpointSlice of a Service; an endpoint is an address that is ready, or an object."""
    return {
        "metadata": {"name": name or f"{of}-1", "namespace": namespace, "labels": {"kubernetes.io/service-name": of}},
        "addressType": family,
        "endpoints": [endpoint(one) if isinstance(one, str) else one for one in addresses],
        "ports": ports if ports is not None else [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def endpoint(address: str, node: str = "", zone: str = "", **conditions: bool) -> Object:
    """An endpoint of a slice."""
    where = {name: value for name, value in {"nodeName": node, "zone": zone}.items() if value}
    return {"addresses": [address], "conditions": conditions or {"ready": True}, **where}
