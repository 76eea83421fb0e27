"""For receivers of callbacks: is it really from the fleet, and what does it say?"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from promptfleet_shared import signing
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.jobs import JobState

_JOB_EVENTS = "prompt."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CallbackEvent:
    """What a callback tells.

    Attributes:
        id: The same each time that this event is delivered: what was handled under this id before
            is handled no more.
        type: E.g. "prompt.succeeded".
        timestamp: When it happened, which may be long before it was delivered.
        data: The event's own facts: of a job, what its result has except for the text.
        job_id: The job that ended; None for an event that is not about a single job.
        state: How it ended; None for an event that is not about a single job.
    """

    id: str
    type: str
    timestamp: dt.datetime
    data: dict[str, Any]
    job_id: uuid.UUID | None
    state: JobState | None


def verify_callback(
    body: bytes | str,
    headers: Mapping[str, str] | signing.Headers,
    secret: str | Sequence[str] | None = None,
    *,
    tolerance_s: float = signing.TOLERANCE_S,
) -> CallbackEvent:
    """Read a callback, if it comes from the fleet and was sent just now.

    Args:
        body: The request's body as it was received, before any JSON was read from it.
        headers: The request's, of whatever framework; the case of names does not matter.
        secret: `whsec_…`, or several of them while they are rotated; without it, those of
            `PROMPTFLEET_CALLBACK_SECRETS`.
        tolerance_s: How far the sender's clock may be from ours, in seconds.

    Raises:
        InvalidSignatureError: It does not come from the fleet, or is an old one sent again. Answer
            with 400, and do nothing.
        InvalidRequestError: It is signed rightly, and still no event of the fleet.
        ConfigurationError: There is no secret, or it is malformed.

    Example:
        >>> event = verify_callback(request.body, request.headers)
        >>> event.type, event.job_id
        ('prompt.succeeded', UUID('01980a3e-3f2b-7c1d-9a4e-0242ac120002'))
    """
    raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else bytes(body)
    verified = signing.verify(_secrets(secret), headers, raw, tolerance_s=tolerance_s)
    return _event(verified.message_id, raw)


def _secrets(secret: str | Sequence[str] | None) -> Sequence[str]:
    if isinstance(secret, str):
        return signing.split_secrets(secret)
    if secret is not None:
        return secret
    # Here, since it takes pydantic, which is long to import.
    from promptfleet_shared.settings import load_settings  # noqa: PLC0415

    return signing.split_secrets(load_settings().callback_secrets.get_secret_value())


def _event(message_id: str, raw: bytes) -> CallbackEvent:
    try:
        payload = orjson.loads(raw)
        data = payload["data"]
        kind = str(payload["type"])
        is_job = kind.startswith(_JOB_EVENTS)
        return CallbackEvent(
            id=message_id,
            type=kind,
            timestamp=dt.datetime.fromisoformat(payload["timestamp"]),
            data=dict(data),
            job_id=uuid.UUID(data["id"]) if is_job else None,
            state=JobState(data["state"]) if is_job else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        msg = "body: is signed rightly, and no event of a fleet all the same"
        raise InvalidRequestError(msg, field="body") from None
