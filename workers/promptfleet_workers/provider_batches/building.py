"""Puts the parts together that see providers' batches through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Self

from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_workers.budgets import Budgets
from promptfleet_workers.endings import Endings
from promptfleet_workers.provider_batches.freeing import Freeing
from promptfleet_workers.provider_batches.handover import Handover
from promptfleet_workers.provider_batches.landing import Lander
from promptfleet_workers.provider_batches.pricing import BatchPricer
from promptfleet_workers.provider_batches.returning import Returner
from promptfleet_workers.provider_batches.service import LEASE_S, ProviderBatches
from promptfleet_workers.provider_batches.submitting import Submitter
from promptfleet_workers.providers.batch_protocol import BatchApi
from promptfleet_workers.routing import Router


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchParts:
    """What the pipeline gives jobs to, and what sees to them then."""

    handover: Handover
    service: ProviderBatches

    @classmethod
    def of(
        cls,
        *,
        database: AsyncDatabase,
        fleet: Fleet,
        router: Router,
        apis: Mapping[str, BatchApi],
        endings: Endings,
        landing: Endings,
        pricer: BatchPricer,
        owner: str,
        retention_s: float,
        ring: Callable[[Iterable[Doorbell]], None],
        lease_s: float = LEASE_S,
        budgets: Budgets | None = None,
    ) -> Self:
        """Build them; nothing runs yet.

        Args:
            database: Where batches are written down.
            fleet: Its options.
            router: Gives jobs their candidates.
            apis: Those of the deployments that have one, by their names.
            endings: The pipeline's, which jobs leave.
            landing: Ends of its own for answers of batches: no slot was taken for their jobs.
            pricer: What lines cost; `landing` prices by it, too.
            owner: This worker's name.
            retention_s: Seconds that ended batches are kept.
            ring: Rings doorbells in the background.
            lease_s: Seconds that a batch stays a worker's without a word from it.
            budgets: Reserve what lines cost, where the fleet has any.
        """
        freeing = None if budgets is None else Freeing(database, budgets)
        returner = Returner(database=database, ring=ring, freeing=freeing)
        submitter = Submitter(
            database=database, options=fleet.batch_service, apis=apis, returner=returner
        )
        lander = Lander(
            database=database,
            fleet=fleet,
            router=router,
            apis=apis,
            endings=landing,
            pricer=pricer,
            returner=returner,
            budgets=budgets,
        )
        service = ProviderBatches(
            database=database,
            options=fleet.batch_service,
            deployments=tuple(apis),
            steps={
                "preparing": submitter.prepare,
                "unknown": submitter.search,
                "submitted": lander.poll,
            },
            owner=owner,
            retention_s=retention_s,
            lease_s=lease_s,
            freeing=freeing,
        )
        handover = Handover(
            database=database,
            fleet=fleet,
            apis=apis,
            endings=endings,
            wake=service.wake,
            budgets=budgets,
        )
        return cls(handover=handover, service=service)
