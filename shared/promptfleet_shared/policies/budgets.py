"""[[budgets]]: how much may be spent on what, in which period."""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from promptfleet_shared.egress import check_url
from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.policies.section import Count, Section

Dollars = Annotated[float, Field(gt=0, le=1_000_000)]
METADATA = "metadata."
NANOS = 1_000_000_000
"""Nanodollars in a dollar: budgets are counted in whole ones, so that a thousand small prices add
up exactly."""


class Period(enum.StrEnum):
    """How long a budget lasts; periods begin at 00:00 UTC."""

    DAY = "day"
    MONTH = "month"
    TOTAL = "total"

    def start(self, now: dt.datetime) -> dt.datetime:
        """When the period that `now` is in began.

        Example:
            >>> Period.MONTH.start(dt.datetime(2026, 3, 9, 8, 30, tzinfo=dt.UTC)).isoformat()
            '2026-03-01T00:00:00+00:00'
        """
        midnight = now.astimezone(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        match self:
            case Period.DAY:
                return midnight
            case Period.MONTH:
                return midnight.replace(day=1)
            case Period.TOTAL:
                return dt.datetime.fromtimestamp(0, dt.UTC)

    def end(self, start: dt.datetime) -> dt.datetime | None:
        """When the period that began at `start` is over; None for never."""
        match self:
            case Period.DAY:
                return start + dt.timedelta(days=1)
            case Period.MONTH:
                return (start + dt.timedelta(days=32)).replace(day=1)
            case Period.TOTAL:
                return None


class Budget(Section):
    """What may be spent in a period.

    Attributes:
        name: Unique in the fleet; shown in logs, metrics and callbacks.
        by: Whose spending is counted: of "all" together, of each "tenant", each "tier", each
            "model" of fleet.toml, or each value of "metadata.KEY". A job without that key is not
            counted.
        only: The values that this budget is for; all of them without it.
        period: "day", "month" (both of UTC) or "total".
        hard_usd: US dollars that are not exceeded: jobs wait for the next period, or fail.
        soft_usd: US dollars at which somebody is told, once a period.
        on_soft: Where a signed callback is posted then.
        reserve: What a job without `max_tokens` reserves money for: "learned", a quarter more than
            the longest of the latest answers of its model and tier; or "most", all that the model
            can write: its `max_output_tokens`, or 16,384 where that is not set.
        reserve_output_tokens: Tokens of output that are reserved at least where it is learned.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    by: Annotated[str, Field(pattern=r"^(all|tenant|tier|model|metadata\..{1,64})$")] = "all"
    only: tuple[str, ...] = ()
    period: Period = Period.MONTH
    hard_usd: Dollars | None = None
    soft_usd: Dollars | None = None
    on_soft: str | None = None
    reserve: Literal["learned", "most"] = "learned"
    reserve_output_tokens: Count = 1000

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hard_usd is None and self.soft_usd is None:
            msg = "hard_usd: a budget needs hard_usd, soft_usd or both"
            raise ValueError(msg)
        if None not in (self.hard_usd, self.soft_usd) and self.soft_usd >= self.hard_usd:  # type: ignore[operator]
            msg = "soft_usd: must be below hard_usd, or nobody is told in time"
            raise ValueError(msg)
        if self.only and self.by == "all":
            msg = 'only: belongs to a budget by "tenant", "tier", "model" or "metadata.KEY"'
            raise ValueError(msg)
        if self.on_soft is not None:
            if self.soft_usd is None:
                msg = "on_soft: needs soft_usd"
                raise ValueError(msg)
            try:
                check_url(self.on_soft, field="on_soft", allow_loopback=True)
            except InvalidRequestError as error:
                raise ValueError(error.message) from None
        return self

    @property
    def metadata_key(self) -> str | None:
        """The key of a job's metadata whose values are counted apart, if that is how."""
        return self.by.removeprefix(METADATA) if self.by.startswith(METADATA) else None

    @property
    def hard_nanos(self) -> int | None:
        """`hard_usd` as it is counted."""
        return None if self.hard_usd is None else round(self.hard_usd * NANOS)

    @property
    def soft_nanos(self) -> int | None:
        """`soft_usd` as it is counted."""
        return None if self.soft_usd is None else round(self.soft_usd * NANOS)

    def counts(self, value: str) -> bool:
        """True if this budget is for such a tenant, tier, model or value."""
        return not self.only or value in self.only


def twice_named(budgets: Sequence[Budget]) -> str | None:
    """What is wrong with the names of the budgets, if anything."""
    names = [budget.name for budget in budgets]
    for name in names:
        if names.count(name) > 1:
            return f"budgets: two budgets are called {name!r}"
    return None
