"""A daemon that knows nothing of hitless, under traffic: its node is adopted, and upgraded, and its pins never move.

Its own loader pins maps and links where it likes, and puts the same programs on its links when it starts again. Clients
count their connects; another program opens every path of the daemon all the time, and never finds one missing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

import hitless
from hitless.bundle import unite_maps
from hitless.kernel.libbpf import check, lib
from hitless.kernel.links import Link
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, load_object
from hitless.layout import kmesh
from hitless.public import version_number
from hitless.upgrade import adopt
from meshd.demo.lab import Lab
from tests.faults.world import NEW, OLD, Broken, Ground, Helper
from tests.releases import compile_object

_ = adopt  # as in tests.faults.world

__all__ = ["AdoptedWorld"]

_PORT = 7100
_NOWHERE = "10.96.0.20"
_SLOWEST = 20.0  # s
_CLIENTS = 2

_LAYOUTS = {
    OLD: """
struct tally { __u32 count TAG("merge=sum"); __u32 last; };
MAP(X_older, HASH, 16, __u32, __u32);
""",
    NEW: """
struct tally { __u64 since; __u64 count TAG("merge=sum"); __u32 last; };
MAP(X_newer, HASH, 16, __u32, __u32);
""",
}
_CODE = """
MAP(X_tally, HASH, 64, __u32, struct tally);
MAP(X_version, ARRAY, 1, __u32, __u32);
static volatile __u32 total TAG("merge=sum");

SEC("cgroup/connect4") int X_turn(struct bpf_sock_addr *ctx)
{
    if (ctx->user_ip4 != bpf_htonl(0x0a600014)) // 10.96.0.20, which nobody has
        return 1;
    __u32 port = __builtin_bswap16(ctx->user_port);
    struct tally *found = bpf_map_lookup_elem(&X_tally, &port);
    if (!found) {
        struct tally none = {};
        bpf_map_update_elem(&X_tally, &port, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&X_tally, &port);
    }
    if (found)
        __sync_fetch_and_add(&found->count, 1);
    __sync_fetch_and_add(&total, 1);
    bpf_map_lookup_elem(&X_version, &port);
    bpf_map_lookup_elem(&OTHER, &port);
    ctx->user_ip4 = bpf_htonl(0x7f000001);
    return 1;
}
char _license[] SEC("license") = "Dual BSD/GPL";
"""
_MANIFEST = """
[bundle]
name = "adopted"
version = "{version}"

[[object]]
file = "X.bpf.o"

[public]
maps = "map"
version_map = "X_version"
snapshot = "{snapshot}"

[map.X_older]
on_loss = "discard"

[map.X_newer]
on_loss = "discard"

[[attach]]
program = "X_turn"
hook = "cgroup"
target = "${{cgroup}}"
link = "turn"
pin = "sockconn/turn_prog"
"""


class _Seen(msgspec.Struct):
    """What a look at the node told, in plain values."""

    version: str | None
    problems: list[str]
    paths: list[str]
    strays: list[str]
    tally: dict[int, int]
    total: int
    noted: int


class AdoptedWorld(Ground):
    """A node that its own loader made, with clients and with who opens its paths; checks raise Broken."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._snapshot = lab.scratch / f"{self._tag}.json"
        self.bundles = {version: self._bundle(version) for version in _LAYOUTS}
        self._clients: list[Helper] = [
            self._helper("client", "clients", str(number), _NOWHERE, str(_PORT + number)) for number in range(_CLIENTS)
        ]
        self._opener = self._helper("opener", "outside")
        self._failures = [0] * _CLIENTS
        self._base = [0] * _CLIENTS
        self._total = 0  # connects before the variables began anew
        self._link = 0
        self._goal = NEW  # where what is done next leads

    def __enter__(self) -> AdoptedWorld:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._pause()
        self.do(self._away)

    @property
    def root(self) -> Path:
        """The daemon's directory."""
        return self._lab.bpffs / f"{self._tag}root{self._number}"

    @property
    def _always(self) -> list[str]:
        """The paths that both releases have."""
        return [str(self.root / "map" / f"{self._tag}_{name}") for name in ("tally", "version")] + [
            str(self.root / "sockconn" / "turn_prog")
        ]

    def begin(self) -> None:
        """Begin anew, with release OLD as its own loader started it, adopted, and another upgrade behind it."""
        self.started()
        self.must(self.adopt)
        self.must(self.upgrade)
        self.allowed = tuple(self.must(self._blocked).value)
        self.reset()

    def started(self) -> None:
        """Begin anew, with release OLD as its own loader started it: where an adoption begins."""
        self._pause()
        if self._number:
            self.must(self._away)
        self._snapshot.unlink(missing_ok=True)
        self._number += 1
        self._link = int(self.must(self._load).value)
        counts = [one.ask("count") for one in self._clients]
        self._base, self._total = [one["made"] for one in counts], 0
        self._failures = [len(one["failures"]) for one in counts]
        self._opener.ask("pause " + " ".join(self._always))
        self._go()

    def _away(self) -> bool:
        if (self.root / "hitless").exists():
            hitless.unload(self.node)
        if self.root.exists():
            for path in sorted(self.root.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            self.root.rmdir()
        return True

    def _load(self) -> int:
        """What its own loader does at each start; returns the id of its link."""
        for name in ("map", "sockconn"):
            (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        item = self.bundles[OLD].objects[0]
        there = {
            one.name: Map(_pinned(self.root / "map" / one.name))
            for one in item.spec.maps
            if "." not in one.name and (self.root / "map" / one.name).exists()
        }
        sections = {name: one for name, one in unite_maps([item.spec]).items() if "." in name}
        loaded = load_object(item.data, item.spec.name, there, sections)
        for name, held in loaded.maps.items():
            if name not in there and name not in sections:
                held.pin(self.root / "map" / name)
        version = version_number(OLD).to_bytes(4, sys.byteorder)
        loaded.maps[f"{self._tag}_version"].update(bytes(4), version)
        program, pin = loaded.programs[f"{self._tag}_turn"], self.root / "sockconn" / "turn_prog"
        if pin.exists():
            with Link(_pinned(pin)) as link, Program.by_id(link.info.program_id) as old:
                link.update(program, old)
                return int(link.info.id)
        fd = os.open(self._lab.cgroup, os.O_RDONLY)
        try:
            with Link.attach(program, fd, "cgroup_inet4_connect", self._lab.cgroup) as link:
                link.pin(pin)
                return int(link.info.id)
        finally:
            os.close(fd)

    def started_again(self) -> None:
        """Its own loader starts again, on an adopted node with release OLD: its variables begin anew."""
        counts = self._pause()
        self.must(self._load)
        self._total = sum(counts) - sum(self._base)
        self._go()

    def _blocked(self) -> list[str]:
        return [entry.name for entry in hitless.plan(self.node, self.bundles[OLD]).blocked]

    def reset(self) -> None:
        """Go back to release OLD."""
        self._goal = NEW
        self.must(lambda: bool(hitless.apply(self.node, self.bundles[OLD], allow_loss=self.allowed)))

    def adopt(self) -> object:
        """Take over what its own loader started."""
        return bool(hitless.adopt(hitless.Node(self.root), self.bundles[OLD]))

    def upgrade(self) -> object:
        """Go from OLD to NEW."""
        return bool(hitless.apply(self.node, self.bundles[NEW]))

    def settle_new(self) -> None:
        """Go to NEW: where a rollback begins."""
        self.must(self.upgrade)
        self._goal = OLD

    def adopted(self) -> None:
        """Who was killed adopting has adopted, and is recovered, or the next one does."""
        if (self.root / "hitless").exists():
            self.must(lambda: hitless.recover(self.node))
        else:
            self.must(self.adopt)

    def applied(self) -> None:
        """The next apply finishes it, first."""
        self.must(lambda: bool(hitless.apply(self.node, self.bundles[NEW])))

    @property
    def node(self) -> hitless.Node:
        """The node, adopted by now or not."""
        return hitless.Node(self.root)

    @node.setter
    def node(self, _: hitless.Node) -> None:
        """It is where the daemon's directory is."""

    def served(self) -> None:
        """Everybody gets through now, and nobody ever failed; the version is not there before all the rest is."""
        before = [one.ask("count")["made"] for one in (*self._clients, self._opener)]
        until = time.monotonic() + _SLOWEST
        while True:
            now = [one.ask("count") for one in (*self._clients, self._opener)]
            for seen, failed in zip(now, (*self._failures, 0), strict=True):
                if len(seen["failures"]) > failed:
                    raise Broken(f"not served: {seen['failures'][failed:][:3]}")
            if set(now[-1]["seen"].get(self._always[-1], [self._link])) != {self._link}:
                raise Broken(f"{self._always[-1]} was link {now[-1]['seen']}, not {self._link}")
            if all(new["made"] > old for old, new in zip(before, now, strict=True)):
                break
            if time.monotonic() > until:
                raise Broken(f"not all came through within {_SLOWEST:g} s")
            time.sleep(0.0005)
        early = self.must(self._early).value
        if early:
            raise Broken(f"the version is there already: {early}")

    def _early(self) -> list[str]:
        """What is not there of the release to come, if the version map tells that already."""
        with Map(_pinned(Path(self._always[1]))) as held:
            if _number(held) != version_number(self._goal):
                return []
        with Map(_pinned(Path(self._always[0]))) as held:
            size = held.info.value_size
        comes, goes = ("newer", "older") if self._goal == NEW else ("older", "newer")
        (told,) = kmesh.load(self._snapshot.read_bytes()).values()
        right = {
            f"tally has {size} bytes": size == {OLD: 8, NEW: 24}[self._goal],
            f"{comes} is missing": (self.root / "map" / f"{self._tag}_{comes}").exists(),
            f"{goes} is there": not os.path.lexists(self.root / "map" / f"{self._tag}_{goes}"),
            "the snapshot is another's": f"{self._tag}_{comes}" in {one.name for one in told.maps},
        }
        return [what for what, is_right in right.items() if not is_right]

    def check(self, forward: bool) -> str | None:
        """Everything agrees and nothing is left over; returns the version that is live. Raises Broken.

        ``forward`` makes no difference here.
        """
        self.served()
        made = self._pause()
        found = msgspec.convert(self.must(self._look).value, _Seen, strict=False)
        for what, wrong in (
            ("verify says", found.problems), ("left behind", found.paths), ("held by nothing known", found.strays),
        ):  # fmt: skip
            if wrong:
                raise Broken(f"{what}: {wrong}")
        own = [count - base for count, base in zip(made, self._base, strict=True)]
        wanted = {_PORT + number: count for number, count in enumerate(own)}
        if (found.tally, found.total) != (wanted, sum(own) - self._total):
            raise Broken(f"{found.tally}, {found.total} was counted, and clients made {wanted}, {self._total} before")
        if found.noted != version_number(found.version or ""):
            raise Broken(f"{found.version} runs, and the version map has {found.noted:#x}")
        self._goal = OLD if found.version == NEW else NEW
        self._go()
        return found.version

    def _look(self) -> object:
        """In a process of its own."""
        node, verified = self.node, hitless.verify(self.node)
        names = {"older"} if verified.version == OLD else {"newer"}
        expected = {self.root / "map" / f"{self._tag}_{name}" for name in (*names, "tally", "version")}
        odd = {*(self.root / "map").iterdir()} ^ expected
        odd |= {path for path in expected if not path.is_symlink()} | {*(self.root.glob("hitless?*"))}
        return _Seen(
            version=verified.version,
            problems=list(verified.problems),
            paths=[*self._left_behind(), *map(str, odd)],
            strays=self._strays(),
            tally={key: value["count"] for key, value in node.map(f"{self._tag}_tally").items()},
            total=node.map(f"{self._tag}.bss").get(0)["total"],
            noted=node.map(f"{self._tag}_version").get(0),
        )

    def _unpinned(self) -> Iterator[str]:
        """What its own loader has started again is held by the link, until the next upgrade."""
        with Link(_pinned(Path(self._always[-1]))) as link, Program.by_id(link.info.program_id) as program:
            held = {f"program {program.info.id}", *(f"map {number}" for number in program.map_ids)}
        return (text for text in super()._unpinned() if " ".join(text.split()[:2]) not in held)

    def _pause(self) -> list[int]:
        self._opener.ask("pause")
        return [one.ask("pause")["made"] for one in self._clients]

    def _go(self) -> None:
        for one in (*self._clients, self._opener):
            one.ask("go")

    def _bundle(self, version: str) -> hitless.Bundle:
        directory = self._lab.scratch / f"{self._tag}{version}"
        directory.mkdir()
        other = {OLD: "X_older", NEW: "X_newer"}[version]
        source = "#include <bpf/bpf_endian.h>\n" + _LAYOUTS[version] + _CODE.replace("OTHER", other)
        compile_object(source.replace("X_", f"{self._tag}_"), directory / f"{self._tag}.bpf.o")
        manifest = _MANIFEST.format(version=version, snapshot=self._snapshot)
        manifest = manifest.replace("X_", f"{self._tag}_").replace("X.", f"{self._tag}.")
        (directory / "bundle.toml").write_text(manifest)
        return hitless.Bundle.load(directory, {"cgroup": str(self._lab.cgroup)})


def _pinned(path: Path) -> int:
    """A descriptor of what is pinned there, as any loader gets it."""
    return check(lib().bpf_obj_get(os.fsencode(path)), "BPF_OBJ_GET", path)


def _number(held: Map) -> int:
    return int.from_bytes(held.lookup(bytes(4)) or b"", sys.byteorder)
