"""When waiting looks, pauses and gives up: on a clock of the test's own."""

from __future__ import annotations

import datetime as dt
import uuid

import pytest

from promptfleet.backends import Lookup
from promptfleet.waiting import FIRST_PAUSE_S, LONGEST_PAUSE_S, Watch, succeeded
from promptfleet_shared.errors import (
    InvalidRequestError,
    JobCancelledError,
    JobExpiredError,
    JobFailedError,
    JobNotFoundError,
    WaitTimeoutError,
)
from promptfleet_shared.jobs import NO_USAGE, CacheStatus, JobError, JobState, Result

FIRST, SECOND = uuid.uuid4(), uuid.uuid4()
NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def result_of(
    id_: uuid.UUID, state: JobState = JobState.SUCCEEDED, error: JobError | None = None
) -> Result:
    return Result(
        job_id=id_,
        state=state,
        tier="basic",
        text=None,
        response=None,
        finish_reason=None,
        error=error,
        model=None,
        provider=None,
        deployment=None,
        usage=NO_USAGE,
        cost_usd=None,
        cache=CacheStatus.OFF,
        attempts=2,
        calls=3,
        batch_id=None,
        batch_size=1,
        queued_ms=0.0,
        provider_ms=None,
        total_ms=0.0,
        metadata={},
        created_at=NOW,
        finished_at=NOW,
    )


def queued(*ids: uuid.UUID) -> Lookup:
    return Lookup(results={}, states=dict.fromkeys(ids, JobState.QUEUED))


def ended(*ids: uuid.UUID) -> Lookup:
    return Lookup(results={id_: result_of(id_) for id_ in ids}, states={})


def test_pauses_grow_and_start_afresh_when_a_job_ends() -> None:
    watch = Watch([FIRST, SECOND], None, clock=Clock())
    pauses = []
    for _ in range(15):
        assert watch.pending == [FIRST, SECOND]
        assert watch.feed(queued(FIRST, SECOND)) == []
        pauses.append(watch.pause())
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(FIRST_PAUSE_S * 1.5)
    assert pauses[-1] == LONGEST_PAUSE_S
    assert [result.job_id for result in watch.feed(ended(SECOND))] == [SECOND]
    assert watch.pause() == FIRST_PAUSE_S
    assert watch.pending == [FIRST]


def test_time_runs_out() -> None:
    clock = Clock()
    watch = Watch([FIRST], 1.0, clock=clock)
    assert watch.pending
    watch.feed(queued(FIRST))
    clock.now += 0.99
    assert watch.pause() == pytest.approx(0.01)
    clock.now += 0.01
    with pytest.raises(WaitTimeoutError) as caught:
        watch.pause()
    assert caught.value.facts == {"job_ids": (FIRST,), "timeout_s": 1.0}


def test_looks_that_take_long_are_rare() -> None:
    clock = Clock()
    watch = Watch([FIRST], None, clock=clock)
    assert watch.pending
    clock.now += 3.0
    watch.feed(queued(FIRST))
    assert watch.pause() == 3.0


def test_a_job_that_is_none_is_noticed_at_once_and_later() -> None:
    with pytest.raises(JobNotFoundError):
        Watch([FIRST], None, clock=Clock()).feed(Lookup(results={}, states={}))
    watch = Watch([FIRST], None, clock=Clock())
    watch.feed(queued(FIRST))
    assert not watch.wants_states
    while not watch.wants_states:
        watch.feed(Lookup(results={}, states={}))
    with pytest.raises(JobNotFoundError):
        watch.feed(Lookup(results={}, states={}))


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True])
def test_a_timeout_is_a_number_from_zero(timeout: float) -> None:
    with pytest.raises(InvalidRequestError, match=r"^timeout: "):
        Watch([FIRST], timeout, clock=Clock())


def test_only_a_success_is_a_success() -> None:
    good = result_of(FIRST)
    assert succeeded(good) is good
    error = JobError(code="overloaded", message="Too much.")
    with pytest.raises(JobFailedError, match="failed: overloaded: Too much") as caught:
        succeeded(result_of(FIRST, JobState.FAILED, error))
    assert caught.value.facts["job_id"] == FIRST
    assert (caught.value.facts["attempts"], caught.value.facts["calls"]) == (2, 3)
    with pytest.raises(JobCancelledError, match="was cancelled"):
        succeeded(result_of(FIRST, JobState.CANCELLED))
    with pytest.raises(JobExpiredError, match="deadline"):
        succeeded(result_of(FIRST, JobState.EXPIRED))
