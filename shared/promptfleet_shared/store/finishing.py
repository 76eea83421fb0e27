"""End jobs: state, results row, ledger and outbox in one statement, where the fence still holds."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from promptfleet_shared.jobs import Outcome
from promptfleet_shared.store.claims import error_record, storable_text

# The response travels as a string within the records' JSON: as JSON within JSON, Postgres would
# refuse an escaped NUL in it, which a column of type json can hold as it came.
_FINISH = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        job_id uuid, held_fence bigint, state text, text text, response text, finish_reason text,
        error jsonb, model text, provider text, deployment text, input_tokens int,
        cached_tokens int, output_tokens int, reasoning_tokens int, cost_usd numeric, cache text,
        calls int, unknown_calls int, batch_id uuid, batch_size int, queued_ms float8,
        provider_ms float8, decision jsonb, saved_usd numeric)
), locked AS MATERIALIZED (
    SELECT id, fence FROM jobs JOIN input ON id = job_id
     WHERE fence = held_fence AND jobs.state = 'running' ORDER BY id FOR UPDATE OF jobs
), done AS (
    UPDATE jobs SET state = input.state, finished_at = clock_timestamp(), lease_owner = NULL,
           lease_until = NULL, claim_calls = 0, calls = jobs.calls + input.calls,
           unknown_calls = jobs.unknown_calls + input.unknown_calls,
           last_error = coalesce(input.error, last_error)
      FROM locked JOIN input ON locked.id = job_id AND locked.fence = held_fence
     WHERE jobs.id = locked.id
    RETURNING jobs.id, jobs.fence, tenant, tier, attempt, jobs.calls AS all_calls,
              jobs.unknown_calls AS all_unknown_calls, metadata, callback_url, created_at,
              finished_at, jobs.batch_id AS api_batch_id, jobs.decision AS decided
), result AS (
    INSERT INTO results (job_id, tenant, tier, state, text, response, finish_reason, error, model,
                         provider, deployment, input_tokens, cached_tokens, output_tokens,
                         reasoning_tokens, cost_usd, cache, attempts, calls, batch_id, batch_size,
                         queued_ms, provider_ms, total_ms, metadata, created_at, finished_at,
                         unknown_calls, api_batch_id, decision, saved_usd)
    SELECT job_id, tenant, tier, state, text, CAST(response AS json), finish_reason, error, model,
           provider, deployment, input_tokens, cached_tokens, output_tokens, reasoning_tokens,
           cost_usd, cache, attempt, all_calls, batch_id, batch_size, queued_ms, provider_ms,
           extract(epoch FROM finished_at - created_at)::float8 * 1000, metadata, created_at,
           finished_at, all_unknown_calls, api_batch_id,
           CASE WHEN decided IS NULL THEN decision ELSE decided || coalesce(decision, '{}') END,
           saved_usd
      FROM done JOIN input ON id = job_id AND fence = held_fence
), paid AS (
    INSERT INTO ledger (job_id, tenant, tier, model, provider, deployment, calls, unknown_calls,
                        input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost_usd)
    SELECT job_id, tenant, tier, model, provider, deployment, calls, unknown_calls, input_tokens,
           cached_tokens, output_tokens, reasoning_tokens, cost_usd
      FROM done JOIN input ON id = job_id AND fence = held_fence WHERE calls > 0
), outbox AS (
    INSERT INTO callbacks (job_id, tenant, url, event)
    SELECT id, tenant, callback_url, 'prompt.' || state
      FROM done JOIN input ON id = job_id AND fence = held_fence WHERE callback_url IS NOT NULL
)
SELECT job_id FROM input EXCEPT SELECT id FROM done
""")


def finish(connection: sa.Connection, outcomes: Sequence[Outcome]) -> set[uuid.UUID]:
    """Write how the jobs ended; the caller commits.

    Returns:
        The jobs that were written. Where the fence had moved on, nothing was touched.
    """
    records = orjson.dumps([_record(outcome) for outcome in outcomes])
    refused = connection.execute(_FINISH, {"records": records.decode()}).scalars().all()
    return {outcome.job_id for outcome in outcomes}.difference(refused)


def _record(outcome: Outcome) -> dict[str, Any]:
    record: dict[str, Any] = {
        "job_id": outcome.job_id,
        "held_fence": outcome.fence,
        "state": outcome.state,
        "input_tokens": outcome.usage.input,
        "cached_tokens": outcome.usage.cached,
        "output_tokens": outcome.usage.output,
        "reasoning_tokens": outcome.usage.reasoning,
        "cache": outcome.cache,
        "calls": outcome.calls,
        "unknown_calls": outcome.unknown_calls,
        "batch_size": outcome.batch_size,
        "queued_ms": outcome.queued_ms,
    }
    # Absent keys are NULL, and cheaper to read than nulls.
    optional = {
        "text": storable_text(outcome.text),
        "response": None if outcome.response is None else outcome.response.decode(),
        "finish_reason": outcome.finish_reason,
        "error": error_record(outcome.error),
        "model": outcome.model,
        "provider": outcome.provider,
        "deployment": outcome.deployment,
        "cost_usd": None if outcome.cost_usd is None else str(outcome.cost_usd),
        "batch_id": outcome.batch_id,
        "provider_ms": outcome.provider_ms,
        "decision": outcome.decision or None,
        "saved_usd": None if outcome.saved_usd is None else str(outcome.saved_usd),
    }
    record.update((name, value) for name, value in optional.items() if value is not None)
    return record
