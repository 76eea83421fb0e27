"""Reserve before a call and settle after it: what the calling of providers sees of the limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Protocol

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import DEFAULT_PRIORITY, JobKind, Usage
from promptfleet_shared.policies.limits import Dimension
from promptfleet_workers.providers.protocol import Answer, Completion
from promptfleet_workers.rate_limits.asking import (
    Grant,
    LimitKeeper,
    News,
    Reservation,
    Verdict,
    unused,
)
from promptfleet_workers.rate_limits.costs import CostLearner, Costs, PriceOf
from promptfleet_workers.rate_limits.counts import NOBODY, LimitCounts
from promptfleet_workers.rate_limits.keys import KeyBook, LimitKey, Plan
from promptfleet_workers.rate_limits.learning import limits_told
from promptfleet_workers.retries import LIMIT_REACHED, QUOTA_REACHED, FailureKind, classify
from promptfleet_workers.routing import Candidate
from promptfleet_workers.work import Work

POLL_S = 0.05
"""Between two looks for a permit that a call of another worker may have given back."""
AT_ONCE_S = 0.05
"""What calls that can't wait still wait: a busy limit gives out its turns one by one."""
PAUSE_S = 1.0
"""After a refusal that does not say how long."""
LONGEST_PAUSE_S = 3600.0
LISTEN_S = 1.0
"""Limits that providers tell are read once in so many seconds."""
BELIEVED_S = 3600.0
"""A limit that a refusal named may have been raised by then, and no answer would say so."""
_NOTHING = Costs(requests=0.0)
_REFUSED = Costs()  # what was refused counts as a request, as with OpenAI
_NOT_SENT = frozenset({"circuit_open", "key_stopped", "retry_budget", "connect_error"})
_FIRST_CALL_S = 1.0
_MAX_PROBES = 10_000
_CERTAIN = (None, Dimension.REQUESTS)


class Prices(Protocol):
    """Knows what usage costs."""

    def cost(
        self, provider: str, model: str, usage: Usage, price_as: str | None = None
    ) -> Decimal | None:
        """US dollars; None where no price is known."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    """What a call reserved of one key, and for which of its jobs; None for all, as one request."""

    key: LimitKey
    cost: float
    jobs: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """What is reserved for a call; settled exactly once.

    Attributes:
        id: Of its permits.
        started: When the call may start, by `time.monotonic`.
    """

    id: str
    works: Sequence[Work]
    items: Sequence[_Item]
    expected: Sequence[Costs]
    plan: Plan | None
    sure: bool = True
    started: float = 0.0

    @property
    def reservation(self) -> Reservation:
        """What is asked for."""
        turn = max(min(work.job.deferrals, 2) for work in self.works)
        if any(work.job.priority > DEFAULT_PRIORITY for work in self.works):
            turn = 2
        items = [(item.key, item.cost) for item in self.items]
        return Reservation(id=self.id, items=items, turn=turn, sure=self.sure)


class Quotas:
    """The limits of all calls of a worker."""

    def __init__(
        self,
        keeper: LimitKeeper,
        book: KeyBook,
        *,
        patience_s: float,
        prices: Prices,
        random: Callable[[], float] = random.random,
    ) -> None:
        """Reserve nothing yet.

        Args:
            keeper: Who counts.
            book: Which limits a call has.
            patience_s: Seconds that a call waits here at most.
            prices: For limits in dollars.
            random: Gives numbers from 0 to 1.
        """
        self._keeper = keeper
        self._book = book
        self._patience_s = patience_s
        self._prices = prices
        self._random = random
        self._learner = CostLearner()
        self._turns: dict[str, asyncio.Lock] = {}
        self._waiting: dict[str, int] = {}
        self._freed: dict[str, asyncio.Event] = {}
        self._call_s: dict[str, float] = {}
        self._probes: dict[uuid.UUID, tuple[Grant, Reservation]] = {}
        self.counts = LimitCounts()
        for plan in book.plans.values():
            self.counts.know(plan.keys)
        self.listeners: Mapping[str, Callable[[Mapping[str, str]], None]] = {
            name: _Listener(plan, keeper).hear
            for name, plan in book.plans.items()
            if plan.learns and plan.rates
        }

    def concerns(self, candidate: Candidate) -> bool:
        """False if no call to this deployment can have a limit."""
        return self._book.has_rules or candidate.deployment.name in self._book.plans

    @property
    def apart(self) -> Callable[[Work], object] | None:
        """Tells jobs apart that must not share a request: one's limit would hold up the other."""
        return _group if self._book.has_rules else None

    async def reserve(
        self, candidate: Candidate, works: Sequence[Work], *, is_last: bool = True
    ) -> Hold | ProviderError:
        """Wait for a call's turn; or say why it has none soon.

        Args:
            candidate: Who is to be called.
            works: For whom; in one request.
            is_last: False if another deployment of the model is asked next, so that the jobs join
                no line yet; the last one's refusal is a place in the shortest of the lines.

        Returns:
            What is to be settled after the call; or the failure of all its jobs, whose
            `retry_after_s` is their place in line.
        """
        hold = self._estimate(candidate, works)
        if not hold.items:
            return hold
        asked_at = time.monotonic()
        reservation = dataclasses.replace(hold.reservation, probe=not is_last)
        if works[0].job.id in self._probes:
            reservation = dataclasses.replace(reservation, probe=True)
        grant = await self._ask(hold, reservation, is_last=is_last)
        self.counts.alone += grant.alone
        if grant.verdict is not Verdict.GO:
            grant = await self._queue(works[0].job.id, reservation, grant, is_last=is_last)
            return self._refused(works, grant, is_last=is_last)
        self._probes.pop(works[0].job.id, None)
        await self._wait(reservation, grant)
        waited_s = time.monotonic() - asked_at
        label = grant.decisive.label if grant.decisive else NOBODY
        self.counts.reserved[label] += 1
        if grant.decisive is not None:
            self.counts.waited_s[label] += waited_s
            _note(works, waited_s, label)
        return dataclasses.replace(hold, started=time.monotonic())

    async def try_reserve(self, candidate: Candidate, works: Sequence[Work]) -> Hold | None:
        """Leave for a call that is made now or never: None if it would have to wait."""
        hold = self._estimate(candidate, works)
        if not hold.items:
            return hold
        if self._full_turn(hold) is not None:
            return None
        reservation = dataclasses.replace(hold.reservation, probe=True)
        grant = await self._keeper.reserve(reservation)
        self.counts.alone += grant.alone
        if grant.verdict is not Verdict.GO:
            return None
        if grant.wait_s > AT_ONCE_S:
            self._tell(unused(reservation))
            return None
        await self._wait(reservation, grant)
        self.counts.reserved[grant.decisive.label if grant.decisive else NOBODY] += 1
        return dataclasses.replace(hold, started=time.monotonic())

    def settle(
        self,
        hold: Hold,
        candidate: Candidate,
        works: Sequence[Work],
        answers: Sequence[Answer] | None,
    ) -> None:
        """Put what the call took in place of what was expected.

        Args:
            hold: From `reserve`.
            candidate: Who was called.
            works: Those of its jobs that the call was made for.
            answers: One each, none if the call was never made; None if it was interrupted, so that
                nobody knows what it took.
        """
        if not hold.items:
            return
        took = self._all_took(hold, candidate, works, answers)
        news = News()
        for item in hold.items:
            if item.key.kind == "permits":
                news.returned.append((item.key, hold.id))
            elif item.key.dimension is not None:
                used = item.key.cost(_sum(took, item.jobs))
                self.counts.used[item.key.label] += used
                if used != item.cost:
                    news.settled.append((item.key, used - item.cost))
        if hold.plan is not None and answers:
            self._tell_health(hold, hold.plan, candidate, answers, news)
        self._tell(news)

    def _all_took(
        self,
        hold: Hold,
        candidate: Candidate,
        works: Sequence[Work],
        answers: Sequence[Answer] | None,
    ) -> Sequence[Costs]:
        """What each of the hold's jobs took."""
        if answers is None:
            return hold.expected
        given = {id(work): answer for work, answer in zip(works, answers, strict=False)}
        return [
            self._took(candidate, work, given[id(work)], expected)
            if id(work) in given
            else _NOTHING
            for work, expected in zip(hold.works, hold.expected, strict=True)
        ]

    async def aclose(self) -> None:
        """Tell what is left."""
        await self._keeper.aclose()

    # -- what it will take -----------------------------------------------------------------

    def _estimate(self, candidate: Candidate, works: Sequence[Work]) -> Hold:
        plan = self._book.plans.get(candidate.deployment.name)
        rules = [self._book.of_job(work.job) for work in works] if self._book.has_rules else []
        keys = (*(plan.keys if plan else ()), *(key for each in rules for key in each))
        price_of = self._price_of(candidate) if _counts_dollars(keys) else None
        expected = [
            self._learner.expect(
                candidate.model,
                work.job.tier,
                [(work.job.kind, work.request, work.job.input_tokens)],
                price_of,
            )
            for work in works
        ]
        whole = _sum(expected, None)
        items = [
            _Item(key=key, cost=key.cost(whole), jobs=None) for key in (plan.keys if plan else ())
        ]
        owners: dict[str, tuple[LimitKey, list[int]]] = {}
        for n, each in enumerate(rules):
            for key in each:
                owners.setdefault(key.name, (key, []))[1].append(n)
        items += [
            _Item(key=key, cost=key.cost(_sum(expected, jobs)), jobs=tuple(jobs))
            for key, jobs in owners.values()
        ]
        return Hold(
            id=uuid.uuid4().hex,
            works=works,
            items=items,
            expected=expected,
            plan=plan,
            sure=self._is_sure(candidate.model, works[0].job.tier, items),
        )

    def _is_sure(self, model: str, tier: str, items: Sequence[_Item]) -> bool:
        """False where what is expected of the call is a mere guess."""
        certain = all(item.key.dimension in _CERTAIN for item in items)
        return certain or self._learner.is_sure(model, tier)

    def _price_of(self, candidate: Candidate) -> PriceOf:
        def price_of(usage: Usage) -> Decimal | None:
            provider = candidate.deployment.provider
            return self._prices.cost(provider, candidate.model_there, usage, candidate.price_as)

        return price_of

    def _took(self, candidate: Candidate, work: Work, answer: Answer, expected: Costs) -> Costs:
        """What one job's part of a call took, as far as anybody knows."""
        if isinstance(answer, ProviderError):
            if answer.code in _NOT_SENT:
                return _NOTHING
            known = classify(answer).kind in {FailureKind.RATE_LIMIT, FailureKind.OVERLOAD}
            return _REFUSED if known and not answer.unknown_outcome else expected
        usage = answer.usage
        # Anthropic's limits do not count what it reads from its cache.
        unlimited = usage.cached if candidate.deployment.provider == "anthropic" else 0
        counted = Usage(input=usage.input - unlimited, output=usage.output)
        self._learner.learn(
            candidate.model,
            work.job.tier,
            estimated=work.job.input_tokens,
            usage=counted,
            is_answer=work.job.kind is not JobKind.EMBEDDING,
        )
        dollars = self._price_of(candidate)(usage) if expected.dollars else None
        return Costs(
            input_tokens=counted.input, output_tokens=counted.output, dollars=float(dollars or 0)
        )

    # -- waiting ---------------------------------------------------------------------------

    async def _wait(self, reservation: Reservation, grant: Grant) -> None:
        """Until the call's turn; gives the turn back where the job is given up before."""
        if grant.wait_s <= 0:
            return
        try:
            await asyncio.sleep(grant.wait_s)
        except asyncio.CancelledError:
            self._tell(unused(reservation))
            raise

    def _tell(self, news: News) -> None:
        self._keeper.tell(news)
        for key, _ in news.returned:
            if key.name in self._freed:
                self._freed[key.name].set()

    def _full_turn(self, hold: Hold) -> LimitKey | None:
        """Permits that others wait for already: they come first."""
        for item in hold.items:
            if item.key.kind == "permits" and self._waiting.get(item.key.name):
                return item.key
        return None

    async def _ask(self, hold: Hold, reservation: Reservation, *, is_last: bool) -> Grant:
        """Whether, and when, the call may go; waits for a permit where nobody else has one."""
        full = self._full_turn(hold)
        if full is None:
            grant = await self._keeper.reserve(reservation)
            if grant.verdict is not Verdict.BUSY or grant.decisive is None:
                return grant
            full = grant.decisive
        return await self._in_turn(full, reservation) if is_last else self._too_busy(full, 1)

    def _too_busy(self, key: LimitKey, ahead: int) -> Grant:
        """As many calls as there are permits end in the time that one call takes."""
        rounds = max(1.0, ahead / (key.limit or ahead))
        wait_s = self._call_s.get(key.name, _FIRST_CALL_S) * rounds * (0.5 + self._random())
        return Grant(verdict=Verdict.LATER, wait_s=wait_s, decisive=key)

    async def _in_turn(self, key: LimitKey, reservation: Reservation) -> Grant:
        """Wait for a permit behind those who wait already; only the first of them asks."""
        lock = self._turns.setdefault(key.name, asyncio.Lock())
        freed = self._freed.setdefault(key.name, asyncio.Event())
        self._waiting[key.name] = self._waiting.get(key.name, 0) + 1
        ahead = self._waiting[key.name]
        try:
            async with asyncio.timeout(self._patience_s), lock:
                while True:
                    freed.clear()
                    grant = await self._keeper.reserve(reservation)
                    if grant.verdict is not Verdict.BUSY:
                        return grant
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL_S * (0.5 + self._random())):
                            await freed.wait()
        except TimeoutError:
            return self._too_busy(key, ahead)
        finally:
            self._waiting[key.name] -= 1
            if not self._waiting[key.name]:  # keys of tenants must not fill our memory
                for kept in (self._waiting, self._turns, self._freed):
                    kept.pop(key.name, None)

    async def _queue(
        self, job_id: uuid.UUID, reservation: Reservation, grant: Grant, *, is_last: bool
    ) -> Grant:
        """Join the shortest of the lines at the deployments that have been asked."""
        if not reservation.probe:
            return grant
        best = min(
            (grant, reservation),
            self._probes.pop(job_id, (grant, reservation)),
            key=lambda probed: probed[0].wait_s,
        )
        if not is_last and _is_deployments(grant.decisive):
            if len(self._probes) >= _MAX_PROBES:
                self._probes.clear()
            self._probes[job_id] = best
            return grant
        if best[0].decisive is not None and best[0].decisive.kind == "permits":
            return best[0]  # there is no line for these
        joined = await self._keeper.reserve(dataclasses.replace(best[1], probe=False))
        if joined.verdict is Verdict.BUSY:
            return best[0]
        if joined.verdict is Verdict.GO:  # by now there is room: for the next time
            self._tell(unused(best[1]))
            return dataclasses.replace(joined, verdict=Verdict.LATER, decisive=grant.decisive)
        return joined

    def _refused(self, works: Sequence[Work], grant: Grant, *, is_last: bool) -> ProviderError:
        label = grant.decisive.label if grant.decisive else NOBODY
        is_deployments = _is_deployments(grant.decisive)
        if is_last or not is_deployments:
            self.counts.refused[label] += 1
            self.counts.waited_s[label] += grant.wait_s
            _note(works, grant.wait_s, label)
        message = f"the limit {label} has no room for the call just now"
        code = QUOTA_REACHED if is_deployments else LIMIT_REACHED
        return ProviderError(message, code=code, retry_after_s=grant.wait_s)

    # -- the deployment's health -----------------------------------------------------------

    def _tell_health(
        self,
        hold: Hold,
        plan: Plan,
        candidate: Candidate,
        answers: Sequence[Answer],
        news: News,
    ) -> None:
        errors = [answer for answer in answers if isinstance(answer, ProviderError)]
        if any(error.code in _NOT_SENT for error in errors):
            return
        kinds = {classify(error).kind for error in errors}
        if FailureKind.RATE_LIMIT in kinds:
            told = max(error.retry_after_s or PAUSE_S for error in errors)
            news.refusals.append((plan.health, min(told, LONGEST_PAUSE_S)))
            if plan.key_health is not None:  # others of its deployments may have room
                news.refusals.append((plan.key_health, 0.0))
            self.counts.throttled[candidate.deployment.name] += 1
        for error in errors if plan.learns else ():
            for name, limit in (error.limits or {}).items():
                if (key := plan.rates.get(Dimension(name))) is not None:
                    news.told.append((key, limit, BELIEVED_S))
        call_s = time.monotonic() - hold.started
        for key in plan.permits:
            known = self._call_s.get(key.name, call_s)
            self._call_s[key.name] = known + 0.1 * (call_s - known)
            if key.adaptive:
                ok = not kinds & _OVERLOADED
                if ok and not any(isinstance(answer, Completion) for answer in answers):
                    continue
                news.outcomes.append((plan.health, key, ok))


_OVERLOADED = frozenset({FailureKind.RATE_LIMIT, FailureKind.OVERLOAD, FailureKind.UNKNOWN_OUTCOME})


class _Listener:
    """Reads the limits that a deployment's responses tell of, once in a while."""

    def __init__(self, plan: Plan, keeper: LimitKeeper) -> None:
        self._keys = plan.rates
        self._keeper = keeper
        self._next_at = 0.0
        self._known: dict[Dimension, float] = {}

    def hear(self, headers: Mapping[str, str]) -> None:
        """Take note of what has changed."""
        now = time.monotonic()
        if now < self._next_at:
            return
        self._next_at = now + LISTEN_S
        news = News()
        for dimension, limit in limits_told(headers):
            key = self._keys.get(dimension)
            if key is not None and self._known.get(dimension) != limit:
                self._known[dimension] = limit
                news.told.append((key, limit, 0.0))
        if news:
            self._keeper.tell(news)


def _is_deployments(key: LimitKey | None) -> bool:
    """True for a limit of the deployment or its API key, false for a rule of our own."""
    return key is None or key.kind == "health" or key.health is not None


def _group(work: Work) -> object:
    return work.job.tenant, work.job.policy.get("limit_key")


def _counts_dollars(keys: Sequence[LimitKey]) -> bool:
    return any(key.dimension is Dimension.DOLLARS for key in keys)


def _sum(costs: Sequence[Costs], jobs: Sequence[int] | None) -> Costs:
    """Of these jobs; None for all of them, as the one request that they share."""
    chosen = costs if jobs is None else [costs[n] for n in jobs]
    requests = [each.requests for each in chosen]
    return Costs(
        requests=max(requests, default=0.0) if jobs is None else sum(requests),
        input_tokens=sum(each.input_tokens for each in chosen),
        output_tokens=sum(each.output_tokens for each in chosen),
        dollars=sum(each.dollars for each in chosen),
    )


def _note(works: Sequence[Work], waited_s: float, label: str) -> None:
    for work in works:
        before = work.job.decision.get("limits")
        earlier = before.get("waited_ms", 0) if isinstance(before, dict) else 0
        here = (work.decision or {}).get("limits", {}).get("waited_ms", earlier)
        work.note("limits", waited_ms=here + round(waited_s * 1000), limit=label)
