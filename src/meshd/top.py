"""``meshd top``: a live view of services, connections, rates, and an upgrade that runs, read from the kernel alone."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

import hitless
from hitless.errors import HitlessError
from meshd.registry import Frontend
from meshd.seen import Seen, look

__all__ = ["Row", "View", "show"]

_COLUMNS = ("opened", "denied", "established", "closed", "failed", "refused")
_TOTALS = ("opened", "denied", "failed", "refused")
_STYLES = {"state": "bold", "upgrade": "bold yellow", "error": "bold red"}
_FULL = 0.9  # of a map, from where on that is said in red


class Row(msgspec.Struct, frozen=True):
    """A service: what clients connect to, what was counted, connections ``open`` now, and what came per second."""

    address: str
    port: int
    protocol: str
    counters: dict[str, int]
    open: int
    rates: dict[str, float]


class View(msgspec.Struct, frozen=True):
    """A mesh at one moment, its services with the busiest first; ``error`` says why it could not be looked at."""

    root: str
    time: float
    seen: Seen = Seen()
    rows: tuple[Row, ...] = ()
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        seen = msgspec.to_builtins(msgspec.structs.replace(self.seen, counters={}))
        del seen["counters"]
        facts = {"error": {"message": self.error}} if self.error else {}
        return {
            "schema": 1, "root": self.root, "time": self.time, **seen, **facts,
            "services": msgspec.to_builtins(self.rows),
        }  # fmt: skip


def views(node: hitless.Node, every: float, count: int | None) -> Iterator[View]:
    """Look ``count`` times (None: without an end), ``every`` so many seconds; raises nothing that a node can cause."""
    before, last = Seen(), 0.0
    done = 0
    while True:
        now = time.monotonic()
        try:
            seen = look(node)
            rows = tuple(_rows(seen, before, now - last if last else 0.0))
            yield View(str(node.root), time.time(), seen, rows)
            before, last = seen, now
        except HitlessError as error:
            yield View(str(node.root), time.time(), before, error=error.message)
        done += 1
        if done == count:
            return
        time.sleep(max(now + every - time.monotonic(), 0.05))


def show(node: hitless.Node, every: float, once: bool, json: bool) -> int:
    """Show views until SIGINT or SIGTERM; returns the exit code: 1 if with ``once`` there was nothing to see."""
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    look_at = views(node, every, 1 if once else None)
    try:
        if json or once or not console.is_terminal:
            return _lines(look_at, json)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            for view in look_at:
                live.update(_screen(view, console.height), refresh=True)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more
    return 0


def _lines(look_at: Iterator[View], json: bool) -> int:
    code = 0
    for view in look_at:
        code = 1 if view.error or view.seen.version is None else 0
        text = msgspec.json.encode(view.to_json()).decode() if json else "\n".join(_plain(view))
        print(text, flush=True)
    return code


def _rows(seen: Seen, before: Seen, seconds: float) -> Iterator[Row]:
    rows = [_row(frontend, seen.counters[frontend], before, seconds) for frontend in seen.counters]
    yield from sorted(rows, key=lambda row: (-row.rates.get("opened", 0), -row.counters.get("opened", 0), row.address))


def _row(frontend: Frontend, counters: dict[str, int], before: Seen, seconds: float) -> Row:
    earlier = before.counters.get(frontend, {})
    rates = {
        name: max(count - earlier.get(name, 0), 0) / seconds for name, count in counters.items() if seconds
    }
    ended = counters.get("closed", 0)
    return Row(
        address=str(frontend.address),
        port=frontend.port,
        protocol=frontend.protocol,
        counters=counters,
        open=max(counters.get("opened", 0) - ended, 0),
        rates=rates,
    )


def _head(view: View) -> list[tuple[str, str]]:
    """The first lines, each with its kind."""
    seen = view.seen
    if seen.version is None:
        what = [] if view.error else [("state", f"{view.root}: no mesh is live")]
    else:
        hooks = f"hooks {seen.attached} of {seen.hooks}"
        what = [("state", f"{view.root}: release {seen.version}, generation {seen.generation}, {hooks}")]
    if seen.going_to is not None:
        was = "" if seen.upgrading is not None else " was interrupted; the next start of meshd finishes or undoes it"
        what.append(("upgrade", f"upgrade to {seen.going_to}: {seen.phase}{was}"))
    if view.error:
        what.append(("error", view.error))
    return what


def _fill(view: View) -> list[tuple[str, bool]]:
    """Each map with how full it is, and whether that is a lot."""
    return [
        (f"{name} {filled.entries}/{filled.max_entries}", filled.entries > _FULL * filled.max_entries)
        for name, filled in view.seen.maps.items()
    ]


def _services(count: int) -> str:
    return f"{count} service" if count == 1 else f"{count} services"


def _where(row: Row) -> str:
    address = f"[{row.address}]" if ":" in row.address else row.address
    return f"{address}:{row.port}" + (f"/{row.protocol}" if row.protocol != "tcp" else "")


def _plain(view: View) -> Iterator[str]:
    yield from (line for _, line in _head(view))
    if view.seen.maps:
        yield f"maps: {', '.join(text for text, _ in _fill(view))}"
    for row in view.rows:
        counted = " ".join(f"{name}={row.counters[name]}" for name in row.counters)
        rate = f" opened/s={row.rates['opened']:.1f}" if "opened" in row.rates else ""
        yield f"{_where(row)} open={row.open} {counted}{rate}"


def _screen(view: View, height: int) -> RenderableType:
    parts: list[RenderableType] = [Text(line, _STYLES[kind]) for kind, line in _head(view)]
    fill = Text("maps  ", "dim")
    for text, is_full in _fill(view):
        fill.append(text + "  ", "bold red" if is_full else "")
    parts.append(fill)
    table = Table(box=None, expand=True, pad_edge=False, header_style="reverse")
    table.add_column("SERVICE", no_wrap=True, ratio=1)
    for name in ("OPEN", "OPENED/s", *(name.upper() for name in _COLUMNS)):
        table.add_column(name, justify="right", no_wrap=True)
    room = max(height - len(parts) - 4, 1)
    for row in view.rows[:room]:
        rate = f"{row.rates['opened']:,.1f}" if "opened" in row.rates else ""
        numbers = [f"{row.counters[name]:,}" if name in row.counters else "" for name in _COLUMNS]
        table.add_row(Text(_where(row)), f"{row.open:,}", rate, *numbers)
    parts.append(table)
    more = len(view.rows) - room
    totals = ", ".join(f"{sum(row.counters.get(name, 0) for row in view.rows):,} {name}" for name in _TOTALS)
    hidden = f", {more} of them not shown" if more > 0 else ""
    parts.append(Text(f"{_services(len(view.rows))}{hidden}: {totals}   (Ctrl-C ends this)", "dim"))
    return Group(*parts)
