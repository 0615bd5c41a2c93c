"""The page that ``hitless check --format html`` writes, as a browser would read it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from tests.cli.test_commands import hitless_command
from tests.releases import COUNTING, write_release

FIRST = """
struct inner { __u32 p; __u8 q; };
struct tally { __u32 count; __u8 gone; __u32 last; struct inner list[2]; };
MAP(tally, HASH, 1024, __u32, struct tally);
MAP(same, HASH, 64, __u32, __u64);
"""
SECOND = """
struct inner { __u64 p; __u8 q; };
struct tally { __u64 since TAG("default=7"); __u64 count; __u32 port TAG("was=last"); struct inner list[4]; };
MAP(tally, HASH, 2048, __u32, struct tally);
MAP(same, HASH, 64, __u32, __u64);
"""
_VOID = ("meta",)


class _Reader(HTMLParser):
    """Checks that tags are balanced, and collects what a browser would load, run or show."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data)


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    top = tmp_path_factory.mktemp("page")
    return tuple(  # type: ignore[return-value]
        write_release(top / name, name, source + COUNTING) for name, source in (("1", FIRST), ("2", SECOND))
    )


@pytest.fixture(scope="module")
def page(releases: tuple[Path, Path]) -> str:
    return hitless_command("check", *releases, "--format", "html", code=1)


def test_it_says_what_is_lost_and_what_to_do_before_anything_else(page: str) -> None:
    text = read(page).text
    verdict = next(line for line in text if line.startswith("An upgrade would lose some of tally"))
    assert "--allow-loss tally" in verdict
    assert "gone is dropped" in text
    assert text.index(verdict) < text.index("gone is dropped")


def test_it_draws_each_field_old_and_new_and_a_band_for_each_that_moves(page: str) -> None:
    reader = read(page)
    shown = " | ".join(reader.text)
    for line in ("__u32 count", "__u64 count", "__u32 last", "__u32 port", "struct inner list[2]", "3 bytes hole"):
        assert line in shown
    words = {"dropped", "new, 7", "moved, widened", "renamed, moved", "old, 28 bytes", "new, 88 bytes"}
    assert words <= set(reader.text)
    bands = [attrs["class"] for tag, attrs in reader.tags if tag == "path"]
    # count, last -> port, list[].p, list[].q; what is dropped or new has none.
    assert bands == ["moved"] * 4
    assert sum(tag == "svg" for tag, _ in reader.tags) == 1
    assert "same" in shown.split("Unchanged, and kept as they are: ")[1]


def test_boxes_of_one_side_never_overlap_and_lie_inside_the_drawing(page: str) -> None:
    (view,) = re.findall(r'viewBox="0 0 (\d+) (\d+)"', page)
    boxes = re.findall(r'<rect class="(?:box|gap)[^"]*" x="(\d+)" y="([\d.]+)" width="(\d+)" height="([\d.]+)"', page)
    for side in (False, True):
        spans = sorted(
            (float(y), float(y) + float(height)) for x, y, _, height in boxes if (int(x) > int(view[0]) // 2) is side
        )
        assert len(spans) > 4
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert spans[-1][1] <= int(view[1])
    assert all(int(x) + int(width) <= int(view[0]) for x, _, width, _ in boxes)


def test_it_needs_nothing_from_anywhere_and_runs_nothing(page: str) -> None:
    reader = read(page)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & {tag for tag, _ in reader.tags}
    for _, attrs in reader.tags:
        assert not {"src", "href", "xlink:href", "style"} & set(attrs)
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_names_that_are_markup_are_shown_and_never_become_any(releases: tuple[Path, Path], tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><b x="&'
    snapshot = json.dumps(json.loads(hitless_command("snapshot", releases[0])))
    text = snapshot.replace('"tally"', json.dumps(evil)).replace('"gone"', json.dumps(evil))
    file = tmp_path / "<i>.json"
    file.write_text(text)
    page = hitless_command("check", file, releases[1], "--format", "html", code=1)
    reader = read(page)
    # The page has <b> of its own, but none with an attribute.
    assert not {"script", "i"} & {tag for tag, _ in reader.tags}
    assert not any(attrs for tag, attrs in reader.tags if tag == "b")
    assert any(evil in text for text in reader.text)
