"""Programs that a release can do without: left out where this kernel refuses them (``skip = "refused"``).

Only the kernel knows which those are. So the objects are loaded once before anything is planned, as staging loads them
later, and let go; what is left is a release of which all else is decided as of any other.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import msgspec

from hitless.bundle import Bundle, BundleObject, unite_maps
from hitless.carry import is_global
from hitless.errors import KernelError, NodeError
from hitless.kernel.maps import Map
from hitless.kernel.programs import Loaded, load_object
from hitless.upgrade.model import Record

__all__ = ["refuse_left_out", "without_refused"]

_FAILED = re.compile(r"prog '(\w+)': failed to load")


def without_refused(bundle: Bundle) -> Bundle:
    """The release without those of its ``optional`` programs that this kernel refuses, nor their hooks and slots.

    Raises KernelError if it refuses another program.
    """
    if not bundle.optional:
        return bundle
    refused: set[str] = set()
    maps: dict[str, Map] = {}
    try:
        for item in bundle.objects:
            loaded = _load(item, maps, bundle.optional, refused)
            for program in loaded.programs.values():
                program.close()
            for name, held in loaded.maps.items():
                if name in maps:
                    held.close()
                else:
                    maps[name] = held
    finally:
        for held in maps.values():
            held.close()
    return _without(bundle, refused) if refused else bundle


def refuse_left_out(bundle: Bundle, current: Record | None) -> None:
    """Raise NodeError if a hook that runs now would lose its program by that: it is not what was allowed."""
    running = {hook.link for hook in current.hooks} if current is not None else set()
    for program, links in bundle.left_out.items():
        for link in running.intersection(links):
            raise NodeError(
                f"this kernel refuses program {program} of {bundle.version}, and link {link} runs one: it would have "
                "to be taken off its hook; nothing was changed: if that is meant, take its [[attach]] out of the "
                "manifest, and say skip = true",
                program=program,
                link=link,
            )


def _load(item: BundleObject, maps: dict[str, Map], optional: Collection[str], refused: set[str]) -> Loaded:
    """The object without the programs that are ``refused``, to which those are added that turn out to be.

    Nothing of one that cannot be loaded for another reason, as a map of maps that only its daemon can make.
    """
    sections = {name: spec for name, spec in unite_maps([item.spec]).items() if is_global(name)}
    while True:
        programs = [
            msgspec.structs.replace(one, autoload=one.autoload and one.name not in refused)
            for one in item.spec.programs
        ]
        try:
            return load_object(item.data, item.spec.name, maps, sections, programs)
        except KernelError as error:
            found = _FAILED.search(str(error.facts.get("log", "")))
            if found is None:  # no program's fault, and staging has maps that this has not
                return Loaded({}, {})
            if found[1] not in optional or found[1] in refused:
                raise
            refused.add(found[1])


def _without(bundle: Bundle, refused: Collection[str]) -> Bundle:
    objects = tuple(
        msgspec.structs.replace(item, spec=msgspec.structs.replace(item.spec, programs=tuple(
            msgspec.structs.replace(one, autoload=one.autoload and one.name not in refused)
            for one in item.spec.programs
        )))
        for item in bundle.objects
    )  # fmt: skip
    gone = {entry.link for entry in bundle.attach if entry.program in refused}
    public = bundle.public
    if public is not None:
        links = {name: pin for name, pin in public.links.items() if name not in gone}
        public = msgspec.structs.replace(public, links=links)
    return msgspec.structs.replace(
        bundle,
        objects=objects,
        programs={one.name: one for item in objects for one in item.spec.hookable},
        attach=tuple(entry for entry in bundle.attach if entry.program not in refused),
        rules={
            name: msgspec.structs.replace(rule, slots={n: one for n, one in rule.slots.items() if one not in refused})
            for name, rule in bundle.rules.items()
        },
        public=public,
        left_out={
            name: tuple(entry.link for entry in bundle.attach if entry.program == name) for name in sorted(refused)
        },
    )
