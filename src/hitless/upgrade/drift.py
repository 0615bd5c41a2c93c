"""What a node is, against what its record says: which pins and links are no longer those that an upgrade left.

Names and shapes do not tell a map from another like it; the kernel's ids do, which stay while the object lives. So an
upgrade notes them in the record, and here they are compared. Each finding is a sentence with what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote

import msgspec

from hitless.errors import InterruptedUpgradeError, KernelError, NodeError
from hitless.hooks import HOOKS
from hitless.kernel.links import LinkInfo
from hitless.kernel.maps import Map, is_alive
from hitless.kernel.names import in_kernel
from hitless.kernel.programs import Program, ProgramInfo, is_loaded
from hitless.upgrade.model import Generation, Hook, NodeState, PinnedMap, PinnedProgram, Record, ReplacedProgram
from hitless.upgrade.node import PUBLIC, Node
from hitless.upgrade.places import Place, file_of, find_places, place_id
from hitless.upgrade.record import map_pin

__all__ = [
    "EITHER_WAY",
    "expected_program",
    "half_done",
    "hook_problem",
    "interrupted",
    "loaded_again",
    "missing",
    "other_pin",
    "other_release",
    "public_problems",
    "put_back",
    "recovering",
    "replaced_pins",
    "strangers",
    "target_id",
    "unhooked",
    "with_ids",
]

EITHER_WAY = "cgroup_skb"
"""The type of programs that run on links of one direction as on those of the other."""

_ALIVE = {"map": is_alive, "prog": is_loaded}
_WORDS = {"map": "map", "prog": "program"}


def with_ids(
    record: Record, maps: Mapping[str, Map], programs: Mapping[str, Program], before: Generation | None
) -> Record:
    """``record`` with the ids of what is pinned for it, and the programs that it replaces: those of ``before``.

    Earlier ones stay in the list while the kernel has them, but for those that run again.
    """
    replaced: tuple[ReplacedProgram, ...] = ()
    own = {held.info.id for held in programs.values()}
    if before is not None:
        old = before.record
        replaced = (
            *(entry for entry in old.replaced_programs if entry.id not in own and is_loaded(entry.id)),
            *(ReplacedProgram(info.id, name, old.generation, info.tag) for name, info in before.programs.items()),
        )
    return msgspec.structs.replace(
        record,
        pinned_maps={
            name: PinnedMap(held.info.id, held.info.max_entries, held.info.flags)
            for name, held in maps.items()
            if name in record.maps
        },
        pinned_programs={name: PinnedProgram(held.info.id, held.info.tag) for name, held in programs.items()},
        replaced_programs=replaced,
    )


def put_back(kind: str, number: int, path: Path) -> str:
    """The command that pins the ``map`` or ``prog`` with the kernel's id ``number`` at ``path``, whatever is there."""
    return f"rm -f {quote(str(path))} && bpftool {kind} pin id {number} {quote(str(path))}"


def missing(kind: str, path: Path, record: Record, number: int | None) -> str:
    """The ``map`` or ``prog`` that should be pinned at ``path`` is not; ``number`` is its id, if the record tells."""
    advice = f"pin it there again (bpftool {kind} pin)" if number is None else _advice(kind, number, path)
    what = f"the record of generation {record.generation} has it, so the pin was removed by hand"
    return f"{path} is missing: {what}; {advice}"


def other_pin(kind: str, path: Path, found: int, number: int) -> str:
    """At ``path`` is ``found``, and the record has ``number``."""
    word = _WORDS[kind]
    return (
        f"{path} is {word} {found}, and the record has {word} {number}: somebody pinned another one there; "
        f"{_advice(kind, number, path)}"
    )


def _advice(kind: str, number: int, path: Path) -> str:
    if _ALIVE[kind](number):
        return f"the right one still lives, so put it back: {put_back(kind, number, path)}"
    lost = ", with all it held" if kind == "map" else ""
    return f"{_WORDS[kind]} {number} is gone{lost}: hitless unload, then apply a release"


def replaced_pins(directory: Path, generation: Generation) -> Iterator[str]:
    """Pins of ``generation`` that are another map or program than its record says."""
    for name, noted in generation.record.pinned_maps.items():
        if name in generation.maps and generation.maps[name].info.id != noted.id:
            yield other_pin("map", map_pin(directory, name), generation.maps[name].info.id, noted.id)
    for name, known in generation.record.pinned_programs.items():
        if name in generation.programs and generation.programs[name].id != known.id:
            yield other_pin("prog", directory / "progs" / name, generation.programs[name].id, known.id)


def strangers(directory: Path, record: Record) -> Iterator[Path]:
    """What is pinned among the maps, variables and programs of a generation, and is not in its record."""
    programs = {program.name for item in record.objects for program in item.programs}
    expected = {map_pin(directory, name) for name in record.maps}
    expected |= {directory / "progs" / name for name in programs}
    for room in ("maps", "data", "progs"):
        if (directory / room).is_dir():
            yield from sorted(set((directory / room).iterdir()) - expected)


def expected_program(hook: Hook, record: Record, pinned: Mapping[str, int], link: LinkInfo | None) -> int | None:
    """Id of the program that should run on ``hook``: what the record says, else what is ``pinned`` (ids by name).

    Of struct_ops it is the map's. An adopted daemon's own loader may have loaded its programs once more, and put one
    of them on its ``link``.
    """
    if hook.hook == "struct_ops":
        return record.pinned_maps[hook.program].id
    noted = record.pinned_programs.get(hook.program)
    if noted is None:
        return pinned.get(hook.program)
    if record.public is not None and link is not None and link.program_id not in (0, noted.id):
        with suppress(KernelError), Program.by_id(link.program_id) as program:
            if program.info.tag in loaded_again(hook, record):
                return link.program_id
    return noted.id


def loaded_again(hook: Hook, record: Record) -> set[str]:
    """The tags that a program may have which the daemon's own loader put on the hook: the record's, as a rule.

    Kmesh's puts its program for outgoing packets on the link of incoming ones as well, at any restart.
    """
    alike = {name for name, spec in record.programs.items() if spec.type == EITHER_WAY} | {hook.program}
    names = alike if record.programs[hook.program].type == EITHER_WAY else {hook.program}
    return {one.tag for name, one in record.pinned_programs.items() if name in names}


def other_release(hook: Hook, record: Record, runs: ProgramInfo) -> str:
    """On the link of ``hook``, which the daemon's own loader may update, is a program that ``record`` does not have."""
    noted = record.pinned_programs[hook.program]
    return (
        f"link {hook.link} runs program {runs.id} ({runs.name}, tag {runs.tag}), and {record.version} has another "
        f"there (tag {noted.tag}): the daemon's own loader has put another release there; let it start "
        f"{record.version} again, or unload hitless, which takes all hooks off, let it start anew, and adopt that"
    )


def target_id(hook: Hook, links: Path) -> int | None:
    """The number of the hook's target, None if it is not there. Of a map it is that of the running release."""
    with suppress(NodeError, OSError):
        if HOOKS[hook.hook].on == "map":
            with Map.open(map_pin(links.parent / "current", hook.target)) as held:
                return int(held.info.id)
        return place_id(hook.hook, hook.target, hook.netns)
    return None


def hook_problem(
    hook: Hook, link: LinkInfo | None, expected: int | None, links: Path, record: Record
) -> str | None:
    """What is wrong with the ``link`` of ``hook`` (None: it is not pinned), whose program should be ``expected``."""
    name = hook.link
    if hook.matched and (link is None or link.is_dead) and target_id(hook, links) is None:
        return None  # what the pattern led to is gone, as it may be
    again = f"remove the pin (rm {quote(str(links / name))}) and apply the same release again"
    if link is None:
        return f"link {name} is gone: its hook runs nothing of ours; apply the same release again"
    target = target_id(hook, links)
    if link.is_dead:
        if target is not None:
            why = f"somebody detached it, or {hook.target} was removed and made again; apply the same release again"
            return f"link {name} is detached: {why}"
        return f"link {name} is detached: {hook.target} was removed; make it again and apply the same release again"
    if link.attach_type != hook.attach_type:
        found = link.attach_type or link.type
        return f"link {name} is on {found}, not on {hook.attach_type}: somebody pinned another link there; {again}"
    if hook.hook == "cgroup" and not Path(hook.target).exists() and Path(hook.target).parent.is_dir():
        # The kernel keeps a removed cgroup, and the link on it, while sockets of its processes are open.
        return f"link {name} is on {link.where}, and {hook.target} was removed: make it again, {again}"
    if link.file and file_of(hook.hook, hook.target) not in (None, link.file):
        return (
            f"link {name} is in the file that was at {hook.target.rsplit(':', 1)[0]} before another took its place, as "
            "a package does: processes that start now are not probed; give the hook another link name in the next "
            "release, which attaches it to the new file and takes it out of the old one"
        )
    if target is not None and link.target_id != target:
        there = msgspec.structs.replace(link, target_id=target).where
        return (
            f"link {name} is attached to {link.where}, not to {hook.target} ({there}): somebody pinned another link "
            f"there; {again}"
        )
    if expected is not None and link.program_id != expected and not HOOKS[hook.hook].linked:
        return (
            f"link {name} is no longer there: {hook.target}{f' in {hook.netns}' if hook.netns else ''} runs program "
            f"{link.program_id} instead of {hook.program} (program {expected}): another tool attached it; let that "
            "take it off, then apply the same release again"
        )
    if expected is not None and link.program_id != expected and (link.type, link.id) == ("sockmap", 0):
        return (
            f"hook {name}: map {hook.target} has program {link.program_id} instead of {hook.program} (program "
            f"{expected}), as after a start of the loader that it was adopted from: sockets that are added from now on "
            "run that, those of before run ours; apply the same release again, which takes the place again"
        )
    if expected is not None and link.program_id != expected:
        if record.public is not None and hook.program in record.pinned_programs:
            with Program.by_id(link.program_id) as program:
                return other_release(hook, record, program.info)
        return (
            f"link {name} runs program {link.program_id}, not {hook.program} (program {expected}): someone else "
            "changed it; apply the same release again to put it right"
        )
    return None


def unhooked(record: Record, links: Mapping[str, LinkInfo]) -> Iterator[str]:
    """What the patterns of the release match by now and no link of it is on."""
    known = {hook.link for hook in record.hooks}
    patterns = (entry for entry in record.attach if entry.is_pattern)
    for place in find_places(patterns, record.programs):
        link = links.get(place.link)
        if place.link in known or (link is not None and link.target_id == place.id):
            continue
        if place.entry.only:
            yield from _of_other_releases(place, record)
        else:
            yield (
                f"{place} came since: hook {place.entry.link} means it, and nothing of this release runs there; apply "
                "the same release again"
            )


def _of_other_releases(place: Place, record: Record) -> Iterator[str]:
    """What the daemon's own loader has put there, if that is not what the release has."""
    noted = record.pinned_programs.get(place.entry.program)
    if noted is None:
        return
    for one in place.occupants:
        if one.name.encode() != in_kernel(place.entry.program):
            continue
        with suppress(KernelError), Program.by_id(one.program_id) as program:  # gone meanwhile: no problem
            if program.info.tag != noted.tag:
                yield (
                    f"{place} came since, and has program {one.program_id} ({one.name}) of another release than "
                    f"{record.version}, with that one's maps: a loader of that release still runs; stop it, then apply "
                    "the same release again, which takes its place"
                )


def public_problems(node: Node) -> Iterator[str]:
    """The paths that other programs open, where they do not lead into the running generation."""
    for name in PUBLIC:
        path, wanted = node.root / name, f"current/{name}"
        found = os.readlink(path) if path.is_symlink() else None  # noqa: PTH115 - what is written, not what it means
        if found != wanted:
            there = path.exists() and found is None
            what = "is no symbolic link" if there else "is missing" if found is None else f"leads to {found}"
            first = "look at what is in it, remove it, then " if there else ""
            yield (
                f"{path} {what}, so who opens maps or programs by it does not get those of the running release; "
                f"{first}put it right: ln -sfn {wanted} {quote(str(path))}"
            )


def half_done(node: Node, state: NodeState) -> str | None:
    """What of an upgrade was seen begun and not ended, in words; None if there is none."""
    if state.current is not None and state.current.record.phase != "committed":
        return f"the upgrade to {state.version} is done but not cleaned up"
    if state.unfinished is not None and state.recovery == "put-back":
        return f"a rollback to {state.unfinished.version} was interrupted before its cutover"
    if state.unfinished is not None:
        return f"an upgrade to {state.unfinished.version} was interrupted in phase {state.unfinished.phase}"
    return f"{node.next} is the rest of an interrupted upgrade" if state.litter else None


def recovering(node: Node) -> str:
    """What to do about an upgrade that was interrupted."""
    return f"hitless recover --root {quote(str(node.root))} finishes or undoes it (the next apply does so too, first)"


def interrupted(node: Node, version: str | None, committed: bool) -> InterruptedUpgradeError:
    """The error for an upgrade to ``version`` that was killed, ``committed`` or before that."""
    what = f"to {version} " if version else ""
    when = "after its commit" if committed else "before its commit"
    return InterruptedUpgradeError(
        f"{node.root}: an upgrade {what}was interrupted {when}, so what is there is between two releases: "
        f"{recovering(node)}",
        path=str(node.root),
    )
