"""How long a provider asks us to wait, in whichever of their ways it says so."""

from __future__ import annotations

import datetime as dt
import email.utils
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

WEEK_S = 7 * 86_400.0
_DAY_S = 86_400.0
_MINUTE_S = 60.0
_RATE_LIMITED = 429
# A number from here on is no span of seconds but an instant: of epoch seconds, of milliseconds.
_EPOCH_S, _EPOCH_MS = 1e9, 1e12
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": _DAY_S}
_DURATION_PART = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)(ms|s|m|h|d)", re.ASCII)
_DURATION = re.compile(rf"(?:{_DURATION_PART.pattern}){{1,5}}", re.ASCII)
_IN_WORDS = re.compile(
    r"(?:try again|retry) (?:in|after) "
    r"(?:(\d{1,12}(?:\.\d{1,12})?) ?(milliseconds?|seconds?|minutes?|hours?)\b"
    rf"|({_DURATION.pattern})(?![a-z]))",
    re.ASCII,
)
_LIMIT_HEADER = re.compile(
    r"(?:x-ratelimit-(?P<what>reset|remaining)(?P<name>-[a-z-]+)?"
    r"|anthropic-ratelimit-(?P<name2>[a-z-]+)-(?P<what2>reset|remaining))"
)


def told_s(
    status: int, headers: Mapping[str, str], error: Mapping[str, Any], now: float
) -> float | None:
    """Seconds that the provider asks us to wait; None if it does not say.

    The longest of what headers and body say, a week at most. Only where neither says anything does
    it matter when the limits that refused us are full again.

    Args:
        status: The response's status.
        headers: Its headers, by lower-case names.
        error: The part of its body that describes the error.
        now: Seconds since the epoch.
    """
    told = [s for s in (retry_after_s(headers, now), _told_by(error)) if s is not None]
    if told:
        return max(told)
    return _reset_s(headers, now) if status == _RATE_LIMITED else None


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the headers ask us to wait, a week at most; None if they do not say.

    `retry-after-ms` is OpenAI's; `retry-after` is RFC 9110's, in seconds or as a date, which is
    read against the response's own date where there is one, so that our clock does not matter.

    Example:
        >>> retry_after_s({"retry-after-ms": "1500"}, now=0)
        1.5
    """
    milliseconds = _finite(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return min(milliseconds / 1000, WEEK_S)
    text = headers.get("retry-after")
    seconds = _finite(text)
    if seconds is None and text is not None:
        at = _timestamp(text)
        seconds = None if at is None else max(0.0, at - _sent(headers, now))
    return None if seconds is None else min(seconds, WEEK_S)


def duration_s(text: str) -> float | None:
    """Seconds of a span such as `20`, `120ms` or `1m30.5s`; None for whatever is none."""
    seconds = _finite(text)
    if seconds is not None:
        return seconds
    if not _DURATION.fullmatch(text):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(text))


# -- bodies ----------------------------------------------------------------------------------


def _told_by(error: Mapping[str, Any]) -> float | None:
    """What the body says; a day at most, as a message is not made for being read by machines."""
    spans = [*_retry_infos(error.get("details")), *_spans_in(error.get("message"))]
    return min(max(spans), _DAY_S) if spans else None


def _retry_infos(details: Any) -> Iterator[float]:
    """Google's `google.rpc.RetryInfo`."""
    for detail in details if isinstance(details, list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        seconds = duration_s(delay) if isinstance(delay, str) else None
        if seconds is not None:
            yield seconds


def _spans_in(message: Any) -> Iterable[float]:
    """From words such as: please try again in 1m30s; please retry after 2 seconds."""
    found = _IN_WORDS.search(message[:1000].lower()) if isinstance(message, str) else None
    if found is None:
        return []
    if found[1] is None:
        return [duration_s(found[3]) or 0.0]
    unit = "ms" if found[2].startswith("milli") else found[2][0]
    return [float(found[1]) * _UNITS[unit]]


# -- headers of limits -----------------------------------------------------------------------


def _reset_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds until the limits that are used up are full again.

    Where the headers show none that is, it is the longest of the short ones: that of a day is
    hardly the one that a minute's burst ran into.
    """
    resets: dict[str, float] = {}
    remaining: dict[str, float] = {}
    for header, value in headers.items():
        found = _LIMIT_HEADER.fullmatch(header.lower())
        if found is None:
            continue
        name = found["name"] or found["name2"] or ""
        if "reset" in (found["what"], found["what2"]):
            seconds = _until(value, _sent(headers, now))
            if seconds is not None:
                resets[name] = min(seconds, WEEK_S)
        else:
            remaining[name] = _finite(value) or 0.0
    used_up = [seconds for name, seconds in resets.items() if remaining.get(name) == 0]
    short = [seconds for seconds in resets.values() if seconds <= _MINUTE_S]
    return max(used_up or short, default=None)


def _until(text: str, now: float) -> float | None:
    """Seconds from now to what a reset header names: a span, or an instant in one of its forms."""
    seconds = duration_s(text)
    if seconds is None:
        at = _instant(text)
        return None if at is None else max(0.0, at - now)
    if seconds >= _EPOCH_MS:
        return max(0.0, seconds / 1000 - now)
    return max(0.0, seconds - now) if seconds >= _EPOCH_S else seconds


def _sent(headers: Mapping[str, str], now: float) -> float:
    """When the response was made, by the provider's clock if it says so."""
    sent = _timestamp(headers.get("date", ""))
    return now if sent is None else sent


def _instant(text: str) -> float | None:
    """RFC 3339, as Anthropic writes instants."""
    try:
        at = dt.datetime.fromisoformat(text)
        return at.timestamp() if at.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


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
