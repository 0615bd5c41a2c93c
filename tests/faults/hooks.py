"""A node with one hook of each kind under traffic, beside another tool; and what must be so after every fault.

Both releases count in a table whose layout changes. The older one has a hook more, which goes; the newer one has one
that comes, and takes over an XDP program of the tool. A filter of the tool is taken over by both.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import msgspec

import hitless
from hitless.kernel.filters import Direction, Filter, filters
from hitless.kernel.interfaces import Interface, interfaces
from hitless.kernel.maps import Map
from hitless.kernel.namespaces import Namespace
from hitless.kernel.programs import load_object
from hitless.kernel.xdp import Xdp
from hitless.upgrade.attached import open_attached, remove
from meshd.demo.lab import Lab
from meshd.demo.pods import Pods
from tests.faults.world import NEW, OLD, Broken, Ground
from tests.releases import compile_object

__all__ = ["HookWorld"]

# A hook's number is its key in the table; each turn of the client is counted so often by it.
EARLY, BYHAND, LATE, GUARD, GONE, TAKEN, SHARED, MESSAGE, BORN = range(1, 10)
_EACH = {EARLY: 2, BYHAND: 1, LATE: 1, GUARD: 1, GONE: 1, TAKEN: 1, SHARED: 1, MESSAGE: 1, BORN: 1}
_OWN_HOOKS = (EARLY, BYHAND, LATE, GUARD, MESSAGE)
_CONNECTED = (TAKEN, SHARED, MESSAGE)
_ALWAYS: tuple[int, ...] = (*_OWN_HOOKS, TAKEN, SHARED)
_SLOWEST = 20.0  # s that a client may take to come on
_PLACE = (5, 1)  # priority and handle of the tool's filter

_LAYOUTS = {
    OLD: 'struct tally { __u32 count TAG("merge=sum"); };',
    NEW: 'struct tally { __u64 since; __u64 count TAG("merge=sum"); };',
}
_HEAD = """
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
"""
_PACKETS = """
static __always_inline int is_ours(void *data, void *end)
{
    struct ethhdr *eth = data;
    struct iphdr *ip = (void *)(eth + 1);
    struct udphdr *udp = (void *)(ip + 1);
    if ((void *)(udp + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP) || ip->protocol != 17)
        return 0;
    return udp->dest == bpf_htons(4242) || udp->source == bpf_htons(4242);
}
#define PACKET(kind, name, number, context, verdict) \\
SEC(kind) int X_##name(struct context *ctx) \\
{ \\
    if (is_ours((void *)(long)ctx->data, (void *)(long)ctx->data_end)) \\
        note(number); \\
    return verdict; \\
}
"""
_CODE = """
MAP(X_tally, HASH, 64, __u32, struct tally);
struct ports { __u32 local, remote; };
MAP(X_peers, SOCKHASH, 64, struct ports, __u64);
static __always_inline void note(__u32 key)
{
    struct tally *found = bpf_map_lookup_elem(&X_tally, &key);
    if (!found) {
        struct tally none = {};
        bpf_map_update_elem(&X_tally, &key, &none, BPF_NOEXIST);
        found = bpf_map_lookup_elem(&X_tally, &key);
    }
    if (found)
        __sync_fetch_and_add(&found->count, 1);
}
PACKETS
PACKET("xdp", early, 1, xdp_md, XDP_PASS)
PACKET("xdp", byhand, 2, xdp_md, XDP_PASS)
PACKET("tc", late, 3, __sk_buff, TC_ACT_UNSPEC)
SEC("netfilter") int X_guard(void *ctx) { note(4); return 1; }
PACKET("tc", shared, 7, __sk_buff, TC_ACT_UNSPEC)
SEC("sockops") int X_join(struct bpf_sock_ops *ops)
{
    struct ports key = { .local = ops->local_port, .remote = bpf_ntohl(ops->remote_port) };
    if (ops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB || ops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        bpf_sock_hash_update(ops, &X_peers, &key, BPF_ANY);
    return 1;
}
SEC("sk_msg") int X_message(struct sk_msg_md *msg) { note(8); return SK_PASS; }
char _license[] SEC("license") = "GPL";
"""
_OWN = {
    OLD: 'PACKET("tc", gone, 5, __sk_buff, TC_ACT_UNSPEC)',
    NEW: """
PACKET("xdp", taken, 6, xdp_md, XDP_PASS)
SEC("tp/task/task_rename") int X_born(void *ctx)
{
    union { char text[16]; __u64 word; } comm, sender = { .text = "X_" };
    bpf_get_current_comm(&comm, sizeof(comm));
    if (comm.word == sender.word)
        note(9);
    return 0;
}
""",
}
_TOOL = """
MAP(tool, ARRAY, 16, __u32, __u64);
static __always_inline void note(__u32 key)
{
    __u64 *found = bpf_map_lookup_elem(&tool, &key);
    if (found)
        __sync_fetch_and_add(found, 1);
}
PACKETS
PACKET("xdp", taken, 6, xdp_md, XDP_PASS)
PACKET("tc", shared, 7, __sk_buff, TC_ACT_UNSPEC)
char _license[] SEC("license") = "GPL";
"""


def _attach(name: str, hook: str, target: str, *more: str) -> str:
    lines = (f'program = "X_{name}"', f'hook = "{hook}"', f'target = "{target}"', f'link = "{name}"', *more)
    return "\n".join(("", "[[attach]]", *lines, ""))


_POD = 'netns = "${pods}/pod%s"'
_BOTH = "".join(
    (
        _attach("join", "cgroup", "${cgroup}"),
        _attach("message", "sk_msg", "X_peers"),
        _attach("early", "xdp", "eth*", _POD % "[12]"),
        _attach("byhand", "xdp", "eth0", _POD % 3, 'by = "netlink"'),
        _attach("late", "tc-ingress", "eth0", _POD % 3),
        _attach("guard", "netfilter", "${pods}/pod3", 'family = "ipv4"', 'point = "input"', "priority = -7"),
        _attach("shared", "tc-ingress", "eth0", _POD % 4, "priority = 5", "handle = 1", "adopt = true"),
    )
)
_MANIFESTS = {
    OLD: _BOTH + _attach("gone", "tc-egress", "eth0", _POD % 3),
    NEW: _BOTH
    + _attach("taken", "xdp", "eth0", _POD % 4, 'by = "netlink"', "adopt = true")
    + _attach("born", "tracepoint", "task/task_rename"),
}


class _Seen(msgspec.Struct):
    """What a look at the node told, in plain values."""

    version: str | None
    problems: list[str]
    paths: list[str]
    strays: list[str]
    counts: dict[int, int]
    tool: dict[int, int]
    tools: list[int]  # the programs of the tool that run
    filters: dict[str, int]  # how many there are by their places


class HookWorld(Ground):
    """Release OLD or NEW on every kind of hook, with a client that takes turns."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._pods = Pods(lab)
        self._pods.add(4)
        self._tool = compile_object(
            _HEAD + _TOOL.replace("PACKETS", _PACKETS).replace("X_", "tool_"), lab.scratch / f"{self._tag}tool.bpf.o"
        )
        self._tool_map = lab.bpffs / f"{self._tag}tool"
        self.bundles = {version: self._bundle(version) for version in _LAYOUTS}
        paths = [str(self._pods.directory / f"pod{number}") for number in range(1, 5)]
        self._client = self._helper("packets", "clients", f"{self._tag}_", *paths)
        self._failures = self._resent = 0
        self._base: dict[int, int] = {}  # turns that were made before those that are counted now
        self._tools: list[int] = []
        self._exact = _ALWAYS  # hooks that have counted all; others were not there for a while

    def __enter__(self) -> HookWorld:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._client.ask("pause")
        self.do(lambda: hitless.unload(self.node))

    def begin(self) -> None:
        """Begin anew, in a pin root of its own, with release OLD and another upgrade behind it."""
        self._client.ask("pause")
        self.do(lambda: hitless.unload(self.node))
        self._new_root()
        self.do(self._clear)
        self.must(self._tool_up)
        self.must(lambda: bool(hitless.apply(self.node, self.bundles[OLD])))
        self._client.ask("connect")
        self.must(lambda: bool(hitless.apply(self.node, self.bundles[NEW])))
        self.allowed = tuple(self.must(self._blocked).value)
        self.reset()

    def _blocked(self) -> list[str]:
        return [entry.name for entry in hitless.plan(self.node, self.bundles[OLD]).blocked]

    def reset(self) -> None:
        """Go back to release OLD, and let what is counted begin anew."""
        self._client.ask("pause")
        self._rest()
        self._client.ask("go")

    def _rest(self) -> None:
        if not self.node.root.exists():
            self.must(self._tool_up)
        self.must(lambda: bool(hitless.apply(self.node, self.bundles[OLD], allow_loss=self.allowed)))
        self.must(self._tool_up)
        told = self._client.ask("connect")
        self._failures, self._resent = len(told["failures"]), told["resent"]
        self._begin_counting()
        self._exact = _ALWAYS

    def _begin_counting(self) -> None:
        made = self._client.ask("pause")["made"]
        found = self._seen()
        self._base = {key: made * each - self._sum(found, key) for key, each in _EACH.items()}
        self._tools = found.tools

    @staticmethod
    def _sum(found: _Seen, key: int) -> int:
        return found.counts.get(key, 0) + found.tool.get(key, 0)

    def upgrade(self) -> object:
        """Go from OLD to NEW."""
        return bool(hitless.apply(self.node, self.bundles[NEW]))

    def upgrade_that_fails(self) -> object:
        """The same, with an error right before the commit, so that it is taken back."""

        def fail(event: hitless.Progress) -> None:
            if event.step == "commit":
                raise hitless.NodeError("this was to fail", planned=True)

        return bool(hitless.apply(self.node, self.bundles[NEW], progress=fail))

    def settle_new(self) -> None:
        """Go to NEW: where a rollback begins, which brings no program of the tool back."""
        self.must(self.upgrade)
        self._tools = []
        self._exact = (*_OWN_HOOKS, SHARED)

    def unloaded(self) -> None:
        """Nothing of hitless is there, and all of the tool's: where a first apply begins."""
        self._client.ask("pause")
        self.must(lambda: hitless.unload(self.node))
        self.must(self._tool_up)
        self._client.ask("connect")
        self._begin_counting()
        self._exact = (TAKEN, SHARED)
        self._client.ask("go")

    def about_to_unload(self) -> None:
        """Release OLD is live, and begins to go."""
        if not self.node.root.exists():
            self.reset()
        self._exact = ()

    def loosened(self) -> None:
        """Release OLD is live, but somebody took some of it off its hooks."""
        if not self.node.root.exists():
            self.reset()
        self._client.ask("pause")
        self.must(self._loosen)
        self._exact = _CONNECTED
        self._client.ask("go")

    def _loosen(self) -> bool:
        early = min(path.name for path in self.node.links.glob("early@*"))
        for name in ("late", early, "byhand", "gone"):
            with open_attached(self.node.links, name) as hook:
                if not hook.info.is_dead:
                    hook.detach()
        remove(self.node.links, "guard")
        return True

    def with_last(self) -> None:
        """Release OLD is live, and NEW the last one."""
        if not self.node.previous.exists():
            self.must(self.upgrade)
            self.reset()

    def served(self) -> None:
        """The client comes on now, and nothing of it ever got lost."""
        before = self._client.ask("count")["made"]
        until = time.monotonic() + _SLOWEST
        while True:
            now = self._client.ask("count")
            if len(now["failures"]) > self._failures:
                raise Broken(f"a packet was lost: {now['failures'][self._failures :][:3]}")
            if now["resent"] > self._resent and EARLY in self._exact:
                raise Broken("a packet was lost, and came when it was sent again")
            if now["made"] > before:
                return
            if time.monotonic() > until:
                raise Broken(f"no turn came to its end within {_SLOWEST:g} s")
            time.sleep(0.0005)

    def check(self, forward: bool) -> str | None:
        """Everything agrees and nothing is left over; returns the version that is live. Raises Broken.

        ``forward`` makes no difference here: what is counted comes along in both directions.
        """
        self.served()
        made = self._client.ask("pause")["made"]
        found = self._seen()
        for what, wrong in (
            ("verify says", found.problems), ("left behind", found.paths), ("held by nothing known", found.strays),
        ):  # fmt: skip
            if wrong:
                raise Broken(f"{what}: {wrong}")
        self._check_counts(found, made)
        self._check_others(found)
        self._check_now(found)
        if found.version == OLD and not found.tools:
            self.reset()  # the tool comes back
            return OLD
        self._begin_counting()
        if found.version is not None:
            self._exact = _ALWAYS
        self._client.ask("go")
        return found.version

    def _check_counts(self, found: _Seen, made: int) -> None:
        for key, each in _EACH.items():
            if found.version is None and key != TAKEN:
                continue  # the table is gone
            wanted, counted = made * each - self._base[key], self._sum(found, key)
            if counted > wanted or (key in self._exact and counted != wanted):
                raise Broken(f"hook {key} counted {counted}, and the client made {wanted}; {found.counts} {found.tool}")

    def _check_others(self, found: _Seen) -> None:
        """The tool's programs run where ours do not, the very ones that ran before; and no filter is there twice."""
        if set(found.tools) - set(self._tools) or (found.version == NEW and found.tools):
            raise Broken(f"the tool's programs are {found.tools}, and were {self._tools}")
        if TAKEN in self._exact and found.version != NEW and len(found.tools) != (1 if found.version else 2):
            raise Broken(f"{found.version} runs beside the tool's programs {found.tools}, and not {self._tools}")
        most = {"pod3 ingress": 1, "pod3 egress": int(found.version == OLD), "pod4 ingress": 1}
        if found.version is None:
            most |= {"pod3 ingress": 0, "pod4 ingress": found.filters["pod4 ingress"]}
        if found.filters != most:
            raise Broken(f"filters are {found.filters}, not {most}")

    def _check_now(self, before: _Seen) -> None:
        """Each hook counts each of five more turns, once."""
        self._resent = self._client.ask("count")["resent"]
        if MESSAGE not in self._exact:
            self._client.ask("connect")  # the sockets are older than the hook that puts them into the map
        started = self._client.ask("pause")["made"]
        told = self._client.ask("step")
        turns = told["made"] - started
        if turns != 5:
            raise Broken(f"a packet was lost: {told['failures'][self._failures :][:3]}")
        after = self._seen()
        old = (BORN,) if TAKEN in self._exact else (BORN, TAKEN)
        off = {OLD: old, NEW: (GONE,)}.get(after.version or "", (*_OWN_HOOKS, GONE, BORN))
        for key, each in _EACH.items():
            if key in (TAKEN, SHARED) and not self._exact:
                continue
            wanted = 0 if key in off else turns * each
            if (counted := self._sum(after, key) - self._sum(before, key)) != wanted:
                raise Broken(f"hook {key} counted {counted} of {wanted} now; {before.counts} then {after.counts}")

    def _seen(self) -> _Seen:
        return msgspec.convert(self.must(self._look).value, _Seen, strict=False)

    def _look(self) -> object:
        """In a process of its own."""
        node = self.node
        counts: dict[int, Any] = {}
        version, problems, paths = None, [], []
        if node.current.exists():
            verified = hitless.verify(node)
            version, problems, paths = verified.version, list(verified.problems), self._left_behind()
            counts = {key: value["count"] for key, value in node.map(f"{self._tag}_tally").items()}
        elif node.root.exists():
            pins = (path for path in node.root.rglob("*") if path.is_symlink() or not path.is_dir())
            paths = [str(path) for path in (*pins, *node.root.glob("next"))]
        with Map.open(self._tool_map) as held:
            tool = {key: int.from_bytes(held.lookup(_key(key)) or b"", sys.byteorder) for key in (TAKEN, SHARED)}
        return _Seen(version, problems, paths, self._strays(), counts, tool, self._tools_there(), self._filters())

    def _interface(self, number: int) -> Interface:
        (found,) = interfaces("eth0", Namespace.at(str(self._pods.directory / f"pod{number}")))
        return found

    def _own(self) -> set[int]:
        state = self.node.observe() if self.node.root.exists() else None
        return {one.id for one in state.current.programs.values()} if state and state.current else set()

    def _tools_there(self) -> list[int]:
        """Of pod 4, which the tool has programs on."""
        pod, own = self._interface(4), self._own()
        xdp = Xdp.find(pod)
        there = [xdp.info.program_id] if xdp else []
        there += [one.program_id for one in filters(pod, "ingress")]
        return [one for one in there if one not in own]

    def _filters(self) -> dict[str, int]:
        places: tuple[tuple[int, Direction], ...] = ((3, "ingress"), (3, "egress"), (4, "ingress"))
        return {f"pod{number} {way}": len(filters(self._interface(number), way)) for number, way in places}

    def _tool_up(self) -> bool:
        """Let the tool attach its programs where nothing is. It does not hold them any more then."""
        pod = self._interface(4)
        known = {"tool": Map.open(self._tool_map)} if self._tool_map.exists() else {}
        loaded = load_object(self._tool.read_bytes(), "tool", known, {})
        if not known:
            loaded.maps["tool"].pin(self._tool_map)
        if Xdp.find(pod) is None:
            Xdp.attach(loaded.programs["tool_taken"], pod, "native")
        if not filters(pod, "ingress"):
            Filter.attach(loaded.programs["tool_shared"], pod, "ingress", *_PLACE)
        return True

    def _clear(self) -> bool:
        """Take everything off the interfaces, whoever attached it."""
        for number in range(1, 5):
            here = str(self._pods.directory / f"pod{number}")
            self._lab.run(["nsenter", f"--net={here}", "ip", "link", "set", "eth0", "xdp", "off"])
            self._lab.run(["nsenter", f"--net={here}", "ip", "link", "set", "eth0", "xdpgeneric", "off"])
            self._lab.run(["nsenter", f"--net={here}", "tc", "qdisc", "del", "dev", "eth0", "clsact"])
        return True

    def _bundle(self, version: str) -> hitless.Bundle:
        directory = self._lab.scratch / f"{self._tag}{version}"
        directory.mkdir()
        source = (_HEAD + _LAYOUTS[version] + _CODE + _OWN[version]).replace("PACKETS", _PACKETS)
        compile_object(source.replace("X_", f"{self._tag}_"), directory / f"{self._tag}.bpf.o")
        head = f'[bundle]\nname = "hooks"\nversion = "{version}"\n\n[[object]]\nfile = "{self._tag}.bpf.o"\n'
        manifest = (head + _MANIFESTS[version]).replace("X_", f"{self._tag}_")
        (directory / "bundle.toml").write_text(manifest)
        values = {"cgroup": str(self._lab.cgroup), "pods": str(self._pods.directory)}
        return hitless.Bundle.load(directory, values)


def _key(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)
