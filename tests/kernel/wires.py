"""Veth pairs between two namespaces of a test's own, and UDP packets over them that the sender counts."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from hitless.kernel.interfaces import Interface, interfaces
from hitless.kernel.libbpf import check, ffi, lib
from hitless.kernel.maps import Map
from hitless.kernel.namespaces import Namespace, entered
from hitless.kernel.programs import Program, load_object
from meshd.demo.lab import Lab
from tests.releases import compile_object

PORT = 7007  # 27 * 256 + 95
_BURST = 16

# Counts UDP packets to PORT, whole Ethernet frames as both hooks see them, and lets everything pass.
_COUNTER = """
MAP(packets, ARRAY, 1, __u32, __u64);
static void count(unsigned char *at, unsigned char *end)
{
    __u32 zero = 0;
    __u64 *found = bpf_map_lookup_elem(&packets, &zero);
    if (found && at + 42 <= end && at[12] == 8 && at[13] == 0 && at[23] == 17 && at[36] == 27 && at[37] == 95)
        __sync_fetch_and_add(found, 1);
}
SEC("tc") int count_filter(struct __sk_buff *ctx)
{
    bpf_skb_pull_data(ctx, 42);
    count((void *)(long)ctx->data, (void *)(long)ctx->data_end);
    return -1;
}
SEC("xdp") int count_xdp(struct xdp_md *ctx)
{
    count((void *)(long)ctx->data, (void *)(long)ctx->data_end);
    return XDP_PASS;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""


class Counter:
    """Programs for both hooks that count in a map of their own."""

    def __init__(self, data: bytes) -> None:
        loaded = load_object(data, "counter", {}, {})
        self.filter: Program = loaded.programs["count_filter"]
        self.xdp: Program = loaded.programs["count_xdp"]
        self._map: Map = loaded.maps["packets"]

    @property
    def packets(self) -> int:
        value = ffi.new("__u64 *")
        check(lib().bpf_map_lookup_elem_flags(self._map.fd, ffi.new("__u32 *"), value, 0), "lookup", "packets")
        return int(value[0])


def compile_counter(directory: Path) -> Callable[[], Counter]:
    data = compile_object(_COUNTER, directory / "counter.bpf.o").read_bytes()
    return lambda: Counter(data)


class Wire(msgspec.Struct, frozen=True):
    """A veth pair from one namespace to another: packets leave at ``near`` and arrive at ``far``."""

    near: Interface
    far: Interface


@contextlib.contextmanager
def wires(count: int = 1) -> Iterator[list[Wire]]:
    """``count`` pairs between the namespaces of two new labs."""
    with Lab() as near, Lab() as far:
        ends = [(f"w{n}", f"10.9.{n}.{{}}", f"02:00:00:00:{n:02x}:0{{}}") for n in range(count)]
        made = [f"link add {name} type veth peer name {name} netns {far.name}" for name, _, _ in ends]
        up = [
            [f"{verb} {what} dev {name} {state}" for name, address, mac in ends for verb, what, state in (
                ("addr add", f"{address.format(side)}/24", ""), ("link set", f"address {mac.format(side)}", "up"),
            )]
            for side in (1, 2)
        ]  # fmt: skip
        known = [f"neigh add {address.format(2)} lladdr {mac.format(2)} dev {name}" for name, address, mac in ends]
        _batch(near.name, *made, *up[0])
        _batch(far.name, *up[1])
        _batch(near.name, *known)
        sides = [interfaces("w*", Namespace.at(str(lab.netns))) for lab in (near, far)]
        by_name = [{interface.name: interface for interface in side} for side in sides]
        yield [Wire(by_name[0][name], by_name[1][name]) for name, _, _ in ends]


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


def _batch(name: str, *lines: str) -> None:
    subprocess.run(["ip", "-n", name, "-batch", "-"], input="\n".join(lines), text=True, check=True)


class Traffic:
    """Packets over a wire while the block runs, a few at a time: ``sent`` of them, of which ``received`` arrived."""

    def __init__(self, wire: Wire) -> None:
        self.sent = self.received = 0
        with entered(wire.far.namespace):
            self._far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._far.bind(("0.0.0.0", PORT))
            self._far.settimeout(1)
        with entered(wire.near.namespace):
            self._near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._near.connect((f"10.9.{wire.near.name[1:]}.2", PORT))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set() and self.sent == self.received:
            for _ in range(_BURST):
                self.sent += self._near.send(b"x")
            with contextlib.suppress(TimeoutError):
                for _ in range(_BURST):
                    self.received += len(self._far.recv(16))

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._near.close()
        self._far.close()
