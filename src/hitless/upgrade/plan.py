"""What an upgrade would do, decided from values alone: nothing here has an effect.

A plan is made from what is live and what the release declares. A person can read it, a tool can keep it, and
``apply`` does exactly this and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Container, Mapping

import msgspec

from hitless.bundle import Attach, Bundle, unite_maps
from hitless.carry import CGROUP_STORAGE, converts, is_global, losses, refusals, translated, way
from hitless.errors import BundleError, UnsupportedError
from hitless.groups import group_of, torn
from hitless.layout.diff import MapDiff, diff_maps, is_constant
from hitless.layout.model import MapSpec
from hitless.layout.rules import MapRules
from hitless.upgrade.model import Generation, HookPlan, MapPlan, NodeState, Plan

__all__ = ["make_plan"]



def make_plan(
    state: NodeState,
    bundle: Bundle,
    cgroups: Mapping[str, int],
    features: Container[str],
    allow_loss: Collection[str] = (),
) -> Plan:
    """Decide what becomes of each map and hook when ``bundle`` is applied to what ``state`` shows.

    ``cgroups`` has the kernel's id of each target of the bundle's hooks; ``features`` are what it can
    do (:mod:`hitless.kernel.features`), by which the methods are chosen; ``allow_loss`` names maps that may lose
    what the plan says they lose. Raises BundleError or LayoutError for rules that cannot apply, UnsupportedError
    for changes that this version cannot make.
    """
    _check_order(bundle)
    current = state.current
    if current is None:
        start_type = "normal"
        maps = tuple(_created(name) for name in bundle.maps)
        hooks = tuple(_hook(entry, bundle, "attach") for entry in bundle.attach)
    elif (current.record.version, current.record.digest) == (bundle.version, bundle.digest):
        start_type = "restart"
        maps = tuple(MapPlan(name, "keep", method="same map") for name in current.record.maps)
        hooks = _plan_hooks(state, current, bundle, cgroups, restart=True)
    else:
        start_type = "update"
        if current.record.name != bundle.name:
            raise BundleError(
                f"{state.root} runs bundle {current.record.name!r}, and this one is {bundle.name!r}: a pin root "
                "holds one bundle's releases; choose another --root",
                running=current.record.name,
                bundle=bundle.name,
            )
        # In a start or restart nothing can be lost, and the same command must do on every node, and twice.
        _check_names(current, bundle, allow_loss)
        maps = _plan_maps(current, bundle, features, allow_loss)
        hooks = _plan_hooks(state, current, bundle, cgroups, restart=False)
        _check_cgroup_storage(maps, hooks, bundle)
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


def _check_names(current: Generation, bundle: Bundle, allow_loss: Collection[str]) -> None:
    live = set(current.record.maps) | {s.name for s in _globals_of(current)}
    for name in allow_loss:
        if name not in live and name not in bundle.maps:
            known = ", ".join(sorted(live | set(bundle.maps)))
            raise BundleError(f"--allow-loss {name}: neither release has such a map; there are: {known}", map=name)


def _globals_of(current: Generation) -> list[MapSpec]:
    united = unite_maps(current.record.objects)
    return [msgspec.structs.replace(spec, name=name) for name, spec in united.items() if is_global(name)]


def _created(name: str) -> MapPlan:
    method = "from the release's object" if is_global(name) else "empty"
    return MapPlan(name, "create", verdict="added", method=method)


def _plan_maps(
    current: Generation, bundle: Bundle, features: Container[str], allow_loss: Collection[str]
) -> tuple[MapPlan, ...]:
    old = [live.spec for live in current.maps.values()]
    new = [
        msgspec.structs.replace(spec, name=name) for name, spec in bundle.maps.items() if not is_global(name)
    ]
    plans = [
        _plan_map(diff, {spec.name: spec for spec in old}, bundle, features, allow_loss)
        for diff in diff_maps(old, new, {name: rule for name, rule in bundle.rules.items() if not is_global(name)})
    ]
    return _whole_groups((*plans, *_plan_globals(current, bundle, allow_loss)), current, bundle)


def _whole_groups(plans: tuple[MapPlan, ...], current: Generation, bundle: Bundle) -> tuple[MapPlan, ...]:
    """Discard what is carried of a group that is not carried as a whole."""
    old = {name: live.spec for name, live in current.maps.items()}
    groups = {
        plan.name: group_of(
            old.get(plan.was or plan.name), bundle.maps.get(plan.name), bundle.rules.get(plan.name, MapRules())
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


def _plan_map(
    diff: MapDiff,
    old: Mapping[str, MapSpec],
    bundle: Bundle,
    features: Container[str],
    allow_loss: Collection[str],
) -> MapPlan:
    rules = bundle.rules.get(diff.name, MapRules())
    allowed = rules.on_loss == "discard" or diff.name in allow_loss or diff.was in allow_loss
    lost = tuple(change.loss for change in losses(diff, rules) if change.loss)

    def planned(
        action: str, method: str, exactness: str = "exact", loss: tuple[str, ...] = (), kind: str = ""
    ) -> MapPlan:
        return MapPlan(diff.name, action, diff.was, diff.verdict, method, exactness, loss, allowed, diff.changes, kind)

    if diff.verdict == "added":
        return planned("create", "empty")
    if diff.verdict == "removed":
        return planned("drop", "none", loss=("all entries: the release has no such map",))
    if diff.verdict == "identical" and bundle.maps[diff.name].type == "prog_array":
        # libbpf fills the slots that the object names when it loads: in a kept array that would go live at once.
        return planned("discard", "from the release's object", loss=("slots that the object does not fill itself",))
    if diff.verdict == "identical":
        return planned("keep", "same map")
    if refused := refusals(diff, bundle.maps[diff.name], rules):
        return planned("discard", "empty", loss=tuple(f"all entries: {reason}" for reason in refused))
    if diff.verdict in ("lossless", "lossy") or converts(diff, rules):
        spec = old[diff.was or diff.name]
        found = way(spec, bundle.maps[diff.name], rules, features)
        if isinstance(found, str):
            return planned("discard", "empty", loss=(f"all entries: {found}", *lost))
        found = translated(found, diff, rules)
        made = planned("convert", found.method, found.exactness, lost, found.kind)
        return msgspec.structs.replace(made, converter=rules.convert if converts(diff, rules) else None)
    reasons = tuple(f"all entries: {change.reason}" for change in diff.changes if change.reason)
    return planned("discard", "empty", loss=reasons or (f"all entries: {diff.verdict}",))


def _plan_globals(current: Generation, bundle: Bundle, allow_loss: Collection[str]) -> list[MapPlan]:
    """Global data are in no pin: each release starts with its own, and what programs wrote is lost."""
    plans = []
    old = {spec.name: spec for spec in _globals_of(current)}
    for name in (*(name for name in bundle.maps if is_global(name)), *sorted(old.keys() - set(bundle.maps))):
        rules = bundle.rules.get(name, MapRules())
        written = name in old and not is_constant(old[name])
        loss = ("variables written by programs: carrying global data is not supported yet",) if written else ()
        action = ("discard" if written else "create") if name in bundle.maps else "drop"
        allowed = rules.on_loss == "discard" or name in allow_loss
        plans.append(MapPlan(name, action, None, "added", "from the release's object", "exact", loss, allowed))
    return plans


def _hook(
    entry: Attach, bundle: Bundle, action: str, was: str | None = None, expected: int | None = None
) -> HookPlan:
    attach_type = bundle.programs[entry.program].attach_type
    return HookPlan(entry.link, action, entry.program, entry.hook, entry.target, attach_type, was, expected)


def _plan_hooks(
    state: NodeState, current: Generation, bundle: Bundle, cgroups: Mapping[str, int], restart: bool
) -> tuple[HookPlan, ...]:
    """New hooks first, then updates in the bundle's order, removed ones last."""
    known = {hook.link: hook for hook in current.record.hooks}
    taken = set()
    attached, updated = [], []
    for entry in bundle.attach:
        name = entry.link if entry.link in state.links else entry.was or entry.link
        link = state.links.get(name)
        taken.add(name)
        if link is None or (link.type == "cgroup" and link.cgroup_id == 0):  # the kernel detached it with its cgroup
            attached.append(_hook(entry, bundle, "attach"))
            continue
        attach_type = bundle.programs[entry.program].attach_type
        if link.type != "cgroup" or link.attach_type != attach_type:
            raise UnsupportedError(
                f"link {name} is on {link.attach_type or link.type}, and {entry.program} attaches to {attach_type}: "
                "moving a link to another hook is not supported; give the new hook a link name of its own",
                feature="link to another hook",
                link=name,
            )
        if link.cgroup_id != cgroups[entry.target]:
            raise UnsupportedError(
                f"link {name} is attached to cgroup {link.cgroup_id}, and {entry.target} is {cgroups[entry.target]}: "
                "moving a link to another target is not supported yet; give it a link name of its own",
                feature="link to another target",
                link=name,
            )
        running = current.programs.get(entry.program)
        same = restart and running is not None and running.id == link.program_id
        was = name if name != entry.link else None
        updated.append(_hook(entry, bundle, "keep" if same else "update", was, link.program_id))
    removed = [
        HookPlan(
            link=name,
            action="detach",
            program=known[name].program if name in known else "",
            hook=known[name].hook if name in known else link.type,
            target=known[name].target if name in known else "",
            attach_type=link.attach_type,
            expected=link.program_id,
        )
        for name, link in state.links.items()
        if name not in taken
    ]
    return (*attached, *updated, *removed)


