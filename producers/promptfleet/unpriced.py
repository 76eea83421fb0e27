"""Which budgets can't count what some deployment costs, because nobody knows its price."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from promptfleet_shared.fleet import Deployment, Fleet, Model
from promptfleet_shared.jobs import Usage
from promptfleet_shared.policies.budgets import Budget


class Price(Protocol):
    """The price list's `cost`."""

    def __call__(
        self, provider: str, model: str, usage: Usage, price_as: str | None = None
    ) -> object | None:
        """Something of a price; None where it is unknown."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unpriced:
    """A deployment without a price, and the budgets that its calls count nothing in."""

    deployment: str
    model: str
    budgets: tuple[str, ...]

    @property
    def text(self) -> str:
        """What is wrong, for people."""
        names = ", ".join(self.budgets)
        which = "the budget" if len(self.budgets) == 1 else "the budgets"
        gap = f"no price is known, so that its calls count nothing in {which} {names}"
        return f"{self.deployment}: {gap}"

    @property
    def advice(self) -> str:
        """What to do about it."""
        return f'set models.{self.model}.price_as to "provider/model", or to "free"'


def unpriced(fleet: Fleet) -> list[Unpriced]:
    """The deployments whose calls a budget is for, and that have no price.

    Without the price list (an extra of the workers) nothing can be said, and nothing is.
    """
    if not fleet.budgets:
        return []
    try:
        from promptfleet_shared.pricing import Pricer  # noqa: PLC0415 - optional, and slow
    except ImportError:
        return []
    price = Pricer().cost
    return [
        Unpriced(deployment=deployment.name, model=name, budgets=budgets)
        for name, model in fleet.models.items()
        if (budgets := tuple(b.name for b in fleet.budgets if _covers(b, name, fleet)))
        for deployment in model.deployments
        if not _has_price(price, name, model, deployment)
    ]


def _covers(budget: Budget, model: str, fleet: Fleet) -> bool:
    """True if a call to the model may count in the budget."""
    match budget.by:
        case "model":
            return budget.counts(model)
        case "tier" if budget.only:
            tiers = (tier for tier, section in fleet.tiers.items() if model in section.models)
            return any(budget.counts(tier) for tier in tiers)
        case _:
            return True


def _has_price(price: Price, name: str, model: Model, deployment: Deployment) -> bool:
    price_as = deployment.price_as or model.price_as
    there = deployment.model or name
    return price(deployment.provider, there, Usage(input=1, output=1), price_as) is not None
