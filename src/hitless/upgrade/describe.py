"""What another loader has on a node, in the words of a release, where that release is not at hand.

Its maps are what is pinned, its types what the kernel and the daemon's own snapshot tell, its hooks those of the
release to come; programs are called as the kernel calls them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from hitless.attach import Attach
from hitless.bundle import Bundle, BundleObject, unite_maps
from hitless.carry import is_global
from hitless.errors import LayoutError, NodeError
from hitless.hooks import HOOKS
from hitless.kernel.dispatcher import attached_program
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.names import in_kernel
from hitless.kernel.programs import Program
from hitless.layout import kmesh
from hitless.layout.model import MapSpec, ObjectSpec, ProgramSpec
from hitless.public import Public, version_number
from hitless.upgrade.places import find_places

__all__ = ["FIRST", "describe", "known_layouts"]

FIRST = bytes(4)
"""The key of the only entry of an array."""

_ADOPTED = "adopted"  # what stands for objects that nobody has


def describe(base: Path, into: Bundle) -> Bundle | None:
    """What runs below ``base`` as far as a node tells it without the objects, in the words of a release.

    Maps are those that are pinned where ``into``, the release to come, says that its own or those that they were will
    be; their types are the kernel's, or the snapshot's. None if no map is pinned there. Raises NodeError, KernelError.
    """
    public = into.public or Public(into.version)
    known = known_layouts(public)
    paths: dict[str, str] = {}
    if public.version_map in into.maps and (pin := public.pin_of(public.version_map)) is not None:
        paths[public.version_map] = pin  # else it is no map of the release, but the daemon's own
    for name, rule in into.rules.items():
        if name in into.maps and not is_global(name):
            for was in rule.sources or ((rule.was,) if rule.was is not None else ()):
                if (pin := public.pin_of(was)) is not None:
                    paths[was] = pin
    paths |= {name: pin for name, pin in public.pins.items() if name not in paths}
    if public.maps is not None and (base / public.maps).is_dir():
        for path in sorted((base / public.maps).iterdir()):
            if path.is_file() and path.name not in paths and path.name != public.version_map:
                paths[path.name] = f"{public.maps}/{path.name}"
    maps = {}
    for name, pin in paths.items():
        if not (base / pin).exists():
            continue
        with Map.open(base / pin) as held:
            spec, noted = held.spec(name), known.get(name)
        if noted is not None and (noted.key_size, noted.value_size) == (spec.key_size, spec.value_size):
            spec = msgspec.structs.replace(spec, key=spec.key or noted.key, value=spec.value or noted.value)
        maps[name] = spec
    if not maps:
        return None
    attach, programs, links, used = [], {}, {}, {}
    owners = {one.name: item.spec.name for item in into.objects for one in item.spec.programs}
    for entry in into.attach:
        runs = _running(base, into, entry)
        if runs is None:
            continue
        with Program.by_id(runs[0]) as program:
            name, was = program.info.name, entry.was or entry.link
            if name in programs:
                raise NodeError(
                    f"two hooks run programs that the kernel calls {name}, so that nobody can tell them apart by name: "
                    "give the release that runs as well (--running)",
                    path=str(base),
                )
            programs[name] = ProgramSpec(name, "", program.info.type, runs[1])
            used[name] = owners[entry.program], program.map_ids
        if entry.link in public.links:
            links[was] = public.links[entry.link]
        attach.append(msgspec.structs.replace(entry, program=name, link=was, was=None))
    variables = _variables(programs, used)
    own = {name for item in variables for name in (one.name for one in item.programs)}
    rest = tuple(spec for name, spec in programs.items() if name not in own)
    specs = (ObjectSpec(_ADOPTED, tuple(maps.values()), rest), *variables)
    version = _version(base, public)
    return Bundle(
        path=base,
        name=into.name,
        version=version,
        digest="",
        objects=tuple(BundleObject(spec, b"") for spec in specs),
        maps=unite_maps(specs),
        programs=programs,
        attach=tuple(attach),
        rules={},
        public=msgspec.structs.replace(
            public, version=version, unproven="accept",
            pins={name: pin for name, pin in paths.items() if name in maps}, links=links,
        ),
    )  # fmt: skip


def _running(base: Path, into: Bundle, entry: Attach) -> tuple[int, str] | None:
    """The id of the program on a hook of the release to come, and its attach type; None if no hook is like that.

    Without a link it is the one of the same name, which is all that tells it from what others attached.
    """
    pin = into.public.links.get(entry.link) if into.public is not None else None
    if pin is not None:
        if not (base / pin).exists():
            return None
        with Link.open(base / pin) as link:
            return link.info.program_id, link.info.attach_type
    program = into.programs[entry.program]
    if not entry.adopt:
        return None
    if HOOKS[entry.hook].on == "map":
        pin = into.public.pin_of(entry.target) if into.public is not None else None
        if pin is None or not (base / pin).exists():
            return None
        with Map.open(base / pin) as held:
            number = attached_program(held, program.attach_type)
        return (number, program.attach_type) if number and _is_called(number, program.name) else None
    for place in find_places([entry], into.programs):
        for one in place.occupants:
            if one.name.encode() == in_kernel(program.name) and not one.is_linked:
                return one.program_id, program.attach_type
    return None


def _is_called(number: int, name: str) -> bool:
    with Program.by_id(number) as program:
        return bool(program.info.name.encode() == in_kernel(name))


def _variables(
    programs: Mapping[str, ProgramSpec], used: Mapping[str, tuple[str, frozenset[int]]]
) -> tuple[ObjectSpec, ...]:
    """The variables of the running programs, as of objects that are called as those of the programs to come.

    ``used`` has that object's name and the ids of maps, by program. Loaders name such maps after their sections.
    """
    sections: dict[str, dict[str, MapSpec]] = {}
    users: dict[str, list[ProgramSpec]] = {}
    for program, (item, numbers) in used.items():
        for number in numbers:
            with Map.by_id(number) as held:
                _, dot, section = held.info.name.partition(".")
                if dot and held.info.type == "array" and held.info.value_type_id:
                    sections.setdefault(item, {})[dot + section] = held.spec(dot + section)
        users.setdefault(item, []).append(programs[program])
    return tuple(ObjectSpec(name, tuple(found.values()), tuple(users[name])) for name, found in sections.items())


def _version(base: Path, public: Public) -> str:
    """What the daemon itself says of its version: a number, of which its own text cannot be told."""
    pin = public.pin_of(public.version_map) if public.version_map is not None else None
    if pin is None or not (base / pin).exists():
        return "unknown"
    with Map.open(base / pin) as held:
        number = int.from_bytes(held.lookup(FIRST) or b"", sys.byteorder)
    return public.version if number == version_number(public.version) else f"0x{number:08x}"


def known_layouts(public: Public) -> Mapping[str, MapSpec]:
    """What the daemon's own snapshot tells of its maps. Raises NodeError if it is damaged."""
    if public.snapshot is None or not Path(public.snapshot).exists():
        return {}
    try:
        found = kmesh.load(Path(public.snapshot).read_bytes())
    except (LayoutError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error.message
        raise NodeError(
            f"{public.snapshot}, where the daemon is said to keep its layouts, cannot be read: {why}; look at it, then "
            "remove it, or leave snapshot out of [public]",
            path=public.snapshot,
        ) from None
    return {spec.name: spec for item in found.values() for spec in item.maps}
