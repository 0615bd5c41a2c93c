"""What another loader has on a node, recognised by the manifest of the release that runs: looked at, never changed.

A map is found where its pin is, or else among the maps that the release's programs use; a hook by the pin of its link,
by a link that is pinned nowhere, or by what is attached there without one. That these are the programs of the objects
is shown by the kernel's tag, a hash of the instructions: the objects are loaded once more for that, and let go. So the
types that the objects tell are those of the running maps, which often carry none themselves.

What cannot be known is asked for, all of it in one error, by the name of what is to be said in the manifest.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import msgspec

from hitless.bundle import Bundle, unite_maps
from hitless.carry import is_global
from hitless.errors import KernelError, NodeError
from hitless.hooks import HOOKS
from hitless.kernel.dispatcher import SOCKET_HOOKS, attached_program
from hitless.kernel.libbpf import PASSING
from hitless.kernel.links import Link, LinkInfo, all_links
from hitless.kernel.map_places import MapPlace
from hitless.kernel.maps import Map
from hitless.kernel.names import in_kernel
from hitless.kernel.processes import holders_of
from hitless.kernel.programs import Program, all_programs, load_object
from hitless.layout.answers import answer
from hitless.layout.diff import diff_map
from hitless.layout.model import MapSpec, ObjectSpec
from hitless.public import ADOPTING, HOME, Public, loaded, version_number
from hitless.upgrade.describe import FIRST, known_layouts
from hitless.upgrade.drift import EITHER_WAY
from hitless.upgrade.model import HookPlan, Record
from hitless.upgrade.places import Place, find_places
from hitless.upgrade.plan import hook_at, hooks_of, new_hook
from hitless.upgrade.public import identity
from hitless.upgrade.unwritten import prove_unwritten

__all__ = ["FoundHook", "FoundMap", "Recognised", "recognise"]

_UNLINKED = ("cgroup_skb", "cgroup_sock_addr", "cgroup_sock", "sched_cls", "sock_ops", "xdp")


class FoundMap(msgspec.Struct, frozen=True):
    """A map that was recognised: its kernel's id, where its loader pinned it, and where its layout is known from.

    ``layout`` is ``kernel``, ``objects``, ``manifest``, ``snapshot`` or ``none``.
    """

    name: str
    id: int
    pin: str | None
    layout: str


class FoundHook(msgspec.Struct, frozen=True):
    """A hook that was recognised: its ``program``, by name and the kernel's id, and how that is ``held``.

    ``proven`` is whether it has the tag of the program in the release's objects.
    """

    link: str
    hook: str
    target: str
    program: str
    program_id: int
    held: str
    proven: bool


class Recognised(msgspec.Struct):
    """All that was recognised, opened; the caller closes nothing, and pins what is to stay.

    ``links`` are those of hooks that have one, ``noted`` the hooks that are attached without. ``notes`` are sentences
    about what was seen and is left as it is.
    """

    record: Record
    maps: dict[str, Map]
    programs: dict[str, Program]
    links: dict[str, Link]
    noted: tuple[HookPlan, ...]
    told_maps: tuple[FoundMap, ...]
    told_hooks: tuple[FoundHook, ...]
    notes: tuple[str, ...]


class _Look:
    """One look at a node: what was found so far, and what has to be asked."""

    def __init__(self, base: Path, bundle: Bundle) -> None:
        self.base = base
        self.bundle = bundle
        self.public = bundle.public or Public(bundle.version)
        self.questions: list[str] = []
        self.notes: list[str] = []
        self.maps: dict[str, Map] = {}
        self.pins: dict[str, str] = {}
        self.links: dict[str, Link] = {}
        self.noted: list[HookPlan] = []
        self.hooks: list[tuple[HookPlan, str]] = []
        self.programs: dict[str, Program] = {}  # of hooks, by name
        self.instead: dict[str, str] = {}  # by link, the program that runs there and is another's
        self.running: dict[int, str] = {}  # all of hooks, by id: a pod's XDP program may have been loaded for it alone

    # Maps

    def find_pinned(self) -> list[str]:
        """Open the maps that are pinned where they should be; the names of the others."""
        missing = []
        for name, spec in self.bundle.maps.items():
            if is_global(name) or spec.ops is not None:
                continue
            pin = self.public.pin_of(name)
            path = self.base / pin if pin is not None else None
            if path is None or not os.path.lexists(path):
                missing.append(name)
                continue
            held = Map.open(path)
            if self._fits(name, spec, held, str(path)):
                self.maps[name] = held
                self.pins[name] = str(path)
        return missing

    def _fits(self, name: str, spec: MapSpec, held: Map, path: str) -> bool:
        seen = held.spec(name)
        wanted = (spec.type, spec.key_size, spec.value_size)
        found = (seen.type, seen.key_size, seen.value_size)
        if wanted != found:
            self.questions.append(
                f"map {name} at {path} is a {found[0]} of {found[1]} and {found[2]} bytes, and the bundle's is a "
                f"{wanted[0]} of {wanted[1]} and {wanted[2]}: this bundle is not the release that runs; give that one, "
                f"or say where its map {name} is ([map.{name}] pin)"
            )
            return False
        if seen.value is not None and spec.value is not None:
            changed = diff_map(_shape(seen), _shape(spec))
            if changed.verdict not in ("identical", "unknown"):
                self.questions.append(
                    f"map {name} at {path} has other fields in the kernel than in the bundle's objects "
                    f"({'; '.join(str(change.path) for change in changed.changes[:4])}): this bundle is not the "
                    "release that runs; give that one"
                )
                return False
        return True

    def find_unpinned(self, missing: Iterable[str]) -> None:
        """Look for them among the maps that the programs use."""
        used = _maps_used(self.programs.values())
        taken = {held.info.id for held in self.maps.values()}
        for name in missing:
            spec = self.bundle.maps[name]
            fit = [
                held
                for number, held in used.items()
                if number not in taken
                and held.info.name.encode() == in_kernel(name)
                and (held.info.type, held.info.key_size, held.info.value_size)
                == (spec.type, spec.key_size, spec.value_size)
            ]
            where = self.public.pin_of(name)
            pins = self._pinned.get(("map", fit[0].info.id), []) if len(fit) == 1 else []
            if pins:
                self.questions.append(
                    f"map {name} is pinned at {pins[0]}, where this manifest does not look for it: say so ([public] "
                    f"maps, or [map.{name}] pin), else the daemon's own loader would find the map of today there for "
                    "ever"
                )
            elif len(fit) == 1:
                self.maps[name] = fit[0]
                self.notes.append(f"map {name} was pinned nowhere: it is one that the programs use")
            elif any(_declares(item.spec, name) and self._runs(item.spec) for item in self.bundle.objects):
                at = f"is not at {self.base / where}" if where else "has no place in the manifest ([public] maps)"
                self.questions.append(
                    f"map {name} {at}, and {len(fit)} of the maps that the programs use could be it: say where its "
                    f"loader pins it ([map.{name}] pin)"
                )

    @cached_property
    def _pinned(self) -> dict[tuple[str, int], list[Path]]:
        """All pins of this daemon, by what they are."""
        found: dict[tuple[str, int], list[Path]] = {}
        for path in (self.base / name for name in sorted(_pins_below(self.base))):
            if "." in path.name or path.is_symlink():  # the kernel's own files have a dot, and no pin has
                continue
            try:
                found.setdefault(identity(path), []).append(path)
            except KernelError as error:
                if error.facts["errno"] not in (errno.EACCES, errno.ENOENT):  # closed even to us, or gone meanwhile
                    raise
        return found

    def note_pins(self) -> None:
        """Pins of these maps that nobody named: who opens those has the map of today whatever comes."""
        for name, held in self.maps.items():
            for path in self._pinned.get(("map", held.info.id), ()):
                if str(path) != os.path.normpath(self.pins.get(name, "")):
                    self.notes.append(f"{path} is another pin of map {name}: it stays with the map that is there now")

    def find_globals(self) -> None:
        """The variables of the objects that run, which no loader pins: each object's own programs use them."""
        for item in self.bundle.objects:
            used = _maps_used(self.programs[one.name] for one in item.spec.programs if one.name in self.programs)
            for name, spec in unite_maps([item.spec]).items():
                if not is_global(name):
                    continue
                section = name[len(item.spec.name) :]
                fit = [
                    held
                    for held in used.values()
                    if held.info.type == "array"
                    and held.info.value_size == spec.value_size
                    and held.info.name.endswith(section[:15])
                ]
                if len(fit) == 1:
                    self.maps[name] = fit[0]
                elif used:
                    self.notes.append(
                        f"variables {name} were not found ({len(fit)} maps could be it): an upgrade begins with those "
                        "of its object"
                    )

    def _runs(self, spec: ObjectSpec) -> bool:
        return any(program.name in self.programs for program in spec.programs)

    # Hooks

    def find_hooks(self) -> None:
        """What runs on the hooks that the manifest names."""
        links = list(all_links())
        for place in find_places(self.bundle.attach, self.bundle.programs):
            kind = HOOKS[place.entry.hook]
            if kind.linked and kind.slot and kind.on != "map":
                self.questions.append(
                    f"hook {place.link} ({place.entry.hook}) cannot be taken over, since the kernel exchanges no "
                    "program there: leave it out of the bundle, and let its loader go on with it"
                )
            elif kind.linked and kind.on != "map" and not place.entry.adopt:
                self._find_link(place, [link.id for link in links if self._could_be(place, link)])
            else:
                self._find_noted(place)

    def find_programs(self) -> None:
        """Open the programs that are pinned where the manifest says, and on no hook: they are jumped to, or wait."""
        if self.public.programs is None:
            return
        for name in loaded(self.bundle.programs.values()):
            path = self.base / self.public.programs / name
            if name in self.programs or not path.exists():
                continue
            self.programs[name] = Program.open(path)
            self.running[self.programs[name].info.id] = name

    def _could_be(self, place: Place, link: LinkInfo) -> bool:
        try:
            return self._why_not(place, link) is None
        except KernelError as error:
            if error.facts["errno"] != errno.ENOENT:
                raise
            return False  # somebody's, who took it off meanwhile

    def _find_link(self, place: Place, candidates: list[int]) -> None:
        pin = self.public.links.get(place.entry.link)
        path = self.base / pin if pin is not None else None
        if path is not None and os.path.lexists(path):
            link, held = Link.open(path), f"link at {path}"
            why = self._why_not(place, link.info) if self._runs_another(place, link) is None else None
            if why is not None:
                end = ", or leave the hook out" if link.info.is_dead else f": correct the pin of link {place.link}"
                self.questions.append(f"the link at {path} {why}{end}")
                self.running[link.info.program_id] = place.entry.program  # all is said about it
                return
        elif len(candidates) == 1 and (path is None or not place.entry.is_pattern):
            link, held = Link.by_id(candidates[0]), "link pinned nowhere"
            if pin is not None:
                self.notes.append(f"link {place.link} was not at {path}: it is link {candidates[0]}")
        else:
            at = f"is not at {path}" if path is not None else "has no pin in the manifest"
            self.questions.append(
                f"link {place.link} {at}, and {len(candidates)} links on {place} could be it: say where its loader "
                "pins it (pin = in its [[attach]]), or leave the hook out if this node has none"
            )
            return
        if place.link in self.instead:
            self.notes.append(
                f"link {place.link} runs {self.instead[place.link]}, not {place.entry.program}: its loader put that "
                "there, and an upgrade puts it right"
            )
        self.links[place.link] = link
        self._take(hook_at(place, self.bundle.programs, "keep", expected=link.info.program_id), held)

    def _why_not(self, place: Place, info: LinkInfo) -> str | None:
        """Why the link is not that of the place, in words that follow its name."""
        entry = place.entry
        if info.is_dead:
            return "runs nowhere: what it was on was removed, or somebody detached it; its own loader has to attach it"
        wanted = entry.attach_type(self.bundle.programs[entry.program])
        if info.attach_type != wanted:
            return f"is on {info.attach_type or info.type}, not on {wanted}"
        if info.target_id != place.id:
            return f"is on {info.where}, and {place} is {place.id}"
        with Program.by_id(info.program_id) as program:
            if program.info.name.encode() != in_kernel(entry.program):
                return f"runs a program {program.info.name}, not {entry.program}"
        return None

    def _runs_another(self, place: Place, link: Link) -> str | None:
        """The release's other program that its loader has put on the link, as Kmesh does at any restart.

        It is the right link all the same, and an upgrade puts the right program there.
        """
        wanted = self.bundle.programs[place.entry.program]
        with Program.by_id(link.info.program_id) as program:
            name = str(program.function)
        spec = self.bundle.programs.get(name)
        if spec is None or name == wanted.name or {spec.type, wanted.type} != {EITHER_WAY}:
            return None
        if (link.info.target_id, link.info.attach_type) != (place.id, place.entry.attach_type(wanted)):
            return None
        self.instead[place.link] = name
        return name

    def _find_noted(self, place: Place) -> None:
        hook = self._adopted(place)
        if hook is None or hook.action != "adopt" or hook.expected is None:
            if not place.entry.is_pattern:
                self.questions.append(
                    f"hook {place.link}: nothing is attached to {place} ({place.entry.hook}) that could be taken over "
                    "(adopt = true): leave it out of the bundle if this node has none"
                )
            return
        with Program.by_id(hook.expected) as program:
            if program.info.name.encode() != in_kernel(hook.program):
                self.questions.append(
                    f"hook {place.link}: {place} runs a program {program.info.name}, not {hook.program}: correct the "
                    "manifest, or let whoever attached it take it off"
                )
                return
        self.noted.append(hook)
        self._take(hook, "no link")

    def _adopted(self, place: Place) -> HookPlan | None:
        programs = self.bundle.programs
        if HOOKS[place.entry.hook].on != "map":
            return new_hook(place, programs, frozenset())
        held = self.maps.get(place.target)
        if held is None or not place.entry.adopt:
            return None
        kind = place.entry.attach_type(programs[place.entry.program])
        number = MapPlace(held.info.id, kind).program()
        if not number or any((link.program_id, link.target_id) == (number, held.info.id) for link in all_links()):
            return None
        return hook_at(place, programs, "adopt", expected=number)

    def _take(self, hook: HookPlan, held: str) -> None:
        assert hook.expected is not None  # what runs there
        program = Program.by_id(hook.expected)
        self.programs.setdefault(hook.program, program)
        self.running[hook.expected] = hook.program
        self.hooks.append((hook, held))

    # Proof

    def prove(self) -> dict[str, str]:
        """The tags that the objects' own programs get, by name; asks about objects that this kernel does not load."""
        tags: dict[str, str] = {}
        for item in self.bundle.objects:
            if not self._runs(item.spec) or self.public.unproven == "accept":
                continue
            given = {name: held for name, held in self.maps.items() if not answer(held.info.type).anew}
            sections = {name: spec for name, spec in unite_maps([item.spec]).items() if is_global(name)}
            own = {name: held for name, held in given.items() if name not in sections}
            try:
                loaded = load_object(item.data, item.spec.name, own, sections, item.spec.programs)
            except KernelError as error:
                if "log" not in error.facts or error.facts["errno"] in PASSING:
                    raise
                self.questions.append(
                    f"object {item.spec.name} cannot be loaded, so that nothing shows that it is what runs: leave out "
                    f"the program that this kernel refuses ([object.program.NAME] skip = true): {error.message}"
                )
                continue
            tags |= {name: program.info.tag for name, program in loaded.programs.items()}
            for one in (*loaded.programs.values(), *loaded.maps.values()):
                one.close()
        return tags

    def ask_unproven(self, tags: Mapping[str, str]) -> None:
        """Programs that are not those of the objects."""
        if self.public.unproven == "accept":
            return
        for hook, _ in self.hooks:
            assert hook.expected is not None
            with Program.by_id(hook.expected) as program:
                tag = program.info.tag
            names = {hook.program, self.instead.get(hook.link, hook.program)}
            known = {tags[name] for name in names if name in tags}
            if known and tag not in known:
                self.questions.append(
                    f"hook {hook.link} runs a program {hook.program} (tag {tag}) that is not the one of the bundle's "
                    f"object (tag {' or '.join(sorted(known))}): this bundle is not the release that runs; give that "
                    'one, or, if it is the same source in the hands of another loader, say [public] unproven = "accept"'
                )

    def ask_version(self) -> None:
        """The version that the daemon itself has noted, by which its next start decides what is of use to it."""
        held = self.maps.get(self.public.version_map or "") or self._own_version()
        if held is None:
            return
        if held.is_read_only:
            self.questions.append(
                f"map {self.public.version_map} is frozen or read-only, so that hitless could not write the version "
                "there behind an upgrade: leave version_map out of [public]"
            )
        noted, number = int.from_bytes(held.lookup(FIRST) or b"", sys.byteorder), version_number(self.public.version)
        if noted != number:
            self.questions.append(
                f"map {self.public.version_map} has {noted:#010x}, and {self.public.version!r} is {number:#010x}: the "
                "daemon runs another version, or calls it otherwise; write the text that it has itself in [public] "
                f"version, or the number ({noted:#010x})"
            )

    def _own_version(self) -> Map | None:
        """The map of the version that the daemon itself has made, which no object declares."""
        name = self.public.version_map
        pin = self.public.pin_of(name) if name is not None and name not in self.bundle.maps else None
        if pin is None or not os.path.lexists(self.base / pin):
            return None
        held = Map.open(self.base / pin)
        # Another kind of map is refused where what is to be written is looked at.
        return held if (held.info.type, held.info.key_size, held.info.value_size) == ("array", 4, 4) else None

    # What else is there

    def ask_others(self) -> None:
        """Programs and links of others that use these maps, and pins among those of this daemon that nobody named."""
        ids = {held.info.id: name for name, held in self.maps.items()}
        explained = set(self.running) | set(self._in_slots())
        runs: dict[int, list[int]] = {}
        for link in all_links():
            runs.setdefault(link.program_id, []).append(link.id)
        attached = {program: f"map {name}" for program, name in self._on_maps()}
        others = [
            (program.info, sorted({ids[number] for number in program.map_ids & ids.keys()}))
            for program in all_programs()
            if program.info.id not in explained and program.map_ids & ids.keys()
        ]
        holders = holders_of([("program", info.id) for info, _ in others])
        for info, names in others:
            if info.name in self.public.leave:
                continue
            what = f"program {info.id} ({info.name}), which uses map {', '.join(names[:3])},"
            if info.id in runs:
                where = f"runs on link {', '.join(map(str, runs[info.id]))}"
            elif info.id in attached:
                where = f"is attached to {attached[info.id]} without a link"
            elif info.type in _UNLINKED and not holders["program", info.id]:
                where = "is attached somewhere without a link, or pinned"
            else:
                self.notes.append(f"{what} is loaded and was seen on no hook: it is left as it is")
                continue
            self.questions.append(
                f"{what} {where}, and no [[attach]] of the manifest names it: name it, or, if it is to stay with the "
                f"maps that are there now whatever comes, say [public] leave = [\"{info.name}\"]"
            )

    def _in_slots(self) -> Iterator[int]:
        for held in self.maps.values():
            if held.info.type == "prog_array":
                for key in held.all_keys():
                    yield int.from_bytes(held.lookup(key) or b"", sys.byteorder)

    def _on_maps(self) -> Iterator[tuple[int, str]]:
        for name, held in self.maps.items():
            if held.info.type in ("sockmap", "sockhash"):
                for attach_type in SOCKET_HOOKS:
                    try:
                        yield attached_program(held, attach_type), name
                    except KernelError as error:
                        if error.facts["errno"] not in (errno.EBUSY, errno.EOPNOTSUPP):
                            raise
                        continue  # it has the other kind of verdict, or this kernel has none of this kind

    # The result

    def objects(self) -> tuple[ObjectSpec, ...]:
        """The release's objects; one of which nothing runs has no variables here."""
        specs = (item.spec for item in self.bundle.objects)
        return tuple(
            spec
            if self._runs(spec)
            else msgspec.structs.replace(spec, maps=tuple(one for one in spec.maps if not is_global(one.name)))
            for spec in specs
        )

    def maps_with_layouts(self) -> tuple[dict[str, MapSpec], tuple[FoundMap, ...]]:
        """The release's word on each map, with the snapshot's where that has none."""
        known = known_layouts(self.public)
        specs, told = {}, []
        for name, held in self.maps.items():
            spec = self.bundle.maps[name]
            rules = self.bundle.rules.get(name)
            layout = "objects"
            noted = known.get(name)
            fits = noted is not None and (noted.key_size, noted.value_size) == (spec.key_size, spec.value_size)
            if fits and noted is not None and spec.value is not None and noted.value is not None:
                changed = diff_map(_shape(noted), _shape(spec))
                if changed.verdict in ("lossless", "lossy", "needs-converter"):
                    self.questions.append(
                        f"map {name} has other fields in {self.public.snapshot} than in the bundle: one of the two is "
                        "not of the release that runs; correct the bundle, or remove the file if it is older"
                    )
            if held.info.value_type_id:
                layout = "kernel"
            elif fits and noted is not None and noted.value is not None and not self.bundle.digest:
                layout = "snapshot"  # as it described the release that nobody has
            elif rules is not None and rules.value is not None:
                layout = "manifest"
            elif spec.value is None:
                layout = "none"
                if fits and noted is not None and noted.value is not None:
                    spec = msgspec.structs.replace(spec, key=noted.key, value=noted.value)
                    layout = "snapshot"
            specs[name] = spec
            told.append(FoundMap(name, held.info.id, self.pins.get(name), layout))
        return specs, tuple(told)


def recognise(base: Path, bundle: Bundle) -> Recognised:
    """What runs below ``base``, the directory of another daemon, if ``bundle`` is the release that it runs.

    Raises NodeError with all that has to be answered (fact ``questions``), KernelError.
    """
    look = _Look(base, bundle)
    missing = look.find_pinned()
    look.find_hooks()
    look.find_programs()
    look.find_unpinned(missing)
    look.find_globals()
    if not look.maps and not look.programs:
        raise NodeError(
            f"nothing of {bundle.name} {bundle.version} was found under {base}: no map is pinned and no link is there "
            "that the manifest names ([public] maps, pin); what is pinned there: "
            f"{', '.join(sorted(_pins_below(base))[:8]) or 'nothing'}",
            path=str(base),
            questions=[],
        )
    look.note_pins()
    look.ask_version()
    look.ask_others()
    tags = look.prove() if not look.questions else {}
    look.ask_unproven(tags)
    specs, told_maps = look.maps_with_layouts()
    if look.questions:
        raise _asked(base, bundle, look.questions)
    unwritten = [name for item in bundle.objects for name in prove_unwritten(item, bundle.rules, look.maps)]
    hooks = [hook for hook, _ in look.hooks]
    record = Record(
        generation=1,
        name=bundle.name,
        version=bundle.version,
        digest=bundle.digest,
        phase="cutover",  # what follows is what follows a commit, and may be repeated
        objects=look.objects(),
        maps=specs,
        hooks=hooks_of(hooks),
        attach=bundle.attach,
        cutover=bundle.cutover,
        rules=bundle.rules,
        own_rules=bundle.rules,
        converters=bundle.converters,
        unwritten=tuple(dict.fromkeys(unwritten)),
        public=look.public,
    )
    return Recognised(
        record, look.maps, look.programs, look.links, tuple(look.noted), told_maps,
        tuple(_told(hook, held, tags) for hook, held in look.hooks), tuple(look.notes),
    )  # fmt: skip


def _told(hook: HookPlan, held: str, tags: Mapping[str, str]) -> FoundHook:
    assert hook.expected is not None
    target = f"{hook.target} in {hook.netns}" if hook.netns else hook.target
    return FoundHook(hook.link, hook.hook, target, hook.program, hook.expected, held, hook.program in tags)


def _asked(base: Path, bundle: Bundle, questions: list[str]) -> NodeError:
    lines = "\n".join(f"  {number}. {text}" for number, text in enumerate(questions, 1))
    return NodeError(
        f"{base} cannot be taken over by {bundle.path} as it is; nothing was changed:\n{lines}",
        path=str(base),
        questions=questions,
    )


def _shape(spec: MapSpec) -> MapSpec:
    """What two sources must agree on: the fields, and nothing of room and flags."""
    return MapSpec("", spec.type, spec.key_size, spec.value_size, 1, key=spec.key, value=spec.value)


def _declares(item: ObjectSpec, name: str) -> bool:
    return any(spec.name == name for spec in item.maps)


def _maps_used(programs: Iterable[Program]) -> dict[int, Map]:
    return {number: Map.by_id(number) for program in programs for number in sorted(program.map_ids)}


def _pins_below(base: Path) -> Iterator[str]:
    for top, directories, files in os.walk(base):
        for own in (HOME, ADOPTING):
            if own in directories:
                directories.remove(own)
        yield from (os.path.relpath(Path(top, name), base) for name in files)
