"""A node as Kmesh's own loader leaves it, upgraded by what the profile draws up, by the init container's command."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

import hitless
from hitless.bundle import unite_maps
from hitless.carry import is_global
from hitless.compare import compare
from hitless.kernel.interfaces import interfaces
from hitless.kernel.links import Link
from hitless.kernel.maps import Map, create
from hitless.kernel.namespaces import Namespace
from hitless.kernel.programs import Program, load_object
from hitless.kernel.xdp import Xdp
from hitless.layout.elf import read_object
from hitless.layout.model import ProgramSpec
from hitless.layout.sections import meant
from hitless.public import version_number
from hitless.skeleton import start_bundle
from hitless.upgrade.pinned import look_at
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.adopt.conftest import pinned
from tests.cli.test_commands import as_json
from tests.cli.test_init import complete
from tests.cli.test_live_init import attach
from tests.cli.test_profile import OBJECTS, kmesh

LINKS = {
    "cgroup_connect4_prog": "sockconn/sockconn_prog",
    "sockops_prog": "sockops/cgroup_sockops_prog",
    "cgroup_skb_ingress_prog": "cgroup_skb/cgroup_skb_ingress_prog",
    "cgroup_skb_egress_prog": "cgroup_skb/cgroup_skb_egress_prog",
}
SLOTS = {
    "km_cgr_tailcall": ["cgroup_connect4_prog"],
    "km_xdp_tailcall": ["policies_check", "policy_check", "xdp_shutdown_in_userspace"],
}
TYPES = {"xdp_auth": "xdp", "tc_ingress": "tc"}
FILES = list(OBJECTS)
CHANGED = {
    name: text.replace("{ __u32 endpoints; __u32 policy; }", "{ __u64 since; __u32 endpoints; __u32 policy; }")
    for name, text in OBJECTS.items()
}
ARRAY = 2


def number(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


class Loader:
    """Kmesh's: every map pinned by its name, every link at its place, XDP in a pod without any."""

    def __init__(self, root: Path, lab: Lab) -> None:
        self.root = root
        self.cgroup = lab.cgroup
        self.pod = interfaces("lo", Namespace.at(str(lab.netns)))[0]

    def start(self, objects: list[Path], version: str) -> None:
        for path in ("map", "sockconn", "sockops", "cgroup_skb"):
            (self.root / path).mkdir(parents=True, exist_ok=True)
        self._load(objects)
        self._fill(self.programs)
        for name, pin in LINKS.items():
            kind = {"connect4": "cgroup_inet4_connect", "sockops": "cgroup_sock_ops", "ingress": "cgroup_inet_ingress"}
            attach_type = next((told for word, told in kind.items() if word in name), "cgroup_inet_egress")
            Link.attach_cgroup(self.programs[name], self.cgroup, attach_type).pin(self.root / pin)
        with opened(self.root / "map" / "km_socket") as sockets:
            attach(self.programs["sendmsg_prog"], sockets.fd, "sk_msg_verdict", 0)
        Xdp.attach(self.programs["xdp_authz"], self.pod, "generic")
        with create(ARRAY, "kmesh_version", 4, 4, 1) as held:
            held.update(bytes(4), number(version_number(version)))
            held.pin(self.root / "map" / "kmesh_version")

    def restart(self, objects: list[Path]) -> None:
        """With the maps that are there, and its programs loaded once more and put on its links."""
        self._load(objects)
        self._fill(self.programs)
        for name, pin in LINKS.items():
            with Link(pinned(self.root / pin)) as link, Program.by_id(link.info.program_id) as runs:
                link.update(self.programs[name], runs)

    def _load(self, objects: list[Path]) -> None:
        programs: dict[str, Program] = {}
        for file in objects:
            spec = read_object(file.read_bytes(), file.stem)
            known = [one if one.type else self.typed(one) for one in spec.programs]
            there = {path.name: opened(path) for path in (self.root / "map").iterdir()}
            sections = {name: one for name, one in unite_maps([spec]).items() if is_global(name)}
            own = {one.name: there[one.name] for one in spec.maps if one.name in there}
            loaded = load_object(file.read_bytes(), file.stem, own, sections, known)
            for name, held in loaded.maps.items():
                if not is_global(name) and name not in there:
                    held.pin(self.root / "map" / name)
            programs |= loaded.programs
        self.programs = programs

    @staticmethod
    def typed(program: ProgramSpec) -> ProgramSpec:
        kind, attach_type = meant(TYPES[program.section]) or ("", "")
        return msgspec.structs.replace(program, type=kind, attach_type=attach_type)

    def _fill(self, programs: Mapping[str, Program]) -> None:
        for name, leaves in SLOTS.items():
            with opened(self.root / "map" / name) as held:
                for slot, leaf in enumerate(leaves):
                    held.update(number(slot), number(programs[leaf].fd))


    def mistake(self) -> None:
        """What Kmesh's restart does: its program for outgoing packets is put on the link of incoming ones."""
        link = Link(pinned(self.root / LINKS["cgroup_skb_ingress_prog"]))
        with link, Program.by_id(link.info.program_id) as runs:
            link.update(self.programs["cgroup_skb_egress_prog"], runs)

    def end(self) -> None:
        """All that its process held is given back."""
        for program in self.programs.values():
            program.close()


def draw(objects: list[Path], out: Path, version: str, lab: Lab) -> Path:
    """What the profile says of them, with the questions answered."""
    _, made = start_bundle(objects, out, daemon="kmesh")
    asked = msgspec.to_builtins(made.questions)
    given = {"[map.kmesh_map64].value": "bytes", "[map.km_nodeinfo].key": "__u32", "[map.km_nodeinfo].value": "__u32"}
    complete(out, asked, {"version": version, **given})
    manifest = out / "bundle.toml"
    text = manifest.read_text().replace("/mnt/kmesh_mapspecs", str(lab.scratch))
    manifest.write_text(text.replace("/run/netns/*", str(lab.netns)))
    return out


def opened(path: Path) -> Map:
    """The map that any loader gets by the path."""
    return Map(pinned(path))


def test_a_node_of_kmesh_is_upgraded_by_what_the_profile_draws_up(lab: Lab, tmp_path: Path) -> None:
    old = kmesh(tmp_path / "old", {name: OBJECTS[name] for name in FILES})
    new = kmesh(tmp_path / "new", {name: CHANGED[name] for name in FILES})
    running, into = draw(old, tmp_path / "1", "v1.0.0", lab), draw(new, tmp_path / "2", "v1.1.0", lab)
    assert compare(str(running), str(into)).verdict == "lossless"
    loader = Loader(lab.bpffs / "bpf_kmesh_workload", lab)
    loader.start(old, "v1.0.0")
    with Map.open(loader.root / "map" / "km_service") as held:
        for one in range(5):
            held.update(number(one), struct.pack("=II", 10 + one, 20 + one))
    with Map.open(loader.root / "map" / "kmesh_map64") as held:
        held.update(number(7), bytes(range(64)))
    place = Xdp.find(loader.pod)
    assert place is not None
    before = place.info.program_id
    command = ("apply", into, "--adopt", "--running", running, "--root", loader.root)
    places = ("--set", f"cgroup={lab.cgroup}", "--yes")
    maps = {entry["name"]: entry["action"] for entry in as_json(*command, *places)["maps"]}
    assert (maps["km_service"], maps["kmesh_map64"]) == ("convert", "keep")
    with opened(loader.root / "map" / "km_service") as held:
        for one in range(5):
            assert held.lookup(number(one)) == struct.pack("=QII", 0, 10 + one, 20 + one)
    with opened(loader.root / "map" / "kmesh_map64") as held:
        assert held.lookup(number(7)) == bytes(range(64))
    with opened(loader.root / "map" / "kmesh_version") as held:
        assert held.lookup(bytes(4)) == number(version_number("v1.1.0"))
    assert place.info.program_id not in (0, before)
    assert "KmeshCgroupSockWorkload" in (lab.scratch / "mapspecs_by_prog.json").read_text()
    node = hitless.Node(loader.root)
    assert hitless.verify(node).problems == ()
    again = hitless.plan(node, hitless.Bundle.load(into, {"cgroup": str(lab.cgroup)}))
    assert again.start_type == "restart"
    seen = look_at(loader.root, [read_object(file.read_bytes(), file.stem) for file in new])
    assert seen.public == {"maps": "map"}
    assert {name: seen.hooks[name][0].keys["pin"] for name in LINKS} == LINKS


def test_the_other_program_on_a_link_is_put_right_by_an_upgrade(lab: Lab, tmp_path: Path) -> None:
    old = kmesh(tmp_path / "old", {name: OBJECTS[name] for name in FILES})
    new = kmesh(tmp_path / "new", {name: CHANGED[name] for name in FILES})
    places = {"cgroup": str(lab.cgroup)}
    running = hitless.Bundle.load(draw(old, tmp_path / "1", "v1.0.0", lab), places)
    into = hitless.Bundle.load(draw(new, tmp_path / "2", "v1.1.0", lab), places)
    loader = Loader(lab.bpffs / "bpf_kmesh_workload", lab)
    loader.start(old, "v1.0.0")
    loader.mistake()
    loader.end()
    node = hitless.Node(loader.root)
    found = hitless.adopt(node, running)
    assert any("cgroup_skb_ingress_prog runs cgroup_skb_egress_prog" in note for note in found.notes)
    assert hitless.verify(node).problems == ()
    hitless.apply(node, into)
    link = Link(pinned(loader.root / LINKS["cgroup_skb_ingress_prog"]))
    with link, Program.by_id(link.info.program_id) as runs:
        assert runs.function == "cgroup_skb_ingress_prog"
    loader.restart(new)
    loader.mistake()
    loader.end()
    assert hitless.verify(node).problems == ()
    assert status(node).problems == ()
    assert hitless.plan(node, running).start_type == "update"
    hitless.rollback(node, ("km_service",))
    assert hitless.verify(node).problems == ()
