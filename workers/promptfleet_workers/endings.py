"""How jobs end: outcomes and releases on their way to the database, and all that follows them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import (
    NO_USAGE,
    CacheStatus,
    Doorbell,
    JobError,
    JobState,
    Outcome,
    Release,
    Usage,
)
from promptfleet_shared.store.claims import storable_text
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.batching import Slots, Ticket
from promptfleet_workers.cache import ResponseCache, encode_completion
from promptfleet_workers.claims import Abort, Claims
from promptfleet_workers.finishing import Finisher
from promptfleet_workers.pricing import Pricer
from promptfleet_workers.providers.protocol import Completion
from promptfleet_workers.routing import Candidate
from promptfleet_workers.telemetry import Emit, JobsFinished, JobsReleased
from promptfleet_workers.token_streams import TokenStreams
from promptfleet_workers.work import Work

FREE = Decimal(0)
UNKNOWN_OUTCOME = JobError(
    code="unknown_outcome",
    message="nobody knows whether a call was answered, and the job must not be called twice",
)


class Endings:
    """Turns what became of works into rows, and tells everybody who waits once they stand."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        fleet: Fleet,
        cache: ResponseCache,
        pricer: Pricer,
        claims: Claims,
        slots: Slots,
        streams: TokenStreams,
        patience_s: float,
        ring: Callable[[Iterable[Doorbell]], None],
        announce: Callable[[Iterable[uuid.UUID]], None],
        wake_callbacks: Callable[[], None],
        emit: Emit,
    ) -> None:
        """Write nothing yet."""
        self._fleet = fleet
        self._cache = cache
        self._pricer = pricer
        self._claims = claims
        self._slots = slots
        self._streams = streams
        self._ring = ring
        self._announce = announce
        self._wake_callbacks = wake_callbacks
        self._owes_callbacks = False
        self._emit = emit
        self._finisher = Finisher(
            database, patience_s=patience_s, on_written=self._written, on_released=self._released
        )
        self._tickets: dict[uuid.UUID, Ticket] = {}
        self._to_cache: dict[uuid.UUID, tuple[str, bytes, int]] = {}
        self._leaders: dict[str, Work] = {}
        self._fills: set[asyncio.Task[None]] = set()
        self.restart: Callable[[Work], None] = lambda _: None  # set by the caller of providers

    # -- who waits ---------------------------------------------------------------------------

    def expect(self, ticket: Ticket) -> None:
        """From now on this ticket is settled when its job's end is written."""
        self._tickets[ticket.job_id] = ticket

    def expects(self, job_id: uuid.UUID) -> bool:
        """True while this worker is at the job."""
        return job_id in self._tickets

    def settle(self, ticket: Ticket) -> None:
        """Nothing will happen to this ticket here: its job is not ours to run."""
        self._slots.give_back()
        ticket.wait.settle()

    def leads(self, work: Work) -> bool:
        """False for a job that waits for an equal one's call instead of its own."""
        if work.key is None:
            return True
        leader = self._leaders.setdefault(work.key, work)
        if leader is work:
            return True
        leader.followers.append(work)
        return False

    # -- ends --------------------------------------------------------------------------------

    def succeed(self, work: Work, completion: Completion, candidate: Candidate) -> None:
        """A whole answer, from the provider or from the cache."""
        paid = work.cache in {CacheStatus.OFF, CacheStatus.MISS}
        model = completion.model or candidate.model_there
        usage = completion.usage if paid else NO_USAGE
        cost: Decimal | None = FREE
        if paid:
            provider = candidate.deployment.provider
            cost = self._pricer.cost(provider, model, usage, candidate.price_as)
            self._remember(work, completion, candidate)
        self._finish(
            work,
            _outcome(
                work,
                JobState.SUCCEEDED,
                candidate,
                model=model,
                completion=completion,
                usage=usage,
                cost_usd=cost,
            ),
        )
        for follower in self._dismiss(work):
            if not self.given_up(follower):
                follower.cache = CacheStatus.COALESCED
                self.succeed(follower, completion, candidate)

    def fail(
        self,
        work: Work,
        error: JobError | None,
        *,
        candidate: Candidate | None = None,
        state: JobState = JobState.FAILED,
        shared: bool = False,
    ) -> None:
        """No answer, and none will come.

        Args:
            work: The job.
            error: Why; None for a cancellation.
            candidate: Who failed, if anybody was asked.
            state: FAILED, CANCELLED or EXPIRED.
            shared: True if the same request would fail for the equal jobs, too.
        """
        model = candidate.model_there if candidate else None
        self._finish(work, _outcome(work, state, candidate, model=model, error=error))
        if shared:
            for follower in self._dismiss(work):
                if not self.given_up(follower):
                    self.fail(follower, error, candidate=candidate, state=state)
        else:
            self._promote_follower(work)

    def give_back(
        self,
        work: Work,
        delay_s: float,
        *,
        counts: bool,
        error: JobError | None = None,
        tier: str | None = None,
    ) -> None:
        """The job is queued again, to run in `delay_s`; `counts` if that burns an attempt.

        Args:
            work: The job.
            delay_s: Seconds until it may run.
            counts: False where the attempt was not the job's fault.
            error: Why it did not succeed, if it failed.
            tier: Another tier that is to go on with it.
        """
        self._finish(
            work,
            Release(
                job_id=work.job.id,
                fence=work.job.fence,
                delay_s=delay_s,
                counts=counts,
                calls=work.calls,
                unknown_calls=work.unknown_calls,
                error=error,
                tier=tier,
                decision=work.decision,
            ),
        )
        self._promote_follower(work)

    def given_up(self, work: Work) -> bool:
        """End a job that was aborted; true if it is (or was already) at its end."""
        if work.ended:
            return True
        match self._claims.aborted(work.job.id):
            case None:
                return False
            case Abort.CANCELLED:
                self.fail(work, None, state=JobState.CANCELLED)
            case Abort.DRAINED if work.must_not_repeat:
                self.fail(work, UNKNOWN_OUTCOME)
            case Abort.DRAINED:
                self.give_back(work, 0.0, counts=False)
            case Abort.FENCED:
                work.ended = True
                self._slots.ended()
                self._streams.drop(work.job.id)
                self._forget([work.job.id])
                self._promote_follower(work)
        return True

    async def flush(self) -> None:
        """Write all that has ended by now, and wait for it."""
        await self._finisher.flush()

    async def drain(self) -> None:
        """Write all that has ended and fill the cache with it."""
        await self._finisher.drain()
        if self._fills:
            await asyncio.wait(self._fills)

    # -- what follows ------------------------------------------------------------------------

    def _finish(self, work: Work, end: Outcome | Release) -> None:
        work.ended = True
        self._slots.ended()
        if isinstance(end, Outcome):
            self._streams.ending(work.job)
            self._owes_callbacks |= work.job.has_callback
        else:
            self._streams.drop(work.job.id)
        self._finisher.add(end)

    def _dismiss(self, work: Work) -> list[Work]:
        """The jobs that waited for this one's call; nobody else will join them."""
        if work.key is not None and self._leaders.get(work.key) is work:
            del self._leaders[work.key]
        followers, work.followers = work.followers, []
        return followers

    def _promote_follower(self, work: Work) -> None:
        """Let the equal jobs have a call of their own, the first of them for all."""
        live = [follower for follower in self._dismiss(work) if not self.given_up(follower)]
        if live:
            heir, *heir.followers = live
            if heir.key is not None:
                self._leaders[heir.key] = heir
            self.restart(heir)

    def _remember(self, work: Work, completion: Completion, candidate: Candidate) -> None:
        # An answer of a second choice must not pass for the first one's until its time is up.
        if work.key is None or candidate is not work.route[0]:
            return
        section = self._fleet.cache
        whole = storable_text(completion.text) == completion.text
        if whole and len(completion.response) <= section.max_value_bytes:
            ttl_s = work.job.cache.ttl_s or section.ttl_s
            self._to_cache[work.job.id] = (work.key, encode_completion(completion), ttl_s)

    def _written(self, outcomes: Sequence[Outcome], written: set[uuid.UUID]) -> None:
        self._announce(written)
        self._streams.ended(outcomes, written)
        if self._owes_callbacks:
            self._owes_callbacks = False
            self._wake_callbacks()
        items = [(o, self._to_cache.pop(o.job_id, None)) for o in outcomes]
        known = [item for o, item in items if item is not None and o.state is JobState.SUCCEEDED]
        if known:
            task = asyncio.create_task(self._cache.set_many(known))
            self._fills.add(task)
            task.add_done_callback(self._fills.discard)
        self._emit(JobsFinished.of(outcomes, fenced=len(outcomes) - len(written)))
        self._forget([outcome.job_id for outcome in outcomes])

    def _released(self, releases: Sequence[Release], doorbells: Sequence[Doorbell]) -> None:
        delays = {release.job_id: release.delay_s for release in releases}
        loop = asyncio.get_running_loop()
        for bell in doorbells:
            # Should this worker die before, the sweeper rings at the same time.
            loop.call_later(delays[bell.job_id], self._ring, [bell])
        self._emit(JobsReleased.of(releases, fenced=len(releases) - len(doorbells)))
        self._forget(list(delays))

    def _forget(self, ids: list[uuid.UUID]) -> None:
        self._claims.let_go(ids)
        for job_id in ids:
            ticket = self._tickets.pop(job_id, None)
            if ticket is not None:
                self._slots.written()
                ticket.wait.settle()


def _outcome(
    work: Work,
    state: JobState,
    candidate: Candidate | None,
    *,
    model: str | None,
    completion: Completion | None = None,
    error: JobError | None = None,
    usage: Usage = NO_USAGE,
    cost_usd: Decimal | None = None,
) -> Outcome:
    """What is to be written about a work that has ended."""
    deployment = candidate.deployment if candidate else None
    return Outcome(
        job_id=work.job.id,
        fence=work.job.fence,
        state=state,
        text=completion.text if completion else None,
        response=completion.response if completion else None,
        finish_reason=completion.finish_reason if completion else None,
        error=error,
        model=model,
        provider=deployment.provider if deployment else None,
        deployment=deployment.name if deployment else None,
        usage=usage,
        cost_usd=cost_usd,
        cache=work.cache,
        calls=work.calls,
        unknown_calls=work.unknown_calls,
        batch_id=work.batch.id,
        batch_size=work.batch.size,
        queued_ms=work.job.queued_ms,
        provider_ms=work.provider_ms,
        decision=work.decision,
        saved_usd=work.saved_usd,
    )
