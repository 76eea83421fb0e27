"""What a client may ask of the fleet beyond OpenAI's parameters: by headers, or in the body.

The Python client sends the latter with `extra_body={"promptfleet": {"tier": "basic"}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from promptfleet.api.submitting import cache_options, header_key, instant
from promptfleet.options import refuse
from promptfleet_shared.errors import InvalidRequestError

BODY_FIELD = "promptfleet"
HEADER_PREFIX = "x-promptfleet-"
CANCEL_HEADER = f"{HEADER_PREFIX}cancel-on-disconnect"
OPTIONS = frozenset(
    {
        "attributes",
        "cache",
        "callback_url",
        "compact",
        "complexity",
        "concurrency_key",
        "context",
        "deadline",
        "deadline_s",
        "escalate_on",
        "idempotency_key",
        "limit_key",
        "memory",
        "memory_id",
        "metadata",
        "on_unknown",
        "priority",
        "session_id",
        "tier",
    }
)
_HEADERS = frozenset({"cache", "callback_url", "deadline_s", "on_unknown", "priority", "tier"})
_NUMBERS = {"priority": int, "deadline_s": float}
_TRUE = frozenset({"1", "true", "yes"})


def fleet_options(body: Mapping[str, Any], request: Request | None = None) -> dict[str, Any]:
    """The options of `enqueue_prompt` that the request has; the body's win over the headers'.

    Args:
        body: Decoded JSON.
        request: Whose headers count, too; None for a line of a file.

    Raises:
        InvalidRequestError: One of them is unknown, or has a value that it can't have.
        ApiError: The idempotency key of the header is none.
    """
    options = {} if request is None else _from_headers(request)
    own = body.get(BODY_FIELD)
    if own is not None:
        if not isinstance(own, Mapping):
            refuse(BODY_FIELD, "an object", own)
        for name in own:
            if name not in OPTIONS:
                accepted = ", ".join(sorted(OPTIONS))
                msg = f"{BODY_FIELD}: has an option that is none of {accepted}"
                raise InvalidRequestError(msg, field=BODY_FIELD)
        options |= {name: value for name, value in own.items() if value is not None}
    if (seconds := options.pop("deadline_s", None)) is not None:
        options.setdefault("deadline", seconds)
    if isinstance(options.get("cache"), Mapping):
        options["cache"] = cache_options(options["cache"])
    if isinstance(options.get("deadline"), str):
        options["deadline"] = instant(options["deadline"])
    return options


def cancels_on_disconnect(request: Request) -> bool:
    """True if the client's leaving is to cancel its job."""
    return request.headers.get(CANCEL_HEADER, "").lower() in _TRUE


def _from_headers(request: Request) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in _HEADERS:
        text = request.headers.get(HEADER_PREFIX + name.replace("_", "-"))
        if text is not None:
            options[name] = _number(name, text) if name in _NUMBERS else text
    if (key := header_key(request)) is not None:
        options["idempotency_key"] = key
    return options


def _number(name: str, text: str) -> float:
    try:
        number: float = _NUMBERS[name](text)
    except ValueError:
        header = HEADER_PREFIX + name.replace("_", "-")
        refuse(header, "a number", text)
    return number
