"""The whole story of a batch: gather, claim, route, look up, coalesce, call, finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from uuid_utils.compat import uuid7

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import Doorbell, JobError
from promptfleet_shared.store import claims as claims_store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.sweeping import MAX_CRASHES
from promptfleet_workers.balancing.balancer import Balancer
from promptfleet_workers.batching import Batcher, DoorbellWait, Ticket
from promptfleet_workers.caching.parts import Caching
from promptfleet_workers.caching.protocol import ResponseCache
from promptfleet_workers.calling import Caller, plan_requests
from promptfleet_workers.claims import Abort, Claims
from promptfleet_workers.compacting import Compactor
from promptfleet_workers.endings import Endings
from promptfleet_workers.feeder import Feed
from promptfleet_workers.routing import Router
from promptfleet_workers.telemetry import BatchClaimed, Emit
from promptfleet_workers.work import Batch, Work

log = logging.getLogger(__name__)

CLAIM_PATIENCE_S = 30.0
LAST_CHANCE = MAX_CRASHES - 1
SUSPECT_WAIT_S = 1.0


class Sifting(Protocol):
    """Prepares jobs by their tiers."""

    async def sift(self, works: list[Work]) -> tuple[list[Work], list[Work]]:
        """Those that can go on, and those whose tier a small model is to be asked for first."""
        ...


class Fitting(Protocol):
    """Makes requests fit the models that may answer them."""

    def part(self, tier: str, works: Sequence[Work]) -> tuple[list[Work], list[Work]]:
        """Those that are sent as they are, and those that `fit` has to look at."""
        ...

    async def fit(self, works: Sequence[Work]) -> list[Work]:
        """Make these fit; those that can't go on now are ended or given back, and left out."""
        ...


class BatchService(Protocol):
    """Takes jobs that are to go through their provider's own batch API."""

    async def take(
        self, works: list[Work], known: Callable[[Sequence[Work]], Awaitable[Sequence[Work]]]
    ) -> list[Work]:
        """Give those jobs away, unless `known` has their answer; returns the others."""
        ...


class Pipeline:
    """Takes doorbells in and sees each of their jobs to an end; lives on the event loop."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        fleet: Fleet,
        router: Router,
        cache: ResponseCache,
        claims: Claims,
        endings: Endings,
        caller: Caller,
        worker: str,
        lease_s: float,
        ring: Callable[[Iterable[Doorbell]], None],
        emit: Emit,
        fitter: Fitting | None = None,
        balancer: Balancer | None = None,
        caching: Caching | None = None,
        feed: Feed | None = None,
        tiering: Sifting | None = None,
        batch_service: BatchService | None = None,
    ) -> None:
        """Put the parts together; nothing runs yet."""
        self._batch_service = batch_service
        self._compactor = Compactor(fleet)
        self._feed = feed
        self._tiering = tiering
        self._balancer = balancer
        self._fitter = fitter
        self._database = database
        self._fleet = fleet
        self._router = router
        caching = caching or Caching(cache, fleet.cache)
        self._look_up = caching.look_up(fleet, claims, endings, caller)
        self._claims = claims
        self._endings = endings
        self._caller = caller
        self._worker = worker
        self._lease_s = lease_s
        self._ring = ring
        self._emit = emit
        self._batcher = Batcher(fleet.batch_options, self.run_batch)
        self._draining = False
        self._suspect: uuid.UUID | None = None

    def take(self, tier: str, ids: Sequence[uuid.UUID], wait: DoorbellWait) -> None:
        """Gather ids, for which the slots are taken."""
        tickets = [Ticket(job_id, wait) for job_id in ids]
        if self._draining:
            self._hand_back(tier, tickets)
        else:
            self._batcher.add(tier, tickets)

    async def run_batch(self, tier: str, tickets: list[Ticket]) -> None:
        """See a batch through until all its calls have started."""
        if self._draining:
            self._hand_back(tier, tickets)
            return
        try:
            works = await self._claim(tier, tickets)
        finally:
            if self._feed is not None:
                self._feed.looked_up(len(tickets))
        try:
            if self._tiering is None:
                await self._start_calls(tier, works)
                return
            ready, asking = await self._tiering.sift(works)
            await self._start_calls(tier, ready)
            # A question each, of a few tokens, to the small model.
            for work in await self._caller.afford(asking) if asking else ():
                await self._caller.start([work])
        except Exception as error:  # noqa: BLE001 - a bug must not keep what is claimed
            name = type(error).__name__
            log.error("batch_crashed", extra={"error": name})  # noqa: TRY400 - a traceback could show a prompt
            self._caller.give_back_idle(works)

    async def _start_calls(self, tier: str, works: list[Work]) -> None:
        if any(work.job.crashes >= LAST_CHANCE for work in works):
            works = await self._without_other_suspects(works)
        routed = [work for work in works if self._has_route(work)]
        self._compactor.compact(tier, routed)
        if self._fitter is None:
            await self._look_up_and_call(tier, routed)
            return
        plain, special = self._fitter.part(tier, routed)
        await self._look_up_and_call(tier, plain)
        if special:  # not before: counting a long one must hold nobody up
            await self._look_up_and_call(tier, await self._fitter.fit(special))

    async def _look_up_and_call(self, tier: str, routed: list[Work]) -> None:
        if self._batch_service is not None:
            routed = await self._batch_service.take(routed, self._look_up.known)
        asked, leaders = self._look_up.questions(await self._look_up(routed))
        await self._call(tier, leaders)
        if asked:  # not before: what may be answered by its meaning must hold nobody up
            await self._call(tier, await self._look_up.by_meaning(asked))

    async def _call(self, tier: str, leaders: list[Work]) -> None:
        if self._caller.budgets is not None:
            leaders = await self._caller.afford(leaders)
        if self._balancer is not None:
            self._balancer.place(leaders)
        for request in plan_requests(leaders, self._fleet.batch_options(tier), self._caller.apart):
            await self._caller.start(request)

    async def _without_other_suspects(self, works: list[Work]) -> list[Work]:
        """Keep one job, at a time, of those that may not lose another worker.

        One of them may be what kills workers. The others were only near it, and must not be lost
        with it once more: they are given back before anything of this batch is called.
        """
        kept = []
        for work in works:
            if work.job.crashes < LAST_CHANCE:
                kept.append(work)
            elif self._suspect is None or not self._claims.holds(self._suspect):
                self._suspect = work.job.id
                kept.append(work)
            else:
                wait_s = random.uniform(0.5, 1.5) * SUSPECT_WAIT_S  # noqa: S311 - no secret
                self._endings.give_back(work, wait_s, counts=False)
        await self._endings.flush()
        return kept

    async def drain(self, patience_s: float) -> None:
        """Claim nothing new, let what runs end, and give back what has not by then."""
        self._draining = self._caller.draining = True
        for tier, tickets in self._batcher.clear():
            self._hand_back(tier, tickets)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._claims.idle.wait(), patience_s)
        self._claims.abort_all(Abort.DRAINED)
        await self._batcher.idle()  # what was being claimed is given back at once
        await self._look_up.idle()
        await self._caller.idle()
        await self._endings.drain()

    async def _claim(self, tier: str, tickets: list[Ticket]) -> list[Work]:
        fresh = self._without_twins(tickets)
        asked_at = time.monotonic()
        answered = True
        try:
            jobs = await self._database.insist(
                lambda connection: claims_store.claim(
                    connection, list(fresh), worker=self._worker, lease_s=self._lease_s
                ),
                patience_s=CLAIM_PATIENCE_S,
            )
        except (StoreRefusedError, StoreUnavailableError) as error:
            log.warning("claim_failed", extra={"jobs": len(fresh), "error": str(error)})
            jobs, answered = [], False  # the sweeper rings again
        self._claims.hold(jobs)
        claimed_at = time.monotonic()
        batch = Batch(id=uuid7(), size=len(jobs))
        waited: dict[uuid.UUID, Mapping[str, object]] = {}
        for job in jobs:
            ticket = fresh.pop(job.id)
            self._endings.expect(ticket)
            if ticket.wait.why is not None:
                waited[job.id] = ticket.wait.why
        for stale in fresh.values():
            self._endings.settle(stale)
        if self._feed is not None:
            self._feed.claimed(jobs)
            self._feed.gone(fresh)
        self._emit(BatchClaimed(tier=tier, rung=len(tickets), claimed=len(jobs), answered=answered))
        return [
            Work(
                job=job,
                batch=batch,
                asked_at=asked_at,
                claimed_at=claimed_at,
                route=self._router.route(job),
                request=job.request,
                decision={"queue": waited[job.id]} if job.id in waited else None,
            )
            for job in jobs
        ]

    def _without_twins(self, tickets: list[Ticket]) -> dict[uuid.UUID, Ticket]:
        """The tickets whose job this worker is not at already."""
        fresh: dict[uuid.UUID, Ticket] = {}
        for ticket in tickets:
            if ticket.job_id in fresh or self._endings.expects(ticket.job_id):
                self._endings.settle(ticket)
            else:
                fresh[ticket.job_id] = ticket
        return fresh

    def _has_route(self, work: Work) -> bool:
        if work.route:
            return True
        what = f"model {work.job.model!r}" if work.job.model else f"tier {work.job.tier!r}"
        message = f"no deployment is configured for {what}"
        self._endings.fail(work, JobError(code="no_route", message=message))
        return False

    def _hand_back(self, tier: str, tickets: Sequence[Ticket]) -> None:
        """Leave unclaimed jobs to another worker."""
        self._ring([Doorbell(job_id=t.job_id, tier=tier, returned=True) for t in tickets])
        if self._feed is not None:
            self._feed.looked_up(len(tickets))
        for ticket in tickets:
            self._endings.settle(ticket)
