"""What the fleet saves: the same prompts with every feature off, all on, and all but one.

    python -m benchmarks.inference [--quick] [--only baseline,all]

Starts Postgres and Valkey on data of their own, and the simulated provider twice: two accounts,
each with a strict limit of its own, and three models at OpenAI's prices in both. Prompts come as
users send them, whether earlier ones were answered or not, with a burst in the middle; all arms get
the same prompts at the same instants, drawn from a fixed seed. They are those of MT-Bench and of
the demo: half of the jobs are drawn from them by Zipf's law, so that some repeat; the other half
name a customer of their own in the system message, so that none is the same as another. For a share
of the jobs there is no hurry, and batch APIs may take them; they count for cost, not for latency.

The baseline sends every prompt to the best model, one call each, and knows no limit. Prints a table
and the goals, writes `benchmarks/results/inference.json`, and ends with 0 whether or not the goals
are met. The simulated provider says the same whatever the model: nothing here judges answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import redis
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.core import LOGS, RESULTS, servers
from benchmarks.machine import REPOSITORY
from promptfleet import Client
from promptfleet.dev_stack import free_port
from promptfleet_shared.settings import Settings
from promptfleet_shared.store.engines import make_engine
from promptfleet_shared.store.migrating import migrate

FEATURES = ("tiers", "cache", "compact", "limits", "balancing", "batch")
BASELINE, ALL = "baseline", "all"
SEED = 11
JOBS, QUICK_JOBS = 300, 120
ZIPF_SHARE, BATCH_SHARE = 0.5, 0.3
RATE, BURST_RATE, BURST_SHARE = 12.0, 40.0, 0.45
"""Prompts a second, usually and in the burst; the share of all prompts that the burst has."""
ACCOUNTS = ("one", "two")
CALLS_AT_ONCE = 3
"""Each account's limit, which refuses any call above it; batches do not count."""
LATENCY_MS, OUTPUT_TOKENS = "150..600", 200
BATCH_MS = "1000..3000"
TIMEOUT_S = 120.0
COST_DOWN_BY = 0.6
DAY_S = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to answer the prompts: its name, and the features that are on."""

    name: str
    features: frozenset[str]

    def has(self, feature: str) -> bool:
        """Whether that feature is on."""
        return feature in self.features


ARMS = (
    Arm(name=BASELINE, features=frozenset()),
    Arm(name=ALL, features=frozenset(FEATURES)),
    *(Arm(name=f"all but {name}", features=frozenset(FEATURES) - {name}) for name in FEATURES),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A job to be: when it comes (seconds from the start), and whether it has a day's time."""

    number: int
    at_s: float
    messages: list[dict[str, str]]
    options: dict[str, Any]
    patient: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What became of an arm.

    Attributes:
        calls: What the provider answered, lines of its batches included.
        batched: The lines of batches among them.
        refused: What it answered with 429.
        p50_ms: From acceptance to the end, of jobs without a day's time only; so is `p95_ms`.
        comparable: Jobs answered by the same model as in the baseline, which need not be many.
        equal: Of these, how many have the same answer.
        by_tier: Jobs by the tier that answered.
    """

    arm: str
    cost_usd: float
    calls: int
    batched: int
    refused: int
    p50_ms: float
    p95_ms: float
    cache_answers: int
    comparable: int
    equal: int
    jobs: int
    succeeded: int
    by_tier: Mapping[str, int]
    models: Mapping[str, int]


Answers = dict[int, tuple[str | None, str | None]]
"""The model and the text, by the question's number."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """What runs for the whole benchmark."""

    directory: Path
    engine: sa.Engine
    database_url: str
    broker_url: str
    provider_urls: Sequence[str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), help="arms, by commas")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, noisier numbers")
    flags = parser.parse_args(arguments)
    console = Console()
    questions = draw_questions(QUICK_JOBS if flags.quick else JOBS)
    scores: list[Score] = []
    reference: Answers = {}
    with site(console) as place:
        for arm in ARMS:
            if flags.only is not None and arm.name not in flags.only:
                continue
            answers = run(place, arm, questions)
            if arm.name == BASELINE:
                reference = answers
            scores.append(score(place, arm, answers, reference))
            console.print(f"  {arm.name}: ${scores[-1].cost_usd:.4f}, {scores[-1].calls} calls")
    console.print(_table(scores, questions))
    goals = reached(scores)
    for text, met in goals.items():
        console.print(f"{'[green]met[/]' if met else '[red]missed[/]'}  {text}")
    path = write_report(scores, goals, questions, quick=flags.quick)
    console.print(f"Written to {path.relative_to(REPOSITORY)}")


# -- the prompts -------------------------------------------------------------------------------


def draw_questions(count: int) -> list[Question]:
    """The same ones each time: see the module's docstring."""
    draw = random.Random(SEED)
    known = _known_prompts()
    draw.shuffle(known)
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    questions = []
    for number, at_s in enumerate(_instants(draw, count)):
        if draw.random() < ZIPF_SHARE:
            messages, options = draw.choices(known, weights)[0]
        else:
            messages, options = known[number % len(known)]
            messages = _for_customer(messages, number)
        patient = draw.random() < BATCH_SHARE
        questions.append(
            Question(number=number, at_s=at_s, messages=messages, options=options, patient=patient)
        )
    return questions


def _known_prompts() -> list[tuple[list[dict[str, str]], dict[str, Any]]]:
    """Messages and options: MT-Bench's first turns, and the demo's prompts."""
    known: list[tuple[list[dict[str, str]], dict[str, Any]]] = [
        ([{"role": "user", "content": line["turns"][0]}], {})
        for line in _lines("tests/data/mt_bench_sample.jsonl")
    ]
    for line in _lines("producers/promptfleet/prompts.jsonl"):
        messages = [{"role": "user", "content": line["prompt"]}]
        if "system" in line:
            messages.insert(0, {"role": "system", "content": line["system"]})
        options: dict[str, Any] = {
            name: line[name] for name in ("max_tokens", "temperature") if name in line
        }
        known.append((messages, options))
    return known


def _lines(path: str) -> list[dict[str, Any]]:
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line]


def _for_customer(messages: Sequence[Mapping[str, str]], number: int) -> list[dict[str, str]]:
    system = f"You answer customer {number}."
    first = messages[0]
    if first["role"] == "system":
        return [
            {"role": "system", "content": f"{system} {first['content']}"},
            *map(dict, messages[1:]),
        ]
    return [{"role": "system", "content": system}, *map(dict, messages)]


def _instants(draw: random.Random, count: int) -> Iterator[float]:
    """Arrivals of a Poisson process whose rate is higher in the middle."""
    at_s = 0.0
    begin = count * (1 - BURST_SHARE) / 2
    for number in range(count):
        yield at_s
        is_burst = begin <= number < count - begin
        at_s += draw.expovariate(BURST_RATE if is_burst else RATE)


# -- the servers -------------------------------------------------------------------------------


@contextmanager
def site(console: Console) -> Iterator[Site]:
    """Postgres, Valkey and the provider's two accounts."""
    LOGS.mkdir(parents=True, exist_ok=True)
    ports = [free_port() for _ in ACCOUNTS]
    options = ["--latency-ms", LATENCY_MS, "--output-tokens", str(OUTPUT_TOKENS)]
    options += ["--max-concurrent", str(CALLS_AT_ONCE), "--batch-ms", BATCH_MS]
    with (
        tempfile.TemporaryDirectory(prefix="inference-") as directory,
        servers(console) as (postgres, valkey),
    ):
        providers = [
            machine.start(
                ["promptfleet_workers.providers.simulated", "--port", str(port), *options],
                env={},
                log=LOGS / "provider.log",
            )
            for port in ports
        ]
        with machine.running(providers):
            machine.wait_for(
                lambda: all(machine.accepts_connections(port) for port in ports),
                "the provider",
                processes=providers,
                timeout_s=20,
            )
            engine = make_engine(postgres.url, application_name="benchmark")
            migrate(engine)
            yield Site(
                directory=Path(directory),
                engine=engine,
                database_url=postgres.url,
                broker_url=valkey.url,
                provider_urls=[f"http://127.0.0.1:{port}" for port in ports],
            )
            engine.dispose()


def fleet_toml(arm: Arm, urls: Sequence[str]) -> str:
    """The arm's configuration; a feature that is off is not in it."""
    text = _FLEET_TOML.format(
        cache=str(arm.has("cache")).lower(),
        compact=str(arm.has("compact")).lower(),
        strategy="peak_ewma" if arm.has("balancing") else "ordered",
    )
    for model in ("small", "middle", "large"):
        text += f'[models.{model}]\nprice_as = "openai/{_MODELS[model]}"\n'
        for account, url in zip(ACCOUNTS, urls, strict=True):
            text += f"[[models.{model}.deployments]]\n"
            text += f'name = "{model}-{account}"\nmodel = "{_MODELS[model]}"\n'
            text += f'base_url = "{url}/v1"\n'
            text += f"batch_api = {str(arm.has('batch')).lower()}\n"
            if arm.has("limits"):
                text += f'limits = {{ account = "{account}", max_concurrency = {CALLS_AT_ONCE} }}\n'
    return text


# -- a run -------------------------------------------------------------------------------------


def run(place: Site, arm: Arm, questions: Sequence[Question]) -> Answers:
    """Send the questions to a worker of this arm, and wait for all answers."""
    with redis.Redis.from_url(place.broker_url) as valkey:
        valkey.flushall()
    config = place.directory / "fleet.toml"
    config.write_text(fleet_toml(arm, place.provider_urls))
    env = {
        "PROMPTFLEET_DATABASE_URL": place.database_url,
        "PROMPTFLEET_BROKER_URL": place.broker_url,
        "PROMPTFLEET_CONFIG": str(config),
    }
    command = ["celery", "-A", "promptfleet_workers.app", "worker", "-n", "inference@%h"]
    command += ["-Q", "prompts.basic,prompts.standard,prompts.advanced", "--loglevel", "WARNING"]
    worker = machine.start(command, env=env, log=LOGS / "inference.log")
    facts: dict[str, Any] = {"database_url": place.database_url, "broker_url": place.broker_url}
    with machine.running([worker]), Client(Settings(**facts, config=config)) as client:
        _empty(place)
        for tier in ("basic", "standard", "advanced"):
            client.enqueue_prompts([f"warm-up {n}" for n in range(4)], tier=tier)
        _wait(place, 12, worker)
        _empty(place)
        _send(client, arm, questions)
        _wait(place, len(questions), worker)
    query = sa.text("SELECT metadata, model, text FROM results")
    with place.engine.connect() as connection:
        return {row.metadata["number"]: (row.model, row.text) for row in connection.execute(query)}


def _empty(place: Site) -> None:
    """Nothing was asked so far, neither here nor there."""
    with place.engine.begin() as connection:
        connection.execute(
            sa.text(
                "TRUNCATE jobs, results, ledger, callbacks, provider_batches, provider_batch_lines"
            )
        )
    for url in place.provider_urls:
        httpx.post(f"{url}/control", json={"reset": True}, timeout=10).raise_for_status()


def _send(client: Client, arm: Arm, questions: Sequence[Question]) -> None:
    """Each at its instant, whether earlier ones were answered or not."""
    start = time.monotonic()
    tier = "auto" if arm.has("tiers") else "advanced"
    for question in questions:
        time.sleep(max(0.0, start + question.at_s - time.monotonic()))
        service: Any = {"service": "batch"} if arm.has("batch") and question.patient else {}
        client.enqueue_prompt(
            question.messages,
            tier=tier,
            deadline=DAY_S,
            metadata={"number": question.number, "patient": question.patient},
            **question.options,
            **service,
        )


def _wait(place: Site, count: int, worker: Any) -> None:
    query = sa.text("SELECT count(*) FROM results")

    def ended() -> bool:
        with place.engine.connect() as connection:
            return bool(connection.execute(query).scalar_one() >= count)

    machine.wait_for(ended, "results", processes=[worker], timeout_s=TIMEOUT_S, poll_s=0.1)


def score(place: Site, arm: Arm, answers: Answers, reference: Answers) -> Score:
    """The numbers of the run that has just ended."""
    with place.engine.connect() as connection:
        rows = connection.execute(sa.text(_RESULTS)).all()
        cost: Decimal | None = connection.execute(sa.text(_COST)).scalar_one()
    stats = [httpx.get(f"{url}/stats", timeout=10).json() for url in place.provider_urls]
    times = [row.total_ms for row in rows if not row.patient]
    cuts = statistics.quantiles(times, n=20)
    comparable = [
        number
        for number, (model, _) in answers.items()
        if number in reference and model is not None and model == reference[number][0]
    ]
    return Score(
        arm=arm.name,
        cost_usd=float(cost or 0),
        calls=sum(one["prompts"] for one in stats),
        batched=sum(one["batch_lines"] for one in stats),
        refused=sum(one["rejected"].get("429", 0) for one in stats),
        p50_ms=round(cuts[9]),
        p95_ms=round(cuts[18]),
        cache_answers=sum(row.cache in {"hit", "coalesced"} for row in rows),
        comparable=len(comparable),
        equal=sum(answers[number][1] == reference[number][1] for number in comparable),
        jobs=len(rows),
        succeeded=sum(row.state == "succeeded" for row in rows),
        by_tier=_counted(row.tier for row in rows),
        models=_counted(str(row.model) for row in rows),
    )


def _counted(names: Iterator[str]) -> dict[str, int]:
    listed = sorted(names)
    return {name: listed.count(name) for name in dict.fromkeys(listed)}


# -- the report --------------------------------------------------------------------------------


def reached(scores: Sequence[Score]) -> dict[str, bool]:
    """The goals and whether they are met; none if the two arms were not both measured."""
    by_name = {score.arm: score for score in scores}
    if not {BASELINE, ALL} <= by_name.keys():
        return {}
    base, best = by_name[BASELINE], by_name[ALL]
    saved = 1 - best.cost_usd / base.cost_usd
    return {
        f"cost down by {saved:.1%} (goal {COST_DOWN_BY:.0%})": saved >= COST_DOWN_BY,
        f"{best.refused} calls answered 429 (goal 0)": best.refused == 0,
        f"p95 {best.p95_ms:,.0f} ms (goal: the baseline's {base.p95_ms:,.0f} ms at most)": (
            best.p95_ms <= base.p95_ms
        ),
        f"{best.succeeded} of {best.jobs} jobs succeeded (goal: all)": best.succeeded == best.jobs,
    }


def _saved(score: Score, scores: Sequence[Score]) -> float | None:
    base = next((other for other in scores if other.arm == BASELINE), None)
    return None if base is None else 1 - score.cost_usd / base.cost_usd


def _table(scores: Sequence[Score], questions: Sequence[Question]) -> Table:
    patient = sum(question.patient for question in questions)
    table = Table(
        title=f"{len(questions)} prompts, {repeats(questions)} of them repeats, {patient} without "
        f"hurry; {os.cpu_count()} cores, Python {platform.python_version()}",
        caption="ms of those that are in a hurry; equal: to the baseline's answer, where the model "
        "is the same",
    )
    table.add_column("arm")
    for title in ("cost", "saved", "calls", "429s", "p50", "p95", "cached", "equal", "succeeded"):
        table.add_column(title, justify="right")
    for score in scores:
        saved = _saved(score, scores)
        table.add_row(
            score.arm,
            f"${score.cost_usd:.4f}",
            "" if saved is None else f"{saved:.1%}",
            f"{score.calls} ({score.batched} batched)" if score.batched else f"{score.calls}",
            str(score.refused),
            f"{score.p50_ms:,.0f}",
            f"{score.p95_ms:,.0f}",
            str(score.cache_answers),
            f"{score.equal} of {score.comparable}",
            f"{score.succeeded} of {score.jobs}",
        )
    return table


def repeats(questions: Sequence[Question]) -> int:
    """Questions that were asked before, to the letter."""
    return len(questions) - len(
        {json.dumps([question.messages, question.options]) for question in questions}
    )


def write_report(
    scores: Sequence[Score],
    goals: Mapping[str, bool],
    questions: Sequence[Question],
    *,
    quick: bool,
) -> Path:
    """Write `inference.json`; an arm that was not measured is not in it."""
    report = {
        "arms": [{**dataclasses.asdict(score), "saved": _saved(score, scores)} for score in scores],
        "goals": [{"text": text, "met": met} for text, met in goals.items()],
        "prompts": len(questions),
        "repeats": repeats(questions),
        "patient": sum(question.patient for question in questions),
        "seconds": questions[-1].at_s,
        "models": _MODELS,
        "calls_at_once": CALLS_AT_ONCE,
        "accounts": len(ACCOUNTS),
        "latency_ms": LATENCY_MS,
        "output_tokens": OUTPUT_TOKENS,
        "seed": SEED,
        "quick": quick,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    path = RESULTS / "inference.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


_MODELS = {"small": "gpt-4.1-nano", "middle": "gpt-4.1-mini", "large": "gpt-4.1"}
_RESULTS = """
SELECT total_ms, state, cache, tier, model, (metadata ->> 'patient')::bool AS patient FROM results
"""
_COST = "SELECT sum(coalesce(cost_usd, 0) + coalesce(estimated_usd, 0)) FROM ledger"
_FLEET_TOML = """
default_tier = "standard"
[cache]
enabled = {cache}
[compact]
enabled = {compact}
[balancing]
strategy = "{strategy}"
[batch_service]
gather_s = 2
poll_s = 0.5
[tiers.basic]
models = ["small"]
[tiers.standard]
models = ["middle"]
[tiers.advanced]
models = ["large"]
"""

if __name__ == "__main__":
    main()
