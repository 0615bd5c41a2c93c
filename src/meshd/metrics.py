"""Figures for Prometheus: what the kernel's maps say when they are asked for, and what the daemon has told."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

import hitless
from hitless.errors import HitlessError
from meshd.health import Health
from meshd.keeper import Keeper
from meshd.seen import Seen, look
from meshd.web import Page

if TYPE_CHECKING:
    from meshd.kube import Announcer

__all__ = ["METRICS", "PHASES", "Definition", "Metrics"]

PHASES = (
    "none", "recover", "plan", "stage", "copy", "prepare", "verify", "cutover", "catch-up", "connections", "merge",
    "commit", "clean-up", "drain",
)  # fmt: skip
_STATES = ("opened", "denied", "established", "closed", "failed", "refused")


class Definition(msgspec.Struct, frozen=True):
    """A metric: ``kind``, its labels in order, and what it means."""

    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    help: str


_SERVICE = ("service", "address", "protocol")

METRICS: dict[str, Definition] = {
    "meshd_release_info": Definition("gauge", ("release", "live"), "1; the release of this daemon, and the live one"),
    "meshd_ready": Definition("gauge", (), "1 if the mesh is live and was verified, else 0"),
    "meshd_generation": Definition("gauge", (), "number of the live generation, 0 if there is none"),
    "meshd_hooks_expected": Definition("gauge", (), "hooks of the live release"),
    "meshd_hooks_attached": Definition("gauge", (), "those of them that run the program that they should"),
    "meshd_map_entries": Definition("gauge", ("map",), "entries of a map"),
    "meshd_map_max_entries": Definition("gauge", ("map",), "how many entries it has room for"),
    "meshd_upgrade_phase": Definition("gauge", ("phase",), "1 for the phase of the start or upgrade that runs, else 0"),
    "meshd_upgrades_total": Definition(
        "counter", ("start_type", "outcome"), "starts since this daemon began, outcome: done or failed"
    ),
    "meshd_upgrade_entries": Definition(
        "gauge", ("map", "what"), "entries of the last upgrade: found in the old map, copied, merged after the copy"
    ),
    "meshd_upgrade_lost_values": Definition("gauge", ("map",), "values that the last upgrade could not carry; 0"),
    "meshd_upgrade_step_seconds": Definition("gauge", ("step",), "how long a step of the last start or upgrade took"),
    "meshd_upgrade_cutover_seconds": Definition("gauge", (), "from the first hook to the last one of the last upgrade"),
    "meshd_upgrade_stale_window_seconds": Definition(
        "gauge", (), "from the first hook of the last upgrade until what old programs wrote was merged"
    ),
    "meshd_services": Definition("gauge", (), "services in force"),
    "meshd_policies": Definition("gauge", (), "policies in force"),
    "meshd_left_out": Definition("gauge", (), "services that cannot be had, each named by an event left-out"),
    "meshd_source_heard_timestamp_seconds": Definition("gauge", ("source",), "when a source was heard last"),
    "meshd_source_away": Definition("gauge", ("source",), "1 if it does not answer or says what cannot be used"),
    "meshd_map_writes_total": Definition("counter", ("change",), "entries added, changed and removed by this daemon"),
    "meshd_kept_age_seconds": Definition("gauge", (), "since the maps were last known to be as the sources say"),
    "meshd_events_total": Definition("counter", ("event",), "events told, by their names"),
    "meshd_errors_total": Definition("counter", ("code",), "errors told, by their codes"),
    "meshd_kubernetes_events_total": Definition("counter", ("outcome",), "Kubernetes events: posted, failed, dropped"),
    "meshd_service_connections_total": Definition(
        "counter", (*_SERVICE, "state"), "connections: opened, denied, established, closed, failed, refused"
    ),
    "meshd_service_sent_bytes_total": Definition("counter", _SERVICE, "bytes that backends acknowledged"),
    "meshd_service_received_bytes_total": Definition("counter", _SERVICE, "bytes that came from backends"),
    "meshd_service_retransmits_total": Definition("counter", _SERVICE, "segments sent again"),
    "meshd_service_rtt_seconds_total": Definition(
        "counter", _SERVICE, "sum of the smoothed round trips that connections ended with"
    ),
    "meshd_scrape_seconds": Definition("gauge", (), "how long it took to read the kernel's maps for this answer"),
    "meshd_scrape_failed": Definition("gauge", (), "1 if they could not be read, so that what is from them is missing"),
}

# Fields of the counters of later releases: their metrics, and what one of them is in its unit.
_FIELDS = {
    "sent": ("meshd_service_sent_bytes_total", 1.0),
    "received": ("meshd_service_received_bytes_total", 1.0),
    "retransmits": ("meshd_service_retransmits_total", 1.0),
    "srtt_us": ("meshd_service_rtt_seconds_total", 1e-6),
}

_Sample = tuple[str, tuple[str, ...], float]


class Metrics(Collector):
    """Collects when it is asked to. ``step`` is what an apply of this daemon is at; it ends with its event."""

    def __init__(self, node: hitless.Node, keeper: Keeper, health: Health, announcer: Announcer | None) -> None:
        self.step = "none"
        self._node = node
        self._keeper = keeper
        self._health = health
        self._announcer = announcer
        self._heard: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self._result: Mapping[str, Any] = {}
        self._guard = threading.Lock()  # of what is heard
        self._one = threading.Lock()  # reading all maps is work: for one at a time
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def page(self) -> Page:
        """All metrics in the text format of Prometheus."""
        with self._one:
            return Page(200, generate_latest(self._registry), CONTENT_TYPE_LATEST)

    def hear(self, event: Mapping[str, Any]) -> None:
        """Count an event of the daemon; see :class:`~meshd.events.Listener`."""
        name = event["event"]
        with self._guard:
            self._heard["meshd_events_total", (name,)] += 1
            if name == "config":
                for change in ("added", "changed", "removed"):
                    self._heard["meshd_map_writes_total", (change,)] += event[change]
            elif name == "error":
                self._heard["meshd_errors_total", (event["code"],)] += 1
            elif name in ("ready", "upgraded"):
                self.step, self._result = "none", event["result"]
                self._heard["meshd_upgrades_total", (event["start_type"], "done")] += 1
            elif name == "upgrade-failed":
                self.step = "none"
                self._heard["meshd_upgrades_total", ("update", "failed")] += 1

    def describe(self) -> Iterable[Metric]:
        """None: what is collected is not looked up when it is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics as they are now."""
        samples: dict[str, list[tuple[tuple[str, ...], float]]] = {name: [] for name in METRICS}
        for name, labels, value in self._samples():
            samples[name].append((labels, value))
        for name, defined in METRICS.items():
            make = GaugeMetricFamily if defined.kind == "gauge" else CounterMetricFamily
            family = make(name, defined.help, labels=defined.labels)
            for labels, value in samples[name]:
                family.add_metric(labels, value)
            yield family

    def _samples(self) -> Iterator[_Sample]:
        began = time.monotonic()
        try:
            seen = look(self._node)
        except HitlessError:
            seen = None  # nothing is said of it here: /readyz and an event say why
        yield "meshd_scrape_seconds", (), time.monotonic() - began
        yield "meshd_scrape_failed", (), float(seen is None)
        state = self._keeper.state()
        if seen is not None:
            yield from _of_kernel(seen, state.names)
        yield "meshd_release_info", (self._keeper.version, (seen.version if seen is not None else None) or ""), 1.0
        yield "meshd_ready", (), float(not self._health.ready())
        for phase in PHASES:
            yield "meshd_upgrade_phase", (phase,), float(phase == self.step)
        yield "meshd_services", (), state.counts["services"]
        yield "meshd_policies", (), state.counts["policies"]
        yield "meshd_left_out", (), state.left_out
        for source, heard in state.sources.items():
            yield "meshd_source_heard_timestamp_seconds", (source,), heard
            yield "meshd_source_away", (source,), float(source in state.away)
        if self._keeper.kept_at:
            yield "meshd_kept_age_seconds", (), time.monotonic() - self._keeper.kept_at
        if self._announcer is not None:
            for outcome, count in self._announcer.counts.items():
                yield "meshd_kubernetes_events_total", (outcome,), count
        with self._guard:
            heard_of, result = dict(self._heard), self._result
        for (name, labels), count in heard_of.items():
            yield name, labels, count
        yield from _of_result(result)


def _of_kernel(seen: Seen, names: Mapping[Any, str]) -> Iterator[_Sample]:
    yield "meshd_generation", (), seen.generation
    yield "meshd_hooks_expected", (), seen.hooks
    yield "meshd_hooks_attached", (), seen.attached
    for name, filled in seen.maps.items():
        yield "meshd_map_entries", (name,), filled.entries
        yield "meshd_map_max_entries", (name,), filled.max_entries
    for frontend, counters in seen.counters.items():
        where = f"[{frontend.address}]" if frontend.address.version == 6 else str(frontend.address)
        labels = (names.get(frontend, ""), f"{where}:{frontend.port}", frontend.protocol)
        for field, count in counters.items():
            if field in _STATES:
                yield "meshd_service_connections_total", (*labels, field), count
            elif field in _FIELDS:
                metric, unit = _FIELDS[field]
                yield metric, labels, count * unit


def _of_result(result: Mapping[str, Any]) -> Iterator[_Sample]:
    for one in result.get("maps", ()):
        if one["action"] == "convert":
            for what, field in (("found", "entries"), ("copied", "copied"), ("merged", "caught_up")):
                yield "meshd_upgrade_entries", (one["name"], what), one[field]
        yield "meshd_upgrade_lost_values", (one["name"],), one["lost"]
    for step, seconds in result.get("steps", {}).items():
        yield "meshd_upgrade_step_seconds", (step,), seconds
    if "cutover" in result:
        yield "meshd_upgrade_cutover_seconds", (), result["cutover"]["first_to_last_us"] / 1e6
        yield "meshd_upgrade_stale_window_seconds", (), result["cutover"]["stale_window_us"] / 1e6
