"""What lines of a provider's batch cost."""

from __future__ import annotations

from decimal import Decimal

from promptfleet_shared.jobs import Usage
from promptfleet_shared.pricing import Pricer


class BatchPricer(Pricer):
    """Prices usage as a provider's batch API does: at half, where no other price is known."""

    def cost(
        self,
        provider: str,
        model: str,
        usage: Usage,
        price_as: str | None = None,
        *,
        batch: bool = True,
    ) -> Decimal | None:
        """US dollars of one line; see `Pricer.cost`."""
        return super().cost(provider, model, usage, price_as, batch=batch)

    def saved(
        self, provider: str, model: str, usage: Usage, price_as: str | None = None
    ) -> Decimal | None:
        """US dollars less than a call of its own would have cost; None where no price is known."""
        usual = self.cost(provider, model, usage, price_as, batch=False)
        paid = self.cost(provider, model, usage, price_as)
        return None if usual is None or paid is None else usual - paid
