"""Read many jobs and results, a page at a time, with cursors that neither skip nor repeat.

**Jobs** come newest first. Their ids are in order of time, so a cursor is the last id that was
seen, and what is accepted meanwhile comes before the first page.

**Results** come as they land. A clock can't tell that order: of two transactions, the one that
took its time first may commit last, behind the back of a reader who has gone on. So each row has
the number of the transaction that wrote it, and a cursor holds what a Postgres snapshot is made of:
the number below which all is settled, and those below it that were still under way. What lands is
what the last snapshot could not see and the present one can, each row exactly once, however late
its transaction commits, and no reader waits for one that stays open.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from promptfleet_shared.jobs import JobError, JobKind, JobState, Result
from promptfleet_shared.store.cursors import Place, Snapshot, decode_job, encode_job
from promptfleet_shared.store.results import RESULT_COLUMNS, job_error, result_of

SCANNED_A_PAGE = 20_000
"""Jobs that a filter may look at for one page: a page may be short, or empty, and not the last."""
_FIRST = uuid.UUID(int=0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobRow:
    """A job as its tenant sees it, without its request.

    Attributes:
        attempts: That counted so far; the present one is among them.
        calls: Of providers, by all attempts; what the present one calls is not among them yet.
        batch_id: The API's batch that it is a line of.
        error: Of the last attempt that failed.
    """

    id: uuid.UUID
    tier: str
    kind: JobKind
    model: str | None
    state: JobState
    priority: int
    stream: bool
    input_tokens: int
    attempts: int
    deferrals: int
    calls: int
    cancel_requested: bool
    batch_id: uuid.UUID | None
    metadata: dict[str, Any]
    error: JobError | None
    created_at: dt.datetime
    run_at: dt.datetime
    deadline: dt.datetime
    finished_at: dt.datetime | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JobPage:
    """Some jobs.

    Attributes:
        cursor: Where the next page begins; None after the last one.
    """

    jobs: list[JobRow]
    cursor: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResultPage:
    """Some results, in the order in which they landed.

    Attributes:
        cursor: Where to go on, now or when more have landed.
        has_more: True if more are there already.
    """

    results: list[Result]
    cursor: str
    has_more: bool


_JOB_COLUMNS = """id, tier, kind, model, state, priority, stream, input_tokens, attempt, deferrals,
           calls, cancel_requested, batch_id, metadata, last_error, created_at, run_at, deadline,
           finished_at"""

_READ_JOBS = sa.text(f"""
SELECT {_JOB_COLUMNS} FROM jobs WHERE tenant = :tenant AND id = ANY(CAST(:ids AS uuid[]))
""")  # noqa: S608 - nothing of a caller's, here and below

# `edge` is where the look of a filter ends, so that one that hardly ever matches does not read a
# million jobs in one go. A batch has an index of its own, and an end.
_LIST_JOBS = sa.text(f"""
WITH edge AS MATERIALIZED (
    SELECT coalesce((
        SELECT id FROM jobs
         WHERE :filtered AND tenant = :tenant AND id < CAST(:before AS uuid)
         ORDER BY id DESC OFFSET :scanned - 1 LIMIT 1), CAST(:first AS uuid)) AS id
), page AS (
    SELECT {_JOB_COLUMNS} FROM jobs
     WHERE tenant = :tenant AND id < CAST(:before AS uuid) AND id >= (SELECT id FROM edge)
       AND (CAST(:state AS text) IS NULL OR state = :state)
       AND (CAST(:tier AS text) IS NULL OR tier = :tier)
       AND NOT EXISTS (
           SELECT FROM unnest(CAST(:names AS text[]), CAST(:values AS text[])) AS m (name, value)
            WHERE (metadata ->> name) IS DISTINCT FROM value)
     ORDER BY id DESC LIMIT :limit)
SELECT nullif(edge.id, CAST(:first AS uuid)) AS edge, page.* FROM edge LEFT JOIN page ON true
 ORDER BY page.id DESC
""").bindparams(first=_FIRST, scanned=SCANNED_A_PAGE)  # noqa: S608

_LIST_BATCH = sa.text(f"""
SELECT NULL AS edge, {_JOB_COLUMNS} FROM jobs
 WHERE batch_id = CAST(:batch_id AS uuid) AND tenant = :tenant AND id < CAST(:before AS uuid)
   AND (CAST(:state AS text) IS NULL OR state = :state)
   AND (CAST(:tier AS text) IS NULL OR tier = :tier)
   AND NOT EXISTS (
       SELECT FROM unnest(CAST(:names AS text[]), CAST(:values AS text[])) AS m (name, value)
        WHERE (metadata ->> name) IS DISTINCT FROM value)
 ORDER BY id DESC LIMIT :limit
""")  # noqa: S608

# Two ways into the same index: the few transactions that were open when the reader last looked,
# and all that came after. `seal` is the snapshot that the reader is reading up to: the present
# one, or that of the first of several pages.
_LANDED = """
WITH seal AS MATERIALIZED (
    SELECT coalesce(CAST(:seal AS pg_snapshot), pg_current_snapshot()) AS snapshot
), landed AS (
    (SELECT job_id, landed FROM results
      WHERE {scope} AND landed = ANY(CAST(:under_way AS xid8[]))
        AND (landed, job_id) > (CAST(:after AS xid8), CAST(:after_id AS uuid))
        AND pg_visible_in_snapshot(landed, (SELECT snapshot FROM seal))
      ORDER BY landed, job_id LIMIT :limit)
    UNION ALL
    (SELECT job_id, landed FROM results
      WHERE {scope}
        AND (landed, job_id) > (CAST(:from AS xid8), CAST(:from_id AS uuid))
        AND landed < (SELECT pg_snapshot_xmax(snapshot) FROM seal)
        AND pg_visible_in_snapshot(landed, (SELECT snapshot FROM seal))
      ORDER BY landed, job_id LIMIT :limit)
), page AS (SELECT * FROM landed ORDER BY landed, job_id LIMIT :limit)
SELECT (SELECT CAST(snapshot AS text) FROM seal) AS seal, CAST(page.landed AS text) AS landed,
       {columns}
  FROM (VALUES (1)) AS one LEFT JOIN page ON true LEFT JOIN results ON results.job_id = page.job_id
 ORDER BY page.landed, page.job_id
"""
_RESULT_NAMES = ", ".join(f"results.{column.name}" for column in RESULT_COLUMNS)
_LANDED_OF_TENANT = sa.text(_LANDED.format(scope="tenant = :tenant", columns=_RESULT_NAMES))
_LANDED_OF_BATCH = sa.text(
    _LANDED.format(
        scope="api_batch_id = CAST(:batch_id AS uuid) AND tenant = :tenant", columns=_RESULT_NAMES
    )
)


def read_jobs(
    connection: sa.Connection, ids: Sequence[uuid.UUID], *, tenant: str
) -> dict[uuid.UUID, JobRow]:
    """Those of the jobs that the tenant has."""
    rows = connection.execute(_READ_JOBS, {"tenant": tenant, "ids": list(ids)})
    return {row.id: _job(row) for row in rows}


def list_jobs(
    connection: sa.Connection,
    tenant: str,
    *,
    state: JobState | None = None,
    tier: str | None = None,
    metadata: Mapping[str, str] | None = None,
    batch_id: uuid.UUID | None = None,
    before: str | None = None,
    limit: int = 100,
) -> JobPage:
    """A tenant's jobs, the newest first.

    Args:
        connection: Read only.
        tenant: Whose.
        state: Only those in this state.
        tier: Only those of this tier.
        metadata: Only those whose metadata has these values, each as a text.
        batch_id: Only the lines of this batch.
        before: The cursor of the page before.
        limit: Jobs at most; a page of fewer, or of none, need not be the last.

    Raises:
        InvalidRequestError: The cursor is none of ours.
    """
    wanted = metadata or {}
    parameters: dict[str, Any] = {
        "tenant": tenant,
        "state": state,
        "tier": tier,
        "names": list(wanted),
        "values": list(wanted.values()),
        "before": decode_job(before),
        "limit": limit + 1,  # one more tells whether there is a next page
    }
    if batch_id is not None:
        rows = connection.execute(_LIST_BATCH, {**parameters, "batch_id": batch_id}).all()
    else:
        parameters["filtered"] = state is not None or tier is not None or bool(wanted)
        rows = connection.execute(_LIST_JOBS, parameters).all()
    found = [_job(row) for row in rows if row.id is not None]
    last = rows[0].edge if rows else None  # all from there on is looked at
    if len(found) > limit:
        found = found[:limit]
        last = found[-1].id
    cursor = None if last is None else encode_job(last)
    return JobPage(jobs=found, cursor=cursor)


def landed_results(
    connection: sa.Connection,
    tenant: str,
    *,
    after: str | None = None,
    limit: int = 100,
    batch_id: uuid.UUID | None = None,
) -> ResultPage:
    """A tenant's results in the order in which they landed, each exactly once.

    Args:
        connection: Read only.
        tenant: Whose.
        after: The cursor of the page before; None begins with the oldest that is kept.
        limit: Results at most.
        batch_id: Only those of this batch's lines; its cursors are good for it alone.

    Raises:
        InvalidRequestError: The cursor is none of ours.
    """
    place = Place.decode(after)
    parameters = {"tenant": tenant, "limit": limit + 1, **place.parameters()}
    if batch_id is None:
        rows = connection.execute(_LANDED_OF_TENANT, parameters).all()
    else:
        rows = connection.execute(_LANDED_OF_BATCH, {**parameters, "batch_id": batch_id}).all()
    seal = Snapshot.parse(rows[0].seal)
    # A seal that could not hold all that was under way sees less than the statement did.
    found = [row for row in rows if row.landed is not None and int(row.landed) < seal.below]
    if len(found) > limit:
        last = found[limit - 1]
        place = dataclasses.replace(place, seal=seal, last=(int(last.landed), last.job_id))
        has_more = True
    else:
        has_more = place.seal is not None  # it was taken some pages ago
        place = Place(seen=seal)
    results = [result_of(row) for row in found[:limit]]
    return ResultPage(results=results, cursor=place.encode(), has_more=has_more)


def newest_results(connection: sa.Connection) -> str:
    """The cursor that leaves out all that has landed so far."""
    snapshot = connection.execute(sa.text("SELECT CAST(pg_current_snapshot() AS text)"))
    return Place(seen=Snapshot.parse(snapshot.scalar_one())).encode()


def _job(row: Any) -> JobRow:
    return JobRow(
        id=row.id,
        tier=row.tier,
        kind=JobKind(row.kind),
        model=row.model,
        state=JobState(row.state),
        priority=row.priority,
        stream=row.stream,
        input_tokens=row.input_tokens,
        attempts=row.attempt,
        deferrals=row.deferrals,
        calls=row.calls,
        cancel_requested=row.cancel_requested,
        batch_id=row.batch_id,
        metadata=row.metadata or {},
        error=job_error(row.last_error),
        created_at=row.created_at,
        run_at=row.run_at,
        deadline=row.deadline,
        finished_at=row.finished_at,
    )
