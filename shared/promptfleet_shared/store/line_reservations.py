"""What lines of providers' batches have reserved of budgets.

Redis counts it, and no worker holds it: whether a line still waits for its answer is known here.
`reserved` is nanodollars by "budget:value".
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import sqlalchemy as sa

Place = tuple[uuid.UUID, int]
FIRST: Place = (uuid.UUID(int=0), 0)
"""Where a walk over all lines begins."""

_WAITING = sa.text("""
SELECT line.job_id, line.fence, line.reserved FROM provider_batch_lines AS line
  JOIN jobs ON jobs.id = line.job_id AND jobs.fence = line.fence AND jobs.state = 'submitted'
 WHERE line.reserved ?| CAST(:keys AS text[])
   AND (line.job_id, line.fence) > (CAST(:job_id AS uuid), CAST(:fence AS bigint))
 ORDER BY line.job_id, line.fence LIMIT :limit
""")

# What landed was settled with its answer.
_IDLE = sa.text("""
WITH idle AS MATERIALIZED (
    SELECT job_id AS idle_id, fence AS idle_fence, reserved AS had FROM provider_batch_lines AS line
     WHERE batch_id = :batch_id AND tenant = :tenant AND reserved IS NOT NULL
       AND NOT EXISTS (SELECT FROM jobs WHERE jobs.id = line.job_id AND jobs.fence = line.fence
                          AND state IN ('submitted', 'succeeded'))
     ORDER BY job_id LIMIT :limit FOR UPDATE)
UPDATE provider_batch_lines SET reserved = NULL FROM idle
 WHERE job_id = idle_id AND fence = idle_fence
RETURNING job_id, fence, had AS reserved
""")


class ReservedLine(NamedTuple):
    """A line, by its job and the fence of the claim that was given away, and what it has."""

    job_id: uuid.UUID
    fence: int
    reserved: Mapping[str, int]


def waiting_lines(
    connection: sa.Connection, keys: Sequence[str], *, after: Place, limit: int
) -> list[ReservedLine]:
    """Up to `limit` lines of any tenant that wait, and have reserved something of these keys."""
    parameters = {"keys": list(keys), "job_id": after[0], "fence": after[1], "limit": limit}
    return [ReservedLine(*row) for row in connection.execute(_WAITING, parameters)]


def free_idle_lines(
    connection: sa.Connection, batch_id: uuid.UUID, *, tenant: str, limit: int
) -> list[ReservedLine]:
    """Up to `limit` of a batch's lines that nobody waits for: they have reserved nothing now.

    Returns:
        What they had.
    """
    parameters = {"batch_id": batch_id, "tenant": tenant, "limit": limit}
    return [ReservedLine(*row) for row in connection.execute(_IDLE, parameters)]
