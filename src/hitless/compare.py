"""Comparing two releases from their files: what changed, what would be lost, and what a person should do about it.

Pure: any OS, no root, no libbpf, so that it can judge a pull request.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from hitless.carry import SectionWay, converts, fold_obstacles, losses, obstacle, refusals, section_way
from hitless.errors import BundleError
from hitless.groups import group_of, torn
from hitless.layout.answers import answer
from hitless.layout.diff import MapDiff, diff_maps, is_constant, phrases
from hitless.layout.dwarf import Dwarf
from hitless.layout.model import MapSpec
from hitless.layout.rules import MapRules
from hitless.layout.variables import diff_sections
from hitless.sources import Source, read_source

__all__ = ["Comparison", "Judged", "compare", "compare_sources"]

# From best to worst; an added map loses nothing.
_ORDER = ("identical", "added", "lossless", "lossy", "removed", "needs-converter", "not-carried", "unknown")
_FEW = 3  # maps whose options a sentence can hold
_GONE = ("removed", "needs-converter", "not-carried", "unknown")


class Judged(msgspec.Struct, frozen=True):
    """One map: how it differs, both its definitions, and what an upgrade would lose of it.

    ``old`` is None for an added map, for one that several were folded into, and for a section whose variables were all
    in others; ``new`` for a removed one.
    ``losses`` is empty if all its state survives; ``whole`` says that the loss is every entry. ``allowed`` says that
    somebody accepted that, by an option or by ``on_loss = "discard"``. ``note`` is what this version cannot keep though
    the layout did not change.
    """

    diff: MapDiff
    old: MapSpec | None
    new: MapSpec | None
    losses: tuple[str, ...] = ()
    whole: bool = False
    allowed: bool = False
    note: str | None = None

    @property
    def name(self) -> str:
        """Its name in the new release, or in the old one if it was removed."""
        return self.diff.name

    @property
    def changed(self) -> bool:
        """Whether there is anything to show about it."""
        return self.diff.verdict != "identical" or bool(self.diff.changes)


class Comparison(msgspec.Struct, frozen=True):
    """What changed from ``old`` to ``new``, map by map; ``verdict`` is the worst of the maps' verdicts."""

    old: Source
    new: Source
    verdict: str
    maps: tuple[Judged, ...]

    @property
    def lost(self) -> tuple[Judged, ...]:
        """Maps that would lose something that nobody accepted."""
        return tuple(item for item in self.maps if item.losses and not item.allowed)

    @property
    def sentence(self) -> str:
        """The conclusion, and what to do, in one sentence."""
        if lost := self.lost:
            return f"An upgrade would lose {_listed(lost)}: {_advice(lost)}."
        accepted = [item for item in self.maps if item.losses]
        if accepted:
            return f"An upgrade loses {_listed(accepted)}, which is accepted; all other state survives."
        if self.verdict == "identical":
            return "The maps are the same: an upgrade keeps them as they are."
        return "All state survives the upgrade."

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints: the documented keys, as plain values."""
        maps = []
        for item in self.maps:
            facts: dict[str, Any] = msgspec.to_builtins(item.diff)
            maps.append({**facts, "losses": list(item.losses), "allowed": item.allowed, "note": item.note})
        return {
            "schema": 1,
            "old": self.old.path,
            "new": self.new.path,
            "verdict": self.verdict,
            "survives": not self.lost,
            "summary": self.sentence,
            "maps": maps,
        }


def compare(old: str, new: str, allow_loss: Collection[str] = (), types: Dwarf | None = None) -> Comparison:
    """Compare the maps of two sources under the rules of the new one; ``allow_loss`` names maps that may lose state.

    ``types`` are for maps of objects that carry none, as in :func:`hitless.sources.read_source`.

    Raises HitlessError by kind: BundleError also for an allowed loss of a map that neither side has.
    """
    return compare_sources(read_source(old, types), read_source(new, types), allow_loss)


def compare_sources(before: Source, after: Source, allow_loss: Collection[str] = ()) -> Comparison:
    """The same of sources that were read."""
    if before.kind == after.kind == "pinned map" and set(before.maps) != set(after.maps):
        # Two pinned maps are compared with each other, whatever they are called.
        (spec,) = before.maps.values()
        (name,) = after.maps
        before = msgspec.structs.replace(before, maps={name: msgspec.structs.replace(spec, name=name)})
    was, now = _named(before), _named(after)
    for name in allow_loss:
        if name not in was and name not in now:
            known = ", ".join(sorted({*was, *now}))
            raise BundleError(f"--allow-loss {name}: neither side has such a map; there are: {known}", map=name)
    # What is split into others is named, as what is dropped, to say that something of it may go.
    gone = [name for name, rule in after.rules.items() if rule.on_loss == "discard" and name not in now]
    diffs = diff_maps(list(was.values()), list(now.values()), after.rules)
    worst = max((diff.verdict for diff in diffs), key=_ORDER.index, default="identical")
    sections = {
        item.diff.name: section_way(item, was, now, after.rules)
        for item in diff_sections(was.values(), now.values(), after.rules)
    }
    judged = tuple(
        _judge(diff, was, now, after.rules.get(diff.name, MapRules()), (*allow_loss, *gone), sections.get(diff.name))
        for diff in diffs
    )
    return Comparison(before, after, worst, _whole_groups(judged, after.rules))


def _whole_groups(judged: tuple[Judged, ...], rules: Mapping[str, MapRules]) -> tuple[Judged, ...]:
    groups = {
        item.name: group_of(item.old, item.new, rules.get(item.name, MapRules()))
        for item in judged
        if item.diff.verdict != "added"
    }
    gone = {item.name: item.losses[0] for item in judged if item.whole and item.losses}
    reasons = torn(groups, gone)
    return tuple(
        msgspec.structs.replace(item, losses=(reasons[item.name], *item.losses), whole=True, note=None)
        if item.name in reasons
        else item
        for item in judged
    )


def _judge(
    diff: MapDiff,
    was: Mapping[str, MapSpec],
    now: Mapping[str, MapSpec],
    rules: MapRules,
    allow_loss: Collection[str],
    section: SectionWay | None,
) -> Judged:
    before = None if diff.verdict == "added" else was.get(diff.was or diff.name)
    after = None if diff.verdict == "removed" else now[diff.name]
    allowed = rules.on_loss == "discard" or diff.name in allow_loss or diff.was in allow_loss
    lost: tuple[str, ...] = ()
    if section is not None:
        whole = bool(section.losses) and not section.parts
        return Judged(diff, before, after, section.losses, whole, allowed)
    if diff.parts and after is not None:
        gone = tuple(f"all entries: {reason}" for reason in fold_obstacles(diff, was, after, rules))
        note = "the functions of its converters were not run" if converts(diff, rules) and not gone else None
        return Judged(diff, None, after, gone or tuple(phrases(losses(diff, rules))), bool(gone), allowed, note)
    by_user = converts(diff, rules)
    refused = refusals(diff, after, rules) if after is not None else ()
    note, whole = None, diff.verdict in _GONE and not by_user
    constant = is_constant(before or after or now[diff.name])
    if diff.verdict == "identical" and before is not None and not constant:
        note = _not_kept(before)
    elif refused and not constant:
        lost, whole = tuple(f"all entries: {reason}" for reason in refused), True
    elif (
        before is not None and after is not None and not constant
        and (diff.verdict in ("lossless", "lossy") or by_user)
    ):  # fmt: skip
        lost = tuple(phrases(losses(diff, rules))) if diff.verdict != "lossless" else ()
        if by_user:
            note = f"its entries are converted by {rules.convert}, which was not run"
        missing = obstacle(before, after, rules)
        if missing is not None:
            lost, whole, note = (f"all entries: {missing}", *lost), True, None
    elif diff.verdict == "removed" and not constant:
        lost = tuple(change.loss for change in diff.changes if change.loss)
    elif diff.verdict == "not-carried" and not any(change.loss for change in diff.changes):
        whole = False
        note = "; ".join(change.reason for change in diff.changes if change.reason)
    elif whole and not constant:
        reasons = dict.fromkeys(change.reason for change in diff.changes if change.reason)
        lost = tuple(f"all entries: {reason}" for reason in reasons) or (f"all entries: {diff.verdict}",)
    return Judged(diff, before, after, lost, whole and bool(lost), allowed, note)


def _not_kept(spec: MapSpec) -> str | None:
    return answer(spec.type).words if answer(spec.type).anew else None


def _named(source: Source) -> dict[str, MapSpec]:
    return {name: msgspec.structs.replace(spec, name=name) for name, spec in source.maps.items()}


def _listed(items: Collection[Judged]) -> str:
    cut = [item.name for item in items if not item.whole]
    gone = [item.name for item in items if item.whole]
    words = []
    if cut:
        words.append(f"some of {', '.join(cut)}")
    if gone:
        words.append(f"all of {', '.join(gone)}")
    return " and ".join(words)


def _advice(items: Collection[Judged]) -> str:
    """What a person can do, the most useful first."""
    verdicts = {item.diff.verdict for item in items}
    few = len(items) <= _FEW
    options = " ".join(f"--allow-loss {item.name}" for item in items) if few else "--allow-loss MAP for each of them"
    hints = " ".join(change.hint or "" for item in items for change in item.diff.changes)
    if "under a new name" in hints:
        first = "name what was renamed (hitless:was)"
    elif "old release's objects" in hints:
        first = "compare with the old release's objects instead of a snapshot that does not tell"
    elif "unknown" in verdicts:
        first = "bind types to the maps whose layout is unknown"
    elif verdicts == {"removed"}:
        first = "keep the map or say what it is called now (was)"
    else:
        first = "give the old contents a place in the new layout"
    return f"{first}, or accept the loss with {options}"
