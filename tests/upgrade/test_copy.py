"""Finding equal records, which needs no kernel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hitless.upgrade import copy

records = st.lists(st.binary(min_size=3, max_size=3), unique=True, max_size=40)


@given(one=records, other=records, collide=st.booleans())
def test_equal_records_are_found_even_if_their_marks_collide(
    one: list[bytes], other: list[bytes], collide: bool
) -> None:
    rows, others = (np.frombuffer(b"".join(items), np.uint8).reshape(-1, 3) for items in (one, other))
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(copy, "marks", lambda rows: np.zeros(len(rows), np.uint64))
        in_both, at_others, only_rows, only_others = copy.match_rows(rows, others)
    assert [one[index] for index in in_both] == [other[index] for index in at_others]
    assert {one[index] for index in in_both} == set(one) & set(other)
    assert {one[index] for index in only_rows} == set(one) - set(other)
    assert {other[index] for index in only_others} == set(other) - set(one)
