"""The part of a plan that only the kernel can tell: hooks of maps that no link holds, and the sockets in those maps."""

from __future__ import annotations

import errno
from collections.abc import Collection, Container, Iterable

import msgspec

from hitless.attach import Attach
from hitless.errors import KernelError, NodeError, UnsupportedError
from hitless.hooks import HOOKS, SOCKMAP_LINK
from hitless.kernel.links import LinkInfo, all_links
from hitless.kernel.map_places import MapPlace
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.layout.diff import is_constant
from hitless.upgrade.attached import slot_of
from hitless.upgrade.model import Generation, HookPlan, NodeState, Plan
from hitless.upgrade.node import Node
from hitless.upgrade.record import map_pin
from hitless.upgrade.socket_hooks import SocketHook

__all__ = ["with_socket_hooks"]

_METHOD = "slot of its dispatcher, attached without a link"


def with_socket_hooks(
    node: Node, state: NodeState, decided: Plan, attach: Iterable[Attach], features: Container[str]
) -> Plan:
    """The plan with what is to become of hooks of maps that entries of ``attach`` adopt, or that no link holds.

    None holds one where the kernel, with ``features``, has no such links.
    Raises NodeError if a program of another loader is there that is not to be replaced, UnsupportedError for what such
    a hook cannot do, KernelError.
    """
    looking = _Look(node, state, decided, {entry.link for entry in attach if entry.adopt}, features)
    return msgspec.structs.replace(decided, hooks=tuple(looking.planned(hook) for hook in decided.hooks))


class _Look:
    """One plan, and what it is made for."""

    def __init__(
        self, node: Node, state: NodeState, decided: Plan, adopting: Collection[str], features: Container[str]
    ) -> None:
        self._node = node
        self._state = state
        self._maps = {entry.name: entry for entry in decided.maps}
        self._by_connection = decided.cutover.consistency == "connection"
        self._release = decided.to_version
        self._adopting = adopting
        self._features = features

    def planned(self, hook: HookPlan) -> HookPlan:
        """What becomes of a hook, whichever it is."""
        link, current = self._state.links.get(hook.was or hook.link), self._state.current
        if hook.action == "attach":
            if HOOKS[hook.hook].on != "map":
                return hook
            if hook.link in self._adopting:
                return self._attached(hook, current)
            return self._without_link(hook, current) if self._lacks_links else hook
        if current is None or link is None or (link.type, link.id) != ("sockmap", 0) or link.is_dead:
            return hook
        if hook.action == "update":
            return self._updated(hook, link, current)
        return self._detached(hook, link, current) if hook.action == "detach" else hook

    def _attached(self, hook: HookPlan, current: Generation | None) -> HookPlan:
        unlinked = msgspec.structs.replace(hook, unlinked=True)
        entry = self._maps[hook.target]
        if current is None or entry.action not in ("keep", "convert"):
            return unlinked  # the map is new: nothing can be there
        with Map.open(map_pin(self._node.current, entry.was or entry.name)) as held:
            place = MapPlace(held.info.id, hook.attach_type)
        there = place.program()
        if not there or _links_of(place):
            return unlinked if not there else hook  # what a link holds is refused as without adopt = true
        self._refuse(hook, changed=entry.action != "keep")
        with Program.by_id(there) as program:
            taken = msgspec.structs.replace(unlinked, action="adopt", expected=there, adopted=program.info.name)
        return self._with_strays(taken, place, current)

    @property
    def _lacks_links(self) -> bool:
        return SOCKMAP_LINK not in self._features

    def _without_link(self, hook: HookPlan, current: Generation | None) -> HookPlan:
        # Whether somebody else's program is there is looked at for hooks of all maps (refuse_sockets).
        self._refuse(hook, changed=current is not None and self._maps[hook.target].action == "convert")
        return msgspec.structs.replace(hook, unlinked=True, method=_METHOD)

    def _updated(self, hook: HookPlan, link: LinkInfo, current: Generation) -> HookPlan:
        place = MapPlace(link.target_id, link.attach_type)
        self._refuse(hook, changed=hook.moved is not None)
        own = {one.id for one in current.programs.values()} | {one.id for one in current.record.replaced_programs}
        over = _links_of(place)
        if link.program_id in own and not over:
            return self._with_strays(hook, place, current)
        if over or hook.link not in self._adopting:
            why = (
                f"held by link {over[0]} of another tool, which the kernel lets nothing else replace: let that tool "
                "detach it"
                if over
                else "which hitless did not attach: let who did take it off, or let this release take it over "
                "(adopt = true)"
            )
            raise NodeError(
                f"link {hook.link}: map {hook.target} has program {link.program_id} where ours ran, {why}; nothing was "
                "changed",
                link=hook.link,
                map=hook.target,
                programs=[link.program_id],
            )
        with Program.by_id(link.program_id) as program:
            taken = msgspec.structs.replace(hook, adopted=program.info.name)
        return self._with_strays(taken, place, current)

    def _detached(self, hook: HookPlan, link: LinkInfo, current: Generation) -> HookPlan:
        strays = self._strays(hook, MapPlace(link.target_id, link.attach_type))
        if changed := self._changed(strays, current):
            raise UnsupportedError(
                f"release {self._release} has no hook {hook.link} and changes {', '.join(changed)}, which sockets that "
                f"run program {_ids(strays)} go on using until they close: leave those maps as they are in the release "
                "that takes the hook off",
                feature="socket hook taken off a changed map",
                link=hook.link,
                maps=changed,
            )
        keep = f"taken off; sockets that run program {_ids(strays)} keep it until they close"
        return msgspec.structs.replace(hook, method=keep if strays else "")

    def _with_strays(self, hook: HookPlan, place: MapPlace, current: Generation) -> HookPlan:
        strays = self._strays(hook, place)
        if not strays:
            return msgspec.structs.replace(hook, method=_METHOD)
        changed = self._changed(strays, current)
        sockets = f"sockets that run program {_ids(strays)}"
        if not changed:
            return msgspec.structs.replace(
                hook, method=f"{_METHOD}; {sockets} keep it until they close: all its maps stay"
            )
        if redirecting := self._redirecting(strays, place, current):
            raise UnsupportedError(
                f"hook {hook.link}: {sockets}, and would have to be handed over, since not all its maps stay "
                f"({', '.join(changed)}); but program {_ids(redirecting)} may redirect to sockets of map "
                f"{hook.target}, and what is sent to one in that moment would fail: keep the definitions of those maps "
                "in this release, which new sockets then get, and change them in one after those connections have "
                "ended",
                feature="handing over sockets that are redirected to",
                link=hook.link,
                maps=changed,
            )
        how = (
            f"{sockets} are handed over one by one, since not all its maps stay ({', '.join(changed)}); a message sent "
            "on one in the microseconds of that passes without a program"
        )
        return msgspec.structs.replace(hook, handed=True, method=f"{_METHOD}; {how}")

    def _strays(self, hook: HookPlan, place: MapPlace) -> set[int]:
        """The programs that sockets in the map run, or get, and that are no dispatcher to the hook's slots."""
        there = SocketHook(place, slot_of(self._node.links, hook.was or hook.link), self._node.root)
        direct = {there.program_id} - {0} if there.program_id == there.info.program_id else set()
        return direct | set(there.strays().values())

    def _redirecting(self, strays: Collection[int], place: MapPlace, current: Generation) -> list[int]:
        """Programs that may look for sockets in the map, which their kind does for nothing else."""
        own = {one.id for one in current.programs.values() if one.type in ("sk_msg", "sk_skb")}
        return [number for number in own | set(strays) if place.map_id in _maps_of(number)]

    def _changed(self, programs: Collection[int], current: Generation) -> list[str]:
        """Maps of the running release that these programs use and that do not stay."""
        used = {number for program in programs for number in _maps_of(program)}
        kept = {entry.was or entry.name for entry in self._maps.values() if entry.action == "keep"}
        return [
            name
            for name, live in current.maps.items()
            if live.info.id in used and name not in kept and not is_constant(live.spec)
        ]

    def _refuse(self, hook: HookPlan, changed: bool) -> None:
        if (self._by_connection or changed) and hook.link not in self._adopting and self._lacks_links:
            raise UnsupportedError(
                f"hook {hook.link} ({hook.hook}) is on map {hook.target} without a link, since this kernel has none "
                "for maps of sockets, as Linux 6.10 and later have: so the map cannot become another one, and no "
                "connection can keep to its release; keep the definition of the map, and leave out "
                'consistency = "connection"',
                feature=SOCKMAP_LINK,
                link=hook.link,
                map=hook.target,
            )
        if self._by_connection:
            raise UnsupportedError(
                f"hook {hook.link} is adopted from another tool, whose program knows of no connections: leave out "
                'consistency = "connection" in this upgrade',
                feature="adopting by connection",
                link=hook.link,
            )
        if changed:
            raise UnsupportedError(
                f"hook {hook.link} ({hook.hook}) is on map {hook.target} without a link, since another loader attaches "
                "its program there, and the map would become another one, in which its sockets cannot get that "
                "program: keep the definition of the map, or give the new map and its hook names of their own",
                feature="adopted socket hook on a changed map",
                link=hook.link,
                map=hook.target,
            )


def _links_of(place: MapPlace) -> list[int]:
    """The links that hold a program there."""
    wanted = "sockmap", place.map_id, place.attach_type
    return [link.id for link in all_links() if (link.type, link.target_id, link.attach_type) == wanted]


def _maps_of(number: int) -> frozenset[int]:
    """The maps that a program uses; none if its last socket has closed meanwhile, and it is gone."""
    try:
        with Program.by_id(number) as program:
            return frozenset(program.map_ids)
    except KernelError as error:
        if error.facts["errno"] != errno.ENOENT:
            raise
        return frozenset()


def _ids(programs: Collection[int]) -> str:
    return " and ".join(map(str, sorted(programs)))
