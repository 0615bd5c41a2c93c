"""What came of it: pytest's JUnit files read into rows, the table of them, and docs/kernels.md."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from hitless.kernel.features import is_known
from tests.matrix import MatrixError
from tests.matrix.selection import LESS

__all__ = ["SCHEMA", "Results", "Row", "document", "load", "read", "save", "table"]

SCHEMA = 1
"""Of results.json: another number, another meaning."""

_HEAD = ("", "kernel", "Python", "libbpf", "passed", "skipped", "failed", "seconds")


class Row(msgspec.Struct, frozen=True):
    """What one run of tests gave, on one kernel with one Python and one libbpf.

    ``skipped`` counts tests by the feature that they did not find; ``failed`` has the names of tests.
    """

    name: str
    kernel: str
    python: str
    libbpf: str
    passed: int
    skipped: dict[str, int]
    failed: tuple[str, ...]
    seconds: float


class Results(msgspec.Struct, frozen=True):
    """A matrix: its ``rows``, why others are missing (``problems``), and by name what `hitless doctor` told there."""

    rows: tuple[Row, ...]
    problems: dict[str, str] = {}
    doctor: dict[str, Any] = {}
    schema: int = SCHEMA

    @property
    def good(self) -> bool:
        """Whether everything came up and nothing failed."""
        return not self.problems and not any(row.failed for row in self.rows)


def read(name: str, junit: bytes, code: int) -> Row:
    """The row that pytest's JUnit file and exit code make. Raises MatrixError where they say nothing."""
    try:
        suite = next(ElementTree.fromstring(junit).iter("testsuite"))
        facts = {each.attrib["name"]: each.attrib["value"] for each in suite.iter("property")}
        where = facts["kernel"], facts["python"], facts["libbpf"]
    except (ElementTree.ParseError, StopIteration, KeyError) as error:
        raise MatrixError(f"{name}: pytest ended with {code}, and its JUnit file has no test that ran") from error
    passed, skipped, failed = 0, Counter[str](), []
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(_name(case))
        elif (why := case.find("skipped")) is not None:
            reason = why.attrib.get("message", "")
            if is_known(reason.removeprefix("needs ")):
                skipped[reason.removeprefix("needs ")] += 1
            else:
                failed.append(f"{_name(case)} (skipped: {reason})")
        else:
            passed += 1
    if code and not failed:
        failed.append(f"(the session itself, which ended with {code})")
    return Row(name, *where, passed, dict(sorted(skipped.items())), tuple(failed), float(suite.attrib["time"]))


def _name(case: ElementTree.Element) -> str:
    place = case.attrib.get("classname", "").replace(".", "/")
    return f"{place}.py::{case.attrib['name']}" if place else case.attrib["name"]


def table(results: Results) -> str:
    """The table for people: one line a row; below it what failed, by name, and what has no row."""
    cells = [_HEAD, *(_cells(row) for row in results.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    for row in results.rows:
        lines += [f"{row.name}: FAILED {test}" for test in row.failed]
    return "\n".join([*lines, *(f"NO RESULTS {problem}" for problem in results.problems.values())])


def _cells(row: Row) -> tuple[str, ...]:
    skipped = ", ".join(f"{count} {name}" for name, count in row.skipped.items())
    total = sum(row.skipped.values())
    numbers = str(row.passed), f"{total} ({skipped})" if total else "0", str(len(row.failed)), f"{row.seconds:.0f}"
    return (row.name, row.kernel, row.python, row.libbpf, *numbers)


def document(results: Results) -> str:
    """docs/kernels.md."""
    lines = [
        "# Kernels",
        "",
        "Which kernels run hitless' own tests, what each of them can do, and what hitless does where it cannot.",
        "`make matrix` boots Debian's kernels in virtual machines and runs the same tests in each and on the machine",
        "itself, whose kernel is the row *here*; `python -m tests.matrix --docs` then writes this page of what came of",
        "it, and nobody else does. A test skips only where a feature is missing that it names. *Locked down* was",
        f"booted with `{LESS}`,",
        "and *newest* is what Debian had as its newest kernel on that day: these two ran a few of the tests.",
        "",
        *_markdown(
            ("", "kernel", "Python", "libbpf", "passed", "skipped", "failed"),
            [_cells(row)[:-1] for row in results.rows],
        ),
    ]
    for row in results.rows:
        lines += [f"- {row.name} failed `{test}`" for test in row.failed]
    lines += [f"- no results of {name}" for name in results.problems]  # why has paths and addresses of one machine
    doctors = results.doctor.items()
    told = {name: {each["name"]: each for each in doctor.get("features", ())} for name, doctor in doctors}
    features = {name: feature for each in told.values() for name, feature in each.items()}
    if features:
        lines += ["", "## Features", "", *_features(told, features)]
    return "\n".join([*lines, ""])


def _features(told: dict[str, Any], features: dict[str, Any]) -> list[str]:
    """A line for each feature: who has it, what it takes, and what happens without it."""
    rows = []
    for name, feature in features.items():
        has = ["yes" if name in each and each[name]["there"] else "no" for each in told.values()]
        rows.append((f"`{name}`", *has, feature["needs"], feature["without"]))
    return _markdown(("feature", *told, "needs", "without it"), rows)


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]


def save(results: Results, path: Path) -> None:
    """Write results.json."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")


def load(path: Path) -> Results:
    """Read results.json. Raises MatrixError."""
    try:
        results = msgspec.json.decode(path.read_bytes(), type=Results)
    except FileNotFoundError as error:
        raise MatrixError(f"There is no {path}: run `make matrix` first") from error
    except msgspec.DecodeError as error:
        raise MatrixError(f"{path} is not what `make matrix` writes ({error}): run it again") from error
    if results.schema != SCHEMA:
        raise MatrixError(f"{path} has the schema {results.schema}, not {SCHEMA}: run `make matrix` again")
    return results


