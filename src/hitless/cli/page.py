"""A comparison as one HTML page: for every changed struct a memory map of old and new, with the moves between them.

It needs nothing from anywhere: no script, no font, no image; its colours follow the reader's, and it prints.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hitless.cli.output import printable
from hitless.compare import Comparison, Judged
from hitless.layout.beside import Cell, Row, Sides, sides
from hitless.layout.model import MapSpec
from hitless.layout.rules import PREFIX
from hitless.layout.show import describe

__all__ = ["page"]

_WIDTH, _BOX, _LEFT, _TOP, _INDENT = 1000, 360, 10, 30, 16
_RIGHT = _WIDTH - _LEFT - _BOX
_CHARACTER = 7.3  # pixels that a character of the drawing takes, generously

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c2128; --dim: #5f6b7a; --line: #d5dbe3; --box: #f2f4f7;
  --same: #9aa5b4; --moved: #2f6fd0; --added: #1a7f4b; --lost: #c62f3b; --gap: #e3e7ed; --soft: 0.13; }
@media (prefers-color-scheme: dark) { :root { --page: #14181e; --text: #e2e7ee; --dim: #98a4b3; --line: #333c48;
  --box: #1f262f; --same: #66717f; --moved: #6ea8ff; --added: #4cc38a; --lost: #ff7b82; --gap: #2a323d; --soft: 0.2; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 64rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 0; display: inline; }
h3 { font-size: .85rem; margin: 1rem 0 .3rem; color: var(--dim); font-weight: 600; }
code, svg, td.code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
code { font-size: .92em; } .dim { color: var(--dim); }
p.verdict { border-left: 5px solid var(--added); padding: .5rem 1rem; margin: 1rem 0; background: var(--box); }
p.verdict.lost { border-color: var(--lost); }
section { border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.2rem; margin: 1.2rem 0; }
.badge { display: inline-block; border: 1px solid; border-radius: 1em; padding: 0 .7em; font-size: .8rem;
  margin-left: .5em; }
.identical { color: var(--dim); } .lossless { color: var(--moved); } .added { color: var(--added); }
.lossy, .removed, .unknown, .needs-converter, .not-carried { color: var(--lost); }
table { border-collapse: collapse; width: 100%; font-size: .87rem; margin: .4rem 0; }
th { text-align: left; color: var(--dim); font-weight: 600; }
th, td { padding: .2rem .8rem .2rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; } th, td.verdict { white-space: nowrap; }
ul.losses { margin: .4rem 0; padding-left: 1.2rem; color: var(--lost); } ul.losses.accepted { color: var(--dim); }
.scroll { overflow-x: auto; } svg { width: 100%; min-width: 40rem; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--text); } svg .dim { fill: var(--dim); } svg .head { font-weight: 600; }
rect.box { fill: var(--box); stroke: var(--same); } rect.group { fill: none; stroke: var(--line); }
rect.gap { fill: var(--gap); stroke: var(--line); stroke-dasharray: 3 3; }
rect.moved { stroke: var(--moved); } rect.added { stroke: var(--added); }
rect.removed, rect.lost { stroke: var(--lost); }
rect.moved, rect.added, rect.removed, rect.lost { stroke-width: 1.6; }
path { fill-opacity: var(--soft); stroke-opacity: .55; } path.same { fill: var(--same); stroke: var(--same); }
path.moved { fill: var(--moved); stroke: var(--moved); } path.lost { fill: var(--lost); stroke: var(--lost); }
svg text.moved { fill: var(--moved); } svg text.added { fill: var(--added); }
svg text.lost, svg text.removed { fill: var(--lost); }
svg text.note { paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--dim); }
@media print { :root { color-scheme: light; --page: #ffffff; --text: #000000; --dim: #444c56; --line: #b8c0ca;
  --box: #f2f4f7; --same: #8a94a2; --moved: #1f55ab; --added: #13643a; --lost: #a51f2b; --gap: #e3e7ed; --soft: 0.13; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  section { border-width: 1px 0 0; border-radius: 0; padding: .6rem 0; }
  header, h3, p { break-after: avoid; } .scroll, li, tr { break-inside: avoid; }
  svg { min-width: 0; max-height: 235mm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def page(comparison: Comparison) -> str:
    """The whole document."""
    title = f"{comparison.old.path} \u2192 {comparison.new.path}"
    changed = [item for item in comparison.maps if item.changed or item.losses or item.note]
    kept = [item.name for item in comparison.maps if item not in changed]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing may be loaded or run, whatever a name in an object file says.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>hitless check: {_text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>What an upgrade does to the maps</h1><p class=\"dim\"><code>{_text(title)}</code></p>",
        f'<p class="verdict{" lost" if comparison.lost else ""}">{_text(comparison.sentence)}</p>',
        _overview(comparison.maps),
        *(_section(item) for item in changed),
    ]
    if kept:
        names = ", ".join(f"<code>{_text(name)}</code>" for name in kept)
        parts.append(f'<p class="dim">Unchanged, and kept as they are: {names}.</p>')
    return "\n".join((*parts, "</body></html>\n"))


def _text(text: str) -> str:
    return html.escape(printable(text))


def _overview(maps: Sequence[Judged]) -> str:
    lines = []
    for item in maps:
        name = f"{item.diff.was} \u2192 {item.name}" if item.diff.was else item.name
        fate = "; ".join(item.losses) or item.note or "nothing is lost"
        word = " (accepted)" if item.losses and item.allowed else ""
        lines.append(
            f'<tr><td class="code">{_text(name)}</td><td class="verdict {item.diff.verdict}">{item.diff.verdict}</td>'
            f"<td>{_text(fate + word)}</td></tr>"
        )
    return f"<table><tr><th>map</th><th>verdict</th><th>what is lost</th></tr>{''.join(lines)}</table>"


def _section(item: Judged) -> str:
    diff = item.diff
    was = f' <span class="dim">was {_text(diff.was)}</span>' if diff.was else ""
    badge = f'<span class="badge {diff.verdict}">{diff.verdict}</span>'
    parts = [f"<section><header><h2><code>{_text(item.name)}</code></h2>{was}{badge}</header>"]
    parts.append(f'<p class="dim">{_definition(item.old, item.new)}</p>')
    if item.losses:
        lines = "".join(f"<li>{_text(loss)}</li>" for loss in item.losses)
        head = "<p>This loss is accepted:</p>" if item.allowed else "<p>An upgrade would lose:</p>"
        parts.append(f'{head}<ul class="losses{" accepted" if item.allowed else ""}">{lines}</ul>')
    if item.note:
        parts.append(f"<p>{_text(item.note)}</p>")
    if item.old is not None and item.new is not None:
        for one in sides(diff, item.old, item.new)[0]:
            parts.append(f"<h3>{one.side}</h3>{_drawing(one, item.name)}")
    if diff.changes:
        parts.append(_changes(item))
    return "".join((*parts, "</section>"))


def _definition(old: MapSpec | None, new: MapSpec | None) -> str:
    before, after = describe(old) if old else [], describe(new) if new else []
    if not before or not after:
        return _text(", ".join(before or after))
    gone = ", ".join(fact for fact in before if fact not in after)
    now = ", ".join(f"<b>{_text(fact)}</b>" if fact not in before else _text(fact) for fact in after)
    return now + (f" <span>(old: {_text(gone)})</span>" if gone else "")


def _changes(item: Judged) -> str:
    lines = []
    for change in item.diff.changes:
        notes = "; ".join(text for text in (change.loss, change.reason, change.hint) if text)
        cells = (change.path or "(map)", change.kind, change.old or "", change.new or "", notes)
        lines.append("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>field</th><th>change</th><th>old</th><th>new</th><th>note</th></tr>"
    count = len(item.diff.changes)
    word = "change" if count == 1 else "changes"
    return f"<details><summary>{count} {word}, one by one</summary><table>{head}{''.join(lines)}</table></details>"


class _Box(NamedTuple):
    """A cell in its place on the drawing; ``end`` is below the last member if it holds some."""

    cell: Cell
    text: str
    y: float
    height: float
    end: float


def _drawing(one: Sides, name: str) -> str:
    """Both layouts in memory order, top to bottom, and a band from each old field to its new place."""
    old, new = (list(_stack([row[side] for row in one.rows])) for side in (1, 2))
    places = [{id(box.cell): box for box in boxes} for boxes in (old, new)]
    height = max((box.end for box in (*old, *new)), default=_TOP) + 6
    bands, labels, classes = [], [], {}
    opened: list[Row] = []
    for row in one.rows:
        kind = _class(row)
        lines = {cell.kind for cell in (row.old, row.new) if cell is not None}
        if "close" in lines:
            # What happened to a struct as a whole is said where it begins.
            begun = opened.pop()
            if begun.changes:
                continue
            changes = tuple(change for change in row.changes if change.kind not in ("nested", "moved"))
            row = begun._replace(changes=changes)
            kind = _class(row) if row.changes else "same"
        elif "open" in lines:
            opened.append(row)
            if row.old and row.new and "field" not in lines:
                continue
        left = places[0].get(id(row.old)) if row.old else None
        right = places[1].get(id(row.new)) if row.new else None
        for box in (left, right):
            if box is not None:
                classes[id(box.cell)] = kind
        if lines & {"hole", "padding"}:
            continue
        if left and right and "close" not in lines:
            bands.append(_band(left, right, kind))
        word = _word(row)
        if word and right:
            labels.append(_label(_RIGHT - 8, right, kind, word, "end"))
        elif word and left:
            labels.append(_label(_LEFT + _BOX + 8, left, kind, word, "start"))
    total = [max(((cell.offset + cell.size) // 8 for cell in _cells(one.rows, side)), default=0) for side in (1, 2)]
    title = f"Memory map of the {one.side} of {name}: {total[0]} bytes in the old release, {total[1]} in the new one"
    heads = (
        f'<text class="head" x="{_LEFT}" y="18">old, {total[0]} bytes</text>'
        f'<text class="head" x="{_RIGHT}" y="18">new, {total[1]} bytes</text>'
    )
    boxes = [_drawn(box, _LEFT, classes) for box in old] + [_drawn(box, _RIGHT, classes) for box in new]
    return (
        f'<div class="scroll"><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{_text(title)}">'
        f"{heads}{''.join(bands)}{''.join(boxes)}{''.join(labels)}</svg></div>"
    )


def _cells(rows: Sequence[Row], side: int) -> Iterator[Cell]:
    for row in rows:
        cell = row[side]
        if isinstance(cell, Cell):
            yield cell


class _Group:
    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.name = ""
        self.inside: list[_Group] = []


def _stack(cells: Sequence[object]) -> Iterator[_Box]:
    """The cells of one side in memory order, each with its place; members below the struct that holds them."""
    root = _Group(Cell("open", "", 0, 0, 0))
    path = [root]
    for cell in cells:
        if not isinstance(cell, Cell):
            continue
        if cell.kind == "close":
            path.pop().name = cell.text.removeprefix("}").strip(" ;")
            continue
        group = _Group(cell)
        path[-1].inside.append(group)
        if cell.kind == "open":
            path.append(group)
    yield from _placed(root, _TOP)


def _placed(group: _Group, y: float) -> list[_Box]:
    out: list[_Box] = []
    inside = group.inside
    if not group.cell.text.startswith("union"):
        inside = sorted(inside, key=lambda one: one.cell.offset)
    for one in inside:
        cell = one.cell
        height = 18.0 if cell.kind in ("hole", "padding") else 24 + 5 * max(0.0, math.log2(max(cell.size, 1) / 64))
        text = f"{cell.text.rstrip('{ ')} {one.name}".strip() if cell.kind == "open" else cell.text.strip("/*; ")
        height = 22 if cell.kind == "open" else height
        below = _placed(one, y + height + 3) if cell.kind == "open" else []
        end = (below[-1].end + 4) if below else y + height
        out += [_Box(cell, text, y, height, end), *below]
        y = end + 3
        if below:
            # The last of a union's or struct's members need not reach lowest.
            out[-len(below) - 1] = out[-len(below) - 1]._replace(end=max(box.end for box in below) + 4)
            y = out[-len(below) - 1].end + 3
    return out


def _class(row: Row) -> str:
    return {"+": "added", "-": "removed", "!": "lost", "~": "moved"}.get(row.mark, "same")


def _word(row: Row) -> str:
    kinds = ", ".join(dict.fromkeys(change.kind for change in row.changes))
    if row.mark == "-" and row.new is None:
        return "dropped" if row.changes else ""
    if row.mark == "+" and row.old is None and row.new is not None and row.changes:
        default = next((tag for tag in row.new.tags if tag.startswith(f"{PREFIX}default=")), "=zero")
        return f"new, {default.partition('=')[2]}" if kinds == "added" else kinds
    return kinds


def _band(left: _Box, right: _Box, kind: str) -> str:
    x, to, middle = _LEFT + _BOX, _RIGHT, _WIDTH / 2
    top, low, end, under = left.y, left.y + left.height, right.y, right.y + right.height
    return (
        f'<path class="{kind}" d="M{x} {top:.1f}C{middle} {top:.1f} {middle} {end:.1f} {to} {end:.1f}'
        f'L{to} {under:.1f}C{middle} {under:.1f} {middle} {low:.1f} {x} {low:.1f}Z"/>'
    )


def _label(x: float, box: _Box, kind: str, word: str, anchor: str) -> str:
    return (
        f'<text class="note {kind}" x="{x}" y="{box.y + box.height / 2 + 4:.1f}" text-anchor="{anchor}">'
        f"{_text(word)}</text>"
    )


def _drawn(box: _Box, x: float, classes: dict[int, str]) -> str:
    cell = box.cell
    inset = _INDENT * cell.depth
    left, width = x + inset, _BOX - inset
    gap, group = cell.kind in ("hole", "padding"), cell.kind == "open"
    kind = classes.get(id(cell), "same")
    look = "gap" if gap else f"group {kind if kind != 'same' else ''}".strip() if group else f"box {kind}"
    place = f"{cell.offset // 8}" + (f":{cell.offset % 8}" if cell.bits else "")
    size = f"{cell.size} bits" if cell.size % 8 or cell.bits else f"{cell.size // 8} B"
    middle = box.y + (18 if gap else box.height) / 2 + 4
    room = int((width - 70 - _CHARACTER * len(size)) / _CHARACTER)
    shown = box.text if len(box.text) <= room else box.text[: max(1, room - 1)] + "\u2026"
    tags = "".join(f", {tag}" for tag in cell.tags)
    return (
        f'<g><title>{_text(f"{box.text}: offset {place}, {size}{tags}")}</title>'
        f'<rect class="{look}" x="{left}" y="{box.y:.1f}" width="{width}" height="{box.end - box.y:.1f}" rx="3"/>'
        f'<text class="dim" x="{left + 6}" y="{middle:.1f}">{place}</text>'
        f'<text class="{"dim" if gap else "name"}" x="{left + 44}" y="{middle:.1f}">{_text(shown)}</text>'
        f'<text class="dim" x="{left + width - 6}" y="{middle:.1f}" text-anchor="end">{size}</text></g>'
    )
