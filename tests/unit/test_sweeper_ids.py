"""The smallest UUIDv7 of an instant: where pruning begins."""

from __future__ import annotations

import datetime as dt
import time
import uuid

from hypothesis import given
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from promptfleet_workers.sweeper import oldest_id


@given(
    milliseconds=st.integers(0, 2**48 - 1),
    random=st.integers(0, 2**74 - 1),
)
def test_no_id_of_that_instant_is_smaller(milliseconds: int, random: int) -> None:
    version_and_rest = (0x7 << 76) | (random >> 62 << 64) | (0b10 << 62) | random & (2**62 - 1)
    real = uuid.UUID(int=milliseconds << 80 | version_and_rest)

    floor = oldest_id(milliseconds / 1000)

    assert abs((floor.int >> 80) - milliseconds) <= 1  # a float's rounding
    assert oldest_id((milliseconds - 1) / 1000 if milliseconds else 0) <= real


@given(st.floats(0, 2**32), st.floats(0, 2**32))
def test_later_instants_have_larger_ids(one: float, two: float) -> None:
    early, late = sorted([one, two])

    assert oldest_id(early) <= oldest_id(late)


def test_it_is_where_postgres_and_python_put_a_known_instant() -> None:
    """The example of RFC 9562, appendix A.6: 2022-02-22 14:22:22.00 -05:00."""
    instant = dt.datetime(2022, 2, 22, 19, 22, 22, tzinfo=dt.UTC).timestamp()
    example = uuid.UUID("017F22E2-79B0-7CC3-98C4-DC0C0C07398F")

    floor = oldest_id(instant)

    assert floor == uuid.UUID("017F22E2-79B0-0000-0000-000000000000")
    assert floor < example


def test_ids_made_now_lie_between_a_minute_ago_and_in_a_minute() -> None:
    now = time.time()

    assert oldest_id(now - 60) < uuid7() < oldest_id(now + 60)
