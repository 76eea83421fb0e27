"""What was spent in a span of time, as the command line and the HTTP API tell it."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from promptfleet_shared.errors import InvalidRequestError

if TYPE_CHECKING:
    from promptfleet_shared.store.costs import CostRow

FREE = Decimal(0)
DEFAULT_BY = "model"
DEFAULT_SINCE = "7d"
_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def seconds_of(text: str) -> float | None:
    """Seconds from `90`, `90s`, `15m`, `24h`, `30d` or `2w`; None if it is none of these."""
    parsed = _SPAN.fullmatch(text.strip())
    return None if parsed is None else float(parsed[1]) * _SECONDS[parsed[2]]


def instant(text: str, now: dt.datetime, *, field: str, label: str = "") -> dt.datetime:
    """An instant in UTC from how long ago it was, or from a date or an instant in ISO 8601.

    Args:
        text: Such as `7d`, `24h`, `2026-03-01` or `2026-03-01T12:00+02:00`; of UTC without a zone.
        now: From which on "ago" is counted.
        field: Of the request, for the error.
        label: What its sender calls it; the field by default.

    Raises:
        InvalidRequestError: It is neither, or too far away.
    """
    try:
        parsed = _parsed(text, now)
    except OverflowError:
        parsed = None
    if parsed is None:
        msg = f"{label or field}: must be like 7d or 24h, or like 2026-03-01, not {text[:64]!r}"
        raise InvalidRequestError(msg, field=field)
    return parsed


def _parsed(text: str, now: dt.datetime) -> dt.datetime | None:
    try:
        parsed = dt.datetime.fromisoformat(text)
    except ValueError:
        ago_s = seconds_of(text)
        if ago_s is None:
            return None
        parsed = now - dt.timedelta(seconds=ago_s)
    return parsed.replace(tzinfo=parsed.tzinfo or dt.UTC).astimezone(dt.UTC)


def report(
    rows: Sequence[CostRow],
    *,
    by: str,
    since: dt.datetime,
    until: dt.datetime,
    tenant: str | None,
) -> dict[str, Any]:
    """The report as JSON shows it."""
    return {
        "by": by,
        "since": since,
        "until": until,
        "tenant": tenant,
        "rows": [record(row) for row in rows],
        "total": record(total(rows)),
    }


def record(row: CostRow) -> dict[str, Any]:
    """A row as JSON and CSV show it."""
    return {
        "key": row.key,
        "calls": row.calls,
        "unknown_calls": row.unknown_calls,
        "unpriced_calls": row.unpriced_calls,
        "input_tokens": row.input_tokens,
        "cached_tokens": row.cached_tokens,
        "output_tokens": row.output_tokens,
        "reasoning_tokens": row.reasoning_tokens,
        "cost_usd": _number(row.cost_usd),
        "estimated_usd": _number(row.estimated_usd),
        "at_most_usd": _number(row.at_most_usd),
        "saved_usd": {name: float(usd) for name, usd in row.saved_usd.items()},
        "saved_jobs": dict(row.saved_jobs),
    }


def total(rows: Sequence[CostRow]) -> CostRow:
    """The sum of all rows."""
    from promptfleet_shared.store.costs import CostRow  # noqa: PLC0415  # slow to import

    saved: dict[str, Decimal] = {}
    jobs: dict[str, int] = {}
    for row in rows:
        for name, usd in row.saved_usd.items():
            saved[name] = saved.get(name, FREE) + usd
        for name, count in row.saved_jobs.items():
            jobs[name] = jobs.get(name, 0) + count
    return CostRow(
        key="all",
        calls=sum(row.calls for row in rows),
        unknown_calls=sum(row.unknown_calls for row in rows),
        input_tokens=sum(row.input_tokens for row in rows),
        cached_tokens=sum(row.cached_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        reasoning_tokens=sum(row.reasoning_tokens for row in rows),
        cost_usd=_sum(row.cost_usd for row in rows),
        estimated_usd=_sum(row.estimated_usd for row in rows),
        at_most_usd=_sum(row.at_most_usd for row in rows),
        unpriced_calls=sum(row.unpriced_calls for row in rows),
        saved_usd=saved,
        saved_jobs=jobs,
    )


def _sum(values: Iterable[Decimal | None]) -> Decimal | None:
    known = [value for value in values if value is not None]
    return sum(known, FREE) if known else None


def _number(usd: Decimal | None) -> float | None:
    return None if usd is None else float(usd)
