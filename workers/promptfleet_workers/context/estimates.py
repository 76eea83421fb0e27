"""Tokens of models whose vocabulary nobody has: counted by another's, and corrected as we learn.

What a provider charged for a request, over what was counted for it, is a sample of the factor
between the two. Its mean and mean deviation are kept, both as moving averages: as the round-trip
time is in RFC 6298, with that document's weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from promptfleet_shared.tokens import TOKENS_OF_THE_ANSWERS_START, TokenCounter, has_own_vocabulary

FIRST_FACTOR = 1.1
FIRST_DEVIATION = 0.1
DEVIATIONS = 2
_ALPHA, _BETA = 1 / 8, 1 / 4
_TOOLS_FIELDS = ("tools", "functions", "response_format")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Tokens of a request for one model.

    Attributes:
        messages: Of each message, rather too many than too few.
        rest: Of tools, schemas and what surrounds the messages.
        least: Of all, rather too few than too many.
        counted: Of all, by the vocabulary that was used.
    """

    messages: list[int]
    rest: int
    least: int
    counted: int

    @property
    def total(self) -> int:
        """Of all, rather too many than too few."""
        return sum(self.messages) + self.rest


class Estimates:
    """Counts requests, and learns from what providers counted; safe to use from many threads."""

    def __init__(self, counter: TokenCounter | None = None) -> None:
        """Know no factor yet."""
        self._counter = counter or TokenCounter()
        self._factors: dict[str, tuple[float, float]] = {}

    def size(
        self, body: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], model: str
    ) -> Size:
        """The size of a chat with these messages and the body's tools; takes time."""
        low, high = self._bounds(model)
        counts = [self._counter.count_message(message, model) for message in messages]
        rest = sum(
            self._counter.count(_written(body[field]), model)
            for field in _TOOLS_FIELDS
            if body.get(field)
        )
        told = sum(counts) + TOKENS_OF_THE_ANSWERS_START
        return Size(
            messages=[math.ceil(count * high) for count in counts],
            rest=math.ceil((rest + TOKENS_OF_THE_ANSWERS_START) * high),
            least=math.floor(told * low),
            counted=told + rest,
        )

    def message(self, message: Mapping[str, Any], model: str) -> int:
        """Tokens of one message, rather too many than too few."""
        return math.ceil(self._counter.count_message(message, model) * self._bounds(model)[1])

    def text(self, text: str, model: str) -> int:
        """Tokens of a text, rather too many than too few."""
        return math.ceil(self._counter.count(text, model) * self._bounds(model)[1])

    def settle(self, model: str, counted: int, charged: int) -> None:
        """A provider counted `charged` tokens where `counted` were counted here."""
        if counted <= 0 or charged <= 0 or has_own_vocabulary(model):
            return
        sample = charged / counted
        known = self._factors.get(model)
        if known is None:
            self._factors[model] = (sample, sample / 2 * _BETA)
            return
        mean, deviation = known
        deviation += _BETA * (abs(sample - mean) - deviation)
        self._factors[model] = (mean + _ALPHA * (sample - mean), deviation)

    def _bounds(self, model: str) -> tuple[float, float]:
        """What a count is multiplied with: for too few rather, and for too many rather."""
        if has_own_vocabulary(model):
            return 1.0, 1.0
        mean, deviation = self._factors.get(model, (FIRST_FACTOR, FIRST_DEVIATION))
        spread = DEVIATIONS * deviation
        return max(0.0, mean - spread), mean + spread


def _written(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
