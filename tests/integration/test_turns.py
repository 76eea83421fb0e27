"""The end of a turn calls the next one of its conversation, whoever else is at it meanwhile."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from tests.rows import ago, change, claim_one, claim_some, insert, job_row, outcome, spec
from tests.waiting import eventually

from promptfleet_shared.jobs import (
    ClaimedJob,
    Doorbell,
    JobError,
    JobSpec,
    JobState,
    Outcome,
    Release,
    TurnTaken,
)
from promptfleet_shared.store.conversations import Ask, take_conversations
from promptfleet_shared.store.sweeping import sweep
from promptfleet_shared.store.turns import finish_turns, release_turns

SLEEP_S = 30.0
MESSAGES = b'[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]'


def turn_of(memory_id: str, **fields: Any) -> JobSpec:
    return spec(policy={"memory_id": memory_id}, **fields)


def take(database: sa.Engine, job: ClaimedJob) -> bool:
    ask = Ask(job.id, job.fence, job.tenant, job.policy["memory_id"], 10**6)
    with database.begin() as connection:
        return job.id in take_conversations(connection, [ask])


def asleep(job: ClaimedJob) -> Release:
    return Release(job_id=job.id, fence=job.fence, delay_s=SLEEP_S, counts=False, waits_turn=True)


def ended(job: ClaimedJob, **fields: Any) -> Outcome:
    return outcome(job, in_conversation=True, **fields)


def said(job: ClaimedJob) -> Outcome:
    return ended(job, turn=TurnTaken(job.policy["memory_id"], MESSAGES))


def finish(database: sa.Engine, *outcomes: Outcome) -> list[uuid.UUID]:
    with database.begin() as connection:
        written, called = finish_turns(connection, outcomes)
    assert written == {item.job_id for item in outcomes}
    return ids_of(called)


def release(database: sa.Engine, *releases: Release) -> list[uuid.UUID]:
    with database.begin() as connection:
        bells, called = release_turns(connection, releases)
    assert {bell.job_id for bell in bells} == {item.job_id for item in releases}
    return ids_of(called)


def ids_of(bells: list[Doorbell]) -> list[uuid.UUID]:
    return [bell.job_id for bell in bells]


def conversation(database: sa.Engine, turns: int, memory_id: str = "chat") -> list[ClaimedJob]:
    """Claimed jobs of which the first one holds the conversation and the others sleep."""
    specs = [turn_of(memory_id) for _ in range(turns)]
    insert(database, *specs)
    jobs = [claim_one(database, each.id) for each in specs]
    assert [take(database, job) for job in jobs] == [True] + [False] * (turns - 1)
    assert release(database, *map(asleep, jobs[1:])) == []
    return jobs


def test_an_end_calls_the_next_turn_and_no_other(database: sa.Engine) -> None:
    first, second, third = conversation(database, 3)
    (other, behind_other) = conversation(database, 2, "another chat")
    assert claim_some(database, [second.id, third.id, behind_other.id]) == []

    assert finish(database, said(first)) == [second.id]

    assert claim_some(database, [third.id, behind_other.id]) == []
    again = claim_one(database, second.id)
    assert take(database, again)
    assert again.attempt == 1  # sleeping burned none
    assert sorted(finish(database, said(again), said(other))) == [third.id, behind_other.id]
    assert finish(database, said(claim_one(database, third.id))) == []


def test_ends_without_a_turn_call_too(database: sa.Engine) -> None:
    first, second, third = conversation(database, 3)
    error = JobError(code="x", message="x")
    assert finish(database, ended(first, state=JobState.FAILED, error=error)) == [second.id]
    again = claim_one(database, second.id)
    assert take(database, again)
    assert finish(database, ended(again, state=JobState.CANCELLED)) == [third.id]


def test_a_tenants_end_calls_nobody_elses_turn(database: sa.Engine) -> None:
    first, second = conversation(database, 2)
    change(database, second.id, tenant="'stranger'")
    assert finish(database, said(first)) == []


def test_who_sleeps_for_another_reason_is_not_called(database: sa.Engine) -> None:
    first, second = conversation(database, 2)
    change(database, second.id, last_error="""'{"code": "rate_limited"}'""")
    assert finish(database, said(first)) == []

    first, second = conversation(database, 2, "one for later")
    change(database, second.id, deferrals="0")  # it was submitted to start so late
    assert finish(database, said(first)) == []


def test_a_turn_that_is_due_needs_no_call(database: sa.Engine) -> None:
    first, second = conversation(database, 2)
    change(database, second.id, run_at=ago(1))
    assert finish(database, said(first)) == []


def test_who_comes_after_the_end_does_not_sleep(database: sa.Engine) -> None:
    specs = [turn_of("chat"), turn_of("chat"), turn_of("chat")]
    insert(database, *specs)
    first, second, third = (claim_one(database, each.id) for each in specs)
    assert take(database, first)
    assert not take(database, second)
    assert finish(database, said(first)) == []  # nobody sleeps yet

    assert release(database, asleep(second), asleep(third)) == [second.id]
    assert take(database, claim_one(database, second.id))


def test_a_lost_call_is_made_again_by_the_sweeper(database: sa.Engine) -> None:
    first, second = conversation(database, 2)
    assert finish(database, said(first)) == [second.id]
    change(database, second.id, sweep_at=ago(1))
    with database.begin() as connection:
        assert ids_of(sweep(connection).doorbells) == [second.id]


def test_an_end_by_the_sweeper_calls_the_next_turn(database: sa.Engine) -> None:
    first, second = conversation(database, 2)
    change(database, first.id, deadline=ago(1), lease_until=ago(1), sweep_at=ago(1))
    with database.begin() as connection:
        found = sweep(connection)
    assert found.verdicts == {"expired": 1}
    assert ids_of(found.doorbells) == [second.id]


@pytest.mark.parametrize("end_first", [True, False])
def test_an_end_and_a_giving_back_that_meet_lose_no_call(
    database: sa.Engine, *, end_first: bool
) -> None:
    """Whichever commits second has waited for the other, and sees what it did."""
    specs = [turn_of("chat"), turn_of("chat")]
    insert(database, *specs)
    first, second = (claim_one(database, each.id) for each in specs)
    assert take(database, first)
    assert not take(database, second)
    steps: list[Callable[[sa.Connection], list[Doorbell]]] = [
        lambda connection: finish_turns(connection, [said(first)])[1],
        lambda connection: release_turns(connection, [asleep(second)])[1],
    ]
    earlier, later = steps if end_first else reversed(steps)

    def run_later() -> list[Doorbell]:
        with database.begin() as connection:
            return later(connection)

    with ThreadPoolExecutor(1) as pool:
        with database.begin() as connection:
            assert earlier(connection) == []
            running = pool.submit(run_later)
            eventually(lambda: waiting_for_locks(database), "the other one waits")
        assert ids_of(running.result(30)) == [second.id]

    row = job_row(database, second.id)
    assert (row["state"], row["deferrals"]) == ("queued", 1)
    assert take(database, claim_one(database, second.id))


def waiting_for_locks(database: sa.Engine) -> int:
    with database.connect() as connection:
        return int(
            connection.execute(
                sa.text(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    " AND datname = current_database()"
                )
            ).scalar_one()
        )
