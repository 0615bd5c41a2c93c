"""Network namespaces by path and pattern, and what a thread finds in them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hitless.errors import GoneError, NodeError
from hitless.kernel.interfaces import interfaces
from hitless.kernel.namespaces import Namespace, entered, namespaces
from meshd.demo.lab import Lab

OWN = Path("/proc/self/ns/net")
HERE = Path("/proc/thread-self/ns/net")


@pytest.fixture
def namespace(module_lab: Lab) -> Namespace:
    return Namespace.at(str(module_lab.netns))


@pytest.fixture
def mounts(lab: Lab) -> Iterator[Path]:
    """A directory of a lab's whose mounts go with it."""
    made = lab.scratch / "mounts"
    made.mkdir()
    yield made
    for path in made.iterdir():
        subprocess.run(["umount", str(path)], check=False, stderr=subprocess.DEVNULL)


def mount(what: str | Path, at: Path) -> str:
    at.touch()
    subprocess.run(["mount", "--bind", str(what), str(at)], check=True)
    return str(at)


def test_a_block_runs_in_the_namespace_and_comes_back(namespace: Namespace) -> None:
    before = HERE.stat().st_ino
    with entered(namespace):
        assert HERE.stat().st_ino == namespace.inode != before
    assert HERE.stat().st_ino == before


def test_an_error_in_the_block_comes_back_too(namespace: Namespace) -> None:
    before = HERE.stat().st_ino
    with pytest.raises(RuntimeError, match="told"), entered(namespace):
        raise RuntimeError("told")
    assert HERE.stat().st_ino == before


def test_blocks_go_into_each_other(namespace: Namespace, lab: Lab) -> None:
    before = HERE.stat().st_ino
    other = Namespace.at(str(lab.netns))
    with entered(namespace):
        with entered(other), entered(other):
            assert HERE.stat().st_ino == other.inode
        assert HERE.stat().st_ino == namespace.inode
    assert HERE.stat().st_ino == before


def test_other_threads_stay_where_they_are(namespace: Namespace) -> None:
    found = []
    inside, looked = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        found.append(HERE.stat().st_ino)
        looked.set()

    waiting = threading.Thread(target=other)
    waiting.start()
    with entered(namespace):
        inside.set()
        looked.wait()
    waiting.join()
    assert found == [OWN.stat().st_ino]


def test_a_block_leaves_no_descriptor_open(namespace: Namespace) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        with entered(namespace):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_namespace_is_not_kept_alive(namespace: Namespace, lab: Lab) -> None:
    gone = Namespace.at(str(lab.netns))
    lab.close()
    with pytest.raises(GoneError, match=f"network namespace {gone.path} is not there"), entered(gone):
        pass


def test_what_is_no_network_namespace_is_refused_by_name(lab: Lab) -> None:
    file = lab.scratch / "file"
    file.touch()
    for path in (str(file), "/proc/self/ns/mnt"):
        with pytest.raises(NodeError, match=f"{path} is no network namespace"):
            namespaces(path)
    with pytest.raises(GoneError, match=f"{file}s is not there"):
        namespaces(f"{file}s")
    with pytest.raises(NodeError, match="cannot be opened: Not a directory"):
        namespaces(f"{file}/s")


def test_nothing_is_this_process_own_namespace() -> None:
    (own,) = namespaces("")
    assert (own.path, own.inode) == ("", OWN.stat().st_ino)


def test_a_pattern_finds_each_namespace_once(lab: Lab, module_lab: Lab, mounts: Path) -> None:
    first = mount(lab.netns, mounts / "net1")
    mount(lab.netns, mounts / "net2")
    third = mount(module_lab.netns, mounts / "net3")
    assert [one.path for one in namespaces(f"{mounts}/net*")] == [first, third]
    assert [one.inode for one in namespaces(f"{mounts}/net*")] == [Path(path).stat().st_ino for path in (first, third)]


def test_a_pattern_leaves_out_what_is_no_namespace_unless_there_is_nothing_else(lab: Lab, mounts: Path) -> None:
    (mounts / "net0").touch()
    mount("/proc/self/ns/uts", mounts / "net1")
    with pytest.raises(NodeError, match="net0 is no network namespace"):
        namespaces(f"{mounts}/net*")
    made = mount(lab.netns, mounts / "net2")
    assert [one.path for one in namespaces(f"{mounts}/net*")] == [made]
    assert namespaces(f"{mounts}/other*") == ()


def test_a_namespace_without_permission_is_named(namespace: Namespace) -> None:
    code = f"""if True:
        from hitless.errors import HitlessError
        from hitless.kernel.namespaces import Namespace, entered
        try:
            with entered(Namespace.at({namespace.path!r})):
                print("entered")
        except HitlessError as error:
            print(error.code, error)
    """
    command = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wanted = f"node network namespace {namespace.path} may not be entered: Operation not permitted"
    assert done.stdout.startswith(wanted)


def test_interfaces_are_found_by_name_and_pattern_in_their_namespace(namespace: Namespace) -> None:
    name = Path(namespace.path).name
    subprocess.run(["ip", "-n", name, "link", "add", "pod1", "type", "veth", "peer", "name", "pod2"], check=True)
    lo, *pods = interfaces("*", namespace)
    assert (lo.name, lo.index) == ("lo", 1)
    assert {pod.name for pod in pods} == {"pod1", "pod2"}
    assert interfaces("pod[12]", namespace) == tuple(pods)
    assert [interfaces(pod.name, namespace) for pod in pods] == [(pod,) for pod in pods]
    assert interfaces("cali*", namespace) == ()
    with pytest.raises(NodeError, match=f"interface pod3 of network namespace {namespace.path} is not there"):
        interfaces("pod3", namespace)
