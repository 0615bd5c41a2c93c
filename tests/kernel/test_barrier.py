"""The barrier returns when programs that ran have ended: also one that sleeps, waiting for a page of user memory."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hitless.hooks import SLEEPABLE
from hitless.kernel.barrier import wait_for_running_programs
from hitless.kernel.libbpf import check, lib
from hitless.kernel.links import Link
from hitless.kernel.programs import load_object
from meshd.demo.lab import Lab
from tests.kernel.pages import Page
from tests.patience import patient
from tests.releases import compile_object

# The first run of the iterator asks for a byte of the reader's memory, and sleeps until somebody gives the page.
SOURCE = """
struct bpf_iter__task { void *meta, *task; };
MAP(where, ARRAY, 1, __u32, __u64);
MAP(ended, ARRAY, 1, __u32, __u64);
SEC("iter.s/task") int sleeper(struct bpf_iter__task *ctx)
{
    __u32 key = 0;
    __u64 *address = bpf_map_lookup_elem(&where, &key), one = 1;
    char byte;
    if (address && *address) {
        bpf_copy_from_user(&byte, 1, (void *)*address);
        *address = 0;
        bpf_map_update_elem(&ended, &key, &one, BPF_ANY);
    }
    return 0;
}
char _license[] SEC("license") = "GPL";
"""


@pytest.fixture
def page() -> Iterator[Page]:
    with Page() as made:
        yield made


def reading(link: Link) -> threading.Thread:
    def read() -> None:
        number = check(lib().bpf_iter_create(link.fd), "BPF_ITER_CREATE", "sleeper")
        with os.fdopen(number, "rb") as file:
            file.read()

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@pytest.mark.needs(SLEEPABLE)
def test_it_waits_for_a_program_that_sleeps(lab: Lab, tmp_path: Path, page: Page) -> None:
    loaded = load_object(compile_object(SOURCE, tmp_path / "sleeper.o").read_bytes(), "sleeper", {}, {})
    loaded.maps["where"].update(bytes(4), struct.pack("=Q", page.address))
    ended: list[bytes] = []
    reader = reading(Link.iterate(loaded.programs["sleeper"], "task"))
    page.wait()
    wait_for_running_programs()  # does not wait for it

    def wait() -> None:
        wait_for_running_programs(sleepable=True)
        ended.append(loaded.maps["ended"].lookup(bytes(4)) or b"")

    barrier = threading.Thread(target=wait)
    barrier.start()
    barrier.join(0.5)
    assert barrier.is_alive()
    page.give()
    barrier.join(patient(5))
    reader.join(patient(5))
    assert ended == [struct.pack("=Q", 1)]


@pytest.mark.timing
def test_it_is_quick_when_nothing_sleeps(lab: Lab) -> None:
    for sleepable, most in ((False, 0.2), (True, 1.0)):
        started = time.perf_counter()
        wait_for_running_programs(sleepable)
        assert time.perf_counter() - started < most
