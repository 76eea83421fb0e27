"""Run a sample of `tier="auto"` on the top tier, too, so that the choice can be measured."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Callable, Iterable

from promptfleet_shared.errors import StoreRefusedError, StoreUnavailableError
from promptfleet_shared.fleet import Fleet
from promptfleet_shared.jobs import CacheMode, CacheOptions, ClaimedJob, Doorbell, JobSpec
from promptfleet_shared.policies.tier_choice import DECISION
from promptfleet_shared.store.database import AsyncDatabase
from promptfleet_shared.store.shadows import SHADOW, SHADOW_METADATA
from promptfleet_shared.store.submissions import insert_jobs
from promptfleet_shared.tiers import AUTO_TIER

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
_SCALE = float(2**64)


class Shadows:
    """Makes the second jobs, once the first ones' results are written."""

    def __init__(
        self, *, database: AsyncDatabase, fleet: Fleet, ring: Callable[[Iterable[Doorbell]], None]
    ) -> None:
        """Make none yet.

        Args:
            database: Where jobs are.
            fleet: The sample's share, and which tier is the top one.
            ring: Rings for jobs.
        """
        self._database = database
        self._section = fleet.routing.shadow
        self._top = fleet.tier_names[-1]
        self._ring = ring
        self._waiting: dict[uuid.UUID, JobSpec] = {}
        self._inserts: set[asyncio.Task[None]] = set()

    def consider(self, job: ClaimedJob) -> None:
        """A job has succeeded: if it is one of the sample, it will have a second one."""
        decided = job.decision.get(DECISION) if job.decision else None
        if decided is None or decided.get("asked") != AUTO_TIER or job.tier == self._top:
            return
        if is_sampled(job.id, self._section.share):
            self._waiting[job.id] = self._spec(job)

    def written(self, ids: Iterable[uuid.UUID], written: set[uuid.UUID]) -> None:
        """These ends were written, or refused by the fence."""
        specs = []
        for job_id in ids:
            spec = self._waiting.pop(job_id, None)
            if spec is not None and job_id in written:
                specs.append(spec)
        if specs:
            task = asyncio.create_task(self._insert(specs))
            self._inserts.add(task)
            task.add_done_callback(self._inserts.discard)

    async def drain(self) -> None:
        """Wait until all second jobs are accepted."""
        if self._inserts:
            await asyncio.wait(self._inserts)

    async def _insert(self, specs: list[JobSpec]) -> None:
        try:
            await self._database.insist(
                lambda connection: insert_jobs(connection, specs), patience_s=PATIENCE_S
            )
        except (StoreRefusedError, StoreUnavailableError) as error:
            # A smaller sample; nobody waits for it.
            log.warning("shadows_lost", extra={"jobs": len(specs), "error": str(error)})
            return
        self._ring(
            [
                Doorbell(job_id=s.id, tier=s.tier, priority=s.priority, tenant=s.tenant)
                for s in specs
            ]
        )

    def _spec(self, job: ClaimedJob) -> JobSpec:
        return JobSpec(
            id=shadow_id(job.id),
            tier=self._top,
            request=job.request.encode("utf-8", "surrogatepass"),
            input_tokens=job.input_tokens,
            deadline_s=self._section.deadline_s,
            tenant=job.tenant,
            kind=job.kind,
            priority=self._section.priority,
            cache=CacheOptions(mode=CacheMode.OFF),  # else its cost and latency would be nobody's
            metadata={SHADOW_METADATA: str(job.id)},
            policy={"escalate_on": {}},
            decision={DECISION: {"asked": self._top, "by": SHADOW, SHADOW: str(job.id)}},
        )


def is_sampled(job_id: uuid.UUID, share: float) -> bool:
    """Whether a job is one of the sample; the same each time it is asked."""
    if share <= 0:
        return False
    digest = hashlib.sha256(job_id.bytes).digest()
    return int.from_bytes(digest[:8], "big") / _SCALE < share


def shadow_id(job_id: uuid.UUID) -> uuid.UUID:
    """The id of a job's second one: a UUIDv7 of the same moment, and always the same."""
    digest = int.from_bytes(hashlib.sha256(b"shadow" + job_id.bytes).digest()[:16], "big")
    moment, version = job_id.int >> 80 << 80, 7 << 76
    variant = 2 << 62
    return uuid.UUID(int=moment | version | (digest & ((0xFFF << 64) | (2**62 - 1))) | variant)
