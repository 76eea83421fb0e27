"""A job as one of OpenAI's Response objects."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Mapping
from typing import Any

from promptfleet.api.openai.answers import openai_answer, usage_of
from promptfleet.api.openai.ids import RESPONSE, public_id
from promptfleet.api.openai.models import TIER_PREFIX
from promptfleet.api.openai.responses_input import told_options
from promptfleet_shared.jobs import JobKind, JobState, Result
from promptfleet_shared.store.listing import JobRow

_STATUSES = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "in_progress",
    JobState.SUBMITTED: "in_progress",
    JobState.FAILED: "failed",
    JobState.EXPIRED: "failed",
    JobState.CANCELLED: "cancelled",
}
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
# OpenAI's codes of a response that failed; others come as they are.
_CODES = {"context_length_exceeded": "invalid_prompt", "insufficient_quota": "rate_limit_exceeded"}

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A response that is to be told.

    Attributes:
        model: As the client calls it.
        request: The chat request that was stored.
        created_at: In Unix' seconds.
    """

    id: uuid.UUID
    model: str
    request: Mapping[str, Any]
    created_at: float
    background: bool = False
    metadata: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, row: JobRow, request: Mapping[str, Any]) -> Draft:
        """That of a job which was submitted some time ago."""
        return cls(
            id=row.id,
            model=row.model or TIER_PREFIX + row.tier,
            request=request,
            created_at=_unix(row.created_at),
            background=True,
            metadata=row.metadata,
        )


def response_json(draft: Draft, *, status: str, result: Result | None = None) -> Json:
    """The Response object.

    Args:
        draft: What does not change.
        status: As long as there is no result.
        result: Once the job has ended.
    """
    output: list[Json] = []
    usage = error = incomplete = completed_at = None
    model = draft.model
    if result is not None:
        status = _STATUSES.get(result.state, "completed")
        if result.succeeded:
            answer = openai_answer(result, JobKind.CHAT, draft.model)
            model = answer["model"]
            choice = _first_choice(answer)
            if reason := _INCOMPLETE.get(str(choice.get("finish_reason"))):
                status, incomplete = "incomplete", {"reason": reason}
            output = output_items(draft.id, choice, status)
            usage = _usage(usage_of(result))
            completed_at = _unix(result.finished_at)
        elif status == "failed":
            error = _error(result)
    return {
        "id": public_id(RESPONSE, draft.id),
        "object": "response",
        "created_at": draft.created_at,
        "completed_at": completed_at,
        "status": status,
        "background": draft.background,
        "error": error,
        "incomplete_details": incomplete,
        "metadata": dict(draft.metadata or {}),
        "model": model,
        "output": output,
        "store": True,
        "usage": usage,
        **told_options(draft.request),
    }


def state_status(row: JobRow) -> str:
    """The status of a job that has not ended."""
    return _STATUSES.get(row.state, "in_progress")


def output_items(job_id: uuid.UUID, choice: Json, status: str) -> list[Json]:
    """A chat's choice as the items of a response: a message, and calls of functions."""
    message = choice.get("message")
    if not isinstance(message, Mapping):
        return []
    done = "incomplete" if status == "incomplete" else "completed"
    items: list[Json] = []
    parts = [text_part(text) for text in _texts(message.get("content"))]
    if isinstance(refusal := message.get("refusal"), str):
        parts.append({"type": "refusal", "refusal": refusal})
    calls = message.get("tool_calls") or []
    if parts or not calls:
        items.append(message_item(job_id, parts, done))
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            items.append(
                {
                    "id": f"fc_{job_id.hex}_{n}",
                    "type": "function_call",
                    "call_id": call.get("id"),
                    "name": function.get("name"),
                    "arguments": function.get("arguments"),
                    "status": done,
                }
            )
    return items


def message_item(job_id: uuid.UUID, parts: list[Json], status: str) -> Json:
    """The message of a response."""
    return {
        "id": f"msg_{job_id.hex}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": parts,
    }


def text_part(text: str) -> Json:
    """A text in a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return ["".join(text for text in texts if isinstance(text, str))]


def _first_choice(answer: Json) -> Json:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else {}
    return first if isinstance(first, dict) else {}


def _usage(counts: Mapping[str, Any]) -> Json:
    prompt, output = _count(counts, "prompt_tokens"), _count(counts, "completion_tokens")
    inputs = counts.get("prompt_tokens_details")
    outputs = counts.get("completion_tokens_details")
    return {
        "input_tokens": prompt,
        "input_tokens_details": {
            "cached_tokens": _count(inputs, "cached_tokens"),
            "cache_write_tokens": 0,
        },
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": _count(outputs, "reasoning_tokens")},
        "total_tokens": prompt + output,
    }


def _count(counts: Any, name: str) -> int:
    value = counts.get(name) if isinstance(counts, Mapping) else 0
    return value if isinstance(value, int) else 0


def _error(result: Result) -> Json:
    if result.error is None:
        return {"code": "server_error", "message": f"The job is {result.state}."}
    code = result.error.code
    if result.error.status == 429:  # noqa: PLR2004  # HTTP's number
        code = "rate_limit_exceeded"
    return {"code": _CODES.get(code, code), "message": result.error.message}


def _unix(instant: dt.datetime) -> float:
    return round(instant.timestamp(), 3)
