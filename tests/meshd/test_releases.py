"""The bundled releases are what the daemon takes them for, and change in every way that an upgrade must survive."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

import hitless
from hitless.layout.codec import decode, encode
from hitless.layout.diff import MapDiff, diff_maps
from hitless.layout.model import Array, Record
from meshd.desired import desired
from meshd.model import Backend, Config, Policy, Service
from meshd.releases import RELEASES, Release

EACH = pytest.mark.parametrize("release", RELEASES.values(), ids=lambda release: release.version)
BY_VALUE = pytest.mark.parametrize(
    "release", [one for one in RELEASES.values() if not one.tables], ids=lambda release: release.version
)


def load(number: int) -> hitless.Bundle:
    return hitless.Bundle.load(RELEASES[number].bundle)


def changes(old: int, new: int) -> dict[str, MapDiff]:
    before, after = load(old), load(new)
    return {diff.name: diff for diff in diff_maps([*before.maps.values()], [*after.maps.values()], after.rules)}


def kinds(diff: MapDiff) -> set[tuple[str, str]]:
    return {(change.path, change.kind) for change in diff.changes}


@EACH
def test_the_table_of_releases_agrees_with_the_objects(bundles: Path, release: Release) -> None:
    bundle = hitless.Bundle.load(release.bundle)
    assert (bundle.name, bundle.version) == ("mesh", release.version)
    assert bundle.maps["service"].max_entries == release.services
    if release.tables:
        assert release.all_backends is not None
        rooms = {name: bundle.maps[name].max_entries for name in ("policy", "outbound", "inbound", "slot", "member")}
        assert all(rooms[name] == 2 * release.policies for name in ("policy", "outbound", "inbound")), "old and new"
        assert all(rooms[name] == 2 * release.all_backends for name in ("slot", "member"))
        return
    assert bundle.maps["policy"].max_entries == release.policies
    value = bundle.maps["service"].value
    assert isinstance(value, Record)
    room = next(field.type for field in value.fields if field.name == "backends")
    assert isinstance(room, Array)
    assert room.count == release.backends


@BY_VALUE
def test_what_is_desired_is_read_back_as_it_was_written(bundles: Path, release: Release) -> None:
    """Otherwise every look at the maps would find a difference."""
    maps = hitless.Bundle.load(release.bundle).maps
    web = Service("web", ip_address("10.96.0.10"), 80, "tcp", (Backend(ip_address("10.1.0.1"), 8080, 65535),))
    wanted = desired(Config((web,), (Policy("deny", "web", None, 2**63),)), release)
    service, policy = maps["service"], maps["policy"]
    assert service.key and service.value and policy.key and policy.value
    for key, value in wanted.services.items():
        assert decode(service.key, encode(service.key, key.to_map())) == key.to_map()
        assert decode(service.value, encode(service.value, value)) == value
    for policy_key in wanted.policies:
        assert decode(policy.key, encode(policy.key, policy_key.to_map())) == policy_key.to_map()
    assert set(decode(policy.value, bytes(policy.value_size))) == {"action", *release.policy_new}


@EACH
def test_what_follows_connections_is_switched_before_what_begins_them(bundles: Path, release: Release) -> None:
    links = [entry.link for entry in hitless.Bundle.load(release.bundle).attach]
    assert links[:3] == ["sockops", "connect6", "connect4"]


def test_going_forward_loses_nothing_that_the_release_did_not_give_up(bundles: Path) -> None:
    for old, new in ((1, 2), (2, 3), (1, 3), (3, 4), (1, 4)):
        rules = load(new).rules
        lossy = {name for name, diff in changes(old, new).items() if any(change.loss for change in diff.changes)}
        assert lossy <= {name for name, rule in rules.items() if rule.on_loss == "discard"}


def test_from_1_to_2_maps_are_renamed_and_added_and_fields_move_widen_and_go(bundles: Path) -> None:
    found = changes(1, 2)
    assert (found["service_counter"].was, found["service_counter"].verdict) == ("counter", "lossless")
    assert {("opened", "widened"), ("denied", "added"), ("closed", "moved")} <= kinds(found["service_counter"])
    assert {("cpu", "removed"), ("client", "added"), ("times", "nested"), ("times.start_ns", "renamed")} <= kinds(
        found["flow"]
    )
    assert {("backends[]", "nested"), ("backends[].weight", "widened"), ("", "max-entries")} <= kinds(found["service"])
    assert ("hits", "widened") in kinds(found["policy"])
    assert found["denial"].verdict == "added"


def test_from_2_to_3_an_array_and_a_map_grow_and_programs_are_added(bundles: Path) -> None:
    found = changes(2, 3)
    assert kinds(found["service"]) == {("backends", "resized")}
    assert kinds(found["flow"]) == {("", "max-entries")}
    assert ("failed", "added") in kinds(found["service_counter"])
    assert found["denial"].verdict == "identical"
    assert set(load(3).programs) - set(load(2).programs) == {"mesh_peername4", "mesh_peername6"}


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 3), (1, 3), (3, 4), (4, 3), (3, 1), (3, 2), (2, 1)])
def test_where_a_socket_wanted_to_go_is_the_same_bytes_in_every_release(bundles: Path, old: int, new: int) -> None:
    assert changes(old, new)["origin"].verdict == "identical"


def test_going_back_names_each_thing_that_the_older_release_has_no_place_for(bundles: Path) -> None:
    lost = {
        name: sorted(change.path for change in diff.changes if change.loss and change.kind in ("removed", "resized"))
        for name, diff in changes(3, 1).items()
    }
    assert lost == {
        "origin": [],
        "flow": ["client", "srtt_us", "times.established_ns"],
        "counter": ["denied", "failed"],
        "service": ["backends", "backends[].zone"],
        "policy": ["last_ns"],
        "denial": [""],
    }
