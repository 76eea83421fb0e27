"""Budgets hold: under concurrency, after a crash, without their server, and across periods."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from tests.integration.budget_worker import BudgetRig

from promptfleet_shared.jobs import JobKind
from promptfleet_workers.budgets import Reason
from promptfleet_workers.context.errands import REFUSED
from promptfleet_workers.telemetry import BudgetNearlySpent, BudgetRefused

ALL = """
[[budgets]]
name = "all"
period = "total"
hard_usd = 1.0
"""
ROOT = Path(__file__).parents[2]
UNREACHABLE = "redis://127.0.0.1:1"
MakeRig = Callable[..., BudgetRig]


@pytest.fixture
async def make_rig(database_url: str, broker_url: str) -> AsyncIterator[MakeRig]:
    rigs: list[BudgetRig] = []

    def make(
        budgets: str = ALL, *, url: str = broker_url, most: int | None = None, **options: float
    ) -> BudgetRig:
        rigs.append(BudgetRig(database_url, url, budgets, most=most, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        await rig.aclose()


def ledger_usd(database: sa.Engine) -> Decimal:
    with database.connect() as connection:
        usd: Decimal = connection.execute(sa.text("SELECT sum(cost_usd) FROM ledger")).scalar_one()
        return usd


async def test_what_fits_is_let_through_and_what_does_not_waits(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second, third = rig.work(60), rig.work(60), rig.work(40)

    assert await rig.budgets.reserve([first]) == {}
    refusals = await rig.budgets.reserve([second, third])

    assert set(refusals) == {second.job.id}  # 60 + 40 cents fit
    refusal = refusals[second.job.id]
    assert (refusal.budget, refusal.reason) == ("all", Reason.HELD)
    assert 0 < (refusal.wait_s or 0) < 5
    assert rig.events == [BudgetRefused(budgets={"all": 1})]


async def test_what_was_not_spent_is_free_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    first, second = rig.work(90), rig.work(60)
    await rig.budgets.reserve([first])
    await rig.finish(first, Decimal("0.40"))

    assert await rig.budgets.reserve([second]) == {}
    await rig.finish(second, Decimal("0.60"))
    refusal = (await rig.budgets.reserve([work := rig.work(1)]))[work.job.id]
    assert (refusal.reason, refusal.wait_s) == (Reason.SPENT, None)


async def test_the_next_period_is_waited_for(make_rig: MakeRig) -> None:
    rig = make_rig(ALL.replace("total", "day"))
    refusal = (await rig.budgets.reserve([work := rig.work(101)]))[work.job.id]

    left_s = 86_400 - time.time() % 86_400
    assert refusal.reason is Reason.SPENT
    assert refusal.wait_s == pytest.approx(left_s % 86_400, abs=10)


async def test_a_month_begins_when_postgres_says_so(make_rig: MakeRig, broker_url: str) -> None:
    """Lua has no calendar of its own: both sides must come to the same day."""
    rig = make_rig(ALL.replace("total", "month"))
    await rig.write(rig.work(), Decimal("0.95"))

    refusals = await rig.budgets.reserve([rig.work(6), fitting := rig.work(5)])

    assert len(refusals) == 1
    assert fitting.job.id not in refusals


async def test_four_processes_never_exceed_a_budget(
    database_url: str, database: sa.Engine, broker_url: str
) -> None:
    budget = ALL.replace("1.0", "6.0")
    argv = [sys.executable, "-m", "tests.integration.budget_worker", database_url, broker_url]
    processes = [
        subprocess.Popen(
            [*argv, budget],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    assert [process.returncode for process in processes] == [0] * 4
    spent = sum(Decimal(output) for output in outputs)
    assert spent == ledger_usd(database)
    assert Decimal("5.5") <= spent <= 6  # a reservation is 20 cents at most
    assert sum(Decimal(output) > 0 for output in outputs) >= 2


async def test_counters_are_seeded_from_the_ledger(make_rig: MakeRig) -> None:
    before = make_rig()
    await before.write(before.work(), Decimal("0.70"))
    rig = make_rig()

    refusals = await rig.budgets.reserve([rig.work(31), fitting := rig.work(30)])

    assert len(refusals) == 1
    assert fitting.job.id not in refusals


async def test_a_server_without_its_data_lets_nothing_through_at_first(
    make_rig: MakeRig, broker_url: str
) -> None:
    """What runs elsewhere is not known again until its worker has said so."""
    other, rig = make_rig(), make_rig(quiet_s=30.0)
    running = other.work(80)
    assert await other.budgets.reserve([running]) == {}
    with redis.Redis.from_url(broker_url) as server:
        server.flushall()

        refusal = (await rig.budgets.reserve([work := rig.work(30)]))[work.job.id]
        assert refusal.reason is Reason.UNKNOWN
        assert 25 < (refusal.wait_s or 0) < 31

        await other.budgets.announce()
        server.set("promptfleet:{budgets}:home", "1")  # as if that were long ago
    refusal = (await rig.budgets.reserve([work := rig.work(30)]))[work.job.id]
    assert refusal.reason is Reason.HELD
    assert await rig.budgets.reserve([rig.work(20)]) == {}


async def test_without_the_server_a_hard_budget_lets_nothing_through(make_rig: MakeRig) -> None:
    rig = make_rig(url=UNREACHABLE)
    refusal = (await rig.budgets.reserve([work := rig.work()]))[work.job.id]
    assert refusal.reason is Reason.UNKNOWN
    assert refusal.wait_s

    soft = make_rig(ALL.replace("hard_usd", "soft_usd"), url=UNREACHABLE)
    assert await soft.budgets.reserve([soft.work()]) == {}


async def test_who_comes_often_comes_less_often(make_rig: MakeRig) -> None:
    """A provider's batch may hold the money for hours."""
    rig = make_rig()
    assert await rig.budgets.reserve([rig.work(100)]) == {}
    work = rig.work(100)
    work.job = work.job._replace(deferrals=50)
    refusal = (await rig.budgets.reserve([work]))[work.job.id]
    assert 15 <= (refusal.wait_s or 0) <= 30


def test_errands_know_why_budgets_refuse() -> None:
    assert {f"budget_{reason.value}" for reason in Reason} < REFUSED


async def test_a_lost_workers_calls_are_found_in_the_ledger(make_rig: MakeRig) -> None:
    """It dies between its commit and its settlement."""
    lost, rig = make_rig(hold_s=0.2), make_rig()
    work = lost.work(90)
    await lost.budgets.reserve([work])
    await lost.write(work, Decimal("0.75"))

    async with asyncio.timeout(10):
        while True:  # 90 cents are reserved, and then 75 spent
            refusals = await rig.budgets.reserve([too_much := rig.work(26), rig.work(25)])
            assert too_much.job.id in refusals
            if len(refusals) == 1:
                break
            await asyncio.sleep(0.02)
    assert await rig.budgets.reserve([rig.work(1)])


async def test_a_long_call_keeps_its_reservation(make_rig: MakeRig) -> None:
    rig, other = make_rig(hold_s=0.3), make_rig()
    announcing = asyncio.create_task(rig.budgets.run())
    await rig.budgets.reserve([rig.work(90)])
    end = asyncio.get_running_loop().time() + 1.0
    reasons: set[Reason] = set()
    while asyncio.get_running_loop().time() < end:
        (refusal,) = (await other.budgets.reserve([other.work(20)])).values()
        reasons.add(refusal.reason)
    assert Reason.HELD in reasons
    assert reasons <= {Reason.HELD, Reason.UNKNOWN}  # a slow machine's server may be late
    await rig.budgets.aclose()
    await announcing


async def test_what_is_settled_while_the_ledger_is_read_is_not_lost(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, broker_url: str
) -> None:
    """Its transaction commits after the read, and its settlement comes before the seed."""
    one, two = make_rig(), make_rig()
    running = two.work(50)
    await two.budgets.reserve([running])
    with redis.Redis.from_url(broker_url) as server:
        (spent,) = server.keys("*:spent:*")
        server.hdel(spent, "period")
    await one.budgets._lengths.read()
    run = one.database.run

    async def slowly(statement):  # type: ignore[no-untyped-def]
        known = await run(statement)
        await two.finish(running, Decimal("0.50"))
        return known

    monkeypatch.setattr(one.database, "run", slowly)
    assert await one.budgets.reserve([one.work(51)])
    monkeypatch.undo()
    assert await one.budgets.reserve([one.work(50)]) == {}


class TestScopes:
    async def test_each_tenant_has_its_own(self, make_rig: MakeRig) -> None:
        rig = make_rig(ALL + 'by = "tenant"\n')
        a, b = rig.work(80, tenant="a"), rig.work(80, tenant="b")
        again = rig.work(80, tenant="a")
        assert set(await rig.budgets.reserve([a, b, again])) == {again.job.id}

    async def test_only_some_tenants_have_one(self, make_rig: MakeRig) -> None:
        rig = make_rig(ALL + 'by = "tenant"\nonly = ["a"]\n')
        works = [rig.work(80, tenant="b") for _ in range(3)]
        assert await rig.budgets.reserve(works) == {}

    async def test_a_model_whose_money_is_spent_leaves_the_route(self, make_rig: MakeRig) -> None:
        rig = make_rig(ALL + 'by = "model"\nonly = ["cheap"]\n')
        first, second = rig.work(100), rig.work(100)
        await rig.budgets.reserve([first])
        await rig.finish(first, Decimal(1))

        assert await rig.budgets.reserve([second]) == {}
        assert [candidate.model for candidate in second.route] == ["dear"]

    async def test_metadata(self, make_rig: MakeRig, database: sa.Engine) -> None:
        from tests.rows import insert, spec

        rig = make_rig(ALL + 'by = "metadata.project"\n')
        specs = [spec(f"{n}", metadata={"project": "x"}) for n in range(2)]
        other = spec("other", metadata={"project": "y"})
        insert(database, *specs, other)
        works = [rig.work(80, job=each.id) for each in (*specs, other)]

        assert set(await rig.budgets.reserve(works)) == {specs[1].id}
        await rig.write(rig.work(), Decimal("0.5"), {"project": "z"})
        third = spec("third", metadata={"project": "z"})
        insert(database, third)
        assert await rig.budgets.reserve([rig.work(51, job=third.id)])

    async def test_all_or_nothing(self, make_rig: MakeRig) -> None:
        """A job that one budget refuses reserves nothing of another."""
        small = ALL.replace('"all"', '"small"').replace("1.0", "0.5") + 'by = "tenant"\n'
        rig = make_rig(ALL + small)
        assert await rig.budgets.reserve([rig.work(60, tenant="a")])
        assert await rig.budgets.reserve([rig.work(50, tenant=t) for t in "bc"]) == {}


class TestUnboundedAnswers:
    """A job without `max_tokens` reserves what such answers take, and more than the longest did."""

    async def test_it_is_learned(self, make_rig: MakeRig) -> None:
        rig = make_rig(ALL + "reserve_output_tokens = 10\n")
        first = rig.work(None)
        assert await rig.budgets.reserve([first]) == {}
        await rig.finish(first, Decimal("0.40"), output=40)

        # 60 cents are left, and 50 are reserved for each.
        refusals = await rig.budgets.reserve([second := rig.work(None), third := rig.work(None)])
        assert set(refusals) == {third.job.id}
        await rig.finish(second, Decimal("0.45"), output=45)
        assert await rig.budgets.reserve([rig.work(None)])  # 15 cents are not enough

    async def test_the_ledger_tells_a_new_worker(self, make_rig: MakeRig) -> None:
        before = make_rig()
        await before.write(before.work(), Decimal("0.10"), output=60)
        rig = make_rig(ALL + "reserve_output_tokens = 10\n")
        assert len(await rig.budgets.reserve([rig.work(None), rig.work(None)])) == 1

    async def test_many_at_once_are_over_by_no_more_than_one(self, make_rig: MakeRig) -> None:
        """Answers of 30 to 40 tokens: what was once seen is reserved for all that follow."""
        rig = make_rig(ALL + "reserve_output_tokens = 10\n")
        await rig.budgets.reserve([first := rig.work(None)])
        await rig.finish(first, Decimal("0.30"), output=30)
        spent = Decimal("0.30")
        while True:
            works = [rig.work(None) for _ in range(20)]
            refusals = await rig.budgets.reserve(works)
            going = [work for work in works if work.job.id not in refusals]
            if not going:
                break
            for work in going:
                await rig.finish(work, Decimal("0.40"), output=40)
                spent += Decimal("0.40")
        assert Decimal("0.5") < spent <= Decimal("1.40")

    async def test_the_most_can_be_reserved(self, make_rig: MakeRig) -> None:
        most = ALL + 'reserve = "most"\nreserve_output_tokens = 10\n'
        rig = make_rig(most, most=90)
        assert len(await rig.budgets.reserve([rig.work(None), rig.work(None)])) == 1
        unknown = make_rig(most)  # 16,384 tokens
        assert len(await unknown.budgets.reserve([unknown.work(None)])) == 1

    async def test_no_more_than_the_model_can_write(self, make_rig: MakeRig) -> None:
        rig = make_rig(ALL + "reserve_output_tokens = 1000\n", most=50)
        assert await rig.budgets.reserve([rig.work(None), rig.work(None)]) == {}

    async def test_embeddings_write_nothing(self, make_rig: MakeRig) -> None:
        rig = make_rig(ALL)
        work = rig.work(None)
        work.job = work.job._replace(kind=JobKind.EMBEDDING)
        assert await rig.budgets.reserve([work]) == {}


async def test_what_lines_hold_lasts_longer_than_a_workers_word(
    make_rig: MakeRig, broker_url: str
) -> None:
    rig = make_rig(hold_s=1.0)
    work = rig.work(90)
    await rig.budgets.reserve([work])
    hold = rig.budgets._held[work.job.id]
    await rig.budgets.hand_over([work])
    await rig.budgets._counters.announce([hold])  # as the worker that lands it may
    with redis.Redis.from_url(broker_url, decode_responses=True) as server:
        (held,) = server.keys("*{budgets}:held:*")
        lapsing: Any = server.zrange(held, 0, -1, withscores=True)
        now: Any = server.time()
    ((_, lapses_ms),) = lapsing
    assert lapses_ms / 1000 - now[0] > 3000


async def test_who_was_given_up_meanwhile_holds_nothing(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()
    work = rig.work(90)
    ask = rig.budgets._counters.ask

    async def slowly(*args: Any, **parts: Any) -> Any:
        reply = await ask(*args, **parts)
        work.ended = True
        return reply

    monkeypatch.setattr(rig.budgets._counters, "ask", slowly)
    await rig.budgets.reserve([work])
    monkeypatch.undo()
    await rig.settled()
    assert await rig.budgets.reserve([rig.work(90)]) == {}


class TestSoftLimits:
    SOFT = ALL + 'soft_usd = 0.5\non_soft = "https://ops.example.com/hook"\n'

    async def test_tell_once(self, make_rig: MakeRig, database: sa.Engine) -> None:
        rigs = [make_rig(self.SOFT), make_rig(self.SOFT)]
        for rig in rigs:
            for _ in range(2):
                work = rig.work(25)
                assert await rig.budgets.reserve([work]) == {}
                await rig.finish(work, Decimal("0.25"))

        with database.connect() as connection:
            rows = connection.execute(sa.text("SELECT * FROM callbacks")).mappings().all()
        (row,) = rows
        assert (row["tenant"], row["event"]) == ("ops", "budget.soft_limit")
        assert row["payload"]["data"] == {
            "budget": "all",
            "by": "all",
            "value": None,
            "period": "total",
            "period_start": "1970-01-01",
            "soft_usd": 0.5,
            "hard_usd": 1.0,
            "spent_usd": 0.5,
        }
        told = [e for rig in rigs for e in rig.events if isinstance(e, BudgetNearlySpent)]
        assert told == [BudgetNearlySpent(budget="all", spent_usd=0.5)]

    async def test_below_it_nobody_is_told(self, make_rig: MakeRig, database: sa.Engine) -> None:
        rig = make_rig(self.SOFT)
        await rig.budgets.reserve([work := rig.work(49)])
        await rig.finish(work, Decimal("0.49"))
        assert rig.events == []
