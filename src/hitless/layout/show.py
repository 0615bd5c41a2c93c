"""Layouts and their differences as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from hitless.layout.beside import Cell, Row, declare, element, gaps, sides
from hitless.layout.diff import Change, MapDiff
from hitless.layout.model import Enum, Field, MapSpec, Record, Type

__all__ = ["describe", "diff_lines", "show_diff", "show_map", "show_type"]

_INDENT = "    "
_COLUMN = 52
_SIGNS = {"added": "+", "removed": "-", "enum-added": "+", "enum-removed": "-"}
_CONTEXT = 2  # unchanged rows that are shown around a change in a long struct


def show_type(made: Type) -> str:
    """The type as C would declare it, with offset and size in bytes of each field, holes and tags, as pahole does."""
    lines: list[str] = []
    if isinstance(made, Record):
        _record(made, "", 0, 0, made.size, (), lines)
    else:
        _line(lines, 0, f"{declare(made, '')};", f"size: {made.size}")
        if isinstance(made, Enum):
            lines += [f"{_INDENT}{name} = {value}" for name, value in made.values]
    return "\n".join(lines)


def show_map(spec: MapSpec) -> str:
    """One map: its definition in a line, then its key and its value."""
    lines = [f"map {spec.name}: {', '.join((*describe(spec), *(f'tag {tag}' for tag in spec.tags)))}"]
    for side, made, size in (("key", spec.key, spec.key_size), ("value", spec.value, spec.value_size)):
        guess = spec.inferred_type(side)
        if made is not None:
            lines += _indented(f"{side}{' (inferred)' if guess else ''}:", show_type(made))
        elif size:
            proposal = f"; {guess} alone fits by size and name" if guess else ""
            lines.append(f"{_INDENT}{side}: {size} bytes, type not known{proposal}")
    if spec.inner is not None:
        lines += _indented("inner:", show_map(spec.inner))
    return "\n".join(lines)


def describe(spec: MapSpec) -> list[str]:
    """A map's definition without its types, fact by fact."""
    facts = [spec.type, f"key {spec.key_size} bytes", f"value {spec.value_size} bytes", f"{spec.max_entries} entries"]
    if spec.flags:
        facts.append(f"flags {spec.flags:#x}")
    if spec.extra:
        facts.append(f"extra {spec.extra:#x}")
    if spec.pinned_by_name:
        facts.append("pinned by name")
    return facts


def show_diff(diff: MapDiff, old: MapSpec | None = None, new: MapSpec | None = None, width: int | None = None) -> str:
    """What changed in one map, old beside new, and what is lost, and why; see :func:`diff_lines`."""
    return "\n".join(line for _, line in diff_lines(diff, old, new, width))


def diff_lines(
    diff: MapDiff, old: MapSpec | None = None, new: MapSpec | None = None, width: int | None = None
) -> list[tuple[str, str]]:
    """The lines of :func:`show_diff`, each with its mark: ``+``, ``-``, ``~``, ``!`` a loss, ``#`` a hole, or a space.

    With both definitions at hand the structs stand side by side, if ``width`` columns hold them; without, or if not,
    there is a line for each change.
    """
    head = f"{diff.name}: {diff.verdict}"
    if diff.was is not None:
        head += f" (was {diff.was})"
    if old is None or new is None:
        return [(" ", head), *_listed(diff.changes)]
    found, rest = sides(diff, old, new)
    tables = []
    for one in found:
        tables += [(" ", f"  {one.side}, old | new, with offset and size in bytes:"), *_table(one.rows)]
    if width is not None and any(len(line) > width for _, line in tables):
        return [(" ", head), *_listed(diff.changes)]
    return [(" ", head), *_listed(rest), *tables]


def _listed(changes: Sequence[Change]) -> list[tuple[str, str]]:
    rows = [(_SIGNS.get(c.kind, "~"), c.path or "(map)", c.old or "", c.new or "", c.kind) for c in changes]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines = []
    for row, change in zip(rows, changes, strict=True):
        sign, path, old, new, kind = row
        mark = "!" if sign == "~" and (change.loss or change.reason) else sign
        text = f"  {sign} {path:<{widths[1]}}  {old:<{widths[2]}}  ->  {new:<{widths[3]}}  {kind}"
        lines.append((mark, text.rstrip()))
        lines += _notes(change)
    return lines


def _notes(change: Change, path: str = "") -> list[tuple[str, str]]:
    notes = (("!", "lost", change.loss), ("!", "reason", change.reason), ("~", "hint", change.hint))
    lead = f"{path}: " if path else ""
    return [(mark, f"      {word}: {lead}{text}") for mark, word, text in notes if text]


def _table(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Both sides in columns: text, offset, size; then what happened. What is lost stands below."""
    shown = _folded(rows)
    cells = [[_place(row.old), _place(row.new)] for row in shown if row is not None]
    widths = [[max(len(pair[side][part]) for pair in cells) for part in range(3)] for side in (0, 1)]
    lines: list[tuple[str, str]] = []
    told: set[int] = set()
    for row in shown:
        if row is None:
            lines.append((" ", "        ..."))
            continue
        text = []
        for side, cell in enumerate((row.old, row.new)):
            parts = _place(cell)
            text.append(
                f"{parts[0]:<{widths[side][0]}}  {parts[1]:>{widths[side][1]}}  {parts[2]:>{widths[side][2]}}"
            )
        what = ", ".join(dict.fromkeys(_kinds(row)))
        gap = (row.new or row.old or Cell("field", "", 0, 0, 0)).kind in ("hole", "padding")
        lines.append(("#" if gap else row.mark, f"  {row.mark} {text[0]}  |  {text[1]}  {what}".rstrip()))
        for change in row.changes:
            if id(change) not in told:
                told.add(id(change))
                lines += _notes(change, _unless_named(change))
    return lines


def _unless_named(change: Change) -> str:
    said = f"{change.loss} {change.reason} {change.hint}"
    return "" if change.path and change.path in said else change.path


def _kinds(row: Row) -> list[str]:
    return [f"{c.kind} {c.old or c.new}" if c.kind.startswith("enum-") else c.kind for c in row.changes]


def _folded(rows: Sequence[Row]) -> list[Row | None]:
    """The rows, with None for each long run of unchanged ones."""
    near: set[int] = set()
    for number, row in enumerate(rows):
        if row.mark != " " or row.changes or (row.old or row.new or Cell("field", "", 0, 0, 0)).kind == "open":
            near.update(range(number - _CONTEXT, number + _CONTEXT + 1))
    near.update((0, len(rows) - 1))
    out: list[Row | None] = []
    for number, row in enumerate(rows):
        if number in near or (number - 1 in near and number + 1 in near):
            out.append(row)
        elif out and out[-1] is not None:
            out.append(None)
    return out


def _place(cell: Cell | None) -> tuple[str, str, str]:
    if cell is None:
        return "", "", ""
    text = "    " * cell.depth + cell.text
    if cell.kind in ("hole", "padding", "open"):
        return text, "", ""
    if cell.bits:
        return text, f"{cell.offset // 8}:{cell.offset % 8}", f"{cell.bits}b"
    return text, str(cell.offset // 8), str(cell.size // 8)


def _indented(head: str, text: str) -> list[str]:
    first, *rest = text.split("\n")
    return [f"{_INDENT}{head} {first}", *(_INDENT + line for line in rest)]


def _line(lines: list[str], depth: int, text: str, note: str) -> None:
    lines.append(f"{_INDENT * depth + text:<{_COLUMN}} /* {note} */")


def _record(made: Record, name: str, base: int, depth: int, size: int, tags: tuple[str, ...], lines: list[str]) -> None:
    kind = "union" if made.union else "struct"
    lines.append(f"{_INDENT * depth}{kind} {made.name + ' ' if made.name else ''}{{")
    holes = {after: end - start for after, start, end in gaps(made)}
    padding = holes.pop(len(made.fields) - 1, 0) if made.fields else 0
    _hole(lines, depth + 1, holes.get(-1, 0))
    for number, field in enumerate(made.fields):
        _field(field, base, depth + 1, lines)
        _hole(lines, depth + 1, holes.get(number, 0))
    _hole(lines, depth + 1, padding, "padding")
    if depth:
        _line(lines, depth, f"}}{' ' + name if name else ''};", "  ".join((f"{base:>5} {size:>5}", *tags)))
        return
    facts = [f"size: {made.size}", f"members: {len(made.fields)}"]
    if holes:
        facts += [f"holes: {len(holes)}", f"sum holes: {_size(sum(holes.values()))}"]
    if padding:
        facts.append(f"padding: {_size(padding)}")
    lines += [f"{_INDENT}/* {', '.join(facts)} */", "};"]


def _field(field: Field, base: int, depth: int, lines: list[str]) -> None:
    at = base + field.offset // 8
    inner, counts = element(field.type)
    if isinstance(inner, Record):
        _record(inner, f"{field.name}{counts}", at, depth, field.type.size, field.tags, lines)
        return
    text = declare(field.type, field.name)
    place = f"{at:>5} {field.type.size:>5}"
    if field.bits:
        # As pahole does: where the unit of the declared type begins, then the bit in it.
        unit = 8 * field.type.size
        text += f":{field.bits}"
        place = f"{base + field.offset // unit * field.type.size:>5}:{field.offset % unit:>2} {field.type.size:>2}"
    _line(lines, depth, text + ";", "  ".join((place, *field.tags)))


def _hole(lines: list[str], depth: int, bits: int, word: str = "hole") -> None:
    if bits:
        size = f"{bits // 8} bytes" if not bits % 8 else f"{bits} bits"
        lines.append(f"{_INDENT * depth}/* XXX {size} {word} */")


def _size(bits: int) -> str:
    return str(bits // 8) if not bits % 8 else f"{bits} bits"
