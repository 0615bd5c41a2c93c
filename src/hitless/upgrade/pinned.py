"""What another loader pinned below a directory and attached, in the words of a manifest: looked at, never changed.

It is matched with the objects of a release by names: of maps by their pins, of programs by the C function that they
were, which the kernel keeps whole in their BTF. A program that is on no pinned link is looked for where its hook can
be without one, and is the daemon's if it uses one of the maps that are pinned there.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from hitless.bundle import unite_maps
from hitless.carry import is_global
from hitless.errors import GoneError, KernelError, NodeError
from hitless.hooks import HOOKS
from hitless.kernel.cgroups import CgroupPlace
from hitless.kernel.dispatcher import attached_program
from hitless.kernel.filters import filters
from hitless.kernel.interfaces import Interface, interfaces
from hitless.kernel.libbpf import pinned_kind
from hitless.kernel.links import Link, LinkInfo
from hitless.kernel.maps import Map
from hitless.kernel.mounts import filesystem
from hitless.kernel.namespaces import Namespace, namespaces
from hitless.kernel.programs import Program
from hitless.kernel.xdp import Xdp
from hitless.known import Known, KnownHook
from hitless.layout.model import MapSpec, ObjectSpec, ProgramSpec
from hitless.public import ADOPTING, HOME

__all__ = ["look_at"]

_PODS = "/run/netns/*"
_OWN = (HOME, ADOPTING)  # of hitless itself
_SOCKET_MAPS = ("sockmap", "sockhash")
_SOCKET_HOOKS = ("sk_msg", "sk_skb")
_FEW = 6
_WHERE = "its target, which the kernel tells as {where}"


class _Pins(msgspec.Struct):
    """What is pinned below a root, by the path from there; ``programs`` only by their path."""

    maps: dict[str, Map]
    links: dict[str, LinkInfo]
    programs: list[str]


def look_at(root: Path, objects: Sequence[ObjectSpec]) -> Known:
    """What is pinned below ``root`` and attached, of what these objects declare; the rest of it is in the notes.

    Raises NodeError if ``root`` is no directory on a bpffs, KernelError.
    """
    if not root.is_dir() or filesystem(root) != "bpf":
        raise NodeError(f"{root} is no directory on a bpffs: name the one below which the daemon pins", path=str(root))
    pins = _pins(root)
    specs = {name: spec for name, spec in unite_maps(objects).items() if not is_global(name) and spec.ops is None}
    programs = {program.name: program for spec in objects for program in spec.programs if program.autoload}
    directory, places, notes = _map_pins(pins, specs)
    hooks, more = _linked(pins, programs)
    notes += more
    ids = {held.info.id for held in pins.maps.values()}
    among, closed = _all_interfaces()
    if closed:
        notes.append(f"network namespaces that could not be looked into: {', '.join(closed[:_FEW])}")
    for name, program in programs.items():
        if name not in hooks:
            found = tuple(_unlinked(program, ids, pins, among))
            if found:
                hooks[name] = found
    slots = {}
    for path, held in pins.maps.items():
        if held.info.type == "prog_array" and (filled := dict(_slots(held, programs))):
            slots[Path(path).name] = filled
    jumped = {name for table in slots.values() for name in table.values()}
    idle = [name for name in programs if name not in hooks and name not in jumped]
    if idle:
        notes.append(f"attached nowhere on this node, and in no slot: {', '.join(idle)}")
    hooks |= dict.fromkeys((name for name in programs if name not in hooks), ())
    return Known(
        public={key: place for key, place in (("maps", directory), ("programs", _directory(pins, programs))) if place},
        hooks=hooks,
        pins=places,
        slots={name: table for name, table in slots.items() if name in specs},
        notes=tuple(f"below {root}: {note}" for note in notes),
    )


def _pins(root: Path) -> _Pins:
    found = _Pins({}, {}, [])
    for top, directories, files in os.walk(root):
        if Path(top) == root:
            directories[:] = [name for name in directories if name not in _OWN]
        for name in sorted(files):
            path = Path(top, name)
            if not path.exists():
                continue  # a symbolic link to nothing
            fd, kind = pinned_kind(path.resolve())  # as it is once a node was adopted
            place = str(path.relative_to(root))
            if kind == "map":
                found.maps[place] = Map(fd, path)
            elif kind == "link":
                with Link(fd) as link:
                    found.links[place] = link.info
            else:
                os.close(fd)
                found.programs.append(place)
    return found


def _directory(pins: _Pins, programs: Mapping[str, ProgramSpec]) -> str | None:
    """The directory in which most programs are pinned by their names."""
    parents = Counter(str(Path(path).parent) for path in pins.programs if Path(path).name in programs)
    return parents.most_common(1)[0][0] if parents else None


def _map_pins(pins: _Pins, specs: Mapping[str, MapSpec]) -> tuple[str | None, dict[str, str], list[str]]:
    """The directory in which most maps are, the paths of those that are elsewhere, and what does not match."""
    found: dict[str, str] = {}
    notes = []
    for path, held in pins.maps.items():
        name = Path(path).name
        spec = specs.get(name)
        if spec is None:
            notes.append(f"pinned at {path}, and no object declares it: {held.info.type} {held.info.name}")
            continue
        wanted = (spec.type, spec.key_size, spec.value_size)
        seen = (held.info.type, held.info.key_size, held.info.value_size)
        if wanted != seen:
            notes.append(
                f"pinned at {path}: a {seen[0]} of {seen[1]} and {seen[2]} bytes, where the object's map {name} is a "
                f"{wanted[0]} of {wanted[1]} and {wanted[2]}: another release"
            )
        if name in found:
            notes.append(f"pinned at {path}, too: {name}")
        found.setdefault(name, path)
    notes += [f"declared by an object, and pinned nowhere there: {name}" for name in specs if name not in found]
    directories = Counter(str(Path(path).parent) for path in found.values())
    directory = max(directories, key=lambda one: directories[one], default=None)
    elsewhere = {name: path for name, path in found.items() if str(Path(path).parent) != directory}
    return directory, elsewhere, notes


def _linked(
    pins: _Pins, programs: Mapping[str, ProgramSpec]
) -> tuple[dict[str, tuple[KnownHook, ...]], list[str]]:
    hooks: dict[str, tuple[KnownHook, ...]] = {}
    notes = []
    for path, info in pins.links.items():
        if info.is_dead:
            notes.append(f"pinned at {path}: a link that is attached nowhere any more")
            continue
        with Program.by_id(info.program_id) as running:
            name = running.function
        program = programs.get(name)
        hook = _hook(program, info) if program is not None else None
        if program is None or hook is None:
            why = "which no object has" if program is None else f"which an object has for {program.section}"
            notes.append(f"pinned at {path}: a link on {info.attach_type or info.type} that runs {name}, {why}")
            continue
        keys: dict[str, str | int | bool] = {"hook": hook}
        target = _target(info)
        asks = {}
        if target is None:
            asks["target"] = _WHERE.format(where=info.where)
        else:
            keys["target"] = target
        keys["pin"] = path
        hooks[name] = (*hooks.get(name, ()), KnownHook(keys, asks))
    return hooks, notes


def _hook(program: ProgramSpec, info: LinkInfo) -> str | None:
    """The hook of a manifest that the link is one of; None if it is not the program's."""
    fitting = [name for name, hook in HOOKS.items() if hook.linked and hook.fits(program)]
    return next((name for name in fitting if HOOKS[name].attach_type(program) == info.attach_type), None)


def _target(info: LinkInfo) -> str | None:
    if info.type == "cgroup":
        return _cgroup(info.target_id)
    if info.type in ("xdp", "tcx"):
        # An index says nothing of its namespace: it is told where only one can be meant.
        there = [one.name for one in interfaces("*", Namespace.at("")) if one.index == info.target_id]
        return there[0] if there and not namespaces(_PODS) else None
    if info.type == "netns":
        return next((one.path for one in namespaces(_PODS) if one.inode == info.target_id), None)
    return None


def _cgroup_mounts() -> list[Path]:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [Path(line[4]) for line in lines if line[line.index("-") + 1] == "cgroup2"]


def _cgroup(number: int) -> str | None:
    """The path of the cgroup with the kernel's id, which is its inode."""
    return next((path for path, found in _cgroups() if found == number), None)


def _cgroups() -> Iterator[tuple[str, int]]:
    """All cgroups, with the kernel's ids."""
    for mount in _cgroup_mounts():
        for top, _directories, _files in os.walk(mount):
            with suppress(FileNotFoundError):  # removed meanwhile
                yield top, Path(top).stat().st_ino


def _unlinked(
    program: ProgramSpec,
    ids: set[int],
    pins: _Pins,
    among: Sequence[Interface],
) -> Iterator[KnownHook]:
    """Where the program is attached without a link that is pinned there."""
    if HOOKS["cgroup"].fits(program):
        for path, number in _cgroups():
            if any(_is_ours(one, program, ids) for one in CgroupPlace(path, number, program.attach_type).programs()):
                yield KnownHook({"hook": "cgroup", "target": path, "adopt": True})
    for hook in _SOCKET_HOOKS:
        if HOOKS[hook].fits(program):
            for path, held in pins.maps.items():
                if held.info.type in _SOCKET_MAPS:
                    number = attached_program(held, program.attach_type)
                    if number and _is_ours(number, program, ids):
                        yield KnownHook({"hook": hook, "target": Path(path).name, "adopt": True})
    if HOOKS["xdp"].fits(program):
        yield from _together({"hook": "xdp", "by": "netlink"}, list(_xdp_places(program, ids, among)))
    for hook in ("tc-ingress", "tc-egress"):
        if HOOKS[hook].fits(program):
            found = list(_filter_places(hook, program, ids, among))
            for priority, handle in sorted({(one[1], one[2]) for one in found}):
                keys: dict[str, str | int | bool] = {"hook": hook, "priority": priority, "handle": handle}
                yield from _together(keys, [one[0] for one in found if one[1:] == (priority, handle)])


def _is_ours(number: int, program: ProgramSpec, ids: set[int]) -> bool:
    try:
        with Program.by_id(number) as running:
            return running.function == program.name and bool(running.map_ids & ids)
    except KernelError as error:
        if error.facts["errno"] != errno.ENOENT:
            raise
        return False


def _all_interfaces() -> tuple[list[Interface], list[str]]:
    """Those here, of the namespaces with a name, and of those that only processes are in; and paths that are closed."""
    seen: set[int] = set()
    found: list[Interface] = []
    closed: list[str] = []
    processes = [str(path / "ns" / "net") for path in Path("/proc").iterdir() if path.name.isdigit()]
    for path in ("", *(one.path for one in namespaces(_PODS)), *sorted(processes)):
        try:
            number = Path(path or "/proc/self/ns/net").stat().st_ino
            if number not in seen:
                found += interfaces("*", Namespace.at(path))
        except (GoneError, OSError):
            continue  # with its last process
        except NodeError:  # of a user namespace that is not ours to enter
            closed.append(path)
        seen.add(number)
    return found, closed


def _xdp_places(program: ProgramSpec, ids: set[int], among: Iterable[Interface]) -> Iterator[Interface]:
    for interface in among:
        try:
            place = Xdp.find(interface)
        except GoneError:
            continue
        if place is not None and _is_ours(place.info.program_id, program, ids):
            with Program.by_id(place.info.program_id) as running:
                if not place.is_linked(running):
                    yield interface


def _filter_places(
    hook: str, program: ProgramSpec, ids: set[int], among: Iterable[Interface]
) -> Iterator[tuple[Interface, int, int]]:
    for interface in among:
        try:
            for one in filters(interface, "ingress" if hook == "tc-ingress" else "egress"):
                if _is_ours(one.program_id, program, ids):
                    yield interface, one.priority, one.handle
        except GoneError:
            continue


def _together(keys: Mapping[str, str | int | bool], places: Iterable[Interface]) -> Iterator[KnownHook]:
    """As few entries as these places need: one for each interface here, one for all in named namespaces."""
    own = [one for one in places if not one.namespace.path]
    pods = [one for one in places if one.namespace.path]
    for one in own:
        yield KnownHook({**keys, "target": one.name, "adopt": True})
    names = sorted({one.name for one in pods})
    if not pods:
        return
    spaces = sorted({one.namespace.path for one in pods})
    said: dict[str, str | int | bool] = {**keys}
    asks, answers = {}, {}
    if len(names) == 1:
        said["target"] = names[0]
    else:
        shortest = min(names, key=len)
        begin = next(shortest[:size] for size in range(len(shortest), -1, -1) if _begin(names, shortest[:size]))
        asks["target"] = f"a pattern for interfaces in pods, for now {', '.join(names[:_FEW])}"
        answers["target"] = (f"{begin}*",)
    if all(path.startswith(_PODS[:-1]) for path in spaces):
        said["netns"] = _PODS
    else:
        asks["netns"] = f"a pattern for the files of the pods' namespaces, for now {', '.join(spaces[:_FEW])}"
    said["adopt"] = "only"
    yield KnownHook(said, asks, answers, f"Found in {len(spaces)} network namespace{'s' if len(spaces) > 1 else ''}.")


def _begin(names: Iterable[str], text: str) -> bool:
    return all(name.startswith(text) for name in names)


def _slots(held: Map, programs: Mapping[str, ProgramSpec]) -> Iterator[tuple[int, str]]:
    """What a program array is filled with, as far as it is the objects'."""
    for slot in range(held.info.max_entries):
        value = held.lookup(slot.to_bytes(4, sys.byteorder))
        if value is not None:
            with Program.by_id(int.from_bytes(value, sys.byteorder)) as program:
                if program.function in programs:
                    yield slot, program.function
