"""A small HTTP server for who watches: metrics, health, readiness. Bounded in threads, time and what it reads."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec

from hitless.errors import UnsupportedError
from meshd.events import Events

__all__ = ["Page", "Pages", "Web"]

_THREADS = 16
_REQUEST = 2.0  # s that a request may take, from its first byte to the last one of the answer
_LOOK = 0.1  # s between looks whether it is closed
_RETRY = 0.2  # s until a port that is taken is tried again


class Page(msgspec.Struct, frozen=True):
    """What is answered."""

    status: int
    text: bytes
    type: str = "text/plain; charset=utf-8"

    @classmethod
    def of(cls, problems: Sequence[str]) -> Page:
        """A page that says what is wrong, with 503, or that all is well."""
        return cls(503 if problems else 200, ("\n".join(problems) or "ok").encode() + b"\n")


Pages = Mapping[str, Callable[[], Page]]


class Web:
    """Answers GET and HEAD of ``pages`` at an address and port, from threads of its own, until it is closed.

    A port that is taken is waited for: the daemon that is taken over from has it until it ends. Raises UnsupportedError
    if the address cannot be had for any other reason.
    """

    def __init__(self, where: tuple[str, int], pages: Pages, events: Events) -> None:
        self._where = where
        self._pages = pages
        self._events = events
        self._closed = threading.Event()
        self._server = self._open()
        self._thread = threading.Thread(target=self._run, name="web", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more, after what is being answered."""
        self._closed.set()
        self._thread.join()

    def _open(self) -> _Server | None:
        try:
            return _Server(self._where, self._pages)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return None
            address, port = self._where
            raise UnsupportedError(
                f"cannot listen at {address} port {port}: {error.strerror}; give an address of this machine "
                "and a free port with --listen",
                feature="listen",
            ) from error

    def _run(self) -> None:
        address, port = self._where
        if self._server is None:
            self._events.tell("listen-busy", message=f"{address} port {port} is taken; waiting until it is free")
        while self._server is None:
            if self._closed.wait(_RETRY):
                return
            self._server = self._open()
        self._events.tell("listening", address=self._server.server_name, port=self._server.server_address[1])
        with self._server:
            while not self._closed.is_set():
                self._server.handle_request()


class _Server(HTTPServer):
    timeout = _LOOK
    request_queue_size = 64

    def __init__(self, where: tuple[str, int], pages: Pages) -> None:
        self.address_family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
        self.pages = pages
        self._free = threading.Semaphore(_THREADS)
        self._pool = ThreadPoolExecutor(_THREADS, "web")
        super().__init__(where, _Handler)

    def server_bind(self) -> None:
        # Not that of HTTPServer, which asks a name server who this is.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)  # more than anybody needs who means well
            return
        self._pool.submit(self._answer, request, client_address)

    def _answer(self, request: Any, client_address: Any) -> None:
        # However slowly it comes in.
        limit = threading.Timer(_REQUEST, lambda: _cut(request))
        limit.start()
        try:
            self.finish_request(request, client_address)
        except OSError:
            pass  # who asked has gone
        finally:
            limit.cancel()
            self.shutdown_request(request)
            self._free.release()

    def server_close(self) -> None:
        super().server_close()
        self._pool.shutdown()


def _cut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is over


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "meshd"
    sys_version = ""
    timeout = _REQUEST

    def do_GET(self) -> None:
        make = self.server.pages.get(self.path.partition("?")[0])
        page = make() if make is not None else Page(404, f"there is {', '.join(self.server.pages)}\n".encode())
        self.send_response(page.status)
        self.send_header("Content-Type", page.type)
        self.send_header("Content-Length", str(len(page.text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.text)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: probes come every second."""
