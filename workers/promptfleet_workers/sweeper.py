"""Looks for lost, overdue and silent jobs, from inside every worker."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.store import batches, conversations, files, sweeping
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.sweeping import Order
from promptfleet_workers.telemetry import Emit, Swept

log = logging.getLogger(__name__)

PRUNE_EVERY_S = 60.0
FAIR_EVERY = 40
"""Of the looks at a long backlog of due jobs, each such one lets tenants take turns. Among 100,000
it takes 90 ms, and a usual one 17 ms: about one a second, for an eighth of a sweep's time."""
PARKED_LOOKS_A_S = 500
PARKED_S = (30.0, 300.0)
"""Seconds after which a job whose doorbell waits its turn is looked at again, at least and at most:
a doorbell that is lost when its turn has come is rung for by then."""
UUID7_RANDOM_BITS = 80


class Parked(Protocol):
    """Who knows what waits its turn."""

    @property
    def any_parked(self) -> bool:
        """False if nothing does."""
        ...

    def parked(self, tier: str) -> int:
        """How many jobs of the tier do, as far as this worker knows."""
        ...

    def waiting(self, bells: Sequence[Doorbell]) -> set[uuid.UUID]:
        """Those of these jobs that do; blocks."""
        ...


class Sweeper:
    """One of any number of sweepers: each judges the jobs that no other one has locked."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        tiers: Sequence[str],
        interval_s: float,
        retention_s: float,
        ring: Callable[[Iterable[Doorbell]], None],
        empty_queues: Callable[[Sequence[str]], Awaitable[Sequence[str]]],
        emit: Emit,
        memory_s: float | None = None,
        parked: Parked | None = None,
    ) -> None:
        """Sweep nothing yet.

        Args:
            database: Used on the loop that `run` runs on.
            tiers: Whose queues are watched for silence.
            interval_s: Seconds between two sweeps.
            retention_s: Seconds that ended jobs are kept; 0 keeps them for ever.
            ring: Rings doorbells in the background.
            empty_queues: Those of the tiers whose queue holds no message.
            emit: Told what was found.
            memory_s: Seconds after their last turn that conversations are kept; as ended jobs
                where it is None.
            parked: Knows the doorbells that wait their turn.
        """
        self._database = database
        self._tiers = tiers
        self._interval_s = interval_s
        self._retention_s = retention_s
        self._ring = ring
        self._empty_queues = empty_queues
        self._emit = emit
        self._parked = parked
        self._pruned_at = time.monotonic()
        self._filed_at = time.monotonic()
        self._memory_s = retention_s if memory_s is None else memory_s
        self._forgot_at = time.monotonic()

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            # Workers that started together must not sweep together.
            await asyncio.sleep(self._interval_s * random.uniform(0.75, 1.25))  # noqa: S311
            try:
                await self.sweep()
                await self.ring_silent()
                await self.prune()
                await self.sweep_files()
                await self.prune_conversations()
            except (StoreRefusedError, StoreUnavailableError) as error:
                log.warning("sweep_failed", extra={"error": str(error)})

    async def sweep(self) -> None:
        """Judge all jobs that are due now."""
        limit = 500
        judged, looks = limit, 0
        order = Order.OLDEST
        while judged == limit or order is Order.FAIR:
            # Of a short list all are judged at once; only a long one has an end to wait for.
            order = Order.FAIR if looks % FAIR_EVERY == 1 else Order.OLDEST
            looks += 1
            parked = await self._parked_of_due(limit, order)
            judge = functools.partial(
                sweeping.sweep, limit=limit, parked=parked, parked_s=self._parked_s(), order=order
            )
            found = await self._database.run(judge)
            self._ring(found.doorbells)
            judged = sum(found.verdicts.values())
            if judged:
                self._emit(Swept(verdicts=found.verdicts, unknown_calls=found.unknown_calls))

    def _parked_s(self) -> float:
        """Longer for a long line: looking at it must not cost more than working it off."""
        least_s, most_s = PARKED_S
        if self._parked is None:
            return most_s
        waiting = sum(self._parked.parked(tier) for tier in self._tiers)
        return min(most_s, max(least_s, waiting / PARKED_LOOKS_A_S))

    async def _parked_of_due(self, limit: int, order: Order) -> set[uuid.UUID]:
        """Jobs that are due to be rung for, and whose doorbells wait their turn."""
        if self._parked is None or not self._parked.any_parked:
            return set()
        bells = await self._database.run(
            lambda c: sweeping.overdue_doorbells(c, limit=limit, order=order)
        )
        if not bells:
            return set()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self._parked.waiting, bells)

    async def ring_silent(self) -> None:
        """Ring for due jobs of the tiers whose queue is empty: their doorbells are lost."""
        for tier in await self._empty_queues(self._tiers):
            limit = 1000
            rung, looks = limit, 0
            order = Order.FAIR
            while rung == limit or order is Order.FAIR:
                order = _ring_order(looks)
                ring_for = functools.partial(
                    sweeping.silent_doorbells, tier=tier, limit=limit, order=order
                )
                doorbells = await self._database.run(ring_for)
                rung, looks = len(doorbells), looks + 1
                if doorbells:
                    self._ring(doorbells)
                    self._emit(Swept(verdicts={"silent": rung}))

    async def prune(self) -> None:
        """Once a minute, delete what is older than the retention, a thousand jobs at a time."""
        if not self._retention_s or time.monotonic() - self._pruned_at < PRUNE_EVERY_S:
            return
        self._pruned_at = time.monotonic()
        floor = oldest_id(time.time() - self._retention_s)
        pruned = limit = 1000
        while pruned == limit:
            pruned = await self._database.run(
                lambda c: sweeping.prune(c, floor=floor, age_s=self._retention_s, limit=limit)
            )
        gone = few = 5
        while gone == few:
            gone = await self._database.run(
                lambda c: batches.prune_batches(c, floor=floor, age_s=self._retention_s, limit=few)
            )

    async def sweep_files(self) -> None:
        """Once a minute, delete files that have expired or were never finished, a few at a time."""
        if time.monotonic() - self._filed_at < PRUNE_EVERY_S:
            return
        self._filed_at = time.monotonic()
        gone = limit = 5
        while gone == limit:
            gone = await self._database.run(lambda c: files.sweep_files(c, limit=limit))

    async def prune_conversations(self) -> None:
        """Once a minute, delete conversations that nobody has gone on with, a hundred at a time."""
        if not self._memory_s or time.monotonic() - self._forgot_at < PRUNE_EVERY_S:
            return
        self._forgot_at = time.monotonic()
        gone = limit = 100
        while gone == limit:
            gone = await self._database.run(
                lambda c: conversations.prune_conversations(c, age_s=self._memory_s, limit=limit)
            )


def _ring_order(looks: int) -> Order:
    """Oldest and newest in turns, and now and then each tenant's first."""
    if looks % FAIR_EVERY == 1:
        return Order.FAIR
    return Order.NEWEST if looks % 2 else Order.OLDEST


def oldest_id(instant: float) -> uuid.UUID:
    """The smallest UUIDv7 (RFC 9562) of an instant in seconds since 1970."""
    return uuid.UUID(int=int(instant * 1000) << UUID7_RANDOM_BITS)
