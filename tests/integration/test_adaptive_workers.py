"""Adaptive concurrency from end to end: two real workers, and a provider whose room changes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import sqlalchemy as sa
from tests.processes import Process, Provider, provider, start_worker, worker_environment
from tests.rows import insert, spec
from tests.waiting import eventually

from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.queueing import make_celery, publish
from promptfleet_workers.rate_limits.exchange import PREFIX

FLEET = """
default_tier = "basic"
[batch]
max_concurrent_calls = 48
[tiers.basic]
models = ["m"]
[models.m]
[[models.m.deployments]]
name = "gpu"
base_url = "{url}"
limits = {{ adaptive = true, max_concurrency = 100, learn = false }}
"""
FEW, MANY = 4, 12
PATIENCE_S = 60.0


class Fleet:
    """What a test sees of two workers and their provider."""

    def __init__(self, database: sa.Engine, valkey: Any, simulated: Provider) -> None:
        self._database = database
        self._valkey = valkey
        self.simulated = simulated

    def room(self, calls: int) -> None:
        """The provider refuses what is beyond so many calls in flight."""
        url = f"{self.simulated.url}/control"
        httpx.post(url, json={"max_concurrent": calls}, timeout=10).raise_for_status()

    @property
    def width(self) -> float:
        """How many calls the fleet takes the deployment to bear."""
        return float(self._valkey.hget(f"{PREFIX}deployment:gpu:health", "width") or 0)

    @property
    def at_work(self) -> set[str]:
        """The workers that have jobs now."""
        query = sa.text("SELECT DISTINCT lease_owner FROM jobs WHERE lease_owner IS NOT NULL")
        with self._database.connect() as connection:
            return set(connection.execute(query).scalars())

    def count(self, what: str) -> int:
        with self._database.connect() as connection:
            return int(connection.execute(sa.text(f"SELECT count(*) FROM {what}")).scalar_one())


@pytest.fixture
def fleet(
    tmp_path: Path, database_url: str, database: sa.Engine, broker_url: str
) -> Iterator[Fleet]:
    flags = ["--latency-ms", "150", "--max-concurrent", str(FEW)]
    with provider(tmp_path, *flags) as simulated:
        config = tmp_path / "fleet.toml"
        config.write_text(FLEET.format(url=simulated.base_url))

        def start(name: str) -> Process:
            env = worker_environment(
                database_url=database_url,
                broker_url=broker_url,
                config=config,
                worker_name=name,
                lease_s=20,
            )
            return start_worker(["basic"], name=name, env=env, log=tmp_path / f"{name}.log")

        with ThreadPoolExecutor() as pool:
            started = [pool.submit(start, name) for name in ("one", "two")]
        try:
            with redis.Redis.from_url(broker_url) as valkey:
                yield Fleet(database, valkey, simulated)
        finally:
            for process in started:
                process.result().kill()


def test_two_workers_find_out_together_what_a_provider_bears(
    fleet: Fleet, database: sa.Engine, broker_url: str
) -> None:
    jobs = [spec(f"{n}", deadline_s=600.0) for n in range(1000)]
    insert(database, *jobs)
    celery = make_celery(broker_url, ["basic"])
    publish(celery, [Doorbell(job_id=j.id, tier=j.tier, priority=j.priority) for j in jobs])
    celery.close()

    eventually(
        lambda: 0 < fleet.width <= 1.5 * FEW,
        "fewer at once: the provider refuses",
        timeout_s=PATIENCE_S,
    )
    eventually(lambda: len(fleet.at_work) == 2, "both workers have jobs", timeout_s=PATIENCE_S)
    fleet.room(MANY)
    eventually(
        lambda: fleet.width >= 2.5 * FEW, "more again: the provider has room", timeout_s=PATIENCE_S
    )
    peak = eventually(
        lambda: n if (n := fleet.simulated.stats()["in_flight"]) > 1.5 * FEW else 0,
        "that many are in flight",
        timeout_s=PATIENCE_S,
    )
    assert peak <= MANY
    fleet.room(FEW)
    eventually(lambda: fleet.width <= 1.5 * FEW, "fewer at once again", timeout_s=PATIENCE_S)

    assert fleet.simulated.stats()["rejected"]["429"] > 0
    assert fleet.count("results") > 0
    assert fleet.count("jobs WHERE attempt > 1 OR state = 'failed'") == 0
