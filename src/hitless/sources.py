"""Whatever describes maps, as one thing: an object file, a bundle, a snapshot file, a pinned map, a pin root."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from hitless.errors import BundleError
from hitless.layout import snapshot
from hitless.layout.diff import MapDiff, diff_maps
from hitless.layout.elf import read_object
from hitless.layout.model import MapSpec, ObjectSpec
from hitless.layout.rules import MapRules
from hitless.upgrade.bundle import MANIFEST, Bundle, unite_maps

__all__ = ["Comparison", "Source", "compare", "read_objects", "read_source"]


class Source(msgspec.Struct, frozen=True):
    """Maps by name from ``path``, with the rules of its manifest and the objects where there are any.

    ``kind`` is ``object``, ``bundle``, ``snapshot``, ``pinned map`` or ``pin root``.
    """

    path: str
    kind: str
    maps: Mapping[str, MapSpec]
    objects: Mapping[str, ObjectSpec] = {}
    rules: Mapping[str, MapRules] = {}


def read_source(what: str) -> Source:
    """Read ``what``. Raises HitlessError by kind; never needs the kernel unless ``what`` is on a bpffs."""
    path = Path(what)
    if not path.exists():
        raise BundleError(
            f"{what} is not there; name a .o file, a bundle, a snapshot file, a pinned map or a pin root", path=what
        )
    if path.is_dir() and _on_bpffs(path):
        return _read_node(path)
    if path.is_dir():
        if not (path / MANIFEST).exists():
            raise BundleError(f"{what} is a directory without a {MANIFEST}, so it is no bundle", path=what)
        bundle = Bundle.load(path)
        objects = {item.spec.name: item.spec for item in bundle.objects}
        return Source(what, "bundle", bundle.maps, objects, bundle.rules)
    # Only on a bpffs is the kernel needed; a laptop without one can look at files.
    if _on_bpffs(path):
        from hitless.kernel.maps import Map

        with Map.open(path) as pinned:
            return Source(what, "pinned map", {path.name: pinned.spec(path.name)})
    data = path.read_bytes()
    if data[:4] == b"\x7fELF" or path.suffix == ".o":
        read = read_object(data, path.name.removesuffix(".o").removesuffix(".bpf"))
        return Source(what, "object", unite_maps([read]), {read.name: read})
    registry = snapshot.load(data)
    return Source(what, "snapshot", unite_maps(registry.values()), registry)


def _read_node(root: Path) -> Source:
    from hitless.upgrade.node import Node

    current = Node(root).observe().current
    if current is None:
        raise BundleError(f"{root} is a pin root where nothing of hitless runs", path=str(root))
    maps = {name: live.spec for name, live in current.maps.items()}
    return Source(str(root), "pin root", maps, {item.name: item for item in current.record.objects})


def _on_bpffs(path: Path) -> bool:
    if not Path("/proc/self/mountinfo").exists():
        return False
    from hitless.kernel.mounts import filesystem

    return filesystem(path) == "bpf"


class Comparison(msgspec.Struct, frozen=True):
    """What changed from ``old`` to ``new``, map by map; ``verdict`` is the worst of the maps' verdicts."""

    old: str
    new: str
    verdict: str
    maps: tuple[MapDiff, ...]
    schema: int = 1


# From best to worst; an added map loses nothing.
_ORDER = ("identical", "added", "lossless", "lossy", "removed", "needs-converter", "not-carried", "unknown")


def compare(old: str, new: str) -> Comparison:
    """Compare the maps of two sources under the rules of the new one. Raises HitlessError by kind."""
    before, after = read_source(old), read_source(new)
    if before.kind == after.kind == "pinned map" and set(before.maps) != set(after.maps):
        # Two pinned maps are compared with each other, whatever they are called.
        (spec,) = before.maps.values()
        (name,) = after.maps
        before = msgspec.structs.replace(before, maps={name: msgspec.structs.replace(spec, name=name)})
    diffs = diff_maps(_named(before), _named(after), after.rules)
    worst = max((diff.verdict for diff in diffs), key=_ORDER.index, default="identical")
    return Comparison(old, new, worst, diffs)


def read_objects(what: str) -> Mapping[str, ObjectSpec]:
    """The objects that ``what`` holds; a pinned map stands as the only map of an object of its name."""
    source = read_source(what)
    if source.objects:
        return source.objects
    return {name: ObjectSpec(name, (spec,), ()) for name, spec in source.maps.items()}


def _named(source: Source) -> list[MapSpec]:
    return [msgspec.structs.replace(spec, name=name) for name, spec in source.maps.items()]
