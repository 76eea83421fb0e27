"""The whole fleet by the Procfile's own commands, while its servers and workers break."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr
from tests.acceptance.fleet import Fleet, Watch
from tests.processes import Provider, provider, worker_environment
from tests.waiting import eventually

from promptfleet import Client
from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.migrating import migrate
from promptfleet_workers.providers.simulated.answers import prompt_hash

TIERS = ("basic", "standard", "advanced")
FLEET = """
[batch]
max_concurrent_calls = {calls}
batch_window_ms = 10
[tiers]
basic = {{ models = ["m"] }}
standard = {{ models = ["m"] }}
advanced = {{ models = ["m"] }}
[models.m]
price_as = "free"
deployments = [{{ base_url = "{url}" }}]
"""
CALLS = 16


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """One that may break."""
    with EmbeddedPostgres(tmp_path / "postgres", durable=False) as server:
        yield server


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """One that may break."""
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


def submit(client: Client, count: int) -> dict[uuid.UUID, str]:
    """So many prompts over all tiers; their texts by the ids of their jobs."""
    texts: dict[uuid.UUID, str] = {}
    for tier in TIERS:
        prompts = [f"{tier} {n} {uuid.uuid4().hex}" for n in range(count // len(TIERS))]
        jobs = client.enqueue_prompts(prompts, tier=tier)
        texts |= {job.id: prompt for job, prompt in zip(jobs, prompts, strict=True)}
    return texts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All that runs, and how to reach it."""

    fleet: Fleet
    client: Client
    watch: Watch
    provider: Provider
    postgres: EmbeddedPostgres
    valkey: EmbeddedValkey


@pytest.fixture
def scene(tmp_path: Path, postgres: EmbeddedPostgres, valkey: EmbeddedValkey) -> Iterator[Scene]:
    watch = Watch(postgres.url)
    migrate(watch.engine)
    config = tmp_path / "fleet.toml"
    with provider(tmp_path, "--latency-ms", "50..350") as simulated:
        config.write_text(FLEET.format(url=simulated.base_url, calls=CALLS))
        env = worker_environment(
            database_url=postgres.url,
            broker_url=valkey.url,
            config=config,
            lease_s=3,
            sweep_interval_s=0.3,
        )
        settings = Settings(
            database_url=SecretStr(postgres.url), broker_url=SecretStr(valkey.url), config=config
        )
        fleet = Fleet(env, tmp_path)
        with Client(settings) as client:
            yield Scene(
                fleet=fleet,
                client=client,
                watch=watch,
                provider=simulated,
                postgres=postgres,
                valkey=valkey,
            )
        fleet.supervisor.stop(grace_s=30)
    watch.engine.dispose()


def test_every_job_ends_once_whatever_breaks(scene: Scene) -> None:
    started = time.monotonic()
    texts = submit(scene.client, 600)

    _after(scene, 60)
    in_flight = scene.provider.stats()["in_flight"]
    os.kill(scene.fleet.pid("worker_basic"), signal.SIGKILL)
    _tell(started, "worker_basic is killed, its jobs are lost with their leases")

    _after(scene, 200)
    scene.valkey.restart(lose_data=True)
    _tell(started, "the broker is back, all doorbells are lost")
    texts |= submit(scene.client, 150)

    _after(scene, 400)
    in_flight += scene.provider.stats()["in_flight"]
    scene.postgres.restart("immediate")
    _tell(started, "the database is back")
    texts |= submit(scene.client, 150)

    eventually(
        lambda: scene.watch.finished() == len(texts),
        "all jobs have a result",
        timeout_s=90,
        every_s=0.1,
    )
    _tell(started, "all jobs are final")
    print(f"{in_flight} calls were in flight at the losses; exits: {scene.fleet.exits}")
    killed = [exit_ for exit_ in scene.fleet.exits if exit_.returncode == -signal.SIGKILL]
    assert [exit_.name for exit_ in killed] == ["worker_basic"]
    _check(scene, texts)


def _after(scene: Scene, results: int) -> None:
    eventually(lambda: scene.watch.finished() >= results, f"{results} results", timeout_s=60)


def _tell(started: float, what: str) -> None:
    print(f"{time.monotonic() - started:5.1f} s: {what}")


def _check(scene: Scene, texts: Mapping[uuid.UUID, str]) -> None:
    rows = scene.watch.rows(
        "SELECT id, jobs.state, crashes, attempt, unknown_calls,"
        " (SELECT count(*) FROM results WHERE job_id = id) AS results,"
        " (SELECT state FROM results WHERE job_id = id) AS result_state FROM jobs"
    )
    assert {row.id for row in rows} == set(texts)
    assert {(row.state, row.result_state, row.results) for row in rows} == {
        ("succeeded", "succeeded", 1)
    }
    calls = scene.provider.stats()["calls_by_prompt"]
    extra = 0
    for row in rows:
        made = calls[prompt_hash([{"role": "user", "content": texts[row.id]}])]
        assert 1 <= made <= 1 + row.crashes, f"{made} calls, {row.crashes} crashes"
        extra += made - 1
    lost = sum(row.crashes for row in rows)
    print(f"{extra} calls were made twice, {lost} leases were lost")
    # At most the killed worker's calls, and those of all workers when the database was lost.
    assert extra <= min(lost, CALLS * (1 + len(TIERS)))
    assert sum(row.unknown_calls for row in rows) >= extra  # and none of them unnoticed


@pytest.mark.parametrize("gone", ["valkey", "postgres"])
def test_workers_stop_though_a_server_is_gone(scene: Scene, gone: str) -> None:
    texts = submit(scene.client, 30)
    eventually(lambda: scene.watch.finished() == len(texts), "the fleet works")

    getattr(scene, gone).kill()
    late = scene.fleet.supervisor.stop(grace_s=30)

    assert late == (), scene.fleet.output[-4000:]
