"""Health, readiness and the watchdog of real workers whose servers, loops and consumers fail."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import redis
import sqlalchemy as sa
from pydantic import SecretStr
from tests.processes import Process, Provider, provider, start_worker, worker_environment
from tests.rows import ago, change, claim_one, insert, job_row, spec
from tests.waiting import eventually

from promptfleet.cli import doctor
from promptfleet.dev_stack import EmbeddedPostgres, EmbeddedValkey
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.queueing import eviction_policy, make_celery, publish, queue_depths
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.database import Database
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.migrating import migrate
from promptfleet_shared.store.status import any_neglected
from promptfleet_workers.watchdog import WorkQuestion

FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 5
[tiers.basic]
models = ["m"]
[models.m]
price_as = "free"
deployments = [{{ base_url = "{url}" }}]
"""
EX_SOFTWARE, EX_CONFIG = 70, 78
_SERVED = re.compile(r"http://127\.0\.0\.1:\d+")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Provider]:
    with provider(tmp_path_factory.mktemp("provider")) as running:
        yield running


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """One that may stop."""
    with EmbeddedPostgres(tmp_path / "postgres", durable=False) as server:
        engine = make_engine(server.url, application_name="tests")
        migrate(engine)
        engine.dispose()
        yield server


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """One that may be set up badly."""
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


Environment = Callable[..., dict[str, str]]


@pytest.fixture
def environment(
    database_url: str, broker_url: str, simulated: Provider, tmp_path: Path
) -> Environment:
    """Makes a worker's environment, with settings by their lower-case names."""
    config = tmp_path / "fleet.toml"
    config.write_text(FLEET.format(url=simulated.base_url))

    def make(**settings: object) -> dict[str, str]:
        servers = {"database_url": database_url, "broker_url": broker_url}
        values: dict[str, Any] = {**servers, **settings}
        return worker_environment(config=config, **values)

    return make


def health_url(worker: Process) -> str:
    """Where it says that it serves its health."""
    (line,) = [line for line in worker.output.splitlines() if "health_served" in line]
    found = _SERVED.search(line)
    assert found
    return found[0]


def ask(url: str) -> tuple[int, Any]:
    """The status and the JSON of a page."""
    response = httpx.get(url, timeout=5)
    return response.status_code, response.json()


def status(url: str) -> int:
    return ask(url)[0]


def test_health_follows_the_database_and_readiness_the_drain(
    own_postgres: EmbeddedPostgres, broker_url: str, environment: Environment, tmp_path: Path
) -> None:
    env = environment(database_url=own_postgres.url, health_stale_s=2, drain_s=20)
    database = make_engine(own_postgres.url, application_name="tests")
    with start_worker(["basic"], name="health", env=env, log=tmp_path / "worker.log") as worker:
        url = health_url(worker)
        eventually(lambda: status(f"{url}/readyz") == 200, "it is ready")
        code, facts = ask(f"{url}/healthz")
        assert (code, facts["status"]) == (200, "alive")
        assert ask(f"{url}/readyz")[1]["tiers"] == ["basic"]

        own_postgres.stop()
        eventually(lambda: status(f"{url}/healthz") == 503, "no commit for two seconds")
        assert ask(f"{url}/healthz")[1]["last_commit_age_s"] > 2
        own_postgres.start()
        eventually(lambda: status(f"{url}/healthz") == 200, "it commits again")

        job = spec("[[sim:latency-ms=3000]] slow")
        insert(database, job)
        celery = make_celery(broker_url, ["basic"])
        publish(celery, [Doorbell(job_id=job.id, tier="basic")])
        celery.close()
        eventually(lambda: job_row(database, job.id)["state"] == "running", "it runs")
        worker.terminate()
        eventually(lambda: status(f"{url}/readyz") == 503, "it is not ready while it drains")
        assert "the worker is draining" in ask(f"{url}/readyz")[1]["reasons"]
        assert status(f"{url}/healthz") == 200
        page = httpx.get(f"{url}/metrics", timeout=5).text
        assert worker.wait() == 0
    assert 'promptfleet_jobs_claimed_total{tier="basic"} 1.0' in page
    assert 'promptfleet_worker_info{tiers="basic"' in page
    assert "promptfleet_slots_free 0.0" in page
    assert "slow" not in page
    assert job_row(database, job.id)["state"] == "succeeded"
    database.dispose()


def test_a_worker_whom_no_doorbell_reaches_is_restarted(
    database: sa.Engine, broker_url: str, environment: Environment, tmp_path: Path
) -> None:
    env = environment(watchdog_s=3)
    celery = make_celery(broker_url, ["basic"])
    with start_worker(["basic"], name="deaf", env=env, log=tmp_path / "worker.log") as worker:
        eventually(lambda: status(f"{health_url(worker)}/readyz") == 200, "it is ready")
        replies = celery.control.cancel_consumer("prompts.basic", reply=True, timeout=10, limit=1)
        assert len(replies) == 1
        metrics = f"{health_url(worker)}/metrics"
        # It asks and hears that nothing waits: an idle worker is well.
        idle = "promptfleet_watchdog_idle_seconds 1.5\n"
        eventually(
            lambda: idle in httpx.get(metrics, timeout=5).text, "it has asked whether work waits"
        )

        job = spec()
        insert(database, job)
        assert worker.wait() == EX_SOFTWARE
    celery.close()
    assert "watchdog_gave_up" in worker.output
    assert "work waits and slots are free" in worker.output
    assert job_row(database, job.id)["attempt"] == 0


HARMED = """
import asyncio, threading, time
from promptfleet_workers import app

async def {harm}

def do_harm():
    while app.worker._parts is None:
        time.sleep(0.05)
    app.worker._loop.run(harm(app.worker._parts.pipeline._database._engine))

threading.Thread(target=do_harm, daemon=True).start()
app.app.worker_main(["worker", "-Q", "prompts.basic", "-n", "harmed@%h", "--loglevel", "INFO"])
"""
BLOCK_THE_LOOP = "harm(_):\n    time.sleep(600)"
KEEP_THE_POOL = "harm(engine):\n    kept = await engine.connect()\n    await asyncio.sleep(600)"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (BLOCK_THE_LOOP, "the event loop stands still"),
        (KEEP_THE_POOL, "work waits and slots are free"),
    ],
    ids=["loop", "pool"],
)
def test_a_worker_that_is_stuck_is_restarted(
    harm: str,
    reason: str,
    environment: Environment,
    database: sa.Engine,
    tmp_path: Path,
) -> None:
    env = environment(watchdog_s=2, database_pool_size=1)
    argv = [sys.executable, "-c", HARMED.format(harm=harm)]
    with Process(argv, log=tmp_path / "worker.log", ready="health_served", env=env) as worker:
        job = spec()
        insert(database, job)
        assert worker.wait() == EX_SOFTWARE
    assert reason in worker.output
    assert "event_loop.py" in worker.output  # the stack of its thread
    assert job_row(database, job.id)["state"] == "queued"


def test_no_worker_runs_on_a_broker_that_evicts(
    own_valkey: EmbeddedValkey, environment: Environment, tmp_path: Path
) -> None:
    env = environment(broker_url=own_valkey.url)
    with (
        redis.Redis.from_url(own_valkey.url) as client,
        start_worker(["basic"], name="a", env=env, log=tmp_path / "worker.log") as worker,
    ):
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert worker.running
        client.client_kill_filter(_type="normal", skipme=True)  # it connects anew
        assert worker.wait() == EX_CONFIG
    assert _refusal(run_worker(env)) == _refusal(worker.output)
    settings = Settings(broker_url=SecretStr(own_valkey.url))
    (memory,) = [found for found in doctor._broker(settings) if found.check == "memory"]
    assert memory.level is doctor.Level.FAIL
    assert memory.text.startswith("the broker's maxmemory-policy is allkeys-lru")
    assert memory.advice in _refusal(worker.output)


def run_worker(env: Mapping[str, str]) -> str:
    """What a worker said that refused to start."""
    argv = [sys.executable, "-m", "celery", "-A", "promptfleet_workers.app", "worker"]
    done = subprocess.run(
        [*argv, "-Q", "prompts.basic", "--loglevel", "INFO"],
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EX_CONFIG, done.stderr
    return done.stderr + done.stdout


def _refusal(output: str) -> str:
    (line,) = [line for line in output.splitlines() if "refused_to_start" in line]
    assert "Traceback" not in output
    reason = str(orjson.loads(line)["reason"])
    assert reason.startswith("the broker's maxmemory-policy is allkeys-lru")
    assert "set maxmemory-policy noeviction" in reason
    return reason


def test_a_port_that_is_taken_is_told(environment: Environment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        env = environment(health_port=port)
        said = run_worker(env)
    assert f"127.0.0.1:{port}" in said
    assert "PROMPTFLEET_HEALTH_PORT" in said
    assert "Traceback" not in said


class TestWhetherWorkWaits:
    @pytest.mark.parametrize(
        ("columns", "neglected"),
        [
            ({"run_at": ago(31)}, True),
            ({"run_at": ago(29)}, False),
            ({"run_at": ago(31), "cancel_requested": "true"}, False),
            ({"run_at": ago(31), "deadline": ago(1)}, False),
            # Rung so often that its next doorbell is far away: it waits all the same.
            ({"run_at": ago(31), "rings": "20", "sweep_at": ago(-299)}, True),
            ({"run_at": ago(-1000), "sweep_at": ago(-1000)}, False),
        ],
        ids=str,
    )
    def test_a_due_job_that_nobody_claims(
        self, database: sa.Engine, columns: dict[str, str], neglected: bool
    ) -> None:
        job = spec(deadline_s=3600.0)
        insert(database, job)
        change(database, job.id, **columns)

        with database.connect() as connection:
            assert any_neglected(connection, ["advanced", "basic"], for_s=30) is neglected
            assert not any_neglected(connection, ["advanced"], for_s=30)
            assert not any_neglected(connection, [], for_s=30)

    def test_a_job_that_runs_is_not_neglected(self, database: sa.Engine) -> None:
        job = spec()
        insert(database, job)
        claim_one(database, job.id)
        change(database, job.id, run_at=ago(31))

        with database.connect() as connection:
            assert not any_neglected(connection, ["basic"], for_s=30)

    def test_no_server_no_answer(
        self, database: sa.Engine, database_url: str, broker_url: str
    ) -> None:
        job = spec()
        insert(database, job)
        change(database, job.id, run_at=ago(31))
        nowhere = "127.0.0.1:1"
        broker = make_celery(broker_url, ["basic"])
        no_broker = make_celery(f"redis://{nowhere}/0", ["basic"])

        def ask(database_url: str, broker: Any) -> bool | None:
            store = Database(database_url, application_name="tests")
            question = WorkQuestion(
                database=store,
                ask_broker=lambda: queue_depths(broker, ["basic"]),
                tiers=["basic"],
                for_s=30,
            )
            try:
                return question()
            finally:
                store.close()

        assert ask(database_url, broker) is True
        assert ask(database_url, no_broker) is None
        assert ask(f"postgresql://me@{nowhere}/d", broker) is None
        broker.close()
        no_broker.close()


def test_a_broker_that_may_not_be_asked_tells_no_policy(own_valkey: EmbeddedValkey) -> None:
    with redis.Redis.from_url(own_valkey.url) as client:
        client.execute_command(
            "ACL", "SETUSER", "shy", "on", ">pw", "~*", "&*", "+@all", "-info", "-config"
        )
    own = make_celery(own_valkey.url, ["basic"])
    shy = make_celery(f"redis://shy:pw@127.0.0.1:{own_valkey.port}/0", ["basic"])
    assert eviction_policy(own) == "noeviction"
    assert eviction_policy(shy) is None
    own.close()
    shy.close()
