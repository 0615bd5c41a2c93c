"""A node in a lab of its own, and two releases of a small data path."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import hitless
from hitless.kernel.maps import Map
from meshd.demo.lab import Lab
from tests.releases import ATTACH, COUNTING, FIRST, SECOND, write_release

Release = Callable[[int], hitless.Bundle]
Make = Callable[..., hitless.Bundle]

PROGRAM = """
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx) { return 1; }
char _license[] SEC("license") = "GPL";
"""


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two releases: 2 has another layout in most maps, and 1 says how to come back."""
    top = tmp_path_factory.mktemp("releases")
    back = ATTACH + '[map.limit]\nwas = "limits"\n[map.extra]\non_loss = "discard"\n'
    return {
        1: write_release(top / "1", "1.0", FIRST + COUNTING, back),
        2: write_release(top / "2", "2.0", SECOND + COUNTING, ATTACH + '[map.limits]\nwas = "limit"\n'),
    }


@pytest.fixture
def release(releases: dict[int, Path], lab: Lab) -> Release:
    """Load release 1 or 2, attached to the lab's cgroup."""
    return lambda number: hitless.Bundle.load(releases[number], {"cgroup": str(lab.cgroup)})


@pytest.fixture
def node(lab: Lab) -> hitless.Node:
    """A pin root of its own."""
    return hitless.Node(lab.bpffs / "store")


@pytest.fixture
def make(lab: Lab, tmp_path: Path) -> Make:
    """A release of some version with these maps."""

    def release(version: str, maps: str, program: str = PROGRAM) -> hitless.Bundle:
        path = write_release(tmp_path / version, version, maps + program)
        return hitless.Bundle.load(path, {"cgroup": str(lab.cgroup)})

    return release


@pytest.fixture
def build(lab: Lab, tmp_path: Path) -> Make:
    """A release of some version with these maps beside the counting program, with rules and converters."""

    def bundle(version: str, maps: str, rules: str = "", converters: str = "") -> hitless.Bundle:
        directory = tmp_path / version
        write_release(directory, version, maps + COUNTING, ATTACH + rules)
        (directory / "converters.py").write_text(converters)
        return hitless.Bundle.load(directory, {"cgroup": str(lab.cgroup)})

    return bundle


def empty_bpffs(node: hitless.Node, lab: Lab) -> None:
    """Another bpffs in the place of the lab's, with nothing on it, as after a restart of the machine."""
    node.access.lock.close()  # which a process that did not live through that does not hold
    subprocess.run(["umount", str(lab.bpffs)], check=True)
    subprocess.run(["mount", "-t", "bpf", "-o", "mode=0700", lab.name, str(lab.bpffs)], check=True)


def everything(node: hitless.Node) -> object:
    """Pins, maps, programs and links as the kernel has them, and all entries."""
    entries = {}
    for path in sorted((node.root / "maps").iterdir()):
        with Map.open(path) as held:
            keys, values = held.entries()
            entries[path.name] = sorted((k.tobytes(), v.tobytes()) for k, v in zip(keys, values, strict=True))
    return node.observe(), sorted(str(path) for path in node.root.rglob("*")), entries
