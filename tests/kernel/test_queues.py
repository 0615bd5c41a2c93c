"""The program that moves elements of queues, against the conversion in Python: every width, sign and repetition."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hitless.errors import KernelError
from hitless.kernel.libbpf import check, ffi, lib
from hitless.kernel.maps import Map
from hitless.kernel.queues import Journal, Mover, count_elements, create_beside
from hitless.layout.conversion import Conversion, Default, Move, Repeat
from meshd.demo.lab import Lab

CONVERSION = Conversion(
    48,
    64,
    (
        Move("wider", 0, 4, 0, 8),
        Move("signed", 4, 2, 8, 8, old_signed=True, new_signed=True),
        Move("narrower", 8, 8, 16, 4),
        Move("less", 16, 8, 20, 2, old_signed=True, new_signed=True),
        Move("sign", 24, 4, 24, 4, old_signed=True),
        Move("unsigned", 28, 4, 28, 4, new_signed=True),
        Move("several[]", 32, 2, 32, 1, repeat=(Repeat(4, 2, 1),)),
        Move("odd", 41, 7, 37, 7),
    ),
    (Default("port", 48, b"\x50\x00"), Default("name", 52, b"hitless")),
)


class Queues:
    """Two queues with a mover between them."""

    def __init__(self, pin: Path) -> None:
        self.source = create_beside("queue", "source", CONVERSION.old_size, 8)
        self.target = create_beside("queue", "target", CONVERSION.new_size, 8)
        self.journal = Journal.at(pin, "test", CONVERSION, CONVERSION.new_size, fresh=True)
        self.mover = Mover("test", self.source, self.target, self.journal, CONVERSION, counts=True)


@pytest.fixture(scope="module")
def queues() -> Iterator[Queues]:
    with Lab() as lab:
        yield Queues(lab.bpffs / "journal")


def push(pushed: Map, data: bytes) -> None:
    check(lib().bpf_map_update_elem(pushed.fd, ffi.NULL, ffi.from_buffer(data), 0), "push", "queue")


def pop(popped: Map) -> bytes:
    value = ctypes.create_string_buffer(popped.info.value_size)
    assert ctypes.CDLL("libbpf.so.1").bpf_map_lookup_and_delete_elem(popped.fd, None, value) == 0
    return value.raw


# Numbers that are all ones or zeros in some of their bytes are the ones at the bounds.
parts = st.sampled_from([b"\0\0", b"\xff\xff", b"\x7f\x00", b"\x80\xff", b"\xff\x7f", b"\0\x80"]) | st.binary(
    min_size=2, max_size=2
)
elements = st.lists(parts, min_size=24, max_size=24).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(element=elements)
def test_an_element_is_converted_in_the_kernel_as_in_python(queues: Queues, element: bytes) -> None:
    expected = CONVERSION.apply(np.frombuffer(element, np.uint8).reshape(1, -1))
    before = queues.journal.lost
    push(queues.source, element)
    queues.mover.run()
    assert pop(queues.target) == expected.records.tobytes()
    counted = {path: count - before.get(path, 0) for path, count in queues.journal.lost.items()}
    assert {path for path, count in counted.items() if count} == {misfit.path for misfit in expected.misfits}


def test_an_element_that_finds_the_target_full_stays_where_it_was(queues: Queues) -> None:
    for number in range(8):
        push(queues.target, bytes([number] * CONVERSION.new_size))
    push(queues.source, bytes([9] * CONVERSION.old_size))
    with pytest.raises(KernelError, match="the map is full"):
        queues.mover.run()
    assert (count_elements(queues.source), count_elements(queues.target)) == (1, 8)
    assert pop(queues.source) == bytes([9] * CONVERSION.old_size)
    assert [pop(queues.target)[0] for _ in range(8)] == list(range(8))


def test_elements_are_counted_also_where_the_ring_of_a_queue_has_turned_over(queues: Queues) -> None:
    for turn in range(20):
        push(queues.source, bytes([turn] * CONVERSION.old_size))
        push(queues.source, bytes([turn] * CONVERSION.old_size))
        assert count_elements(queues.source) == 2
        pop(queues.source)
        pop(queues.source)
        assert count_elements(queues.source) == 0
