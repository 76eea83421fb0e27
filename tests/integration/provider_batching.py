"""A worker's parts for providers' batches, and a simulated provider with both batch APIs."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import orjson
import sqlalchemy as sa
from tests.rows import spec

from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import Doorbell, JobSpec
from promptfleet_shared.pricing import Pricer
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.sweeping import Sweep, sweep
from promptfleet_workers.batching import DoorbellWait, Slots
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.budgets import Budgets
from promptfleet_workers.caching.memory import MemoryCache
from promptfleet_workers.calling import Caller
from promptfleet_workers.claims import Claims
from promptfleet_workers.endings import Endings
from promptfleet_workers.escalation import Escalation
from promptfleet_workers.pipeline import Pipeline
from promptfleet_workers.provider_batches.building import BatchParts
from promptfleet_workers.provider_batches.pricing import BatchPricer
from promptfleet_workers.providers.batch_building import build_batch_apis
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.simulated.http import HttpServer
from promptfleet_workers.providers.simulated.options import Options
from promptfleet_workers.providers.simulated.server import SimulatedProvider
from promptfleet_workers.routing import Router
from promptfleet_workers.telemetry import Event
from promptfleet_workers.token_streams import TokenStreams

DEADLINE_S = 20.0
PRICES = {"openai": "openai/gpt-4o-mini", "anthropic": "anthropic/claude-haiku-4-5"}
FLEET = """
default_tier = "basic"
[batch]
batch_window_ms = 1
[retry]
retry_delay_ms = 1
[batch_service]
gather_s = {gather_s}
poll_s = {poll_s}
settle_s = {settle_s}
spill_before_s = 30
max_lines = {max_lines}
[tiers.basic]
models = ["m"]
[models.m]
price_as = "{price_as}"
deployments = [
  {{ name = "d", provider = "{provider}", base_url = "{base_url}", batch_api = {batch_api} }},
]
"""


def fleet_of(
    provider: str,
    url: str,
    *,
    gather_s: float = 0.01,
    poll_s: float = 0.05,
    settle_s: float = 0.1,
    max_lines: int = 1000,
    batch_api: bool = True,
    more: str = "",
) -> Fleet:
    """One deployment of that provider at `url`; `more` goes into fleet.toml."""
    return parse_fleet(
        FLEET.format(
            provider=provider,
            base_url=f"{url}/v1",
            price_as=PRICES[provider],
            gather_s=gather_s,
            poll_s=poll_s,
            settle_s=settle_s,
            max_lines=max_lines,
            batch_api=str(batch_api).lower(),
        )
        + more
    )


def batch_job(text: str, **fields: object) -> JobSpec:
    """A job of `service="batch"` with an hour to live."""
    values: dict[str, object] = {"policy": {"service": "batch"}, "deadline_s": 3600.0, **fields}
    return spec(text, **values)


class Station:
    """One worker's pipeline and batch service, without Celery, heartbeat and sweeper."""

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        *,
        lease_s: float = 30.0,
        make_budgets: Callable[[Station], Budgets] | None = None,
    ) -> None:
        self.fleet = fleet
        self.database = AsyncDatabase(url, application_name="tests", pool_size=3)
        self.client = HttpClient()
        self.rung: list[Doorbell] = []
        self.events: list[Event] = []
        self.told: set[uuid.UUID] = set()
        self.woken = asyncio.Event()
        self.cache = MemoryCache()
        self.slots, self.claims = Slots(64), Claims()
        self.budgets = make_budgets(self) if make_budgets else None
        providers = {
            deployment.name: build_provider(deployment, self.client)
            for model in fleet.models.values()
            for deployment in model.deployments
        }
        router = Router(fleet, providers)
        endings = self._endings(Pricer(), self.slots, self.claims)
        pricer = BatchPricer()
        self.batches = BatchParts.of(
            database=self.database,
            fleet=fleet,
            router=router,
            apis=build_batch_apis(fleet, self.client),
            endings=endings,
            landing=self._endings(pricer, Slots(64), Claims()),
            pricer=pricer,
            owner="station",
            retention_s=0.0,
            ring=self.rung.extend,
            lease_s=lease_s,
            budgets=self.budgets,
        )
        self.service = self.batches.service
        caller = Caller(
            database=self.database,
            fleet=fleet,
            breakers=Breakers.of(fleet, calls=64, emit=self.events.append),
            claims=self.claims,
            endings=endings,
            streams=TokenStreams("redis://127.0.0.1:1"),
            calls=64,
            budgets=self.budgets,
        )
        self.pipeline = Pipeline(
            database=self.database,
            fleet=fleet,
            router=router,
            cache=self.cache,
            claims=self.claims,
            endings=endings,
            caller=caller,
            worker="station",
            lease_s=30,
            ring=self.rung.extend,
            emit=self.events.append,
            batch_service=self.batches.handover,
        )

    def _endings(self, pricer: Pricer, slots: Slots, claims: Claims) -> Endings:
        return Endings(
            judge=Escalation(self.fleet),
            database=self.database,
            fleet=self.fleet,
            cache=self.cache,
            pricer=pricer,
            claims=claims,
            slots=slots,
            streams=TokenStreams("redis://127.0.0.1:1"),
            patience_s=5,
            ring=self._ring,
            announce=self.told.update,
            wake_callbacks=self.woken.set,
            emit=self.events.append,
            spending=self.budgets,
        )

    def _ring(self, doorbells: Iterable[Doorbell]) -> None:
        self.rung.extend(doorbells)

    async def give(self, ids: Sequence[uuid.UUID]) -> None:
        """Doorbells for these jobs, until each has been seen to."""
        async with asyncio.timeout(DEADLINE_S):
            for start in range(0, len(ids), 50):
                some = ids[start : start + 50]
                assert self.slots.take(len(some)) == len(some)
                wait = DoorbellWait(len(some))
                self.pipeline.take("basic", some, wait)
                await asyncio.wrap_future(wait.done)

    async def look(self) -> None:
        """One look at what is due, and everything that follows from it."""
        async with asyncio.timeout(DEADLINE_S):
            await self.service.look()
            await self.service.idle()

    async def aclose(self) -> None:
        await self.pipeline.drain(0.0)
        if self.budgets is not None:
            await self.budgets.aclose()
        await self.client.aclose()
        await self.database.close()


@contextlib.asynccontextmanager
async def simulated(**options: object) -> AsyncIterator[tuple[SimulatedProvider, str]]:
    """The simulated provider in this process, and its address."""
    provider = SimulatedProvider(Options().changed(options))
    server = HttpServer(provider)
    port = await server.start("127.0.0.1", 0)
    try:
        yield provider, f"http://127.0.0.1:{port}"
    finally:
        await server.drain(0.0)


def batch_rows(database: sa.Engine) -> list[sa.RowMapping]:
    """The providers' batches, the oldest first."""
    query = sa.text("SELECT * FROM provider_batches ORDER BY id")
    with database.connect() as connection:
        return list(connection.execute(query).mappings())


def line_count(database: sa.Engine) -> int:
    """Lines that are written down."""
    query = sa.text("SELECT count(*) FROM provider_batch_lines")
    with database.connect() as connection:
        return int(connection.execute(query).scalar_one())


def due_now(database: sa.Engine) -> None:
    """As if somebody had to look at every batch now."""
    with database.begin() as connection:
        connection.execute(
            sa.text("UPDATE provider_batches SET lease_until = clock_timestamp() - interval '1 s'")
        )


def sweep_once(database: sa.Engine) -> Sweep:
    """One sweep."""
    with database.begin() as connection:
        return sweep(connection)


def calls_of(provider: SimulatedProvider) -> list[int]:
    """How often each prompt was answered, by a batch or by itself."""
    return sorted(provider.stats.calls.values())


def decoded(value: bytes) -> object:
    """A JSON body."""
    return orjson.loads(value)
