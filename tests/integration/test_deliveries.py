"""The statements of the outbox against a real Postgres."""

from __future__ import annotations

import concurrent.futures
import datetime as dt
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from tests.rows import ago, claim_some, insert, outcome, spec
from tests.waiting import eventually

from promptfleet_shared.jobs import JobError, JobState, Usage
from promptfleet_shared.store.callbacks import (
    CallbackCounts,
    CallbackState,
    Replay,
    callback_counts,
    enable_endpoint,
    list_callbacks,
    replay_exhausted,
    replay_one,
)
from promptfleet_shared.store.deliveries import (
    FIRST_PAUSE_S,
    MAX_PAUSE_S,
    OPEN_AFTER_FAILURES,
    Attempt,
    Delivery,
    Endpoint,
    Verdict,
    abandon_hopeless,
    claim_deliveries,
    due_endpoints,
    forget_endpoints,
    record_attempts,
)
from promptfleet_shared.store.finishing import finish
from promptfleet_shared.store.tables import callback_endpoints, callbacks

HOOK = "https://example.com/hook"
HERE = Endpoint(tenant="default", endpoint=HOOK)


def finished(
    database: sa.Engine, count: int = 1, *, url: str = HOOK, tenant: str = "default", **facts: Any
) -> list[uuid.UUID]:
    """So many ended jobs with a callback to `url`; their ids."""
    specs = [spec(callback_url=url, tenant=tenant, metadata={"n": n}) for n in range(count)]
    ids = insert(database, *specs)
    ends = [outcome(job, **facts) for job in claim_some(database, ids)]
    with database.begin() as connection:
        assert finish(connection, ends) == set(ids)
    return ids


def claim(
    database: sa.Engine,
    *endpoints: Endpoint,
    limit: int = 100,
    per_endpoint: int = 10,
    lease_s: float = 30.0,
) -> list[Delivery]:
    with database.begin() as connection:
        return claim_deliveries(
            connection,
            endpoints or [HERE],
            limit=limit,
            per_endpoint=per_endpoint,
            lease_s=lease_s,
        )


def attempt(delivery: Delivery, verdict: Verdict, **fields: Any) -> Attempt:
    return Attempt(callback_id=delivery.id, held=delivery.lease_until, verdict=verdict, **fields)


def record(database: sa.Engine, *attempts: Attempt) -> dict[Verdict, int]:
    with database.begin() as connection:
        return record_attempts(connection, attempts)


def open_endpoints(database: sa.Engine, **fields: Any) -> list[Endpoint]:
    with database.connect() as connection:
        return due_endpoints(connection, **{"per_endpoint": 10, **fields}).open


def row(database: sa.Engine, callback_id: uuid.UUID) -> sa.RowMapping:
    with database.connect() as connection:
        query = sa.select(callbacks).where(callbacks.c.id == callback_id)
        return connection.execute(query).mappings().one()


def endpoint_row(database: sa.Engine) -> sa.RowMapping:
    with database.connect() as connection:
        return connection.execute(sa.select(callback_endpoints)).mappings().one()


def pass_time(database: sa.Engine, seconds: float) -> None:
    """Put everything that the outbox knows this much into the past."""
    shift = f"interval '{seconds} seconds'"
    with database.begin() as connection:
        connection.execute(
            sa.text(
                f"UPDATE callbacks SET next_at = next_at - {shift}, begun_at = begun_at - "
                f"{shift}, lease_until = lease_until - {shift}"
            )
        )
        connection.execute(
            sa.text(f"UPDATE callback_endpoints SET paused_until = paused_until - {shift}")
        )


def waits_for_lock(database: sa.Engine) -> bool:
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with database.connect() as connection:
        return bool(connection.execute(sa.text(query)).scalar_one())


def pause_s(database: sa.Engine) -> float:
    """How long the one known endpoint is paused from now."""
    until = endpoint_row(database)["paused_until"]
    with database.connect() as connection:
        now: dt.datetime = connection.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
    return float((until - now).total_seconds())


class TestClaim:
    def test_a_claim_brings_the_facts_and_no_output(self, database: sa.Engine) -> None:
        (job_id,) = finished(
            database,
            url=HOOK + "?token=1",
            state=JobState.FAILED,
            error=JobError(code="bad_request", message="No.", status=400),
            model="m",
            finish_reason="stop",
            usage=Usage(input=1, cached=2, output=3, reasoning=4),
            cost_usd=Decimal("0.5"),
        )

        (one,) = claim(database)

        assert (one.job_id, one.url, one.endpoint) == (job_id, HOOK + "?token=1", HOOK)
        assert (one.event, one.attempt, one.tenant) == ("prompt.failed", 1, "default")
        assert one.facts is not None
        assert one.facts.error == JobError(code="bad_request", message="No.", status=400)
        assert one.facts.usage == Usage(input=1, cached=2, output=3, reasoning=4)
        assert (one.facts.cost_usd, one.facts.metadata) == (Decimal("0.5"), {"n": 0})
        assert (one.facts.state, one.facts.tier, one.facts.attempts) == ("failed", "basic", 1)

    def test_what_is_claimed_is_claimed_again_only_when_the_lease_lapses(
        self, database: sa.Engine
    ) -> None:
        finished(database)
        (first,) = claim(database)
        assert claim(database) == []
        assert open_endpoints(database) == []

        pass_time(database, 31)

        assert open_endpoints(database) == [HERE]
        (second,) = claim(database)
        assert (second.id, second.attempt) == (first.id, 2)
        assert record(database, attempt(first, Verdict.FAILED, delay_s=900)) == {}
        assert row(database, first.id)["lease_until"] == second.lease_until
        assert record(database, attempt(second, Verdict.DELIVERED)) == {Verdict.DELIVERED: 1}
        assert row(database, first.id)["delivered_at"] is not None

    def test_no_endpoint_gets_more_than_its_share_from_claimers_at_once(
        self, database: sa.Engine
    ) -> None:
        finished(database, 40)
        finished(database, 3, url="https://other.example/hook")
        other = Endpoint(tenant="default", endpoint="https://other.example/hook")

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(lambda _: claim(database, HERE, other, limit=6, per_endpoint=7), range(16))
            )

        claimed = [one for some in found for one in some]
        assert len({one.id for one in claimed}) == len(claimed) == 10
        assert sum(one.endpoint == HOOK for one in claimed) == 7
        assert max(len(some) for some in found) <= 6
        record(database, *(attempt(one, Verdict.DELIVERED) for one in claimed[:2]))
        assert len(claim(database, per_endpoint=7)) == sum(
            one.endpoint == HOOK for one in claimed[:2]
        )

    def test_a_claim_waits_for_one_that_is_not_committed(self, database: sa.Engine) -> None:
        """Else it would not see what that one has in flight, and take as many others."""
        finished(database, 20)
        with concurrent.futures.ThreadPoolExecutor(1) as pool, database.connect() as connection:
            first = claim_deliveries(connection, [HERE], limit=100, per_endpoint=7, lease_s=30.0)
            assert len(first) == 7
            second = pool.submit(claim, database, per_endpoint=7)
            eventually(lambda: second.done() or waits_for_lock(database), "it is decided")
            connection.commit()
            assert second.result() == []

    def test_tenants_do_not_share_an_endpoint(self, database: sa.Engine) -> None:
        finished(database, 2)
        finished(database, 2, tenant="acme")
        there = Endpoint(tenant="acme", endpoint=HOOK)
        assert open_endpoints(database) == [there, HERE]
        assert len(claim(database, per_endpoint=1)) == 1
        assert [one.tenant for one in claim(database, there, per_endpoint=1)] == ["acme"]
        assert open_endpoints(database, per_endpoint=1) == []

    def test_a_look_goes_from_endpoint_to_endpoint(self, database: sa.Engine) -> None:
        urls = [f"https://example.com/{n}" for n in range(5)]
        for url in reversed(urls):
            finished(database, 3, url=url)
        seen: list[str] = []
        after = None
        for _ in range(4):
            with database.connect() as connection:
                found = due_endpoints(connection, per_endpoint=1, after=after, limit=2)
            seen += [one.endpoint for one in found.open]
            after = found.last
            if after is None:
                break
        assert seen == urls


class TestRecord:
    def test_a_failure_waits_for_its_time(self, database: sa.Engine) -> None:
        finished(database)
        (one,) = claim(database)
        record(database, attempt(one, Verdict.FAILED, delay_s=300, status=500, error="http_500: x"))
        kept = row(database, one.id)
        assert (kept["attempts"], kept["last_status"]) == (1, 500)
        assert kept["last_error"] == "http_500: x"
        pass_time(database, 290)
        assert claim(database) == []
        pass_time(database, 11)
        assert [again.attempt for again in claim(database)] == [2]

    def test_a_returned_one_has_not_been_tried(self, database: sa.Engine) -> None:
        finished(database)
        (one,) = claim(database)
        assert record(database, attempt(one, Verdict.RETURNED)) == {Verdict.RETURNED: 1}
        assert [again.attempt for again in claim(database)] == [1]

    def test_many_are_recorded_together_each_with_its_own_verdict(
        self, database: sa.Engine
    ) -> None:
        finished(database, 4)
        a, b, c, d = claim(database)
        counts = record(
            database,
            attempt(a, Verdict.DELIVERED, status=200),
            attempt(b, Verdict.FAILED, delay_s=60, status=500),
            attempt(c, Verdict.EXHAUSTED, error="timeout: x"),
            attempt(d, Verdict.RETURNED),
        )
        assert counts == dict.fromkeys(
            (Verdict.DELIVERED, Verdict.FAILED, Verdict.EXHAUSTED, Verdict.RETURNED), 1
        )
        assert row(database, a.id)["delivered_at"] is not None
        assert row(database, b.id)["exhausted_at"] is None
        assert row(database, c.id)["exhausted_at"] is not None
        assert row(database, d.id)["attempts"] == 0
        assert endpoint_row(database)["failures"] == 0  # one of them got through


class TestEndpoints:
    def fail(self, database: sa.Engine, count: int = 1, **fields: Any) -> list[Delivery]:
        claimed = claim(database, limit=count)
        fields = {"delay_s": 0.0, "status": 500, **fields}
        for one in claimed:
            record(database, attempt(one, Verdict.FAILED, **fields))
        return claimed

    def test_failures_in_a_row_pause_it_longer_and_longer(self, database: sa.Engine) -> None:
        finished(database, 20)
        self.fail(database, OPEN_AFTER_FAILURES - 1)
        assert open_endpoints(database) == [HERE]
        assert len(self.fail(database)) == 1

        pauses = []
        for _ in range(9):
            assert open_endpoints(database) == []
            assert claim(database) == []
            pauses.append(pause_s(database))
            pass_time(database, pauses[-1] + 1)
            assert open_endpoints(database) == [HERE]
            assert len(self.fail(database, 10)) == 1, "one probe a pause"
        assert pauses[0] == about(FIRST_PAUSE_S)
        assert pauses[1] == about(2 * FIRST_PAUSE_S)
        assert pauses[-1] == about(MAX_PAUSE_S)

    def test_many_failures_at_once_count_as_one_opening(self, database: sa.Engine) -> None:
        finished(database, 20)
        claimed = claim(database, per_endpoint=20)
        record(database, *(attempt(one, Verdict.FAILED) for one in claimed[:10]))
        for late in claimed[10:]:
            record(database, attempt(late, Verdict.FAILED))
        assert pause_s(database) == about(FIRST_PAUSE_S)
        assert endpoint_row(database)["failures"] == OPEN_AFTER_FAILURES

    def test_only_one_probe_over_the_fleet(self, database: sa.Engine) -> None:
        finished(database, 20)
        self.fail(database, OPEN_AFTER_FAILURES)
        pass_time(database, FIRST_PAUSE_S + 1)
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: claim(database), range(12)))
        assert sum(len(some) for some in found) == 1

    def test_a_success_opens_it_again(self, database: sa.Engine) -> None:
        finished(database, 20)
        self.fail(database, OPEN_AFTER_FAILURES)
        pass_time(database, FIRST_PAUSE_S + 1)
        (probe,) = claim(database)
        record(database, attempt(probe, Verdict.DELIVERED, status=200))
        assert endpoint_row(database)["failures"] == 0
        assert len(claim(database)) == 10

    def test_it_is_left_alone_for_as_long_as_it_asked(self, database: sa.Engine) -> None:
        finished(database, 3)
        a, b = claim(database, limit=2)
        record(database, attempt(a, Verdict.FAILED, status=429, pause_s=120))
        record(database, attempt(b, Verdict.DELIVERED, status=200))
        assert claim(database) == []
        assert open_endpoints(database) == []
        pass_time(database, 119)
        assert claim(database) == []
        pass_time(database, 2)
        assert len(claim(database)) == 2

    def test_a_disabled_one_gets_nothing_more_and_its_callbacks_are_exhausted(
        self, database: sa.Engine
    ) -> None:
        finished(database, 3)
        finished(database, 1, tenant="acme")
        self.fail(database)  # so that it is known already
        (one,) = claim(database, limit=1)
        assert record(database, attempt(one, Verdict.DISABLED, status=410)) == {Verdict.DISABLED: 1}
        assert claim(database) == []
        with database.begin() as connection:
            assert abandon_hopeless(connection, give_up_s=1e6) == 2
            kept = list_callbacks(connection, tenant="default")
            assert [one.state for one in list_callbacks(connection, tenant="acme")] == ["pending"]
        assert {one.state for one in kept} == {CallbackState.EXHAUSTED}
        assert all(one.disabled_at for one in kept)
        assert any("endpoint_disabled" in (one.last_error or "") for one in kept)

    def test_what_waits_too_long_for_a_failing_one_is_exhausted(self, database: sa.Engine) -> None:
        finished(database, 8)
        finished(database, 1, url="https://well.example/")
        self.fail(database, OPEN_AFTER_FAILURES, delay_s=1e6)
        pass_time(database, 1000)
        fresh = finished(database, 1)
        with database.begin() as connection:
            assert abandon_hopeless(connection, give_up_s=900) == 8
            pending = list_callbacks(connection, tenant="default", state=CallbackState.PENDING)
        assert {one.endpoint for one in pending} == {HOOK, "https://well.example/"}
        assert fresh[0] in {one.job_id for one in pending}

    def test_one_that_does_not_fail_any_more_is_forgotten(self, database: sa.Engine) -> None:
        finished(database, 1)
        self.fail(database)
        with database.begin() as connection:
            forget_endpoints(connection)
        assert endpoint_row(database)["failures"] == 1
        pass_time(database, 8 * 86_400)
        with database.begin() as connection:
            forget_endpoints(connection)
            assert not connection.execute(sa.select(callback_endpoints)).all()


class TestPeople:
    def exhaust(self, database: sa.Engine, count: int, *, url: str = HOOK) -> Sequence[Delivery]:
        finished(database, count, url=url)
        claimed = claim(database, Endpoint(tenant="default", endpoint=url))
        record(database, *(attempt(one, Verdict.EXHAUSTED, error="x: y") for one in claimed))
        return claimed

    def replay(
        self, database: sa.Engine, callback_id: uuid.UUID, tenant: str = "default"
    ) -> Replay:
        with database.begin() as connection:
            return replay_one(connection, callback_id, tenant=tenant)

    def test_replay_of_one_begins_its_schedule_anew(self, database: sa.Engine) -> None:
        (one,) = self.exhaust(database, 1)
        assert self.replay(database, one.id, "acme") == Replay(replayed=0, disabled=0, in_flight=0)
        assert claim(database) == []
        assert self.replay(database, one.id) == Replay(replayed=1, disabled=0, in_flight=0)
        (again,) = claim(database)
        assert (again.id, again.attempt) == (one.id, 1)
        assert self.replay(database, one.id) == Replay(replayed=0, disabled=0, in_flight=1)
        record(database, attempt(again, Verdict.DELIVERED))
        assert self.replay(database, one.id).replayed == 1

    def test_replay_of_all_exhausted_of_one_endpoint(self, database: sa.Engine) -> None:
        self.exhaust(database, 3)
        self.exhaust(database, 2, url="https://other.example/")
        with database.begin() as connection:
            found = replay_exhausted(connection, tenant="default", endpoint=HOOK + "?x=1")
            assert found == Replay(replayed=3, disabled=0, in_flight=0)
            assert replay_exhausted(connection, tenant="acme").replayed == 0
            assert replay_exhausted(connection, tenant="default").replayed == 2

    def test_a_disabled_endpoint_has_to_be_enabled_first(self, database: sa.Engine) -> None:
        finished(database, 2)
        (one,) = claim(database, limit=1)
        record(database, attempt(one, Verdict.DISABLED, status=410))
        with database.begin() as connection:
            abandon_hopeless(connection, give_up_s=1e6)
            assert callback_counts(connection) == CallbackCounts(pending=0, exhausted=2, disabled=1)
            found = replay_exhausted(connection, tenant="default")
            assert found == Replay(replayed=0, disabled=2, in_flight=0)
            assert not enable_endpoint(connection, HOOK, tenant="acme")
            assert enable_endpoint(connection, HOOK + "?a=b", tenant="default")
            assert replay_exhausted(connection, tenant="default").replayed == 2
        assert len(claim(database)) == 2

    def test_a_replay_ends_a_pause(self, database: sa.Engine) -> None:
        claimed = self.exhaust(database, OPEN_AFTER_FAILURES)
        assert pause_s(database) > 0
        self.replay(database, claimed[0].id)
        assert [one.id for one in claim(database)] == [claimed[0].id]

    def test_the_list_has_the_newest_first_and_shows_no_query(self, database: sa.Engine) -> None:
        finished(database, 1, url=HOOK + "?token=secret")
        second = finished(database, 1)
        finished(database, 1, tenant="acme")
        with database.connect() as connection:
            found = list_callbacks(connection, tenant="default")
            assert list_callbacks(connection, tenant="default", limit=1) == found[:1]
            assert not list_callbacks(connection, tenant="default", state=CallbackState.DELIVERED)
        assert found[0].job_id == second[0]
        assert {one.endpoint for one in found} == {HOOK}
        assert "secret" not in repr(found)


def test_a_long_backlog_of_one_endpoint_is_not_read(database: sa.Engine) -> None:
    """A look costs a probe an endpoint, whatever waits for it."""
    with database.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO callbacks (job_id, tenant, url, event, next_at) SELECT "
                f"gen_random_uuid(), 'default', '{HOOK}', 'prompt.succeeded', {ago(-600)} "
                "FROM generate_series(1, 20000)"
            )
        )
        connection.execute(sa.text("ANALYZE callbacks"))
    finished(database, 1, url="https://z.example/")
    with database.connect() as connection:
        before = _tuples_read(connection)
        assert [one.endpoint for one in due_endpoints(connection, per_endpoint=1).open] == [
            "https://z.example/"
        ]
        assert _tuples_read(connection) - before < 100


def _tuples_read(connection: sa.Connection) -> int:
    """Of the outbox, by this transaction so far."""
    query = (
        "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables "
        "WHERE relname = 'callbacks'"
    )
    return int(connection.execute(sa.text(query)).scalar_one())


def about(seconds: float) -> Any:
    import pytest

    return pytest.approx(seconds, abs=3)
