"""Attaching something to a hook for the first time, each kind in its own way, and pinning what holds it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hitless.errors import GoneError, KernelError
from hitless.hooks import HOOKS
from hitless.kernel.bpffs import make_directory
from hitless.kernel.cgroups import CgroupPlace
from hitless.kernel.dispatcher import Dispatcher, jump_for
from hitless.kernel.filters import Direction, Filter, free_place
from hitless.kernel.interfaces import Interface, interfaces
from hitless.kernel.libbpf import system_call
from hitless.kernel.links import Link
from hitless.kernel.map_places import MapPlace
from hitless.kernel.maps import Map
from hitless.kernel.namespaces import Namespace, entered
from hitless.kernel.netfilter import attach_netfilter
from hitless.kernel.programs import Program
from hitless.kernel.tracing import attach_event, attach_probe, attach_raw_tracepoint, attach_tracepoint
from hitless.kernel.xdp import Mode, Xdp
from hitless.upgrade.attached import Attached, open_attached, remove, slot_of
from hitless.upgrade.model import HookPlan
from hitless.upgrade.notes import Where, note, noted, read_note
from hitless.upgrade.places import file_of
from hitless.upgrade.socket_hooks import SocketHook, give_all

__all__ = ["adopt", "attach"]

_XDP_MODES = {"generic": 2, "native": 4}  # XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE


def attach(hook: HookPlan, program: Program, links: Path, maps: Path) -> None:
    """Attach the program and pin what holds it; ``maps`` has the pins of the release's maps.

    Raises GoneError if the target is not what it was when this was planned, NodeError, KernelError.
    """
    pin = links / hook.link
    match HOOKS[hook.hook].on:
        case "map":
            with Map.open(maps / hook.target) as held:
                if hook.unlinked:
                    place = MapPlace(held.info.id, hook.attach_type)
                    note(pin, place)
                    taken = SocketHook(place, slot_of(links, hook.link), links.parent)
                    taken.take(program)
                    give_all(held, hook.attach_type, taken.program_id)
                else:
                    _attach_dispatcher(held, hook, program, links)
            return
        case "interface" if not HOOKS[hook.hook].linked:
            _attach_noted(hook, program, pin)
            return
        case "interface":
            link = _attach_interface(hook, program)
        case "kernel" if hook.hook == "iter":
            link = Link.iterate(program, hook.target)
        case "kernel" if hook.hook == "struct_ops":
            link = Link.attach(program, 0, hook.attach_type, hook.target)
        case "netns" | "kernel" | "cpu" if HOOKS[hook.hook].slot:
            _put_dispatcher(hook, program, links)
            return
        case _ if hook.hook == "iter-cgroup":
            with _opened(Path(hook.target)) as target:
                link = Link.iterate(program, hook.target, target)
        case _:
            with _opened(Path(hook.target)) as target:
                link = Link.attach(program, target, hook.attach_type, hook.target)
    with link:
        link.pin(pin)


@contextmanager
def adopt(hook: HookPlan, links: Path, maps: Path) -> Iterator[Attached]:
    """What another tool attached, under a note of our own from now on; it runs on. Raises as :func:`attach`."""
    pin = links / hook.link
    where = _where(hook, maps)
    if pin.exists() and read_note(pin) != where:
        remove(links, hook.link)  # of an interface that was there before
    if not pin.exists():
        note(pin, where)
    with open_attached(links, hook.link) as there:
        yield there


def _put_dispatcher(hook: HookPlan, program: Program, links: Path) -> None:
    slot = slot_of(links, hook.link)
    make_directory(slot.parent, exist_ok=True)

    def link_to(dispatcher: Program) -> Link:
        if hook.point is not None:
            namespace = Namespace.at(hook.target)
            if namespace.inode != hook.target_id:
                raise GoneError(f"{namespace} is another one than when this was planned; plan again", path=hook.target)
            with entered(namespace):
                return attach_netfilter(dispatcher, hook.point)
        if hook.hook == "perf_event":
            event, period, _ = re.split("[:@]", hook.target)
            return attach_event(dispatcher, event, int(period), hook.target_id - 1)
        if hook.hook == "tracepoint":
            return attach_tracepoint(dispatcher, hook.target)
        if hook.hook in ("uprobe", "uretprobe"):
            path, _ = hook.target.rsplit(":", 1)
            return attach_probe(dispatcher, path, hook.target_id, hook.hook == "uretprobe")
        return attach_raw_tracepoint(dispatcher, hook.target)

    what = f"{hook.attach_type} of {hook.target}" if hook.point else hook.attach_type
    jump = jump_for(hook.hook, hook.target)
    probed = file_of(hook.hook, hook.target) or 0
    with Dispatcher.put(jump, link_to, program, slot, links / hook.link, what, hook.target_id, file=probed):
        pass  # the pins keep it


def _attach_dispatcher(held: Map, hook: HookPlan, program: Program, links: Path) -> None:
    slot = slot_of(links, hook.link)
    make_directory(slot.parent, exist_ok=True)
    with Dispatcher.attach(held, hook.attach_type, program, slot, links / hook.link) as made:
        give_all(held, hook.attach_type, made.program_id)


def _attach_noted(hook: HookPlan, program: Program, pin: Path) -> None:
    interface = _interface(hook)
    if hook.hook != "xdp-netlink":
        direction = _direction(hook)
        in_turn = hook.instead_of is not None
        priority, handle = free_place(interface, direction, hook.priority, hook.handle, in_turn)
        with noted(pin, Filter(interface, direction, priority, handle), program):
            Filter.attach(program, interface, direction, priority, handle)
        return
    # Without a mode the kernel would take the native one where the driver has it; but that is to be noted before.
    modes: tuple[Mode, ...] = ("native", "generic")
    for mode in modes:
        if hook.mode not in (None, mode):
            continue
        try:
            with noted(pin, Xdp(interface, mode), program):
                Xdp.attach(program, interface, mode)
            return
        except KernelError as error:
            if error.facts["errno"] != errno.EOPNOTSUPP or mode in (hook.mode, modes[-1]):
                raise


def _where(hook: HookPlan, maps: Path) -> Where:
    if HOOKS[hook.hook].on == "map":
        with Map.open(maps / hook.target) as held:
            return MapPlace(held.info.id, hook.attach_type)
    if hook.hook == "cgroup":
        return CgroupPlace(hook.target, hook.target_id, hook.attach_type)
    interface = _interface(hook)
    if hook.hook == "xdp-netlink":
        return Xdp(interface, "generic" if hook.mode == "generic" else "native")
    return Filter(interface, _direction(hook), hook.priority, hook.handle)


def _direction(hook: HookPlan) -> Direction:
    return "egress" if hook.hook == "tc-egress" else "ingress"


def _interface(hook: HookPlan) -> Interface:
    namespace = Namespace.at(hook.netns or "")
    for interface in interfaces("*", namespace):
        if interface.index == hook.target_id:
            return interface
    raise GoneError(
        f"interface {hook.target} of {namespace} with the index {hook.target_id} that it had when this was planned is "
        "gone: it was removed, or another made in its place; plan again",
        interface=hook.target,
        index=hook.target_id,
        namespace=namespace.path,
    )


def _attach_interface(hook: HookPlan, program: Program) -> Link:
    interface = _interface(hook)
    flags = _XDP_MODES[hook.mode] if hook.mode else 0
    with interface.entered():
        return Link.attach(program, interface.index, hook.attach_type, interface, flags)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    with system_call("open", path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
