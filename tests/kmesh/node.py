"""A node that a daemon like Kmesh's runs, started by its own loader: nine objects, pods, 100,000 entries, traffic."""

from __future__ import annotations

import ctypes
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hitless.kernel.filters import filters
from hitless.kernel.interfaces import Interface, interfaces
from hitless.kernel.links import Link
from hitless.kernel.maps import Map, possible_cpus
from hitless.kernel.namespaces import Namespace
from hitless.kernel.programs import Program
from hitless.kernel.xdp import Xdp
from hitless.layout.model import Record
from meshd.demo.lab import BACKENDS6, Lab
from meshd.demo.pods import Pods
from tests.kmesh.bundles import VERSIONS, snapshot_of, variables
from tests.kmesh.structs import RENAMED, SCHEMAS

__all__ = ["Built", "KmeshNode", "Loader", "Start", "Table", "Traffic", "build", "differences"]

HERE = Path(__file__).parent
SOURCES = tuple(sorted((HERE / "bpf").glob("*.bpf.c")))

SERVICE, BACKEND = 1 << 24, 2 << 24
WEB = {"10.96.0.1": 1, "10.96.0.2": 2, "10.96.0.3": 3}
WEB6 = {"fd00:96::1": 4}
DENIED = {"10.96.0.4": 5}
DNS = {"10.96.0.10": 6}
SERVICES = WEB | WEB6 | DENIED | DNS
"""Addresses that lead nowhere by themselves, and the numbers of their services."""
TCP, UDP = 8080, 5353
PODS = 3
HOOKS = ("connect4", "connect6", "sockops", "sk_msg", "skb_ingress", "skb_egress", "xdp", "lost")

Rows = npt.NDArray[np.void]
Columns = Mapping[str, Sequence[Any]]


class Built(msgspec.Struct, frozen=True):
    """The compiled fixture: objects of each release with debug information, and ``stripped`` of it, and the loader."""

    objects: Mapping[int, Path]
    stripped: Mapping[int, Path]
    headers: Mapping[int, Path]
    loader: Path


def build(directory: Path) -> Built:
    """Compile all of it."""
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    loader = directory / "loader"
    commands = [["gcc", "-O2", "-Wall", "-Werror", str(HERE / "loader.c"), "-lbpf", "-o", str(loader)]]
    made, stripped, headers = {}, {}, {}
    for release in (1, 2):
        headers[release] = HERE / "bpf" / f"release{release}" / "maps.h"
        made[release], stripped[release] = directory / f"release{release}", directory / f"stripped{release}"
        made[release].mkdir()
        commands += [
            ["clang-19", "-target", "bpf", "-g", "-O2", "-Wall", "-Werror", f"-DRELEASE={release}", include,
             f"-I{headers[release].parent}", "-c", str(source), "-o", str(made[release] / f"{source.stem}.o")]
            for source in SOURCES
        ]  # fmt: skip
    _all(commands)
    for release in (1, 2):
        shutil.copytree(made[release], stripped[release])
    _all([["llvm-strip", "-g", str(path)] for one in stripped.values() for path in one.iterdir()])
    return Built(made, stripped, headers, loader)


def _all(commands: Sequence[Sequence[str]]) -> None:
    running: list[subprocess.Popen[bytes]] = []
    for command in commands:
        running.append(subprocess.Popen(command))
        if len(running) >= 2 * (os.cpu_count() or 1):
            _finish(running.pop(0))
    for each in running:
        _finish(each)


def _finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait(120):
        raise subprocess.CalledProcessError(process.returncode, process.args)


class MapStart(msgspec.Struct, frozen=True):
    """What a loader said of a map: the kernel's id, and whether it was there before."""

    id: int
    reused: bool


class Start(msgspec.Struct, frozen=True):
    """What a loader said: how it started, and its maps."""

    start: str
    maps: dict[str, MapStart]

    @property
    def pinned(self) -> dict[str, MapStart]:
        """Those that are pinned: all but global variables."""
        return {name: one for name, one in self.maps.items() if "." not in name}


class LoaderError(Exception):
    """It ended with an error, which it tells."""


class Loader:
    """The daemon as a process, with what it said when it ``started``."""

    def __init__(self, process: subprocess.Popen[str], started: Start) -> None:
        self._process = process
        self.started = started

    def stop(self) -> None:
        """As a DaemonSet's pod is stopped that is to come again: all stays as it is."""
        self._process.terminate()
        assert self._process.wait(10) == 0


class Table(msgspec.Struct, frozen=True):
    """All entries of a map, by its release's types; each has a row of values, in a per-CPU map one for each CPU."""

    keys: Rows
    values: Rows

    def rows(self) -> dict[tuple[Any, ...], dict[str, int]]:
        """Each entry's fields by name, lists left out; what several CPUs counted is summed up."""
        names = [name for name in self.values.dtype.names or () if not self.values.dtype[name].shape]
        return {
            _plain(key): {name: int(np.sum(value[name], dtype=np.uint64)) for name in names}
            for key, value in zip(self.keys, self.values, strict=True)
        }


def _plain(key: np.void) -> tuple[Any, ...]:
    return tuple(tuple(part.tolist()) if isinstance(part, np.ndarray) else part.item() for part in key)  # type: ignore[attr-defined]


def differences(before: Table, after: Table, but: Sequence[str] = ()) -> list[str]:
    """Entries that only one has, and fields that differ: new ones, which only ``after`` has, have to be 0.

    All fields are compared ``but`` those named; of each, three entries at most are told.
    """
    if len(before.keys) != len(after.keys):
        return [f"{len(before.keys)} entries, then {len(after.keys)}"]
    shared = [name for name in before.keys.dtype.names or () if name in (after.keys.dtype.names or ())]
    old_order, new_order = _order(before.keys, shared), _order(after.keys, shared)
    told = []
    for old, new in ((before.keys, after.keys), (before.values, after.values)):
        for name in new.dtype.names or ():
            there = new[name][new_order]
            was = old[name][old_order] if name in (old.dtype.names or ()) else np.zeros_like(there)
            wrong = (was != there).reshape(len(there), -1).any(axis=1)
            for index in np.flatnonzero(wrong)[:3] if name not in but else ():
                told.append(f"{name} of {after.keys[new_order][index]}: {was[index]}, then {there[index]}")
    return told


def _order(keys: Rows, fields: Sequence[str]) -> npt.NDArray[np.intp]:
    columns = [np.ascontiguousarray(keys[name]).view(np.uint8).reshape(len(keys), -1) for name in fields]
    return np.lexsort(np.concatenate(columns, axis=1).T)


class KmeshNode:
    """The node in a lab: pods with servers, and what its loader made below ``root``."""

    def __init__(self, lab: Lab, built: Built) -> None:
        """Pods and their servers; nothing is loaded yet."""
        self.lab = lab
        self.built = built
        self.root = lab.bpffs / "bpf_kmesh_workload"
        self.snapshot = lab.scratch / "kmesh_mapspecs" / "mapspecs_by_prog.json"
        self.pods = Pods(lab)
        servers = [
            self._server(["nsenter", f"--net={self.pods.directory / f'pod{number}'}"], f"10.9.{number}.2")
            for number in self.pods.add(PODS)
        ]
        servers.append(self._server([], BACKENDS6[0]))
        for server in servers:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"

    def _server(self, within: Sequence[str], address: str) -> subprocess.Popen[str]:
        script = [sys.executable, str(HERE / "peers.py"), "server", address, str(TCP), str(UDP)]
        return self.lab.popen([*within, *script], stdout=subprocess.PIPE)

    def start(
        self, release: int, version: str | None = None, objects: Path | None = None, pods: int | None = None
    ) -> Loader:
        """Start the daemon of a release, which manages the first ``pods``, or all.

        Raises LoaderError with its words, or "Update" if it would have to carry.
        """
        namespaces = sorted(self.pods.directory.iterdir())[:pods]
        command: list[str | Path] = [
            self.built.loader, objects or self.built.stripped[release], self.root, self.lab.cgroup,
            version or VERSIONS[release], *namespaces,
        ]  # fmt: skip
        process = self.lab.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        started = msgspec.json.decode(line, type=Start) if line else None
        if started is None or started.start == "Update":
            process.wait(10)
            raise LoaderError(started.start if started else process.stderr.read())
        if started.start == "Normal":
            self.snapshot.parent.mkdir(exist_ok=True)
            self.snapshot.write_bytes(snapshot_of(objects or self.built.stripped[release]))
        return Loader(process, started)

    def variables_of_bundles(self) -> dict[str, str]:
        """What this node fills into a bundle."""
        return variables(self.lab.cgroup, self.pods.directory, self.snapshot)

    def fill(self, release: int = 1, frontends: int = 100_000) -> None:
        """What the control plane writes: the services of the traffic, and others up to so many ``frontends``."""
        _Filling(self, release).all(frontends)

    def map(self, name: str) -> Map:
        """The map at its public path."""
        return Map.open(self.public(f"map/{name}"))

    def link(self, pin: str) -> Link:
        """The link at its public path."""
        return Link.open(self.public(pin))

    def public(self, pin: str) -> Path:
        """What is pinned below the root, or where that leads to: hitless's own eyes do not follow links."""
        return (self.root / pin).resolve()

    def dump(self, release: int) -> dict[str, Table]:
        """All entries of all maps whose entries can be listed, under the release's names, by the release's types."""
        return {name: self.table(release, name) for name in SCHEMAS[release] if name != "km_orig_dst"}

    def table(self, release: int, name: str) -> Table:
        """All entries of one map."""
        key, value = SCHEMAS[release][name]
        with self.map(name) as held:
            info = held.info
            assert (info.key_size, info.value_size) == (key.itemsize, value.itemsize), name
            keys, values = held.entries()
        cpus = possible_cpus() if info.per_cpu else 1
        rows = values.reshape(len(keys), cpus, info.entry_size // cpus)[..., : value.itemsize]
        return Table(keys.view(key).reshape(len(keys)), np.ascontiguousarray(rows).view(value).reshape(-1, cpus))

    def variables(self) -> dict[str, int]:
        """All global variables, ``object.variable``, as the running programs have them."""
        with self.link("cgroup_sockops_prog") as link:
            sockops = link.info.program_id
        (decrypt,) = (one.program_id for one in filters(self.device("pod1"), "ingress") if one.priority == 2)
        return dict(_variables("sockops", sockops)) | dict(_variables("tc_mark_decrypt", decrypt))

    def device(self, pod: str) -> Interface:
        """A pod's interface."""
        (found,) = interfaces("eth0", Namespace.at(str(self.pods.directory / pod)))
        return found

    def programs_of_pods(self) -> dict[str, tuple[int, ...]]:
        """By pod, the kernel's ids of the programs on its interface: of XDP, then of filters, in and out."""
        found = {}
        for pod in sorted(self.pods.directory.iterdir()):
            device = self.device(pod.name)
            xdp = Xdp.find(device)
            both = (*filters(device, "ingress"), *filters(device, "egress"))
            found[pod.name] = (*((xdp.info.program_id,) if xdp else ()), *(one.program_id for one in both))
        return found

    def hooks(self, release: int) -> dict[str, dict[str, int]]:
        """What km_hooks counted, by hook."""
        rows = self.table(release, "km_hooks").rows()
        return {hook: rows[number,] for number, hook in enumerate(HOOKS)}

    def wrong(self, release: int, traffic: Traffic) -> list[str]:
        """Each count of the kernel's that is not what the paused clients did, and all that went wrong with them."""
        connects, messages = traffic.connects(), traffic.messages()
        denials = sum(traffic.now["denied"].denied.values())
        asked = sum(traffic.now["questions"].messages.values())
        by_pod = sum(connects[vip] for vip in WEB)
        hooks = self.hooks(release)
        tally = self.table(release, "km_tally" if release == 1 else RENAMED["km_tally"]).rows()
        policies = self.table(release, "km_authz_policies").rows()
        made: Counter[int] = Counter()
        for row in tally.values():
            made[row["last_service"]] += row["connects"]
        pods = self.table(release, "km_pods").rows()
        stored = traffic.storage(release)
        answers = sum(row["answers"] for row in self.table(release, "km_dns_orig").rows().values())
        pairs = {
            **{f"connects of {vip}": (made[SERVICE | number], connects[vip]) for vip, number in (WEB | WEB6).items()},
            **{f"policy of {vip}": (policies[number,]["hits"], connects[vip]) for vip, number in (WEB | WEB6).items()},
            "hits of the policy that denies": (policies[DENIED["10.96.0.4"],]["hits"], denials),
            "denied": (sum(row["denied"] for row in tally.values()), denials),
            "connect4": (hooks["connect4"]["packets"], by_pod + denials),
            "connect6": (hooks["connect6"]["packets"], connects["fd00:96::1"]),
            "established": (hooks["sockops"]["packets"], sum(connects.values())),
            "messages": (hooks["sk_msg"]["packets"], sum(messages.values())),
            "bytes of messages": (hooks["sk_msg"]["bytes"], 16 * sum(messages.values())),
            "packets of pods at XDP": (hooks["xdp"]["packets"], by_pod),
            "authorized": (sum(row["hits"] for row in self.table(release, "km_auth_res").rows().values()), by_pod),
            "questions that left": (hooks["skb_egress"]["packets"], asked),
            "answers that came": (hooks["skb_ingress"]["packets"], asked),
            "bytes of answers": (hooks["skb_ingress"]["bytes"], 44 * asked),
            "questions to pods": (sum(row["rx_udp"] for row in pods.values()), asked),
            "answers of pods": (sum(row["tx_udp"] for row in pods.values()), asked),
            "bytes of pods": (sum(row["rx_bytes"] for row in pods.values()), 58 * asked),
            "answers by their socket": (answers, asked),
            "tail calls that went nowhere": (hooks["lost"]["packets"], 0),
            **{f"messages of socket {one['fd']}": (kept["messages"], one["messages"]) for one, kept in stored},
            **{f"bytes of socket {one['fd']}": (kept["bytes"], 16 * one["messages"]) for one, kept in stored},
        }
        told = [f"{what}: {seen} in the kernel, {done} by clients" for what, (seen, done) in pairs.items()
                if seen != done]  # fmt: skip
        return [*told, *(f"{what}, {count} times" for what, count in traffic.failed().items())]

    @contextmanager
    def traffic(self, held: int = 50) -> Iterator[Traffic]:
        """Clients of all services, which go on until they are paused or ended."""
        made = Traffic(self, held)
        try:
            yield made
        finally:
            made.close()


def _variables(name: str, program: int) -> Iterator[tuple[str, int]]:
    with Program.by_id(program) as held:
        ids = held.map_ids
    for number in ids:
        with Map.by_id(number) as one:
            if not one.info.name.endswith(".bss"):
                continue
            data, layout = one.lookup(bytes(4)) or b"", one.spec("bss").value
        assert isinstance(layout, Record)
        for field in layout.fields:
            at = field.offset // 8
            yield f"{name}.{field.name}", int.from_bytes(data[at : at + field.type.size], sys.byteorder)


class Totals(msgspec.Struct, frozen=True):
    """What a client did: counts by address; ``failed`` has all that went wrong, ``gap`` is the longest step in s."""

    connects: dict[str, int]
    messages: dict[str, int]
    denied: dict[str, int]
    failed: dict[str, int]
    gap: float
    sockets: list[dict[str, Any]]


class Traffic:
    """Four clients: connections that are ``held``, ``short`` ones, ``denied`` ones, and ``questions`` by UDP."""

    def __init__(self, node: KmeshNode, held: int) -> None:
        """Each makes its first connections; then all wait to be told to :meth:`go`."""
        self._node = node
        _become_managed(node.lab)
        roles: dict[str, tuple[float, int, Mapping[str, int]]] = {
            "held": (0.0005, held, WEB | WEB6), "short": (0.002, 0, WEB | WEB6), "denied": (0.02, 0, DENIED),
            "questions": (0.002, 0, DNS),
        }  # fmt: skip
        self._clients = {role: self._start(role, *what) for role, what in roles.items()}
        self.now = {role: self._hear(client) for role, client in self._clients.items()}

    def _start(self, role: str, pause: float, count: int, targets: Mapping[str, int]) -> subprocess.Popen[str]:
        words = [f"{vip}:{53 if vip in DNS else 80}" for vip in targets]
        script = [sys.executable, str(HERE / "peers.py"), role, str(pause), str(count), *words]
        return self._node.lab.popen(script, "clients", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def go(self) -> None:
        """Let all of them go on."""
        self._say("go")

    def pause(self) -> dict[str, Totals]:
        """Let all of them finish the step they are at, and tell what they did; connections stay."""
        return self._say("pause")

    def end(self) -> dict[str, Totals]:
        """The same, and end them: their connections close."""
        return self._say("end")

    def failed(self) -> dict[str, int]:
        """All that went wrong, with how often."""
        return {f"{role}: {what}": count for role, one in self.now.items() for what, count in one.failed.items()}

    def connects(self) -> dict[str, int]:
        """Connections that came to be, by address."""
        return self._sum("connects", "held", "short")

    def messages(self) -> dict[str, int]:
        """Messages on them."""
        return self._sum("messages", "held", "short")

    def storage(self, release: int) -> list[tuple[dict[str, Any], dict[str, int]]]:
        """Of each held connection what its client says, and what the kernel has in the socket's storage."""
        kind = SCHEMAS[release]["km_orig_dst"][1]
        pidfd = os.pidfd_open(self._clients["held"].pid)
        told = []
        try:
            with self._node.map("km_orig_dst") as held:
                for one in self.now["held"].sockets:
                    fd = _fd_of(pidfd, one["fd"])
                    try:
                        (row,) = np.frombuffer(held.lookup(fd.to_bytes(4, sys.byteorder)) or b"", kind)
                    finally:
                        os.close(fd)
                    told.append((one, {name: int(row[name]) for name in kind.names or ()}))
        finally:
            os.close(pidfd)
        return told

    def close(self) -> None:
        """Kill those that are left."""
        for client in self._clients.values():
            client.kill()
            client.wait()

    def _sum(self, what: str, *roles: str) -> dict[str, int]:
        every = [getattr(self.now[role], what) for role in roles]
        return {vip: sum(one.get(vip, 0) for one in every) for vip in WEB | WEB6}

    def _say(self, word: str) -> dict[str, Totals]:
        for client in self._clients.values():
            assert client.stdin is not None
            client.stdin.write(f"{word}\n")
            client.stdin.flush()
        self.now = {role: self._hear(client) for role, client in self._clients.items()}
        return self.now

    @staticmethod
    def _hear(client: subprocess.Popen[str]) -> Totals:
        assert client.stdout is not None
        assert select.select([client.stdout], [], [], 20)[0], "a client hangs"
        return msgspec.json.decode(client.stdout.readline(), type=Totals)


def _become_managed(lab: Lab) -> None:
    """As the agent of a node does it: by a connection that is refused."""
    word = "import socket\ntry: socket.create_connection(('0.0.0.2', 929), 1)\nexcept PermissionError: print('managed')"
    assert lab.run_python("-c", word, cgroup="clients").stdout == "managed\n"


def _fd_of(pidfd: int, fd: int) -> int:
    """A descriptor of our own for another process's."""
    got = int(ctypes.CDLL(None, use_errno=True).syscall(438, pidfd, fd, 0))  # pidfd_getfd
    if got < 0:
        raise OSError(ctypes.get_errno(), f"pidfd_getfd {fd}")
    return got


class _Filling:
    def __init__(self, node: KmeshNode, release: int) -> None:
        self._node = node
        self._release = release

    def all(self, frontends: int) -> None:
        vips = {addr_of(vip): number for vip, number in SERVICES.items()}
        pods = [addr_of(f"10.9.{number}.2") for number in range(1, PODS + 1)]
        backends = {  # of each service: some of the pods, each under an id of its own
            1: [pods[0], pods[1]], 2: [pods[1], pods[2]], 3: [pods[2]], 4: [addr_of(BACKENDS6[0])], 5: [pods[0]],
            6: [pods[0]],
        }  # fmt: skip
        spare = 10_000
        others = range(frontends - len(vips))
        self._write(
            "km_frontend", frontends, {"addr": [*vips, *((_high(172, n), 0, 0, 0) for n in others)]},
            {"upstream_id": [*(SERVICE | n for n in vips.values()), *(BACKEND | 1000 + n % spare for n in others)]},
        )  # fmt: skip
        numbers = [*backends, *range(100, 1100)]
        self._write(
            "km_service", len(numbers), {"service_id": [SERVICE | n for n in numbers]},
            {
                "endpoint_count": [len(backends.get(n, [0] * 4)) for n in numbers],
                "policy_id": [n if n < 500 else 0 for n in numbers],
                "service_port": [(53 if n == 6 else 80, n) for n in numbers],
                "target_port": [(UDP if n == 6 else TCP, n) for n in numbers],
                "waypoint_id": [BACKEND | n for n in numbers],
            },
        )  # fmt: skip
        ends = [(n, index, 10 * n + index, addr) for n, each in backends.items() for index, addr in enumerate(each)]
        more = [(n, index, 1000 + (4 * n + index) % spare, (0, 0, 0, 0)) for n in numbers[6:] for index in range(4)]
        every = ends + more
        self._write(
            "km_endpoint", len(every),
            {"service_id": [SERVICE | n for n, *_ in every], "backend_index": [index for _, index, *_ in every]},
            {"backend_uid": [BACKEND | uid for *_, uid, _ in every]},
        )  # fmt: skip
        uids = [uid for *_, uid, _ in ends] + [1000 + n for n in range(spare)]
        self._write(
            "km_backend", len(uids), {"backend_uid": [BACKEND | uid for uid in uids]},
            {
                "addr": [*(addr for *_, addr in ends), *((_high(173, n), 0, 0, 0) for n in range(spare))],
                "service_count": [1 + uid % 4 for uid in uids],
                "services": [tuple(SERVICE | 100 + (uid + i) % 1000 for i in range(4)) for uid in uids],
            },
        )  # fmt: skip
        policies = list(range(1, 500))
        self._write(
            "km_authz_policies", len(policies), {"policy_id": policies},
            {"action": [int(n == DENIED["10.96.0.4"]) for n in policies], "port": [n + 7 for n in policies]},
        )  # fmt: skip
        many = range(1, 501)
        self._write("km_manage", 500, {"netns_cookie": [n << 40 for n in many]}, {"marked": list(many)})
        nets = [(24, _high(10, 9 << 16 | 1 << 8)), *((16 + n % 16, _high(20 + n, 0)) for n in range(100))]
        self._write(
            "km_nodeinfo", len(nets), {"prefix": [n for n, _ in nets], "addr": [addr for _, addr in nets]},
            {"spi": [n + 1 for n in range(len(nets))], "host": [7 * n for n in range(len(nets))]},
        )  # fmt: skip
        self._write("km_config", 1, {"number": [0]}, {"log_level": [3], "authz": [1]})

    def _write(self, name: str, count: int, key: Columns, value: Columns) -> None:
        kinds = SCHEMAS[self._release][name]
        columns = []
        for kind, fields in zip(kinds, (key, value), strict=True):
            rows = np.zeros(count, kind)
            for field, column in fields.items():
                rows[field] = np.array(column, dtype=kind[field].base)
            columns.append(rows.view(np.uint8).reshape(count, -1))
        with self._node.map(name) as held:
            held.write(*columns)


def addr_of(text: str) -> tuple[int, ...]:
    """An address as maps have it: four numbers, of IPv4 the first only."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    parts = np.frombuffer(socket.inet_pton(family, text), np.uint32).tolist()
    return tuple([*parts, 0, 0, 0][:4])


def _high(first: int, number: int) -> int:
    """The address ``first``.x.y.z, where x.y.z is ``number``, in network order."""
    return int.from_bytes((first << 24 | number).to_bytes(4, "big"), sys.byteorder)
