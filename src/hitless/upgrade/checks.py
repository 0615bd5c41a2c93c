"""What must hold before an upgrade begins, and before its steps: else it stops, and the old release goes on."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from hitless.bundle import Bundle
from hitless.carry import is_global
from hitless.errors import KernelError, LossNotAllowedError, NodeError, UnsupportedError, VerifyError
from hitless.hooks import HOOKS
from hitless.kernel.cgroups import keeps_links_out
from hitless.kernel.dispatcher import attached_program, is_dispatcher
from hitless.kernel.links import all_links
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.kernel.queues import count_elements
from hitless.kernel.socket_programs import programs_of_sockets
from hitless.kernel.sockets import list_sockets
from hitless.kernel.struct_ops import congestion_controls
from hitless.layout.rules import MapRules
from hitless.upgrade.attached import open_attached, pin_of
from hitless.upgrade.drift import replaced_pins
from hitless.upgrade.model import Generation, HookPlan, MapPlan, NodeState, Plan
from hitless.upgrade.node import Node
from hitless.upgrade.record import map_pin

__all__ = [
    "refuse_exclusive",
    "refuse_frozen",
    "refuse_loss",
    "refuse_overfull",
    "refuse_replaced_pins",
    "refuse_sockets",
    "refuse_taken_names",
    "verify_hooks",
    "verify_pins",
    "with_clashes",
]


def refuse_replaced_pins(directory: Path, generation: Generation) -> None:
    """Raise NodeError if a pin of the generation is another map or program than its record says."""
    problems = list(replaced_pins(directory, generation))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise NodeError(f"{problems[0]}{more}; nothing was changed", path=str(directory), problems=problems)


def refuse_frozen(directory: Path, decided: Plan) -> None:
    """Raise NodeError if a map of the last generation, in ``directory``, is to get entries and takes none."""
    for entry in decided.maps:
        if entry.action != "convert" or is_global(entry.name):
            continue
        with Map.open(map_pin(directory, entry.name)) as held:
            if held.is_read_only:
                raise NodeError(
                    f"map {entry.name} of {decided.to_version} is frozen or read-only, so that the entries of now "
                    "cannot come back to it; nothing was changed: apply that release's bundle instead, which makes a "
                    "new map",
                    map=entry.name,
                )


def refuse_overfull(node: Node, state: NodeState, bundle: Bundle, decided: Plan) -> None:
    """A smaller map must have room for what is there now; one that evicts makes room by itself.

    Raises LossNotAllowedError.
    """
    for entry in decided.maps:
        if entry.action != "convert" or state.current is None or is_global(entry.name):
            continue
        room = bundle.maps[entry.name].max_entries
        if _may_be_fewer(entry, bundle.rules.get(entry.name, MapRules())):
            continue
        listed = entry.kind.startswith(("entries", "mirrored", "folded")) and "hash" in bundle.maps[entry.name].type
        most = sum(state.current.maps[old].info.max_entries for old in entry.olds)
        if room >= most or not (listed or entry.kind in ("queue", "sockets")):
            continue
        entries = 0
        for old in entry.olds:
            with Map.open(node.current / "maps" / old) as live:
                entries += _count(live, entry.kind)
        if entries > room and "lru" not in bundle.maps[entry.name].type:
            who = f"maps {' and '.join(entry.olds)} have" if entry.sources else f"map {entry.olds[0]} has"
            raise LossNotAllowedError(
                f"{who} {entries} entries, and release {bundle.version} has room for {room} "
                f"(max_entries of {entry.name}); nothing was changed: raise it, or delete entries first",
                maps=[entry.name],
                entries=entries,
                room=room,
            )


def _may_be_fewer(entry: MapPlan, rules: MapRules) -> bool:
    """Whether only the copy can tell how many entries there will be."""
    selected = entry.converter is not None and any(change.kind == "split" for change in entry.changes)
    return selected or (bool(entry.sources) and rules.on_collision not in (None, "error"))


def _count(live: Map, kind: str) -> int:
    if kind == "queue":
        return count_elements(live)
    if kind == "sockets":
        return len(list_sockets(live))
    return sum(len(keys) for keys, _ in live.batches())


def refuse_exclusive(decided: Plan) -> None:
    """Raise NodeError if a program of another tool keeps a link of the plan out of its cgroup (which the kernel tells
    as EPERM, and nothing more).
    """
    for hook in decided.hooks:
        if hook.action != "attach" or hook.hook != "cgroup":
            continue
        found = keeps_links_out(Path(hook.target), hook.attach_type)
        if found is not None:
            cgroup, programs = found
            here = cgroup == Path(hook.target)
            adopt = ", or let this release take it over (adopt = true)" if here else ""
            raise NodeError(
                f"link {hook.link}: cgroup {cgroup} has {hook.attach_type} program {programs[0]}, attached without a "
                f"link and not to be with others (BPF_F_ALLOW_MULTI), so that the kernel attaches nothing "
                f"{'beside' if here else 'below'} it; nothing was changed: let who attached it take it off{adopt}",
                link=hook.link,
                cgroup=str(cgroup),
                programs=programs,
            )


def refuse_taken_names(decided: Plan) -> None:
    """Raise NodeError if a struct_ops is to be attached under a name that the kernel has already (EEXIST)."""
    for hook in decided.hooks:
        if hook.action == "attach" and hook.hook == "struct_ops" and hook.target in congestion_controls():
            raise NodeError(
                f"link {hook.link}: the kernel has a congestion control {hook.target} already, by another link or "
                "tool; nothing was changed: let who registered it take it off (bpftool struct_ops list), name its "
                f"link as `was` if it is this bundle's, or give {hook.program} another name",
                link=hook.link,
                name=hook.target,
            )


def refuse_sockets(node: Node, state: NodeState, decided: Plan) -> None:
    """Raise NodeError if a hook of sockets would not reach those that are in its map: the kernel takes from none the
    program that it has. UnsupportedError if it would leave a board of dispatchers.
    """
    for hook in decided.hooks:
        if hook.action not in ("attach", "update") or HOOKS[hook.hook].on != "map":
            continue
        if hook.moved and (node.root / "board" / "dispatchers" / pin_of(hook, node.links)).exists():
            raise UnsupportedError(
                f"hook {hook.link} has dispatchers that keep each connection with its release, since an upgrade with "
                f'consistency = "connection", and map {hook.moved} would become another, in which connections of one '
                "release do not find those of the other: keep the definition of the map, or give the new map and its "
                "hook names of their own",
                feature="socket hook on a changed map",
                link=hook.link,
                map=hook.target,
            )
        (entry,) = (entry for entry in decided.maps if entry.name == hook.target)
        if hook.action == "attach" and state.current is not None and entry.action in ("keep", "convert"):
            with Map.open(map_pin(node.current, entry.was or entry.name)) as held:
                _refuse_taken(hook, held, state)


def _refuse_taken(hook: HookPlan, held: Map, state: NodeState) -> None:
    name = held.info.label
    for link, info in state.links.items():
        if info.type == "sockmap" and info.target_id == held.info.id and info.attach_type == hook.attach_type:
            raise NodeError(
                f"link {hook.link}: map {name} has the {hook.attach_type} of link {link} of this bundle, and takes one "
                f"only: name that link as `was`, or leave that hook out in a release before",
                link=hook.link,
                map=name,
            )
    found = Counter(programs_of_sockets(held, hook.attach_type).values()) if list_sockets(held) else Counter[int]()
    others = {number: count for number, count in found.items() if number and not is_dispatcher(number)}
    attached = attached_program(held, hook.attach_type)
    if attached:
        others.setdefault(attached, 0)
    if others:
        what = " and ".join(f"program {number} ({count} sockets run it)" for number, count in sorted(others.items()))
        raise NodeError(
            f"link {hook.link}: map {name} has {hook.attach_type} {what}, which hitless did not attach, and the kernel "
            "lets a socket keep what it was added under until it closes; nothing was changed: let who attached it take "
            "it off, and close or let end the connections that run it; or give the map and its hook names of their own",
            link=hook.link,
            map=name,
            programs=sorted(others),
            sockets=sum(others.values()),
        )


def with_clashes(decided: Plan, state: NodeState) -> Plan:
    """The plan with the links that may keep its netfilter hooks out (EBUSY), if this process may look at links.

    Raises KernelError.
    """
    if not any(hook.action == "attach" and hook.point for hook in decided.hooks):
        return decided
    own = {link.id for link in state.links.values()}
    try:
        others = [link for link in all_links() if link.type == "netfilter" and link.id not in own]
    except KernelError as error:
        if error.facts["errno"] != errno.EPERM:
            raise
        return decided
    hooks = tuple(
        msgspec.structs.replace(hook, clashes=tuple(link.id for link in others if link.attach_type == hook.attach_type))
        if hook.action == "attach"
        else hook
        for hook in decided.hooks
    )
    return msgspec.structs.replace(decided, hooks=hooks)


def refuse_loss(decided: Plan) -> None:
    """Raise LossNotAllowedError if the plan loses what nobody allowed to be lost."""
    if not decided.blocked:
        return
    lines = [f"  {entry.name} loses: {loss}" for entry in decided.blocked for loss in entry.loss]
    options = " ".join(f"--allow-loss {entry.name}" for entry in decided.blocked)
    raise LossNotAllowedError(
        f"going from {decided.from_version} to {decided.to_version} would lose state:\n"
        + "\n".join(lines)
        + f"\nnothing was changed; if that is fine, say so: {options}",
        maps=[entry.name for entry in decided.blocked],
        losses={entry.name: list(entry.loss) for entry in decided.blocked},
    )


def verify_pins(node: Node, current: Generation | None, maps: Mapping[str, Map]) -> None:
    """The maps under both generations' paths are still those that were seen and made, not somebody else's.

    Raises VerifyError.
    """
    seen = current.maps if current is not None else {}
    expected = {map_pin(node.current, name): live.info.id for name, live in seen.items()}
    expected |= {map_pin(node.next, name): held.info.id for name, held in maps.items()}
    for path, wanted in expected.items():
        if not path.exists():
            raise VerifyError(
                f"{path} was removed by somebody else while the upgrade ran; the old release goes on as it was: "
                "pin its map there again (bpftool map pin), then apply again",
                path=str(path), expected=wanted, found=None,
            )  # fmt: skip
        with Map.open(path) as held:
            found = held.info.id
        if found != wanted:
            raise VerifyError(
                f"{path} is map {found}, and was map {wanted} when the upgrade began: somebody else pinned another "
                "one there; the old release goes on as it was: find out who did, then apply again",
                path=str(path), expected=wanted, found=found,
            )  # fmt: skip


def verify_hooks(hooks: Collection[HookPlan], programs: Mapping[str, Program], links: Path) -> None:
    """Each hook runs its new program. Raises VerifyError."""
    for hook in hooks:
        if hook.action not in ("attach", "update", "adopt"):
            continue
        name = pin_of(hook, links)
        if hook.matched and not (links / name).exists():
            continue  # its target was gone when it was to be attached
        with open_attached(links, name) as link:
            expected, runs = programs[hook.program].info.id, link.info.program_id
            gone = link.info.is_dead and hook.matched
        if runs != expected and not gone:
            raise VerifyError(
                f"link {hook.link} runs program {runs}, not {expected}, just after it was switched: someone else "
                "changes this pin root's links; find out who, then apply again",
                link=hook.link,
                program=runs,
                expected=expected,
            )
