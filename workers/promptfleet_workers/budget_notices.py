"""Tell, once a period, that a budget's soft limit is reached: a log line, a metric, a callback."""

from __future__ import annotations

import datetime as dt
import logging
import uuid
from collections.abc import Callable
from typing import Any

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.policies.budgets import NANOS, Budget
from promptfleet_shared.store import costs as costs_store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.telemetry import BudgetNearlySpent, Emit

log = logging.getLogger(__name__)

EVENT = "budget.soft_limit"
MAX_TOLD = 10_000
"""Notices that a worker remembers; one that it forgets is told again, with the same id."""
_NAMESPACE = uuid.UUID("6f7a3e0a-3a1f-4b43-9d0d-0d9b8a1c5b58")


class BudgetNotices:
    """Writes callbacks into the outbox of Postgres, and emits events."""

    def __init__(
        self,
        database: AsyncDatabase,
        *,
        tenant: str,
        wake_callbacks: Callable[[], None],
        emit: Emit,
    ) -> None:
        """Tell nothing yet; `tenant` is whose callbacks those are that are of no single tenant."""
        self._database = database
        self._tenant = tenant
        self._wake = wake_callbacks
        self._emit = emit
        self._telling: set[uuid.UUID] = set()
        self._told: set[uuid.UUID] = set()

    async def tell(self, budget: Budget, value: str, spent: int, start: int) -> bool:
        """Tell of it; true once that is done, false if it must be tried again.

        Args:
            budget: Which one.
            value: Whose, where each has its own.
            spent: Nanodollars.
            start: When its period began, in seconds since 1970.
        """
        notice = uuid.uuid5(_NAMESPACE, f"{budget.name}\0{value}\0{start}")
        if notice in self._told or notice in self._telling:
            return notice in self._told
        self._telling.add(notice)
        try:
            if budget.on_soft is not None:
                await self._write(notice, budget, value, spent, start)
        except (StoreRefusedError, StoreUnavailableError) as error:
            log.warning("budget_not_told", extra={"budget": budget.name, "error": str(error)})
            return False
        finally:
            self._telling.discard(notice)
        if len(self._told) >= MAX_TOLD:
            self._told.clear()
        self._told.add(notice)
        self._emit(BudgetNearlySpent(budget=budget.name, spent_usd=spent / NANOS))
        return True

    async def _write(
        self, notice: uuid.UUID, budget: Budget, value: str, spent: int, start: int
    ) -> None:
        payload = _payload(budget, value, spent, start)
        tenant = value if budget.by == "tenant" else self._tenant
        url = budget.on_soft or ""
        await self._database.run(
            lambda connection: costs_store.tell_of_budget(
                connection, notice, tenant=tenant, url=url, event=EVENT, payload=payload
            )
        )
        self._wake()


def _payload(budget: Budget, value: str, spent: int, start: int) -> dict[str, Any]:
    return {
        "type": EVENT,
        "timestamp": dt.datetime.now(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "data": {
            "budget": budget.name,
            "by": budget.by,
            "value": None if budget.by == "all" else value,
            "period": budget.period.value,
            "period_start": dt.datetime.fromtimestamp(start, dt.UTC).date().isoformat(),
            "soft_usd": budget.soft_usd,
            "hard_usd": budget.hard_usd,
            "spent_usd": round(spent / NANOS, 6),
        },
    }
