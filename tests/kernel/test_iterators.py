"""An iterator program runs once for each entry of a map, and says what it likes."""

from __future__ import annotations

import struct

import pytest

from hitless.errors import KernelError, UnsupportedError
from hitless.kernel.codegen import Assembler
from hitless.kernel.iterators import Iterator
from hitless.kernel.maps import Map, create
from meshd.demo.lab import Lab

SEQ_WRITE = 127  # bpf_seq_write
KEY, VALUE = 16, 24  # in struct bpf_iter__bpf_map_elem, behind the pointers to meta and map


def telling(member: int, size: int) -> bytes:
    """A program that writes the key or the value of each entry."""
    asm = Assembler()
    asm.emit(0x79, 6, 1, 0)  # R6 = context->meta
    asm.emit(0x79, 2, 1, member)
    asm.emit(0x15, 2, 0, "end", 0)  # the last call, after all entries, has none
    asm.emit(0x79, 1, 6, 0)  # R1 = meta->seq
    asm.emit(0xB7, 3, imm=size)
    asm.call(SEQ_WRITE)
    asm.label("end")
    asm.emit(0xB7, 0, imm=0)
    asm.emit(0x95)
    return asm.code()


def filled(entries: int) -> Map:
    made = create(1, "filled", 4, 8, entries)
    for number in range(entries):
        made.update(struct.pack("=I", number), struct.pack("=Q", number * number))
    return made


@pytest.mark.parametrize(("member", "form"), [(KEY, "=I"), (VALUE, "=Q")])
def test_a_pass_visits_every_entry_once(lab: Lab, member: int, form: str) -> None:
    iterator = Iterator.load("bpf_map_elem", telling(member, struct.calcsize(form)), "telling")
    seen = sorted(number for (number,) in struct.iter_unpack(form, iterator.run(filled(10_000))))
    assert seen == [number if member == KEY else number * number for number in range(10_000)]
    iterator.close()


def test_a_small_read_visits_few_entries(lab: Lab) -> None:
    iterator = Iterator.load("bpf_map_elem", telling(KEY, 4), "telling")
    iterator.open(filled(100))
    parts = []
    while part := iterator.read(40):
        parts.append(len(part))
    assert parts == [40] * 10
    iterator.close()


def test_a_pass_can_begin_again_over_another_map(lab: Lab) -> None:
    iterator = Iterator.load("bpf_map_elem", telling(KEY, 4), "telling")
    assert [len(iterator.run(filled(entries))) for entries in (3, 5)] == [12, 20]
    iterator.close()


def test_what_the_verifier_refuses_comes_with_its_log(lab: Lab) -> None:
    with pytest.raises(KernelError, match=r"the program wrong, an iterator over bpf_map_elem: .*(?s:.)*R0 !read_ok"):
        Iterator.load("bpf_map_elem", struct.pack("=BBhi", 0x95, 0, 0, 0), "wrong")


def test_a_map_that_the_iterator_cannot_visit_is_named(lab: Lab) -> None:
    iterator = Iterator.load("bpf_map_elem", telling(KEY, 4), "telling")
    with pytest.raises(KernelError, match="an iterator over bpf_map_elem of map waiting: EINVAL"):
        iterator.open(create(22, "waiting", 0, 4, 8))  # BPF_MAP_TYPE_QUEUE
    iterator.close()


def test_an_unknown_kind_of_object_is_unsupported(lab: Lab) -> None:
    with pytest.raises(UnsupportedError, match="no iterator over moons"):
        Iterator.load("moons", b"", "none")
