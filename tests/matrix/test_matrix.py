"""The tool itself: what it says where something is missing, what it reads, and that it leaves no guest behind.

Real kernels boot in `make matrix MATRIX_ARGS=--sample`. Here a script stands in for qemu, which is not the kernel.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hitless.carry import ITERATE_HASH
from tests.matrix import HOUSE, MatrixError
from tests.matrix.image import write_archive, write_initrd
from tests.matrix.machine import Guest, progress
from tests.matrix.packages import Kernel, obtain
from tests.matrix.report import Results, Row, document, load, read, save, table

QEMU = """#!/bin/bash
serial=()
while [ $# -gt 0 ]; do [ "$1" = -serial ] && serial+=("${2#file:}"); shift; done
log=${serial[0]} back=${serial[1]}
"""

UP = "echo 'guest: up' >$log\n"
ONE_TEST = "printf 'tests/a/test_b.py::test_c[x y] PASSED [ 50%%]\\r\\ntests/a/test_b.py::test_d ' >>$log\n"

HERE = Row("here", "6.18.0", "3.11.2", "1.1", 30, {}, (), 12.4)
THERE = Row("Linux 6.1", "6.1.0-56", "3.11.2", "1.1", 24, {"tcx": 4, ITERATE_HASH: 1}, ("tests/a.py::test_b",), 300.2)


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Guest]:
    """A guest whose qemu does what this script says."""

    def make(script: str, limit: float = 20.0) -> Guest:
        qemu = tmp_path / "bin" / "qemu-system-x86_64"
        qemu.parent.mkdir()
        qemu.write_text(QEMU + script)
        qemu.chmod(0o755)
        monkeypatch.setenv("PATH", str(qemu.parent), prepend=os.pathsep)
        return Guest(Kernel("6.1", "6.1.0-1", tmp_path), tmp_path / "initrd", tmp_path / "guest", limit, "tcg")

    return make


def outcome(guest: Guest) -> str:
    """What the error says that a guest ends with."""
    with pytest.raises(MatrixError) as error, guest:
        while not guest.ended():
            time.sleep(0.01)
        guest.brought()
    assert error.value.message.endswith(f"; see {guest.log}")
    return error.value.message.removesuffix(f"; see {guest.log}")


def test_a_kernel_that_panics_is_quoted(guest: Callable[..., Guest]) -> None:
    panics = guest("printf '[    1.2] Kernel panic - not syncing: No working init found.\\r\\n' >$log\n")
    assert outcome(panics) == "Linux 6.1: did not boot: Kernel panic - not syncing: No working init found."


def test_what_qemu_says_of_a_kernel_that_is_none_is_handed_on(guest: Callable[..., Guest]) -> None:
    refuses = guest("echo 'qemu: could not load kernel' >&2; exit 1\n")
    assert outcome(refuses) == (
        "Linux 6.1: did not boot: qemu-system-x86_64 ended with 1, and said: qemu: could not load kernel"
    )


def test_a_kernel_that_hangs_is_given_up(guest: Callable[..., Guest]) -> None:
    hangs = guest("exec sleep 1000\n", limit=0.3)
    assert outcome(hangs) == "Linux 6.1: was not ready in 0 s and was ended before its init ran"


def test_a_guest_that_hangs_in_a_test_says_in_which(guest: Callable[..., Guest]) -> None:
    hangs = guest(UP + ONE_TEST + "exec sleep 1000\n", limit=1.0)
    assert outcome(hangs) == "Linux 6.1: was not ready in 1 s and was ended after 1 test, in tests/a/test_b.py::test_d"


def test_a_guest_that_dies_amid_the_tests_says_in_which(guest: Callable[..., Guest]) -> None:
    assert outcome(guest(UP + ONE_TEST)) == (
        "Linux 6.1: died after 1 test, in tests/a/test_b.py::test_d: qemu-system-x86_64 ended with 0"
    )


def test_results_that_were_cut_on_their_way_are_no_results(guest: Callable[..., Guest]) -> None:
    cut = guest(UP + "echo 'guest: done' >>$log; head -c 100 /dev/urandom >$back\n")
    assert "Linux 6.1: what it sent back through its second serial port is damaged" in outcome(cut)


def test_a_guest_without_a_junit_file_has_no_row(guest: Callable[..., Guest]) -> None:
    none = guest(UP + "echo 'guest: done' >>$log; cd $(dirname $back); echo 4 >code; tar -cz code >$back\n")
    assert outcome(none) == "Linux 6.1: pytest ended with 4 and wrote no JUnit file, before the first test"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_guest_outlives_the_matrix(guest: Callable[..., Guest], tmp_path: Path, number: signal.Signals) -> None:
    guest(f"echo $$ >{tmp_path}/pid\nexec sleep 1000\n")
    program = f"""
import sys, time
from pathlib import Path
from tests.matrix import __main__ as main
from tests.matrix.machine import Guest
from tests.matrix.packages import Kernel
here = Path({str(tmp_path)!r})
main._run = lambda chosen: main._Matrix().run([Guest(Kernel("6.1", "x", here), here / "i", here / "g", 100.0, "tcg")])
sys.exit(main.main([]))
"""
    matrix = subprocess.Popen([sys.executable, "-c", program], cwd=HOUSE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
            assert time.monotonic() < until
            time.sleep(0.01)
        pid = int((tmp_path / "pid").read_text())
        matrix.send_signal(number)
        _, told = matrix.communicate(timeout=20)
    finally:
        matrix.kill()
    assert matrix.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in told
    while alive(pid):
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_progress_is_read_between_the_kernel_s_own_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "guest: up\r\ntests/a/test_b.py::test_c[x: y] PASSED    [ 10%]\r\n[   12.1] BPF: some line\r\n"
        "tests/a/test_b.py::test_d FAILED     [ 20%]\r\ntests/a/test_b.py::test_e "
    )
    assert str(progress(log)) == "after 2 tests, in tests/a/test_b.py::test_e"


def run_matrix(**environment: str) -> str:
    command = [sys.executable, "-m", "tests.matrix", "--sample"]
    done = subprocess.run(
        command, cwd=HOUSE, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_without_qemu_it_says_what_to_install(tmp_path: Path) -> None:
    assert run_matrix(PATH=str(tmp_path)) == (
        "matrix: qemu-system-x86_64 is not installed: apt-get install qemu-system-x86, or use `make matrix`\n"
    )


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A registry of packages for apt, which knows of a kernel but has not got it."""
    for name in ("lists/partial", "cache/archives/partial", "parts", "repository"):
        (tmp_path / name).mkdir(parents=True)
    about = "Version: 1\nArchitecture: amd64\nMaintainer: m <m@m>\nDescription: d\nFilename: ./gone.deb\nSize: 1\n"
    about += f"SHA256: {'0' * 64}\n"
    (tmp_path / "repository/Packages").write_text(
        f"Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-1-cloud-amd64\n{about}\n"
        f"Package: linux-image-6.1.0-1-cloud-amd64\n{about}"
    )
    (tmp_path / "sources").write_text(f"deb [trusted=yes arch=amd64] file:{tmp_path}/repository ./\n")
    (tmp_path / "apt.conf").write_text(
        f'Dir::State::lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}/cache";\nDir::Etc::sourcelist '
        f'"{tmp_path}/sources";\nDir::Etc::sourceparts "{tmp_path}/parts";\nAPT::Sandbox::User "root";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    yield tmp_path


def test_a_registry_that_does_not_answer_is_named(registry: Path) -> None:
    with pytest.raises(MatrixError, match=r"could not download linux-image-6\.1\.0-1-cloud-amd64, .*/gone\.deb"):
        obtain("6.1", registry / "packages")


def test_a_kernel_that_apt_does_not_know_is_said_with_what_was_looked_for(registry: Path) -> None:
    with pytest.raises(MatrixError) as error:
        obtain("6.12", registry / "packages")
    assert (
        "apt was asked for linux-image-6.12-cloud-amd64 and linux-image-cloud-amd64, and knows "
        "linux-image-6.1.0-1-cloud-amd64; see " in error.value.message
    )


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmp", str(tmp_path)], check=True)
    try:
        with pytest.raises(MatrixError, match=r"No room on disk: a guest's root takes \d+ MiB, and .* has 0 MiB left"):
            write_archive(tmp_path / "out", [Path("/bin/bash")])
        assert not (tmp_path / "out").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def entries(archive: bytes) -> dict[str, tuple[int, int, bytes]]:
    """What an archive of cpio's newc format has: by name mode, modification time and data."""
    found, at = {}, 0
    while at < len(archive):
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        data = at + (110 + fields[11] + 3 & ~3)
        found[name] = fields[1], fields[5], archive[data : data + fields[6]]
        at = data + (fields[6] + 3 & ~3)
    return found


def test_a_root_has_files_at_their_paths_with_the_symlinks_that_lead_there(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "real/deep/file").write_bytes(b"12345")
    os.utime(tmp_path / "real/deep/file", (7, 7))
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real/again").symlink_to("deep/file")
    write_archive(tmp_path / "out", [tmp_path / "link/again"])
    has = entries((tmp_path / "out").read_bytes())
    where = str(tmp_path)[1:]
    assert has[f"{where}/link"][2] == b"real"
    assert has[f"{where}/real/again"][2] == b"deep/file"
    assert has[f"{where}/real/deep/file"] == (stat.S_IFREG | 0o644, 7, b"12345")
    assert stat.S_ISDIR(has[f"{where}/real/deep"][0])


def test_a_kernel_s_own_modules_and_settings_come_behind_the_base(tmp_path: Path) -> None:
    kernel = Kernel("6.1", "6.1.0-1", tmp_path)
    (kernel.modules / "kernel").mkdir(parents=True)
    (kernel.modules / "kernel/veth.ko").write_bytes(b"module")
    write_archive(tmp_path / "base", [Path("/etc/passwd")])
    write_initrd(tmp_path / "initrd", tmp_path / "base", kernel, {"HOUSE": "/here"})
    has = entries((tmp_path / "initrd").read_bytes())
    assert has["etc/passwd"][2] == Path("/etc/passwd").read_bytes()
    assert has["usr/lib/modules/6.1.0-1/kernel/veth.ko"][2] == b"module"
    assert has["settings"][2] == b"HOUSE=/here\n"


def test_a_row_counts_what_passed_what_had_no_feature_and_what_failed(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_c(): assert 0\n"
        f"def test_d(): pytest.skip('needs {ITERATE_HASH}')\ndef test_e(nothing): pass\n"
        "def test_f(): pytest.skip('no time')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.matrix.facts", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "--junitxml=j", "."], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths()})
    row = read("mine", (tmp_path / "j").read_bytes(), done.returncode)
    assert (row.name, row.kernel, row.passed) == ("mine", os.uname().release, 1)
    assert row.skipped == {ITERATE_HASH: 1}
    assert row.failed == ("test_x.py::test_c", "test_x.py::test_e", "test_x.py::test_f (skipped: no time)")


def paths() -> str:
    return os.pathsep.join([str(HOUSE), str(HOUSE / "src")])


def test_a_session_that_fails_beside_its_tests_is_a_failure() -> None:
    facts = "".join(f'<property name="{name}" value="1"/>' for name in ("kernel", "python", "libbpf"))
    junit = f'<testsuite time="1"><properties>{facts}</properties><testcase name="a"/></testsuite>'
    assert read("x", junit.encode(), 0).failed == ()
    assert read("x", junit.encode(), 1).failed == ("(the session itself, which ended with 1)",)


@pytest.mark.parametrize("junit", [b"", b"<testsuites", b"<testsuites/>", b'<testsuite time="1"/>'])
def test_a_junit_file_that_says_nothing_makes_no_row(junit: bytes) -> None:
    with pytest.raises(MatrixError, match=r"Linux 6\.1: pytest ended with 2, and its JUnit file has no test that ran"):
        read("Linux 6.1", junit, 2)


def test_the_table_has_a_line_for_each_row_and_names_below_it() -> None:
    results = Results((HERE, THERE), {"Linux 6.12": "Linux 6.12: did not boot"})
    assert table(results).splitlines() == [
        "           kernel    Python  libbpf  passed  skipped                         failed  seconds",
        "here       6.18.0    3.11.2  1.1     30      0                               0       12",
        "Linux 6.1  6.1.0-56  3.11.2  1.1     24      5 (4 tcx, 1 iter/bpf_map_elem)  1       300",
        "Linux 6.1: FAILED tests/a.py::test_b",
        "NO RESULTS Linux 6.12: did not boot",
    ]
    assert not results.good


def test_the_page_says_which_kernel_has_which_feature_and_what_happens_without_it() -> None:
    tcx = {"name": "tcx", "needs": "Linux 6.6", "without": "programs are attached with tc"}
    doctor = {"here": {"features": [{**tcx, "there": True}]}, "Linux 6.1": {"features": [{**tcx, "there": False}]}}
    page = document(Results((HERE, THERE), {}, doctor)).splitlines()
    assert "| Linux 6.1 | 6.1.0-56 | 3.11.2 | 1.1 | 24 | 5 (4 tcx, 1 iter/bpf_map_elem) | 1 |" in page
    assert "- Linux 6.1 failed `tests/a.py::test_b`" in page
    assert "| feature | here | Linux 6.1 | needs | without it |" in page
    assert "| `tcx` | yes | no | Linux 6.6 | programs are attached with tc |" in page


def test_the_page_names_a_kernel_that_was_not_to_be_had_and_nothing_of_one_machine() -> None:
    page = document(Results((HERE, THERE), {"newest Linux": "Failed to fetch a:b; see /here/newest.log"})).splitlines()
    assert "- no results of newest Linux" in page
    assert not any("newest.log" in line for line in page)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = Results((HERE, THERE), {"x": "y"}, {"here": {"features": []}})
    save(results, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == results


@pytest.mark.parametrize("text", [None, "", "{}", '{"rows": [], "schema": 99}'])
def test_results_that_cannot_be_read_are_refused_in_a_sentence(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(MatrixError, match="`make matrix`"):
        load(tmp_path / "results.json")
