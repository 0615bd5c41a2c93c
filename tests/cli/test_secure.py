"""What the command does with root's rights, and how a bundle is pinned by its digest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hitless
from hitless.kernel import capabilities
from hitless.kernel.capabilities import USED
from hitless.kernel.maps import Map
from meshd.demo.lab import Lab
from tests.cli.test_commands import as_json, hitless_command
from tests.releases import ATTACH, COUNTING, FIRST, SECOND, write_release
from tests.upgrade.conftest import node, releases

__all__ = ["node", "releases"]  # fixtures

NEEDED = [one.name for one in USED if one.needed]
OTHER = "f" * 64


def with_capabilities(names: list[str], *args: object) -> subprocess.CompletedProcess[str]:
    """Run Python with these capabilities and no other one, nor a way to get them."""
    bounding = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in names)])
    return without("--bounding-set", bounding, *args)


def without(option: str, value: str, *args: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["setpriv", f"{option}={value}", "--", sys.executable, *map(str, args)],
        capture_output=True, text=True, timeout=30, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def own() -> dict[str, int]:
    """The capabilities of this thread, by the names of proc(5)."""
    lines = Path("/proc/thread-self/status").read_text().splitlines()
    return {name: int(bits, 16) for name, bits in (line.split() for line in lines if line.startswith("Cap"))}


def given(lab: Lab, node: hitless.Node, bundle: Path) -> list[object]:
    return [bundle, "--root", node.root, "--set", f"cgroup={lab.cgroup}"]


@pytest.mark.parametrize("names", [NEEDED, [one.name for one in USED]], ids=["needed", "used"])
def test_a_process_with_the_named_capabilities_alone_installs_upgrades_and_unloads(
    lab: Lab, node: hitless.Node, releases: dict[int, Path], names: list[str]
) -> None:
    for command in (
        ["apply", *given(lab, node, releases[1])],
        ["status", "--root", node.root],
        ["apply", *given(lab, node, releases[2])],
        ["unload", "--root", node.root],
    ):
        done = with_capabilities(names, "-m", "hitless", *command)
        assert done.returncode == 0, done.stderr
    assert not node.root.exists()


@pytest.mark.parametrize("name", NEEDED)
def test_a_process_that_lacks_one_that_is_needed_is_told_which_and_what_for(
    lab: Lab, node: hitless.Node, releases: dict[int, Path], name: str
) -> None:
    (purpose,) = (one.purpose for one in USED if one.name == name)
    for command in (
        ["plan", *given(lab, node, releases[1])],
        ["apply", *given(lab, node, releases[1])],
        ["status", "--root", node.root],
        ["unload", "--root", node.root],
    ):
        done = without("--bounding-set", f"-{name.removeprefix('CAP_').lower()}", "-m", "hitless", *command, "--json")
        error = json.loads(done.stdout)["error"]
        assert (done.returncode, error["code"], error["missing"]) == (1, "node", [name])
        assert f"{name}, which it takes to {purpose}" in error["message"]
    assert not node.root.exists()


@pytest.mark.parametrize("may_look", [True, False])
def test_who_holds_a_map_is_seen_by_a_process_that_may_look(
    lab: Lab, node: hitless.Node, releases: dict[int, Path], may_look: bool
) -> None:
    hitless_command("apply", *given(lab, node, releases[1]))
    names = [*NEEDED, *(["CAP_SYS_PTRACE"] if may_look else [])]
    with Map.open(node.root / "maps" / "limit"):
        done = with_capabilities(names, "-m", "hitless", "status", "--root", node.root, "--json")
    seen = json.loads(done.stdout)["holders"]
    assert (os.getpid() in {holder["pid"] for holder in seen["found"]}) == may_look
    assert may_look or seen["unseen"]


def test_a_release_in_a_directory_that_is_closed_to_root_is_read(
    lab: Lab, node: hitless.Node, releases: dict[int, Path], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(releases[1], home / "release")
    os.chown(home, 1234, 1234)
    home.chmod(0o700)
    done = with_capabilities(NEEDED, "-m", "hitless", "apply", *given(lab, node, home / "release"))
    assert (done.returncode, "Permission denied" in done.stderr) == (1, True)
    hitless_command("apply", *given(lab, node, home / "release"))


WATCHING = """
import os
from pathlib import Path

def tally(keys, old, new):
    threads = [text.read_text() for text in Path("/proc/self/task").glob("*/status")]
    child = os.popen("cat /proc/self/status").read()
    lines = {line for text in (*threads, child) for line in text.splitlines() if line.startswith("Cap")}
    Path(%r).write_text("\\n".join(sorted(lines)))
    return new
"""


def test_a_converter_and_what_it_executes_have_no_more_rights_than_an_upgrade_takes(
    lab: Lab, node: hitless.Node, tmp_path: Path
) -> None:
    one = write_release(tmp_path / "1", "1.0", FIRST + COUNTING)
    rules = '[map.limits]\nwas = "limit"\n[map.tally]\nconvert = "converters:tally"\n'
    two = write_release(tmp_path / "2", "2.0", SECOND + COUNTING, ATTACH + rules)
    (two / "converters.py").write_text(WATCHING % str(tmp_path / "seen"))
    hitless_command("apply", *given(lab, node, one))
    node.map("tally")[1] = {"count": 1, "last": 1, "label": bytes(6)}
    hitless_command("apply", *given(lab, node, two))
    used = sum(1 << one.number for one in USED) & own()["CapEff:"]
    found = {line.split()[0]: int(line.split()[1], 16) for line in (tmp_path / "seen").read_text().splitlines()}
    assert found == {"CapInh:": 0, "CapPrm:": used, "CapEff:": used, "CapBnd:": used, "CapAmb:": 0}


def test_the_library_leaves_the_rights_of_its_process_alone(
    lab: Lab, node: hitless.Node, releases: dict[int, Path]
) -> None:
    before = own()
    hitless.apply(node, hitless.Bundle.load(releases[1], {"cgroup": str(lab.cgroup)}))
    assert own() == before


def test_the_capabilities_in_effect_are_those_of_the_kernel() -> None:
    assert capabilities.held() == {one.name for one in USED if own()["CapEff:"] >> one.number & 1}


def test_the_document_of_security_has_every_capability_with_what_it_is_for() -> None:
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    for one in USED:
        assert f"| `{one.name}` | {'needed' if one.needed else 'kept'} | {one.purpose}" in text


def test_inspect_prints_the_digest_that_apply_can_be_told(
    lab: Lab, node: hitless.Node, releases: dict[int, Path]
) -> None:
    digest = as_json("inspect", releases[1])["digest"]
    assert digest == hitless.Bundle.load(releases[1]).digest
    assert hitless_command("inspect", releases[1]).startswith(f"digest: {digest}\n")
    hitless_command("plan", *given(lab, node, releases[1]), "--digest", digest, code=2)
    hitless_command("apply", *given(lab, node, releases[1]), "--digest", digest.upper())


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_another_digest_than_the_pinned_one_is_refused_before_anything_happens(
    lab: Lab, node: hitless.Node, releases: dict[int, Path], command: str
) -> None:
    error = as_json(command, *given(lab, node, releases[1]), "--digest", OTHER, code=1)["error"]
    assert (error["code"], error["expected"]) == ("bundle", OTHER)
    assert error["digest"] == as_json("inspect", releases[1])["digest"]
    assert OTHER in error["message"]
    assert error["digest"] in error["message"]
    assert not node.root.exists()


@pytest.mark.parametrize("text", ["abc", "g" * 64, ""])
def test_what_is_no_digest_is_a_wrong_argument(node: hitless.Node, releases: dict[int, Path], text: str) -> None:
    error = as_json("plan", releases[1], "--root", node.root, "--digest", text, code=1)["error"]
    assert error["code"] == "usage"


def test_a_bundle_that_is_only_looked_at_may_be_anybodys(releases: dict[int, Path], tmp_path: Path) -> None:
    bundle = write_release(tmp_path / "theirs", "1.0", FIRST + COUNTING)
    for path in (bundle, *bundle.iterdir()):
        os.chown(path, 1234, 1234)
        path.chmod(0o777)
    hitless_command("check", bundle, releases[1])
    hitless_command("diff", bundle, releases[1])
    hitless_command("inspect", bundle)


def test_a_pinned_map_may_be_named_by_a_symbolic_link(lab: Lab, node: hitless.Node, releases: dict[int, Path]) -> None:
    hitless_command("apply", *given(lab, node, releases[1]))
    (lab.bpffs / "alias").symlink_to(node.root / "maps" / "limit")
    assert set(as_json("inspect", lab.bpffs / "alias")["maps"]) <= {"limit", "alias"}
