"""The composition root: reads the settings, builds everything, exports the Celery app.

`celery -A promptfleet_workers.app worker -Q prompts.basic` starts a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from promptfleet_shared.errors import BrokerUnavailableError
from promptfleet_shared.fleet import Fleet, load_fleet
from promptfleet_shared.queueing import Ringer, make_celery, queue_depths
from promptfleet_shared.settings import Settings, default_worker_name, load_settings
from promptfleet_shared.store.database import AsyncDatabase, Database
from promptfleet_workers import gate, logs, tasks
from promptfleet_workers.batching import Slots
from promptfleet_workers.cache import RedisCache
from promptfleet_workers.calling import Caller
from promptfleet_workers.claims import Claims, Heartbeat
from promptfleet_workers.endings import Endings
from promptfleet_workers.event_loop import EventLoop
from promptfleet_workers.pipeline import Pipeline
from promptfleet_workers.pricing import Pricer
from promptfleet_workers.providers.building import build_provider
from promptfleet_workers.providers.http import HttpClient
from promptfleet_workers.routing import Router
from promptfleet_workers.sweeper import Sweeper
from promptfleet_workers.telemetry import LogHook, emit_to
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
        calls = sum(fleet.batch_options(tier).max_concurrent_calls for tier in tiers) or 1
        slots, claims, emit = Slots(calls), Claims(), emit_to([LogHook()])
        endings = Endings(
            database=database,
            fleet=fleet,
            cache=cache,
            pricer=Pricer(),
            claims=claims,
            slots=slots,
            patience_s=settings.lease_s,
            ring=self._ringer.ring,
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
                database=database, fleet=fleet, claims=claims, endings=endings, calls=calls
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
            empty_queues=_empty_queues,
            emit=emit,
        )
        heartbeat = Heartbeat(beats, claims, lease_s=settings.lease_s, on_loop=loop.call)

        async def close() -> None:
            for provider in providers.values():
                await provider.aclose()
            await client.aclose()
            await cache.aclose()
            await database.close()
            self._ringer.flush()

        return Parts(
            pipeline=pipeline, sweeper=sweeper, heartbeat=heartbeat, slots=slots, close=close
        )


async def _empty_queues(tiers: Sequence[str]) -> list[str]:
    loop = asyncio.get_running_loop()
    try:
        depths = await loop.run_in_executor(None, queue_depths, app, tiers)
    except BrokerUnavailableError:
        return []  # nothing can be rung now, either
    return [tier for tier, depth in depths.items() if depth == 0]


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
