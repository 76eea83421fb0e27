"""Every statement of the store, against a real Postgres."""

from __future__ import annotations

import dataclasses
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import IntegrityError
from tests.rows import (
    ago,
    callback_rows,
    change,
    claim_one,
    claim_some,
    insert,
    job_row,
    ledger_rows,
    outcome,
    result_rows,
    spec,
)
from tests.waiting import eventually
from uuid_utils.compat import uuid7

from promptfleet.dev_stack import EmbeddedPostgres
from promptfleet_shared.errors import IdempotencyConflictError
from promptfleet_shared.jobs import (
    CacheMode,
    CacheOptions,
    CacheStatus,
    JobError,
    JobKind,
    JobState,
    Release,
    Usage,
)
from promptfleet_shared.store import migrating, sweeping
from promptfleet_shared.store.claims import begin_calls, heartbeat, release
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.results import read_results, request_cancel, states
from promptfleet_shared.store.submissions import insert_jobs
from promptfleet_shared.store.sweeping import Sweep, prune, silent_doorbells
from promptfleet_shared.store.tables import Xid8, metadata

TENANT = "default"


def sweep(database: sa.Engine, *, limit: int = 500) -> Sweep:
    with database.begin() as connection:
        return sweeping.sweep(connection, limit=limit)


def cancel(database: sa.Engine, *ids: uuid.UUID, tenant: str = TENANT) -> set[uuid.UUID]:
    with database.begin() as connection:
        return request_cancel(connection, ids, tenant=tenant)


def finish_all(database: sa.Engine, *outcomes: Any) -> set[uuid.UUID]:
    with database.begin() as connection:
        return finish(connection, outcomes)


def give_back(database: sa.Engine, *releases: Release) -> list[uuid.UUID]:
    with database.begin() as connection:
        return [bell.job_id for bell in release(connection, releases)]


def beat(
    database: sa.Engine, held: dict[uuid.UUID, int], lease_s: float = 45.0
) -> dict[uuid.UUID, bool]:
    with database.begin() as connection:
        return heartbeat(connection, held, lease_s=lease_s)


def seconds_until(database: sa.Engine, job_id: uuid.UUID, column: str) -> float:
    query = f"SELECT extract(epoch FROM {column} - clock_timestamp()) FROM jobs WHERE id = :id"
    with database.connect() as connection:
        return float(connection.execute(sa.text(query), {"id": job_id}).scalar_one())


class TestInsert:
    def test_the_row_says_what_the_spec_said(self, database: sa.Engine) -> None:
        job = spec(
            'a "b" \\ \n é 🎉',
            kind=JobKind.CHAT,
            model="m",
            priority=9,
            tenant="acme",
            cache=CacheOptions(mode=CacheMode.REFRESH, ttl_s=7, namespace="n"),
            metadata={"run": "1", "nested": {"x": [1, None]}},
            callback_url="https://example.com/hook",
            deadline_s=120.0,
        )

        assert insert(database, job) == [job.id]

        row = job_row(database, job.id)
        assert row["state"] == "queued"
        assert (row["tenant"], row["model"], row["priority"]) == ("acme", "m", 9)
        assert row["metadata"] == {"run": "1", "nested": {"x": [1, None]}}
        assert row["callback_url"] == "https://example.com/hook"
        assert (row["attempt"], row["fence"], row["crashes"]) == (0, 0, 0)
        assert (row["deadline"] - row["created_at"]).total_seconds() == pytest.approx(120.0)
        claimed = claim_one(database, job.id)
        assert claimed.request.encode() == job.request
        assert claimed.cache == job.cache
        assert 0 <= claimed.queued_ms < 60_000
        assert 100 < claimed.remaining_s <= 120

    def test_a_request_keeps_nul_and_lone_surrogates_byte_by_byte(
        self, database: sa.Engine
    ) -> None:
        request = b'{"messages":[{"content":"a\\u0000b\\ud800c","role":"user"}]}'
        job = spec(request=request)

        insert(database, job)

        assert claim_one(database, job.id).request.encode() == request

    def test_nothing_is_inserted_from_nothing(self, database: sa.Engine) -> None:
        assert insert(database) == []

    def test_thousands_at_once_keep_their_order(self, database: sa.Engine) -> None:
        specs = [spec(f"{n}") for n in range(3000)]

        assert insert(database, *specs) == [job.id for job in specs]

    def test_the_sweeper_looks_at_the_deadline_at_the_latest(self, database: sa.Engine) -> None:
        short, long = spec(deadline_s=2.0), spec(deadline_s=3600.0)

        insert(database, short, long)

        assert seconds_until(database, short.id, "sweep_at") < 2.5
        assert 25 < seconds_until(database, long.id, "sweep_at") <= 30


class TestIdempotency:
    def test_the_same_request_gives_the_same_job(self, database: sa.Engine) -> None:
        first, again = spec("x", idempotency_key="k"), spec("x", idempotency_key="k")

        assert insert(database, first) == [first.id]
        assert insert(database, again) == [first.id]

        with database.connect() as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM jobs")).scalar_one() == 1

    @pytest.mark.parametrize(
        "other",
        [
            {"request": b'{"messages":[]}'},
            {"tier": "advanced"},
            {"model": "another"},
            {"kind": JobKind.COMPLETION},
            {"callback_url": "https://example.com"},
            {"metadata": {"a": 1}},
        ],
        ids=lambda other: next(iter(other)),
    )
    def test_another_request_is_an_error_and_inserts_nothing(
        self, database: sa.Engine, other: dict[str, Any]
    ) -> None:
        insert(database, spec("x", idempotency_key="k"))
        bystander = spec("y")

        with pytest.raises(IdempotencyConflictError) as caught:
            insert(database, bystander, spec("x", idempotency_key="k", **other))

        assert caught.value.field == "idempotency_key"
        with database.connect() as connection:
            assert states(connection, [bystander.id], tenant=TENANT) == {}

    def test_a_key_belongs_to_its_tenant(self, database: sa.Engine) -> None:
        ours = spec("x", idempotency_key="k")
        theirs = spec("another", idempotency_key="k", tenant="acme")

        assert insert(database, ours, theirs) == [ours.id, theirs.id]

    def test_equal_keys_within_one_call_are_one_job(self, database: sa.Engine) -> None:
        one, two = spec("x", idempotency_key="k"), spec("x", idempotency_key="k")
        other = spec("x")

        assert insert(database, one, other, two) == [one.id, other.id, one.id]

    def test_a_conflict_within_one_call_is_an_error(self, database: sa.Engine) -> None:
        with pytest.raises(IdempotencyConflictError):
            insert(database, spec("x", idempotency_key="k"), spec("y", idempotency_key="k"))

    def test_earlier_and_fresh_keys_in_one_call(self, database: sa.Engine) -> None:
        known = spec("x", idempotency_key="known")
        insert(database, known)
        fresh = spec("y", idempotency_key="fresh")

        ids = insert(database, spec("x", idempotency_key="known"), fresh, spec("z"))

        assert ids[:2] == [known.id, fresh.id]

    def test_concurrent_calls_with_one_key_agree(self, database: sa.Engine) -> None:
        barrier = threading.Barrier(5)

        def submit(_: int) -> uuid.UUID:
            job = spec("x", idempotency_key="k")
            barrier.wait(10)
            return insert(database, job)[0]

        with ThreadPoolExecutor(5) as pool:
            ids = set(pool.map(submit, range(5)))

        assert len(ids) == 1

    def test_concurrent_calls_with_the_same_keys_in_other_orders_do_not_deadlock(
        self, database: sa.Engine
    ) -> None:
        keys = [f"k{n}" for n in range(300)]
        barrier = threading.Barrier(2)

        def submit(order: list[str]) -> dict[str, uuid.UUID]:
            specs = [spec("x", idempotency_key=key) for key in order]
            barrier.wait(10)
            return dict(zip(order, insert(database, *specs), strict=True))

        with ThreadPoolExecutor(2) as pool:
            for round_ in range(5):
                named = [f"{round_}-{key}" for key in keys]
                one, two = pool.map(submit, [named, named[::-1]])
                assert one == two

    def test_two_open_transactions_on_the_same_key(self, database: sa.Engine) -> None:
        """The second waits for the first: after its commit it sees the job, never a KeyError."""
        first, second = spec("x", idempotency_key="k"), spec("x", idempotency_key="k")
        with ThreadPoolExecutor(1) as pool:
            with database.begin() as connection:
                insert_jobs(connection, [first])
                waiting = pool.submit(insert, database, second)
                eventually(lambda: _waits_for_a_lock(database), "the second insert waits")
            assert waiting.result(10) == [first.id]


def _waits_for_a_lock(database: sa.Engine) -> bool:
    query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with database.connect() as connection:
        return bool(connection.execute(sa.text(query)).scalar_one())


class TestClaim:
    def test_takes_what_is_due_and_says_who_has_it(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)

        claimed = claim_some(database, [job.id], worker="me", lease_s=30)[0]

        assert (claimed.id, claimed.fence, claimed.attempt, claimed.calls) == (job.id, 1, 1, 0)
        row = job_row(database, job.id)
        assert (row["state"], row["lease_owner"], row["fence"]) == ("running", "me", 1)
        assert 25 < seconds_until(database, job.id, "lease_until") <= 30

    def test_leaves_out_what_may_not_run(self, database: sa.Engine) -> None:
        due, later, overdue, cancelled, running, done = jobs = [spec() for _ in range(6)]
        insert(database, *jobs)
        change(database, later.id, run_at=ago(-5))
        change(database, overdue.id, deadline=ago(1))
        change(database, cancelled.id, cancel_requested="true")
        claim_one(database, running.id)
        finish_all(database, outcome(claim_one(database, done.id)))
        unknown = uuid7()

        claimed = claim_some(database, [*(job.id for job in jobs), unknown, due.id])

        assert [job.id for job in claimed] == [due.id]

    def test_no_ids_at_all(self, database: sa.Engine) -> None:
        assert claim_some(database, []) == []

    def test_a_lapsed_lease_is_the_sweepers_to_judge(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claim_one(database, job.id)
        change(database, job.id, lease_until=ago(1), sweep_at=ago(1))

        assert claim_some(database, [job.id]) == []
        assert sweep(database).verdicts == {"lost": 1}
        assert claim_one(database, job.id).attempt == 1

    def test_what_another_claimer_has_locked_is_passed_over(self, database: sa.Engine) -> None:
        mine, theirs = spec(), spec()
        insert(database, mine, theirs)
        with database.begin() as connection:
            lock = sa.text("SELECT id FROM jobs WHERE id = :id FOR UPDATE")
            connection.execute(lock, {"id": theirs.id})

            claimed = claim_some(database, [mine.id, theirs.id])

        assert [job.id for job in claimed] == [mine.id]


class TestHeartbeat:
    def test_extends_and_tells_of_cancellation_and_loss(self, database: sa.Engine) -> None:
        held, cancelled, fenced, finished = jobs = [spec() for _ in range(4)]
        insert(database, *jobs)
        claims = {job.id: claim_one(database, job.id, lease_s=1).fence for job in jobs}
        done = outcome(claim_one_again(database, finished.id))
        finish_all(database, done)
        cancel(database, cancelled.id)
        change(database, fenced.id, fence="fence + 1")

        alive = beat(database, claims, lease_s=40)

        assert alive == {held.id: False, cancelled.id: True}
        assert seconds_until(database, held.id, "lease_until") > 30
        assert seconds_until(database, fenced.id, "lease_until") < 2

    def test_a_late_beat_keeps_a_job_that_nobody_took(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)
        change(database, job.id, lease_until=ago(5))

        assert beat(database, {job.id: claimed.fence}) == {job.id: False}

    def test_no_beat_keeps_a_job_long_after_its_deadline(self, database: sa.Engine) -> None:
        job = spec(deadline_s=100)
        insert(database, job)
        claimed = claim_one(database, job.id, lease_s=2)
        change(database, job.id, deadline=ago(10))

        assert beat(database, {job.id: claimed.fence}, lease_s=100) == {job.id: False}

        assert 3 < seconds_until(database, job.id, "lease_until") <= 5


class TestBeginCalls:
    def test_what_a_lost_claim_had_begun_is_charged(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)

        assert begin(database, {job.id: (claimed.fence, 3)}) == {job.id: False}
        change(database, job.id, lease_until=ago(1), sweep_at=ago(1))
        found = sweep(database)

        assert (found.verdicts, found.unknown_calls) == ({"lost": 1}, 3)
        row = job_row(database, job.id)
        assert (row["calls"], row["unknown_calls"], row["claim_calls"]) == (3, 3, 0)
        (paid,) = ledger_rows(database, job.id)
        assert (paid["calls"], paid["unknown_calls"]) == (3, 3)

    def test_what_ended_is_charged_its_own_calls_alone(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)
        begin(database, {job.id: (claimed.fence, 2)})

        finish_all(database, outcome(claimed, calls=1))

        row = job_row(database, job.id)
        assert (row["calls"], row["unknown_calls"], row["claim_calls"]) == (1, 0, 0)

    def test_nobody_calls_for_what_is_lost_lapsed_or_cancelled(self, database: sa.Engine) -> None:
        held, moved, lapsed, cancelled = jobs = [spec() for _ in range(4)]
        insert(database, *jobs)
        claims = {job.id: (claim_one(database, job.id).fence, 2) for job in jobs}
        change(database, moved.id, fence="fence + 1")
        change(database, lapsed.id, lease_until=ago(1))
        cancel(database, cancelled.id)

        assert begin(database, claims) == {held.id: False, cancelled.id: True}
        calls = [job_row(database, job.id)["claim_calls"] for job in jobs]
        assert calls == [2, 1, 1, 1]


def begin(database: sa.Engine, begun: dict[uuid.UUID, tuple[int, int]]) -> dict[uuid.UUID, bool]:
    with database.begin() as connection:
        return begin_calls(connection, begun)


def claim_one_again(database: sa.Engine, job_id: uuid.UUID) -> Any:
    change(database, job_id, lease_until=ago(1), sweep_at=ago(1))
    assert sweep(database).verdicts == {"lost": 1}
    return claim_one(database, job_id)


class TestRelease:
    def test_a_counted_one_is_queued_for_later_with_its_error(self, database: sa.Engine) -> None:
        job = spec(priority=7)
        insert(database, job)
        claimed = claim_one(database, job.id)
        error = JobError(code="timeout", message="too slow", status=504)

        with database.begin() as connection:
            item = Release(
                job_id=job.id,
                fence=claimed.fence,
                delay_s=30,
                calls=2,
                unknown_calls=1,
                error=error,
            )
            (bell,) = release(connection, [item])

        assert (bell.job_id, bell.tier, bell.priority) == (job.id, "basic", 7)
        row = job_row(database, job.id)
        assert (row["state"], row["attempt"], row["deferrals"]) == ("queued", 1, 0)
        assert (row["calls"], row["unknown_calls"]) == (2, 1)
        assert row["lease_owner"] is None
        assert row["lease_until"] is None
        assert row["last_error"] == {"code": "timeout", "message": "too slow", "status": 504}
        assert 25 < seconds_until(database, job.id, "run_at") <= 30
        assert 25 < seconds_until(database, job.id, "sweep_at") <= 30
        assert claim_some(database, [job.id]) == []
        (paid,) = ledger_rows(database, job.id)
        assert (paid["calls"], paid["unknown_calls"]) == (2, 1)

    def test_one_that_does_not_count_gives_the_attempt_back(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)

        give_back(database, Release(job_id=job.id, fence=claimed.fence, counts=False))

        row = job_row(database, job.id)
        assert (row["attempt"], row["deferrals"]) == (0, 1)
        assert ledger_rows(database, job.id) == []
        again = claim_one(database, job.id)
        assert (again.attempt, again.fence) == (1, 2)

    def test_a_moved_fence_is_not_touched(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        stale = claim_one(database, job.id)
        claim_one_again(database, job.id)
        before = job_row(database, job.id)
        paid = ledger_rows(database, job.id)

        assert give_back(database, Release(job_id=job.id, fence=stale.fence, calls=1)) == []

        assert job_row(database, job.id) == before
        assert ledger_rows(database, job.id) == paid

    def test_the_sweeper_looks_no_later_than_the_deadline(self, database: sa.Engine) -> None:
        job = spec(deadline_s=5.0)
        insert(database, job)
        claimed = claim_one(database, job.id)

        give_back(database, Release(job_id=job.id, fence=claimed.fence, delay_s=60))

        assert seconds_until(database, job.id, "sweep_at") <= 5

    def test_a_cancelled_job_does_not_wait_for_its_next_try_to_end(
        self, database: sa.Engine
    ) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)
        cancel(database, job.id)
        give_back(database, Release(job_id=job.id, fence=claimed.fence, delay_s=30))

        assert sweep(database).verdicts == {"cancelled": 1}


class TestFinish:
    def test_state_result_ledger_and_callback_in_one(self, database: sa.Engine) -> None:
        job = spec(callback_url="https://example.com/hook", metadata={"run": "r"}, tenant="acme")
        insert(database, job)
        claimed = claim_one(database, job.id)
        batch = uuid7()
        end = outcome(
            claimed,
            text="Hé 🎉",
            response=b'{"a": 1,  "b":"x"}',
            finish_reason="stop",
            model="gpt",
            provider="openai",
            deployment="d",
            usage=Usage(input=10, cached=4, output=7, reasoning=2),
            cost_usd=Decimal("0.000012345678"),
            cache=CacheStatus.MISS,
            calls=2,
            unknown_calls=1,
            batch_id=batch,
            batch_size=3,
            queued_ms=1.5,
            provider_ms=20.25,
        )

        assert finish_all(database, end) == {job.id}

        row = job_row(database, job.id)
        assert (row["state"], row["lease_owner"], row["calls"]) == ("succeeded", None, 2)
        with database.connect() as connection:
            result = read_results(connection, [job.id], tenant="acme")[job.id]
        assert result.succeeded
        assert (result.text, result.response) == ("Hé 🎉", {"a": 1, "b": "x"})
        assert result.usage == Usage(input=10, cached=4, output=7, reasoning=2)
        assert result.cost_usd == Decimal("0.000012345678")
        assert (result.cache, result.attempts, result.calls) == (CacheStatus.MISS, 1, 2)
        assert (result.batch_id, result.batch_size) == (batch, 3)
        assert (result.queued_ms, result.provider_ms) == (1.5, 20.25)
        assert result.metadata == {"run": "r"}
        assert result.total_ms == pytest.approx(
            (result.finished_at - result.created_at).total_seconds() * 1000, abs=0.01
        )
        (paid,) = ledger_rows(database, job.id)
        assert (paid["calls"], paid["unknown_calls"], paid["tenant"]) == (2, 1, "acme")
        assert paid["cost_usd"] == Decimal("0.000012345678")
        (callback,) = callback_rows(database, job.id)
        assert (callback["url"], callback["event"]) == (
            "https://example.com/hook",
            "prompt.succeeded",
        )

    def test_a_failure_keeps_its_error_and_what_it_cost_before(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        give_back(
            database, Release(job_id=job.id, fence=claim_one(database, job.id).fence, calls=3)
        )
        error = JobError(code="bad_request", message="no", status=400)

        end = outcome(
            claim_one(database, job.id),
            state=JobState.FAILED,
            text=None,
            response=None,
            error=error,
        )
        finish_all(database, end)

        with database.connect() as connection:
            result = read_results(connection, [job.id], tenant=TENANT)[job.id]
        assert (result.state, result.error, result.text) == (JobState.FAILED, error, None)
        assert (result.calls, result.attempts) == (4, 2)
        assert [row["calls"] for row in ledger_rows(database, job.id)] == [3, 1]

    def test_a_cached_answer_costs_no_ledger_row(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)

        finish_all(database, outcome(claim_one(database, job.id), calls=0, cache=CacheStatus.HIT))

        assert ledger_rows(database, job.id) == []
        assert callback_rows(database, job.id) == []
        assert len(result_rows(database, job.id)) == 1

    def test_a_moved_fence_touches_nothing(self, database: sa.Engine) -> None:
        job = spec(callback_url="https://example.com")
        insert(database, job)
        stale = claim_one(database, job.id)
        claim_one_again(database, job.id)
        before = job_row(database, job.id)
        paid = ledger_rows(database, job.id)

        assert finish_all(database, outcome(stale)) == set()

        assert job_row(database, job.id) == before
        assert result_rows(database, job.id) == []
        assert ledger_rows(database, job.id) == paid
        assert callback_rows(database, job.id) == []

    def test_a_result_never_changes(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)
        finish_all(database, outcome(claimed))
        before = result_rows(database, job.id)

        assert finish_all(database, outcome(claimed, text="later")) == set()
        assert cancel(database, job.id) == set()
        change(database, job.id, sweep_at=ago(5))
        assert sweep(database).verdicts == {}

        assert result_rows(database, job.id) == before

    def test_of_many_only_the_stale_are_left_out(self, database: sa.Engine) -> None:
        specs = [spec() for _ in range(20)]
        insert(database, *specs)
        claimed = claim_some(database, [job.id for job in specs])
        stale = {job.id for job in claimed[::3]}
        ends = [
            outcome(job, fence=job.fence - 1 if job.id in stale else job.fence) for job in claimed
        ]

        written = finish_all(database, *ends)

        assert written == {job.id for job in specs} - stale

    def test_two_claims_of_one_job_in_one_call(self, database: sa.Engine) -> None:
        """A zombie and the rightful owner may share a worker, and so a transaction."""
        job, other = spec(), spec()
        insert(database, job, other)
        stale = claim_one(database, job.id)
        rightful = claim_one_again(database, job.id)
        neighbour = claim_one(database, other.id)

        written = finish_all(
            database,
            outcome(stale, text="stale", calls=5),
            outcome(rightful, text="rightful"),
            outcome(neighbour),
        )

        assert written == {job.id, other.id}
        assert [row["text"] for row in result_rows(database, job.id)] == ["rightful"]
        paid = [(row["calls"], row["unknown_calls"]) for row in ledger_rows(database, job.id)]
        assert paid == [(1, 1), (1, 0)]  # the lost claim's, and the rightful owner's

    def test_what_postgres_can_not_hold(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        response = b'{"text":"a\\u0000b\\ud800c"}'

        end = outcome(claim_one(database, job.id), text="a\0b\ud800c", response=response)
        assert finish_all(database, end) == {job.id}

        query = sa.text("SELECT text, response::text FROM results WHERE job_id = :id")
        with database.connect() as connection:
            text, stored = connection.execute(query, {"id": job.id}).one()
        assert text == "a\ufffdb\ufffdc"
        assert stored.encode() == response

    def test_an_error_that_postgres_can_not_hold(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        error = JobError(code="odd", message="a\0b\ud800c")

        end = outcome(claim_one(database, job.id), state=JobState.FAILED, error=error)

        assert finish_all(database, end) == {job.id}
        with database.connect() as connection:
            result = read_results(connection, [job.id], tenant=TENANT)[job.id]
        assert result.error == JobError(code="odd", message="a\ufffdb\ufffdc")

    def test_only_an_end_is_an_end(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)

        with pytest.raises(IntegrityError):
            finish_all(database, outcome(claimed, state=JobState.QUEUED))

        assert job_row(database, job.id)["state"] == "running"

    def test_a_finish_beats_a_sweep_that_comes_second(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)
        change(database, job.id, lease_until=ago(1), sweep_at=ago(1))
        with database.begin() as connection:
            assert finish(connection, [outcome(claimed)]) == {job.id}
            assert sweep(database).verdicts == {}  # passes over what is locked

        assert sweep(database).verdicts == {}
        assert len(result_rows(database, job.id)) == 1

    def test_a_sweep_beats_a_finish_that_comes_second(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)
        change(database, job.id, lease_until=ago(1), sweep_at=ago(1))
        with ThreadPoolExecutor(1) as pool:
            with database.begin() as connection:
                assert sweeping.sweep(connection).verdicts == {"lost": 1}
                waiting = pool.submit(finish_all, database, outcome(claimed))
                eventually(lambda: _waits_for_a_lock(database), "the finish waits")
            assert waiting.result(10) == set()

        assert job_row(database, job.id)["state"] == "queued"
        assert result_rows(database, job.id) == []


class TestSweep:
    def test_a_job_that_lives_is_looked_at_again_when_its_lease_ends(
        self, database: sa.Engine
    ) -> None:
        job = spec()
        insert(database, job)
        claim_one(database, job.id, lease_s=40)
        change(database, job.id, sweep_at=ago(1))

        found = sweep(database)

        assert (found.verdicts, found.doorbells) == ({"alive": 1}, [])
        assert 30 < seconds_until(database, job.id, "sweep_at") <= 40
        assert job_row(database, job.id)["state"] == "running"
        assert beat(database, {job.id: 1}) == {job.id: False}

    def test_a_silent_job_is_rung_ever_more_seldom(self, database: sa.Engine) -> None:
        job = spec(deadline_s=3600.0, priority=2)
        insert(database, job)
        waits = []
        for _ in range(7):
            change(database, job.id, sweep_at=ago(1))
            found = sweep(database)
            assert found.verdicts == {"ring": 1}
            assert [(bell.job_id, bell.priority) for bell in found.doorbells] == [(job.id, 2)]
            waits.append(round(seconds_until(database, job.id, "sweep_at")))

        assert waits == [30, 60, 120, 240, 300, 300, 300]
        assert job_row(database, job.id)["attempt"] == 0

    def test_a_lost_lease_is_queued_again_and_its_zombie_fenced(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        zombie = claim_one(database, job.id)
        change(database, job.id, lease_until=ago(1), sweep_at=ago(1))

        found = sweep(database)

        assert found.verdicts == {"lost": 1}
        assert [bell.job_id for bell in found.doorbells] == [job.id]
        row = job_row(database, job.id)
        assert (row["state"], row["crashes"], row["unknown_calls"]) == ("queued", 1, 1)
        assert row["lease_owner"] is None
        assert beat(database, {job.id: zombie.fence}) == {}
        assert finish_all(database, outcome(zombie)) == set()
        assert claim_one(database, job.id).fence == zombie.fence + 2

    def test_the_third_lost_lease_is_poison(self, database: sa.Engine) -> None:
        job = spec(callback_url="https://example.com")
        insert(database, job)
        verdicts = []
        for _ in range(3):
            claim_one(database, job.id)
            change(database, job.id, lease_until=ago(1), sweep_at=ago(1))
            verdicts.append(sweep(database).verdicts)

        assert verdicts == [{"lost": 1}, {"lost": 1}, {"poison": 1}]
        with database.connect() as connection:
            result = read_results(connection, [job.id], tenant=TENANT)[job.id]
        assert result.state is JobState.FAILED
        assert result.error is not None
        assert result.error.code == "poison"
        assert [row["event"] for row in callback_rows(database, job.id)] == ["prompt.failed"]
        assert claim_some(database, [job.id]) == []

    def test_a_job_that_must_not_be_called_twice_ends_with_its_worker(
        self, database: sa.Engine
    ) -> None:
        job = spec()
        insert(database, job)
        change(database, job.id, on_unknown="'fail'")
        claimed = claim_one(database, job.id)
        begin(database, {job.id: (claimed.fence, 1)})
        change(database, job.id, lease_until=ago(1), sweep_at=ago(1))

        found = sweep(database)

        assert (found.verdicts, found.unknown_calls, found.doorbells) == ({"unknown": 1}, 1, [])
        with database.connect() as connection:
            result = read_results(connection, [job.id], tenant=TENANT)[job.id]
        assert (result.state, result.calls) == (JobState.FAILED, 1)
        assert result.error is not None
        assert result.error.code == "unknown_outcome"

    def test_before_its_call_it_may_be_lost_like_any_other(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        change(database, job.id, on_unknown="'fail'")
        claim_one(database, job.id)
        change(database, job.id, lease_until=ago(1), sweep_at=ago(1))

        found = sweep(database)

        assert (found.verdicts, found.unknown_calls) == ({"lost": 1}, 0)
        assert job_row(database, job.id)["calls"] == 0

    @pytest.mark.parametrize("running", [False, True], ids=["queued", "lost"])
    def test_an_overdue_job_expires(self, database: sa.Engine, *, running: bool) -> None:
        job = spec(callback_url="https://example.com", metadata={"a": 1})
        insert(database, job)
        if running:
            claim_one(database, job.id)
            change(database, job.id, lease_until=ago(1))
        change(database, job.id, deadline=ago(1), sweep_at=ago(1))

        found = sweep(database)

        assert (found.verdicts, found.doorbells) == ({"expired": 1}, [])
        with database.connect() as connection:
            result = read_results(connection, [job.id], tenant=TENANT)[job.id]
        assert result.state is JobState.EXPIRED
        assert result.error is not None
        assert result.error.code == "expired"
        assert result.metadata == {"a": 1}
        assert [row["event"] for row in callback_rows(database, job.id)] == ["prompt.expired"]

    def test_a_cancelled_job_whose_worker_is_gone_ends(self, database: sa.Engine) -> None:
        job = spec(callback_url="https://example.com")
        insert(database, job)
        claim_one(database, job.id)
        assert cancel(database, job.id) == {job.id}
        change(database, job.id, lease_until=ago(1), sweep_at=ago(1))

        assert sweep(database).verdicts == {"cancelled": 1}

        assert [row["state"] for row in result_rows(database, job.id)] == ["cancelled"]
        assert [row["event"] for row in callback_rows(database, job.id)] == ["prompt.cancelled"]

    def test_a_submitted_job_is_left_alone_until_its_time(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        change(database, job.id, state="'submitted'", run_at=ago(-30), sweep_at=ago(1))

        assert sweep(database).verdicts == {"alive": 1}
        row = job_row(database, job.id)
        assert row["sweep_at"] == row["run_at"]  # when it is taken back
        change(database, job.id, deadline=ago(1), sweep_at=ago(1))
        assert sweep(database).verdicts == {"expired": 1}

    def test_what_is_not_due_is_not_looked_at(self, database: sa.Engine) -> None:
        insert(database, spec())

        assert sweep(database) == Sweep(doorbells=[], verdicts={})

    def test_two_sweepers_share_the_work(self, database: sa.Engine) -> None:
        specs = [spec() for _ in range(10)]
        insert(database, *specs)
        for job in specs:
            change(database, job.id, sweep_at=ago(1))
        with database.begin() as connection:
            one = sweeping.sweep(connection, limit=6)
            two = sweep(database)

        ids = [bell.job_id for bell in [*one.doorbells, *two.doorbells]]
        assert len(one.doorbells) == 6
        assert sorted(ids) == sorted(job.id for job in specs)


class TestSilentDoorbells:
    def test_rings_due_jobs_once_until_they_are_silent_again(self, database: sa.Engine) -> None:
        silent, fresh, later, elsewhere, running, cancelled = jobs = [
            spec(tier="advanced" if n == 3 else "basic") for n in range(6)
        ]
        insert(database, *jobs)
        claim_one(database, running.id)
        for job in jobs:
            if job is not fresh:
                change(database, job.id, rung_at=ago(6))
        change(database, later.id, run_at=ago(-60))
        change(database, cancelled.id, cancel_requested="true")

        with database.begin() as connection:
            bells = silent_doorbells(connection, "basic")
        assert [bell.job_id for bell in bells] == [silent.id]
        with database.begin() as connection:
            assert silent_doorbells(connection, "basic") == []
            assert [bell.job_id for bell in silent_doorbells(connection, "advanced")] == [
                elsewhere.id
            ]


class TestCancel:
    def test_a_queued_job_ends_at_once(self, database: sa.Engine) -> None:
        job = spec(callback_url="https://example.com")
        insert(database, job)

        assert cancel(database, job.id, uuid7()) == {job.id}

        assert [row["state"] for row in result_rows(database, job.id)] == ["cancelled"]
        assert [row["event"] for row in callback_rows(database, job.id)] == ["prompt.cancelled"]
        assert cancel(database, job.id) == set()
        assert claim_some(database, [job.id]) == []

    def test_a_running_job_is_told(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claimed = claim_one(database, job.id)

        assert cancel(database, job.id) == {job.id}

        assert result_rows(database, job.id) == []
        assert beat(database, {job.id: claimed.fence}) == {job.id: True}
        assert finish_all(database, outcome(claimed)) == {job.id}

    def test_other_tenants_jobs_do_not_exist(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)

        assert cancel(database, job.id, tenant="acme") == set()
        with database.connect() as connection:
            assert states(connection, [job.id], tenant="acme") == {}
            assert states(connection, [job.id], tenant=TENANT) == {job.id: JobState.QUEUED}
            assert read_results(connection, [job.id], tenant=TENANT) == {}


class TestPrune:
    def test_deletes_old_ends_and_nothing_else(self, database: sa.Engine) -> None:
        old, recent, open_ = jobs = [spec() for _ in range(3)]
        insert(database, *jobs)
        for job in (old, recent):
            finish_all(database, outcome(claim_one(database, job.id)))
        change(database, old.id, finished_at=ago(3600))
        floor = uuid7()

        with database.begin() as connection:
            assert prune(connection, floor=old.id, age_s=60) == 0  # younger than the floor
            assert prune(connection, floor=floor, age_s=60) == 1

        with database.connect() as connection:
            left = states(connection, [job.id for job in jobs], tenant=TENANT)
        assert left == {recent.id: JobState.SUCCEEDED, open_.id: JobState.QUEUED}
        assert result_rows(database, old.id) == []
        assert len(result_rows(database, recent.id)) == 1
        assert len(ledger_rows(database, old.id)) == 1  # what was paid stays on the books

    def test_a_job_stays_until_its_callback_is_delivered(self, database: sa.Engine) -> None:
        job = spec(callback_url="https://example.com/hook")
        insert(database, job)
        finish_all(database, outcome(claim_one(database, job.id)))
        change(database, job.id, finished_at=ago(3600))

        with database.begin() as connection:
            assert prune(connection, floor=uuid7(), age_s=60) == 0
            connection.execute(sa.text("UPDATE callbacks SET delivered_at = clock_timestamp()"))
            assert prune(connection, floor=uuid7(), age_s=60) == 1

        assert callback_rows(database, job.id) == []


class TestConstraints:
    @pytest.mark.parametrize(
        "columns",
        [
            {"state": "'lost'"},
            {"kind": "'poem'"},
            {"priority": "10"},
            {"priority": "-1"},
            {"state": "'succeeded'"},
            {"finished_at": "clock_timestamp()"},
            {"id": "gen_random_uuid()", "request": "NULL"},
        ],
        ids=str,
    )
    def test_the_table_refuses_what_can_not_be(
        self, database: sa.Engine, columns: dict[str, str]
    ) -> None:
        job = spec()
        insert(database, job)

        with pytest.raises(IntegrityError):
            change(database, job.id, **columns)

    def test_a_results_state_is_final(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        finish_all(database, outcome(claim_one(database, job.id)))

        for column, value in {"state": "running", "cache": "warm"}.items():
            with pytest.raises(IntegrityError), database.begin() as connection:
                connection.execute(sa.text(f"UPDATE results SET {column} = '{value}'"))

    def test_a_second_result_of_a_job_is_impossible(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        finish_all(database, outcome(claim_one(database, job.id)))

        with pytest.raises(IntegrityError), database.begin() as connection:
            connection.execute(sa.text("INSERT INTO results SELECT * FROM results"))

    def test_a_refused_insert_says_nothing_of_the_prompt(self, database: sa.Engine) -> None:
        job = dataclasses.replace(spec("a secret"), priority=99)

        with pytest.raises(IntegrityError) as caught:
            insert(database, job)

        assert "jobs_priority_check" in str(caught.value.orig)


class TestMigrations:
    @pytest.fixture
    def empty(self, postgres: EmbeddedPostgres, admin: sa.Engine) -> Any:
        name = f"empty_{uuid.uuid4().hex[:8]}"
        with admin.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
        url = sa.make_url(postgres.url).set(database=name)
        engine = make_engine(url.render_as_string(hide_password=False), application_name="tests")
        yield engine
        engine.dispose()
        with admin.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))

    def test_lead_to_the_tables(self, database: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(PGDialect.ischema_names, "xid8", Xid8)
        with database.connect() as connection:
            context = MigrationContext.configure(
                connection, opts={"compare_type": True, "compare_server_default": True}
            )
            assert compare_metadata(context, metadata) == []

    def test_make_the_same_checks_as_the_tables(
        self, database: sa.Engine, empty: sa.Engine
    ) -> None:
        """Alembic does not compare CHECKs, so Postgres does."""
        metadata.create_all(empty)

        assert _checks(database) == _checks(empty)

    def test_report_where_a_database_stands(self, empty: sa.Engine) -> None:
        with empty.connect() as connection:
            before = migrating.schema_version(connection)
        after = migrating.migrate(empty)

        assert (before.current, before.is_current) == (None, False)
        assert after.is_current
        assert migrating.migrate(empty) == after

    def test_two_migrators_at_once(self, empty: sa.Engine) -> None:
        barrier = threading.Barrier(2)

        def run(_: int) -> bool:
            barrier.wait(10)
            return migrating.migrate(empty).is_current

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(run, range(2))) == [True, True]

    def test_go_down_and_up_again(self, empty: sa.Engine) -> None:
        migrating.migrate(empty)
        with empty.begin() as connection:
            config = migrating._config()
            config.attributes["connection"] = connection
            command.downgrade(config, "base")
        assert sa.inspect(empty).get_table_names() == ["alembic_version"]

        assert migrating.migrate(empty).is_current
        assert insert(empty, spec())


def _checks(engine: sa.Engine) -> dict[str, str]:
    query = sa.text(
        "SELECT conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)"
        " FROM pg_constraint WHERE contype = 'c' AND connamespace = 'public'::regnamespace"
    )
    with engine.connect() as connection:
        return {row[0]: row[1] for row in connection.execute(query)}
