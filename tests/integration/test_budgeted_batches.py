"""Lines of providers' batches reserve money, whoever dies, and give it back however they end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from decimal import Decimal
from typing import Any

import orjson
import pytest
import redis
import sqlalchemy as sa
from tests.integration.provider_batching import (
    Station,
    batch_job,
    batch_rows,
    due_now,
    fleet_of,
    simulated,
    sweep_once,
)
from tests.rows import ago, change, insert, job_row, result_rows

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import JobSpec
from promptfleet_shared.pricing import Pricer
from promptfleet_shared.store.results import request_cancel
from promptfleet_workers import budget_counters
from promptfleet_workers.budget_notices import BudgetNotices
from promptfleet_workers.budgets import Budgets

HARD = """
[[budgets]]
name = "all"
period = "total"
hard_usd = 0.05
"""
LINE = 100_000
"""Tokens of answer that are 3 cents at the price of batches, and 6 of a call's."""
MakeStation = Callable[..., Station]


@pytest.fixture
async def make_station(database_url: str, broker_url: str) -> AsyncIterator[MakeStation]:
    async with contextlib.AsyncExitStack() as stack:

        def make(fleet: Fleet, *, hold_s: float = 30.0) -> Station:
            def budgets(station: Station) -> Budgets:
                return Budgets(
                    fleet,
                    url=broker_url,
                    database=station.database,
                    prices=Pricer(),
                    notices=BudgetNotices(
                        station.database,
                        tenant="ops",
                        wake_callbacks=station.woken.set,
                        emit=station.events.append,
                    ),
                    emit=station.events.append,
                    quiet_s=0.0,
                    hold_s=hold_s,
                    timeout_s=5.0,
                )

            station = Station(database_url, fleet, make_budgets=budgets)
            stack.push_async_callback(station.aclose)
            return station

        yield make


def line(text: str, tokens: int = LINE, **fields: object) -> JobSpec:
    """A job whose line costs so many tokens of answer at most."""
    body = {"max_tokens": tokens, "messages": [{"content": text, "role": "user"}]}
    return batch_job(text, request=orjson.dumps(body, option=orjson.OPT_SORT_KEYS), **fields)


async def settled(station: Station) -> None:
    assert station.budgets is not None
    while station.budgets._tasks:
        await asyncio.gather(*station.budgets._tasks)


async def until_ended(station: Station, database: sa.Engine) -> None:
    for _ in range(20):
        due_now(database)
        await station.look()
        if all(row["state"] == "ended" for row in batch_rows(database)):
            await settled(station)
            return
    raise AssertionError(batch_rows(database))


async def give(station: Station, database: sa.Engine, *jobs: JobSpec) -> list[str]:
    """Their states after a worker has had them."""
    ids = insert(database, *jobs)
    await station.give(ids)
    return [job_row(database, job)["state"] for job in ids]


async def test_a_line_reserves_half_and_is_settled_when_it_lands(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (_, url):
        station = make_station(fleet_of("openai", url, more=HARD))
        jobs = [line("a"), line("b", deadline_s=40 * 60.0)]
        assert await give(station, database, *jobs) == ["submitted", "queued"]
        waiting = job_row(database, jobs[1].id)
        assert waiting["last_error"]["code"] == "budget_held"
        assert (waiting["attempt"], waiting["deferrals"]) == (0, 1)
        assert waiting["decision"]["budget"] == {"name": "all", "reason": "held"}

        await until_ended(station, database)
        (result,) = result_rows(database, jobs[0].id)
        assert result["state"] == "succeeded"
        assert 0 < result["cost_usd"] < Decimal("0.001")
        assert await give(station, database, line("c", LINE * 3 // 2)) == ["submitted"]

        (refused,) = insert(database, line("much", 2 * LINE))  # 6 cents never fit
        await station.give([refused])
    (result,) = result_rows(database, refused)
    assert (result["state"], result["error"]["code"]) == ("failed", "budget_exceeded")


async def test_a_batch_of_jobs_is_one_reservation(
    make_station: MakeStation, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = budget_counters.Counters.ask

    async def counting(
        self: budget_counters.Counters,
        act: str,
        counters: Sequence[budget_counters.Counter],
        **parts: Any,
    ) -> dict[str, Any] | None:
        if act == "reserve":
            asked.append(len(parts["jobs"]))
        return await ask(self, act, counters, **parts)

    async with simulated() as (_, url):
        station = make_station(fleet_of("openai", url, more=HARD))
        await give(station, database, line("seeds the counter", 1))
        monkeypatch.setattr(budget_counters.Counters, "ask", counting)
        assert set(await give(station, database, *[line(f"{n}", 10) for n in range(30)])) == {
            "submitted"
        }
    assert sum(asked) == 30
    assert len(asked) <= 2  # the window may close between two of them


@pytest.mark.parametrize("lost", ["worker", "redis"])
async def test_its_money_is_kept_whoever_is_lost(
    lost: str, make_station: MakeStation, database: sa.Engine, broker_url: str
) -> None:
    """No worker says so, and no server must remember: the row does."""
    async with simulated() as (_, url):
        fleet = fleet_of("openai", url, more=HARD)
        dead, station = make_station(fleet, hold_s=0.05), make_station(fleet)
        assert await give(dead, database, line("a")) == ["submitted"]
        with redis.Redis.from_url(broker_url) as server:
            (held,) = server.keys("*{budgets}:held:*")
            members: Any = server.zrange(held, 0, -1)
            if lost == "redis":
                server.flushall()
            else:  # it died before it could say that its jobs are lines
                server.zadd(held, dict.fromkeys(members, 1.0))
        assert await give(station, database, line("b")) == ["queued"]
        assert await give(station, database, line("c", LINE // 2)) == ["submitted"]
        await until_ended(station, database)
        assert await give(station, database, line("d")) == ["submitted"]


@pytest.mark.parametrize("how", ["cancel", "expire", "spill"])
async def test_a_line_that_nobody_waits_for_gives_its_money_back(
    how: str, make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated(batch_ms=60_000) as (_, url):
        station = make_station(fleet_of("openai", url, more=HARD))
        first, other = line("a"), line("b", 1)
        assert await give(station, database, first, other) == ["submitted"] * 2
        due_now(database)
        await station.look()
        match how:
            case "cancel":
                with database.begin() as connection:
                    request_cancel(connection, [first.id], tenant="default")
            case "expire":
                change(database, first.id, deadline=ago(1), sweep_at=ago(1))
            case _:
                change(database, first.id, run_at=ago(1), sweep_at=ago(1))
        sweep_once(database)
        assert job_row(database, first.id)["state"] != "submitted"
        assert await give(station, database, line("c")) == ["queued"]

        due_now(database)
        await station.look()

        assert await give(station, database, line("d")) == ["submitted"]


async def test_what_nobody_gave_back_lapses(
    make_station: MakeStation, database: sa.Engine, broker_url: str
) -> None:
    async with simulated() as (_, url):
        station = make_station(fleet_of("openai", url, more=HARD, gather_s=600))
        first = line("a")
        assert await give(station, database, first) == ["submitted"]
        with database.begin() as connection:
            request_cancel(connection, [first.id], tenant="default")
        sweep_once(database)
        assert await give(station, database, line("b")) == ["queued"]
        with redis.Redis.from_url(broker_url) as server:
            (held,) = server.keys("*{budgets}:held:*")
            members: Any = server.zrange(held, 0, -1)
            server.zadd(held, dict.fromkeys(members, 1.0))  # an hour later
        assert await give(station, database, line("c")) == ["submitted"]


async def test_a_line_that_failed_gives_its_money_back(
    make_station: MakeStation, database: sa.Engine
) -> None:
    async with simulated() as (_, url):
        station = make_station(fleet_of("openai", url, more=HARD))
        shaky = line("Shaky [[sim:status=500,times=1]]")
        assert await give(station, database, shaky) == ["submitted"]
        await until_ended(station, database)
        assert job_row(database, shaky.id)["state"] == "queued"  # to be called by itself
        assert await give(station, database, line("b")) == ["submitted"]


async def test_metadata_is_counted_when_it_lands(
    make_station: MakeStation, database: sa.Engine
) -> None:
    soft = HARD + 'by = "metadata.project"\nsoft_usd = 0.000001\n'
    async with simulated() as (_, url):
        station = make_station(fleet_of("openai", url, more=soft))
        assert await give(station, database, line("a", metadata={"project": "x"})) == ["submitted"]
        await until_ended(station, database)
    told = [event for event in station.events if type(event).__name__ == "BudgetNearlySpent"]
    assert len(told) == 1


async def test_a_model_whose_money_is_spent_leaves_it_to_another(
    make_station: MakeStation, database: sa.Engine
) -> None:
    spent = HARD + 'by = "model"\nonly = ["m"]\n'
    async with simulated() as (_, url):
        more = f"""
[models.n]
price_as = "openai/gpt-4o-mini"
deployments = [{{ name = "e", base_url = "{url}/v1", batch_api = true }}]
"""
        fleet = fleet_of("openai", url, more=more + spent)
        tier = fleet.tiers["basic"].model_copy(update={"models": ("m", "n")})
        station = make_station(fleet.model_copy(update={"tiers": {"basic": tier}}))
        assert await give(station, database, line("a", 2 * LINE)) == ["submitted"]
        (row,) = batch_rows(database)
    assert row["deployment"] == "e"
