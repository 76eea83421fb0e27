"""Jobs through both batch APIs, with a real Postgres and the simulated provider."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from decimal import Decimal

import pytest
import sqlalchemy as sa
from tests.integration.provider_batching import (
    Station,
    batch_job,
    batch_rows,
    calls_of,
    due_now,
    fleet_of,
    line_count,
    simulated,
    sweep_once,
)
from tests.rows import (
    ago,
    callback_rows,
    change,
    insert,
    job_row,
    ledger_rows,
    result_rows,
    spec,
)

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.store.results import request_cancel

PROVIDERS = pytest.mark.parametrize("provider", ["openai", "anthropic"])
MakeStation = Callable[[Fleet], Station]


@pytest.fixture
async def make_station(database_url: str) -> AsyncIterator[MakeStation]:
    async with contextlib.AsyncExitStack() as stack:

        def make(fleet: Fleet) -> Station:
            station = Station(database_url, fleet)
            stack.push_async_callback(station.aclose)
            return station

        yield make


async def until_ended(station: Station, database: sa.Engine, looks: int = 20) -> None:
    """Look until no batch is open."""
    for _ in range(looks):
        due_now(database)
        await station.look()
        if all(row["state"] == "ended" for row in batch_rows(database)):
            return
    raise AssertionError(batch_rows(database))


def cancel(database: sa.Engine, *jobs: object) -> None:
    with database.begin() as connection:
        request_cancel(connection, list(jobs), tenant="default")  # type: ignore[arg-type]


@PROVIDERS
async def test_jobs_go_through_the_batch_api_and_land_like_any_other(
    provider: str, make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (there, url):
        station = make_station(fleet_of(provider, url))
        jobs = [batch_job(f"Say {n}") for n in range(120)]
        jobs[0] = batch_job("Call back", callback_url="https://example.com/hook")
        ids = insert(database, *jobs)
        await station.give(ids)

        assert {job_row(database, job)["state"] for job in ids} == {"submitted"}
        assert there.stats.batches == 0
        row = job_row(database, ids[5])
        assert (row["lease_owner"], row["lease_until"], row["claim_calls"]) == (None, None, 0)
        assert station.claims.fences() == {}
        assert station.slots.take(1000) == 64  # nobody holds a slot for them

        await until_ended(station, database)

    assert (there.stats.batches, there.stats.batch_lines) == (1, 120)
    assert calls_of(there) == [1] * 120
    for job in ids:
        (result,) = result_rows(database, job)
        assert (result["state"], result["deployment"], result["calls"]) == ("succeeded", "d", 1)
        assert result["unknown_calls"] == 0
        assert result["decision"]["service"]["way"] == "batch"
        assert result["saved_usd"] == result["cost_usd"] > 0  # half of the usual price
        (paid,) = ledger_rows(database, job)
        assert (paid["calls"], paid["cost_usd"]) == (1, result["cost_usd"])
    first = result_rows(database, ids[1])[0]
    assert first["text"].startswith("Simulated answer to: Say 1 ")
    assert first["batch_id"] == batch_rows(database)[0]["id"]
    assert first["batch_size"] == 120
    assert len(callback_rows(database, ids[0])) == 1
    assert station.woken.is_set()
    assert set(ids) <= station.told
    assert line_count(database) == 0


@PROVIDERS
async def test_what_is_known_is_not_sent_and_what_lands_is_kept(
    provider: str, make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (there, url):
        station = make_station(fleet_of(provider, url))
        (first,) = insert(database, batch_job("Equal"))
        await station.give([first])
        await until_ended(station, database)
        (second,) = insert(database, batch_job("Equal"))
        await station.give([second])

    (result,) = result_rows(database, second)
    assert (result["state"], result["cache"], result["cost_usd"]) == ("succeeded", "hit", 0)
    assert there.stats.batch_lines == 1


async def test_a_batch_holds_no_more_lines_than_it_may(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (there, url):
        station = make_station(fleet_of("openai", url, max_lines=7, gather_s=60))
        ids = insert(database, *[batch_job(f"{n}") for n in range(24)])
        await station.give(ids)
        lines = sorted(row["lines"] for row in batch_rows(database))
        assert sum(lines) == 24
        assert max(lines) <= 7
        await until_ended(station, database)

    assert there.stats.batch_lines == 24
    assert all(result_rows(database, job)[0]["state"] == "succeeded" for job in ids)


async def test_tenants_share_no_batch(make_station: MakeStation, database: sa.Engine) -> None:
    async with simulated() as (there, url):
        station = make_station(fleet_of("openai", url))
        ids = insert(database, *[batch_job(f"{n}", tenant=f"t{n % 2}") for n in range(4)])
        await station.give(ids)
        await until_ended(station, database)

    assert there.stats.batches == 2
    assert {row["tenant"] for row in batch_rows(database)} == {"t0", "t1"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"deadline_s": 20.0}, "deadline"),
        ({"policy": {"service": "auto"}}, "deadline"),
        ({"stream": True}, "stream"),
    ],
)
async def test_what_can_t_wait_goes_the_ordinary_way(
    fields: dict[str, object], why: str, make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (there, url):
        station = make_station(fleet_of("openai", url))
        (job,) = insert(database, batch_job("Now", **fields))
        await station.give([job])

    (result,) = result_rows(database, job)
    assert result["state"] == "succeeded"
    assert result["decision"]["service"] == {"way": "standard", "why": why}
    assert there.stats.batches == 0


async def test_lines_that_fail_are_judged_one_by_one(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (there, url):
        station = make_station(fleet_of("openai", url))
        good, bad, shaky = ids = insert(
            database,
            batch_job("Fine"),
            batch_job("Bad [[sim:status=400]]"),
            batch_job("Shaky [[sim:status=500,times=1]]"),
        )
        await station.give(ids)
        await until_ended(station, database)

        assert result_rows(database, good)[0]["state"] == "succeeded"
        (refused,) = result_rows(database, bad)
        assert (refused["state"], refused["error"]["status"]) == ("failed", 400)
        again = job_row(database, shaky)
        assert (again["state"], again["policy"]) == ("queued", {"service": "standard"})
        await station.give([shaky])

    (result,) = result_rows(database, shaky)
    assert (result["state"], result["attempts"], result["calls"]) == ("succeeded", 2, 2)
    assert there.stats.batches == 1


@PROVIDERS
async def test_a_batch_that_is_refused_sends_every_line_the_ordinary_way(
    provider: str, make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated(batch_faults="fail") as (there, url):
        station = make_station(fleet_of(provider, url))
        ids = insert(database, batch_job("a"), batch_job("b"))
        await station.give(ids)
        await until_ended(station, database)
        assert {job_row(database, job)["state"] for job in ids} == {"queued"}
        assert {bell.job_id for bell in station.rung} == set(ids)
        await station.give(ids)

    for job in ids:
        (result,) = result_rows(database, job)
        assert (result["state"], result["calls"], result["unknown_calls"]) == ("succeeded", 1, 0)
    assert calls_of(there) == [1, 1]


async def test_where_the_account_has_no_room_they_gather_again(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated(batch_faults="full") as (there, url):
        station = make_station(fleet_of("openai", url))
        (job,) = insert(database, batch_job("a"))
        await station.give([job])
        await until_ended(station, database)
        row = job_row(database, job)
        assert (row["state"], row["policy"]) == ("queued", {"service": "batch"})
        there.options = there.options.changed({"batch_faults": []})
        change(database, job, run_at=ago(1))
        await station.give([job])
        await until_ended(station, database)

    assert result_rows(database, job)[0]["decision"]["service"]["way"] == "batch"
    assert calls_of(there) == [1]


@PROVIDERS
async def test_lines_that_expire_there_go_the_ordinary_way(
    provider: str, make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated(batch_ms=400, batch_expires_s=0.22) as (there, url):
        station = make_station(fleet_of(provider, url))
        ids = insert(database, *[batch_job(f"{n}") for n in range(10)])
        await station.give(ids)
        await until_ended(station, database, looks=2000)
        states = [job_row(database, job)["state"] for job in ids]
        assert states.count("succeeded") == states.count("queued") == 5
        await station.give([job for job, s in zip(ids, states, strict=True) if s == "queued"])

    assert calls_of(there) == [1] * 10
    assert all(result_rows(database, job)[0]["calls"] == 1 for job in ids)


class TestCancelling:
    async def test_before_it_is_sent_a_job_ends_at_once(
        self, make_station: MakeStation, database: sa.Engine
    ) -> None:
        async with simulated() as (there, url):
            station = make_station(fleet_of("openai", url))
            ids = insert(database, batch_job("a"), batch_job("b"))
            await station.give(ids)
            cancel(database, ids[0])
            assert result_rows(database, ids[0])[0]["state"] == "cancelled"
            await until_ended(station, database)

        assert there.stats.batch_lines == 1
        (result,) = result_rows(database, ids[0])
        assert (result["calls"], result["unknown_calls"]) == (0, 0)

    async def test_a_batch_of_which_all_are_cancelled_is_never_sent(
        self, make_station: MakeStation, database: sa.Engine
    ) -> None:
        async with simulated() as (there, url):
            station = make_station(fleet_of("openai", url))
            (job,) = insert(database, batch_job("a"))
            await station.give([job])
            cancel(database, job)
            await until_ended(station, database)

        assert there.stats.requests.total() == 0

    @PROVIDERS
    async def test_after_it_is_sent_its_answer_is_dropped_and_the_call_counted(
        self, provider: str, make_station: MakeStation, database: sa.Engine
    ) -> None:
        async with simulated(batch_ms=10_000) as (there, url):
            station = make_station(fleet_of(provider, url))
            ids = insert(database, batch_job("a"), batch_job("b"))
            await station.give(ids)
            due_now(database)
            await station.look()
            assert batch_rows(database)[0]["state"] == "submitted"
            cancel(database, ids[0])
            assert job_row(database, ids[0])["state"] == "submitted"
            assert sweep_once(database).verdicts == {"cancelled": 1}
            (result,) = result_rows(database, ids[0])
            assert (result["state"], result["unknown_calls"]) == ("cancelled", 1)
            due_now(database)
            await station.look()
            assert not batch_rows(database)[0]["cancel_sent"]  # the other one waits

            cancel(database, ids[1])
            sweep_once(database)
            await until_ended(station, database)

        assert batch_rows(database)[0]["cancel_sent"]
        assert calls_of(there) == []  # the provider has stopped before the first line
        assert result_rows(database, ids[1])[0]["state"] == "cancelled"


class TestSpillingOver:
    async def test_near_its_deadline_a_job_is_called_by_itself(
        self, make_station: MakeStation, database: sa.Engine
    ) -> None:
        async with simulated(batch_ms=600) as (_, url):
            station = make_station(fleet_of("openai", url))
            (job,) = insert(database, batch_job("a"))
            await station.give([job])
            row = job_row(database, job)
            assert (row["deadline"] - row["run_at"]).total_seconds() == 30
            due_now(database)
            await station.look()
            change(database, job, run_at=ago(1), sweep_at=ago(1))
            found = sweep_once(database)
            assert found.verdicts == {"spill": 1}
            assert found.unknown_calls == 1
            assert [bell.job_id for bell in found.doorbells] == [job]
            await station.give([job])
            (result,) = result_rows(database, job)
            await until_ended(station, database, looks=3000)  # its late answer

        assert (result["state"], result["calls"], result["unknown_calls"]) == ("succeeded", 2, 1)
        assert result_rows(database, job) == [result]
        assert sum(row["calls"] for row in ledger_rows(database, job)) == 2
        row = job_row(database, job)
        assert (row["attempt"], row["deferrals"], row["crashes"]) == (1, 1, 0)

    async def test_what_must_not_be_called_twice_waits_until_its_deadline(
        self, make_station: MakeStation, database: sa.Engine
    ) -> None:
        async with simulated(batch_ms=60_000) as (_, url):
            station = make_station(fleet_of("openai", url))
            (job,) = insert(database, batch_job("a", on_unknown="fail"))
            await station.give([job])
            due_now(database)
            await station.look()
            change(database, job, run_at=ago(1), sweep_at=ago(1))
            assert sweep_once(database).verdicts == {"alive": 1}
            change(database, job, deadline=ago(1), sweep_at=ago(1))
            assert sweep_once(database).verdicts == {"expired": 1}

        (result,) = result_rows(database, job)
        assert (result["state"], result["unknown_calls"]) == ("expired", 1)

    async def test_before_it_is_sent_it_costs_no_unknown_call(
        self, make_station: MakeStation, database: sa.Engine
    ) -> None:
        async with simulated() as (there, url):
            station = make_station(fleet_of("openai", url, gather_s=600))
            (job,) = insert(database, batch_job("a"))
            await station.give([job])
            change(database, job, run_at=ago(1), sweep_at=ago(1))
            assert sweep_once(database).unknown_calls == 0
            await station.give([job])
            await until_ended(station, database)

        assert calls_of(there) == [1]
        assert result_rows(database, job)[0]["calls"] == 1


async def test_results_that_break_off_are_read_again(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated(batch_faults="results-cut") as (there, url):
        station = make_station(fleet_of("openai", url))
        ids = insert(database, *[batch_job(f"{n} " + "x" * 900) for n in range(60)])
        await station.give(ids)
        for _ in range(2):
            due_now(database)
            await station.look()
        assert batch_rows(database)[0]["state"] == "submitted"
        there.options = there.options.changed({"batch_faults": []})
        await until_ended(station, database)

    assert all(result_rows(database, job)[0]["state"] == "succeeded" for job in ids)
    assert calls_of(there) == [1] * 60
    assert all(len(ledger_rows(database, job)) == 1 for job in ids)


async def test_a_gateway_that_lost_the_reply_does_not_make_it_twice(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated(batch_faults="create-502") as (there, url):
        station = make_station(fleet_of("openai", url))
        (job,) = insert(database, batch_job("a"))
        await station.give([job])
        due_now(database)
        await station.look()
        assert batch_rows(database)[0]["state"] == "unknown"
        await until_ended(station, database)

    assert there.stats.batches == 1
    assert calls_of(there) == [1]
    assert result_rows(database, job)[0]["unknown_calls"] == 0


async def test_a_batch_whose_owner_can_t_be_told_yet_is_waited_for(
    make_station: MakeStation, database: sa.Engine
) -> None:
    """Another batch of the same size is under way: it could be ours, so nothing is sent again."""
    async with simulated(batch_ms=400, batch_faults="create-502") as (there, url):
        station = make_station(fleet_of("anthropic", url))
        (job,) = insert(database, batch_job("a"))
        await station.give([job])
        due_now(database)
        await station.look()
        for _ in range(3):
            due_now(database)
            await station.look()
            assert batch_rows(database)[0]["state"] == "unknown"
        await until_ended(station, database, looks=3000)

    assert there.stats.batches == 1
    assert calls_of(there) == [1]
    assert result_rows(database, job)[0]["state"] == "succeeded"


async def test_a_fleet_without_batch_apis_calls_such_jobs_by_themselves(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (_, url):
        station = make_station(fleet_of("openai", url, batch_api=False))
        (job,) = insert(database, batch_job("a"))
        await station.give([job])

    (result,) = result_rows(database, job)
    assert result["decision"]["service"] == {"way": "standard", "why": "no_batch_api"}


async def test_other_jobs_of_the_same_batch_are_called_at_once(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (_, url):
        station = make_station(fleet_of("openai", url))
        waiting, called = ids = insert(database, batch_job("a"), spec("b"))
        await station.give(ids)

    assert job_row(database, waiting)["state"] == "submitted"
    (result,) = result_rows(database, called)
    assert result["state"] == "succeeded"
    assert result["cost_usd"] > Decimal(0)
