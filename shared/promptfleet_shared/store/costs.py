"""What was spent, on what, and what was saved: the ledger's reports, forecasts and budgets.

A call's cost is the price of what the provider counted. Where it did not count, the ledger has our
estimate of what came of the answer, and what the call may have cost at most.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from promptfleet_shared.errors import InvalidRequestError
from promptfleet_shared.policies.budgets import METADATA, Period

COLUMNS = ("model", "tier", "tenant", "day", "provider", "deployment")
"""What costs are shown by; or "metadata.KEY"."""
_KEYS = {
    "day": "to_char({instant} AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "metadata": "metadata ->> :key",
}

_SAVIOURS = 4
"""What a key's savings are told apart by: three states of the cache, and "other"."""

_COSTS = """
SELECT {ledger_key} AS key, sum(calls)::bigint AS calls,
       sum(unknown_calls)::bigint AS unknown_calls,
       sum(input_tokens)::bigint AS input_tokens, sum(cached_tokens)::bigint AS cached_tokens,
       sum(output_tokens)::bigint AS output_tokens,
       sum(reasoning_tokens)::bigint AS reasoning_tokens, sum(cost_usd) AS cost_usd,
       sum(estimated_usd) AS estimated_usd, sum(at_most_usd) AS at_most_usd,
       (sum(calls) FILTER (WHERE cost_usd IS NULL AND estimated_usd IS NULL
                             AND unknown_calls = 0))::bigint AS unpriced_calls
  FROM ledger
 WHERE at >= :since AND at < :until AND (tenant = :tenant OR :all_tenants) GROUP BY 1
 LIMIT CAST(:most_keys AS bigint)
"""
_SAVED = """
SELECT {results_key} AS key, CASE WHEN cache IN ('off', 'miss') THEN 'other' ELSE cache END AS by,
       count(*)::bigint AS jobs, sum(saved_usd) AS saved_usd
  FROM results
 WHERE finished_at >= :since AND finished_at < :until AND (tenant = :tenant OR :all_tenants)
   AND (saved_usd IS NOT NULL OR cache NOT IN ('off', 'miss')) GROUP BY 1, 2
 LIMIT CAST(:most_savings AS bigint)
"""

_OUTPUTS = sa.text("""
SELECT tier, count(*) AS answers, avg(output_tokens)::float8 AS mean,
       percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY output_tokens) AS quantiles
  FROM (SELECT tier, output_tokens FROM results
         WHERE tenant = :tenant AND state = 'succeeded' AND cache IN ('off', 'miss')
           AND output_tokens > 0 AND finished_at >= clock_timestamp() - :age_s * interval '1 second'
         ORDER BY landed DESC LIMIT :limit) AS latest
 GROUP BY tier
""")

# The busiest minutes of a tier: what it can do, rather than what it had to.
_RATES = sa.text("""
SELECT tier, percentile_cont(0.9) WITHIN GROUP (ORDER BY jobs) / 60 AS per_s
  FROM (SELECT tier, date_trunc('minute', finished_at) AS minute, count(*) AS jobs
          FROM (SELECT tier, finished_at FROM results
                 WHERE tenant = :tenant AND state = 'succeeded'
                   AND finished_at >= clock_timestamp() - :age_s * interval '1 second'
                 ORDER BY landed DESC LIMIT :limit) AS latest
         GROUP BY 1, 2) AS minutes
 GROUP BY tier
""")

_SPENT = """
SELECT extract(epoch FROM began)::bigint AS period, coalesce((
    SELECT sum(coalesce(cost_usd, at_most_usd, estimated_usd, 0)) FROM ledger
     WHERE at >= began {whose}), 0) AS usd
  FROM (SELECT {began} AS began) AS periods
"""
_BEGAN = {
    Period.DAY: "date_trunc('day', clock_timestamp(), 'UTC')",
    Period.MONTH: "date_trunc('month', clock_timestamp(), 'UTC')",
    Period.TOTAL: "to_timestamp(0)",
}
_WHOSE = {
    "all": "",
    "tenant": "AND tenant = :value",
    "tier": "AND tier = :value",
    "model": "AND deployment = ANY(:deployments)",
    "metadata": "AND metadata ->> :key = :value",
}

_METADATA = sa.text("""
SELECT id, k, metadata ->> k FROM jobs CROSS JOIN unnest(CAST(:keys AS text[])) AS k
 WHERE id = ANY(CAST(:ids AS uuid[])) AND metadata ->> k IS NOT NULL
""")

# The newest rows, by the primary key: the ledger may be long.
_LONGEST = sa.text("""
SELECT deployment, tier, max(output_tokens) AS tokens
  FROM (SELECT deployment, tier, output_tokens FROM ledger ORDER BY id DESC LIMIT :limit) AS latest
 WHERE deployment IS NOT NULL AND output_tokens > 0 GROUP BY deployment, tier
""")

_TELL = sa.text("""
INSERT INTO callbacks (id, tenant, url, event, payload)
VALUES (:id, :tenant, :url, :event, :payload) ON CONFLICT (id) DO NOTHING
""").bindparams(sa.bindparam("payload", type_=pg.JSON))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CostRow:
    """What one model, tier, tenant … cost in a span of time.

    Attributes:
        key: Which one; None for what nobody knows it of, e.g. the model of a lost worker's calls.
        unknown_calls: Of the calls, those whose outcome (and bill) nobody knows.
        cost_usd: US dollars, by the provider's counts; None where no price is known.
        estimated_usd: Of calls that were cut, by what came of their answers.
        at_most_usd: What the unknown calls may have cost at most, as far as that can be said.
        unpriced_calls: Calls without a known price that `cost_usd` leaves out.
        saved_usd: What answers would have cost that were not paid for, by what saved it: a state of
            the cache, or "other".
    """

    key: str | None
    calls: int = 0
    unknown_calls: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    cost_usd: Decimal | None = None
    estimated_usd: Decimal | None = None
    at_most_usd: Decimal | None = None
    unpriced_calls: int = 0
    saved_usd: Mapping[str, Decimal] = dataclasses.field(default_factory=dict)
    saved_jobs: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObservedOutputs:
    """How long a tier's answers were, in tokens."""

    answers: int
    mean: float
    p50: float
    p95: float


def check_key(by: str) -> str:
    """The name of what costs are shown by.

    Raises:
        InvalidRequestError: There is no such thing.
    """
    named = by.startswith(METADATA) and len(by) > len(METADATA) and "\0" not in by
    if by in COLUMNS or named:
        return by
    msg = f"by: must be one of {', '.join(COLUMNS)} or metadata.KEY, not {by[:64]!r}"
    raise InvalidRequestError(msg, field="by")


def costs(
    connection: sa.Connection,
    *,
    by: str,
    since: dt.datetime,
    until: dt.datetime,
    tenant: str | None,
    most: int | None = None,
) -> list[CostRow]:
    """What was spent from `since` until before `until`, the dearest first.

    Args:
        connection: Sees the ledger.
        by: See `COLUMNS`.
        since: The first instant.
        until: The first instant that is left out.
        tenant: None for all tenants, as far as the connection sees them.
        most: Rows that the caller has room for; None for any number.

    Raises:
        InvalidRequestError: See `check_key`; or there would be more rows.
    """
    check_key(by)
    parameters: dict[str, Any] = {
        "most_keys": None if most is None else most + 1,
        "most_savings": None if most is None else most * _SAVIOURS + 1,
        "since": since,
        "until": until,
        "tenant": tenant or "",
        "all_tenants": tenant is None,
    }
    if by.startswith(METADATA):
        parameters["key"] = by.removeprefix(METADATA)
    paid = connection.execute(sa.text(_COSTS.format(ledger_key=_key(by, "at"))), parameters)
    rows = {row.key: _cost_row(row) for row in paid}
    saved = sa.text(_SAVED.format(results_key=_key(by, "finished_at")))
    for row in connection.execute(saved, parameters):
        known = rows.get(row.key) or CostRow(key=row.key)
        saving = {row.by: row.saved_usd} if row.saved_usd is not None else {}
        rows[row.key] = dataclasses.replace(
            known,
            saved_usd={**known.saved_usd, **saving},
            saved_jobs={**known.saved_jobs, row.by: row.jobs},
        )
    if most is not None and len(rows) > most:
        msg = f"by: {by} has more than {most:,} values in that time; ask for a shorter one"
        raise InvalidRequestError(msg, field="by")
    if by == "day":
        return sorted(rows.values(), key=lambda row: row.key or "")
    return sorted(rows.values(), key=_spent, reverse=True)


def _key(by: str, instant: str) -> str:
    kind = "metadata" if by.startswith(METADATA) else by
    return _KEYS.get(kind, kind).format(instant=instant)


def _cost_row(row: Any) -> CostRow:
    values = {**row._mapping, "unpriced_calls": row.unpriced_calls or 0}  # noqa: SLF001 - SQLAlchemy's public name
    return CostRow(**values)


def _spent(row: CostRow) -> tuple[Decimal, int]:
    return (row.cost_usd or Decimal(0)) + (row.estimated_usd or Decimal(0)), row.calls


def observed_outputs(
    connection: sa.Connection, *, tenant: str, age_s: float = 30 * 86_400.0, limit: int = 20_000
) -> dict[str, ObservedOutputs]:
    """How long each tier's latest answers were: at most `limit` of them, `age_s` old at most."""
    rows = connection.execute(_OUTPUTS, {"tenant": tenant, "age_s": age_s, "limit": limit})
    return {
        row.tier: ObservedOutputs(
            answers=row.answers, mean=row.mean, p50=row.quantiles[0], p95=row.quantiles[1]
        )
        for row in rows
    }


def observed_rates(
    connection: sa.Connection, *, tenant: str, age_s: float = 7 * 86_400.0, limit: int = 100_000
) -> dict[str, float]:
    """Answers a second of each tier in its busiest minutes (the 90th percentile)."""
    rows = connection.execute(_RATES, {"tenant": tenant, "age_s": age_s, "limit": limit})
    return {row.tier: row.per_s for row in rows}


def spent_in_period(
    connection: sa.Connection,
    *,
    by: str,
    value: str,
    period: Period,
    deployments: Sequence[str] = (),
) -> tuple[int, Decimal]:
    """When the present period began (seconds since 1970), and the US dollars spent since.

    Calls without a count of the provider's are counted with what they may have cost at most.

    Args:
        connection: Sees the whole ledger.
        by: "all", "tenant", "tier", "model" or "metadata.KEY".
        value: Which one.
        period: By the database's clock.
        deployments: Those of the model.
    """
    kind = "metadata" if by.startswith(METADATA) else by
    own: dict[str, dict[str, Any]] = {
        "all": {},
        "model": {"deployments": list(deployments)},
        "metadata": {"key": by.removeprefix(METADATA), "value": value},
    }
    parameters = own.get(kind, {"value": value})
    statement = _SPENT.format(whose=_WHOSE[kind], began=_BEGAN[period])
    row = connection.execute(sa.text(statement), parameters).one()
    return row.period, row.usd


def longest_outputs(
    connection: sa.Connection, *, limit: int = 20_000
) -> dict[tuple[str, str], int]:
    """Tokens of the longest answers of each deployment and tier, of the latest `limit` calls."""
    rows = connection.execute(_LONGEST, {"limit": limit})
    return {(row.deployment, row.tier): row.tokens for row in rows}


def metadata_values(
    connection: sa.Connection, ids: Sequence[uuid.UUID], keys: Sequence[str]
) -> dict[uuid.UUID, dict[str, str]]:
    """The values of these keys of the jobs' metadata, as text."""
    found: dict[uuid.UUID, dict[str, str]] = {}
    for job_id, key, value in connection.execute(_METADATA, {"ids": list(ids), "keys": list(keys)}):
        found.setdefault(job_id, {})[key] = value
    return found


def tell_of_budget(
    connection: sa.Connection,
    callback_id: uuid.UUID,
    *,
    tenant: str,
    url: str,
    event: str,
    payload: Mapping[str, Any],
) -> None:
    """Put a callback into the outbox, once: the same id is the same callback."""
    parameters = {
        "id": callback_id,
        "tenant": tenant,
        "url": url,
        "event": event,
        "payload": dict(payload),
    }
    connection.execute(_TELL, parameters)
