"""Keep the promise when somebody died: one timer a job, looked at by any number of sweepers."""

from __future__ import annotations

import dataclasses
import enum
import uuid
from collections.abc import Collection

import sqlalchemy as sa

from promptfleet_shared.jobs import Doorbell
from promptfleet_shared.store.claims import doorbell
from promptfleet_shared.store.turns import call_next

MAX_CRASHES = 3
"""Lost leases after which a job is taken for the cause: `failed`, code `poison`."""
RING_BACKOFF_S = 30
RING_BACKOFF_MAX_S = 300
FAIR_AMONG = 200_000
"""Due jobs among which tenants take turns: a fifth of a second of Postgres' time for so many."""


class Order(enum.Enum):
    """Which of the due jobs come first.

    A tenant's backlog may be due all at once, and stand before everybody else's jobs for minutes.
    """

    OLDEST = "oldest"  # whose timer was due first
    NEWEST = "newest"  # last
    FAIR = "fair"  # each tenant's oldest, then each one's second oldest, and so on


# Each due job gets a verdict. Final ones get their results row (and callback) here and now;
# queued ones are rung again after 30 s, 60 s, 120 s … so that a long backlog is not rung to death.
# The clock is read once: a lease that ends between two looks at it would be over for one column of
# its row, and go on for the next.
_SWEEP = """
WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now), due AS MATERIALIZED (
    SELECT id AS job_id, (SELECT now FROM clock) AS now,
           state = 'running' AND lease_until < (SELECT now FROM clock) AS lapsed,
           -- What a lost claim had begun to call may have been answered, and billed.
           CASE WHEN state = 'running' AND lease_until < (SELECT now FROM clock)
                  OR state = 'submitted' AND (cancel_requested
                     OR deadline <= (SELECT now FROM clock)
                     OR run_at <= (SELECT now FROM clock) AND on_unknown <> 'fail')
                THEN claim_calls ELSE 0 END AS charged, CASE
               WHEN state = 'running' AND lease_until >= (SELECT now FROM clock) THEN 'alive'
               WHEN cancel_requested THEN 'cancelled'
               WHEN deadline <= (SELECT now FROM clock) THEN 'expired'
               WHEN state = 'running' AND crashes + 1 >= :max_crashes THEN 'poison'
               WHEN state = 'running' AND on_unknown = 'fail' AND claim_calls > 0 THEN 'unknown'
               WHEN state = 'running' THEN 'lost'
               -- `run_at` is when a provider's batch has had it for long enough. What must not be
               -- called twice waits on, once the provider may have it.
               WHEN state = 'submitted' AND (run_at > (SELECT now FROM clock)
                    OR on_unknown = 'fail' AND claim_calls > 0) THEN 'alive'
               WHEN state = 'submitted' THEN 'spill'
               WHEN id = ANY(CAST(:parked AS uuid[])) THEN 'parked'
               ELSE 'ring' END AS verdict
      FROM jobs WHERE finished_at IS NULL AND sweep_at <= (SELECT now FROM clock) {among}
     ORDER BY sweep_at LIMIT :limit FOR UPDATE SKIP LOCKED
), moved AS (
    UPDATE jobs SET
           state = CASE verdict WHEN 'alive' THEN state WHEN 'cancelled' THEN 'cancelled'
                   WHEN 'expired' THEN 'expired' WHEN 'poison' THEN 'failed'
                   WHEN 'unknown' THEN 'failed' ELSE 'queued' END,
           finished_at = CASE WHEN verdict IN ('cancelled', 'expired', 'poison', 'unknown')
                         THEN clock_timestamp() END,
           calls = calls + charged, unknown_calls = unknown_calls + charged,
           claim_calls = CASE WHEN verdict = 'alive' THEN claim_calls ELSE 0 END,
           -- A lost lease counts as a crash and not as an attempt; what a provider's batch was too
           -- slow for is neither.
           crashes = crashes + CAST(lapsed AS int),
           attempt = attempt - CAST(lapsed OR verdict = 'spill' AS int),
           deferrals = deferrals + CAST(verdict = 'spill' AS int),
           -- A lost claim is fenced off at once, so that a zombie's late result can't land.
           fence = fence + CAST(lapsed OR verdict = 'spill' AS int),
           policy = CASE WHEN verdict = 'spill'
                    THEN coalesce(policy, '{{}}') || '{{"service": "standard"}}' ELSE policy END,
           lease_owner = CASE WHEN verdict = 'alive' THEN lease_owner END,
           lease_until = CASE WHEN verdict = 'alive' THEN lease_until END,
           rings = rings + CASE WHEN verdict IN ('ring', 'lost', 'spill') THEN 1 ELSE 0 END,
           rung_at = CASE WHEN verdict IN ('ring', 'lost', 'spill') THEN clock_timestamp()
                     ELSE rung_at END,
           last_error = CASE verdict WHEN 'poison' THEN jsonb_build_object(
                'code', 'poison', 'message', 'the job''s worker was lost too often')
                WHEN 'unknown' THEN jsonb_build_object('code', 'unknown_outcome', 'message',
                'the job''s worker was lost in mid-call, and the job must not be called twice')
                WHEN 'expired' THEN jsonb_build_object(
                'code', 'expired', 'message', 'the deadline passed before the job succeeded')
                ELSE last_error END,
           sweep_at = CASE verdict WHEN 'alive' THEN coalesce(lease_until, CASE
                     WHEN run_at > now THEN least(run_at, deadline)
                     ELSE deadline END)
                -- Its doorbell waits its turn, and is not lost.
                WHEN 'parked' THEN least(deadline,
                     clock_timestamp() + interval '1 second' * :parked_s)
                ELSE least(deadline, clock_timestamp() + interval '1 second' *
                     least(:backoff_max_s, :backoff_s * 2 ^ least(rings, 10))) END
      FROM due WHERE id = job_id
    RETURNING jobs.*, verdict, charged
), result AS (
    INSERT INTO results (job_id, tenant, tier, state, error, attempts, calls, unknown_calls,
                         total_ms, metadata, created_at, finished_at, api_batch_id, decision)
    SELECT id, tenant, tier, state, CASE WHEN state <> 'cancelled' THEN last_error END, attempt,
           calls, unknown_calls,
           extract(epoch FROM finished_at - created_at)::float8 * 1000, metadata, created_at,
           finished_at, batch_id, decision
      FROM moved WHERE finished_at IS NOT NULL
), paid AS (
    INSERT INTO ledger (job_id, tenant, tier, calls, unknown_calls, metadata)
    SELECT id, tenant, tier, charged, charged, metadata FROM moved WHERE charged > 0
), outbox AS (
    INSERT INTO callbacks (job_id, tenant, url, event)
    SELECT id, tenant, callback_url, 'prompt.' || state
      FROM moved WHERE finished_at IS NOT NULL AND callback_url IS NOT NULL
)
SELECT id, tier, priority, tenant, concurrency_key, verdict, charged,
       finished_at IS NOT NULL AND (policy ->> 'memory_id') IS NOT NULL AS was_turn FROM moved
"""

# Each tenant's first jobs; what somebody else has locked is not replaced by what comes after it.
_FAIR = """ AND id IN (
    SELECT id FROM (
        SELECT id, sweep_at, row_number() OVER (PARTITION BY tenant ORDER BY sweep_at) AS place
          FROM (SELECT id, tenant, sweep_at FROM jobs WHERE {due}
                 ORDER BY sweep_at LIMIT :among) AS oldest) AS placed
     ORDER BY place, sweep_at LIMIT :limit)"""

# For a tier whose queue is empty although jobs are due: their doorbells are lost (or under way,
# which the few seconds since the last ring rule out), so nobody waits for the back-off.
_IS_IDLE = """finished_at IS NULL AND state = 'queued' AND tier = :tier
   AND NOT cancel_requested AND run_at <= clock_timestamp()
   AND rung_at < clock_timestamp() - :silence_s * interval '1 second'"""
_RING_IDLE = """
WITH silent AS MATERIALIZED (
    SELECT id AS job_id FROM jobs WHERE {due} {among}
     ORDER BY sweep_at {order} LIMIT :limit FOR UPDATE SKIP LOCKED)
UPDATE jobs SET rings = rings + 1, rung_at = clock_timestamp() FROM silent WHERE id = job_id
RETURNING id, tier, priority, tenant, concurrency_key
"""

# What a sweep would ring for: asked before, where doorbells are known to wait their turn.
# The clock is read in a query of its own, so that the index is searched for what it says.
_IS_SILENT = """finished_at IS NULL AND sweep_at <= (SELECT clock_timestamp())
   AND state = 'queued'
   AND NOT cancel_requested AND deadline > clock_timestamp()"""
_SILENT = """
SELECT id, tier, priority, tenant, concurrency_key FROM jobs WHERE {due} {among}
 ORDER BY sweep_at {order} LIMIT :limit
"""


def _in_order(statement: str, order: Order, due: str) -> sa.TextClause:
    among = _FAIR.format(due=due) if order is Order.FAIR else ""
    direction = "DESC" if order is Order.NEWEST else "ASC"
    text = sa.text(statement.format(due=due, among=among, order=direction))
    return text.bindparams(among=FAIR_AMONG) if among else text


_IS_DUE = "finished_at IS NULL AND sweep_at <= (SELECT now FROM clock)"
_SWEEPS = {
    order: _in_order(_SWEEP, order, _IS_DUE).bindparams(
        max_crashes=MAX_CRASHES, backoff_s=RING_BACKOFF_S, backoff_max_s=RING_BACKOFF_MAX_S
    )
    for order in (Order.OLDEST, Order.FAIR)
}
_RINGS = {order: _in_order(_RING_IDLE, order, _IS_IDLE) for order in Order}
_SILENCE = {order: _in_order(_SILENT, order, _IS_SILENT) for order in (Order.OLDEST, Order.FAIR)}

_PRUNE = sa.text("""
WITH old AS MATERIALIZED (
    SELECT id AS job_id FROM jobs
     WHERE id < CAST(:floor AS uuid) AND finished_at < clock_timestamp() - :age_s * interval '1 s'
       AND NOT EXISTS (SELECT FROM callbacks WHERE callbacks.job_id = jobs.id
                          AND delivered_at IS NULL AND exhausted_at IS NULL)
       -- What a batch has not written into its files yet is kept for it.
       AND NOT EXISTS (
           SELECT FROM batches WHERE batches.id = jobs.batch_id
              AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling'))
     ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM jobs USING old WHERE id = job_id RETURNING id
), told AS (
    DELETE FROM callbacks USING gone WHERE callbacks.job_id = gone.id
)
DELETE FROM results USING gone WHERE results.job_id = gone.id RETURNING results.job_id
""")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What one look at the due jobs led to.

    Attributes:
        doorbells: What to ring now.
        verdicts: How many jobs got each verdict: alive, ring, lost, poison, unknown, cancelled,
            expired, parked (its doorbell waits its turn), spill (taken back from a provider's
            batch).
        unknown_calls: Calls that lost claims had begun, or that a provider's batch may have made:
            nobody knows what became of them.
    """

    doorbells: list[Doorbell]
    verdicts: dict[str, int]
    unknown_calls: int = 0


def overdue_doorbells(
    connection: sa.Connection, *, limit: int = 500, order: Order = Order.OLDEST
) -> list[Doorbell]:
    """Whom a sweep of up to `limit` jobs in this order would ring for, unless they are parked."""
    return [doorbell(row) for row in connection.execute(_SILENCE[order], {"limit": limit})]


def sweep(
    connection: sa.Connection,
    *,
    limit: int = 500,
    parked: Collection[uuid.UUID] = (),
    parked_s: float = RING_BACKOFF_MAX_S,
    order: Order = Order.OLDEST,
) -> Sweep:
    """Judge up to `limit` jobs whose timer is due; the caller commits, then rings.

    Args:
        connection: In a transaction.
        limit: Jobs at most.
        parked: Jobs whose doorbells wait their turn: they are looked at again later.
        parked_s: Seconds until then.
        order: Which of the due jobs, if there are more: the oldest, or fairly by tenant.
    """
    parameters = {"limit": limit, "parked": list(parked), "parked_s": parked_s}
    doorbells: list[Doorbell] = []
    verdicts: dict[str, int] = {}
    unknown_calls = 0
    turns: list[uuid.UUID] = []
    for row in connection.execute(_SWEEPS[order], parameters):
        verdicts[row.verdict] = verdicts.get(row.verdict, 0) + 1
        unknown_calls += row.charged
        if row.verdict in {"ring", "lost", "spill"}:
            doorbells.append(doorbell(row))
        elif row.was_turn:
            turns.append(row.id)
    if turns:
        doorbells += call_next(connection, turns)
    return Sweep(doorbells=doorbells, verdicts=verdicts, unknown_calls=unknown_calls)


def silent_doorbells(
    connection: sa.Connection,
    tier: str,
    *,
    silence_s: float = 5.0,
    limit: int = 1000,
    order: Order = Order.OLDEST,
) -> list[Doorbell]:
    """Due jobs of a tier that nobody rang for in `silence_s` seconds, marked as rung.

    The order lets a job behind a long backlog not wait until all of that is rung for.
    """
    parameters = {"tier": tier, "silence_s": silence_s, "limit": limit}
    rows = connection.execute(_RINGS[order], parameters)
    return [doorbell(row) for row in rows]


def prune(connection: sa.Connection, *, floor: uuid.UUID, age_s: float, limit: int = 1000) -> int:
    """Delete up to `limit` jobs and results that ended more than `age_s` seconds ago.

    What has a callback to be delivered stays until it is delivered or exhausted.

    Args:
        connection: In a transaction that the caller commits.
        floor: The smallest UUIDv7 of that age: ids are in order of time, so the primary key
            finds the old ones.
        age_s: Seconds since the job ended.
        limit: Jobs at most.
    """
    parameters = {"floor": floor, "age_s": age_s, "limit": limit}
    return len(connection.execute(_PRUNE, parameters).all())
