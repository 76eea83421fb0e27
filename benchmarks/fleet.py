"""The fleet as a contestant: one worker process, started as the Procfile starts it."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa

from benchmarks import machine
from benchmarks.contest import Heat, Stage, count_rows, instants
from benchmarks.peers.contestants import CALLS_IN_FLIGHT
from promptfleet import Client
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.migrating import migrate

FLEET_PROMPTS = 20_000
SINGLE_CALLERS = 16
SPREAD_MS = "100..10000"
SPREAD_PROMPTS = 1_000


def heats() -> list[Heat]:
    """A backlog that was made in bulk, one that was made by single calls, and slow calls."""
    bulk, single = Fleet(), Fleet(single_calls=True)
    return [
        Heat(contestant=bulk, prompts=FLEET_PROMPTS, warm_up=FLEET_PROMPTS // 10),
        Heat(contestant=single, prompts=FLEET_PROMPTS, warm_up=FLEET_PROMPTS // 10),
        Heat(
            contestant=bulk,
            latency_ms="1000",
            prompts=12 * CALLS_IN_FLIGHT,
            warm_up=2 * CALLS_IN_FLIGHT,
        ),
    ]


def spread_heat() -> Heat:
    """Latencies from 0.1 to 10 s, for what a prompt waits beyond its own."""
    return Heat(
        contestant=Fleet(),
        latency_ms=SPREAD_MS,
        prompts=SPREAD_PROMPTS,
        warm_up=SPREAD_PROMPTS // 10,
        timeout_s=90,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """One worker process with its usual options and 500 calls in flight.

    Attributes:
        single_calls: The backlog is made by `enqueue_prompt` from 16 threads, whose doorbells the
            background ringer puts together, instead of by `enqueue_prompts`.
    """

    single_calls: bool = False

    @property
    def name(self) -> str:
        """Its key in the results."""
        return "fleet_single_enqueue" if self.single_calls else "fleet"

    @property
    def variant(self) -> str:
        """How the backlog was made."""
        return "single calls" if self.single_calls else "bulk"

    def enqueue(self, stage: Stage, prompts: int) -> None:
        """Submit as a web app would, every prompt different."""
        migrate(stage.engine)
        with stage.engine.begin() as connection:
            connection.execute(sa.text("TRUNCATE jobs, results, ledger, callbacks"))
        texts = [f"Question {number}: how are you?" for number in range(prompts)]
        with Client(_settings(stage)) as client:
            if self.single_calls:
                with ThreadPoolExecutor(SINGLE_CALLERS) as callers:
                    list(callers.map(lambda text: client.enqueue_prompt(text, tier="basic"), texts))
            else:
                client.enqueue_prompts(texts, tier="basic")

    def start(self, stage: Stage) -> Sequence[subprocess.Popen[bytes]]:
        """The Procfile's command for one tier, less talkative."""
        config = stage.directory / "fleet.toml"
        config.write_text(_FLEET_TOML.format(url=stage.provider_url, calls=CALLS_IN_FLIGHT))
        arguments = ["celery", "-A", "promptfleet_workers.app", "worker"]
        arguments += ["-Q", "prompts.basic", "-n", "basic@%h", "--loglevel", "WARNING"]
        env = {
            "PROMPTFLEET_DATABASE_URL": stage.database_url,
            "PROMPTFLEET_BROKER_URL": stage.broker_url,
            "PROMPTFLEET_CONFIG": str(config),
        }
        return [machine.start(arguments, env=env, log=stage.directory / f"{self.name}.log")]

    def finished(self, stage: Stage) -> int:
        """The rows of `results`."""
        return count_rows(stage, "results")

    def finish_times(self, stage: Stage) -> list[float]:
        """When its result rows were written."""
        return instants(stage, "results")


def overhead_ms(stage: Stage) -> dict[str, float]:
    """What the finished jobs waited between their claim and their result beyond their own call.

    Returns:
        Milliseconds: `p50`, `p95` and `max`.
    """
    query = sa.text("""
        SELECT percentile_cont(ARRAY[0.5, 0.95, 1]) WITHIN GROUP (
               ORDER BY total_ms - queued_ms - provider_ms) FROM results""")
    with stage.engine.connect() as connection:
        p50, p95, worst = connection.execute(query).scalar_one()
    return {"p50": p50, "p95": p95, "max": worst}


def _settings(stage: Stage) -> Settings:
    facts: dict[str, Any] = {"database_url": stage.database_url, "broker_url": stage.broker_url}
    return Settings(**facts)


_FLEET_TOML = """
default_tier = "basic"
[batch]
max_concurrent_calls = {calls}
[tiers.basic]
models = ["simulated"]
[models.simulated]
price_as = "openai/gpt-4o-mini"
[[models.simulated.deployments]]
base_url = "{url}/v1"
"""
