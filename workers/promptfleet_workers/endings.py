"""How jobs end: outcomes and releases on their way to the database, and all that follows them."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Protocol

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import (
    NO_USAGE,
    CacheMode,
    CacheStatus,
    Doorbell,
    JobError,
    JobState,
    Outcome,
    Release,
    Usage,
)
from promptfleet_shared.policies.routing import Complexity
from promptfleet_shared.policies.tier_choice import DECISION
from promptfleet_shared.pricing import Pricer
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.batching import Slots, Ticket
from promptfleet_workers.caching.filling import Filling
from promptfleet_workers.caching.protocol import ResponseCache
from promptfleet_workers.caching.tally import CacheTally
from promptfleet_workers.claims import Abort, Claims
from promptfleet_workers.escalation import AnswerJudge, Failing, tier_record
from promptfleet_workers.feeder import Feed
from promptfleet_workers.finishing import Finisher
from promptfleet_workers.lost_calls import price_lost
from promptfleet_workers.providers.protocol import Completion, Received
from promptfleet_workers.routing import Candidate
from promptfleet_workers.shadowing import Shadows
from promptfleet_workers.telemetry import Emit, JobsFinished, JobsReleased
from promptfleet_workers.token_streams import TokenStreams
from promptfleet_workers.triage import Triage
from promptfleet_workers.work import Work

FREE = Decimal(0)
UNKNOWN_OUTCOME = JobError(
    code="unknown_outcome",
    message="nobody knows whether a call was answered, and the job must not be called twice",
)


class Spending(Protocol):
    """What has to know what claims spent."""

    def end(self, work: Work, end: Outcome | Release | None) -> None:
        """A claim has ended; None where nothing will be written of it."""
        ...

    def settle(self, ids: Iterable[uuid.UUID]) -> None:
        """The ends of these jobs are written."""
        ...


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
        filling: Filling | None = None,
        judge: AnswerJudge | None = None,
        shadows: Shadows | None = None,
        triage: Triage | None = None,
        feed: Feed | None = None,
        spending: Spending | None = None,
    ) -> None:
        """Write nothing yet."""
        self._spending = spending
        self._judge, self._triage, self._shadows = judge, triage, shadows
        self._feed = feed
        self._filling = filling or Filling(cache, fleet.cache)
        self._cache_tally = CacheTally()
        self._fleet = fleet
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
            database,
            patience_s=patience_s,
            on_written=self._written,
            on_released=self._released,
            ring=ring,
        )
        self._tickets: dict[uuid.UUID, Ticket] = {}
        self._leaders: dict[str, Work] = {}
        self.restart: Callable[[Work], None] = lambda _: None  # set by the caller of providers
        # Set by who counts tokens.
        self.counted: Callable[[Work, Usage, Candidate], None] = lambda _work, _usage, _at: None

    # -- who waits ---------------------------------------------------------------------------

    def expect(self, ticket: Ticket) -> None:
        """From now on this ticket is settled when its job's end is written."""
        self._tickets[ticket.job_id] = ticket

    def expects(self, job_id: uuid.UUID) -> bool:
        """True while this worker is at the job."""
        return job_id in self._tickets

    def settle(self, ticket: Ticket) -> None:
        """Nothing will happen to this ticket here: its job is not ours to run."""
        self._slots.give_back(ticket.job_id)
        ticket.wait.settle()

    def leads(self, work: Work) -> bool:
        """False for a job that waits for an equal one's call instead of its own."""
        if work.key is None:
            return True
        if (answered := self._filling.known(work.key)) and work.job.cache.mode is CacheMode.USE:
            work.cache = CacheStatus.COALESCED
            self.succeed(work, *answered)
            return False
        leader = self._leaders.setdefault(work.key, work)
        if leader is work:
            return True
        leader.followers.append(work)
        return False

    # -- ends --------------------------------------------------------------------------------

    def succeed(self, work: Work, completion: Completion, candidate: Candidate) -> None:
        """A whole answer, from the provider or from the cache."""
        if work.triage_of is not None:
            self._triaged(work, completion, candidate)
            return
        failing = None if self._judge is None else self._judge.judge(work, completion)
        if failing is not None and not self._is_final(work, completion, candidate, failing):
            return
        paid = work.cache in {CacheStatus.OFF, CacheStatus.MISS}
        model = completion.model or candidate.model_there
        usage = completion.usage if paid else NO_USAGE
        cost: Decimal | None = FREE
        if paid:
            provider = candidate.deployment.provider
            cost = self._pricer.cost(provider, model, usage, candidate.price_as)
            self._keep(work, completion, candidate, good=failing is None)
            if work.counted is not None:
                self.counted(work, usage, candidate)
        else:
            self._not_bought(work, completion, candidate, model)
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
        if self._shadows is not None:
            self._shadows.consider(work.job)
        unserved = []
        for follower in self._dismiss(work):
            if self.given_up(follower):
                continue
            if not paid and follower.job.cache.mode is CacheMode.REFRESH:
                unserved.append(follower)  # it wants an answer that is new
                continue
            follower.cache = CacheStatus.COALESCED if paid else work.cache
            self.succeed(follower, completion, candidate)
        self._lead_on(unserved)

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
        if work.triage_of is not None:
            if state is JobState.FAILED:  # the question failed, and not the job
                self.choose_tier(work, None)
                return
            work.job, work.triage_of = work.triage_of, None
        model = candidate.model_there if candidate else None
        self._finish(work, _outcome(work, state, candidate, model=model, error=error))
        if shared:
            if self._is_leader(work):
                self._filling.release(work.key or "")
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
        waits_turn: bool = False,
    ) -> None:
        """The job is queued again, to run in `delay_s`; `counts` if that burns an attempt.

        Args:
            work: The job.
            delay_s: Seconds until it may run.
            counts: False where the attempt was not the job's fault.
            error: Why it did not succeed, if it failed.
            tier: Another tier that is to go on with it.
            waits_turn: True if the end of an earlier turn of its conversation is to wake it.
        """
        if work.triage_of is not None and error is not None:
            self.choose_tier(work, None)
            return
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
                lost=work.lost,
                waits_turn=waits_turn,
            ),
        )
        self._promote_follower(work)

    def choose_tier(
        self,
        work: Work,
        level: Complexity | None,
        *,
        completion: Completion | None = None,
        candidate: Candidate | None = None,
    ) -> None:
        """A job that was queued for triage goes to its tier, be it this very one.

        Args:
            work: The job.
            level: The small model's verdict; None where there is none, and the rules decide.
            completion: The answer that the verdict was in.
            candidate: Who gave it.
        """
        work.triage_of = None
        assert self._triage is not None  # noqa: S101 - who sets works up for it has built it
        tier, record = self._triage.decide(work.job, level)
        work.note(DECISION, **record)
        self.move(work, tier, completion=completion, candidate=candidate)

    def move(
        self,
        work: Work,
        tier: str,
        *,
        completion: Completion | None = None,
        candidate: Candidate | None = None,
    ) -> None:
        """The job goes on in another tier's queue; what it was answered here stays in the ledger.

        Args:
            work: The job.
            tier: Its next tier.
            completion: An answer that is not its result.
            candidate: Who gave that.
        """
        release = Release(
            job_id=work.job.id,
            fence=work.job.fence,
            counts=False,
            calls=work.calls,
            unknown_calls=work.unknown_calls,
            tier=tier,
            decision=work.decision,
            lost=work.lost,
        )
        if completion is not None and candidate is not None and _is_paid(work):
            release = self._with_bill(release, completion, candidate)
        self._finish(work, release)

    def lose(
        self,
        work: Work,
        candidate: Candidate,
        error: ProviderError | None,
        received: Received | None,
        together: Sequence[Work],
    ) -> None:
        """Price a call that may have cost something and gave this job no answer.

        Args:
            work: The job.
            candidate: Who was asked.
            error: What came instead; None where the call was given up.
            received: What came of a stream until then.
            together: The jobs of the request; it is counted on the first of them.
        """
        call = price_lost(
            self._pricer,
            work,
            candidate,
            counted=error.usage if error else None,
            received=received,
            share=len(together),
        )
        unknown = error is None or error.unknown_outcome
        calls = int(work is together[0])
        work.lost += (call._replace(calls=calls, unknown_calls=int(unknown)),)

    def leave(self, work: Work) -> None:
        """The job is nobody's claim any more, and not at its end: a provider's batch has it."""
        work.end()
        if self._spending is not None:
            self._spending.end(work, None)
        self._slots.ended(work.job.id)
        self._streams.drop(work.job.id)
        self._forget([work.job.id])
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
                work.end()
                if self._spending is not None:
                    self._spending.end(work, None)
                self._slots.ended(work.job.id)
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
        await self._filling.drain()
        if self._triage is not None:
            await self._triage.drain()
        if self._shadows is not None:
            await self._shadows.drain()

    # -- other tiers -------------------------------------------------------------------------

    def _triaged(self, work: Work, completion: Completion, candidate: Candidate) -> None:
        assert self._triage is not None  # noqa: S101 - as above
        level = self._triage.level(completion)
        if level is not None:
            self._triage.keep(work.triage_key, level)
        self.choose_tier(work, level, completion=completion, candidate=candidate)

    def _is_final(
        self, work: Work, completion: Completion, candidate: Candidate, failing: Failing
    ) -> bool:
        """Let the next tier go on with a job; true if its answer stands although it failed."""
        record = tier_record(work)
        if failing.tier is None:
            work.note(DECISION, **record, failed_check=failing.check)
            return True
        model = completion.model or candidate.model_there
        step = {"tier": work.job.tier, "model": model, "check": failing.check}
        record["chosen"] = failing.tier
        record["escalated_from"] = [*record.get("escalated_from", ()), step]
        work.note(DECISION, **record)
        if self._is_leader(work):
            self._filling.release(work.key or "")
        equal = self._dismiss(work)
        status = CacheStatus.COALESCED if _is_paid(work) else work.cache
        self.move(work, failing.tier, completion=completion, candidate=candidate)
        for follower in equal:  # each is judged by its own checks
            if not self.given_up(follower):
                follower.cache = status
                self.succeed(follower, completion, candidate)
        return False

    def _keep(
        self, work: Work, completion: Completion, candidate: Candidate, *, good: bool
    ) -> None:
        """Let equal jobs have the answer, too, if it is a good one."""
        if good:
            self._filling.keep(work, completion, candidate)
        elif self._is_leader(work):
            self._filling.release(work.key or "")

    def _with_bill(self, release: Release, completion: Completion, candidate: Candidate) -> Release:
        deployment = candidate.deployment
        model = completion.model or candidate.model_there
        usage = completion.usage
        cost = self._pricer.cost(deployment.provider, model, usage, candidate.price_as)
        return dataclasses.replace(
            release,
            model=model,
            provider=deployment.provider,
            deployment=deployment.name,
            usage=usage,
            cost_usd=cost,
        )

    # -- what follows ------------------------------------------------------------------------

    def _finish(self, work: Work, end: Outcome | Release) -> None:
        work.end()
        self._slots.ended(work.job.id)
        if isinstance(end, Outcome):
            self._streams.ending(work.job)
            self._owes_callbacks |= work.job.has_callback
            self._cache_tally.add(work)
        else:
            self._streams.drop(work.job.id)
        if self._spending is not None:
            self._spending.end(work, end)
        self._finisher.add(end)

    def _dismiss(self, work: Work) -> list[Work]:
        """The jobs that waited for this one's call; nobody else will join them."""
        if work.key is not None and self._leaders.get(work.key) is work:
            del self._leaders[work.key]
        followers, work.followers = work.followers, []
        return followers

    def _promote_follower(self, work: Work) -> None:
        """Let the equal jobs have a call of their own, the first of them for all."""
        led = self._is_leader(work)
        live = [follower for follower in self._dismiss(work) if not self.given_up(follower)]
        if led and not live:
            self._filling.release(work.key or "")
        self._lead_on(live)

    def _is_leader(self, work: Work) -> bool:
        return work.key is not None and self._leaders.get(work.key) is work

    def _lead_on(self, works: list[Work]) -> None:
        """Let the first of these equal jobs have a call for all of them."""
        if works:
            heir, *heir.followers = works
            if heir.key is not None:
                self._leaders[heir.key] = heir
            self.restart(heir)

    def _not_bought(
        self, work: Work, completion: Completion, candidate: Candidate, model: str
    ) -> None:
        """The work has its answer from the cache: say what that saved."""
        provider = candidate.deployment.provider
        price = self._pricer.cost(provider, model, completion.usage, candidate.price_as)
        if price is not None:
            work.saved_usd = price + (work.saved_usd or FREE)
        if self._is_leader(work):  # of those who looked for it by its meaning
            self._filling.release(work.key or "")

    def _written(self, outcomes: Sequence[Outcome], written: set[uuid.UUID]) -> None:
        self._announce(written)
        if self._shadows is not None:
            self._shadows.written([outcome.job_id for outcome in outcomes], written)
        self._streams.ended(outcomes, written)
        if self._owes_callbacks:
            self._owes_callbacks = False
            self._wake_callbacks()
        self._filling.written(outcomes)
        for used in self._cache_tally.take():
            self._emit(used)
        self._emit(JobsFinished.of(outcomes, fenced=len(outcomes) - len(written)))
        self._forget([outcome.job_id for outcome in outcomes])

    def _released(self, releases: Sequence[Release], doorbells: Sequence[Doorbell]) -> None:
        delays = {release.job_id: release.delay_s for release in releases}
        called = {release.job_id for release in releases if release.waits_turn}
        loop = asyncio.get_running_loop()
        for bell in doorbells:
            # Should this worker die before, the sweeper rings at the same time. What an earlier
            # turn's end is to wake, the sweeper alone rings for: it knows who has been woken.
            if bell.job_id not in called:
                loop.call_later(delays[bell.job_id], self._ring, [bell])
        self._emit(JobsReleased.of(releases, fenced=len(releases) - len(doorbells)))
        self._forget(list(delays))

    def _forget(self, ids: list[uuid.UUID]) -> None:
        self._claims.let_go(ids)
        if self._feed is not None:
            self._feed.gone(ids)
        if self._spending is not None:
            self._spending.settle(ids)
        for job_id in ids:
            ticket = self._tickets.pop(job_id, None)
            if ticket is not None:
                self._slots.written()
                ticket.wait.settle()


def _is_paid(work: Work) -> bool:
    """True for an answer that was called for, and not found in the cache."""
    return work.cache in {CacheStatus.OFF, CacheStatus.MISS}


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
        turn=work.turn.answered(completion) if work.turn and completion else None,
        lost=work.lost,
        in_conversation="memory_id" in work.job.policy,
    )
