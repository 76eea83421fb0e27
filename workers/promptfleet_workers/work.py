"""A claimed job on its way through the pipeline: what the steps have found out so far."""

from __future__ import annotations

import dataclasses
import time
import uuid
from decimal import Decimal
from typing import Any

from promptfleet_shared.jobs import CacheStatus, ClaimedJob, LostCall, OnUnknown
from promptfleet_workers.balancing.places import Place
from promptfleet_workers.caching.probe import Probe
from promptfleet_workers.context.remembering import NewTurn
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
        key_model: The model whose answer that is: another one's is not kept under the key.
        probe: What the semantic cache is to keep with its answer.
        followers: Equal jobs that wait for this one's call.
        decision: Why it went this way, a key a feature; never a prompt or an output.
        saved_usd: US dollars that its answer would have cost without what saved them.
        place: Where the balancer counts it as in flight; None where nothing is balanced.
        lost: Its calls that cost something, or may have, and gave no answer.
        turn: What it says in its conversation; None where it has none.
        counted: The model whose tokens were counted, and how many the request has by that count.
        triage_key: The key of a small model's verdict on its tier.
        triage_of: The job as it was claimed, while what is asked is how hard its prompt is.
        ended: True once its outcome or release is on its way to the database.
    """

    job: ClaimedJob
    batch: Batch
    asked_at: float
    claimed_at: float
    route: tuple[Candidate, ...]
    request: str
    key: str | None = None
    key_model: str | None = None
    probe: Probe | None = None
    cache: CacheStatus = CacheStatus.OFF
    followers: list[Work] = dataclasses.field(default_factory=list)
    calls: int = 0
    unknown_calls: int = 0
    provider_ms: float | None = None
    decision: dict[str, Any] | None = None
    saved_usd: Decimal | None = None
    lost: tuple[LostCall, ...] = ()
    place: Place | None = None
    turn: NewTurn | None = None
    counted: tuple[str, int] | None = None
    triage_key: str | None = None
    triage_of: ClaimedJob | None = None
    ended: bool = False

    def end(self) -> None:
        """Its outcome or release is on its way; it is in flight nowhere any more."""
        self.ended = True
        if self.place is not None:
            self.place.own -= 1
            self.place = None

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
