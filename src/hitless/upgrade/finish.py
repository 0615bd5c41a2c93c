"""What follows a commit: the old release leaves its last hooks, and becomes the one to go back to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from hitless.kernel.barrier import wait_for_running_programs
from hitless.kernel.bpffs import make_directory, move, remove_tree
from hitless.kernel.maps import Map, is_alive
from hitless.kernel.programs import Program, is_loaded
from hitless.upgrade.attached import open_attached, remove, rename
from hitless.upgrade.cutover import detach_hooks
from hitless.upgrade.model import Hook, Record
from hitless.upgrade.moving import come_along
from hitless.upgrade.node import Node, read_generation
from hitless.upgrade.pace import Pace
from hitless.upgrade.passages import Sides, make_carriers
from hitless.upgrade.public import hold_link, keep_leading, publish
from hitless.upgrade.record import map_pin, read_record, write_record
from hitless.upgrade.steps import in_step

__all__ = ["finish", "pin_as_noted"]


@in_step("clean-up")
def finish(node: Node) -> None:
    """Everything that follows a commit; may be repeated."""
    record = read_record(node.current / "record")
    keep_leading(node, record)
    if node.next.exists():
        _let_go(node, record)
        remove_tree(node.previous)
        move(node.next, node.previous)
    for generation in (node.current, node.previous):
        remove_tree(generation / "base")
        remove_tree(generation / "adopted")
    if record.public is not None:
        pin_as_noted(node, record)
    planned = record.plan.hooks if record.plan else ()
    for hook in planned:
        if hook.was:
            hold_link(node, record, hook.was)
            rename(node.links, hook.was, hook.link)
    come_along([hook for hook in planned if hook.moved], node.links, node.current / "links")
    hooks = _without_gone(node, record.hooks)
    last = node.previous / "record"
    publish(node, msgspec.structs.replace(record, hooks=hooks), read_record(last) if last.exists() else None)
    committed = msgspec.structs.replace(record, phase="committed", plan=None, former=None, hooks=hooks)
    write_record(node.current / "record", committed)


def pin_as_noted(node: Node, record: Record) -> None:
    """Let each pin be what the record of the running release has, if that still lives; each is replaced in one step."""
    beside = node.current / "adopted"  # which every clean-up removes
    programs = {node.current / "progs" / name: noted.id for name, noted in record.pinned_programs.items()}
    maps = {map_pin(node.current, name): noted.id for name, noted in record.pinned_maps.items()}
    wanted: list[tuple[type[Map] | type[Program], Path, int]] = []
    wanted += [(Program, path, number) for path, number in programs.items() if is_loaded(number)]
    wanted += [(Map, path, number) for path, number in maps.items() if is_alive(number)]
    for kind, path, number in wanted:
        if not path.exists():
            continue
        with kind.open(path) as there, kind.by_id(number) as noted:
            if there.info.id != number:
                make_directory(beside, exist_ok=True)
                remove_tree(beside / path.name)
                noted.pin(beside / path.name)
                move(beside / path.name, path)
    remove_tree(beside)


def _without_gone(node: Node, hooks: Sequence[Hook]) -> tuple[Hook, ...]:
    """Those hooks that are there, of which patterns led to some; pins of the others go."""
    there = []
    for hook in hooks:
        pin = node.links / hook.link
        if hook.matched:
            if not pin.exists():
                continue
            with open_attached(node.links, hook.link) as link:
                dead = link.info.is_dead
            if dead:
                remove(node.links, hook.link)
                continue
        there.append(hook)
    return tuple(there)


def _let_go(node: Node, record: Record) -> None:
    """Take the old release off the hooks that the new one has not, and bring along what it wrote there until now.

    Not before the commit, since an upgrade that is taken back wants them as they were, without a gap. The maps that
    those programs cannot write stay out: others may have written the new ones meanwhile.
    """
    gone = {hook.link for hook in record.plan.hooks if hook.action == "detach"} if record.plan else set()
    if not gone:
        return
    detach_hooks(sorted(gone), node.links)
    old = read_generation(node.next)
    wait_for_running_programs(old.record.may_sleep)
    used: set[int] = set()
    for hook in old.record.hooks:
        if hook.link in gone and hook.hook != "struct_ops":  # the maps that those write are kept
            with Program.open(node.next / "progs" / hook.program) as program:
                used |= program.map_ids
    written = {name for name, live in old.maps.items() if live.info.id in used and name not in old.record.unwritten}
    maps = {name: Map.open(map_pin(node.current, name)) for name in record.maps}
    sides = Sides(node.next, node.current, node.access.writing)
    carried = make_carriers(sides, record, maps, old, Pace(), fresh=False)
    for entry in record.plan.maps if record.plan else ():
        if entry.action == "convert" and (entry.kind == "variables" or not written.isdisjoint(entry.olds)):
            carried[entry.name].catch_up(last=True)
