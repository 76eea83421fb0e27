"""What a job is, on both sides of the queue: frozen data and no behaviour."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

DEFAULT_TENANT = "default"
DEFAULT_PRIORITY = 5
MAX_PRIORITY = 9


class JobState(enum.StrEnum):
    """Where a job is; docs/reference/states.md draws the moves between them."""

    QUEUED = "queued"
    RUNNING = "running"
    SUBMITTED = "submitted"  # a provider's own batch API has it
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        """True when a results row exists and nothing will change any more."""
        return self in FINAL_STATES


FINAL_STATES = frozenset(
    {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}
)


class JobKind(enum.StrEnum):
    """Which kind of endpoint answers the job."""

    CHAT = "chat"
    COMPLETION = "completion"
    EMBEDDING = "embedding"


class OnUnknown(enum.StrEnum):
    """What becomes of a job when nobody knows whether its call was answered, and billed."""

    RETRY = "retry"  # call again: an answer matters more than what it costs
    FAIL = "fail"  # end as failed, code `unknown_outcome`: nothing may be done twice


class Service(enum.StrEnum):
    """How a job is answered, as its `service` option asks."""

    STANDARD = "standard"  # by a call of its own
    BATCH = "batch"  # by its provider's batch API, at half price and within a day
    AUTO = "auto"  # by the batch API if its deadline is far enough


class CacheMode(enum.StrEnum):
    """How a job uses the response cache."""

    USE = "use"
    REFRESH = "refresh"  # call the provider and store the new answer
    ONLY = "only"  # fail with code `cache_miss` where the cache has no answer: no call
    OFF = "off"


class CacheStatus(enum.StrEnum):
    """Where a job's answer came from, as its results row tells."""

    OFF = "off"
    MISS = "miss"
    HIT = "hit"
    COALESCED = "coalesced"  # an equal job's call answered this one too
    SEMANTIC = "semantic"  # the answer to a prompt that means the same


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """A job's wishes for the response cache; None means what fleet.toml says."""

    mode: CacheMode = CacheMode.USE
    ttl_s: int | None = None
    namespace: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """A validated submission: everything that becomes a `queued` row.

    Attributes:
        request: The request's own part of the provider's body as JSON bytes: `messages`, `prompt`
            or `input`, and parameters such as `max_tokens`; never the model.
        input_tokens: A cheap estimate, used to size batches.
        deadline_s: Seconds from the insert until the job expires.
        stream: True if its tokens are to be read as they come.
        batch_id: The API's batch that the job is a line of.
        policy: Options that steer how the job is answered, by their names; JSON.
        concurrency_key: What the job shares a bound on running jobs with.
        decision: What its submission decided, for its result: a key a feature.
    """

    id: uuid.UUID
    tier: str
    request: bytes
    input_tokens: int
    deadline_s: float
    tenant: str = DEFAULT_TENANT
    kind: JobKind = JobKind.CHAT
    model: str | None = None
    priority: int = DEFAULT_PRIORITY
    cache: CacheOptions | None = None
    metadata: dict[str, Any] | None = None
    idempotency_key: str | None = None
    callback_url: str | None = None
    on_unknown: OnUnknown = OnUnknown.RETRY
    stream: bool = False
    batch_id: uuid.UUID | None = None
    policy: dict[str, Any] | None = None
    concurrency_key: str | None = None
    decision: dict[str, Any] | None = None


NO_POLICY: Mapping[str, Any] = {}


class ClaimedJob(NamedTuple):
    """A job that this worker holds: valid while its fence is the row's.

    A tuple, as an outcome is: one is made for each job, at half of a frozen data class's time.

    Attributes:
        attempt: Which attempt this is, from 1.
        deferrals: How often a provider had no room for it.
        calls: Provider calls that earlier attempts made.
        crashes: Workers that were lost while they had it.
        queued_ms: Milliseconds from when the job could run until this claim.
        remaining_s: Seconds from the claim to the deadline, by the database's clock.
        policy: Options that steer how the job is answered, by their names.
        decision: What earlier claims decided, a key a feature.
        concurrency_key: What the job shares a bound on running jobs with.
    """

    id: uuid.UUID
    fence: int
    tenant: str
    tier: str
    kind: JobKind
    model: str | None
    request: str
    input_tokens: int
    priority: int
    cache: CacheOptions
    attempt: int
    deferrals: int
    calls: int
    on_unknown: OnUnknown
    queued_ms: float
    remaining_s: float
    stream: bool = False
    has_callback: bool = False
    crashes: int = 0
    policy: Mapping[str, Any] = NO_POLICY
    decision: Mapping[str, Any] = NO_POLICY
    concurrency_key: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of one or more calls; `input` includes the `cached` ones, `output` the `reasoning`."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            input=self.input + other.input,
            cached=self.cached + other.cached,
            output=self.output + other.output,
            reasoning=self.reasoning + other.reasoning,
        )


NO_USAGE = Usage()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobError:
    """Why a job or an attempt failed: a short code and a sentence without prompt or output."""

    code: str
    message: str
    status: int | None = None


class TurnTaken(NamedTuple):
    """What a job adds to its conversation, as JSON: its new messages and the answer's."""

    memory_id: str
    messages: bytes


class LostCall(NamedTuple):
    """A call that may have cost something and gave no answer; the ledger has a row of each.

    Attributes:
        usage: Its tokens: the provider's own count, or what came of the answer by our estimate.
        cost_usd: The price of the provider's count; None where it gave none.
        estimated_usd: The price by our estimate, where a part of the answer came without a count.
        at_most_usd: What it may have cost at most, where nobody knows what the provider did.
        calls: 0 for a job whose request was counted on another job's.
    """

    model: str
    provider: str
    deployment: str
    usage: Usage
    cost_usd: Decimal | None = None
    estimated_usd: Decimal | None = None
    at_most_usd: Decimal | None = None
    calls: int = 1
    unknown_calls: int = 0


class Outcome(NamedTuple):
    """How a claimed job ended: what `finish` writes in one transaction.

    Attributes:
        response: The provider's whole response, as the JSON it sent.
        calls: Provider calls made under this claim, each of them in the ledger.
        cost_usd: The price of the call that answered; None where no price is known.
        provider_ms: Milliseconds from sending the request to the end of its response.
        unknown_calls: Calls whose outcome (and bill) is not known, e.g. after a time-out.
        decision: Why it went this way, a key a feature; never a prompt or an output.
        saved_usd: US dollars that this answer would have cost without what saved them.
        turn: What its conversation is to remember of it, where it has one.
        lost: Those of the calls that cost something, or may have, and gave no answer.
        in_conversation: True if another job may wait for this one's end to have its turn.
    """

    job_id: uuid.UUID
    fence: int
    state: JobState
    text: str | None = None
    response: bytes | None = None
    finish_reason: str | None = None
    error: JobError | None = None
    model: str | None = None
    provider: str | None = None
    deployment: str | None = None
    usage: Usage = NO_USAGE
    cost_usd: Decimal | None = None
    cache: CacheStatus = CacheStatus.OFF
    calls: int = 0
    unknown_calls: int = 0
    batch_id: uuid.UUID | None = None
    batch_size: int = 1
    queued_ms: float = 0.0
    provider_ms: float | None = None
    decision: Mapping[str, Any] | None = None
    saved_usd: Decimal | None = None
    turn: TurnTaken | None = None
    lost: tuple[LostCall, ...] = ()
    in_conversation: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A claim given back without a result: the job is queued again.

    Attributes:
        delay_s: Seconds until it may run again.
        counts: False where the attempt was not the job's fault (429, shutdown).
        tier: Another tier that is to go on with it; None for its own.
        decision: What the job's result is to tell of this claim.
        model: Who was paid for the calls of this claim, where that is known.
        usage: Tokens of those calls, for the ledger.
        cost_usd: The price of those calls; None where no price is known.
        lost: As of `Outcome`.
        waits_turn: True for a turn of a conversation that an earlier one is before; `delay_s` is
            how long it sleeps unless that one's end wakes it.
    """

    job_id: uuid.UUID
    fence: int
    delay_s: float = 0.0
    counts: bool = True
    calls: int = 0
    unknown_calls: int = 0
    error: JobError | None = None
    tier: str | None = None
    decision: Mapping[str, Any] | None = None
    model: str | None = None
    provider: str | None = None
    deployment: str | None = None
    usage: Usage = NO_USAGE
    cost_usd: Decimal | None = None
    lost: tuple[LostCall, ...] = ()
    waits_turn: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Doorbell:
    """A job that somebody should look at: all that a message on a queue may know.

    Attributes:
        returned: True for one that had come to the front of its queue already, where no worker had
            room for it: it goes before all others of its priority.
        tenant: Whose job it is: tenants take turns.
        concurrency_key: What the job shares a bound on running jobs with.
    """

    job_id: uuid.UUID
    tier: str
    priority: int = DEFAULT_PRIORITY
    returned: bool = False
    tenant: str = DEFAULT_TENANT
    concurrency_key: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A row of `results`: how a job ended, for whoever asked.

    Attributes:
        text: The answer, or None for a job without one. A NUL, which Postgres' text can't hold,
            is shown as U+FFFD here and kept as it came in `response`.
        response: The provider's whole response, decoded.
        cost_usd: US dollars for the call that answered; None where no price is known. What other
            calls cost is in the ledger.
        batch_id: Of the worker's batch that it was claimed in.
        queued_ms: Milliseconds the job waited for its (last) claim.
        total_ms: Milliseconds from its acceptance to its end.
        unknown_calls: Calls of all attempts whose outcome (and bill) nobody knows.
        decision: Why this tier, model and deployment, why this wait: a key a feature.
        saved_usd: US dollars that it would have cost without what saved them, e.g. the cache.
    """

    job_id: uuid.UUID
    state: JobState
    tier: str
    text: str | None
    response: Any
    finish_reason: str | None
    error: JobError | None
    model: str | None
    provider: str | None
    deployment: str | None
    usage: Usage
    cost_usd: Decimal | None
    cache: CacheStatus
    attempts: int
    calls: int
    batch_id: uuid.UUID | None
    batch_size: int
    queued_ms: float
    provider_ms: float | None
    total_ms: float
    metadata: dict[str, Any]
    created_at: dt.datetime
    finished_at: dt.datetime
    unknown_calls: int = 0
    decision: dict[str, Any] | None = None
    saved_usd: Decimal | None = None

    @property
    def succeeded(self) -> bool:
        """True if the provider (or the cache) answered in full."""
        return self.state is JobState.SUCCEEDED


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ConversationTurn:
    """What one job added to a conversation.

    Attributes:
        messages: The job's new messages without system messages, then the answer's.
    """

    number: int
    job_id: uuid.UUID
    messages: list[dict[str, Any]]
    created_at: dt.datetime


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """All that is remembered under one `memory_id`.

    Attributes:
        turns: In order, the oldest first.
        summary: Of older turns; None where none was made. The turns are kept beside it.
        updated_at: When the last turn was added.
    """

    memory_id: str
    turns: list[ConversationTurn]
    summary: str | None
    created_at: dt.datetime
    updated_at: dt.datetime

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of all turns, in order."""
        return [message for turn in self.turns for message in turn.messages]
