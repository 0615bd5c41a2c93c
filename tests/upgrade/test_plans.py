"""Plans that are kept: applied as they are, or refused with what changed since."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.kernel.links import Link
from hitless.kernel.maps import Map, create
from hitless.upgrade.fingerprint import differences
from hitless.upgrade.model import Fingerprint, LinkFacts, MapFacts
from meshd.demo.lab import Lab
from tests.kills import kill_upgrade
from tests.releases import ATTACH, COUNTING, FIRST, write_release
from tests.upgrade.conftest import Release, empty_bpffs

BACK = ("tally", "limit")


@pytest.fixture
def planned(node: hitless.Node, release: Release) -> hitless.Plan:
    """Release 1 runs, and this is the plan of going to 2."""
    hitless.apply(node, release(1))
    return hitless.plan(node, release(2))


def refused(
    node: hitless.Node, bundle: hitless.Bundle, planned: hitless.Plan, kind: type[hitless.HitlessError], words: str
) -> hitless.HitlessError:
    """Applying the plan fails so, and what is live is what was live."""
    before = node.observe()
    with pytest.raises(kind, match=words) as caught:
        hitless.apply(node, bundle, planned=planned)
    assert node.observe() == before
    return caught.value


def test_a_plan_that_was_saved_and_loaded_is_the_same_plan(planned: hitless.Plan, tmp_path: Path) -> None:
    hitless.save_plan(planned, tmp_path / "plan")
    assert hitless.load_plan(tmp_path / "plan") == planned


def test_a_saved_plan_is_applied_as_it_is(
    node: hitless.Node, release: Release, planned: hitless.Plan, tmp_path: Path
) -> None:
    hitless.save_plan(planned, tmp_path / "plan")
    result = hitless.apply(node, release(2), planned=hitless.load_plan(tmp_path / "plan"))
    assert (result.to_version, result.generation, result.hooks) == ("2.0", 2, planned.hooks)
    assert [(entry.name, entry.action) for entry in result.maps] == [
        (entry.name, entry.action) for entry in planned.maps
    ]


def test_a_plan_for_a_first_start_is_applied(node: hitless.Node, release: Release) -> None:
    planned = hitless.plan(node, release(1))
    assert hitless.apply(node, release(1), planned=planned).start_type == "normal"


def test_entries_that_come_and_go_do_not_make_a_plan_stale(
    node: hitless.Node, release: Release, planned: hitless.Plan
) -> None:
    node.map("tally").update_many((port, {"count": port}) for port in range(100))
    assert hitless.apply(node, release(2), planned=planned).maps[0].copied == 100


def test_the_losses_that_were_allowed_when_it_was_planned_are_allowed_by_the_plan(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(2))
    planned = hitless.plan(node, release(1), BACK)
    assert hitless.apply(node, release(1), planned=planned).to_version == "1.0"


def test_a_plan_with_a_loss_that_nobody_allowed_is_refused(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(2))
    planned = hitless.plan(node, release(1))
    refused(node, release(1), planned, hitless.LossNotAllowedError, "since is dropped")


def test_a_loss_cannot_be_allowed_beside_a_plan(node: hitless.Node, release: Release) -> None:
    hitless.apply(node, release(2))
    planned = hitless.plan(node, release(1))
    with pytest.raises(hitless.LossNotAllowedError, match="plan again with all that may be lost"):
        hitless.apply(node, release(1), BACK, planned=planned)
    assert node.observe().version == "2.0"


def test_a_bundle_that_changed_since_is_refused_with_both_digests(
    node: hitless.Node, lab: Lab, tmp_path: Path
) -> None:
    variables = {"cgroup": str(lab.cgroup)}
    directory = write_release(tmp_path, "1.0", FIRST + COUNTING)
    bundle = hitless.Bundle.load(directory, variables)
    planned = hitless.plan(node, bundle)
    write_release(tmp_path, "1.0", FIRST + COUNTING, ATTACH + "# a word more\n")
    changed = hitless.Bundle.load(directory, variables)
    error = refused(node, changed, planned, hitless.BundleError, "is not what was planned")
    assert bundle.digest in error.message
    assert changed.digest in error.message
    assert not node.root.exists()


def test_other_values_for_the_targets_than_were_planned_are_refused(
    node: hitless.Node, releases: dict[int, Path], lab: Lab, planned: hitless.Plan
) -> None:
    other = hitless.Bundle.load(releases[2], {"cgroup": "/sys/fs/cgroup"})
    refused(node, other, planned, hitless.BundleError, "the plan has link connect4 on .*give the same values")


def test_another_upgrade_since_is_told_as_generation_and_release(
    node: hitless.Node, release: Release, planned: hitless.Plan
) -> None:
    hitless.apply(node, release(2))
    words = r"generation 1 \(release 1.0, .*\) ran, and now generation 2 \(release 2.0, .*\) does; .*plan again"
    refused(node, release(2), planned, hitless.NodeError, words)


def test_another_map_in_the_place_of_one_is_told_by_its_name_and_what_differs(
    node: hitless.Node, release: Release, planned: hitless.Plan
) -> None:
    pin = node.current / "maps" / "owner"
    with Map.open(pin) as owner, create(1, "owner", 4, 8, 32) as other:
        pin.unlink()
        other.pin(pin)
        error = refused(
            node, release(2), planned, hitless.NodeError, f"map owner: id {owner.info.id} became {other.info.id}"
        )
    assert "map owner: max_entries 64 became 32" in error.message
    assert "map owner: other layout" in error.message


def test_another_program_on_a_link_is_told(
    node: hitless.Node, release: Release, planned: hitless.Plan, lab: Lab
) -> None:
    other = hitless.Node(lab.bpffs / "other")
    hitless.apply(other, release(1))
    with Link.open(other.links / "connect4") as theirs:
        pin = node.links / "connect4"
        pin.unlink()
        theirs.pin(pin)
        words = rf"link connect4: id \d+ became {theirs.info.id}; link connect4: program \d+ became"
        refused(node, release(2), planned, hitless.NodeError, words)


def test_a_link_that_is_gone_is_told(node: hitless.Node, release: Release, planned: hitless.Plan) -> None:
    (node.links / "connect4").unlink()
    refused(node, release(2), planned, hitless.NodeError, "link connect4 is gone")


def test_a_cgroup_that_was_made_anew_is_told(node: hitless.Node, releases: dict[int, Path], lab: Lab) -> None:
    target = lab.cgroup / "anew"
    target.mkdir()
    bundle = hitless.Bundle.load(releases[1], {"cgroup": str(target)})
    planned = hitless.plan(node, bundle)
    target.rmdir()
    target.mkdir()
    refused(node, bundle, planned, hitless.NodeError, rf"cgroup {target}: id \d+ became {target.stat().st_ino}")
    target.rmdir()


FULL = Fingerprint(
    boot="a",
    kernel="6.18",
    generation=1,
    version="1.0",
    digest="d",
    maps={"flow": MapFacts(1, "hash", 64, 0, "x")},
    programs={"count4": 5},
    links={"connect4": LinkFacts(1, 5, 100, "cgroup_inet4_connect")},
    targets={"cgroup /c": 100},
    features={"iter": True},
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"boot": "b"}, ["the machine was started again since, which takes all pins, maps and links away"]),
        ({"kernel": "6.19"}, ["kernel 6.18 became 6.19"]),
        ({"features": {"iter": False}}, ["the kernel can no longer do iter"]),
        ({"programs": {"count4": 6}}, ["program count4: id 5 became 6"]),
        ({"maps": {}}, ["map flow is gone"]),
        ({"maps": {**FULL.maps, "more": FULL.maps["flow"]}}, ["map more came"]),
        ({"maps": {"flow": MapFacts(1, "hash", 64, 0, "y", (2,))}},
         ["map flow: other layout", "map flow: other slots are filled"]),
        ({"rings": ("events",)}, ["ring buffer events of the last release holds bytes now that nobody reads"]),
        ({}, []),
    ],
    ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_became_of_a_node_is_told_in_words(change: dict[str, object], told: list[str]) -> None:
    assert list(differences(FULL, msgspec.structs.replace(FULL, **change))) == told


def test_an_upgrade_that_was_killed_since_is_recovered_first_and_not_by_the_plan(
    node: hitless.Node, release: Release, releases: dict[int, Path], lab: Lab, planned: hitless.Plan
) -> None:
    kill_upgrade("copy", node, releases[2], {"cgroup": str(lab.cgroup)})
    refused(node, release(2), planned, hitless.InterruptedUpgradeError, f"hitless recover --root {node.root}")
    hitless.recover(node)
    assert hitless.apply(node, release(2), planned=planned).to_version == "2.0"


def test_a_plan_for_another_root_is_refused(release: Release, planned: hitless.Plan, lab: Lab) -> None:
    other = hitless.Node(lab.bpffs / "other")
    refused(other, release(2), planned, hitless.PlanError, rf"was made for the pin root .*/store, not for {other.root}")
    assert not other.root.exists()


def test_a_plan_that_was_edited_into_another_is_not_believed(
    node: hitless.Node, release: Release, planned: hitless.Plan
) -> None:
    first, *rest = planned.maps
    edited = msgspec.structs.replace(planned, maps=(msgspec.structs.replace(first, action="discard"), *rest))
    refused(node, release(2), edited, hitless.PlanError, rf"maps {first.name}\).*plan again")


def test_a_plan_of_a_hitless_without_fingerprints_is_refused(
    node: hitless.Node, release: Release, planned: hitless.Plan
) -> None:
    bare = msgspec.structs.replace(planned, fingerprint=None)
    refused(node, release(2), bare, hitless.PlanError, "does not say which node")


# The file


def test_a_plan_file_is_for_its_owner_alone_and_replaces_what_was_there(
    planned: hitless.Plan, tmp_path: Path
) -> None:
    file = tmp_path / "plan"
    file.write_text("old")
    file.chmod(0o644)
    hitless.save_plan(planned, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert hitless.load_plan(file) == planned
    assert list(tmp_path.iterdir()) == [file]


def test_a_plan_file_that_is_a_symbolic_link_is_replaced_and_not_followed(
    planned: hitless.Plan, tmp_path: Path
) -> None:
    theirs, file = tmp_path / "theirs", tmp_path / "plan"
    theirs.write_text("theirs")
    file.symlink_to(theirs)
    hitless.save_plan(planned, file)
    assert theirs.read_text() == "theirs"
    assert not file.is_symlink()


@pytest.mark.parametrize("name", ["gone/plan", "."])
def test_a_plan_that_cannot_be_written_is_told_and_leaves_nothing(
    planned: hitless.Plan, tmp_path: Path, name: str
) -> None:
    with pytest.raises(hitless.PlanError, match="the plan cannot be written to"):
        hitless.save_plan(planned, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def spoiled(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(change(file.read_bytes()))


def into_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def with_key(name: str, value: object) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (spoiled(lambda data: data[: len(data) // 2]), hitless.PlanError, "is no saved plan, or damaged"),
        (spoiled(lambda data: b""), hitless.PlanError, "is no saved plan, or damaged"),
        (spoiled(lambda data: b"\xff\x00" * 9), hitless.PlanError, "is no saved plan, or damaged"),
        (spoiled(lambda data: b"[1]"), hitless.PlanError, "is no saved plan, or damaged"),
        (spoiled(lambda data: b'{"x": ' + b"[" * 100_000), hitless.PlanError, "is no saved plan, or damaged"),
        (spoiled(lambda data: data.replace(b'"tally"', b'"tallx"', 1)), hitless.PlanError, "its checksum"),
        (with_key("kind", "grocery list"), hitless.PlanError, "its kind is 'grocery list'"),
        (with_key("schema", 2), hitless.UnsupportedError, r"newer hitless \(plan schema 2, this one knows 1\)"),
        (lambda file: file.chmod(0o620), hitless.PlanError, "mode 0620\\) can be changed by others"),
        (lambda file: file.unlink(), hitless.PlanError, "cannot be read: No such file"),
        (into_directory, hitless.PlanError, "is no regular file|Is a directory"),
    ],
    ids=["half", "empty", "binary", "list", "deep", "a letter", "other kind", "newer", "writable", "gone", "directory"],
)
def test_a_plan_file_that_is_not_as_it_was_written_is_refused_by_name(
    planned: hitless.Plan,
    tmp_path: Path,
    spoil: Callable[[Path], object],
    kind: type[hitless.HitlessError],
    words: str,
) -> None:
    file = tmp_path / "plan"
    hitless.save_plan(planned, file)
    spoil(file)
    with pytest.raises(kind, match=words):
        hitless.load_plan(file)


# A restart of the machine in between takes everything on a bpffs away; a new mount has as little on it.


def test_a_plan_from_before_the_bpffs_was_emptied_is_refused(
    node: hitless.Node, release: Release, planned: hitless.Plan, lab: Lab
) -> None:
    empty_bpffs(node, lab)
    words = r"generation 1 \(release 1.0, .*\) ran, and now nothing does.*plan again"
    refused(node, release(2), planned, hitless.NodeError, words)
    assert not node.root.exists()


def test_a_plan_from_before_a_restart_of_the_machine_is_refused(
    node: hitless.Node, release: Release, planned: hitless.Plan, lab: Lab
) -> None:
    empty_bpffs(node, lab)
    assert planned.fingerprint is not None
    earlier = msgspec.structs.replace(planned.fingerprint, boot="3f2c9a0e-0000-0000-0000-000000000000")
    stale = msgspec.structs.replace(planned, fingerprint=earlier)
    refused(node, release(2), stale, hitless.NodeError, "the machine was started again since")
    assert hitless.apply(node, release(2)).start_type == "normal"
