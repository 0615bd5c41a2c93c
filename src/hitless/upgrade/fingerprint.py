"""The node that a plan was made for, and what became of it since. Pure: values in, values and words out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Container, Iterator, Mapping

import msgspec

from hitless.bundle import Bundle
from hitless.errors import BundleError, NodeError, PlanError
from hitless.upgrade.model import Fingerprint, LinkFacts, LiveMap, MapFacts, MapPlan, NodeState, Plan

__all__ = ["Asked", "differences", "fingerprint", "require_meant", "require_same", "require_unchanged"]


class Asked(Container[str]):
    """Passes questions about features on, and keeps the answers."""

    def __init__(self, features: Container[str]) -> None:
        self._features = features
        self.answers: dict[str, bool] = {}

    def __contains__(self, name: object) -> bool:
        found = name in self._features
        self.answers[str(name)] = found
        return found


def fingerprint(
    state: NodeState, targets: Mapping[str, int], features: Mapping[str, bool], kernel: str, boot: str
) -> Fingerprint:
    """The facts of ``state`` that a plan rests on; ``targets``, ``features``... are those of :class:`Fingerprint`."""
    current = state.current
    return Fingerprint(
        boot=boot,
        kernel=kernel,
        generation=state.generation,
        version=state.version,
        digest=current.record.digest if current else None,
        maps={name: _map_facts(live) for name, live in current.maps.items()} if current else {},
        programs={name: program.id for name, program in current.programs.items()} if current else {},
        links={
            name: LinkFacts(link.id, link.program_id, link.target_id, link.attach_type)
            for name, link in state.links.items()
        },
        targets=dict(targets),
        features=dict(features),
        rings=tuple(ring.name for ring in state.left if not ring.holders),
    )


def _map_facts(live: LiveMap) -> MapFacts:
    spec = msgspec.json.encode((live.spec, live.source))
    layout = hashlib.sha256(spec).hexdigest()[:16]
    return MapFacts(live.info.id, live.info.type, live.info.max_entries, live.info.flags, layout, live.filled)


def differences(then: Fingerprint, now: Fingerprint) -> Iterator[str]:
    """What is different, each thing in words. After a restart of the machine or another upgrade only that is told."""
    rebooted = then.boot != now.boot
    if rebooted:
        yield "the machine was started again since, which takes all pins, maps and links away"
    if then.kernel != now.kernel:
        yield f"kernel {then.kernel} became {now.kernel}"
    if (then.generation, then.version, then.digest) != (now.generation, now.version, now.digest):
        yield f"{_running(then)} ran, and now {_running(now)} does"
        return
    if rebooted:
        return  # no id means what it meant
    yield from _changed("map", then.maps, now.maps)
    yield from _ids("program", then.programs, now.programs)
    yield from _changed("link", then.links, now.links)
    yield from _ids("", then.targets, now.targets)
    for name, there in then.features.items():
        if now.features.get(name) != there:
            yield f"the kernel {'can no longer do' if there else 'can now do'} {name}"
    for name in sorted({*now.rings} - {*then.rings}):
        yield f"ring buffer {name} of the last release holds bytes now that nobody reads"
    for name in sorted({*then.rings} - {*now.rings}):
        yield f"ring buffer {name} of the last release holds no bytes any more that nobody reads"


def _running(seen: Fingerprint) -> str:
    if seen.generation is None:
        return "nothing"
    return f"generation {seen.generation} (release {seen.version}, digest {(seen.digest or '')[:12]})"


_WORDS = {"id": "id", "program_id": "program", "target_id": "target", "attach_type": "attach type"}


def _changed(
    kind: str, then: Mapping[str, MapFacts | LinkFacts], now: Mapping[str, MapFacts | LinkFacts]
) -> Iterator[str]:
    yield from _come_and_gone(kind, then, now)
    for name in then:
        if name not in now or then[name] == now[name]:
            continue
        for field in then[name].__struct_fields__:
            before, after = getattr(then[name], field), getattr(now[name], field)
            if before == after:
                continue
            if field in ("layout", "filled"):
                yield f"{kind} {name}: other {'slots are filled' if field == 'filled' else 'layout'}"
            else:
                yield f"{kind} {name}: {_WORDS.get(field, field)} {before} became {after}"


def _ids(kind: str, then: Mapping[str, int], now: Mapping[str, int]) -> Iterator[str]:
    yield from _come_and_gone(kind, then, now)
    for name in then:
        if name in now and then[name] != now[name]:
            yield f"{kind} {name}: id {then[name]} became {now[name]}".lstrip()


def _come_and_gone(kind: str, then: Collection[str], now: Collection[str]) -> Iterator[str]:
    yield from (f"{kind} {name} is gone".lstrip() for name in then if name not in now)
    yield from (f"{kind} {name} came".lstrip() for name in now if name not in then)


def require_meant(planned: Plan, root: str, bundle: Bundle) -> None:
    """Raise PlanError unless the plan is for ``root``, BundleError unless it is for ``bundle`` with these targets."""
    if planned.root != root:
        raise PlanError(
            f"this plan was made for the pin root {planned.root}, not for {root}; give --root {planned.root}, or plan "
            "for this one",
            planned=planned.root,
            root=root,
        )
    if planned.fingerprint is None:
        raise PlanError(
            "this plan does not say which node it was made for, so nobody can tell whether it still fits; plan again",
            root=root,
        )
    if planned.digest != bundle.digest:
        raise BundleError(
            f"{bundle.path} is not what was planned: the plan is for {planned.name} {planned.to_version} with digest "
            f"{planned.digest}, and this is {bundle.name} {bundle.version} with digest {bundle.digest}; get the "
            "release that was planned, or look at this one and plan again",
            file=str(bundle.path),
            digest=bundle.digest,
            expected=planned.digest,
        )
    targets = {hook.link: hook.target for hook in planned.hooks if hook.action != "detach"}
    for entry in bundle.attach:
        # What a pattern leads to is among the targets of the fingerprint.
        if not entry.is_pattern and targets.get(entry.link) != entry.target:
            raise BundleError(
                f"the plan has link {entry.link} on {targets.get(entry.link)}, and with what --set gives now it would "
                f"be on {entry.target}; give the same values as to plan, or plan again",
                link=entry.link,
                target=entry.target,
                expected=targets.get(entry.link),
            )


def require_unchanged(planned: Plan, now: Fingerprint) -> None:
    """Raise NodeError with all that is not as it was when the plan was made."""
    changes = list(differences(planned.fingerprint or Fingerprint(), now))
    if changes:
        raise NodeError(
            f"{planned.root} is not as it was when this was planned: {'; '.join(changes)}; nothing was changed: plan "
            "again, and look at that plan",
            path=planned.root,
            changes=changes,
        )


def require_same(planned: Plan, decided: Plan) -> None:
    """Raise PlanError unless what is decided now is what was planned; the numbers that losses tell may differ."""
    if _decisions(planned) != _decisions(decided):
        now = {entry.name: entry for entry in decided.maps}
        other = [entry.name for entry in planned.maps if entry.name not in now or not _alike(entry, now[entry.name])]
        what = f" (maps {', '.join(other)})" if other else ""
        raise PlanError(
            f"on the same node and for the same release something else would be done now than was planned{what}: "
            "another version of hitless made the plan, or it was edited; plan again",
            root=planned.root,
            maps=other,
        )


def _decisions(plan: Plan) -> Plan:
    maps = tuple(msgspec.structs.replace(entry, loss=()) for entry in plan.maps)
    # What sockets run changes with each that closes.
    hooks = tuple(msgspec.structs.replace(hook, clashes=(), method="", handed=False) for hook in plan.hooks)
    return msgspec.structs.replace(plan, maps=maps, hooks=hooks, fingerprint=None)


def _alike(one: MapPlan, other: MapPlan) -> bool:
    return msgspec.structs.replace(one, loss=()) == msgspec.structs.replace(other, loss=())
