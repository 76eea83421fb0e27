"""Batches of the HTTP API: made and read by their tenants, moved on by runners.

Any number of runners share the work. Who moves a batch on holds its lease, and each of its
statements asks for that lease and for what the batch was when it looked: a runner that was taken
for dead changes nothing any more. A batch that waits has its lease end when somebody should look
again.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Sequence
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from uuid_utils.compat import uuid7

from promptfleet_shared.errors import IdempotencyConflictError
from promptfleet_shared.jobs import JobSpec, Result
from promptfleet_shared.store.results import RESULT_COLUMNS, result_of
from promptfleet_shared.store.submissions import give_up_soon, insert_jobs

FINAL_STATUSES = frozenset({"failed", "completed", "expired", "cancelled"})
_LAST = uuid.UUID(int=2**128 - 1)

_COLUMNS = """id, tenant, endpoint, input_file_id, output_file_id, error_file_id, status, total,
       completed, failed, metadata, completion_window_s, callback_url, errors, created_at,
       in_progress_at, finalizing_at, completed_at, failed_at, expired_at, cancelling_at,
       cancelled_at, expires_at, next_line, jobs, model, usage, output_ttl_s, idempotency_key,
       extract(epoch FROM expires_at - clock_timestamp())::float8 AS remaining_s"""

_CREATE = sa.text(f"""
INSERT INTO batches (id, tenant, endpoint, input_file_id, metadata, completion_window_s,
                     callback_url, output_ttl_s, idempotency_key, created_at, expires_at)
SELECT :id, :tenant, :endpoint, :input_file_id, :metadata, :completion_window_s, :callback_url,
       :output_ttl_s, :idempotency_key, now, now + :completion_window_s * interval '1 second'
  FROM (SELECT clock_timestamp() AS now) AS clock
ON CONFLICT DO NOTHING
RETURNING {_COLUMNS}
""").bindparams(  # noqa: S608 - nothing of a caller's, here and below
    sa.bindparam("metadata", type_=pg.JSONB(none_as_null=True)),
    sa.bindparam("completion_window_s", type_=sa.Integer),
    sa.bindparam("output_ttl_s", type_=sa.Integer),
)

_BY_KEY = sa.text(f"""
SELECT {_COLUMNS} FROM batches
 WHERE tenant = :tenant AND (id = :id OR idempotency_key = :idempotency_key)
""")  # noqa: S608

_READ = sa.text(f"SELECT {_COLUMNS} FROM batches WHERE id = :id AND tenant = :tenant")  # noqa: S608

_LIST = sa.text(f"""
SELECT {_COLUMNS} FROM batches WHERE tenant = :tenant AND id < CAST(:after AS uuid)
 ORDER BY id DESC LIMIT :limit
""")  # noqa: S608

_COUNT_OPEN = sa.text("""
SELECT count(*) FROM batches
 WHERE tenant = :tenant AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
""")

# Whoever waits for the next look is called at once; who is at work notices by itself.
_CANCEL = sa.text(f"""
WITH found AS MATERIALIZED (
    SELECT id AS batch_id FROM batches WHERE id = :id AND tenant = :tenant FOR UPDATE
), asked AS (
    UPDATE batches SET status = 'cancelling', cancelling_at = clock_timestamp(),
           lease_until = CASE WHEN lease_owner IS NOT NULL THEN lease_until END
      FROM found WHERE id = batch_id AND status IN ('validating', 'in_progress')
    RETURNING {_COLUMNS}
)
SELECT true AS done, asked.* FROM asked
UNION ALL
SELECT false, {_COLUMNS} FROM batches JOIN found ON id = batch_id
 WHERE NOT EXISTS (SELECT FROM asked)
""")  # noqa: S608

_CLAIM = sa.text("""
SELECT batch, whose FROM promptfleet_claim_batches(:runner, CAST(:lease_s AS float8), :most)
""")

_HELD = "id = :id AND tenant = :tenant AND lease_owner = :runner"
_LEASE = "lease_until = clock_timestamp() + CAST(:lease_s AS float8) * interval '1 second'"

_HOLD = sa.text(f"UPDATE batches SET {_LEASE} WHERE {_HELD} RETURNING {_COLUMNS}")  # noqa: S608

_PAUSE = sa.text(f"UPDATE batches SET lease_owner = NULL, {_LEASE} WHERE {_HELD}")  # noqa: S608

_BEGIN = sa.text(f"""
UPDATE batches SET status = 'in_progress', in_progress_at = clock_timestamp(), total = :total,
       model = :model, {_LEASE}
 WHERE {_HELD} AND status = 'validating' RETURNING {_COLUMNS}
""")  # noqa: S608

_ADVANCE = sa.text(f"""
UPDATE batches SET next_line = next_line + :lines, jobs = jobs + :jobs, {_LEASE}
 WHERE {_HELD} AND next_line = :start
   AND (status = 'in_progress' AND expires_at > clock_timestamp()
        OR :jobs = 0 AND status IN ('in_progress', 'cancelling'))
RETURNING id
""").bindparams(sa.bindparam("jobs", type_=sa.Integer))  # noqa: S608

_ADD_LINES = sa.text("""
INSERT INTO batch_lines (batch_id, n, tenant, custom_id, job_id, error)
SELECT :id, n, :tenant, custom_id, job_id, error
  FROM json_to_recordset(CAST(:records AS json)) AS r (
      n int, custom_id text, job_id uuid, error jsonb)
""")

_PROGRESS = sa.text(f"""
WITH counted AS MATERIALIZED (
    SELECT count(*) FILTER (WHERE state = 'succeeded') AS good,
           count(*) FILTER (WHERE state = 'failed') AS bad, count(*) AS landed
      FROM results WHERE api_batch_id = :id AND tenant = :tenant
), seen AS (
    UPDATE batches SET completed = good, failed = bad, {_LEASE},
           status = CASE WHEN status = 'in_progress' AND next_line = total AND landed >= jobs
                    THEN 'finalizing' ELSE status END,
           finalizing_at = CASE WHEN status = 'in_progress' AND next_line = total
                           AND landed >= jobs THEN clock_timestamp() ELSE finalizing_at END
      FROM counted WHERE {_HELD} AND status IN ('in_progress', 'cancelling')
    RETURNING {_COLUMNS}, next_line = total AND landed >= jobs AS ended
)
SELECT * FROM seen
""")  # noqa: S608

_UNFINISHED = sa.text("""
SELECT id FROM jobs
 WHERE batch_id = :id AND tenant = :tenant AND finished_at IS NULL AND NOT cancel_requested
 LIMIT :limit
""")

_RESULT_NAMES = ", ".join(f"results.{column.name}" for column in RESULT_COLUMNS)
_READ_LINES = sa.text(f"""
WITH page AS MATERIALIZED (
    SELECT n, custom_id, job_id AS wanted_id, error AS line_error FROM batch_lines
     WHERE batch_id = :id AND tenant = :tenant AND n >= :start ORDER BY n LIMIT :limit)
SELECT page.*, {_RESULT_NAMES}
  FROM page LEFT JOIN results ON results.job_id = wanted_id AND results.tenant = :tenant
 ORDER BY n
""")  # noqa: S608

_END = f"""
UPDATE batches SET status = :status, {{at}} = clock_timestamp(), errors = :errors,
       completed = :completed, failed = :failed, output_file_id = :output, error_file_id = :error,
       usage = :usage, lease_owner = NULL, lease_until = NULL
 WHERE {_HELD} AND status = ANY(:before) RETURNING {_COLUMNS}
"""  # noqa: S608
_MAY_END = {
    "failed": ["validating"],
    "completed": ["finalizing"],
    "expired": ["finalizing"],
    "cancelled": ["cancelling"],
}
_ENDS = {
    status: sa.text(_END.format(at=f"{status}_at")).bindparams(
        sa.bindparam("errors", type_=pg.JSONB(none_as_null=True)),
        sa.bindparam("usage", type_=pg.JSONB(none_as_null=True)),
        sa.bindparam("before", type_=pg.ARRAY(sa.Text)),
    )
    for status in FINAL_STATUSES
}

_TELL = sa.text("""
INSERT INTO callbacks (tenant, url, event, payload) VALUES (:tenant, :url, :event, :payload)
""").bindparams(sa.bindparam("payload", type_=pg.JSON))

_PRUNE = sa.text("""
WITH old AS MATERIALIZED (
    SELECT id AS batch_id FROM batches
     WHERE id < CAST(:floor AS uuid)
       AND status IN ('failed', 'completed', 'expired', 'cancelled')
       AND coalesce(completed_at, expired_at, cancelled_at, failed_at)
           < clock_timestamp() - :age_s * interval '1 second'
     ORDER BY id LIMIT :limit FOR UPDATE SKIP LOCKED
), lines AS (
    DELETE FROM batch_lines USING old WHERE batch_lines.batch_id = old.batch_id
), told AS (
    DELETE FROM callbacks
     WHERE job_id IS NULL AND created_at < clock_timestamp() - :age_s * interval '1 second'
       AND (delivered_at IS NOT NULL OR exhausted_at IS NOT NULL)
)
DELETE FROM batches USING old WHERE id = batch_id RETURNING id
""")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewBatch:
    """What a tenant asks for.

    Attributes:
        endpoint: That of all lines.
        metadata: Up to 16 texts by name.
        completion_window_s: Seconds until what has not ended expires.
        callback_url: Where the batch's end is posted.
        output_ttl_s: Seconds that its output files are kept; None for never deleting them.
    """

    id: uuid.UUID
    tenant: str
    endpoint: str
    input_file_id: uuid.UUID
    metadata: dict[str, str] | None = None
    completion_window_s: int = 86_400
    callback_url: str | None = None
    output_ttl_s: int | None = None
    idempotency_key: str | None = None

    def is_like(self, batch: Batch) -> bool:
        """True if the batch was asked for in the same words."""
        mine = dataclasses.asdict(self)
        return all(getattr(batch, name) == value for name, value in mine.items() if name != "id")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A batch as it stands.

    Attributes:
        total: Its lines, once they were all read.
        completed: Lines whose job has succeeded.
        failed: Lines whose job has failed.
        errors: What was wrong with its input, by OpenAI's `errors.data`.
        next_line: The first line that was not taken on yet.
        jobs: Of the lines that were taken on; those that an end came before have none.
        model: That of all lines; None if they name several, or before they were read.
        usage: Tokens of all results, once it has ended.
        remaining_s: Seconds from the look until it expires.
    """

    id: uuid.UUID
    tenant: str
    endpoint: str
    input_file_id: uuid.UUID
    output_file_id: uuid.UUID | None
    error_file_id: uuid.UUID | None
    status: str
    total: int
    completed: int
    failed: int
    metadata: dict[str, str] | None
    completion_window_s: int
    callback_url: str | None
    errors: list[dict[str, Any]] | None
    created_at: dt.datetime
    in_progress_at: dt.datetime | None
    finalizing_at: dt.datetime | None
    completed_at: dt.datetime | None
    failed_at: dt.datetime | None
    expired_at: dt.datetime | None
    cancelling_at: dt.datetime | None
    cancelled_at: dt.datetime | None
    expires_at: dt.datetime
    next_line: int
    jobs: int
    model: str | None
    usage: dict[str, Any] | None
    output_ttl_s: int | None
    idempotency_key: str | None
    remaining_s: float

    @property
    def is_final(self) -> bool:
        """True if nothing will change any more."""
        return self.status in FINAL_STATUSES


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NewLine:
    """A line to take on.

    Attributes:
        n: Its place, from 0.
        spec: Its job.
        error: Why it has none, as its line of the error file tells it.
    """

    n: int
    custom_id: str
    spec: JobSpec | None = None
    error: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EndedLine:
    """A line, and what became of it.

    Attributes:
        job_id: Its job; None if it has none.
        result: Of that job; None if it is not there (any more).
        error: Why it has no job.
    """

    n: int
    custom_id: str
    job_id: uuid.UUID | None
    result: Result | None
    error: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """How a batch ends.

    Attributes:
        status: One of the final ones.
        errors: What was wrong with its input.
        output: The file of answers; None where there are none.
        error: The file of errors.
    """

    status: str
    completed: int = 0
    failed: int = 0
    errors: list[dict[str, Any]] | None = None
    output: uuid.UUID | None = None
    error: uuid.UUID | None = None
    usage: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A batch that a runner holds: what its statements ask for.

    Attributes:
        runner: The name that the lease is in; no two runners have the same.
        lease_s: Seconds for which each statement extends it.
    """

    id: uuid.UUID
    tenant: str
    runner: str
    lease_s: float

    @property
    def parameters(self) -> dict[str, Any]:
        """What the statements are given."""
        return dataclasses.asdict(self)


def create_batch(connection: sa.Connection, new: NewBatch) -> tuple[Batch, bool]:
    """Make a batch, or find that of an earlier call under the same key; the caller commits.

    May be repeated after a lost reply.

    Returns:
        The batch, and whether it is a new one.

    Raises:
        IdempotencyConflictError: The key was used for another batch.
    """
    parameters = dataclasses.asdict(new)
    row = connection.execute(_CREATE, parameters).first()
    if row is not None:
        return _batch(row), True
    known = _batch(connection.execute(_BY_KEY, parameters).one())
    if not new.is_like(known):
        raise IdempotencyConflictError(field="idempotency_key")
    return known, False


def read_batch(connection: sa.Connection, batch_id: uuid.UUID, *, tenant: str) -> Batch | None:
    """A tenant's batch, if there is such a one."""
    return _maybe(connection.execute(_READ, {"id": batch_id, "tenant": tenant}).first())


def list_batches(
    connection: sa.Connection, *, tenant: str, after: uuid.UUID | None = None, limit: int = 20
) -> tuple[list[Batch], bool]:
    """A tenant's batches, the newest first, and whether there are more."""
    parameters = {"tenant": tenant, "after": after or _LAST, "limit": limit + 1}
    rows = connection.execute(_LIST, parameters).all()
    return [_batch(row) for row in rows[:limit]], len(rows) > limit


def open_batches(connection: sa.Connection, *, tenant: str) -> int:
    """How many of a tenant's batches have not ended."""
    return int(connection.execute(_COUNT_OPEN, {"tenant": tenant}).scalar_one())


def cancel_batch(
    connection: sa.Connection, batch_id: uuid.UUID, *, tenant: str
) -> tuple[Batch, bool] | None:
    """Ask for a batch's end; the caller commits.

    Returns:
        The batch, and whether this call made it `cancelling`; None if there is no such batch.
    """
    row = connection.execute(_CANCEL, {"id": batch_id, "tenant": tenant}).first()
    return None if row is None else (_batch(row), row.done)


def claim_batches(
    connection: sa.Connection, runner: str, *, lease_s: float, limit: int
) -> list[Held]:
    """Take up to `limit` batches of any tenants that somebody should look at now."""
    parameters = {"runner": runner, "lease_s": lease_s, "most": limit}
    rows = connection.execute(_CLAIM, parameters)
    return [Held(id=row[0], tenant=row[1], runner=runner, lease_s=lease_s) for row in rows]


def hold_batch(connection: sa.Connection, held: Held) -> Batch | None:
    """Extend the lease and look; None if the batch is somebody else's by now. Here and below."""
    return _maybe(connection.execute(_HOLD, held.parameters).first())


def pause_batch(connection: sa.Connection, held: Held, pause_s: float) -> None:
    """Give the batch back, for whoever looks at it after `pause_s` seconds."""
    connection.execute(_PAUSE, {**held.parameters, "lease_s": pause_s})


def begin_batch(
    connection: sa.Connection, held: Held, *, total: int, model: str | None
) -> Batch | None:
    """A valid batch goes into progress."""
    parameters = {**held.parameters, "total": total, "model": model}
    return _maybe(connection.execute(_BEGIN, parameters).first())


def add_lines(connection: sa.Connection, held: Held, lines: Sequence[NewLine]) -> bool:
    """Take on some neighbouring lines, all or none: their jobs are queued.

    Returns:
        False if nothing was done: the batch is somebody else's, or it was cancelled or has expired
        and the lines have jobs, or the lines are not those that come next.
    """
    specs = [line.spec for line in lines if line.spec is not None]
    give_up_soon(connection)
    parameters = {"lines": len(lines), "jobs": len(specs), "start": lines[0].n}
    if connection.execute(_ADVANCE, {**held.parameters, **parameters}).first() is None:
        return False
    insert_jobs(connection, specs)
    records = orjson.dumps([_line_record(line) for line in lines]).decode()
    connection.execute(_ADD_LINES, {"id": held.id, "tenant": held.tenant, "records": records})
    return True


def note_progress(connection: sa.Connection, held: Held) -> tuple[Batch, bool] | None:
    """Count what has ended; a batch in progress whose last result has landed is finalizing.

    Returns:
        The batch, and whether all of its lines have ended.
    """
    row = connection.execute(_PROGRESS, held.parameters).first()
    return None if row is None else (_batch(row), row.ended)


def unfinished_jobs(connection: sa.Connection, held: Held, *, limit: int) -> list[uuid.UUID]:
    """Some of the batch's jobs that have not ended and were not told to."""
    parameters = {"id": held.id, "tenant": held.tenant, "limit": limit}
    return list(connection.execute(_UNFINISHED, parameters).scalars())


def read_lines(connection: sa.Connection, held: Held, *, start: int, limit: int) -> list[EndedLine]:
    """Up to `limit` lines from `start` on, with their results."""
    parameters = {"id": held.id, "tenant": held.tenant, "start": start, "limit": limit}
    return [
        EndedLine(
            n=row.n,
            custom_id=row.custom_id,
            job_id=row.wanted_id,
            result=None if row.job_id is None else result_of(row),
            error=row.line_error,
        )
        for row in connection.execute(_READ_LINES, parameters).all()
    ]


def end_batch(connection: sa.Connection, held: Held, ending: Ending) -> Batch | None:
    """A batch ends, and whoever wants to hear of it is told."""
    values = dataclasses.asdict(ending)
    parameters = {**held.parameters, **values, "before": _MAY_END[ending.status]}
    batch = _maybe(connection.execute(_ENDS[ending.status], parameters).first())
    if batch is not None and batch.callback_url is not None:
        _tell(connection, batch)
    return batch


def prune_batches(
    connection: sa.Connection, *, floor: uuid.UUID, age_s: float, limit: int = 5
) -> int:
    """Delete up to `limit` batches that ended more than `age_s` seconds ago, of all tenants.

    Their files go by their own dates. `floor` is as for `sweeping.prune`.
    """
    parameters = {"floor": floor, "age_s": age_s, "limit": limit}
    return len(connection.execute(_PRUNE, parameters).all())


def _tell(connection: sa.Connection, batch: Batch) -> None:
    """What OpenAI's webhooks say: https://platform.openai.com/docs/api-reference/webhook-events."""
    ended_at: dt.datetime = getattr(batch, f"{batch.status}_at")
    event = f"batch.{batch.status}"
    payload = {
        "id": f"evt_{uuid7().hex}",
        "object": "event",
        "created_at": int(ended_at.timestamp()),
        "type": event,
        "data": {"id": f"batch_{batch.id.hex}"},
    }
    parameters = {"tenant": batch.tenant, "url": batch.callback_url, "event": event}
    connection.execute(_TELL, {**parameters, "payload": payload})


def _line_record(line: NewLine) -> dict[str, Any]:
    record: dict[str, Any] = {"n": line.n, "custom_id": line.custom_id}
    if line.spec is not None:
        record["job_id"] = line.spec.id
    if line.error is not None:
        record["error"] = line.error
    return record


def _maybe(row: Any) -> Batch | None:
    return None if row is None else _batch(row)


def _batch(row: Any) -> Batch:
    return Batch(**{name: getattr(row, name) for name in _FIELDS})


_FIELDS = tuple(field.name for field in dataclasses.fields(Batch))
