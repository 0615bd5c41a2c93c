"""What the maps of both releases hold, written down by hand from bpf/release*/maps.h.

So it is not hitless that says what its own work is to be measured by.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import cast

import numpy as np

__all__ = ["RENAMED", "SCHEMAS", "Schema"]

U8, U16, U32, U64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64

Fields = tuple[tuple[str, type], ...]
Schema = tuple[np.dtype[np.void], np.dtype[np.void]]

RENAMED = {"km_tally": "km_backend_stats"}
"""Names of release 1 that are others in release 2."""

NUMBER: Fields = (("number", U32),)
ADDR: Fields = (("addr", U32 * 4),)

# Of each map: the key's fields and the value's, in release 1, and in release 2 where they are others.
_FIRST: dict[str, tuple[Fields, Fields]] = {
    "kmesh_version": (NUMBER, (("hash", U32),)),
    "km_config": (NUMBER, (("log_level", U32), ("authz", U8))),
    "km_frontend": (ADDR, (("upstream_id", U32),)),
    "km_service": (
        (("service_id", U32),),
        (("endpoint_count", U32), ("policy_id", U32), ("service_port", U16 * 2), ("target_port", U16 * 2),
         ("waypoint_id", U32)),
    ),
    "km_endpoint": ((("service_id", U32), ("backend_index", U32)), (("backend_uid", U32),)),
    "km_backend": ((("backend_uid", U32),), (*ADDR, ("service_count", U32), ("services", U32 * 4))),
    "km_authz_policies": ((("policy_id", U32),), (("action", U32), ("port", U32), ("hits", U64))),
    "km_manage": ((("netns_cookie", U64),), (("marked", U32),)),
    "km_tally": ((("backend_uid", U32),), (("connects", U32), ("denied", U32), ("last_service", U64))),
    "km_auth_res": (
        (("saddr", U32), ("daddr", U32), ("dport", U16), ("unused", U16)), (("verdict", U8), ("hits", U32)),
    ),
    "km_pods": (ADDR, (("rx_udp", U32), ("tx_udp", U32), ("rx_bytes", U64), ("tx_bytes", U64))),
    "km_hooks": (NUMBER, (("packets", U64), ("bytes", U64))),
    "km_nodeinfo": ((("prefix", U32), ("addr", U32)), (("spi", U32), ("host", U32))),
    "km_dns_orig": ((("cookie", U64),), (("addr", U32), ("port", U16), ("unused", U16), ("answers", U32))),
    "km_orig_dst": (
        (("fd", U32),),
        (("vip", U32), ("vip_port", U32), ("service_id", U32), ("backend_uid", U32), ("messages", U32),
         ("bytes", U32)),
    ),
}  # fmt: skip
_SECOND: dict[str, tuple[Fields, Fields]] = {
    "km_config": (NUMBER, (("log_level", U32), ("authz", U8), ("period", U8))),
    "km_frontend": (ADDR, (("upstream_id", U32), ("zone", U32))),
    "km_service": (
        (("service_id", U32),),
        (("endpoint_count", U32), ("lb_policy", U32), ("policy_id", U32), ("service_port", U16 * 2),
         ("target_port", U16 * 2), ("waypoint_id", U32)),
    ),
    "km_endpoint": ((("service_id", U32), ("backend_index", U32), ("prio", U32)), (("backend_uid", U32),)),
    "km_backend": (
        (("backend_uid", U32),), (*ADDR, ("service_count", U32), ("services", U32 * 4), ("region", U32)),
    ),
    "km_authz_policies": ((("policy_id", U32),), (("action", U32), ("rule", U32), ("port", U32), ("hits", U64))),
    "km_backend_stats": ((("backend_uid", U32),), (("connects", U64), ("denied", U64), ("last_service", U64))),
    "km_auth_res": (
        (("saddr", U32), ("daddr", U32), ("dport", U16), ("unused", U16)),
        (("verdict", U8), ("reason", U8), ("hits", U32)),
    ),
    "km_pods": (ADDR, (("rx_udp", U64), ("tx_udp", U64), ("rx_bytes", U64), ("tx_bytes", U64))),
    "km_hooks": (NUMBER, (("packets", U64), ("dropped", U64), ("bytes", U64))),
    "km_nodeinfo": ((("prefix", U32), ("addr", U32)), (("spi", U32), ("host", U32), ("epoch", U64))),
    "km_dns_orig": (
        (("cookie", U64),), (("addr", U32), ("port", U16), ("unused", U16), ("answers", U32), ("asked", U32)),
    ),
    "km_orig_dst": (
        (("fd", U32),),
        (("vip", U32), ("vip_port", U32), ("service_id", U32), ("backend_uid", U32), ("first_seen", U64),
         ("messages", U64), ("bytes", U64)),
    ),
    "km_waypoint": ((("addr", U32),), (("asked", U64),)),
}  # fmt: skip


def _schemas() -> Iterator[dict[str, Schema]]:
    after = {name: fields for name, fields in _FIRST.items() if name not in RENAMED} | _SECOND
    for release in (_FIRST, after):
        yield {name: (_dtype(key), _dtype(value)) for name, (key, value) in release.items()}


def _dtype(fields: Fields) -> np.dtype[np.void]:
    # As C lays it out, which is what ctypes does.
    return cast("np.dtype[np.void]", np.dtype(type("fields", (ctypes.Structure,), {"_fields_": list(fields)})))


SCHEMAS = dict(enumerate(_schemas(), 1))
"""The types of keys and values, by release and map."""
