"""From fleet.toml to the limits of a worker, and what runs beside them."""

from __future__ import annotations

import asyncio
from typing import Self

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.background import keep_running
from promptfleet_workers.rate_limits.exchange import FleetLimits
from promptfleet_workers.rate_limits.keeping import WindowKeeping
from promptfleet_workers.rate_limits.keys import KeyBook
from promptfleet_workers.rate_limits.local import LocalLimits
from promptfleet_workers.rate_limits.quotas import Prices, Quotas


class Limiting:
    """A worker's quotas and the tasks beside them; made on its event loop."""

    def __init__(
        self, quotas: Quotas, keeper: FleetLimits, keeping: WindowKeeping | None = None
    ) -> None:
        """Start to renew permits, and to keep windows where there are any."""
        self.quotas = quotas
        self._keeper = keeper
        self._keeping = keeping
        self._tasks = [asyncio.create_task(keep_running("limits", keeper.run))]
        if keeping is not None:
            self._tasks.append(asyncio.create_task(keep_running("limit_windows", keeping.run)))

    @classmethod
    def of(
        cls, fleet: Fleet, url: str, prices: Prices, database: AsyncDatabase | None = None
    ) -> Self | None:
        """The limits of fleet.toml; None if there are none, so that nothing is paid for them.

        Args:
            fleet: With its limits.
            url: The Redis that the whole fleet shares.
            prices: For limits in dollars.
            database: Remembers what was used of limits of an hour and longer; None: nobody does.
        """
        book = KeyBook(fleet)
        if not book.limits_anything:
            return None
        patience_s, headroom = fleet.limits.wait_ms / 1000, fleet.limits.headroom
        local = LocalLimits(patience_s=patience_s, headroom=headroom)
        keeping = None
        if database is not None and book.has_windows:
            keeping = WindowKeeping(url, database)
        keeper = FleetLimits(url, local, patience_s=patience_s, headroom=headroom, memory=keeping)
        return cls(Quotas(keeper, book, patience_s=patience_s, prices=prices), keeper, keeping)

    async def aclose(self) -> None:
        """Tell what is left to be told, and close the connections."""
        for task in self._tasks:
            task.cancel()
        await self._keeper.aclose()
        if self._keeping is not None:
            await self._keeping.aclose()
