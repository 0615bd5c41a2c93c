"""One kind of change: two objects compiled, the old one applied and filled, the new one applied, and what is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

import hitless
from hitless.compare import compare
from meshd.demo.lab import Lab
from tests.catalogue.changes import Kind
from tests.releases import compile_object

__all__ = ["Outcome", "compiled", "run", "table"]

HERE = Path(__file__).parent


class Outcome(msgspec.Struct, frozen=True):
    """What became of the entries of one kind: ``after`` by map, or the words of the ``refusal``."""

    kind: Kind
    verdict: str
    after: Mapping[str, Mapping[Any, Any]] = {}
    refusal: str | None = None

    @property
    def problem(self) -> str | None:
        """How it is not what it should be."""
        wanted = self.kind
        if self.verdict != wanted.verdict:
            return f"{wanted.change}: {self.verdict}, not {wanted.verdict}"
        if wanted.refused is not None:
            refused = self.refusal is not None and wanted.refused in self.refusal and not self.after
            return None if refused else f"{wanted.change}: not refused as it should be: {self.refusal or self.after}"
        if self.refusal is not None or self.after != wanted.after:
            return f"{wanted.change}: {self.refusal or self.after}, not {wanted.after}"
        return None


def run(kind: Kind, number: int, lab: Lab, objects: Mapping[tuple[str, str], Path]) -> Outcome:
    """Upgrade from the old object to the new one. ``objects`` are by C file and "old" or "new"."""
    folder = lab.scratch / f"catalogue-{number}"
    releases = {
        "old": _bundle(folder / "old", objects[kind.source, "old"], "1.0", kind.old_rules, ""),
        "new": _bundle(folder / "new", objects[kind.source, "new"], "2.0", kind.rules, kind.converters),
    }
    places = {"cgroup": str(lab.cgroup)}
    node = hitless.Node(lab.bpffs / f"catalogue-{number}")
    hitless.apply(node, hitless.Bundle.load(releases["old"], places))
    try:
        for name, entries in kind.before.items():
            held = node.map(name)
            held.update_many((_struct(key, held.spec.key), value) for key, value in entries.items())
        verdict = "unknown"
        try:
            verdict = compare(str(releases["old"]), str(releases["new"])).verdict
            hitless.apply(node, hitless.Bundle.load(releases["new"], places), kind.allow_loss)
        except hitless.HitlessError as error:
            if isinstance(error, hitless.UnsupportedError):
                verdict = compare(str(releases["old"]), str(objects[kind.source, "new"])).verdict
            intact = {name: _entries(node, name) for name in kind.before}
            assert intact == kind.before, f"{kind.change}: refused, and the old release's entries are {intact}"
            words = error.message.replace(f"{folder}/new/", "").replace("\n ", ";").replace("\n", "; ")
            return Outcome(kind, verdict, refusal=words)
        return Outcome(kind, verdict, {name: _entries(node, name) for name in kind.after})
    finally:
        hitless.unload(node)


def _bundle(directory: Path, item: Path, version: str, rules: str, converters: str) -> Path:
    directory.mkdir(parents=True)
    file = "new.bpf.o" if version == "2.0" else "old.bpf.o"
    (directory / file).write_bytes(item.read_bytes())
    (directory / "bundle.toml").write_text(
        f'[bundle]\nname = "catalogue"\nversion = "{version}"\n[[object]]\nfile = "{file}"\n{rules}'
    )
    if converters:
        (directory / "converters.py").write_text(converters)
    return directory


def _struct(key: Any, made: Any) -> Any:
    return dict(zip((field.name for field in made.fields), key, strict=True)) if isinstance(key, tuple) else key


def _entries(node: hitless.Node, name: str) -> dict[Any, Any]:
    return {tuple(key.values()) if isinstance(key, dict) else key: value for key, value in node.map(name).items()}


def compiled(folder: Path, sources: Iterable[str]) -> dict[tuple[str, str], Path]:
    """Both objects of each C file."""
    found = {}
    for source in dict.fromkeys(sources):
        text = (HERE / f"{source}.bpf.c").read_text() + 'char _license[] SEC("license") = "GPL";\n'
        for side, define in (("old", ""), ("new", "#define NEW\n")):
            found[source, side] = compile_object(define + text, folder / f"{source}-{side}.bpf.o")
    return found


def table(outcomes: Iterable[Outcome]) -> str:
    """Change, verdict, entries before and after; where hitless refuses, its words."""
    rows = [("change", "verdict", "before", "after")]
    for one in outcomes:
        after = f"refused: {one.refusal}" if one.refusal else _shown(one.after)
        rows.append((one.kind.change, one.verdict, _shown(one.kind.before), after))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = [[cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)] for row in rows]
    return "\n".join("  ".join((*cells, row[3])) for cells, row in zip(padded, rows, strict=True))


def _shown(maps: Mapping[str, Mapping[Any, Any]]) -> str:
    texts = []
    for name, entries in maps.items():
        text = ", ".join(f"{key}: {value}" for key, value in entries.items())
        texts.append(f"{name} {{{text if len(text) < 60 else text[:57] + '...'}}}")
    return " ".join(texts)
