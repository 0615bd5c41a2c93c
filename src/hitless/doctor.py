"""What this machine is to hitless: what is missing, what its kernel can do, and how each type of map would be carried.

Nothing is changed: what is made to try a feature is let go at once.
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Container
from pathlib import Path

import msgspec

from hitless.carry import Way, way
from hitless.errors import KernelError, UnsupportedError
from hitless.features import FEATURES, Feature
from hitless.kernel import capabilities
from hitless.kernel.features import absence, features, release
from hitless.kernel.libbpf import lib
from hitless.kernel.maps import create
from hitless.layout.answers import ANSWERS
from hitless.layout.model import Field, Int, MapSpec, Record
from hitless.layout.rules import MapRules

__all__ = ["SCHEMA", "Doctor", "FeatureFound", "MapMethod", "examine"]

SCHEMA = 1
"""Of the JSON: another number, another meaning."""

_NO_PLAN = "a plan that asks for it ends with that error"
_HASH = 1  # BPF_MAP_TYPE_HASH
_INNER = ("array_of_maps", "hash_of_maps")


class FeatureFound(msgspec.Struct, frozen=True):
    """One feature, as in :class:`hitless.features.Feature`; ``why`` it is not ``there``, in the kernel's words.

    Not ``permitted`` is what this process may not even try, though the kernel may have it: then no plan is made that
    asks for it.
    """

    name: str
    there: bool
    why: str | None
    needs: str
    probed: str
    without: str
    permitted: bool = True


class MapMethod(msgspec.Struct, frozen=True):
    """How a map of one type is carried here when its value gained a field; no ``exactness``: not at all."""

    type: str
    method: str
    exactness: str | None = None


class Doctor(msgspec.Struct, frozen=True):
    """What was found. ``problems`` are what keeps hitless from working at all, each with what to do.

    ``libbpf`` is its version, None without one. ``capabilities`` says of each that hitless uses whether it is held.
    ``bpffs`` and ``cgroup2`` are where such file systems are mounted. ``features`` and ``maps`` are empty where nothing
    could be tried.
    """

    kernel: str
    machine: str
    python: str
    libbpf: str | None
    capabilities: dict[str, bool]
    bpffs: tuple[str, ...]
    cgroup2: tuple[str, ...]
    problems: tuple[str, ...]
    features: tuple[FeatureFound, ...]
    maps: tuple[MapMethod, ...]
    schema: int = SCHEMA


def examine() -> Doctor:
    """Look at this machine with the rights of this process. Raises KernelError where a probe says nothing (ENOMEM)."""
    problems = []
    held = capabilities.held()
    lacking = [one for one in capabilities.USED if one.needed and one.name not in held]
    problems += [f"this process lacks {one.name}, which it takes to {one.purpose}: run as root" for one in lacking]
    try:
        libbpf = _libbpf()
    except UnsupportedError as error:
        libbpf = None
        problems.append(error.message)
    bpffs, cgroup2 = _mounted("bpf"), _mounted("cgroup2")
    if not bpffs:
        problems.append("no bpffs is mounted, where maps and links are pinned: mount -t bpf bpf /sys/fs/bpf")
    able = libbpf is not None and not lacking
    if able and (refused := _refused()) is not None:
        able = False
        problems.append(refused)
    found = tuple(map(_found, FEATURES)) if able else ()
    return Doctor(
        kernel=release(),
        machine=platform.machine(),
        python=platform.python_version(),
        libbpf=libbpf,
        capabilities={one.name: one.name in held for one in capabilities.USED},
        bpffs=bpffs,
        cgroup2=cgroup2,
        problems=tuple(problems),
        features=found,
        maps=tuple(_method(kind, features()) for kind in ANSWERS) if able else (),
    )


def _refused() -> str | None:
    """Why not even a map can be made: in a user namespace root holds all capabilities, and may not call bpf(2)."""
    try:
        create(_HASH, "probe", 4, 4, 1).close()
    except KernelError as error:
        return error.message
    return None


def _libbpf() -> str:
    return f"{lib().libbpf_major_version()}.{lib().libbpf_minor_version()}"


def _mounted(kind: str) -> tuple[str, ...]:
    """Where file systems of a type are mounted: proc(5) has the type behind the first dash."""
    lines = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return tuple(line[4] for line in lines if line[line.index("-") + 1] == kind)


def _found(feature: Feature) -> FeatureFound:
    try:
        why = absence(feature.name)
    except KernelError as error:
        if error.facts["errno"] != errno.EPERM:
            raise
        said = error.message.partition("\n")[0].rstrip(":")
        why = f"not permitted: {said}"
        return FeatureFound(feature.name, False, why, feature.needs, feature.probed, _NO_PLAN, permitted=False)
    return FeatureFound(feature.name, why is None, why, feature.needs, feature.probed, feature.without)


def _method(kind: str, there: Container[str]) -> MapMethod:
    """That of a map whose value gains a field."""
    answer = ANSWERS[kind]
    if not answer.kind:
        return MapMethod(kind, f"not carried: {answer.words}")
    found = way(_map(kind, 1), _map(kind, 2), MapRules(), there)
    return MapMethod(kind, found.method, found.exactness) if isinstance(found, Way) else MapMethod(kind, found)


def _map(kind: str, fields: int) -> MapSpec:
    number = Int("__u64", 8, signed=False)
    value = Record("value", 8 * fields, tuple(Field(f"field{at}", number, 64 * at) for at in range(fields)))
    inner = MapSpec("inner", "hash", 4, value.size, 1, key=Int("__u32", 4, signed=False), value=value)
    if kind in _INNER:
        return msgspec.structs.replace(inner, type=kind, value_size=4, value=None, inner=inner)
    return msgspec.structs.replace(inner, type=kind)
