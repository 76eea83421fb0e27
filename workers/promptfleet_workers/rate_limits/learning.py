"""The limits that providers tell of in their responses' headers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from promptfleet_shared.policies.limits import Dimension

# OpenAI: https://platform.openai.com/docs/guides/rate-limits, "Rate limits in headers".
# Anthropic: https://docs.anthropic.com/en/api/rate-limits, "Response headers".
_LIMIT = re.compile(
    r"x-ratelimit-limit-(?P<theirs>requests|tokens)"
    r"|anthropic-ratelimit-(?P<others>requests|input-tokens|output-tokens|tokens)-limit"
)
_LARGEST = 1e15


def limits_told(headers: Mapping[str, str]) -> Iterator[tuple[Dimension, float]]:
    """The limits of a minute that a response tells of.

    Args:
        headers: The response's; the case of their names does not matter.

    Example:
        >>> list(limits_told({"x-ratelimit-limit-requests": "500"}))
        [(<Dimension.REQUESTS: 'requests'>, 500.0)]
    """
    for header, text in headers.items():
        found = _LIMIT.fullmatch(header.lower())
        if found is None:
            continue
        limit = _number(text)
        if limit is not None:
            name = (found["theirs"] or found["others"]).replace("-", "_")
            yield Dimension(name), limit


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and 1 <= number <= _LARGEST else None
