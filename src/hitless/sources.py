"""Whatever describes maps, as one thing: an object file, a bundle, a snapshot file, a pinned map, a pin root."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from hitless.bundle import MANIFEST, Bundle, object_name, unite_maps
from hitless.errors import BundleError
from hitless.layout.dwarf import Dwarf
from hitless.layout.elf import Binding, read_object
from hitless.layout.model import MapSpec, ObjectSpec
from hitless.layout.rules import MapRules

__all__ = ["Source", "read_objects", "read_source"]


class Source(msgspec.Struct, frozen=True):
    """Maps by name from ``path``, with the rules of its manifest and the objects where there are any.

    ``kind`` is ``object``, ``bundle``, ``snapshot``, ``pinned map`` or ``pin root``; ``digest`` is a bundle's.
    """

    path: str
    kind: str
    maps: Mapping[str, MapSpec]
    objects: Mapping[str, ObjectSpec] = {}
    rules: Mapping[str, MapRules] = {}
    digest: str | None = None

    @property
    def file(self) -> str:
        """The file that says what is in it: a bundle's manifest, else ``path`` itself."""
        return str(Path(self.path) / MANIFEST) if self.kind == "bundle" else self.path


def read_source(what: str, types: Dwarf | None = None) -> Source:
    """Read ``what``. Raises HitlessError by kind; never needs the kernel unless ``what`` is on a bpffs.

    ``types`` are for the maps of an object that carry none: of those, the one that fits by size and name.
    """
    path = Path(what)
    if not path.exists():
        raise BundleError(
            f"{what} is not there; name a .o file, a bundle, a snapshot file, a pinned map or a pin root", path=what
        )
    if path.is_dir():
        # A bpffs refuses a dot in any name, so what has a manifest needs no kernel to be told from a pin root.
        if not any(entry.name == MANIFEST for entry in path.iterdir()):
            if _on_bpffs(path):
                return _read_node(path)
            raise BundleError(f"{what} is a directory without a {MANIFEST}, so it is no bundle", path=what)
        bundle = Bundle.load(path)
        objects = {item.spec.name: item.spec for item in bundle.objects}
        return Source(what, "bundle", bundle.maps, objects, bundle.rules, bundle.digest)
    # A pin has no bytes; whatever has some is a file like any other, on any system.
    if not path.stat().st_size and _on_bpffs(path):
        from hitless.kernel.maps import Map

        with Map.open(path.resolve()) as pinned:  # the name is the user's own, so a link in it is meant
            return Source(what, "pinned map", {path.name: pinned.spec(path.name)})
    data = path.read_bytes()
    if data[:4] == b"\x7fELF" or path.suffix == ".o":
        read = _bound(data, object_name(path.name), types)
        return Source(what, "object", unite_maps([read]), {read.name: read})
    # Only here: a check of objects must start at once.
    from hitless.layout import kmesh, snapshot

    registry = kmesh.load(data) if kmesh.is_kmesh(data) else snapshot.load(data)
    return Source(what, "snapshot", unite_maps(registry.values()), registry)


def _bound(data: bytes, name: str, types: Dwarf | None) -> ObjectSpec:
    read = read_object(data, name, types=types)
    if types is None:
        return read
    # Who gives a header for just this object has accepted what fits alone.
    guessed = {
        spec.name: Binding(spec.inferred_type("key"), spec.inferred_type("value"))
        for spec in read.maps
        if spec.inferred
    }
    return read_object(data, name, guessed, types) if guessed else read


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


def read_objects(what: str) -> Mapping[str, ObjectSpec]:
    """The objects that ``what`` holds; a pinned map stands as the only map of an object of its name."""
    source = read_source(what)
    if source.objects:
        return source.objects
    return {name: ObjectSpec(name, (spec,), ()) for name, spec in source.maps.items()}

