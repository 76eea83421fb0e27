"""A worker's parts for every tier of a fleet, without Celery: what is rung is taken at once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson
import sqlalchemy as sa
from tests.rows import Row, job_row, ledger_rows, result_rows

from promptfleet.requests import Defaults, make_spec
from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import Doorbell, JobSpec, Usage
from promptfleet_shared.pricing import Pricer
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.submissions import insert_jobs
from promptfleet_workers.batching import DoorbellWait, Slots
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.caching.memory import MemoryCache
from promptfleet_workers.calling import Caller
from promptfleet_workers.claims import Claims
from promptfleet_workers.endings import Endings
from promptfleet_workers.escalation import Escalation
from promptfleet_workers.pipeline import Pipeline
from promptfleet_workers.providers.protocol import Answer, Call, Completion
from promptfleet_workers.routing import Router
from promptfleet_workers.shadowing import Shadows
from promptfleet_workers.telemetry import Event
from promptfleet_workers.tiering import Tiering
from promptfleet_workers.token_streams import TokenStreams
from promptfleet_workers.triage import Triage

DEADLINE_S = 10.0
FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 1
[retry]
retry_delay_ms = 1
{routing}
[tiers.basic]
models = ["small"]
{basic}
[tiers.standard]
models = ["middle"]
{standard}
[tiers.advanced]
models = ["large"]
{advanced}
[models.small]
price_as = "openai/gpt-4o-mini"
deployments = [{{ base_url = "http://small" }}]
[models.middle]
price_as = "openai/gpt-4o"
deployments = [{{ base_url = "http://middle" }}]
[models.large]
price_as = "openai/gpt-4o"
deployments = [{{ base_url = "http://large" }}]
"""
Behaviour = Callable[[Call], Awaitable[list[Answer]]]


def saying(*texts: str, finish_reason: str = "stop") -> Behaviour:
    """Answers each request with the next text, and the last one from then on."""
    left = list(texts)

    async def answer(call: Call) -> list[Answer]:
        answers: list[Answer] = []
        for _ in call.requests:
            text = left.pop(0) if len(left) > 1 else left[0]
            answers.append(
                Completion(
                    text=text,
                    response=orjson.dumps({"text": text}),
                    finish_reason=finish_reason,
                    usage=Usage(input=10, output=5),
                )
            )
        return answers

    return answer


class Model:
    """Does what the test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = saying("fine")
        self.calls: list[Call] = []
        self.changed = asyncio.Event()

    async def call(self, call: Call) -> list[Answer]:
        self.calls.append(call)
        self.changed.set()
        return await self.behaviour(call)

    async def asked(self) -> None:
        """Until it was called."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.calls:
                self.changed.clear()
                await self.changed.wait()

    async def aclose(self) -> None:
        pass


class TierRig:
    """Workers of all tiers in this process; `follow` lets doorbells be heard."""

    def __init__(self, url: str, rows: sa.Engine, **toml: str) -> None:
        self.rows = rows
        parts = {"routing": "", "basic": "", "standard": "", "advanced": "", **toml}
        self.fleet: Fleet = parse_fleet(FLEET.format(**parts))
        self.database = AsyncDatabase(url, application_name="tests", pool_size=3)
        self.models = {name: Model() for name in ("small", "middle", "large")}
        self.slots, self.claims = Slots(64), Claims()
        streams = TokenStreams("redis://127.0.0.1:1")  # no job here streams
        self.events: list[Event] = []
        self.rung: list[Doorbell] = []
        self.follow = True
        self._waits: list[DoorbellWait] = []
        self.cache = MemoryCache()
        router = Router(self.fleet, self.models)
        triage = Triage(fleet=self.fleet, cache=self.cache)
        self.shadows = Shadows(database=self.database, fleet=self.fleet, ring=self.ring)
        self.endings = Endings(
            database=self.database,
            fleet=self.fleet,
            cache=self.cache,
            pricer=Pricer(),
            claims=self.claims,
            slots=self.slots,
            streams=streams,
            patience_s=5,
            ring=self.ring,
            announce=lambda _: None,
            wake_callbacks=lambda: None,
            emit=self.events.append,
            judge=Escalation(self.fleet),
            triage=triage,
            shadows=self.shadows,
        )
        self.caller = Caller(
            database=self.database,
            fleet=self.fleet,
            breakers=Breakers.of(self.fleet, calls=64, emit=self.events.append),
            claims=self.claims,
            endings=self.endings,
            streams=streams,
            calls=64,
        )
        self.pipeline = Pipeline(
            database=self.database,
            fleet=self.fleet,
            router=router,
            cache=self.cache,
            claims=self.claims,
            endings=self.endings,
            caller=self.caller,
            worker="rig",
            lease_s=30,
            ring=self.ring,
            emit=self.events.append,
            tiering=Tiering(fleet=self.fleet, router=router, triage=triage, endings=self.endings),
        )

    def accept(self, prompt: object = "Hi", **options: Any) -> JobSpec:
        """Submit as a producer with this fleet.toml does."""
        made = Defaults(
            tier=self.fleet.default_tier,
            tiers=self.fleet.tier_names,
            chooser=self.fleet.tier_chooser(),
        )
        spec = make_spec(prompt, options, made)
        with self.rows.begin() as connection:
            insert_jobs(connection, [spec])
        return spec

    def ring(self, doorbells: Iterable[Doorbell]) -> None:
        """What a worker of each tier hears."""
        for bell in doorbells:
            self.rung.append(bell)
            if self.follow:
                self.take(bell.tier, bell.job_id)

    def take(self, tier: str, *ids: uuid.UUID) -> None:
        """As a Celery task of that tier does."""
        assert self.slots.take(len(ids)) == len(ids)
        wait = DoorbellWait(len(ids))
        self._waits.append(wait)
        self.pipeline.take(tier, ids, wait)

    async def run(self, *specs: JobSpec) -> None:
        """Ring for jobs, and see to all that comes of it."""
        for spec in specs:
            self.take(spec.tier, spec.id)
        await self.settled()

    async def settled(self) -> None:
        """Until no doorbell is waited for, and nothing is left to write."""
        async with asyncio.timeout(DEADLINE_S):
            while self._waits or self.shadows._inserts:
                for wait in self._waits[:]:
                    await asyncio.wrap_future(wait.done)
                    self._waits.remove(wait)
                await self.shadows.drain()
                await asyncio.sleep(0.001)  # a ring comes by the loop's timer

    def result(self, job_id: uuid.UUID) -> Row:
        """The one results row of a job."""
        (row,) = result_rows(self.rows, job_id)
        return row

    def job(self, job_id: uuid.UUID) -> Row:
        """The row of a job."""
        return job_row(self.rows, job_id)

    def bill(self, job_id: uuid.UUID) -> list[tuple[str, str | None, int, int]]:
        """Of each of its ledger rows: tier, deployment, calls and tokens."""
        return [
            (r["tier"], r["deployment"], r["calls"], r["input_tokens"] + r["output_tokens"])
            for r in sorted(ledger_rows(self.rows, job_id), key=lambda row: int(row["id"]))
        ]

    def asked(self, model: str) -> list[dict[str, Any]]:
        """The requests that a model was sent."""
        return [orjson.loads(r) for call in self.models[model].calls for r in call.requests]

    async def close(self) -> None:
        """Give back what is held."""
        self.follow = False
        async with asyncio.timeout(DEADLINE_S):
            await self.pipeline.drain(0.0)
        await self.database.close()
