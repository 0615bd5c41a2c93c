"""Bring the live maps to what is desired by writing only what differs.

What programs write (a policy's hits) is never set back: a policy entry is written only when it is missing or its
action differs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

from meshd.desired import Desired, entries, policy_key, service_key
from meshd.model import NOWHERE, Locality, Policy, Service
from meshd.registry import Frontend, News
from meshd.releases import Release
from meshd.switching import Changes, TableWriter

if TYPE_CHECKING:
    import hitless

__all__ = ["Changes", "Writer", "reconcile", "sweep_flows"]

_CLOSED = 3
_CONNECTING = 1
# The kernel gives up a connect after about 130 s (tcp_syn_retries 6).
_CONNECT_NS = 180 * 10**9


class Writer:
    """Keeps the maps of ``node`` as the news say that it hears, in the layout of ``release``.

    ``here`` is where the node is, by which near backends are told; ``access_log`` says whether the programs write
    one, where the release has it.
    """

    def __init__(
        self, node: hitless.Node, release: Release, here: Locality = NOWHERE, access_log: bool = False
    ) -> None:
        self._by_table = TableWriter(node, here, access_log) if release.tables else None
        self._node = node
        self._release = release
        self._here = here
        self._services: dict[Frontend, Service] = {}
        self._policies: tuple[tuple[Policy, Frontend | None], ...] = ()

    def write(self, news: News) -> Changes:
        """Bring the news into the maps and return what that took. After an error :meth:`resync` puts all right."""
        if self._by_table is not None:
            return self._by_table.write(news)
        for frontend, service in news.services.items():
            if service is None:
                self._services.pop(frontend, None)
            else:
                self._services[frontend] = service
        if news.policies is not None:
            self._policies = news.policies
        wanted = entries(self._services.values(), self._policies, self._release, self._here)
        return reconcile(self._node, wanted)

    def resync(self, everything: News) -> Changes:
        """Read the maps, make them hold ``everything`` and nothing else, and return what that took."""
        if self._by_table is not None:
            return self._by_table.resync(everything)
        self._services.clear()
        return self.write(everything)


def reconcile(node: hitless.Node, wanted: Desired) -> Changes:
    """Make the maps ``service`` and ``policy`` of ``node`` hold what is ``wanted`` and return what that took.

    Safe to repeat, also after an error half-way. Raises HitlessError when a map cannot be read or written.
    """
    service, policy = node.map("service"), node.map("policy")
    services = {service_key(key): value for key, value in _entries(service)}
    policies = {policy_key(key): value for key, value in _entries(policy)}

    # A service is never reachable without its policies: they come before it and go after it.
    policy_writes = [
        (key.to_map(), (policies.get(key) or wanted.policy_new) | {"action": action})
        for key, action in wanted.policies.items()
        if key not in policies or policies[key]["action"] != action
    ]
    service_writes = [(key.to_map(), value) for key, value in wanted.services.items() if services.get(key) != value]
    if policy_writes:
        policy.update_many(policy_writes)
    if service_writes:
        service.update_many(service_writes)
    service_gone = [key.to_map() for key in services if key not in wanted.services]
    policy_gone = [key.to_map() for key in policies if key not in wanted.policies]
    # Some may be gone already: their connection ended meanwhile, or an earlier try got this far.
    service.delete_many(service_gone)
    policy.delete_many(policy_gone)

    new = sum(key not in services for key in wanted.services) + sum(key not in policies for key in wanted.policies)
    return Changes(
        added=new,
        changed=len(policy_writes) + len(service_writes) - new,
        removed=len(service_gone) + len(policy_gone),
    )


def sweep_flows(node: hitless.Node, now_ns: int | None = None) -> int:
    """Delete flow entries of connections that are over, and return how many there were.

    Those are entries in state closed, left as word to an upgrade that still copied the connection, and those that
    began to connect so long ago that the kernel has given up. Not to be called during an upgrade. ``now_ns`` is
    CLOCK_MONOTONIC.
    """
    now = time.monotonic_ns() if now_ns is None else now_ns
    flow = node.map("flow")
    return flow.delete_many(key for key, value in _entries(flow) if _is_over(value, now))


def _entries(handle: hitless.MapHandle) -> list[tuple[Any, dict[str, Any]]]:
    # All maps of the mesh have structs as values.
    return cast("list[tuple[Any, dict[str, Any]]]", handle.items())


def _is_over(value: dict[str, Any], now_ns: int) -> bool:
    times = value["times"]
    began = times["start_ns"] if "start_ns" in times else times["opened_ns"]
    state: int = value["state"]
    return state == _CLOSED or (state == _CONNECTING and began + _CONNECT_NS < now_ns)
