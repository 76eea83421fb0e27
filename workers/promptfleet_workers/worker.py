"""A worker's life: start everything on the event loop, run doorbells, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from promptfleet_shared.errors import ConfigurationError
from promptfleet_shared.jobs import MAX_PRIORITY, Doorbell
from promptfleet_workers.background import keep_running
from promptfleet_workers.batching import DoorbellWait, Slots
from promptfleet_workers.callbacks import Deliverer
from promptfleet_workers.claims import Claims, Heartbeat
from promptfleet_workers.event_loop import EventLoop
from promptfleet_workers.feeder import Feeder
from promptfleet_workers.health import HealthServer, Phase, Vitals
from promptfleet_workers.pipeline import Pipeline
from promptfleet_workers.sweeper import Sweeper
from promptfleet_workers.watchdog import Stuck, Watchdog, announce, end_for_restart

log = logging.getLogger(__name__)

CLOSE_S = 10.0
"""Seconds to close up in after draining."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the composition root builds for a running worker."""

    pipeline: Pipeline
    sweeper: Sweeper
    deliverer: Deliverer
    heartbeat: Heartbeat
    claims: Claims
    slots: Slots
    vitals: Vitals
    watchdog: Watchdog
    health: HealthServer | None
    feeder: Feeder
    close: Callable[[], Awaitable[None]]


BuildParts = Callable[[Sequence[str], EventLoop], Awaitable[Parts]]


class FleetWorker:
    """What Celery's threads talk to."""

    def __init__(
        self,
        build: BuildParts,
        *,
        drain_s: float,
        ring: Callable[[Iterable[Doorbell]], None],
    ) -> None:
        """Start nothing yet.

        Args:
            build: Makes the parts for the tiers that this worker serves; runs on the loop.
            drain_s: Seconds that running jobs have to end when the worker stops.
            ring: Rings doorbells in the background.
        """
        self._build = build
        self._ring = ring
        self._drain_s = drain_s
        self._loop = EventLoop()
        self._parts: Parts | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._waits: set[DoorbellWait] = set()

    def start(self, tiers: Sequence[str]) -> None:
        """Build the parts and begin to sweep; doorbells are welcome from now on.

        Raises:
            ConfigurationError: Health can't be served where the settings say.
        """
        self._loop.start()
        try:
            self._loop.run(self._start(tiers))
        except ConfigurationError:
            self._loop.stop()
            raise
        # Thousands of small objects live for the length of a call: with the usual thresholds the
        # collector would walk all of Celery and SQLAlchemy for them, at a tenth of the CPU.
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        # Celery's threads do little and often, and the loop would stand still for 5 ms each time.
        sys.setswitchinterval(0.001)

    @property
    def wants_work(self) -> bool:
        """True if the next doorbell is worth taking from a queue."""
        parts = self._parts
        return parts is not None and parts.slots.wants_work and parts.feeder.claims_in_time

    @property
    def reserves(self) -> bool:
        """True if some slots are for interactive jobs only."""
        return self._parts is not None and self._parts.slots.reserve > 0

    @property
    def wants_interactive(self) -> bool:
        """True if the reserve has room for an interactive job."""
        return self._parts is not None and self._parts.slots.wants_interactive

    def consumer_looked(self) -> None:
        """Celery's consumer is about to look at the queues."""
        if self._parts is not None:
            self._parts.vitals.looked_at = time.monotonic()

    def run(
        self,
        tier: str,
        ids: Sequence[uuid.UUID],
        priority: int,
        why: Mapping[str, object] | None = None,
    ) -> None:
        """See to the jobs of a doorbell; returns when each has been.

        What there are no slots for goes back to the head of the queue, for whoever has them.

        Args:
            tier: Theirs.
            ids: Theirs.
            priority: The doorbell's; the highest takes slots of the reserve, if there is one.
            why: What they have waited for, if for anybody else.
        """
        parts = self._parts
        room = 0 if parts is None else _take(parts.slots, ids, priority)
        if parts is not None:
            parts.feeder.taken(tier, room)
        taken, excess = ids[:room], ids[room:]
        if excess:
            self._ring(
                [
                    Doorbell(job_id=job_id, tier=tier, priority=priority, returned=True)
                    for job_id in excess
                ]
            )
        if parts is not None and taken:
            self._see_to(parts, tier, taken, why)

    def _see_to(
        self,
        parts: Parts,
        tier: str,
        ids: Sequence[uuid.UUID],
        why: Mapping[str, object] | None,
    ) -> None:
        wait = DoorbellWait(len(ids), why)
        self._waits.add(wait)
        try:
            self._loop.call(parts.pipeline.take, tier, ids, wait)
            wait.done.result()
        finally:
            self._waits.discard(wait)

    def stop(self) -> None:
        """Drain and stop; what could not end is queued again under its fence."""
        if self._parts is None:
            return
        parts, self._parts = self._parts, None
        parts.watchdog.stop()
        parts.slots.shut()
        parts.feeder.retire()
        parts.vitals.phase = Phase.DRAINING
        try:
            self._loop.run(self._stop(parts), timeout_s=self._drain_s + CLOSE_S)
        except TimeoutError:
            log.warning("drain_gave_up", extra={"after_s": self._drain_s + CLOSE_S})
        parts.heartbeat.stop()
        for wait in list(self._waits):
            wait.abandon()
        self._loop.stop()

    async def _start(self, tiers: Sequence[str]) -> None:
        parts = await self._build(tiers, self._loop)
        if parts.health is not None:
            await parts.health.start()
        self._parts = parts
        parts.heartbeat.start()
        self._sweeping = asyncio.create_task(keep_running("sweeper", parts.sweeper.run))
        parts.deliverer.start()
        parts.feeder.start()
        parts.vitals.phase = Phase.SERVING
        parts.watchdog.start(self._give_up)

    async def _stop(self, parts: Parts) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        await asyncio.gather(
            parts.pipeline.drain(self._drain_s), parts.deliverer.drain(self._drain_s)
        )
        await asyncio.get_running_loop().run_in_executor(None, parts.feeder.stop)
        await parts.close()
        if parts.health is not None:
            await parts.health.stop()

    def _give_up(self, stuck: Stuck) -> None:
        """End this process to have a fresh one; what still runs, and was paid for, may end."""
        parts = self._parts
        if parts is None:  # it drains already
            return
        announce(stuck, within_s=self._drain_s + 2 * CLOSE_S)
        parts.slots.shut()
        parts.vitals.phase = Phase.DRAINING
        if stuck is not Stuck.LOOP and not parts.claims.idle.is_set():
            with contextlib.suppress(TimeoutError):
                drain = parts.pipeline.drain(self._drain_s)
                self._loop.run(drain, timeout_s=self._drain_s + CLOSE_S)
        end_for_restart()


def _take(slots: Slots, ids: Sequence[uuid.UUID], priority: int) -> int:
    if slots.reserve and priority == MAX_PRIORITY:
        return slots.take_reserved(ids)
    return slots.take(len(ids))
