"""The paths by which a daemon that knows nothing of hitless, and its own loader, find its maps and links. Pure.

Such a daemon has a directory on a bpffs, with pins where it expects them. They stay there: once hitless has taken the
node over, each is a symbolic link into what hitless keeps in ``hitless/`` below that directory, which BPF_OBJ_GET
follows. So the one exchange that commits an upgrade changes what all of them show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from hitless.carry import is_global
from hitless.layout.model import MapSpec, ProgramSpec

__all__ = ["ADOPTING", "HOME", "Public", "loaded", "version_number"]

HOME = "hitless"
"""The directory, in that of the other daemon, of all that is hitless's own."""

ADOPTING = "hitless-adopting"
"""The directory in which what will be ``hitless/`` is built."""

_NUMBER = re.compile(r"0x[0-9a-f]{8}")


class Public(msgspec.Struct, frozen=True):
    """What a manifest says of them. All paths are relative to the daemon's directory, or absolute.

    Maps are pinned in the directory ``maps``, and programs in ``programs``, by their names, but for the maps in
    ``pins``; ``links`` has the paths of links, by the link's name. ``version_map`` is a map with one number that stands
    for ``version``, and ``snapshot`` the file with the layouts of its maps in Kmesh's format. ``leave`` names programs
    that use these maps and are left alone; ``unproven`` says whether programs may be taken over that are not those of
    the objects, by the kernel's tag.
    """

    version: str
    maps: str | None = None
    programs: str | None = None
    version_map: str | None = None
    snapshot: str | None = None
    leave: tuple[str, ...] = ()
    unproven: Literal["error", "accept"] = "error"
    pins: Mapping[str, str] = {}
    links: Mapping[str, str] = {}

    def pin_of(self, name: str) -> str | None:
        """Where the map is pinned; None if it is not."""
        if name in self.pins:
            return self.pins[name]
        return f"{self.maps}/{name}" if self.maps is not None and not is_global(name) else None

    def places(self, maps: Mapping[str, MapSpec], links: Iterable[str], programs: Iterable[str]) -> dict[str, str]:
        """What each path leads to, by a path below :data:`HOME`: for maps and programs of the release, and links."""
        pinned = {name: self.pin_of(name) for name in maps}
        places = {path: f"current/maps/{name}" for name, path in pinned.items() if path is not None}
        if self.programs is not None:
            places |= {f"{self.programs}/{name}": f"current/progs/{name}" for name in programs}
        return places | {self.links[link]: f"links/{link}" for link in links if link in self.links}


def loaded(programs: Iterable[ProgramSpec]) -> list[str]:
    """The names of those that are programs, and not left out."""
    return [one.name for one in programs if one.autoload and not one.section.startswith(".struct_ops")]


def version_number(version: str) -> int:
    """The 32 bits that Kmesh keeps of a version: FNV-1a over its text. ``0x`` and eight digits are such a number."""
    if _NUMBER.fullmatch(version):
        return int(version, 16)
    number = 0x811C9DC5
    for byte in version.encode():
        number = (number ^ byte) * 0x01000193 & 0xFFFFFFFF
    return number
