"""What an upgrade that is taken back after its cutover leaves in the old release's maps."""

from __future__ import annotations

import pytest

import hitless
from hitless.kernel.maps import Map
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
