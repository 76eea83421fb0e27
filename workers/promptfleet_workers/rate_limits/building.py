"""From fleet.toml to the limits of a worker, and what runs beside them."""

from __future__ import annotations

import asyncio
from typing import Self

from promptfleet_shared.fleet import Fleet
from promptfleet_workers.background import keep_running
from promptfleet_workers.rate_limits.exchange import FleetLimits
from promptfleet_workers.rate_limits.keys import KeyBook
from promptfleet_workers.rate_limits.local import LocalLimits
from promptfleet_workers.rate_limits.quotas import Prices, Quotas


class Limiting:
    """A worker's quotas and the task that renews its permits; made on its event loop."""

    def __init__(self, quotas: Quotas, keeper: FleetLimits) -> None:
        """Start to renew."""
        self.quotas = quotas
        self._keeper = keeper
        self._renewing = asyncio.create_task(keep_running("limits", keeper.run))

    @classmethod
    def of(cls, fleet: Fleet, url: str, prices: Prices) -> Self | None:
        """The limits of fleet.toml; None if there are none, so that nothing is paid for them.

        Args:
            fleet: With its limits.
            url: The Redis that the whole fleet shares.
            prices: For limits in dollars.
        """
        book = KeyBook(fleet)
        if not book.limits_anything:
            return None
        patience_s, headroom = fleet.limits.wait_ms / 1000, fleet.limits.headroom
        local = LocalLimits(patience_s=patience_s, headroom=headroom)
        keeper = FleetLimits(url, local, patience_s=patience_s, headroom=headroom)
        return cls(Quotas(keeper, book, patience_s=patience_s, prices=prices), keeper)

    async def aclose(self) -> None:
        """Tell what is left to be told, and close the connection."""
        self._renewing.cancel()
        await self._keeper.aclose()
