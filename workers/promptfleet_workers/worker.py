"""A worker's life: start everything on the event loop, run doorbells, drain, stop."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence

from promptfleet_shared.jobs import Doorbell
from promptfleet_workers.batching import DoorbellWait, Slots
from promptfleet_workers.claims import Heartbeat
from promptfleet_workers.event_loop import EventLoop
from promptfleet_workers.pipeline import Pipeline
from promptfleet_workers.sweeper import Sweeper

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What the composition root builds for a running worker."""

    pipeline: Pipeline
    sweeper: Sweeper
    heartbeat: Heartbeat
    slots: Slots
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
        """Build the parts and begin to sweep; doorbells are welcome from now on."""
        self._loop.start()
        self._loop.run(self._start(tiers))
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
        return self._parts is not None and self._parts.slots.wants_work

    def run(self, tier: str, ids: Sequence[uuid.UUID], priority: int) -> None:
        """See to the jobs of a doorbell; returns when each has been.

        What there are no slots for goes back to the head of the queue, for whoever has them.
        """
        parts = self._parts
        room = 0 if parts is None else parts.slots.take(len(ids))
        taken, excess = ids[:room], ids[room:]
        if excess:
            self._ring(
                [
                    Doorbell(job_id=job_id, tier=tier, priority=priority, returned=True)
                    for job_id in excess
                ]
            )
        if parts is not None and taken:
            self._see_to(parts, tier, taken)

    def _see_to(self, parts: Parts, tier: str, ids: Sequence[uuid.UUID]) -> None:
        wait = DoorbellWait(len(ids))
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
        parts.slots.shut()
        try:
            self._loop.run(self._stop(parts), timeout_s=self._drain_s + 10)
        except TimeoutError:
            log.warning("drain_gave_up", extra={"after_s": self._drain_s + 10})
        parts.heartbeat.stop()
        for wait in list(self._waits):
            wait.abandon()
        self._loop.stop()

    async def _start(self, tiers: Sequence[str]) -> None:
        self._parts = await self._build(tiers, self._loop)
        self._parts.heartbeat.start()
        self._sweeping = asyncio.create_task(self._parts.sweeper.run())

    async def _stop(self, parts: Parts) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        await parts.pipeline.drain(self._drain_s)
        await parts.close()
