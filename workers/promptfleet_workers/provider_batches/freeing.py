"""What lines have reserved of budgets is free again once nobody waits for them."""

from __future__ import annotations

from promptfleet_shared.store import line_reservations as store
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.provider_batches import Held
from promptfleet_workers.budgets import Budgets

PAGE = 500


class Freeing:
    """Looks for lines whose jobs were cancelled, have expired, or go another way by now."""

    def __init__(self, database: AsyncDatabase, budgets: Budgets) -> None:
        """Free nothing yet."""
        self._database = database
        self._budgets = budgets

    async def __call__(self, held: Held) -> None:
        """Free what such lines of a batch have reserved.

        Raises:
            StoreUnavailableError: Or it is left to lapse.
            StoreRefusedError: As above.
        """
        while True:
            lines = await self._database.run(
                lambda connection: store.free_idle_lines(
                    connection, held.id, tenant=held.tenant, limit=PAGE
                )
            )
            await self._budgets.free(lines)
            if len(lines) < PAGE:
                return
