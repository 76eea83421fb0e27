"""How fast a deployment, a tenant or any group of jobs may be served, as fleet.toml says it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from promptfleet_shared.policies.section import Count, Milliseconds, Section

Dollars = Annotated[float, Field(gt=0)]
PERIODS_S = {"minute": 60, "hour": 3600, "day": 86_400, "month": 30 * 86_400}
"""A month is thirty days: limits slide, they do not follow the calendar."""


class Dimension(enum.StrEnum):
    """What a limit counts."""

    REQUESTS = "requests"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    TOKENS = "tokens"  # of prompts and answers
    DOLLARS = "dollars"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """So much of something in any period of `period_s` seconds."""

    dimension: Dimension
    period: str
    amount: float

    @property
    def period_s(self) -> int:
        """Seconds."""
        return PERIODS_S[self.period]

    @property
    def name(self) -> str:
        """As in fleet.toml, e.g. "requests_per_minute"."""
        return f"{self.dimension.value}_per_{self.period}"


class Rates(Section):
    """Limits; each of them holds, whatever the others allow.

    Attributes:
        requests_per_minute: Calls in any minute; also `_per_hour`, `_per_day`, `_per_month`, as
            the next four.
        input_tokens_per_minute: Tokens of prompts.
        output_tokens_per_minute: Tokens of answers.
        tokens_per_minute: Both together.
        dollars_per_minute: US dollars.
        max_concurrency: Calls in flight at once, of the whole fleet.
    """

    requests_per_minute: Count | None = None
    requests_per_hour: Count | None = None
    requests_per_day: Count | None = None
    requests_per_month: Count | None = None
    input_tokens_per_minute: Count | None = None
    input_tokens_per_hour: Count | None = None
    input_tokens_per_day: Count | None = None
    input_tokens_per_month: Count | None = None
    output_tokens_per_minute: Count | None = None
    output_tokens_per_hour: Count | None = None
    output_tokens_per_day: Count | None = None
    output_tokens_per_month: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_hour: Count | None = None
    tokens_per_day: Count | None = None
    tokens_per_month: Count | None = None
    dollars_per_minute: Dollars | None = None
    dollars_per_hour: Dollars | None = None
    dollars_per_day: Dollars | None = None
    dollars_per_month: Dollars | None = None
    max_concurrency: Count | None = None

    def rates(self) -> tuple[Rate, ...]:
        """Those that are set."""
        return tuple(
            Rate(dimension=dimension, period=period, amount=float(amount))
            for dimension in Dimension
            for period in PERIODS_S
            if (amount := getattr(self, f"{dimension.value}_per_{period}")) is not None
        )


class DeploymentLimits(Rates):
    """What a provider allows; the fleet stays below it.

    Attributes:
        account: Deployments that name the same account share these limits; give them the same
            numbers. By default each deployment has its own. What belongs to an API key, besides
            what each of its deployments has, is a rule per "api_key".
        adaptive: True to find out by itself how many calls the deployment bears at once, up to
            `max_concurrency`: one more while all goes well, fewer after an overload.
        learn: False to ignore the limits that the provider's responses tell of. What they tell
            lowers these limits, and stands for those of a minute that are not set.
    """

    account: str = ""
    adaptive: bool = False
    learn: bool = True


class LimitRule(Rates):
    """A limit that many deployments or jobs share: a provider's for a key, or one of our own.

    Attributes:
        per: What has the limit: each "api_key" (by the `api_key_env` of its deployments), each
            "tenant", each "tier", each "limit_key" (an option of the job), or the "fleet".
        only: The values that this rule is for; it takes the place of rules for all values.
    """

    per: Literal["api_key", "fleet", "tier", "tenant", "limit_key"]
    only: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if not self.rates() and self.max_concurrency is None:
            msg = "limits.rules: a rule needs a limit, such as requests_per_minute"
            raise ValueError(msg)
        if self.per == "fleet" and self.only:
            msg = "limits.rules: there is one fleet only; leave out `only`"
            raise ValueError(msg)
        return self


class LimitsSection(Section):
    """How limits are kept.

    Attributes:
        wait_ms: A job whose turn comes within so many milliseconds waits for it in the worker,
            longer ones in the database.
        headroom: The share of a minute's limit that is left unused, because calls do not arrive
            as evenly as they are sent, 0 to 0.5.
        rules: Limits of API keys, and limits of our own.
    """

    wait_ms: Milliseconds = 1000.0
    headroom: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    rules: tuple[LimitRule, ...] = ()

    def mistake(self, api_keys: Collection[str]) -> str | None:
        """What is wrong with the rules, if anything.

        Args:
            api_keys: The environment variables that deployments take their keys from.
        """
        for rule in self.rules:
            if rule.per != "api_key":
                continue
            if not api_keys:
                return "limits.rules: a rule per api_key needs a deployment with api_key_env"
            for name in rule.only:
                if name not in api_keys:
                    known = ", ".join(sorted(api_keys))
                    return f"limits.rules: no deployment has api_key_env {name!r}, only {known}"
        return None
