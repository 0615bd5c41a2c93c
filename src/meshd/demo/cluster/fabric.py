"""Nodes as network namespaces on one switch. Nothing leads out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from hitless.errors import NodeError
from meshd.demo.lab import CLIENT4, CLIENT6, Lab

__all__ = ["CONTROL", "Fabric", "fabric"]

CONTROL = "10.9.0.1"
"""The address of the switch's own namespace, where the control plane is."""

_EACH = 8  # addresses of backends on a node, of each family


class Fabric:
    """The ``switch``, in whose namespace the control plane runs, and the ``nodes``, each a lab of its own.

    Node ``n`` (from 0) has the backends ``backends4[n]`` and ``backends6[n]``, and reaches those of the others. The
    addresses of services lead nowhere: a connection that the mesh does not redirect fails at once.
    """

    def __init__(self, switch: Lab, nodes: Sequence[Lab]) -> None:
        self.switch = switch
        self.nodes = tuple(nodes)
        self.backends4 = tuple(backends4(number) for number in range(len(nodes)))
        self.backends6 = tuple(backends6(number) for number in range(len(nodes)))
        _ip(switch, ["link add br0 type bridge", f"addr add {CONTROL}/24 dev br0", "link set br0 up"])
        for number, node in enumerate(nodes):
            self._connect(number, node)
        for number, node in enumerate(nodes):
            self._route(number, node)

    def _connect(self, number: int, node: Lab) -> None:
        _ip(self.switch, [f"link add node{number} type veth peer name eth0 netns {node.name}"])
        _ip(self.switch, [f"link set node{number} master br0 up"])
        _ip(
            node,
            [
                f"addr add {_on_wire4(number)}/24 dev eth0",
                f"addr add {_on_wire6(number)}/64 dev eth0 nodad",
                "link set eth0 up",
            ],
        )

    def _route(self, number: int, node: Lab) -> None:
        others = [other for other in range(len(self.nodes)) if other != number]
        _ip(node, [f"route add {a}/32 via {_on_wire4(o)}" for o in others for a in self.backends4[o]])
        _ip(node, [f"route add {a}/128 via {_on_wire6(o)}" for o in others for a in self.backends6[o]])


@contextmanager
def fabric(count: int) -> Iterator[Fabric]:
    """So many nodes on a switch, gone at the end. Raises UnsupportedError as a :class:`Lab` does."""
    with ExitStack() as labs:
        switch = labs.enter_context(Lab(()))
        nodes = [
            labs.enter_context(Lab((*backends4(number), *backends6(number), *CLIENT4, *CLIENT6)))
            for number in range(count)
        ]
        yield Fabric(switch, nodes)


def backends4(node: int) -> tuple[str, ...]:
    """The IPv4 addresses of a node's backends."""
    return tuple(f"10.1.{node + 1}.{each}" for each in range(1, _EACH + 1))


def backends6(node: int) -> tuple[str, ...]:
    """The IPv6 addresses of a node's backends."""
    return tuple(f"fd00:1:{node + 1}::{each}" for each in range(1, _EACH + 1))


def _on_wire4(node: int) -> str:
    return f"10.9.0.{node + 11}"


def _on_wire6(node: int) -> str:
    return f"fd00:9::{node + 11}"


def _ip(lab: Lab, lines: Sequence[str]) -> None:
    for line in lines:
        done = lab.run(["ip", *line.split()])
        if done.returncode:
            raise NodeError(f"the wires of the cluster cannot be laid: `ip {line}`: {done.stderr.strip()}")
