"""The access log: a record for each connection to a service that is over or was not to be, from the kernel's ring."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal

import msgspec

from hitless.errors import NodeError
from meshd.model import Address
from meshd.tables import PROTOCOLS, address_of

if TYPE_CHECKING:
    import hitless

__all__ = ["AccessLog", "Connection", "End"]

_RECORD = struct.Struct("=QQQQQ16s2sBx16s2sBxIIII")
Verdict = Literal["closed", "failed", "refused", "denied"]
_VERDICTS: tuple[Verdict, ...] = ("closed", "failed", "refused", "denied")
_NAMES = {number: name for name, number in PROTOCOLS.items()}


class End(msgspec.Struct, frozen=True):
    """One end of a connection."""

    address: Address
    port: int


class Connection(msgspec.Struct, frozen=True):
    """What became of a connection.

    ``start`` and ``end`` are seconds of CLOCK_MONOTONIC; ``client`` is the client's cgroup id, ``sent`` and
    ``received`` are the client's bytes, ``rtt`` its smoothed round trip in seconds. ``verdict``: ``closed`` after it
    was established, ``failed`` before it was, ``refused`` because the service had no backend, ``denied`` by a policy;
    ``backend`` is None in these two. Of UDP there are only these two.
    """

    verdict: Verdict
    protocol: str
    service: End
    backend: End | None
    client: int
    start: float
    end: float
    sent: int
    received: int
    rtt: float
    retransmits: int


class AccessLog:
    """Takes the records of the mesh on ``node``; there is one reader of a ring.

    Raises NodeError where no mesh is live, or its release has no access log.
    """

    def __init__(self, node: hitless.Node) -> None:
        live = node.observe().current
        if live is None:
            raise NodeError(f"no mesh is live under {node.root}: start one with `meshd run`", path=str(node.root))
        if "access" not in live.maps:
            raise NodeError(
                f"release {live.record.version}, which is live under {node.root}, has no access log: "
                "start a newer one with `meshd run --access-log`",
                path=str(node.root),
            )
        self._ring = node.ring("access")

    def take(self) -> list[Connection]:
        """What was logged since the last call. Raises NodeError where the release has no access log any more."""
        return [_connection(record) for record in self._ring.take()]


def _connection(record: bytes) -> Connection:
    values = _RECORD.unpack_from(record)
    start, end, client, sent, received, address, port, protocol, behind, behind_port, _, rtt, lost, verdict, _ = values
    backend = End(address_of(behind), int.from_bytes(behind_port, "big"))
    return Connection(
        verdict=_VERDICTS[verdict],
        protocol=_NAMES.get(protocol, str(protocol)),
        service=End(address_of(address), int.from_bytes(port, "big")),
        backend=backend if backend.port else None,
        client=client,
        start=start / 1e9,
        end=end / 1e9,
        sent=sent,
        received=received,
        rtt=rtt / 1e6,
        retransmits=lost,
    )
