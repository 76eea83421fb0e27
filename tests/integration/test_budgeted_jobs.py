"""Budgets in the pipeline: what becomes of the jobs that one lets through, and of the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any

import pytest
from tests.integration.test_pipeline import Rig, answer_all, make_rig
from tests.rows import insert, job_row, ledger_rows, result_rows, spec

from promptfleet_shared.fleet import parse_fleet
from promptfleet_shared.jobs import JobSpec
from promptfleet_shared.pricing import Pricer
from promptfleet_workers.budget_notices import BudgetNotices
from promptfleet_workers.budgets import Budgets
from promptfleet_workers.providers.protocol import Answer, Call

__all__ = ["make_rig"]  # the fixture

MakeRig = Callable[..., Rig]
BUDGET = """
[models.m]
deployments = [{ name = "first", base_url = "http://first" }]
[[budgets]]
name = "all"
period = "PERIOD"
hard_usd = 0.0001
"""
COST = Decimal("0.0000045")
"""Of `answer_all`'s tokens: ten and five of openai/gpt-4o-mini."""


@pytest.fixture
async def make_budgeted(
    make_rig: MakeRig, broker_url: str
) -> AsyncIterator[Callable[..., tuple[Rig, Budgets]]]:
    made: list[Budgets] = []

    def make(*, period: str = "total", url: str = broker_url) -> tuple[Rig, Budgets]:
        rig = make_rig()
        notices = BudgetNotices(
            rig.database, tenant="ops", wake_callbacks=rig.woken.set, emit=rig.events.append
        )
        budgets = Budgets(
            parse_fleet(BUDGET.replace("PERIOD", period)),
            url=url,
            database=rig.database,
            prices=Pricer(),
            notices=notices,
            emit=rig.events.append,
            quiet_s=0.0,
        )
        rig.caller.budgets = rig.endings._spending = budgets
        made.append(budgets)
        return rig, budgets

    yield make
    for budgets in made:
        await budgets.aclose()


def bounded(text: str, tokens: int, **fields: Any) -> JobSpec:
    """100 tokens are 60 % of the budget."""
    request = f'{{"max_tokens":{tokens},"messages":[{{"content":"{text}","role":"user"}}]}}'
    return spec(request=request.encode(), **fields)


MakeBudgeted = Callable[..., tuple[Rig, Budgets]]


async def test_what_calls_cost_is_settled(make_budgeted: MakeBudgeted) -> None:
    rig, budgets = make_budgeted()
    for n in range(4):  # each reserves 60 %, and costs 4.5 %
        job = bounded(f"{n}", 100)
        insert(rig.rows, job)
        await rig.settled(rig.take(job.id))
        assert result_rows(rig.rows, job.id)[0]["cost_usd"] == COST
        while budgets._tasks:
            await asyncio.gather(*budgets._tasks)

    async def fail(call: Call) -> list[Answer]:
        raise AssertionError

    rig.provider.behaviour = fail
    job = bounded("last", 140)  # 84 % and the prompt are too much by now
    insert(rig.rows, job)
    await rig.settled(rig.take(job.id))
    assert result_rows(rig.rows, job.id)[0]["error"]["code"] == "budget_exceeded"
    assert ledger_rows(rig.rows, job.id) == []


async def test_a_job_waits_for_the_next_period(make_budgeted: MakeBudgeted) -> None:
    rig, _ = make_budgeted(period="month")
    patient, hurried = (
        bounded("a", 1000, deadline_s=32 * 86_400.0),
        bounded("b", 1000, deadline_s=1.5),
    )
    insert(rig.rows, patient, hurried)
    await rig.settled(rig.take(patient.id, hurried.id))

    row = job_row(rig.rows, patient.id)
    assert (row["state"], row["attempt"], row["deferrals"]) == ("queued", 0, 1)
    assert row["last_error"]["code"] == "budget_spent"
    assert row["decision"]["budget"] == {"name": "all", "reason": "spent"}
    assert (row["run_at"].astimezone().utctimetuple().tm_mday, row["calls"]) == (1, 0)
    (result,) = result_rows(rig.rows, hurried.id)
    assert (result["state"], result["error"]["code"]) == ("failed", "budget_exceeded")
    assert rig.provider.calls == []


async def test_what_is_reserved_by_others_is_waited_for(make_budgeted: MakeBudgeted) -> None:
    rig, _ = make_budgeted()
    jobs = [bounded(f"{n}", 100) for n in range(3)]
    insert(rig.rows, *jobs)
    await rig.settled(rig.take(*[job.id for job in jobs]))

    assert sorted(rig.state(job.id) for job in jobs) == ["queued", "queued", "succeeded"]
    waiting = [job_row(rig.rows, job.id) for job in jobs if rig.state(job.id) == "queued"]
    assert {row["last_error"]["code"] for row in waiting} == {"budget_held"}


async def test_jobs_wait_while_redis_is_away(make_budgeted: MakeBudgeted) -> None:
    rig, _ = make_budgeted(url="redis://127.0.0.1:1")
    job = bounded("a", 1)
    insert(rig.rows, job)
    await rig.settled(rig.take(job.id))
    assert rig.state(job.id) == "queued"
    assert rig.provider.calls == []


async def test_equal_jobs_have_one_reservation(make_budgeted: MakeBudgeted) -> None:
    rig, _ = make_budgeted()
    rig.provider.behaviour = answer_all
    jobs = [bounded("same", 100) for _ in range(5)]
    insert(rig.rows, *jobs)
    await rig.settled(rig.take(*[job.id for job in jobs]))
    assert {rig.state(job.id) for job in jobs} == {"succeeded"}
    assert len(rig.provider.calls) == 1
