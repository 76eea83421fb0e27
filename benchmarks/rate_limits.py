"""How much of a provider's quota four workers use in a minute, and how often they are refused.

    python -m benchmarks.rate_limits [--only rpm,tpm] [--seconds 60] [--workers 4]

Starts Postgres and Valkey on data of their own and the simulated provider with strict limits: a
sliding log, of which no window of 60 s ever admits more than the limit, on what a call really
takes (a token bucket, as real providers have, would admit more). A backlog waits before the
workers start; the minute begins with the first call that is admitted. Prompts have the lengths of
MT-Bench's 160 turns; the length of an answer is drawn from a log-normal distribution, and the
workers do not know it. Prints a table and writes `benchmarks/results/rate_limits.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.core import LOGS, RESULTS, servers
from promptfleet import Client
from promptfleet.dev_stack import free_port
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.migrating import migrate

LATENCY_MS = "300..1500"
START_S = 60.0
USED_AT_LEAST, REFUSED_AT_MOST = 0.97, 0.005
WINDOW_S = 60.0
# Characters of the turns of https://huggingface.co/spaces/lmsys/mt-bench, question by question.
PROMPT_CHARS = [
    127, 71, 250, 57, 292, 58, 219, 92, 126, 126, 183, 113, 166, 61, 163, 92, 226, 192, 365, 69,
    140, 42, 223, 62, 450, 73, 511, 123, 450, 24, 317, 97, 410, 76, 186, 61, 169, 30, 209, 93,
    178, 99, 163, 103, 94, 54, 89, 125, 862, 44, 334, 97, 85, 258, 77, 62, 240, 60, 672, 245,
    103, 54, 241, 179, 296, 100, 95, 107, 294, 78, 38, 16, 68, 23, 112, 49, 257, 170, 57, 26,
    133, 23, 69, 175, 109, 51, 541, 517, 93, 32, 132, 63, 110, 52, 176, 65, 155, 79, 102, 109,
    684, 85, 1028, 84, 1556, 101, 742, 68, 758, 51, 1237, 66, 1044, 170, 1642, 114, 385, 77, 519,
    107, 121, 64, 237, 82, 216, 189, 92, 62, 317, 32, 221, 47, 319, 121, 210, 141, 186, 91, 110,
    83, 179, 38, 72, 53, 135, 45, 219, 68, 131, 72, 105, 73, 77, 1117, 83, 135, 68, 118, 113, 111,
]  # fmt: skip
OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_MOST = 200.0, 0.6, 1000


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A provider's limits, both of a minute."""

    name: str
    rpm: int
    tpm: int


CASES = (
    Case(name="rpm", rpm=600, tpm=10_000_000),
    Case(name="tpm", rpm=100_000, tpm=200_000),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What became of a case.

    Attributes:
        used: The share of the limit that binds, of what `seconds` admit.
        refused: The share of calls that were answered 429.
        deferrals_a_job: How often a job that ended had been sent back to wait.
    """

    name: str
    used: float
    refused: float
    calls: int
    deferrals_a_job: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What the command line says."""

    seconds: float
    workers: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rate_limits", description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--seconds", type=float, default=WINDOW_S)
    parser.add_argument("--workers", type=int, default=4)
    flags = parser.parse_args(arguments)
    run = Run(seconds=flags.seconds, workers=flags.workers)
    console = Console()
    scores = [
        measure(case, run, console)
        for case in CASES
        if flags.only is None or case.name in flags.only
    ]
    console.print(_table(scores, run))
    console.print(f"Written to {write_report(scores, run).name}")


def measure(case: Case, run: Run, console: Console) -> Score:
    """One case on servers of its own."""
    with ExitStack() as stack:
        postgres, valkey = stack.enter_context(servers(console))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="limits-")))
        provider_url = _start_provider(case, stack)
        engine = sa.create_engine(postgres.url)
        stack.callback(engine.dispose)
        migrate(engine)
        _enqueue(case, run, postgres.url, valkey.url)
        config = directory / "fleet.toml"
        config.write_text(_FLEET_TOML.format(url=provider_url, rpm=case.rpm, tpm=case.tpm))
        env = {
            "PROMPTFLEET_DATABASE_URL": postgres.url,
            "PROMPTFLEET_BROKER_URL": valkey.url,
            "PROMPTFLEET_CONFIG": str(config),
        }
        processes = [_start_worker(n, env) for n in range(run.workers)]
        stack.enter_context(machine.running(processes))
        looked_at = [time.monotonic()]

        def has_begun() -> bool:
            looked_at.append(time.monotonic())
            return bool(_stats(provider_url)["prompts"])

        machine.wait_for(
            has_begun,
            "the first call",
            processes=processes,
            timeout_s=START_S,
            poll_s=0.005,
        )
        began_at = looked_at[-2]  # nothing had been admitted then
        time.sleep(max(0.0, began_at + run.seconds - time.monotonic()))
        stats = _stats(provider_url)
        return _score(case, time.monotonic() - began_at, stats, engine)


def _score(case: Case, elapsed_s: float, stats: dict[str, Any], engine: sa.Engine) -> Score:
    tokens = stats["input_tokens"] + stats["output_tokens"]
    share = elapsed_s / WINDOW_S
    used = stats["prompts"] / (case.rpm * share), tokens / (case.tpm * share)
    refused = stats["rejected"].get("429", 0)
    query = sa.text("SELECT avg(deferrals)::float8 FROM jobs WHERE state = 'succeeded'")
    with engine.connect() as connection:
        deferrals = connection.execute(query).scalar_one() or 0.0
    return Score(
        name=case.name,
        used=max(used),
        refused=refused / (stats["prompts"] + refused),
        calls=stats["prompts"],
        deferrals_a_job=deferrals,
    )


def _start_provider(case: Case, stack: ExitStack) -> str:
    LOGS.mkdir(parents=True, exist_ok=True)
    port = free_port()
    arguments = ["promptfleet_workers.providers.simulated", "--port", str(port)]
    arguments += ["--latency-ms", LATENCY_MS, "--rpm", str(case.rpm), "--tpm", str(case.tpm)]
    process = machine.start(arguments, env={}, log=LOGS / "provider.log")
    stack.enter_context(machine.running([process]))
    machine.wait_for(
        lambda: machine.accepts_connections(port), "the provider", processes=[process], timeout_s=20
    )
    return f"http://127.0.0.1:{port}"


def _start_worker(number: int, env: dict[str, str]) -> Any:
    arguments = ["celery", "-A", "promptfleet_workers.app", "worker", "-Q", "prompts.basic"]
    arguments += ["-n", f"limits{number}@%h", "--loglevel", "WARNING"]
    return machine.start(arguments, env=env, log=LOGS / "rate_limits.log")


def _enqueue(case: Case, run: Run, database_url: str, broker_url: str) -> None:
    """Half as much again as the minute admits."""
    draw = random.Random(7)
    share = 1.5 * run.seconds / WINDOW_S
    mean_tokens = 290  # of a prompt and its answer, about
    jobs = int(share * min(case.rpm, case.tpm / mean_tokens))
    prompts = []
    for n in range(jobs):
        output = min(OUTPUT_MOST, round(draw.lognormvariate(0, OUTPUT_SIGMA) * OUTPUT_MEDIAN))
        marker = f"[[sim:output-tokens={output}]] {n} "
        chars = PROMPT_CHARS[n % len(PROMPT_CHARS)]
        prompts.append(marker + "word " * max(0, (chars - len(marker)) // 5))
    facts: dict[str, Any] = {"database_url": database_url, "broker_url": broker_url}
    with Client(Settings(**facts)) as client:
        client.enqueue_prompts(prompts, tier="basic")


def _stats(provider_url: str) -> dict[str, Any]:
    stats: dict[str, Any] = httpx.get(f"{provider_url}/stats", timeout=10).json()
    return stats


def _table(scores: Sequence[Score], run: Run) -> Table:
    table = Table(
        title=f"{run.seconds:g} s, {run.workers} workers, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}"
    )
    for title in ("bound by", "quota used", "answered 429", "calls", "deferrals a job", "goal"):
        table.add_column(title)
    for score in scores:
        met = score.used >= USED_AT_LEAST and score.refused < REFUSED_AT_MOST
        table.add_row(
            score.name,
            f"{score.used:.1%}",
            f"{score.refused:.2%}",
            f"{score.calls:,}",
            f"{score.deferrals_a_job:.2f}",
            "met" if met else "missed",
        )
    return table


def write_report(scores: Sequence[Score], run: Run) -> Path:
    """Write `rate_limits.json`."""
    report = {
        "scores": [dataclasses.asdict(score) for score in scores],
        "goals": {"used_at_least": USED_AT_LEAST, "refused_below": REFUSED_AT_MOST},
        "seconds": run.seconds,
        "workers": run.workers,
        "latency_ms": LATENCY_MS,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    path = RESULTS / "rate_limits.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


_FLEET_TOML = """
default_tier = "basic"
[tiers.basic]
models = ["simulated"]
[models.simulated]
price_as = "openai/gpt-4o-mini"
[[models.simulated.deployments]]
base_url = "{url}/v1"
limits = {{ requests_per_minute = {rpm}, tokens_per_minute = {tpm} }}
"""

if __name__ == "__main__":
    main()
