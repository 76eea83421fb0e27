"""What a tenant's backlog does to another's single job, and what sharing costs one tenant alone.

    python -m benchmarks.fairness [--backlog 100000] [--singles 10] [--rounds 3] [--quick]

With and without fairness, in one run: one tenant's backlog waits, the worker is at it, and another
tenant submits single jobs, one after the other; how many of the backlog's jobs are claimed before
each, and how long each waits for its claim. Then one tenant alone: how fast a backlog is enqueued
in bulk and worked off, in turns with and without fairness, with the worker's and Postgres' CPU
time a prompt, which other load disturbs less than the rates. Writes
`benchmarks/results/fairness.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.contest import Heat, Score, Stage, count_rows, instants, measure
from benchmarks.core import RESULTS, servers, stage_at
from benchmarks.peers.contestants import CALLS_IN_FLIGHT
from promptfleet import Client
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.migrating import migrate

BATCH = 100
LATENCY_MS = "50..150"
ALONE_PROMPTS = 20_000
PATIENCE_S = 300.0
_FLEET_TOML = """
default_tier = "basic"
[batch]
max_concurrent_calls = {calls}
[fairness]
enabled = {fair}
[tiers.basic]
models = ["simulated"]
[models.simulated]
price_as = "openai/gpt-4o-mini"
[[models.simulated.deployments]]
base_url = "{url}/v1"
"""
# What was claimed while the job waited for its own claim.
_WAIT = sa.text("""
WITH job AS (
    SELECT jobs.run_at, queued_ms, results.batch_id, provider_ms, total_ms
      FROM jobs JOIN results ON job_id = id WHERE id = :id)
SELECT (SELECT count(*) FROM results JOIN jobs ON id = job_id, job
         WHERE results.batch_id <> job.batch_id
           AND jobs.run_at + results.queued_ms * interval '1 ms'
               BETWEEN job.run_at AND job.run_at + job.queued_ms * interval '1 ms') AS before,
       queued_ms, total_ms - provider_ms AS beyond_call_ms FROM job
""")


@dataclasses.dataclass(kw_only=True, slots=True)
class Fleet:
    """One worker process and its producers.

    Attributes:
        fair: Whether tenants share.
        enqueue_s: How long the last backlog took to be accepted.
    """

    fair: bool
    enqueue_s: float = 0.0

    @property
    def name(self) -> str:
        """Its key in the results."""
        return "with" if self.fair else "without"

    @property
    def variant(self) -> str:
        """How it is set up."""
        return "fairness on" if self.fair else "fairness off"

    def client(self, stage: Stage, tenant: str) -> Client:
        """A producer of a tenant."""
        facts: dict[str, Any] = {
            "database_url": stage.database_url,
            "broker_url": stage.broker_url,
            "config": self._config(stage),
            "tenant": tenant,
        }
        return Client(Settings(**facts))

    def enqueue(self, stage: Stage, prompts: int) -> None:
        """Make the backlog of one tenant, every prompt different."""
        migrate(stage.engine)
        with stage.engine.begin() as connection:
            connection.execute(sa.text("TRUNCATE jobs, results, ledger, callbacks"))
        texts = [f"Question {number}: how are you?" for number in range(prompts)]
        with self.client(stage, "big") as client:
            started = time.monotonic()
            client.enqueue_prompts(texts, tier="basic")
            self.enqueue_s = time.monotonic() - started

    def start(self, stage: Stage) -> Sequence[subprocess.Popen[bytes]]:
        """The Procfile's command for one tier, less talkative."""
        arguments = ["celery", "-A", "promptfleet_workers.app", "worker"]
        arguments += ["-Q", "prompts.basic", "-n", "basic@%h", "--loglevel", "WARNING"]
        env = {
            "PROMPTFLEET_DATABASE_URL": stage.database_url,
            "PROMPTFLEET_BROKER_URL": stage.broker_url,
            "PROMPTFLEET_CONFIG": self._config(stage),
        }
        return [machine.start(arguments, env=env, log=stage.directory / f"{self.name}.log")]

    def finished(self, stage: Stage) -> int:
        """The rows of `results`."""
        return count_rows(stage, "results")

    def finish_times(self, stage: Stage) -> list[float]:
        """When its result rows were written."""
        return instants(stage, "results")

    def _config(self, stage: Stage) -> str:
        path = stage.directory / f"fairness-{self.name}.toml"
        fair = str(self.fair).lower()
        path.write_text(
            _FLEET_TOML.format(calls=CALLS_IN_FLIGHT, fair=fair, url=stage.provider_url)
        )
        return str(path)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Delay:
    """What single jobs waited behind another tenant's backlog.

    Attributes:
        batches: Jobs that were claimed before each, in batches of a hundred.
        queued_ms: Milliseconds that each waited for its claim.
        backlog_left: Jobs of the backlog that were not finished after the last one.
    """

    batches: list[float]
    queued_ms: list[float]
    backlog_left: int


def single_jobs(fleet: Fleet, stage: Stage, *, backlog: int, singles: int) -> Delay:
    """Let one tenant's jobs come into another's backlog, one after the other."""
    fleet.enqueue(stage, backlog)
    workers = fleet.start(stage)
    with machine.running(workers):
        machine.wait_for(
            lambda: fleet.finished(stage) > min(backlog // 20, 2_000),
            "work on the backlog",
            processes=workers,
            timeout_s=PATIENCE_S,
        )
        with fleet.client(stage, "small") as client:
            jobs = []
            for n in range(singles):
                jobs.append(client.enqueue_prompt(f"Single {n}", tier="basic", cache=False))
                jobs[-1].result(timeout=PATIENCE_S)
        left = backlog + singles - fleet.finished(stage)
    with stage.engine.connect() as connection:
        rows = [connection.execute(_WAIT, {"id": job.id}).one() for job in jobs]
    return Delay(
        batches=[round(row.before / BATCH, 2) for row in rows],
        queued_ms=[round(row.queued_ms, 1) for row in rows],
        backlog_left=left,
    )


def alone(stage: Stage, console: Console, *, rounds: int, prompts: int) -> dict[str, Any]:
    """One tenant's bulk, in turns with and without fairness."""
    scores: dict[str, list[Score]] = {"with": [], "without": []}
    enqueued: dict[str, list[float]] = {"with": [], "without": []}
    for round_ in range(rounds):
        fleets = [Fleet(fair=True), Fleet(fair=False)]
        for fleet in fleets if round_ % 2 == 0 else reversed(fleets):
            heat = Heat(contestant=fleet, prompts=prompts, warm_up=prompts // 10, timeout_s=120)
            score = measure(heat, stage)
            scores[fleet.name].append(score)
            enqueued[fleet.name].append(prompts / fleet.enqueue_s)
            console.print(
                f"  alone, {fleet.variant}: {enqueued[fleet.name][-1]:,.0f} enqueued/s,"
                f" {score.prompts_per_s:,.0f} prompts/s,"
                f" worker {score.cpu_us_per_prompt['worker']:.0f} µs,"
                f" others {score.foreign_cores:.2f} cores"
            )
    return {
        name: {
            "enqueued_per_s": round(statistics.median(enqueued[name])),
            "prompts_per_s": round(statistics.median(s.prompts_per_s for s in scores[name])),
            "cpu_us_per_prompt": {
                group: round(statistics.median(s.cpu_us_per_prompt[group] for s in scores[name]), 1)
                for group in ("worker", "postgres", "valkey")
            },
            "foreign_cores": round(statistics.median(s.foreign_cores for s in scores[name]), 2),
        }
        for name in scores
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--backlog", type=int, default=100_000)
    parser.add_argument("--singles", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tenth of it, noisier numbers")
    flags = parser.parse_args(arguments)
    backlog = flags.backlog // 10 if flags.quick else flags.backlog
    prompts = ALONE_PROMPTS // 4 if flags.quick else ALONE_PROMPTS
    console = Console()
    delays = {}
    with servers(console) as (postgres, valkey):
        with stage_at(LATENCY_MS, postgres, valkey) as stage:
            for fleet in (Fleet(fair=True), Fleet(fair=False)):
                singles = flags.singles if fleet.fair else 1
                delay = single_jobs(fleet, stage, backlog=backlog, singles=singles)
                delays[fleet.name] = delay
                console.print(f"  {fleet.variant}: {delay}")
        with stage_at("0", postgres, valkey) as stage:
            rates = alone(stage, console, rounds=flags.rounds, prompts=prompts)
    console.print(_table(delays, rates))
    report = {
        "backlog": backlog,
        "delays": {name: dataclasses.asdict(delay) for name, delay in delays.items()},
        "alone": rates,
        "quick": flags.quick,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    path = RESULTS / "fairness.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {path.name}")


def _table(delays: dict[str, Delay], rates: dict[str, Any]) -> Table:
    table = Table(title=f"{os.cpu_count()} cores, Python {platform.python_version()}")
    table.add_column("fairness")
    titles = ("batches before", "waited ms", "enqueued/s", "prompts/s", "worker µs", "valkey µs")
    for title in titles:
        table.add_column(title, justify="right")
    for name, delay in delays.items():
        own = rates[name]
        table.add_row(
            name,
            f"{max(delay.batches):.2f} at most",
            f"{statistics.median(delay.queued_ms):,.0f}",
            f"{own['enqueued_per_s']:,}",
            f"{own['prompts_per_s']:,}",
            f"{own['cpu_us_per_prompt']['worker']}",
            f"{own['cpu_us_per_prompt']['valkey']}",
        )
    return table


if __name__ == "__main__":
    main()
