"""Keep the fleet within its budgets: money is reserved before a call and settled after it.

The counters are in Redis, and the ledger is the truth that they are seeded from. Where Redis can't
be asked, or does not know a counter yet, jobs of a hard budget wait: never is there no limit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import itertools
import random
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import Outcome, Release, Usage
from promptfleet_shared.policies.budgets import Budget
from promptfleet_shared.store import costs as costs_store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.line_reservations import ReservedLine
from promptfleet_workers.budget_counters import (
    LINE_HOLD_S,
    Counter,
    Counters,
    End,
    Hold,
    Want,
    job_of,
    line_id,
    nanos,
    unique,
)
from promptfleet_workers.budget_notices import BudgetNotices
from promptfleet_workers.lost_calls import UNBOUNDED_OUTPUT, Prices, output_bound
from promptfleet_workers.output_lengths import OutputLengths
from promptfleet_workers.routing import Candidate
from promptfleet_workers.telemetry import BudgetRefused, Emit
from promptfleet_workers.work import Work

TIMEOUT_S = 1.0
ANNOUNCE_S = 2.0
"""Between two times that a worker says what it holds, so that a server which lost its data knows
of it again."""
QUIET_S = 5.0
"""A server that has just come lets nothing through until all workers have said so."""
HOLD_S = 60.0
"""A reservation without a word from its worker lapses, and the ledger is asked what it became."""
RETRY_S = 2.0
"""About when a job comes back that others' reservations, or a server that is away, kept out."""
MAX_RETRY_S = 30.0
"""The same for one that they have kept out often: a provider's batch may hold money for hours."""
MAX_TRIES = 4
"""Looks at the counters until a batch gets its answer: with seeds and used up models between."""
BYTES_A_TOKEN = 3
"""Of a prompt, when money is reserved for it: rather too much than too little."""
MARGIN = 1.25
"""An unbounded answer may be so much longer than the longest that was seen."""


class Reason(enum.StrEnum):
    """Why a job was not let through."""

    SPENT = "spent"  # the period's money is spent
    HELD = "held"  # what is left is reserved for calls that run
    UNKNOWN = "unknown"  # the counters can't be asked, or are not known yet


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BudgetRefusal:
    """A job that must not be called now.

    Attributes:
        budget: Which one.
        wait_s: Seconds until it makes sense to ask again; None for never.
    """

    budget: str
    reason: Reason
    wait_s: float | None


class Bill(NamedTuple):
    """What is to be paid for, where that is not a call to any candidate of the job's route.

    Attributes:
        candidates: Who may be called.
        usage: Tokens that the call takes at most; None to expect what the job's own call takes.
        prices: None for the usual ones.
    """

    candidates: Sequence[Candidate]
    usage: Usage | None = None
    prices: Prices | None = None


_Bills = Mapping[uuid.UUID, Bill]
_NO_BILLS: _Bills = {}
_NO_METADATA: Mapping[str, str] = {}


class Budgets:
    """Reserves and settles for a worker; lives on its event loop."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        url: str,
        database: AsyncDatabase,
        prices: Prices,
        notices: BudgetNotices,
        emit: Emit,
        announce_s: float = ANNOUNCE_S,
        quiet_s: float = QUIET_S,
        hold_s: float = HOLD_S,
        timeout_s: float = TIMEOUT_S,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Connect with the first batch.

        Args:
            fleet: Its budgets, and which deployments are whose.
            url: As in redis://user:password@host:6379/0.
            database: Of the ledger.
            prices: What tokens cost.
            notices: Who tells of soft limits.
            emit: Hears of jobs that were refused.
            announce_s: See `ANNOUNCE_S`, and so on for the next two.
            quiet_s: More than twice `announce_s`.
            hold_s: Many times `announce_s`.
            timeout_s: Seconds that a round trip may take.
            jitter: As `random.uniform`.
        """
        self._budgets: tuple[Budget, ...] = fleet.budgets
        self._metadata_keys = sorted({b.metadata_key for b in fleet.budgets if b.metadata_key})
        self._most = {name: model.max_output_tokens for name, model in fleet.models.items()}
        self._database = database
        self._prices = prices
        self._emit = emit
        self._announce_s = announce_s
        self._jitter = jitter
        self._counters = Counters(
            fleet,
            url=url,
            database=database,
            notices=notices,
            quiet_s=quiet_s,
            hold_s=hold_s,
            timeout_s=timeout_s,
        )
        self._lengths = OutputLengths(database, self._counters.models)
        self._tasks = self._counters.tasks
        self._held: dict[uuid.UUID, Hold] = {}
        self._beside: dict[uuid.UUID, list[Hold]] = {}
        self._numbers = itertools.count()
        self._ended: dict[uuid.UUID, End] = {}
        self._unsent: list[End] = []
        self._sending = asyncio.Lock()  # what is announced must not be settled meanwhile
        self._closing = asyncio.Event()

    # -- before the calls --------------------------------------------------------------------

    async def reserve(
        self, works: Sequence[Work], bills: _Bills = _NO_BILLS
    ) -> dict[uuid.UUID, BudgetRefusal]:
        """Reserve money for each job that a budget is for, in one round trip; says who gets none.

        A job's candidates whose model's budget is used up leave its route, where others remain.

        Args:
            works: The jobs.
            bills: For those of them that are to be lines of a provider's batch; see `Bill`.
        """
        refusals = await self._reserve_all(works, bills, beside=False)
        if refusals:
            self._emit(BudgetRefused.of(r.budget for r in refusals.values()))
        return refusals

    async def reserve_beside(self, works: Sequence[Work], bills: _Bills) -> set[uuid.UUID]:
        """Reserve money for calls beside the jobs' own; returns the jobs that get some.

        It is settled with the job, whose `lost` calls they are.
        """
        refusals = await self._reserve_all(works, bills, beside=True)
        return {work.job.id for work in works} - refusals.keys()

    async def _reserve_all(
        self, works: Sequence[Work], bills: _Bills, *, beside: bool
    ) -> dict[uuid.UUID, BudgetRefusal]:
        if not self._lengths.is_known:
            await self._lengths.read()
        metadata = await self._metadata_of(works)
        refusals: dict[uuid.UUID, BudgetRefusal] = {}
        open_works = list(works)
        for _ in range(MAX_TRIES):
            asked = [
                (work, Hold(id=self._name_for(work, beside=beside), wants=wants, metadata=known))
                for work in open_works
                if (
                    wants := self._wants(
                        work,
                        known := metadata.get(work.job.id, _NO_METADATA),
                        bills.get(work.job.id) if bills else None,
                    )
                )
            ]
            open_works = await self._reserve(asked, refusals, bills, beside=beside) if asked else []
            if not open_works:
                break
        for work in open_works:
            refusals.setdefault(work.job.id, self._later(work, "budgets"))
        return refusals

    def _name_for(self, work: Work, *, beside: bool) -> str:
        name = line_id(work.job.id, work.job.fence)
        return f"{name}:{next(self._numbers)}" if beside else name

    async def _reserve(
        self,
        asked: Sequence[tuple[Work, Hold]],
        refusals: dict[uuid.UUID, BudgetRefusal],
        bills: _Bills,
        *,
        beside: bool,
    ) -> list[Work]:
        """One look; returns the jobs that are to be asked for again at once."""
        counters = unique(want.counter for _, hold in asked for want in hold.wants)
        jobs = [job_of(hold.id, hold.wants, counters) for _, hold in asked]
        reply = await self._counters.ask("reserve", counters, jobs=jobs)
        if reply is None:
            for work, hold in asked:
                hard = [w for w in hold.wants if self._budgets[w.counter.budget].hard_usd]
                if hard:
                    refusals[work.job.id] = self._later(work, self._name(hard[0].counter))
            return []
        again: list[Work] = []
        if reply["unseeded"]:
            await self._counters.seed([counters[n - 1] for n in reply["unseeded"]])
        for (work, hold), (verdict, place) in zip(asked, reply["verdicts"], strict=True):
            if verdict == "ok":
                self._keep(work, hold, beside=beside)
            elif verdict == "unseeded":
                again.append(work)
            elif verdict == "spent" and not beside and self._leave_out(work, counters[place - 1]):
                if work.job.id in bills:  # where its line goes is to be chosen anew
                    refusals[work.job.id] = BudgetRefusal(
                        budget=self._name(counters[place - 1]), reason=Reason.SPENT, wait_s=0.0
                    )
                else:
                    again.append(work)
            else:
                refusals[work.job.id] = self._refusal(
                    work, verdict, counters[place - 1], reply, place
                )
        return again

    def _keep(self, work: Work, hold: Hold, *, beside: bool) -> None:
        if work.ended:  # given up meanwhile: nobody would settle it
            self._send(End((hold,), ()))
        elif beside:
            self._beside.setdefault(work.job.id, []).append(hold)
        else:
            self._held[work.job.id] = hold

    def _refusal(
        self, work: Work, verdict: str, counter: Counter, reply: Mapping[str, Any], place: int
    ) -> BudgetRefusal:
        name = self._name(counter)
        if verdict == "spent":
            left_ms = reply["left_ms"][place - 1]
            wait_s = None if left_ms < 0 else left_ms / 1000 + self._jitter(0.0, RETRY_S)
            return BudgetRefusal(budget=name, reason=Reason.SPENT, wait_s=wait_s)
        if verdict == "quiet":
            wait_s = reply["quiet_ms"] / 1000 + self._jitter(0.0, 0.1)
            return BudgetRefusal(budget=name, reason=Reason.UNKNOWN, wait_s=wait_s)
        return BudgetRefusal(budget=name, reason=Reason.HELD, wait_s=self._retry_s(work))

    def _later(self, work: Work, budget: str) -> BudgetRefusal:
        return BudgetRefusal(budget=budget, reason=Reason.UNKNOWN, wait_s=self._retry_s(work))

    def _retry_s(self, work: Work) -> float:
        most = min(MAX_RETRY_S, RETRY_S * 1.5 ** min(work.job.deferrals, 10))
        return self._jitter(most / 2, most)

    def _leave_out(self, work: Work, counter: Counter) -> bool:
        """Take a model whose money is spent out of the route; false if that leaves nobody."""
        if self._budgets[counter.budget].by != "model":
            return False
        others = tuple(c for c in work.route if c.model != counter.value)
        if others:
            work.route = others
        return bool(others)

    async def _metadata_of(self, works: Sequence[Work]) -> Mapping[uuid.UUID, Mapping[str, str]]:
        if not self._metadata_keys or not works:
            return {}
        ids = [work.job.id for work in works]
        return await self._database.insist(
            lambda connection: costs_store.metadata_values(connection, ids, self._metadata_keys),
            patience_s=15.0,
        )

    def _wants(
        self, work: Work, metadata: Mapping[str, str], bill: Bill | None
    ) -> tuple[Want, ...]:
        """What is to be reserved for a job: the price of its dearest candidate, or of a model."""
        found = []
        route = work.route if bill is None else bill.candidates
        for place, budget in enumerate(self._budgets):
            if budget.by == "model":
                for name in unique(candidate.model for candidate in route):
                    if budget.counts(name):
                        candidates = [c for c in route if c.model == name]
                        amount = self._price(work, candidates, budget, bill)
                        found.append(Want(Counter(place, name), amount))
                continue
            value = _value_of(budget, work, metadata)
            if value is not None and budget.counts(value):
                amount = self._price(work, route, budget, bill)
                found.append(Want(Counter(place, value), amount))
        return tuple(found)

    def _price(
        self, work: Work, candidates: Sequence[Candidate], budget: Budget, bill: Bill | None
    ) -> int:
        prices = self._prices if bill is None or bill.prices is None else bill.prices
        told = None if bill is None else bill.usage
        prompt = max(work.job.input_tokens, -(-len(work.request) // BYTES_A_TOKEN))
        bound = output_bound(work)
        most = 0
        for c in candidates:
            usage = told
            if usage is None:
                output = self._output(c.model, work, budget) if bound is None else bound
                usage = Usage(input=prompt, output=output)
            price = prices.cost(c.deployment.provider, c.model_there, usage, price_as=c.price_as)
            most = max(most, nanos(price))
        return most

    def _output(self, model: str, work: Work, budget: Budget) -> int:
        """Tokens of an answer that the job does not bound."""
        can = self._most.get(model)
        if budget.reserve == "most":
            return can or UNBOUNDED_OUTPUT
        seen = round(self._lengths.longest(model, work.job.tier) * MARGIN)
        likely = max(seen, budget.reserve_output_tokens)
        return likely if can is None else min(likely, can)

    # -- lines of providers' batches ---------------------------------------------------------

    def record(self, work: Work) -> Mapping[str, int] | None:
        """What the job's line is to say that it has reserved; None for nothing."""
        held = self._held.get(work.job.id)
        return None if held is None else self._counters.record(held.wants)

    async def hand_over(self, works: Iterable[Work]) -> None:
        """These are lines now: what they have reserved is nobody's, until they land."""
        holds = [hold for work in works if (hold := self._held.pop(work.job.id, None))]
        # Should that fail, they lapse, and what lines have reserved is read in Postgres.
        await self._counters.announce(holds, hold_s=LINE_HOLD_S)

    def adopt(self, work: Work, reserved: Mapping[str, int] | None) -> None:
        """The work is a line whose job ends now: what it has reserved is this worker's again."""
        wants = self._counters.wants_of(reserved or {})
        metadata = {
            key: want.counter.value
            for want in wants
            if (key := self._budgets[want.counter.budget].metadata_key) is not None
        }
        name = line_id(work.job.id, work.job.fence)
        self._held[work.job.id] = Hold(id=name, wants=wants, metadata=metadata)

    async def free(self, lines: Sequence[ReservedLine]) -> None:
        """Nobody waits for these lines any more."""
        ends = [
            End((Hold(id=line_id(line.job_id, line.fence), wants=wants),), ())
            for line in lines
            if (wants := self._counters.wants_of(line.reserved))
        ]
        if ends:
            await self._counters.settle(ends)

    # -- after the calls ---------------------------------------------------------------------

    def end(self, work: Work, end: Outcome | Release | None) -> None:
        """A claim has ended and will be written; None for one that somebody else has by now."""
        held = self._held.pop(work.job.id, None)
        beside = self._beside.pop(work.job.id, None) if self._beside else None
        holds = () if held is None else (held,)
        if beside is not None:
            holds = (*holds, *beside)
        if isinstance(end, Outcome) and end.usage.output:
            self._lengths.learn(end.deployment or "", work.job.tier, end.usage.output)
        metadata = holds[0].metadata if holds else _NO_METADATA
        spent = () if end is None else self._spending(work, end, metadata)
        if spent or any(hold.wants for hold in holds):
            self._ended[work.job.id] = End(holds, spent)

    def settle(self, ids: Iterable[uuid.UUID]) -> None:
        """These ends are written: the ledger has what they cost, and the counters may have it."""
        self._send(*(end for end in (self._ended.pop(job_id, None) for job_id in ids) if end))

    def _send(self, *ends: End) -> None:
        starts = not self._unsent
        self._unsent += ends
        if ends and starts:
            self._counters.spawn(self._settle())

    async def _settle(self) -> None:
        async with self._sending:
            ends, self._unsent = self._unsent, []
            await self._counters.settle(ends)

    def _spending(
        self, work: Work, end: Outcome | Release, metadata: Mapping[str, str]
    ) -> tuple[Want, ...]:
        amounts: dict[str, int] = {}
        if end.cost_usd:
            amounts[end.deployment or ""] = nanos(end.cost_usd)
        for call in end.lost:
            counted = call.cost_usd if call.cost_usd is not None else call.at_most_usd
            usd = counted if counted is not None else call.estimated_usd
            amounts[call.deployment] = amounts.get(call.deployment, 0) + nanos(usd)
        total = sum(amounts.values())
        if not total:
            return ()
        found = []
        for place, budget in enumerate(self._budgets):
            if budget.by == "model":
                for deployment, amount in amounts.items():
                    name = self._counters.models.get(deployment)
                    if name is not None and amount and budget.counts(name):
                        found.append(Want(Counter(place, name), amount))
                continue
            value = _value_of(budget, work, metadata)
            if value is not None and budget.counts(value):
                found.append(Want(Counter(place, value), total))
        return tuple(found)

    async def run(self) -> None:
        """Say again and again what this worker holds, until closed."""
        while not self._closing.is_set():
            try:
                async with asyncio.timeout(self._announce_s):
                    await self._closing.wait()
            except TimeoutError:
                await self.announce()

    async def announce(self) -> None:
        """Say what this worker holds; costs nothing where that is nothing."""
        async with self._sending:
            ends = (*self._ended.values(), *self._unsent)
            await self._counters.announce(
                [
                    *self._held.values(),
                    *(hold for holds in self._beside.values() for hold in holds),
                    *(hold for end in ends for hold in end.holds),
                ]
            )

    async def aclose(self) -> None:
        """Settle what is left, and close the connection."""
        self._closing.set()
        await self._counters.aclose()

    def _name(self, counter: Counter) -> str:
        return self._counters.name(counter)


def _value_of(budget: Budget, work: Work, metadata: Mapping[str, str]) -> str | None:
    """Which tenant, tier or value of the metadata a job's spending is counted on."""
    match budget.by:
        case "all":
            return ""
        case "tenant":
            return work.job.tenant
        case "tier":
            return work.job.tier
        case _:
            return metadata.get(budget.metadata_key or "")
