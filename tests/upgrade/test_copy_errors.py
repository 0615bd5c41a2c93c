"""What can go wrong while entries are carried: the upgrade stops before the commit, and the old release is complete."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import hitless
from hitless.kernel.maps import Map, create
from hitless.upgrade.status import status
from meshd.demo.lab import Lab
from tests.patience import patient
from tests.upgrade.conftest import PROGRAM, Make

OLD, NEW = "struct held { __u32 a; }; ", "struct held { __u64 b; __u64 a; }; "
STORE = "MAP(held, HASH, %d, __u32, struct held);\n"


def complete(node: hitless.Node, entries: int) -> bool:
    """Release 1 runs, with every entry, and nothing is left of another."""
    found = status(node)
    assert (found.version, found.problems, node.next.exists()) == ("1", (), False)
    return dict(node.map("held").items()) == {key: {"a": key} for key in range(entries)}


@pytest.fixture
def running(node: hitless.Node, make: Make) -> hitless.Bundle:
    """Release 1 runs and holds 50 entries; returns release 2."""
    hitless.apply(node, make("1", OLD + STORE % 64))
    node.map("held").update_many((key, {"a": key}) for key in range(50))
    return make("2", NEW + STORE % 64)


def test_a_map_that_was_removed_meanwhile_is_named(node: hitless.Node, running: hitless.Bundle) -> None:
    pin = node.current / "maps" / "held"
    with Map.open(pin) as held:
        with pytest.raises(hitless.VerifyError, match="held was removed by somebody else"):
            hitless.apply(node, running, prepare=lambda _: pin.unlink())
        held.pin(pin)
    assert complete(node, 50)


@pytest.mark.parametrize("step", ["prepare", "merge"])
def test_a_map_that_was_replaced_meanwhile_is_named(node: hitless.Node, running: hitless.Bundle, step: str) -> None:
    pin = node.current / "maps" / "held"
    with Map.open(pin) as held:

        def replace(progress: hitless.Progress) -> None:
            if progress.step == step:
                pin.unlink()
                with create(1, "foreign", 4, 4, 64) as foreign:
                    foreign.pin(pin)

        with pytest.raises(hitless.VerifyError, match="somebody else pinned another one") as caught:
            hitless.apply(node, running, progress=replace)
        assert caught.value.facts["expected"] == held.info.id
        pin.unlink()
        held.pin(pin)
    assert complete(node, 50)


def test_a_refusal_by_the_verifier_leaves_everything_as_it_was(
    node: hitless.Node, running: hitless.Bundle, make: Make
) -> None:
    unchecked = "__u32 key = 0; struct held *found = bpf_map_lookup_elem(&held, &key); return found->a;"
    careless = PROGRAM.replace("return 1;", unchecked)
    with pytest.raises(hitless.KernelError, match="the verifier refused a program") as caught:
        hitless.apply(node, make("2.1", NEW + STORE % 64, careless))
    assert "invalid mem access" in str(caught.value.facts["log"])
    assert complete(node, 50)


def test_memory_that_is_not_there_leaves_everything_as_it_was(node: hitless.Node, make: Make, lab: Lab) -> None:
    hitless.apply(node, make("1", OLD + STORE % 4_000_000))
    node.map("held").update_many((key, {"a": key}) for key in range(50))
    bundle = make("2", NEW + STORE % 4_000_000)
    script = f"""
import hitless, sys
bundle = hitless.Bundle.load({str(bundle.path)!r}, {{"cgroup": {str(lab.cgroup)!r}}})
sys.stdin.readline()
try:
    hitless.apply(hitless.Node({str(node.root)!r}), bundle)
except hitless.KernelError as error:
    print(error.facts["errno_name"])
"""
    with limited_memory(200 << 20) as directory:
        upgrader = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        (directory / "cgroup.procs").write_text(str(upgrader.pid))
        assert upgrader.communicate("go\n", timeout=patient(60))[0].strip() == "ENOMEM"
    assert complete(node, 50)


@contextmanager
def limited_memory(limit: int) -> Iterator[Path]:
    """A memory cgroup with a limit in bytes, in whichever hierarchy has the controller."""
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    top = Path("/sys/fs/cgroup" if unified else "/sys/fs/cgroup/memory")
    directory = top / f"hitless-limit-{os.getpid()}"
    directory.mkdir()
    try:
        if unified:
            (directory / "memory.swap.max").write_text("0")
        (directory / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(limit))
        yield directory
    finally:
        directory.rmdir()
