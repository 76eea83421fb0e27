"""What Google's refusals say of quotas: no header does, but the body of a 429 names them.

Source: https://cloud.google.com/apis/design/errors (`google.rpc.QuotaFailure`), and answers of the
Gemini API, whose violations have `quotaId`, such as GenerateRequestsPerMinutePerProjectPerModel or
GenerateContentInputTokensPerModelPerMinute-FreeTier, and mostly `quotaValue`, a number as text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

_QUOTA_ID = re.compile(
    r"(?P<what>InputTokens|OutputTokens|Tokens|Requests)[A-Za-z]{0,80}?Per(?P<period>Minute|Day)"
    r"(?![a-z])",
    re.ASCII,
)
_NAMES = {
    "InputTokens": "input_tokens",
    "OutputTokens": "output_tokens",
    "Tokens": "tokens",
    "Requests": "requests",
}
_LONGEST_ID = 200
_LARGEST_DIGITS = 15


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Violated:
    """The quotas that a refusal names.

    Attributes:
        minute: Limits of a minute, as far as their values are told, by what they count:
            "requests", "input_tokens", "output_tokens" or "tokens".
        lasts: True if the next minute brings nothing: the day's quota is used up, or there is none.
    """

    minute: Mapping[str, float]
    lasts: bool


def violated(error: Mapping[str, Any]) -> Violated:
    """What the part of a body that describes an error tells of quotas.

    Example:
        >>> named = {"quotaId": "GenerateRequestsPerMinutePerProjectPerModel", "quotaValue": "15"}
        >>> violated({"details": [{"violations": [named]}]})
        Violated(minute={'requests': 15.0}, lasts=False)
    """
    minute: dict[str, float] = {}
    lasts = False
    for what, period, value in _violations(error.get("details")):
        if period == "Day" or value == 0:
            lasts = True
        elif value is not None:
            minute[what] = min(value, minute.get(what, value))
    return Violated(minute=minute, lasts=lasts)


def _violations(details: Any) -> Iterator[tuple[str, str, float | None]]:
    for detail in details if isinstance(details, list) else ():
        listed = detail.get("violations") if isinstance(detail, dict) else None
        for violation in listed if isinstance(listed, list) else ():
            quota = violation.get("quotaId") if isinstance(violation, dict) else None
            if isinstance(quota, str) and len(quota) <= _LONGEST_ID:
                found = _QUOTA_ID.search(quota)
                if found is not None:
                    value = _number(violation.get("quotaValue"))
                    yield _NAMES[found["what"]], found["period"], value


def _number(value: Any) -> float | None:
    """Protobuf's JSON writes an int64 as text."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not text.isascii() or not text.isdigit():
        return None
    return float(text) if len(text) <= _LARGEST_DIGITS else None
