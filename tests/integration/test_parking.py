"""Where doorbells wait, on a real server: the order, the bounds, and what a loss leads to."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from tests.fair_model import FairModel
from tests.rows import ago, change, insert, job_row, spec

from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.parking import Held, ParkingLot, shared_fields
from promptfleet_shared.policies.fairness import FairnessSection, KeyBound, TenantShare
from promptfleet_shared.queueing import make_celery, parked_jobs, queue_depths
from promptfleet_shared.store.sweeping import overdue_doorbells, silent_doorbells, sweep

TIER = "basic"
CONFIG = "promptfleet:fair:config"


def doorbell(tenant: str, made_ms: int, priority: int = 5, key: str | None = None) -> Doorbell:
    """For a job that was made at an instant: a UUIDv7 begins with it."""
    job_id = uuid.UUID(int=made_ms << 80 | uuid.uuid4().int & (1 << 80) - 1)
    return Doorbell(job_id=job_id, tier=TIER, tenant=tenant, priority=priority, concurrency_key=key)


class Place:
    """A tier's parked doorbells, and its queue."""

    def __init__(self, url: str) -> None:
        self.app = make_celery(url, [TIER])
        self.redis = redis.Redis.from_url(url)
        self.lot = ParkingLot()

    def configure(self, chunk: int = 100, **fields: Any) -> None:
        self.lot.configure(self.app, shared_fields(FairnessSection(**fields), {TIER: chunk}))
        self.redis.hset(CONFIG, "since", 0)  # as if the fleet had been up for long

    def park(self, *bells: Doorbell) -> None:
        self.lot.deliver(self.app, bells)

    def next(self, **options: Any) -> list[str]:
        """The ids of the next message, which a worker takes."""
        self.lot.turn(self.app, TIER, worker="w", **options)
        return self.message()

    def message(self) -> list[str]:
        with self.app.connection_or_acquire() as connection:
            channel = connection.default_channel
            channel.queue_declare(queue=f"prompts.{TIER}", passive=False)
            message = channel.basic_get(f"prompts.{TIER}", no_ack=True)
            return [] if message is None else list(message.decode()[0][0])

    @property
    def parked(self) -> int:
        return parked_jobs(self.app, [TIER])[TIER]


@pytest.fixture
def place(broker_url: str) -> Iterator[Place]:
    made = Place(broker_url)
    yield made
    made.redis.close()
    made.app.close()


@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_the_models(place: Place, seed: int) -> None:
    chance = random.Random(seed)
    weights = {"a": 1.0, "b": 2.5, "c": 0.5}
    place.configure(chunk=9, tenants={name: TenantShare(weight=w) for name, w in weights.items()})
    model = FairModel(weights=weights)
    place.redis.lpush("prompts.basic", "full")  # so that all wait
    for clock in range(1, 60):
        for made_ms in range(clock * 1000, clock * 1000 + chance.randrange(8)):
            key = chance.choice([None, "k"])
            bell = doorbell(chance.choice("abcd"), made_ms, chance.randrange(10), key)
            place.park(bell)
            model.park(bell.tenant, str(bell.job_id), made_ms, bell.priority, key or "")
        if clock % 2:
            place.redis.delete("prompts.basic")
            taken = place.next()
            place.redis.lpush("prompts.basic", "full")
            assert taken == model.take(9)
        assert place.parked == model.waiting


@pytest.mark.parametrize("seed", range(3))
def test_bounds_hold_and_keep_nobody_else_waiting(place: Place, seed: int) -> None:
    chance = random.Random(seed)
    place.configure(
        chunk=9,
        tenants={"b": TenantShare(max_in_flight=4)},
        keys={"k": KeyBound(max_in_flight=2)},
    )
    waiting: dict[str, Doorbell] = {}
    in_flight: dict[str, Doorbell] = {}

    def full(bell: Doorbell) -> bool:
        tenant = sum(other.tenant == bell.tenant for other in in_flight.values())
        flow = (bell.tenant, "k")
        key = sum((b.tenant, b.concurrency_key) == flow for b in in_flight.values())
        return (bell.tenant == "b" and tenant >= 4) or (bell.concurrency_key == "k" and key >= 2)

    place.redis.lpush("prompts.basic", "full")
    clock = 0
    while clock < 40 or waiting:
        clock += 1
        for made_ms in range(clock * 1000, clock * 1000 + (clock < 40) * chance.randrange(8)):
            key = chance.choice([None, "k"])
            bell = doorbell(chance.choice("abc"), made_ms, chance.randrange(10), key)
            place.park(bell)
            waiting[str(bell.job_id)] = bell
        gone = chance.sample(sorted(in_flight), min(len(in_flight), chance.randrange(1, 9)))
        for job_id in gone:
            del in_flight[job_id]
        place.redis.delete("prompts.basic")
        taken = place.next(let_go=[uuid.UUID(job_id) for job_id in gone])
        place.redis.lpush("prompts.basic", "full")
        for job_id in taken:
            assert not full(waiting[job_id])
            in_flight[job_id] = waiting.pop(job_id)
        if len(taken) < 9:
            assert all(full(bell) for bell in waiting.values())
        assert place.parked == len(waiting)


def test_a_doorbell_that_waits_is_not_doubled(place: Place) -> None:
    place.configure(chunk=2)
    bells = [doorbell("a", n) for n in range(10)]
    place.park(*bells)
    place.park(*bells[5:])

    assert place.parked == 8
    taken = place.message() + [job_id for _ in range(4) for job_id in place.next()]
    assert taken == [str(bell.job_id) for bell in bells]
    assert place.parked == 0
    assert queue_depths(place.app, [TIER]) == {TIER: 0}


def test_nothing_is_sent_before_the_fleet_knows_its_bounds(place: Place) -> None:
    place.park(doorbell("a", 1))

    assert (place.parked, place.message()) == (1, [])
    assert queue_depths(place.app, [TIER]) == {TIER: 1}
    place.configure()
    assert len(place.next()) == 1


def test_after_a_loss_bounded_jobs_wait_until_all_have_said_what_they_hold(place: Place) -> None:
    place.configure(max_in_flight=1)
    place.redis.hset(CONFIG, "since", place.redis.time()[0] * 1000)
    place.park(doorbell("a", 1))

    assert place.next() == []
    place.redis.hset(CONFIG, "since", 0)
    place.redis.zadd("promptfleet:fair:prompts.basic:blocked", {b"b\0a": 0})
    assert len(place.next()) == 1


def test_a_worker_speaks_for_what_it_holds(place: Place) -> None:
    place.configure(max_in_flight=2)
    running = Held(job_id=uuid.uuid4(), tenant="a", concurrency_key=None)
    place.lot.turn(place.app, TIER, held=[running])
    place.park(*[doorbell("a", n) for n in range(5)])

    assert len(place.message()) == 1
    assert place.next() == []
    assert len(place.next(let_go=[running.job_id])) == 1


def test_interactive_jobs_are_sent_apart_and_only_once(place: Place) -> None:
    place.configure(chunk=3, interactive_reserve=0.5, interactive_priority=9)
    place.redis.lpush("prompts.basic\x06\x163", "full")
    usual = [doorbell("a", n) for n in range(6)]
    urgent = [doorbell("a", n, 9) for n in range(4)]
    place.park(*usual, *urgent)

    assert place.redis.llen("prompts.basic\x06\x161") == 1
    assert place.parked == 7
    taken = place.message()
    place.redis.delete("prompts.basic\x06\x163")
    while ids := place.next():
        taken += ids
        while more := place.message():
            taken += more
    assert sorted(taken) == sorted(str(bell.job_id) for bell in [*usual, *urgent])
    assert place.parked == 0


def test_where_fairness_is_off_doorbells_ring_at_once(place: Place) -> None:
    place.park(doorbell("a", 1))
    place.configure(enabled=False)
    place.park(doorbell("a", 2))

    assert place.parked == 1  # from before
    assert len(place.message()) == 1
    assert len(place.next(drain=True)) == 1
    assert place.parked == 0


def test_a_broker_without_scripts_is_served_as_they_come(place: Place) -> None:
    every = ["+@all", "-@scripting"]
    place.redis.acl_setuser(
        "plain", enabled=True, passwords=["+pw"], keys=["*"], channels=["*"], categories=every
    )
    host = place.redis.connection_pool.connection_kwargs
    app = make_celery(f"redis://plain:pw@{host['host']}:{host['port']}/0", [TIER])
    bells = [doorbell("a", n) for n in range(150)]

    place.lot.deliver(app, bells)

    app.close()
    place.redis.acl_deluser("plain")
    assert place.redis.llen("prompts.basic\x06\x163") == 2


def test_the_sweeper_leaves_alone_what_waits(place: Place, database: sa.Engine) -> None:
    place.configure(chunk=1)
    ids = insert(database, *[spec(tenant="a", deadline_s=900) for _ in range(3)])
    for job_id in ids:
        change(database, job_id, sweep_at=ago(1))
    place.redis.lpush("prompts.basic", "full")
    with database.begin() as connection:
        bells = overdue_doorbells(connection)
    place.park(*bells[:2])

    parked = place.lot.parked_among(place.app, bells)
    with database.begin() as connection:
        found = sweep(connection, parked=parked)

    assert parked == {bell.job_id for bell in bells[:2]}
    assert found.verdicts == {"parked": 2, "ring": 1}
    assert found.doorbells == [bells[2]]
    with database.begin() as connection:
        assert sweep(connection).verdicts == {}
    assert job_row(database, bells[0].job_id)["rings"] == 0


def test_silent_jobs_are_found_from_both_ends(database: sa.Engine) -> None:
    ids = insert(database, *[spec(tenant="a", concurrency_key="k") for _ in range(5)])
    for n, job_id in enumerate(ids):
        change(database, job_id, sweep_at=ago(5 - n), rung_at=ago(6))
    with database.begin() as connection:
        first = silent_doorbells(connection, TIER, limit=2)
        last = silent_doorbells(connection, TIER, limit=2, newest=True)

    assert {bell.job_id for bell in first} == set(ids[:2])
    assert {bell.job_id for bell in last} == set(ids[3:])
    assert {(bell.tenant, bell.concurrency_key) for bell in [*first, *last]} == {("a", "k")}
