"""Layouts and their differences as text for people."""

from __future__ import annotations

from hitless.layout.diff import MapDiff
from hitless.layout.model import Array, Enum, Field, MapSpec, Pointer, Record, Type

__all__ = ["show_diff", "show_map", "show_type"]

_INDENT = "    "
_COLUMN = 52
_SIGNS = {"added": "+", "removed": "-", "enum-added": "+", "enum-removed": "-"}


def show_type(made: Type) -> str:
    """The type as C would declare it, with offset and size in bytes of each field, holes and tags, as pahole does."""
    lines: list[str] = []
    if isinstance(made, Record):
        _record(made, "", 0, 0, made.size, (), lines)
    else:
        _line(lines, 0, f"{_declare(made, '')};", f"{made.size} bytes")
        if isinstance(made, Enum):
            lines += [f"{_INDENT}{name} = {value}" for name, value in made.values]
    return "\n".join(lines)


def show_map(spec: MapSpec) -> str:
    """One map: its definition in a line, then its key and its value."""
    facts = [spec.type, f"key {spec.key_size} bytes", f"value {spec.value_size} bytes", f"{spec.max_entries} entries"]
    if spec.flags:
        facts.append(f"flags {spec.flags:#x}")
    if spec.extra:
        facts.append(f"extra {spec.extra:#x}")
    if spec.pinned_by_name:
        facts.append("pinned by name")
    facts += [f"tag {tag}" for tag in spec.tags]
    lines = [f"map {spec.name}: {', '.join(facts)}"]
    for side, made, size in (("key", spec.key, spec.key_size), ("value", spec.value, spec.value_size)):
        if made is not None:
            lines += _indented(f"{side}:", show_type(made))
        elif size:
            lines.append(f"{_INDENT}{side}: {size} bytes, type not known")
    if spec.inner is not None:
        lines += _indented("inner:", show_map(spec.inner))
    return "\n".join(lines)


def show_diff(diff: MapDiff) -> str:
    """What changed in one map: a line for each change, old beside new, and below it what is lost, and why."""
    head = f"{diff.name}: {diff.verdict}"
    if diff.was is not None:
        head += f" (was {diff.was})"
    rows = [(_SIGNS.get(c.kind, "~"), c.path or "(map)", c.old or "", c.new or "", c.kind) for c in diff.changes]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    lines = [head]
    for row, change in zip(rows, diff.changes, strict=True):
        sign, path, old, new, kind = row
        lines.append(f"  {sign} {path:<{widths[1]}}  {old:<{widths[2]}}  ->  {new:<{widths[3]}}  {kind}".rstrip())
        notes = (("lost", change.loss), ("reason", change.reason), ("hint", change.hint))
        lines += [f"      {word}: {text}" for word, text in notes if text]
    return "\n".join(lines)


def _indented(head: str, text: str) -> list[str]:
    first, *rest = text.split("\n")
    return [f"{_INDENT}{head} {first}", *(_INDENT + line for line in rest)]


def _line(lines: list[str], depth: int, text: str, note: str) -> None:
    lines.append(f"{_INDENT * depth + text:<{_COLUMN}} /* {note} */")


def _record(made: Record, name: str, base: int, depth: int, size: int, tags: tuple[str, ...], lines: list[str]) -> None:
    kind = "union" if made.union else "struct"
    lines.append(f"{_INDENT * depth}{kind} {made.name + ' ' if made.name else ''}{{")
    at = 0
    for field in made.fields:
        if not made.union:
            _hole(lines, depth + 1, at, field.offset)
        _field(field, base, depth + 1, lines)
        at = max(at, field.offset + (field.bits or 8 * field.type.size))
    if made.fields:
        _hole(lines, depth + 1, at, 8 * made.size, "padding")
    note = f"{base:>4} {size:>5}" if depth else f"{made.size} bytes"
    _line(lines, depth, f"}}{' ' + name if name else ''};", "  ".join((note, *tags)))


def _field(field: Field, base: int, depth: int, lines: list[str]) -> None:
    at = base + field.offset // 8
    element, counts = _element(field.type)
    if isinstance(element, Record):
        _record(element, f"{field.name}{counts}", at, depth, field.type.size, field.tags, lines)
        return
    if field.bits:
        place = f"{at:>4}:{field.offset % 8} {field.bits} bits"
        text = f"{_declare(field.type, field.name)}:{field.bits};"
    else:
        place = f"{at:>4} {field.type.size:>5}"
        text = f"{_declare(field.type, field.name)};"
    _line(lines, depth, text, "  ".join((place, *field.tags)))


def _hole(lines: list[str], depth: int, start: int, end: int, word: str = "hole") -> None:
    if end <= start:
        return
    size = f"{(end - start) // 8} bytes" if not (end - start) % 8 else f"{end - start} bits"
    lines.append(f"{_INDENT * depth}/* {size} {word} */")


def _element(made: Type) -> tuple[Type, str]:
    counts = ""
    while isinstance(made, Array):
        counts += f"[{made.count or ''}]"
        made = made.element
    return made, counts


def _declare(made: Type, name: str) -> str:
    element, counts = _element(made)
    match element:
        case Pointer(target=target):
            return f"{target} *{name}{counts}"
        case Enum():
            spelled = f"enum {element.name or '{...}'}"
        case Record():
            spelled = f"{'union' if element.union else 'struct'} {element.name or '{...}'}"
        case _:
            spelled = element.name
    return f"{spelled} {name}{counts}" if name else spelled + counts
