"""A manifest that hitless init draws up: what it asks, and that plan takes it when that is answered."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

import benchmarks.build
import hitless
from hitless.skeleton import start_bundle
from meshd.demo.lab import Lab
from tests.cli.test_commands import as_json, hitless_command
from tests.fuzz.targets import EVERYTHING, object_of
from tests.releases import compile_object

TREE = Path(__file__).parents[2]
RELEASES = TREE / "src" / "meshd" / "bpf"
BENCHMARKS = ("bare", "flow", "interfaces", "mixing", "pass")

ODD = """
struct service_key { __u32 addr; __u32 port; };
struct service_value { __u32 hits; __u32 last[2]; };
#define SIZED(name, key, value) struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 8); \\
    __uint(key_size, key); __uint(value_size, value); } name SEC(".maps")
SIZED(km_service, 8, 12);
SIZED(km_endpoint, 4, 20);
struct { __uint(type, BPF_MAP_TYPE_SOCKHASH); __uint(max_entries, 8); __uint(key_size, 8); __uint(value_size, 4); }
    km_sockets SEC(".maps");
int jumped(struct xdp_md *ctx);
struct { __uint(type, BPF_MAP_TYPE_PROG_ARRAY); __uint(max_entries, 2); __uint(key_size, 4);
         __array(values, int (void *)); } km_jumps SEC(".maps") = { .values = { [1] = (void *)&jumped } };
SEC("xdp_auth") int early(struct xdp_md *ctx) { return XDP_PASS; }
SEC("xdp") int jumped(struct xdp_md *ctx) { return XDP_PASS; }
SEC("mesh/own") int own(struct __sk_buff *ctx) { return 0; }
SEC("tc_ingress") int shape(struct __sk_buff *ctx)
{
    struct service_key key = {};
    struct service_value *found = bpf_map_lookup_elem(&km_service, &key);
    return found ? (int)found->hits : 0;
}
SEC("cgroup/connect4/mesh") int connect4(struct bpf_sock_addr *ctx) { return 1; }
SEC("cgroup/skb") int skb(struct __sk_buff *ctx) { return 1; }
SEC("sk_msg") int redirect(struct sk_msg_md *ctx) { return SK_PASS; }
SEC("kprobe/do_exit") int probe(void *ctx) { return 0; }
SEC("netfilter") int guard(void *ctx) { return 1; }
SEC("uprobe") int probed(void *ctx) { return 0; }
SEC("perf_event") int sampled(void *ctx) { return 0; }
SEC("?sockops") int not_now(void *ctx) { return 1; }
char _license[] SEC("license") = "GPL";
"""


def complete(directory: Path, questions: list[dict[str, Any]], given: Mapping[str, str] = {}) -> None:
    """Answer every question by line: as given, else by its first candidate; an optional one without any is deleted."""
    file = directory / "bundle.toml"
    lines = file.read_text().splitlines()
    for question in questions:
        at = question["line"] - 1
        above = next(line for line in reversed(lines[:at]) if "[" in line or line.startswith("program ="))
        key = question["key"]
        default = question["candidates"][0] if question["candidates"] else None
        answer = given.get(f"{above}.{key}", given.get(key, default))
        if answer is None and question["optional"]:
            lines[at] = ""
            continue
        assert answer is not None, question
        lines[at] = f"{key} = {answer}" if key == "priority" else f'{key} = "{answer}"'
    file.write_text("\n".join(lines) + "\n")


def planned(directory: Path, node: hitless.Node, lab: Lab) -> hitless.Plan:
    places = {"cgroup": str(lab.cgroup), "interface": "lo", "netns": f"/run/netns/{lab.name}"}
    return hitless.plan(node, hitless.Bundle.load(directory, places))


LIBC = f"/usr/lib/{platform.machine()}-linux-gnu/libc.so.6"
GIVEN = {
    "version": "1.0", 'program = "probed".target': f"{LIBC}:malloc", "priority": "7", "[object.program.own].type": "tc",
    'program = "own".hook': "tc-egress", 'program = "own".target': "lo",
}  # fmt: skip


def groups(folder: Path) -> dict[str, list[Path]]:
    """The objects of the tree, those together that are of one release."""
    folder.mkdir()
    found = {f"meshd-{path.name}": sorted(path.glob("*.bpf.o")) for path in sorted(RELEASES.iterdir()) if path.is_dir()}
    for name in BENCHMARKS:
        benchmarks.build.compile_bpf(name, folder, "-DRELEASE=1", "-DENTRIES=64", "-DFLAGS=0")
        found[name] = [folder / f"{name}.bpf.o"]
    for number in (1, 2, 3):
        source = f"#define RELEASE {number}\n" + (TREE / "tests" / "soak" / "meter.bpf.c").read_text()
        found[f"meter-{number}"] = [compile_object(source, folder / f"meter{number}.bpf.o")]
    (folder / "everything.bpf.o").write_bytes(object_of(EVERYTHING.read_text()))
    found["everything"] = [folder / "everything.bpf.o"]
    found["odd"] = [compile_object(ODD, folder / "odd.bpf.o")]
    return found


def test_plan_takes_what_is_drawn_up_for_every_object_of_the_tree(lab: Lab, tmp_path: Path) -> None:
    for name, objects in groups(tmp_path / "objects").items():
        directory = tmp_path / name
        _, made = start_bundle(objects, directory)
        asked = msgspec.to_builtins(made.questions)
        with pytest.raises(hitless.BundleError, match="questions that wait for an answer") as caught:
            hitless.Bundle.load(directory)
        lines = [question["line"] for question in caught.value.facts["questions"]]  # type: ignore[attr-defined]
        assert lines == [question["line"] for question in asked]
        complete(directory, asked, GIVEN)
        assert planned(directory, hitless.Node(lab.bpffs / name), lab).start_type == "normal", name


def test_what_the_file_does_not_tell_is_asked(tmp_path: Path) -> None:
    found = as_json("init", compile_object(ODD, tmp_path / "odd.bpf.o"))
    asked = {(tuple(question["candidates"]), question["key"]) for question in found["questions"]}
    assert (("cgroup/connect4",), "type") in asked
    assert (("service_value",), "value") in asked and (("service_key",), "key") in asked
    assert {(("xdp",), "type"), (("tc/ingress",), "type"), ((), "type")} <= asked
    text = (tmp_path / "bundle.toml").read_text()
    assert "hook kprobe is not supported" in text and "jumped is jumped to" in text
    assert "give a header by --types-from" in text
    assert 'target = "km_sockets"' in text


def test_a_header_answers_what_an_object_does_not(tmp_path: Path) -> None:
    header = tmp_path / "types.h"
    header.write_text("#include <linux/types.h>\nstruct endpoint_value { __u32 id[5]; };\n")
    objects = compile_object(ODD, tmp_path / "odd.bpf.o")
    asked = as_json("init", objects, "--types-from", header, "-o", tmp_path / "out")["questions"]
    assert ["endpoint_value"] in [question["candidates"] for question in asked]
    complete(tmp_path / "out", asked, GIVEN)
    value = hitless.Bundle.load(tmp_path / "out").maps["km_endpoint"].value
    assert value is not None and value.name == "endpoint_value"


def test_renames_are_asked_and_losses_are_told(tmp_path: Path) -> None:
    found = as_json("init", *sorted((RELEASES / "v2").glob("*.o")), "-o", tmp_path / "two", "--from", RELEASES / "v1")
    assert found["renames"] == {"service_counter": "counter"}
    assert found["losses"] == {"flow": ["cpu is dropped"]}
    complete(tmp_path / "two", found["questions"], GIVEN)
    assert 'was = "counter"' in (tmp_path / "two" / "bundle.toml").read_text()
    drawn = hitless.Bundle.load(tmp_path / "two")
    assert (drawn.name, {entry.link for entry in drawn.attach}) == ("mesh", {"connect4", "connect6", "sockops"})
    compared = as_json("check", RELEASES / "v1", tmp_path / "two", code=1)["maps"]
    verdicts = {entry["name"]: entry["verdict"] for entry in compared}
    assert verdicts["service_counter"] == "lossless"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    one = sorted((RELEASES / "v1").glob("*.o"))
    assert "version" in hitless_command("init", *one, "-o", tmp_path / "out")
    before = (tmp_path / "out" / "bundle.toml").read_bytes()
    assert "is there already" in as_json("init", *one, "-o", tmp_path / "out", code=1)["error"]["message"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / one[0].name).write_bytes(b"mine")
    assert "another file" in as_json("init", *one, "-o", tmp_path / "other", code=1)["error"]["message"]
    assert (tmp_path / "out" / "bundle.toml").read_bytes() == before
    assert (tmp_path / "other" / one[0].name).read_bytes() == b"mine"
    assert "cannot be read" in as_json("init", tmp_path / "gone.o", "-o", tmp_path, code=1)["error"]["message"]
    (tmp_path / "text.o").write_text("no object")
    assert "not an ELF file" in as_json("init", tmp_path / "text.o", "-o", tmp_path, code=1)["error"]["message"]
    both = as_json("init", one[0], RELEASES / "v2" / one[0].name, "-o", tmp_path, code=1)
    assert "two objects are called" in both["error"]["message"]
