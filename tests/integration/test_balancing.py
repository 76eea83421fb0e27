"""Loads and latencies that the fleet shares, and jobs that go by them through a real pipeline."""

from __future__ import annotations

import asyncio
import random
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from tests.integration.test_pipeline import (
    DEADLINE_S,
    Rig,
    answer_all,
    hang,
    refuse_to_connect,
)
from tests.processes import Process
from tests.rows import chat, insert, result_rows, spec

from promptfleet_shared.fleet import parse_fleet
from promptfleet_shared.policies.balancing import BalancingSection
from promptfleet_shared.pricing import Pricer
from promptfleet_workers.balancing.balancer import Balancer
from promptfleet_workers.balancing.load_exchange import LoadExchange
from promptfleet_workers.balancing.places import ALONE_AFTER_S, Place, Places
from promptfleet_workers.claims import Abort

PROGRAM = Path(__file__).with_name("load_worker.py")
FLEET = """
[models.m]
deployments = [
  { name = "a", base_url = "http://a/v1" },
  { name = "b", base_url = "http://b/v1" },
]
"""


class Worker:
    """The places of one worker, and its exchange; its clock is real unless the test moves it."""

    def __init__(self, url: str, **options: float) -> None:
        self.ahead_s = 0.0
        deployments = parse_fleet(FLEET).models["m"].deployments
        self.a, self.b = (Place(d, decay_s=10.0, clock=self.clock) for d in deployments)
        self.places = Places([self.a, self.b])
        self.exchange = LoadExchange(self.places, url, clock=self.clock, **options)

    def clock(self) -> float:
        return time.monotonic() + self.ahead_s


MakeWorkers = Callable[..., list[Worker]]


@pytest.fixture
async def make(broker_url: str) -> AsyncIterator[MakeWorkers]:
    made: list[Worker] = []

    def workers(number: int, url: str = broker_url, **options: float) -> list[Worker]:
        new = [Worker(url, **options) for _ in range(number)]
        made.extend(new)
        return new

    yield workers
    for worker in made:
        await worker.exchange.aclose()


async def test_each_knows_what_all_have_in_flight(make: MakeWorkers) -> None:
    one, two, three = make(3)
    one.a.own, two.a.own, two.b.own = 2, 3, 1
    for worker in (one, two, three, one):
        assert await worker.exchange.exchange()

    assert (one.a.in_flight, one.b.in_flight) == (5, 1)
    assert (three.a.in_flight, three.b.in_flight) == (5, 1)
    one.a.own += 1  # own jobs count at once, others' by the next exchange
    assert (one.a.in_flight, three.a.in_flight) == (6, 5)
    one.a.own = 0
    await one.exchange.exchange()
    await three.exchange.exchange()
    assert (one.a.in_flight, three.a.in_flight) == (3, 3)


async def test_sums_stay_right_whatever_happens(make: MakeWorkers) -> None:
    workers = make(4)
    dice = random.Random(7)
    for _ in range(200):
        worker = dice.choice(workers)
        worker.a.own = max(0, worker.a.own + dice.randint(-3, 3))
        worker.b.own = dice.choice((0, worker.b.own, 5))
        await worker.exchange.exchange()
    for worker in workers:
        await worker.exchange.exchange()
    for worker in workers:
        await worker.exchange.exchange()
        assert worker.a.in_flight == sum(each.a.own for each in workers)
        assert worker.b.in_flight == sum(each.b.own for each in workers)


async def test_a_killed_workers_load_vanishes(
    make: MakeWorkers, broker_url: str, tmp_path: Path
) -> None:
    (watcher,) = make(1, lease_s=0.5)
    argv = [sys.executable, str(PROGRAM), broker_url, "7"]
    with Process(argv, log=tmp_path / "worker.log", ready="ready") as process:
        await watcher.exchange.exchange()
        assert watcher.a.in_flight == 7
        process.kill()
        async with asyncio.timeout(DEADLINE_S):
            while watcher.a.in_flight:
                await watcher.exchange.exchange()
                await asyncio.sleep(0.02)


async def test_a_worker_that_closes_takes_its_load_back(make: MakeWorkers) -> None:
    leaving, staying = make(2)
    leaving.a.own = 4
    leaving.places.use()
    await leaving.exchange.exchange()
    await staying.exchange.exchange()
    assert staying.a.in_flight == 4
    leaving.a.own = 0  # a drained worker has none left
    await leaving.exchange.aclose()
    await staying.exchange.exchange()
    assert staying.a.in_flight == 0


async def test_latencies_and_rests_are_the_fleets(make: MakeWorkers) -> None:
    one, two = make(2)
    one.a.answered(0.8)
    one.a.answered(0.2)
    one.b.rest(30.0)
    await one.exchange.exchange()
    await two.exchange.exchange()
    assert two.a.latency_s == pytest.approx(0.8, rel=0.1)
    assert (two.a.has_room, two.b.has_room) == (True, False)

    two.a.answered(0.1)
    await two.exchange.exchange()
    await one.exchange.exchange()
    assert 0.1 < (one.a.latency_s or 0.0) < 0.8  # forgotten slowly, and by all alike
    assert one.a.latency_s == pytest.approx(two.a.latency_s, rel=0.1)


class CountedExchange(LoadExchange):
    """Knows how often it was made."""

    times = 0

    async def exchange(self) -> bool:
        done = await super().exchange()
        self.times += 1
        return done


async def test_nobody_exchanges_before_a_job_is_placed(make: MakeWorkers, broker_url: str) -> None:
    busy, quiet = make(2)
    exchanges = [
        CountedExchange(worker.places, broker_url, interval_s=0.01, idle_s=0.01)
        for worker in (busy, quiet)
    ]
    running = [asyncio.create_task(exchange.run()) for exchange in exchanges]
    busy.places.use()

    async def until(times: int, which: CountedExchange) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while which.times < times:
                await asyncio.sleep(0.005)

    await until(10, exchanges[0])
    assert exchanges[1].times == 0
    quiet.places.use()
    await until(2, exchanges[1])
    for exchange in exchanges:
        await exchange.aclose()
    await asyncio.gather(*running)


async def test_without_redis_a_worker_goes_by_its_own_counts(make: MakeWorkers) -> None:
    one, two = make(2)
    two.a.own = 5
    one.a.own = 1
    for worker in (two, one):
        await worker.exchange.exchange()
    assert one.a.in_flight == 6

    (lost,) = make(1, "redis://127.0.0.1:1/0", timeout_s=0.5)
    lost.a.own, lost.a.others = 1, 5
    assert not await lost.exchange.exchange()
    assert lost.a.in_flight == 6  # a moment's silence means nothing yet
    lost.ahead_s = ALONE_AFTER_S + 1
    assert not await lost.exchange.exchange()
    assert lost.a.in_flight == 1


async def test_a_server_that_lost_its_data_learns_it_again(
    make: MakeWorkers, broker_url: str
) -> None:
    one, two = make(2)
    one.a.own, two.a.own = 2, 3
    for worker in (one, two):
        await worker.exchange.exchange()
    with redis.Redis.from_url(broker_url) as server:
        server.flushall()
    for worker in (one, two, one):
        await worker.exchange.exchange()
    assert (one.a.in_flight, two.a.in_flight) == (5, 5)


# -- a real pipeline -----------------------------------------------------------------------------


@pytest.fixture
async def rig(database_url: str, database: sa.Engine) -> AsyncIterator[Rig]:
    rig = Rig(database_url, database, calls=64, batches=4)
    fleet = rig.fleet.model_copy(update={"balancing": BalancingSection(strategy="least_busy")})
    balancer = Balancer.of(fleet, health=rig.breakers, pricer=Pricer())
    rig.pipeline._balancer = rig.caller._balancer = balancer
    yield rig
    await rig.pipeline.drain(0.1)
    await rig.database.close()


def loads(rig: Rig) -> dict[str, int]:
    balancer = rig.caller._balancer
    assert balancer is not None
    return {load.deployment: load.in_flight for load in balancer.loads()}


def jobs(rig: Rig, count: int) -> list[uuid.UUID]:
    specs = [spec(request=chat(f"job {n}")) for n in range(count)]
    insert(rig.rows, *specs)
    return [one.id for one in specs]


async def called(rig: Rig, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while sum(len(provider.calls) for provider in rig.providers.values()) < count:
            await asyncio.sleep(0.005)


async def test_jobs_spread_and_their_rows_say_why(rig: Rig) -> None:
    for provider in rig.providers.values():
        provider.behaviour = hang
    ids = jobs(rig, 6)
    rig.take(*ids)
    await called(rig, 6)
    assert loads(rig) == {"first": 3, "second": 3}
    assert [len(provider.calls) for provider in rig.providers.values()] == [3, 3]

    rig.claims.abort_all(Abort.DRAINED)
    async with asyncio.timeout(DEADLINE_S):
        while any(loads(rig).values()):
            await asyncio.sleep(0.005)

    for provider in rig.providers.values():
        provider.behaviour = answer_all
    (again,) = jobs(rig, 1)
    await rig.settled(rig.take(again))
    (row,) = result_rows(rig.rows, again)
    assert row["decision"]["deployment"]["strategy"] == "least_busy"
    assert row["decision"]["deployment"]["why"].endswith("of 2")
    assert set(loads(rig).values()) == {0}


async def test_a_job_is_asked_of_the_next_one_and_counts_there(rig: Rig) -> None:
    rig.providers["first"].behaviour = refuse_to_connect
    rig.providers["second"].behaviour = hang
    balancer = rig.caller._balancer
    assert balancer is not None
    balancer.places["second"].others = 5  # so the job goes to the first one
    rig.take(*jobs(rig, 1))
    await called(rig, 2)
    assert [len(provider.calls) for provider in rig.providers.values()] == [1, 1]
    assert loads(rig) == {"first": 0, "second": 6}


async def test_a_fenced_job_is_in_flight_nowhere(rig: Rig) -> None:
    for provider in rig.providers.values():
        provider.behaviour = hang
    (one,) = jobs(rig, 1)
    rig.take(one)
    await called(rig, 1)
    assert sum(loads(rig).values()) == 1
    rig.claims.abort(one, Abort.FENCED)
    async with asyncio.timeout(DEADLINE_S):
        while any(loads(rig).values()):
            await asyncio.sleep(0.005)
