"""When an insert is repeated, on a clock of the test's."""

from __future__ import annotations

import pytest
from tests.unit.test_failures import failure

from promptfleet.resubmission import PAUSES_S, REPEAT_WITHIN_S, Resubmission
from promptfleet_shared.errors import StoreUnavailableError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tries(clock: Clock) -> Resubmission:
    return Resubmission(clock=clock, jitter=lambda _low, high: high)


LOST, AWAY, DEADLOCK = failure(None, broken=True), failure(None), failure("40P01")
FULL, REFUSED = failure("53100"), failure("23514")


@pytest.mark.parametrize("error", [AWAY, FULL, REFUSED])
def test_what_was_not_done_is_told_at_once(tries: Resubmission, error: Exception) -> None:
    assert tries.pause_s(error) is None
    told = tries.told(StoreUnavailableError("no room", sqlstate="53100"))
    assert (told.message, told.unknown_outcome) == ("no room", False)


@pytest.mark.parametrize("error", [LOST, DEADLOCK])
def test_what_is_open_is_asked_for_again_twice(tries: Resubmission, error: Exception) -> None:
    assert [tries.pause_s(error) for _ in range(4)] == [*PAUSES_S, None, None]


def test_what_was_open_once_stays_open(tries: Resubmission) -> None:
    assert tries.pause_s(LOST) is not None
    assert tries.pause_s(AWAY) is not None  # the server starts again, perhaps
    assert tries.pause_s(AWAY) is None
    told = tries.told(StoreUnavailableError(sqlstate="57P03"))
    assert told.unknown_outcome
    assert told.facts == {"sqlstate": "57P03", "unknown_outcome": True}
    assert "idempotency key" in str(told)


def test_a_deadlock_was_undone(tries: Resubmission) -> None:
    assert tries.pause_s(DEADLOCK) is not None
    assert not tries.told(StoreUnavailableError()).unknown_outcome


def test_no_repeat_begins_late(tries: Resubmission, clock: Clock) -> None:
    clock.now += REPEAT_WITHIN_S + 0.1
    assert tries.pause_s(LOST) is None
    assert tries.told(StoreUnavailableError()).unknown_outcome
