"""How tenants share a tier's workers, as fleet.toml says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, model_validator

from promptfleet_shared.policies.section import Count, Section

Weight = Annotated[float, Field(gt=0, le=1_000_000)]
MAX_RESERVE = 0.5
EVERY = ":*"
"""How the name of a group of keys ends."""


class TenantShare(Section):
    """What one tenant gets.

    Attributes:
        weight: Its jobs for each job of a tenant with weight 1, while both have some waiting.
        max_in_flight: Its jobs that may be on their way or running at once, over all tiers.
    """

    weight: Weight = 1.0
    max_in_flight: Count | None = None


class KeyBound(Section):
    """What jobs of one tenant with the same `concurrency_key` may do at once.

    Attributes:
        max_in_flight: How many may be on their way or running, over all tiers.
    """

    max_in_flight: Count


class FairnessSection(Section):
    """How tenants share a tier's workers.

    Attributes:
        enabled: False queues all jobs of a tier by their priority and age alone.
        ageing_s: Seconds of waiting that count as much as one step of priority.
        interactive_priority: Jobs of this priority and above are interactive.
        interactive_reserve: The share of a worker's slots that only interactive jobs may take,
            0 to 0.5.
        max_in_flight: A bound for each tenant that has none of its own.
        max_in_flight_per_key: A bound for each `concurrency_key` that has none of its own.
        tenants: What is different for these tenants.
        keys: What is different for these keys; "user:*" stands for all that begin with "user:".
    """

    enabled: bool = True
    ageing_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    interactive_priority: Annotated[int, Field(ge=0, le=9)] = 8
    interactive_reserve: Annotated[float, Field(ge=0, le=MAX_RESERVE)] = 0.0
    max_in_flight: Count | None = None
    max_in_flight_per_key: Count | None = None
    tenants: Mapping[str, TenantShare] = {}
    keys: Mapping[str, KeyBound] = {}

    @model_validator(mode="after")
    def _needs_to_be_on(self) -> Self:
        if not self.enabled and (self.interactive_reserve or self.has_bounds):
            msg = "fairness.enabled: must be true for a reserve or for max_in_flight"
            raise ValueError(msg)
        return self

    @property
    def has_bounds(self) -> bool:
        """True if any tenant or key has a bound."""
        return (
            self.max_in_flight is not None
            or self.max_in_flight_per_key is not None
            or bool(self.keys)
            or any(share.max_in_flight is not None for share in self.tenants.values())
        )

    def bound_of_tenant(self, tenant: str) -> int | None:
        """How many jobs of the tenant may be in flight; None for any number."""
        share = self.tenants.get(tenant)
        own = share.max_in_flight if share is not None else None
        return self.max_in_flight if own is None else own

    def bound_of_key(self, key: str) -> int | None:
        """How many jobs with the key, of one tenant, may be in flight; None for any number."""
        found = self.keys.get(key) or self.keys.get(key.partition(":")[0] + EVERY)
        return self.max_in_flight_per_key if found is None else found.max_in_flight

    def is_bounded(self, tenant: str, key: str | None) -> bool:
        """True if a bound holds for a job of this tenant with this key."""
        if self.bound_of_tenant(tenant) is not None:
            return True
        return key is not None and self.bound_of_key(key) is not None

    def reserved(self, slots: int) -> int:
        """How many of a worker's slots are for interactive jobs only: one at least, if any."""
        if not self.interactive_reserve:
            return 0
        return min(slots - 1, max(1, round(slots * self.interactive_reserve)))
