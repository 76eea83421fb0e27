"""Jobs without an answer, as OpenAI's errors: its client raises the class that it would there.

The fleet has tried again by then, as often as was worth it. So clients are told not to: their own
repeats would be new jobs.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from promptfleet.api.errors import INVALID, LIMITED, OURS, ApiError
from promptfleet.api.shapes import fleet_headers
from promptfleet_shared.jobs import JobState, Result

JOB_HEADER = "x-promptfleet-job"
NO_REPEAT = {"x-should-retry": "false"}
RETRY_AFTER_S = 5
"""Seconds after which a provider may have room, where it has not said."""

_TOO_MANY = 429
_TIMEOUT, _BAD_GATEWAY, _CONFLICT = 504, 502, 409
# What the client did wrong, as the provider says. Not 401: the key that it refuses is the fleet's.
_THEIRS = frozenset({400, 403, 404, 405, 406, 410, 413, 415, 422, 451})
_BY_CODE: Mapping[str, int] = {
    "content_filter": 400,
    "content_policy_violation": 400,
    "context_length_exceeded": 400,
    "request_too_large": 413,
    "unsupported": 400,
    "timeout": _TIMEOUT,
    "expired": _TIMEOUT,
    "no_route": 500,
    "internal": 500,
    "poison": 500,
}
_QUOTA = "insufficient_quota"


def failure(result: Result) -> ApiError:
    """The answer to a request whose job has ended without one."""
    if result.state is JobState.CANCELLED:
        status, code, message = _CONFLICT, "job_cancelled", "The job was cancelled."
    else:
        error = result.error
        code = error.code if error is not None else str(result.state)
        message = error.message if error is not None else f"The job is {result.state}."
        message = message[:1].upper() + message[1:].rstrip(".") + "."
        status = _status(result, code)
    headers = fleet_headers(result)
    if status == _TOO_MANY:
        headers["retry-after"] = str(RETRY_AFTER_S)
    if status != _TOO_MANY or code == _QUOTA:
        headers |= NO_REPEAT
    return ApiError(status, message, type=_type(status, code), code=code, headers=headers)


def still_running(job_id: uuid.UUID) -> ApiError:
    """The answer to whoever has waited as long as they may."""
    message = (
        f"The job {job_id} is still under way; nothing is lost:"
        f" GET /v1/jobs/{job_id}?wait=60 has its result."
    )
    headers = {JOB_HEADER: str(job_id), **NO_REPEAT}
    return ApiError(_TIMEOUT, message, type=OURS, code="still_running", headers=headers)


def _status(result: Result, code: str) -> int:
    told = result.error.status if result.error is not None else None
    if told == _TOO_MANY or (told is not None and told in _THEIRS):
        return told
    if code in _BY_CODE:
        return _BY_CODE[code]
    if result.state is JobState.EXPIRED:
        return _TIMEOUT
    return _BAD_GATEWAY


def _type(status: int, code: str) -> str:
    if code == _QUOTA:
        return _QUOTA
    if status == _TOO_MANY:
        return LIMITED
    return INVALID if status in _THEIRS else OURS
