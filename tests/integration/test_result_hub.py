"""Waiting for jobs' ends: announced, found without an announcement, or not there at all."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from tests.rows import claim_some, insert, outcome, spec

from promptfleet.api.result_hub import POLL_S, ResultHub
from promptfleet.api.stores import Stores
from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.errors import StoreUnavailableError
from promptfleet_shared.finish_notices import CHANNEL, decode_notice, encode_notice
from promptfleet_shared.jobs import Result
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.database import Statement
from promptfleet_shared.store.finishing import finish
from promptfleet_workers.finish_notices import FinishNotices

DEADLINE_S = 20.0
AWAY = "redis://127.0.0.1:1/0"


class NoBell:
    def ring(self, doorbells: object) -> None:
        """Nobody is to run these jobs."""

    def close(self) -> None:
        """Nothing to close."""


class CountedStore:
    """Stores that counts statements, and fails as often as it is told."""

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self.looks = 0
        self.fails = 0

    async def run(
        self, tenant: str, statement: Statement[dict[uuid.UUID, Result]]
    ) -> dict[uuid.UUID, Result]:
        self.looks += 1
        if self.fails:
            self.fails -= 1
            raise StoreUnavailableError
        return await self.stores.run(tenant, statement)


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[CountedStore]:
    stores = Stores(settings, bell=NoBell())
    yield CountedStore(stores)
    await stores.close()


@pytest.fixture
async def hub(store: CountedStore, broker_url: str) -> AsyncIterator[ResultHub]:
    made = ResultHub(store, broker_url)
    yield made
    await made.aclose()


@pytest.fixture
async def deaf_hub(store: CountedStore) -> AsyncIterator[ResultHub]:
    """A hub whose notices' server is away."""
    made = ResultHub(store, AWAY)
    yield made
    await made.aclose()


@pytest.fixture
async def notices(broker_url: str) -> AsyncIterator[FinishNotices]:
    made = FinishNotices(broker_url)
    yield made
    await made.aclose()


def make_jobs(database: sa.Engine, count: int, tenant: str = "default") -> list[uuid.UUID]:
    return insert(database, *(spec(f"{n}", tenant=tenant) for n in range(count)))


def end(database: sa.Engine, ids: Sequence[uuid.UUID]) -> None:
    """End them in one transaction, and tell nobody."""
    done = [outcome(job) for job in claim_some(database, ids)]
    assert len(done) == len(ids)
    with database.begin() as connection:
        finish(connection, done)


async def heard(hub: ResultHub) -> None:
    """Until the hub's subscription stands."""
    hub._notices.start()
    async with asyncio.timeout(DEADLINE_S):
        while not hub._notices.are_heard:
            await asyncio.sleep(0.005)


def only_notices_help(hub: ResultHub) -> None:
    hub._pause_s = lambda *_: 1000.0  # type: ignore[method-assign]


async def begun(hub: ResultHub, jobs: int) -> None:
    """Until so many jobs are waited for."""
    async with asyncio.timeout(DEADLINE_S):
        while hub.waited_for != jobs:
            await asyncio.sleep(0.001)


async def test_what_is_announced_is_looked_up_together(
    hub: ResultHub, store: CountedStore, notices: FinishNotices, database: sa.Engine
) -> None:
    ids = make_jobs(database, 60)
    await heard(hub)
    only_notices_help(hub)
    waits = [
        asyncio.create_task(hub.wait("default", [job_id], DEADLINE_S, is_new=True))
        for job_id in ids
    ]
    await begun(hub, 60)
    before = store.looks
    await asyncio.to_thread(end, database, ids)
    notices.tell(ids)

    found = await asyncio.gather(*waits)

    assert [list(one) for one in found] == [[job_id] for job_id in ids]
    assert store.looks - before <= 3  # one, unless the notice came in pieces
    assert hub.waited_for == 0


async def test_a_lost_notice_costs_a_moment(
    hub: ResultHub, store: CountedStore, database: sa.Engine
) -> None:
    ids = make_jobs(database, 40)
    await heard(hub)
    waiting = asyncio.create_task(hub.wait("default", ids, DEADLINE_S, is_new=True))
    await begun(hub, 40)
    await asyncio.to_thread(end, database, ids)
    looks, began = store.looks, time.monotonic()

    assert (await waiting).keys() == set(ids)

    took_s = time.monotonic() - began
    assert took_s < DEADLINE_S / 2  # not by the last look
    assert store.looks - looks <= 2 + took_s / POLL_S


async def test_without_redis_it_looks_often(
    deaf_hub: ResultHub, store: CountedStore, database: sa.Engine
) -> None:
    ids = make_jobs(database, 3)
    waiting = asyncio.create_task(deaf_hub.wait("default", ids, DEADLINE_S))
    async with asyncio.timeout(DEADLINE_S):
        while store.looks < 4:
            await asyncio.sleep(0.001)
    await asyncio.to_thread(end, database, ids)
    assert (await waiting).keys() == set(ids)


async def test_a_job_that_ended_before_the_wait(
    hub: ResultHub, store: CountedStore, notices: FinishNotices, database: sa.Engine
) -> None:
    ids = make_jobs(database, 2)
    await heard(hub)
    only_notices_help(hub)
    await asyncio.to_thread(end, database, ids)
    assert (await hub.wait("default", ids[:1], DEADLINE_S)).keys() == set(ids[:1])
    assert store.looks == 1

    notices.tell(ids[1:])
    async with asyncio.timeout(DEADLINE_S):
        while ids[1].bytes not in hub._fresh:
            await asyncio.sleep(0.001)
    assert await hub.wait("default", ids[1:], DEADLINE_S, is_new=True)


async def test_what_has_ended_when_the_time_is_up(hub: ResultHub, database: sa.Engine) -> None:
    ids = make_jobs(database, 3)
    theirs = make_jobs(database, 1, tenant="other")
    await asyncio.to_thread(end, database, [*ids[:2], *theirs])

    found = await hub.wait("default", [*ids, *theirs, uuid.uuid4()], 0.05)

    assert found.keys() == set(ids[:2])
    assert await hub.wait("other", theirs, DEADLINE_S)
    assert await hub.wait("default", [], 0.01) == {}


async def test_who_gives_up_waiting_leaves_nothing_behind(
    hub: ResultHub, database: sa.Engine
) -> None:
    ids = make_jobs(database, 3)
    both = [asyncio.create_task(hub.wait("default", ids, DEADLINE_S)) for _ in range(2)]
    await begun(hub, 3)
    both[0].cancel()
    await asyncio.gather(both[0], return_exceptions=True)
    assert hub.waited_for == 3
    await asyncio.to_thread(end, database, ids)
    assert (await both[1]).keys() == set(ids)
    assert hub.waited_for == 0
    assert not hub._desks


async def test_a_database_that_comes_back(
    deaf_hub: ResultHub, store: CountedStore, database: sa.Engine
) -> None:
    ids = make_jobs(database, 1)
    await asyncio.to_thread(end, database, ids)
    store.fails = 2
    assert (await deaf_hub.wait("default", ids, DEADLINE_S)).keys() == set(ids)
    store.fails = 10**6
    with pytest.raises(StoreUnavailableError):
        await deaf_hub.wait("default", [uuid.uuid4()], 0.05)


# -- notices ---------------------------------------------------------------------------------


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


def subscribe(url: str) -> Any:
    subscription: Any = redis.Redis.from_url(url).pubsub()  # type: ignore[no-untyped-call]
    subscription.subscribe(CHANNEL)
    assert subscription.get_message(timeout=DEADLINE_S)
    return subscription


async def next_ids(subscription: Any) -> list[uuid.UUID]:
    message = await asyncio.to_thread(subscription.get_message, timeout=DEADLINE_S)
    return [uuid.UUID(bytes=key) for key in decode_notice(message["data"])]


async def test_one_message_for_a_batch(broker_url: str, notices: FinishNotices) -> None:
    ids = [uuid.uuid4() for _ in range(50)]
    subscription = subscribe(broker_url)
    notices.tell(ids)
    assert await next_ids(subscription) == ids
    notices.tell(ids[:1])
    assert await next_ids(subscription) == ids[:1]
    notices.tell([])
    await notices.aclose()
    assert subscription.get_message(timeout=0.05) is None
    subscription.close()


async def test_notices_outlive_their_server(
    own_valkey: EmbeddedValkey, store: CountedStore, caplog: pytest.LogCaptureFixture
) -> None:
    notices = FinishNotices(own_valkey.url, cool_down_s=0)
    hub = ResultHub(store, own_valkey.url)
    await heard(hub)
    notices.tell([uuid.uuid4()])
    own_valkey.kill()
    for _ in range(5):
        notices.tell([uuid.uuid4()])
        while notices._sending is not None:
            await asyncio.sleep(0.001)
    async with asyncio.timeout(DEADLINE_S):
        while hub._notices.are_heard:
            await asyncio.sleep(0.005)
    said = [r for r in caplog.records if r.name == "promptfleet_workers.finish_notices"]
    assert [record.message for record in said] == ["notices_unavailable"]

    await asyncio.to_thread(own_valkey.start)
    await heard(hub)
    job_id = uuid.uuid4()
    async with asyncio.timeout(DEADLINE_S):
        while job_id.bytes not in hub._fresh | hub._older:
            notices.tell([job_id])
            await asyncio.sleep(0.02)
    await hub.aclose()
    await notices.aclose()


async def test_a_server_that_may_not_be_told_to_be_silent(own_valkey: EmbeddedValkey) -> None:
    with redis.Redis.from_url(own_valkey.url) as admin:
        admin.acl_setuser(
            "quiet",
            enabled=True,
            passwords=["+pw"],
            channels=["*"],
            commands=["+publish"],
        )
    url = sa.make_url(own_valkey.url).set(username="quiet", password="pw")
    subscription = subscribe(own_valkey.url)
    notices = FinishNotices(url.render_as_string(hide_password=False))
    for _ in range(3):
        ids = [uuid.uuid4()]
        notices.tell(ids)
        assert await next_ids(subscription) == ids
    await notices.aclose()
    subscription.close()


def test_what_is_no_notice_says_nothing() -> None:
    ids = [uuid.uuid4(), uuid.uuid4()]
    assert decode_notice(encode_notice(ids)) == [job_id.bytes for job_id in ids]
    assert decode_notice(b"seventeen bytes!!") == []
    assert decode_notice(b"") == []
