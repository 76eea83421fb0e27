"""Calls beside the jobs' own: within all limits and budgets, now or never, paid by their jobs."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple, Protocol

from uuid_utils.compat import uuid7

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import JobKind, LostCall, Usage
from promptfleet_workers.breaker import Permit, Refusal
from promptfleet_workers.budgets import Bill
from promptfleet_workers.providers.protocol import Answer, Call, Completion
from promptfleet_workers.rate_limits.quotas import Hold
from promptfleet_workers.routing import Candidate
from promptfleet_workers.work import Work

log = logging.getLogger(__name__)

BYTES_A_TOKEN = 4
BYTES_A_RESERVED_TOKEN = 3
"""Rather too much money is reserved than too little."""


class Prices(Protocol):
    """The part of a `Pricer` that is needed here."""

    def cost(
        self, provider: str, model: str, usage: Usage, price_as: str | None = None
    ) -> Decimal | None:
        """US dollars of one call; None where no price is known."""
        ...


class Health(Protocol):
    """The part of the breakers that is needed here."""

    def admit(self, name: str, *, retry: bool) -> Permit | Refusal:
        """Ask for leave to call a deployment now."""
        ...

    def ended(self, permit: Permit, *, ok: bool | None) -> None:
        """Tell how a call ended."""
        ...


class Limits(Protocol):
    """The part of the quotas that is needed here."""

    @property
    def apart(self) -> Callable[[Work], object] | None:
        """Tells jobs apart that must not share a request."""
        ...

    def concerns(self, candidate: Candidate) -> bool:
        """False if no call to this deployment can have a limit."""
        ...

    async def try_reserve(self, candidate: Candidate, works: Sequence[Work]) -> Hold | None:
        """Leave for a call that is made now; None if it would have to wait."""
        ...

    def settle(
        self,
        hold: Hold,
        candidate: Candidate,
        works: Sequence[Work],
        answers: Sequence[Answer] | None,
    ) -> None:
        """Put what the call took in place of what was expected."""
        ...


class Money(Protocol):
    """The part of the budgets that is needed here."""

    async def reserve_beside(
        self, works: Sequence[Work], bills: Mapping[uuid.UUID, Bill]
    ) -> set[uuid.UUID]:
        """Reserve for calls beside those of the jobs; the jobs that get some."""
        ...


class SideRequest(NamedTuple):
    """What is asked on whose behalf, and the tokens that its answer may have."""

    work: Work
    body: str
    max_output: int = 0

    @property
    def tokens(self) -> int:
        """Of the prompt, about."""
        return -(-len(self.body) // BYTES_A_TOKEN)

    def bill(self, route: Sequence[Candidate]) -> Bill:
        """What it may cost."""
        prompt = -(-len(self.body) // BYTES_A_RESERVED_TOKEN)
        return Bill(candidates=route, usage=Usage(input=prompt, output=self.max_output))


class SideCalls:
    """Makes them: bounded in time, admitted by the breakers, never repeated.

    What a limit or a budget has no room for now is not called; it has no answer, at once.
    """

    def __init__(
        self,
        *,
        health: Health,
        prices: Prices,
        timeout_s: float,
        limits: Limits | None = None,
        money: Money | None = None,
    ) -> None:
        """Call nothing yet.

        Args:
            health: Gives leave to call deployments.
            prices: Prices the calls.
            timeout_s: Seconds for each request, all its candidates together.
            limits: The limits of deployments and jobs, where there are any.
            money: The budgets, where there are any.
        """
        self._health = health
        self._prices = prices
        self._timeout_s = timeout_s
        self._limits = limits
        self._money = money

    async def call(
        self,
        route: Sequence[Candidate],
        kind: JobKind,
        asked: Sequence[SideRequest],
        *,
        together: int = 1,
    ) -> list[Completion | None]:
        """An answer for each, or None; its cost is its work's.

        Args:
            route: Who is asked, in turn.
            kind: Of the requests.
            asked: At most one of each work. Money is reserved for all of them together.
            together: How many may share one request.
        """
        afforded = await self._afforded(route, asked)
        parts = self._parts(afforded, together)
        answers = await asyncio.gather(*(self._part(route, kind, part) for part in parts))
        found = {
            id(request): answer
            for part, some in zip(parts, answers, strict=True)
            for request, answer in zip(part, some, strict=True)
        }
        return [found.get(id(request)) for request in asked]

    async def _afforded(
        self, route: Sequence[Candidate], asked: Sequence[SideRequest]
    ) -> Sequence[SideRequest]:
        if self._money is None:
            return asked
        works = [request.work for request in asked]
        bills = {request.work.job.id: request.bill(route) for request in asked}
        try:
            async with asyncio.timeout(self._timeout_s):
                paid = await self._money.reserve_beside(works, bills)
        except TimeoutError:
            return ()  # what was reserved lapses
        return [request for request in asked if request.work.job.id in paid]

    def _parts(
        self, asked: Sequence[SideRequest], together: int
    ) -> Sequence[Sequence[SideRequest]]:
        """Requests of at most so many; of one limit's jobs only, where jobs have limits."""
        apart = None if self._limits is None else self._limits.apart
        groups: dict[object, list[SideRequest]] = {}
        for request in asked:
            groups.setdefault(apart(request.work) if apart else None, []).append(request)
        return [
            group[at : at + together]
            for group in groups.values()
            for at in range(0, len(group), together)
        ]

    async def _part(
        self, route: Sequence[Candidate], kind: JobKind, asked: Sequence[SideRequest]
    ) -> Sequence[Completion | None]:
        try:
            async with asyncio.timeout(self._timeout_s):
                for candidate in route:
                    answers = await self._within_limits(candidate, kind, asked)
                    if answers is not None:
                        return [
                            self._paid(candidate, request.work, answer)
                            for request, answer in zip(asked, answers, strict=True)
                        ]
        except TimeoutError:
            log.info("side_call_late", extra={"kind": kind.value})
        return [None] * len(asked)

    async def _within_limits(
        self, candidate: Candidate, kind: JobKind, asked: Sequence[SideRequest]
    ) -> Sequence[Answer] | None:
        limits = self._limits
        if limits is None or not limits.concerns(candidate):
            return _unless_failed(await self._ask(candidate, kind, asked))
        works = [_side_work(candidate, kind, request) for request in asked]
        # Its answers are short, or none: what is expected of others must not be learned from them.
        apart = dataclasses.replace(candidate, model=f"{candidate.model} beside")
        hold = await limits.try_reserve(apart, works)
        if hold is None:
            return None
        took: Sequence[Answer] | None = None  # nobody knows what an interrupted call took
        try:
            answers = took = await self._ask(candidate, kind, asked)
        finally:
            limits.settle(hold, apart, works, took)
        return _unless_failed(answers)

    async def _ask(
        self, candidate: Candidate, kind: JobKind, asked: Sequence[SideRequest]
    ) -> Sequence[Answer]:
        """An answer each; none if it was not called."""
        permit = self._health.admit(candidate.deployment.name, retry=False)
        if isinstance(permit, Refusal):
            return ()
        ok: bool | None = None
        try:
            answers = await candidate.provider.call(
                Call(
                    kind=kind,
                    model=candidate.model_there,
                    requests=[request.body for request in asked],
                    input_tokens=[request.tokens for request in asked],
                    timeouts=candidate.timeouts,
                )
            )
            ok = True
        except ProviderError as error:
            log.info("side_call_failed", extra={"kind": kind.value, "code": error.code})
            return [error] * len(asked)
        finally:
            # A failure here is no judgement: the deployment's own jobs will tell.
            self._health.ended(permit, ok=ok)
        return answers

    def _paid(self, candidate: Candidate, work: Work, answer: Answer) -> Completion | None:
        if not isinstance(answer, Completion):
            return None
        deployment = candidate.deployment
        model = answer.model or candidate.model_there
        cost = self._prices.cost(deployment.provider, model, answer.usage, candidate.price_as)
        # In the ledger, and not among the job's own calls: those are bounded.
        work.lost += (
            LostCall(
                model=model,
                provider=deployment.provider,
                deployment=deployment.name,
                usage=answer.usage,
                cost_usd=cost,
                calls=0,
            ),
        )
        return answer


def _unless_failed(answers: Sequence[Answer]) -> Sequence[Answer] | None:
    """None if somebody else is to be asked."""
    return answers if any(isinstance(answer, Completion) for answer in answers) else None


def _side_work(candidate: Candidate, kind: JobKind, request: SideRequest) -> Work:
    """The call as its limits see it: the same tenant's, tier's and key's, and nobody's turn."""
    work = request.work
    job = work.job._replace(id=uuid7(), kind=kind, input_tokens=request.tokens, deferrals=0)
    return Work(
        job=job,
        batch=work.batch,
        asked_at=work.asked_at,
        claimed_at=work.claimed_at,
        route=(candidate,),
        request=request.body,
    )
