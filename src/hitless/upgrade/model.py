"""The values that an upgrade is made of: what was seen, what is planned, what is recorded, what came of it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from hitless.attach import Attach
from hitless.bundle import CutoverRule
from hitless.hooks import NetfilterPoint
from hitless.kernel.links import LinkInfo
from hitless.kernel.maps import MapInfo
from hitless.kernel.programs import ProgramInfo
from hitless.layout.diff import Change
from hitless.layout.model import MapSpec, ObjectSpec, ProgramSpec
from hitless.layout.rules import MapRules
from hitless.public import Public
from hitless.upgrade.phases import Recovery, recovery

__all__ = [
    "SCHEMA",
    "Cutover",
    "Fingerprint",
    "Former",
    "Generation",
    "Hook",
    "HookPlan",
    "LeftRing",
    "LinkFacts",
    "LiveMap",
    "MapFacts",
    "MapPlan",
    "MapResult",
    "NodeState",
    "PathPlan",
    "PinnedMap",
    "PinnedProgram",
    "Plan",
    "Progress",
    "Record",
    "ReplacedMap",
    "ReplacedProgram",
    "Result",
]

SCHEMA = 1
"""Version of the record's format; a hitless that knows less refuses to touch what is newer."""


class MapPlan(msgspec.Struct, frozen=True):
    """What becomes of one map.

    ``action``: ``keep`` (the same map), ``convert`` (a new map, filled from the old), ``create`` (new and empty),
    ``drop`` (the release has it no more), ``discard`` (a new empty map takes its place). ``method`` is how
    entries travel, ``exactness`` what is promised of them meanwhile. ``loss`` names each thing that is lost;
    ``allowed`` tells whether all of it may be. ``kind`` names the carrier of a map that is converted, ``converter`` the
    user's function for it. ``sources`` are the old maps that are folded into it. ``notes`` say, on the way back, what
    becomes of fields, variables and maps of which the running release knows nothing.
    """

    name: str
    action: str
    was: str | None = None
    verdict: str = "identical"
    method: str = "none"
    exactness: str = "exact"
    loss: tuple[str, ...] = ()
    allowed: bool = True
    changes: tuple[Change, ...] = ()
    kind: str = ""
    converter: str | None = None
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def olds(self) -> tuple[str, ...]:
        """The running release's names of the maps that it comes from, if it comes from any."""
        return self.sources or (self.was or self.name,)


class HookPlan(msgspec.Struct, frozen=True):
    """What becomes of one hook: ``keep``, ``update`` in place, ``attach``, ``adopt`` or ``detach``.

    To adopt is to update what another tool attached. ``expected`` is the kernel's id of the program that must be
    running there for the update to happen; ``adopted`` is its name if hitless did not attach it. ``target_id`` is the
    number of the target, as in LinkInfo, and ``netns`` the network namespace of an interface. ``matched`` says that a
    pattern led to it, so that it may go at any time. ``method`` is how the program of a live hook is exchanged, in
    words, and ``point`` where one of netfilter runs. ``clashes`` are links of others of that point and priority, which
    keep this one out if they are in the same network namespace: the kernel does not tell in which. ``priority`` and
    ``handle`` are those of a tc filter; 0 is one that is free when it is attached. ``moved`` is the running release's
    name of the map of sockets that it is on, if that becomes another: see :mod:`hitless.upgrade.moving`. ``unlinked``
    says that no link is to hold it, where one could, and ``handed`` that the sockets that run another program than its
    dispatcher are handed over to that: see :mod:`hitless.upgrade.socket_hooks`. ``instead_of`` is the hook that the
    manifest names, if this kernel has none like it.
    """

    link: str
    action: str
    program: str
    hook: str
    target: str
    attach_type: str
    was: str | None = None
    expected: int | None = None
    netns: str | None = None
    mode: str | None = None
    target_id: int = 0
    matched: bool = False
    method: str = ""
    point: NetfilterPoint | None = None
    priority: int = 0
    handle: int = 0
    adopted: str | None = None
    moved: str | None = None
    clashes: tuple[int, ...] = ()
    unlinked: bool = False
    handed: bool = False
    instead_of: str | None = None


class PathPlan(msgspec.Struct, frozen=True):
    """A path of a daemon's own loader that is added or removed (``action``): see :mod:`hitless.public`."""

    path: str
    action: str


class MapFacts(msgspec.Struct, frozen=True):
    """What a plan relies on of a live map. ``layout`` stands for its key, value and inner maps; see LiveMap."""

    id: int
    type: str
    max_entries: int
    flags: int
    layout: str
    filled: tuple[int, ...] = ()


class LinkFacts(msgspec.Struct, frozen=True):
    """What a plan relies on of a link: where it is attached, and the program that it runs."""

    id: int
    program_id: int
    target_id: int
    attach_type: str


class Fingerprint(msgspec.Struct, frozen=True):
    """The node that a plan was made for, as the facts that the plan rests on: what differs later can be named.

    ``boot`` is the kernel's id of this run of the machine, ``kernel`` its release, ``features`` what the plan asked
    of it. ``digest`` is the running release's. ``targets`` has the number of what each link is for, ``programs`` the
    ids of the pinned ones, ``rings`` the names of ring buffers of the last generation that hold bytes and that no
    process has open. How many entries maps have is no part of it: that changes all the time.
    """

    boot: str = ""
    kernel: str = ""
    generation: int | None = None
    version: str | None = None
    digest: str | None = None
    maps: Mapping[str, MapFacts] = {}
    programs: Mapping[str, int] = {}
    links: Mapping[str, LinkFacts] = {}
    targets: Mapping[str, int] = {}
    features: Mapping[str, bool] = {}
    rings: tuple[str, ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """What ``apply`` or ``rollback`` would do on one node.

    ``start_type`` is ``normal``, ``restart``, ``update`` or ``rollback``. ``digest`` is the bundle's. ``fingerprint``
    is of the node; None in a plan of a rollback, or of a hitless that took none. ``cutover`` says how hooks go over,
    ``paths`` which of the paths of an adopted daemon's own loader come and go. ``left_out`` are programs that this
    kernel refuses, and that the release can do without. ``barrier`` is how running programs are waited for, if
    not by membarrier(2).
    """

    root: str
    name: str
    start_type: str
    from_version: str | None = msgspec.field(name="from")
    to_version: str = msgspec.field(name="to")
    digest: str = ""
    generation: int = 1
    maps: tuple[MapPlan, ...] = ()
    hooks: tuple[HookPlan, ...] = ()
    fingerprint: Fingerprint | None = None
    cutover: CutoverRule = CutoverRule()
    paths: tuple[PathPlan, ...] = ()
    left_out: tuple[str, ...] = ()
    barrier: str | None = None
    schema: int = 1

    @property
    def blocked(self) -> tuple[MapPlan, ...]:
        """The maps that would lose something nobody allowed to be lost; ``apply`` refuses while there are any."""
        return tuple(entry for entry in self.maps if entry.loss and not entry.allowed)

    @property
    def changes_anything(self) -> bool:
        """Whether ``apply`` would do anything at all."""
        if self.start_type != "restart":
            return True
        return any(hook.action != "keep" for hook in self.hooks)


class Hook(msgspec.Struct, frozen=True):
    """A hook of a generation: the link's pin name, and the program that it runs. The rest is as in HookPlan."""

    link: str
    program: str
    hook: str
    target: str
    attach_type: str
    netns: str | None = None
    mode: str | None = None
    matched: bool = False


class ReplacedMap(msgspec.Struct, frozen=True):
    """A map of an earlier generation, whose place another has taken; its last ``generation`` is told by number."""

    id: int
    name: str
    generation: int


class ReplacedProgram(msgspec.Struct, frozen=True):
    """A program of an earlier generation; its last ``generation`` is told by number, ``tag`` is the kernel's."""

    id: int
    name: str
    generation: int
    tag: str


class PinnedMap(msgspec.Struct, frozen=True):
    """What the kernel said of a map when it was pinned, and no object tells: its id stays while the map lives."""

    id: int
    max_entries: int
    flags: int


class PinnedProgram(msgspec.Struct, frozen=True):
    """What the kernel said of a program when it was pinned; ``tag`` is its hash of the instructions, in hex."""

    id: int
    tag: str


class Former(msgspec.Struct, frozen=True):
    """What a rollback changed in the record of ``previous/``: enough to make it again what it was."""

    generation: int
    rules: dict[str, MapRules] = {}
    converters: dict[str, str] = {}
    replaced: tuple[ReplacedMap, ...] = ()
    replaced_programs: tuple[ReplacedProgram, ...] = ()
    hooks: tuple[Hook, ...] = ()


class Record(msgspec.Struct, frozen=True):
    """What a generation is. ``generation`` counts up from 1; ``digest`` is the bundle's.

    ``objects`` is the release's MapSpec snapshot; ``maps`` holds the spec of each pinned map by pin name, as the
    release defines it. ``rules`` are those by which the generation before became this one, and ``converters`` the
    sources of the modules that they name: so the upgrade can be finished without the bundle, and the way back is known.
    ``own_rules`` are those of the release's manifest, which are other ones after a rollback. ``plan`` is set while the
    upgrade to this generation runs, and ``former`` if that goes back to ``previous/``, which it was.
    ``replaced`` are the maps of earlier generations that something may still hold, ``replaced_programs`` their
    programs. ``attach`` are the hooks as the manifest has them, patterns and all. ``unwritten`` are the maps that no
    program of the release writes, as the verifier has shown.
    ``public`` tells where a daemon that does not know hitless looks for its pins, None if there is none.
    ``pinned_maps`` and ``pinned_programs`` tell what is pinned by its kernel's id, by name; empty in a record of a
    hitless that did not note them.
    """

    generation: int
    name: str
    version: str
    digest: str
    phase: str
    objects: tuple[ObjectSpec, ...]
    maps: dict[str, MapSpec]
    hooks: tuple[Hook, ...]
    attach: tuple[Attach, ...] = ()
    cutover: CutoverRule = CutoverRule()
    plan: Plan | None = None
    rules: dict[str, MapRules] = {}
    replaced: tuple[ReplacedMap, ...] = ()
    converters: dict[str, str] = {}
    unwritten: tuple[str, ...] = ()
    pinned_maps: dict[str, PinnedMap] = {}
    pinned_programs: dict[str, PinnedProgram] = {}
    replaced_programs: tuple[ReplacedProgram, ...] = ()
    own_rules: dict[str, MapRules] = {}
    former: Former | None = None
    public: Public | None = None
    schema: int = SCHEMA

    @property
    def may_sleep(self) -> bool:
        """Whether one of the programs may sleep, so that it may run on for long."""
        return any(program.may_sleep for item in self.objects for program in item.programs)

    @property
    def programs(self) -> dict[str, ProgramSpec]:
        """What hooks of the release can run, by name."""
        return {program.name: program for item in self.objects for program in item.hookable}


class LiveMap(msgspec.Struct, frozen=True):
    """A pinned map: the kernel's facts, and its layouts from ``source``.

    ``kernel`` when the map itself carries BTF, ``record`` when only the release's record knows, ``none``.
    ``filled`` are the slots of a program array that hold a program.
    """

    info: MapInfo
    spec: MapSpec
    source: str
    filled: tuple[int, ...] = ()


class Generation(msgspec.Struct, frozen=True):
    """One generation as it is pinned. ``of_ops`` are the ids of maps that programs of struct_ops use, its own
    and those of earlier generations that the kernel still has.
    """

    record: Record
    maps: dict[str, LiveMap]
    programs: dict[str, ProgramInfo]
    of_ops: frozenset[int] = frozenset()


class LeftRing(msgspec.Struct, frozen=True):
    """A ring buffer of the last generation that holds ``unread`` bytes; ``holders`` are processes that have it open."""

    name: str
    unread: int
    holders: tuple[int, ...]


class NodeState(msgspec.Struct, frozen=True):
    """What was seen under a pin root at one time.

    ``unfinished`` is the record of an upgrade that began and did not end; ``litter`` is true when ``next/`` is
    there without a readable beginning of one. ``left`` are ring buffers of the last generation that are not empty.
    """

    root: str
    current: Generation | None
    links: dict[str, LinkInfo]
    unfinished: Record | None = None
    litter: bool = False
    previous: str | None = None
    left: tuple[LeftRing, ...] = ()

    @property
    def recovery(self) -> Recovery:
        """What recovery would do now, if nobody upgrades: see :mod:`hitless.upgrade.phases`."""
        phase = self.current.record.phase if self.current is not None else None
        there = self.litter or self.unfinished is not None
        if self.unfinished is None:
            return recovery(phase, there, None, returning=False)
        return recovery(phase, there, self.unfinished.phase, self.unfinished.former is not None)

    @property
    def abandoned(self) -> bool:
        """Whether ``next/`` is the rest of an upgrade that had switched no hook."""
        return self.recovery in ("remove", "put-back")

    @property
    def version(self) -> str | None:
        """Version of the running release, None if nothing of ours runs."""
        return self.current.record.version if self.current else None

    @property
    def generation(self) -> int | None:
        """Number of the running generation, None if nothing of ours runs."""
        return self.current.record.generation if self.current else None


class Progress(msgspec.Struct, frozen=True):
    """Something that is going on: the ``step``, and for the copy the map with the entries ``done`` so far.

    In the step ``connections``, ``done`` is how many of them are left with the old release.

    ``rate`` is in entries per second since the copy of this map began; ``round`` counts the passes over what differed
    after it, and ``differing`` is about how many entries did so at last.
    """

    step: str
    map: str | None = None
    done: int = 0
    rate: float = 0.0
    round: int = 0
    differing: int = 0


class MapResult(MapPlan, frozen=True):
    """What became of one map. ``entries`` were in the old map, ``copied`` by the first pass, ``caught_up`` merged
    in ``rounds`` later ones; ``lost`` counts conversions of values that did not fit the new layout, ``lost_fields``
    by path. ``unread`` are the bytes that the readers of an old ring buffer had not taken when apply was done.
    """

    entries: int = 0
    copied: int = 0
    rounds: int = 0
    caught_up: int = 0
    lost: int = 0
    lost_fields: Mapping[str, int] = {}
    unread: int = 0
    seconds: float = 0.0


class Cutover(msgspec.Struct, frozen=True):
    """The switch of ``hooks`` hooks: microseconds from first to last, and from the first until the catch-up ended.

    ``moved`` connections were still open when they were not waited for any longer; None if none was waited for.
    """

    hooks: int = 0
    first_to_last_us: float = 0.0
    stale_window_us: float = 0.0
    moved: int | None = None


class Result(msgspec.Struct, frozen=True):
    """What an apply did; the plan's facts and what came of them. ``steps`` are seconds by step."""

    root: str
    name: str
    start_type: str
    from_version: str | None = msgspec.field(name="from")
    to_version: str = msgspec.field(name="to")
    generation: int = 1
    maps: tuple[MapResult, ...] = ()
    hooks: tuple[HookPlan, ...] = ()
    cutover: Cutover = Cutover()
    steps: Mapping[str, float] = {}
    recovered: str | None = None
    left_out: tuple[str, ...] = ()
    committed: bool = True
    schema: int = 1
