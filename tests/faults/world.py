"""A small mesh under traffic, and what must be so after every fault: nobody failed, and all books agree.

Two releases differ in the layout of every map: a hash and a per-CPU array that count connects, a table of a control
plane, and a global. The older one has a hook more, which counts sockets. Clients on each CPU count their own connects,
a control plane in a process of its own keeps a journal.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

import hitless
from hitless.errors import KernelError
from hitless.kernel import iterators
from hitless.kernel.bpffs import remove_tree
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program
from hitless.upgrade import transaction, verify
from hitless.upgrade.model import Record
from meshd.demo.lab import Lab
from tests.faults.tracer import Outcome, alone
from tests.releases import compile_object

# Loaded here, so that no child has to do it again: hitless loads the first two when they are used, and libbpf reads the
# types of the kernel, which takes longer than an upgrade.
_ = (transaction, verify, iterators._function("bpf_map_elem"), msgspec.json.Decoder(Record))

__all__ = ["NEW", "OLD", "Broken", "Ground", "Helper", "World"]

OLD, NEW = "1.0", "2.0"
_HOUSE = Path(__file__).parents[2]
_NOWHERE = "10.96.0.20"
_PORT = 7000
_CLIENTS = 2
_SLOWEST = 20.0  # s that a client may take to answer
_GONE = 3.0  # s that the kernel may take to free what nobody holds
_SOCKETS = 0  # key under which the hook that goes counts
_MARK = 999  # key of the entry that the upgrading process itself writes

_LAYOUTS = {
    OLD: """
struct tally { __u32 count TAG("merge=sum"); __u32 last; };
struct limit { __u32 rate; __u32 burst; };
struct seen { __u32 count TAG("merge=sum"); __u32 pad; };
static volatile __u32 total TAG("merge=sum");
""",
    NEW: """
struct tally { __u64 since; __u64 count TAG("merge=sum"); __u32 last; };
struct limit { __u64 class; __u64 rate; __u64 burst; };
struct seen { __u64 first; __u64 count TAG("merge=sum"); __u32 pad; };
static volatile __u64 begun;
static volatile __u64 total TAG("merge=sum");
""",
}

_CODE = """
MAP(X_tally, HASH, 64, __u32, struct tally);
MAP(X_limit, HASH, 64, __u32, struct limit);
MAP(X_seen, PERCPU_ARRAY, 1, __u32, struct seen);

SEC("cgroup/connect4") int X_turn(struct bpf_sock_addr *ctx)
{
    if (ctx->user_ip4 != bpf_htonl(0x0a600014)) // 10.96.0.20, which nobody has
        return 1;
    __u32 port = __builtin_bswap16(ctx->user_port), zero = 0;
    struct tally *found = bpf_map_lookup_elem(&X_tally, &port);
    if (!found) {
        struct tally none = {};
        bpf_map_update_elem(&X_tally, &port, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&X_tally, &port);
    }
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    struct seen *here = bpf_map_lookup_elem(&X_seen, &zero);
    if (here)
        here->count++;
    __sync_fetch_and_add(&total, 1);
    BEGUN
    ctx->user_ip4 = bpf_htonl(0x7f000001);
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""

_GOING = """
SEC("cgroup/sock_create") int X_going(struct bpf_sock *ctx)
{
    __u32 key = 0;
    struct tally *found = bpf_map_lookup_elem(&X_tally, &key);
    if (!found) {
        struct tally none = {};
        bpf_map_update_elem(&X_tally, &key, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&X_tally, &key);
    }
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    return 1;
}
"""

_MANIFEST = """
[bundle]
name = "faults"
version = "{version}"

[[object]]
file = "X.bpf.o"

[[attach]]
program = "X_turn"
hook = "cgroup"
target = "${{cgroup}}"
link = "turn"
"""

_ATTACH_GOING = """
[[attach]]
program = "X_going"
hook = "cgroup"
target = "${{cgroup}}"
link = "going"
"""

_BY_CONNECTION = """
[cutover]
consistency = "connection"
deadline = 0.2
"""

_worlds = itertools.count()
_KINDS: dict[int, type[Map] | type[Program]] = {12: Map, 11: Program}  # by BPF_..._GET_NEXT_ID


class Broken(AssertionError):  # noqa: N818
    """Something is not as it must be."""


class Helper:
    """A process of the world that counts, and answers a line by a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None  # they are pipes
        self._process.stdin.write(f"{command}\n")
        line = self._process.stdout.readline()
        if not line:
            raise Broken(f"a client ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


class Seen(msgspec.Struct):
    """What a look at the node told, in plain values."""

    version: str | None
    problems: list[str]
    paths: list[str]
    strays: list[str]
    tally: dict[int, int]
    seen: int
    total: int
    limits: dict[int, list[int]]
    going: list[int]


class Ground:
    """A node in ``lab`` whose pin root is made anew by ``begin``, and what any world does with it."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        # In the name of every map and program, so that they can be told from those of other tests.
        self._tag = "f" + _base36(os.getpid()) + _base36(next(_worlds))
        self._older = {command: max(_ids(command), default=0) for command in _KINDS}
        self._number = 0
        self.allowed: tuple[str, ...] = ()
        self.node = hitless.Node(lab.bpffs / "none")

    def _new_root(self) -> None:
        if self._number:
            alone(lambda: remove_tree(self.node.root))
        self._number += 1
        self.node = hitless.Node(self._lab.bpffs / f"{self._tag}root{self._number}")

    def about_to_write(self) -> None:
        """The next upgrade is about to begin."""

    def do(self, work: Callable[[], object]) -> Outcome:
        """Do ``work`` in a process of its own and say how it ended."""
        return alone(work) or Outcome(message="it was killed by something else, or took too long", crashed=True)

    def must(self, work: Callable[[], object]) -> Outcome:
        """The same; it must not fail."""
        outcome = self.do(work)
        if outcome.failed:
            raise Broken(outcome.message)
        return outcome

    def unsettled(self) -> bool:
        """Whether an upgrade is left that somebody has to finish or undo."""
        return bool(self.must(self._unsettled).value)

    def _unsettled(self) -> bool:
        state = self.node.observe()
        phase = state.current.record.phase if state.current is not None else "committed"
        return state.unfinished is not None or state.litter or phase != "committed"

    def _left_behind(self) -> list[str]:
        """What is under the root and belongs to no generation and no hook."""
        node = self.node
        known = {"current", "previous", "links", "slots", "board", "writers", "maps", "progs"}
        tops = [path for path in node.root.iterdir() if path.name not in known]
        scratch = [path for one in ("current", "previous") for path in (node.root / one).glob("ba[sc]*")]
        paths = [*tops, *(path for path in scratch if any(path.iterdir()) or path.name == "back")]
        paths += [path for one in ("current", "previous") for path in (node.root / one).glob("adopted/*")]
        paths += [path for path in node.root.glob("slots/*") if not (node.links / path.name).exists()]
        board = (path for part in ("dispatchers", "slots") for path in node.root.glob(f"board/{part}/*"))
        paths += [path for path in board if not _has_hook(node, path.name)]
        return [str(path) for path in paths]

    def _strays(self) -> list[str]:
        """Maps and programs of ours that are alive and not pinned in either generation."""
        until = time.monotonic() + _GONE
        while True:
            strays = list(self._unpinned())
            if not strays or time.monotonic() > until:
                return strays
            time.sleep(0.002)

    def _unpinned(self) -> Iterator[str]:
        pinned = set()
        for generation in (self.node.current, self.node.previous):
            for room, kind in (("maps", Map), ("data", Map), ("progs", Program)):
                for path in (generation / room).iterdir() if (generation / room).exists() else ():
                    with kind.open(path) as held:
                        pinned.add((kind, held.info.id))
        for command, kind in _KINDS.items():
            for number in _ids(command, self._older[command]):
                try:
                    with kind.by_id(number) as held:
                        if self._tag in held.info.name and (kind, number) not in pinned:
                            yield f"{kind.__name__.lower()} {number} {held.info.name}"
                except KernelError:
                    continue  # gone meanwhile

    def _helper(self, module: str, group: str, *args: str) -> Helper:
        command = [sys.executable, "-m", f"tests.faults.{module}", *args]
        pipe = subprocess.PIPE
        return Helper(self._lab.popen(command, group, stdin=pipe, stdout=pipe, cwd=_HOUSE))


class World(Ground):
    """A node that runs release OLD or NEW, with clients; checks raise Broken.

    With ``by_connection`` each connection keeps to the release that it began with.
    """

    def __init__(self, lab: Lab, by_connection: bool = False) -> None:
        super().__init__(lab)
        self._by_connection = by_connection
        self._base: list[int] = []
        self.bundles = {version: self._bundle(version) for version in _LAYOUTS}
        self._mark = [0, 0]  # what was in the entry _MARK when it was looked at, and the last that was to be written
        self._sockets = 0
        self._failures: list[int] = []
        self._clients = [
            self._helper("client", "clients", str(number), _NOWHERE, str(_PORT + number)) for number in range(_CLIENTS)
        ]
        self._writer = self._helper("writer", "outside", self.limit, "1")

    def __enter__(self) -> World:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._pause()
        self.do(lambda: hitless.unload(self.node))

    @property
    def limit(self) -> str:
        """The table of the control plane."""
        return f"{self._tag}_limit"

    def begin(self) -> None:
        """Begin anew, in a pin root of its own, with release OLD and another upgrade behind it."""
        self._pause()
        self._new_root()
        self.must(lambda: _facts(hitless.apply(self.node, self.bundles[OLD])))
        self._base = [one.ask("count")["made"] for one in self._clients]
        self._failures = [len(one.ask("count")["failures"]) for one in self._clients]
        self._mark = [0, 0]
        self._sockets = 0
        self._go()
        self.must(lambda: _facts(hitless.apply(self.node, self.bundles[NEW])))
        self.allowed = tuple(self.must(self._blocked).value)
        self.reset()

    def _blocked(self) -> list[str]:
        return [entry.name for entry in hitless.plan(self.node, self.bundles[OLD]).blocked]

    def reset(self) -> None:
        """Go back to release OLD."""
        self.must(lambda: _facts(hitless.apply(self.node, self.bundles[OLD], allow_loss=self.allowed)))

    def upgrade(self) -> object:
        """Go from OLD to NEW; a control plane in the same process writes an entry meanwhile."""
        return _facts(hitless.apply(self.node, self.bundles[NEW], prepare=self._write_mark))

    def upgrade_that_fails(self) -> object:
        """The same, with an error right before the commit, so that it is taken back."""

        def fail(event: hitless.Progress) -> None:
            if event.step == "commit":
                raise hitless.NodeError("this was to fail", planned=True)

        return _facts(hitless.apply(self.node, self.bundles[NEW], prepare=self._write_mark, progress=fail))

    def settle_new(self) -> None:
        """Go to NEW: where a rollback begins."""
        self.about_to_write()
        self.must(self.upgrade)

    def _write_mark(self, node: hitless.Node) -> None:
        node.map(self.limit)[_MARK] = {"rate": self._mark[1], "burst": 0}

    def about_to_write(self) -> None:
        """The next upgrade writes another value, and may be killed before or after that."""
        self._mark = [self._mark[0], self._mark[1] + 1]

    def served(self) -> None:
        """Every client gets through now, and none ever failed."""
        before = [one.ask("count") for one in self._clients]
        until = time.monotonic() + _SLOWEST
        while True:
            now = [one.ask("count") for one in self._clients]
            for client, failed in zip(now, self._failures, strict=True):
                if len(client["failures"]) > failed:
                    raise Broken(f"a hook did not serve: {client['failures'][failed:][:3]}")
            if all(new["made"] > old["made"] for old, new in zip(before, now, strict=True)):
                return
            if time.monotonic() > until:
                raise Broken(f"no connect came to its end within {_SLOWEST:g} s")
            time.sleep(0.0005)

    def check(self, forward: bool) -> str | None:
        """Everything agrees and nothing is left over; returns the version that is live. Raises Broken.

        ``forward`` says that it came from OLD: a rollback that was given up leaves the maps of OLD as it emptied them.
        """
        self.served()
        made, journal = self._pause()
        found = msgspec.convert(self.must(self._look).value, Seen, strict=False)
        if found.problems:
            raise Broken(f"verify says: {found.problems}")
        if found.paths:
            raise Broken(f"left behind: {found.paths}")
        if found.strays:
            raise Broken(f"held by nothing that is known: {found.strays}")
        own = [count - base for count, base in zip(made, self._base, strict=True)]
        wanted = {_PORT + number: count for number, count in enumerate(own)}
        counted = {"tally": found.tally, "seen": found.seen, "total": found.total}
        expected = {"tally": wanted, "seen": sum(wanted.values()), "total": sum(wanted.values())}
        if counted != expected:
            raise Broken(f"{counted} was counted, and clients made {expected}")
        if (forward and len(set(found.going)) != 1) or found.going[0] < self._sockets:
            what = f"the hook that goes had counted {self._sockets}"
            raise Broken(f"{what}, and in the end {found.going[1:]}; found is {found.going[0]}")
        self._sockets = found.going[0]
        mark = found.limits.pop(_MARK, [0])[0]
        if not self._mark[0] <= mark <= self._mark[1]:
            raise Broken(f"the upgrading process wrote {self._mark}, and found is {mark}")
        self._mark = [mark, self._mark[1]]
        held = {int(key): values for key, values in journal["held"].items()}
        if found.limits != held or journal["failures"]:
            raise Broken(f"the control plane wrote {held}, and found is {found.limits}; {journal['failures'][:3]}")
        self._go()
        return found.version

    def _look(self) -> object:
        """In a process of its own: :class:`Seen`."""
        node, verified = self.node, hitless.verify(self.node)
        variables = node.map(f"{self._tag}.bss").get(0)
        tally = {key: value["count"] for key, value in node.map(f"{self._tag}_tally").items()}
        going = [tally.pop(_SOCKETS, 0)]
        if verified.version == NEW:  # what its program wrote in the end is in the map that it used
            with Map.open(node.previous / "maps" / f"{self._tag}_tally") as held:
                going.append(int.from_bytes((held.lookup(bytes(4)) or b"")[:4], sys.byteorder))
        return Seen(
            version=verified.version,
            problems=list(verified.problems),
            paths=self._left_behind(),
            strays=self._strays(),
            tally=tally,
            seen=sum(one["count"] for one in node.map(f"{self._tag}_seen").get(0)),
            total=variables["total"],
            limits={key: [value["rate"], value["burst"]] for key, value in node.map(self.limit).items()},
            going=going,
        )

    def _pause(self) -> tuple[list[int], dict[str, Any]]:
        journal = self._writer.ask("pause")
        return [one.ask("pause")["made"] for one in self._clients], journal

    def _go(self) -> None:
        for one in self._clients:
            one.ask("go")
        self._writer.ask(f"go {self.node.root}")

    def _bundle(self, version: str) -> hitless.Bundle:
        directory = self._lab.scratch / version
        directory.mkdir()
        begun = "" if version == OLD else "if (!begun) begun = bpf_ktime_get_ns();"
        source = "#include <bpf/bpf_endian.h>\n" + _LAYOUTS[version] + _CODE.replace("BEGUN", begun)
        source += _GOING if version == OLD else ""
        compile_object(source.replace("X_", f"{self._tag}_"), directory / f"{self._tag}.bpf.o")
        template = _MANIFEST + (_ATTACH_GOING if version == OLD else "")
        template += _BY_CONNECTION if self._by_connection else ""
        manifest = template.format(version=version).replace("X_", f"{self._tag}_").replace("X.", f"{self._tag}.")
        (directory / "bundle.toml").write_text(manifest)
        return hitless.Bundle.load(directory, {"cgroup": str(self._lab.cgroup)})


def _facts(result: hitless.Result) -> object:
    return {"to": result.to_version, "lost": sum(entry.lost for entry in result.maps), "how": result.start_type}


def _has_hook(node: hitless.Node, name: str) -> bool:
    return (node.links / name).exists() or (node.root / "board" / "witnesses" / name).exists()


def _ids(command: int, after: int = 0) -> Iterator[int]:
    """Ids of all maps (BPF_MAP_GET_NEXT_ID) or programs that the kernel has, which hitless itself never asks for."""
    attr, call = (ctypes.c_uint32 * 32)(after), ctypes.CDLL(None).syscall
    while call(321, command, ctypes.byref(attr), ctypes.sizeof(attr)) == 0:
        attr[0] = attr[1]
        yield attr[0]


def _base36(number: int) -> str:
    digits = string.digits + string.ascii_lowercase
    return digits[number] if number < 36 else _base36(number // 36) + digits[number % 36]
