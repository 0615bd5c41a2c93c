"""The fixture itself: a node whose daemon knows nothing of hitless, and a loader that carries nothing over."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import hitless
from hitless.layout.model import Record
from tests.kmesh.bundles import VERSIONS, variables, write_bundle
from tests.kmesh.node import Built, KmeshNode, LoaderError, differences
from tests.kmesh.structs import SCHEMAS

FILLED = ("km_config", "km_frontend", "km_service", "km_endpoint", "km_backend", "km_authz_policies", "km_nodeinfo")


PLAIN = ("kmesh_version",)


def names(kind: Record) -> list[str]:
    return [field.name for field in kind.fields]


def test_a_start_pins_what_another_start_uses_again(node: KmeshNode) -> None:
    first = node.start(1)
    assert first.started.start == "Normal"
    assert not any(one.reused for one in first.started.maps.values())
    first.stop()
    again = node.start(1).started
    assert again.start == "Restart"
    assert all(one.reused for one in again.pinned.values())
    assert {name: one.id for name, one in again.pinned.items()} == {
        name: one.id for name, one in first.started.pinned.items()
    }


def test_a_start_carries_nothing_to_another_release(node: KmeshNode) -> None:
    node.start(1).stop()
    with pytest.raises(LoaderError, match="Update"):
        node.start(2)
    with pytest.raises(LoaderError, match=r"map km_\w+: .* is another one: \w+ \w+ \d+, not \d+"):
        node.start(2, version=VERSIONS[1])


@pytest.mark.parametrize("release", [1, 2])
def test_the_kernel_counts_what_clients_do_and_another_start_disturbs_nobody(node: KmeshNode, release: int) -> None:
    daemon = node.start(release)
    node.fill(release)
    before = node.dump(release)
    with node.traffic() as traffic:
        traffic.go()
        time.sleep(0.3)
        daemon.stop()
        node.start(release)
        time.sleep(0.3)
        totals = traffic.pause()
        assert node.wrong(release, traffic) == []
        assert min(traffic.connects().values()) > 0
        assert min(totals["denied"].denied["10.96.0.4"], totals["questions"].messages["10.96.0.10"]) > 0
        assert node.variables()["tc_mark_decrypt.from_nodes"] > 0
    after = node.dump(release)
    for name in FILLED:
        assert differences(before[name], after[name], ["hits"]) == []
    assert len(after["km_frontend"].keys) == 100_000


@pytest.mark.parametrize("release", [1, 2])
@pytest.mark.parametrize("stripped", [False, True])
def test_bundles_describe_both_releases(built: Built, tmp_path: Path, release: int, stripped: bool) -> None:
    objects, header = (built.stripped, built.headers[release]) if stripped else (built.objects, None)
    path = write_bundle(tmp_path / "bundle", release, objects[release], header)
    bundle = hitless.Bundle.load(path, variables(*map(Path, ("/cgroup", "/pods", "/snapshot"))))
    assert len(bundle.objects) == 9
    for name, told in SCHEMAS[release].items():
        spec = bundle.maps[name]
        for kind, wanted in zip((spec.key, spec.value), told, strict=True):
            if isinstance(kind, Record):
                assert (kind.size, names(kind)) == (wanted.itemsize, list(wanted.names or ()))
        assert name in PLAIN or isinstance(spec.value, Record), name
