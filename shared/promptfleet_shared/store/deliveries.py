"""Deliver what is in the outbox: claim what is due, and write down what became of it.

A claimed delivery has a lease. `lease_until` is its fence as well: no two claims of a delivery have
the same, so that what comes in late, from a worker that was taken for dead, changes nothing.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import orjson
import sqlalchemy as sa

from promptfleet_shared.jobs import JobError, Usage
from promptfleet_shared.store.results import job_error

OPEN_AFTER_FAILURES = 5
"""Failures in a row after which an endpoint is paused, then tried with one delivery a pause."""
FIRST_PAUSE_S = 10.0
MAX_PAUSE_S = 600.0
"""Pauses double from the first to the longest, as long as nothing succeeds."""
FORGET_AFTER_S = 7 * 86_400.0
IDLE_TRANSACTION_MS = 5_000
_LOCK = 7_046_811_922

# A loose scan: from one endpoint that has something pending to the next, an index probe each, so
# that a backlog of a million for one of them costs as much as a single delivery. What is claimed
# has its `next_at` at the end of its lease, and is not due before. The statement's time, unlike the
# clock's, may be compared by the index.
_DUE_ENDPOINTS = sa.text("""
WITH RECURSIVE seen AS (
    (SELECT tenant, endpoint, next_at, 1 AS number FROM callbacks
      WHERE delivered_at IS NULL AND exhausted_at IS NULL
        AND (tenant, endpoint) > (:after_tenant, :after_endpoint)
      ORDER BY tenant, endpoint, next_at LIMIT 1)
    UNION ALL
    SELECT following.*, number + 1 FROM seen CROSS JOIN LATERAL (
        SELECT c.tenant, c.endpoint, c.next_at FROM callbacks c
         WHERE delivered_at IS NULL AND exhausted_at IS NULL
           AND (c.tenant, c.endpoint) > (seen.tenant, seen.endpoint)
         ORDER BY c.tenant, c.endpoint, c.next_at LIMIT 1) AS following
     WHERE number < :limit
), busy AS (
    SELECT tenant, endpoint, count(*) AS posts FROM callbacks
     WHERE lease_until > statement_timestamp() GROUP BY tenant, endpoint
)
SELECT tenant, endpoint, next_at <= statement_timestamp() AND disabled_at IS NULL
           AND coalesce(paused_until <= statement_timestamp(), true)
           AND coalesce(posts, 0) < CASE WHEN coalesce(failures, 0) < :open_after
                                    THEN :per_endpoint ELSE 1 END AS open
  FROM seen LEFT JOIN callback_endpoints USING (tenant, endpoint)
            LEFT JOIN busy USING (tenant, endpoint)
 ORDER BY number
""").bindparams(open_after=OPEN_AFTER_FAILURES)

# One claim at a time over the whole fleet, or two could count the same posts in flight. Should a
# worker be stopped while it has the lock, the server ends its transaction after a few seconds.
_LOCK_CLAIMS = sa.text("""
SELECT set_config('idle_in_transaction_session_timeout', :idle_ms, true),
       pg_advisory_xact_lock(:lock)
""").bindparams(lock=_LOCK, idle_ms=str(IDLE_TRANSACTION_MS))

_CLAIM = sa.text("""
WITH asked AS (
    SELECT * FROM unnest(CAST(:tenants AS text[]), CAST(:endpoints AS text[]))
                  WITH ORDINALITY AS a (tenant, endpoint, number)
), busy AS (
    SELECT tenant, endpoint, count(*) AS posts FROM callbacks
     WHERE lease_until > statement_timestamp() GROUP BY tenant, endpoint
), room AS MATERIALIZED (
    SELECT asked.tenant, asked.endpoint, CASE WHEN coalesce(failures, 0) < :open_after
           THEN :per_endpoint ELSE 1 END - coalesce(posts, 0) AS posts
      FROM asked LEFT JOIN callback_endpoints USING (tenant, endpoint)
                 LEFT JOIN busy USING (tenant, endpoint)
     WHERE disabled_at IS NULL AND coalesce(paused_until <= statement_timestamp(), true)
     ORDER BY number
), due AS MATERIALIZED (
    SELECT picked.id AS callback_id FROM room CROSS JOIN LATERAL (
        SELECT c.id FROM callbacks c
         WHERE c.tenant = room.tenant AND c.endpoint = room.endpoint
           AND delivered_at IS NULL AND exhausted_at IS NULL AND next_at <= statement_timestamp()
         ORDER BY next_at LIMIT greatest(room.posts, 0) FOR UPDATE SKIP LOCKED) AS picked
     LIMIT :limit
), claimed AS (
    UPDATE callbacks SET attempts = attempts + 1,
           lease_until = clock_timestamp() + :lease_s * interval '1 second',
           next_at = clock_timestamp() + :lease_s * interval '1 second'
      FROM due WHERE id = callback_id
    RETURNING id, lease_until, job_id, callbacks.tenant, endpoint, url, event,
              attempts AS attempt, payload
)
SELECT claimed.id, lease_until, claimed.job_id, claimed.tenant, endpoint, url, event, attempt,
       payload, state, tier, model, finish_reason, error, input_tokens, cached_tokens,
       output_tokens, reasoning_tokens, cost_usd, cache, attempts, metadata, finished_at
  FROM claimed LEFT JOIN results ON results.job_id = claimed.job_id
""").bindparams(open_after=OPEN_AFTER_FAILURES)

# The breaker of an endpoint counts failures in a row up to where it opens, whatever their number;
# then one a pause, each twice as long as the one before. A success closes it, and leaves a pause
# that the receiver asked for as it is.
_RECORD = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        callback_id uuid, held timestamptz, verdict text, delay_s float8, pause_s float8,
        status int, error text)
), locked AS MATERIALIZED (
    SELECT id, tenant, endpoint, input.* FROM callbacks JOIN input ON id = callback_id
     WHERE lease_until = held ORDER BY id FOR UPDATE OF callbacks
), recorded AS (
    UPDATE callbacks SET lease_until = NULL,
           attempts = attempts - CASE verdict WHEN 'returned' THEN 1 ELSE 0 END,
           next_at = clock_timestamp() + delay_s * interval '1 second',
           delivered_at = CASE verdict WHEN 'delivered' THEN clock_timestamp() END,
           exhausted_at = CASE WHEN verdict IN ('exhausted', 'disabled') THEN clock_timestamp() END,
           last_status = CASE verdict WHEN 'returned' THEN last_status ELSE locked.status END,
           last_error = CASE verdict WHEN 'returned' THEN last_error ELSE locked.error END
      FROM locked WHERE callbacks.id = locked.id
), heard AS (
    SELECT tenant, endpoint, count(*) FILTER (WHERE verdict <> 'delivered') AS failed,
           bool_or(verdict = 'delivered') AS answered, bool_or(verdict = 'disabled') AS gone,
           max(pause_s) AS pause_s
      FROM locked WHERE verdict <> 'returned' GROUP BY tenant, endpoint
), judged AS (
    INSERT INTO callback_endpoints AS known (tenant, endpoint, failures, paused_until, disabled_at)
    SELECT tenant, endpoint, CASE WHEN answered THEN 0 ELSE least(failed, :open_after) END,
           clock_timestamp() + interval '1 second' * greatest(pause_s, CASE
               WHEN NOT answered AND failed >= :open_after THEN :first_pause_s ELSE 0 END),
           CASE WHEN gone THEN clock_timestamp() END
      FROM heard LEFT JOIN callback_endpoints old USING (tenant, endpoint)
     WHERE failed > 0 OR old.failures > 0 ORDER BY tenant, endpoint
    ON CONFLICT (tenant, endpoint) DO UPDATE SET
        failures = CASE WHEN excluded.failures = 0 THEN 0
            WHEN known.failures < :open_after
            THEN least(known.failures + excluded.failures, :open_after)
            WHEN known.paused_until > clock_timestamp() THEN known.failures
            ELSE known.failures + 1 END,
        paused_until = greatest(known.paused_until, excluded.paused_until, CASE
            WHEN excluded.failures > 0 AND known.failures + excluded.failures >= :open_after
                 AND (known.failures < :open_after OR known.paused_until <= clock_timestamp())
            THEN clock_timestamp() + interval '1 second' * least(:max_pause_s, :first_pause_s
                 * 2 ^ least(greatest(known.failures + 1 - :open_after, 0), 20)) END),
        disabled_at = coalesce(known.disabled_at, excluded.disabled_at)
)
SELECT verdict, count(*) FROM locked GROUP BY verdict
""").bindparams(
    open_after=OPEN_AFTER_FAILURES, first_pause_s=FIRST_PAUSE_S, max_pause_s=MAX_PAUSE_S
)

_ABANDON = sa.text("""
WITH closed AS (
    SELECT tenant, endpoint, disabled_at IS NOT NULL AS disabled FROM callback_endpoints
     WHERE disabled_at IS NOT NULL OR failures >= :open_after
), hopeless AS MATERIALIZED (
    SELECT picked.id AS callback_id, disabled FROM closed CROSS JOIN LATERAL (
        SELECT c.id FROM callbacks c
         WHERE c.tenant = closed.tenant AND c.endpoint = closed.endpoint
           AND delivered_at IS NULL AND exhausted_at IS NULL
           AND coalesce(lease_until <= statement_timestamp(), true)
           AND (disabled OR begun_at < statement_timestamp() - :give_up_s * interval '1 second')
         LIMIT :limit FOR UPDATE SKIP LOCKED) AS picked
     LIMIT :limit)
UPDATE callbacks SET exhausted_at = clock_timestamp(), lease_until = NULL,
       last_error = CASE WHEN disabled
           THEN 'endpoint_disabled: the receiver has answered 410 and wants no more callbacks'
           ELSE 'endpoint_failing: no callback of this endpoint got through for too long' END
  FROM hopeless WHERE id = callback_id
RETURNING id
""").bindparams(open_after=OPEN_AFTER_FAILURES)

_FORGET = sa.text("""
DELETE FROM callback_endpoints
 WHERE disabled_at IS NULL AND paused_until < clock_timestamp() - :age_s * interval '1 second'
""").bindparams(age_s=FORGET_AFTER_S)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Whom callbacks go to: what is slowed down, paused and disabled as one."""

    tenant: str
    endpoint: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DueEndpoints:
    """What a look at the outbox found.

    Attributes:
        open: Endpoints that something may be posted to now.
        last: Where the next look goes on; None if this one came to the end.
    """

    open: list[Endpoint]
    last: Endpoint | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResultFacts:
    """What a callback may tell of a result: neither prompt nor output is among it."""

    state: str
    tier: str
    model: str | None
    finish_reason: str | None
    error: JobError | None
    usage: Usage
    cost_usd: Decimal | None
    cache: str
    attempts: int
    metadata: dict[str, Any] | None
    finished_at: dt.datetime


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """A callback that this worker has claimed, to post it once.

    Attributes:
        lease_until: Its fence; see above.
        job_id: The job that it tells of; None where it has a payload of its own.
        attempt: Which attempt this is, from 1.
        facts: Of the job's result; None if that is gone.
        payload: The whole event, for what is no job's end.
    """

    id: uuid.UUID
    lease_until: dt.datetime
    job_id: uuid.UUID | None
    tenant: str
    endpoint: str
    url: str
    event: str
    attempt: int
    facts: ResultFacts | None
    payload: dict[str, Any] | None = None


class Verdict(enum.StrEnum):
    """What became of an attempt."""

    DELIVERED = "delivered"
    FAILED = "failed"  # tried again later
    EXHAUSTED = "exhausted"  # tried no more, until somebody replays it
    DISABLED = "disabled"  # exhausted, and so is whatever else goes to this endpoint
    RETURNED = "returned"  # not tried: it is as if it had not been claimed


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """What is written down about an attempt.

    Attributes:
        callback_id: Whose attempt it was.
        held: The fence of its claim.
        delay_s: Seconds until the next attempt.
        pause_s: Seconds for which the endpoint is to be left alone.
        status: HTTP's, where there was an answer.
        error: A short code and a sentence, never a part of an answer.
    """

    callback_id: uuid.UUID
    held: dt.datetime
    verdict: Verdict
    delay_s: float = 0.0
    pause_s: float = 0.0
    status: int | None = None
    error: str | None = None


def due_endpoints(
    connection: sa.Connection, *, per_endpoint: int, after: Endpoint | None = None, limit: int = 200
) -> DueEndpoints:
    """Look which endpoints have something due, without claiming it.

    Args:
        connection: To the database.
        per_endpoint: Posts that may be in flight to each.
        after: Where the last look ended.
        limit: Endpoints to look at.
    """
    parameters = {
        "after_tenant": after.tenant if after else "",
        "after_endpoint": after.endpoint if after else "",
        "per_endpoint": per_endpoint,
        "limit": limit,
    }
    rows = connection.execute(_DUE_ENDPOINTS, parameters).all()
    seen = [Endpoint(tenant=row.tenant, endpoint=row.endpoint) for row in rows]
    return DueEndpoints(
        open=[endpoint for endpoint, row in zip(seen, rows, strict=True) if row.open],
        last=seen[-1] if len(seen) == limit else None,
    )


def claim_deliveries(
    connection: sa.Connection,
    endpoints: Sequence[Endpoint],
    *,
    limit: int,
    per_endpoint: int,
    lease_s: float,
) -> list[Delivery]:
    """Take up to `limit` due deliveries to these endpoints, the first endpoint's first.

    Args:
        connection: In a transaction that the caller commits at once: it holds up all other claims.
        endpoints: Each at most once.
        limit: Deliveries at most.
        per_endpoint: Posts that the whole fleet may have in flight to each endpoint; to one that
            fails only one at a time.
        lease_s: Seconds after which somebody else may take them.
    """
    connection.execute(_LOCK_CLAIMS)
    parameters = {
        "tenants": [endpoint.tenant for endpoint in endpoints],
        "endpoints": [endpoint.endpoint for endpoint in endpoints],
        "limit": limit,
        "per_endpoint": per_endpoint,
        "lease_s": lease_s,
    }
    return [_delivery(row) for row in connection.execute(_CLAIM, parameters).all()]


def record_attempts(connection: sa.Connection, attempts: Sequence[Attempt]) -> dict[Verdict, int]:
    """Write down what became of claimed deliveries, and what that tells of their endpoints.

    Returns:
        How many were written with each verdict. Where the lease has lapsed and somebody else has
        the delivery, nothing was touched.
    """
    records = orjson.dumps([dataclasses.asdict(attempt) for attempt in attempts])
    rows = connection.execute(_RECORD, {"records": records.decode()})
    return {Verdict(row[0]): row[1] for row in rows}


def abandon_hopeless(connection: sa.Connection, *, give_up_s: float, limit: int = 1000) -> int:
    """Exhaust up to `limit` callbacks of endpoints that are disabled, or fail for very long.

    A failing endpoint gets one attempt a pause, and most of its callbacks wait without using up
    their own attempts: their time is up after `give_up_s` seconds.
    """
    parameters = {"give_up_s": give_up_s, "limit": limit}
    return len(connection.execute(_ABANDON, parameters).all())


def forget_endpoints(connection: sa.Connection) -> None:
    """Delete what is known of endpoints that did not fail for a week, and are not disabled."""
    connection.execute(_FORGET)


def _delivery(row: Any) -> Delivery:
    return Delivery(
        id=row.id,
        lease_until=row.lease_until,
        job_id=row.job_id,
        tenant=row.tenant,
        endpoint=row.endpoint,
        url=row.url,
        event=row.event,
        attempt=row.attempt,
        facts=None if row.state is None else _facts(row),
        payload=row.payload,
    )


def _facts(row: Any) -> ResultFacts:
    return ResultFacts(
        state=row.state,
        tier=row.tier,
        model=row.model,
        finish_reason=row.finish_reason,
        error=job_error(row.error),
        usage=Usage(
            input=row.input_tokens,
            cached=row.cached_tokens,
            output=row.output_tokens,
            reasoning=row.reasoning_tokens,
        ),
        cost_usd=row.cost_usd,
        cache=row.cache,
        attempts=row.attempts,
        metadata=row.metadata,
        finished_at=row.finished_at,
    )
