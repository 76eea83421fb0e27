"""What the providers' JSON APIs have in common: reading bodies, and saying what went wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import orjson

from promptfleet_shared.errors import ProviderError
from promptfleet_shared.jobs import Usage
from promptfleet_workers.providers.google_quotas import violated
from promptfleet_workers.providers.http import HttpResponse
from promptfleet_workers.providers.waits import told_s
from promptfleet_workers.retries import DAY_IS_OVER, is_telling

TOKENS_MAX = 2**31 - 1
"""What Postgres' integer holds; no real call comes near it."""

_NAME_MAX = 200
_TOO_MANY = 429
# Behind these statuses of gateways and proxies the model may well have answered.
_UNKNOWN_OUTCOME = frozenset({408, 499, 502, 504, 520, 524})
# Codes that decide nothing, and yet are worth showing. No other text of a body is ever shown: it
# could be a part of a prompt.
_VAGUE_CODES = frozenset(
    {
        "api_error",
        "bad_request",
        "badrequesterror",
        "conflict_error",
        "error",
        "failed_precondition",
        "generation",
        "incomplete_generation",
        "internal_error",
        "internal_server_error",
        "internalservererror",
        "invalid_argument",
        "invalid_request_error",
        "invalid_type",
        "invalid_value",
        "missing_required_parameter",
        "notfounderror",
        "processing_error",
        "server_error",
        "servererror",
        "unknown_error",
        "unknown_parameter",
        "unprocessable_entity_error",
        "unsupported_parameter",
        "unsupported_value",
        "validation",
    }
)
# Where a code says no more than "bad request", these phrases of common servers say what is bad.
_PHRASES = (
    ("context length", "context_length_exceeded"),
    ("context window", "context_length_exceeded"),
    ("context size", "context_length_exceeded"),
    ("prompt is too long", "context_length_exceeded"),
    ("too many tokens", "context_length_exceeded"),
    ("`max_new_tokens` must be <=", "context_length_exceeded"),
    ("credit balance is too low", "insufficient_quota"),
    ("exceeded your current quota", "insufficient_quota"),
    ("used all available credits", "insufficient_quota"),
    ("monthly spending limit", "insufficient_quota"),
    ("insufficient balance", "insufficient_quota"),
    ("insufficient credits", "insufficient_quota"),
    ("api key not valid", "invalid_api_key"),
    ("invalid api key", "invalid_api_key"),
    ("incorrect api key", "invalid_api_key"),
)
_TOO_LARGE = "request too large for"
_TOO_FAST = frozenset({"rate_limit_exceeded", "tokens"})


def read_json(body: bytes) -> Any:
    """The decoded body.

    orjson refuses some texts that JSON allows (lone surrogates, among others); the standard
    library reads those.

    Raises:
        ValueError: It is no JSON in UTF-8.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def write_json(value: Any) -> bytes:
    """The counterpart of `read_json`: what it read can be written again."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def response_json(value: Any) -> bytes:
    """An answer that was put together here.

    Raises:
        ProviderError: `bad_response`: it is nested too deeply, or holds a number that is none.
    """
    try:
        return write_json(value)
    except (ValueError, RecursionError):
        raise bad_response("the answer can't be written as JSON") from None


def read_answer(response: HttpResponse) -> dict[str, Any]:
    """The decoded body of a success.

    Raises:
        ProviderError: The body or the status tells of a failure, or this is no answer at all.
    """
    try:
        data = read_json(response.body)
    except ValueError:
        data = None
    is_success = 200 <= response.status < 300  # noqa: PLR2004 - HTTP's numbers
    if not is_success or _error_of(data):
        raise failure(data, response.status, response.headers)
    if not isinstance(data, dict):
        kind = "HTML" if response.body.lstrip()[:1] == b"<" else "not a JSON object"
        raise bad_response(f"the provider's answer is {kind}", response.status)
    return data


def failure(
    data: Any,
    status: int,
    headers: Mapping[str, str] | None = None,
    *,
    has_begun: bool = False,
) -> ProviderError:
    """The failure that a response tells of: by its body first, by its status second.

    Args:
        data: The decoded body, or whatever there is in its place.
        status: The response's; a body's own status wins.
        headers: The response's.
        has_begun: True if a part of the answer came before, which may be billed.
    """
    error = _error_of(data)
    what = f"the provider refused the request with status {status}"
    if status < 300:  # noqa: PLR2004 - HTTP's numbers
        what = "the provider's answer tells of an error"
    elif not error and isinstance(data, dict):
        error = data  # some gateways' bodies are the error itself
    status = _status_of(error) or status
    code = _code_of(error) or f"http_{status}"
    quotas = violated(error) if status == _TOO_MANY else None
    if quotas is not None and quotas.lasts:
        code = DAY_IS_OVER
    return ProviderError(
        f"{what} ({code})",
        code=code,
        status=status,
        retry_after_s=told_s(status, headers or {}, error, time.time()),
        unknown_outcome=has_begun or status in _UNKNOWN_OUTCOME,
        limits=quotas.minute or None if quotas is not None else None,
    )


def bad_response(what: str, status: int | None = None) -> ProviderError:
    """An answer that was paid for, perhaps, and can't be used."""
    return ProviderError(what, code="bad_response", status=status, unknown_outcome=True)


def truncated(status: int | None = None, *, usage: Usage | None = None) -> ProviderError:
    """An answer without the mark of its end; `usage` is what the provider counted all the same."""
    message = "the answer ends without a finish reason"
    return ProviderError(
        message, code="truncated", status=status, unknown_outcome=True, usage=usage
    )


def tokens(value: object) -> int:
    """A count of tokens; 0 for whatever is none."""
    return value if type(value) is int and 0 <= value <= TOKENS_MAX else 0


def estimate_tokens(text: str | None) -> int:
    """Tokens of a text where no provider has counted: four bytes of UTF-8 are about one."""
    return 0 if not text else (len(text.encode("utf-8", "replace")) + 3) // 4


def storable(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which UTF-8 can't hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def name(value: object) -> str | None:
    """A short name, such as a model's or a finish reason; None for whatever is none."""
    if not isinstance(value, str) or not value:
        return None
    if len(value) <= _NAME_MAX and value.isprintable():
        return value
    return storable(value[:_NAME_MAX]).replace("\0", "\ufffd")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _error_of(data: Any) -> dict[str, Any]:
    """The part of a body that describes an error; empty if there is none.

    OpenAI, Anthropic and most others: {"error": {...}}; Google's compatible endpoint wraps that in
    a list; TGI: {"error": "text", "error_type": ...}; older vLLM: {"object": "error", ...}.
    """
    if isinstance(data, list) and data:
        data = data[0]
    if not isinstance(data, dict):
        return {}
    error = data.get("error")
    if isinstance(error, dict):
        return error
    if error:
        return {"type": data.get("error_type"), "message": error}
    return data if data.get("object") == "error" or "error_type" in data else {}


def _status_of(error: dict[str, Any]) -> int | None:
    code = error.get("code")
    return code if type(code) is int and 400 <= code < 600 else None  # noqa: PLR2004 - HTTP's numbers


def _code_of(error: dict[str, Any]) -> str | None:
    """The error's own code, if it is a known one: anything else could be a part of a prompt."""
    codes = [code.lower() for code in _codes(error) if isinstance(code, str)]
    message = error.get("message")
    start = message[:1000].lower() if isinstance(message, str) else ""
    telling = next((code for code in codes if is_telling(code)), None)
    if telling is not None:
        # More tokens than a whole minute's limit: no waiting helps.
        is_hopeless = telling in _TOO_FAST and _TOO_LARGE in start
        return "request_too_large" if is_hopeless else telling
    meant = next((code for phrase, code in _PHRASES if phrase in start), None)
    return meant or next((code for code in codes if code in _VAGUE_CODES), None)


def _codes(error: dict[str, Any]) -> list[Any]:
    """Where the providers put their codes; Azure's reason for a refusal is an inner one."""
    inner = error.get("innererror")
    inner_code = inner.get("code") if isinstance(inner, dict) else None
    return [error.get("code"), error.get("type"), error.get("status"), inner_code]
