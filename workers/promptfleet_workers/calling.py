"""Call providers: which jobs share a request, who is asked next, and what a failure means."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence

import orjson

from promptfleet_shared.errors import ProviderError, StoreRefusedError, StoreUnavailableError
from promptfleet_shared.fleet import BatchOptions, Fleet
from promptfleet_shared.jobs import JobError, JobKind, JobState, OnUnknown
from promptfleet_shared.store import claims as claims_store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.alarms import Alarms, this_task
from promptfleet_workers.balancing.balancer import Balancer
from promptfleet_workers.breaker import Refusal
from promptfleet_workers.breakers import Breakers
from promptfleet_workers.budget_refusals import refuse
from promptfleet_workers.budgets import Budgets
from promptfleet_workers.claims import Abort, Claims
from promptfleet_workers.endings import UNKNOWN_OUTCOME, Endings
from promptfleet_workers.providers.protocol import Answer, Call, Completion, Received
from promptfleet_workers.rate_limits.quotas import Quotas
from promptfleet_workers.retries import (
    KEY_STOP_S,
    LIMIT_REACHED,
    QUOTA_REACHED,
    Judgement,
    Verdict,
    classify,
    delay_s,
    speaks_of_health,
)
from promptfleet_workers.routing import Candidate
from promptfleet_workers.token_streams import TokenStreams
from promptfleet_workers.work import Work

log = logging.getLogger(__name__)

CLEARANCE_PATIENCE_S = 30.0

_TOO_LATE = JobError(code="expired", message="the deadline passed before the job succeeded")
_TOO_MANY_CALLS = JobError(code="max_calls", message="the job has cost as many calls as it may")
_ROOM_ENOUGH = contextlib.nullcontext()
_LAST_TRY_S = 2.0
_TOLD_EXACTLY = frozenset({LIMIT_REACHED, QUOTA_REACHED})
_LIST_FIELD = {JobKind.COMPLETION: "prompt", JobKind.EMBEDDING: "input"}


def plan_requests(
    works: Sequence[Work],
    options: BatchOptions,
    apart: Callable[[Work], object] | None = None,
) -> Iterator[list[Work]]:
    """Which works go into one request each.

    Prompts that begin alike come one after the other, so that the provider's prefix cache hits.
    Many go into one request where the deployment takes a list and they differ in nothing else, nor
    in what `apart` says of them.
    """
    ordered = sorted(works, key=lambda work: work.request)
    singles = [work for work in ordered if not _takes_list(work)]
    yield from ([work] for work in singles)
    shared: dict[tuple[object, ...], list[Work]] = {}
    for work in ordered:
        if _takes_list(work):
            group = None if apart is None else apart(work)
            shared.setdefault((group, *_likeness(work)), []).append(work)
    for alike in shared.values():
        yield from _packed(alike, options.max_batch_tokens)


def _takes_list(work: Work) -> bool:
    if work.job.stream:
        return False  # its tokens could not be told from its neighbours'
    return work.job.kind in _LIST_FIELD and work.route[0].deployment.prompts_per_request > 1


def _likeness(work: Work) -> tuple[object, ...]:
    parameters = orjson.loads(work.request)
    parameters.pop(_LIST_FIELD[work.job.kind])
    rest = orjson.dumps(parameters, option=orjson.OPT_SORT_KEYS)
    return work.job.kind, id(work.route), rest


def _packed(works: Sequence[Work], max_tokens: int) -> Iterator[list[Work]]:
    """Requests of at most `prompts_per_request` prompts and `max_tokens` input tokens."""
    limit = works[0].route[0].deployment.prompts_per_request
    request: list[Work] = []
    tokens = 0
    for work in works:
        full = len(request) >= limit or tokens + work.job.input_tokens > max_tokens
        if request and full:
            yield request
            request, tokens = [], 0
        request.append(work)
        tokens += work.job.input_tokens
    yield request


def _tries(work: Work, judgement: Judgement) -> int:
    """How often the job was sent away so: what its next delay grows with."""
    if judgement.otherwise is Verdict.DEFER:
        return 1 if judgement.retry_after_s is not None else work.job.deferrals + 1
    return work.job.attempt


def _not_called(refusal: Refusal) -> ProviderError:
    message = "the deployment was not called: it fails too often at the moment"
    return ProviderError(message, code=refusal.code, retry_after_s=refusal.wait_s)


def _has_sibling(route: Sequence[Candidate], candidate: Candidate) -> bool:
    """True if the next one to ask is another deployment of the same model."""
    place = route.index(candidate) + 1
    return place < len(route) and route[place].model == candidate.model


def _for_all(works: Sequence[Work], error: ProviderError) -> list[Answer]:
    return [error] * len(works)


class Caller:
    """Runs requests, each in a task of its own, so many at once."""

    def __init__(
        self,
        *,
        database: AsyncDatabase,
        fleet: Fleet,
        breakers: Breakers,
        claims: Claims,
        endings: Endings,
        streams: TokenStreams,
        calls: int,
        balancer: Balancer | None = None,
        quotas: Quotas | None = None,
        budgets: Budgets | None = None,
    ) -> None:
        """Call nothing yet; `calls` is how many requests may be in flight."""
        self.budgets = budgets
        self._balancer = balancer
        self._quotas = quotas
        self._listeners = {} if quotas is None else quotas.listeners
        self.apart = None if quotas is None else quotas.apart
        self._database = database
        self._breakers = breakers
        self._fleet = fleet
        self._claims = claims
        self._endings = endings
        self._streams = streams
        self._slots = asyncio.Semaphore(calls)
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarms = Alarms()
        self._rooms: dict[str, asyncio.Semaphore] = {}
        self.draining = False
        endings.restart = self._restart

    async def start(self, works: list[Work]) -> None:
        """Wait for a free slot and start a request for these jobs."""
        await self._slots.acquire()
        live = [work for work in works if self._may_start(work)]
        if not live:
            self._slots.release()
            return
        task = self._alarms.loop.create_task(self._run(live))
        self._tasks.add(task)
        # Not a `finally` within: a task that is cancelled before its first step runs none of it.
        task.add_done_callback(lambda task: self._ended(task, live))
        self._claims.work(task, [work.job for work in live])

    def give_back_idle(self, works: Sequence[Work]) -> None:
        """Queue those again that have not ended, and that nobody is at."""
        for work in works:
            if not work.ended and not self._claims.has_task(work.job.id):
                self._endings.give_back(work, 0.0, counts=False)

    async def idle(self) -> None:
        """Wait until no request is in flight or about to start."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _restart(self, work: Work) -> None:
        if self._balancer is not None:
            self._balancer.place([work])
        again = self.start([work]) if self.budgets is None else self._start_if_afforded(work)
        self._keep(asyncio.create_task(again))

    async def afford(self, works: list[Work]) -> list[Work]:
        """Reserve money for these jobs; those that get none leave, and are not returned."""
        if self.budgets is None:
            return works
        refusals = await self.budgets.reserve(works)
        for work in works if refusals else ():
            if (refusal := refusals.get(work.job.id)) is not None:
                refuse(self._endings, work, refusal)
        return [work for work in works if not work.ended]

    async def _start_if_afforded(self, work: Work) -> None:
        try:
            works = await self.afford([work])
        except (StoreRefusedError, StoreUnavailableError):
            self.give_back_idle([work])
            return
        if works:
            await self.start(works)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _may_start(self, work: Work) -> bool:
        if self._endings.given_up(work):
            return False
        if self.draining:
            self._endings.give_back(work, 0.0, counts=False)
        elif work.remaining_s <= 0:
            self._endings.fail(work, _TOO_LATE, state=JobState.EXPIRED)
        elif work.job.calls and self._is_spent(work):
            self._endings.fail(work, _TOO_MANY_CALLS)
        return not work.ended

    def _is_spent(self, work: Work) -> bool:
        return work.all_calls >= self._fleet.retry_options(work.job.tier).max_calls

    async def _run(self, works: list[Work]) -> None:
        try:
            await self._call(works)
        except asyncio.CancelledError:
            pass  # given up; `_ended` sees to it
        except (StoreRefusedError, StoreUnavailableError) as error:
            log.warning("clearance_failed", extra={"jobs": len(works), "error": str(error)})
            for work in works:
                if not self._endings.given_up(work):
                    self._endings.give_back(work, 0.0, counts=False)
        except Exception as error:  # noqa: BLE001 - a bug must fail its jobs, not hang them
            name = type(error).__name__
            log.error("call_crashed", extra={"error": name})  # noqa: TRY400 - a traceback could show a prompt
            for work in works:
                if not work.ended:
                    message = f"a bug in the worker or its provider ({name})"
                    self._endings.fail(work, JobError(code="internal", message=message))

    def _ended(self, task: asyncio.Task[None], works: list[Work]) -> None:
        self._tasks.discard(task)
        self._slots.release()
        self._claims.rest([work.job for work in works])
        for work in works:
            self._endings.given_up(work)

    async def _call(self, works: list[Work]) -> None:
        """Try the candidates in order until there is nothing left to try the next one for."""
        for candidate in works[0].route:
            if works[0].place is not None and self._balancer is not None:
                self._balancer.move(works, candidate)
            async with self._room_at(candidate):
                if self._quotas is not None and self._quotas.concerns(candidate):
                    works, answers = await self._ask_within_limits(self._quotas, candidate, works)
                else:
                    if self._need_clearance(works):
                        works = await self._cleared(works)
                    answers = await self._ask(candidate, works) if works else ()
            unanswered = []
            for work, answer in zip(works, answers, strict=True):
                if isinstance(answer, Completion):
                    self._endings.succeed(work, answer, candidate)
                elif self._may_ask_next(work, answer, candidate):
                    unanswered.append(work)
                else:
                    self._judge(work, answer, candidate)
            works = unanswered
            if not works:
                return

    async def _ask_within_limits(
        self, quotas: Quotas, candidate: Candidate, works: list[Work]
    ) -> tuple[list[Work], Sequence[Answer]]:
        """Wait for the call's turn, and settle what it took; those that are left, and answers."""
        is_last = not _has_sibling(works[0].route, candidate)
        hold = await quotas.reserve(candidate, works, is_last=is_last)
        if isinstance(hold, ProviderError):
            return works, _for_all(works, hold)
        answers: Sequence[Answer] | None = ()
        try:
            if self._need_clearance(works):
                works = await self._cleared(works)
            if works:
                answers = None  # nobody knows what an interrupted call took
                answers = await self._ask(candidate, works)
        finally:
            quotas.settle(hold, candidate, works, answers)
        return works, answers or ()

    def _may_ask_next(self, work: Work, error: ProviderError, candidate: Candidate) -> bool:
        if candidate is work.route[-1] or classify(error).verdict is not Verdict.NEXT:
            return False
        if error.code == QUOTA_REACHED and not _has_sibling(work.route, candidate):
            return False  # waiting for a turn is no reason for an answer of another model
        return work.remaining_s > 0 and not work.must_not_repeat and not self._is_spent(work)

    def _need_clearance(self, works: list[Work]) -> bool:
        """True if the database must be asked before these jobs are called (once more)."""
        for work in works:
            if work.calls or work.job.on_unknown is OnUnknown.FAIL:
                return True
        return not self._claims.is_fresh(works[0].asked_at)

    async def _cleared(self, works: list[Work]) -> list[Work]:
        """Those that are still ours to call; what their calls may cost is written down."""
        while not self._claims.is_fresh(works[0].asked_at):
            await self._claims.confirmation()
        begun = {
            work.job.id: (work.job.fence, work.calls + 1)
            for work in works
            if work.calls or work.job.on_unknown is OnUnknown.FAIL
        }
        if begun:
            held = await self._database.insist(
                lambda connection: claims_store.begin_calls(connection, begun),
                patience_s=CLEARANCE_PATIENCE_S,
            )
            for job_id in begun:
                if (cancelled := held.get(job_id)) is not False:
                    self._claims.abort(job_id, Abort.CANCELLED if cancelled else Abort.FENCED)
        return [work for work in works if not self._endings.given_up(work)]

    async def _ask(self, candidate: Candidate, works: list[Work]) -> Sequence[Answer]:
        """One request to one deployment, if its breaker gives leave."""
        first = works[0]
        left_s = first.remaining_s if len(works) == 1 else min(work.remaining_s for work in works)
        if left_s <= 0:
            return _for_all(works, ProviderError("no time was left for a call", code="timeout"))
        retry = first.all_calls > 0 or first.job.attempt > 1
        permit = self._breakers.admit(candidate.deployment.name, retry=retry)
        if isinstance(permit, Refusal):
            return _for_all(works, _not_called(permit))
        ok: bool | None = None
        first.calls += 1  # a request that jobs share is counted on the first of them
        started = time.perf_counter()
        try:
            limit_s = candidate.timeouts.timeout_ms / 1000
            received = Received() if candidate.deployment.stream or first.job.stream else None
            answers = await self._call_within(min(limit_s, left_s), candidate, works, received)
            ok = self._take_note(candidate, works, answers, received)
            if ok is False and left_s < limit_s and time.perf_counter() - started >= left_s:
                ok = None  # it had less time than it may take: the job's deadline is not its fault
        finally:
            self._breakers.ended(permit, ok=ok)
        elapsed_ms = (time.perf_counter() - started) * 1000
        if self._balancer is not None:
            self._balancer.ended(candidate, elapsed_ms / 1000, answers)
        for work in works:
            work.provider_ms = elapsed_ms
        return answers

    def _take_note(
        self,
        candidate: Candidate,
        works: list[Work],
        answers: Sequence[Answer],
        received: Received | None,
    ) -> bool | None:
        """Count what the answers cost; returns what they say about the deployment's health."""
        health: bool | None = None
        for work, answer in zip(works, answers, strict=True):
            if isinstance(answer, Completion):
                health = True
                continue
            judgement = classify(answer)
            if answer.unknown_outcome or answer.usage is not None:
                self._endings.lose(work, candidate, answer, received, works)
            if answer.unknown_outcome:
                work.unknown_calls += 1
            elif judgement.otherwise is Verdict.DEFER and work.calls:
                work.calls -= 1  # refused before any work was done: no money, and no try
            if judgement.stops_key:
                self._breakers.stop(candidate.deployment.name, KEY_STOP_S, alone=judgement.alone)
            elif health is None and speaks_of_health(judgement):
                health = False
        return health

    async def _call_within(
        self,
        limit_s: float,
        candidate: Candidate,
        works: list[Work],
        received: Received | None,
    ) -> Sequence[Answer]:
        """The answers, or for each job the failure of the whole request."""
        on_text = self._streams.begin([work.job for work in works])
        call = Call(
            kind=works[0].job.kind,
            model=candidate.model_there,
            requests=[work.request for work in works],
            input_tokens=[work.job.input_tokens for work in works],
            timeouts=candidate.timeouts,
            stream=candidate.deployment.stream or on_text is not None,
            on_text=on_text,
            received=received,
            on_headers=self._listeners.get(candidate.deployment.name),
        )
        loop = self._alarms.loop
        task = this_task(loop)
        self._alarms.set(task, loop.time() + limit_s)
        try:
            return await candidate.provider.call(call)
        except asyncio.CancelledError:
            if not self._alarms.went_off(task):
                for work in works:
                    work.unknown_calls += 1
                    self._endings.lose(work, candidate, None, received, works)
                raise
            late = ProviderError("the call took too long", code="timeout", unknown_outcome=True)
            return _for_all(works, late)
        except ProviderError as error:
            return _for_all(works, error)
        finally:
            self._alarms.clear(task)

    def _room_at(self, candidate: Candidate) -> contextlib.AbstractAsyncContextManager[object]:
        """A place among the calls that its deployment takes at once, where that is bounded."""
        bound = candidate.deployment.max_concurrent_calls
        if bound is None:
            return _ROOM_ENOUGH
        name = candidate.deployment.name
        if name not in self._rooms:
            self._rooms[name] = asyncio.Semaphore(bound)
        return self._rooms[name]

    def _judge(self, work: Work, error: ProviderError, candidate: Candidate) -> None:
        """The call failed for this job: give it back for later, or end it."""
        judgement = classify(error)
        verdict = judgement.otherwise  # whoever else there was has been asked
        facts = JobError(code=error.code, message=error.message, status=error.status)
        options = self._fleet.retry_options(work.job.tier)
        spent = work.job.attempt > options.retry_attempts or work.all_calls >= options.max_calls
        wait_s = delay_s(options, _tries(work, judgement), judgement.retry_after_s, random.random)
        if error.code in _TOLD_EXACTLY and error.retry_after_s is not None:
            wait_s = error.retry_after_s  # its own place in line: nobody else was told the same
            if wait_s >= work.remaining_s > _LAST_TRY_S:
                wait_s = work.remaining_s * 0.8  # the line may be faster than it is expected to be
        if work.must_not_repeat:
            self._endings.fail(work, UNKNOWN_OUTCOME, candidate=candidate)
        elif verdict is Verdict.FINAL:
            self._endings.fail(work, facts, candidate=candidate, shared=True)
        elif verdict is Verdict.RETRY and spent and work.remaining_s > 0:
            self._endings.fail(work, facts, candidate=candidate)
        elif wait_s >= work.remaining_s:
            self._endings.fail(work, facts, candidate=candidate, state=JobState.EXPIRED)
        else:
            counts = verdict is Verdict.RETRY
            self._endings.give_back(work, wait_s, counts=counts, error=facts)
