"""A bundle: one release of a daemon's data path, as a directory of objects and their ``bundle.toml``."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from hitless.attach import ATTACH_KEYS, ATTACH_NEEDS, Attach, check_links, read_attach
from hitless.errors import BundleError, LayoutError, UnsupportedError
from hitless.layout.contradictions import check_rules, differences
from hitless.layout.diff import section_of
from hitless.layout.dwarf import Dwarf
from hitless.layout.elf import Binding, Types, read_btf, read_object
from hitless.layout.model import MapSpec, ObjectSpec, ProgramSpec, Type
from hitless.layout.rules import FieldRule, MapRules
from hitless.layout.sections import meant
from hitless.public import ADOPTING, HOME, Public

__all__ = ["MANIFEST", "OPEN", "Bundle", "BundleObject", "CutoverRule", "object_name", "unite_maps"]

MANIFEST = "bundle.toml"

OPEN = "..."
"""What stands in a manifest for an answer that a person has yet to give."""

_CONSISTENCY = ("hook", "connection")
_LONGEST = 86400  # s that connections may stay with the old release
_KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "": {"bundle": dict, "object": list, "attach": list, "map": dict, "cutover": dict, "types": dict,
        "public": dict},
    "public": {
        "maps": str, "programs": str, "version_map": str, "version": str, "snapshot": str, "leave": list,
        "unproven": str,
    },
    "cutover": {"consistency": str, "deadline": (int, float)},
    "bundle": {"name": str, "version": str},
    "types": {"file": str},
    "object": {"file": str, "name": str, "program": dict},
    "program": {"type": str, "skip": (bool, str)},
    "attach": ATTACH_KEYS,
    "map": {
        "was": (str, list), "from": dict, "key": str, "value": str, "old_key": str, "old_value": str, "convert": str,
        "on_collision": str, "on_loss": str, "group": str, "programs": str, "infer": bool, "field": dict, "slots": dict,
        "pin": str,
    },
    "from": {"old_key": str, "old_value": str, "convert": str, "field": dict},
    "field of from": {"was": str, "default": (int, float)},
    "field": {"was": str, "merge": str, "default": (int, float)},
}  # fmt: skip
_REQUIRED = {"bundle": ("name", "version"), "object": ("file",), "types": ("file",), "attach": ATTACH_NEEDS}
_FUNCTION = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):([A-Za-z_][A-Za-z0-9_]*)")
_FUNCTIONS = ("", "_key", "_back", "_key_back")  # what may follow a converter's name, see layout/structured.py
_MODULE_BYTES = 1 << 18  # it travels in the record of an upgrade, which may have to be finished without the bundle
_OBJECT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PATH = re.compile(r"(?!/*$)[^.]*(\.\.?/[^.]*)*")  # below a bpffs, which has no dot in a name, or a way to it
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class CutoverRule(msgspec.Struct, frozen=True):
    """How hooks go over: each ``hook`` by itself, or together for each ``connection`` that begins.

    In that case connections that had begun stay with the old release until they end, at most ``deadline`` seconds.
    """

    consistency: str = "hook"
    deadline: float = 60.0


def object_name(file: str) -> str:
    """What an object is called after its file."""
    return Path(file).name.removesuffix(".o").removesuffix(".bpf")


class BundleObject(msgspec.Struct, frozen=True):
    """One object file of a bundle: what it declares, and its bytes."""

    spec: ObjectSpec
    data: bytes


class Bundle(msgspec.Struct, frozen=True):
    """A release, read and checked. ``digest`` is a SHA-256 over the manifest, the objects and the converters, in hex.

    It is of what the files hold, so what ``variables`` fill in does not change it.
    ``maps`` and ``programs``, or what else hooks can run, are by name over all objects; ``attach`` is in the order of
    cutover. ``converters`` are the sources of the modules that the rules name, by module; nothing of them was run.
    ``optional`` are programs that it can do without; ``left_out`` are those of them that were, with the links that
    they would have had. ``public`` tells where a daemon that does not know hitless looks for what is pinned; None if
    there is none.
    """

    path: Path
    name: str
    version: str
    digest: str
    objects: tuple[BundleObject, ...]
    maps: dict[str, MapSpec]
    programs: dict[str, ProgramSpec]
    attach: tuple[Attach, ...]
    rules: dict[str, MapRules]
    converters: dict[str, str] = {}
    cutover: CutoverRule = CutoverRule()
    public: Public | None = None
    optional: frozenset[str] = frozenset()
    left_out: Mapping[str, tuple[str, ...]] = {}

    @classmethod
    def load(
        cls, path: Path | str, variables: Mapping[str, str] | None = None, digest: str | None = None
    ) -> Bundle:
        """Read the bundle in directory ``path``, with ``${NAME}`` in the manifest's targets from ``variables``.

        Without ``variables`` (None) targets stay as written: enough to look at a release, not to apply it. With them
        (``{}`` if there are none) the directory and its files must be root's or this user's, and nobody else's to
        write, since what they hold is going to run. ``digest`` is what the bundle's must be, if it was pinned.
        Raises BundleError with file and line, LayoutError for a bad object, UnsupportedError by feature.
        """
        directory = Path(path)
        with _Files(directory, trusted=variables is not None) as files:
            try:
                text = files.read(MANIFEST).decode()
            except (OSError, UnicodeDecodeError) as error:
                raise _unreadable(directory, error) from None
            bundle = _Reader(directory / MANIFEST, text, variables, files).bundle()
        if digest is not None and digest != bundle.digest:
            raise BundleError(
                f"{directory} has digest {bundle.digest}, not {digest} as pinned: it is another release, or somebody "
                "changed a file of it; nothing was done: get the one that was pinned, or pin this one, if you trust it",
                file=str(directory),
                digest=bundle.digest,
                expected=digest,
            )
        return bundle


class _Files:
    """Reads files of one directory. ``trusted`` ones must be such that no other user can have changed them.

    Those are looked at through the descriptor that they are read from, so that what was checked is what is read.
    """

    def __init__(self, directory: Path, trusted: bool) -> None:
        self._directory = directory
        self._trusted = trusted
        self._fd = -1

    def __enter__(self) -> _Files:
        if self._trusted:
            try:
                self._fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise _unreadable(self._directory, error) from None
            try:
                _require_trusted(self._directory, os.fstat(self._fd))
            except BaseException:
                os.close(self._fd)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, name: str, most: int = -1) -> bytes:
        """All bytes of the file, or ``most`` of them. Raises OSError, BundleError if it is not to be trusted."""
        if self._fd < 0:
            with (self._directory / name).open("rb") as file:
                return file.read(most)
        with os.fdopen(os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=self._fd), "rb") as file:
            _require_trusted(self._directory / name, os.fstat(file.fileno()))
            return file.read(most)


def _unreadable(directory: Path, error: Exception) -> BundleError:
    manifest = directory / MANIFEST
    why = error.strerror if isinstance(error, OSError) else error
    return BundleError(
        f"{manifest} cannot be read: {why}; a bundle is a directory with a {MANIFEST} and its objects",
        file=str(manifest),
    )


def _require_trusted(path: Path, seen: os.stat_result) -> None:
    mode = stat.S_IMODE(seen.st_mode)
    facts = {"file": str(path), "owner": seen.st_uid, "mode": f"{mode:04o}"}
    if not stat.S_ISREG(seen.st_mode) and not stat.S_ISDIR(seen.st_mode):
        raise BundleError(f"{path} is no regular file", **facts)
    # Who owns hitless itself decides already what runs here: without them `sudo make demo` in one's own clone fails.
    if seen.st_uid not in (0, os.geteuid(), Path(__file__).stat().st_uid):
        raise BundleError(
            f"{path} belongs to user {seen.st_uid}, who is neither root nor you, and what is in a bundle runs with "
            f"your rights and in the kernel: look at it, then chown root:root {path}",
            **facts,
        )
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BundleError(
            f"{path} has mode {mode:04o} and can be written by others than its owner (user {seen.st_uid}), and what is "
            f"in a bundle runs with your rights and in the kernel: look at it, then chmod go-w {path}",
            **facts,
        )


def unite_maps(objects: Iterable[ObjectSpec]) -> dict[str, MapSpec]:
    """All maps of ``objects`` by name; objects share a map of one name, and any of them may tell its types.

    Global data (``.bss``...) belong to one object, so they are named ``<object>.bss``. Raises LayoutError if two
    objects define one map differently.
    """
    united: dict[str, MapSpec] = {}
    origin: dict[str, str] = {}
    for item in objects:
        for spec in item.maps:
            name = f"{item.name}{spec.name}" if spec.name.startswith(".") else spec.name
            if name != spec.name and name in united:
                raise LayoutError(
                    f"section {spec.name} of {item.name} would be called {name}, as one of {origin[name]} is: give one "
                    "object another name",
                    map=name,
                    objects=[origin[name], item.name],
                )
            known = united.setdefault(name, spec)
            wrong = differences(known, spec) if known != spec else []
            if wrong:
                raise LayoutError(
                    f"map {name} is defined differently by {origin[name]} and {item.name} ({'; '.join(wrong)}): "
                    "objects of one bundle share maps by name; make them the same, or give one another name",
                    map=name,
                    objects=[origin[name], item.name],
                    differences=wrong,
                )
            origin.setdefault(name, item.name)
            key, value = (mine if mine is not None else yours for mine, yours in (
                (known.key, spec.key), (known.value, spec.value),
            ))  # fmt: skip
            if (key, value) != (known.key, known.value):  # declared with sizes only by the first
                united[name] = msgspec.structs.replace(known, key=key, value=value)
    return united


class _Reader:
    """Turns a manifest's text into a Bundle, knowing the line of every key for its errors."""

    def __init__(self, file: Path, text: str, variables: Mapping[str, str] | None, files: _Files) -> None:
        self._file = file
        self._files = files
        self._text = text
        self._variables = variables
        self._lines = _key_lines(text)
        self._converters: dict[str, str] = {}
        self._types: Dwarf | None = None
        self._optional: set[str] = set()

    def bundle(self) -> Bundle:
        try:
            manifest = tomllib.loads(self._text)
            self._check_text(manifest, ())
            self._check_answered(manifest)
        except RecursionError:
            raise BundleError(f"{self._file}: nested too deeply for a manifest", file=str(self._file)) from None
        except tomllib.TOMLDecodeError as error:
            raise BundleError(f"{self._file} is not TOML: {error}", file=str(self._file)) from None
        self._check(manifest, "", ())
        self._check(manifest.get("bundle", {}), "bundle", ("bundle",))
        self._check(manifest.get("cutover", {}), "cutover", ("cutover",))
        for name, entry in manifest.get("map", {}).items():
            self._check(entry, "map", ("map", name))
        bindings = {
            name: Binding(rule.get("key"), rule.get("value"), rule.get("infer", False))
            for name, rule in manifest.get("map", {}).items()
        }
        carried = b""
        if "types" in manifest:
            self._check(manifest["types"], "types", ("types",))
            carried = self._beside(manifest["types"]["file"], ("types", "file"))
            self._types = Dwarf.parse(carried, manifest["types"]["file"])
        unbound = [
            self._object(entry, ("object", str(index))) for index, entry in enumerate(manifest.get("object", []))
        ]
        objects = [self._bound(item, unbound, bindings) for item in unbound]
        if not objects:
            self.fail((), "names no object: add [[object]] with file = \"NAME.bpf.o\"")
        specs = [item.spec for item in objects]
        for index, spec in enumerate(specs):
            if spec.name in {other.name for other in specs[:index]}:
                self.fail(("object", str(index)), f"two [[object]] are called {spec.name}: give one another name")
        maps = unite_maps(specs)
        programs = self._programs(specs)
        rules = {name: self._rules(entry, maps, name, objects) for name, entry in manifest.get("map", {}).items()}
        self._check_heirs(rules, maps)
        attach = []
        for index, entry in enumerate(manifest.get("attach", [])):
            self._check(entry, "attach", ("attach", str(index)))
            attach.append(read_attach(entry, programs, maps, ("attach", str(index)), self))
        check_links(attach, self)
        digest = hashlib.sha256(self._text.encode())
        for item in objects:
            digest.update(hashlib.sha256(item.data).digest())
        if carried:
            digest.update(hashlib.sha256(carried).digest())
        for module in sorted(self._converters):
            digest.update(hashlib.sha256(self._converters[module].encode()).digest())
        return Bundle(
            path=self._file.parent,
            name=manifest["bundle"]["name"],
            version=manifest["bundle"]["version"],
            digest=digest.hexdigest(),
            objects=tuple(objects),
            maps=maps,
            programs=programs,
            attach=tuple(attach),
            rules=rules,
            converters=self._converters,
            cutover=self._cutover(manifest.get("cutover", {})),
            public=self._public(manifest, maps),
            optional=frozenset(self._optional),
        )

    def _cutover(self, entry: Mapping[str, Any]) -> CutoverRule:
        rule = CutoverRule(**entry)
        if rule.consistency not in _CONSISTENCY:
            words = f"consistency is {' or '.join(_CONSISTENCY)}, not {rule.consistency!r}"
            self.fail(("cutover", "consistency"), words)
        if not 0 <= rule.deadline <= _LONGEST:
            self.fail(("cutover", "deadline"), f"deadline is in seconds, from 0 to {_LONGEST}, not {rule.deadline}")
        return rule

    def _public(self, manifest: Mapping[str, Any], maps: Mapping[str, MapSpec]) -> Public | None:
        entry = manifest.get("public", {})
        self._check(entry, "public", ("public",))
        rules, attach = manifest.get("map", {}), manifest.get("attach", [])
        pins = {name: self._pin(rule["pin"], ("map", name, "pin")) for name, rule in rules.items() if "pin" in rule}
        links = {
            one["link"]: self._pin(one["pin"], ("attach", str(index), "pin"))
            for index, one in enumerate(attach)
            if "pin" in one
        }
        if "public" not in manifest and not pins and not links:
            return None
        version_map = entry.get("version_map")
        if version_map is not None:
            spec = maps.get(version_map)
            if spec is not None and (spec.type, spec.key_size, spec.value_size) != ("array", 4, 4):
                why = f"{version_map} is no array with a value of 4 bytes, which is to hold the version"
                self.fail(("public", "version_map"), why)
            if spec is None and "maps" not in entry:
                why = f"no object has a map {version_map}: say by maps where the daemon pins it that makes it itself"
                self.fail(("public", "version_map"), why)
        if entry.get("unproven", "error") not in ("error", "accept"):
            self.fail(("public", "unproven"), f'unproven is "error" or "accept", not {entry["unproven"]!r}')
        if not all(isinstance(name, str) for name in entry.get("leave", [])):
            self.fail(("public", "leave"), "leave is a list of names of programs")
        public = Public(
            version=self.substitute(entry.get("version", manifest["bundle"]["version"]), ("public", "version")),
            maps=self._pin(entry["maps"], ("public", "maps")) if "maps" in entry else None,
            programs=self._pin(entry["programs"], ("public", "programs")) if "programs" in entry else None,
            version_map=version_map,
            snapshot=self.substitute(entry["snapshot"], ("public", "snapshot")) if "snapshot" in entry else None,
            leave=tuple(entry.get("leave", ())),
            unproven=entry.get("unproven", "error"),
            pins=pins,
            links=links,
        )
        if self._variables is not None:
            self._check_places(public, maps)
        return public

    def _check_places(self, public: Public, maps: Mapping[str, MapSpec]) -> None:
        """Each path is that of one map or link, and none is in what hitless makes itself."""
        places: dict[Path, str] = {}
        pins = {name: public.pin_of(name) for name in maps}
        found = [(pin, f"map {name}", ("map", name)) for name, pin in pins.items() if pin is not None]
        found += [(pin, f"link {link}", ("attach", "0")) for link, pin in public.links.items()]
        for pin, what, path in found:
            place = Path(os.path.normpath(pin))
            if place.parts[0] in (HOME, ADOPTING):
                self.fail(path, f"{what} cannot be pinned at {pin}: hitless keeps there what is its own")
            for one in (place, *place.parents):
                if one in places:
                    self.fail(path, f"{what} and {places[one]} are both to be pinned at {one}: give each its own")
            for one, other in places.items():
                if place in one.parents:
                    self.fail(path, f"{what} is to be pinned at {pin}, which is a directory of {other}")
            places[place] = what

    def _pin(self, text: str, path: tuple[str, ...]) -> str:
        """A place on a bpffs, which cannot be in what hitless makes itself."""
        place = self.substitute(text, path)
        if self._variables is not None and not _PATH.fullmatch(place):
            self.fail(path, f"{place!r} is no path on a bpffs, whose names have no dots")
        return place

    def _check_text(self, item: Any, path: tuple[str, ...]) -> None:
        # Names and values end up in messages and plans, whose lines a control character could forge.
        items = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, value in items:
            for text in (key, value):
                if isinstance(text, str) and not text.isprintable():
                    self.fail((*path, str(key)), f"{text!r} has control characters")
            self._check_text(value, (*path, str(key)))

    def _check_answered(self, manifest: Any) -> None:
        questions = [(self._lines.get(path), path) for path in _open_questions(manifest, ())]
        if questions:
            words = [f"line {line}: {'.'.join(path)}" if line else ".".join(path) for line, path in questions]
            raise BundleError(
                f"{self._file} has questions that wait for an answer ({'; '.join(words)}): write it in the place of "
                f'"{OPEN}", or delete the line where its comment says that this may be',
                file=str(self._file),
                line=questions[0][0],
                questions=[{"line": line, "key": ".".join(path)} for line, path in questions],
            )

    def _check(self, table: Any, kind: str, path: tuple[str, ...]) -> None:
        """Types and names of the keys of one table; ``kind`` is its row in _KEYS."""
        if not isinstance(table, dict):
            self.fail(path, f"{'.'.join(path)} must be a table")
        known = _KEYS[kind]
        for key, value in table.items():
            if key not in known:
                self.fail((*path, key), f"unknown key {key!r}; known here: {', '.join(known)}")
            wanted = known[key]
            kinds = wanted if isinstance(wanted, tuple) else (wanted,)
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in kinds):
                names = wanted.__name__ if isinstance(wanted, type) else " or ".join(one.__name__ for one in wanted)
                self.fail((*path, key), f"{key} must be of type {names}, not {type(value).__name__}")
        for key in _REQUIRED.get(kind, ()):
            if key not in table:
                self.fail(path, f"[{kind}] needs {key}")

    def _object(self, entry: Any, path: tuple[str, ...]) -> BundleObject:
        self._check(entry, "object", path)
        data = self._beside(entry["file"], (*path, "file"))
        name = entry.get("name", object_name(entry["file"]))
        if "name" in entry and not _OBJECT.fullmatch(name):
            self.fail((*path, "name"), f"{name!r} cannot be an object's name: letters, digits, dots, _ and - only")
        spec = self._settled(read_object(data, name, types=self._types), entry.get("program", {}), path)
        return BundleObject(spec, data)

    def _bound(
        self, item: BundleObject, objects: Iterable[BundleObject], bindings: Mapping[str, Binding]
    ) -> BundleObject:
        """The object with the types that the manifest names for its maps: its own, else those of another object.

        The compiler keeps a type only in objects that have a use for it, and a map is shared by all that declare it.
        """
        name = item.spec.name
        bound = {spec.name: bindings[spec.name] for spec in item.spec.maps if any(bindings.get(spec.name, ()))}
        if not bound:
            return item
        beside: Dwarf | Types | None = self._types
        own = Types(read_btf(item.data, name), item.data, name, beside)
        wanted = [one for binding in bound.values() for one in (binding.key, binding.value) if one is not None]
        if any(own.find(one) is None for one in wanted):
            for other in objects:
                if other is not item:
                    beside = Types(read_btf(other.data, other.spec.name), other.data, other.spec.name, beside)
        maps = read_object(item.data, name, bound, beside).maps
        return BundleObject(msgspec.structs.replace(item.spec, maps=maps), item.data)

    def _beside(self, name: str, path: tuple[str, ...]) -> bytes:
        """The bytes of a file beside the manifest, which names it at ``path``."""
        file = self._file.parent / name
        if file.resolve().parent != self._file.parent.resolve():
            self.fail(path, f"{name} is not a file beside the manifest")
        try:
            return self._files.read(name)
        except OSError as error:
            self.fail(path, f"{file} cannot be read: {error.strerror}; was the object compiled?")

    def _settled(self, spec: ObjectSpec, entries: Mapping[str, Any], path: tuple[str, ...]) -> ObjectSpec:
        """The object with what the manifest says of its programs: a type, or that one is left out."""
        programs = {program.name: program for program in spec.programs}
        for name, entry in entries.items():
            here = (*path, "program", name)
            self._check(entry, "program", here)
            if name not in programs:
                known = ", ".join(sorted(programs)) or "none"
                self.fail(here, f"{spec.name} has no program {name}; there are: {known}")
            if "type" in entry:
                kinds = meant(entry["type"])
                if kinds is None:
                    self.fail(
                        (*here, "type"),
                        f"{entry['type']!r} is no type of programs: give a section's name as libbpf knows it, "
                        'as "xdp", "tc" or "cgroup/connect4"',
                    )
                programs[name] = msgspec.structs.replace(programs[name], type=kinds[0], attach_type=kinds[1])
            if "skip" in entry:
                if isinstance(entry["skip"], str):
                    if entry["skip"] != "refused":
                        self.fail((*here, "skip"), f'skip is true, false or "refused", not {entry["skip"]!r}')
                    self._optional.add(name)
                programs[name] = msgspec.structs.replace(programs[name], autoload=entry["skip"] is not True)
        for program in programs.values():
            if program.autoload and not program.type:
                self.fail(
                    path,
                    f"{spec.name}: libbpf does not know section {program.section}: say what program {program.name} is "
                    f'by [object.program.{program.name}] with type = "xdp", "cgroup/connect4" or the like, or leave it '
                    "out by skip = true",
                )
        return msgspec.structs.replace(spec, programs=tuple(programs.values()))

    def _programs(self, objects: Iterable[ObjectSpec]) -> dict[str, ProgramSpec]:
        programs: dict[str, ProgramSpec] = {}
        origin: dict[str, str] = {}
        for index, item in enumerate(objects):
            for program in item.hookable:
                if program.name in programs:
                    both = f"{origin[program.name]} and {item.name}"
                    self.fail(("object", str(index)), f"{both} both have a program called {program.name}: rename one")
                programs[program.name] = program
                origin[program.name] = item.name
        return programs

    def _rules(
        self, entry: Any, maps: Mapping[str, MapSpec], name: str, objects: Iterable[BundleObject]
    ) -> MapRules:
        path = ("map", name)
        # A map that the release no longer has may be named only to say that dropping it is fine.
        if name not in maps and set(entry) != {"on_loss"}:
            self.fail(path, f"no object of this bundle has a map {name}; its maps: {', '.join(sorted(maps))}")
        on_loss = entry.get("on_loss", "error")
        if on_loss not in ("error", "discard"):
            self.fail((*path, "on_loss"), f'on_loss is "error" or "discard", not {on_loss!r}')
        on_collision = entry.get("on_collision")
        if on_collision not in (None, "error", "first", "last", "merge"):
            self.fail((*path, "on_collision"), f"on_collision is error, first, last or merge, not {on_collision!r}")
        programs = entry.get("programs")
        if programs not in (None, "read"):
            self.fail((*path, "programs"), f'programs is "read" or left out, not {programs!r}')
        fields = {}
        for field, rule in entry.get("field", {}).items():
            self._check(rule, "field", (*path, "field", field))
            merge = rule.get("merge")
            if merge not in (None, "keep", "sum", "max", "min", "or"):
                self.fail((*path, "field", field, "merge"), f"merge is keep, sum, max, min or or, not {merge!r}")
            fields[field] = FieldRule(was=rule.get("was"), merge=merge, default=rule.get("default"))
        was = entry.get("was")
        rules = MapRules(
            was=was if isinstance(was, str) else None,
            key=entry.get("key"),
            value=entry.get("value"),
            old_value=entry.get("old_value"),
            on_loss=on_loss,
            fields=fields,
            on_collision=on_collision,
            old_key=entry.get("old_key"),
            old_key_type=self._old_type(entry, "old_key", objects, path),
            old_value_type=self._old_type(entry, "old_value", objects, path),
            convert=entry.get("convert"),
            functions=self._functions(entry["convert"], path) if "convert" in entry else (),
            group=entry.get("group"),
            programs=programs,
            slots=self._slots(entry.get("slots", {}), maps.get(name), objects, path),
        )
        sources = self._sources(entry, rules, objects, path)
        rules = msgspec.structs.replace(rules, sources=sources)
        if name in maps:
            for rule, at in ((rules, path), *((sources[one], (*path, "from", one)) for one in sources)):
                try:
                    check_rules(maps[name], rule)
                except LayoutError as error:
                    field = error.facts.get("field")
                    self.fail((*at, "field", str(field)) if field else at, error.message)
        return rules

    def _sources(
        self, entry: Mapping[str, Any], rules: MapRules, objects: Iterable[BundleObject], path: tuple[str, ...]
    ) -> dict[str, MapRules]:
        """The rules for each map of a list ``was``: those of the map, with what ``from`` says of that source."""
        was, tables = entry.get("was"), entry.get("from", {})
        names = was if isinstance(was, list) else []
        if isinstance(was, list) and (not names or not all(isinstance(one, str) for one in names)):
            self.fail((*path, "was"), "was is the old name of the map, or a list of those that are folded into it")
        if len(set(names)) < len(names):
            self.fail((*path, "was"), f"was names a map twice: {', '.join(names)}")
        for one in tables:
            if one not in names:
                known = ", ".join(names) or 'none, since was is no list: was = ["A", "B"]'
                self.fail((*path, "from", one), f"from is for the maps that are folded into {path[-1]}: {known}")
        out = {}
        for one in names:
            here, own = (*path, "from", one), tables.get(one, {})
            self._check(own, "from", here)
            fields = dict(rules.fields)
            for at, said in own.get("field", {}).items():
                self._check(said, "field of from", (*here, "field", at))
                rule = fields.get(at, FieldRule())
                fields[at] = FieldRule(said.get("was", rule.was), rule.merge, said.get("default", rule.default))
            bound: dict[str, Any] = {
                "old_key": own.get("old_key", rules.old_key),
                "old_value": own.get("old_value", rules.old_value),
                "old_key_type": self._old_type(own, "old_key", objects, here) or rules.old_key_type,
                "old_value_type": self._old_type(own, "old_value", objects, here) or rules.old_value_type,
            }
            if "convert" in own:
                bound |= {"convert": own["convert"], "functions": self._functions(own["convert"], here)}
            out[one] = msgspec.structs.replace(rules, was=one, fields=fields, apart=True, **bound)
        return out

    def _check_heirs(self, rules: Mapping[str, MapRules], maps: Mapping[str, MapSpec]) -> None:
        """An old map may be split or folded with others, and not both; variables are carried one by one."""
        heirs: dict[str, list[str]] = {}
        for name, rule in rules.items():
            if name not in maps:
                continue
            if section_of(maps[name]) is not None:
                if rule.sources:
                    words = f"{name} holds variables, which come one by one from where their own was says"
                    self.fail(("map", name, "was"), f"{words}: no maps are folded into it")
                continue
            for was in rule.sources or ((rule.was,) if rule.was is not None else ()):
                heirs.setdefault(was, []).append(name)
        for was, names in heirs.items():
            if len(names) > 1 and any(rules[name].sources for name in names):
                raise UnsupportedError(
                    f"{self.where(('map', names[-1], 'was'))}: {' and '.join(names)} say that they were {was}: folding "
                    "a map with others and splitting it at once is not supported: do one of it in a release before",
                    feature="map folded and split",
                    maps=names,
                )

    def _slots(
        self, entry: Mapping[str, Any], spec: MapSpec | None, objects: Iterable[BundleObject], path: tuple[str, ...]
    ) -> dict[int, str]:
        """The programs that the manifest puts into a program array."""
        if entry and (spec is None or spec.type != "prog_array"):
            self.fail((*path, "slots"), f"slots hold programs, and this map is no program array: {path[-1]}")
        programs = {program.name: program for item in objects for program in item.spec.programs}
        slots = {}
        for slot, name in entry.items():
            here = (*path, "slots", slot)
            if not slot.isdecimal() or spec is None or int(slot) >= spec.max_entries:
                room = spec.max_entries if spec else 0
                self.fail(here, f"{slot!r} is no slot of {path[-1]}, which has {room} of them")
            if not isinstance(name, str) or name not in programs or not programs[name].autoload:
                known = ", ".join(sorted(one for one, program in programs.items() if program.autoload))
                self.fail(here, f"no object has a program {name!r} that is loaded; there are: {known}")
            slots[int(slot)] = name
        return slots

    def _old_type(
        self, entry: Mapping[str, Any], key: str, objects: Iterable[BundleObject], path: tuple[str, ...]
    ) -> Type | None:
        """The type that a manifest names for the old side of a map: this release's source has to know it."""
        if key not in entry:
            return None
        found = (read_btf(item.data, item.spec.name).find(entry[key]) for item in objects)
        made = next((made for made in found if made is not None), None)
        if made is None and self._types is not None:
            made = self._types.find(entry[key])
        if made is None:
            self.fail(
                (*path, key),
                f"{key}: no object of this bundle has a type {entry[key]!r}; declare the old release's type in one, "
                "and use it there (a pointer variable is enough), so that the compiler keeps it",
            )
        return made

    def _functions(self, convert: str, path: tuple[str, ...]) -> tuple[str, ...]:
        """The functions that belong to converter ``module:name``; the file is read and parsed, never run."""
        path = (*path, "convert")
        match = _FUNCTION.fullmatch(convert)
        if match is None:
            self.fail(path, f'convert is "MODULE:FUNCTION", of a file MODULE.py beside the manifest, not {convert!r}')
        module, name = match.groups()
        if module not in self._converters:
            self._converters[module] = self._module(self._file.parent / f"{module}.py", path)
        try:
            tree = ast.parse(self._converters[module])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            self.fail(path, f"{module}.py{f':{line}' if line else ''} is not Python: {getattr(error, 'msg', error)}")
        there = {item.name for item in tree.body if isinstance(item, ast.FunctionDef)}
        if name not in there:
            self.fail(path, f"{module}.py has no function {name}; it has: {', '.join(sorted(there)) or 'none'}")
        return tuple(name + suffix for suffix in _FUNCTIONS if name + suffix in there)

    def _module(self, file: Path, path: tuple[str, ...]) -> str:
        def bad(why: str) -> NoReturn:
            self.fail(path, f"{file} {why}")

        try:
            if not stat.S_ISREG(file.lstat().st_mode):
                bad("is no regular file")
            data = self._files.read(file.name, _MODULE_BYTES + 1)
        except OSError as error:
            bad(f"cannot be read: {error.strerror}")
        if len(data) > _MODULE_BYTES:
            bad(f"has more than {_MODULE_BYTES} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            bad(f"is not UTF-8: {error}")

    def substitute(self, text: str, path: tuple[str, ...]) -> str:
        if self._variables is None:
            return text
        variables = self._variables

        def value(match: re.Match[str]) -> str:
            if match[1] not in variables:
                self.fail(path, f"${{{match[1]}}} has no value: give one with --set {match[1]}=VALUE")
            return variables[match[1]]

        return _VARIABLE.sub(value, text)

    def where(self, path: tuple[str, ...]) -> str:
        """File and line of the key at ``path``, or of the nearest table around it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._lines:
                return f"{self._file}:{self._lines[path[:length]]}"
        return str(self._file)

    def fail(self, path: tuple[str, ...], why: str) -> NoReturn:
        where = self.where(path)
        raise BundleError(f"{where}: {why}", file=str(self._file), line=where.rpartition(":")[2], key=".".join(path))


def _open_questions(item: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if item == OPEN:
        yield path
    items = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in items:
        yield from _open_questions(value, (*path, str(key)))


def _key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line numbers (from 1) of tables and keys, by path; an array of tables has the index in its path.

    tomllib tells no lines. Only what a manifest holds is understood: headers and ``key = value`` on lines of
    their own; anything else has no line here, which an error message then lacks.
    """
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*(\[\[?)([^\]]+)\]", line):
            table = _dotted(header[2])
            if header[1] == "[[":
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
            elif table[:1] in counts:
                table = (table[0], str(counts[table[:1]]), *table[1:])
            for length in range(1, len(table) + 1):
                lines.setdefault(table[:length], number)
        elif key := re.match(r"""\s*([A-Za-z0-9_-]+|"[^"]*"|'[^']*')\s*=""", line):
            lines.setdefault((*table, key[1].strip("\"'")), number)
    return lines


def _dotted(name: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""", name))
