"""Budgets in a process of their own, as a worker has them; each call is in the ledger at its end.

Run as a program it waits for a line, calls until its budget lets nothing through any more, and
prints what it spent.
"""

from __future__ import annotations

import asyncio
import random
import sys
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, cast

import orjson
import sqlalchemy as sa
from uuid_utils.compat import uuid7

from promptfleet_shared.fleet import Fleet, parse_fleet
from promptfleet_shared.jobs import (
    CacheOptions,
    ClaimedJob,
    JobKind,
    JobState,
    OnUnknown,
    Outcome,
    Usage,
)
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.budget_notices import BudgetNotices
from promptfleet_workers.budgets import Budgets, Reason
from promptfleet_workers.providers.protocol import Provider
from promptfleet_workers.routing import Router
from promptfleet_workers.telemetry import Event
from promptfleet_workers.work import Batch, Work

PRICE_USD = Decimal("0.01")
"""Of an output token; the input costs nothing, so that sums are easy."""
FLEET = """
default_tier = "basic"
[tiers.basic]
models = ["cheap", "dear"]
[models.cheap]{bound}
deployments = [{{ name = "cheap", base_url = "http://first" }}]
[models.dear]{bound}
deployments = [{{ name = "dear", base_url = "http://second" }}]
"""

_LEDGER = sa.text("""
INSERT INTO ledger (job_id, tenant, tier, deployment, calls, output_tokens, cost_usd, metadata)
VALUES (:job, :tenant, :tier, :deployment, 1, :output, :usd, CAST(:metadata AS jsonb))
""")


class TokenPrices:
    """A cent for each token of output."""

    def cost(
        self, provider: str, model: str, usage: Usage, price_as: str | None = None
    ) -> Decimal | None:
        return usage.output * PRICE_USD


class BudgetRig:
    """A worker's budgets, and its jobs without a pipeline."""

    def __init__(
        self,
        database_url: str,
        url: str,
        budgets: str,
        *,
        most: int | None = None,
        **options: float,
    ) -> None:
        bound = "" if most is None else f"\nmax_output_tokens = {most}"
        self.fleet: Fleet = parse_fleet(FLEET.format(bound=bound) + budgets)
        self.database = AsyncDatabase(database_url, application_name="tests", pool_size=3)
        self.events: list[Event] = []
        self.budgets = Budgets(
            self.fleet,
            url=url,
            database=self.database,
            prices=TokenPrices(),
            notices=BudgetNotices(
                self.database,
                tenant="ops",
                wake_callbacks=lambda: None,
                emit=self.events.append,
            ),
            emit=self.events.append,
            **{"announce_s": 0.05, "quiet_s": 0.0, **options},  # type: ignore[arg-type]
        )
        nobody: dict[str, Provider] = {name: cast("Provider", None) for name in ("cheap", "dear")}
        self._router = Router(self.fleet, nobody)

    def work(
        self, tokens: int | None = 10, *, tenant: str = "t", job: uuid.UUID | None = None
    ) -> Work:
        """A job whose call costs at most `tokens` cents; None for one without a bound."""
        bound = {} if tokens is None else {"max_tokens": tokens}
        request = orjson.dumps({**bound, "messages": []}).decode()
        claimed = ClaimedJob(
            id=job or uuid7(),
            fence=1,
            tenant=tenant,
            tier="basic",
            kind=JobKind.CHAT,
            model=None,
            request=request,
            input_tokens=1,
            priority=5,
            cache=CacheOptions(),
            attempt=1,
            deferrals=0,
            calls=0,
            on_unknown=OnUnknown.RETRY,
            queued_ms=0.0,
            remaining_s=60.0,
        )
        return Work(
            job=claimed,
            batch=Batch(id=uuid7(), size=1),
            asked_at=0.0,
            claimed_at=0.0,
            route=self._router.route(claimed),
            request=request,
        )

    async def write(
        self,
        work: Work,
        usd: Decimal,
        metadata: Mapping[str, Any] | None = None,
        *,
        output: int = 0,
    ) -> None:
        """What a call cost, as its result's transaction writes it."""
        parameters = {
            "job": work.job.id,
            "tenant": work.job.tenant,
            "tier": work.job.tier,
            "deployment": work.route[0].deployment.name,
            "usd": usd,
            "output": output,
            "metadata": None if metadata is None else orjson.dumps(metadata).decode(),
        }
        await self.database.run(lambda connection: connection.execute(_LEDGER, parameters))

    def outcome(self, work: Work, usd: Decimal, output: int = 0) -> Outcome:
        return Outcome(
            job_id=work.job.id,
            fence=1,
            state=JobState.SUCCEEDED,
            deployment=work.route[0].deployment.name,
            usage=Usage(output=output),
            cost_usd=usd,
            calls=1,
        )

    async def finish(self, work: Work, usd: Decimal, *, output: int = 0) -> None:
        """The call is over: the ledger, then the counters."""
        self.budgets.end(work, self.outcome(work, usd, output))
        await self.write(work, usd, output=output)
        self.budgets.settle([work.job.id])
        await self.settled()

    async def settled(self) -> None:
        while self.budgets._tasks:
            await asyncio.gather(*self.budgets._tasks)

    async def aclose(self) -> None:
        await self.budgets.aclose()
        await self.database.close()


async def hammer(rig: BudgetRig) -> Decimal:
    """Batch after batch of calls, each of them at once, until the money is spent."""
    announcing = asyncio.create_task(rig.budgets.run())
    spent = Decimal(0)
    while True:
        works = [rig.work(random.randint(1, 20)) for _ in range(8)]
        refusals = await rig.budgets.reserve(works)
        going = [work for work in works if work.job.id not in refusals]
        for work in going:
            most = orjson.loads(work.request)["max_tokens"]
            usd = random.randint(most // 2, most) * PRICE_USD
            await rig.finish(work, usd)
            spent += usd
        if not going and all(refusal.reason is Reason.SPENT for refusal in refusals.values()):
            break
    await rig.budgets.aclose()
    await announcing
    await rig.database.close()
    return spent


async def main(database_url: str, url: str, budgets: str) -> None:
    rig = BudgetRig(database_url, url, budgets)
    print("ready", flush=True)
    sys.stdin.readline()
    print(await hammer(rig), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3]))
