"""In which order due jobs are judged and rung for; the table is a list."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import Any, cast

import pytest

from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.store import sweeping
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.sweeping import Order, Sweep
from promptfleet_workers.sweeper import FAIR_EVERY, PARKED_S, Sweeper
from promptfleet_workers.telemetry import Event

TIER = "basic"
BACKLOG = 100_000
LOOK = 500
ARRIVES_AFTER = 30_000
"""Jobs of the backlog that are judged before another one becomes due, in mid-sweep."""


def bell(tenant: str) -> Doorbell:
    return Doorbell(job_id=uuid.uuid4(), tier=TIER, tenant=tenant)


class Table:
    """Answers the sweeper's questions about due jobs, in the orders that the statements have."""

    def __init__(self, due: Sequence[Doorbell]) -> None:
        self.due = list(due)
        self.asked: list[dict[str, Any]] = []
        self.judged = 0
        self.latecomer: Doorbell | None = None

    async def run(self, question: partial[object]) -> object:
        self.asked.append(question.keywords)
        found = self._take(question.keywords["order"], question.keywords["limit"])
        if question.func is sweeping.silent_doorbells:
            return found
        assert question.func is sweeping.sweep
        return Sweep(doorbells=found, verdicts={"ring": len(found)} if found else {})

    def _take(self, order: Order, limit: int) -> list[Doorbell]:
        if self.latecomer is not None and self.judged >= ARRIVES_AFTER:
            self.due.append(self.latecomer)
            self.latecomer = None
        match order:
            case Order.OLDEST:
                found, self.due = self.due[:limit], self.due[limit:]
            case Order.NEWEST:
                found, self.due = self.due[-limit:], self.due[:-limit]
            case Order.FAIR:
                found = fairly(self.due)[:limit]
                gone = set(map(id, found))
                self.due = [each for each in self.due if id(each) not in gone]
        self.judged += len(found)
        return found


def fairly(due: Sequence[Doorbell]) -> list[Doorbell]:
    places: dict[str, int] = defaultdict(int)
    placed = []
    for each in due:
        placed.append((places[each.tenant], each))
        places[each.tenant] += 1
    return [each for _, each in sorted(placed, key=itemgetter(0))]


class Line:
    """Doorbells that wait their turn."""

    any_parked = False

    def __init__(self, length: int) -> None:
        self.length = length

    def parked(self, tier: str) -> int:
        assert tier == TIER
        return self.length

    def waiting(self, bells: Sequence[Doorbell]) -> set[uuid.UUID]:
        raise AssertionError(bells)


class Bench:
    """A sweeper, its table, and what it rang."""

    def __init__(self, table: Table, parked: Line | None = None) -> None:
        self.table = table
        self.rung: list[Doorbell] = []
        self.events: list[Event] = []
        self.sweeper = Sweeper(
            database=cast("AsyncDatabase", table),
            tiers=[TIER],
            interval_s=1,
            retention_s=0,
            ring=self.rung.extend,
            empty_queues=self.all_empty,
            emit=self.events.append,
            parked=parked,
        )

    async def all_empty(self, tiers: Sequence[str]) -> Sequence[str]:
        return tiers


@pytest.mark.parametrize("silent", [False, True])
async def test_a_long_backlog_does_not_delay_another_tenants_job(*, silent: bool) -> None:
    """Neither one that is due at its end, nor one that becomes due behind what is left of it."""
    backlog = [bell("many") for _ in range(BACKLOG)]
    at_the_end, late = bell("few"), bell("few")
    middle = BACKLOG // 2 + 123
    bench = Bench(Table([*backlog[:middle], at_the_end, *backlog[middle:]]))
    bench.table.latecomer = late

    await (bench.sweeper.ring_silent() if silent else bench.sweeper.sweep())

    look = 1_000 if silent else LOOK
    assert len(bench.rung) == BACKLOG + 2
    assert len(set(bench.rung)) == BACKLOG + 2
    assert bench.rung.index(at_the_end) < 2 * look
    assert bench.rung.index(late) <= ARRIVES_AFTER + (FAIR_EVERY + 1) * look


async def test_a_short_list_is_one_look() -> None:
    bench = Bench(Table([bell("a"), bell("b")]))
    await bench.sweeper.sweep()
    assert [question["order"] for question in bench.table.asked] == [Order.OLDEST]


async def test_a_fair_look_in_vain_does_not_end_the_sweep() -> None:
    """Another sweeper may have locked each tenant's first jobs."""
    table = Table([bell("a") for _ in range(3 * LOOK)])
    bench = Bench(table)
    usual = table._take
    table._take = lambda order, limit: (  # type: ignore[method-assign]
        [] if order is Order.FAIR else usual(order, limit)
    )
    await bench.sweeper.sweep()
    assert len(bench.rung) == 3 * LOOK


@pytest.mark.parametrize(
    ("waiting", "looked_at_after_s"),
    [(0, PARKED_S[0]), (1_000, PARKED_S[0]), (50_000, 100.0), (10**6, PARKED_S[1])],
)
async def test_who_waits_in_a_short_line_is_looked_at_soon(
    waiting: int, looked_at_after_s: float
) -> None:
    bench = Bench(Table([]), parked=Line(waiting))
    await bench.sweeper.sweep()
    assert bench.table.asked[0]["parked_s"] == looked_at_after_s
