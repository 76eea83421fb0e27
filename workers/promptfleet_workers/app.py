"""The composition root: reads the settings, builds everything, exports the Celery app.

`celery -A promptfleet_workers.app worker -Q prompts.basic` starts a worker.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from promptfleet_shared.fleet import Fleet, load_fleet
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.parking import ParkingLot
from promptfleet_shared.pricing import Pricer
from promptfleet_shared.queueing import MAX_IDS, Ringer, make_celery, publish, queue_depths
from promptfleet_shared.settings import Settings, default_worker_name, load_settings
from promptfleet_shared.signing import split_secrets
from promptfleet_shared.store.database import AsyncDatabase, Database
from promptfleet_workers import gate, logs, tasks
from promptfleet_workers.background import keep_running
from promptfleet_workers.balancing.balancer import Balancer
from promptfleet_workers.balancing.load_exchange import LoadExchange
from promptfleet_workers.batching import Slots
from promptfleet_workers.breaker_exchange import BreakerExchange
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.budget_notices import BudgetNotices
from promptfleet_workers.budgets import Budgets
from promptfleet_workers.caching.building import build_caching
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
from promptfleet_workers.providers.batch_protocol import BatchApi
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.queues import QueueWatch
from promptfleet_workers.rate_limits.building import Limiting
from promptfleet_workers.routing import Router
from promptfleet_workers.shadowing import Shadows
from promptfleet_workers.sweeper import Sweeper
from promptfleet_workers.telemetry import Emit, LogHook, emit_to
from promptfleet_workers.tiering import Tiering
from promptfleet_workers.token_streams import TokenStreams
from promptfleet_workers.triage import Triage
from promptfleet_workers.watchdog import Watchdog, WorkQuestion
from promptfleet_workers.worker import FleetWorker, Parts

SECONDS_A_DAY = 86_400


class Builder:
    """Builds a worker's parts from its settings."""

    def __init__(self, settings: Settings, fleet: Fleet, ringer: Ringer) -> None:
        """Read-only: nothing is built yet."""
        self._settings = settings
        self._fleet = fleet
        self._ringer = ringer

    async def __call__(self, tiers: Sequence[str], loop: EventLoop) -> Parts:  # noqa: PLR0915 - one part after the other
        """Build the parts of a worker that serves these tiers, on its event loop."""
        settings, fleet = self._settings, self._fleet
        url = settings.database_url.get_secret_value()
        database = AsyncDatabase(
            url, application_name="promptfleet-worker", pool_size=settings.database_pool_size
        )
        beats = Database(url, application_name="promptfleet-heartbeat")
        client = HttpClient()
        providers = {
            deployment.name: build_provider(deployment, client)
            for model in fleet.models.values()
            for deployment in model.deployments
        }
        streams = TokenStreams(settings.cache_server_url)
        notices = FinishNotices(settings.cache_server_url)
        calls = sum(fleet.batch_options(tier).max_concurrent_calls for tier in tiers) or 1
        slots = Slots(calls, reserve=fleet.fairness.reserved(calls))
        claims = Claims()
        feeder = build_feeder(settings, fleet, tiers)
        observers = Observers(
            settings, tiers, loop, claims=claims, slots=slots, calls=calls, feeder=feeder
        )
        emit = emit_to([LogHook(), observers.metrics, observers.watchdog.hear])
        breakers = Breakers.of(fleet, calls=calls, emit=emit)
        exchange = BreakerExchange(breakers, settings.broker_url.get_secret_value())
        await exchange.exchange()  # so that the first call knows of a breaker that is open
        exchanging = asyncio.create_task(keep_running("breakers", exchange.run))
        pricer = Pricer()
        balancer = Balancer.of(fleet, health=breakers, pricer=pricer)
        loads = LoadExchange(balancer.places, settings.broker_url.get_secret_value())
        sharing = asyncio.create_task(keep_running("loads", loads.run))
        if balancer.balances:
            observers.metrics.watch_loads(balancer.loads)
        limiting = Limiting.of(fleet, settings.broker_url.get_secret_value(), pricer, database)
        if limiting is not None:
            observers.metrics.registry.register(limiting.quotas.counts)
        deliverer = build_deliverer(settings, emit)
        router = Router(fleet, providers)
        budgets = build_budgets(
            settings, fleet, database, pricer=pricer, deliverer=deliverer, emit=emit
        )
        caching = build_caching(
            fleet,
            settings.cache_server_url,
            router=router,
            health=breakers,
            prices=pricer,
            limits=limiting.quotas if limiting is not None else None,
            money=budgets,
        )
        triage = Triage(fleet=fleet, cache=caching.cache)
        endings = Endings(
            judge=Escalation(fleet),
            triage=triage,
            shadows=(
                Shadows(database=database, fleet=fleet, ring=self._ringer.ring)
                if fleet.routing.shadow.share > 0
                else None
            ),
            database=database,
            fleet=fleet,
            cache=caching.cache,
            filling=caching.filling,
            pricer=pricer,
            claims=claims,
            slots=slots,
            streams=streams,
            patience_s=settings.lease_s,
            ring=self._ringer.ring,
            announce=notices.tell,
            wake_callbacks=deliverer.wake,
            emit=emit,
            feed=feeder,
            spending=budgets,
        )
        budgeting = None
        if budgets is not None:
            budgeting = asyncio.create_task(keep_running("budgets", budgets.run))
        batches = build_batches(
            settings,
            fleet,
            build_batch_apis(fleet, client),
            database=database,
            router=router,
            endings=endings,
            landing=lambda line_pricer: Endings(
                judge=Escalation(fleet),
                database=database,
                fleet=fleet,
                cache=caching.cache,
                filling=caching.filling,
                pricer=line_pricer,
                claims=Claims(),
                slots=Slots(calls),
                streams=streams,
                patience_s=settings.lease_s,
                ring=self._ringer.ring,
                announce=notices.tell,
                wake_callbacks=deliverer.wake,
                emit=emit,
                spending=budgets,
            ),
            ring=self._ringer.ring,
            budgets=budgets,
        )
        pipeline = Pipeline(
            database=database,
            batch_service=batches.handover if batches is not None else None,
            fleet=fleet,
            router=router,
            tiering=Tiering(fleet=fleet, router=router, triage=triage, endings=endings),
            cache=caching.cache,
            caching=caching,
            claims=claims,
            endings=endings,
            caller=Caller(
                database=database,
                fleet=fleet,
                breakers=breakers,
                claims=claims,
                endings=endings,
                streams=streams,
                calls=calls,
                balancer=balancer,
                quotas=limiting.quotas if limiting is not None else None,
                budgets=budgets,
            ),
            balancer=balancer,
            fitter=Fitter(
                database=database,
                fleet=fleet,
                endings=endings,
                errands=Errands(database, self._ringer.ring),
            ),
            worker=settings.worker_name or default_worker_name(),
            lease_s=settings.lease_s,
            ring=self._ringer.ring,
            emit=emit,
            feed=feeder,
        )
        batching = None
        if batches is not None:
            batching = asyncio.create_task(keep_running("batches", batches.service.run))
        sweeper = Sweeper(
            database=database,
            tiers=tiers,
            interval_s=settings.sweep_interval_s,
            retention_s=settings.retention_days * SECONDS_A_DAY,
            memory_s=fleet.memory.retention_days and fleet.memory.retention_days * SECONDS_A_DAY,
            ring=self._ringer.ring,
            empty_queues=observers.queues.empty,
            emit=emit,
            parked=feeder,
        )
        heartbeat = Heartbeat(beats, claims, lease_s=settings.lease_s, on_loop=loop.call)
        vitals = observers.vitals([database, beats])

        async def close() -> None:
            if batching is not None:
                batching.cancel()
            await exchange.aclose()
            exchanging.cancel()
            await loads.aclose()
            sharing.cancel()
            if limiting is not None:
                await limiting.aclose()
            if budgets is not None and budgeting is not None:
                await budgets.aclose()
                budgeting.cancel()
            for provider in providers.values():
                await provider.aclose()
            await client.aclose()
            await caching.aclose()
            await streams.aclose()
            await notices.aclose()
            await deliverer.aclose()
            await database.close()
            self._ringer.flush()

        return Parts(
            pipeline=pipeline,
            sweeper=sweeper,
            deliverer=deliverer,
            feeder=feeder,
            heartbeat=heartbeat,
            claims=claims,
            slots=slots,
            vitals=vitals,
            watchdog=observers.watchdog,
            health=observers.health(vitals),
            close=close,
        )


def build_feeder(settings: Settings, fleet: Fleet, tiers: Sequence[str]) -> Feeder:
    """Who keeps the queues of these tiers filled."""
    chunks = {}
    for tier in tiers:
        options = fleet.batch_options(tier)
        chunks[tier] = min(MAX_IDS, options.max_batch_size, options.max_concurrent_calls)
    return Feeder(
        app,
        lot,
        fleet.fairness,
        worker=settings.worker_name or default_worker_name(),
        chunks=chunks,
    )


def build_budgets(
    settings: Settings,
    fleet: Fleet,
    database: AsyncDatabase,
    *,
    pricer: Pricer,
    deliverer: Deliverer,
    emit: Emit,
) -> Budgets | None:
    """Who keeps the fleet within its budgets; None where it has none."""
    if not fleet.budgets:
        return None
    notices = BudgetNotices(
        database, tenant=settings.tenant, wake_callbacks=deliverer.wake, emit=emit
    )
    return Budgets(
        fleet,
        url=settings.broker_url.get_secret_value(),
        database=database,
        prices=pricer,
        notices=notices,
        emit=emit,
    )


def build_batches(
    settings: Settings,
    fleet: Fleet,
    apis: Mapping[str, BatchApi],
    *,
    database: AsyncDatabase,
    router: Router,
    endings: Endings,
    landing: Callable[[BatchPricer], Endings],
    ring: Callable[[Iterable[Doorbell]], None],
    budgets: Budgets | None,
) -> BatchParts | None:
    """What sees to providers' own batches; None where no deployment has a batch API."""
    if not apis:
        return None
    pricer = BatchPricer()
    return BatchParts.of(
        database=database,
        fleet=fleet,
        router=router,
        apis=apis,
        endings=endings,
        landing=landing(pricer),
        pricer=pricer,
        owner=settings.worker_name or default_worker_name(),
        retention_s=settings.retention_days * SECONDS_A_DAY,
        ring=ring,
        budgets=budgets,
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
        self.queues = QueueWatch(functools.partial(queue_depths, app))
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


settings = load_settings()
fleet = load_fleet(settings.config_path)
app = make_celery(settings.broker_url.get_secret_value(), fleet.tier_names)
app.conf.update(
    worker_pool="threads",
    # A task waits for its doorbell's jobs and does nothing else, so there may be one for each job
    # that can be in flight; how many doorbells are taken is the gate's business.
    worker_concurrency=sum(
        fleet.batch_options(tier).max_concurrent_calls for tier in fleet.tier_names
    ),
    worker_prefetch_multiplier=1,
    worker_enable_prefetch_count_reduction=False,
    worker_send_task_events=True,
    worker_hijack_root_logger=True,
    task_acks_late=False,
)
lot = ParkingLot()
ringer = Ringer(
    app,
    window_s=settings.doorbell_window_ms / 1000,
    deliver=lot.deliver if fleet.fairness.enabled else publish,
)
worker = FleetWorker(Builder(settings, fleet, ringer), drain_s=settings.drain_s, ring=ringer.ring)
tasks.register(app, worker.run)
gate.install(app, worker)
logs.install(settings.log_format)
