"""What a file of prompts will cost and how long it will take, before anything is submitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

import orjson

from promptfleet.bulk.lines import RawLine, parse_line
from promptfleet.estimates import Dollars, Estimates, Output
from promptfleet.requests import Defaults, make_specs
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.jobs import JobSpec, Usage

MAX_MISTAKES = 20
"""Lines whose mistakes are told; the others are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A line that could not be submitted."""

    line: int
    message: str


@dataclasses.dataclass(kw_only=True, slots=True)
class TierForecast:
    """What the lines of one tier will take.

    Attributes:
        output_tokens: Expected.
        high_usd: If each answer were as long as only one in twenty is.
        sources: For how many lines the length of the answer was "observed", its bound taken
            ("max_tokens"), or a "default".
        duration_s: At the pace of the tier's busiest minutes; None where none was seen.
    """

    tier: str
    prompts: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: Dollars = dataclasses.field(default_factory=Dollars)
    high_usd: Dollars = dataclasses.field(default_factory=Dollars)
    batch_usd: Dollars = dataclasses.field(default_factory=Dollars)
    sources: dict[str, int] = dataclasses.field(default_factory=dict)
    duration_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a file will take.

    Attributes:
        lines: That are not blank.
        invalid: Those of them that could not be submitted.
        mistakes: The first of those.
        tiers: As the lines are written.
        all_on: What the whole file would cost on each tier of the fleet, and there by the
            provider's batch API.
    """

    lines: int
    invalid: int
    mistakes: tuple[Mistake, ...]
    tiers: tuple[TierForecast, ...]
    all_on: Mapping[str, tuple[Decimal | None, Decimal | None]]

    @property
    def duration_s(self) -> float | None:
        """Tiers run side by side; None where nobody knows of one of them."""
        known = [tier.duration_s for tier in self.tiers]
        return None if not known or None in known else max(s for s in known if s is not None)


class Forecaster:
    """Reads lines and adds up; nothing of a prompt is kept."""

    def __init__(
        self,
        estimates: Estimates,
        *,
        options: Mapping[str, Any],
        defaults: Defaults,
        keep_model: bool,
        rates: Mapping[str, float],
    ) -> None:
        """Read nothing yet.

        Args:
            estimates: Of tokens and prices.
            options: Of all prompts; a line's own win.
            defaults: Of the fleet.
            keep_model: False to leave out the model of an OpenAI batch line.
            rates: Answers a second of each tier, as far as that was seen.
        """
        self._estimates = estimates
        self._options = options
        self._defaults = defaults
        self._keep_model = keep_model
        self._rates = rates
        self._tiers: dict[str, TierForecast] = {}
        self._all_on = {tier: (Dollars(), Dollars()) for tier in defaults.tiers or ()}
        self._mistakes: list[Mistake] = []
        self._lines = self._invalid = 0

    def read(self, lines: Iterator[RawLine]) -> Forecast:
        """Check, count and price every line."""
        for raw in lines:
            self._lines += 1
            try:
                spec = spec_of_line(raw, self._options, self._defaults, keep_model=self._keep_model)
            except InvalidRequestError as error:
                self._invalid += 1
                if len(self._mistakes) < MAX_MISTAKES:
                    self._mistakes.append(Mistake(line=raw.number, message=error.message))
                continue
            self._add(spec)
        for tier in self._tiers.values():
            rate = self._rates.get(tier.tier)
            tier.duration_s = tier.prompts / rate if rate else None
        return Forecast(
            lines=self._lines,
            invalid=self._invalid,
            mistakes=tuple(self._mistakes),
            tiers=tuple(self._tiers[name] for name in sorted(self._tiers)),
            all_on={name: (a.total, b.total) for name, (a, b) in self._all_on.items()},
        )

    def _add(self, spec: JobSpec) -> None:
        estimates = self._estimates
        body = orjson.loads(spec.request)
        model = estimates.model_of(spec)
        tokens = estimates.input_tokens(body, model)
        output = estimates.output(spec.kind, spec.tier, body.get("max_tokens"))
        usage = Usage(input=tokens, output=output.expected)
        tier = self._tiers.setdefault(spec.tier, TierForecast(tier=spec.tier))
        _count(tier, usage, output)
        tier.usd.add(estimates.cost(model, usage))
        tier.high_usd.add(estimates.cost(model, Usage(input=tokens, output=output.high)))
        tier.batch_usd.add(estimates.cost(model, usage, batch=True))
        for name, (ordinary, batch) in self._all_on.items():
            there = estimates.model_of_tier(name)
            answer = estimates.output(spec.kind, name, body.get("max_tokens"))
            expected = Usage(input=tokens, output=answer.expected)
            ordinary.add(estimates.cost(there, expected))
            batch.add(estimates.cost(there, expected, batch=True))


def spec_of_line(
    raw: RawLine, options: Mapping[str, Any], defaults: Defaults, *, keep_model: bool
) -> JobSpec:
    """The job that the line would become.

    Raises:
        InvalidRequestError: It would become none; says why, without its content.
    """
    parsed = parse_line(raw, keep_model=keep_model)
    try:
        (spec,) = make_specs([parsed.item], options, defaults)
    except InvalidRequestError as error:
        message = error.message.removeprefix("prompts[0]").removeprefix(".")
        raise InvalidRequestError(message, field=error.field) from None
    return spec


def _count(tier: TierForecast, usage: Usage, output: Output) -> None:
    tier.prompts += 1
    tier.input_tokens += usage.input
    tier.output_tokens += usage.output
    tier.sources[output.source] = tier.sources.get(output.source, 0) + 1
