"""Where doorbells wait, on a real server: the order, the bounds, and what a loss leads to."""

from __future__ import annotations

import base64
import json
import random
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from tests.fair_model import FairModel
from tests.rows import ago, change, insert, job_row, spec
from typer.testing import CliRunner

from promptfleet.cli import app
from promptfleet_shared.errors import BrokerUnavailableError
from promptfleet_shared.jobs import DEFAULT_PRIORITY, Doorbell
from promptfleet_shared.parking import Held, ParkingLot, shared_fields
from promptfleet_shared.policies.fairness import FairnessSection, KeyBound, TenantShare
from promptfleet_shared.queueing import make_celery, parked_jobs, publish, queue_depths
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.sweeping import Order, overdue_doorbells, silent_doorbells, sweep
from promptfleet_shared.store.tables import jobs
from promptfleet_workers.sweeper import Sweeper

TIER = "basic"
CONFIG = "promptfleet:fair:config"
USUAL_LIST = "prompts.basic\x06\x163"
FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["small"]
[models.small]
deployments = [{ base_url = "http://127.0.0.1:9/v1" }]
"""


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

    def raw(self) -> dict[str, Any]:
        """The next message as it stands in Redis."""
        found: Any = self.redis.rpop(USUAL_LIST)
        message: dict[str, Any] = json.loads(found)
        return message

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


def test_status_tells_what_is_parked_apart_from_the_queue(
    place: Place,
    settings: Settings,
    database: sa.Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text(FLEET)
    asked = settings.model_copy(update={"config": config})
    monkeypatch.setattr("promptfleet.cli.status.find_settings", lambda _: asked)
    place.redis.lpush("prompts.basic", "one message")
    place.park(doorbell("a", 1), doorbell("b", 2), doorbell("b", 3))

    shown = CliRunner().invoke(app, ["status", "--json"])
    assert shown.exit_code == 0, shown.output
    tier = json.loads(shown.stdout)["tiers"][TIER]
    assert (tier["doorbells"], tier["parked"]) == (1, 3)
    assert re.search(r"basic\s+1\s+3\s+0", CliRunner().invoke(app, ["status"]).stdout)


def test_status_without_a_broker_knows_neither(
    settings: Settings, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BrokerUnavailableError

    monkeypatch.setattr("promptfleet.cli.status.find_settings", lambda _: settings)
    monkeypatch.setattr("promptfleet.broker.parked_jobs", refuse)

    tiers = json.loads(CliRunner().invoke(app, ["status", "--json"]).stdout)["tiers"]
    assert (tiers["basic"]["doorbells"], tiers["basic"]["parked"]) == (None, None)


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
        last = silent_doorbells(connection, TIER, limit=2, order=Order.NEWEST)

    assert {bell.job_id for bell in first} == set(ids[:2])
    assert {bell.job_id for bell in last} == set(ids[3:])
    assert {(bell.tenant, bell.concurrency_key) for bell in [*first, *last]} == {("a", "k")}


@pytest.mark.parametrize("silent", [False, True])
async def test_a_swept_backlog_does_not_stand_before_another_tenants_job(
    place: Place, database: sa.Engine, database_url: str, *, silent: bool
) -> None:
    """From the table to the queue: judged in its turn, and parked by tenant."""
    place.configure(chunk=10)
    place.redis.lpush("prompts.basic", "full")
    many = [spec(tenant="many", deadline_s=900) for _ in range(2_500)]
    (last,) = insert(database, spec(tenant="few", deadline_s=900))
    insert(database, *many)
    with database.begin() as connection:
        due = {"sweep_at": sa.text(ago(10)), "rung_at": sa.text(ago(60))}
        connection.execute(sa.update(jobs).values(due))
        younger = jobs.c.id.in_([each.id for each in many[1_250:]])
        connection.execute(sa.update(jobs).where(younger).values(sweep_at=sa.text(ago(2))))
    change(database, last, sweep_at=ago(5))
    looks: list[set[uuid.UUID]] = []

    def ring(bells: Iterable[Doorbell]) -> None:
        found = list(bells)
        looks.append({bell.job_id for bell in found})
        place.park(*found)

    async def all_empty(tiers: Sequence[str]) -> Sequence[str]:
        return tiers

    asynchronous = AsyncDatabase(database_url, application_name="tests", pool_size=1)
    sweeper = Sweeper(
        database=asynchronous,
        tiers=[TIER],
        interval_s=1,
        retention_s=0,
        ring=ring,
        empty_queues=all_empty,
        emit=lambda _: None,
    )
    try:
        await (sweeper.ring_silent() if silent else sweeper.sweep())
    finally:
        await asynchronous.close()

    assert last in looks[1]  # the first look is at the oldest, the second one fair
    assert sum(map(len, looks)) == len(set().union(*looks)) == len(many) + 1
    assert place.parked == len(many) + 1
    place.redis.delete("prompts.basic")
    assert str(last) in place.next()  # of the 2,501, in the very next message


def test_what_the_script_sends_is_what_celery_sends(place: Place) -> None:
    place.configure(interactive_reserve=0.25)
    bells = [doorbell("a", n, priority=DEFAULT_PRIORITY) for n in range(12)]
    other = doorbell("b", 99)
    assert place.lot.deliver(place.app, [*bells[:11], other]) == 1
    ours = place.raw()
    publish(place.app, bells[:11])
    theirs = place.raw()
    ids = [str(bell.job_id) for bell in bells[:11]]

    body = json.loads(ours["body"])
    assert json.loads(base64.b64decode(theirs["body"])) == [[ids], *body[1:]]
    assert set(body[0][0]) == {*ids, str(other.job_id)}
    assert body[0][1] == {"tenants": 2}
    assert ours["headers"]["argsrepr"].endswith(", ...]")
    assert ids[0] in ours["headers"]["argsrepr"]
    own = {"id", "root_id", "argsrepr"}
    for headers in (ours["headers"], theirs["headers"]):
        assert headers["id"] == headers["root_id"] == str(uuid.UUID(headers["id"]))
    assert {k: v for k, v in ours["headers"].items() if k not in own} == {
        k: v for k, v in theirs["headers"].items() if k not in own
    }
    own = {"correlation_id", "reply_to", "delivery_tag", "body_encoding"}
    assert ours["properties"].keys() == theirs["properties"].keys()
    assert {k: v for k, v in ours["properties"].items() if k not in own} == {
        k: v for k, v in theirs["properties"].items() if k not in own
    }
    assert ours.keys() == theirs.keys()


def test_messages_of_one_look_have_ids_of_their_own(place: Place) -> None:
    place.configure(chunk=2)
    for worker in ("w1", "w2", "w3", "w4", "w5", "w6"):
        place.lot.turn(place.app, TIER, worker=worker)
    assert place.lot.deliver(place.app, [doorbell("a", n) for n in range(20)]) == 3
    sent = [json.loads(message) for message in place.redis.lrange(USUAL_LIST, 0, -1)]
    assert len({message["headers"]["id"] for message in sent}) == 3
    assert len({message["properties"]["delivery_tag"] for message in sent}) == 3
