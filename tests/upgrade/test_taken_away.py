"""A kernel without something: the release that needs it is refused by its name, or the plan names what is done instead.

Here the feature is taken away from what hitless is told of the kernel; tests/matrix has kernels that have not got it.
"""

from __future__ import annotations

import errno
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.carry import ITERATE_HASH
from hitless.errors import KernelError, UnsupportedError
from hitless.features import EVENT_INFO, FEATURES, INNER_LOCK, MEMBARRIER
from hitless.hooks import SLEEPABLE
from hitless.kernel import barrier
from hitless.kernel.features import features
from meshd.demo.lab import Lab
from tests.patience import often
from tests.releases import write_release
from tests.upgrade.conftest import Make, Release
from tests.upgrade.test_under_fire import BACK, clients, counted

PROGRAMS = """
MAP(tally, ARRAY, 1, __u32, __u64);
SEC("netfilter") int early(void *ctx) { return 1; }
SEC("cgroup/connect_unix") int local(struct bpf_sock_addr *ctx) { return 1; }
SEC("perf_event") int sampled(void *ctx) { return 0; }
SEC("tc") int late(struct __sk_buff *ctx) { return -1; }
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "GPL";
"""
ASLEEP = 'SEC("iter.s/task") int asleep(void *ctx) { return 0; }\n'
BLOOM = 'struct { __uint(type, 30); __uint(max_entries, 8); __type(value, __u32); } seen SEC(".maps");\n'
GUARDED = """
struct guarded { struct bpf_spin_lock lock; __u32 count; };
MAP(whole, ARRAY, 1, __u32, struct guarded);  // and it makes the compiler tell the layout
struct inner { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32);
               __type(value, struct guarded); };
struct { __uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS); __uint(max_entries, 1); __type(key, __u32);
         __array(values, struct inner); } outer SEC(".maps");
"""
ENTRY = '[[attach]]\nprogram = "early"\nhook = "netfilter"\ntarget = "${netns}"\nlink = "early"\n'
POINT = 'family = "ipv4"\npoint = "input"\npriority = 7\n'
LOCAL = '[[attach]]\nprogram = "local"\nhook = "cgroup"\ntarget = "${cgroup}"\nlink = "local"\n'
FILTER = '[[attach]]\nprogram = "late"\nhook = "tc-ingress"\ntarget = "lo"\nnetns = "${netns}"\nlink = "late"\n'
SAMPLED = '[[attach]]\nprogram = "sampled"\nhook = "perf_event"\ntarget = "page-faults:1000"\nlink = "sampled"\n'
TYPES = '[object.program.early]\ntype = "netfilter"\n[object.program.local]\ntype = "cgroup/connect_unix"\n'
Take = Callable[[str], None]

# Run in mounts of its own, where the kernel tells nobody of its types, so that no iterator can be loaded.
BLIND = "mount -t tmpfs none /sys/kernel/btf && exec "


@pytest.mark.parametrize(
    ("name", "more", "attach"),
    [
        ("netfilter link", "", ENTRY + POINT),
        ("cgroup unix hooks", "", LOCAL),
        ("map/bloom_filter", BLOOM, ""),
        ("tc filters", "", FILTER),
        (INNER_LOCK, GUARDED, ""),
        (EVENT_INFO, "", SAMPLED),
        (SLEEPABLE, ASLEEP, ""),
    ],
)
def test_a_release_that_needs_it_is_refused_by_its_name_before_anything_happens(
    take_away: Take, name: str, more: str, attach: str, lab: Lab, node: hitless.Node, tmp_path: Path
) -> None:
    if name in features():
        take_away(name)
    written = write_release(tmp_path / "1", "1.0", more + PROGRAMS, TYPES + attach)
    bundle = hitless.Bundle.load(written, {"cgroup": str(lab.cgroup), "netns": str(lab.netns)})
    with pytest.raises(UnsupportedError) as caught:
        hitless.plan(node, bundle)
    assert caught.value.facts["feature"] == name
    assert caught.value.facts["needs"] == next(one.needs for one in FEATURES if one.name == name)
    assert not node.root.exists()


def test_programs_that_may_sleep_are_named_whether_the_release_has_them_or_the_one_before(
    take_away: Take, node: hitless.Node, tmp_path: Path
) -> None:
    sleeping, other = (
        hitless.Bundle.load(write_release(tmp_path / version, version, source + PROGRAMS, TYPES), {})
        for version, source in (("1.0", ASLEEP), ("2.0", ""))
    )
    hitless.apply(node, sleeping)
    take_away(SLEEPABLE)
    for bundle, words, names in ((sleeping, "asleep", ["asleep"]), (other, "programs of what runs", [])):
        with pytest.raises(UnsupportedError, match=f"^waiting for {words}, which may sleep,") as caught:
            hitless.plan(node, bundle)
        assert (caught.value.facts["feature"], caught.value.facts["programs"]) == (SLEEPABLE, names)


def test_without_iterators_the_plan_says_that_user_space_copies(
    take_away: Take, release: Release, make: Make, node: hitless.Node
) -> None:
    hitless.apply(node, release(1))
    assert {entry.method for entry in hitless.plan(node, release(2)).maps if entry.name == "tally"} == {
        "copy and merge in the kernel"
    }
    take_away(ITERATE_HASH)
    planned = hitless.plan(node, release(2))
    assert {entry.method for entry in planned.maps if entry.name == "tally"} == {"batch copy, merge in the kernel"}
    assert hitless.apply(node, release(2)).maps


def test_without_the_types_of_the_kernel_counters_are_exact_and_the_plan_says_how(
    release: Release, releases: dict[int, Path], node: hitless.Node, lab: Lab
) -> None:
    hitless.apply(node, release(1))
    args = [str(releases[2]), "--root", str(node.root), "--set", f"cgroup={lab.cgroup}", "--json"]
    with clients(lab) as tries:
        done = []
        for verb in ("plan", "apply"):
            command = BLIND + shlex.join([sys.executable, "-m", "hitless", verb, *args])
            asked = ["unshare", "--mount", "sh", "-c", command]
            done.append(subprocess.run(asked, capture_output=True, text=True, check=False))
    assert [one.stderr for one in done] == ["", ""]
    planned, applied = (json.loads(one.stdout) for one in done)
    tally = next(entry for entry in planned["maps"] if entry["name"] == "tally")
    assert (tally["method"], tally["exactness"][:6]) == ("batch copy, merge in the kernel", "exact,")
    assert applied["committed"]
    assert counted(node) == tries


def test_without_membarrier_counters_are_exact_and_the_plan_says_how(
    monkeypatch: pytest.MonkeyPatch, take_away: Take, release: Release, node: hitless.Node, lab: Lab
) -> None:
    def refused() -> None:
        raise KernelError("membarrier: EINVAL", errno=errno.EINVAL)

    take_away(MEMBARRIER)
    monkeypatch.setattr(barrier, "call_membarrier", refused)
    hitless.apply(node, release(1))
    assert "an update of a map of maps" in (hitless.plan(node, release(2)).barrier or "")
    with clients(lab) as tries:
        for _ in range(often(6)):
            hitless.apply(node, release(2))
            hitless.apply(node, release(1), allow_loss=BACK)
    assert counted(node) == tries
