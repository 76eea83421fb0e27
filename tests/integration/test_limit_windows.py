"""Limits of an hour and longer outlive Redis: a real Valkey that forgets, and a real Postgres."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from tests.integration.test_limited_calls import Rigged, limited, run
from tests.integration.test_rate_limits import DAY_US, HEADROOM, Clocked, a_day, clocked
from tests.rows import insert, job_row, spec

from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.limit_windows import (
    LimitWindow,
    keep_windows,
    prune_windows,
    recall_windows,
)
from promptfleet_workers.rate_limits.asking import Grant, News, Reservation, Verdict
from promptfleet_workers.rate_limits.exchange import CHANGED, PREFIX, FleetLimits, _Question
from promptfleet_workers.rate_limits.keeping import WindowKeeping
from promptfleet_workers.rate_limits.keys import LimitKey
from promptfleet_workers.rate_limits.local import LocalLimits

__all__ = ["clocked", "limited"]  # fixtures

KEY = LimitKey(
    name="tenant:acme:requests_per_day",
    label="tenant/requests_per_day",
    kind="window",
    limit=10,
    period_us=DAY_US,
    tenant="acme",
)


class Worker:
    """A worker's limits, and what keeps its windows."""

    def __init__(self, url: str, database: AsyncDatabase, **options: Any) -> None:
        self.keeping = WindowKeeping(url, database, every_s=0.05)
        local = LocalLimits(patience_s=1, headroom=HEADROOM)
        self.limits = FleetLimits(
            url, local, patience_s=1, headroom=HEADROOM, memory=self.keeping,
            **{"timeout_s": 5, **options},
        )  # fmt: skip

    async def call(self, key: LimitKey = KEY, cost: float = 1.0) -> Grant:
        return await self.limits.reserve(Reservation(id=uuid.uuid4().hex, items=[(key, cost)]))

    async def let_through(self, calls: int, key: LimitKey = KEY) -> int:
        grants = await asyncio.gather(*[self.call(key) for _ in range(calls)])
        return sum(grant.verdict is Verdict.GO for grant in grants)

    async def aclose(self) -> None:
        await self.limits.aclose()
        await self.keeping.aclose()


@pytest.fixture
async def memory(database_url: str) -> AsyncIterator[AsyncDatabase]:
    made = AsyncDatabase(database_url, application_name="tests")
    yield made
    await made.close()


@pytest.fixture
async def workers(broker_url: str, memory: AsyncDatabase) -> AsyncIterator[list[Worker]]:
    made = [Worker(broker_url, memory) for _ in range(3)]
    yield made
    for worker in made:
        await worker.aclose()


def forget(url: str) -> None:
    with redis.Redis.from_url(url) as server:
        server.flushall()


async def test_a_redis_that_comes_back_empty_is_told_what_was_used(
    workers: list[Worker], broker_url: str
) -> None:
    one, two, three = workers
    assert await one.let_through(6) == 6
    assert await two.keeping.keep() == 1
    forget(broker_url)

    let_through = await asyncio.gather(*[worker.let_through(5) for worker in (one, two, three)])

    assert sum(let_through) == 4
    assert not any([(await worker.call()).alone for worker in workers])


async def test_it_may_forget_again_and_again(workers: list[Worker], broker_url: str) -> None:
    worker = workers[0]
    for _ in range(12):
        await worker.call()
        await worker.keeping.keep()
        forget(broker_url)

    assert (await worker.call()).verdict is Verdict.LATER


async def test_what_nobody_had_kept_is_all_that_is_forgotten(
    workers: list[Worker], broker_url: str
) -> None:
    worker = workers[0]
    await worker.let_through(5)
    await worker.keeping.keep()
    await worker.let_through(2)
    forget(broker_url)

    assert await worker.let_through(10) == 5


async def test_what_is_settled_at_an_empty_redis_counts_besides(
    workers: list[Worker], broker_url: str
) -> None:
    one, two, _ = workers
    await one.let_through(6)
    await one.keeping.keep()
    forget(broker_url)
    one.limits.tell(News(settled=[(KEY, -2.0)]))  # of a call that was made before
    await one.limits.aclose()
    with redis.Redis.from_url(broker_url) as server:  # as whoever had begun to keep it before
        server.zadd(CHANGED, {f"{KEY.tenant}\0{PREFIX}{KEY.name}": 1})
    assert await one.keeping.keep() == 0  # what is not known as a whole is not kept

    assert await two.let_through(10) == 6


async def test_what_was_used_without_redis_is_told_to_it_later(
    tmp_path: Path, memory: AsyncDatabase
) -> None:
    key = a_day("d:requests_per_day", 86_400)  # a call a second for one who is alone
    with EmbeddedValkey(tmp_path / "valkey") as server:
        worker = Worker(server.url, memory, again_s=0.05)
        assert await worker.let_through(3, key) == 3
        await worker.keeping.keep()
    alone = await worker.let_through(20, key)
    assert 1 <= alone <= 3  # now, and within the second
    with EmbeddedValkey(tmp_path / "valkey") as server:
        async with asyncio.timeout(20):
            while (await worker.call(key, 0.0)).alone:
                await asyncio.sleep(0.05)
        await worker.call(key, 0.0)
        with redis.Redis.from_url(server.url) as client:
            kept = client.hgetall(f"{PREFIX}{key.name}")
        assert sum(float(used) for name, used in kept.items() if name.isdigit()) == 3 + alone
        await worker.aclose()


async def test_without_postgres_a_worker_has_its_share_only(broker_url: str) -> None:
    database = AsyncDatabase("postgresql://127.0.0.1:1/none", application_name="tests")
    worker = Worker(broker_url, database)
    grants = await asyncio.gather(*[worker.call(a_day("d", 86_400)) for _ in range(50)])

    assert all(grant.alone for grant in grants)
    assert 1 <= sum(grant.verdict is Verdict.GO for grant in grants) <= 3
    with contextlib.suppress(Exception):
        await worker.aclose()
    await database.close()


async def test_one_of_the_workers_keeps_them_and_under_their_tenant(
    workers: list[Worker], broker_url: str, database: sa.Engine
) -> None:
    running = [asyncio.create_task(worker.keeping.run()) for worker in workers]
    await workers[0].let_through(3)
    await workers[0].let_through(3, a_day("fleet:requests_per_day", 100))
    with redis.Redis.from_url(broker_url) as server:
        async with asyncio.timeout(20):
            while server.exists(CHANGED):
                await asyncio.sleep(0.01)
    for task in running:
        task.cancel()

    with database.connect() as connection:
        rows = connection.execute(sa.text("SELECT tenant, name FROM limit_windows")).all()
        fleets = recall_windows(connection, [("", "fleet:requests_per_day"), ("", KEY.name)])
    assert sorted(rows) == [("", "fleet:requests_per_day"), ("acme", KEY.name)]
    assert [[used for _, used in pieces] for pieces in fleets.values()] == [[3.0]]


def test_a_keeper_that_comes_late_undoes_nothing(database: sa.Engine) -> None:
    def window(used: float) -> list[LimitWindow]:
        return [LimitWindow(tenant="acme", name="n", period_s=3600, pieces={7: used})]

    minute = 60_000_000
    for used, seen_us, known in [
        (5.0, 10 * minute, 5.0),
        (3.0, 10 * minute - 1, 5.0),  # was stopped before it wrote
        (4.5, 10 * minute + 1, 4.5),  # less, as calls took less than they had reserved
        (1.0, 8 * minute, 1.0),  # of another Redis, with another clock
    ]:
        with database.begin() as connection:
            keep_windows(connection, window(used), seen_us=seen_us)
            assert recall_windows(connection, [("acme", "n")]) == {"n": [(7, known)]}
            assert recall_windows(connection, [("other", "n")]) == {}
            assert prune_windows(connection, limit=10) == 0
    with database.begin() as connection:
        connection.execute(sa.text("UPDATE limit_windows SET expires_at = clock_timestamp()"))
        assert recall_windows(connection, [("acme", "n")]) == {}
        assert prune_windows(connection, limit=10) == 1


def test_what_is_recalled_grows_old_and_is_never_counted_twice(clocked: Clocked) -> None:
    key = a_day("d", 10)
    clocked._terms["kept"] = True
    newest = clocked.now * 60 // DAY_US
    pieces = [(newest - 61, 100.0), (newest - 60, 2.0), (newest - 1, 3.0), (newest + 9, 4.0)]

    def ask(calls: int, recalled: bool) -> list[Verdict]:
        question = _Question(clocked._terms)
        for n in range(calls):
            question.add(Reservation(id=str(n), items=[(key, 1.0)]))
        question.add_news(News(), {})
        if recalled:
            question.recall([(key, pieces)])
        time = f"[{clocked.now // 1_000_000},{clocked.now % 1_000_000}]"
        reply: Any = clocked._script(keys=question.redis_keys, args=[question.json(), time])
        return [Verdict(reply[n]) for n in range(2, len(reply), 3)]

    assert ask(3, recalled=False) == [Verdict.UNKNOWN] * 3
    assert ask(3, recalled=True) == [Verdict.GO, Verdict.LATER, Verdict.LATER]
    assert ask(1, recalled=True) == [Verdict.LATER]
    clocked.now += DAY_US // 60  # the two are a day old
    assert ask(3, recalled=False) == [Verdict.GO, Verdict.GO, Verdict.LATER]
    clocked.now += DAY_US + DAY_US // 60
    assert ask(10, recalled=False) == [Verdict.GO] * 10


async def test_a_tenants_day_of_jobs_survives_a_flush(
    limited: Rigged, broker_url: str, database: sa.Engine
) -> None:
    rig = limited('[[limits.rules]]\nper = "tenant"\nrequests_per_day = 2')
    jobs = [spec(f"{n}", tenant="acme") for n in range(3)]
    insert(rig.rows, *jobs)
    await run(rig, jobs[0].id, jobs[1].id)
    query = sa.text(
        "SELECT coalesce(sum(used.value::float8), 0) FROM limit_windows,"
        " jsonb_each_text(pieces) AS used WHERE tenant = 'acme'"
    )
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        async with asyncio.timeout(20):
            while connection.execute(query).scalar_one() < 2:
                await asyncio.sleep(0.05)
    forget(broker_url)

    await run(rig, jobs[2].id)

    row = job_row(rig.rows, jobs[2].id)
    assert (row["state"], row["deferrals"], row["calls"]) == ("queued", 1, 0)
    assert row["last_error"]["code"] == "limit_reached"
