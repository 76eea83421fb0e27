"""What a call will cost, before it is made: learned from what earlier ones did."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from decimal import Decimal

from promptfleet_shared.jobs import JobKind, Usage
from promptfleet_shared.policies.limits import Dimension

FIRST_OUTPUT = 256.0
"""Tokens of an answer that are expected of a model that has not answered yet."""
_QUICK, _SLOW = 0.2, 0.02
_QUICK_CALLS = 20
_SURE_CALLS = 5
_MAX_MODELS = 1000
_MAX_TOKENS = re.compile(r'[{,]"max_(?:completion_)?tokens":(\d{1,9})[,}]')

PriceOf = Callable[[Usage], Decimal | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What one call takes of each limit."""

    requests: float = 1.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    dollars: float = 0.0

    def of(self, dimension: Dimension) -> float:
        """How much of this."""
        match dimension:
            case Dimension.REQUESTS:
                return self.requests
            case Dimension.INPUT_TOKENS:
                return self.input_tokens
            case Dimension.OUTPUT_TOKENS:
                return self.output_tokens
            case Dimension.TOKENS:
                return self.input_tokens + self.output_tokens
            case Dimension.DOLLARS:
                return self.dollars


@dataclasses.dataclass(slots=True)
class _Learned:
    """Moving averages of one model's calls for one tier."""

    input_ratio: float = 1.0
    output: float = FIRST_OUTPUT
    calls: int = 0


class CostLearner:
    """Expects what calls will take, and learns from what they took.

    The answer's length is the average of past answers of the same model and tier, no longer than
    the job allows; the prompt's is the job's own estimate, corrected by how far such estimates
    were off. So the expected sum over many calls is right, which is what a limit is about.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._learned: dict[tuple[str, str], _Learned] = {}

    def expect(
        self,
        model: str,
        tier: str,
        requests: list[tuple[JobKind, str, int]],
        price_of: PriceOf | None,
    ) -> Costs:
        """The cost of one call.

        Args:
            model: Whose answers are alike.
            tier: Whose questions are alike.
            requests: Of each job in the call: kind, body, and estimated input tokens.
            price_of: Prices an expected usage; None where no dollars are counted.
        """
        learned = self._of(model, tier)
        prompt = answer = 0.0
        for kind, body, tokens in requests:
            prompt += tokens * learned.input_ratio
            if kind is not JobKind.EMBEDDING:
                answer += min(learned.output, _most(body))
        dollars = 0.0
        if price_of is not None:
            dollars = float(price_of(Usage(input=round(prompt), output=round(answer))) or 0)
        return Costs(input_tokens=prompt, output_tokens=answer, dollars=dollars)

    def learn(
        self, model: str, tier: str, *, estimated: int, usage: Usage, is_answer: bool
    ) -> None:
        """One job's call took this."""
        learned = self._of(model, tier)
        learned.calls += 1
        weight = max(_SLOW, _QUICK if learned.calls <= _QUICK_CALLS else _SLOW, 1 / learned.calls)
        if estimated > 0 and usage.input > 0:
            learned.input_ratio += weight * (usage.input / estimated - learned.input_ratio)
        if is_answer:
            learned.output += weight * (usage.output - learned.output)

    def is_sure(self, model: str, tier: str) -> bool:
        """True once enough was seen for more than a guess."""
        return self._of(model, tier).calls >= _SURE_CALLS

    def _of(self, model: str, tier: str) -> _Learned:
        learned = self._learned.get((model, tier))
        if learned is None:
            if len(self._learned) >= _MAX_MODELS:
                self._learned.clear()
            learned = self._learned[model, tier] = _Learned()
        return learned


def _most(body: str) -> float:
    """The tokens that the answer may have at most."""
    found = _MAX_TOKENS.search(body)
    return float(found[1]) if found else float("inf")
