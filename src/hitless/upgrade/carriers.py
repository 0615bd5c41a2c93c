"""The carrier of each kind that :mod:`hitless.carry` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hitless.upgrade.carrier import Carrier, Passage
from hitless.upgrade.copy import carry_entries, carry_in_kernel
from hitless.upgrade.inner_maps import carry_inner_maps
from hitless.upgrade.mirror import carry_mirrored
from hitless.upgrade.queue import carry_queue
from hitless.upgrade.references import carry_references
from hitless.upgrade.ring import carry_ring
from hitless.upgrade.sockets import carry_sockets
from hitless.upgrade.storage import carry_storage

__all__ = ["CARRIERS"]

CARRIERS: Mapping[str, Callable[[Passage], Carrier]] = {
    "entries": carry_entries,
    "entries-in-kernel": carry_in_kernel,
    "inner-maps": carry_inner_maps,
    "mirrored": carry_mirrored,
    "queue": carry_queue,
    "references": carry_references,
    "ring": carry_ring,
    "storage": carry_storage,
    "sockets": carry_sockets,
}
