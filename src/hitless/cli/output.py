"""What the commands print: text for people, tables and colours on a terminal only, JSON for tools."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from hitless.layout.show import diff_lines, show_map

if TYPE_CHECKING:
    from hitless.compare import Comparison
    from hitless.doctor import Doctor
    from hitless.skeleton import Skeleton
    from hitless.sources import Source
    from hitless.upgrade.adopt import Adopted
    from hitless.upgrade.gc import Garbage
    from hitless.upgrade.holders import Holder, Holders
    from hitless.upgrade.model import HookPlan, LeftRing, MapPlan, MapResult, Plan, Progress, Result
    from hitless.upgrade.recovery import Recovery
    from hitless.upgrade.remnants import Remnant
    from hitless.upgrade.status import HookStatus, Status
    from hitless.upgrade.verify import Verification

__all__ = [
    "annotation",
    "print_json",
    "printable",
    "progress_line",
    "show_adopted",
    "show_annotations",
    "show_diffs",
    "show_doctor",
    "show_garbage",
    "show_left_behind",
    "show_plan",
    "show_recovery",
    "show_result",
    "show_skeleton",
    "show_source",
    "show_status",
    "show_verification",
]

_COLOURS = {
    "keep": "green", "update": "cyan", "convert": "cyan", "create": "blue", "attach": "blue",
    "drop": "red", "discard": "red", "detach": "yellow",
    "ok": "green", "wrong": "red",
}  # fmt: skip

_FEW_HOOKS = 8  # of one pattern, which are shown one by one
_SELDOM = 5.0  # seconds between two lines about one copy, where lines stay


def print_json(value: object) -> None:
    """One JSON object, indented, on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def show_source(source: Source) -> str:
    """A bundle's digest, maps with their layouts, then programs."""
    parts = [f"digest: {source.digest}"] if source.digest else []
    parts += [show_map(spec) for spec in source.maps.values()]
    programs = [program for item in source.objects.values() for program in item.programs]
    if programs:
        rows = [(p.name, p.section, p.type or "type unknown", p.attach_type) for p in programs]
        parts.append("programs:\n" + "\n".join(_aligned(rows)))
    return printable("\n\n".join(parts), "\n")


def show_skeleton(file: str, made: Skeleton) -> str:
    """Where the manifest is, what is open in it, and what an upgrade to it would lose."""
    count = len(made.questions)
    parts = [f"{file}: {count} {_plural(count, 'question')} to answer"]
    parts += [f"  line {question.line}: {question.key}: {question.asks}" for question in made.questions]
    parts += [f"  {name} loses {'; '.join(texts)}" for name, texts in made.losses.items()]
    return printable("\n".join(parts), "\n")


def show_diffs(comparison: Comparison, width: int | None = None) -> str:
    """Every map that changed, old beside new, then one sentence; coloured, for ``click.echo`` to strip if need be."""
    parts = []
    for item in comparison.maps:
        lines = diff_lines(item.diff, item.old, item.new, width) if item.changed else []
        told = {text for change in item.diff.changes for text in (change.loss, change.reason)}
        unsaid = [loss for loss in item.losses if loss.removeprefix("all entries: ") not in told]
        if item.whole:
            lines += [("!", f"  {item.name} loses {loss}") for loss in unsaid]
        if item.losses and item.allowed:
            lines.append((" ", f"  {item.name}: this loss is accepted"))
        if item.note:
            lines += [("~", f"  {item.name}: {item.note}")]
        if lines:
            parts.append("\n".join(_coloured(mark, line) for mark, line in lines))
    same = sum(not item.changed for item in comparison.maps)
    if same:
        parts.append(f"{same} {_plural(same, 'map')} unchanged")
    parts.append(_coloured("=", comparison.sentence))
    return "\n\n".join(parts)


_MARKS: dict[str, dict[str, Any]] = {
    "+": {"fg": "green"}, "-": {"fg": "red"}, "!": {"fg": "red", "bold": True}, "~": {"fg": "cyan"}, "#": {"dim": True},
    "=": {"bold": True},
}  # fmt: skip


def _coloured(mark: str, line: str) -> str:
    text = printable(line)
    return click.style(text, **_MARKS[mark]) if mark in _MARKS and "NO_COLOR" not in os.environ else text


def printable(text: str, keep: str = "") -> str:
    """The text with control characters spelled out: names come from files that anybody may have made."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def show_annotations(comparison: Comparison) -> str:
    """Workflow commands of GitHub: an error for each map that would lose state, a warning for an accepted loss."""
    file = comparison.new.file
    lines = []
    for item in comparison.maps:
        was = f" (was {item.diff.was})" if item.diff.was else ""
        text = "\n".join(map(printable, item.losses))
        if item.losses and not item.allowed:
            hint = f"\nIf that is fine, accept it with --allow-loss {printable(item.name)} or on_loss = \"discard\"."
            lines.append(annotation("error", file, f"hitless: {item.name}{was} would lose state", text + hint))
        elif item.losses:
            lines.append(annotation("warning", file, f"hitless: {item.name}{was} loses state, as accepted", text))
        elif item.note:
            lines.append(annotation("warning", file, f"hitless: {item.name}{was}", item.note))
    level = "error" if comparison.lost else "notice"
    if level == "notice":
        lines.append(annotation(level, file, "hitless check", comparison.sentence))
    lines.append(printable(comparison.sentence))
    return "\n".join(lines)


def annotation(level: str, file: str | None, title: str, message: str) -> str:
    """One workflow command, escaped so that no name in it can end it or begin another."""
    where = f"file={_property(file)}," if file else ""
    return f"::{level} {where}title={_property(title)}::{_message(message)}"


def _message(text: str) -> str:
    return printable(text, "\n").replace("%", "%25").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(printable(text)).replace(":", "%3A").replace(",", "%2C")


def show_plan(plan: Plan) -> None:
    """The plan for a person: what becomes of each map and hook, and what would be lost."""
    click.echo(_headline(plan.name, plan.start_type, plan.from_version, plan.to_version, plan.root))
    _show_maps(plan.maps)
    _show_hooks(plan.hooks)
    if plan.cutover.consistency == "connection":
        click.echo(
            "  connections that are open stay with the running release on all hooks until they end, at most for "
            f"{plan.cutover.deadline:g} s"
        )
    if plan.barrier is not None:
        click.echo(f"  running programs are waited for by {plan.barrier}")
    for path in plan.paths:
        click.echo(f"  {path.action} {path.path}, a path of the daemon's own loader")
    _show_left_out(plan.left_out)
    if plan.blocked:
        options = " ".join(f"--allow-loss {entry.name}" for entry in plan.blocked)
        command = "rollback" if plan.start_type == "rollback" else "apply"
        click.echo(f"{command} will refuse this: it loses state. If that is fine, add {options}")
    elif not plan.changes_anything:
        click.echo("Nothing to do.")


def _show_left_out(programs: Sequence[str]) -> None:
    for name in programs:
        click.echo(f"  {name} is left out, since this kernel refuses it")


def _headline(name: str, start_type: str, before: str | None, after: str, root: str) -> str:
    if start_type == "restart":
        return f"{name} {after} runs under {root} already (restart)"
    if before is None:
        return f"{name} {after} starts under {root} (normal)"
    return f"{name} {before} -> {after} under {root} ({start_type})"


def _show_maps(maps: Sequence[MapPlan]) -> None:
    rows = [(m.action, _renamed(m), _changes(m)) for m in maps]
    _table("maps", ("action", "map", "changes"), rows)
    for entry in maps:
        for loss in entry.loss:
            click.echo(f"  {entry.name} loses: {loss}{'' if entry.allowed else '  (not allowed)'}")
    for entry in maps:
        if entry.converter is not None:
            click.echo(f"  {entry.name} is converted by {entry.converter}")
        if entry.exactness != "exact":
            click.echo(f"  {entry.name} is {entry.exactness}")
        for note in entry.notes:
            click.echo(f"  {entry.name}: {note}")


def _lost(entry: MapResult) -> str:
    """How many values did not fit, by fields, and what else was lost, which is told by more than one word."""
    others = {what: count for what, count in entry.lost_fields.items() if " " in what}
    values = entry.lost - sum(others.values())
    words = [f"{count} {what}" for what, count in others.items()]
    return "".join(f", {text}" for text in ([f"{values} values did not fit"] if values else []) + words)


def _renamed(entry: MapPlan) -> str:
    if entry.sources:
        return f"{' + '.join(entry.sources)} -> {entry.name}"
    return f"{entry.was} -> {entry.name}" if entry.was else entry.name


def _changes(entry: MapPlan) -> str:
    """How many changes of each kind, in the order of their first appearance: ``2 added, 1 widened``."""
    if entry.action != "convert":
        return entry.verdict if entry.was is None else "renamed"
    counts: dict[str, int] = {}
    for change in entry.changes:
        counts[change.kind] = counts.get(change.kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _show_hooks(hooks: Sequence[HookPlan]) -> None:
    matched = Counter((h.action, h.link.split("@")[0], h.program) for h in hooks if h.matched)
    methods = {(h.action, h.link.split("@")[0], h.program): h.method or _clashes(h) for h in hooks}
    rows = [(*what, f"{count} that match", methods[what]) for what, count in matched.items() if count > _FEW_HOOKS]
    rows += [
        (
            h.action,
            f"{h.was} -> {h.link}" if h.was else h.link,
            h.program,
            _where(h.target, h.netns) + _instead(h),
            h.method or _clashes(h),
        )
        for h in hooks
        if not h.matched or matched[h.action, h.link.split("@")[0], h.program] <= _FEW_HOOKS
    ]
    _table("hooks", ("action", "link", "program", "target", "method"), rows)


def _where(target: str, netns: str | None) -> str:
    return f"{target} in {netns}" if netns else target


def _clashes(hook: HookPlan) -> str:
    if not hook.clashes:
        return ""
    links = f"link{'s' * (len(hook.clashes) > 1)} {', '.join(map(str, hook.clashes))}"
    return f"may be kept out by {links} of the same priority, if in the same namespace"


def _instead(hook: HookPlan) -> str:
    return "" if hook.adopted is None else f", instead of program {hook.expected} {hook.adopted}".rstrip()


def show_result(result: Result) -> None:
    """What an apply did, with its figures."""
    if result.recovered:
        click.echo(f"first, {result.recovered}")
    click.echo(_headline(result.name, result.start_type, result.from_version, result.to_version, result.root))
    _show_maps(result.maps)
    _show_hooks(result.hooks)
    _show_left_out(result.left_out)
    for entry in result.maps:
        if entry.action == "convert":
            lost = _lost(entry)
            lost += f", {entry.unread} bytes left unread in the old one" if entry.unread else ""
            click.echo(
                f"  {entry.name}: {entry.copied} entries copied, {entry.caught_up} caught up "
                f"in {entry.rounds} rounds{lost}, {entry.seconds * 1000:.1f} ms"
            )
    if result.cutover.moved is not None:
        seconds = result.steps.get("connections", 0.0)
        still = f"{result.cutover.moved:,} were still open then, and moved" if result.cutover.moved else "none was left"
        click.echo(f"open connections were waited for {seconds:.1f} s; {still}")
    if result.cutover.hooks:
        caught_up = f"; caught up {result.cutover.stale_window_us / 1000:.1f} ms after the first"
        took = f"{result.cutover.first_to_last_us:.0f} us from first to last"
        click.echo(
            f"{result.cutover.hooks} {_plural(result.cutover.hooks, 'hook')} switched, "
            + (took if result.cutover.moved is None else "at once")
            + (caught_up if result.cutover.stale_window_us else "")
        )
    steps = ", ".join(f"{name} {seconds * 1000:.1f}" for name, seconds in result.steps.items())
    click.echo(f"milliseconds: {steps}")
    click.echo(f"done: generation {result.generation}, version {result.to_version}")


def show_adopted(found: Adopted) -> None:
    """What was taken over from another loader, or would be."""
    shown = {True: "yes", False: "no"}
    how = "is taken over" if found.adopted else "would be taken over"
    click.echo(f"{found.name} {found.version} {how}, as it runs, under {found.root}")
    _table(
        "maps", ("map", "id", "pinned at", "types from"),
        [(one.name, str(one.id), one.pin or "-", one.layout) for one in found.maps],
    )  # fmt: skip
    _table(
        "hooks", ("link", "hook", "target", "program", "held by", "shown to be the object's"),
        [
            (one.link, one.hook, one.target, f"{one.program} ({one.program_id})", one.held, shown[one.proven])
            for one in found.hooks
        ],
    )  # fmt: skip
    for note in found.notes:
        click.echo(f"  {note}")


def show_recovery(found: Recovery) -> None:
    """What an interrupted upgrade had left, what was done about it, and what runs now."""
    if found.did is None:
        click.echo(f"{found.root}: nothing to recover")
    else:
        click.echo(f"found: {found.found}")
        click.echo(f"{found.did}")
    if found.version is None:
        click.echo("nothing of hitless runs there; apply a release")
    else:
        click.echo(f"version {found.version} runs, generation {found.generation}")


def show_doctor(found: Doctor) -> None:
    """The machine, each feature and what is done without it, and what becomes of each type of map."""
    libbpf = f"libbpf {found.libbpf}" if found.libbpf else "no libbpf"
    click.echo(f"Linux {found.kernel} on {found.machine}, {libbpf}, Python {found.python}")
    for kind, places in (("bpffs", found.bpffs), ("cgroup2", found.cgroup2)):
        click.echo(f"{kind}: {', '.join(places) or 'not mounted'}")
    without = [name for name, held in found.capabilities.items() if not held]
    click.echo(f"capabilities: {'not held: ' + ', '.join(without) if without else 'all that hitless uses'}")
    rows = [
        (
            "ok" if one.there else "no",
            one.name,
            "" if one.there else f"{f'needs {one.needs}' if one.permitted else one.why}; {one.without}",
        )
        for one in found.features
    ]
    _table("features", ("", "feature", "without it"), rows)
    maps = [(one.type, one.method, one.exactness or "") for one in found.maps]
    _table("maps that changed", ("type", "method", "exactness"), maps)
    for problem in found.problems:
        click.echo(f"problem: {problem}")
    if not found.problems:
        click.echo("hitless can work here.")


def _kind(hook: HookStatus) -> tuple[str, str, str, str]:
    """What hooks that a pattern led to have in common."""
    return hook.link.split("@")[0], hook.attach_type, hook.program or "?", str(hook.program_id or "-")


def show_status(status: Status) -> None:
    """What runs, then what is wrong with it."""
    if status.version is None:
        gone = "pins are gone after a restart of the machine or an unload; apply a release"
        click.echo(f"nothing of hitless runs under {status.root}: {gone}")
    else:
        previous = f", previous {status.previous}" if status.previous else ""
        click.echo(f"{status.name} {status.version}, generation {status.generation}{previous}, under {status.root}")
        rows = [
            (m.name, m.type, "-" if m.entries is None else str(m.entries), str(m.max_entries), str(m.id))
            for m in status.maps
        ]
        _table("maps", ("map", "type", "entries", "of", "id"), rows)
        alike = Counter(_kind(hook) for hook in status.hooks if "@" in hook.link)
        hooks = [(*what, f"{count} that match") for what, count in alike.items() if count > _FEW_HOOKS]
        hooks += [
            (h.link, h.attach_type, h.program or "?", str(h.program_id or "-"), _where(h.target, h.netns))
            for h in status.hooks
            if alike[_kind(h)] <= _FEW_HOOKS
        ]
        _table("hooks", ("link", "attach type", "program", "id", "target"), hooks)
        _show_holders(status.holders)
        left = [
            (r.kind, r.name, str(r.id), f"of generation {r.generation}", _bytes(r.memory), _kept(r))
            for r in status.remnants
        ]
        _table("left of earlier generations", ("kind", "name", "id", "generation", "memory", "kept by"), left)
    _show_rings(status.left, status.previous)
    for problem in status.problems:
        click.secho(f"problem: {problem}", fg="red")
    if status.upgrading is not None:
        from hitless.kernel.processes import who  # which commands that need no kernel do not load

        click.echo(printable(f"{who(status.upgrading)} is upgrading this root right now"))
    if not status.problems:
        click.echo("no problems")


def _kept(remnant: Remnant) -> str:
    """What keeps it, as far as that can be seen."""
    told = [
        f"held by {_plural(len(remnant.processes), 'process')} {', '.join(map(str, remnant.processes))}"
        if remnant.processes else "",
        f"runs on {_plural(len(remnant.links), 'link')} {', '.join(map(str, remnant.links))}" if remnant.links else "",
        f"used by {_plural(len(remnant.programs), 'program')} {', '.join(map(str, remnant.programs))}"
        if remnant.programs else "",
    ]  # fmt: skip
    return "; ".join(filter(None, told)) or "held by what cannot be seen: a pin elsewhere, or mapped memory"


def _show_rings(rings: Sequence[LeftRing], version: str | None) -> None:
    for ring in rings:
        who = f"process {', '.join(map(str, ring.holders))}" if ring.holders else "nobody"
        click.echo(f"ring buffer {ring.name} of {version} holds {ring.unread} unread bytes; {who} has it open")


def _bytes(count: int) -> str:
    return f"{count / 1024:,.0f} KiB" if count >= 1024 else f"{count} B"


def show_verification(found: Verification) -> None:
    """What was proved, and on how many; then what is wrong."""
    click.echo(f"{found.name} {found.version}, generation {found.generation}, under {found.root}")
    rows = [
        ("wrong" if check.problems else "ok", check.name, str(check.looked_at), check.proves) for check in found.checks
    ]
    _table("checked", ("", "what", "looked at", "what holds if ok"), rows)
    for check in found.checks:
        for text in check.untold:
            click.echo(f"not told: {printable(text)}")
    click.echo("not checked: what the maps hold, which programs change all the time")
    for problem in found.problems:
        click.secho(f"problem: {printable(problem)}", fg="red")
    count = len(found.problems)
    click.echo(f"{count} {_plural(count, 'problem')}" if count else "all agree")


def show_garbage(found: Garbage) -> None:
    """What goes and why, what keeps it nevertheless, and the memory that comes back."""
    if not found.items:
        click.echo(f"{found.root}: nothing to remove")
        return
    rows = [
        (
            str(Path(item.path).relative_to(found.root)),
            item.kind,
            str(item.id or "-"),
            _bytes(item.memory),
            f"{item.why}; kept by {item.kept_by}" if item.kept_by else item.why,
        )
        for item in found.items
    ]
    _table("garbage", ("pin", "kind", "id", "memory", "what it is"), rows)
    _show_rings(found.left, found.version)
    if found.blocked:
        options = " ".join(f"--allow-loss {name}" for name in found.blocked)
        click.echo(f"gc will refuse this: unread bytes would be lost. If that is fine, add {options}")
    count = len(found.items)
    click.echo(
        f"{'would remove' if found.dry_run else 'removed'} {count} {_plural(count, 'pin')}; the kernel gets back about "
        f"{_bytes(found.freed)}"
    )
    if found.version is not None:
        when = "would no longer be" if found.dry_run else "is no longer"
        click.echo(f"going back to {found.version} {when} possible")


def show_left_behind(holders: Holders) -> None:
    """Who still writes to maps that the upgrade has replaced, and what to do about it; nothing if nobody does."""
    for holder in holders.left_behind:
        click.echo(
            f"process {holder.pid} ({printable(holder.command)}) still holds the old map {holder.map}, id "
            f"{holder.map_id}: what it writes reaches nobody; restart it, or make it write through hitless"
        )
    if holders.unseen:
        click.echo(f"{_unseen(holders)}; that takes CAP_SYS_PTRACE")


def _show_holders(holders: Holders) -> None:
    rows = [(h.map, str(h.map_id), str(h.pid), _standing(h), printable(h.command)) for h in holders.found]
    _table("held by", ("map", "id", "process", "upgrades", "command"), rows)
    if holders.unseen:
        click.echo(_unseen(holders))


def _standing(holder: Holder) -> str:
    if holder.follows:
        return "follows"
    return "left behind: its writes reach nobody" if holder.old else "will not follow"


def _unseen(holders: Holders) -> str:
    return f"{holders.unseen} {_plural(holders.unseen, 'process')} may hold maps too and could not be looked at"


def progress_line() -> Callable[[Progress], None]:
    """Progress on stderr: one changing line on a terminal, else a line a step, and one now and then in a long copy."""
    terminal = sys.stderr.isatty()
    started = told = time.monotonic()

    def tell(progress: Progress) -> None:
        # Nobody may be reading any more (a closed pipe, a lost terminal): no reason to undo an upgrade.
        with suppress(OSError):
            show(progress)

    def show(progress: Progress) -> None:
        nonlocal told
        now = time.monotonic()
        line = f"{now - started:6.2f} s  {progress.step}{_detail(progress)}"
        if terminal:
            click.echo(f"\r\033[K{line}", nl=False, err=True)
            if progress.step in ("clean-up", "drain"):  # nothing may follow
                click.echo("\r\033[K", nl=False, err=True)
        elif (progress.map is None and not progress.done) or now - told > _SELDOM:
            told = now
            click.echo(line, err=True)

    return tell


def _detail(progress: Progress) -> str:
    if progress.step == "connections" and progress.done:
        return f": {progress.done:,} are left with the old release"
    if progress.map is None:
        return ""
    detail = f" {progress.map}: {progress.done:,} entries, {progress.rate:,.0f} a second"
    if progress.differing or progress.round:
        detail += f"; round {progress.round + 1}, about {progress.differing:,} differ"
    return detail


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
    return word if count == 1 else f"{word}{'es' if word.endswith('s') else 's'}"
