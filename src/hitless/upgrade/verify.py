"""Whether pins, maps, programs, links, variables and record of a node belong together, check by check, as a value.

Looks only. What maps hold is no part of it: the carriers compare that with its conversion before the cutover, as far as
it can be read, and afterwards nobody can, since programs write.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from hitless.carry import is_global
from hitless.errors import BusyError, HitlessError, NodeError, VerifyError
from hitless.kernel.bpffs import require_bpffs
from hitless.kernel.libbpf import PASSING
from hitless.kernel.links import LinkInfo
from hitless.kernel.maps import Map
from hitless.kernel.processes import who
from hitless.kernel.programs import Program
from hitless.layout.diff import diff_map
from hitless.layout.model import MapSpec
from hitless.upgrade.attached import open_attached
from hitless.upgrade.drift import (
    expected_program,
    hook_problem,
    interrupted,
    missing,
    other_pin,
    public_problems,
    put_back,
    strangers,
    target_id,
    unhooked,
)
from hitless.upgrade.model import PinnedMap, Record
from hitless.upgrade.node import PUBLIC, Node, foreign_error, generation_record
from hitless.upgrade.public import path_problems
from hitless.upgrade.record import map_pin, read_record

__all__ = ["Check", "Verification", "check_generation", "verify"]

_LOOKS = 20
_NO_IDS = (
    "the record names no ids of {}, as an older hitless wrote it: one replaced by another of the same shape is not "
    "told; the next upgrade notes them"
)


class Check(msgspec.Struct, frozen=True):
    """One thing that was checked, on ``looked_at`` objects: ``proves`` is what holds if there are no ``problems``.

    Problems are sentences, each with what to do; ``untold`` are sentences about what could not be seen.
    """

    name: str
    looked_at: int
    proves: str
    problems: tuple[str, ...] = ()
    untold: tuple[str, ...] = ()


class Verification(msgspec.Struct, frozen=True):
    """What verify found of the running generation; ``problems`` are those of all checks, none if all agree."""

    root: str
    name: str
    generation: int
    version: str
    checks: tuple[Check, ...]
    problems: tuple[str, ...]
    schema: int = 1


def verify(node: Node) -> Verification:
    """Check everything under ``node`` against its record, all of it, whatever is found first.

    Raises NodeError if nothing runs, or the record cannot be read, without which nothing can be checked; BusyError
    while another process upgrades, InterruptedUpgradeError after one was killed.
    """
    require_bpffs(node.root)
    node.refuse_untrusted()
    for _ in range(_LOOKS):
        found = node.at_rest(lambda: _look(node))
        unsettled = node.at_rest(lambda: _unsettled(node))
        if unsettled is None and found is not None and not found.problems:
            return found
        pid = node.holder()
        if pid is not None:
            raise BusyError(
                f"{node.root} is being upgraded by {who(pid)}, so what is there is about to change; "
                "verify again when it is done",
                path=str(node.root),
                pid=pid,
            )
        # With nobody there between two looks that agree, what was seen is so for good.
        if node.at_rest(lambda: (_unsettled(node), _look(node))) == (unsettled, found):
            if unsettled is not None:
                raise interrupted(node, *unsettled)
            if found is not None:
                return found
    raise BusyError(f"{node.root} changes too fast to be looked at; try again", path=str(node.root), pid=None)


def check_generation(directory: Path, record: Record) -> None:
    """What can be checked of a generation before it runs: its maps, variables and programs against ``record``.

    Raises VerifyError with the first problem; its fact ``problems`` has all.
    """
    maps, variables, pinned = _check_maps(directory, record)
    programs, _ = _check_programs(directory, record, pinned)
    problems = [*maps.problems, *variables.problems, *programs.problems]
    problems += [foreign_error(path).message for path in strangers(directory, record)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise VerifyError(
            f"generation {record.generation} is not what its record says: {problems[0]}{more}",
            path=str(directory),
            problems=problems,
        )


def _unsettled(node: Node) -> tuple[str | None, bool] | None:
    """Version of an upgrade that is not over, and whether it is committed; None if there is none."""
    if (node.current / "record").exists():
        record = read_record(node.current / "record")
        if record.phase != "committed":
            return record.version, True
    if not node.next.exists():
        return None
    with suppress(HitlessError):
        return read_record(node.next / "record").version, False
    return None, False


def _look(node: Node) -> Verification | None:
    """None where an upgrade has begun and nothing runs yet."""
    if not node.current.exists():
        state = node.observe()  # which names what else may be there
        if state.unfinished is not None or state.litter:
            return None
        raise NodeError(
            f"nothing of hitless runs under {node.root}: nothing was applied, it was unloaded, or its pins are gone "
            "with a restart of the machine, which no bpffs outlives; apply a release",
            path=str(node.root),
        )
    record = generation_record(node.current)
    maps, variables, pinned = _check_maps(node.current, record)
    programs, ids = _check_programs(node.current, record, pinned)
    checks = (
        Check("record", 1, "the record can be read, and is of a committed generation"),
        maps,
        variables,
        programs,
        _check_links(node, record, ids),
        Check("public paths", len(PUBLIC), "maps and progs lead into current/", tuple(public_problems(node))),
        *_check_adopted(node, record),
        _check_foreign(node, record),
    )
    return Verification(
        root=str(node.root),
        name=record.name,
        generation=record.generation,
        version=record.version,
        checks=checks,
        problems=tuple(problem for check in checks for problem in check.problems),
    )


def _check_maps(directory: Path, record: Record) -> tuple[Check, Check, frozenset[int]]:
    """The checks of maps and of variables, and the ids of all that are pinned."""
    problems: dict[bool, list[str]] = {False: [], True: []}
    ids = set()
    for name, declared in record.maps.items():
        path, noted = map_pin(directory, name), record.pinned_maps.get(name)
        try:
            with Map.open(path) as pinned:
                ids.add(pinned.info.id)
                if noted is not None and pinned.info.id != noted.id:
                    problems[is_global(name)].append(other_pin("map", path, pinned.info.id, noted.id))
                else:
                    problems[is_global(name)] += _map_problems(path, pinned, name, declared, noted)
        except HitlessError as error:
            _must_tell(error)
            problems[is_global(name)].append(
                _unopened(error, "map", path, record, noted.id if noted is not None else None)
            )
    sections = sum(map(is_global, record.maps))
    untold = (_NO_IDS.format("maps"),) if record.maps and not record.pinned_maps else ()
    ours = "" if untold else "the record's by id, and "
    return (
        Check(
            "maps", len(record.maps) - sections,
            f"each is pinned, {ours}of its type, sizes, flags, max_entries and layout",
            tuple(problems[False]), untold,
        ),
        Check("globals", sections, f"each section is pinned, {ours}of its size and layout", tuple(problems[True])),
        frozenset(ids),
    )  # fmt: skip


def _must_tell(error: HitlessError) -> None:
    """Raise ``error`` if it says nothing of what is pinned: then nobody may be told to remove that."""
    if error.facts.get("errno") in (*PASSING, errno.EPERM):
        raise error


def _unopened(error: HitlessError, kind: str, path: Path, record: Record, number: int | None) -> str:
    """What to say of a pin that cannot be opened as what it should be."""
    if not path.exists():
        return missing(kind, path, record, number)
    return error.message if number is None else f"{error.message}; put it back: {put_back(kind, number, path)}"


def _map_problems(path: Path, pinned: Map, name: str, declared: MapSpec, noted: PinnedMap | None) -> Iterator[str]:
    """How a map differs from the record, one sentence for all of it."""
    try:
        seen = pinned.spec(name)
        wrong = list(_differences(seen, msgspec.structs.replace(declared, name=name), noted))
    except HitlessError as error:
        _must_tell(error)
        wrong = [f"its types cannot be compared with the record's: {error.message}"]
    if wrong:
        yield (
            f"{path} is not the map of the record: {'; '.join(wrong)}; somebody pinned another one there: pin the "
            "right one again (bpftool map pin), or unload and apply a release"
        )


def _differences(seen: MapSpec, declared: MapSpec, noted: PinnedMap | None) -> Iterator[str]:
    if seen.type != declared.type:
        yield f"it is a {seen.type}, and that of the record a {declared.type}"
        return
    if is_global(declared.name):
        if seen.value_size != declared.value_size:
            yield f"it has {seen.value_size} bytes, and the record's {declared.value_size}"
            return
    else:
        for side in ("key", "value"):
            size, wanted = getattr(seen, f"{side}_size"), getattr(declared, f"{side}_size")
            if size != wanted and declared.ops is None:  # whose size the kernel decides
                yield f"its {side}s have {size} bytes, and those of the record {wanted}"
                return
    if noted is not None and seen.flags != noted.flags:
        yield f"its flags are {seen.flags:#x}, and were {noted.flags:#x} when it was pinned"
    # The kernel may round up what was declared, so without a note only fewer are wrong.
    least = noted.max_entries if noted is not None else declared.max_entries
    if seen.max_entries < least or (noted is not None and seen.max_entries != least):
        yield f"it has room for {seen.max_entries} entries, and the record's for {least}"
    # What the kernel tells of key and value; everything else as declared, so that only layouts can differ.
    live = msgspec.structs.replace(declared, key=seen.key or declared.key, value=seen.value or declared.value)
    changes = [f"{one.path}: {one.kind}" for one in diff_map(live, declared).changes if one.kind not in _NO_CHANGE]
    if changes:
        yield f"its layout is not the record's: {', '.join(changes)}"


# A type that nobody knows, or that was guessed, proves nothing either way.
_NO_CHANGE = ("unknown", "inferred")


def _check_programs(directory: Path, record: Record, maps: frozenset[int]) -> tuple[Check, dict[str, int]]:
    """The check of the programs, which may use ``maps`` only, and the ids of those that are pinned, by name."""
    specs = {program.name: program for item in record.objects for program in item.programs}
    noted = {name: program.id for name, program in record.pinned_programs.items()}
    known = maps | {one.id for one in record.pinned_maps.values()}  # a map whose own pin is wrong is told there
    room = directory / "progs"
    present = {path.name for path in room.iterdir() if path.name in specs} if room.is_dir() else set()
    names = sorted(present | set(noted) | {one.program for one in record.hooks if one.hook != "struct_ops"})
    problems, ids = [], {}
    for name in names:
        path, number = room / name, noted.get(name)
        try:
            with Program.open(path) as program:
                info, used = program.info, program.map_ids
        except HitlessError as error:
            _must_tell(error)
            problems.append(_unopened(error, "prog", path, record, number))
            continue
        ids[name] = info.id
        if number is not None and info.id != number:
            problems.append(other_pin("prog", path, info.id, number))
            continue
        spec = specs.get(name)
        if spec is not None and spec.type and spec.type != info.type:
            problems.append(
                f"{path} is a {info.type}, and the record has a {spec.type}: somebody pinned another program there; "
                "pin the right one again (bpftool prog pin), or unload and apply a release"
            )
        if number is not None and info.tag != record.pinned_programs[name].tag:
            problems.append(f"{path} has tag {info.tag}, and had {record.pinned_programs[name].tag} when it was pinned")
        for one in sorted(used - known):
            problems.append(
                f"program {name} uses map {one}{_called(one)}, which is not pinned under {directory}: nobody finds it "
                f"by a path, and an upgrade would lose what it holds; save that (bpftool map dump id {one}), then "
                "unload and apply a release"
            )
    untold = (_NO_IDS.format("programs"),) if names and not noted else ()
    proves = "each is the record's" + ("" if untold else " by id and tag") + ", and uses only maps that are pinned here"
    return Check("programs", len(names), proves, tuple(problems), untold), ids


def _called(map_id: int) -> str:
    with suppress(HitlessError), Map.by_id(map_id) as used:
        return f" ({used.info.name})" if used.info.name else ""
    return ""


def _check_links(node: Node, record: Record, programs: dict[str, int]) -> Check:
    problems, untold = [], []
    links: dict[str, LinkInfo] = {}
    for hook in record.hooks:
        path = node.links / hook.link
        link: LinkInfo | None = None
        if path.exists():
            try:
                with open_attached(node.links, hook.link) as opened:
                    link = links[hook.link] = opened.info
            except HitlessError as error:
                _must_tell(error)
                problems.append(f"{error.message}; remove it, and apply the same release again")
                continue
        problem = hook_problem(hook, link, expected_program(hook, record, programs, link), node.links, record)
        if problem is not None:
            problems.append(problem)
        elif target_id(hook, node.links) is None and not hook.matched:
            untold.append(f"link {hook.link} may be on {hook.target} or not: that cannot be looked at from here")
    problems += unhooked(record, links)
    known = {hook.link for hook in record.hooks}
    present = sorted(node.links.iterdir()) if node.links.is_dir() else []
    problems += [
        f"{path} is not in the record: another program pinned it; remove it, or choose another root (--root)"
        for path in present
        if path.name not in known
    ]
    proves = "each is pinned, attached to its target with its attach type, and runs its program"
    return Check("links", len(record.hooks), proves, tuple(problems), tuple(untold))


def _check_adopted(node: Node, record: Record) -> Iterator[Check]:
    if record.public is not None:
        count = len(record.public.places(record.maps, [hook.link for hook in record.hooks], record.pinned_programs))
        proves = "each path of the daemon's own loader leads to the map or link of the running release"
        yield Check("the daemon's paths", count, proves, tuple(path_problems(node, record)))


def _check_foreign(node: Node, record: Record) -> Check:
    public = {node.root / name for name in PUBLIC}  # which have a check of their own
    found = [*(path for path in node.foreign() if path not in public), *strangers(node.current, record)]
    problems = [foreign_error(path).message for path in found]
    if node.previous.exists():
        try:
            before = generation_record(node.previous)
            problems += [foreign_error(path).message for path in strangers(node.previous, before)]
        except HitlessError as error:
            problems.append(error.message)
    count = sum(1 for _ in node.root.rglob("*"))
    return Check("nothing foreign", count, "nothing is under the root that hitless did not put there", tuple(problems))
