"""What a callback says: a thin, signed message with a link to the result, never the result."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from typing import Any, Final

import orjson

from promptfleet_shared import __version__
from promptfleet_shared.signing import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, sign
from promptfleet_shared.store.deliveries import Delivery, ResultFacts

MAX_BODY_BYTES: Final = 20_000
MAX_NAME_CHARS: Final = 200
MAX_SENTENCE_CHARS: Final = 1000
USER_AGENT: Final = f"promptfleet/{__version__}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One attempt's request."""

    headers: dict[str, str]
    body: bytes


def message_id(callback_id: uuid.UUID) -> str:
    """The `webhook-id`: the same for every attempt, and for every replay."""
    return f"msg_{callback_id.hex}"


def sign_message(
    delivery: Delivery,
    facts: ResultFacts | None,
    *,
    secrets: tuple[str, ...],
    public_url: str,
    now: float,
) -> Message:
    """The message of a delivery, signed at `now` (seconds since 1970)."""
    body = write_body(delivery, facts, public_url=public_url)
    id_, timestamp = message_id(delivery.id), int(now)
    return Message(
        headers={
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            ID_HEADER: id_,
            TIMESTAMP_HEADER: str(timestamp),
            SIGNATURE_HEADER: sign(secrets, id_, timestamp, body),
        },
        body=body,
    )


def write_body(delivery: Delivery, facts: ResultFacts | None, *, public_url: str) -> bytes:
    """The event as JSON, below 20 kB: metadata that would not fit are left out.

    Args:
        delivery: What to tell.
        facts: Of the job's result; None for a delivery that has a payload of its own.
        public_url: Where results are linked to; empty for no link.
    """
    if facts is None:
        return orjson.dumps(delivery.payload)
    data = _data(delivery, facts, public_url)
    body = _json(delivery, facts, data)
    if len(body) >= MAX_BODY_BYTES:
        del data["metadata"]
        body = _json(delivery, facts, data)
    return body


def _json(delivery: Delivery, facts: ResultFacts, data: dict[str, Any]) -> bytes:
    # In one form, whatever time zone the database's session is in: each attempt has the same body.
    ended = facts.finished_at.astimezone(dt.UTC)
    event = {"type": delivery.event, "timestamp": ended, "data": data}
    return orjson.dumps(event, option=orjson.OPT_UTC_Z)


def _data(delivery: Delivery, facts: ResultFacts, public_url: str) -> dict[str, Any]:
    usage, error = facts.usage, facts.error
    return {
        "id": delivery.job_id,
        "state": facts.state,
        "tier": facts.tier,
        "model": _short(facts.model),
        "finish_reason": _short(facts.finish_reason),
        "error": None
        if error is None
        else {
            "code": _short(error.code),
            "message": _short(error.message, MAX_SENTENCE_CHARS),
            "status": error.status,
        },
        "usage": {
            "input_tokens": usage.input,
            "cached_tokens": usage.cached,
            "output_tokens": usage.output,
            "reasoning_tokens": usage.reasoning,
        },
        "cost_usd": None if facts.cost_usd is None else float(facts.cost_usd),
        "cache": facts.cache,
        "attempts": facts.attempts,
        "metadata": facts.metadata or {},
        "result_url": f"{public_url}/v1/jobs/{delivery.job_id}" if public_url else None,
    }


def _short(text: str | None, chars: int = MAX_NAME_CHARS) -> str | None:
    """A provider's own words, such as a model's name, could be of any length."""
    return None if text is None else text[:chars]
