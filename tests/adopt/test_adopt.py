"""A node that another loader made becomes one of hitless's nodes, and its own loader goes on with it."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import hitless
from hitless.bundle import unite_maps
from hitless.kernel.links import Link, LinkInfo, all_links
from hitless.kernel.maps import Map
from hitless.kernel.programs import Program, load_object
from hitless.layout import kmesh
from hitless.public import version_number
from hitless.skeleton import start_bundle
from hitless.upgrade import adopt as adopting
from hitless.upgrade import recognise
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.adopt.conftest import MANIFEST, NEW, OLD, Loader, connect, pinned
from tests.releases import write_release

Release = Callable[[int], hitless.Bundle]


def test_what_runs_is_adopted_as_it_is_and_its_paths_lead_to_the_same_maps_and_links(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    before = {name: identity(loader.root / name) for name in ("map/tally", "map/version_of", loader.link)}
    found = hitless.adopt(node, release(1))
    assert {(one.name, one.layout) for one in found.maps} == {
        ("tally", "manifest"), ("version_of", "manifest"), ("idle", "manifest"), ("store.bss", "kernel"),
    }  # fmt: skip
    assert [(one.link, one.program, one.proven) for one in found.hooks] == [("connect4", "count4", True)]
    assert {name: identity(loader.root / name) for name in before} == before
    assert (loader.root / "map" / "tally").readlink() == Path("../hitless/current/maps/tally")
    assert node.root == loader.root / "hitless"
    assert node.map("tally").get(80) == {"count": 240, "last": 560}
    seen = status(hitless.Node(loader.root))
    assert (seen.version, seen.problems) == ("1.0", ())
    assert hitless.verify(node).problems == ()
    assert hitless.plan(node, release(1)).start_type == "restart"


def test_links_of_others_that_go_meanwhile_are_passed_over(
    node: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list(all_links())

    def with_gone() -> Iterator[LinkInfo]:
        for link in seen:
            yield link
            yield msgspec.structs.replace(link, id=1 << 30, program_id=1 << 30)

    monkeypatch.setattr(recognise, "all_links", with_gone)
    assert [one.link for one in hitless.adopt(node, release(1)).hooks] == ["connect4"]


def test_an_upgrade_of_what_was_adopted_changes_all_its_public_paths_at_once_and_loses_nothing(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    connect(lab, 80, 5)
    hitless.adopt(node, release(1))
    result = hitless.apply(node, release(2))
    assert {one.name: one.action for one in result.maps}["tally"] == "convert"
    connect(lab, 80, 4)
    with Map(pinned(loader.root / "map" / "tally")) as held:
        assert held.info.value_size == 24
        entries = [(keys, values) for keys, values in held.batches()]
    assert sum(len(keys) for keys, _ in entries) == 2002
    assert node.map("tally").get(80) == {"since": 0, "count": 249, "last": 560}
    assert node.map("tally").get(2999) == {"since": 0, "count": 8997, "last": 20993}
    assert node.map("version_of").get(0) == version_number("2.0")
    assert status(node).problems == ()


def test_its_own_loader_starts_on_the_result_and_uses_every_map_and_the_next_upgrade_goes_on_from_there(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    hitless.adopt(node, release(1))
    hitless.apply(node, release(2))
    ids = {name: live.info.id for name, live in node.observe().current.maps.items() if "." not in name}  # type: ignore[union-attr]
    assert loader.start(release(2).objects[0].data, "2.0") == sorted(ids)
    assert {name: identity(loader.root / "map" / name)[1] for name in ids} == ids
    connect(lab, 443, 3)
    assert status(node).problems == ()
    assert hitless.verify(node).problems == ()
    assert node.map("tally").get(443)["count"] == 443 * 3 + 3
    hitless.rollback(node, ("tally",))
    connect(lab, 443, 2)
    assert node.map("tally").get(443) == {"count": 443 * 3 + 5, "last": 443 * 7}
    assert node.map("version_of").get(0) == version_number("1.0")
    assert loader.start(release(1).objects[0].data, "1.0") == sorted(ids)


def test_its_variables_come_along_whichever_start_of_its_loader_made_them(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    connect(lab, 80, 3)
    hitless.adopt(node, release(1))
    loader.start(release(1).objects[0].data, "1.0")  # its variables begin anew then
    connect(lab, 80, 2)
    hitless.apply(node, release(2))
    connect(lab, 80, 2)
    assert node.map("store.bss").get(0)["calls"] == 4


def test_without_the_release_that_runs_it_is_taken_over_by_what_the_node_and_the_new_manifest_tell(
    lab: Lab, loader: Loader, node: hitless.Node, tmp_path: Path
) -> None:
    old = "struct before { __u32 count; __u32 last; };\nstruct before *was;\n"
    bound = MANIFEST.replace('key = "__u32"', 'key = "__u32"\nold_key = "__u32"')
    for name, before in (("tally", "before"), ("__u64", "__u64"), ("__u32", "__u32")):
        bound = bound.replace(f'\nvalue = "{name}"', f'\nvalue = "{name}"\nold_value = "{before}"')
    source = NEW.replace("struct tally *kept", f"{old}struct tally *kept").replace("!= (void *)1", "!= (void *)was + 1")
    path = write_release(tmp_path / "2", "2.0", source, bound)
    into = hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))})
    found = hitless.adopt_for(node, into)
    assert found is not None
    assert found.version == f"0x{version_number('1.0'):08x}"
    hitless.apply(node, into)
    assert node.map("tally").get(80) == {"since": 0, "count": 240, "last": 560}
    hitless.rollback(node, ("tally", "store.bss"))
    assert node.map("tally").get(80) == {"count": 240, "last": 560}
    assert node.map("version_of").get(0) == version_number("1.0")
    connect(lab, 80, 1)
    assert node.map("tally").get(80)["count"] == 241


def test_where_nothing_of_the_daemon_runs_or_the_same_release_does_nothing_is_done(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    assert hitless.adopt_for(node, release(1)) is None
    empty = lab.bpffs / "empty"
    empty.mkdir()
    assert hitless.adopt_for(hitless.Node(empty), release(1)) is None
    assert list(empty.iterdir()) == []
    assert not (loader.root / "hitless").exists()


def test_another_release_than_the_one_that_runs_is_refused_by_what_shows_it(
    loader: Loader, node: hitless.Node, release: Release, lab: Lab, tmp_path: Path
) -> None:
    with pytest.raises(hitless.NodeError, match=r"map tally at .* is a hash of 4 and 8 bytes, and the") as told:
        hitless.adopt(node, release(2))
    assert len(told.value.facts["questions"]) >= 1  # type: ignore[arg-type]
    other = write_release(tmp_path / "o", "1.0", OLD.replace("&found->count, 1", "&found->count, 2"), MANIFEST)
    with pytest.raises(hitless.NodeError, match=r"count4 \(tag \w+\) that is not the one of the bundle's object"):
        hitless.adopt(node, hitless.Bundle.load(other, {"cgroup": str(lab.cgroup_of("clients"))}))
    assert sorted(path.name for path in loader.root.iterdir()) == ["map", "sockconn"]


def test_a_version_that_the_daemon_does_not_call_so_is_asked_for_since_its_next_start_would_begin_anew(
    lab: Lab, loader: Loader, node: hitless.Node, tmp_path: Path
) -> None:
    path = write_release(tmp_path / "o", "v1", OLD, MANIFEST)
    wrong = hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))})
    with pytest.raises(hitless.NodeError, match=r"map version_of has 0xeb421bf2, and 'v1' is 0x\w+: the daemon"):
        hitless.adopt(node, wrong)
    path = write_release(tmp_path / "r", "v1", OLD, MANIFEST.replace("[public]", '[public]\nversion = "0xeb421bf2"'))
    hitless.adopt(node, hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))}))
    assert node.map("version_of").get(0) == version_number("1.0") == 0xEB421BF2


def test_types_that_nobody_else_knows_are_those_of_the_daemons_own_snapshot(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release, tmp_path: Path
) -> None:
    snapshot = tmp_path / "mapspecs.json"
    snapshot.write_bytes(kmesh.dump({"sockconn": release(1).objects[0].spec}))
    told = snapshot.read_bytes()
    public = f'[public]\nsnapshot = "{snapshot}"'
    path = write_release(tmp_path / "2", "2.0", NEW, MANIFEST.replace("[public]", public))
    into = hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))})
    found = hitless.adopt_for(node, into)
    assert found is not None
    assert {one.name: one.layout for one in found.maps}["tally"] == "snapshot"
    assert snapshot.read_bytes() == told
    hitless.apply(node, into)
    assert node.map("tally").get(80) == {"since": 0, "count": 240, "last": 560}
    maps = {spec.name: spec for spec in kmesh.load(snapshot.read_bytes())["store"].maps}
    assert [field.name for field in maps["tally"].value.fields] == ["since", "count", "last"]  # type: ignore[union-attr]


def test_a_program_that_uses_these_maps_and_that_nobody_named_is_asked_for_by_name(
    lab: Lab, loader: Loader, node: hitless.Node, tmp_path: Path
) -> None:
    source = OLD + 'SEC("cgroup/connect6") int count6(struct bpf_sock_addr *ctx)\n{ __u32 key = 0;\n'
    source += "    bpf_map_lookup_elem(&tally, &key); return 1; }\n"
    path = write_release(tmp_path / "two", "1.0", source, MANIFEST)
    bundle = hitless.Bundle.load(path, {"cgroup": str(lab.cgroup_of("clients"))})
    sections = {name: one for name, one in unite_maps([bundle.objects[0].spec]).items() if "." in name}
    with Map(pinned(loader.root / "map" / "tally")) as held:
        loaded = load_object(bundle.objects[0].data, "tally", {"tally": held}, sections)
        fd = os.open(lab.cgroup_of("clients"), os.O_RDONLY)
        with Link.attach(loaded.programs["count6"], fd, "cgroup_inet6_connect", "it") as link:
            link.pin(loader.root / "sockconn" / "other")
        os.close(fd)
    with pytest.raises(hitless.NodeError, match=r"\(count6\), which uses map tally, runs on link \d+, and no"):
        hitless.adopt(node, hitless.Bundle.load(path.parent / "two", {"cgroup": str(lab.cgroup_of("clients"))}))


def test_who_is_killed_while_adopting_leaves_what_the_next_one_finishes(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    for step in ("move", "finish"):
        pid = os.fork()
        if not pid:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(adopting, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                hitless.adopt(node, release(1))
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        connect(lab, 80, 1)
        if step == "move":
            assert not (loader.root / "hitless").exists()
            assert not (loader.root / "map" / "tally").is_symlink()
    node.find()
    assert "cleaned up" in " ".join(status(node).problems)
    hitless.recover(node)
    assert status(node).problems == ()
    assert (loader.root / "map" / "tally").is_symlink()
    hitless.apply(node, release(2))
    assert node.map("tally").get(80)["count"] == 242


def test_unload_takes_all_of_it_away_its_paths_too(
    lab: Lab, loader: Loader, node: hitless.Node, release: Release
) -> None:
    hitless.adopt(node, release(1))
    hitless.unload(node)
    assert [path for path in loader.root.rglob("*") if path.is_symlink() or not path.is_dir()] == []
    assert loader.start(release(2).objects[0].data, "2.0") == []


def identity(path: Path) -> tuple[str, int]:
    """What is pinned at the path, as any loader sees it."""
    fd = pinned(path)
    try:
        text = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    facts = dict(line.split(":") for line in text.splitlines())
    return next((kind, int(facts[kind])) for kind in ("map_id", "link_id", "prog_id") if kind in facts)


def test_the_programs_that_run_are_those_of_the_daemon_until_an_upgrade(
    loader: Loader, node: hitless.Node, release: Release
) -> None:
    with Link(pinned(loader.root / loader.link)) as link:
        runs = link.info.program_id
    hitless.adopt(node, release(1))
    with Link(pinned(loader.root / loader.link)) as link, Program.open(node.current / "progs" / "count4") as program:
        assert link.info.program_id == runs == program.info.id


def test_what_bpftool_started_is_adopted_by_what_init_finds_and_its_pins_follow_the_upgrade(
    lab: Lab, bundles: dict[int, Path], tmp_path: Path
) -> None:
    root, cgroup = lab.bpffs / "tool", lab.cgroup_of("clients")
    root.mkdir()
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    old, new = (str(bundles[number] / "store.bpf.o") for number in (1, 2))
    run(["bpftool", "prog", "loadall", old, root / "progs", "pinmaps", root / "maps"])
    run(["bpftool", "cgroup", "attach", cgroup, "connect4", "pinned", root / "progs" / "count4"])
    run(["bpftool", "map", "update", "pinned", root / "maps" / "tally", "key", "80", "0", "0", "0",
         "value", "5", "0", "0", "0", "7", "0", "0", "0"])  # fmt: skip
    releases = []
    for number, source in (("1.0", old), ("2.0", new)):
        manifest, _ = start_bundle([Path(source)], tmp_path / number / "tool", root=root)
        text = manifest.read_text().partition("\n[map.")[0].replace('version = "..."', f'version = "{number}"')
        types = {"idle": "__u64", "version_of": "__u32", "tally": "tally"}
        bound = "".join(f'[map.{name}]\nkey = "__u32"\nvalue = "{kind}"\n' for name, kind in types.items())
        manifest.write_text(f'{text}\n{bound}field.count.merge = "sum"\n')
        releases.append(hitless.Bundle.load(manifest.parent, {}))
    node = hitless.Node(root)
    found = hitless.adopt(node, releases[0])
    assert [(one.program, one.held, one.proven) for one in found.hooks] == [("count4", "no link", True)]
    connect(lab, 80, 2)
    hitless.apply(node, releases[1])
    connect(lab, 80, 3)
    assert node.map("tally").get(80) == {"since": 0, "count": 10, "last": 7}
    assert identity(root / "progs" / "count4") == identity(node.current / "progs" / "count4")
    assert identity(root / "maps" / "tally") == identity(node.current / "maps" / "tally")
    assert hitless.verify(node).problems == ()
