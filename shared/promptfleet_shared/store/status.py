"""Numbers about the fleet, for `promptfleet status`, the demo's table and doctor."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Sequence
from decimal import Decimal

import sqlalchemy as sa

from promptfleet_shared.store.sweeping import RING_BACKOFF_MAX_S


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TierSummary:
    """What finished in a tier, over some jobs or a span of time.

    Attributes:
        batches: Claimed batches that the finished jobs came from.
        mean_batch_size: Jobs a batch as claimed.
        cached: Jobs answered without a call of their own (hits, coalesced, and by meaning).
        cost_usd: US dollars, of the calls whose price is known.
        queued_ms: p50 and p95 of the wait for the claim.
        provider_ms: p50 and p95 of the provider's time, over jobs that called.
        cache_saved_usd: US dollars that the answers from the cache would have cost.
    """

    tier: str
    jobs: int
    succeeded: int
    batches: int
    mean_batch_size: float
    cached: int
    calls: int
    input_tokens: int
    output_tokens: int
    queued_ms: tuple[float, float]
    provider_ms: tuple[float, float] | None
    cost_usd: Decimal | None
    cache_saved_usd: Decimal | None = None


_SUMMARY = sa.text("""
SELECT tier, count(*) AS jobs, count(*) FILTER (WHERE state = 'succeeded') AS succeeded,
       count(DISTINCT batch_id) AS batches,
       count(*) FILTER (WHERE cache IN ('hit', 'coalesced', 'semantic')) AS cached,
       sum(saved_usd) FILTER (WHERE cache IN ('hit', 'coalesced', 'semantic')) AS cache_saved_usd,
       sum(calls)::bigint AS calls, sum(input_tokens)::bigint AS input_tokens,
       sum(output_tokens)::bigint AS output_tokens, sum(cost_usd) AS cost_usd,
       percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY queued_ms) AS queued,
       percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY provider_ms) AS provider
  FROM results
 WHERE finished_at >= :since AND (metadata ->> 'run' = :run OR CAST(:run AS text) IS NULL)
   AND (tenant = :tenant)
 GROUP BY tier ORDER BY tier
""")

_STATES = sa.text("""
SELECT tier, state, count(*) FROM jobs WHERE finished_at IS NULL AND tenant = :tenant
 GROUP BY tier, state ORDER BY tier, state
""")

_OVERDUE = sa.text("""
SELECT count(*) FROM jobs
 WHERE finished_at IS NULL AND deadline < clock_timestamp() - interval '60 seconds'
""")

# A due job's timer is never further away than the longest pause between two of its doorbells: so
# the index of timers leaves out what is to run later.
_NEGLECTED = sa.text("""
SELECT EXISTS (
    SELECT FROM jobs
     WHERE finished_at IS NULL AND state = 'queued' AND tier = ANY(:tiers) AND NOT cancel_requested
       AND deadline > clock_timestamp()
       AND run_at <= clock_timestamp() - :for_s * interval '1 second'
       AND sweep_at <= clock_timestamp() + :backoff_max_s * interval '1 second')
""").bindparams(backoff_max_s=RING_BACKOFF_MAX_S)


def tier_summaries(
    connection: sa.Connection, *, tenant: str, since: dt.datetime, run: str | None = None
) -> list[TierSummary]:
    """A summary of each tier's results since an instant, optionally of one metadata `run`."""
    rows = connection.execute(_SUMMARY, {"tenant": tenant, "since": since, "run": run})
    return [
        TierSummary(
            tier=row.tier,
            jobs=row.jobs,
            succeeded=row.succeeded,
            batches=row.batches,
            mean_batch_size=row.jobs / row.batches if row.batches else 0.0,
            cached=row.cached,
            calls=row.calls,
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            queued_ms=(row.queued[0], row.queued[1]),
            provider_ms=None if row.provider is None else (row.provider[0], row.provider[1]),
            cost_usd=row.cost_usd,
            cache_saved_usd=row.cache_saved_usd,
        )
        for row in rows
    ]


def open_jobs(connection: sa.Connection, *, tenant: str) -> dict[str, dict[str, int]]:
    """How many jobs of each tier are in each state that is not final."""
    counts: dict[str, dict[str, int]] = {}
    for tier, state, count in connection.execute(_STATES, {"tenant": tenant}):
        counts.setdefault(tier, {})[state] = count
    return counts


def database_clock(connection: sa.Connection) -> dt.datetime:
    """The time by the only clock that counts."""
    now: dt.datetime = connection.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
    return now


def overdue_jobs(connection: sa.Connection) -> int:
    """Jobs that no sweeper ended within a minute of their deadline: no worker runs."""
    return int(connection.execute(_OVERDUE).scalar_one())


def any_neglected(connection: sa.Connection, tiers: Sequence[str], *, for_s: float) -> bool:
    """True if a job of these tiers may run for `for_s` seconds already, and nobody has claimed it.

    A backlog is neglected, too: the answer says that there is work, and not whose fault it is.
    """
    parameters = {"tiers": list(tiers), "for_s": for_s}
    return bool(connection.execute(_NEGLECTED, parameters).scalar_one())
