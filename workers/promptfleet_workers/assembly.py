"""How a worker is put together: each part is made when another first asks for it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import cached_property

from celery import Celery

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.parking import ParkingLot
from promptfleet_shared.pricing import Pricer
from promptfleet_shared.queueing import MAX_IDS, Ringer, queue_depths
from promptfleet_shared.settings import Settings, default_worker_name
from promptfleet_shared.signing import split_secrets
from promptfleet_shared.store.database import AsyncDatabase, Database
from promptfleet_workers.background import keep_running
from promptfleet_workers.balancing.balancer import Balancer
from promptfleet_workers.balancing.load_exchange import LoadExchange
from promptfleet_workers.batching import Slots
from promptfleet_workers.breaker_exchange import BreakerExchange
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.budget_notices import BudgetNotices
from promptfleet_workers.budgets import Budgets
from promptfleet_workers.caching.building import build_caching
from promptfleet_workers.caching.parts import Caching
from promptfleet_workers.callbacks import Deliverer, DeliveryOptions
from promptfleet_workers.calling import Caller
from promptfleet_workers.claims import Claims, Heartbeat
from promptfleet_workers.context.errands import Errands
from promptfleet_workers.context.fitter import Fitter
from promptfleet_workers.egress import GuardedClient
from promptfleet_workers.endings import Endings
from promptfleet_workers.escalation import Escalation
from promptfleet_workers.event_loop import EventLoop
from promptfleet_workers.feeder import Feeder
from promptfleet_workers.finish_notices import FinishNotices
from promptfleet_workers.health import HealthServer, Vitals
from promptfleet_workers.metrics import PrometheusHook
from promptfleet_workers.pipeline import Pipeline
from promptfleet_workers.provider_batches.building import BatchParts
from promptfleet_workers.provider_batches.pricing import BatchPricer
from promptfleet_workers.providers.batch_building import build_batch_apis
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.providers.protocol import Provider
from promptfleet_workers.queues import QueueWatch
from promptfleet_workers.rate_limits.building import Limiting
from promptfleet_workers.rate_limits.quotas import Quotas
from promptfleet_workers.routing import Router
from promptfleet_workers.shadowing import Shadows
from promptfleet_workers.sweeper import Sweeper
from promptfleet_workers.telemetry import Emit, LogHook, emit_to
from promptfleet_workers.tiering import Tiering
from promptfleet_workers.token_streams import TokenStreams
from promptfleet_workers.triage import Triage
from promptfleet_workers.watchdog import Watchdog, WorkQuestion
from promptfleet_workers.worker import Parts

SECONDS_A_DAY = 86_400


class Builder:
    """Builds a worker's parts from its settings."""

    def __init__(
        self, settings: Settings, fleet: Fleet, *, app: Celery, lot: ParkingLot, ringer: Ringer
    ) -> None:
        """Read-only: nothing is built yet."""
        self._settings = settings
        self._fleet = fleet
        self._app = app
        self._lot = lot
        self._ringer = ringer

    async def __call__(self, tiers: Sequence[str], loop: EventLoop) -> Parts:
        """Build the parts of a worker that serves these tiers, on its event loop.

        What was opened is closed again if a later part can't be built.
        """
        opened = AsyncExitStack()
        opened.callback(self._ringer.flush)
        assembly = _Assembly(
            self._settings,
            self._fleet,
            tiers,
            loop,
            app=self._app,
            lot=self._lot,
            ringer=self._ringer,
            opened=opened,
        )
        try:
            return await assembly.parts()
        except BaseException:
            await opened.aclose()
            raise


class _Assembly:
    """The parts of one worker; those that others stand on are made first, and closed last."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        tiers: Sequence[str],
        loop: EventLoop,
        *,
        app: Celery,
        lot: ParkingLot,
        ringer: Ringer,
        opened: AsyncExitStack,
    ) -> None:
        """Make nothing yet; what is opened is left to `opened` to close."""
        self._settings = settings
        self._fleet = fleet
        self._tiers = tiers
        self._loop = loop
        self._app = app
        self._lot = lot
        self._ring = ringer.ring
        self._opened = opened
        self._name = settings.worker_name or default_worker_name()
        self._redis_url = settings.broker_url.get_secret_value()
        self._database_url = settings.database_url.get_secret_value()
        self._calls = sum(fleet.batch_options(tier).max_concurrent_calls for tier in tiers) or 1

    async def parts(self) -> Parts:
        """All of them, each at its work beside the others."""
        exchange = BreakerExchange(self.breakers, self._redis_url)
        await exchange.exchange()  # so that the first call knows of a breaker that is open
        self._keep_running("breakers", exchange.run, then=exchange.aclose)
        loads = LoadExchange(self.balancer.places, self._redis_url)
        self._keep_running("loads", loads.run, then=loads.aclose)
        if self.balancer.balances:
            self.observers.metrics.watch_loads(self.balancer.loads)
        pipeline = self.pipeline
        if self.batches is not None:
            self._keep_running("batches", self.batches.service.run)
        beats = Database(self._database_url, application_name="promptfleet-heartbeat")
        vitals = self.observers.vitals([self.database, beats])
        return Parts(
            pipeline=pipeline,
            sweeper=self.sweeper,
            deliverer=self.deliverer,
            feeder=self.feeder,
            heartbeat=Heartbeat(
                beats, self.claims, lease_s=self._settings.lease_s, on_loop=self._loop.call
            ),
            claims=self.claims,
            slots=self.slots,
            vitals=vitals,
            watchdog=self.observers.watchdog,
            health=self.observers.health(vitals),
            close=self._opened.aclose,
        )

    def _keep_running(
        self,
        name: str,
        run: Callable[[], Awaitable[None]],
        *,
        then: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Run it until the worker is closed: `then` lets it end, and what is left is cancelled."""
        self._opened.callback(asyncio.create_task(keep_running(name, run)).cancel)
        if then is not None:
            self._opened.push_async_callback(then)

    # -- what all stand on ---------------------------------------------------------------------

    @cached_property
    def database(self) -> AsyncDatabase:
        database = AsyncDatabase(
            self._database_url,
            application_name="promptfleet-worker",
            pool_size=self._settings.database_pool_size,
        )
        self._opened.push_async_callback(database.close)
        return database

    @cached_property
    def claims(self) -> Claims:
        return Claims()

    @cached_property
    def slots(self) -> Slots:
        return Slots(self._calls, reserve=self._fleet.fairness.reserved(self._calls))

    @cached_property
    def feeder(self) -> Feeder:
        """Who keeps the queues of the tiers filled."""
        chunks = {}
        for tier in self._tiers:
            options = self._fleet.batch_options(tier)
            chunks[tier] = min(MAX_IDS, options.max_batch_size, options.max_concurrent_calls)
        return Feeder(self._app, self._lot, self._fleet.fairness, worker=self._name, chunks=chunks)

    @cached_property
    def observers(self) -> Observers:
        return Observers(
            self._settings,
            self._tiers,
            self._loop,
            queues=QueueWatch(functools.partial(queue_depths, self._app)),
            claims=self.claims,
            slots=self.slots,
            calls=self._calls,
            feeder=self.feeder,
        )

    @cached_property
    def emit(self) -> Emit:
        return emit_to([LogHook(), self.observers.metrics, self.observers.watchdog.hear])

    # -- how answers come ----------------------------------------------------------------------

    @cached_property
    def client(self) -> HttpClient:
        client = HttpClient()
        self._opened.push_async_callback(client.aclose)
        return client

    @cached_property
    def providers(self) -> dict[str, Provider]:
        """By their deployments' names."""
        providers = {
            deployment.name: build_provider(deployment, self.client)
            for model in self._fleet.models.values()
            for deployment in model.deployments
        }
        for provider in providers.values():
            self._opened.push_async_callback(provider.aclose)
        return providers

    @cached_property
    def router(self) -> Router:
        return Router(self._fleet, self.providers)

    @cached_property
    def breakers(self) -> Breakers:
        return Breakers.of(self._fleet, calls=self._calls, emit=self.emit)

    @cached_property
    def balancer(self) -> Balancer:
        return Balancer.of(self._fleet, health=self.breakers, pricer=self.pricer)

    @cached_property
    def quotas(self) -> Quotas | None:
        """None where fleet.toml has no limits."""
        limiting = Limiting.of(self._fleet, self._redis_url, self.pricer, self.database)
        if limiting is None:
            return None
        self._opened.push_async_callback(limiting.aclose)
        self.observers.metrics.registry.register(limiting.quotas.counts)
        return limiting.quotas

    @cached_property
    def caching(self) -> Caching:
        caching = build_caching(
            self._fleet,
            self._settings.cache_server_url,
            router=self.router,
            health=self.breakers,
            prices=self.pricer,
            limits=self.quotas,
            money=self.budgets,
        )
        self._opened.push_async_callback(caching.aclose)
        return caching

    @cached_property
    def streams(self) -> TokenStreams:
        streams = TokenStreams(self._settings.cache_server_url)
        self._opened.push_async_callback(streams.aclose)
        return streams

    @cached_property
    def caller(self) -> Caller:
        return Caller(
            database=self.database,
            fleet=self._fleet,
            breakers=self.breakers,
            claims=self.claims,
            endings=self.endings,
            streams=self.streams,
            calls=self._calls,
            balancer=self.balancer,
            quotas=self.quotas,
            budgets=self.budgets,
        )

    # -- what they cost ------------------------------------------------------------------------

    @cached_property
    def pricer(self) -> Pricer:
        return Pricer()

    @cached_property
    def budgets(self) -> Budgets | None:
        """Who keeps the fleet within its budgets; None where it has none."""
        if not self._fleet.budgets:
            return None
        notices = BudgetNotices(
            self.database,
            tenant=self._settings.tenant,
            wake_callbacks=self.deliverer.wake,
            emit=self.emit,
        )
        budgets = Budgets(
            self._fleet,
            url=self._redis_url,
            database=self.database,
            prices=self.pricer,
            notices=notices,
            emit=self.emit,
        )
        self._keep_running("budgets", budgets.run, then=budgets.aclose)
        return budgets

    # -- how jobs end --------------------------------------------------------------------------

    @cached_property
    def notices(self) -> FinishNotices:
        notices = FinishNotices(self._settings.cache_server_url)
        self._opened.push_async_callback(notices.aclose)
        return notices

    @cached_property
    def deliverer(self) -> Deliverer:
        """Who delivers callbacks; its own connections never wait for those of jobs."""
        deliverer = build_deliverer(self._settings, self.emit)
        self._opened.push_async_callback(deliverer.aclose)
        return deliverer

    @cached_property
    def triage(self) -> Triage:
        return Triage(fleet=self._fleet, cache=self.caching.cache)

    @cached_property
    def endings(self) -> Endings:
        shadows = None
        if self._fleet.routing.shadow.share > 0:
            shadows = Shadows(database=self.database, fleet=self._fleet, ring=self._ring)
        return Endings(
            judge=Escalation(self._fleet),
            triage=self.triage,
            shadows=shadows,
            database=self.database,
            fleet=self._fleet,
            cache=self.caching.cache,
            filling=self.caching.filling,
            pricer=self.pricer,
            claims=self.claims,
            slots=self.slots,
            streams=self.streams,
            patience_s=self._settings.lease_s,
            ring=self._ring,
            announce=self.notices.tell,
            wake_callbacks=self.deliverer.wake,
            emit=self.emit,
            feed=self.feeder,
            spending=self.budgets,
        )

    def landing(self, pricer: BatchPricer) -> Endings:
        """How lines of providers' batches end: nobody here waits for them or holds a slot."""
        return Endings(
            judge=Escalation(self._fleet),
            database=self.database,
            fleet=self._fleet,
            cache=self.caching.cache,
            filling=self.caching.filling,
            pricer=pricer,
            claims=Claims(),
            slots=Slots(self._calls),
            streams=self.streams,
            patience_s=self._settings.lease_s,
            ring=self._ring,
            announce=self.notices.tell,
            wake_callbacks=self.deliverer.wake,
            emit=self.emit,
            spending=self.budgets,
        )

    # -- the whole of it -----------------------------------------------------------------------

    @cached_property
    def batches(self) -> BatchParts | None:
        """What sees to providers' own batches; None where no deployment has a batch API."""
        apis = build_batch_apis(self._fleet, self.client)
        if not apis:
            return None
        pricer = BatchPricer()
        return BatchParts.of(
            database=self.database,
            fleet=self._fleet,
            router=self.router,
            apis=apis,
            endings=self.endings,
            landing=self.landing(pricer),
            pricer=pricer,
            owner=self._name,
            retention_s=self._settings.retention_days * SECONDS_A_DAY,
            ring=self._ring,
            budgets=self.budgets,
        )

    @cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline(
            database=self.database,
            batch_service=self.batches.handover if self.batches is not None else None,
            fleet=self._fleet,
            router=self.router,
            tiering=Tiering(
                fleet=self._fleet, router=self.router, triage=self.triage, endings=self.endings
            ),
            cache=self.caching.cache,
            caching=self.caching,
            claims=self.claims,
            endings=self.endings,
            caller=self.caller,
            balancer=self.balancer,
            fitter=Fitter(
                database=self.database,
                fleet=self._fleet,
                endings=self.endings,
                errands=Errands(self.database, self._ring),
            ),
            worker=self._name,
            lease_s=self._settings.lease_s,
            ring=self._ring,
            emit=self.emit,
            feed=self.feeder,
        )

    @cached_property
    def sweeper(self) -> Sweeper:
        memory_days = self._fleet.memory.retention_days
        return Sweeper(
            database=self.database,
            tiers=self._tiers,
            interval_s=self._settings.sweep_interval_s,
            retention_s=self._settings.retention_days * SECONDS_A_DAY,
            memory_s=memory_days and memory_days * SECONDS_A_DAY,
            ring=self._ring,
            empty_queues=self.observers.queues.empty,
            emit=self.emit,
            parked=self.feeder,
        )


def build_deliverer(settings: Settings, emit: Emit) -> Deliverer:
    """Who delivers callbacks; has connections of its own, so that it never waits for the jobs'."""
    return Deliverer(
        database=AsyncDatabase(
            settings.database_url.get_secret_value(),
            application_name="promptfleet-callbacks",
            pool_size=2,
        ),
        client=GuardedClient(allow_loopback=settings.callback_allow_loopback),
        options=DeliveryOptions(
            secrets=split_secrets(settings.callback_secrets.get_secret_value()),
            delays_s=settings.callback_delays_s,
            timeout_s=settings.callback_timeout_s,
            concurrency=settings.callback_concurrency,
            endpoint_concurrency=settings.callback_endpoint_concurrency,
            poll_s=settings.callback_poll_s,
            public_url=settings.public_url,
        ),
        emit=emit,
    )


class Observers:
    """What watches a worker: its metrics, its watchdog, and what its health page shows."""

    def __init__(
        self,
        settings: Settings,
        tiers: Sequence[str],
        loop: EventLoop,
        *,
        queues: QueueWatch,
        claims: Claims,
        slots: Slots,
        calls: int,
        feeder: Feeder,
    ) -> None:
        """Build what needs to hear of events; `calls` is how many may be in flight."""
        self._settings = settings
        self._tiers = tiers
        self._claims = claims
        self._slots = slots
        self._calls = calls
        self.metrics = PrometheusHook()
        self.metrics.watch_parking(tiers, feeder.parked)
        self.queues = queues
        self.watchdog = Watchdog(
            limit_s=settings.watchdog_s,
            on_loop=loop.call,
            # What has ended and waits to be written needs no room.
            has_room=lambda: len(claims.fences()) - slots.unwritten < calls - slots.reserve,
            work_waits=WorkQuestion(
                database=Database(
                    settings.database_url.get_secret_value(),
                    application_name="promptfleet-watchdog",
                ),
                ask_broker=lambda: self.queues.look(tiers),
                tiers=tiers,
                for_s=settings.watchdog_s / 2,
                held_back=feeder.all_blocked,
            ),
        )

    def vitals(self, databases: Sequence[AsyncDatabase | Database]) -> Vitals:
        """The vitals of a worker that commits to these; the metrics show them, too."""
        settings, claims, slots = self._settings, self._claims, self._slots
        vitals = Vitals(
            databases=databases,
            broker=self.queues,
            tiers=self._tiers,
            stale_s=settings.health_stale_s,
            sweep_interval_s=settings.sweep_interval_s,
        )
        self.metrics.watch(
            worker=settings.worker_name or default_worker_name(),
            tiers=self._tiers,
            slots=self._calls,
            slots_free=lambda: slots.free,
            jobs_held=lambda: len(claims.fences()),
            commit_age_s=lambda: vitals.commit_age_s,
            watchdog_idle_s=lambda: self.watchdog.idle_s,
        )
        return vitals

    def health(self, vitals: Vitals) -> HealthServer | None:
        """The server of these vitals, unless the settings want none."""
        if self._settings.health_port is None:
            return None
        return HealthServer(
            vitals,
            host=self._settings.health_host,
            port=self._settings.health_port,
            metrics=self.metrics.page,
            ask_broker=lambda: self.queues.empty(self._tiers),
        )
