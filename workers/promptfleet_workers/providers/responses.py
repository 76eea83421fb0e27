"""What the providers' JSON APIs have in common: reading bodies, and saying what went wrong."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import orjson

from promptfleet_shared.errors import ProviderError
from promptfleet_workers.providers.http import HttpResponse

TOKENS_MAX = 2**31 - 1
"""What Postgres' integer holds; no real call comes near it."""

_SHORT_CODE = re.compile(r"[a-z0-9_.-]{1,64}")
_NAME_MAX = 200
_RETRY_AFTER_MAX_S = 7 * 86_400.0
# Behind these statuses of gateways and proxies the model may well have answered.
_UNKNOWN_OUTCOME = frozenset({408, 499, 502, 504, 520, 524})
# Where a code says no more than "bad request", these phrases of common servers say what is bad.
_CONTEXT_PHRASES = (
    "context length",
    "context window",
    "context size",
    "prompt is too long",
    "too many tokens",
)
_VAGUE_CODES = frozenset({"400", "badrequesterror", "bad_request", "invalid_request_error"})


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


def failure(data: Any, status: int, headers: Mapping[str, str] | None = None) -> ProviderError:
    """The failure that a response tells of: by its body first, by its status second."""
    error = _error_of(data)
    what = f"the provider refused the request with status {status}"
    if status < 300:  # noqa: PLR2004 - HTTP's numbers
        what = "the provider's answer tells of an error"
    status = _status_of(error) or status
    code = _code_of(error) or f"http_{status}"
    return ProviderError(
        f"{what} ({code})",
        code=code,
        status=status,
        retry_after_s=None if headers is None else retry_after_s(headers, time.time()),
        unknown_outcome=status in _UNKNOWN_OUTCOME,
    )


def bad_response(what: str, status: int | None = None) -> ProviderError:
    """An answer that was paid for, perhaps, and can't be used."""
    return ProviderError(what, code="bad_response", status=status, unknown_outcome=True)


def truncated(status: int | None = None) -> ProviderError:
    """An answer without the mark of its end."""
    message = "the answer ends without a finish reason"
    return ProviderError(message, code="truncated", status=status, unknown_outcome=True)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the provider asks us to wait, a week at most; None if it does not say.

    `retry-after-ms` is OpenAI's; `retry-after` is RFC 9110's, in seconds or as a date, which is
    read against the response's own date where there is one, so that our clock does not matter.

    Example:
        >>> retry_after_s({"retry-after-ms": "1500"}, now=0)
        1.5
    """
    milliseconds = _finite(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return min(milliseconds / 1000, _RETRY_AFTER_MAX_S)
    text = headers.get("retry-after")
    seconds = _finite(text)
    if seconds is None and text is not None:
        at = _timestamp(text)
        sent = _timestamp(headers.get("date", ""))
        seconds = None if at is None else max(0.0, at - (now if sent is None else sent))
    return None if seconds is None else min(seconds, _RETRY_AFTER_MAX_S)


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
    """The error's own short code; nothing that could be a sentence, and so hold a prompt."""
    candidates = (error.get("code"), error.get("type"), error.get("status"))
    codes = [c.lower() for c in candidates if isinstance(c, str)]
    code = next((c for c in codes if _SHORT_CODE.fullmatch(c)), None)
    message = error.get("message")
    if (code is None or code in _VAGUE_CODES) and isinstance(message, str):
        start = message[:1000].lower()
        if any(phrase in start for phrase in _CONTEXT_PHRASES):
            return "context_length_exceeded"
    return code


def _finite(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _timestamp(text: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
