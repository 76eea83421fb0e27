"""Two real workers and hundreds of equal prompts: the provider's own count is the judge."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from celery import Celery
from tests.processes import Process, Provider, start_worker, worker_environment
from tests.rows import spec
from tests.waiting import eventually

from promptfleet.dev_stack import EmbeddedValkey
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.queueing import make_celery, publish
from promptfleet_shared.store.submissions import insert_jobs

FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["main"]
[models.main]
price_as = "openai/gpt-4o-mini"
deployments = [{{ base_url = "{url}" }}]
"""
COUNT = 500


class Site:
    """Where the workers work."""

    def __init__(self, directory: Path, broker_url: str, database: sa.Engine) -> None:
        self.directory = directory
        self.broker_url = broker_url
        self.database = database
        self.celery: Celery = make_celery(broker_url, ["basic"])
        self.provider = Provider(directory)
        self.processes: dict[str, Process] = {}
        self._names = itertools.count(1)

    def workers(self, count: int) -> list[str]:
        """The names of so many workers that run."""
        while len(self.processes) < count:
            name = f"worker-{next(self._names)}"
            self.processes[name] = self._start(name)
        return list(self.processes)

    def _start(self, name: str) -> Process:
        config = self.directory / "fleet.toml"
        config.write_text(FLEET.format(url=self.provider.base_url))
        env = worker_environment(
            database_url=self.database.url.render_as_string(hide_password=False),
            broker_url=self.broker_url,
            config=config,
            worker_name=name,
        )
        log = self.directory / f"{name}.log"
        return start_worker(["basic"], name=name, env=env, log=log)

    def kill(self, name: str) -> None:
        self.processes.pop(name).kill()

    def submit(self, text: str, count: int) -> None:
        specs = [spec(text, metadata={"run": text}) for _ in range(count)]
        with self.database.begin() as connection:
            insert_jobs(connection, specs)
        publish(self.celery, [Doorbell(job_id=s.id, tier=s.tier) for s in specs])

    def value(self, query: str, **parameters: object) -> Any:
        with self.database.connect() as connection:
            return connection.execute(sa.text(query), parameters).scalar_one()

    def held_by(self, worker: str) -> int:
        query = "SELECT count(*) FROM jobs WHERE lease_owner = :worker"
        return int(self.value(query, worker=worker))

    def results(self, text: str, what: str = "count(*)") -> Any:
        """Something about the results of the jobs that asked this."""
        where = "state = 'succeeded' AND metadata ->> 'run' = :run"
        return self.value(f"SELECT {what} FROM results WHERE {where}", run=text)

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
        self.provider.close()
        self.celery.close()


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey, engine: sa.Engine
) -> Iterator[Site]:
    with redis.Redis.from_url(valkey.url) as connection:
        connection.flushall()
    opened = Site(tmp_path_factory.mktemp("workers"), valkey.url, engine)
    try:
        yield opened
    finally:
        opened.close()


def test_a_killed_leader_costs_one_more_call(site: Site) -> None:
    text = f"[[sim:hang,times=1]] Why is the sea salty? {uuid.uuid4().hex}"
    (first,) = site.workers(1)
    site.submit(text, 100)
    eventually(lambda: site.provider.calls_of(text) == 1, "the first worker calls")
    _, second = site.workers(2)
    site.submit(text, COUNT - 100)
    eventually(lambda: site.held_by(second), "the second worker waits")
    assert site.provider.calls_of(text) == 1

    site.kill(first)
    eventually(lambda: site.results(text) == COUNT, "all are answered", timeout_s=60)

    assert site.provider.calls_of(text) == 2


def test_hundreds_of_equal_prompts_are_one_call(site: Site) -> None:
    first, second = site.workers(2)
    text = f"[[sim:latency-ms=1500]] Why is the sky blue? {uuid.uuid4().hex}"

    site.submit(text, COUNT)
    eventually(lambda: site.held_by(first) and site.held_by(second), "both have some")
    eventually(lambda: site.results(text) == COUNT, "all are answered", timeout_s=60)

    assert site.provider.calls_of(text) == 1
    assert site.results(text, "count(*) FILTER (WHERE cache = 'miss')") == 1
    # One of the other worker's jobs waited for all of them.
    waited = "count(*) FILTER (WHERE decision -> 'cache' ->> 'waited_ms' IS NOT NULL)"
    assert site.results(text, waited) == 1
    assert site.results(text, "sum(saved_usd) = max(cost_usd) * (count(*) - 1)")
