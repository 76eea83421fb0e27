"""The composition root: reads the settings, builds everything, exports the Celery app.

`celery -A promptfleet_workers.app worker -Q prompts.basic` starts a worker.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence

from promptfleet_shared.fleet import Fleet, load_fleet
from promptfleet_shared.queueing import Ringer, make_celery, queue_depths
from promptfleet_shared.settings import Settings, default_worker_name, load_settings
from promptfleet_shared.signing import split_secrets
from promptfleet_shared.store.database import AsyncDatabase, Database
from promptfleet_workers import gate, logs, tasks
from promptfleet_workers.background import keep_running
from promptfleet_workers.batching import Slots
from promptfleet_workers.breaker_exchange import BreakerExchange
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.cache import RedisCache
from promptfleet_workers.callbacks import Deliverer, DeliveryOptions
from promptfleet_workers.calling import Caller
from promptfleet_workers.claims import Claims, Heartbeat
from promptfleet_workers.egress import GuardedClient
from promptfleet_workers.endings import Endings
from promptfleet_workers.event_loop import EventLoop
from promptfleet_workers.finish_notices import FinishNotices
from promptfleet_workers.health import HealthServer, Vitals
from promptfleet_workers.metrics import PrometheusHook
from promptfleet_workers.pipeline import Pipeline
from promptfleet_workers.pricing import Pricer
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.queues import QueueWatch
from promptfleet_workers.routing import Router
from promptfleet_workers.sweeper import Sweeper
from promptfleet_workers.telemetry import Emit, LogHook, emit_to
from promptfleet_workers.token_streams import TokenStreams
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

    async def __call__(self, tiers: Sequence[str], loop: EventLoop) -> Parts:
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
        cache = RedisCache(settings.cache_server_url)
        streams = TokenStreams(settings.cache_server_url)
        notices = FinishNotices(settings.cache_server_url)
        calls = sum(fleet.batch_options(tier).max_concurrent_calls for tier in tiers) or 1
        slots, claims = Slots(calls), Claims()
        observers = Observers(settings, tiers, loop, claims=claims, slots=slots, calls=calls)
        emit = emit_to([LogHook(), observers.metrics, observers.watchdog.hear])
        breakers = Breakers.of(fleet, calls=calls, emit=emit)
        exchange = BreakerExchange(breakers, settings.broker_url.get_secret_value())
        await exchange.exchange()  # so that the first call knows of a breaker that is open
        exchanging = asyncio.create_task(keep_running("breakers", exchange.run))
        deliverer = build_deliverer(settings, emit)
        endings = Endings(
            database=database,
            fleet=fleet,
            cache=cache,
            pricer=Pricer(),
            claims=claims,
            slots=slots,
            streams=streams,
            patience_s=settings.lease_s,
            ring=self._ringer.ring,
            announce=notices.tell,
            wake_callbacks=deliverer.wake,
            emit=emit,
        )
        pipeline = Pipeline(
            database=database,
            fleet=fleet,
            router=Router(fleet, providers),
            cache=cache,
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
            ),
            worker=settings.worker_name or default_worker_name(),
            lease_s=settings.lease_s,
            ring=self._ringer.ring,
            emit=emit,
        )
        sweeper = Sweeper(
            database=database,
            tiers=tiers,
            interval_s=settings.sweep_interval_s,
            retention_s=settings.retention_days * SECONDS_A_DAY,
            ring=self._ringer.ring,
            empty_queues=observers.queues.empty,
            emit=emit,
        )
        heartbeat = Heartbeat(beats, claims, lease_s=settings.lease_s, on_loop=loop.call)
        vitals = observers.vitals([database, beats])

        async def close() -> None:
            await exchange.aclose()
            exchanging.cancel()
            for provider in providers.values():
                await provider.aclose()
            await client.aclose()
            await cache.aclose()
            await streams.aclose()
            await notices.aclose()
            await deliverer.aclose()
            await database.close()
            self._ringer.flush()

        return Parts(
            pipeline=pipeline,
            sweeper=sweeper,
            deliverer=deliverer,
            heartbeat=heartbeat,
            claims=claims,
            slots=slots,
            vitals=vitals,
            watchdog=observers.watchdog,
            health=observers.health(vitals),
            close=close,
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
    ) -> None:
        """Build what needs to hear of events; `calls` is how many may be in flight."""
        self._settings = settings
        self._tiers = tiers
        self._claims = claims
        self._slots = slots
        self._calls = calls
        self.metrics = PrometheusHook()
        self.queues = QueueWatch(functools.partial(queue_depths, app))
        self.watchdog = Watchdog(
            limit_s=settings.watchdog_s,
            on_loop=loop.call,
            # What has ended and waits to be written needs no room.
            has_room=lambda: len(claims.fences()) - slots.unwritten < calls,
            work_waits=WorkQuestion(
                database=Database(
                    settings.database_url.get_secret_value(),
                    application_name="promptfleet-watchdog",
                ),
                ask_broker=lambda: self.queues.look(tiers),
                tiers=tiers,
                for_s=settings.watchdog_s / 2,
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
ringer = Ringer(app, window_s=settings.doorbell_window_ms / 1000)
worker = FleetWorker(Builder(settings, fleet, ringer), drain_s=settings.drain_s, ring=ringer.ring)
tasks.register(app, worker.run)
gate.install(app, worker)
logs.install(settings.log_format)
