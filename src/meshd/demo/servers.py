"""The servers behind the mesh: a real nginx, and an echo server. ``python -m meshd.demo.servers`` is the latter."""

from __future__ import annotations

import contextlib
import selectors
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hitless.errors import NodeError, UnsupportedError
from meshd.demo.lab import Lab

__all__ = ["ECHO_PORT", "HTTP_PORT", "start_echo", "start_nginx"]

HTTP_PORT = 8080
ECHO_PORT = 7000
_READY_WITHIN = 10.0

_NGINX = """\
daemon off;
user root;
worker_processes 2;
pid {home}/nginx.pid;
error_log {home}/error.log warn;
events {{ worker_connections 4096; multi_accept on; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    default_type text/plain;
    keepalive_timeout 3600s;
    keepalive_requests 100000000;
    server {{
{listen}
        location / {{ return 200 "$server_addr\\n"; }}
        location /echo/ {{ return 200 "$request_uri\\n"; }}
    }}
}}
"""


def start_nginx(lab: Lab, addresses: Sequence[str]) -> subprocess.Popen[str]:
    """Start nginx on every one of ``addresses`` and return when it listens.

    It answers with its own address, so that a client sees which backend it got, and ``/echo/X`` with the path.
    Raises UnsupportedError without nginx, NodeError when it does not come up.
    """
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if nginx is None:
        raise UnsupportedError("nginx is not installed: apt-get install nginx-light", feature="nginx")
    home = lab.scratch / "nginx"
    home.mkdir()
    # Each worker has its own sockets (reuseport): two workers need no lock between them to accept.
    listen = [f"        listen {_bracket(a)}:{HTTP_PORT} backlog=4096 reuseport;" for a in addresses]
    config = home / "nginx.conf"
    config.write_text(_NGINX.format(home=home, listen="\n".join(listen)))
    log = home / "error.log"
    process = lab.popen([nginx, "-p", str(home), "-c", str(config)], stderr=subprocess.DEVNULL)
    _await(process, HTTP_PORT, len(addresses), f"nginx (its log is {log})")
    return process


def start_echo(lab: Lab, addresses: Sequence[str]) -> subprocess.Popen[str]:
    """Start the echo server on ``addresses`` and return when it listens; raises NodeError when it does not."""
    process = lab.popen([sys.executable, "-m", "meshd.demo.servers", *addresses])
    _await(process, ECHO_PORT, len(addresses), "the echo server")
    return process


def _bracket(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _await(process: subprocess.Popen[str], port: int, count: int, what: str) -> None:
    until = time.monotonic() + _READY_WITHIN
    while _listening(process.pid, port) < count:
        if process.poll() is not None or time.monotonic() > until:
            raise NodeError(f"{what} does not listen on port {port}: exit code {process.poll()}")
        time.sleep(0.02)


def _listening(pid: int, port: int) -> int:
    """Count the distinct addresses that listen on ``port`` in the network namespace of ``pid``."""
    found = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    found.add(fields[1])
    return len(found)


def _echo(addresses: Sequence[str]) -> None:
    watch = selectors.EpollSelector()
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, ECHO_PORT), family=family, backlog=1024)
        listener.setblocking(False)
        watch.register(listener, selectors.EVENT_READ, True)
    while True:
        for key, _ in watch.select():
            assert isinstance(key.fileobj, socket.socket)
            if key.data:
                accepted, _ = key.fileobj.accept()
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                watch.register(accepted, selectors.EVENT_READ, False)
                continue
            try:
                data = key.fileobj.recv(65536)
                key.fileobj.sendall(data)
            except ConnectionError:
                data = b""
            if not data:
                watch.unregister(key.fileobj)
                key.fileobj.close()


if __name__ == "__main__":
    _echo(sys.argv[1:])
