"""The releases of the mesh that this package bundles, and how each lays out what the control plane writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from meshd.model import Protocol

__all__ = ["RELEASES", "Release"]


class Release(msgspec.Struct, frozen=True):
    """One release: its number, its version, and how much of the control plane's wishes it can hold.

    ``services`` and ``policies`` are the sizes of its maps in entries, ``backends`` is per service; ``protocols`` are
    those it serves. With ``tables`` a service's backends are in a table of slots (:mod:`meshd.tables`), and there are
    affinity and policies by addresses; without, they are in the service's entry. ``backend_unused`` and ``policy_new``
    are fields of that layout that the control plane has no opinion about, with the value that a new entry gets.
    ``all_backends`` is over all services, None where each may have as many as fit in its entry.
    """

    number: int
    version: str
    services: int
    policies: int
    backends: int
    protocols: tuple[Protocol, ...] = ("tcp",)
    tables: bool = False
    all_backends: int | None = None
    backend_unused: dict[str, Any] = {}
    policy_new: dict[str, Any] = {}

    @property
    def bundle(self) -> Path:
        """The bundle directory."""
        return Path(__file__).parent / "bpf" / f"v{self.number}"


RELEASES = {
    release.number: release
    for release in (
        Release(1, "1.0.0", services=1024, policies=4096, backends=8, policy_new={"hits": 0}),
        Release(
            2, "2.0.0", services=2048, policies=4096, backends=8, backend_unused={"zone": 0}, policy_new={"hits": 0}
        ),
        Release(
            3,
            "3.0.0",
            services=2048,
            policies=4096,
            backends=16,
            backend_unused={"zone": 0},
            policy_new={"hits": 0, "last_ns": 0},
        ),
        # Half of its slots are for tables that are written beside those that they replace.
        Release(
            4,
            "4.0.0",
            services=65536,
            policies=16384,
            backends=16384,
            protocols=("tcp", "udp"),
            tables=True,
            all_backends=1 << 19,
        ),
    )
}
