"""Jobs for tests, and the rows that tell what became of them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import orjson
import sqlalchemy as sa
from uuid_utils.compat import uuid7

from promptfleet_shared.jobs import ClaimedJob, JobSpec, JobState, Outcome
from promptfleet_shared.store.claims import claim
from promptfleet_shared.store.submissions import insert_jobs
from promptfleet_shared.store.tables import callbacks, jobs, ledger, results

Row = sa.RowMapping


def chat(text: str, **parameters: object) -> bytes:
    """A chat request as it is stored."""
    body = {"messages": [{"role": "user", "content": text}], **parameters}
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


def spec(text: str = "Hello", **fields: Any) -> JobSpec:
    """A job that asks `text`, with a minute to live."""
    values: dict[str, Any] = {
        "id": uuid7(),
        "tier": "basic",
        "request": chat(text),
        "input_tokens": 4,
        "deadline_s": 60.0,
        **fields,
    }
    return JobSpec(**values)


def insert(database: sa.Engine, *specs: JobSpec) -> list[uuid.UUID]:
    """Insert in one transaction."""
    with database.begin() as connection:
        return insert_jobs(connection, specs)


def claim_one(database: sa.Engine, job_id: uuid.UUID, *, lease_s: float = 45.0) -> ClaimedJob:
    """Claim a job that must be claimable."""
    claimed = claim_some(database, [job_id], lease_s=lease_s)
    assert len(claimed) == 1, job_row(database, job_id)
    return claimed[0]


def claim_some(
    database: sa.Engine, ids: Sequence[uuid.UUID], *, worker: str = "w", lease_s: float = 45.0
) -> list[ClaimedJob]:
    """Claim in one transaction."""
    with database.begin() as connection:
        return claim(connection, ids, worker=worker, lease_s=lease_s)


def outcome(job: ClaimedJob, **fields: Any) -> Outcome:
    """A success of this claim."""
    values: dict[str, Any] = {
        "job_id": job.id,
        "fence": job.fence,
        "state": JobState.SUCCEEDED,
        "text": "An answer",
        "response": b'{"choices":[]}',
        "calls": 1,
        **fields,
    }
    return Outcome(**values)


def job_row(database: sa.Engine, job_id: uuid.UUID) -> Row:
    """The row of a job."""
    return _rows(database, sa.select(jobs).where(jobs.c.id == job_id))[0]


def result_rows(database: sa.Engine, job_id: uuid.UUID) -> list[Row]:
    """The results rows of a job: one or none, if all is well."""
    return _rows(database, sa.select(results).where(results.c.job_id == job_id))


def ledger_rows(database: sa.Engine, job_id: uuid.UUID) -> list[Row]:
    """What was paid for a job."""
    return _rows(database, sa.select(ledger).where(ledger.c.job_id == job_id))


def callback_rows(database: sa.Engine, job_id: uuid.UUID) -> list[Row]:
    """The outbox rows of a job."""
    return _rows(database, sa.select(callbacks).where(callbacks.c.job_id == job_id))


def change(database: sa.Engine, job_id: uuid.UUID, **sql: str) -> None:
    """Set columns of a job to SQL expressions: a time machine for the database's clock."""
    assignments = ", ".join(f"{name} = {expression}" for name, expression in sql.items())
    with database.begin() as connection:
        connection.execute(sa.text(f"UPDATE jobs SET {assignments} WHERE id = :id"), {"id": job_id})


def ago(seconds: float) -> str:
    """An SQL expression for an instant in the past (or, if negative, to come)."""
    return f"clock_timestamp() - interval '{seconds} seconds'"


def _rows(database: sa.Engine, query: sa.Select[Any]) -> list[Row]:
    with database.connect() as connection:
        return list(connection.execute(query).mappings())
