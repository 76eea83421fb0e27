"""Call the next turn of a conversation when one ends, in the transaction that writes its end.

A job whose turn it is not yet is given back, and sleeps until it is called. Two transactions may
meet: one that ends a turn, and one that gives the next job back. Each locks the conversation first
and looks for the next turn last, so whichever comes second sees what the other one did: either the
end finds the sleeping job and wakes it, or the sleeper finds that nobody is before it any more.

What no statement here sees (a turn that is cancelled while it waits, a doorbell that is lost, a
conversation that was deleted meanwhile), the sweeper rings for when the sleeper's time is over.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import sqlalchemy as sa

from promptfleet_shared.jobs import Doorbell, Outcome, Release
from promptfleet_shared.store.claims import doorbell, release
from promptfleet_shared.store.finishing import finish

RING_AGAIN_S = 5.0
"""Seconds after which the sweeper rings once more for a job that was called."""

# In one order, so that nobody waits in a circle. Those who give back keep out those who end a turn
# and nobody else: neither each other nor the job that takes the conversation.
_LOCK = """
SELECT FROM conversations c
 WHERE (c.tenant, c.memory_id) IN (
           SELECT tenant, policy ->> 'memory_id' FROM jobs
            WHERE id = ANY(CAST(:ids AS uuid[])) AND (policy ->> 'memory_id') IS NOT NULL)
 ORDER BY c.tenant, c.memory_id FOR {strength} OF c
"""
_LOCK_TO_END, _LOCK_TO_WAIT = (
    sa.text(_LOCK.format(strength=strength)) for strength in ("UPDATE", "KEY SHARE")
)

# A job that has failed sleeps for a reason of its own, and one that was never given back may have
# been told to start later. What somebody else has locked is passed over: it is being looked at.
_CALL = sa.text("""
WITH spoken AS (
    SELECT DISTINCT tenant, policy ->> 'memory_id' AS memory_id FROM jobs
     WHERE id = ANY(CAST(:ids AS uuid[])) AND (policy ->> 'memory_id') IS NOT NULL
), first AS MATERIALIZED (
    SELECT next.id AS job_id FROM spoken
           CROSS JOIN LATERAL (
               SELECT id FROM jobs
                WHERE jobs.tenant = spoken.tenant AND (jobs.policy ->> 'memory_id') IS NOT NULL
                  AND (jobs.policy ->> 'memory_id') = spoken.memory_id AND finished_at IS NULL
                ORDER BY id LIMIT 1) AS next
           LEFT JOIN conversations c
           ON c.tenant = spoken.tenant AND c.memory_id = spoken.memory_id
     WHERE NOT EXISTS (
               SELECT FROM jobs WHERE id = c.holder AND id <> next.id
                  AND (state = 'running' AND fence = c.holder_fence OR state = 'submitted'))
), asleep AS MATERIALIZED (
    SELECT id FROM jobs JOIN first ON id = job_id
     WHERE state = 'queued' AND run_at > clock_timestamp() AND deferrals > 0
       AND last_error IS NULL AND NOT cancel_requested AND deadline > clock_timestamp()
     ORDER BY id FOR UPDATE OF jobs SKIP LOCKED
)
UPDATE jobs SET run_at = clock_timestamp(), rung_at = clock_timestamp(),
       sweep_at = least(deadline, clock_timestamp() + :again_s * interval '1 second')
  FROM asleep WHERE jobs.id = asleep.id
RETURNING jobs.id, tier, priority, tenant, concurrency_key
""").bindparams(again_s=RING_AGAIN_S)


def finish_turns(
    connection: sa.Connection, outcomes: Sequence[Outcome]
) -> tuple[set[uuid.UUID], list[Doorbell]]:
    """As `finish`, and the doorbells of those whose turn has come by it; the caller commits.

    Where none of the jobs is `in_conversation`, it is `finish` and nothing else.
    """
    ids = [outcome.job_id for outcome in outcomes if outcome.in_conversation]
    if not ids:
        return finish(connection, outcomes), []
    connection.execute(_LOCK_TO_END, {"ids": ids})
    return finish(connection, outcomes), call_next(connection, ids)


def release_turns(
    connection: sa.Connection, releases: Sequence[Release]
) -> tuple[list[Doorbell], list[Doorbell]]:
    """As `release`, and the doorbells of those that need not wait for their turn any more.

    Where none of the jobs `waits_turn`, it is `release` and nothing else.
    """
    ids = [item.job_id for item in releases if item.waits_turn]
    if not ids:
        return release(connection, releases), []
    connection.execute(_LOCK_TO_WAIT, {"ids": ids})
    return release(connection, releases), call_next(connection, ids)


def call_next(connection: sa.Connection, ids: Sequence[uuid.UUID]) -> list[Doorbell]:
    """Wake the first unfinished job of each conversation that these jobs are of, if it sleeps.

    Returns:
        What to ring once the caller has committed.
    """
    return [doorbell(row) for row in connection.execute(_CALL, {"ids": list(ids)})]
