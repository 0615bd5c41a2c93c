"""The proof that no program of a release writes a map: the verifier accepts them all with writes to it barred."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from hitless.bundle import BundleObject, unite_maps
from hitless.carry import is_global
from hitless.errors import BundleError, KernelError
from hitless.kernel.libbpf import PASSING, options
from hitless.kernel.maps import Map, create
from hitless.kernel.programs import load_object
from hitless.layout.answers import answer
from hitless.layout.rules import MapRules, only_read

__all__ = ["prove_unwritten"]

_HASH = 1  # BPF_MAP_TYPE_HASH
_NO_PREALLOC, _RDONLY_PROG = 1 << 0, 1 << 7  # BPF_F_NO_PREALLOC, BPF_F_RDONLY_PROG


def prove_unwritten(item: BundleObject, rules: Mapping[str, MapRules], maps: Mapping[str, Map]) -> list[str]:
    """The maps of ``item`` that its release promises to leave alone, after its programs were loaded to show that.

    ``maps`` are those that they were loaded with. Raises BundleError if a program does write one.
    """
    specs = unite_maps([item.spec])
    found = [
        name
        for name, spec in specs.items()
        if spec.type == "hash" and only_read(spec, rules.get(name, MapRules()))
    ]
    if not found:
        return []
    twins = {
        name: create(
            _HASH, name, specs[name].key_size, specs[name].value_size, specs[name].max_entries,
            options("bpf_map_create_opts", map_flags=_NO_PREALLOC | _RDONLY_PROG),
        )
        for name in found
    }  # fmt: skip
    # libbpf writes the slots of an array of programs that it is given, so it makes one of its own.
    given = {name: held for name, held in maps.items() if name in specs and not answer(held.info.type).anew}
    sections = {name: spec for name, spec in specs.items() if is_global(name)}
    try:
        loaded = load_object(item.data, item.spec.name, {**given, **twins}, sections, item.spec.programs)
    except KernelError as error:
        if error.facts["errno"] in (*PASSING, errno.EPERM):  # which says nothing of the programs
            raise
        names = ", ".join(found)
        raise BundleError(
            f"a program of {item.spec.name} writes a map of which the release says that none does "
            f"(programs = \"read\": {names}); take that out of the manifest or the source: {error.message}",
            maps=found,
            object=item.spec.name,
            log=error.facts.get("log"),
        ) from None
    finally:
        for twin in twins.values():
            twin.close()
    for program in loaded.programs.values():
        program.close()
    return found
