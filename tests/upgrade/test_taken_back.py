"""What an upgrade that is taken back after its cutover leaves in the old release's maps."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

import hitless
from hitless.kernel.maps import Map
from hitless.upgrade import cutover, transaction
from tests.upgrade.conftest import Release


def test_an_entry_that_the_new_release_deleted_stays_deleted_even_if_it_has_fields_that_only_the_old_one_knows(
    node: hitless.Node, release: Release
) -> None:
    hitless.apply(node, release(2))
    node.map("tally")[7] = {"since": 5, "count": 3, "port": 7}  # release 1 has no `since`
    node.map("tally")[9] = {"count": 4}

    def fail_after_a_deletion(event: hitless.Progress) -> None:
        if event.step == "commit":
            with Map.open(node.next / "maps" / "tally") as new:  # as a program of the new release does
                for port in (7, 9):
                    assert new.delete(port.to_bytes(4, "little"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, release(1), allow_loss=("tally", "limit"), progress=fail_after_a_deletion)
    assert node.observe().version == "2.0"
    assert dict(node.map("tally").items()) == {}


@pytest.mark.parametrize("deleted", [True, False])
def test_an_entry_of_the_old_release_that_the_new_one_only_touched_is_gone_when_the_old_one_deletes_it(
    node: hitless.Node, release: Release, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    hitless.apply(node, release(1))
    key, switch_back = (7).to_bytes(4, "little"), cutover.switch_back

    def write(generation: Path, value: bytes) -> None:  # as programs do
        with Map.open(generation / "maps" / "tally") as held:
            held.update(key, value.ljust(held.info.value_size, b"\0"))

    def after_the_copy(event: hitless.Progress) -> None:
        if event.step == "cutover":
            write(node.current, struct.pack("=I", 5))
        elif event.step == "catch-up":
            write(node.next, struct.pack("=QQ", 0, 6))
            raise ZeroDivisionError

    def back(*args: Any) -> None:
        switch_back(*args)
        if deleted:
            with Map.open(node.current / "maps" / "tally") as old:
                assert old.delete(key)

    monkeypatch.setattr(transaction, "switch_back", back)
    with pytest.raises(ZeroDivisionError):
        hitless.apply(node, release(2), progress=after_the_copy)
    left = {port: value["count"] for port, value in node.map("tally").items()}
    assert left == ({} if deleted else {7: 11})
