"""A claimed job on its way through the pipeline: what the steps have found out so far."""

from __future__ import annotations

import dataclasses
import time
import uuid

from promptfleet_shared.jobs import CacheStatus, ClaimedJob, OnUnknown
from promptfleet_workers.routing import Candidate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Jobs that were claimed together."""

    id: uuid.UUID
    size: int


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class Work:
    """A job, its route, and what was done about it so far.

    Attributes:
        asked_at: When the claim was asked for, by `time.monotonic`.
        claimed_at: When it was there.
        key: The key of its answer in the cache; None where the cache is off.
        followers: Equal jobs that wait for this one's call.
        ended: True once its outcome or release is on its way to the database.
    """

    job: ClaimedJob
    batch: Batch
    asked_at: float
    claimed_at: float
    route: tuple[Candidate, ...]
    key: str | None = None
    cache: CacheStatus = CacheStatus.OFF
    followers: list[Work] = dataclasses.field(default_factory=list)
    calls: int = 0
    unknown_calls: int = 0
    provider_ms: float | None = None
    ended: bool = False

    @property
    def remaining_s(self) -> float:
        """Seconds until the job's deadline."""
        return self.job.remaining_s - (time.monotonic() - self.claimed_at)

    @property
    def must_not_repeat(self) -> bool:
        """True if the job may have been answered already, and must not be called twice."""
        return self.unknown_calls > 0 and self.job.on_unknown is OnUnknown.FAIL

    @property
    def all_calls(self) -> int:
        """Calls under this and earlier claims."""
        return self.job.calls + self.calls
