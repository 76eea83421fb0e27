"""Tenants that share a real worker: whose turn it is, what is reserved, and what is bounded."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from pydantic import SecretStr
from tests.processes import Process, Provider, start_worker, worker_environment
from tests.waiting import eventually

from promptfleet import Client, PromptJob
from promptfleet_shared.queueing import make_celery, parked_jobs
from promptfleet_shared.settings import Settings

FLEET = """
default_tier = "basic"
[batch]
max_concurrent_calls = {calls}
max_batch_size = {batch}
[tiers]
basic = {{ models = ["m"] }}
[models.m]
price_as = "free"
deployments = [{{ base_url = "{url}" }}]
[fairness]
{fairness}
"""
BACKLOG = 5_000
BATCH = 20


class Site:
    """A provider, and workers and clients of one database."""

    def __init__(
        self, directory: Path, database_url: str, broker_url: str, simulated: Provider
    ) -> None:
        self.directory = directory
        self.database_url = database_url
        self.broker_url = broker_url
        self.provider = simulated
        self.celery = make_celery(broker_url, ["basic"])
        self.redis = redis.Redis.from_url(broker_url)
        self.workers: list[Process] = []
        self.clients: list[Client] = []

    def client(self, tenant: str) -> Client:
        """A producer that knows nothing of fleet.toml, as most don't."""
        settings = Settings(
            database_url=SecretStr(self.database_url),
            broker_url=SecretStr(self.broker_url),
            tenant=tenant,
        )
        self.clients.append(Client(settings))
        return self.clients[-1]

    def worker(self, *, calls: int = 20, fairness: str = "", **settings: object) -> Process:
        name = f"w{len(self.workers)}"
        config = self.directory / f"{name}.toml"
        config.write_text(
            FLEET.format(batch=BATCH, calls=calls, url=self.provider.base_url, fairness=fairness)
        )
        env = worker_environment(
            database_url=self.database_url, broker_url=self.broker_url, config=config, **settings
        )
        log = self.directory / f"{name}.log"
        self.workers.append(start_worker(["basic"], name=name, env=env, log=log))
        return self.workers[-1]

    def parked(self) -> int:
        return parked_jobs(self.celery, ["basic"])["basic"]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for client in self.clients:
            client.close()
        self.redis.close()
        self.celery.close()


@pytest.fixture
def make_site(tmp_path: Path, database_url: str, broker_url: str) -> Iterator[Callable[..., Site]]:
    made: list[tuple[Provider, Site]] = []

    def make(*flags: str) -> Site:
        simulated = Provider(tmp_path, *flags)
        made.append((simulated, Site(tmp_path, database_url, broker_url, simulated)))
        return made[-1][1]

    yield make
    for simulated, site in made:
        site.close()
        simulated.close()


def prompts(count: int, name: str) -> list[str]:
    return [f"{name} {n} {uuid.uuid4().hex}" for n in range(count)]


def finished(database: sa.Engine, tenant: str) -> int:
    with database.connect() as connection:
        count = "SELECT count(*) FROM results WHERE tenant = :tenant"
        return int(connection.execute(sa.text(count), {"tenant": tenant}).scalar_one())


def claimed_before(database: sa.Engine, job: PromptJob) -> int:
    """Jobs in batches that were claimed between a job's acceptance and its own claim."""
    query = sa.text("""
        WITH claims AS (
            SELECT results.batch_id, count(*) AS size,
                   min(jobs.run_at + queued_ms * interval '1 ms') AS at
              FROM results JOIN jobs ON jobs.id = job_id GROUP BY 1)
        SELECT coalesce(sum(size), 0)
          FROM claims, jobs AS job JOIN results AS result ON result.job_id = job.id
         WHERE job.id = :id AND claims.batch_id <> result.batch_id
           AND claims.at BETWEEN job.run_at AND job.run_at + result.queued_ms * interval '1 ms'""")
    with database.connect() as connection:
        return int(connection.execute(query, {"id": job.id}).scalar_one())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_long_backlog_delays_a_single_job_of_another_by_two_batches(
    make_site: Callable[..., Site], database: sa.Engine, workers: int
) -> None:
    site = make_site("--latency-ms", "20..60")
    site.client("big").enqueue_prompts(prompts(BACKLOG, "big"), tier="basic")
    for _ in range(workers):
        site.worker()
    eventually(lambda: finished(database, "big") > 100, "the backlog is being worked on")
    assert site.parked() > BACKLOG / 2

    small = site.client("small")
    # Its connections are made before: meanwhile a loaded machine would claim more than two batches.
    assert small.enqueue_prompt(*prompts(1, "small"), tier="basic").result(timeout=30).succeeded
    jobs = []
    for _ in range(5):
        jobs.append(small.enqueue_prompt(*prompts(1, "small"), tier="basic"))
        assert jobs[-1].result(timeout=30).succeeded

    assert finished(database, "big") < BACKLOG
    delays = [claimed_before(database, job) for job in jobs]
    assert max(delays) <= 2 * BATCH * workers, delays
    said = [job.result(timeout=1).decision for job in jobs]
    assert {"queue": {"tenants": 2}} in said


def test_without_fairness_it_waits_for_all_of_it(
    make_site: Callable[..., Site], database: sa.Engine
) -> None:
    """What the test above would find if nothing were shared: it can fail."""
    site = make_site("--latency-ms", "20..60")
    off = "enabled = false"
    site.worker(fairness=off)
    eventually(lambda: site.redis.hget("promptfleet:fair:config", "off"), "the fleet knows")
    site.client("big").enqueue_prompts(prompts(1_000, "big"), tier="basic")
    eventually(lambda: finished(database, "big"), "its doorbells are rung")
    job = site.client("small").enqueue_prompt(*prompts(1, "small"), tier="basic")

    assert job.result(timeout=60).succeeded

    assert site.parked() == 0
    assert finished(database, "big") > 900


def test_a_tenant_has_no_more_jobs_in_flight_than_its_bound(
    make_site: Callable[..., Site], database: sa.Engine
) -> None:
    site = make_site("--latency-ms", "100")
    site.worker(fairness="tenants.small = { max_in_flight = 3 }\nkeys.db = { max_in_flight = 1 }")
    small, other = site.client("small"), site.client("other")
    jobs = small.enqueue_prompts(prompts(24, "small"), tier="basic")
    keyed = other.enqueue_prompts(prompts(6, "keyed"), tier="basic", concurrency_key="db")
    free = other.enqueue_prompts(prompts(60, "free"), tier="basic")

    for job in [*jobs, *keyed, *free]:
        assert job.result(timeout=30).succeeded

    assert most_at_once(database, jobs) == 3
    assert most_at_once(database, keyed) == 1
    assert most_at_once(database, free) > 3


def test_the_reserve_serves_interactive_jobs_while_all_other_slots_are_taken(
    make_site: Callable[..., Site], database: sa.Engine
) -> None:
    site = make_site("--latency-ms", "20000")
    reserve = "interactive_reserve = 0.2\ninteractive_priority = 9"
    worker = site.worker(calls=10, fairness=reserve, drain_s=1)
    client = site.client("one")
    client.enqueue_prompts(prompts(40, "slow"), tier="basic")
    eventually(lambda: site.provider.stats()["in_flight"] == 8, "all but the reserve is taken")
    assert site.parked() > 0

    client.enqueue_prompts(prompts(5, "interactive"), tier="basic", priority=9)

    eventually(lambda: site.provider.stats()["in_flight"] == 10, "the reserve is taken")
    assert worker.running


def test_a_broker_that_loses_all_loses_no_job(
    make_site: Callable[..., Site], database: sa.Engine
) -> None:
    site = make_site("--latency-ms", "5")
    site.worker(fairness="tenants.b = { max_in_flight = 5 }")
    for tenant, count in (("a", 3_000), ("b", 200)):
        site.client(tenant).enqueue_prompts(prompts(count, tenant), tier="basic")
    eventually(lambda: finished(database, "a") > 200, "both are being worked on")
    assert site.parked() > 500

    site.redis.flushall()

    eventually(lambda: finished(database, "a") == 3_000, "a is done", timeout_s=60)
    eventually(lambda: finished(database, "b") == 200, "b is done", timeout_s=60)
    with database.connect() as connection:
        calls = connection.execute(sa.text("SELECT sum(calls) FROM results")).scalar_one()
    assert calls == 3_200


def most_at_once(database: sa.Engine, jobs: Sequence[PromptJob]) -> int:
    """How many of these jobs were called at the same time, at most."""
    query = sa.text("""
        WITH called AS (
            SELECT job_id, finished_at AS until,
                   finished_at - provider_ms * interval '1 ms' AS since
              FROM results WHERE job_id = ANY(:ids))
        SELECT max(many) FROM (
            SELECT count(*) AS many FROM called AS one JOIN called AS other
                ON other.since <= one.since AND one.since < other.until - interval '5 ms'
             GROUP BY one.job_id) AS counts""")
    with database.connect() as connection:
        return int(connection.execute(query, {"ids": [job.id for job in jobs]}).scalar_one())
