"""As much of a Kubernetes API server as the cluster in miniature needs: objects in memory, listed, read and watched."""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hitless.kernel.namespaces import Namespace, entered

__all__ = ["ApiServer"]

_KEPT = 10_000  # events that a watch may begin behind
_WATCH = 60.0  # s that a watch takes if it asks for nothing else


class ApiServer:
    """Serves ``objects`` on ``address`` in ``namespace``, from threads of its own, until it is closed.

    A path is that of the API without its version's root: ``services``, ``endpointslices``, ``daemonsets``, ``pods``.
    """

    def __init__(self, namespace: Namespace, address: str, port: int = 0) -> None:
        self._changed = threading.Condition()
        self._version = 1
        self._objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self._events: deque[tuple[int, str, str, dict[str, Any]]] = deque(maxlen=_KEPT)
        with entered(namespace):  # its sockets stay there
            self._server = _Server((address, port), _Handler)
        self._server.api = self
        self.url = f"http://{address}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        """Stop answering; watches end."""
        with self._changed:
            self._server.is_closing = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def put(self, kind: str, obj: Mapping[str, Any]) -> None:
        """Make or replace an object of a kind, as ``services``."""
        with self._changed:
            meta = obj["metadata"]
            key = (kind, meta["namespace"], meta["name"])
            self._version += 1
            told = {**obj, "metadata": {**meta, "resourceVersion": str(self._version)}}
            self._events.append((self._version, kind, "MODIFIED" if key in self._objects else "ADDED", told))
            self._objects[key] = told
            self._changed.notify_all()

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Remove an object."""
        with self._changed:
            self._version += 1
            gone = self._objects.pop((kind, namespace, name))
            told = {**gone, "metadata": {**gone["metadata"], "resourceVersion": str(self._version)}}
            self._events.append((self._version, kind, "DELETED", told))
            self._changed.notify_all()

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """One object, None if it is not there."""
        with self._changed:
            return self._objects.get((kind, namespace, name))

    def all_of(self, kind: str, namespace: str | None) -> dict[str, Any]:
        """All of a kind, of one namespace or of all, in the form of a list of the API."""
        with self._changed:
            items = [
                one for (of, where, _), one in self._objects.items() if of == kind and namespace in (None, where)
            ]
            return {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}

    def wait(self, after: int, seconds: float) -> list[tuple[int, str, str, dict[str, Any]]] | None:
        """Events after a version, waited for so long; None if they are forgotten."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > after or self._server.is_closing, seconds)
            if self._events and self._events[0][0] > after + 1 and len(self._events) == _KEPT:
                return None
            return [event for event in self._events if event[0] > after]

    @property
    def is_closing(self) -> bool:
        """Whether watches have to end."""
        return self._server.is_closing


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    api: ApiServer
    is_closing = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is nobody's business; all else is a mistake and printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        asked = parse_qs(parts.query)
        kind, namespace, name = _of(parts.path)
        api = self.server.api
        if name is not None:
            found = api.get(kind, namespace or "", name)
            self._answer(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND, found or _status(404, f"{name} not found"))
        elif asked.get("watch", ["false"])[0] in ("true", "1"):
            seconds = float(asked.get("timeoutSeconds", [_WATCH])[0])
            self._watch(kind, namespace, int(asked.get("resourceVersion", ["0"])[0] or 0), seconds)
        else:
            self._answer(HTTPStatus.OK, api.all_of(kind, namespace))

    def do_POST(self) -> None:
        """Take an object, as the Events that meshd tells."""
        kind, namespace, _ = _of(urlsplit(self.path).path)
        made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        meta = made["metadata"]
        meta.setdefault("name", f"{meta.get('generateName', '')}{uuid.uuid4().hex[:5]}")
        self.server.api.put(kind, {**made, "metadata": {**meta, "namespace": namespace}})
        self._answer(HTTPStatus.CREATED, made)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _watch(self, kind: str, namespace: str | None, version: int, seconds: float) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        api = self.server.api
        try:
            while not api.is_closing and seconds > 0:
                events = api.wait(version, min(seconds, 5.0))
                if events is None:
                    self._chunk({"type": "ERROR", "object": _status(410, "too old resource version")})
                    break
                if not events:
                    seconds -= min(seconds, 5.0)
                for number, of, what, obj in events:
                    version = number
                    if of == kind and namespace in (None, obj["metadata"]["namespace"]):
                        self._chunk({"type": what, "object": obj})
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            self.close_connection = True

    def _chunk(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

    def _answer(self, status: HTTPStatus, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _of(path: str) -> tuple[str, str | None, str | None]:
    """Kind, namespace and name of a path such as /api/v1/namespaces/shop/services/web."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    namespace = None
    if parts[0] == "namespaces" and len(parts) > 2:
        namespace, parts = parts[1], parts[2:]
    return parts[0], namespace, parts[1] if len(parts) > 1 else None


def _status(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}
