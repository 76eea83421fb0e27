"""What a worker's feeder says and does, against a lot that only remembers."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from promptfleet_shared.errors import BrokerUnavailableError
from promptfleet_shared.parking import Turn
from promptfleet_shared.policies.fairness import FairnessSection
from promptfleet_workers.feeder import Feeder

NOTHING = Turn(known="", parked=0, eligible=0, blocked=0, sent=0)


class FakeLot:
    """Remembers what it was asked; may be out of reach."""

    def __init__(self) -> None:
        self.turns: list[dict[str, Any]] = []
        self.known = ""
        self.answer = NOTHING
        self.is_away = False

    def configure(self, _: object, fields: dict[str, str]) -> None:
        self.known = fields["id"]

    def turn(self, _: object, tier: str, **options: Any) -> Turn:
        if self.is_away:
            raise BrokerUnavailableError
        self.turns.append({"tier": tier, **options})
        found = self.answer
        return Turn(
            known=self.known,
            parked=found.parked,
            eligible=found.eligible,
            blocked=found.blocked,
            sent=0,
        )


@pytest.fixture
def lot() -> FakeLot:
    return FakeLot()


def make(lot: Any, **fields: Any) -> Feeder:
    app: Any = None
    return Feeder(app, lot, FairnessSection(**fields), worker="w", chunks={"a": 100, "b": 100})


def test_a_message_is_replaced_once_its_jobs_are_claimed_and_not_before(lot: FakeLot) -> None:
    feeder = make(lot)
    feeder.taken("b", 10)
    assert not feeder._wake.is_set()
    feeder.looked_up(10)
    assert feeder._wake.is_set()

    feeder = make(lot)
    feeder.taken("b", 0)  # there was no room for any of it
    assert feeder._wake.is_set()


def test_what_was_taken_is_replaced_in_its_own_tier(lot: FakeLot) -> None:
    feeder = make(lot)
    feeder.look()
    lot.turns.clear()

    feeder.taken("b", 10)
    feeder.look()

    assert [turn["tier"] for turn in lot.turns] == ["b"]
    assert lot.turns[0]["worker"] == "w"
    feeder.retire()
    feeder.taken("b", 0)
    feeder.look()
    assert lot.turns[-1]["worker"] == ""


def test_no_more_is_taken_while_a_batch_is_unclaimed(lot: FakeLot) -> None:
    feeder = make(lot)

    feeder.taken("a", 100)  # a whole message

    assert not feeder.claims_in_time
    feeder.looked_up(1)
    assert feeder.claims_in_time


def test_a_lost_redis_is_told_all_again(lot: FakeLot) -> None:
    feeder = make(lot, max_in_flight=1)
    feeder.look()
    first = lot.known
    assert first
    lot.known = ""

    feeder.taken("a", 0)
    feeder.look()  # hears of it

    assert lot.known not in {"", first}
    lot.turns.clear()
    feeder.look()
    assert {turn["tier"] for turn in lot.turns} == {"a", "b"}


def test_jobs_that_ended_are_told_of_once_redis_is_back(lot: FakeLot) -> None:
    feeder = make(lot, max_in_flight=1)
    feeder.look()
    lot.turns.clear()
    ended = uuid.uuid4()
    lot.is_away = True
    feeder.gone([ended])
    with pytest.raises(BrokerUnavailableError):
        feeder.look()

    lot.is_away = False
    feeder.taken("a", 0)
    feeder.look()

    assert [job_id for turn in lot.turns for job_id in turn["let_go"]] == [ended]


def test_without_bounds_nobody_speaks_of_jobs(lot: FakeLot) -> None:
    feeder = make(lot)
    feeder.gone([uuid.uuid4()])
    feeder.look()

    assert all(turn["let_go"] == [] for turn in lot.turns)


@pytest.mark.parametrize(
    ("eligible", "blocked", "all_blocked"), [(0, 1, True), (1, 1, False), (0, 0, False)]
)
def test_an_idle_worker_is_not_stuck_while_all_wait_for_a_bound(
    lot: FakeLot, eligible: int, blocked: int, *, all_blocked: bool
) -> None:
    feeder = make(lot, max_in_flight=1)
    lot.answer = Turn(known="", parked=5, eligible=eligible, blocked=blocked, sent=0)
    feeder.look()

    assert feeder.all_blocked() is all_blocked
    assert feeder.any_parked
