"""The newest kernel of the matrix: which one it is, how it is put together, and what is said where it cannot be had."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.matrix import MatrixError
from tests.matrix import __main__ as matrix
from tests.matrix.packages import NEWEST, Kernel, obtain_newest

REFUSED = "The newest kernel is not to be had from Debian trixie-backports and unstable: "
OLD, NEW = "9.8.7+deb14-cloud-amd64", "9.9.1+deb13-cloud-amd64"
PARTS = ("linux-image", "linux-binary", "linux-modules")


def sums(file: Path) -> tuple[str, int]:
    return hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size


def publish(mirror: Path, name: str, records: str, *facts: str) -> None:
    """Make a release of Debian that has these packages. Nobody signed it."""
    index = mirror / "dists" / name / "main" / "binary-amd64" / "Packages"
    index.parent.mkdir(parents=True)
    index.write_text(records)
    lines = ["Origin: Debian", "Label: Debian", f"Suite: {name}", "Date: Thu, 01 Jan 2026 00:00:00 UTC", *facts]
    lines += ["Architectures: amd64", "Components: main", "SHA256:"]
    lines += [" {} {} main/binary-amd64/Packages\n".format(*sums(index))]
    (mirror / "dists" / name / "Release").write_text("\n".join(lines))


def package(mirror: Path, name: str, depends: str, paths: Iterable[str]) -> str:
    """Make a package whose files have their names as contents; return the record of it."""
    control = f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: m <m@m>\nDescription: d\n{depends}"
    contents = mirror / name
    for path, text in {"DEBIAN/control": control, **{path: path for path in paths}}.items():
        (contents / path).parent.mkdir(parents=True, exist_ok=True)
        (contents / path).write_text(text)
    archive = mirror / f"{name}_1_amd64.deb"
    subprocess.run(["dpkg-deb", "-b", contents, archive], check=True, capture_output=True)
    return control + "Filename: {}\nSHA256: {}\nSize: {}\n".format(archive.name, *sums(archive))


def kernel(mirror: Path, release: str, image: str = "vmlinuz") -> str:
    """Records of a kernel, which is in packages as Debian has had them since 7.3, and of the general one."""
    modules = f"usr/lib/modules/{release}"
    files = (["usr/share/doc/x"], [f"{modules}/{image}"], [f"{modules}/modules.order", f"{modules}/modules.builtin"])
    depends = "Depends: {}\n".format(", ".join(f"{part}-{release}" for part in PARTS[1:]))
    names = [f"{part}-{release}" for part in PARTS]
    parts = [package(mirror, *each) for each in zip(names, (depends, "", ""), files, strict=True)]
    return "\n".join([general(release), *parts])


def general(release: str) -> str:
    """The record of the package that depends on a release's newest kernel; nobody downloads it."""
    return (
        f"Package: linux-image-cloud-amd64\nVersion: {release.partition('+')[0]}\nArchitecture: amd64\nDescription: d\n"
        f"Depends: linux-base-cloud-amd64, linux-image-{release}\nFilename: none\nSize: 1\nSHA256: {'0' * 64}\n"
    )


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine has Debian from: apt knows only that, and takes what nobody signed. A script is depmod."""
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (tmp_path / name).mkdir(parents=True)
    made = tmp_path / "mirror"
    publish(made, "bookworm", general("6.1.0-1+deb12-cloud-amd64"))
    (tmp_path / "sources").write_text(f"deb file:{made} bookworm main\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::State::lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}/cache";\nDir::Etc::sourcelist '
        f'"{tmp_path}/sources";\nDir::Etc::sourceparts "{tmp_path}/parts";\nAPT::Sandbox::User "root";\n'
        'Acquire::AllowInsecureRepositories "true";\nAPT::Get::AllowUnauthenticated "true";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    script(tmp_path / "bin" / "depmod", 'echo "$1" >"$2/lib/modules/$3/modules.dep"')
    subprocess.run(["apt-get", "update", "-qq"], check=True, capture_output=True)
    return made


def script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def refusal(tmp_path: Path) -> str:
    with pytest.raises(MatrixError) as caught:
        obtain_newest(tmp_path / "packages")
    assert "\n" not in caught.value.message
    assert not list((tmp_path / "packages").glob("linux-image-*[!t]"))  # but what ends in .part
    return caught.value.message.partition("; see ")[0]


def test_the_newest_of_all_releases_is_taken_and_put_together(mirror: Path, tmp_path: Path) -> None:
    publish(mirror, "unstable", kernel(mirror, OLD))
    publish(mirror, "trixie-backports", kernel(mirror, NEW), "NotAutomatic: yes")
    newest = obtain_newest(tmp_path / "packages")
    assert (newest.name, newest.release) == ("9.9", NEW)
    assert newest.image.read_text() == f"usr/lib/modules/{NEW}/vmlinuz"
    assert (newest.modules / "modules.dep").exists()
    assert not (newest.modules / "vmlinuz").exists()  # a guest has no use for a second one in its memory

    for archive in mirror.glob("*.deb"):
        archive.unlink()
    assert obtain_newest(tmp_path / "packages") == newest


def test_a_newest_kernel_that_no_release_has_is_told_in_a_sentence(mirror: Path, tmp_path: Path) -> None:
    publish(mirror, "unstable", "")
    publish(mirror, "trixie-backports", "")
    assert refusal(tmp_path) == f"{REFUSED}No packages found"


def test_a_release_that_is_not_on_the_mirror_is_named(mirror: Path, tmp_path: Path) -> None:
    publish(mirror, "unstable", general(NEW))
    assert refusal(tmp_path).startswith(f"{REFUSED}Failed to fetch file:{mirror}/dists/trixie-backports/")


def test_a_registry_that_names_a_kernel_and_has_none_is_told_in_a_sentence(mirror: Path, tmp_path: Path) -> None:
    publish(mirror, "unstable", kernel(mirror, NEW))
    publish(mirror, "trixie-backports", "")
    (mirror / f"linux-modules-{NEW}_1_amd64.deb").unlink()
    said = refusal(tmp_path)
    assert said.startswith(REFUSED)
    assert f"linux-modules-{NEW}_1_amd64.deb" in said


def test_packages_that_hold_no_kernel_are_named(mirror: Path, tmp_path: Path) -> None:
    publish(mirror, "unstable", kernel(mirror, NEW, image="System.map"))
    publish(mirror, "trixie-backports", "")
    names = " and ".join(f"{part}-{NEW}" for part in PARTS)
    assert refusal(tmp_path) == f"{names}: no kernel is where Debian puts them"


@pytest.mark.parametrize("programs", [(), ("apt-get",)])
def test_without_apt_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: tuple[str, ...]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in programs:
        script(tmp_path / "bin" / name, "echo file:/nowhere")
    assert refusal(tmp_path).endswith(f"{'apt-cache' if programs else 'apt-get'} is not installed")


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ([], ("6.1", "6.12", NEWEST)),
        (["--sample"], ("6.1",)),
        (["--kernel", "newest"], (NEWEST,)),
        (["--kernel", "6.12", "--sample"], ("6.12",)),
        (["--host"], ()),
    ],
)
def test_the_newest_kernel_is_part_of_a_whole_matrix_only(args: list[str], wanted: tuple[str, ...]) -> None:
    assert matrix._wanted(matrix._parse(args)) == wanted


def test_without_the_newest_kernel_the_others_are_run_and_the_table_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def none(folder: Path) -> Kernel:
        raise MatrixError("The newest kernel is not to be had")

    monkeypatch.setattr(matrix, "STATE", tmp_path)
    monkeypatch.setattr(matrix, "look_for_qemu", lambda: None)
    monkeypatch.setattr(matrix, "obtain", lambda name, folder: Kernel(name, f"{name}.0", folder))
    monkeypatch.setattr(matrix, "obtain_newest", none)
    monkeypatch.setattr(matrix, "_environments", lambda *_: [])
    monkeypatch.setattr(matrix._Matrix, "run", lambda *_: None)
    monkeypatch.setattr(matrix, "_guests", lambda kernels, newest, *_: ran.extend([k.name for k in kernels] + [newest]))
    assert matrix.main([]) == 1
    assert ran == ["6.1", "6.12", None]
    assert capsys.readouterr().out.splitlines()[-1] == "NO RESULTS The newest kernel is not to be had"
