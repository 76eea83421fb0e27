"""Delete single jobs with their results, before the retention time is over."""

from __future__ import annotations

import enum
import uuid
from typing import Any

import sqlalchemy as sa

# What is still to be told of, or to be written into a batch's files, is kept for that.
_DELETE = sa.text("""
WITH found AS MATERIALIZED (
    SELECT id AS job_id, finished_at IS NULL
           OR EXISTS (SELECT FROM callbacks WHERE callbacks.job_id = jobs.id
                         AND delivered_at IS NULL AND exhausted_at IS NULL)
           OR EXISTS (
               SELECT FROM batches WHERE batches.id = jobs.batch_id
                  AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')) AS used
      FROM jobs WHERE id = :id AND tenant = :tenant FOR UPDATE
), gone AS (
    DELETE FROM jobs USING found WHERE id = job_id AND tenant = :tenant AND NOT used RETURNING id
), told AS (
    DELETE FROM callbacks USING gone WHERE callbacks.job_id = gone.id AND tenant = :tenant
), result AS (
    DELETE FROM results USING gone WHERE results.job_id = gone.id AND tenant = :tenant
)
SELECT used FROM found
""")


class Deletion(enum.Enum):
    """What became of the wish to delete something."""

    DONE = "done"
    MISSING = "missing"
    IN_USE = "in use"


def delete_job(connection: sa.Connection, job_id: uuid.UUID, *, tenant: str) -> Deletion:
    """Delete a job that has ended, its result and its callbacks; the ledger keeps what it cost.

    A job is in use until it has ended, its callback is delivered or given up, and the batch that it
    is a line of has written its files.
    """
    row: Any = connection.execute(_DELETE, {"id": job_id, "tenant": tenant}).first()
    if row is None:
        return Deletion.MISSING
    return Deletion.IN_USE if row.used else Deletion.DONE
