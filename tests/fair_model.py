"""Whose job is next, as plain Python: what parking.lua is compared with, and judged by."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Waiting:
    """A job by its place among its tenant's."""

    score: float
    job_id: str
    key: str = dataclasses.field(default="", compare=False)


class FairModel:
    """Tenants by start-time fair queueing, jobs of a tenant by age and priority; no pools."""

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        bounds: Mapping[str, int] | None = None,
        ageing_ms: int = 60_000,
    ) -> None:
        """Nobody waits.

        Args:
            weights: Of tenants; 1 for all others.
            bounds: Jobs in flight, of tenants and of "tenant/key".
            ageing_ms: What one step of priority is worth.
        """
        self._weights = weights or {}
        self._bounds = bounds or {}
        self._ageing_ms = ageing_ms
        self._jobs: dict[str, list[Waiting]] = defaultdict(list)  # the next one first
        self._parked: set[str] = set()
        self._starts: dict[str, float] = {}
        self._resting: dict[str, float] = {}
        self._now = 0.0
        self._held: dict[str, str] = {}

    @property
    def waiting(self) -> int:
        return len(self._parked)

    def park(self, tenant: str, job_id: str, made_ms: int, priority: int, key: str = "") -> None:
        """A job of a tenant waits, unless it does already."""
        self._held.pop(job_id, None)  # who is rung for is not in flight
        if job_id not in self._parked:
            self._parked.add(job_id)
            score = made_ms - priority * self._ageing_ms
            bisect.insort(self._jobs[tenant], Waiting(score, job_id, key))
        self._wake()

    def let_go(self, job_id: str) -> None:
        """A job is no longer in flight."""
        self._held.pop(job_id, None)
        self._wake()

    def take(self, most: int) -> list[str]:
        """The next message."""
        ids: list[str] = []
        while len(ids) < most and self._starts:
            order = sorted((start, tenant.encode()) for tenant, start in self._starts.items())
            start, tenant = order[0][0], order[0][1].decode()
            weight = self._weights.get(tenant, 1.0)
            many = most - len(ids)
            if len(order) > 1:
                many = min(many, max(1, math.floor((order[1][0] - start) * weight)))
            self._now = start
            popped = self._pop(tenant, many)
            ids += popped
            after = start + len(popped) / weight
            if self._may_run(tenant):
                self._starts[tenant] = after
            else:
                del self._starts[tenant]
                self._resting[tenant] = after
        if not self._starts and not any(self._jobs.values()):
            self._resting.clear()
            self._now = 0.0
        return ids

    def _wake(self) -> None:
        for tenant, jobs in self._jobs.items():
            if jobs and tenant not in self._starts and self._may_run(tenant):
                self._starts[tenant] = max(self._now, self._resting.pop(tenant, 0.0))

    def _pop(self, tenant: str, most: int) -> list[str]:
        popped: list[str] = []
        while len(popped) < most and (job := self._next(tenant)):
            self._jobs[tenant].remove(job)
            self._parked.discard(job.job_id)
            self._held[job.job_id] = f"{tenant}/{job.key}" if job.key else tenant
            popped.append(job.job_id)
        return popped

    def _next(self, tenant: str) -> Waiting | None:
        if self._full(tenant):
            return None
        free = (j for j in self._jobs[tenant] if not j.key or not self._full(f"{tenant}/{j.key}"))
        return next(free, None)

    def _may_run(self, tenant: str) -> bool:
        return self._next(tenant) is not None

    def _full(self, flow: str) -> bool:
        bound = self._bounds.get(flow)
        if bound is None:
            return False
        held = [own for own in self._held.values() if own == flow or own.startswith(f"{flow}/")]
        return len(held) >= bound
