"""Hold jobs: claim, heartbeat, release. Only the database's clock counts."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
import sqlalchemy as sa

from promptfleet_shared.jobs import (
    NO_POLICY,
    CacheMode,
    CacheOptions,
    ClaimedJob,
    Doorbell,
    JobError,
    JobKind,
    LostCall,
    OnUnknown,
    Release,
)

LEASE_S = 45.0
"""Seconds that a claim lasts without a heartbeat."""

DEADLINE_GRACE_S = 15.0
"""Seconds after its deadline that a job's lease can still be extended to: a worker that hangs must
not keep it for ever."""

CLAIMED_COLUMNS = """id, fence, tenant, tier, kind, model, request::text, input_tokens, priority,
          cache, attempt, deferrals, calls, on_unknown,
          greatest(0, extract(epoch FROM clock_timestamp() - run_at))::float8 * 1000 AS queued_ms,
          extract(epoch FROM deadline - clock_timestamp())::float8 AS remaining_s, stream,
          callback_url IS NOT NULL AS has_callback, crashes, policy,
          decision, concurrency_key"""
"""What `claimed_job` reads, in its order; of `jobs`."""

# Locking in the order of ids, and passing over what somebody else is claiming this very moment,
# makes any number of claimers free of deadlocks. `sweep_at` moves only where it would come later
# than the lease ends: in the usual case no indexed column changes and Postgres updates in place.
# A lapsed lease is the sweeper's to judge, and nobody else's: one place that counts what was lost.
_CLAIM = sa.text(f"""
WITH runnable AS MATERIALIZED (
    SELECT id AS job_id FROM jobs
     WHERE id = ANY(CAST(:ids AS uuid[])) AND state = 'queued' AND run_at <= clock_timestamp()
       AND NOT cancel_requested AND deadline > clock_timestamp()
     ORDER BY id FOR UPDATE SKIP LOCKED)
UPDATE jobs SET state = 'running', fence = fence + 1, attempt = attempt + 1,
       -- The first call needs no word from the worker, unless it must be known for sure.
       claim_calls = CASE on_unknown WHEN 'fail' THEN 0 ELSE 1 END,
       lease_owner = :worker, lease_until = clock_timestamp() + :lease_s * interval '1 second',
       sweep_at = least(sweep_at, clock_timestamp() + :lease_s * interval '1 second')
  FROM runnable WHERE id = job_id
RETURNING {CLAIMED_COLUMNS}
""")  # noqa: S608 - nothing of a caller's

# Beats come often, to hear of cancellations, but write only where a third of the lease is over:
# a job that ends before then costs no write.
_HEARTBEAT = sa.text("""
WITH held AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:fences AS bigint[])) AS h (job_id, held_fence)
), late AS MATERIALIZED (
    SELECT id FROM jobs JOIN held ON id = job_id
     WHERE fence = held_fence AND state = 'running'
       AND lease_until < clock_timestamp() + :lease_s * interval '1 second' * 2 / 3
     ORDER BY id FOR UPDATE OF jobs
), extended AS (
    UPDATE jobs SET lease_until = least(
               clock_timestamp() + :lease_s * interval '1 second',
               greatest(lease_until, deadline + :grace_s * interval '1 second'))
      FROM late WHERE jobs.id = late.id
)
SELECT id, cancel_requested FROM jobs JOIN held ON id = job_id
 WHERE fence = held_fence AND state = 'running'
""").bindparams(grace_s=DEADLINE_GRACE_S)

_BEGIN_CALLS = sa.text("""
WITH held AS (
    SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:fences AS bigint[]), CAST(:calls AS int[]))
               AS h (job_id, held_fence, begun)
), locked AS MATERIALIZED (
    SELECT id, begun, cancel_requested FROM jobs JOIN held ON id = job_id
     WHERE fence = held_fence AND state = 'running' AND lease_until > clock_timestamp()
     ORDER BY id FOR UPDATE OF jobs
), noted AS (
    UPDATE jobs SET claim_calls = greatest(claim_calls, begun)
      FROM locked WHERE jobs.id = locked.id AND NOT locked.cancel_requested
)
SELECT id, cancel_requested FROM locked
""")

_RELEASE = sa.text("""
WITH input AS (
    SELECT * FROM json_to_recordset(CAST(:records AS json)) AS r (
        job_id uuid, held_fence bigint, delay_s float8, counts boolean,
        calls int, unknown_calls int, error jsonb, tier text,
        decision jsonb, model text, provider text, deployment text, input_tokens int,
        cached_tokens int, output_tokens int, reasoning_tokens int, cost_usd numeric,
        lost json, lost_calls int, lost_unknown_calls int)
), locked AS MATERIALIZED (
    SELECT id, jobs.tier AS was_tier, input.* FROM jobs JOIN input ON id = job_id
     WHERE fence = held_fence AND state IN ('running', 'submitted')
     ORDER BY id FOR UPDATE OF jobs
), released AS (
    UPDATE jobs SET state = 'queued', lease_owner = NULL, lease_until = NULL, claim_calls = 0,
           run_at = clock_timestamp() + locked.delay_s * interval '1 second',
           sweep_at = CASE WHEN cancel_requested THEN clock_timestamp() ELSE least(deadline,
                      clock_timestamp() + locked.delay_s * interval '1 second') END,
           attempt = attempt - CASE WHEN locked.counts THEN 0 ELSE 1 END,
           deferrals = deferrals + CASE WHEN locked.counts OR locked.tier IS NOT NULL
                                        THEN 0 ELSE 1 END,
           calls = jobs.calls + locked.calls,
           unknown_calls = jobs.unknown_calls + locked.unknown_calls,
           last_error = coalesce(locked.error, last_error),
           tier = coalesce(locked.tier, jobs.tier),
           decision = CASE WHEN locked.decision IS NULL THEN jobs.decision
                           ELSE coalesce(jobs.decision, '{}') || locked.decision END
      FROM locked WHERE jobs.id = locked.id
    RETURNING jobs.id, tenant, jobs.tier, priority, concurrency_key, locked.calls,
              locked.unknown_calls,
              was_tier, locked.model, locked.provider, locked.deployment, locked.input_tokens,
              cached_tokens, output_tokens, reasoning_tokens, cost_usd, metadata, lost,
              lost_calls, lost_unknown_calls
), paid AS (
    INSERT INTO ledger (job_id, tenant, tier, calls, unknown_calls, model, provider, deployment,
                        input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost_usd,
                        metadata)
    SELECT id, tenant, was_tier, calls - coalesce(lost_calls, 0),
           unknown_calls - coalesce(lost_unknown_calls, 0), model, provider, deployment,
           coalesce(input_tokens, 0), coalesce(cached_tokens, 0), coalesce(output_tokens, 0),
           coalesce(reasoning_tokens, 0), cost_usd, metadata
      FROM released
     WHERE calls > coalesce(lost_calls, 0) OR input_tokens + output_tokens > 0
), wasted AS (
    INSERT INTO ledger (job_id, tenant, tier, metadata, model, provider, deployment, calls,
                        unknown_calls, input_tokens, cached_tokens, output_tokens,
                        reasoning_tokens, cost_usd, estimated_usd, at_most_usd)
    SELECT id, tenant, was_tier, metadata, l.model, l.provider, l.deployment, l.calls,
           l.unknown_calls, l.input_tokens, l.cached_tokens, l.output_tokens, l.reasoning_tokens,
           l.cost_usd, l.estimated_usd, l.at_most_usd
      FROM released CROSS JOIN LATERAL json_to_recordset(lost) AS l (
        model text, provider text, deployment text, calls int, unknown_calls int,
        input_tokens int, cached_tokens int, output_tokens int, reasoning_tokens int,
        cost_usd numeric, estimated_usd numeric, at_most_usd numeric)
     WHERE lost IS NOT NULL
)
SELECT id, tier, priority, tenant, concurrency_key FROM released
""")

_NO_CACHE_OPTIONS = CacheOptions()


def claim(
    connection: sa.Connection,
    ids: Sequence[uuid.UUID],
    *,
    worker: str,
    lease_s: float = LEASE_S,
) -> list[ClaimedJob]:
    """Take those of the jobs that may run now, for `lease_s` seconds.

    An id that can't be claimed (running, final, not due, cancelled, overdue) is left out: its
    doorbell was stale.
    """
    # As one text: the driver would look up how to write each id by itself.
    array = "{" + ",".join([job_id.hex for job_id in ids]) + "}"
    rows = connection.execute(_CLAIM, {"ids": array, "worker": worker, "lease_s": lease_s})
    return [claimed_job(row) for row in rows.all()]  # fetching one by one costs twice as much


def claimed_job(row: Any) -> ClaimedJob:
    """The job of a row that begins with `CLAIMED_COLUMNS`."""
    return ClaimedJob(
        id=row[0],
        fence=row[1],
        tenant=row[2],
        tier=row[3],
        kind=JobKind(row[4]),
        model=row[5],
        request=row[6],
        input_tokens=row[7],
        priority=row[8],
        cache=_cache_options(row[9]),
        attempt=row[10],
        deferrals=row[11],
        calls=row[12],
        on_unknown=OnUnknown(row[13]),
        queued_ms=row[14],
        remaining_s=row[15],
        stream=row[16],
        has_callback=row[17],
        crashes=row[18],
        policy=row[19] or NO_POLICY,
        decision=row[20] or NO_POLICY,
        concurrency_key=row[21],
    )


def doorbell(row: Any) -> Doorbell:
    """The doorbell of a row that has the job's `tier`, `priority`, `tenant` and key."""
    return Doorbell(
        job_id=row.id,
        tier=row.tier,
        priority=row.priority,
        tenant=row.tenant,
        concurrency_key=row.concurrency_key,
    )


def _cache_options(record: dict[str, Any] | None) -> CacheOptions:
    if record is None:
        return _NO_CACHE_OPTIONS
    return CacheOptions(
        mode=CacheMode(record["mode"]), ttl_s=record["ttl_s"], namespace=record["namespace"]
    )


def heartbeat(
    connection: sa.Connection, held: Mapping[uuid.UUID, int], *, lease_s: float = LEASE_S
) -> dict[uuid.UUID, bool]:
    """Extend the leases of all the jobs that a worker holds.

    Args:
        connection: In a transaction that the caller commits.
        held: The fence of each job.
        lease_s: Seconds from now.

    Returns:
        For each job that is still held, whether its cancellation was asked for. A job that is
        missing is somebody else's by now: abort it.
    """
    parameters = {"ids": list(held), "fences": list(held.values()), "lease_s": lease_s}
    return {row[0]: row[1] for row in connection.execute(_HEARTBEAT, parameters)}


def begin_calls(
    connection: sa.Connection, begun: Mapping[uuid.UUID, tuple[int, int]]
) -> dict[uuid.UUID, bool]:
    """Write down, before a call is made, how many calls a claim will have begun with it.

    What a claim has begun is charged to its job should its worker be lost. The first call is
    charged by the claim itself, except for jobs that must not be called twice.

    Args:
        connection: In a transaction that the caller commits.
        begun: For each job the fence of its claim and the number of calls, this one included.

    Returns:
        For each job that is still held, whether its cancellation was asked for: then nothing was
        written down, and it must not be called. A job that is missing is lost: abort it.
    """
    parameters = {
        "ids": list(begun),
        "fences": [fence for fence, _ in begun.values()],
        "calls": [calls for _, calls in begun.values()],
    }
    return {row[0]: row[1] for row in connection.execute(_BEGIN_CALLS, parameters)}


def release(connection: sa.Connection, releases: Iterable[Release]) -> list[Doorbell]:
    """Give claims back; where the fence has moved on, nothing happens.

    Returns:
        The doorbells to ring once each job's delay is over.
    """
    records = [_release_record(item) for item in releases]
    rows = connection.execute(_RELEASE, {"records": orjson.dumps(records).decode()})
    return [doorbell(row) for row in rows]


def _release_record(item: Release) -> dict[str, Any]:
    return {
        "job_id": item.job_id,
        "held_fence": item.fence,
        "delay_s": item.delay_s,
        "counts": item.counts,
        "calls": item.calls,
        "unknown_calls": item.unknown_calls,
        "error": error_record(item.error),
        "tier": item.tier,
        "decision": item.decision,
        **(_paid_record(item) if item.model is not None else _NOT_PAID),
        **lost_record(item.lost),
    }


_NOT_PAID: dict[str, Any] = {}


def _paid_record(item: Release) -> dict[str, Any]:
    return {
        "model": item.model,
        "provider": item.provider,
        "deployment": item.deployment,
        "input_tokens": item.usage.input,
        "cached_tokens": item.usage.cached,
        "output_tokens": item.usage.output,
        "reasoning_tokens": item.usage.reasoning,
        "cost_usd": None if item.cost_usd is None else str(item.cost_usd),
    }


def lost_record(lost: Sequence[LostCall]) -> dict[str, Any]:
    """The calls of a claim that gave no answer, as the statements that end claims read them."""
    if not lost:
        return _NOT_PAID
    return {
        "lost": [_lost_call(call) for call in lost],
        "lost_calls": sum(call.calls for call in lost),
        "lost_unknown_calls": sum(call.unknown_calls for call in lost),
    }


def _lost_call(call: LostCall) -> dict[str, Any]:
    prices = {
        "cost_usd": call.cost_usd,
        "estimated_usd": call.estimated_usd,
        "at_most_usd": call.at_most_usd,
    }
    return {
        "model": call.model,
        "provider": call.provider,
        "deployment": call.deployment,
        "calls": call.calls,
        "unknown_calls": call.unknown_calls,
        "input_tokens": call.usage.input,
        "cached_tokens": call.usage.cached,
        "output_tokens": call.usage.output,
        "reasoning_tokens": call.usage.reasoning,
        **{name: str(price) for name, price in prices.items() if price is not None},
    }


def error_record(error: JobError | None) -> dict[str, Any] | None:
    """A job's error as JSON columns keep it."""
    if error is None:
        return None
    return {"code": error.code, "message": storable_text(error.message), "status": error.status}


def storable_text(text: str | None) -> str | None:
    """The text as Postgres can hold it: NUL and lone surrogates become U+FFFD."""
    if text is None or (text.isascii() and "\0" not in text):
        return text
    return (
        text.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )
