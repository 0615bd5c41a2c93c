"""The hooks of a manifest: its ``[[attach]]`` entries, read and checked against what the objects hold. Pure."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, NoReturn, Protocol

import msgspec

from hitless.errors import UnsupportedError
from hitless.hooks import EVENTS, FAMILIES, HOOKS, POINTS, REFUSED, NetfilterPoint
from hitless.layout.model import MapSpec, ProgramSpec

__all__ = ["ATTACH_KEYS", "ATTACH_NEEDS", "ONE_MAP_ITERATORS", "Attach", "Lines", "check_links", "read_attach"]

ATTACH_KEYS: dict[str, type | tuple[type, ...]] = {
    "program": str, "hook": str, "target": str, "link": str, "was": str, "netns": str, "mode": str, "by": str,
    "family": str, "point": str, "priority": int, "handle": int, "adopt": (bool, str),
    "pin": str,
}  # fmt: skip
"""What an entry may say, with the types."""

ATTACH_NEEDS = ("program", "hook", "target", "link")
"""What an entry has to say."""

ONE_MAP_ITERATORS = ("bpf_map_elem", "bpf_sk_storage_map", "sockmap")
"""What iterators that hitless refuses iterate over."""
_PRIORITIES = range(-(1 << 31) + 1, (1 << 31) - 1)  # the first and the last are the kernel's own
_HOOKS = tuple(name for name in HOOKS if name != "xdp-netlink")
_SOCKET_MAPS = ("sockmap", "sockhash")
_MODES = ("native", "generic")
_PIN_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Attach(msgspec.Struct, frozen=True):
    """One ``[[attach]]``: ``program`` runs on ``hook`` of ``target``, its link pinned as ``links/<link>``.

    ``target`` and ``netns``, the network namespace of an interface, may be patterns: then there are as many links as
    things that match. ``mode`` is how XDP is to run, native or generic; None lets the kernel decide. ``point`` is where
    a netfilter program runs. ``priority`` and ``handle`` are those of a tc filter; 0 is one that is free. ``adopt``
    lets it take the place of a program that another tool attached; ``only`` there, where that is of the same name.
    ``instead_of`` is the hook that the manifest names, if this kernel has none like it.
    """

    program: str
    hook: str
    target: str
    link: str
    was: str | None = None
    netns: str | None = None
    mode: str | None = None
    point: NetfilterPoint | None = None
    priority: int = 0
    handle: int = 0
    adopt: bool = False
    only: bool = False
    instead_of: str | None = None

    def attach_type(self, program: ProgramSpec) -> str:
        """What the kernel says of a link for ``program`` here, as in LinkInfo."""
        if self.point is not None:
            return f"netfilter {self.point}"
        match self.hook:
            case "iter" | "tracepoint":
                return f"{self.hook} {self.target.rpartition('/')[2]}"
            case "iter-cgroup":
                return "iter cgroup"
            case "perf_event" | "uprobe" | "uretprobe":
                return f"{self.hook} {self.target.rpartition(':')[0]}"
            case "raw_tracepoint" | "tp_btf":
                return f"raw_tracepoint {self.target}"
        return HOOKS[self.hook].attach_type(program)

    @property
    def is_pattern(self) -> bool:
        """Whether any number of interfaces, of network namespaces or of CPUs may match."""
        if HOOKS[self.hook].on == "cpu":
            return True
        texts = (self.target, self.netns or "") if HOOKS[self.hook].on in ("interface", "netns") else ()
        return any(sign in text for sign in "*?[" for text in texts)


class Lines(Protocol):
    """A manifest that knows the line of each key."""

    def where(self, path: tuple[str, ...]) -> str:
        """File and line of the key at ``path``, or of the nearest table around it."""

    def fail(self, path: tuple[str, ...], why: str) -> NoReturn:
        """Raise BundleError about the key at ``path``."""

    def substitute(self, text: str, path: tuple[str, ...]) -> str:
        """``text``, which is at ``path``, with variables filled in. Raises BundleError."""


def read_attach(
    entry: Any, programs: Mapping[str, ProgramSpec], maps: Mapping[str, MapSpec], path: tuple[str, ...], file: Lines
) -> Attach:
    """The entry at ``path`` of the manifest ``file``, whose keys have the right names and types.

    Raises BundleError, and UnsupportedError by feature, both with file and line.
    """
    if entry["program"] not in programs:
        known = ", ".join(sorted(programs))
        file.fail((*path, "program"), f"no object has a program {entry['program']}; there are: {known}")
    hook = entry["hook"]
    if hook in REFUSED:
        raise UnsupportedError(
            f"{file.where((*path, 'hook'))}: hook {hook} is not supported: {REFUSED[hook]}", feature=f"hook {hook}"
        )
    if hook not in _HOOKS:
        file.fail((*path, "hook"), f"unknown hook {hook!r}; known: {', '.join(_HOOKS)}")
    if "by" in entry:
        if (hook, entry["by"]) != ("xdp", "netlink"):
            file.fail((*path, "by"), f'by is "netlink", for xdp only, or left out, not {entry["by"]!r} for {hook}')
        hook = "xdp-netlink"
    program = programs[entry["program"]]
    if not program.autoload:
        why = f"{program.name} (section {program.section}) is left out: by skip = true, or by the ? before its section"
        file.fail((*path, "program"), why)
    if HOOKS[hook].slot and program.may_sleep:
        # The kernel takes it into the slot, and lets it sleep where the dispatcher must not.
        raise UnsupportedError(
            f"{file.where((*path, 'program'))}: {program.name} (section {program.section}) may sleep, and the "
            f"dispatcher that {hook} is replaced by may not: only programs that do not sleep are supported there",
            feature=f"sleepable programs on {hook}",
        )
    if hook == "struct_ops" and not HOOKS[hook].fits(program):
        there = ", ".join(one.name for one in programs.values() if HOOKS[hook].fits(one)) or "none"
        file.fail(
            (*path, "program"),
            f"{program.name} (section {program.section}) is no struct_ops map: name the variable in "
            f".struct_ops.link that holds the programs; there are: {there}",
        )
    if not HOOKS[hook].fits(program):
        typed = f"what a program of type {program.type} does" if program.type else "nothing that libbpf knows"
        what = program.attach_type or typed
        wanted = f"a {HOOKS[hook].on}" if hook == "cgroup" else hook
        file.fail(
            (*path, "program"), f"{program.name} (section {program.section}) attaches to {what}, not to {wanted}"
        )
    if HOOKS[hook].on == "map" and (entry["target"] not in maps or maps[entry["target"]].type not in _SOCKET_MAPS):
        there = ", ".join(sorted(name for name, spec in maps.items() if spec.type in _SOCKET_MAPS)) or "none"
        file.fail((*path, "target"), f"{hook} is on a sockmap or sockhash of this bundle, which has: {there}")
    if "netns" in entry and HOOKS[hook].on != "interface":
        file.fail((*path, "netns"), f"netns says where an interface is, and {hook} is on a {HOOKS[hook].on}")
    if "mode" in entry and (not hook.startswith("xdp") or entry["mode"] not in _MODES):
        file.fail((*path, "mode"), f"mode is {' or '.join(_MODES)}, and for xdp only, not {entry['mode']!r}")
    _check_section(entry, program, path, file)
    _check_numbers(entry, path, file)
    if isinstance(entry.get("adopt"), str) and entry["adopt"] != "only":
        file.fail((*path, "adopt"), f'adopt is true, false or "only", not {entry["adopt"]!r}')
    if entry.get("adopt") == "only" and HOOKS[hook].on == "map":
        file.fail((*path, "adopt"), f'"only" is for places of which some have the hook, and {hook} has one: say true')
    if entry.get("adopt") and hook != "cgroup" and HOOKS[hook].on != "map" and HOOKS[hook].linked:
        file.fail(
            (*path, "adopt"),
            f"{hook} is attached by a link, which takes no other program's place: adopt is for cgroup, "
            'tc-ingress, tc-egress, sk_msg, sk_skb, and xdp with by = "netlink"',
        )
    if "pin" in entry and (not HOOKS[hook].linked or HOOKS[hook].slot or HOOKS[hook].on in ("map", "cpu")):
        file.fail((*path, "pin"), f"pin is where another loader pins the link, and {hook} has none that it could pin")
    for key in ("link", "was"):
        if key in entry and not _PIN_NAME.fullmatch(entry[key]):
            file.fail((*path, key), f"{entry[key]!r} cannot be a pin name: letters, digits, _ and - only")
    made = Attach(
        program=entry["program"],
        hook=hook,
        target=file.substitute(entry["target"], (*path, "target")),
        link=entry["link"],
        was=entry.get("was"),
        netns=file.substitute(entry["netns"], (*path, "netns")) if "netns" in entry else None,
        mode=entry.get("mode"),
        point=_point(entry, path, file),
        priority=0 if hook == "netfilter" else entry.get("priority", 0),
        handle=entry.get("handle", 0),
        adopt=bool(entry.get("adopt", False)),
        only=entry.get("adopt") == "only",
    )
    if "pin" in entry and made.is_pattern:
        file.fail((*path, "pin"), "pin is the place of one link, and a pattern leads to several")
    return made


def _check_section(entry: Any, program: ProgramSpec, path: tuple[str, ...], file: Lines) -> None:
    """What a program's section says of tracepoints and iterators is what it attaches to."""
    hook, (kind, _, own) = entry["hook"], program.section.partition("/")
    if hook == "perf_event":
        event, _, period = entry["target"].partition(":")
        if event not in EVENTS or not re.fullmatch(r"[1-9][0-9]{0,17}", period):
            file.fail(
                (*path, "target"),
                f"{entry['target']!r} is no event to sample: EVENT:PERIOD, where EVENT is {', '.join(EVENTS)}",
            )
    if HOOKS[hook].program == "kprobe":
        if kind != hook:
            file.fail((*path, "program"), f"{program.name} (section {program.section}) is no {hook}")
        if not re.fullmatch(r".+:\w+", entry["target"]):
            file.fail((*path, "target"), f"{entry['target']!r} is no function of a file: /PATH:FUNCTION")
        return
    if hook.startswith("iter") and own in ONE_MAP_ITERATORS:
        raise UnsupportedError(
            f"{file.where(path)}: {program.name} iterates over {own}: iterators over one map are not supported",
            feature=f"iter/{own}",
        )
    if hook == "iter-cgroup" or (hook == "iter" and own == "cgroup"):
        if (hook, own) != ("iter-cgroup", "cgroup"):
            file.fail((*path, "hook"), f"{hook} is not for {program.name} (section {program.section})")
    elif HOOKS[hook].on == "kernel" and own not in ("", entry["target"]):
        file.fail(
            (*path, "target"), f"{program.name} is for {own} (section {program.section}), not for {entry['target']}"
        )


def _point(entry: Any, path: tuple[str, ...], file: Lines) -> NetfilterPoint | None:
    if entry["hook"] != "netfilter":
        for key in ("family", "point"):
            if key in entry:
                file.fail((*path, key), f"{key} says where a netfilter program runs, not one of {entry['hook']}")
        return None
    known: dict[str, tuple[Container[object], str]] = {
        "family": (FAMILIES, ", ".join(FAMILIES)),
        "point": (POINTS, ", ".join(POINTS)),
        "priority": (_PRIORITIES, f"{_PRIORITIES[0]} to {_PRIORITIES[-1]}"),
    }
    for key, (values, wanted) in known.items():
        if key not in entry:
            file.fail(path, f"netfilter needs {key}: {wanted}")
        if entry[key] not in values:
            file.fail((*path, key), f"{key} is {wanted}, not {entry[key]!r}")
    return NetfilterPoint(*(entry[key] for key in known))


def _check_numbers(entry: Mapping[str, Any], path: tuple[str, ...], file: Lines) -> None:
    if entry["hook"] == "netfilter":
        return  # whose priority is another thing
    for key, most in (("priority", 0xFFFF), ("handle", 0xFFFFFFFF)):
        if key in entry and not (entry["hook"].startswith("tc-") and 0 < entry[key] <= most):
            file.fail((*path, key), f"{key} is a number from 1 to {most}, of a tc filter, not {entry[key]}")
    if "handle" in entry and "priority" not in entry:
        file.fail((*path, "handle"), "a handle tells filters of one priority apart: give the priority too")


def check_links(attach: Iterable[Attach], file: Lines) -> None:
    """Raise BundleError if two entries have one link."""
    seen = set()
    for index, entry in enumerate(attach):
        if entry.link in seen:
            file.fail(("attach", str(index), "link"), f"two [[attach]] have the link {entry.link}")
        seen.add(entry.link)
