"""Maps as rows of bytes, and ring buffers by their reader: the quick ways in and out for who knows the layout."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import hitless
from hitless.errors import LayoutError, NodeError
from meshd.demo.lab import Lab
from tests.upgrade.conftest import Make

HELD = "struct entry {{ __u32 number; __u32 {more}; }}; MAP(held, HASH, 65536, __u32, struct entry);"
BEFORE, AFTER = HELD.format(more="other"), HELD.format(more="other; __u64 since")

# Every third record is given up; a program may also be slow to submit.
RING = """
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, %d); } held SEC(".maps");
SEC("cgroup/connect4") int count4(struct bpf_sock_addr *ctx)
{
    __u64 *record = bpf_ringbuf_reserve(&held, 12, 0);
    if (!record)
        return 1;
    *record = __builtin_bswap16(ctx->user_port);
    if (*record %% 3 == 0)
        bpf_ringbuf_discard(record, 0);
    else
        bpf_ringbuf_submit(record, 0);
    return 1;
}
char _license[] SEC("license") = "GPL";
"""
CONNECT = """
import socket, sys
for port in range(int(sys.argv[1]), int(sys.argv[2])):
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", port))
"""


def rows(*records: bytes) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)


def test_what_is_written_as_rows_is_read_by_name_and_as_rows(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", BEFORE))
    held = node.map("held")
    written = [struct.pack("=II", number, 7) for number in range(9)]
    held.update_rows(rows(*(value[:4] for value in written)), rows(*written))
    assert held.get(3) == {"number": 3, "other": 7}
    assert held.delete_rows(rows(struct.pack("=I", 3), struct.pack("=I", 99))) == 1
    keys, values = held.rows()
    found = dict(zip(keys.view(np.uint32).ravel().tolist(), values.view(np.uint32)[:, 0].tolist(), strict=True))
    assert found == {n: n for n in range(9) if n != 3}


def test_rows_reach_both_releases_during_an_upgrade(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", BEFORE))
    node.map("held")[1] = {"number": 1, "other": 1}

    def write(staged: hitless.Node) -> None:
        held = staged.map("held")
        assert [row.tobytes() for row in held.rows()[1]] == [struct.pack("=IIQ", 1, 1, 0)]
        held.update_rows(rows(struct.pack("=I", 2)), rows(struct.pack("=IIQ", 2, 2, 5)))
        with pytest.raises(LayoutError, match="rows of 16 bytes"):
            held.update_rows(rows(struct.pack("=I", 2)), rows(struct.pack("=II", 2, 2)))
        live = hitless.Node(node.root)
        assert live.map("held").get(2) == {"number": 2, "other": 2}, "the running release has it, too"

    hitless.apply(node, make("2.0", AFTER), prepare=write)
    assert node.map("held").get(2) == {"number": 2, "other": 2, "since": 5}


def test_a_reader_takes_every_record_once_and_in_order_also_across_an_upgrade(
    node: hitless.Node, make: Make, lab: Lab
) -> None:
    hitless.apply(node, make("1.0", "", RING % 4096))
    ring = node.ring("held")
    assert ring.take() == []
    for first in (1, 101, 201):  # more than once around: a record takes 24 bytes of 4096
        assert lab.run_python("-c", CONNECT, str(first), str(first + 100), cgroup="clients").returncode == 0
        records = [struct.unpack_from("=Q", record)[0] for record in ring.take()]
        assert records == [port for port in range(first, first + 100) if port % 3]
    lab.run_python("-c", CONNECT, "1", "3", cgroup="clients")
    hitless.apply(node, make("2.0", "", RING % 8192))
    lab.run_python("-c", CONNECT, "4", "6", cgroup="clients")
    assert [struct.unpack_from("=Q", record)[0] for record in ring.take()] == [1, 2, 4, 5]
    assert ring.take() == []


def test_a_ring_that_is_not_there_is_named(node: hitless.Node, make: Make) -> None:
    hitless.apply(node, make("1.0", BEFORE))
    with pytest.raises(NodeError, match="has no map nothing; its maps: held"):
        node.ring("nothing").take()
