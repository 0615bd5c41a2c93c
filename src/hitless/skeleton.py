"""A manifest for objects that have none: what their files tell, and a question wherever they do not.

What is not known is asked for by ``"..."``, which no command takes for an answer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from hitless.attach import ONE_MAP_ITERATORS
from hitless.bundle import MANIFEST, OPEN, Bundle, object_name, unite_maps
from hitless.compare import compare_sources
from hitless.errors import BundleError
from hitless.headers import compile_header
from hitless.hooks import HOOKS, REFUSED
from hitless.known import Known, KnownHook, together
from hitless.layout.diff import is_constant
from hitless.layout.dwarf import Dwarf
from hitless.layout.elf import BYTES, Types, needs_types, read_btf, read_object
from hitless.layout.infer import fits
from hitless.layout.model import MapSpec, ObjectSpec, ProgramSpec
from hitless.layout.rules import MapRules
from hitless.layout.sections import SECTIONS, program_type
from hitless.profiles import profile
from hitless.sources import Source, read_source

__all__ = ["Question", "Skeleton", "draw_up", "start_bundle"]

_TYPES = "types.bpf.o"
_FEW = 6  # types of one size that a comment can name
_NOTHING = Known()
_UNFIT = re.compile(r"[^A-Za-z0-9_-]")  # for the name of an object
_SIDES: tuple[Literal["key", "value"], ...] = ("key", "value")
_SOCKET_MAPS = ("sockmap", "sockhash")
_VAGUE = {
    "cgroup/skb": ("cgroup_skb/ingress", "cgroup_skb/egress"),
    "sk_skb": ("sk_skb/stream_parser", "sk_skb/stream_verdict", "sk_skb/verdict"),
}
_REFUSED_SECTIONS = {"ksyscall": "kprobe", "kretsyscall": "kretprobe", "lsm_cgroup": "lsm"}


class Question(msgspec.Struct, frozen=True):
    """What a person has to answer at ``line`` of the manifest. ``candidates`` are answers that could be right.

    ``optional``: the line may be deleted instead.
    """

    line: int
    key: str
    asks: str
    candidates: tuple[str, ...] = ()
    optional: bool = False


class Skeleton(msgspec.Struct, frozen=True):
    """A manifest's ``text``, what is open in it, renames that are suggested (new name: old name), and losses by map."""

    text: str
    questions: tuple[Question, ...]
    renames: Mapping[str, str] = {}
    losses: Mapping[str, tuple[str, ...]] = {}


def start_bundle(
    objects: Sequence[Path],
    directory: Path | None = None,
    old: Sequence[str] = (),
    header: Path | None = None,
    daemon: str | None = None,
    mode: str | None = None,
    root: Path | None = None,
) -> tuple[Path, Skeleton]:
    """Write a manifest, and copies of the objects where they are not beside it; returns its path and what it says.

    Without ``directory`` it is where the objects are. ``old`` is the release before: a bundle, a snapshot or objects;
    ``header`` has types for maps that carry none. ``daemon`` is one of :data:`hitless.known.PROFILES`, and ``mode``
    one of its modes, the objects' if None: what is known of it fills the manifest. So does what is pinned below
    ``root``, by whatever loader; it is only looked at. Raises BundleError, LayoutError, UnsupportedError, and for
    ``root`` NodeError, KernelError; nothing is written then.
    """
    if directory is None:
        places = {path.resolve().parent for path in objects}
        if len(places) > 1:
            raise BundleError("the objects are not in one directory: say by -o DIR where the bundle is to be")
        directory = places.pop()
    manifest = directory / MANIFEST
    if manifest.exists():
        raise BundleError(f"{manifest} is there already: move it away, or name another directory by -o")
    files: dict[str, bytes] = {}
    for path in objects:
        if path.name in files:
            raise BundleError(f"two objects are called {path.name}: rename one", file=str(path))
        try:
            files[path.name] = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}; was it compiled?", file=str(path)) from None
    types = compile_header(header) if header is not None else b""
    if types and _TYPES in files:
        raise BundleError(f"an object is called {_TYPES}, as the one with the header's types will be: rename it")
    carried = Dwarf.parse(types, str(header)) if types else None
    sources = [read_source(what, carried) for what in old]
    bundles = [Bundle.load(source.path) for source in sources if source.kind == "bundle"]
    name = bundles[0].name if bundles else daemon or directory.resolve().name
    # A hook goes from one release to the next in place only where its link keeps its name.
    links = {entry.program: entry.link for bundle in bundles for entry in bundle.attach}
    known, before = Known(), _united(sources)
    if daemon is not None:
        specs = {file: read_object(data, object_name(file)) for file, data in files.items()}
        known = profile(specs, mode, before.maps if before is not None else ())
        files = {file: data for file, data in files.items() if file not in known.left_out}
    if root is not None:
        from hitless.upgrade.pinned import look_at  # a kernel is needed only for that

        known = together(known, look_at(root, [read_object(data, object_name(file)) for file, data in files.items()]))
    made = draw_up(files, name, before, carried, _TYPES if types else "", links, known)
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in (*files.items(), *([(_TYPES, types)] if types else [])):
        place = directory / name
        if not place.exists() or place.read_bytes() != data:
            _create(place, data)
    _create(manifest, made.text.encode())
    return manifest, made


def _create(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)
    except FileExistsError:
        raise BundleError(f"{path} is there already, and is another file: move it away", file=str(path)) from None


def _united(sources: Sequence[Source]) -> Source | None:
    """The release that several objects are together."""
    if len(sources) < 2:
        return sources[0] if sources else None
    objects = {name: spec for source in sources for name, spec in source.objects.items()}
    return Source(", ".join(source.path for source in sources), "object", unite_maps(objects.values()), objects)


class _Read(msgspec.Struct, frozen=True):
    file: str
    spec: ObjectSpec
    types: Types


class _Page:
    """Lines of a manifest, and the questions among them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.questions: list[Question] = []

    def say(self, *lines: str) -> None:
        self.lines += lines

    def take(self, head: str, other: _Page) -> None:
        """Add ``other`` below the line ``head``."""
        self.lines.append(head)
        before = len(self.lines)
        self.lines += other.lines
        self.questions += [msgspec.structs.replace(one, line=before + one.line) for one in other.questions]

    def ask(self, key: str, asks: str, candidates: Sequence[str] = (), optional: bool = False) -> None:
        self.lines.append(f'{key} = "{OPEN}"  # {asks}')
        self.questions.append(Question(len(self.lines), key, asks, tuple(candidates), optional))


def draw_up(
    files: Mapping[str, bytes],
    name: str,
    old: Source | None = None,
    types: Dwarf | None = None,
    beside: str = "",
    links: Mapping[str, str] = {},
    known: Known = _NOTHING,
) -> Skeleton:
    """A manifest for the objects ``files``, by the name of their file, of a bundle called ``name``.

    ``old`` is the release before, for renames and losses; ``types``, which are in the file ``beside``, are for maps
    that carry none; ``links`` are the names of links that programs have; ``known`` is more about these objects.
    Raises LayoutError and UnsupportedError as :func:`hitless.layout.elf.read_object`, BundleError if objects cannot
    be of one bundle.
    """
    read = [
        _Read(file, read_object(data, title, types=types), Types(read_btf(data, file), data, file, types))
        for file, data in files.items()
        for title in (known.objects.get(file) or _UNFIT.sub("_", object_name(file))[:64],)
    ]
    maps = unite_maps(item.spec for item in read)
    _refuse_twins(read)
    page = _Page()
    page.say(
        f'# Drawn up by hitless init. What it could not know is asked for by "{OPEN}": no command takes this file',
        "# before each of these lines has its answer. Look at the rest, too: hooks are guessed from section names.",
        "", "[bundle]", f"name = {_quoted(name)}",
    )  # fmt: skip
    page.ask("version", "what this release is called")
    if known.public:
        page.say("", "# Where the daemon's own loader looks: paths relative to its pin root, or absolute.", "[public]")
        page.say(*(f"{key} = {_quoted(value)}" for key, value in known.public.items()))
    page.say(*(f"# {note}" for note in known.notes))
    if beside:
        page.say("", "# Types for maps that carry none.", "[types]", f"file = {_quoted(beside)}")
    for item in read:
        page.say("", "[[object]]", f"file = {_quoted(item.file)}")
        if item.spec.name != object_name(item.file):
            page.say(f"name = {_quoted(item.spec.name)}")
        _types(page, item.spec, known)
    for file, why in known.left_out.items():
        page.say("", f"# left out: {file}: {why}")
    jumped = {program for spec in maps.values() for _slot, program in spec.slots}
    for item in read:
        for program in item.spec.hookable:
            if program.name in known.hooks and program.autoload:
                _known_hooks(page, program, known.hooks[program.name], links)
            else:
                _attach(page, program, maps, jumped, links, known)
    renames, losses = _former(read, maps, old, known.related)
    for map_name, spec in maps.items():
        # Objects share a map by its name, and any of them may have its types.
        own = [item for item in read if _declares(item, spec)]
        found = [item.types for item in (*own, *(item for item in read if item not in own))]
        _map(page, map_name, spec, found, renames.get(map_name), known)
    for map_name, texts in losses.items():
        page.say("", f"# {map_name} loses: " + "; ".join(texts))
        if map_name not in maps:
            page.say("# to accept that:", f"# [map.{_key(map_name)}]", '# on_loss = "discard"')
    return Skeleton("\n".join(page.lines) + "\n", tuple(page.questions), renames, losses)


def _refuse_twins(read: Sequence[_Read]) -> None:
    origin: dict[str, str] = {}
    for item in read:
        if item.spec.name in (other.spec.name for other in read if other is not item):
            raise BundleError(f"two objects are called {item.spec.name}: rename a file", object=item.spec.name)
        for program in item.spec.hookable:
            if program.name in origin:
                raise BundleError(
                    f"{origin[program.name]} and {item.file} both have a program called {program.name}, and programs "
                    "of one bundle have names of their own: rename one, or make two bundles",
                    program=program.name,
                )
            origin[program.name] = item.file


def _declares(item: _Read, spec: MapSpec) -> bool:
    return any(other.name == spec.name for other in item.spec.maps)


def _types(page: _Page, spec: ObjectSpec, known: Known) -> None:
    for program in spec.programs:
        section = program.section.removeprefix("?")
        if not program.autoload:
            page.say(f"# program {program.name}: section {program.section}: not loaded, but with skip = false")
        elif program.name in known.types:
            page.say(f"[object.program.{program.name}]", f"type = {_quoted(known.types[program.name])}")
        elif program.name in known.dispensable:
            page.say(f"[object.program.{program.name}]", f'skip = "refused"  # {known.dispensable[program.name]}')
        elif not program.type or section in _VAGUE:
            page.say(f"[object.program.{program.name}]")
            likely = _likely(section)
            asks = f"section {section} does not tell libbpf what it is"
            asks += f": {' or '.join(map(_quoted, likely))}?" if likely else ': "xdp", "tc", "cgroup/connect4"...'
            page.ask("type", f"{asks}; or skip = true in its place, and no [[attach]] for it", likely)


def _likely(section: str) -> tuple[str, ...]:
    """Sections that libbpf knows and whose name this one begins with, or is another spelling of."""
    if section in _VAGUE:
        return _VAGUE[section]
    parts = section.split("/")
    longer = ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    words = section.replace("_", "/").split("/")
    longer += ["/".join(words[:2]), words[0]]
    return tuple(dict.fromkeys(name for name in longer if name in SECTIONS))[:1]


def _known_hooks(page: _Page, program: ProgramSpec, hooks: Sequence[KnownHook], links: Mapping[str, str]) -> None:
    if not hooks:
        page.say("", f"# program {program.name} is attached nowhere: it is jumped to, or not in use.")
    link = links.get(program.name, program.name[:64])
    for number, entry in enumerate(hooks, 1):
        page.say("", *([f"# {entry.note}"] if entry.note else []), "[[attach]]", f"program = {_quoted(program.name)}")
        for key in dict.fromkeys(("hook", "target", *entry.keys, *entry.asks)):
            if key in entry.asks:
                page.ask(key, entry.asks[key], entry.answers.get(key, ()))
            else:
                page.say(f"{key} = {json.dumps(entry.keys[key], ensure_ascii=False)}")
        page.say(f"link = {_quoted(link if number == 1 else f'{link[:60]}-{number}')}")


def _attach(
    page: _Page,
    program: ProgramSpec,
    maps: Mapping[str, MapSpec],
    jumped: set[str],
    links: Mapping[str, str],
    known: Known,
) -> None:
    section = program.section.removeprefix("?")
    kind, _, own = section.partition("/")
    kind = kind.removesuffix(".s").removesuffix(".multi")
    refused = next((word for word in (kind, _REFUSED_SECTIONS.get(kind, "")) if word in REFUSED), None)
    if not program.autoload:
        return
    if program.name in jumped:
        page.say("", f"# program {program.name} is jumped to: it is in a slot of a program array.")
        return
    if refused is not None:
        page.say("", f"# program {program.name}: hook {refused} is not supported: {REFUSED[refused]}.")
        return
    if kind == "iter" and own in ONE_MAP_ITERATORS:
        page.say("", f"# program {program.name}: iterators over one map ({section}) are not supported.")
        return
    hooks = _hooks(program, section)
    if known.types.get(program.name) == "tc":
        hooks = sorted(("tc-ingress", "tc-egress"), key=lambda hook: hook.removeprefix("tc-") not in section)
    if not hooks and program_type(section)[0]:
        page.say("", f"# program {program.name} (section {section}) is for no hook of hitless: it is only loaded.")
        return
    page.say("", "[[attach]]", f"program = {_quoted(program.name)}")
    if len(hooks) == 1 and program.name not in known.types:
        page.say(f"hook = {_quoted(hooks[0])}")
    else:
        choice = " or ".join(hooks) if hooks else "what its type is for"
        page.ask("hook", f"{choice}; or delete this [[attach]] if it is only jumped to", hooks)
    _target(page, program, hooks, own, maps)
    page.say(f"link = {_quoted(links.get(program.name, program.name[:64]))}")
    if hooks == ["netfilter"]:
        page.ask("family", '"ipv4" or "ipv6"', ("ipv4", "ipv6"))
        page.ask("point", '"prerouting", "input", "forward", "output" or "postrouting"', ("input",))
        page.ask("priority", "a number without quotes: lower ones run first")


def _hooks(program: ProgramSpec, section: str) -> list[str]:
    """The hooks whose programs these are, those that its section names before others that would take it, too."""
    kind, _, own = section.partition("/")
    kind = {"tp": "tracepoint", "raw_tp": "raw_tracepoint"}.get(kind, kind).removesuffix(".s")
    if not program.type or section in _VAGUE:
        likely = _likely(section)
        if not likely:
            return []
        kind, attach_type = program_type(likely[0])
        return _hooks(ProgramSpec(program.name, likely[0], kind, attach_type), likely[0])
    if program.type == "struct_ops":
        # Its programs run where the struct_ops map is attached that holds them.
        return ["struct_ops"] if HOOKS["struct_ops"].fits(program) else []
    if kind == "iter":
        return ["iter-cgroup"] if own == "cgroup" else ["iter"]
    if kind in HOOKS and HOOKS[kind].fits(program):
        return [kind]
    if program.type in ("kprobe", "tracing", "sched_cls"):
        direction = {"ingress": ["tcx-ingress"], "egress": ["tcx-egress"]}.get(own, ["tc-ingress", "tc-egress"])
        return direction if program.type == "sched_cls" and HOOKS[direction[0]].fits(program) else []
    fitting = [name for name, hook in HOOKS.items() if name != "xdp-netlink" and hook.fits(program)]
    return fitting if all(HOOKS[name].program in ("", program.type) for name in fitting) else []


def _target(page: _Page, program: ProgramSpec, hooks: Sequence[str], own: str, maps: Mapping[str, MapSpec]) -> None:
    on = {HOOKS[hook].on for hook in hooks}
    sockets = [name for name, spec in maps.items() if spec.type in _SOCKET_MAPS]
    if on == {"cgroup"}:
        page.say('target = "${cgroup}"')
    elif on == {"interface"}:
        page.say('target = "${interface}"')
    elif on == {"netns"}:
        page.say('target = "${netns}"')
    elif on == {"map"} and len(sockets) == 1:
        page.say(f"target = {_quoted(sockets[0])}")
    elif on == {"map"}:
        choice = " or ".join(sockets) or "there is none"
        page.ask("target", f"the sockmap or sockhash whose sockets it is for: {choice}", sockets)
    elif hooks == ["perf_event"]:
        page.ask("target", "an event and its period, as cpu-clock:1000000", ("cpu-clock:1000000",))
    elif hooks and hooks[0] in ("uprobe", "uretprobe"):
        if ":" in own:
            page.say(f"target = {_quoted(own if own.startswith('/') else '/' + own)}")
        else:
            page.ask("target", "a function of a file, as /usr/lib/libssl.so.3:SSL_do_handshake")
    elif on == {"kernel"} and own:
        page.say(f"target = {_quoted(own)}")
    else:
        page.ask("target", "where: a cgroup, an interface, a tracepoint, ...; ${NAME} is filled by --set NAME=VALUE")


def _map(
    page: _Page, name: str, spec: MapSpec, types: Sequence[Types], was: str | None, known: Known
) -> None:
    page.say("", f"# {name}: {spec.type}, {_layout(spec)}")
    blind = [side for side in _SIDES if needs_types(spec, side) and not (side == "key" and "array" in spec.type)]
    about = _Page()
    if was is not None:
        asks = f'the old release has no such map, and its "{was}" is gone: was it that? or delete this line'
        about.ask("was", asks, (was,), optional=True)
    for side in blind:
        _bind(about, name, side, spec.key_size if side == "key" else spec.value_size, types, known)
    if name in known.pins:
        about.say(f"pin = {_quoted(known.pins[name])}")
    if name in known.groups:
        about.say(f"group = {_quoted(known.groups[name])}")
    if name in known.scratch:
        about.say(f'on_loss = "discard"  # {known.scratch[name]}')
    if about.lines:
        page.take(f"[map.{_key(name)}]", about)
    slots, unknown = known.slots.get(name, {}), known.open_slots.get(name, ())
    if slots or unknown:
        page.say(f"[map.{_key(name)}.slots]", *(f"{slot} = {_quoted(program)}" for slot, program in slots.items()))
    if unknown:
        asks = f"which program is in which slot ({', '.join(unknown)}), a line for each; or delete it: they stay empty"
        page.ask("0", asks, unknown, optional=True)


def _bind(
    page: _Page, name: str, side: Literal["key", "value"], size: int, types: Sequence[Types], known: Known
) -> None:
    likely = (known.keys if side == "key" else known.values).get(name, ())
    if side == "value" and name in known.asked:
        page.ask(side, f"{known.asked[name]}; or delete this line, and no entry survives a change", likely, True)
        return
    sized = _of_size(types, size)
    fit = next((other for other in likely if other in sized or other == BYTES), None)
    if fit is not None:
        why = f"  # from {sized[fit]}, by its name and its {size} bytes" if fit in sized else ""
        page.say(f"{side} = {_quoted(fit)}{why}")
        return
    fitting = [other for other in sized if fits(name, side, other)]
    guess = fitting[0] if len(fitting) == 1 else None
    found = {guess: sized[guess]} if guess else sized
    names = ", ".join(f'"{other}" ({source})' for other, source in list(found.items())[:_FEW])
    more = f" and {len(found) - _FEW} more" if len(found) > _FEW else ""
    told = f"{names}{more}" if found else "and no type that is known has that; give a header by --types-from"
    if guess:
        told += ", which alone fits by size and name"
    if likely:
        told = f"{' or '.join(map(_quoted, likely))} would be it, which is not known here in that size; {told}"
    asks = (
        f"the type of its {side}, {size} bytes: {told}; {_quoted(BYTES)} if these are to be taken as they are; "
        "or delete this line, and no entry survives a change"
    )
    page.ask(side, asks, tuple(found)[:_FEW] or ((BYTES,) if likely else ()), optional=True)


def _layout(spec: MapSpec) -> str:
    """A map's two sides, and where that was read."""
    if spec.type == "struct_ops":
        return "the kernel lays it out"
    sides = []
    for side, made, size in (("key", spec.key, spec.key_size), ("value", spec.value, spec.value_size)):
        if size:
            told = f" ({made.name or 'no name'}, from BTF)" if made is not None else ""
            sides.append(f"{side} of {size} bytes{told}")
    return ", ".join(sides) or "without entries that hitless could read"


def _of_size(types: Sequence[Types], size: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in types:
        for name in sorted(one.names()):
            made = one.find(name)
            if name not in found and made is not None and made.size == size:
                found[name] = one.source(name)
    return found


def _former(
    read: Sequence[_Read], maps: Mapping[str, MapSpec], old: Source | None, related: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Maps that seem to be renamed, and what of the old release's would be lost if they are."""
    if old is None:
        return {}, {}
    new = Source("the new objects", "object", maps, {item.spec.name: item.spec for item in read})
    first = compare_sources(old, new)
    added = [item.name for item in first.maps if item.diff.verdict == "added" and not is_constant(maps[item.name])]
    gone = {item.name: item.old for item in first.maps if item.diff.verdict == "removed" and item.old is not None}
    renames: dict[str, str] = {}
    for name in added:
        fits = [other for other, spec in gone.items() if _alike(name, maps[name], other, spec)]
        if related.get(name) in gone:
            fits = [related[name]]
        if len(fits) == 1 and fits[0] not in renames.values():
            renames[name] = fits[0]
    rules = {name: MapRules(was=was) for name, was in renames.items()}
    judged = compare_sources(old, msgspec.structs.replace(new, rules=rules)).maps
    return renames, {item.name: item.losses for item in judged if item.losses}


def _alike(name: str, new: MapSpec, other: str, old: MapSpec) -> bool:
    """Whether one may have become the other: its type and the size of its key, and a word or the value's type."""
    if (new.type, new.key_size) != (old.type, old.key_size) or not new.key_size:
        return False
    shared = set(name.lower().split("_")) & set(other.lower().split("_"))
    named = new.value is not None and old.value is not None and new.value.name == old.value.name
    return bool(shared) or named


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _quoted(name)
