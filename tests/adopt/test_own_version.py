"""The map of the version is one that the daemon itself makes, as Kmesh does: no object declares it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import hitless
from hitless.kernel.maps import Map, create
from hitless.public import version_number
from meshd.demo.lab import Lab
from tests.adopt.conftest import MANIFEST, NEW, OLD, Loader
from tests.releases import write_release

ARRAY = 2
OWN = MANIFEST.replace('version_map = "version_of"', 'version_map = "own_version"')
BEFORE = (
    OWN.replace('key = "__u32"', 'key = "__u32"\nold_key = "__u32"')
    .replace('value = "__u64"', 'value = "__u64"\nold_value = "__u64"')
    .replace('\nvalue = "__u32"', '\nvalue = "__u32"\nold_value = "__u32"')
    .replace('value = "tally"', 'value = "tally"\nold_value = "before"')
)
FORMER = "struct before { __u32 count; __u32 last; };\nstruct before *was;\n"
NEWER = NEW.replace("struct tally *kept", f"{FORMER}struct tally *kept")
NEWER = NEWER.replace("!= (void *)1", "!= (void *)was + 1")


@pytest.fixture
def version(loader: Loader) -> Path:
    """Where the daemon has it, with the number of its version 1.0."""
    path = loader.root / "map" / "own_version"
    with create(ARRAY, "own_version", 4, 4, 1) as held:
        held.update(bytes(4), version_number("1.0").to_bytes(4, "little"))
        held.pin(path)
    return path


def number(path: Path) -> int:
    with Map.open(path) as held:
        return int.from_bytes(held.lookup(bytes(4)) or b"", "little")


@pytest.mark.parametrize("described", [True, False])
def test_it_stays_where_it_is_and_has_the_number_of_the_release(
    described: bool, lab: Lab, node: hitless.Node, version: Path, tmp_path: Path
) -> None:
    places = {"cgroup": str(lab.cgroup_of("clients"))}
    into = hitless.Bundle.load(write_release(tmp_path / "2", "2.0", NEWER, BEFORE), places)
    if described:
        hitless.adopt(node, hitless.Bundle.load(write_release(tmp_path / "1", "1.0", OLD, OWN), places))
    else:
        assert (found := hitless.adopt_for(node, into)) is not None
        assert found.version == f"0x{version_number('1.0'):08x}"
    hitless.apply(node, into)
    assert number(version) == version_number("2.0")
    assert node.map("tally").get(80) == {"since": 0, "count": 240, "last": 560}
    assert hitless.verify(node).problems == ()
    hitless.rollback(node, ("tally", "store.bss"))
    assert number(version) == version_number("1.0")
    hitless.unload(node)
    assert number(version) == 0  # it is not ours, and has to tell the daemon that nothing is there any more


def test_another_version_than_the_bundle_is_asked_for(
    lab: Lab, node: hitless.Node, version: Path, tmp_path: Path
) -> None:
    places = {"cgroup": str(lab.cgroup_of("clients"))}
    other = hitless.Bundle.load(write_release(tmp_path / "1", "1.0.7", OLD, OWN), places)
    with pytest.raises(hitless.NodeError, match="the daemon runs another version, or calls it otherwise"):
        hitless.adopt(node, other)


def test_it_is_made_where_the_daemon_looks_for_it(lab: Lab, node: hitless.Node, version: Path, tmp_path: Path) -> None:
    os.unlink(version)  # noqa: PTH108
    places = {"cgroup": str(lab.cgroup_of("clients"))}
    hitless.adopt(node, hitless.Bundle.load(write_release(tmp_path / "1", "1.0", OLD, OWN), places))
    assert number(version) == version_number("1.0")


def test_another_map_where_the_version_should_be_is_refused(
    lab: Lab, node: hitless.Node, version: Path, tmp_path: Path
) -> None:
    os.unlink(version)  # noqa: PTH108
    with create(ARRAY, "own_version", 4, 8, 1) as held:
        held.pin(version)
    places = {"cgroup": str(lab.cgroup_of("clients"))}
    with pytest.raises(hitless.NodeError, match="is to hold the daemon's version, and is no array of 4 bytes"):
        hitless.adopt(node, hitless.Bundle.load(write_release(tmp_path / "1", "1.0", OLD, OWN), places))
    assert not (node.base / "hitless").exists()
