"""End jobs: state, results row, ledger and outbox in one statement, where the fence still holds."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from promptfleet_shared.jobs import Outcome
from promptfleet_shared.store.claims import error_record, lost_record, storable_text

# The response travels as a string within the records' JSON: as JSON within JSON, Postgres would
# refuse an escaped NUL in it, which a column of type json can hold as it came.
_FINISH = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        job_id uuid, held_fence bigint, state text, text text, response text, finish_reason text,
        error jsonb, model text, provider text, deployment text, input_tokens int,
        cached_tokens int, output_tokens int, reasoning_tokens int, cost_usd numeric, cache text,
        calls int, unknown_calls int, batch_id uuid, batch_size int, queued_ms float8,
        provider_ms float8, decision jsonb, saved_usd numeric,
        lost json, lost_calls int, lost_unknown_calls int)
), locked AS MATERIALIZED (
    SELECT id, fence FROM jobs JOIN input ON id = job_id
     WHERE fence = held_fence AND jobs.state IN ('running', 'submitted')
     ORDER BY id FOR UPDATE OF jobs
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
    -- A request that jobs share is counted on the first of them, and its tokens on all.
    INSERT INTO ledger (job_id, tenant, tier, model, provider, deployment, calls, unknown_calls,
                        input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost_usd,
                        metadata)
    SELECT job_id, tenant, tier, model, provider, deployment, calls - coalesce(lost_calls, 0),
           unknown_calls - coalesce(lost_unknown_calls, 0), input_tokens, cached_tokens,
           output_tokens, reasoning_tokens, cost_usd, metadata
      FROM done JOIN input ON id = job_id AND fence = held_fence
     WHERE calls > coalesce(lost_calls, 0) OR input_tokens + output_tokens > 0
), wasted AS (
    INSERT INTO ledger (job_id, tenant, tier, metadata, model, provider, deployment, calls,
                        unknown_calls, input_tokens, cached_tokens, output_tokens,
                        reasoning_tokens, cost_usd, estimated_usd, at_most_usd)
    SELECT job_id, tenant, tier, metadata, l.model, l.provider, l.deployment, l.calls,
           l.unknown_calls, l.input_tokens, l.cached_tokens, l.output_tokens, l.reasoning_tokens,
           l.cost_usd, l.estimated_usd, l.at_most_usd
      FROM done JOIN input ON id = job_id AND fence = held_fence
            CROSS JOIN LATERAL json_to_recordset(lost) AS l (
        model text, provider text, deployment text, calls int, unknown_calls int,
        input_tokens int, cached_tokens int, output_tokens int, reasoning_tokens int,
        cost_usd numeric, estimated_usd numeric, at_most_usd numeric)
     WHERE lost IS NOT NULL
), outbox AS (
    INSERT INTO callbacks (job_id, tenant, url, event)
    SELECT id, tenant, callback_url, 'prompt.' || state
      FROM done JOIN input ON id = job_id AND fence = held_fence WHERE callback_url IS NOT NULL
)
SELECT job_id FROM input EXCEPT SELECT id FROM done
""")

# The same where some of the jobs have a conversation: a turn is added with the result, if its job
# still holds the conversation. Who deletes one waits for this row's lock, and then takes all.
_FINISH_WITH_TURNS = sa.text(
    _FINISH.text.replace("decision jsonb,", "decision jsonb, memory_id text, turn text,").replace(
        "\nSELECT job_id FROM input EXCEPT",
        """, noted AS (
    UPDATE conversations SET turns = turns + 1, updated_at = clock_timestamp()
      FROM done JOIN input ON id = job_id AND fence = held_fence
     WHERE conversations.tenant = done.tenant AND conversations.memory_id = input.memory_id
       AND holder = job_id
    RETURNING conversations.tenant, conversations.memory_id, turns, job_id, turn
), remembered AS (
    INSERT INTO conversation_turns (tenant, memory_id, n, job_id, messages, bytes)
    SELECT tenant, memory_id, turns, job_id, CAST(turn AS json), octet_length(turn) FROM noted
)
SELECT job_id FROM input EXCEPT""",
    )
)


def finish(connection: sa.Connection, outcomes: Sequence[Outcome]) -> set[uuid.UUID]:
    """Write how the jobs ended; the caller commits.

    Returns:
        The jobs that were written. Where the fence had moved on, nothing was touched.
    """
    records = orjson.dumps([_record(outcome) for outcome in outcomes])
    has_turns = any(outcome.turn is not None for outcome in outcomes)
    statement = _FINISH_WITH_TURNS if has_turns else _FINISH
    refused = connection.execute(statement, {"records": records.decode()}).scalars().all()
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
    if outcome.lost:
        record |= lost_record(outcome.lost)
    if outcome.turn is not None:
        record |= {"memory_id": outcome.turn.memory_id, "turn": outcome.turn.messages.decode()}
    return record
