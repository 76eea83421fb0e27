"""The counters of budgets in Redis: asked in one round trip, and seeded from what Postgres knows.

What is spent is in the ledger. What lines of providers' batches have reserved is in their rows: no
worker holds it for them, so that it lapses after an hour, and then those that still wait reserve
it anew.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib.resources
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import orjson

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.policies.budgets import NANOS, Budget
from promptfleet_shared.redis_clients import impatient_client
from promptfleet_shared.redis_failures import REDIS_FAILURES
from promptfleet_shared.store import costs as costs_store
from promptfleet_shared.store import line_reservations as lines_store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.budget_notices import BudgetNotices

log = logging.getLogger(__name__)

HOME = "promptfleet:{budgets}:home"
LINE_HOLD_S = 3600.0
"""A line's reservation lapses, and Postgres is asked whether it still waits."""
LINES = 1000
"""Lines that are read, and told of, at a time."""


class Counter(NamedTuple):
    """One budget of one tenant, tier, model …; its place in the configuration and its value."""

    budget: int
    value: str


class Want(NamedTuple):
    """So many nanodollars of a counter."""

    counter: Counter
    amount: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hold:
    """What is reserved under a name, and the metadata that its spending is counted on."""

    id: str
    wants: tuple[Want, ...]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


class End(NamedTuple):
    """What is not reserved any more, and what was spent instead."""

    holds: tuple[Hold, ...]
    spent: tuple[Want, ...]


class Counters:
    """Asks the server for a worker; on its event loop only."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        url: str,
        database: AsyncDatabase,
        notices: BudgetNotices,
        quiet_s: float,
        hold_s: float,
        timeout_s: float,
    ) -> None:
        """Connect with the first question; see `Budgets`."""
        self.budgets: tuple[Budget, ...] = fleet.budgets
        self.models = {d.name: m for m, model in fleet.models.items() for d in model.deployments}
        self.tasks: set[asyncio.Task[None]] = set()
        deployments = [d for model in fleet.models.values() for d in model.deployments]
        self._has_lines = any(deployment.batch_api for deployment in deployments)
        self._places = {budget.name: place for place, budget in enumerate(fleet.budgets)}
        self._database = database
        self._notices = notices
        self._quiet_ms = round(quiet_s * 1000)
        self._hold_ms = round(hold_s * 1000)
        self._timeout_s = timeout_s
        self._redis = impatient_client(url, connect_s=timeout_s)
        files = importlib.resources.files("promptfleet_workers")
        self._script = self._redis.register_script(files.joinpath("budget.lua").read_text("utf-8"))

    def name(self, counter: Counter) -> str:
        """The budget's."""
        return self.budgets[counter.budget].name

    async def ask(
        self, act: str, counters: Sequence[Counter], **parts: object
    ) -> dict[str, Any] | None:
        """One round trip; None if the server could not be asked."""
        budgets = [self.budgets[counter.budget] for counter in counters]
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
            self.spawn(self._tell(counter, budget, int(spent), int(start)))
        return reply

    async def announce(self, holds: Sequence[Hold], *, hold_s: float | None = None) -> bool:
        """Say what is held, whatever the server knows; false if it could not be told.

        Args:
            holds: All of it is told in one round trip.
            hold_s: Seconds until it lapses; a worker's own by default. What is to last longer
                already lapses no earlier.
        """
        counters = unique(want.counter for hold in holds for want in hold.wants)
        if not counters:
            return True
        jobs = [job_of(hold.id, hold.wants, counters) for hold in holds]
        if hold_s is not None:
            jobs = [{**job, "hold_ms": round(hold_s * 1000)} for job in jobs]
        return await self.ask("announce", counters, jobs=jobs) is not None

    async def settle(self, ends: Sequence[End]) -> None:
        """Put what was spent in place of what was reserved.

        Should that fail, the reservations lapse, and then the ledger is asked.
        """
        wants = [w for end in ends for w in (*end.spent, *(w for h in end.holds for w in h.wants))]
        counters = unique(want.counter for want in wants)
        settlements = [part for end in ends for part in _settlement(end, counters)]
        await self.ask("settle", counters, ends=settlements)

    async def seed(self, counters: Sequence[Counter]) -> None:
        """Tell the server what Postgres knows."""
        try:
            if self._has_lines and not await self._restore(counters):
                return
            known = await self._database.run(
                lambda connection: [
                    costs_store.spent_in_period(
                        connection,
                        by=self.budgets[counter.budget].by,
                        value=counter.value,
                        period=self.budgets[counter.budget].period,
                        deployments=[d for d, m in self.models.items() if m == counter.value],
                    )
                    for counter in counters
                ]
            )
        except (StoreRefusedError, StoreUnavailableError) as error:
            log.warning("budgets_not_seeded", extra={"error": str(error)})
            return
        seeds = [
            {"counter": n, "period": period, "spent": nanos(usd)}
            for n, (period, usd) in enumerate(known, 1)
        ]
        await self.ask("seed", counters, seeds=seeds)

    async def aclose(self) -> None:
        """Wait for what is being told, and close the connection."""
        while self.tasks:
            await asyncio.wait(self.tasks)
        await self._redis.aclose()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run it in the background."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    # -- lines of providers' batches ---------------------------------------------------------

    def record(self, wants: Iterable[Want]) -> dict[str, int]:
        """What a line's row says that it has reserved."""
        return {f"{self.name(want.counter)}:{want.counter.value}": want.amount for want in wants}

    def wants_of(self, reserved: Mapping[str, int]) -> tuple[Want, ...]:
        """The reverse; without budgets that fleet.toml has no more."""
        found = []
        for key, amount in reserved.items():
            name, _, value = key.partition(":")
            if name in self._places:
                found.append(Want(Counter(self._places[name], value), amount))
        return tuple(found)

    async def _restore(self, counters: Sequence[Counter]) -> bool:
        """Tell the server what lines that wait have reserved of these; false if that failed."""
        wanted = set(counters)
        keys = list(self.record(Want(counter, 0) for counter in counters))
        after = lines_store.FIRST
        while True:
            page = await self._database.run(_waiting(keys, after))
            holds = [
                Hold(id=line_id(line.job_id, line.fence), wants=tuple(wants))
                for line in page
                if (wants := [w for w in self.wants_of(line.reserved) if w.counter in wanted])
            ]
            if not await self.announce(holds, hold_s=LINE_HOLD_S):
                return False
            if len(page) < LINES:
                return True
            after = (page[-1].job_id, page[-1].fence)

    async def _tell(self, counter: Counter, budget: Budget, spent: int, start: int) -> None:
        if await self._notices.tell(budget, counter.value, spent, start):
            await self.ask("told", [counter])


def _waiting(
    keys: Sequence[str], after: lines_store.Place
) -> Callable[[Any], list[lines_store.ReservedLine]]:
    return lambda connection: lines_store.waiting_lines(connection, keys, after=after, limit=LINES)


def line_id(job_id: Any, fence: int) -> str:
    """The name of what a claim has reserved."""
    return f"{job_id.hex}:{fence}"


def nanos(usd: Decimal | None) -> int:
    """Nanodollars, rounded up; none where no price is known."""
    return 0 if usd is None else -int(-usd * NANOS // 1)


def unique(items: Iterable[Any]) -> list[Any]:
    """Each of them once, in order."""
    return list(dict.fromkeys(items))


def job_of(name: str, wants: Iterable[Want], counters: Sequence[Counter]) -> dict[str, Any]:
    """A reservation as budget.lua reads it."""
    return {"id": name, "wants": _parts(wants, counters)}


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


def _parts(wants: Iterable[Want], counters: Sequence[Counter]) -> list[dict[str, int]]:
    places = {counter: n for n, counter in enumerate(counters, 1)}
    return [{"counter": places[want.counter], "amount": want.amount} for want in wants]


def _settlement(end: End, counters: Sequence[Counter]) -> list[dict[str, Any]]:
    spent = {"id": "", "reserved": [], "spent": _parts(end.spent, counters)}
    freed = [
        {"id": hold.id, "reserved": _parts(hold.wants, counters), "spent": []} for hold in end.holds
    ]
    return [spent, *freed] if end.spent else freed
