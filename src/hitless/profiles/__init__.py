"""Profiles: what is known of daemons by name, so that ``hitless init --profile`` can fill their manifests. Pure data.

A profile is tolerant of releases: it speaks of programs and maps that only some have, and of none that is new. Names
of maps are compared by their :func:`role`, since releases call one map ``map_of_service``, ``kmesh_service`` and
``km_service``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec

from hitless.errors import BundleError
from hitless.known import MODES, Known, KnownHook
from hitless.layout.elf import BYTES
from hitless.layout.model import MapSpec, ObjectSpec
from hitless.layout.sections import program_type
from hitless.profiles import kmesh

__all__ = ["profile"]

_SOCKET_MAPS = ("sockmap", "sockhash")


def role(name: str) -> str:
    """What a map is for: its name without the prefixes and underscores that releases changed."""
    bare = name
    while (cut := re.sub(r"^(?:map_of|kmesh|km)_", "", bare)) != bare:
        bare = cut
    return bare.replace("_", "")


def profile(files: Mapping[str, ObjectSpec], mode: str | None = None, former: Iterable[str] = ()) -> Known:
    """What Kmesh's profile knows of objects, by the name of their file. ``mode`` is one of MODES; None: theirs.

    ``former`` are names of maps of the release before. Raises BundleError if the objects are of both
    modes and none was given.
    """
    names = {file: _object_name(file, spec) for file, spec in files.items()}
    found = MODES[mode] if mode is not None else _mode(names)
    left_out = _left_out(names, found)
    kept = {file: spec for file, spec in files.items() if file not in left_out}
    maps = {one.name: one for spec in kept.values() for one in spec.maps}
    programs = {program.name for spec in kept.values() for program in spec.programs}

    def of_roles(known: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        return {name: known[role(name)] for name in maps if role(name) in known}

    once = Counter(names[file] for file in kept)  # of two that could be it, neither is
    slots, open_slots = _slots(maps, programs, found)
    types = {**kmesh.BINDINGS, **dict.fromkeys(kmesh.STRUCTURES, (("__u32",), (BYTES,)))}
    return Known(
        public=kmesh.PUBLIC,
        objects={file: name for file in kept if (name := names[file]) is not None and once[name] == 1},
        types={
            program.name: kind
            for spec in kept.values()
            for program in spec.programs
            if not program.type and (kind := _type_of(program.section)) is not None
        },
        dispensable={name: why for name, why in kmesh.DISPENSABLE.items() if name in programs},
        hooks=_hooks(kept.values(), maps, found, slots),
        keys=of_roles({one: keys for one, (keys, _values) in types.items()}),
        values=of_roles({one: values for one, (_keys, values) in types.items()}),
        asked={name: kmesh.STRUCTURES_ASK for name in maps if role(name) in kmesh.STRUCTURES},
        slots=slots,
        open_slots=open_slots,
        groups={name: kmesh.GROUP for name in maps if role(name) in kmesh.POINTING},
        scratch={name: kmesh.SCRATCH[role(name)] for name in maps if role(name) in kmesh.SCRATCH},
        left_out=left_out,
        related=_related(maps, former),
        notes=kmesh.NOTES,
    )


def _related(maps: Iterable[str], former: Iterable[str]) -> dict[str, str]:
    """Maps of the release before that were for the same, where there is one."""
    before: dict[str, list[str]] = {}
    for name in former:
        before.setdefault(kmesh.LATER.get(role(name), role(name)), []).append(name)
    found = {name: before.get(kmesh.LATER.get(role(name), role(name)), []) for name in maps}
    return {name: old[0] for name, old in found.items() if len(old) == 1 and old[0] != name}


def _object_name(file: str, spec: ObjectSpec) -> str | None:
    """What Kmesh calls an object in its snapshots: by the file that bpf2go made, else by what is in it."""
    stem = re.sub(r"(?:_[a-z0-9]+)*_(?:bpf)?(?:el|eb|bpfel|bpfeb)$", "", file.removesuffix(".o").removesuffix(".bpf"))
    bare = stem.lower().removesuffix("compat")
    found = next((name for name in kmesh.OBJECTS if name.lower() == bare), None)
    if found is not None:
        return f"{found}Compat" if bare != stem.lower() else found
    programs = {program.name for program in spec.programs}
    found = next((name for name, own in kmesh.OBJECTS.items() if own <= programs), None)
    if found is not None and {role(one.name) for one in spec.maps} & kmesh.ADS_ROLES:
        return found.removesuffix("Workload")
    return found


def _mode(names: Mapping[str, str | None]) -> str:
    def of(mode: str) -> list[str]:
        own = kmesh.MODE_OBJECTS[mode]
        return [file for file, name in names.items() if name is not None and name.removesuffix("Compat") in own]

    workload, ads = of("workload"), of("ads")
    if workload and ads:
        raise BundleError(
            f"{workload[0]} is of Kmesh's dual-engine mode and {ads[0]} of its kernel-native mode, and a bundle is for "
            "one: say by --mode which; objects of the other are left out",
        )
    return "ads" if ads else "workload"


def _left_out(names: Mapping[str, str | None], mode: str) -> dict[str, str]:
    """Objects that Kmesh embeds beside those that a node of this mode runs."""
    out = {}
    there = set(names.values())
    other = kmesh.MODE_OBJECTS["ads" if mode == "workload" else "workload"]
    for file, name in names.items():
        bare = (name or "").removesuffix("Compat")
        if bare in other:
            out[file] = "of Kmesh's other mode"
        elif name != bare and bare in there:
            out[file] = f"for kernels before 5.13, which take it instead of {bare}"
    little = {name for file, name in names.items() if "bpfel" in file}
    for file, name in names.items():
        if "bpfeb" in file and name in little:
            out[file] = "for machines of the other byte order"
    return out


def _type_of(section: str) -> str | None:
    """What a program is whose section libbpf does not know: Kmesh adds to names that it knows what is jumped to."""
    bare = section.removeprefix("?")
    if bare in kmesh.SECTIONS:
        return kmesh.SECTIONS[bare]
    longer = bare.rpartition("/")[0]
    return longer if any(program_type(longer)) else kmesh.SECTIONS.get(longer)


def _slots(
    maps: Mapping[str, MapSpec], programs: Collection[str], mode: str
) -> tuple[dict[str, dict[int, str]], dict[str, tuple[str, ...]]]:
    """Which program arrays user space fills, and with what; and the programs of which only that they are jumped to."""
    slots: dict[str, dict[int, str]] = {}
    unknown: dict[str, tuple[str, ...]] = {}
    for name, spec in maps.items():
        if spec.type != "prog_array" or spec.slots:
            continue
        for table in kmesh.TABLES[mode]:
            if role(name) not in table.maps:
                continue
            there = {slot: one for slot, one in table.slots.items() if one in programs and slot < spec.max_entries}
            if there and not (table.jumped & set(programs)) - set(there.values()):
                slots[name] = there
                break
        else:
            jumped = {
                one for table in kmesh.TABLES[mode] if role(name) in table.maps for one in table.jumped
            } & set(programs)
            if jumped:
                unknown[name] = tuple(sorted(jumped))
    return slots, unknown


def _hooks(
    objects: Iterable[ObjectSpec], maps: Mapping[str, MapSpec], mode: str, slots: Mapping[str, Mapping[int, str]]
) -> dict[str, tuple[KnownHook, ...]]:
    out: dict[str, tuple[KnownHook, ...]] = {}
    sockets = [name for name, spec in maps.items() if spec.type in _SOCKET_MAPS]
    filled = {one for table in slots.values() for one in table.values()}
    found = list(objects)
    sections = Counter(program.section for spec in found for program in spec.programs)
    for spec in found:
        for program in spec.programs:
            # Where Kmesh attaches one program of a kind, its name may be another in another release.
            alone = sections[program.section] == 1 and kmesh.ONE_OF_A_KIND[mode].get(program.section)
            entry = kmesh.HOOKS[mode].get(program.name) or kmesh.HOOKS[mode].get(alone or "")
            if entry is not None:
                keys, asks = dict(entry.keys), dict(entry.asks)
                if keys.get("target") == kmesh.SOCKETS:
                    named = [one for one in sockets if role(one) == "socket"] or sockets
                    if len(named) == 1:
                        keys["target"] = named[0]
                    else:
                        del keys["target"]
                        asks["target"] = "the map of the sockets that it is for, of an object that is given as well"
                if "egress" in program.section and keys["hook"] == "tc-ingress":
                    keys["hook"] = "tc-egress"
                out[program.name] = (msgspec.structs.replace(entry, keys=keys, asks=asks),)
            elif program.name in kmesh.JUMPED or program.name in filled:
                out[program.name] = ()
    return out
