"""Two layouts side by side: the rows in which one declares what the other does, holes and all.

Purely for showing. What matches what, and what became of it, was decided by :mod:`hitless.layout.diff`; here its
changes are put beside the lines of C that they are about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from hitless.layout.diff import Change, MapDiff
from hitless.layout.members import SPECIAL, join
from hitless.layout.model import Array, Enum, Field, MapSpec, Pointer, Record, Type

__all__ = ["Cell", "Row", "Sides", "declare", "element", "gaps", "rows", "sides"]

_INDEX = re.compile(r"\[\d*\]")
_GROUP = re.compile(r"\{[^{}]*\}")


class Cell(NamedTuple):
    """A line of one side. ``offset`` (from the start of the whole) and ``size`` are in bits.

    ``kind`` ``open`` and ``close`` are the first and last line of a struct or union that is shown with its members,
    and both have its place. ``depth`` is how many of those are around it.
    """

    kind: Literal["field", "open", "close", "hole", "padding"]
    text: str
    depth: int
    offset: int
    size: int
    bits: int = 0
    tags: tuple[str, ...] = ()


class Row(NamedTuple):
    """What stands side by side; one of both may be missing. ``changes`` are those that are about just this."""

    path: str
    old: Cell | None
    new: Cell | None
    changes: tuple[Change, ...] = ()

    @property
    def mark(self) -> str:
        """``+`` added, ``-`` removed, ``!`` changed with a loss or not convertible, ``~`` changed, or a space."""
        kind = (self.new or self.old or _NOTHING).kind
        if any(change.loss or change.reason for change in self.changes):
            return "!" if self.old and self.new else "-" if self.old else "+"
        if kind in ("hole", "padding"):
            return " "
        if self.old is None or self.new is None:
            return "-" if self.new is None else "+"
        return "~" if self.changes else " "


class Sides(NamedTuple):
    """The key or the value of a map, row by row. ``rows`` is empty if a side's type is not known."""

    side: str
    rows: tuple[Row, ...]


_NOTHING = Cell("hole", "", 0, 0, 0)


def sides(diff: MapDiff, old: MapSpec, new: MapSpec) -> tuple[tuple[Sides, ...], tuple[Change, ...]]:
    """Key and value of a map, each if it changed, and the changes that are about the map or stand in no row."""
    left = list(diff.changes)
    out = []
    for side, before, after in (("key", old.key, new.key), ("value", old.value, new.value)):
        if before is None or after is None:
            continue
        index = _Index(side, before, after, left)
        if not index.found:
            continue
        made = tuple(rows(before, after, index))
        if any(row.changes for row in made):
            out.append(Sides(side, made))
            shown = {id(change) for row in made for change in row.changes}
            left = [change for change in left if id(change) not in shown]
    return tuple(out), tuple(left)


class _Index:
    """The changes of one side by the path of the line that they belong to."""

    def __init__(self, side: str, old: Type, new: Type, changes: Iterable[Change]) -> None:
        names = {field.name for made in (old, new) if isinstance(made, Record) for field in made.fields}
        self.found: dict[str, list[Change]] = {}
        for change in changes:
            path = change.path
            if not path:
                continue
            if side == "key":
                if path != "key" and not path.startswith("key."):
                    continue
                path = path.removeprefix("key").removeprefix(".")
            elif path == "key" or path.startswith("key."):
                # The value may have a field of that name; then both sides are tried and the rows decide.
                if "key" not in names:
                    continue
            elif path == "value" and "value" not in names:
                path = ""
            for one in _paths(path):
                self.found.setdefault(one, []).append(change)

    def at(self, path: str, old: bool, new: bool) -> tuple[Change, ...]:
        found = self.found.get(path, ())
        if old and new:
            return tuple(change for change in found if change.kind != "removed")
        if new:
            return tuple(change for change in found if change.kind != "removed")
        return tuple(change for change in found if change.kind == "removed")

    def was(self, path: str) -> str | None:
        """The sibling's name that a field had, or an empty string if it came from elsewhere."""
        for change in self.found.get(path, ()):
            if change.kind == "renamed" and change.old is not None:
                return "" if "." in change.old or "." in (change.new or "") else change.old
        return None


def _plain(path: str) -> str:
    return _INDEX.sub("", path)


def _paths(path: str) -> Iterator[str]:
    """The path without indices and without groups around it; that of each bitfield if it names a run of them."""
    parts = _plain(path).split(".") if "{" not in path else _split(_plain(path))
    *parents, last = parts
    base = ".".join(part for part in parents if not part.startswith("{"))
    if last.startswith("{") and "|" in last:
        yield join(base, _group(last[1:-1].split("|")))
    elif last.startswith("{"):
        yield from (join(base, name) for name in last[1:-1].split(","))
    else:
        yield join(base, last)


def _group(names: Iterable[str]) -> str:
    return f"{{{'|'.join(sorted(names))}}}"


def _split(path: str) -> list[str]:
    groups = _GROUP.findall(path)
    parts = _GROUP.sub("{}", path).split(".")
    return [groups.pop(0) if part == "{}" and groups else part for part in parts]


def rows(old: Type, new: Type, index: _Index | None = None) -> Iterator[Row]:
    """Both types line by line, aligned by what matches."""
    found = index or _Index("value", old, new, ())
    yield from _pair(Field("", old, 0), Field("", new, 0), "", "", 0, 0, 0, found)


def _pair(
    old: Field | None, new: Field | None, was: str, path: str, at: int, to: int, depth: int, index: _Index
) -> Iterator[Row]:
    """One field of either side or both; ``at`` and ``to`` are where their structs begin, in bits."""
    field = new or old
    if field is None:
        return
    here = path if new is not None else was
    if not field.name and depth:
        here = join(here, _group(_names(element(field.type)[0])))
    changes = index.at(here, old is not None, new is not None)
    before, after = _record(old), _record(new)
    same = old is not None and new is not None and old.type == new.type
    if (same and field.name) or (before is None and after is None):
        yield Row(here, _cell(old, at, depth), _cell(new, to, depth), changes)
        return
    # Where a struct stands beside something else, that is the change, and where it begins they stand side by side.
    mixed = old is not None and new is not None and (before is None or after is None)
    yield Row(here, _cell(old, at, depth, "open"), _cell(new, to, depth, "open"), changes if mixed else ())
    yield from _members(
        before, after, was, path, at + (old.offset if old else 0), to + (new.offset if new else 0), depth + 1, index
    )
    closing = _cell(old, at, depth, "close") if before else None, _cell(new, to, depth, "close") if after else None
    yield Row(here, *closing, () if mixed else changes)


class _Item(NamedTuple):
    """A field, or the gap after field number ``after`` (-1: before the first)."""

    field: Field | None
    after: int
    gap: tuple[int, int] = (0, 0)
    last: bool = False


def _members(
    old: Record | None, new: Record | None, was: str, path: str, at: int, to: int, depth: int, index: _Index
) -> Iterator[Row]:
    olds, news = _items(old), _items(new)
    matched = _match(olds, news, path, index)
    order: list[tuple[int | None, int | None]] = [(matched.get(j), j) for j in range(len(news))]
    taken = set(matched.values())
    for number, item in enumerate(olds):
        if number in taken:
            continue
        previous = next((k for k, (o, _) in enumerate(order) if o is not None and o == number - 1), -1)
        order.insert(len(order) if item.last else previous + 1, (number, None))
    for i, j in order:
        before = olds[i] if i is not None else None
        after = news[j] if j is not None else None
        if (before or after or _Item(None, 0)).field is None:
            yield Row("", _hole(before, at, depth), _hole(after, to, depth))
            continue
        left, right = before.field if before else None, after.field if after else None
        there = join(was, left.name) if left and left.name else was
        here = join(path, right.name) if right and right.name else path
        yield from _pair(left, right, there, here, at, to, depth, index)


def _match(olds: Sequence[_Item], news: Sequence[_Item], path: str, index: _Index) -> dict[int, int]:
    """Number of the new item -> number of the old one."""
    names = {item.field.name: i for i, item in enumerate(olds) if item.field and item.field.name}
    out: dict[int, int] = {}
    for j, item in enumerate(news):
        if item.field and item.field.name:
            former = index.was(join(path, item.field.name))
            if former is not None and former in names:
                out[j] = names[former]
    taken = set(out.values())
    for j, item in enumerate(news):
        if j in out or item.field is None or index.was(join(path, item.field.name)) == "":
            continue
        same = names.get(item.field.name) if item.field.name else None
        if same is None:
            same = _anonymous(item.field, olds, taken)
        if same is not None and same not in taken:
            out[j] = same
            taken.add(same)
    # The gaps behind two fields that match are the same gap, whatever its size.
    numbers = {-1: -1, **out}
    for j, item in enumerate(news):
        if item.field is None:
            for i, other in enumerate(olds):
                if other.field is None and (
                    (item.last and other.last)
                    or (not item.last and not other.last and numbers.get(item.after) == other.after)
                ):
                    out[j] = i
    return out


def _anonymous(field: Field, olds: Sequence[_Item], taken: set[int]) -> int | None:
    """Number of the old field that shares a name with this one, where either has names only inside."""
    mine = {field.name} if field.name else _names(field.type)
    for i, item in enumerate(olds):
        if i in taken or item.field is None or (field.name and item.field.name):
            continue
        if mine & ({item.field.name} if item.field.name else _names(item.field.type)):
            return i
    return None


def _names(made: Type) -> set[str]:
    if not isinstance(made, Record):
        return set()
    return {name for field in made.fields for name in ({field.name} if field.name else _names(field.type))}


def _items(made: Record | None) -> list[_Item]:
    if made is None:
        return []
    out: list[_Item] = []
    holes = {after: (start, end) for after, start, end in gaps(made)}
    last = -1

    def hole(after: int) -> None:
        if after in holes:
            out.append(_Item(None, last, holes[after], after == len(made.fields) - 1))

    hole(-1)
    for number, field in enumerate(made.fields):
        out.append(_Item(field, -1))
        last = len(out) - 1
        hole(number)
    return out


def gaps(made: Record) -> Iterator[tuple[int, int, int]]:
    """Bits that belong to no field: (number of the field before, start, end). A union's only gap is at its end."""
    at = 0
    for number, field in enumerate(made.fields):
        if not made.union and field.offset > at:
            yield number - 1, at, field.offset
        at = max(at, field.offset + (field.bits or 8 * field.type.size))
    if made.fields and 8 * made.size > at:
        yield len(made.fields) - 1, at, 8 * made.size


def _hole(item: _Item | None, base: int, depth: int) -> Cell | None:
    if item is None:
        return None
    start, end = item.gap
    size = f"{(end - start) // 8} bytes" if not (end - start) % 8 else f"{end - start} bits"
    word: Literal["padding", "hole"] = "padding" if item.last else "hole"
    return Cell(word, f"/* {size} {word} */", depth, base + start, end - start)


def _record(field: Field | None) -> Record | None:
    if field is None:
        return None
    inner, _ = element(field.type)
    # What the kernel keeps in a lock or a timer is nobody's field.
    return inner if isinstance(inner, Record) and inner.name not in SPECIAL and inner.fields else None


def _cell(
    field: Field | None, base: int, depth: int, kind: Literal["field", "open", "close"] = "field"
) -> Cell | None:
    if field is None:
        return None
    record = _record(field)
    if record is None or kind == "field":
        kind, text = "field", declare(field.type, field.name) + (f":{field.bits}" if field.bits else "") + ";"
    elif kind == "open":
        text = f"{'union' if record.union else 'struct'} {record.name + ' ' if record.name else ''}{{"
    else:
        name = field.name + element(field.type)[1]
        text = f"}}{' ' + name if name else ''};"
    size = field.bits or 8 * field.type.size
    return Cell(kind, text, depth, base + field.offset, size, field.bits, field.tags)


def element(made: Type) -> tuple[Type, str]:
    """What an array is made of in the end, and its counts as C writes them; any other type, and nothing."""
    counts = ""
    while isinstance(made, Array):
        counts += f"[{made.count or ''}]"
        made = made.element
    return made, counts


def declare(made: Type, name: str) -> str:
    """The declaration of ``name`` in C, without its semicolon; the type alone if the name is empty."""
    inner, counts = element(made)
    match inner:
        case Pointer(target=target):
            return f"{target} *{name}{counts}"
        case Enum():
            spelled = f"enum {inner.name or '{...}'}"
        case Record():
            spelled = f"{'union' if inner.union else 'struct'} {inner.name or '{...}'}"
        case _:
            spelled = inner.name or "(type not known)"
    return f"{spelled} {name}{counts}" if name else spelled + counts
