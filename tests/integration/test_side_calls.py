"""Calls beside the jobs' own keep limits and budgets, and wait for nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from tests.integration.test_pipeline import MakeRig, Rig, good, make_rig
from tests.integration.test_semantic_cache import (
    MAIL,
    MODELS,
    OCEAN,
    SEA,
    embed,
    run,
    statuses,
)
from tests.rows import claim_one, insert, ledger_rows, spec

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import ClaimedJob, JobKind, JobSpec
from promptfleet_shared.pricing import Pricer
from promptfleet_workers import budget_counters
from promptfleet_workers.budget_notices import BudgetNotices
from promptfleet_workers.budgets import Budgets
from promptfleet_workers.caching.building import build_caching
from promptfleet_workers.caching.redis_cache import RedisCache
from promptfleet_workers.context.errands import Errands, embedding_errand, summary_errand
from promptfleet_workers.providers.protocol import Answer, Call
from promptfleet_workers.rate_limits.building import Limiting

__all__ = ["make_rig"]  # a fixture

COST = Decimal("0.00002")
"""Of one embedding: a thousand tokens, as `embed` counts them."""
BUDGET = """
[[budgets]]
name = "vectors"
by = "{by}"
{more}
period = "total"
hard_usd = {usd}
"""


class SideRig:
    """A pipeline whose semantic cache calls within limits and budgets; its jobs have none."""

    def __init__(self, make_rig: MakeRig, broker_url: str, more: str) -> None:
        self.limiting: Limiting | None = None
        self.budgets: Budgets | None = None
        self._url = broker_url
        priced = '[models.judge]\nprice_as = "openai/gpt-4o-mini"'
        models = MODELS.replace("[models.judge]", priced)
        self.rig: Rig = make_rig(more=models + more, make_caching=self._caching)
        self.rig.endings._spending = self.budgets
        self.vectors = self.rig.providers["vectors"]
        self.vectors.behaviour = embed

    def _caching(self, rig: Rig) -> Any:
        self.limiting = Limiting.of(rig.fleet, self._url, Pricer())
        if rig.fleet.budgets:
            self.budgets = Budgets(
                rig.fleet,
                url=self._url,
                database=rig.database,
                prices=Pricer(),
                notices=BudgetNotices(
                    rig.database, tenant="ops", wake_callbacks=lambda: None, emit=rig.events.append
                ),
                emit=rig.events.append,
                quiet_s=0.0,
                timeout_s=5.0,
            )
        return build_caching(
            rig.fleet,
            self._url,
            router=rig.router,
            health=rig.breakers,
            prices=Pricer(),
            limits=self.limiting.quotas if self.limiting else None,
            money=self.budgets,
        )

    async def run(self, *jobs: JobSpec) -> list[str]:
        """Their answers' states in the cache, one job after the other."""
        rows = []
        for job in jobs:
            rows += await run(self.rig, job)
            while self.budgets is not None and self.budgets._tasks:
                await asyncio.gather(*self.budgets._tasks)
        return statuses(rows)

    async def aclose(self) -> None:
        if self.limiting is not None:
            await self.limiting.aclose()
        if self.budgets is not None:
            await self.budgets.aclose()


def claimed_job_of(rig: Rig) -> ClaimedJob:
    """A job that this worker is at."""
    job = spec("a")
    insert(rig.rows, job)
    return claim_one(rig.rows, job.id)


Make = Callable[[str], SideRig]


@pytest.fixture
async def make(
    make_rig: MakeRig, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Make]:
    defaults = RedisCache.__init__.__kwdefaults__ or {}
    monkeypatch.setattr(RedisCache.__init__, "__kwdefaults__", {**defaults, "timeout_s": 5.0})
    made: list[SideRig] = []

    def make(more: str) -> SideRig:
        made.append(SideRig(make_rig, broker_url, more))
        return made[-1]

    yield make
    for each in made:
        await each.aclose()


class TestLimits:
    async def test_without_room_it_is_a_miss_at_once(self, make: Make) -> None:
        rig = make('[[limits.rules]]\nper = "tier"\nrequests_per_hour = 2\n')
        assert await rig.run(spec(SEA), spec(OCEAN), spec(MAIL)) == ["miss", "semantic", "miss"]
        assert await rig.run(spec("another")) == ["miss"]  # who was refused gave nothing back
        assert len(rig.vectors.calls) == 2
        assert len(rig.rig.provider.calls) == 3
        assert rig.limiting is not None
        assert rig.limiting.quotas._probes == {}

    async def test_a_tenants_limit_holds_up_no_other(self, make: Make) -> None:
        rig = make('[[limits.rules]]\nper = "tenant"\nonly = ["a"]\ninput_tokens_per_hour = 1000\n')
        a = [spec(text, tenant="a") for text in (SEA, OCEAN)]
        b = [spec(text, tenant="b") for text in (SEA, OCEAN)]
        assert await rig.run(a[0]) == ["miss"]
        insert(rig.rig.rows, a[1], *b)
        await rig.rig.settled(rig.rig.take(a[1].id, b[0].id, b[1].id))
        assert [len(call.requests) for call in rig.vectors.calls] == [1, 2]

    async def test_what_it_took_is_settled_and_not_learned_from(self, make: Make) -> None:
        rig = make('[[limits.rules]]\nper = "fleet"\ninput_tokens_per_hour = 5000\n')
        assert await rig.run(spec(SEA)) == ["miss"]
        assert rig.limiting is not None
        quotas = rig.limiting.quotas
        assert quotas.counts.used["fleet/input_tokens_per_hour"] == 1000
        expected = quotas._learner.expect("vectors", "basic", [(JobKind.CHAT, "", 1)], None)
        assert expected.input_tokens == 1  # as nobody has answered yet

    async def test_a_call_that_failed_gives_its_permit_back(self, make: Make) -> None:
        rig = make('[[limits.rules]]\nper = "fleet"\nmax_concurrency = 1\n')

        async def fail(call: Call) -> list[Answer]:
            message = "no"
            raise ProviderError(message, code="overloaded", status=503)

        rig.vectors.behaviour = fail
        await rig.run(spec(SEA))
        rig.vectors.behaviour = embed
        await rig.run(spec(MAIL))
        assert len(rig.vectors.calls) == 2


class TestErrands:
    """Embeddings for the context window are jobs, and nobody waits for those that must wait."""

    @pytest.mark.parametrize("code", ["budget_held", "quota_reached", "limit_reached"])
    async def test_a_refused_embedding_is_not_waited_for(
        self, make_rig: MakeRig, code: str
    ) -> None:
        rig = make_rig()
        job = claimed_job_of(rig)
        asked = [
            embedding_errand(job, "what?", "m"),
            summary_errand(job, "long", tier="basic", model=None, tokens=9),
        ]
        errands = Errands(rig.database, rig.ring)
        assert await errands.send(asked) == {}
        assert await errands.send(asked) == {}  # they are under way
        with rig.rows.begin() as connection:
            connection.execute(
                sa.text(
                    "UPDATE jobs SET last_error = jsonb_build_object('code', CAST(:c AS text))"
                ),
                {"c": code},
            )
        assert await errands.send(asked) == {asked[0].key: None}
        assert len(rig.rung) == 2


class TestBudgets:
    async def test_what_is_spent_on_vectors_counts_and_ends_them(self, make: Make) -> None:
        rig = make(BUDGET.format(by="model", more='only = ["vectors"]', usd=COST * 3 / 2))
        jobs = [spec(SEA), spec(OCEAN), spec(MAIL)]
        # The first costs two thirds; the second is let through, for its text is short.
        assert await rig.run(*jobs) == ["miss", "semantic", "miss"]
        assert len(rig.vectors.calls) == 2
        assert not any("BudgetRefused" in type(event).__name__ for event in rig.rig.events)
        paid = [row for job in jobs for row in ledger_rows(rig.rig.rows, job.id)]
        vectors = [row for row in paid if row["deployment"] == "vectors"]
        assert [row["cost_usd"] for row in vectors] == [COST, COST]

    async def test_each_tenant_pays_for_its_own(self, make: Make) -> None:
        rig = make(BUDGET.format(by="tenant", more='only = ["a"]', usd="0.0000001"))
        jobs = [spec(text, tenant=tenant) for text in (SEA, OCEAN) for tenant in "ab"]
        insert(rig.rig.rows, *jobs)
        for one, other in (jobs[:2], jobs[2:]):
            await rig.rig.settled(rig.rig.take(one.id, other.id))
            await rig.rig.endings.drain()
        assert sum(len(call.requests) for call in rig.vectors.calls) == 2
        assert {row["tenant"] for job in jobs for row in ledger_rows(rig.rig.rows, job.id)
                if row["deployment"] == "vectors"} == {"b"}  # fmt: skip

    async def test_many_texts_are_one_reservation(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[int] = []
        ask = budget_counters.Counters.ask

        async def counting(
            self: budget_counters.Counters,
            act: str,
            counters: Sequence[budget_counters.Counter],
            **parts: Any,
        ) -> dict[str, Any] | None:
            if act == "reserve":
                asked.append(len(parts["jobs"]))
            return await ask(self, act, counters, **parts)

        rig = make(BUDGET.format(by="all", more="", usd=1))
        await rig.run(spec(SEA))  # seeds the counter
        monkeypatch.setattr(budget_counters.Counters, "ask", counting)
        jobs = [spec(f"{n}") for n in range(6)]
        insert(rig.rig.rows, *jobs)
        await rig.rig.settled(rig.rig.take(*[job.id for job in jobs]))
        assert asked == [6]
        assert sorted(len(call.requests) for call in rig.vectors.calls[1:]) == [2, 4]

    async def test_while_a_job_runs_its_vectors_are_reserved(self, make: Make) -> None:
        rig = make(BUDGET.format(by="all", more="", usd=1))
        assert rig.budgets is not None
        seen: list[int] = []

        async def look(call: Call) -> list[Answer]:
            assert rig.budgets is not None
            seen.append(sum(len(holds) for holds in rig.budgets._beside.values()))
            return [good() for _ in call.requests]

        rig.rig.provider.behaviour = look
        await rig.run(spec(SEA))
        assert seen == [1]
        assert rig.budgets._beside == {}

    async def test_without_money_for_the_judge_the_model_is_asked(self, make: Make) -> None:
        budget = BUDGET.format(by="model", more='only = ["judge"]', usd="0.0001")
        rig = make(f'verify = "model:judge"\n{budget}')
        assert await rig.run(spec(SEA), spec(OCEAN)) == ["miss", "miss"]
        assert rig.rig.providers["judge"].calls == []

    async def test_without_the_server_nothing_is_bought(self, make: Make) -> None:
        rig = make(BUDGET.format(by="all", more="", usd=1))
        assert rig.budgets is not None

        async def away(*_: object, **__: object) -> None:
            return None

        rig.budgets._counters.ask = away  # type: ignore[method-assign]
        assert await rig.run(spec(SEA), spec(OCEAN)) == ["miss", "miss"]
        assert rig.vectors.calls == []
