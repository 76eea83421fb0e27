"""From a client's JSON to the `JobSpec` that becomes a row: the fields of `enqueue_prompt`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from promptfleet.api.errors import invalid
from promptfleet.api.limits import Limits
from promptfleet.options import check_option, refuse
from promptfleet.requests import Defaults, make_template
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.jobs import CacheOptions, JobSpec

KEY_HEADER = "idempotency-key"
_PROMPTS = ("prompt", "messages")
_CACHE_FIELDS = frozenset({"mode", "ttl_s", "namespace"})


def job_of(body: object, defaults: Defaults, limits: Limits, *, key: str | None = None) -> JobSpec:
    """The job that this JSON object asks for.

    Args:
        body: Decoded JSON.
        defaults: Of the tenant.
        limits: Of the API.
        key: The idempotency key, unless the body has one itself.

    Raises:
        InvalidRequestError: `field` names what is wrong.
        ApiError: The prompt is beyond a limit.
    """
    if not isinstance(body, Mapping):
        refuse("the body", 'an object with a "prompt" or "messages"', body)
    given = [name for name in _PROMPTS if body.get(name) is not None]
    if len(given) != 1:
        msg = 'must have either "prompt" or "messages"'
        raise InvalidRequestError(msg, field="prompt")
    if given[0] == "messages" and not isinstance(body["messages"], list):
        refuse("messages", "a list of messages", body["messages"])
    options = {name: value for name, value in body.items() if name not in _PROMPTS}
    _from_json(options)
    if key is not None and options.get("idempotency_key") is None:
        options["idempotency_key"] = key
    spec = make_template(options, defaults).spec(body[given[0]], given[0])
    limits.check_tokens(spec, param=given[0])
    return spec


def header_key(request: Request) -> str | None:
    """The idempotency key of the request's header, if there is one.

    Raises:
        InvalidRequestError: It is empty or too long.
    """
    value = request.headers.get(KEY_HEADER)
    if value is None:
        return None
    try:
        key: str = check_option("idempotency_key", value)
    except InvalidRequestError as error:
        raise invalid(error.message, param=KEY_HEADER) from None
    return key


def _from_json(options: dict[str, Any]) -> None:
    """Turn what JSON has no form for into what the options are in Python."""
    cache = options.get("cache")
    if isinstance(cache, Mapping):
        options["cache"] = cache_options(cache)
    deadline = options.get("deadline")
    if isinstance(deadline, str):
        options["deadline"] = instant(deadline)


def cache_options(value: Mapping[str, Any]) -> CacheOptions:
    """A job's wishes for the cache from a JSON object.

    Raises:
        InvalidRequestError: It has an unknown field.
    """
    for name in value:
        if name not in _CACHE_FIELDS:
            accepted = ", ".join(sorted(_CACHE_FIELDS))
            msg = f"cache: has a field that is none of {accepted}"
            raise InvalidRequestError(msg, field="cache")
    return CacheOptions(**{name: given for name, given in value.items() if given is not None})


def instant(text: str) -> dt.datetime:
    """An instant from its text.

    Raises:
        InvalidRequestError: It is none.
    """
    try:
        return dt.datetime.fromisoformat(text)
    except ValueError:
        refuse("deadline", "seconds from now, or an instant as in ISO 8601 with its offset", text)
