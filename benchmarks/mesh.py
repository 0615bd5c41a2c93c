"""``python -m benchmarks.mesh``: how long meshd takes to sync many services, and until a connect sees one change."""

from __future__ import annotations

import argparse
import ipaddress
import itertools
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

import hitless
from benchmarks.machine import this_machine
from hitless.errors import HitlessError
from meshd.demo.lab import BACKENDS4, Lab
from meshd.model import Backend, Config, Service
from meshd.reconcile import Writer
from meshd.registry import Registry
from meshd.releases import RELEASES

__all__ = ["main"]

_ENDPOINTS = 10  # of each service
_PORT = 8080
_VIP = "10.96.0.10"
_RELEASE = RELEASES[max(RELEASES)]


class Run(msgspec.Struct, frozen=True):
    """With so many services: seconds to sync them into empty maps, to look at all that is there and find it right, from
    the change of a service's only endpoint until a connect has reached the new one and was answered, and to write the
    change of one endpoint of many; resident bytes at the end.
    """

    services: int
    endpoints: int
    first_sync: float
    resync: float
    seen: list[float]
    written: list[float]
    resident: int


def main(args: Sequence[str] | None = None) -> int:
    """Measure each number of services in a lab and a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh", description=__doc__)
    parser.add_argument("--services", type=_numbers, default=[1000, 10_000], metavar="N,N,...")
    parser.add_argument("--changes", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--in", dest="place", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.place:
        root, cgroup = map(Path, options.place)
        print(msgspec.json.encode(_measure(root, cgroup, options.services[0], options.changes)).decode())
        return 0
    try:
        runs = [_in_lab(count, options.changes) for count in options.services]
    except HitlessError as error:
        print(error.message, file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "benchmarks.mesh", *(sys.argv[1:] if args is None else args)])
    if options.json:
        print(msgspec.json.encode({"machine": this_machine(), "command": command, "runs": runs}).decode())
    else:
        _print(command, runs)
    return 0


def _numbers(text: str) -> list[int]:
    return sorted(int(part) for part in text.split(","))


def _in_lab(count: int, changes: int) -> Run:
    with Lab() as lab:
        module = [sys.executable, "-m", "benchmarks.mesh", "--services", str(count), "--changes", str(changes)]
        place = [str(lab.bpffs / "mesh"), str(lab.cgroup)]
        process = lab.popen([*module, "--in", *place], "clients", stdout=subprocess.PIPE)
        said, _ = process.communicate(timeout=600)
        if process.returncode:
            raise HitlessError(f"measuring {count} services failed")
        return msgspec.json.decode(said, type=Run)


def _measure(root: Path, cgroup: Path, count: int, changes: int) -> Run:
    """Run in the lab and in the mesh's cgroup: control plane and client are one process."""
    for address in BACKENDS4[:2]:
        threading.Thread(target=_serve, args=(address,), daemon=True).start()
    services = [*_services(count - 1), _probe(0)]
    node = hitless.Node(root)
    bundle = hitless.Bundle.load(_RELEASE.bundle, {"cgroup": str(cgroup)})
    registry, writer = Registry(["bench"], _RELEASE), Writer(node, _RELEASE)
    synced: list[float] = []

    def sync(_: hitless.Node) -> None:
        began = time.perf_counter()
        registry.replace("bench", Config(tuple(services)))
        writer.resync(registry.all())
        synced.append(time.perf_counter() - began)

    hitless.apply(node, bundle, prepare=sync)
    sync(node)
    before = services[: len(services) - 1]
    written = [_change(registry, writer, _with_one_changed(before[n % len(before)], n)) for n in range(changes)]
    seen = [_until_seen(registry, writer, number + 1) for number in range(changes)]
    return Run(count, count * _ENDPOINTS, synced[0], synced[1], seen, written, _resident())


def _change(registry: Registry, writer: Writer, service: Service) -> float:
    """What meshd does when a source says that one service changed."""
    began = time.perf_counter()
    registry.update("bench", {service.name: service})
    news = registry.take_news()
    registry.problems()
    writer.write(news)
    return time.perf_counter() - began


def _until_seen(registry: Registry, writer: Writer, number: int) -> float:
    wanted = BACKENDS4[number % 2].encode()
    began = time.perf_counter()
    _change(registry, writer, _probe(number))
    with socket.create_connection((_VIP, 80), 10) as connection:
        if connection.recv(100) != wanted:
            raise HitlessError(f"change {number} was written, and a connect did not see it")
    return time.perf_counter() - began


def _with_one_changed(service: Service, number: int) -> Service:
    first = msgspec.structs.replace(service.backends[0], port=9000 + number)
    return msgspec.structs.replace(service, backends=(first, *service.backends[1:]))


def _services(count: int) -> list[Service]:
    vip, end = ipaddress.IPv4Address("10.100.0.0"), ipaddress.IPv4Address("10.128.0.0")
    return [
        Service(
            f"namespace.service-{number}.http",
            vip + number,
            80,
            "tcp",
            tuple(Backend(end + number * _ENDPOINTS + one, _PORT, 1 + one % 3) for one in range(_ENDPOINTS)),
        )
        for number in range(count)
    ]


def _probe(number: int) -> Service:
    backend = Backend(ipaddress.ip_address(BACKENDS4[number % 2]), _PORT)
    return Service("probe", ipaddress.ip_address(_VIP), 80, "tcp", (backend,))


def _serve(address: str) -> None:
    with socket.create_server((address, _PORT), backlog=512) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(address.encode())


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def _print(command: str, runs: Sequence[Run]) -> None:
    console = Console()
    console.width = max(console.width, 150)
    console.print(f"{this_machine()}, Python {platform.python_version()}", highlight=False)
    console.print(f"Command: {command}", highlight=False)
    table = Table()
    names = ("services", "endpoints", "first sync, s", "a look at all, s", "change seen p50, ms", "p99, ms")
    for name in (*names, "written p50, ms", "p99, ms", "resident, MiB"):
        table.add_column(name, justify="right")
    for run in runs:
        table.add_row(
            f"{run.services:,}",
            f"{run.endpoints:,}",
            f"{run.first_sync:.3f}",
            f"{run.resync:.3f}",
            f"{statistics.median(run.seen) * 1e3:.2f}",
            f"{_p99(run.seen) * 1e3:.2f}",
            f"{statistics.median(run.written) * 1e3:.2f}",
            f"{_p99(run.written) * 1e3:.2f}",
            f"{run.resident / 2**20:.0f}",
        )
    console.print(table)
    for small, large in itertools.pairwise(runs):
        console.print(
            f"From {small.services:,} to {large.services:,} services, {large.services / small.services:.0f} times as "
            f"many: first sync {large.first_sync / small.first_sync:.1f} times as long, a look at all "
            f"{large.resync / small.resync:.1f} times, a change seen (p50) "
            f"{statistics.median(large.seen) / statistics.median(small.seen):.1f} times, resident "
            f"{large.resident / small.resident:.1f} times.",
            highlight=False,
        )


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) * 99 // 100, len(values) - 1)]


if __name__ == "__main__":
    sys.exit(main())
