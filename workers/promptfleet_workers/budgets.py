"""Keep the fleet within its budgets: money is reserved before a call and settled after it.

The counters are in Redis, and the ledger is the truth that they are seeded from. Where Redis can't
be asked, or does not know a counter yet, jobs of a hard budget wait: never is there no limit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import hashlib
import importlib.resources
import logging
import random
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import orjson

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import Outcome, Release, Usage
from promptfleet_shared.policies.budgets import NANOS, Budget
from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_shared.store import costs as costs_store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.budget_notices import BudgetNotices
from promptfleet_workers.lost_calls import Prices, most_output
from promptfleet_workers.routing import Candidate
from promptfleet_workers.telemetry import BudgetRefused, Emit
from promptfleet_workers.work import Work

log = logging.getLogger(__name__)

HOME = "promptfleet:{budgets}:home"
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
MAX_TRIES = 4
"""Looks at the counters until a batch gets its answer: with seeds and used up models between."""
BYTES_A_TOKEN = 3
"""Of a prompt, when money is reserved for it: rather too much than too little."""


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


class _Counter(NamedTuple):
    """One budget of one tenant, tier, model …; its place in the configuration and its value."""

    budget: int
    value: str


class _Want(NamedTuple):
    counter: _Counter
    amount: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """What a claim has reserved, and what its spending is counted on."""

    id: str
    wants: tuple[_Want, ...]
    metadata: Mapping[str, str]


class _End(NamedTuple):
    id: str
    reserved: tuple[_Want, ...]
    spent: tuple[_Want, ...]


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
        self._models = {d.name: m for m, model in fleet.models.items() for d in model.deployments}
        self._metadata_keys = sorted({b.metadata_key for b in fleet.budgets if b.metadata_key})
        self._database = database
        self._prices = prices
        self._notices = notices
        self._emit = emit
        self._announce_s = announce_s
        self._quiet_ms = round(quiet_s * 1000)
        self._hold_ms = round(hold_s * 1000)
        self._timeout_s = timeout_s
        self._jitter = jitter
        self._held: dict[uuid.UUID, _Held] = {}
        self._ended: dict[uuid.UUID, _End] = {}
        self._unsent: list[_End] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()  # what is announced must not be settled meanwhile
        self._redis = impatient_client(url, connect_s=timeout_s)
        files = importlib.resources.files("promptfleet_workers")
        self._script = self._redis.register_script(files.joinpath("budget.lua").read_text("utf-8"))
        self._closing = asyncio.Event()

    # -- before the calls --------------------------------------------------------------------

    async def reserve(self, works: Sequence[Work]) -> dict[uuid.UUID, BudgetRefusal]:
        """Reserve money for each job that a budget is for, in one round trip; says who gets none.

        A job's candidates whose model's budget is used up leave its route, where others remain.
        """
        metadata = await self._metadata_of(works)
        refusals: dict[uuid.UUID, BudgetRefusal] = {}
        open_works = list(works)
        for _ in range(MAX_TRIES):
            asked = [
                (work, wants)
                for work in open_works
                if (wants := self._wants(work, metadata.get(work.job.id, {})))
            ]
            open_works = await self._reserve(asked, metadata, refusals) if asked else []
            if not open_works:
                break
        for work in open_works:
            refusals.setdefault(work.job.id, self._later("budgets"))
        if refusals:
            self._emit(BudgetRefused.of(r.budget for r in refusals.values()))
        return refusals

    async def _reserve(
        self,
        asked: Sequence[tuple[Work, tuple[_Want, ...]]],
        metadata: Mapping[uuid.UUID, Mapping[str, str]],
        refusals: dict[uuid.UUID, BudgetRefusal],
    ) -> list[Work]:
        """One look; returns the jobs that are to be asked for again at once."""
        counters = _unique(want.counter for _, wants in asked for want in wants)
        jobs = [_job(_claim_id(work), wants, counters) for work, wants in asked]
        reply = await self._ask("reserve", counters, jobs=jobs)
        if reply is None:
            for work, wants in asked:
                hard = [w for w in wants if self._budgets[w.counter.budget].hard_usd is not None]
                if hard:
                    refusals[work.job.id] = self._later(self._name(hard[0].counter))
            return []
        again: list[Work] = []
        if reply["unseeded"]:
            await self._seed([counters[n - 1] for n in reply["unseeded"]])
        for (work, wants), (verdict, place) in zip(asked, reply["verdicts"], strict=True):
            if verdict == "ok":
                known = metadata.get(work.job.id, {})
                self._held[work.job.id] = _Held(id=_claim_id(work), wants=wants, metadata=known)
            elif self._is_to_be_asked_again(work, verdict, counters[place - 1]):
                again.append(work)
            else:
                refusals[work.job.id] = self._refusal(verdict, counters[place - 1], reply, place)
        return again

    def _is_to_be_asked_again(self, work: Work, verdict: str, counter: _Counter) -> bool:
        return verdict == "unseeded" or (verdict == "spent" and self._leave_out(work, counter))

    def _refusal(
        self, verdict: str, counter: _Counter, reply: Mapping[str, Any], place: int
    ) -> BudgetRefusal:
        name = self._name(counter)
        if verdict == "spent":
            left_ms = reply["left_ms"][place - 1]
            wait_s = None if left_ms < 0 else left_ms / 1000 + self._jitter(0.0, RETRY_S)
            return BudgetRefusal(budget=name, reason=Reason.SPENT, wait_s=wait_s)
        if verdict == "quiet":
            wait_s = reply["quiet_ms"] / 1000 + self._jitter(0.0, 0.1)
            return BudgetRefusal(budget=name, reason=Reason.UNKNOWN, wait_s=wait_s)
        wait_s = self._jitter(RETRY_S / 2, RETRY_S)
        return BudgetRefusal(budget=name, reason=Reason.HELD, wait_s=wait_s)

    def _later(self, budget: str) -> BudgetRefusal:
        wait_s = self._jitter(RETRY_S / 2, RETRY_S)
        return BudgetRefusal(budget=budget, reason=Reason.UNKNOWN, wait_s=wait_s)

    def _leave_out(self, work: Work, counter: _Counter) -> bool:
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

    def _wants(self, work: Work, metadata: Mapping[str, str]) -> tuple[_Want, ...]:
        """What is to be reserved for a job: the price of its dearest candidate, or of a model."""
        found = []
        for place, budget in enumerate(self._budgets):
            if budget.by == "model":
                for name in _unique(candidate.model for candidate in work.route):
                    if budget.counts(name):
                        candidates = [c for c in work.route if c.model == name]
                        amount = self._price(work, candidates, budget)
                        found.append(_Want(_Counter(place, name), amount))
                continue
            value = _value_of(budget, work, metadata)
            if value is not None and budget.counts(value):
                amount = self._price(work, work.route, budget)
                found.append(_Want(_Counter(place, value), amount))
        return tuple(found)

    def _price(self, work: Work, candidates: Sequence[Candidate], budget: Budget) -> int:
        prompt = max(work.job.input_tokens, -(-len(work.request) // BYTES_A_TOKEN))
        usage = Usage(input=prompt, output=most_output(work, budget.reserve_output_tokens))
        prices = [
            self._prices.cost(c.deployment.provider, c.model_there, usage, price_as=c.price_as)
            for c in candidates
        ]
        return max((_nanos(price) for price in prices), default=0)

    # -- after the calls ---------------------------------------------------------------------

    def end(self, work: Work, end: Outcome | Release | None) -> None:
        """A claim has ended and will be written; None for one that somebody else has by now."""
        held = self._held.pop(work.job.id, None)
        spent = () if end is None else self._spending(work, end, held)
        reserved = () if held is None else held.wants
        if spent or reserved:
            self._ended[work.job.id] = _End(_claim_id(work), reserved, spent)

    def settle(self, ids: Iterable[uuid.UUID]) -> None:
        """These ends are written: the ledger has what they cost, and the counters may have it."""
        fresh = [end for end in (self._ended.pop(job_id, None) for job_id in ids) if end]
        if not fresh:
            return
        starts = not self._unsent
        self._unsent += fresh
        if starts:
            self._spawn(self._settle())

    async def _settle(self) -> None:
        async with self._sending:
            ends, self._unsent = self._unsent, []
            wants = [want for end in ends for want in (*end.reserved, *end.spent)]
            counters = _unique(want.counter for want in wants)
            await self._ask("settle", counters, ends=[_settlement(end, counters) for end in ends])
            # Should that fail, the reservations lapse, and then the ledger is asked.

    def _spending(
        self, work: Work, end: Outcome | Release, held: _Held | None
    ) -> tuple[_Want, ...]:
        amounts: dict[str, int] = {}
        if end.cost_usd:
            amounts[end.deployment or ""] = _nanos(end.cost_usd)
        for call in end.lost:
            counted = call.cost_usd if call.cost_usd is not None else call.at_most_usd
            usd = counted if counted is not None else call.estimated_usd
            amounts[call.deployment] = amounts.get(call.deployment, 0) + _nanos(usd)
        total = sum(amounts.values())
        if not total:
            return ()
        metadata = {} if held is None else held.metadata
        found = []
        for place, budget in enumerate(self._budgets):
            if budget.by == "model":
                for deployment, amount in amounts.items():
                    name = self._models.get(deployment)
                    if name is not None and amount and budget.counts(name):
                        found.append(_Want(_Counter(place, name), amount))
                continue
            value = _value_of(budget, work, metadata)
            if value is not None and budget.counts(value):
                found.append(_Want(_Counter(place, value), total))
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
            held = list(self._held.values()) + [
                _Held(id=end.id, wants=end.reserved, metadata={})
                for end in (*self._ended.values(), *self._unsent)
            ]
            counters = _unique(want.counter for each in held for want in each.wants)
            if counters:
                jobs = [_job(each.id, each.wants, counters) for each in held]
                await self._ask("announce", counters, jobs=jobs)

    async def aclose(self) -> None:
        """Settle what is left, and close the connection."""
        self._closing.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._redis.aclose()

    # -- the server --------------------------------------------------------------------------

    async def _ask(
        self, act: str, counters: Sequence[_Counter], **parts: object
    ) -> dict[str, Any] | None:
        """One round trip; None if the server could not be asked."""
        budgets = [self._budgets[counter.budget] for counter in counters]
        order = {
            "act": act,
            "quiet_ms": self._quiet_ms,
            "hold_ms": self._hold_ms,
            "counters": [_terms(budget) for budget in budgets],
            **parts,
        }
        keys = [HOME]
        for counter, budget in zip(counters, budgets, strict=True):
            keys += _keys(budget, counter.value)
        try:
            async with asyncio.timeout(self._timeout_s):
                raw = await self._script(keys=keys, args=[orjson.dumps(order)])
        except REDIS_FAILURES as error:
            log.warning("budgets_unknown", extra={"act": act, "error": type(error).__name__})
            return None
        reply: dict[str, Any] = orjson.loads(raw)
        for place, spent, start in reply["soft"]:
            counter, budget = counters[place - 1], budgets[place - 1]
            self._spawn(self._tell(counter, budget, int(spent), int(start)))
        return reply

    async def _seed(self, counters: Sequence[_Counter]) -> None:
        """Tell the server what the ledger knows."""
        try:
            known = await self._database.run(
                lambda connection: [
                    costs_store.spent_in_period(
                        connection,
                        by=self._budgets[counter.budget].by,
                        value=counter.value,
                        period=self._budgets[counter.budget].period,
                        deployments=[d for d, m in self._models.items() if m == counter.value],
                    )
                    for counter in counters
                ]
            )
        except (StoreRefusedError, StoreUnavailableError) as error:
            log.warning("budgets_not_seeded", extra={"error": str(error)})
            return
        seeds = [
            {"counter": n, "period": period, "spent": _nanos(usd)}
            for n, (period, usd) in enumerate(known, 1)
        ]
        await self._ask("seed", counters, seeds=seeds)

    async def _tell(self, counter: _Counter, budget: Budget, spent: int, start: int) -> None:
        if await self._notices.tell(budget, counter.value, spent, start):
            await self._ask("told", [counter])

    def _name(self, counter: _Counter) -> str:
        return self._budgets[counter.budget].name

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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


def _claim_id(work: Work) -> str:
    return f"{work.job.id.hex}:{work.job.fence}"


def _nanos(usd: Decimal | None) -> int:
    return 0 if usd is None else -int(-usd * NANOS // 1)  # rounded up


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def _terms(budget: Budget) -> dict[str, object]:
    terms: dict[str, object] = {"period": budget.period.value}
    if budget.hard_nanos is not None:
        terms["hard"] = budget.hard_nanos
    if budget.soft_nanos is not None:
        terms["soft"] = budget.soft_nanos
    return terms


def _keys(budget: Budget, value: str) -> list[str]:
    """Values are a caller's own words: only their digest is shown."""
    digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    which = f"{budget.name}:{budget.period.value}:{digest}"
    return [f"promptfleet:{{budgets}}:spent:{which}", f"promptfleet:{{budgets}}:held:{which}"]


def _parts(wants: Iterable[_Want], counters: Sequence[_Counter]) -> list[dict[str, int]]:
    places = {counter: n for n, counter in enumerate(counters, 1)}
    return [{"counter": places[want.counter], "amount": want.amount} for want in wants]


def _job(claim_id: str, wants: Iterable[_Want], counters: Sequence[_Counter]) -> dict[str, Any]:
    return {"id": claim_id, "wants": _parts(wants, counters)}


def _settlement(end: _End, counters: Sequence[_Counter]) -> dict[str, Any]:
    return {
        "id": end.id,
        "reserved": _parts(end.reserved, counters),
        "spent": _parts(end.spent, counters),
    }
