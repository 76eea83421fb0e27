"""Read what became of jobs, and ask for their cancellation."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from promptfleet_shared.jobs import (
    CacheStatus,
    JobError,
    JobState,
    Result,
    Usage,
)
from promptfleet_shared.store.tables import jobs, results

# A queued job ends here and now, and so does one whose provider's batch is still gathering; a
# running one is told so with its next heartbeat. What a provider may have already, the next sweep
# ends: its call is counted, and its answer will be nobody's.
_CANCEL = sa.text("""
WITH locked AS MATERIALIZED (
    SELECT id AS job_id,
           state = 'queued' OR (state = 'submitted' AND claim_calls = 0) AS ends_now
      FROM jobs WHERE id = ANY(:ids) AND tenant = :tenant AND finished_at IS NULL
     ORDER BY id FOR UPDATE
), asked AS (
    UPDATE jobs SET cancel_requested = true,
           state = CASE WHEN ends_now THEN 'cancelled' ELSE state END,
           finished_at = CASE WHEN ends_now THEN clock_timestamp() END,
           sweep_at = CASE WHEN state = 'submitted' THEN least(sweep_at, clock_timestamp())
                           ELSE sweep_at END
      FROM locked WHERE id = job_id
    RETURNING id, tenant, tier, state, attempt, calls, unknown_calls, metadata, callback_url,
              created_at, finished_at, batch_id, decision
), result AS (
    INSERT INTO results (job_id, tenant, tier, state, attempts, calls, unknown_calls, total_ms,
                         metadata, created_at, finished_at, api_batch_id, decision)
    SELECT id, tenant, tier, state, attempt, calls, unknown_calls,
           extract(epoch FROM finished_at - created_at)::float8 * 1000, metadata, created_at,
           finished_at, batch_id, decision
      FROM asked WHERE finished_at IS NOT NULL
), outbox AS (
    INSERT INTO callbacks (job_id, tenant, url, event)
    SELECT id, tenant, callback_url, 'prompt.cancelled'
      FROM asked WHERE finished_at IS NOT NULL AND callback_url IS NOT NULL
)
SELECT id FROM asked
""")

RESULT_COLUMNS = [
    column for column in results.c if column.name not in {"tenant", "landed", "api_batch_id"}
]
"""What a `Result` is made of."""


def states(
    connection: sa.Connection, ids: Sequence[uuid.UUID], *, tenant: str
) -> dict[uuid.UUID, JobState]:
    """The state of each of the jobs that exist."""
    query = sa.select(jobs.c.id, jobs.c.state).where(
        jobs.c.id == sa.any_(sa.literal(list(ids), sa.ARRAY(sa.Uuid))), jobs.c.tenant == tenant
    )
    return {row[0]: JobState(row[1]) for row in connection.execute(query)}


def read_results(
    connection: sa.Connection, ids: Sequence[uuid.UUID], *, tenant: str
) -> dict[uuid.UUID, Result]:
    """The results of those of the jobs that are final."""
    query = sa.select(*RESULT_COLUMNS).where(
        results.c.job_id == sa.any_(sa.literal(list(ids), sa.ARRAY(sa.Uuid))),
        results.c.tenant == tenant,
    )
    return {row.job_id: result_of(row) for row in connection.execute(query)}


def request_cancel(
    connection: sa.Connection, ids: Sequence[uuid.UUID], *, tenant: str
) -> set[uuid.UUID]:
    """Ask for the cancellation of jobs; the caller commits.

    Returns:
        Those that were not final yet.
    """
    return set(connection.execute(_CANCEL, {"ids": list(ids), "tenant": tenant}).scalars())


def job_error(record: dict[str, Any] | None) -> JobError | None:
    """A job's error from its JSON column."""
    if record is None:
        return None
    return JobError(code=record["code"], message=record["message"], status=record.get("status"))


def result_of(row: Any) -> Result:
    """A result from its row."""
    return Result(
        job_id=row.job_id,
        state=JobState(row.state),
        tier=row.tier,
        text=row.text,
        response=row.response,
        finish_reason=row.finish_reason,
        error=job_error(row.error),
        model=row.model,
        provider=row.provider,
        deployment=row.deployment,
        usage=Usage(
            input=row.input_tokens,
            cached=row.cached_tokens,
            output=row.output_tokens,
            reasoning=row.reasoning_tokens,
        ),
        cost_usd=row.cost_usd,
        cache=CacheStatus(row.cache),
        attempts=row.attempts,
        calls=row.calls,
        batch_id=row.batch_id,
        batch_size=row.batch_size,
        queued_ms=row.queued_ms,
        provider_ms=row.provider_ms,
        total_ms=row.total_ms,
        metadata=row.metadata or {},
        created_at=row.created_at,
        finished_at=row.finished_at,
        unknown_calls=row.unknown_calls,
        decision=row.decision,
        saved_usd=row.saved_usd,
    )
