"""What an upgrade would do, decided from values alone: nothing here has an effect.

A plan is made from what is live and what the release declares. A person can read it, a tool can keep it, and
``apply`` does exactly this and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Container, Iterable, Mapping, Sequence

import msgspec

from hitless.bundle import Bundle, CutoverRule, unite_maps
from hitless.carry import (
    CGROUP_STORAGE,
    converts,
    emptied,
    fold_obstacles,
    folded,
    is_global,
    is_split,
    losses,
    mirrored,
    refusals,
    section_way,
    translated,
    way,
)
from hitless.errors import BundleError, NodeError, UnsupportedError
from hitless.features import MEMBARRIER, require
from hitless.groups import group_of, torn
from hitless.hooks import HOOKS, TCX
from hitless.kernel.links import LinkInfo
from hitless.kernel.names import in_kernel
from hitless.kernel.switchboard import KINDS
from hitless.layout.answers import answer
from hitless.layout.diff import MapDiff, diff_maps, is_constant, phrases, sources_of
from hitless.layout.model import MapSpec, ProgramSpec
from hitless.layout.rules import MapRules, only_read
from hitless.layout.variables import SectionDiff, diff_sections
from hitless.public import loaded
from hitless.upgrade.model import Generation, Hook, HookPlan, LeftRing, MapPlan, NodeState, PathPlan, Plan, Record
from hitless.upgrade.places import Occupant, Place

__all__ = ["awaited", "hook_at", "hooks_of", "late_hooks", "make_plan", "new_hook"]

_OTHER_BARRIER = "an update of a map of maps, since this kernel has no membarrier(2) for all CPUs"
_WITHOUT_TCX = "tc filter at clsact, since this kernel has no tcx"
_MOVED = "exact; its sockets keep their hooks, and for a moment of the cutover some may not find each other"


def make_plan(
    state: NodeState,
    bundle: Bundle,
    places: Sequence[Place],
    features: Container[str],
    allow_loss: Collection[str] = (),
    into: Generation | None = None,
) -> Plan:
    """Decide what becomes of each map and hook when ``bundle`` is applied to what ``state`` shows.

    ``into`` is the last generation, if ``bundle`` is its release: a rollback, which fills the maps that are there.

    ``places`` are those of the bundle's hooks on this node; ``features`` are what it can
    do (:mod:`hitless.kernel.features`), by which the methods are chosen; ``allow_loss`` names maps that may lose
    what the plan says they lose. Raises BundleError or LayoutError for rules that cannot apply, UnsupportedError
    for changes that this version cannot make.
    """
    _check_order(bundle)
    current = state.current
    require(bundle, features, current is not None and current.record.may_sleep)
    if current is None:
        start_type = "normal"
        maps = tuple(_created(name) for name in bundle.maps)
        found = (new_hook(place, bundle.programs, frozenset()) for place in places)
        hooks = tuple(hook for hook in found if hook is not None)
    elif into is None and (current.record.version, current.record.digest) == (bundle.version, bundle.digest):
        start_type = "restart"
        maps = tuple(MapPlan(name, "keep", method="same map") for name in current.record.maps)
        hooks = _plan_hooks(state, current, bundle, places, restart=True)
    else:
        start_type = "update" if into is None else "rollback"
        if current.record.name != bundle.name:
            raise BundleError(
                f"{state.root} runs bundle {current.record.name!r}, and this one is {bundle.name!r}: a pin root "
                "holds one bundle's releases; choose another --root",
                running=current.record.name,
                bundle=bundle.name,
            )
        # In a start or restart nothing can be lost, and the same command must do on every node, and twice.
        left = state.left if into is None else ()  # a rollback keeps the rings of the last generation
        _check_names(current, bundle, allow_loss, left)
        maps = _plan_maps(current, bundle, features, allow_loss, into)
        maps = _with_left_rings(maps, left, state.previous, bundle, allow_loss)
        hooks = _plan_hooks(state, current, bundle, places, restart=False)
        _check_cgroup_storage(maps, hooks, bundle)
        _check_socket_hooks(current, maps, hooks, bundle.cutover)
        _check_ops(maps, hooks, current, bundle)
        hooks = _with_moved(maps, hooks)
        maps = tuple(_with_hooks(entry, hooks) for entry in maps)
        maps = _with_waits(maps, current, bundle.cutover)
    if bundle.cutover.consistency == "connection":
        _check_dispatchers(hooks)
    return Plan(
        root=state.root,
        name=bundle.name,
        start_type=start_type,
        from_version=state.version,
        to_version=bundle.version,
        digest=bundle.digest,
        generation=(state.generation or 0) + (start_type != "restart"),
        maps=maps,
        hooks=hooks,
        cutover=bundle.cutover if start_type in ("update", "rollback") else CutoverRule(),
        paths=_paths(current, bundle, hooks) if start_type != "restart" else (),
        left_out=tuple(bundle.left_out),
        barrier=None if start_type in ("normal", "restart") or MEMBARRIER in features else _OTHER_BARRIER,
    )


def _paths(current: Generation | None, bundle: Bundle, hooks: Iterable[HookPlan]) -> tuple[PathPlan, ...]:
    """What changes of the paths by which the daemon's own loader finds its pins."""
    record = current.record if current is not None else None
    old, new = {}, {}
    if record is not None and record.public is not None:
        old = record.public.places(record.maps, [hook.link for hook in record.hooks], record.pinned_programs)
    if bundle.public is not None:
        links = [hook.link for hook in hooks if hook.action != "detach"]
        new = bundle.public.places(bundle.maps, links, loaded(bundle.programs.values()))
    added = [PathPlan(path, "add") for path in sorted(new.keys() - old.keys())]
    return (*added, *(PathPlan(path, "remove") for path in sorted(old.keys() - new.keys())))


def _check_dispatchers(hooks: tuple[HookPlan, ...]) -> None:
    for hook in hooks:
        if hook.action == "adopt":
            raise UnsupportedError(
                f"hook {hook.link} is adopted from another tool, whose program knows of no connections: leave out "
                'consistency = "connection" in this upgrade',
                feature="adopting by connection",
                link=hook.link,
            )
        if hook.instead_of:
            raise UnsupportedError(
                f"hook {hook.link} is a {_WITHOUT_TCX}, and of a filter no connection can keep to its release: leave "
                'out consistency = "connection", or the hook',
                feature=TCX,
                link=hook.link,
            )
        if hook.attach_type not in KINDS:
            raise UnsupportedError(
                f"hook {hook.link} is on {hook.attach_type}, where no connection can keep to its release: leave out "
                'consistency = "connection", or the hook',
                feature=f"dispatcher on {hook.attach_type}",
                link=hook.link,
            )


def _check_order(bundle: Bundle) -> None:
    for name, spec in bundle.maps.items():
        if spec.order != sys.byteorder:
            raise UnsupportedError(
                f"map {name} of {bundle.path} is for a {spec.order}-endian processor, and this one is "
                f"{sys.byteorder}-endian: take the release that was compiled for it",
                feature=f"{spec.order}-endian objects",
                map=name,
            )


def _check_socket_hooks(
    current: Generation, maps: tuple[MapPlan, ...], hooks: tuple[HookPlan, ...], cutover: CutoverRule
) -> None:
    """Sockets keep the dispatcher of a hook for good; a map that becomes another has to have them all."""
    plans = {entry.name: entry for entry in maps}
    targets = {hook.link: hook.target for hook in current.record.hooks}
    for hook in hooks:
        if hook.action != "update" or HOOKS[hook.hook].on != "map":
            continue
        entry = plans[hook.target]
        was = targets.get(hook.was or hook.link, entry.was or entry.name)
        why = _not_moved(hook, entry, was, cutover)
        if why is not None:
            same = was == (entry.was or entry.name)
            goes = f"which becomes another one ({entry.verdict})" if same else f"and would go to map {hook.target}"
            raise UnsupportedError(
                f"hook {hook.link} ({hook.hook}) is on map {was}, {goes}: {why}",
                feature="socket hook on a changed map",
                link=hook.link,
                map=hook.target,
            )


def awaited(maps: Sequence[MapPlan], current: Generation) -> tuple[str, ...]:
    """The maps that are converted and that connections may write by a struct_ops of this or an earlier release."""
    out = []
    for entry in maps:
        lives = [current.maps[was] for was in entry.olds if was in current.maps]
        written = any(
            live.info.id in current.of_ops and live.spec.name not in current.record.unwritten for live in lives
        )
        if entry.action == "convert" and written:
            out.append(entry.name)
    return tuple(out)


def _with_waits(maps: tuple[MapPlan, ...], current: Generation, rule: CutoverRule) -> tuple[MapPlan, ...]:
    late = awaited(maps, current)
    note = (
        f"the last merge waits for sockets that have the struct_ops of {current.record.version} or before it, at most "
        f"{rule.deadline:g} s; if any is left then, the upgrade is taken back"
    )
    return tuple(
        msgspec.structs.replace(entry, notes=(*entry.notes, note)) if entry.name in late else entry for entry in maps
    )


def _check_ops(
    maps: tuple[MapPlan, ...], hooks: tuple[HookPlan, ...], current: Generation, bundle: Bundle
) -> None:
    """What the kernel exchanges has the same name; and what is taken off runs on for connections that have it."""
    known = {hook.link: hook for hook in current.record.hooks}
    for hook in hooks:
        if hook.hook != "struct_ops" or hook.action not in ("update", "detach"):
            continue
        old = known.get(hook.was or hook.link)
        if hook.action == "detach" and (late := awaited(maps, current)):
            raise UnsupportedError(
                f"release {bundle.version} has no hook {hook.link} and changes {', '.join(late)}, which connections "
                "that have its struct_ops go on writing until they end: leave those maps as they are in the release "
                "that takes the hook off",
                feature="struct_ops taken off a changed map",
                link=hook.link,
                maps=list(late),
            )
        if hook.action == "update" and old is not None and old.target != hook.target:
            raise UnsupportedError(
                f"link {hook.link} is {old.target}, and {hook.program} is called {hook.target}: the kernel exchanges "
                "only what has the same name; keep the name, or give the new one a link name of its own",
                feature="struct_ops of another name",
                link=hook.link,
            )


def _not_moved(hook: HookPlan, entry: MapPlan, was: str, cutover: CutoverRule) -> str | None:
    """Why a hook cannot go over from map ``was`` to what the plan makes of it, and what to do; None if it can."""
    names = "give the new map and its hook names of their own"
    if (entry.was or entry.name) != was:
        return f"that is another one, and the sockets of {was} would go on without it; {names}"
    if entry.action == "keep":
        return None
    if entry.action != "convert":
        reason = entry.loss[0] if entry.loss else entry.method
        return f"its sockets do not come along ({reason}), and would keep the hook all the same; {names}"
    if hook.attach_type == "sk_skb_stream_parser":
        return (
            "a socket that comes in the moment in which that takes the hook of another may get its verdict without its "
            f"parser; keep the definition of the map, or {names}"
        )
    if cutover.consistency == "connection":
        return (
            "as long as connections of both releases live, each would look for the other's sockets in a map where they "
            'are not; leave out consistency = "connection" in this upgrade, or keep the definition of the map'
        )
    return None


def _with_moved(maps: tuple[MapPlan, ...], hooks: tuple[HookPlan, ...]) -> tuple[HookPlan, ...]:
    """The hooks with the maps of sockets from which they come."""
    olds = {entry.name: entry.was or entry.name for entry in maps if entry.action == "convert"}
    method = "slot of its dispatcher; the new map gets one too"
    return tuple(
        msgspec.structs.replace(hook, moved=olds[hook.target], method=method)
        if hook.action == "update" and HOOKS[hook.hook].on == "map" and hook.target in olds
        else hook
        for hook in hooks
    )


def _with_hooks(entry: MapPlan, hooks: tuple[HookPlan, ...]) -> MapPlan:
    if any(hook.moved and hook.target == entry.name for hook in hooks):
        return msgspec.structs.replace(entry, exactness=_MOVED)
    return entry


def _check_cgroup_storage(maps: tuple[MapPlan, ...], hooks: tuple[HookPlan, ...], bundle: Bundle) -> None:
    for entry in maps:
        if entry.action == "discard" and bundle.maps[entry.name].type in CGROUP_STORAGE:
            updated = next((hook.link for hook in hooks if hook.action == "update"), None)
            if updated is not None:
                raise UnsupportedError(
                    f"map {entry.name} of type {bundle.maps[entry.name].type} changed, and link {updated} is updated "
                    "in place: the kernel would let the new program write into the old map's storage, whatever its "
                    "size; leave the map as it is, use cgrp_storage, or give every hook a link name of its own",
                    feature="changed cgroup storage",
                    map=entry.name,
                    link=updated,
                )


def _check_names(
    current: Generation, bundle: Bundle, allow_loss: Collection[str], left: Collection[LeftRing]
) -> None:
    live = set(unite_maps(current.record.objects)) | {ring.name for ring in left}
    for name in allow_loss:
        if name not in live and name not in bundle.maps:
            known = ", ".join(sorted(live | set(bundle.maps)))
            raise BundleError(f"--allow-loss {name}: neither release has such a map; there are: {known}", map=name)


def _created(name: str) -> MapPlan:
    method = "from the release's object" if is_global(name) else "empty"
    return MapPlan(name, "create", verdict="added", method=method)


def _plan_maps(
    current: Generation,
    bundle: Bundle,
    features: Container[str],
    allow_loss: Collection[str],
    into: Generation | None,
) -> tuple[MapPlan, ...]:
    apart = _apart(current, into)
    old = {name: live.spec for name, live in current.maps.items()}
    new = {name: msgspec.structs.replace(spec, name=name) for name, spec in bundle.maps.items()}
    sections = {item.diff.name: item for item in diff_sections(old.values(), new.values(), bundle.rules)}
    plans = [
        _plan_section(sections[diff.name], old, new, bundle, allow_loss, apart)
        if diff.name in sections
        else _plan_map(diff, old, bundle, features, allow_loss, current.record.unwritten, apart)
        for diff in diff_maps(list(old.values()), list(new.values()), bundle.rules)
    ]
    plans = [_with_slots(entry, current, bundle) for entry in plans]
    planned = _whole_groups(_without_unpinned(plans, current, bundle, allow_loss), current, bundle)
    return planned if into is None else tuple(_with_last(entry, current, into) for entry in planned)


def _apart(current: Generation, into: Generation | None) -> frozenset[str]:
    """Maps of the last generation that are not maps of the running one as well."""
    if into is None:
        return frozenset()
    shared = {live.info.id for live in current.maps.values()}
    return frozenset(name for name, live in into.maps.items() if live.info.id not in shared)


def _with_last(entry: MapPlan, current: Generation, into: Generation) -> MapPlan:
    """The plan of one map when the map that takes its place is there, and holds what it held."""
    there, running = into.maps.get(entry.name), current.maps.get(entry.was or entry.name)
    if there is None:
        return entry
    if running is not None and running.info.id == there.info.id:
        return MapPlan(entry.name, "keep", entry.was, entry.verdict, "same map", changes=entry.changes)
    left = f"as {into.record.version} left it"
    match entry.action:
        case "convert":
            return msgspec.structs.replace(entry, notes=_notes(entry, current, into))
        case "discard" if not is_global(entry.name) and emptied(there.info.type):
            return entry
        case "create" if not is_global(entry.name):
            note = f"what is in it is {left}: {current.record.version} has no such map"
            return msgspec.structs.replace(entry, method=left, notes=(note,))
        case "create" | "discard":
            return msgspec.structs.replace(entry, method=left)
    return entry


def _notes(entry: MapPlan, current: Generation, into: Generation) -> tuple[str, ...]:
    """What becomes of the fields and variables that the running release does not have."""
    added = [change.path for change in entry.changes if change.kind == "added" and change.path]
    if not added:
        return ()
    fate = f"as {into.record.version} left it" if entry.kind == "variables" else "its default, or zero, in every entry"
    return tuple(f"{path} is {fate}: {current.record.version} does not have it" for path in added)


def _whole_groups(plans: tuple[MapPlan, ...], current: Generation, bundle: Bundle) -> tuple[MapPlan, ...]:
    """Discard what is carried of a group that is not carried as a whole."""
    old = {name: live.spec for name, live in current.maps.items()}
    groups = {
        plan.name: group_of(
            next((old[was] for was in plan.olds if was in old), None),
            bundle.maps.get(plan.name),
            bundle.rules.get(plan.name, MapRules()),
        )
        for plan in plans
        if plan.action != "create"
    }
    gone = {plan.name: plan.loss[0] for plan in plans if plan.action in ("discard", "drop") and plan.loss}
    reasons = torn(groups, gone)
    return tuple(
        msgspec.structs.replace(
            plan, action="discard", method="empty", exactness="exact", kind="", converter=None,
            loss=(reasons[plan.name], *plan.loss),
        )
        if plan.name in reasons
        else plan
        for plan in plans
    )


def _plan_section(
    section: SectionDiff,
    old: Mapping[str, MapSpec],
    new: Mapping[str, MapSpec],
    bundle: Bundle,
    allow_loss: Collection[str],
    apart: Collection[str],
) -> MapPlan:
    """What becomes of the variables of one section; those without a source start as the release's object says."""
    diff = section.diff
    rules = bundle.rules.get(diff.name, MapRules())
    if rules.convert is not None:
        raise UnsupportedError(
            f"map {diff.name} of {bundle.path}: convert is for maps with entries; global variables are carried by name",
            feature="convert of global variables",
            map=diff.name,
        )
    found = section_way(section, old, new, bundle.rules)
    allowed = _is_allowed(diff.name, diff.was, bundle, allow_loss)

    def planned(action: str, method: str, kind: str = "") -> MapPlan:
        told = found.exactness, found.losses, allowed, diff.changes
        return MapPlan(diff.name, action, diff.was, diff.verdict, method, *told, kind)

    if diff.verdict == "removed":
        return planned("drop", "none")
    if diff.verdict == "identical" and diff.name not in apart:
        return MapPlan(diff.name, "keep", diff.was, diff.verdict, "same map", changes=diff.changes)
    if found.parts:
        return planned("convert", "variables by name, merge in the kernel", "variables")
    return planned("discard" if found.losses else "create", "from the release's object")


def _without_unpinned(
    plans: list[MapPlan], current: Generation, bundle: Bundle, allow_loss: Collection[str]
) -> tuple[MapPlan, ...]:
    """Variables of a running release whose upgrader did not pin them cannot be read by anybody."""
    loss = ("variables written by programs: the hitless that started the running release did not keep them",)
    lost = {
        name: MapPlan(name, "drop", None, "removed", "none", "exact", loss, _is_allowed(name, None, bundle, allow_loss))
        for name, spec in unite_maps(current.record.objects).items()
        if name not in current.maps and not is_constant(msgspec.structs.replace(spec, name=name))
    }
    out = []
    for plan in plans:
        unpinned = lost.pop(plan.name, None)
        if unpinned is not None:
            plan = msgspec.structs.replace(plan, action="discard", loss=unpinned.loss, allowed=unpinned.allowed)
        out.append(plan)
    return (*out, *lost.values())


def _is_allowed(name: str, was: str | None, bundle: Bundle, allow_loss: Collection[str]) -> bool:
    rules = bundle.rules.get(name, MapRules())
    # What is split into others is named, as what is dropped, to say that entries of it may go.
    gone = bundle.rules.get(was) if was is not None and was not in bundle.maps else None
    discards = "discard" in (rules.on_loss, gone.on_loss if gone is not None else None)
    return discards or name in allow_loss or was in allow_loss


def _with_slots(entry: MapPlan, current: Generation, bundle: Bundle) -> MapPlan:
    """The plan of a program array with the slots that somebody else filled and the new release does not."""
    live = current.maps.get(entry.was or entry.name)
    if live is None or entry.action != "discard":
        return entry
    own = {index for index, _ in live.spec.slots}
    own |= set(current.record.own_rules.get(entry.was or entry.name, MapRules()).slots)
    own |= set(bundle.rules.get(entry.name, MapRules()).slots)
    foreign = [str(index) for index in live.filled if index not in own]
    if not foreign:
        return entry
    how = f"name their programs in [map.{entry.name}.slots]"
    loss = f"slots that neither release fills itself: {', '.join(foreign)}; {how}"
    return msgspec.structs.replace(entry, loss=(*entry.loss, loss))


def _plan_map(
    diff: MapDiff,
    old: Mapping[str, MapSpec],
    bundle: Bundle,
    features: Container[str],
    allow_loss: Collection[str],
    unwritten: Collection[str],
    apart: Collection[str],
) -> MapPlan:
    rules = bundle.rules.get(diff.name, MapRules())
    allowed = _is_allowed(diff.name, diff.was, bundle, allow_loss)
    lost = tuple(phrases(losses(diff, rules)))

    def planned(
        action: str, method: str, exactness: str = "exact", loss: tuple[str, ...] = (), kind: str = ""
    ) -> MapPlan:
        return MapPlan(diff.name, action, diff.was, diff.verdict, method, exactness, loss, allowed, diff.changes, kind)

    if is_global(diff.name) and is_constant(old.get(diff.name) or bundle.maps[diff.name]):
        return planned("create" if diff.name in bundle.maps else "drop", "from the release's object")
    if diff.verdict == "added":
        return planned("create", "from the release's object" if is_global(diff.name) else "empty")
    if diff.verdict == "removed":
        gone = () if old[diff.name].ops else ("all entries: the release has no such map",)
        return planned("drop", "none", loss=gone)
    if diff.verdict == "identical" and answer(bundle.maps[diff.name].type).anew:
        # libbpf fills the slots that the object names when it loads: in a kept array that would go live at once.
        return planned("discard", "from the release's object")
    if diff.verdict == "identical" and diff.name not in apart:
        return planned("keep", "same map")
    if diff.parts:
        spec = bundle.maps[diff.name]
        if reasons := fold_obstacles(diff, old, spec, rules):
            made = planned("discard", "empty", loss=tuple(f"all entries: {reason}" for reason in reasons))
        else:
            together = folded(spec, rules)
            made = planned("convert", together.method, together.exactness, lost, together.kind)
        return msgspec.structs.replace(made, sources=sources_of(diff))
    if refused := refusals(diff, bundle.maps[diff.name], rules):
        return planned("discard", "empty", loss=tuple(f"all entries: {reason}" for reason in refused))
    if diff.verdict in ("identical", "lossless", "lossy") or converts(diff, rules):
        spec = old[diff.was or diff.name]
        found = way(spec, bundle.maps[diff.name], rules, features)
        if isinstance(found, str):
            return planned("discard", "empty", loss=(f"all entries: {found}", *lost))
        found = translated(found, diff, rules)
        if not is_split(diff) and spec.name in unwritten and only_read(bundle.maps[diff.name], rules):
            found = mirrored(found, spec, bundle.maps[diff.name], diff)
        made = planned("convert", found.method, found.exactness, lost, found.kind)
        return msgspec.structs.replace(made, converter=rules.function() if converts(diff, rules) else None)
    if diff.verdict == "not-carried" and not lost:
        return planned("discard", "from the release's object")
    reasons = tuple(f"all entries: {change.reason}" for change in diff.changes if change.reason)
    return planned("discard", "empty", loss=reasons or (f"all entries: {diff.verdict}",))


def _with_left_rings(
    plans: tuple[MapPlan, ...],
    left: Collection[LeftRing],
    last: str | None,
    bundle: Bundle,
    allow_loss: Collection[str],
) -> tuple[MapPlan, ...]:
    """The plans with what the generation that an upgrade removes, the one before the running, still holds unread."""
    out = {entry.name: entry for entry in plans}
    for ring in left:
        if ring.holders:
            continue  # it lives on until they are done with it
        loss = f"{ring.unread} bytes in the ring buffer of {last}, which nobody read and nobody holds open"
        entry = out.get(ring.name)
        if entry is None:
            allowed = ring.name in allow_loss or bundle.rules.get(ring.name, MapRules()).on_loss == "discard"
            entry = MapPlan(ring.name, "drop", verdict="removed", allowed=allowed)
        out[ring.name] = msgspec.structs.replace(entry, loss=(*entry.loss, loss))
    return tuple(out.values())


def hooks_of(planned: Iterable[HookPlan]) -> tuple[Hook, ...]:
    """The hooks that the release has when what is planned of them is done."""
    return tuple(
        Hook(hook.link, hook.program, hook.hook, hook.target, hook.attach_type, hook.netns, hook.mode, hook.matched)
        for hook in planned
        if hook.action != "detach"
    )


def late_hooks(plan: Plan, record: Record, places: Sequence[Place]) -> list[HookPlan]:
    """Those of ``places``, to which patterns lead now, that the plan does not know, or knows as something that went."""
    known = {(hook.link, hook.target_id) for hook in plan.hooks if hook.action != "detach"}
    programs = record.programs
    own = {program.id for program in record.pinned_programs.values()} | {hook.expected for hook in plan.hooks}
    so_far = "it came while hooks were switched, so the upgrade is taken back and the old release goes on"
    late = (
        new_hook(place, programs, _own_at(place, own, record, plan.hooks), so_far)
        for place in places
        if (place.link, place.id) not in known
    )
    return [hook for hook in late if hook is not None]


def new_hook(
    place: Place,
    programs: Mapping[str, ProgramSpec],
    own: Container[int | None],
    so_far: str = "nothing was changed",
) -> HookPlan | None:
    """The plan of a hook on which nothing of its link is; ``own`` are ids of programs that are not of other tools.

    None if there is nothing to adopt, and it is for that only.
    Raises NodeError if the place is taken, which says what was done ``so_far``.
    """
    entry = place.entry
    if entry.hook in ("xdp", "xdp-netlink"):
        there = list(place.occupants)
    else:
        there = [
            one for one in place.occupants
            if entry.priority in (0, one.priority) and entry.handle in (0, one.handle)
        ]  # fmt: skip
    if entry.adopt:
        # A filter has a place of its own; of XDP, and on a cgroup without a link, there can be but one of ours.
        there = [one for one in there if not one.priority or one.program_id not in own]
        if entry.only:  # so that a program of yet another tool stays
            there = [one for one in there if one.name == in_kernel(entry.program).decode()]
    elif not (entry.hook.startswith("xdp") or entry.handle):
        there = []  # others have their own places
    if not there:
        return None if entry.only else hook_at(place, programs, "attach")
    found = there[0]
    why = _not_adopted(place, there, own)
    if why:
        raise NodeError(
            f"link {place.link}: {place} has {' and '.join(map(str, there))}, {why}; {so_far}",
            link=place.link,
            target=place.target,
            namespace=place.netns,
            programs=[one.program_id for one in there],
        )
    planned = hook_at(place, programs, "adopt", expected=found.program_id)
    return msgspec.structs.replace(
        planned, mode=found.mode, priority=found.priority, handle=found.handle, adopted=found.name
    )


def _own_at(
    place: Place, own: Container[int | None], record: Record, hooks: Iterable[Hook | HookPlan]
) -> Container[int | None]:
    """Which of our ``own`` programs say, by being there, that the place is one of our ``hooks`` already.

    None where we have no hook, if another loader has these programs too: it attaches them to what comes.
    """
    ours = record.public is None or any((hook.target, hook.netns) == (place.target, place.netns) for hook in hooks)
    return own if ours else frozenset()


def _not_adopted(place: Place, there: Sequence[Occupant], own: Container[int | None]) -> str:
    """Why what is there is not adopted, and what to do; empty if it is."""
    entry, found = place.entry, there[0]
    if found.program_id in own:
        return (
            "which is this bundle's own under another link name or by another hook: name that link as `was`, or leave "
            "that hook out in a release before"
        )
    if not entry.adopt:
        how = "adopt = true" if not HOOKS[entry.hook].linked else 'by = "netlink" and adopt = true'
        return f"which hitless did not attach: let who did take it off, or let this release take it over ({how})"
    if len(there) > 1:
        what = ": give its priority and handle" if found.priority else "; let who attached them take off all others"
        return f"and nobody can say which one to adopt{what}"
    if found.is_linked:
        return (
            "held by a link of another tool, which stays its owner's, and which the kernel lets nothing else replace: "
            "let that tool detach it"
        )
    if entry.mode not in (None, found.mode):
        return f"and {entry.mode} is wanted: the kernel cannot change the mode in place; leave mode out of the manifest"
    if not found.is_plain:
        return (
            "which is not in direct-action mode for all protocols in chain 0, and a replacement would be: let who "
            "attached it do it so"
        )
    return ""


def _taken_over(place: Place, link: LinkInfo, own: Container[int | None]) -> str:
    """The name of the program by which another tool replaced ours. Raises NodeError if it is not to be replaced."""
    there = [
        one for one in place.occupants
        if (one.program_id, one.priority, one.handle) == (link.program_id, link.priority, link.handle)
    ]  # fmt: skip
    why = _not_adopted(place, there, own) if there else "which changed just now: plan again"
    if why:
        raise NodeError(
            f"link {place.link}: {place} runs program {link.program_id} where ours ran, {why}; nothing was changed",
            link=place.link,
            target=place.target,
            namespace=place.netns,
            programs=[link.program_id],
        )
    return there[0].name


def hook_at(
    place: Place, programs: Mapping[str, ProgramSpec], action: str, was: str | None = None, expected: int | None = None
) -> HookPlan:
    """The plan of the hook at ``place``: what is done there, with a link that was called ``was``, and what runs now."""
    entry = place.entry
    method = HOOKS[entry.hook].method if action == "update" else ""
    return HookPlan(
        link=place.link,
        action=action,
        program=entry.program,
        hook=entry.hook,
        target=place.target,
        attach_type=entry.attach_type(programs[entry.program]),
        was=was,
        expected=expected,
        netns=place.netns,
        mode=entry.mode,
        target_id=place.id,
        matched=entry.is_pattern,
        method=_WITHOUT_TCX if entry.instead_of else method,
        point=entry.point,
        priority=entry.priority,
        handle=entry.handle,
        instead_of=entry.instead_of,
    )


def _plan_hooks(
    state: NodeState, current: Generation, bundle: Bundle, places: Sequence[Place], restart: bool
) -> tuple[HookPlan, ...]:
    """New hooks first, then updates in the bundle's order, removed ones last."""
    known = {hook.link: hook for hook in current.record.hooks}
    own = {one.id for one in current.programs.values()} | {one.id for one in current.record.replaced_programs}
    taken = set()
    attached, updated = [], []
    for place in places:
        entry = place.entry
        name = place.link if place.link in state.links else place.was or place.link
        link = state.links.get(name)
        # The kernel detached it with its target. Of a netfilter link it does not tell, so that another namespace at the
        # same path is taken for a sign that the old one is gone.
        if link is None or link.is_dead or (entry.point and link.target_id != place.id):
            at = _own_at(place, own, current.record, current.record.hooks)
            found = new_hook(place, bundle.programs, at)
            if found is not None:
                attached.append(found)
                taken.add(name)
            continue
        taken.add(name)
        attach_type = entry.attach_type(bundle.programs[entry.program])
        if link.attach_type != attach_type or (name in known and known[name].hook != entry.hook):
            raise UnsupportedError(
                f"link {name} is on {link.attach_type or link.type}, and {entry.program} attaches to {attach_type}: "
                "moving a link to another hook is not supported; give the new hook a link name of its own",
                feature="link to another hook",
                link=name,
            )
        # Of a sampled event the kernel does not tell the period.
        other = HOOKS[entry.hook].on == "cpu" and name in known and known[name].target != place.target
        if other or (link.target_id != place.id and HOOKS[entry.hook].on != "map"):
            raise UnsupportedError(
                f"link {name} is attached to {link.where}, and {place.target} is {place.id}: "
                "moving a link to another target is not supported yet; give it a link name of its own",
                feature="link to another target",
                link=name,
            )
        if link.priority != (entry.priority or link.priority) or link.handle != (entry.handle or link.handle):
            raise UnsupportedError(
                f"link {name} is a filter with priority {link.priority} and handle {link.handle:#x}, and the manifest "
                "has others: moving a filter is not supported; give the new one a link name of its own",
                feature="filter to another priority",
                link=name,
            )
        of_map = entry.hook == "struct_ops" and entry.program in current.maps
        running = current.maps[entry.program].info if of_map else current.programs.get(entry.program)
        same = restart and running is not None and running.id == link.program_id
        was = name if name != place.link else None
        planned = hook_at(place, bundle.programs, "keep" if same else "update", was, link.program_id)
        if not HOOKS[entry.hook].linked and link.program_id not in own:
            planned = msgspec.structs.replace(planned, adopted=_taken_over(place, link, own))
        updated.append(planned)
    removed = [
        HookPlan(
            link=name,
            action="detach",
            program=known[name].program if name in known else "",
            hook=known[name].hook if name in known else link.type,
            target=known[name].target if name in known else "",
            attach_type=link.attach_type,
            expected=link.program_id,
            netns=known[name].netns if name in known else None,
            target_id=link.target_id,
        )
        for name, link in state.links.items()
        if name not in taken
    ]
    return (*attached, *updated, *removed)


