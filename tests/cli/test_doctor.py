"""``hitless doctor``, and what is said where a feature or a right was taken away."""

from __future__ import annotations

import ctypes
import errno
import json
import platform
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from hitless.cli import main
from hitless.features import FEATURES
from hitless.hooks import SOCKMAP_LINK, TCX
from hitless.kernel import features, libbpf
from hitless.layout.answers import ANSWERS
from meshd.demo.lab import Lab
from tests.releases import write_release

# A release with a hook of tcx, on an interface that every namespace has.
LATE = """
MAP(seen, ARRAY, 1, __u32, __u64);
SEC("tc") int late(struct __sk_buff *ctx) { return -1; }
char _license[] SEC("license") = "GPL";
"""
ATTACH = '[[attach]]\nprogram = "late"\nhook = "tcx-ingress"\ntarget = "lo"\nnetns = "${netns}"\nlink = "late"\n'


def run(*words: str, prefix: tuple[str, ...] = (), before: Callable[[], None] | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of hitless, run behind the command ``prefix`` by a process that calls ``before``."""
    command = [*prefix, sys.executable, "-m", "hitless", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, preexec_fn=before)
    return done.returncode, done.stdout, done.stderr


def deny_links() -> None:
    """From now on who makes a link of BPF is answered EPERM, as by a security module or a container's runtime."""
    bpf, link_create = libbpf._CALLS["bpf"][platform.machine()], 28
    rules = (
        (0x20, 0, 0, 0),  # the number of the call
        (0x15, 0, 3, bpf),
        (0x20, 0, 0, 16),  # its first argument
        (0x15, 0, 1, link_create),
        (0x06, 0, 0, 0x00050000 | errno.EPERM),  # SECCOMP_RET_ERRNO
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
    if ctypes.CDLL(None).prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError("seccomp")


def test_it_says_that_hitless_can_work_here_and_names_each_feature_and_type_of_map(lab: Lab) -> None:
    done = CliRunner().invoke(main, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["schema"], told["problems"]) == (0, 1, [])
    assert str(lab.bpffs) in told["bpffs"]
    assert [each["name"] for each in told["features"]] == [feature.name for feature in FEATURES]
    assert [each["type"] for each in told["maps"]] == list(ANSWERS)
    assert all((each["why"] is None) == each["there"] for each in told["features"])


def test_people_read_it_line_by_line(lab: Lab) -> None:
    lines = CliRunner().invoke(main, ["doctor"]).stdout.splitlines()
    assert lines[0].startswith("Linux ")
    assert any("iter/bpf_map_elem" in line for line in lines)
    assert lines[-1] == "hitless can work here."


def test_the_features_that_have_a_name_are_those_that_can_be_tried() -> None:
    assert {feature.name for feature in FEATURES} == features._PROBES.keys()


@pytest.mark.parametrize(
    ("prefix", "what"),
    [
        (("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"), "CAP_SYS_ADMIN"),
        (("unshare", "--user", "--map-root-user"), "EPERM"),
    ],
    ids=["without CAP_SYS_ADMIN", "in a user namespace"],
)
def test_a_process_without_rights_is_told_what_it_lacks_and_tries_nothing(prefix: tuple[str, ...], what: str) -> None:
    code, text, errors = run("doctor", "--json", prefix=prefix)
    told = json.loads(text)
    assert (code, told["features"], errors) == (1, [], "")
    assert what in str(told["problems"])


def test_what_this_process_may_not_try_is_told_as_that_and_all_else_too(lab: Lab) -> None:
    code, text, errors = run("doctor", "--json", before=deny_links)
    told = json.loads(text)
    assert (code, told["problems"], errors) == (0, [], "")
    assert [each["name"] for each in told["features"]] == [feature.name for feature in FEATURES]
    assert [each["type"] for each in told["maps"]] == list(ANSWERS)
    denied = {each["name"]: each["why"] for each in told["features"] if not each["permitted"]}
    assert denied.keys() == {TCX, SOCKMAP_LINK}
    assert not any(each["there"] for each in told["features"] if each["name"] in denied)
    assert all(why.startswith("not permitted: BPF_LINK_CREATE on ") and "EPERM" in why for why in denied.values())
    code, text, errors = run("doctor", before=deny_links)
    assert (code, errors) == (0, "")
    lines = [line for line in text.splitlines() if denied[TCX] in line]
    assert [line.split()[:2] for line in lines] == [["no", TCX]]
    assert lines[0].endswith("; a plan that asks for it ends with that error")


def test_a_plan_that_asks_for_what_this_process_may_not_try_ends_with_an_error(lab: Lab, tmp_path: Path) -> None:
    release = write_release(tmp_path / "1", "1.0", LATE, ATTACH)
    words = "plan", str(release), "--root", str(lab.bpffs / "store"), "--set", f"netns={lab.netns}", "--json"
    assert run(*words)[0] == 2
    code, text, _ = run(*words, before=deny_links)
    told = json.loads(text)["error"]
    assert (code, told["errno_name"], told["step"]) == (1, "EPERM", "plan")
