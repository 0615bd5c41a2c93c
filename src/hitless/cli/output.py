"""What the commands print: text for people, tables and colours on a terminal only, JSON for tools."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import click
import msgspec

from hitless.layout.show import show_diff, show_map

if TYPE_CHECKING:
    from hitless.sources import Comparison, Source
    from hitless.upgrade.model import HookPlan, MapPlan, Plan, Progress, Result
    from hitless.upgrade.status import Status

__all__ = [
    "print_json",
    "progress_line",
    "show_diffs",
    "show_plan",
    "show_result",
    "show_source",
    "show_status",
]

_COLOURS = {
    "keep": "green", "update": "cyan", "convert": "cyan", "create": "blue", "attach": "blue",
    "drop": "red", "discard": "red", "detach": "yellow",
}  # fmt: skip


def print_json(value: object) -> None:
    """One JSON object, indented, on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def show_source(source: Source) -> str:
    """Maps with their layouts, then programs."""
    parts = [show_map(spec) for spec in source.maps.values()]
    programs = [program for item in source.objects.values() for program in item.programs]
    if programs:
        rows = [(p.name, p.section, p.type or "type unknown", p.attach_type) for p in programs]
        parts.append("programs:\n" + "\n".join(_aligned(rows)))
    return "\n\n".join(parts)


def show_diffs(comparison: Comparison) -> str:
    """Every map that changed, then one sentence."""
    parts = [show_diff(diff) for diff in comparison.maps if diff.verdict != "identical" or diff.changes]
    same = sum(diff.verdict == "identical" and not diff.changes for diff in comparison.maps)
    if same:
        parts.append(f"{same} {_plural(same, 'map')} unchanged")
    parts.append(_sentence(comparison))
    return "\n\n".join(parts)


def _sentence(comparison: Comparison) -> str:
    gone = [diff.name for diff in comparison.maps if diff.verdict in ("removed", "needs-converter", "not-carried")]
    gone += [diff.name for diff in comparison.maps if diff.verdict == "unknown"]
    cut = [diff.name for diff in comparison.maps if diff.verdict == "lossy"]
    if gone or cut:
        words = []
        if cut:
            words.append(f"some fields of {', '.join(cut)}")
        if gone:
            words.append(f"all of {', '.join(gone)}")
        return f"Upgrading loses {' and '.join(words)}; apply asks for --allow-loss for each of these maps."
    if comparison.verdict == "identical":
        return "The maps are the same: an upgrade keeps them as they are."
    return "All state survives the upgrade."


def show_plan(plan: Plan) -> None:
    """The plan for a person: what becomes of each map and hook, and what would be lost."""
    click.echo(_headline(plan.name, plan.start_type, plan.from_version, plan.to_version, plan.root))
    _show_maps(plan.maps)
    _show_hooks(plan.hooks)
    if plan.blocked:
        options = " ".join(f"--allow-loss {entry.name}" for entry in plan.blocked)
        click.echo(f"apply will refuse this: it loses state. If that is fine, add {options}")
    elif not plan.changes_anything:
        click.echo("Nothing to do.")


def _headline(name: str, start_type: str, before: str | None, after: str, root: str) -> str:
    if start_type == "restart":
        return f"{name} {after} runs under {root} already (restart)"
    if before is None:
        return f"{name} {after} starts under {root} (normal)"
    return f"{name} {before} -> {after} under {root} (update)"


def _show_maps(maps: Sequence[MapPlan]) -> None:
    rows = [(m.action, f"{m.was} -> {m.name}" if m.was else m.name, _changes(m)) for m in maps]
    _table("maps", ("action", "map", "changes"), rows)
    for entry in maps:
        for loss in entry.loss:
            click.echo(f"  {entry.name} loses: {loss}{'' if entry.allowed else '  (not allowed)'}")
    for entry in maps:
        if entry.exactness != "exact":
            click.echo(f"  {entry.name} is {entry.exactness}")


def _changes(entry: MapPlan) -> str:
    """How many changes of each kind, in the order of their first appearance: ``2 added, 1 widened``."""
    if entry.action != "convert":
        return entry.verdict if entry.was is None else "renamed"
    counts: dict[str, int] = {}
    for change in entry.changes:
        counts[change.kind] = counts.get(change.kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _show_hooks(hooks: Sequence[HookPlan]) -> None:
    rows = [(h.action, f"{h.was} -> {h.link}" if h.was else h.link, h.program, h.target) for h in hooks]
    _table("hooks", ("action", "link", "program", "target"), rows)


def show_result(result: Result) -> None:
    """What an apply did, with its figures."""
    if result.recovered:
        click.echo(f"first, {result.recovered}")
    click.echo(_headline(result.name, result.start_type, result.from_version, result.to_version, result.root))
    _show_maps(result.maps)
    _show_hooks(result.hooks)
    for entry in result.maps:
        if entry.action == "convert":
            lost = f", {entry.lost} values did not fit" if entry.lost else ""
            click.echo(
                f"  {entry.name}: {entry.copied} entries copied, {entry.caught_up} caught up "
                f"in {entry.rounds} rounds{lost}, {entry.seconds * 1000:.1f} ms"
            )
    if result.cutover.hooks:
        caught_up = f"; caught up {result.cutover.stale_window_us / 1000:.1f} ms after the first"
        click.echo(
            f"{result.cutover.hooks} {_plural(result.cutover.hooks, 'hook')} switched, "
            f"{result.cutover.first_to_last_us:.0f} us from first to last"
            + (caught_up if result.cutover.stale_window_us else "")
        )
    steps = ", ".join(f"{name} {seconds * 1000:.1f}" for name, seconds in result.steps.items())
    click.echo(f"milliseconds: {steps}")
    click.echo(f"done: generation {result.generation}, version {result.to_version}")


def show_status(status: Status) -> None:
    """What runs, then what is wrong with it."""
    if status.version is None:
        click.echo(f"nothing of hitless runs under {status.root}")
    else:
        previous = f", previous {status.previous}" if status.previous else ""
        click.echo(f"{status.name} {status.version}, generation {status.generation}{previous}, under {status.root}")
        rows = [
            (m.name, m.type, "-" if m.entries is None else str(m.entries), str(m.max_entries), str(m.id))
            for m in status.maps
        ]
        _table("maps", ("map", "type", "entries", "of", "id"), rows)
        hooks = [(h.link, h.attach_type, h.program or "?", str(h.program_id or "-"), h.target) for h in status.hooks]
        _table("hooks", ("link", "attach type", "program", "id", "target"), hooks)
    for problem in status.problems:
        click.secho(f"problem: {problem}", fg="red")
    if status.upgrading is not None:
        click.echo(f"process {status.upgrading} is upgrading this root right now")
    if not status.problems:
        click.echo("no problems")


def progress_line() -> Callable[[Progress], None]:
    """Progress on stderr: one changing line on a terminal, else a line a step."""
    terminal = sys.stderr.isatty()
    started = time.monotonic()

    def tell(progress: Progress) -> None:
        # Nobody may be reading any more (a closed pipe, a lost terminal): no reason to undo an upgrade.
        with suppress(OSError):
            show(progress)

    def show(progress: Progress) -> None:
        if terminal:
            detail = f" {progress.map}: {progress.done} entries" if progress.map else ""
            click.echo(f"\r\033[K{time.monotonic() - started:6.2f} s  {progress.step}{detail}", nl=False, err=True)
            if progress.step == "clean-up":
                click.echo("\r\033[K", nl=False, err=True)
        elif progress.map is None:
            click.echo(f"{time.monotonic() - started:6.2f} s  {progress.step}", err=True)

    return tell


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    if not sys.stdout.isatty():
        click.echo(f"{title}:")
        for line in _aligned(rows):
            click.echo(line)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left", box=None, header_style="dim")
    for row in rows:
        table.add_row(Text(row[0], style=_COLOURS.get(row[0], "")), *(Text(cell, overflow="fold") for cell in row[1:]))
    Console().print(table)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"
