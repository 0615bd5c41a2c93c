"""The wheel has all that a node needs, is what the sdist makes of itself, and runs."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml

import hitless
from meshd.demo.lab import Lab
from meshd.demo.mesh import Lines
from meshd.releases import RELEASES
from tests.meshd.labmesh import VIP, A, Mesh, service
from tests.packaging.chart import container, known
from tests.packaging.conftest import TREE, copy_tree, environment, make_dist, say

NEWEST = max(RELEASES)


def contents(archive: Path) -> dict[str, bytes]:
    """Every file of a wheel or an sdist by its name; the sdist's without its top directory."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    found = {}
    with tarfile.open(archive) as sdist:
        for entry in sdist:
            file = sdist.extractfile(entry)
            if file is not None:
                found[entry.name.partition("/")[2]] = file.read()
    return found


def test_the_wheel_holds_every_release_with_its_objects_and_what_is_made_at_build(dist: tuple[Path, Path]) -> None:
    inside = contents(dist[0]).keys()
    for release in RELEASES.values():
        sources = [path.relative_to(TREE / "src") for path in (TREE / "src/meshd/bpf").glob(f"v{release.number}/*.c")]
        assert len(sources) >= 2
        assert {str(path.with_suffix(".o")) for path in sources} < inside
        assert f"meshd/bpf/v{release.number}/bundle.toml" in inside
    made = ["hitless/kernel/_libbpf.py", "hitless/include/hitless.h", "hitless/py.typed", "meshd/py.typed"]
    assert set(made) < inside
    shared = {name.partition(".data/data/share/")[2] for name in inside if ".data/data/share/" in name}
    assert shared == {
        "man/man1/hitless.1",
        "man/man1/meshd.1",
        "bash-completion/completions/hitless",
        "bash-completion/completions/meshd",
        "zsh/site-functions/_hitless",
        "zsh/site-functions/_meshd",
        "fish/vendor_completions.d/hitless.fish",
        "fish/vendor_completions.d/meshd.fish",
        "hitless/systemd/meshd.env",
        "hitless/systemd/meshd.service",
    }


def test_another_place_and_umask_give_the_same_bytes(dist: tuple[Path, Path], tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        again = make_dist(copy_tree(tmp_path / "elsewhere"))
    finally:
        os.umask(umask)
    for one, other in zip(dist, again, strict=True):
        assert contents(one) == contents(other)
        assert one.read_bytes() == other.read_bytes()


def test_the_sdist_makes_the_wheel_that_the_tree_makes(dist: tuple[Path, Path], first: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path)]
    say(*build, cwd=first, env=environment(first))  # dist's own wheel is the one that was made from the sdist
    (of_tree,) = tmp_path.glob("*.whl")
    assert contents(of_tree) == contents(dist[0])
    source = contents(dist[1])
    assert {"setup.py", "pyproject.toml", "LICENSE", "packaging/Dockerfile", "src/meshd/bpf/Makefile"} < source.keys()
    objects = {name: data for name, data in contents(dist[0]).items() if name.endswith(".bpf.o")}
    assert {name: source[f"src/{name}"] for name in objects} == objects


def test_no_path_of_the_machine_is_inside(dist: tuple[Path, Path], first: Path) -> None:
    places = [str(path).encode() for path in (first, TREE, Path(sys.prefix))]
    told = [
        f"{archive.name}: {name}: {place.decode()}"
        for archive in dist
        for name, data in contents(archive).items()
        for place in places
        if place in data
    ]
    assert told == []


def test_what_is_not_compiled_is_not_packed(dist: tuple[Path, Path], first: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(first, tree)
    (tree / "src/meshd/bpf/v2/connect.bpf.o").unlink()
    for form in ("--wheel", "--sdist"):
        done = subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", form],
            cwd=tree, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        wanted = "not compiled: src/meshd/bpf/v2/connect.bpf.o; say `make dist`, or first `make -C src/meshd/bpf`"
        assert wanted in done.stdout + done.stderr


def test_the_installed_commands_are_the_wheels(dist: tuple[Path, Path], installed: Path, tmp_path: Path) -> None:
    code = "import hitless, meshd; print(hitless.__file__, meshd.__file__, hitless.include_dir())"
    for path in say(installed / "bin/python", "-c", code, env=bare(installed), cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed)
    assert "apply" in say(installed / "bin/hitless", "--help", env=bare(installed))
    version = dist[0].name.split("-")[1]
    assert version in say(installed / "bin/hitless", "--version", env=bare(installed))


def test_the_installed_meshd_checks_a_file(installed: Path, tmp_path: Path) -> None:
    file = tmp_path / "services.yaml"
    file.write_text(yaml.safe_dump({"services": [service("web", VIP, A)], "policies": []}))
    said = say(installed / "bin/meshd", "check", file, "--json", env=bare(installed))
    assert '"services":1' in said.replace(" ", "")
    file.write_text("services: 7\n")
    check = [f"{installed}/bin/meshd", "check", str(file)]
    done = subprocess.run(check, env=bare(installed), capture_output=True, timeout=30, check=False)
    assert done.returncode == 1
    assert b"services" in done.stderr


def test_the_installed_meshd_runs_upgrades_and_is_seen_by_the_installed_hitless(installed: Path, lab: Lab) -> None:
    mesh = Mesh(lab)
    mesh.write([service("web", VIP, A)])
    for release, event in ((1, "ready"), (NEWEST, "upgraded")):
        run = ["run", f"--release={release}", f"--root={mesh.root}", f"--cgroup={lab.cgroup}", "--json"]
        run += [f"--services={mesh.file}", "--exit-type=restart", "--allow-loss=flow"]
        daemon = lab.popen([installed / "bin/meshd", *run], stdout=subprocess.PIPE, env=bare(installed))
        Lines(daemon).wait_for({"event": (event,)}, 30)
        assert mesh.connect()["answers"] == {A: 1}
        daemon.terminate()
        assert daemon.wait(20) == 0
    say(installed / "bin/hitless", "verify", "--root", mesh.root, env=bare(installed))
    say(installed / "bin/hitless", "unload", "--root", mesh.root, env=bare(installed))


POD = """
set -eu
mount -t tmpfs pod "$1"
for entry in /*; do
  case "$entry" in
    /etc) ;;
    *) if [ -L "$entry" ]; then cp -P "$entry" "$1"; elif [ -d "$entry" ]; then
         mkdir "$1$entry" && mount --rbind "$entry" "$1$entry" && mount -o remount,bind,ro "$1$entry"; fi ;;
  esac
done
mkdir -p "$1/host/bpf" "$1/host/cgroup" "$1/etc/meshd"
mount --bind "$2" "$1/host/bpf"
mount --bind "$3" "$1/host/cgroup" && mount -o remount,bind,ro "$1/host/cgroup"
mount --bind "$4" "$1/etc/meshd" && mount -o remount,bind,ro "$1/etc/meshd"
mount -o remount,ro "$1"
root=$1; caps=$5; shift 5
exec chroot "$root" setpriv --no-new-privs --bounding-set="-all$caps" -- "$@"
"""


@pytest.mark.parametrize("release", [1, NEWEST])
def test_a_pod_of_the_chart_can_do_its_work(installed: Path, lab: Lab, release: int) -> None:
    """Its mounts, its read-only file systems, its capabilities and its arguments, without a container runtime."""
    mesh = Mesh(lab)
    config, pod = lab.scratch / "config", lab.scratch / "pod"
    config.mkdir()
    pod.mkdir()
    mesh.file = config / "services.yaml"
    mesh.write([service("web", VIP, A)])
    values = {"root": "mesh", "cgroup": lab.cgroup.name, "kubernetes": False, "extraArgs": [f"--release={release}"]}
    spec = container(values)
    security = spec["securityContext"]
    assert security["capabilities"]["drop"] == ["ALL"]
    assert security["readOnlyRootFilesystem"] is True
    capabilities = "".join(f",+{name.lower()}" for name in security["capabilities"]["add"])
    places = [pod, lab.bpffs, lab.cgroup.parent, config]
    shell = ["unshare", "--mount", "--propagation=slave", "sh", "-c", POD, "pod", *map(str, places), capabilities]
    command = [*shell, str(installed / "bin/meshd"), *known(spec["args"])]
    daemon = lab.popen(command, stdout=subprocess.PIPE, env=bare(installed))
    Lines(daemon).wait_for({"event": ("ready",)}, 30)
    assert mesh.connect()["answers"] == {A: 1}
    daemon.terminate()
    assert daemon.wait(20) == 0
    assert mesh.connect()["answers"] == {A: 1}
    assert hitless.verify(mesh.node).problems == ()


def test_bash_completes_commands_options_and_values(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "release-2").mkdir()
    for name, typed, wanted in (
        ("hitless", "hitless rollb", "hitless rollback "),
        ("hitless", "hitless plan --allow", "hitless plan --allow-loss "),
        ("hitless", "hitless inspect rele", "hitless inspect release-2/"),
        ("meshd", "meshd run --exit-type no", "meshd run --exit-type normal "),
    ):
        script = installed / f"share/bash-completion/completions/{name}"
        assert wanted in typed_in_bash(typed + "\t", wanted, script, installed, tmp_path)


def typed_in_bash(keys: str, wanted: str, script: Path, installed: Path, where: Path) -> str:
    """What an interactive bash shows, until it shows what is wanted or ten seconds have passed."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(where)
        os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], {**bare(installed), "TERM": "dumb"})
    said, end = "", time.monotonic() + 10
    os.write(terminal, f"source {script}\n{keys}".encode())
    try:
        while wanted not in said and _has_more(terminal, end):
            said += os.read(terminal, 4096).decode()
    finally:
        os.close(terminal)
        os.waitpid(child, 0)
    return said


def bare(installed: Path) -> dict[str, str]:
    """An environment in which only what is installed is found."""
    return {"PATH": f"{installed}/bin:{os.environ['PATH']}", "LANG": "C.UTF-8", "HOME": "/nonexistent"}


def _has_more(terminal: int, end: float) -> bool:
    watch = select.poll()  # not select(), which knows no descriptor above 1023
    watch.register(terminal, select.POLLIN)
    return bool(watch.poll(max(0, end - time.monotonic()) * 1000))
