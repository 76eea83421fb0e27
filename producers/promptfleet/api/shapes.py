"""What the fleet's own endpoints take and give, as JSON and as OpenAPI describes it."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any, Literal

import pydantic
from pydantic import Field

from promptfleet_shared.jobs import (
    CacheStatus,
    JobError,
    JobKind,
    JobState,
    OnUnknown,
    Result,
    Service,
    Usage,
)
from promptfleet_shared.store.listing import JobRow


class _Shape(pydantic.BaseModel):
    """Described only: bodies are read by `submitting`, and written by orjson."""


class ErrorShape(_Shape):
    """Why a request was refused; always all four keys."""

    message: str = Field(description="A sentence for people.")
    type: str = Field(description="OpenAI's kind of error, e.g. `invalid_request_error`.")
    param: str | None = Field(description="Which field is wrong, if one is.")
    code: str | None = Field(description="A short, stable name for programs.")


class ErrorBody(_Shape):
    """The body of every response that is an error."""

    error: ErrorShape


class CacheShape(_Shape):
    """How a job uses the response cache."""

    mode: Literal["use", "refresh", "only", "off"] = "use"
    ttl_s: int | None = Field(None, description="Seconds that the answer is kept.")
    namespace: str | None = Field(None, description="Answers of other namespaces are not used.")


class JobRequest(_Shape):
    """A prompt and how it is to be answered; null means the same as leaving a field out."""

    prompt: str | list[dict[str, Any]] | None = Field(
        None, description="The prompt's text, or the messages of a chat. Either this or `messages`."
    )
    messages: list[dict[str, Any]] | None = Field(
        None, description="The messages of a chat: a `role`, and what else the provider takes."
    )
    tier: str | None = Field(
        None, description='Which models answer; "auto" chooses; else the fleet\'s default.'
    )
    model: str | None = Field(None, description="One model of the fleet instead of the tier's.")
    system: str | None = Field(None, description="The system message, put before the others.")
    max_tokens: int | None = Field(None, ge=1, description="Tokens of the answer at most.")
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: str | list[str] | None = Field(None, description="What ends the answer; up to four.")
    seed: int | None = None
    response_format: dict[str, Any] | None = Field(
        None, description='E.g. `{"type": "json_object"}`.'
    )
    tools: list[dict[str, Any]] | None = Field(
        None, description="Functions that the model may call."
    )
    tool_choice: str | dict[str, Any] | None = None
    metadata: dict[str, Any] | None = Field(
        None, description="JSON of yours, up to 16 KiB, given back with the result."
    )
    priority: int | None = Field(None, ge=0, le=9, description="9 is the most urgent; else 5.")
    deadline: float | str | None = Field(
        None, description="Seconds from now, or an instant of ISO 8601 with its offset."
    )
    idempotency_key: str | None = Field(
        None, max_length=255, description="The same key with the same request is one job."
    )
    callback_url: str | None = Field(None, description="Where a signed message is posted.")
    cache: bool | Literal["use", "refresh", "only", "off"] | CacheShape | None = None
    kind: JobKind | None = None
    on_unknown: OnUnknown | None = Field(
        None, description="When nobody knows whether a call was billed: again, or end as failed."
    )
    stream: bool | None = Field(None, description="Keep the tokens as they come, to be followed.")
    service: Service | None = Field(
        None, description="By a call of its own, or by its provider's batch API at half price."
    )
    limit_key: str | None = Field(
        None, max_length=255, description="What it shares a rule of [limits] with."
    )
    concurrency_key: str | None = Field(
        None, max_length=255, description="Jobs of the same key are bounded together."
    )
    session_id: str | None = Field(
        None, max_length=255, description="Prompts of a session go to the same deployment."
    )
    attributes: dict[str, Any] | None = Field(
        None, description='What you know of the prompt, for the tier "auto".'
    )
    complexity: Literal["low", "medium", "high"] | float | None = Field(
        None, description='How hard it is, for the tier "auto": a word, or 1 to 10.'
    )
    escalate_on: bool | str | list[str] | dict[str, Any] | None = Field(
        None, description="What is wrong with an answer, so that the next tier is asked."
    )
    context: str | dict[str, Any] | None = Field(
        None, description="What is left out of a chat that is too long: a policy, or its options."
    )
    compact: bool | None = Field(None, description="Leave out of the prompt what changes nothing.")
    memory_id: str | None = Field(
        None, max_length=255, description="The conversation that it is a turn of."
    )
    memory: dict[str, Any] | None = Field(
        None, description="How much of its conversation it is told."
    )


class JobErrorShape(_Shape):
    """Why a job or an attempt failed."""

    code: str
    message: str
    status: int | None = Field(description="The provider's HTTP status, if there was one.")


class UsageShape(_Shape):
    """Tokens of the final attempt's calls."""

    input_tokens: int = Field(description="The cached ones included.")
    cached_tokens: int
    output_tokens: int = Field(description="The reasoning ones included.")
    reasoning_tokens: int


class TimingsShape(_Shape):
    """Where the time went, in milliseconds."""

    queued_ms: float = Field(description="From when the job could run until its last claim.")
    provider_ms: float | None = Field(description="From the request to the end of its response.")
    total_ms: float = Field(description="From its acceptance to its end.")


class ResultShape(_Shape):
    """How a job ended."""

    job_id: uuid.UUID
    object: Literal["result"]
    state: JobState
    tier: str
    text: str | None = Field(description="The answer.")
    response: Any = Field(description="The provider's whole response.")
    finish_reason: str | None
    error: JobErrorShape | None
    model: str | None = Field(description="Who answered.")
    provider: str | None
    usage: UsageShape
    cost_usd: float | None = Field(description="US dollars; null where no price is known.")
    cache: CacheStatus
    attempts: int
    calls: int = Field(description="Calls of providers, by all attempts.")
    unknown_calls: int = Field(description="Those whose outcome and bill nobody knows.")
    decision: dict[str, Any] | None = Field(description="Why it went this way, a key a feature.")
    saved_usd: float | None = Field(description="US dollars that something, e.g. a cache, saved.")
    timings: TimingsShape
    metadata: dict[str, Any]
    created_at: dt.datetime
    finished_at: dt.datetime


class JobShape(_Shape):
    """A job as it stands."""

    id: uuid.UUID
    object: Literal["job"]
    state: JobState
    kind: JobKind
    tier: str
    model: str | None = Field(description="The model that was asked for.")
    priority: int
    stream: bool
    metadata: dict[str, Any]
    attempts: int
    calls: int
    cancel_requested: bool
    error: JobErrorShape | None = Field(description="Of the last attempt that failed.")
    batch_id: uuid.UUID | None = Field(description="The batch that it is a line of.")
    created_at: dt.datetime
    deadline: dt.datetime
    finished_at: dt.datetime | None
    result: ResultShape | None = Field(
        None, description="Once the state is final; lists of jobs leave it out."
    )


class JobList(_Shape):
    """A page of jobs, the newest first."""

    object: Literal["list"]
    data: list[JobShape]
    has_more: bool
    cursor: str | None = Field(description="Where the next page begins; null after the last.")


class ResultList(_Shape):
    """A page of results, in the order in which they landed."""

    object: Literal["list"]
    data: list[ResultShape]
    has_more: bool = Field(description="Whether more are there already.")
    cursor: str = Field(description="Where to go on, now or when more have landed.")


class UploadLine(_Shape):
    """A line of the answer to many jobs: one for each, in order."""

    index: int = Field(description="Its place in the request, from 0.")
    id: uuid.UUID | None = Field(None, description="The job, which is committed.")
    error: ErrorShape | None = Field(None, description="Why there is none.")


def job_json(row: JobRow, result: Result | None = None) -> dict[str, Any]:
    """A job's JSON, with its result."""
    return {**listed_job_json(row), "result": None if result is None else result_json(result)}


def listed_job_json(row: JobRow) -> dict[str, Any]:
    """A job's JSON in a list."""
    return {
        "id": row.id,
        "object": "job",
        "state": row.state,
        "kind": row.kind,
        "tier": row.tier,
        "model": row.model,
        "priority": row.priority,
        "stream": row.stream,
        "metadata": row.metadata,
        "attempts": row.attempts,
        "calls": row.calls,
        "cancel_requested": row.cancel_requested,
        "error": error_json(row.error),
        "batch_id": row.batch_id,
        "created_at": _utc(row.created_at),
        "deadline": _utc(row.deadline),
        "finished_at": None if row.finished_at is None else _utc(row.finished_at),
    }


def result_json(result: Result) -> dict[str, Any]:
    """A result's JSON."""
    return {
        "job_id": result.job_id,
        "object": "result",
        "state": result.state,
        "tier": result.tier,
        "text": result.text,
        "response": result.response,
        "finish_reason": result.finish_reason,
        "error": error_json(result.error),
        "model": result.model,
        "provider": result.provider,
        "usage": usage_json(result.usage),
        "cost_usd": None if result.cost_usd is None else float(result.cost_usd),
        "cache": result.cache,
        "attempts": result.attempts,
        "calls": result.calls,
        "unknown_calls": result.unknown_calls,
        "decision": result.decision,
        "saved_usd": None if result.saved_usd is None else float(result.saved_usd),
        "timings": {
            "queued_ms": round(result.queued_ms, 3),
            "provider_ms": None if result.provider_ms is None else round(result.provider_ms, 3),
            "total_ms": round(result.total_ms, 3),
        },
        "metadata": result.metadata,
        "created_at": _utc(result.created_at),
        "finished_at": _utc(result.finished_at),
    }


def usage_json(usage: Usage) -> dict[str, int]:
    """Tokens as the fleet's own endpoints and callbacks tell them."""
    return {
        "input_tokens": usage.input,
        "cached_tokens": usage.cached,
        "output_tokens": usage.output,
        "reasoning_tokens": usage.reasoning,
    }


def error_json(error: JobError | None) -> dict[str, Any] | None:
    """Why something failed."""
    if error is None:
        return None
    return {"code": error.code, "message": error.message, "status": error.status}


def fleet_headers(result: Result) -> dict[str, str]:
    """What the response with one result tells of how it was made, for clients that look there."""
    values: dict[str, object] = {
        "x-promptfleet-job": result.job_id,
        "x-promptfleet-tier": result.tier,
        "x-promptfleet-model": result.model,
        "x-promptfleet-cache": result.cache.value,
        "x-promptfleet-queue-ms": round(result.queued_ms),
        "x-promptfleet-provider-ms": (
            None if result.provider_ms is None else round(result.provider_ms)
        ),
        "x-promptfleet-cost-usd": None if result.cost_usd is None else f"{result.cost_usd:f}",
    }
    return {name: _header(value) for name, value in values.items() if value is not None}


def _header(value: object) -> str:
    """A provider's own words could hold anything; a header holds printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in str(value))[:200]


def _utc(instant: dt.datetime) -> dt.datetime:
    return instant.astimezone(dt.UTC)
