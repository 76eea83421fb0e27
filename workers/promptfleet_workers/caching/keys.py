"""Which requests are equal: the key of an answer."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from promptfleet_shared.jobs import JobKind

KEY_PREFIX = "promptfleet:cache:"
# The order of a schema's keys is the order in which the model answers: it stays as it is.
_ORDERED = frozenset({"response_format", "tools", "tool_choice"})
_EXACT = 2**53


def cache_key(namespace: str, tenant: str, model: str, kind: JobKind, request: str) -> str:
    """The key of a request's answer; equal only if all the parts are.

    Args:
        namespace: From the job's or the fleet's cache options.
        tenant: Whose answer it is; tenants never see each other's.
        model: Where the answer comes from: provider and model.
        kind: Which endpoint answers.
        request: The request in its `canonical` form.
    """
    # With their lengths in front, no two different lists of parts join to the same text.
    parts = (
        f"{len(namespace)}:{namespace}{len(tenant)}:{tenant}"
        f"{len(model)}:{model}{len(kind)}:{kind}{len(request)}:{request}"
    )
    return KEY_PREFIX + hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()


def canonical(request: str, *, as_stored: bool) -> str:
    """The one form of all requests that ask for the same: keys sorted, 1.0 as 1, no whitespace.

    Args:
        request: A JSON object's text.
        as_stored: True for one as a submission stores it, which has its keys sorted: unless it
            holds something that may be a whole float, it has this form already.

    Example:
        >>> canonical('{"temperature": 1.0, "prompt": "Hi"}', as_stored=False)
        '{"prompt":"Hi","temperature":1}'
    """
    if as_stored and ".0" not in request:
        return request
    try:
        body = orjson.loads(request)
    except orjson.JSONDecodeError:
        return request  # whoever sends it will see
    if not isinstance(body, dict):
        return request
    return orjson.dumps(canonical_body(body), option=orjson.OPT_SORT_KEYS).decode()


def canonical_body(body: dict[str, Any]) -> dict[str, Any]:
    """What, written with sorted keys, is the canonical form of a request."""
    return {
        name: orjson.Fragment(orjson.dumps(_whole(value))) if name in _ORDERED else _whole(value)
        for name, value in body.items()
    }


def _whole(value: Any) -> Any:
    """The value with each float that is an integer as one: JSON has only one kind of number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < _EXACT else value
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value
