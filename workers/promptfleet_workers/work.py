"""A claimed job on its way through the pipeline: what the steps have found out so far."""

from __future__ import annotations

import dataclasses
import time
import uuid
from decimal import Decimal
from typing import Any

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
        request: What is sent: the job's own request, or what was made of it to fit the model.
        key: The key of its answer in the cache; None where the cache is off.
        followers: Equal jobs that wait for this one's call.
        decision: Why it went this way, a key a feature; never a prompt or an output.
        saved_usd: US dollars that its answer would have cost without what saved them.
        ended: True once its outcome or release is on its way to the database.
    """

    job: ClaimedJob
    batch: Batch
    asked_at: float
    claimed_at: float
    route: tuple[Candidate, ...]
    request: str
    key: str | None = None
    cache: CacheStatus = CacheStatus.OFF
    followers: list[Work] = dataclasses.field(default_factory=list)
    calls: int = 0
    unknown_calls: int = 0
    provider_ms: float | None = None
    decision: dict[str, Any] | None = None
    saved_usd: Decimal | None = None
    ended: bool = False

    def note(self, feature: str, **facts: object) -> None:
        """Let the job's result tell this of a feature; more facts join those that are there."""
        if self.decision is None:
            self.decision = {}
        self.decision.setdefault(feature, {}).update(facts)

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
