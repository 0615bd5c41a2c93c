"""One kind of change: two objects compiled; the old one loaded by a loader that knows nothing of hitless, filled and
adopted; then the upgrade to the new one, and what is there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

import hitless
from hitless.bundle import unite_maps
from hitless.compare import compare
from hitless.kernel.links import Link
from hitless.kernel.programs import load_object
from hitless.layout.codec import encode
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
    """From what another loader made of the old object to the new one. ``objects`` are by C file and "old" or "new"."""
    folder = lab.scratch / f"catalogue-{number}"
    releases = {
        "old": _bundle(folder / "old", objects[kind.source, "old"], "1.0", kind.old_rules, ""),
        "new": _bundle(folder / "new", objects[kind.source, "new"], "2.0", kind.rules, kind.converters),
    }
    places = {"cgroup": str(lab.cgroup)}
    node = hitless.Node(lab.bpffs / f"catalogue-{number}")
    old = hitless.Bundle.load(releases["old"], places)
    _start(old, node.root, lab.cgroup, kind)
    hitless.adopt(node, old)
    try:
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


def _start(old: hitless.Bundle, root: Path, cgroup: Path, kind: Kind) -> None:
    """As another loader does it: maps pinned by their names, links as well, and the rest forgotten."""
    (root / "map").mkdir(parents=True)
    for item in old.objects:
        sections = {name: spec for name, spec in unite_maps([item.spec]).items() if "." in name}
        loaded = load_object(item.data, item.spec.name, {}, sections, item.spec.programs)
        for name, held in loaded.maps.items():
            for key, value in kind.before.get(name, {}).items():
                spec = old.maps[name]
                assert spec.key is not None and spec.value is not None
                held.update(encode(spec.key, _struct(key, spec.key)), encode(spec.value, value))
            if "." not in name:
                held.pin(root / "map" / name)
        for entry in old.attach:
            fd = os.open(cgroup, os.O_RDONLY)
            program, attach_type = loaded.programs[entry.program], old.programs[entry.program].attach_type
            with Link.attach(program, fd, attach_type, cgroup) as link:
                link.pin(root / entry.link)
            os.close(fd)


def _bundle(directory: Path, item: Path, version: str, rules: str, converters: str) -> Path:
    directory.mkdir(parents=True)
    file = "new.bpf.o" if version == "2.0" else "old.bpf.o"
    (directory / file).write_bytes(item.read_bytes())
    (directory / "bundle.toml").write_text(
        f'[bundle]\nname = "catalogue"\nversion = "{version}"\n[public]\nmaps = "map"\n'
        f'[[object]]\nfile = "{file}"\n{rules}'
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
